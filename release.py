"""Make the released model from its data: every step from raw files to a folder that is ready to be pushed.

    python release.py --fer2013 fer2013.csv --ferplus fer2013new.csv --faces FACES --out runs/release
    python release.py ... --scale gpu             # ViT-Small at 96 px, hundreds of epochs
    python release.py ... --minutes 9             # stops in time; the same command goes on

prepare the data -> pretrain on faces without labels -> image stage -> label the unlabelled faces and train
again -> the better of the two by validation, calibrated and judged -> temporal stage on simulated streams ->
card -> exports. Steps that are done are not done again, and one that was interrupted goes on. Each is a
command that is printed and can be run by hand; what they took and gave is in OUT/summary.json.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_fer.evaluation.metrics import write_whole
from pseudo_label import run_command

ROOT = Path(__file__).parent
STAGES = ("pretrain", "image", "second", "video")
SCALED = {*STAGES, "accelerate", "select", "streams", "folds"}  # what a file of configs/release/ may hold
OWN_WEIGHT = "0.5"  # of FER2013's own label, beside the votes of FER+
# For glibc: freed memory is kept, and lies on huge pages. What it gains on a CPU is in docs/experiments.md.
HUGE_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Step:
    """One command, and the file or folder that is there once it is done."""

    name: str
    command: list[str]
    made: Path


@dataclass(frozen=True)
class Release:
    """What a release is made of.

    Attributes:
        out: folder of everything that is made.
        scale: name of a file in `configs/release/`: what differs there from `configs/release_*.yaml`.
        fer2013, ferplus: files of FER2013 and of the votes of FER+.
        faces: folder of faces without labels.
        repo: org/name on the Hub, for the card.
    """

    out: Path
    scale: str
    fer2013: str
    ferplus: str
    faces: str
    repo: str

    def scaled(self) -> dict[str, Any]:
        """What the scale changes: options of each stage, and flags of other commands.

        Raises:
            ValueError: the file names something else.
        """
        path = ROOT / "configs" / "release" / f"{self.scale}.yaml"
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if unknown := sorted(found.keys() - SCALED):
            raise ValueError(f"{path}: {', '.join(unknown)} is none of {', '.join(sorted(SCALED))}")
        return found

    def config(self, stage: str) -> Path:
        """Where the configuration of a stage is written."""
        return self.out / "configs" / f"{stage}.yaml"

    def write_configs(self) -> None:
        """Write each stage's configuration: the common one, what the scale changes, and where all lies."""
        out, data, scaled = self.out, self.out / "data", self.scaled()
        unlabelled, encoder = f",unlabelled={data / 'faces'}", out / "pretrain" / "model"
        places: dict[str, dict[str, Any]] = {
            "pretrain": {"data": f"labelled={data / 'fer2013'}{unlabelled}"},
            "image": {"data": f"labelled={data / 'blend'}{unlabelled}", "encoder": encoder},
            "second": {"data": data / "blend", "encoder": out / "image" / "model"},
            "video": {"data": data / "streams", "encoder": out / "final" / "model"},
        }
        for stage, place in places.items():
            common = yaml.safe_load((ROOT / "configs" / f"release_{stage}.yaml").read_text(encoding="utf-8"))
            given = {name: str(value) for name, value in {**place, "output_dir": out / stage}.items()}
            content = yaml.safe_dump({**common, **scaled.get(stage, {}), **given}, sort_keys=False)
            write_whole(self.config(stage), content.encode())

    def better(self) -> Path:
        """The run of the first or of the second round, by macro F1 on validation; the first on a tie."""
        runs = (self.out / "image", self.out / "second" / "round-1" / "run")
        scores = [json.loads((run / "metrics.json").read_text())["macro_f1_present"] for run in runs]
        return runs[scores[1] > scores[0]]

    def steps(self) -> Iterator[Step]:
        """Yield what is to be done, in order; a step is asked for when those before it are done."""
        scaled, out, final, video = self.scaled(), self.out, self.out / "final", self.out / "video"
        fer2013, blend, faces, streams = (
            str(out / "data" / n) for n in ("fer2013", "blend", "faces", "streams")
        )
        fer, image_model = [sys.executable, "-m", "modeling_fer.cli"], str(final / "model")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        launch += ["--config_file", str(ROOT / scaled["accelerate"])]

        def prepare(source: str, folder: str, *flags: str) -> Step:
            command = [*fer, "data", "prepare", source, *flags, "--out", folder, "--overwrite"]
            return Step(f"data: {Path(folder).name}", command, Path(folder, "report.json"))

        def script(name: str, stage: str, *flags: str) -> list[str]:
            return [*launch, str(ROOT / name), "--config", str(self.config(stage)), *flags]

        csv = ("--csv", self.fer2013, "--rule", "fer2013", "--drop-duplicates")
        yield prepare("fer2013", fer2013, *csv)
        yield prepare("fer2013", blend, *csv, "--ferplus", self.ferplus, "--own_weight", OWN_WEIGHT)
        yield prepare("folder", faces, "--root", self.faces, "--unlabeled", "True")
        resume = ("--resume", "auto")
        yield Step(
            "pretraining", script("train.py", "pretrain", *resume), out / "pretrain/learning_curve.png"
        )
        yield Step("image stage", script("train.py", "image", *resume), out / "image/metrics.json")
        rounds = [sys.executable, str(ROOT / "pseudo_label.py"), "rounds", "--rounds", "1"]
        rounds += ["--model", str(out / "image/model"), "--images", faces, "--labelled", blend]
        rounds += ["--out", str(out / "second"), "--config", str(self.config("second"))]
        rounds += ["--launch", shlex.join(launch), *map(str, scaled.get("select", []))]
        yield Step("labelling and second round", rounds, out / "second/round-1/run/metrics.json")
        calibrate = [*fer, "calibrate", "--model", str(self.better() / "model"), "--data", fer2013]
        yield Step("calibration", [*calibrate, "--grey", "--half", "--out", str(final)], final / "model")
        judge = [*fer, "eval", "--model", image_model, "--data", fer2013, "--out", str(final / "validation")]
        yield Step("evaluation", judge, final / "validation/metrics.json")
        yield prepare("streams", streams, "--stills", fer2013, *map(str, scaled.get("streams", [])))
        yield Step("temporal stage", script("train.py", "video", *resume), video / "metrics.json")
        folds = ["--k", str(scaled.get("folds", 3)), "--out", str(video / "folds")]
        folds += ["--model", str(video / "model")]
        cross_validation = video / "folds/cross_validation.json"
        yield Step("temporal folds", script("cross_validate.py", "video", *folds), cross_validation)
        judge = [*fer, "eval", "--model", str(video / "model"), "--against", image_model, "--data", streams]
        judge += ["--split", "test", "--out", str(video / "test")]
        yield Step("temporal evaluation", judge, video / "test/comparison.json")
        card = [*fer, "card", str(final), "--repo", self.repo, "--eval", str(final / "validation")]
        yield Step("card", card, final / "model/README.md")
        export = [*fer, "export", image_model, "--format", "vit", "onnx", "--int8", "--check", fer2013]
        yield Step("export", [*export, "--out", str(out / "export")], out / "export/config.json")

    def summary(self) -> dict[str, Any]:
        """What each training took (device, seconds, energy, memory), and what each stage scored."""
        took, scores = {}, {}
        second = self.out / "second/round-1/run"
        for name, run in {
            "image": self.out / "image",
            "second": second,
            "final": self.out / "final/validation",
        }.items():
            found = json.loads((run / "metrics.json").read_text())
            scores[name] = {key: found[key] for key in ("accuracy", "macro_f1_present", "ece")}
        for name in ("pretrain", "image", "second", "video"):
            run = second if name == "second" else self.out / name
            took[name] = json.loads((run / "environment.json").read_text())
        scores["streams"] = json.loads((self.out / "video/test/comparison.json").read_text())
        return {"chosen": self.better().relative_to(self.out).as_posix(), "scores": scores, "took": took}


