"""Training speed: the whole loop of train.py against bare passes of the same model.

Before each step of the loop comes a bare one of another copy of the model, same batch and dtype, so that both
see the same machine from one second to the next. Reported is the time of all bare steps over that of all loop
steps, and the quartiles of single steps. What is missing to 1 pays for loading, augmentation, optimizer,
clipping, averages and logs (every fifth step here). Bare is forward and backward over the labelled batch;
with `--method fixmatch`, forward and backward over labelled and strong views in one batch, and a forward pass
without gradients over weak views. A GPU is waited for after each step, so that the loop cannot prepare a
batch while it computes: there the ratio is below that of an undisturbed loop.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
import transformers

import train
from modeling_fer.data.prepare import prepare
from modeling_fer.data.sources.synthetic import SyntheticOptions
from modeling_fer.labels import CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.fixmatch import FixMatchStep
from modeling_fer.learning.image import build_model
from modeling_fer.learning.optimization import choose_precision, cpu_cores, use_cpu
from modeling_fer.learning.step import SupervisedStep

RESULTS = Path(__file__).parent / "results"
WARM_UP = 4  # steps


def bare_step(arguments: FerTrainingArguments, device: torch.device) -> Callable[[], None]:
    """A function of forward and backward alone, on one batch that is already on the device."""
    model: Any = build_model(arguments, list(CLASSES))
    model.to(device)
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

    return step


def side_by_side(arguments: FerTrainingArguments, device: torch.device) -> list[tuple[float, float]]:
    """Seconds of a bare step and of the loop's step that follows it, for each step of a run but the last."""
    bare = bare_step(arguments, device)
    method = FixMatchStep if arguments.method == "fixmatch" else SupervisedStep
    compute = method.__call__
    pairs: list[tuple[float, float]] = []
    open_pair: list[float] = []  # seconds of the bare step, and when it had ended

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self: Any, *args: Any) -> Any:
        """The loop's own, after a bare one; the loop's step lasts from the end of that to the next call."""
        start = now()
        if open_pair:
            pairs.append((open_pair[0], start - open_pair[1]))
        bare()
        end = now()
        open_pair[:] = end - start, end
        return compute(self, *args)

    with mock.patch.object(method, "__call__", step):
        train.train(arguments)
    return pairs


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16"))
    parser.add_argument("--method", default="supervised", choices=("supervised", "fixmatch"))
    parser.add_argument("--batch-size", type=int, default=64, help="labelled faces of a step")
    parser.add_argument("--mu", type=int, default=4, help="unlabelled faces for each of them, with fixmatch")
    parser.add_argument("--steps", type=int, default=30, help="measured steps, after a few of warm-up")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2")
    device = accelerate.Accelerator().device
    precision = choose_precision(args.precision, device)
    if device.type == "cpu":
        use_cpu(0, 1)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(
            "synthetic",
            SyntheticOptions(image_size=112, train=512, validation=64, test=64, unlabeled=512),
            data,
            show_progress=False,
        )
        steps = WARM_UP + args.steps + 1
        arguments = FerTrainingArguments(
            data=str(data),
            output_dir=f"{folder}/run",
            image_size=112,
            patch_size=16,
            method=args.method,
            batch_size=args.batch_size,
            mu=args.mu,
            max_steps=steps,
            log_steps=5,
            eval_steps=steps,
            save_steps=steps,
            tracker="none",
            precision=precision,
        )
        pairs = side_by_side(arguments, device)[WARM_UP:]

    ratios = [bare / loop for bare, loop in pairs]
    ratio = sum(bare for bare, _ in pairs) / sum(loop for _, loop in pairs)
    result = {
        "model": "ViT-Tiny/16, 112 px, all weights trained",
        "method": args.method,
        "batch_size": args.batch_size,
        "unlabelled_per_labelled": args.mu if args.method == "fixmatch" else 0,
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_cores()} CPU cores",
        "threads": torch.get_num_threads(),
        "seconds_bare": [bare for bare, _ in pairs],
        "seconds_loop": [loop for _, loop in pairs],
        "ratio": ratio,
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "step_cost_over_bare": 1 / ratio,
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
    quartiles = ", ".join(f"{one:.3f}" for one in result["ratio_quartiles"])
    print(f"whole loop over bare: {ratio:.3f} (quartiles of steps {quartiles})")
    print(f"cost of a step over bare: {result['step_cost_over_bare']:.3f}, written {path}")


if __name__ == "__main__":
    main()
