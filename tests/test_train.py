"""The training script through its front door: runs, resumes, processes, bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from modeling_fer import FerForImageClassification
from modeling_fer.data import schema
from modeling_fer.learning.arguments import FREE_ON_RESUME
from modeling_fer.learning.command_line import parse_arguments
from tests.runs import in_this_process

ROOT = Path(__file__).parents[1]
# Not accelerate's launcher: on CPUs it starts one process, whatever the number that is asked for.
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STEPS = 12
TINY = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "batch_size": 8,
    "max_steps": STEPS,
    "log_steps": 1,
    "eval_steps": 4,
    "save_steps": 3,
    "dropout": 0.1,
    "erasing": 0.5,
    "tracker": "none",
    "threads": 1,
    "ema_decay": 0.9,
}


def command(data: Path, out: Path, launcher: tuple[str, ...] = (sys.executable,), **options) -> list[str]:
    fields = {**TINY, "data": data, "output_dir": out, **options}
    flags = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    return [*launcher, str(ROOT / "train.py"), *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def run(*args, check: bool = True, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*args, **options), env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def history(out: Path) -> list[dict]:
    """Rows of the run without its speed, which no two runs share."""
    rows = map(json.loads, (out / "history.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_equal(a, b) -> None:
    """Equality to the last bit of nested containers of tensors and plain values."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    last = f"checkpoints/step_{STEPS:08d}"
    assert history(a) == history(b)
    states = [json.loads((run / last / "state.json").read_text()) for run in (a, b)]
    for state in states:
        state["arguments"] = {k: v for k, v in state["arguments"].items() if k not in FREE_ON_RESUME}
    assert states[0] == states[1]
    for name in ("optimizer.bin", "objects.pt"):
        assert_equal(*(torch.load(run / last / name, weights_only=True) for run in (a, b)))
    for name in (f"{last}/model.safetensors", "model/model.safetensors"):
        assert_equal(load_file(a / name), load_file(b / name))


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run(prepared, out)
    return out


def test_leaves_model_history_curve_and_last_checkpoints(finished):
    rows = history(finished)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    judged = {row["step"]: row["validation/macro_f1"] for row in rows if "validation/macro_f1" in row}
    assert list(judged) == [4, 8, 12]
    state = json.loads((finished / f"checkpoints/step_{STEPS:08d}/state.json").read_text())
    assert state["best"] == max(judged.values()) == judged[state["best_step"]]
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step_00000009", "step_00000012"]
    assert (finished / "learning_curve.png").stat().st_size > 1000
    assert {"preprocessor_config.json", "modeling_fer.py"} <= {p.name for p in (finished / "model").iterdir()}


