"""Train a facial-expression model: `accelerate launch train.py --config FILE.yaml [--any_field value]`.

One loop for every stage and method. A stage (learning/<stage>.py) brings model, data, step and judge; a step
turns a batch into gradients; the loop owns time: order, optimizer, schedule, averages, evaluation,
checkpoints.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from modeling_fer.data.feed import Streamed, joined
from modeling_fer.evaluation import plots
from modeling_fer.hub.card import write_card
from modeling_fer.hub.push import push, summary
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.checkpoint import (
    Stateful,
    drop_later,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    write_folder,
)
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.environment import Environment
from modeling_fer.learning.history import History
from modeling_fer.learning.image import image_stage
from modeling_fer.learning.optimization import (
    build_optimizer,
    build_schedule,
    choose_precision,
    seed_step,
    share_statistics,
    use_cpu,
    weight_average,
)
from modeling_fer.learning.pretrain import pretrain_stage
from modeling_fer.learning.video import video_stage

STAGES = {"pretrain": pretrain_stage, "image": image_stage, "video": video_stage}


# --- Parts ---


def shown(metrics: dict[str, float]) -> str:
    """Numbers as one line of text."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def flat(logs: dict[str, Any]) -> dict[str, float]:
    """Numbers for a tracker: a list becomes one number a place."""
    return {
        f"{name}/{i}" if isinstance(value, list) else name: number
        for name, value in logs.items()
        for i, number in enumerate(value if isinstance(value, list) else [value])
    }


