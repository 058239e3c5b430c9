"""Training with unlabelled faces through the script: resumes, processes, streams, bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeling_fer.data import schema
from modeling_fer.learning.arguments import FREE_ON_RESUME
from tests.runs import run_here
from tests.test_train import ROOT, STEPS, TWO_PROCESSES, assert_equal, command, environment, history

LAST = f"checkpoints/step_{STEPS:08d}"
COMMON = {
    "round_steps": 5,
    "mu": 2,
    "debias_tau": 0.8,
    "sampler_bound": 3,
    "holdout": 0.3,
    "learning_rate": 3e-3,
}
METHODS = {
    "fixmatch": {
        **COMMON, "method": "fixmatch", "threshold_rule": "free", "teacher_ema": 0.9, "align": "labelled",
        "gate": "energy", "gate_quantile": 0.3,
    },
    "feedback": {
        **COMMON, "method": "feedback", "threshold_rule": "flex", "threshold": 0.15, "finetune": 0.2,
    },
    # Half of a batch at a time; rule flex remembers fewer faces than there are.
    "stream": {
        **COMMON, "method": "fixmatch", "threshold_rule": "flex", "threshold": 0.15, "accumulation_steps": 2,
        "stream_memory": 17,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(prepared, tmp_path_factory) -> Path:
    """Faces as shards of unequal size."""
    folder, faces = tmp_path_factory.mktemp("stream"), schema.load(prepared)["train"]
    for number, rows in enumerate(np.split(np.random.default_rng(0).permutation(24), [11, 18])):
        faces.select(rows).to_parquet(folder / f"{number}.parquet")
    return folder


def arguments(method, prepared, shards, out, **options):
    more = {"stream": shards} if method == "stream" else {}
    data = prepared if method == "stream" else f"{prepared},unlabelled={prepared}"
    return command(data, out, **METHODS[method], **more, **options)[2:]


@pytest.fixture(scope="module")
def finished(prepared, shards, tmp_path_factory) -> dict[str, Path]:
    """Runs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        run_here(arguments(method, prepared, shards, folder / method))
    return {method: folder / method for method in METHODS}


def assert_same_run(a: Path, b: Path) -> None:
    """Equal to the last bit: history, and all that the last checkpoint and the best model hold."""
    assert history(a) == history(b)
    names = {p.name for p in (a / LAST).iterdir()}
    assert names == {p.name for p in (b / LAST).iterdir()}
    for name in names:
        files = [run / LAST / name for run in (a, b)]
        if name.endswith(".safetensors"):
            assert_equal(*map(load_file, files))
        elif name.endswith((".bin", ".pt")):
            assert_equal(*(torch.load(file, weights_only=True) for file in files))
        elif name == "state.json":
            states = [json.loads(file.read_text()) for file in files]
            for state in states:
                state["arguments"] = {k: v for k, v in state["arguments"].items() if k not in FREE_ON_RESUME}
            assert states[0] == states[1]
    assert_equal(*(load_file(run / "model/model.safetensors") for run in (a, b)))


def rounds(out: Path) -> list[dict]:
    return [row for row in history(out) if "round/marginal" in row]


@pytest.mark.parametrize("method", METHODS)
def test_killed_in_the_middle_of_a_round_and_resumed_is_uninterrupted(
    method, finished, prepared, shards, tmp_path
):
    """Checkpoints are those of steps 3, 6, 9; rounds end with steps 5 and 10."""
    argv = arguments(method, prepared, shards, tmp_path / "killed", resume="auto")
    for step in {"stream": [9]}.get(method, [5, 11]):
        run_here(argv, killed_before=step)
    run_here(argv)
    assert_same_run(finished[method], tmp_path / "killed")


