"""Label any number of faces with a trained model, and make the sure ones a data set to train on.

    python pseudo_label.py label  --model runs/demo/first/model --images FACES --out runs/pseudo
    python pseudo_label.py select --out runs/pseudo --rule quota --quota 5000 --against data/demo
    python pseudo_label.py rounds --model runs/demo/first/model --images FACES --out runs/rounds \\
        --labelled data/demo --config configs/demo.yaml --launch "accelerate launch"

`label` runs under `accelerate launch` too, and many times at once on machines that share the folder: workers
take units of work that nobody has in hand. After a kill, start it again: what was finished stays. `select`
chooses by confidence without the model, as often as you like. `rounds` is label, select and train, again and
again, each round labelled by the model of the last; it prints the commands that it runs. `label` exits with
75 where other workers still have units in hand.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from huggingface_hub import snapshot_download
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from modeling_fer.data.augment import Normalize
from modeling_fer.data.images import HUB, Face, batches, decoded, find_source, read
from modeling_fer.data.pseudo import Job, LabelOptions, changes, flags, open_job, predicted, revision_of
from modeling_fer.data.pseudo_set import FREE, RoundOptions, followed, select, write_whole
from modeling_fer.data.selection import SelectOptions
from modeling_fer.learning.inference import class_names, load_classifier, over_all_classes
from modeling_fer.learning.optimization import choose_precision, cpu_cores


@torch.inference_mode()
def predict_views(model: nn.Module, images: torch.Tensor, precision: str) -> torch.Tensor:
    """Class probabilities `(2, B, C)` in float32 of normalised images `(B, 3, H, W)` and of their mirrors."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = [model(pixel_values=view).logits for view in (images, images.flip(-1))]
    return torch.stack(logits).float().softmax(-1)


