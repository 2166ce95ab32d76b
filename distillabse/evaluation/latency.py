"""Speed of several engines on the same texts, measured so that the ratios between them can be trusted.

* Every engine has a process of its own, pinned to as many CPUs as it has threads, and exactly one of them works at a
  time: idle threads of one ONNX Runtime session slow whatever runs next in the same process.
* The engines alternate in many short rounds, in an order that rotates. A speedup compares two engines within a round,
  so that what slows the machine for a while slows both sides of the ratio.
* In a round every engine encodes the same batches of real texts, drawn at random, as many as the slowest engine can
  do in the time; faster engines go through them again until the time is used up.
* The rounds of a cell, a batch size with a length of texts, are spread over the whole measurement: cells are visited in
  turn, a few rounds each, pass after pass. They go on until the interval of every ratio is narrow, or time is used up.
* A timed call starts with strings and ends with a numpy array: tokenisation is inside, because users pay for it. All
  engines tokenise with the same Rust library, PyTorch engines through transformers, ONNX engines directly.
* What other processes used of the CPU meanwhile is part of the result. It is not harmless: with one of two cores taken,
  PyTorch's OpenMP threads wait for each other, and a call of 1 ms was seen to take 160 ms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distillabse.config import BenchConfig
from distillabse.cores import cpus_for, usable_cores
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation.grid import Cell, affordable, standard_cells, visit_in_turn
from distillabse.evaluation.rounds import rotated, summarise
from distillabse.evaluation.workers import Engine, Worker, cores_used_by_others, cpu_times, started

logger = logging.getLogger(__name__)

BASELINES = ("teacher-torch", "teacher-onnx")
WARM_UP_BATCHES = 3
ROUNDS_PER_VISIT = 3
TOLERATED_CORES = 0.25
_WARM_UP_SECONDS = 0.5
_REST_SECONDS = 0.04


def measure(
    engines: list[Engine], texts: list[str], config: BenchConfig, seed: int, baselines: Sequence[str] = BASELINES
) -> dict[str, Any]:
    """Measure the latency of all engines on the same texts.

    Args:
        engines: What to measure; their order is the order of the first round.
        texts: Texts of real lengths; batches are drawn from them.
        config: The grid, threads, rounds and the device.
        seed: Seed of the drawn batches and of the bootstrap.
        baselines: Names of the engines that the others are compared with.

    Returns:
        "latency" (for each engine one row per cell: percentiles in milliseconds, sentences per second, speedups with
        their 95 % intervals), "left_out" (cells that did not fit into the time), "tokens" (lengths of the texts as the
        first engine cuts them), "threads", "cpus", "device", "cores_used_by_others" (mean number of cores that other
        processes took).

    Raises:
        InputError: there are no texts.
        ConfigurationError: a baseline is not among the engines, or the device cannot be used.
        DistillabseError: an engine's process died.
    """
    require_measurable([engine.name for engine in engines], texts, baselines)
    with started(engines, config) as workers, progress_bars() as progress:
        lengths = [worker.tokens(texts) for worker in workers]
        start = cpu_times(workers)
        cells = standard_cells(texts, config.batch_sizes, config.lengths, workers[0].tokens)
        found = measure_cells(workers, cells, config, seed, baselines, progress, seconds=config.max_seconds)
        others = cores_used_by_others(start, cpu_times(workers))
    warn_of_others(others, config)
    return {**found, "tokens": summary_of_lengths(lengths[0]), **conditions(config), "cores_used_by_others": others}


def measure_cells(
    workers: Sequence[Worker],
    cells: Sequence[Cell],
    config: BenchConfig,
    seed: int,
    baselines: Sequence[str],
    progress: Progress,
    *,
    seconds: float,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Latency of engines that are loaded.

    Args:
        workers: The engines; the first is the one whose order is rotated first.
        cells: The grid.
        config: Rounds, interval and the time of a round.
        seed: Seed of the drawn batches and of the bootstrap.
        baselines: Names of the engines that the others are compared with.
        progress: Shows how far it is.
        seconds: Time for all cells; without `config.interval` it is not looked at.
        between: Called after each visit to a cell, when nothing is timed.

    Returns:
        "latency" and "left_out" as in `measure`.
    """
    limit = math.inf if config.interval is None else seconds
    costs = [_warm_up(cell, workers, config, seed, progress) for cell in cells]
    chosen, left_out = affordable(cells, costs, limit)
    for row in left_out:
        logger.warning("Batch %s is left out: %s", row["batch"], row["reason"])
    task = progress.add_task("latency", total=len(chosen) * config.rounds)

    def rows_of(cell: Cell) -> dict[str, dict[str, Any]]:
        timings = cell.timings()
        return summarise(timings, cell.batch, seed, baselines, passes=cell.passes, interval=config.interval)

    def visit(cell: Cell) -> None:
        progress.update(task, description=f"latency, {cell.title}, round {cell.rounds + 1}")
        # Beyond the least number, whole visits: each is one block of the bootstrap.
        left = config.rounds - cell.rounds
        for _ in range(min(ROUNDS_PER_VISIT, left) if left > 0 else ROUNDS_PER_VISIT):
            _round(cell, workers, config, seed)
            progress.advance(task, 1 if left > 0 else 0)
        cell.passes += [max(cell.passes, default=-1) + 1] * (len(cell.turns[workers[0].engine.name]) - cell.rounds)
        between()

    def is_finished(cell: Cell) -> bool:
        if cell.rounds < config.rounds or cell.in_order:
            return cell.rounds >= config.rounds and cell.is_through
        return config.interval is None or all(row["converged"] for row in rows_of(cell).values())

    visit_in_turn(chosen, visit, is_finished, limit)
    latency: dict[str, list[dict[str, Any]]] = {worker.engine.name: [] for worker in workers}
    for cell in chosen:
        for name, row in rows_of(cell).items():
            latency[name].append(_row(cell, name, row))
    return {"latency": latency, "left_out": left_out}


