"""What a run ran on, and what it took: versions, device, time, memory and energy, in `environment.json`.

The record names no person, no machine and no folder, so that it can be published. It has no say in what is
learnt.
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from modeling_fer import __version__
from modeling_fer.evaluation.metrics import write_whole

# What the package depends on; a test holds this to pyproject.toml.
PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "evaluate", "peft", "huggingface-hub", "safetensors",
    "pillow", "numpy", "scikit-learn", "scipy", "matplotlib", "pyarrow", "tensorboard", "tqdm", "PyYAML",
    "jinja2",
)  # fmt: skip

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
READ_EVERY = 10.0  # seconds; the counters of CPUs start over after minutes
# "Any" processor in data/latest/TDP_cpu.csv of the Green Algorithms calculator (Lannelongue, Grealey and
# Inouye, "Green Algorithms: Quantifying the Carbon Footprint of Computation", Advanced Science, 2021).
WATTS_OF_CORE = 12.0
WATTS_VARIABLE = "FER_WATTS"
JOULES_OF_KWH = 3.6e6
NOT_RECORDED = "not recorded"

Counter = Callable[[], float | None]  # joules since some time; None: it broke down


# --- What it ran on ---


def versions() -> dict[str, str]:
    """Versions of this package and of what it depends on; what is not installed is left out."""
    found = {"abaw-fer": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """What the maker calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def peak_memory(device: torch.device) -> tuple[float | None, str]:
    """Most memory in MiB that this process has held so far, and which; None: the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "GPU, allocated by torch in one process"
    try:
        import resource
    except ImportError:  # Windows
        return None, NOT_RECORDED
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "resident, of one process"


# --- What it took ---


def gpu_counter(device: torch.device) -> Counter | None:
    """The energy counter of a GPU by NVML (`nvmlDeviceGetTotalEnergyConsumption`); None: it has none."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return None
    handle, told = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()  # a part of a GPU has another

    def read() -> int:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(told))

    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) or read():
        return None

    return lambda: None if read() else told.value / 1000


class CpuCounter:
    """Joules of the machine's CPU packages by RAPL, which Linux shows in `/sys/class/powercap`.

    The counters count microjoules and start over at `max_energy_range_uj`, after minutes of hard work: they
    must be read more often than that, see `watch`.

    Args:
        zones: folders of the packages.
    """

    def __init__(self, zones: list[Path]) -> None:
        self.ranges = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self.last = {zone: int((zone / "energy_uj").read_text()) for zone in zones}
        self.spent = 0
        self.lock = threading.Lock()

    def watch(self) -> None:
        """Read for as long as the process lives, in a thread of its own."""
        while True:
            time.sleep(READ_EVERY)
            self()

    def __call__(self) -> float:
        """Joules since this was made."""
        with self.lock:
            for zone, last in self.last.items():
                now = int((zone / "energy_uj").read_text())
                self.spent += now - last if now >= last else now + self.ranges[zone] - last
                self.last[zone] = now
            return self.spent / 1e6


def cpu_counter(folder: Path) -> CpuCounter | None:
    """The counter of the machine's CPU packages; None: there is none, or it is for administrators only."""
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    if not zones or not all(os.access(zone / "energy_uj", os.R_OK) for zone in zones):
        return None
    counter = CpuCounter(zones)
    threading.Thread(target=counter.watch, daemon=True).start()
    return counter


def stated_watts(device: torch.device, threads: int) -> tuple[float | None, str]:
    """Power of one process for an estimate, and where that is from; None: nobody states one.

    Raises:
        ValueError: the environment variable that states it is not a number above 0.
    """
    if told := os.environ.get(WATTS_VARIABLE):
        try:
            watts = float(told)
        except ValueError:
            watts = 0.0
        if not 0 < watts < float("inf"):
            raise ValueError(f"{WATTS_VARIABLE} must be the watts of one process, above 0, got {told!r}")
        return watts, f"estimate: {watts:g} W a process, as {WATTS_VARIABLE} says"
    if device.type != "cpu":
        return None, NOT_RECORDED
    source = "average of CPUs, Lannelongue et al. 2021, without memory and cooling"
    cores = f"{threads} thread{'s' if threads > 1 else ''} x {WATTS_OF_CORE:g} W"
    return threads * WATTS_OF_CORE, f"estimate: {cores} a process ({source})"


