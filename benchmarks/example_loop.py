"""Training speed of train.py against the loop of transformers' example of image classification.

The example is `run_image_classification_no_trainer.py` of transformers' examples: an accelerate loop over a
`DataLoader` of a `datasets` split that decodes, crops and flips one image after another. Its transforms come
from torchvision, which need not be installed here; the same ones are made with PIL instead, and all else as
there: no workers, stock AdamW, linear schedule. Model, batch, precision and threads are equal. train.py
decodes all faces once, before its clock starts; the example decodes them again in every pass. Each turn runs
the example, train.py, and train.py compiled, each in a process of its own, another one first in each turn;
ratios are of one turn.

    python -m benchmarks.example_loop                # ViT-Tiny/16 at 112 px
    python -m benchmarks.example_loop --size small   # the size of the released ViT, 48 px
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator, PartialState
from datasets import load_dataset
from PIL import Image
from torch.utils.data import DataLoader

import train
from benchmarks.temporal import alone
from modeling_fer.data.prepare import prepare
from modeling_fer.data.sources.synthetic import SyntheticOptions
from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.labels import CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.environment import device_name
from modeling_fer.learning.image import build_model
from modeling_fer.learning.optimization import choose_precision, cpu_cores

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"image_size": 112, "patch_size": 16},
    "small": {"image_size": 48, "patch_size": 8, "num_layers": 6},
}


def transform(image: Image.Image, side: int, draw: np.random.Generator) -> torch.Tensor:
    """A random part, 0.08 to 1 of the area, resized, perhaps mirrored, scaled and normalised."""
    image = image.convert("RGB")
    area = image.width * image.height * draw.uniform(0.08, 1)
    ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
    left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - height)
    image = image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(0.5).div_(0.5)


def example_speed(arguments: FerTrainingArguments, steps: int) -> float:
    """Images a second of the example's loop, after as many steps of warm-up."""
    torch.set_num_threads(cpu_cores())
    accelerator = Accelerator(mixed_precision=arguments.precision)
    draw = np.random.default_rng(0)

    def transforms(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [transform(image, arguments.image_size, draw) for image in batch["image"]]
        return {"pixel_values": pixels, "labels": batch["expression"]}

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}

    faces: Any = load_dataset(arguments.data, split="train")
    loader: Any = DataLoader(
        faces.with_transform(transforms), arguments.batch_size, shuffle=True, collate_fn=collate
    )
    model: Any = build_model(arguments, list(CLASSES))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    schedule = transformers.get_scheduler("linear", optimizer, 0, 2 * steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    done, start = 0, 0.0
    while done < 2 * steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            done += 1
            if done in (steps, 2 * steps):
                loss.item()  # waits for the device
            if done == steps:
                start = time.perf_counter()
            if done == 2 * steps:
                break
    return steps * arguments.batch_size / (time.perf_counter() - start)


def loop_speed(arguments: FerTrainingArguments, run: Path, compiled: bool) -> float:
    """Images a second of the last half of a run of train.py."""
    arguments.output_dir, arguments.compile = str(run), compiled
    train.train(arguments)
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row["images_per_second"] for row in rows if "loss" in row][-1]


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny", choices=sorted(SIZES))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12, help="measured in each turn, after as many before")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    device = PartialState().device
    turns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        data, side = f"{folder}/data", SIZES[args.size]["image_size"]
        drawn = SyntheticOptions(image_size=side, train=1024, validation=64, test=64, unlabeled=0)
        prepare("synthetic", drawn, data, show_progress=False)
        moments = dict.fromkeys(("max_steps", "eval_steps", "save_steps"), 2 * args.steps)
        for turn in range(args.turns):
            arguments = FerTrainingArguments(
                data=data,
                output_dir="unset",
                batch_size=args.batch_size,
                log_steps=args.steps,
                tracker="none",
                precision=choose_precision("auto", device),
                **SIZES[args.size],
                **moments,
            )
            run = Path(folder, str(turn))
            ways: dict[str, tuple[Any, ...]] = {
                "example": (example_speed, arguments, args.steps),
                "train.py": (loop_speed, arguments, run / "plain", False),
                "train.py, compiled": (loop_speed, arguments, run / "compiled", True),
            }
            names = list(ways)
            found = {name: alone(*ways[name]) for name in names[turn % 3 :] + names[: turn % 3]}
            turns.append(found)
            print(", ".join(f"{name} {speed:.1f}" for name, speed in found.items()), "images/s", flush=True)
    over = {name: [turn[name] / turn["example"] for turn in turns] for name in ways if name != "example"}
    result = {
        "size": SIZES[args.size],
        "batch_size": args.batch_size,
        "precision": arguments.precision,
        "device": device_name(device),
        "threads": cpu_cores(),
        "images_per_second": turns,
        "over_example": {
            name: {"median": statistics.median(r), "range": [min(r), max(r)]} for name, r in over.items()
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = RESULTS / f"example_loop_{args.size}_{device.type}.json"
    write_whole(path, (json.dumps(result, indent=2) + "\n").encode())
    for name, ratios in over.items():
        middle = statistics.median(ratios)
        print(f"{name} over the example: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