def test_a_checkpoint_holds_all_that_decides_the_next_step(finished):
    def objects(method):
        return torch.load(finished[method] / LAST / "objects.pt", weights_only=True)

    step = objects("fixmatch")["step"]
    assert step.keys() == {"labeler", "teacher"}
    assert step["labeler"].keys() == {"rule", "marginal", "gate", "counts", "alignment"}
    assert step["labeler"]["counts"]["faces"].sum() == 2 * 16, "two steps of a round that has not ended"
    assert objects("feedback")["step"]["steps"] == STEPS
    names = {p.name for p in (finished["feedback"] / LAST).iterdir()}
    assert {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin"} <= names
    pool = objects("fixmatch")["unlabelled"]
    assert pool["epoch"] * 2 + pool["batches_done"] == STEPS, "28 faces, 16 at a time"
    own = torch.load(finished["stream"] / LAST / "own_0.pt", weights_only=True)["unlabelled"]
    assert own["place"]["given"] == STEPS * 16


def test_rounds_feed_back_to_the_sampler(finished):
    for method, out in finished.items():
        rows = rounds(out)
        assert [row["step"] for row in rows] == [5, 10]
        weights = np.array([row["round/class_weights"] for row in rows])
        assert np.allclose(weights.sum(1), 1)
        assert weights.std(1).min() > 1e-3, "classes are not alike"
        assert (8 * weights < 3.001).all()
        assert (8 * weights > 0.333).all()
        sampler = torch.load(out / LAST / "objects.pt", weights_only=True)["sampler"]
        assert sampler["class_weights"] == pytest.approx(weights[1].tolist())
        assert all(0 < row["round/pseudo_label_rate"] <= 1 for row in rows)
        assert all(len(row["round/held_out_recall"]) == 8 for row in rows)
        assert ("round/h" in rows[0]) == (method == "feedback")
    judged = [row for row in history(finished["feedback"]) if "loss" in row]
    assert ["teacher_loss" in row for row in judged] == [True] * 10 + [False] * 2  # 0.2 of 12 steps fine-tune


def test_hidden_labels_change_nothing_that_is_learnt(finished, prepared, shards, tmp_path):
    """The unlabelled folder without the labels that it has: the same run, but for what is measured."""
    other = tmp_path / "other"
    shutil.copytree(prepared, other, ignore=shutil.ignore_patterns("cache"))
    train = schema.load(prepared)["train"]
    names = train.features
    train = train.map(lambda row: {"expression": -1}, features=names)
    train.to_parquet(next((other / "data").glob("train-*")))
    argv = arguments("fixmatch", prepared, shards, tmp_path / "run")
    argv[argv.index("--data") + 1] = f"{prepared},unlabelled={other}"
    run_here(argv)
    ours, theirs = tmp_path / "run", finished["fixmatch"]
    accuracy = "round/pseudo_label_accuracy"
    assert all(accuracy in row for row in rounds(theirs))
    assert history(ours) == [{k: v for k, v in row.items() if k != accuracy} for row in history(theirs)]
    assert_equal(*(load_file(run / LAST / "model.safetensors") for run in (ours, theirs)))


SCRIPT = """
import json, sys
from pathlib import Path
import torch, train
from accelerate import Accelerator
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.feedback import FeedbackStep
from modeling_fer.learning.fixmatch import FixMatchStep

def watched(end_round):
    def watching(self):
        state = self.state_dict()
        ended = end_round(self)
        seen.append([state, ended.class_weights.tolist()])
        return ended
    return watching

Accelerator.end_training = lambda self: None  # it would close the group of processes, which goes on
for step in (FixMatchStep, FeedbackStep):
    step.end_round = watched(step.end_round)
for argv in json.loads(sys.argv[1]):
    seen, arguments = [], parse_arguments(argv)
    train.train(arguments)
    assert torch.distributed.get_world_size() == 2
    torch.save(seen, Path(arguments.output_dir) / f"seen_{torch.distributed.get_rank()}.pt")
"""


def test_two_processes_learn_what_one_learns(prepared, shards, tmp_path):
    """Same statistics and weights but for the order of sums; between the two processes to the last bit.

    Augmentation and dropout draw by rank and have to be off. One launch for both methods.
    """
    alike = {
        "augmentation": "none",
        "strong_augmentation": "none",
        "dropout": 0,
        "erasing": 0,
        "precision": "no",
    }
    runs = {
        method: [
            arguments(method, prepared, shards, tmp_path / f"{method}_{n}", **alike) for n in ("one", "two")
        ]
        for method in ("fixmatch", "feedback")
    }
    for one, _ in runs.values():
        run_here(one)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [*TWO_PROCESSES, str(tmp_path / "script.py"), json.dumps([two for _, two in runs.values()])],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for method in runs:
        one, two = (tmp_path / f"{method}_{n}" for n in ("one", "two"))
        seen = [torch.load(two / f"seen_{rank}.pt", weights_only=True) for rank in range(2)]
        assert len(seen[0]) == 2
        assert_equal(*seen)
        for a, b in zip(history(one), history(two), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                tolerance = 1e-6 if key.startswith("round/") else 2e-5
                assert np.allclose(a[key], b[key], rtol=0, atol=tolerance), (method, a["step"], key)
        names = ["model.safetensors", *(["model_1.safetensors"] if method == "feedback" else [])]
        for name in names:
            a, b = (load_file(run / LAST / name) for run in (one, two))
            assert a.keys() == b.keys()
            for key in a:
                # Attention does not depend on the keys' bias: its gradient is rounding, which Adam blows up.
                tolerance = 1e-3 if key.endswith("k_proj.bias") else 1e-6
                assert torch.allclose(a[key], b[key], rtol=0, atol=tolerance), (method, name, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "fixmatch"},
            "train.py: --method fixmatch: {data} has no unlabeled split; prepare the data",
        ),
        ({"method": "feedback", "accumulation_steps": 2}, "train.py: --method feedback compares"),
        ({"method": "fixmatch", "sampler_bound": 0.5}, "train.py: --sampler_bound must be"),
        ({"method": "fixmatch", "holdout": 1}, "train.py: --holdout must be at least 0 and below 1, got 1.0"),
        ({"method": "fixmatch", "stream": "/nowhere/at/all"}, "train.py: /nowhere/at/all"),
        ({"data": "labeled=d"}, "train.py: --data labeled=d: expected a folder, or labelled=FOLDER"),
    ],
)
def test_bad_input_is_one_line(options, message, prepared, tmp_path, monkeypatch):
    import train

    data = tmp_path / "data"
    shutil.copytree(prepared, data, ignore=shutil.ignore_patterns("unlabeled-*", "cache"))
    argv = command(
        options.get("data", data), tmp_path / "out", **{k: v for k, v in options.items() if k != "data"}
    )
    monkeypatch.setattr(sys, "argv", argv[1:])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert str(stopped.value).startswith(message.format(data=data))
    assert "\n" not in str(stopped.value)
