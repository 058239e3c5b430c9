"""Make the released model from its data: every step from raw files to a folder that is ready to be pushed.

    python release.py --fer2013 fer2013.csv --ferplus fer2013new.csv --faces FACES --out runs/release
    python release.py ... --scale gpu             # ViT-Small at 96 px, hundreds of epochs
    python release.py ... --minutes 9             # stops in time; the same command goes on

prepare the data -> pretrain a ViT on faces without labels -> first round: a teacher -> further rounds: it
labels those faces, and a student that starts from its encoder learns from it and from all labels -> the
best round by validation, calibrated and judged -> temporal stage on simulated streams -> card -> exports.
What is done is not done again; trainings and labelling go on where they stopped, other steps start anew. Each
is a command that is printed and can be run by hand; OUT/summary.json has what they took and gave. With
`--scale gpu` the first round learns from faces without labels, too; with `--scale cpu` its encoder is
convolutional, for speed, and starts new: masked autoencoding is for ViTs, so nothing is pretrained.
"""

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
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
SCALED = {*STAGES, "accelerate", "further_rounds", "select", "streams", "folds"}  # in configs/release/*.yaml
BOTH = "fer2013_and_votes"  # FER2013 with the votes of FER+, all labels in one
SCORES = ("accuracy", "macro_f1_present", "nll", "ece")  # what the summary tells of each round
OWN_WEIGHT = "0.5"  # of FER2013's own label, beside the votes of FER+
# For glibc: freed memory is kept, and lies on huge pages; `benchmarks.efficiency` tells what it gains here.
HUGE_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Step:
    """One command, the file or folder that is there once it is done, and the configuration that it reads.

    With `anew`, what an interrupted one left is removed before it starts again.
    """

    name: str
    command: list[str]
    made: Path
    config: Path | None = None
    anew: bool = False

    def told(self) -> dict[str, Any]:
        """What a record of the step holds: a step with other words than those is another one."""
        words = shlex.join(self.command).replace(sys.executable, "python")
        return {"name": self.name, "command": words, "config": self.config and self.config.read_text()}


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
            ValueError: the file names something else, no file for accelerate, or a wrong number of rounds.
        """
        path = ROOT / "configs" / "release" / f"{self.scale}.yaml"
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if unknown := sorted(found.keys() - SCALED):
            raise ValueError(f"{path}: {', '.join(unknown)} is none of {', '.join(sorted(SCALED))}")
        if "accelerate" not in found:
            raise ValueError(f"{path}: accelerate is missing, the file that accelerate launch is to read")
        if type(found.setdefault("further_rounds", 1)) is not int or found["further_rounds"] < 1:
            raise ValueError(f"{path}: further_rounds, after the first, must be a whole number, at least 1")
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
            "image": {"data": f"labelled={data / BOTH}"},
            "second": {"data": data / BOTH, **dict.fromkeys(("encoder", "teacher"), out / "image" / "model")},
            "video": {"data": data / "streams", "encoder": out / "final" / "model"},
        }
        for stage, place in places.items():
            common = yaml.safe_load((ROOT / "configs" / f"release_{stage}.yaml").read_text(encoding="utf-8"))
            given = {name: str(value) for name, value in {**place, "output_dir": out / stage}.items()}
            merged = {**common, **scaled.get(stage, {}), **given}
            if stage == "image":  # a new encoder, or the pretrained one
                new = merged.get("encoder_config")
                merged |= {"encoder_config": str(ROOT / new)} if new else {"encoder": str(encoder)}
            if merged.get("method", "supervised") != "supervised":
                merged["data"] += unlabelled
            write_whole(self.config(stage), yaml.safe_dump(merged, sort_keys=False).encode())

    def pretrains(self) -> bool:
        """Whether the first round, as `write_configs` has it, starts from a pretrained encoder."""
        return bool(yaml.safe_load(self.config("image").read_text()).get("encoder"))

    def runs(self) -> list[str]:
        """The run of each round, as a folder in `out`."""
        return ["image", *(f"second/round-{n + 1}/run" for n in range(self.scaled()["further_rounds"]))]

    def best(self) -> Path:
        """The run of the round with the best likelihood on validation, which class biases change least."""
        runs = [self.out / run for run in self.runs()]
        return min(runs, key=lambda run: json.loads((run / "metrics.json").read_text())["nll"])

    def steps(self) -> Iterator[Step]:
        """Yield what is to be done, in order; a step is asked for when those before it are done."""
        scaled, out, final, video = self.scaled(), self.out, self.out / "final", self.out / "video"
        fer2013, both, faces, streams = (f"{out}/data/{n}" for n in ("fer2013", BOTH, "faces", "streams"))
        self.write_configs()
        fer, image_model = [sys.executable, "-m", "modeling_fer.cli"], str(final / "model")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        launch += ["--config_file", str(ROOT / scaled["accelerate"])]

        def prepare(source: str, folder: str, *flags: str) -> Step:
            command = [*fer, "data", "prepare", source, *flags, "--out", folder, "--overwrite"]
            return Step(f"data: {Path(folder).name}", command, Path(folder, "report.json"))

        def train(name: str, stage: str, made: Path, script: str = "train.py", *flags: str) -> Step:
            config = self.config(stage)
            command = [*launch, str(ROOT / script), "--config", str(config), *(flags or ("--resume", "auto"))]
            return Step(name, command, made, config)

        csv = ("--csv", self.fer2013, "--rule", "fer2013", "--drop-duplicates")
        yield prepare("fer2013", fer2013, *csv)
        yield prepare("fer2013", both, *csv, "--ferplus", self.ferplus, "--own_weight", OWN_WEIGHT)
        yield prepare("folder", faces, "--root", self.faces, "--unlabeled", "True")
        if self.pretrains():
            yield train("pretraining", "pretrain", out / "pretrain/learning_curve.png")
        yield train("image stage", "image", out / "image/metrics.json")
        rounds = [sys.executable, f"{ROOT}/pseudo_label.py", "rounds", "--images", faces, "--labelled", both]
        rounds += ["--model", str(out / "image/model"), "--rounds", str(scaled["further_rounds"])]
        rounds += ["--out", str(out / "second"), "--config", str(self.config("second"))]
        rounds += ["--launch", shlex.join(launch), *map(str, scaled.get("select", []))]
        yield Step("further rounds", rounds, out / self.runs()[-1] / "metrics.json", self.config("second"))
        calibrate = [*fer, "calibrate", "--model", str(self.best() / "model"), "--data", both]
        calibrate += ["--bias", "--grey", "--half", "--out", str(final)]
        yield Step("calibration", calibrate, final / "model", anew=True)
        judge = [*fer, "eval", "--model", image_model, "--data", both, "--out", str(final / "validation")]
        yield Step("evaluation", judge, final / "validation/metrics.json")
        yield prepare("streams", streams, "--stills", fer2013, *map(str, scaled.get("streams", [])))
        yield train("temporal stage", "video", video / "metrics.json")
        folds = ["--k", str(scaled.get("folds", 3)), "--out", f"{video}/folds", "--model", f"{video}/model"]
        folded = video / "folds/cross_validation.json"
        yield train("temporal folds", "video", folded, "cross_validate.py", *folds)
        judge = [*fer, "eval", "--model", f"{video}/model", "--against", image_model, "--data", streams]
        judge += ["--split", "test", "--out", f"{video}/test"]
        yield Step("temporal evaluation", judge, video / "test/comparison.json")
        card = [*fer, "card", str(final), "--repo", self.repo, "--eval", str(final / "validation")]
        yield Step("card", card, final / "model/README.md")
        encoder = json.loads((final / "model/config.json").read_text())["encoder_config"]["model_type"]
        formats = ("vit", "onnx", "--int8") if encoder == "vit" else ("onnx",)  # int8 is for matrices
        export = [*fer, "export", image_model, "--format", *formats, "--check", fer2013]
        yield Step("export", [*export, "--out", str(out / "export")], out / "export", anew=True)

    def summary(self) -> dict[str, Any]:
        """What every step took, each training's record of it (device, energy, memory), and the scores."""

        def read(path: str) -> dict[str, Any]:
            return json.loads((self.out / path).read_text())

        trained = [*self.runs(), "video"] + (["pretrain"] if self.pretrains() else [])
        scores = {run: read(f"{run}/metrics.json") for run in (*self.runs(), "final/validation")}
        records = [json.loads(path.read_text()) for path in sorted((self.out / "steps").glob("*.json"))]
        return {
            "scale": self.scale,
            "chosen": self.best().relative_to(self.out).as_posix(),
            "seconds": {one["name"]: one["seconds"] for one in records},
            "trainings": {run: read(f"{run}/environment.json") for run in trained},
            "validation": {run: {key: found[key] for key in SCORES} for run, found in scores.items()},
            "calibration": read("final/calibration.json"),
            "streams": read("video/test/comparison.json"),
        }


