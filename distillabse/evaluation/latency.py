"""Speed of several engines on the same texts, measured so that the ratios between them can be trusted.

* Every engine has a process of its own, and exactly one of them works at a time: idle threads of one ONNX Runtime
  session slow whatever runs next in the same process.
* The engines alternate in many short rounds, in an order that rotates. A speedup compares two engines within a round,
  so that what slows the machine for a while slows both sides of the ratio.
* In a round every engine encodes the same batches of real texts, drawn at random, as many as the slowest engine can
  do in the time; faster engines go through them again until the time is used up.
* A timed call starts with strings and ends with a numpy array: tokenisation is inside, because users pay for it. All
  engines tokenise with the same Rust library, PyTorch engines through transformers, ONNX engines directly.
* What other processes used of the CPU meanwhile is part of the result. It is not harmless: with one of two cores taken,
  PyTorch's OpenMP threads wait for each other, and a call of 1 ms was seen to take 160 ms.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distillabse.config import BenchConfig
from distillabse.environment import require_device, usable_cores
from distillabse.errors import ConfigurationError, DistillabseError, InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

logger = logging.getLogger(__name__)

BASELINES = ("teacher-torch", "teacher-onnx")
WARM_UP_BATCHES = 3
BOOTSTRAP_SAMPLES = 2000
TOLERATED_CORES = 0.25
# Every library that brings threads: OpenMP and MKL (PyTorch), Rayon (tokenizers).
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")

Rounds = list[list[float]]
"""Seconds of every batch, by round."""


@dataclass(frozen=True)
class Engine:
    """Something that encodes texts.

    Attributes:
        name: what results call it.
        kind: a SentenceTransformer folder ("torch") or a graph of a bundle ("onnx"); or what another worker knows.
        folder: where it is.
        file: the graph inside the folder.
        worker: the command of its process, which speaks as `latency_worker` does.
    """

    name: str
    kind: str
    folder: Path
    file: str | None = None
    worker: Sequence[str] = (sys.executable, "-m", "distillabse.evaluation.latency_worker")


class CpuTimes(NamedTuple):
    """Seconds since some moment: on the clock, of CPU use of the whole machine, and of this process and its workers."""

    clock: float
    machine: float
    own: float


def measure(
    engines: list[Engine], texts: list[str], config: BenchConfig, seed: int, baselines: Sequence[str] = BASELINES
) -> dict[str, Any]:
    """Measure all engines on the same texts.

    Args:
        engines: What to measure; their order is the order of the first round.
        texts: Texts of real lengths; batches are drawn from them.
        config: Batch sizes, threads, rounds and the device.
        seed: Seed of the drawn batches and of the bootstrap.
        baselines: Names of the engines that the others are compared with.

    Returns:
        "latency" (for each engine one row per batch size: percentiles in milliseconds, sentences per second, speedups
        with their 95 % intervals), "tokens" (lengths of the texts as the first engine cuts them), "threads", "device",
        "cores_used_by_others" (mean number of cores that other processes took).

    Raises:
        InputError: there are no texts.
        ConfigurationError: a baseline is not among the engines, or the device cannot be used.
        DistillabseError: an engine's process died.
    """
    names = [engine.name for engine in engines]
    if missing := [name for name in baselines if name not in names]:
        raise ConfigurationError(f"The baseline {missing[0]} is not among the engines: {', '.join(names)}. Add it.")
    if not texts:
        raise InputError("There are no texts to measure on. Give at least one.")
    require_device(config.device)
    threads = config.threads or usable_cores()
    latency: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = [_Worker(engine, config.device, threads, stack) for engine in engines]
        # An answer also means that the engine is loaded: none may be loading while another is timed.
        lengths = [worker.ask({"texts": texts})["tokens"] for worker in workers]
        progress = stack.enter_context(_progress())
        start = _cpu_times(workers)
        for size in config.batch_sizes:
            timings = _time_batch_size(workers, texts, size, config, seed, progress)
            for name, row in summarise(timings, size, seed, baselines).items():
                latency[name].append(row)
        others = cores_used_by_others(start, _cpu_times(workers))
    if others + threads > (psutil.cpu_count() or 1) + TOLERATED_CORES:
        logger.warning(
            "Other processes used %.1f cores while %d threads were measured: do not trust these figures. Stop the "
            "others and measure again, or set bench.threads to what is free.",
            others,
            threads,
        )
    return {
        "latency": latency,
        "tokens": _lengths(lengths[0]),
        "threads": threads,
        "device": config.device,
        "cores_used_by_others": others,
    }


def summarise(timings: dict[str, Rounds], size: int, seed: int, baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One row of `bench.json` for every engine, from the seconds of its batches at one batch size."""
    rows = {}
    for name, rounds in timings.items():
        seconds = [second for one in rounds for second in one]
        row: dict[str, Any] = {"batch": size, **percentiles(seconds)}
        row |= {"sentences_per_second": size / float(np.median(seconds)), "rounds": len(rounds)}
        for baseline in baselines:
            key = f"speedup_vs_{baseline.replace('-', '_')}"
            row[key], row[f"{key}_ci95"] = paired_speedup(timings[baseline], rounds, seed)
        rows[name] = row
    return rows


