"""Training runs in processes of their own, from a server that has the imports behind it, or in this one.

A fresh interpreter spends seconds on imports, a run of a tiny model less.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers.utils import logging

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["modeling_fer.learning.image", "modeling_fer.learning.pretrain"])


def work(argv: list[str], log: Path, killed_before: int | None) -> None:
    """Train; what is said goes into `log`. Ends by SIGKILL where step `killed_before` would begin."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import train
    from modeling_fer.learning.command_line import parse_arguments

    seed_step = train.seed_step

    def seed_or_die(seed: int, step: int, rank: int) -> None:
        if step == killed_before:
            os.kill(os.getpid(), signal.SIGKILL)
        seed_step(seed, step, rank)

    train.seed_step = seed_or_die
    train.train(parse_arguments(argv))


def run_here(argv: list[str], killed_before: int | None = None) -> None:
    """Run to the end, or to where it is killed."""
    log = Path(argv[argv.index("--output_dir") + 1]).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=work, args=(argv, log, killed_before))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    expected = 0 if killed_before is None else -signal.SIGKILL
    assert process.exitcode == expected, log.read_text()[-3000:]


@contextmanager
def in_this_process() -> Iterator[None]:
    """What trains in here does so on the CPU, as in a process of its own; what it sets up is put back."""
    threads, flash = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
        torch.backends.cuda.enable_flash_sdp(flash)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
