"""What more processes gain, and what each image costs where there are very many.

Parts, each kept in the JSON when another is measured again:

- `train`: train.py with 1 process against several, the same global batch, supervised and FixMatch; labelled
  images/s in the last half of each run.
- `label`: pseudo_label.py with 1 process against several; images/s from the cut of the source to the last
  label.
- `costs`: CPU time to read an image and to write down its label, bytes of a label, speed of a selection,
  memory a unit and a face.

Every process has one core, one thread and, where there is no GPU, gloo. Runs of 1 and of several processes
take turns, and the median of the turns' ratios is reported.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --parts costs
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.pseudo_labels import SIZE, build_model, link
from modeling_fer.data import schema
from modeling_fer.data.dataset import FaceDataset
from modeling_fer.data.images import Face, cut, decoded, find_source, read
from modeling_fer.data.pixels import open_image
from modeling_fer.data.prepare import prepare
from modeling_fer.data.pseudo import LABELS, ROWS_AT_ONCE, Job, LabelWriter
from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.data.selection import Selection, SelectOptions
from modeling_fer.data.similar import BYTES
from modeling_fer.data.sources.synthetic import SyntheticOptions
from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.labels import NUM_CLASSES

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/scaling_cpu.json"
DRAWN, UNIT_ROWS = 512, 64  # faces that are drawn, and linked as often as needed; images of a labelling unit
HELD_OUT, LABEL_UNIT, UNITS, POOL = 4096, 50_000, 20_000, 1_000_000  # of part `costs`


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Leave this process, and what it starts meanwhile, the first `count` of its cores.

    Raises:
        ValueError: it has fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise ValueError(f"{count} processes need a core each, there are {len(cores)}: pass --processes")
    os.sched_setaffinity(0, cores[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def launch(processes: int, *words: str) -> None:
    """Run a script with a core for each process.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    # Not accelerate's launcher: on CPUs it starts one process, whatever the number that is asked for.
    torchrun = f"torch.distributed.run --standalone --nproc_per_node {processes}"
    command = [sys.executable, "-m", *torchrun.split(), *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with on_cores(processes):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]} with {processes} processes failed: {done.stderr[-2000:]}")


def turn_about(
    speed: Callable[[int, Path], float], processes: int, turns: int, folder: Path
) -> dict[str, Any]:
    """Measure images/s of 1 process and of several, turn about."""
    found = []
    for turn in range(turns):
        one = speed(1, folder / f"one-{turn}")
        several = speed(processes, folder / f"several-{turn}")
        found.append({"one": one, "several": several, "ratio": several / one})
        print(found[-1], flush=True)
    ratios = [turn["ratio"] for turn in found]
    middle = statistics.median(ratios)
    return {"processes": processes, "turns": found, "ratio_median": middle, "efficiency": middle / processes}