def require_measurable(names: Sequence[str], texts: Sequence[str], baselines: Sequence[str]) -> None:
    """Refuse what cannot be measured.

    Raises:
        InputError: there are no texts.
        ConfigurationError: a baseline is not among the engines.
    """
    if missing := [name for name in baselines if name not in names]:
        raise ConfigurationError(f"The baseline {missing[0]} is not among the engines: {', '.join(names)}. Add it.")
    if not texts:
        raise InputError("There are no texts to measure on. Give at least one.")


def conditions(config: BenchConfig) -> dict[str, Any]:
    """What the engines were given: "threads", the CPUs that they were pinned to, "device"."""
    threads = config.threads or usable_cores()
    return {"threads": threads, "cpus": cpus_for(threads), "device": config.device}


def is_crowded(others: float, threads: int) -> bool:
    """Whether other processes took cores that were measured on."""
    return others + threads > (psutil.cpu_count() or 1) + TOLERATED_CORES


def warn_of_others(others: float, config: BenchConfig) -> None:
    """Say so where other processes took cores that were measured on."""
    threads = config.threads or usable_cores()
    if is_crowded(others, threads):
        logger.warning(
            "Other processes used %.1f cores while %d threads were measured: do not trust these figures. Stop the "
            "others and measure again, or set bench.threads to what is free.",
            others,
            threads,
        )


def summary_of_lengths(tokens: Sequence[int]) -> dict[str, float]:
    """Summary of the texts' lengths in tokens."""
    p50, p95 = np.percentile(tokens, [50, 95]).tolist()
    return {"mean": float(np.mean(tokens)), "p50": p50, "p95": p95, "max": max(tokens)}


def progress_bars() -> Progress:
    """Bars on a terminal, with the time that has gone and the time left."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def _warm_up(cell: Cell, workers: Sequence[Worker], config: BenchConfig, seed: int, progress: Progress) -> float:
    """Let every engine see batches of the cell, set how many a round has, and say what its rounds will cost in seconds.

    Raises:
        DistillabseError: an engine's process died.
    """
    task = progress.add_task(f"warming up, {cell.title}", total=len(workers))
    fastest = []
    for worker in workers:
        times: list[float] = []
        for batch in cell.batches(0, seed + 1)[:1] * WARM_UP_BATCHES:
            times += worker.time([batch], seconds=0).seconds
            if sum(times) > _WARM_UP_SECONDS:
                break
        fastest.append(min(times))
        progress.advance(task)
    progress.remove_task(task)
    cell.count = max(1, int(config.seconds_per_round / max(fastest)))
    return config.rounds * sum(max(config.seconds_per_round, time) + _REST_SECONDS for time in fastest)


def _round(cell: Cell, workers: Sequence[Worker], config: BenchConfig, seed: int) -> None:
    number = len(cell.turns.get(workers[0].engine.name, ()))
    batches = cell.batches(number, seed)
    # Texts in their order are encoded once, as they come.
    seconds = 0 if cell.in_order else config.seconds_per_round
    for worker in rotated(workers, number):
        cell.turns.setdefault(worker.engine.name, []).append(worker.time(batches, seconds))


def _row(cell: Cell, name: str, row: dict[str, Any]) -> dict[str, Any]:
    whole = {"batch": cell.batch, "length": cell.length, **row, "ms_per_sentence": cell.milliseconds_per_sentence(name)}
    if cell.in_order:  # the last batch may be smaller than the others, or the only one
        whole["sentences_per_second"] = 1000 / whole["ms_per_sentence"]
    if wall := cell.wall_milliseconds(name):
        whole["wall_p50_ms"] = float(np.median(wall))
    return whole
