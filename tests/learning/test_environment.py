"""What a run records of itself: complete, summed over sessions, measured or called an estimate, no secret."""

import ctypes
import json
import re
import socket
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import command

import train
from modeling_fer import __version__
from modeling_fer.learning import environment
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.environment import CpuCounter, Environment, cpu_counter, gpu_counter, stated_watts
from tests.runs import in_this_process

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def accelerator(**more):
    return SimpleNamespace(
        **{"device": CPU, "is_main_process": True, "is_local_main_process": True, "num_processes": 1, **more}
    )


def record(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(autouse=True)
def no_counters(monkeypatch, tmp_path):
    """Whatever the machine has: none of its counters, none of its settings."""
    monkeypatch.setattr(environment, "POWERCAP", tmp_path / "none")
    monkeypatch.delenv(environment.WATTS_VARIABLE, raising=False)


# -- runs -------------------------------------------------------------------------------------------


@pytest.fixture
def run_here(prepared, tmp_path, monkeypatch):
    """Train in this process; `dies_before`: the step not reached."""
    seed_step = train.seed_step

    def start(dies_before=None, **options):
        def seed_or_die(seed, step, rank):
            if step == dies_before:
                raise KeyboardInterrupt
            seed_step(seed, step, rank)

        monkeypatch.setattr(train, "seed_step", seed_or_die)
        sizes = {"max_steps": 6, "eval_steps": 6, "save_steps": 2}
        flags = command(prepared, tmp_path / "run", **{**sizes, **options})
        train.train(parse_arguments([str(flag) for flag in flags[2:]]))
        return record(tmp_path / "run/environment.json")

    with in_this_process():
        yield start


def test_a_run_records_what_it_ran_on_and_what_it_took(run_here, tmp_path):
    started = time.perf_counter()
    told = run_here()
    wall = time.perf_counter() - started
    assert told["steps"] == 6
    assert (told["since_step"], told["sessions"], told["processes"], told["threads"]) == (0, 1, 1, 1)
    assert 0 < told["seconds"] <= wall + 0.1
    assert told["versions"]["abaw-fer"] == __version__
    assert told["versions"]["torch"] == torch.__version__
    assert told["precision"] in {"fp32", "bf16"}
    assert told["peak_memory_mib"] > 50
    assert told["energy_kwh"] is None
    assert told["energy_kwh_estimated"] == pytest.approx(told["seconds"] * 12 / 3.6e6, rel=0.2)
    assert told["energy_source"].startswith("estimate: 1 thread x 12 W")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["started"])
    assert told["started"] <= told["updated"]
    words = [value for value in told.values() if isinstance(value, str)]
    assert not [word for word in words if "/" in word or "\\" in word], "no paths"
    assert socket.gethostname() not in (tmp_path / "run/environment.json").read_text()


def test_sessions_add_up(run_here, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_here(dies_before=4)
    path = tmp_path / "run/environment.json"
    first = record(path)
    assert (first["steps"], first["sessions"]) == (2, 1), "as at the last checkpoint"
    # Hours that this session did not have, on another machine.
    path.write_text(json.dumps({**first, "seconds": 7200.0, "device": "another", "energy_kwh": 1.5}))
    told = run_here(resume="auto")
    assert (told["steps"], told["sessions"], told["since_step"]) == (6, 2, 0)
    assert told["started"] == first["started"]
    assert 7200 < told["seconds"] < 7300
    assert told["device"].startswith("another; ")
    assert told["energy_kwh"] == 1.5
    assert told["energy_kwh_estimated"] > first["energy_kwh_estimated"]
    # A run whose beginning was not recorded does not claim to know it.
    path.unlink()
    told = run_here(resume="auto", max_steps=6)
    assert (told["since_step"], told["steps"]) == (6, 6)


# -- energy -----------------------------------------------------------------------------------------


def zone(folder, name, energy, top=1000):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{energy}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{top}\n")
    return folder / name


@settings(max_examples=25, deadline=None)
@given(
    starts=st.lists(st.integers(0, 999), min_size=1, max_size=2),
    spent=st.lists(st.integers(0, 999), max_size=12),
)
def test_counters_of_cpus_that_start_over_lose_nothing(starts, spent, tmp_path_factory):
    """A counter shows the energy modulo its range; between two readings it starts over once at most."""
    folder = tmp_path_factory.mktemp("powercap")
    zones = [zone(folder, f"intel-rapl:{i}", start) for i, start in enumerate(starts)]
    counter = CpuCounter(zones)
    total = list(starts)
    for amount in spent:
        for i, one in enumerate(zones):
            total[i] += amount
            (one / "energy_uj").write_text(str(total[i] % 1000))
        assert counter() * 1e6 == pytest.approx(sum(total) - sum(starts))


def test_packages_are_read_and_not_their_parts(tmp_path, monkeypatch):
    assert cpu_counter(tmp_path / "none") is None
    zone(tmp_path / "powercap", "intel-rapl:0:0", 5)
    assert cpu_counter(tmp_path / "powercap") is None
    zone(tmp_path / "powercap", "intel-rapl:0", 100)
    monkeypatch.setattr(environment, "READ_EVERY", 0.01)
    counter = cpu_counter(tmp_path / "powercap")
    zone(tmp_path / "powercap", "intel-rapl:0", 700)
    deadline = time.monotonic() + 10
    while counter.spent != 600 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert counter.spent == 600, "read by the thread, unasked"
    monkeypatch.setattr(environment, "READ_EVERY", 1e6)
    zone(tmp_path / "powercap", "intel-rapl:0", 50)  # 350 more, over the top
    assert counter() == pytest.approx(950e-6)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cpu_counter(tmp_path / "powercap") is None


class FakeNvml:
    """NVML of one GPU whose counter stands at `millijoules`."""

    uuid, millijoules, status = b"GPU-12ab", 0, 0

    def nvmlInit_v2(self):  # noqa: N802, NVML's own name
        return 0

    def nvmlDeviceGetHandleByUUID(self, name, handle):  # noqa: N802
        return 0 if name == self.uuid else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, told):  # noqa: N802
        told._obj.value = self.millijoules
        return self.status


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    properties = SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    return fake