def label(out: str, options: LabelOptions) -> None:
    """Label what is left of a job, as one of its workers.

    Raises:
        FileNotFoundError: no such model or images.
        ValueError: the folder holds another job, or the model's output is not finite.
        SystemExit: with 75, other workers have units in hand.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))  # for the slowest, at the end
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    cores = max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    # On CPUs each core has a batch of its own: threads that share one wait for those that decode meanwhile.
    at_once = cores if device.type == "cpu" else 1
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = options.model.removeprefix(HUB)
    folder = Path(snapshot_download(name) if name != options.model else name)
    model, processor = load_classifier(folder, mirror=False)  # both views are asked for
    joined = Job(out) if (Path(out) / "job").exists() else None
    precision = joined.settings["precision"] if joined and options.precision == "auto" else options.precision
    revision = joined.source.get("revision") if joined else None
    settings = {"model_revision": revision_of(folder), "precision": choose_precision(precision, device)}
    source = find_source(options.images, options.split, options.column, options.unit_rows, revision)
    job = open_job(out, source, settings, {"model": options.model})
    model.to(device)
    normalize = Normalize(processor.image_mean, processor.image_std).to(device)
    size, classes = processor.size["height"], class_names(model)
    batch_size = options.batch_size or (64 if device.type == "cpu" else 256)

    def predict(batch: list[Face]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([face.pixels for face in batch])).to(device)
        return predict_views(model, normalize(pixels), settings["precision"]).flatten(0, 1)

    progress = tqdm(desc="labelling", unit="image", disable=None if accelerator.is_main_process else True)
    with (
        progress,
        ThreadPoolExecutor(options.threads or cores) as pool,
        ThreadPoolExecutor(at_once) as models,
    ):
        todo = job.unfinished(len(job.units) * rank // world)  # workers start apart and meet rarely
        for turn, unit in enumerate(todo):
            progress.set_postfix_str(f"unit {turn + 1} of {len(todo)}")
            with job.claimed(unit, 60 * options.stale_minutes) as beat:
                if beat is None:
                    continue
                with job.writer(unit) as writer:
                    encoded = read(source, job.units[unit], job.folder)
                    images = decoded(encoded, size, pool, 2 * batch_size)
                    faces = batches(images, batch_size, writer.skip)
                    for batch, views in predicted(faces, predict, models, at_once):
                        probabilities = over_all_classes(views.cpu().numpy(), classes)
                        writer.add(batch, probabilities.reshape(2, len(batch), -1))
                        progress.update(len(batch))
                        beat()
    accelerator.wait_for_everyone()  # a launcher ends all of its processes when one returns an error
    accelerator.end_training()
    if left := job.finish():
        print(f"{left} of {len(job.units)} units are in other workers' hands; if those died, run this again")
        sys.exit(os.EX_TEMPFAIL)
    if accelerator.is_main_process:
        print(f"all is labelled; choose what to keep: pseudo_label.py select --out {out}")


def run_rounds(out: str, labels: LabelOptions, choice: SelectOptions, options: RoundOptions) -> None:
    """Label, select and train, round after round; each command resumes what it finds, so all of it does.

    Raises:
        ValueError: the folder holds rounds with other options.
        subprocess.CalledProcessError: a command failed; it has told why.
    """
    scripts, launch = Path(__file__).parent, shlex.split(options.launch)
    config, first = dict(yaml.safe_load(Path(options.config).read_text()) or {}), labels.model
    choice = dataclasses.replace(choice, against=[options.labelled, *choice.against])
    for number in range(1, options.rounds + 1):
        folder = f"{out}/round-{number}"
        told, data = Path(folder, "options.json"), Path(folder, "data")
        given = {**vars(labels), **vars(choice), **vars(options)}
        follow = followed(config, first, labels.model)
        given = {name: given[name] for name in given.keys() - FREE} | {"config": config | follow}
        if told.exists() and (other := changes(json.loads(told.read_text()), given)):
            raise ValueError(f"{folder} was made with other options ({other}); use those, or another --out")
        print(f"round {number}", flush=True)
        command = str(scripts / "pseudo_label.py")
        run_command([*launch, command, "label", *flags(labels), "--out", folder])
        if not (told.exists() and data.exists()):
            run_command([sys.executable, command, "select", *flags(choice), "--out", folder])
            # Written last: it tells that the data set is whole, and of these options.
            write_whole(told, json.dumps(given, indent=2, sort_keys=True) + "\n")
        training = ["--config", options.config, "--data", f"labelled={options.labelled},pseudo={folder}"]
        training += ["--output_dir", f"{folder}/run", "--resume", "auto"]
        newest = [f"--{name}={model}" for name, model in follow.items()]
        training += [*newest, *shlex.split(options.train_args)]
        if "cache_dir" not in config and "--cache_dir" not in options.train_args:
            training += ["--cache_dir", f"{folder}/cache"]
        run_command([*launch, str(scripts / "train.py"), *training])
        labels = dataclasses.replace(labels, model=f"{folder}/run/model")


def run_command(command: list[str], timeout: float | None = None, environment: Any = None) -> None:
    """Run a command; it is told to end when this process is, or after `timeout` seconds, with its own."""
    print(shlex.join(command), flush=True)
    process = subprocess.Popen(command, process_group=0, env={**os.environ, **(environment or {})})
    try:
        code = process.wait(timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


COMMANDS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "label": (label, (LabelOptions,)),
    "select": (lambda out, options: print(select(out, options).text()), (SelectOptions,)),
    "rounds": (run_rounds, (LabelOptions, SelectOptions, RoundOptions)),
}


def main(argv: list[str] | None = None) -> None:
    """Run from the command line: what the user can mend is one line, not a traceback."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    for name, (_, kinds) in COMMANDS.items():
        command: Any = commands.add_parser(name, dataclass_types=kinds)
        command.add_argument("--out", required=True, help="folder of the job and of its data set")
    args = vars(parser.parse_args(argv))
    run, kinds = COMMANDS[args["command"]]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a worker that is told to go gives its unit back
    try:
        given = [kind(**{f.name: args[f.name] for f in dataclasses.fields(kind)}) for kind in kinds]
        run(args["out"], *given)
    except (ValueError, OSError, yaml.YAMLError, subprocess.CalledProcessError) as error:
        sys.exit(f"pseudo_label.py: {error}")


if __name__ == "__main__":
    main()
