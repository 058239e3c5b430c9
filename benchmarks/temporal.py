"""Temporal heads side by side: each frame for itself, smoothed, convolution, encoder; causal and both ways.

All heads learn from the same features of one frozen image model, on the same videos, with the same steps.
Their post-processing (temperature, smoothing, bias) is fitted on the validation split, which also chooses the
step; the test split is reported. Each difference is paired over test videos.

- `synthetic`: drawn videos in which frames are spoilt at random, so that a still alone is ambiguous.
- `simulated`: streams put together from stills of FER+, each frame another still of the same expression: not
  videos, only a test of gathering evidence over frames. Stills for training, choosing and testing are
  different ones, and the image model was trained on none of them (copies are left out).
- `speed`: frames a second offline, and what a frame of a stream costs, of the default head, and the memory
  of each, in a process of its own.

    fer data prepare synthetic --videos 400 --subjects 400 --frame_noise 0.4 --frames 160 \\
        --out data/temporal_synthetic
    fer data prepare synthetic --seed 1 --subjects 400 --train 6000 --unlabeled 0 --out data/temporal_stills
    python train.py --config configs/demo.yaml --data data/temporal_stills --output_dir runs/temporal_image
    python -m benchmarks.temporal synthetic --data data/temporal_synthetic --encoder runs/temporal_image/model

    fer data prepare streams --stills data/ferplus --out data/temporal_simulated
    python -m benchmarks.temporal simulated --data data/temporal_simulated \\
        --encoder runs/ferplus_finetune_cpu/model --classes present
    python -m benchmarks.temporal simulated --name simulated_release --data runs/release/data/streams \\
        --encoder runs/release/final/model --classes present
    python -m benchmarks.temporal speed
"""

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import train
from modeling_fer import FerConfig, FerForVideoClassification
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.evaluation.comparison import compare
from modeling_fer.evaluation.metrics import compute_metrics, write_whole
from modeling_fer.evaluation.tuning import VideoLogits, apply, fit
from modeling_fer.labels import IGNORE
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.features import FrameFeatures, frame_features
from modeling_fer.learning.inference import class_names, load_model
from modeling_fer.learning.optimization import cpu_cores
from modeling_fer.learning.timelines import predict_frames, predict_tracks, tracks_of, video_logits
from modeling_fer.postprocess_fer import PostProcess

RESULTS = Path(__file__).parent / "results"
CONFIG = Path(__file__).parents[1] / "configs" / "video_cpu.yaml"
# Name, options of training, and whether post-processing may look ahead.
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    "per frame": ({"temporal_head": "none"}, False),
    "convolution, causal": ({"temporal_head": "convolution", "causal": True}, True),
    "convolution": ({"temporal_head": "convolution"}, False),
    "encoder, causal": ({"temporal_head": "transformer", "causal": True}, True),
    "encoder": ({"temporal_head": "transformer"}, False),
}
# Post-processing as tuning fits it, for what it costs.
FITTED = {
    "smoothing": "gaussian",
    "half_width": 8,
    "temperature": 1.3,
    "bias": [0.0, 0.4, 0.8, 0.6, -0.3, 0.2, 0.1, -0.2],
}


def logits_of(model: Any, features: FrameFeatures, rows: Any, where: str) -> list[VideoLogits]:
    """Logits and labels of the videos of a split."""
    found = tracks_of(rows, where)
    return video_logits(predict_tracks(model, features, found), found, class_names(model))