def test_best_model_reproduces_its_score(finished, prepared, tmp_path):
    from modeling_fer.cli import main

    assert (
        main(["eval", "--model", f"{finished}/model", "--data", str(prepared), "--out", str(tmp_path)]) == 0
    )
    state = json.loads((finished / f"checkpoints/step_{STEPS:08d}/state.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text())["macro_f1"] == state["best"]


def test_killed_at_random_steps_and_resumed_is_uninterrupted(finished, prepared, tmp_path):
    out = tmp_path / "killed"
    for step in sorted(random.Random(0).sample(range(1, STEPS), 5)):
        process = subprocess.Popen(
            command(prepared, out, resume="auto"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            done = (
                (out / "history.jsonl").read_text().count('"loss"') if (out / "history.jsonl").exists() else 0
            )
            if done >= step:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it must have been killed in the middle"
    run(prepared, out, resume="auto")
    assert_same_run(finished, out)


def test_accumulated_steps_see_the_same_examples(finished, prepared, tmp_path):
    out = tmp_path / "accumulated"
    run(prepared, out, accumulation_steps=2, augmentation="none", erasing=0, dropout=0)
    plain = tmp_path / "plain"
    run(prepared, plain, augmentation="none", erasing=0, dropout=0)
    losses = [[row["loss"] for row in history(path) if "loss" in row] for path in (out, plain)]
    assert np.allclose(*losses, rtol=0, atol=2e-2), (
        "the same batches in two halves give the same losses but for rounding"
    )


def test_two_processes_see_what_one_sees(prepared, tmp_path):
    """Same examples in each step, so the same losses and weights but for the order of sums."""
    options = {"augmentation": "none", "erasing": 0, "dropout": 0, "precision": "no", "max_steps": 6}
    run(prepared, tmp_path / "one", **options)
    run(prepared, tmp_path / "two", launcher=TWO_PROCESSES, **options)
    assert (tmp_path / "two/checkpoints/step_00000006/own_1.pt").exists(), "one process only"
    rows = [history(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=2e-5) for key in a)
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    # The loss does not depend on the keys' bias: its gradient is rounding, which Adam blows up.
    gaps = {key: (a[key] - b[key]).abs().max().item() for key in a}
    far = {key: gap for key, gap in gaps.items() if gap > 1e-5}
    assert all(key.endswith(("key.bias", "k_proj.bias")) for key in far), far
    assert max(gaps.values()) < 1e-3, far


def test_lora_run_publishes_merged_weights_and_the_adapter_apart(prepared, checkpoint, tmp_path):
    run(prepared, tmp_path / "lora", lora_rank=2, max_steps=4, encoder=checkpoint, image_size=0)
    model = tmp_path / "lora/model"
    assert not (model / "adapter_config.json").exists()
    merged = FerForImageClassification.from_pretrained(model).eval()
    assert not [name for name in merged.state_dict() if "lora" in name]
    base = FerForImageClassification.from_encoder_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, model / "adapter").eval()
    images = torch.randn(4, 3, 16, 16)
    assert torch.allclose(adapted(pixel_values=images).logits, merged(images).logits, atol=1e-5)


def test_starts_from_a_saved_encoder(finished, prepared, tmp_path):
    run(
        prepared,
        tmp_path / "tuned",
        encoder=finished / "model",
        max_steps=1,
        learning_rate=1e-30,
        weight_decay=0,
        ema_decay=0,
        image_size=0,
    )
    before, after = (load_file(path / "model/model.safetensors") for path in (finished, tmp_path / "tuned"))
    encoder = [name for name in before if name.startswith("fer.encoder.")]
    assert encoder
    assert all(torch.equal(before[name], after[name]) for name in encoder)


def test_a_new_encoder_of_any_kind_is_the_same_when_resumed(prepared, tmp_path):
    """Batch norms, too, go on where they were."""
    config = tmp_path / "encoder.json"
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}
    config.write_text(json.dumps({"model_type": "regnet", "downsample_in_first_stage": False, **stages}))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(prepared, whole, encoder_config=config)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/step_00000012")
    run(prepared, parts, encoder_config=config, resume="auto")
    assert_same_run(whole, parts)
    model = FerForImageClassification.from_pretrained(whole / "model")
    assert model.config.encoder_config.model_type == "regnet"
    assert model.fer.encoder.embedder.embedder.normalization.running_mean.abs().max() > 0


def test_a_student_learns_from_its_teacher(finished, prepared, tmp_path):
    losses = {}
    for share in (0, 0.5, 1):
        out = tmp_path / str(share)
        run(prepared, out, max_steps=3, teacher=finished / "model" if share else "", distillation=share)
        losses[share] = next(row["loss"] for row in history(out))
    assert losses[0.5] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-3)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    taught = {"teacher": finished / "model", "distillation": 1, "noise": 0.5}
    run(prepared, whole, **taught)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/step_00000012")
    run(prepared, parts, **taught, resume="auto")
    assert_same_run(whole, parts)


def test_a_teacher_that_does_not_fit_is_refused(finished, prepared, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished / "model", other)
    described = json.loads((other / "config.json").read_text())
    for name, wrong, message in (
        ("elsewhere", None, "no model folder"),
        ("other", {"image_size": 24}, "has image_size 24, the model to be trained 16"),
        ("other", {"id2label": {**described["id2label"], "0": "Other", "7": "Neutral"}}, "has classes"),
    ):
        (other / "config.json").write_text(json.dumps({**described, **(wrong or {})}))
        options = {"teacher": tmp_path / name, "distillation": 0.5}
        done = run(prepared, tmp_path / "student", check=False, **options)
        assert done.returncode == 1
        assert f"--teacher {tmp_path / name}" in done.stderr
        assert message in done.stderr


def test_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(prepared, tmp_path):
    out = tmp_path / "diverging"
    run(prepared, out)
    shutil.rmtree(out / "checkpoints/step_00000012")  # go back to 9, and poison what follows
    good = load_file(out / "checkpoints/step_00000009/model.safetensors")
    optimizer = torch.load(out / "checkpoints/step_00000009/optimizer.bin", weights_only=True)
    for moments in optimizer["state"].values():
        moments["exp_avg"].fill_(float("nan"))
    torch.save(optimizer, out / "checkpoints/step_00000009/optimizer.bin")
    done = run(prepared, out, resume="auto", check=False)
    assert done.returncode == 1
    assert "loss became nan" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in sorted((out / "checkpoints").iterdir())][-1] == "step_00000009"
    assert_equal(good, load_file(out / "checkpoints/step_00000009/model.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": "auto", "learning_rate": 0.5}, "learning_rate: 0.0005 -> 0.5"),
        ({}, "holds a run already; continue it with --resume auto"),
        ({"resume": "nowhere"}, "nowhere is no checkpoint"),
        ({"resume": "auto", "tracker": "trackio"}, "pip install trackio"),
        ({"batch_size": 7, "accumulation_steps": 2, "resume": "auto"}, "does not divide"),
    ],
)
def test_wrong_resumes_are_told(finished, prepared, options, message):
    import train

    argv = command(prepared, finished, **options)[2:]
    with in_this_process(), pytest.raises((ValueError, OSError), match=message):
        train.train(parse_arguments(argv))