def test_the_energy_of_a_gpu_is_measured_over_all_processes(nvml, tmp_path, monkeypatch):
    nvml.millijoules = 500_000
    own = Environment(tmp_path / "e.json", accelerator(device=torch.device("cuda"), num_processes=2), "bf16")
    nvml.millijoules += 7_200_000  # 7.2 kJ: 0.002 kWh
    other = {"memory": 5.0, "energy_kwh": 3600.0}
    monkeypatch.setattr(environment, "gather_object", lambda parts: [*parts, other])
    own.update(3)
    told = record(tmp_path / "e.json")
    assert told["energy_kwh"] == 0.003
    assert told["energy_kwh_estimated"] is None
    assert told["peak_memory_mib"] == 5.0
    assert (told["device"], told["precision"], told["processes"]) == ("A GPU", "bf16", 2)
    assert told["energy_source"] == "NVML counters of the GPUs alone"


def test_a_gpu_without_a_counter_has_no_energy(nvml, tmp_path, monkeypatch):
    gpu = torch.device("cuda")
    nvml.uuid = b"GPU-other"  # a part of a GPU, say
    assert gpu_counter(gpu) is None
    Environment(tmp_path / "e.json", accelerator(device=gpu), "no").update(1)
    told = record(tmp_path / "e.json")
    assert (told["energy_kwh"], told["energy_kwh_estimated"]) == (None, None)
    assert told["energy_source"] == "not recorded"
    nvml.uuid = FakeNvml.uuid
    own = Environment(tmp_path / "e.json", accelerator(device=gpu), "no")
    nvml.status = 999  # it breaks down
    own.update(2)
    assert record(tmp_path / "e.json")["energy_source"] == "not recorded"

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_counter(gpu) is None


def test_one_process_speaks_for_the_cpus_of_its_machine(tmp_path, monkeypatch):
    folder = zone(tmp_path / "powercap", "intel-rapl:0", 0, 10**10).parent
    monkeypatch.setattr(environment, "POWERCAP", folder)
    for is_first, expected in ((True, 0.001), (False, 0.0)):
        zone(folder, "intel-rapl:0", 0, 10**10)
        own = Environment(tmp_path / "e.json", accelerator(is_local_main_process=is_first), "no")
        zone(folder, "intel-rapl:0", 3_600_000_000, 10**10)
        own.update(0)
        told = record(tmp_path / "e.json")
        assert (told["energy_kwh"], told["energy_kwh_estimated"]) == (expected, None)
        assert told["energy_source"].startswith("RAPL counters")


def test_an_estimate_says_its_watts(monkeypatch):
    assert stated_watts(CPU, 4)[0] == 48
    assert "4 threads x 12 W" in stated_watts(CPU, 4)[1]
    assert stated_watts(torch.device("mps"), 4) == (None, "not recorded")
    monkeypatch.setenv("FER_WATTS", "65.5")
    assert stated_watts(torch.device("mps"), 4) == (65.5, "estimate: 65.5 W a process, as FER_WATTS says")
    for wrong in ("much", "0", "-3", "nan", "inf"):
        monkeypatch.setenv("FER_WATTS", wrong)
        with pytest.raises(ValueError, match=rf"FER_WATTS must be the watts .* got '{wrong}'"):
            stated_watts(CPU, 1)


# -- files ------------------------------------------------------------------------------------------


def test_the_versions_are_those_of_all_that_the_package_depends_on():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.split(r"[<>=!~\[ ;]", line)[0] for line in wanted]
    assert sorted(environment.PACKAGES) == sorted(names)
    assert list(environment.versions())[1:] == list(environment.PACKAGES)


def test_a_damaged_record_is_told(tmp_path):
    checkpoint = tmp_path / "run/checkpoints/step_00000002"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run/environment.json").write_text('{"seconds"')
    with pytest.raises(ValueError, match=r"run/environment\.json is damaged .*delete it"):
        Environment(tmp_path / "run/environment.json", accelerator(), "no", checkpoint)


def test_only_the_main_process_writes(tmp_path):
    Environment(tmp_path / "e.json", accelerator(is_main_process=False), "no").update(1)
    assert list(tmp_path.iterdir()) == []