def run_heads(data: str, encoder: str, seeds: list[int], runs: Path, extra: list[str]) -> dict[str, Any]:
    """Train every head with every seed; returns what each says of the test frames, tuned and not."""
    splits = schema.load(data)
    image_model, processor = load_model(encoder)
    features = {}
    for split in ("validation", "test"):
        normalize, size = Normalize(processor.image_mean, processor.image_std), processor.size["height"]
        features[split] = frame_features(
            image_model.fer, splits[split], normalize, size, Path(data) / "cache", Accelerator()
        )
    found: dict[str, Any] = {}
    for name, (options, causal) in HEADS.items():
        for seed in seeds:
            out = runs / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
            given = {
                **options,
                "data": data,
                "encoder": encoder,
                "output_dir": out,
                "seed": seed,
            }
            flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
            train.train(parse_arguments(["--config", str(CONFIG), *flags, "--resume", "auto", *extra]))
            model, _ = load_model(out / "model")
            videos = {s: logits_of(model, features[s], splits[s], f"{data}, {s}") for s in features}
            variants = [(name, PostProcess(causal=causal))]
            for looks_back in {causal, True} if name == "per frame" else {causal}:
                label = f"{name}, tuned, causal" if looks_back and not causal else f"{name}, tuned"
                variants.append((label, fit(videos["validation"], looks_back)[0]))
            for label, post in variants:
                predictions = apply(post, videos["test"]).argmax(-1)
                row = found.setdefault(label, {"predictions": [], "postprocess": []})
                row["predictions"].append(predictions)
                row["postprocess"].append(post.to_dict())
            gc.collect()
    references = np.concatenate([v.references[v.references != IGNORE] for v in videos["test"]])
    groups = np.concatenate([[v.group] * int((v.references != IGNORE).sum()) for v in videos["test"]])
    return {"methods": found, "references": references, "groups": groups, "classes": class_names(model)}


def tabulate(result: dict[str, Any], about: dict[str, Any], name: str) -> None:
    """Scores with their spread, and what the encoder gains; printed and kept."""
    references, groups, classes = result["references"], result["groups"], result["classes"]
    rows: dict[str, Any] = {}
    print("| method | accuracy | macro F1 | deviation over seeds | 95 % interval over videos (first seed) |")
    print("|---|---|---|---|---|")
    for label, entry in result["methods"].items():
        scores = [compute_metrics(references, p, None, classes, groups, 1000) for p in entry["predictions"]]
        f1 = [s["macro_f1_present"] for s in scores]
        low, high = scores[0]["interval"]["macro_f1_present"]
        accuracy = [s["accuracy"] for s in scores]
        rows[label] = {"macro_f1": f1, "accuracy": accuracy, "interval_first_seed": [low, high]}
        rows[label]["postprocess"] = entry["postprocess"]
        deviation = statistics.stdev(f1) if len(f1) > 1 else 0.0
        print(
            f"| {label} | {100 * statistics.mean(accuracy):.1f} | {100 * statistics.mean(f1):.1f} | "
            f"{100 * deviation:.1f} | {100 * low:.1f} to {100 * high:.1f} |"
        )
    gains = {}
    pairs = [
        ("per frame", "encoder"),
        ("per frame, tuned", "encoder, tuned"),
        ("per frame, tuned", "encoder"),
        ("per frame, tuned, causal", "encoder, causal, tuned"),
        ("convolution, tuned", "encoder, tuned"),
    ]
    for before, after in pairs:
        both = (result["methods"][m]["predictions"] for m in (before, after))
        compared = [compare(references, a, b, classes, groups=groups) for a, b in zip(*both, strict=True)]
        gains[f"{after} over {before}"] = compared
    write_whole(
        RESULTS / f"temporal_{name}.json",
        (json.dumps({**about, "test": rows, "gains": gains}, indent=2, default=float) + "\n").encode(),
    )
    for title, compared in gains.items():
        for seed, entry in zip(about["seeds"], compared, strict=True):
            gain = entry["macro_f1"]
            low, high = (100 * value for value in gain["interval"])
            print(f"{title}, seed {seed}: {100 * gain['difference']:+.1f} ({low:+.1f} to {high:+.1f})")


class RandomFrames:
    """Features of a stream of any length, made when they are asked for."""

    shape, dtype = (0, 192), np.float16
    block = np.random.default_rng(0).standard_normal((1024, 192), dtype=np.float32).astype(np.float16)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.block[np.arange(rows.start, rows.stop) % len(self.block)]