def test_empty_class_is_told_and_left_out_when_asked(prepared, tmp_path):
    data = schema.load(prepared)
    for split in data:
        data[split] = data[split].filter(lambda label: label != 7, input_columns="expression")
        (tmp_path / "data/data").mkdir(parents=True, exist_ok=True)
        data[split].to_parquet(tmp_path / f"data/data/{split}-00000-of-00001.parquet")
    done = run(tmp_path / "data", tmp_path / "all", check=False)
    assert done.returncode == 1
    assert "no training rows of Other" in done.stderr
    assert "--classes present" in done.stderr
    run(tmp_path / "data", tmp_path / "present", classes="present", max_steps=1)
    assert FerForImageClassification.from_pretrained(tmp_path / "present/model").config.num_labels == 7


def test_named_checkpoint_starts_over_in_its_run_or_in_another(finished, prepared, tmp_path):
    """From an older checkpoint, in a new folder: the same end; with another configuration: told."""
    older = finished / "checkpoints/step_00000009"
    run(prepared, tmp_path / "again", resume=older)
    ours, theirs = (
        load_file(p / "checkpoints/step_00000012/model.safetensors") for p in (tmp_path / "again", finished)
    )
    assert_equal(ours, theirs)
    run(prepared, tmp_path / "again", resume=older)
    assert [p.name for p in sorted((tmp_path / "again/checkpoints").iterdir())] == ["step_00000012"]
    done = run(prepared, tmp_path / "again", resume=older, learning_rate=0.5, check=False)
    assert done.returncode == 1
    assert "learning_rate: 0.0005 -> 0.5" in done.stderr


def test_changed_data_is_told_on_resume(prepared, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(prepared, copy)
    run(copy, tmp_path / "run", max_steps=4)
    train = schema.load(copy)["train"]
    shutil.rmtree(copy)
    shutil.copytree(prepared, copy)
    for file in (copy / "data").glob("train-*"):
        file.unlink()
    train.select(range(len(train) - 1)).to_parquet(copy / "data/train-00000-of-00001.parquet")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000004")
    done = run(copy, tmp_path / "run", max_steps=4, resume="auto", check=False)
    assert done.returncode == 1
    assert "the labels of the data, or the features of its frames, have changed" in done.stderr


def test_soft_labels_bf16_and_tensorboard(prepared, tmp_path):
    run(prepared, tmp_path / "run", soft_labels=True, precision="bf16", tracker="tensorboard", max_steps=2)
    assert list((tmp_path / "run/logs").rglob("events.out.tfevents.*"))
    assert all(np.isfinite(row["loss"]) for row in history(tmp_path / "run") if "loss" in row)


@pytest.mark.slow
def test_compiled_run(prepared, tmp_path):
    run(prepared, tmp_path / "plain", max_steps=4, precision="no", dropout=0)
    run(prepared, tmp_path / "compiled", max_steps=4, precision="no", dropout=0, compile=True)
    plain, compiled = (
        [row["loss"] for row in history(tmp_path / n) if "loss" in row] for n in ("plain", "compiled")
    )
    assert np.allclose(plain, compiled, atol=1e-3)