def train_part(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Speed of train.py."""
    options = SyntheticOptions(image_size=SIZE, train=DRAWN, validation=16, test=16, unlabeled=DRAWN)
    prepare("synthetic", options, folder / "data", show_progress=False)
    common = {
        "data": folder / "data",
        "image_size": SIZE,
        "batch_size": args.batch_size,
        "mu": args.mu,
        "max_steps": 2 * args.steps,
        "log_steps": args.steps,
        "eval_steps": 2 * args.steps,
        "save_steps": 2 * args.steps,
        "tracker": "none",
        "threads": 1,
    }

    def speed(method: str) -> Callable[[int, Path], float]:
        def measure(processes: int, out: Path) -> float:
            fields = {**common, "method": method, "output_dir": out}
            words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
            launch(processes, "train.py", *words)
            rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
            return [row["images_per_second"] for row in rows if "loss" in row][-1]

        return measure

    found: dict[str, Any] = {"model": f"ViT-Tiny/16, {SIZE} px, all weights trained"}
    for method in ("supervised", "fixmatch"):
        found[method] = turn_about(speed(method), args.processes, args.turns, folder / method)
    return {**found, "batch_size": args.batch_size, "mu": args.mu, "steps": args.steps}


def write_faces(count: int, folder: Path) -> Path:
    """Write a tree of drawn faces as JPEG, the same ones again and again."""
    options = SyntheticOptions(image_size=SIZE, train=16, validation=16, test=16, unlabeled=DRAWN)
    prepare("synthetic", options, folder / "drawn", show_progress=False)
    rows = schema.load(folder / "drawn", "unlabeled")["unlabeled"].with_format("arrow")["image"][:]
    (folder / "files").mkdir()
    for number, cell in enumerate(rows.to_pylist()):
        open_image(cell["bytes"]).save(folder / f"files/{number:05d}.jpg", quality=90)
    link(sorted((folder / "files").iterdir())[:count], folder / "tree", max(1, count // DRAWN))
    return folder / "tree"


def label_part(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Speed of pseudo_label.py."""
    build_model(folder / "model")
    words = ["--model", str(folder / "model"), "--images", str(write_faces(args.images, folder))]
    words += ["--unit_rows", str(UNIT_ROWS), "--batch_size", str(UNIT_ROWS)]

    def speed(processes: int, out: Path) -> float:
        launch(processes, "pseudo_label.py", "label", *words, "--out", str(out))
        labels = list((out / "labels").glob("*.parquet"))
        images = sum(pq.read_metadata(path).num_rows for path in labels)
        last = max(path.stat().st_mtime for path in labels)
        return images / (last - (out / "job/job.json").stat().st_mtime)

    found = turn_about(speed, args.processes, args.turns, folder)
    return {"model": f"ViT-Tiny/16, {SIZE} px, both views of each image", "images": args.images, **found}


# --- What an image costs ---


def handling_costs(folder: Path) -> dict[str, float]:
    """Bytes of an image; CPU microseconds to read, decode and hash it, and to write down its label."""
    source = find_source(str(write_faces(DRAWN, folder)), "", "image", DRAWN)
    (unit,) = cut(source, folder)
    with ThreadPoolExecutor(1) as pool:
        list(decoded(read(source, unit, folder), SIZE, pool, DRAWN))  # the files are in the cache from now on
        start = time.process_time()
        images = list(decoded(read(source, unit, folder), SIZE, pool, DRAWN))
        reading = time.process_time() - start
    faces = [face for face in images if isinstance(face, Face)]
    views = np.random.default_rng(0).dirichlet(np.ones(NUM_CLASSES), (2, len(faces))).astype(np.float32)
    start = time.process_time()
    with pq.ParquetWriter(folder / "labels.parquet", LABELS) as parquet:
        writer = LabelWriter(parquet, print)
        writer.add(faces, views)
        writer.flush()
    writing = time.process_time() - start
    return {
        "bytes": sum(path.stat().st_size for path in (folder / "files").iterdir()) / len(faces),
        "reading_us": 1e6 * reading / len(faces),
        "writing_us": 1e6 * writing / len(faces),
    }


def made_up_labels(rows: int, unit: int) -> pa.Table:
    """Label rows as a model that is mostly sure gives them."""
    rng = np.random.default_rng([unit])
    sharp = rng.dirichlet(np.full(NUM_CLASSES, 0.3), rows)
    views = [0.9 * sharp + 0.1 * rng.dirichlet(np.ones(NUM_CLASSES), rows) for _ in range(2)]
    probabilities = np.mean(views, axis=0).astype(np.float32)
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    columns = {
        "row": np.arange(rows),
        "file": [f"faces-{unit:05d}.parquet:{row}" for row in range(rows)],
        "content_hash": [rng.bytes(16) for _ in range(rows)],
        "perceptual_hash": [rng.bytes(BYTES) for _ in range(rows)],
        "width": np.full(rows, SIZE),
        "height": np.full(rows, SIZE),
        "is_blank": np.zeros(rows, bool),
        "probabilities": pa.FixedSizeListArray.from_arrays(probabilities.ravel(), NUM_CLASSES),
        "raw_label": probabilities.argmax(axis=1),
        "confidence": first,
        "margin": first - second,
        "agreement": 1 - np.abs(views[0] - views[1]).sum(axis=1) / 2,
    }
    return pa.table(
        {name: pa.array(values, LABELS.field(name).type) for name, values in columns.items()}, schema=LABELS
    )


def made_up_job(out: Path, units: int, rows: int) -> None:
    """Write a finished job of labels, without images: `rows` in each of `units`."""
    for name in ("job", "labels", "claims", "partial"):
        (out / name).mkdir(parents=True)
    lines = [
        {"file": f"data/faces-{n:05d}.parquet", "groups": list(range(50)), "first": 0} for n in range(units)
    ]
    (out / "job/units.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about: dict[str, Any] = {"source": {}, "settings": {}, "about": {}}
    (out / "job/job.json").write_text(json.dumps(about))
    for unit in range(units if rows else 0):
        with pq.ParquetWriter(out / f"labels/unit-{unit:06d}.parquet", LABELS) as writer:
            writer.write_table(made_up_labels(rows, unit), row_group_size=ROWS_AT_ONCE)


def selection_costs(rows: int, folder: Path) -> dict[str, Any]:
    """Bytes of a label row, and CPU microseconds that a selection takes for it, without reading the image."""
    units = max(1, rows // LABEL_UNIT)
    made_up_job(folder / "job", units, rows // units)
    job = Job(folder / "job")
    total = rows // units * units
    found: dict[str, Any] = {
        "rows": total,
        "bytes_per_row": sum(p.stat().st_size for p in (job.out / "labels").iterdir()) / total,
    }
    nobody = np.empty((0, BYTES), np.uint8)
    held_out = np.random.default_rng(0).integers(0, 256, (HELD_OUT, BYTES), np.uint8)
    for name, options, against in (
        ("threshold", SelectOptions("threshold"), nobody),
        ("quota", SelectOptions("quota", quota=max(1, total // 100)), nobody),
        (f"threshold_against_{HELD_OUT}", SelectOptions("threshold"), held_out),
    ):
        (folder / name).mkdir()
        start = time.process_time()
        kept = sum(int(unit.keep.sum()) for unit in Selection(job, options, against, folder / name).units())
        found[name] = {"kept": kept, "us_per_row": 1e6 * (time.process_time() - start) / total}
    return found


def memory_costs(folder: Path) -> dict[str, float]:
    """Bytes in a labelling worker a unit, and in a training process a face of a pool."""
    made_up_job(folder / "job", UNITS, 0)
    tracemalloc.start()
    job = Job(folder / "job")
    unit = tracemalloc.get_traced_memory()[0] / len(job.units)
    tracemalloc.stop()
    no_pixels = np.broadcast_to(np.zeros(1, np.uint8), (POOL, 3, 1, 1))  # they are a file
    tracemalloc.start()
    dataset = FaceDataset(no_pixels, np.full(POOL, -1))
    sampler = DebiasFeedbackSampler(np.zeros(POOL, np.int64), 1, 100, 0.0)
    kept = tracemalloc.get_traced_memory()[0]
    order = iter(sampler)
    next(order)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "bytes_per_unit": unit,
        "bytes_per_face": kept / len(dataset),
        "peak_per_face": peak / len(dataset),
    }


def costs_part(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What each image costs besides the model."""
    for name in ("handling", "selection", "memory"):
        (folder / name).mkdir()
    return {
        "image": f"drawn face, JPEG of quality 90, {SIZE} px",
        **handling_costs(folder / "handling"),
        "selection": selection_costs(args.rows, folder / "selection"),
        **memory_costs(folder / "memory"),
    }


PARTS = {"train": train_part, "label": label_part, "costs": costs_part}


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--processes", type=int, default=2, help="against 1")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=12, help="train: measured steps, after as many of warm-up"
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="train: labelled faces, over all processes"
    )
    parser.add_argument("--mu", type=int, default=2, help="train: unlabelled faces for each labelled one")
    parser.add_argument("--images", type=int, default=8192, help="label: images")
    parser.add_argument("--rows", type=int, default=500_000, help="costs: label rows to select from")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](args, Path(folder))
        machine = {
            "kind": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
        }
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        result[name] = {**found, "machine": machine, "versions": versions}
        write_whole(args.out, (json.dumps(result, indent=2) + "\n").encode())
        print(f"{name}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
