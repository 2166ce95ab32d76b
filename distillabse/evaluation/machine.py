"""What the machine does to a measurement: how steady its CPU runs, what energy it takes, and whether code is slow."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CPUS = Path("/sys/devices/system/cpu")
CPU_STATISTICS = Path("/proc/stat")
CGROUP_STATISTICS = Path("/sys/fs/cgroup/cpu.stat")
POWER_CAPPING = Path("/sys/class/powercap")

_REFERENCE_SIZE = 128
_REFERENCE_RUNS = 15
# Variables that make PyTorch, Python or memory slow, and the values that do not.
_SLOW_VARIABLES = {
    "PYTHONDEVMODE": ("", "0"),
    "CUDA_LAUNCH_BLOCKING": ("", "0"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("",),
}


class Throttling(NamedTuple):
    """Counters of a moment, None where the system does not tell.

    Attributes:
        clock: seconds.
        thermal_events: how often the CPU was slowed because it was hot.
        stolen_seconds: CPU time that the neighbours of a virtual machine took, over all CPUs.
        quota_seconds: time for which a container was stopped because it had used up its share.
    """

    clock: float
    thermal_events: int | None
    stolen_seconds: float | None
    quota_seconds: float | None


def throttling() -> Throttling:
    """The counters of now."""
    events = [int(text) for path in CPUS.glob("cpu*/thermal_throttle/*_throttle_count") if (text := _read(path))]
    return Throttling(time.monotonic(), sum(events) if events else None, _stolen_seconds(), _quota_seconds())


def reference_seconds(clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a fixed calculation on one thread, the fastest of 15: what rises when the CPU runs slower.

    A product of two float32 matrices of 128 x 128 in numpy's own loops, which use one core and fit into its cache.
    """
    matrix = np.linspace(-1, 1, _REFERENCE_SIZE**2, dtype=np.float32).reshape(_REFERENCE_SIZE, _REFERENCE_SIZE)
    times = []
    for _ in range(_REFERENCE_RUNS):
        start = clock()
        np.einsum("ij,jk->ik", matrix, matrix)
        times.append(clock() - start)
    return min(times)


def governors() -> list[str]:
    """The different frequency governors of the CPUs; empty where the system does not tell."""
    found = {_read(path) for path in CPUS.glob("cpu*/cpufreq/scaling_governor")}
    return sorted(name for name in found if name)


def debug_signs() -> list[str]:
    """What makes this process or its libraries slower than those that people run; empty for release builds."""
    import onnxruntime
    import torch

    runtime = onnxruntime.get_build_info() if hasattr(onnxruntime, "get_build_info") else ""
    return signs_of_debugging(
        environment=os.environ,
        dev_mode=sys.flags.dev_mode,
        debug_python=bool(sysconfig.get_config_var("Py_DEBUG")) or hasattr(sys, "gettotalrefcount"),
        debug_torch=bool(torch.version.debug),
        onnxruntime_build=str(runtime),
    )


def signs_of_debugging(
    *, environment: Any, dev_mode: bool, debug_python: bool, debug_torch: bool, onnxruntime_build: str
) -> list[str]:
    """The same, from what was found.

    Args:
        environment: variables of the environment.
        dev_mode: Python's development mode is on.
        debug_python: Python was built with --with-pydebug.
        debug_torch: PyTorch was built for debugging.
        onnxruntime_build: what `onnxruntime.get_build_info()` says.
    """
    signs = [
        name
        for name, holds in (
            ("Python is a debug build", debug_python),
            ("Python is in development mode (-X dev)", dev_mode and not environment.get("PYTHONDEVMODE")),
            ("PyTorch is a debug build", debug_torch),
        )
        if holds
    ]
    if (build := re.search(r"build type=(\w+)", onnxruntime_build)) and build[1] == "Debug":
        signs.append("ONNX Runtime is a debug build")
    signs += [
        f"{name}={environment[name]}"
        for name, harmless in _SLOW_VARIABLES.items()
        if environment.get(name, "") not in harmless
    ]
    if "debug" in environment.get("PYTHONMALLOC", ""):
        signs.append(f"PYTHONMALLOC={environment['PYTHONMALLOC']}")
    if re.search(r"lib[alt]san|libclang_rt\.\w*san|valgrind", environment.get("LD_PRELOAD", "")):
        signs.append(f"LD_PRELOAD={environment['LD_PRELOAD']}")
    return signs


class EnergyMeter:
    """Energy of the CPU packages by RAPL, Intel's and AMD's running average power limit, as Linux gives it out.

    https://docs.kernel.org/power/powercap/powercap.html: each package counts microjoules up to a greatest value, and
    then from 0 again. It is that of the whole package, whatever runs on it.

    Attributes:
        unavailable: why nothing can be read; None where it can.
    """

    def __init__(self) -> None:
        # intel-rapl:0 is a package, intel-rapl:0:0 a part of it.
        self._packages = sorted(path for path in POWER_CAPPING.glob("intel-rapl:*") if path.name.count(":") == 1)
        self._ranges = [int(_read(path / "max_energy_range_uj") or 0) for path in self._packages]
        self.unavailable: str | None = None
        if not self._packages:
            self.unavailable = f"{POWER_CAPPING} lists no package: this machine does not tell what energy it takes."
        elif any(_read(path / "energy_uj") is None for path in self._packages):
            self.unavailable = (
                f"{self._packages[0] / 'energy_uj'} cannot be read: `sudo chmod a+r {POWER_CAPPING}/*/energy_uj` lets "
                "everybody read it until the next start."
            )

    def counters(self) -> list[int]:
        """Microjoules of every package; empty where nothing can be read."""
        return [] if self.unavailable else [int(_read(path / "energy_uj") or 0) for path in self._packages]

    def joules(self, start: Sequence[int], end: Sequence[int]) -> float:
        """Joules of all packages between two readings, less than one turn of a counter apart."""
        return sum(
            (after - before if after >= before else after - before + most) / 1e6
            for before, after, most in zip(start, end, self._ranges, strict=True)
        )


def _stolen_seconds() -> float | None:
    """`steal` of the line for all CPUs: user nice system idle iowait irq softirq steal (proc_stat(5))."""
    fields = (_read(CPU_STATISTICS) or "").splitlines()[:1]
    numbers = fields[0].split()[1:] if fields else []
    return int(numbers[7]) / os.sysconf("SC_CLK_TCK") if len(numbers) > 7 else None


def _quota_seconds() -> float | None:
    found = re.search(r"^throttled_usec (\d+)$", _read(CGROUP_STATISTICS) or "", re.MULTILINE)
    return int(found[1]) / 1e6 if found else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