def run_step(step: Step, record: Path, deadline: float | None) -> None:
    """Run a step unless it is done; its record adds up what it took.

    Raises:
        ValueError: it was begun with another command.
        subprocess.CalledProcessError: the command failed; it has told why.
        subprocess.TimeoutExpired: the deadline came first; the command was told to end.
    """
    told: dict[str, Any] = {"name": step.name, "command": step.command, "seconds": 0.0, "done": False}
    if record.exists():
        told = json.loads(record.read_text())
    if told["command"] != step.command:
        raise ValueError(
            f"{record}: {step.name} was begun with another command; use the options of then, or another --out"
        )
    if told["done"] and step.made.exists():
        return
    print(f"\n{step.name}", flush=True)
    clock = time.monotonic()
    try:
        run_command(step.command, None if deadline is None else max(0.1, deadline - clock))
        told["done"] = True
    finally:
        told["seconds"] = round(told["seconds"] + time.monotonic() - clock, 1)
        write_whole(record, (json.dumps(told, indent=2) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    """Run from the command line: what the user can mend is one line, not a traceback."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, help in {
        "fer2013": "csv file of FER2013, may be compressed",
        "ferplus": "csv file of the votes of FER+",
        "faces": "folder of further faces, whose labels are not looked at",
    }.items():
        parser.add_argument(f"--{name}", required=True, help=help)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    scales = sorted(path.stem for path in (ROOT / "configs" / "release").glob("*.yaml"))
    parser.add_argument("--scale", default="cpu", choices=scales, help="for which machine (default: cpu)")
    parser.add_argument("--repo", default="org/abaw-fer-small", help="name on the Hub, for the card")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"stop after so many, with exit code {os.EX_TEMPFAIL}; run again to go on",
    )
    args = vars(parser.parse_args(argv))
    minutes = args.pop("minutes")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    release = Release(**args)
    os.environ.update(
        {name: os.environ.get(name, value) for name, value in HUGE_PAGES.items()}
    )  # of children
    try:
        release.write_configs()
        for number, step in enumerate(release.steps()):
            run_step(step, release.out / "steps" / f"{number:02d}.json", deadline)
        summary = json.dumps(release.summary(), indent=2) + "\n"
        write_whole(release.out / "summary.json", summary.encode())
        print(f"\nmodel: {release.out / 'final/model'}\nwritten: {release.out / 'summary.json'}")
    except subprocess.TimeoutExpired:
        print("release.py: stopped in time; the same command goes on from here")
        sys.exit(os.EX_TEMPFAIL)
    except (ValueError, OSError, yaml.YAMLError, subprocess.CalledProcessError) as error:
        sys.exit(f"release.py: {error}")


if __name__ == "__main__":
    main()
