"""Offline pseudo-labelling: its speed, and what kills, damage, more images and more processes change.

Speed: the whole of `pseudo_label.py label` (loading, listing, reading, decoding, hashing, writing; without
the imports) against bare batched inference of the same model on pixels that are in memory already, both views
of each image in both cases, turn about, the median of the turns' ratios. CPU seconds are told beside wall
seconds, since other programs on the machine disturb them less.

Then: a job killed at random times, one with damaged files among its images, the peak memory at ten times the
images (of a model of one layer), and two processes in place of one.

    python -m benchmarks.pseudo_labels --faces FOLDER
    python -m benchmarks.pseudo_labels --faces FOLDER --parts killed memory --limit 2000 --unit_rows 256
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers

import pseudo_label
from modeling_fer import FerConfig, FerForImageClassification
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import ENDINGS, decode
from modeling_fer.data.pseudo import Job, LabelOptions
from modeling_fer.learning.inference import load_classifier
from modeling_fer.learning.optimization import choose_precision, cpu_cores

RESULTS = Path(__file__).parent / "results"
SCRIPT = Path(pseudo_label.__file__)
SIZE, DAMAGED, KILLS, TIMES = 112, 200, 10, 10
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def build_model(folder: Path, layers: int = 12) -> None:
    """Save a new ViT-Tiny/16 with logits that differ between images."""
    torch.manual_seed(0)
    vit = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SIZE,
        patch_size=16,
    )
    model = FerForImageClassification(FerConfig(encoder_config=vit))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


def link(files: list[Path], folder: Path, times: int = 1) -> None:
    """Make a folder tree that holds the files `times` times, as links."""
    for repeat in range(times):
        (folder / str(repeat)).mkdir(parents=True)
        for file in files:
            (folder / str(repeat) / file.name).symlink_to(file.resolve())


def damage(files: list[Path], folder: Path) -> None:
    """Add files that cannot be read, spread among those that can: empty ones, half ones, text."""
    spread = np.linspace(0, len(files), DAMAGED, endpoint=False).astype(int)
    for number, file in enumerate(files[place] for place in spread):
        whole = file.read_bytes()
        content = (b"", whole[: len(whole) // 2], b"this is no image")[number % 3]
        (folder / "0" / f"{file.name}-damaged-{number}.jpg").write_bytes(content)  # comes after that file


def bare_seconds(
    model_folder: Path, pixels: np.ndarray, batch_size: int, precision: str
) -> tuple[float, float]:
    """Wall and CPU seconds of inference alone, on both views of decoded images."""
    model, processor = load_classifier(model_folder, mirror=False)
    device = accelerate.Accelerator().device
    torch.set_num_threads(cpu_cores())  # a labelling job before may have left one
    model.to(device)
    normalize = Normalize(processor.image_mean, processor.image_std).to(device)
    start = time.perf_counter(), time.process_time()
    for first in range(0, len(pixels), batch_size):
        images = torch.from_numpy(pixels[first : first + batch_size]).to(device)
        pseudo_label.predict_views(model, normalize(images), precision).cpu()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def whole_seconds(options: LabelOptions, out: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a labelling job in this process."""
    start = time.perf_counter(), time.process_time()
    pseudo_label.label(str(out), options)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def command(options: LabelOptions, out: Path, *launcher: str) -> list[str]:
    """The same job as a command."""
    return [
        *(launcher or (sys.executable,)),
        str(SCRIPT),
        "label",
        *pseudo_label.flags(options),
        "--out",
        str(out),
    ]


