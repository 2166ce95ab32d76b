"""What an NVIDIA GPU says of itself while it is measured."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

# Names of `nvidia-smi --help-query-gpu`, with the unit that `nounits` leaves out.
QUERIES = {
    "name": "name",
    "driver_version": "driver",
    "pstate": "power_state",
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "greatest_sm_clock_mhz",
    "temperature.gpu": "temperature_celsius",
    "power.draw": "power_watts",
    "clocks_throttle_reasons.active": "throttle_reasons",
}
# Bits of clocks_throttle_reasons.active (nvml.h, nvmlClocksThrottleReason*) that stand for a GPU held back; idle and
# clocks that somebody has set are none.
HELD_BACK = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}

Run = Callable[[list[str]], str]
"""Runs a command and gives its standard output."""


def run_command(command: list[str]) -> str:
    """Standard output of a command.

    Raises:
        OSError: there is no such program.
        subprocess.SubprocessError: it failed, or took longer than 20 seconds.
    """
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def gpu_state(run: Run = run_command) -> list[dict[str, Any]] | None:
    """Clocks, power state, temperature and what holds each GPU back, now; None where nvidia-smi does not run."""
    query = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader,nounits"]
    try:
        lines = run(query).strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return [dict(zip(QUERIES.values(), map(_value, line.split(",")), strict=True)) for line in lines]


def held_back_by(state: list[dict[str, Any]] | None) -> list[str]:
    """What holds the GPUs back, in words."""
    masks = [str(gpu["throttle_reasons"]) for gpu in state or ()]
    bits = [int(mask, 16) for mask in masks if mask.startswith("0x")]
    return sorted({reason for bit, reason in HELD_BACK.items() if any(mask & bit for mask in bits)})


def memory_of_process(pid: int, run: Run = run_command) -> int | None:
    """Bytes of GPU memory that a process holds; None where nvidia-smi does not tell, as often inside a container."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    try:
        rows = [line.split(",") for line in run(query).strip().splitlines()]
    except (OSError, subprocess.SubprocessError):
        return None
    found = [int(used) for number, used in rows if number.strip() == str(pid) and used.strip().isdigit()]
    return sum(found) * 2**20 if found else None


def _value(text: str) -> str | float | None:
    text = text.strip()
    if text in ("[N/A]", "N/A", "[Not Supported]"):
        return None
    try:
        return float(text)
    except ValueError:
        return text
