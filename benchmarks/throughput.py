"""Training speed: the whole loop of train.py against bare passes of the same model.

Both run the same model, batch and dtype on the same device, turn about, several times; each turn's ratio is
taken and the median reported. What is missing to 1 pays for loading, augmentation, optimizer, clipping,
averages and logs. Bare is forward and backward over the labelled batch; with `--method fixmatch`, forward and
backward over labelled and strong views in one batch, and a forward pass without gradients over weak views.

    python -m benchmarks.throughput                     # ViT-Tiny, 112 px
    python -m benchmarks.throughput --precision no      # in float32
    python -m benchmarks.throughput --method fixmatch   # the cost of a semi-supervised step
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import accelerate
import torch
import transformers

import train
from modeling_fer.data.prepare import prepare
from modeling_fer.data.sources.synthetic import SyntheticOptions
from modeling_fer.labels import CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.image import build_model
from modeling_fer.learning.optimization import choose_precision, cpu_cores, use_cpu

RESULTS = Path(__file__).parent / "results"


def loop_speed(arguments: FerTrainingArguments, run: Path) -> float:
    """Images a second of the last half of a run of train.py."""
    arguments.output_dir = str(run)
    train.train(arguments)
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row["images_per_second"] for row in rows if "loss" in row][-1]


def bare_speed(arguments: FerTrainingArguments, steps: int) -> float:
    """Images a second of forward and backward alone, on one batch that is already on the device."""
    device = accelerate.Accelerator().device
    model = build_model(arguments, list(CLASSES)).to(device)
    side = arguments.image_size
    unlabelled = arguments.mu * arguments.batch_size if arguments.method == "fixmatch" else 0
    images = torch.randn(arguments.batch_size + unlabelled, 3, side, side, device=device)
    weak = torch.randn(unlabelled, 3, side, side, device=device)
    labels = torch.arange(len(images), device=device) % len(CLASSES)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            if unlabelled:
                with torch.no_grad():
                    model(pixel_values=weak)
            logits = model(pixel_values=images).logits
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    for _ in range(steps):  # as much warm-up as the loop has
        step()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return steps * arguments.batch_size / (time.perf_counter() - start)


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16"))
    parser.add_argument("--method", default="supervised", choices=("supervised", "fixmatch"))
    parser.add_argument("--batch-size", type=int, default=64, help="labelled faces of a step")
    parser.add_argument("--mu", type=int, default=4, help="unlabelled faces for each of them, with fixmatch")
    parser.add_argument(
        "--steps", type=int, default=12, help="measured steps of each turn, after as many of warm-up"
    )
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    device = accelerate.Accelerator().device
    precision = choose_precision(args.precision, device)
    if device.type == "cpu":
        use_cpu(0, 1)

    turns = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(
            "synthetic",
            SyntheticOptions(image_size=112, train=512, validation=64, test=64, unlabeled=512),
            data,
            show_progress=False,
        )
        for turn in range(args.turns):
            arguments = FerTrainingArguments(
                data=str(data),
                output_dir="unset",
                image_size=112,
                patch_size=16,
                method=args.method,
                batch_size=args.batch_size,
                mu=args.mu,
                max_steps=2 * args.steps,
                log_steps=args.steps,
                eval_steps=2 * args.steps,
                save_steps=2 * args.steps,
                tracker="none",
                precision=precision,
            )
            bare = bare_speed(arguments, args.steps)
            loop = loop_speed(arguments, Path(folder) / f"run{turn}")
            turns.append({"bare": bare, "loop": loop, "ratio": loop / bare})
            print(f"bare {bare:.1f} images/s, whole loop {loop:.1f} images/s, ratio {loop / bare:.3f}")

    ratios = [turn["ratio"] for turn in turns]
    result = {
        "model": "ViT-Tiny/16, 112 px, all weights trained",
        "method": args.method,
        "batch_size": args.batch_size,
        "unlabelled_per_labelled": args.mu if args.method == "fixmatch" else 0,
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_cores()} CPU cores",
        "threads": torch.get_num_threads(),
        "turns": turns,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "step_cost_over_bare": 1 / statistics.median(ratios),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    RESULTS.mkdir(exist_ok=True)
    name = "throughput" if args.method == "supervised" else f"throughput_{args.method}"
    path = RESULTS / f"{name}_{device.type}_{precision}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    low, high = result["ratio_range"]
    print(f"whole loop over bare: {result['ratio_median']:.3f} (turns {low:.3f} to {high:.3f})")
    print(f"cost of a step over bare: {result['step_cost_over_bare']:.3f}, written {path}")


if __name__ == "__main__":
    main()