def peak_mb(words: list[str]) -> float:
    """Run a command; the largest resident memory that it had, in MB."""
    # A child's figure begins with its parent's, so a small process stands between.
    code = """if True:
        import resource, subprocess, sys
        subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)  # kilobytes on Linux
    """
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """All rows of a job by file name.

    Raises:
        ValueError: a row is there twice.
    """
    job = Job(out)
    found: dict[str, dict[str, Any]] = {}
    for unit in range(len(job.units)):
        for row in job.read_labels(unit).to_pylist():
            del row["row"]  # its number in its unit, which damaged files before it change
            if found.setdefault(row["file"], row) is not row:
                raise ValueError(f"{row['file']} is there twice")
    return found


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How far the rows of two jobs differ."""
    a, b = rows(one), rows(other)
    common = a.keys() & b.keys()
    gaps = [np.abs(np.subtract(a[k]["probabilities"], b[k]["probabilities"])).max() for k in common]
    return {
        "rows": [len(a), len(b)],
        "in_one_only": len(a.keys() ^ b.keys()),
        "identical_rows": sum(a[k] == b[k] for k in common),
        "other_raw_labels": sum(a[k]["raw_label"] != b[k]["raw_label"] for k in common),
        "largest_difference": float(max(gaps)),
    }


def is_at_work(process: subprocess.Popen, out: Path) -> bool:
    """Whether the process has a unit in hand; claims of the dead lie about until somebody takes them over."""
    for owner in (out / "claims").glob("unit-*/owner.json"):
        with contextlib.suppress(FileNotFoundError):  # just given back
            if json.loads(owner.read_text())["pid"] == process.pid:
                return True
    return False


def kill_at_random(options: LabelOptions, out: Path, seconds: float) -> dict[str, Any]:
    """Run a job and kill it, ten times, each at a random moment of its work; then let it end."""
    draw = random.Random(0)
    moments = [draw.uniform(0, 1.5 * seconds / KILLS) for _ in range(KILLS)]
    finished = []
    for moment in moments:
        process = subprocess.Popen(command(options, out), **QUIET)
        while process.poll() is None and not is_at_work(process, out):
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError("the job ended before it was killed; use more images or a smaller --unit_rows")
        finished.append(len([*(out / "labels").glob("*.parquet")]))
    units = len(Job(out).units)
    subprocess.run(command(options, out), check=True, **QUIET)
    return {"after_s": moments, "units": units, "units_finished_at_kills": finished}


class Bench:
    """A folder with a model and links to the images, and what is measured there."""

    def __init__(self, files: list[Path], options: LabelOptions, folder: Path, turns: int) -> None:
        self.files, self.options, self.folder, self.turns = files, options, folder, turns
        build_model(folder / "model")
        link(files, folder / "images")
        options.model, options.images = str(folder / "model"), str(folder / "images")

    @cached_property
    def finished(self) -> tuple[Path, float]:
        """A whole job of one process, to compare others with, and the seconds that it took."""
        seconds, _ = whole_seconds(self.options, self.folder / "finished")
        return self.folder / "finished", seconds

    def speed(self) -> dict[str, Any]:
        """Bare inference and the whole job, turn about."""
        options, turns = self.options, []
        pixels = np.stack([decode(file.read_bytes(), SIZE) for file in self.files])
        for turn in range(self.turns):
            bare = bare_seconds(self.folder / "model", pixels, options.batch_size, options.precision)
            whole = whole_seconds(options, self.folder / f"turn-{turn}")
            told = {"bare_s": bare[0], "whole_s": whole[0], "bare_cpu_s": bare[1], "whole_cpu_s": whole[1]}
            turns.append({**told, "ratio": bare[0] / whole[0], "cpu_ratio": bare[1] / whole[1]})
            print(turns[-1], flush=True)
        medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        return {"turns": turns, "medians": medians, "images_per_second": len(self.files) / medians["whole_s"]}

    def killed(self) -> dict[str, Any]:
        """A job killed again and again."""
        finished, seconds = self.finished
        kills = kill_at_random(self.options, self.folder / "killed", seconds)
        return {**kills, **compare(finished, self.folder / "killed")}

    def damaged(self) -> dict[str, Any]:
        """A job with files among its images that cannot be read."""
        link(self.files, self.folder / "mixed")
        damage(self.files, self.folder / "mixed")
        out = self.folder / "out-mixed"
        whole_seconds(dataclasses.replace(self.options, images=str(self.folder / "mixed")), out)
        lines = len((out / "skipped.jsonl").read_text().splitlines())
        return {"files": DAMAGED, "lines": lines, **compare(self.finished[0], out)}

    def processes(self) -> dict[str, Any]:
        """A job of two processes, and how many processes had units in hand."""
        out, launch = self.folder / "two", "-m torch.distributed.run --standalone --nproc_per_node 2"
        cpu = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
        words = command(self.options, out, sys.executable, *launch.split())
        process = subprocess.Popen(words, env={**os.environ, **cpu}, **QUIET)
        workers = set()
        while process.poll() is None:
            for owner in (out / "claims").glob("unit-*/owner.json"):
                with contextlib.suppress(FileNotFoundError):  # just given back
                    workers.add(json.loads(owner.read_text())["pid"])
            time.sleep(0.02)
        if process.returncode or len(workers) != 2:
            raise RuntimeError(
                f"{len(workers)} processes took part, the launcher returned {process.returncode}"
            )
        return {"processes": len(workers), **compare(self.finished[0], out)}

    def memory(self) -> dict[str, Any]:
        """Peaks at the images, and at ten times the images."""
        build_model(self.folder / "shallow", layers=1)  # layers cost time but, one after another, no memory
        peaks: dict[str, dict[str, float]] = {}
        for times in (1, TIMES):
            images, out = self.folder / f"repeated-{times}", self.folder / f"out-{times}"
            link(self.files, images, times)
            options = dataclasses.replace(
                self.options, model=str(self.folder / "shallow"), images=str(images)
            )
            select = [sys.executable, str(SCRIPT), "select", "--out", str(out), "--threshold", "0"]
            peaks[str(times * len(self.files))] = {
                "label": peak_mb(command(options, out)),
                "select": peak_mb(select),
            }
            print(peaks, flush=True)
            shutil.rmtree(out)
        first, last = peaks.values()
        return {"peak_mb": peaks, "growth": {name: last[name] / first[name] - 1 for name in first}}


PARTS = {
    part.__name__: part for part in (Bench.speed, Bench.killed, Bench.damaged, Bench.processes, Bench.memory)
}


def main() -> None:
    """Measure, print and keep the result; parts that are not asked for stay as they were."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faces", required=True, type=Path, help="folder of face crops")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    parser.add_argument("--limit", type=int, help="use so many of the faces only")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--unit_rows", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=0, help="0: that of pseudo_label.py")
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16"))
    args = parser.parse_args()
    device = accelerate.Accelerator().device
    transformers.utils.logging.disable_progress_bar()
    options = LabelOptions(
        model="",
        images="",
        unit_rows=args.unit_rows,
        batch_size=args.batch_size or (64 if device.type == "cpu" else 256),
        precision=choose_precision(args.precision, device),
    )
    if args.unit_rows % options.batch_size:
        parser.error(f"--unit_rows must be a multiple of the batch size, {options.batch_size}")
    files = sorted(path for path in args.faces.rglob("*") if path.suffix.lower() in ENDINGS)[: args.limit]
    path = RESULTS / "pseudo_labels.json"
    RESULTS.mkdir(exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(files, options, Path(folder), args.turns)
        for name in args.parts:
            result[name] = {
                "images": len(files),
                "model": f"ViT-Tiny/16 at {SIZE} px, {1 if name == 'memory' else 12} layers, both views",
                "batch_size": options.batch_size,
                "unit_rows": options.unit_rows,
                "precision": options.precision,
                "device": torch.cuda.get_device_name()
                if device.type == "cuda"
                else f"{cpu_cores()} CPU cores",
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                **PARTS[name](bench),
            }
            print(name, json.dumps(result[name], indent=2), flush=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written {path}")


if __name__ == "__main__":
    main()
