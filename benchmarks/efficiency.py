"""How much of a CPU training uses: pretraining, image stage, a ViT in further rounds; what makes it faster.

Each turn runs train.py with the stage's configuration on drawn faces, in a process of its own: as it is, with
memory that the allocator keeps and puts on huge pages, compiled, and both. The share of the ceiling is what
the model's matrix products and convolutions come to, by torch's own count, over what the device reaches with
large bf16 matrices in the same session; where the rest goes, a profile of one step says.

    python -m benchmarks.efficiency
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import train
from modeling_fer.data.prepare import prepare
from modeling_fer.data.sources.synthetic import SyntheticOptions
from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.labels import CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.environment import device_name
from modeling_fer.learning.image import build_model
from modeling_fer.learning.optimization import choose_precision, cpu_cores, use_cpu
from modeling_fer.learning.pretrain import build_autoencoder
from release import HUGE_PAGES

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "plain": ({}, False),
    "huge pages": (HUGE_PAGES, False),
    "compiled": ({}, True),
    "both": (HUGE_PAGES, True),
}
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn_convolution",
    "aten::convolution_backward",
    "aten::convolution",
)


def stage_arguments(stage: str, data: str, run: Path, *flags: str) -> FerTrainingArguments:
    """The configuration of a stage on other data."""
    given = yaml.safe_load((ROOT / f"configs/release_{stage}.yaml").read_text())
    given |= {"data": data, "output_dir": str(run), "classes": "all", "soft_labels": False, "encoder": ""}
    pretraining = yaml.safe_load((ROOT / "configs/release_pretrain.yaml").read_text())
    sizes = ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads")
    given |= {name: pretraining[name] for name in sizes}
    for name in ("teacher", "distillation"):
        given.pop(name, None)
    if "encoder_config" in given:
        given["encoder_config"] = str(ROOT / given["encoder_config"])
    return parse_arguments([*(f"--{name}={value}" for name, value in given.items()), *flags])


def measure(stage: str, data: str, compiled: bool, steps: int) -> None:
    """Print the images a second of the last half of a run of train.py."""
    with tempfile.TemporaryDirectory() as run:
        moments = [f"--{name}_steps={2 * steps}" for name in ("max", "eval", "save")]
        flags = [*moments, f"--log_steps={steps}", f"--compile={compiled}", "--resume=never"]
        train.train(stage_arguments(stage, data, Path(run), *flags))
        rows = [json.loads(line) for line in Path(run, "history.jsonl").read_text().splitlines()]
    print("images a second:", [row["images_per_second"] for row in rows if "loss" in row][-1])


def ceiling() -> float:
    """Floating-point operations a second of products of large bf16 matrices, the best of a few turns."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * 2048**3 / (time.perf_counter() - start))
    return best


def anatomy(stage: str, batch: int) -> tuple[float, float]:
    """Operations of products an image (forward and backward), and products' share of a plain step's time."""
    arguments = stage_arguments(stage, "unset", Path("unset"))
    is_pretraining = stage == "pretrain"
    model: Any = build_autoencoder(arguments) if is_pretraining else build_model(arguments, list(CLASSES))
    images = torch.randn(batch, 3, arguments.image_size, arguments.image_size)
    labels = torch.arange(batch) % len(CLASSES)

    def step() -> None:
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=choose_precision("auto", torch.device("cpu")) == "bf16"
        ):
            output = model(pixel_values=images)
        loss = (
            output.loss
            if is_pretraining
            else torch.nn.functional.cross_entropy(output.logits.float(), labels)
        )
        loss.backward()
        model.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    return counter.get_total_flops() / batch, products / sum(event.self_cpu_time_total for event in events)


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="measured steps of each turn, after as many of warm-up"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("STAGE", "DATA"), help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        stage, data = args.measure
        measure(stage, data, args.compiled, args.steps)
        return
    use_cpu(0, 1)
    top = ceiling()
    result: dict[str, Any] = {
        "device": device_name(torch.device("cpu")),
        "cores": cpu_cores(),
        "ceiling_gflops": top / 1e9,
        "torch": torch.__version__,
        "stages": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        drawn = SyntheticOptions(image_size=48, train=2048, validation=64, test=0, unlabeled=0)
        prepare("synthetic", drawn, data, show_progress=False)
        # The autoencoder; the convolutional network; a ViT in a further round, without the teacher's pass.
        for stage in ("pretrain", "image", "second"):
            rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
            for _ in range(args.turns):
                for name, (environment, compiled) in VARIANTS.items():
                    command = [sys.executable, "-m", "benchmarks.efficiency", "--measure", stage, data]
                    command += ["--steps", str(args.steps), *(["--compiled"] if compiled else [])]
                    told = subprocess.run(
                        command,
                        env={**os.environ, **environment},
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    rates[name].append(float(told.stdout.rsplit(":", 1)[1]))
                    print(f"{stage}, {name}: {rates[name][-1]:.0f} images/s", flush=True)
            batch = yaml.safe_load((ROOT / f"configs/release_{stage}.yaml").read_text())["batch_size"]
            operations, share = anatomy(stage, batch)
            middle = {name: statistics.median(found) for name, found in rates.items()}
            result["stages"][stage] = {
                "batch_size": batch,
                "mflop_an_image": operations / 1e6,
                "images_per_second": rates,
                "median": middle,
                "over_plain": {
                    name: statistics.median(a / b for a, b in zip(found, rates["plain"], strict=True))
                    for name, found in rates.items()
                },
                "share_of_ceiling": {name: rate * operations / top for name, rate in middle.items()},
                "share_of_time_in_products_plain": share,
            }
    print(json.dumps(result, indent=2))
    write_whole(RESULTS / "efficiency_cpu.json", (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