def percentiles(seconds: ArrayLike) -> dict[str, float]:
    """50th, 95th and 99th percentile of times in seconds, linearly interpolated, in milliseconds."""
    values = 1000 * np.percentile(np.asarray(seconds, dtype=np.float64), [50, 95, 99])
    return dict(zip(("p50_ms", "p95_ms", "p99_ms"), values.tolist(), strict=True))


def paired_speedup(baseline: Rounds, engine: Rounds, seed: int) -> tuple[float, list[float]]:
    """How many times faster `engine` is than `baseline`, from rounds that both took part in.

    Args:
        baseline: Seconds of the baseline's batches, by round.
        engine: Seconds of the engine's batches, for the same rounds.
        seed: Seed of the bootstrap.

    Returns:
        The median over rounds of (baseline's median / engine's median), and its 95 % percentile-bootstrap interval over
        resampled rounds.
    """
    ratios = np.array([np.median(slow) / np.median(fast) for slow, fast in zip(baseline, engine, strict=True)])
    resampled = np.random.default_rng(seed).choice(ratios, (BOOTSTRAP_SAMPLES, len(ratios)))
    interval = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), interval.tolist()


def cores_used_by_others(start: CpuTimes, end: CpuTimes) -> float:
    """Mean number of cores that other processes used between two moments."""
    used = (end.machine - start.machine) - (end.own - start.own)
    return max(0.0, used / (end.clock - start.clock))


def draw_batches(texts: Sequence[str], size: int, count: int, seed: Sequence[int]) -> list[list[str]]:
    """Draw `count` batches of `size` texts; within a batch no text twice, unless there are too few."""
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(len(texts), size, replace=size > len(texts)) for _ in range(count)]
    return [[texts[index] for index in batch] for batch in drawn]


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """The items in turn, starting with number `by`, counted around."""
    start = by % len(items)
    return [*items[start:], *items[:start]]


def _time_batch_size(
    workers: list[_Worker], texts: list[str], size: int, config: BenchConfig, seed: int, progress: Progress
) -> dict[str, Rounds]:
    """Warm up, then let the engines alternate; the seconds of every batch, by engine and round."""
    task = progress.add_task(f"batch {size}, warming up", total=config.rounds)
    warm_up = draw_batches(texts, size, WARM_UP_BATCHES, [seed, size])
    slowest = max(min(worker.time(warm_up, seconds=0)) for worker in workers)
    count = max(1, int(config.seconds_per_round / slowest))
    timings: dict[str, Rounds] = {worker.engine.name: [] for worker in workers}
    for number in range(config.rounds):
        progress.update(task, description=f"batch {size}, rounds")
        batches = draw_batches(texts, size, count, [seed, size, number])
        for worker in rotated(workers, number):
            timings[worker.engine.name].append(worker.time(batches, config.seconds_per_round))
        progress.advance(task)
    return timings


class _Worker:
    """The process of one engine: one JSON line in, one JSON line out. It ends when `stack` is left."""

    def __init__(self, engine: Engine, device: str, threads: int, stack: ExitStack) -> None:
        self.engine = engine
        log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        self._log = stack.enter_context(log)
        self._process = subprocess.Popen(
            list(engine.worker),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))},
        )
        stack.callback(self._process.communicate)
        stack.callback(self._process.kill)  # it holds nothing that must be saved
        settings = {"kind": engine.kind, "folder": str(engine.folder), "file": engine.file}
        self._send({**settings, "device": device, "threads": threads})

    def time(self, batches: list[list[str]], seconds: float) -> list[float]:
        """Seconds of every batch; all batches are encoded once, and again until `seconds` are used up."""
        return list(self.ask({"batches": batches, "seconds": seconds})["seconds"])

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        used = psutil.Process(self._process.pid).cpu_times()
        return float(used.user + used.system)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        self._send(question)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise self._death()
        return dict(json.loads(answer))

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> DistillabseError:
        status = self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-15:])
        return DistillabseError(
            f"The process that measures {self.engine.name} ({self.engine.folder}) ended with status {status} "
            f"(-9: the machine ran out of memory). Its last words:\n{tail}"
        )


def _cpu_times(workers: list[_Worker]) -> CpuTimes:
    machine = psutil.cpu_times()
    # Steal is time that the neighbours of a virtual machine took.
    busy = sum(getattr(machine, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    own = time.process_time() + sum(worker.cpu_seconds() for worker in workers)
    return CpuTimes(time.monotonic(), busy, own)


def _lengths(tokens: list[int]) -> dict[str, float]:
    """Summary of the texts' lengths in tokens."""
    p50, p95 = np.percentile(tokens, [50, 95]).tolist()
    return {"mean": float(np.mean(tokens)), "p50": p50, "p95": p95, "max": max(tokens)}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns)
