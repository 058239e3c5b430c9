"""Exports against torch: how far they differ on faces, and how fast they are on the CPU.

Each model is exported to every format that can hold it. Differences are those that `fer export` checks.
Speed is of the model alone, on pixels that are ready: turn about, the median of several turns, for batches
and for single faces. Of models of videos, frames a second of the temporal head alone, on one video.

    python -m benchmarks.export --faces FACES --model runs/demo/round-1/run/model runs/demo/video/model
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from modeling_fer import FerForVideoClassification
from modeling_fer.data.pixels import ENDINGS, decode
from modeling_fer.hub.export import export, pixels_of
from modeling_fer.hub.export_onnx import open_graph, run_graph
from modeling_fer.learning.inference import load_model

RESULTS = Path(__file__).parent / "results"
Runs = dict[str, Callable[[], Any]]  # what is measured, by name
BATCHES = (64, 1)
FRAMES = (128, 1000)  # of a video: what a model is trained on, and half a minute


def read_faces(folder: Path, count: int, size: int) -> np.ndarray:
    """The first faces of a folder by name, `(count, 3, size, size)` uint8."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)[:count]
    if len(paths) < count:
        raise SystemExit(f"{folder} holds {len(paths)} images, fewer than {count}: pass --count {len(paths)}")
    return np.stack([decode(path.read_bytes(), size) for path in tqdm(paths, desc="faces", disable=None)])


def speeds(runs: Runs, items: int, turns: int, seconds: float) -> dict[str, float]:
    """Items a second of each: turn about, so that what else the machine does meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first one warms up
        for name, run in runs.items():
            start, repeats = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                run()
                repeats += 1
            if turn:
                found[name].append(repeats * items / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def graph(session: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """An ONNX graph of stills as a function of pixels."""
    return lambda part: run_graph(session, pixel_values=part)


def still_speeds(model: Any, out: Path, pixels: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Faces a second by batch size, of torch and of each export that was written."""
    ways: dict[str, Callable[[torch.Tensor], Any]] = {"torch": model}
    if (out / "vit").exists():
        ways["stock ViT"] = AutoModelForImageClassification.from_pretrained(out / "vit").eval()
    for name, file in {"onnx": "model.onnx", "onnx int8": "model_quantized.onnx"}.items():
        ways[name] = graph(open_graph(out / "onnx" / "onnx" / file, args.threads))
    found = {}
    for batch in BATCHES:
        runs: Runs = {name: partial(way, pixels[:batch]) for name, way in ways.items()}
        found[f"batches of {batch}"] = speeds(runs, batch, args.turns, args.seconds)
    return found


def temporal_speeds(model: Any, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Frames a second of the temporal head, of one video with every frame there."""
    session = open_graph(out / "onnx" / "onnx" / "temporal.onnx", args.threads)
    found = {}
    for frames in FRAMES:
        inputs = {
            "frame_features": torch.randn(1, frames, model.config.feature_size),
            "frame_mask": torch.ones(1, frames, dtype=torch.bool),
            "frame_times": torch.arange(frames, dtype=torch.float64)[None] / model.config.frame_rate,
        }
        runs: Runs = {"torch": partial(model, **inputs), "onnx": partial(run_graph, session, **inputs)}
        found[f"{frames} frames"] = speeds(runs, frames, args.turns, args.seconds)
    return found


@torch.inference_mode()
def measure(path: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Export one model in every way, print and return what was found."""
    model, processor = load_model(path)
    faces = read_faces(Path(args.faces), args.count, processor.size["height"])
    is_video = isinstance(model, FerForVideoClassification)
    agreements = [] if is_video else export(model, processor, faces, out / "vit", "vit")
    agreements += export(model, processor, faces, out / "onnx", "onnx", int8=not is_video)
    if is_video:
        found = temporal_speeds(model, out, args)
    else:
        found = still_speeds(model, out, pixels_of(processor, faces[: max(BATCHES)]), args)
    print(path, *agreements, sep="\n  ")
    for what, rates in found.items():
        print(f"  {what}: " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in rates.items()))
    return {"agreements": [asdict(agreement) for agreement in agreements], "per_second": found}


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faces", required=True, help="folder of face crops")
    parser.add_argument("--count", type=int, default=1000, help="faces to compare on")
    parser.add_argument("--model", nargs="+", required=True, help="model folders, of stills or of videos")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one turn of one way")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        models = {
            path: measure(path, args, Path(folder) / str(number)) for number, path in enumerate(args.model)
        }
    result = {
        "command": f"python -m benchmarks.export --faces FACES --count {args.count} --threads {args.threads} "
        f"--turns {args.turns} --seconds {args.seconds} --model {' '.join(args.model)}",
        "faces": args.count,
        "threads": args.threads,
        "models": models,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "export_cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written {path}")


if __name__ == "__main__":
    main()
