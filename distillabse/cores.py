"""How many cores this process may keep busy."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores that this process may use: its CPU affinity and its container's CPU quota are kept to."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed, _quota() or allowed)


def _quota() -> int | None:
    """Whole CPUs' worth of time that control group version 2 grants, which `docker run --cpus` sets; None: no limit.

    The file holds microseconds and the period they are granted for, or "max" for no limit:
    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    try:
        granted, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return max(1, int(granted) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None