def memory(what: str) -> float:
    """Memory of this process in MB: resident now (`VmRSS`), or at most so far (`VmHWM`); Linux only.

    Not by `getrusage`: its peak begins with that of the process that started this one.
    """
    line = re.search(rf"^{what}:\s+([0-9]+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line[1]) / 1024 if line else float("nan")


def matmul_ceiling(threads: int) -> float:
    """Floating-point operations a second of a product of large matrices."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        ceiling = 20 * 2 * a.shape[0] * b.numel() / (time.perf_counter() - start)
    return ceiling


def offline(causal: bool, threads: int, frames: int, ceiling: float) -> dict[str, Any]:
    """Frames a second and peak memory of a default head with random weights, for ten times the frames too."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = FerForVideoClassification(FerConfig(temporal_causal=causal)).eval()
    head: Any = model.temporal.head
    weights = sum(p.numel() for p in model.temporal.parameters() if p.ndim == 2)
    passes = 1 if causal else 2  # windows overlap by half
    rates, peaks = [], []
    for part in (frames // 10, frames, 10 * frames):
        start = time.perf_counter()
        predict_frames(model, RandomFrames(), np.arange(part))
        rates.append(part / (time.perf_counter() - start))
        peaks.append(memory("VmHWM"))
    return {
        "frames_per_second": rates[1],
        "share_of_matmul": rates[1] * passes * 2 * weights / ceiling,
        "peak_mb": dict(zip((frames, 10 * frames), peaks[1:], strict=True)),
        "layers": len(head.layers),
    }


def streamed(postprocess: dict[str, Any] | None, frames: int, some: int = 2_000) -> dict[str, Any]:
    """What a frame of a stream costs on one core, and memory, of one of 100 frames and of an old one.

    An old and a young stream take turns, frame by frame, so that both meet the machine in the same state.
    What came before, they followed in pieces of 100 frames, which leave the same state as single ones;
    `frames`, the age of the old one, is a multiple of 100.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = FerForVideoClassification(FerConfig(temporal_causal=True, postprocess=postprocess)).eval()
    x, resident = torch.randn(1, 192), {}
    spent, streams = np.empty((some, 2)), []
    with torch.inference_mode():
        for age in (100, frames):
            stream = model.init_stream()
            for _ in range(age // 100):
                _, _, stream = model.step(x.expand(1, 100, -1), stream)
            streams.append(stream)
            resident[age] = memory("VmRSS")
        for number in range(some):
            for which in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                _, _, streams[which] = model.step(x, streams[which])
                spent[number, which] = 1e3 * (time.perf_counter() - start)
    young, old = np.median(spent, 0)
    return {
        "ms_from_frame_100": young,
        f"ms_from_frame_{frames}": old,
        "old_over_young": float(np.median(spent[:, 1] / spent[:, 0])),
        "ms_fastest_tenth": float(np.quantile(spent, 0.1)),
        "ms_99th_percentile": float(np.quantile(spent, 0.99)),
        "resident_mb_at_frame": {**resident, frames + some: memory("VmRSS")},
    }


def alone(measure: Callable[..., Any], *given: Any) -> Any:
    """What a measurement gives in a process of its own, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *given).result()


def speed(threads: int, frames: int = 45_000, streamed_frames: int = 100_000) -> dict[str, Any]:
    """Frames a second offline and the cost of a streamed frame, of default heads with random weights."""
    ceiling = alone(matmul_ceiling, threads)
    return {
        "threads": threads,
        "frames": frames,
        "matmul_gflops": ceiling / 1e9,
        "both ways": alone(offline, False, threads, frames, ceiling),
        "causal": alone(offline, True, threads, frames, ceiling),
        "stream": alone(streamed, None, streamed_frames),
        "stream, post-processed": {**alone(streamed, FITTED, streamed_frames), "postprocess": FITTED},
    }


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("synthetic", "simulated", "speed"))
    parser.add_argument("--data", help="prepared videos")
    parser.add_argument("--encoder", help="image model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/temporal"))
    parser.add_argument("--name", help="of the runs and the JSON (default: that of the part)")
    args, extra = parser.parse_known_args()
    if args.part == "speed":
        result = speed(cpu_cores())
        print(json.dumps(result, indent=2))
        write_whole(RESULTS / "temporal_speed_cpu.json", (json.dumps(result, indent=2) + "\n").encode())
        return
    name = args.name or args.part
    found = run_heads(args.data, args.encoder, args.seeds, args.runs / name, extra)
    about = {
        "data": args.data,
        "encoder": args.encoder,
        "seeds": args.seeds,
        "videos": len(set(found["groups"])),
    }
    tabulate(found, {**about, "frames": len(found["references"]), "classes": found["classes"]}, name)


if __name__ == "__main__":
    main()