def run_step(step: Step, record: Path, deadline: float | None) -> None:
    """Run a step unless it is done; its record adds up what it took.

    Raises:
        ValueError: it was done with another command or configuration.
        FileNotFoundError: the command ended well and made nothing.
        subprocess.CalledProcessError: the command failed; it has told why.
        subprocess.TimeoutExpired: the deadline came first; the command was told to end.
    """
    told = {**step.told(), "seconds": 0.0, "done": False}
    before = json.loads(record.read_text()) if record.exists() else told
    if not before["done"] and before["name"] != step.name:  # of a recipe with other steps
        before = told
    if before["done"] and step.made.exists():
        if changed := [key for key in ("name", "command", "config") if before[key] != told[key]]:
            raise ValueError(
                f"{record}: {step.name} was done with another {' and '.join(changed)}; use the options of "
                "then, another --out, or delete this record and those after it to do it again"
            )
        return
    clock = time.monotonic()
    if deadline is not None and clock >= deadline:
        raise subprocess.TimeoutExpired(step.command, 0.0)
    if step.anew:
        shutil.rmtree(step.made, ignore_errors=True)
    write_whole(record, (json.dumps({**told, "seconds": before["seconds"]}, indent=2) + "\n").encode())
    print(f"\n{step.name}", flush=True)
    try:
        run_command(step.command, None if deadline is None else deadline - clock, HUGE_PAGES)
        if not step.made.exists():
            raise FileNotFoundError(f"{step.name} ended well, but {step.made} is not there")
        told["done"] = True
    finally:
        told["seconds"] = round(before["seconds"] + time.monotonic() - clock, 1)
        write_whole(record, (json.dumps(told, indent=2) + "\n").encode())


