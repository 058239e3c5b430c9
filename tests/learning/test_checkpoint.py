import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from torch import nn

from modeling_fer.learning.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_folder,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- one folder, whole or not at all ----------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path):
    def write(folder):
        assert not target.exists()
        (folder / "a").write_text("one")

    target = tmp_path / "deep" / "model"
    write_folder(target, write)
    assert (target / "a").read_text() == "one"
    assert names(target.parent) == ["model"]


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "model"
    write_folder(target, lambda folder: (folder / "old").write_text("old"))

    def write(folder):
        (folder / "new").write_text("new")
        assert names(target) == ["old"]

    write_folder(target, write)
    assert names(target) == ["new"]  # nothing of the old one is left in it
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(28, "No space left on device"),
        RuntimeError("unexpected pos 704"),  # torch on a full disk
        SafetensorError("I/O error: No space left on device"),
    ],
)
def test_a_full_disk_keeps_the_old_folder_and_names_it(tmp_path, fault):
    target = tmp_path / "model"
    write_folder(target, lambda folder: (folder / "old").write_text("old"))

    def write(folder):
        (folder / "half").write_text("ha")
        raise fault

    with pytest.raises(
        OSError, match=r"could not write .*model: .*(No space|pos).*what stood there is kept. Mend the cause"
    ):
        write_folder(target, write)
    assert names(tmp_path) == ["model"]
    assert (target / "old").read_text() == "old"


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), TypeError("not JSON")])
def test_other_faults_pass_through_and_leave_nothing_behind(tmp_path, fault):
    target = tmp_path / "model"
    write_folder(target, lambda folder: (folder / "old").write_text("old"))

    def write(folder):
        (folder / "half").write_text("ha")
        raise fault

    with pytest.raises(type(fault)):
        write_folder(target, write)
    assert names(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    for leftover in (".model.writing", ".model.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("ha")
    (tmp_path / "model").mkdir()
    write_folder(tmp_path / "model", lambda folder: (folder / "new").write_text("new"))
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new"]


def test_a_folder_that_a_killed_process_had_moved_aside_is_not_lost(tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "only").write_text("copy")

    def write(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "model", write)
    assert (tmp_path / "model" / "only").read_text() == "copy"


# -- which checkpoint -------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Return a run with three checkpoints, one half-written, and things that are none."""
    for name in ("step_9", "step_00000010", "step_200", ".step_300.writing", "step_400.bak", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    return tmp_path


def test_checkpoints_are_sorted_by_number(run):
    assert [path.name for path in checkpoints(run)] == ["step_9", "step_00000010", "step_200"]


def test_what_resume_asks_for(run, tmp_path):
    assert find_checkpoint(run, "never") is None
    assert find_checkpoint(run, "auto") == run / "checkpoints/step_200"
    assert find_checkpoint(run / "none", "auto") is None
    named = run / "checkpoints/step_9"
    assert find_checkpoint(run, str(named)) == named


@pytest.mark.parametrize("name", ["absent", "checkpoints"])
def test_a_named_folder_must_be_a_checkpoint(run, name):
    with pytest.raises(FileNotFoundError, match=rf"{name} is no checkpoint \(it has no state.json\); pass a"):
        find_checkpoint(run, str(run / name))


# -- a small run ------------------------------------------------------------------------------------


class Training:
    """Model, optimizer and schedule of a run small enough to write down."""

    def __init__(self):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer.optimizer, 1, 0.9)
        self.objects = {"schedule": self.schedule}

    def steps(self, count):
        for _ in range(count):
            self.accelerator.backward(self.model(torch.randn(5, 4)).square().mean())
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def save(self, run, step, keep=2):
        save_checkpoint(self.accelerator, run, {"step": step, "best": 0.5}, self.objects, {}, keep)

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.fixture
def training():
    """Return a builder of runs; accelerate's state is per process and is cleared."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Training
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_newest_stay(training, tmp_path):
    ours = training()
    for step in (5, 10, 15, 20):
        ours.save(tmp_path, step, keep=2)
        assert (tmp_path / f"checkpoints/step_{step:08d}/state.json").exists()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000015", "step_00000020"]
    ours.save(tmp_path, 25, keep=1)
    assert names(tmp_path / "checkpoints") == ["step_00000025"]


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(training, tmp_path):
    whole = training()
    whole.steps(3)
    whole.save(tmp_path, 3)
    whole.steps(4)

    other = training()
    other.steps(1)
    state = load_checkpoint(other.accelerator, find_checkpoint(tmp_path, "auto"), other.objects, {})
    assert state == {"step": 3, "best": 0.5}
    other.steps(4)  # dropout and inputs come from the random state that was saved
    assert torch.equal(other.weights(), whole.weights())
    assert other.schedule.get_last_lr() == whole.schedule.get_last_lr()


def test_weights_are_not_pickled(training, tmp_path):
    training().save(tmp_path, 1)
    folder = tmp_path / "checkpoints/step_00000001"
    assert (folder / "model.safetensors").exists()
    assert not (folder / "pytorch_model.bin").exists()
    torch.load(folder / "objects.pt", weights_only=True)


def damage(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("name", ["state.json", "objects.pt", "model.safetensors", "optimizer.bin"])
@pytest.mark.parametrize("spoil", [damage, lambda path: path.unlink()], ids=["cut", "gone"])
def test_a_damaged_checkpoint_is_one_clear_error(training, tmp_path, name, spoil):
    ours = training()
    ours.steps(1)
    ours.save(tmp_path, 1)
    folder = tmp_path / "checkpoints/step_00000001"
    spoil(folder / name)
    with pytest.raises(
        ValueError, match=rf"cannot resume from {folder}: .+; delete it to fall back to an earlier one"
    ):
        load_checkpoint(ours.accelerator, folder, ours.objects, {})


def test_a_checkpoint_of_another_kind_of_run(training, tmp_path):
    ours = training()
    ours.save(tmp_path, 1)
    folder = tmp_path / "checkpoints/step_00000001"
    with pytest.raises(
        ValueError, match=r"it holds \['schedule'\], this run needs \['sampler', 'schedule'\]"
    ):
        load_checkpoint(ours.accelerator, folder, {**ours.objects, "sampler": ours.schedule}, {})


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(training, tmp_path):
    class Full:
        def state_dict(self):
            raise OSError(28, "No space left on device")

    ours = training()
    ours.save(tmp_path, 1)
    ours.objects["more"] = Full()
    with pytest.raises(OSError, match=r"step_00000002: .*No space left.*--resume auto"):
        ours.save(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == ["step_00000001"]
    assert json.loads((tmp_path / "checkpoints/step_00000001/state.json").read_text())["step"] == 1