def together(before: str | None, now: str) -> str:
    """Names of several sessions, each once."""
    return "; ".join(dict.fromkeys([*(before.split("; ") if before else []), *now.split("; ")]))


class Environment:
    """The record of a run, summed over its sessions: from its start, and from each time it was resumed.

    A session counts up to its last `update`: what a killed one did after that is not in the record, and
    what was done twice is in it twice.

    Args:
        path: the file.
        accelerator: of the run.
        precision: "no" or "bf16", as the step computes.
        checkpoint: what the run is resumed from; the record beside its run goes on. None: a new run.

    Raises:
        ValueError: the record to go on with is damaged.
    """

    def __init__(
        self, path: Path, accelerator: Accelerator, precision: str, checkpoint: Path | None = None
    ) -> None:
        self.path, self.accelerator, self.precision = path, accelerator, precision
        self.clock, self.started = time.perf_counter(), now_utc()
        self.before: dict[str, Any] = {}
        device = accelerator.device
        earlier = checkpoint.absolute().parents[1] / path.name if checkpoint else None
        if earlier and earlier.is_file():
            try:
                self.before = json.loads(earlier.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{earlier} is damaged ({error}): delete it; time is counted anew"
                ) from error
        self.since = self.before.get("since_step")
        self.counter: Counter | None
        if device.type == "cuda":
            self.counter, self.source = gpu_counter(device), "NVML counters of the GPUs alone"
        else:
            self.counter = cpu_counter(POWERCAP) if device.type == "cpu" else None
            self.source = "RAPL counters of the CPU packages, whatever ran on them"
        self.joules = self.counter() if self.counter else None
        self.watts: float | None = None
        if self.counter is None:
            self.watts, self.source = stated_watts(device, torch.get_num_threads())

    def spent(self, seconds: float) -> dict[str, float]:
        """Joules of this process in the session, by how they are known; empty: they are not."""
        if self.counter is None:
            return {"energy_kwh_estimated": self.watts * seconds} if self.watts else {}
        now = self.counter()
        if now is None or self.joules is None:
            self.source = NOT_RECORDED
            return {}
        # One process of a machine speaks for its CPUs.
        mine = self.accelerator.device.type == "cuda" or self.accelerator.is_local_main_process
        return {"energy_kwh": now - self.joules if mine else 0.0}

    def update(self, step: int) -> None:
        """Write what the run took until now, at a step. Call on every process."""
        device = self.accelerator.device
        seconds = time.perf_counter() - self.clock
        memory, kind = peak_memory(device)
        parts = gather_object([{"memory": memory, **self.spent(seconds)}])
        if not self.accelerator.is_main_process:
            return
        self.since = step if self.since is None else self.since
        kwh: dict[str, float | None] = {}
        for name in ("energy_kwh", "energy_kwh_estimated"):
            known = [part[name] / JOULES_OF_KWH for part in parts if name in part]
            known += [self.before[name]] if self.before.get(name) else []
            kwh[name] = float(f"{sum(known):.4g}") if known else None
        memories = [part["memory"] for part in parts] + [self.before.get("peak_memory_mib")]
        held = [value for value in memories if value is not None]
        told = {
            "started": self.before.get("started", self.started),
            "updated": now_utc(),
            "sessions": self.before.get("sessions", 0) + 1,
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "device": together(self.before.get("device"), device_name(device)),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "precision": "fp32" if self.precision == "no" else self.precision,
            "since_step": self.since,
            "steps": step,
            "seconds": round(self.before.get("seconds", 0) + seconds, 1),
            "peak_memory_mib": round(max(held), 1) if held else None,
            "peak_memory_kind": kind,
            **kwh,
            "energy_source": together(self.before.get("energy_source"), self.source),
            "versions": versions(),
        }
        write_whole(self.path, (json.dumps(told, indent=2) + "\n").encode())


def now_utc() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