def run(release: Release, deadline: float | None) -> None:
    """Run what is left to do, as the only one in the folder.

    Raises:
        ValueError: another process is at it, or the folder's name cannot be passed on.
    """
    if set(",=") & set(str(release.out)):
        raise ValueError(f"--out {release.out}: its name must hold no comma and no =")
    release.out.mkdir(parents=True, exist_ok=True)
    with (release.out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another release.py is at work in {release.out}") from None
        for number, step in enumerate(release.steps()):
            run_step(step, release.out / "steps" / f"{number:02d}.json", deadline)
        write_whole(release.out / "summary.json", (json.dumps(release.summary(), indent=2) + "\n").encode())
    print(f"\nmodel: {release.out / 'final/model'}\nwritten: {release.out / 'summary.json'}")


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
    parser.add_argument("--minutes", type=float, help=f"stop after so many (exit code {os.EX_TEMPFAIL})")
    args = vars(parser.parse_args(argv))
    minutes = args.pop("minutes")
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what was started ends, too
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        run(Release(**args), None if minutes is None else time.monotonic() + 60 * minutes)
    except (ValueError, OSError, yaml.YAMLError, subprocess.SubprocessError) as error:
        if isinstance(error, subprocess.TimeoutExpired) or getattr(error, "returncode", 0) == os.EX_TEMPFAIL:
            print("release.py: stopped in time; the same command goes on from here")
            sys.exit(os.EX_TEMPFAIL)
        sys.exit(f"release.py: {error}")


if __name__ == "__main__":
    main()