def set_up(arguments: FerTrainingArguments) -> tuple[Accelerator, Path | None]:
    """Check that the run can begin or go on; returns the accelerator, and the checkpoint to resume from.

    Raises:
        ValueError: arguments that do not fit the machine, the folder, or the checkpoint.
    """
    run = Path(arguments.output_dir)
    if arguments.tracker != "none" and find_spec(arguments.tracker) is None:
        raise ValueError(f"--tracker {arguments.tracker}: pip install {arguments.tracker}, or choose another")
    accelerator = Accelerator(
        mixed_precision="no",  # a step autocasts where it wants to; evaluation is in float32
        log_with=None if arguments.tracker == "none" else arguments.tracker,
        project_dir=str(run),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if accelerator.device.type == "cpu":
        use_cpu(arguments.threads, accelerator.num_processes)
    arguments.precision = choose_precision(arguments.precision, accelerator.device)
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
    return accelerator, checkpoint


def publish(arguments: FerTrainingArguments) -> str:
    """Write the card of a run's model and push both; returns what was pushed.

    Raises:
        ValueError: it failed, for whatever reason; the message says what to run again.
    """
    run, name, base = Path(arguments.output_dir), arguments.hub_model_id, arguments.hub_base_model
    try:
        write_card(run, name)
        return summary(push(run / "model", name, base_model=base or None))
    except Exception as error:
        again = f"fer card {run} --repo {name} && fer push {run / 'model'} {name}"
        raise ValueError(
            f"the run is done, and its model is in {run / 'model'}, but not on the Hub: "
            f"{' '.join(str(error).split())}. When that is mended, run {again}"
            f"{f' --base-model {base}' if base else ''}, or train.py as now with --resume auto; there "
            "--hub_model_id and --hub_base_model may be others"
        ) from error


# --- The run ---


def train(arguments: FerTrainingArguments) -> dict[str, Any]:
    """Train one stage to its end; returns the best evaluation.

    Raises:
        ValueError: bad data, arguments, or a checkpoint of another configuration.
        FloatingPointError: the loss is no longer finite; the last checkpoint is good.
    """
    accelerator, checkpoint = set_up(arguments)
    run, is_main, device = Path(arguments.output_dir), accelerator.is_main_process, accelerator.device
    environment = Environment(run / "environment.json", accelerator, arguments.precision, checkpoint)

    # Model, data and state
    seed_step(arguments.seed, 0, 0)  # the same initial weights on every process
    stage = STAGES[arguments.stage](arguments, accelerator)
    sampler = stage.labelled.sampler
    total = arguments.max_steps or max(1, round(arguments.epochs * sampler.batches_per_pass))
    average = weight_average(stage.model, arguments.ema_decay).to(device) if arguments.ema_decay else None
    optimizer = build_optimizer(
        stage.model, arguments.learning_rate, arguments.weight_decay, arguments.layer_decay
    )
    finetune = arguments.finetune if arguments.method == "feedback" else 0.0
    schedule = build_schedule(optimizer, arguments.warmup, total, finetune)
    if arguments.compile:
        stage.model.compile()
    model, optimizer = accelerator.prepare(stage.model, optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    step = stage.make_step(model, total)
    objects: dict[str, Stateful] = {"schedule": schedule, "sampler": sampler, "step": step}
    objects |= {} if average is None else {"average": average}
    own: dict[str, Stateful] = {}
    if stage.unlabelled is not None:
        (own if isinstance(stage.unlabelled, Streamed) else objects)["unlabelled"] = stage.unlabelled
    state: dict[str, Any] = {"step": 0, "best": None}
    if checkpoint:
        state = load_checkpoint(accelerator, checkpoint, objects, own)
        accelerator.print(f"resumed from {checkpoint}")
    state["arguments"] = dataclasses.asdict(arguments)
    if is_main:
        arguments.save(run / "arguments.json")
        drop_later(run, state["step"])
    accelerator.init_trackers("logs", config=vars(arguments))
    history = History(run / "history.jsonl", state["step"], is_main)
    environment.update(state["step"])
    released = average.module if average is not None else stage.model

    def backward(loss: torch.Tensor) -> None:
        accelerator.backward(loss / arguments.accumulation_steps)

    # The loop: each pass judges and saves what the steps so far have made, then takes one more
    started_at, logged_at = state["step"], state["step"]
    stream = joined(stage.labelled, stage.unlabelled, arguments.accumulation_steps, device)
    sums: dict[str, torch.Tensor] = {}
    counts: defaultdict[str, float] = defaultdict(float)  # of steps: not every one has every number

    def note(logs: dict[str, torch.Tensor], share: float = 1.0) -> None:
        for name, value in logs.items():
            sums[name] = sums.get(name, 0) + value * share
            counts[name] += share

    moments = (arguments.log_steps, arguments.eval_steps, arguments.save_steps)
    clock = time.perf_counter()
    bar = tqdm(total=total, initial=state["step"], unit="step", disable=None if is_main else True)
    while True:
        now, last = state["step"], state["step"] == total
        is_new = now > started_at

        # Nothing is judged or saved before its loss was found finite.
        if is_new and (last or any(now % n == 0 for n in moments)):
            totals = accelerator.reduce(sums, "mean")
            parts = {name: value.item() / counts[name] for name, value in totals.items()}
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
            history.add({"step": now, "epoch": sampler.epoch, **row})
            bar.set_postfix(loss=f"{parts['loss']:.3f}", refresh=False)
            sums.clear()
            counts.clear()
            logged_at, clock = now, time.perf_counter()

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
            save_checkpoint(accelerator, run, state, objects, own, arguments.keep_checkpoints)
            environment.update(now)
            clock += time.perf_counter() - paused

        if last:
            break

        parts_of_step = [next(stream) for _ in range(arguments.accumulation_steps)]
        seed_step(arguments.seed, now + 1, accelerator.process_index)
        for i, batch in enumerate(parts_of_step):
            waits = i + 1 < arguments.accumulation_steps
            with accelerator.no_sync(model) if waits else contextlib.nullcontext():
                logs = step(batch, backward)
            note(logs, 1 / arguments.accumulation_steps)
        norm = nn.utils.clip_grad_norm_(trainable, arguments.max_grad_norm or math.inf)
        note({"grad_norm": norm.detach()})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        share_statistics(stage.model, accelerator)
        if average is not None:
            average.update_parameters(stage.model)
        note(step.after_update())
        state["step"] += 1
        if stage.unlabelled is not None:
            stage.unlabelled.advance()
        if sampler.advance():
            ended = step.end_round()
            if ended.class_weights is not None:
                sampler.set_class_weights(ended.class_weights)
            if ended.logs:
                logs = {f"round/{name}": value for name, value in ended.logs.items()}
                accelerator.log(flat(logs), step=state["step"])
                history.add({"step": state["step"], "epoch": sampler.epoch, **logs})
        bar.update()

    # What the run leaves
    bar.close()
    for tracker in accelerator.trackers:  # not `end_training`, which parts the processes: more may follow
        tracker.finish()
    if is_main:
        plots.save(plots.learning_curve_figure(history.rows), run / "learning_curve.png")
        print(f"best on validation, at step {state['best_step']}: {shown(state['best_metrics'])}")
        print(f"model: {run / 'model'}")
    if stage.report and (run / "model").exists() and (is_new or not (run / "metrics.json").exists()):
        stage.report(run)  # the best model of a run resumed elsewhere may lie there
    if is_main and arguments.push_to_hub:
        print(publish(arguments))
    return state


def main() -> None:
    """Run from the command line: what the user can mend is one line, not a traceback."""
    try:
        train(parse_arguments())
        Accelerator().end_training()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
