"""Train a facial-expression model: `accelerate launch train.py --config FILE.yaml [--any_field value]`.

One loop for every stage and method. A stage (learning/<stage>.py) brings model, data, step and judge; a step
turns a batch into gradients; the loop owns time: order, optimizer, schedule, averages, evaluation,
checkpoints.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from modeling_fer.data.dataset import as_batch
from modeling_fer.evaluation import plots
from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.learning.arguments import FerTrainingArguments, parse_arguments
from modeling_fer.learning.checkpoint import (
    drop_later,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    write_folder,
)
from modeling_fer.learning.image import image_stage
from modeling_fer.learning.stage import Stage

STAGES = {"image": image_stage}


# --- Parts ---


def choose_precision(wanted: str, device: torch.device) -> str:
    """`auto` to what the launcher was told, else to bf16 where the device has instructions for it, else no.

    Raises:
        ValueError: the launcher was told a precision that is not offered.
    """
    if wanted != "auto":
        return wanted
    if (told := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        if told != "bf16":
            raise ValueError(f"accelerate launch --mixed_precision {told} is not offered; use bf16 or no")
        return told
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "no"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "no"


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_optimizer(model: nn.Module, arguments: FerTrainingArguments) -> torch.optim.AdamW:
    """AdamW on what is trainable; weight decay on matrices, not on biases, norms, tokens and positions."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = {name: p.ndim >= 2 and "position" not in name and "token" not in name for name, p in trainable}
    groups = [
        {"params": [p for name, p in trainable if decays[name]], "weight_decay": arguments.weight_decay},
        {"params": [p for name, p in trainable if not decays[name]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98), fused=True)


def weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights; it looks back further as steps pass, up to `decay`."""

    def average(averaged: Any, current: Any, seen: torch.Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(seen)) / (10 + int(seen)))
        torch._foreach_lerp_(averaged, current, weight)

    return AveragedModel(model, multi_avg_fn=average)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the randomness of a step a pure function of its place: a resumed run draws what it would have."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def batches(stage: Stage, size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for this process without end: round after round of the sampler, from where it stands."""
    loader = DataLoader(
        stage.dataset, size, sampler=stage.sampler, collate_fn=as_batch, pin_memory=device.type == "cuda"
    )
    while True:
        for batch in loader:
            yield {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def shown(metrics: dict[str, float]) -> str:
    """Numbers as one line of text."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


class History:
    """The run's numbers by step, one JSON object a line; resuming drops what came after the checkpoint."""

    def __init__(self, path: Path, step: int, is_main: bool) -> None:
        self.path, self.is_main, self.rows = path, is_main, []
        if is_main:
            if path.exists() and step:
                rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
                self.rows = [row for row in rows if row["step"] <= step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if self.is_main:
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


# --- The run ---


def train(arguments: FerTrainingArguments) -> dict[str, Any]:
    """Train one stage to its end; returns the best evaluation.

    Raises:
        ValueError: bad data, arguments, or a checkpoint of another configuration.
        FloatingPointError: the loss is no longer finite; the last checkpoint is good.
    """
    run = Path(arguments.output_dir)
    if arguments.tracker != "none" and find_spec(arguments.tracker) is None:
        raise ValueError(f"--tracker {arguments.tracker}: pip install {arguments.tracker}, or choose another")
    accelerator = Accelerator(
        mixed_precision="no",  # a step autocasts where it wants to; evaluation is in float32
        log_with=None if arguments.tracker == "none" else arguments.tracker,
        project_dir=str(run),
    )
    is_main, device = accelerator.is_main_process, accelerator.device
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device.type == "cpu":  # accelerate launch leaves one thread a process unless told otherwise
        torch.set_num_threads(arguments.threads or max(1, cpu_cores() // accelerator.num_processes))
    arguments.precision = choose_precision(arguments.precision, device)
    share = accelerator.num_processes * arguments.accumulation_steps
    if arguments.batch_size % share:
        raise ValueError(
            f"--batch_size {arguments.batch_size} does not divide by {accelerator.num_processes} processes x "
            f"{arguments.accumulation_steps} accumulation steps"
        )
    checkpoint = find_checkpoint(run, arguments.resume)
    if checkpoint and (other := arguments.differences(read_state(checkpoint)["arguments"])):
        raise ValueError(
            f"{checkpoint} is of another configuration ({'; '.join(other)}); resume with the same, "
            "or use another --output_dir"
        )
    if not checkpoint and arguments.resume == "never" and (run / "history.jsonl").exists():
        raise ValueError(
            f"{run} holds a run already; continue it with --resume auto, or choose another --output_dir"
        )
    accelerator.wait_for_everyone()

    # Model, data and state
    seed_step(arguments.seed, 0, 0)  # the same initial weights on every process
    stage = STAGES[arguments.stage](arguments, accelerator)
    total = arguments.max_steps or max(1, round(arguments.epochs * stage.sampler.batches_per_epoch))
    average = weight_average(stage.model, arguments.ema_decay).to(device) if arguments.ema_decay else None
    optimizer = build_optimizer(stage.model, arguments)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(arguments.warmup * total), total)
    if arguments.compile:
        stage.model.compile()
    model, optimizer = accelerator.prepare(stage.model, optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    step = stage.make_step(model)
    objects = {"schedule": schedule, "sampler": stage.sampler, "step": step}
    if average is not None:
        objects["average"] = average
    state: dict[str, Any] = {"step": 0, "best": None}
    if checkpoint:
        state = load_checkpoint(accelerator, checkpoint, objects)
        accelerator.print(f"resumed from {checkpoint}")
    state["arguments"] = dataclasses.asdict(arguments)
    if is_main:
        arguments.save(run / "arguments.json")
        drop_later(run, state["step"])
    accelerator.init_trackers("logs", config=vars(arguments))
    history = History(run / "history.jsonl", state["step"], is_main)
    released = average.module if average is not None else stage.model

    def backward(loss: torch.Tensor) -> None:
        accelerator.backward(loss / arguments.accumulation_steps)

    # The loop: each pass judges and saves what the steps so far have made, then takes one more
    started_at, logged_at = state["step"], state["step"]
    stream = batches(stage, arguments.batch_size // share, device)
    sums: dict[str, torch.Tensor] = {}
    moments = (arguments.log_steps, arguments.eval_steps, arguments.save_steps)
    clock = time.perf_counter()
    bar = tqdm(total=total, initial=state["step"], unit="step", disable=None if is_main else True)
    while True:
        now, last = state["step"], state["step"] == total
        is_new = now > started_at

        # Nothing is judged or saved before its loss was found finite.
        if is_new and (last or any(now % n == 0 for n in moments)):
            totals = accelerator.reduce(sums, "mean")
            parts = {name: value.item() / (now - logged_at) for name, value in totals.items()}
            if wrong := [
                f"{name} became {value}" for name, value in parts.items() if not math.isfinite(value)
            ]:
                raise FloatingPointError(
                    f"{' and '.join(wrong)} between steps {logged_at} and {now}; the newest checkpoint in "
                    f"{run / 'checkpoints'} is from before that. Look at the data and train again "
                    "with a lower --learning_rate in a new --output_dir"
                )
            rate = (now - logged_at) * arguments.batch_size / (time.perf_counter() - clock)
            row = {**parts, "learning_rate": schedule.get_last_lr()[0], "images_per_second": rate}
            accelerator.log({f"train/{name}": value for name, value in row.items()}, step=now)
            history.add({"step": now, "epoch": stage.sampler.epoch, **row})
            bar.set_postfix(loss=f"{parts['loss']:.3f}", refresh=False)
            sums, logged_at, clock = {}, now, time.perf_counter()

        if is_new and (now % arguments.eval_steps == 0 or last):
            paused = time.perf_counter()
            metrics = stage.evaluate(released)
            accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=now)
            history.add({"step": now, **{f"validation/{name}": value for name, value in metrics.items()}})
            accelerator.print(f"step {now} of {total}: loss {parts['loss']:.3f}, {shown(metrics)}")
            if state["best"] is None or metrics[stage.criterion] > state["best"]:
                state |= {"best": metrics[stage.criterion], "best_step": now, "best_metrics": metrics}
                if is_main:
                    write_folder(run / "model", lambda folder: stage.save(released, folder))
            clock += time.perf_counter() - paused

        if is_new and (now % arguments.save_steps == 0 or last):
            paused = time.perf_counter()
            save_checkpoint(accelerator, run, state, objects, arguments.keep_checkpoints)
            clock += time.perf_counter() - paused

        if last:
            break

        parts_of_step = [next(stream) for _ in range(arguments.accumulation_steps)]
        seed_step(arguments.seed, now + 1, accelerator.process_index)
        for i, batch in enumerate(parts_of_step):
            waits = i + 1 < arguments.accumulation_steps
            with accelerator.no_sync(model) if waits else contextlib.nullcontext():
                logs = step(batch, backward)
            for name, value in logs.items():
                sums[name] = sums.get(name, 0) + value / arguments.accumulation_steps
        norm = nn.utils.clip_grad_norm_(trainable, arguments.max_grad_norm or math.inf)
        sums["grad_norm"] = sums.get("grad_norm", 0) + norm.detach()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update_parameters(stage.model)
        if stage.sampler.advance() and (weights := step.end_round()) is not None:
            stage.sampler.set_class_weights(weights)
        state["step"] += 1
        bar.update()

    # What the run leaves
    bar.close()
    accelerator.end_training()
    if is_main:
        plots.save(plots.learning_curve_figure(history.rows), run / "learning_curve.png")
        print(f"best on validation, at step {state['best_step']}: {shown(state['best_metrics'])}")
        print(f"model: {run / 'model'}")
    return state


def main() -> None:
    """Run from the command line: what the user can mend is one line, not a traceback."""
    try:
        train(parse_arguments())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
