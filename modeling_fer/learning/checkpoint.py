"""Checkpoints: all that decides how a run goes on, written whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

# How a full disk is reported: by Python, by torch, by safetensors.
NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)
PATTERN = re.compile(r"step_(\d+)$")


class Stateful(Protocol):
    """Anything with a state to save."""

    def state_dict(self) -> Any:
        """State as tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: Any) -> Any:
        """Take over a state."""


def write_folder(folder: Path, write: Callable[[Path], None], accelerator: Accelerator | None = None) -> None:
    """Let `write` fill a temporary folder, then put it in the place of `folder`, which stays until then.

    With an accelerator all processes call this, each `write`s its part into the same temporary folder, and
    the main process puts it in place when all are done.

    Raises:
        OSError: writing failed (a full disk, say); the message names the folder, and what stood there is
            untouched.
    """
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    is_main = accelerator is None or accelerator.is_main_process
    fresh, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    try:
        if is_main:
            if old.exists() and not folder.exists():  # an earlier process ended between the two renames below
                os.rename(old, folder)
            for leftover in (fresh, old):
                shutil.rmtree(leftover, ignore_errors=True)
            fresh.mkdir(parents=True)
        wait()
        write(fresh)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not isinstance(error, NOT_WRITTEN):
            raise
        raise OSError(
            f"could not write {folder}: {error}; what stood there is kept. "
            "Mend the cause (space, permissions), then --resume auto"
        ) from error
    wait()
    if is_main:
        if folder.exists():
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in (run / "checkpoints").glob("step_*") if (m := PATTERN.search(p.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    accelerator: Accelerator,
    run: Path,
    state: Mapping[str, Any],
    objects: Mapping[str, Stateful],
    own: Mapping[str, Stateful],
    keep: int,
) -> None:
    """Write `run/checkpoints/step_N` and delete all but the newest `keep`. Call on every process.

    accelerate writes model, optimizer and random states; `objects` (schedule, sampler, averages, the step's
    own state) are the same on every process and go into `objects.pt`; `own` are those whose state every
    process has for itself (the place in a stream) and go into `own_<rank>.pt`; `state` (plain numbers and
    names, with `step`) goes into `state.json`.
    """

    def write(folder: Path) -> None:
        accelerator.save_state(str(folder))
        torch.save({name: o.state_dict() for name, o in own.items()}, folder / own_file(accelerator))
        if accelerator.is_main_process:
            torch.save({name: o.state_dict() for name, o in objects.items()}, folder / "objects.pt")
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    write_folder(run / "checkpoints" / f"step_{state['step']:08d}", write, accelerator)
    if accelerator.is_main_process:
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def own_file(accelerator: Accelerator) -> str:
    """Name of the file of this process's own state."""
    return f"own_{accelerator.process_index}.pt"


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` asks for.

    None for `never`; the newest, or None if there is none, for `auto`; else the folder that is named.

    Raises:
        FileNotFoundError: a named folder is no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return next(reversed(checkpoints(run)), None)
    folder = Path(resume)
    if not (folder / "state.json").exists():
        raise FileNotFoundError(
            f"{folder} is no checkpoint (it has no state.json); pass a checkpoints/step_N folder, or auto"
        )
    return folder


def drop_later(run: Path, step: int) -> None:
    """Delete checkpoints of later steps: a run that starts over from `step` will write them again."""
    for folder in checkpoints(run):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain numbers and names of a checkpoint.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot resume from {folder}: {error}; delete it to fall back to an earlier one"
        ) from error


def load_checkpoint(
    accelerator: Accelerator, folder: Path, objects: Mapping[str, Stateful], own: Mapping[str, Stateful]
) -> dict[str, Any]:
    """Take over everything that `save_checkpoint` wrote; returns its `state`.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another kind of run.
    """
    state = read_state(folder)
    try:
        saved = torch.load(folder / "objects.pt", map_location="cpu", weights_only=True)
        if own:
            file = folder / own_file(accelerator)
            if not file.exists():
                raise ValueError(f"it has no {file.name}: resume with as many processes as wrote it")
            saved |= torch.load(file, map_location="cpu", weights_only=True)
        needed = {**objects, **own}
        if saved.keys() != needed.keys():
            raise ValueError(f"it holds {sorted(saved)}, this run needs {sorted(needed)}")
        accelerator.load_state(str(folder))
        for name, o in needed.items():
            o.load_state_dict(saved[name])
    except Exception as error:
        raise ValueError(
            f"cannot resume from {folder}: {error}; delete it to fall back to an earlier one"
        ) from error
    return state
