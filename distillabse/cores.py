"""How many cores this process may keep busy, and which."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores that this process may use: its CPU affinity and its container's CPU quota are kept to."""
    allowed = len(_allowed_cpus()) or psutil.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed, _quota() or allowed)


def cpus_for(threads: int) -> list[int]:
    """The CPUs to pin so many threads to: one of every physical core first, then their second hardware threads.

    Returns:
        Numbers of CPUs that this process may use, at most `threads`; empty where the system pins no processes.
    """
    order: dict[str, int] = {}
    ranked = []
    for cpu in _allowed_cpus():
        core = _core_of(cpu)
        order[core] = order.get(core, 0) + 1
        ranked.append((order[core], cpu))
    return sorted(cpu for _, cpu in sorted(ranked)[:threads])


def _allowed_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _core_of(cpu: int) -> str:
    """What the hardware threads of one physical core have in common; a CPU of unknown kin is a core of its own."""
    try:
        return (CPU_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


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
