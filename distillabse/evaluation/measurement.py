"""Everything that is measured of engines side by side: latency, throughput, memory, cold start, energy, and guards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from distillabse.evaluation import gpu, guards, machine
from distillabse.evaluation.grid import standard_cells, thesis_cells
from distillabse.evaluation.latency import (
    conditions,
    is_crowded,
    measure_cells,
    progress_bars,
    require_measurable,
    summary_of_lengths,
)
from distillabse.evaluation.rounds import rotated
from distillabse.evaluation.workers import Engine, Worker, cores_used_by_others, cpu_times, started

if TYPE_CHECKING:
    from rich.progress import Progress

    from distillabse.config import BenchConfig
    from distillabse.evaluation.fidelity import Vectors

logger = logging.getLogger(__name__)

Protocol = Literal["standard", "thesis"]

# Latency gets at least this share of the time for the whole measurement; cold starts end after this share of it, and a
# run over the texts takes at most this one.
_LATENCY_SHARE = 1 / 3
_COLD_START_SHARE = 1 / 5
_RUN_SHARE = 1 / 40
_LEAST_TEXTS = 32


@dataclass(frozen=True)
class Measurement:
    """What was found.

    Attributes:
        figures: as in the JSON: "latency", "left_out", "throughput", "memory", "cold_start", "energy", "guards",
            "trusted", "tokens", "threads", "cpus", "device", "cores_used_by_others", "throttling", "gpu", "seconds".
        vectors: of the texts, by engine: float32 [texts or `encoded`, dimension].
        tokens: length of every text, as the first engine cuts it.
    """

    figures: dict[str, Any]
    vectors: dict[str, Vectors]
    tokens: list[int]


class Watch:
    """Readings of the machine, before, between and after what is timed.

    Args:
        device: that of the engines; of "cuda" the GPUs are read, too.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = machine.throttling()
        self._idle_gpus = gpu.gpu_state() if device == "cuda" else None
        self._loaded_gpus: list[dict[str, Any]] | None = None
        self._held_back: set[str] = set()
        self._references = [machine.reference_seconds()]

    def look(self) -> None:
        """Take one more reading."""
        if self._device == "cuda":  # first, while its clocks are still those of the work that has just ended
            self._loaded_gpus = gpu.gpu_state()
            self._held_back.update(gpu.held_back_by(self._loaded_gpus))
        self._references.append(machine.reference_seconds())

    def finish(self) -> tuple[dict[str, Any], list[guards.Guard]]:
        """Take the last reading; "throttling" and "gpu" for the JSON, and the guards on them."""
        self.look()
        end, governors = machine.throttling(), machine.governors()
        figures: dict[str, Any] = {
            "throttling": {
                "start": self._start._asdict(),
                "end": end._asdict(),
                "reference_seconds": self._references,
                "governors": governors,
            },
            "gpu": None,
        }
        found = [guards.cpu_throttling(self._start, end, self._references, psutil.cpu_count() or 1, governors)]
        if self._device == "cuda":
            held_back = sorted(self._held_back)
            figures["gpu"] = {"idle": self._idle_gpus, "loaded": self._loaded_gpus, "held_back_by": held_back}
            found.append(guards.gpu_throttling(held_back))
        return figures, found


def measure_engines(
    engines: Sequence[Engine],
    texts: Sequence[str],
    config: BenchConfig,
    seed: int,
    baselines: Sequence[str],
    *,
    protocol: Protocol = "standard",
    training: Iterable[str] | None = None,
    encoded: int | None = None,
) -> Measurement:
    """Measure engines side by side, within about `config.max_seconds`, and look for what makes figures worthless.

    Args:
        engines: What to measure. Lengths are counted with the tokenizer of the first.
        texts: Distinct texts of real lengths.
        config: The grid, threads, rounds, device and time.
        seed: Seed of the drawn batches and of the bootstrap.
        baselines: Names of the engines that the others are compared with.
        protocol: "standard": the grid of `config`; "thesis": see `grid.thesis_cells`.
        training: The training corpus, if it is known.
        encoded: Texts, from the first on, whose vectors are kept and judged; by default all.

    Raises:
        InputError: there are no texts, or none of a length that is asked for.
        ConfigurationError: a baseline is not among the engines, or the device cannot be used.
        DistillabseError: an engine's process died.
    """
    names = [engine.name for engine in engines]
    require_measurable(names, texts, baselines)
    begun, listed = time.monotonic(), list(texts)
    judged = [guards.debug_build(machine.debug_signs()), guards.training_overlap(listed, training)]
    with progress_bars() as progress, started(engines, config) as workers:
        tokens = workers[0].tokens(listed)
        watch = Watch(config.device)
        few = listed[:encoded]
        vectors, seconds = _encode_all(workers, few, progress)
        for worker in workers:
            judged += _judge_vectors(worker, vectors[worker.engine.name], few, worker.engine.name in baselines)
        figures: dict[str, Any] = {"cold_start": cold_starts(engines, listed[0], config, progress)}
        start = cpu_times(workers)
        sample = _sample(listed, max(seconds.values()) * len(listed) / len(few), config, seed)
        figures |= measure_throughput(workers, sample, config.throughput_runs, progress)
        watch.look()
        cells = (
            thesis_cells(listed, workers[0].tokens)
            if protocol == "thesis"
            else standard_cells(listed, config.batch_sizes, config.lengths, workers[0].tokens)
        )
        left = max(config.max_seconds - (time.monotonic() - begun), _LATENCY_SHARE * config.max_seconds)
        figures |= measure_cells(workers, cells, config, seed, baselines, progress, seconds=left, between=watch.look)
        others = cores_used_by_others(start, cpu_times(workers))
        figures["memory"] = {worker.engine.name: _memory(worker) for worker in workers}
        readings, of_machine = watch.finish()
    given = conditions(config)
    judged += [
        guards.few_pairs(figures["latency"], baselines),
        *of_machine,
        guards.other_processes(others, given["threads"], is_crowded(others, given["threads"])),
    ]
    rows = guards.as_rows(judged)
    figures |= {
        **readings,
        **given,
        "tokens": summary_of_lengths(tokens),
        "cores_used_by_others": others,
        "guards": rows,
        "trusted": guards.is_trusted(rows),
        "seconds": time.monotonic() - begun,
    }
    return Measurement(figures, vectors, tokens)


def cold_starts(
    engines: Sequence[Engine],
    text: str,
    config: BenchConfig,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, dict[str, Any]]:
    """Seconds from the start of a fresh process to its first vector, by engine; the files are in memory already.

    The engines alternate. Where a fifth of `config.max_seconds` is used up there are fewer runs, but one each.
    """
    found: dict[str, list[float]] = {engine.name: [] for engine in engines}
    threads = conditions(config)["threads"]
    task = progress.add_task("cold starts", total=config.cold_starts * len(engines))
    begun = clock()
    for number in range(config.cold_starts):
        if number and clock() - begun > _COLD_START_SHARE * config.max_seconds:
            break
        for engine in rotated(engines, number):
            with ExitStack() as stack:
                start = time.monotonic()
                worker = Worker(engine, config.device, threads, stack)
                found[engine.name].append(worker.first_vector(text) - start)
            progress.advance(task)
    return {
        name: {"median_seconds": float(np.median(times)), "spread": [min(times), max(times)], "runs": len(times)}
        for name, times in found.items()
        if times
    }


def measure_throughput(
    workers: Sequence[Worker], texts: list[str], runs: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """All texts through every engine's own sorting and batching, in turn: "throughput" and "energy" of the JSON.

    Energy is what the CPU packages took during an engine's turns: all of it, what else ran and idling included.
    """
    seconds: dict[str, list[float]] = {worker.engine.name: [] for worker in workers}
    joules = dict.fromkeys(seconds, 0.0)
    meter = machine.EnergyMeter()
    task = progress.add_task("throughput", total=runs * len(workers))
    for number in range(runs):
        for worker in rotated(workers, number):
            before = meter.counters()
            seconds[worker.engine.name].append(worker.bulk_seconds(texts))
            joules[worker.engine.name] += meter.joules(before, meter.counters()) if before else 0.0
            progress.advance(task)
    rates = {name: [len(texts) / time for time in times] for name, times in seconds.items() if times}
    energy: dict[str, Any] = {
        name: {"joules_per_1000_sentences": 1000 * joules[name] / (len(found) * len(texts))}
        for name, found in rates.items()
    }
    return {
        "throughput": {
            name: {
                "sentences_per_second": float(np.median(found)),
                "spread": [min(found), max(found)],
                "runs": len(found),
                "texts": len(texts),
            }
            for name, found in rates.items()
        },
        "energy": energy if meter.unavailable is None else {"unavailable": meter.unavailable},
    }


def show_failures(figures: dict[str, Any]) -> None:
    """Log a line for every guard that failed."""
    for line in guards.failures(figures["guards"]):
        logger.error("Not to be trusted: %s", line)


def _encode_all(
    workers: Sequence[Worker], texts: list[str], progress: Progress
) -> tuple[dict[str, Vectors], dict[str, float]]:
    """Vectors of all texts, and the seconds they took, by engine."""
    vectors: dict[str, Vectors] = {}
    seconds: dict[str, float] = {}
    for worker in progress.track(workers, description=f"encoding {len(texts)} texts"):
        vectors[worker.engine.name], seconds[worker.engine.name] = worker.bulk_vectors(texts)
    return vectors, seconds


def _judge_vectors(worker: Worker, vectors: Vectors, texts: Sequence[str], is_baseline: bool) -> list[guards.Guard]:
    name = worker.engine.name
    found = [guards.constant_vectors(name, vectors, is_baseline=is_baseline)]
    if len(texts) > 1:
        found.append(guards.batch_dependence(name, worker.vectors, texts))
        found.append(guards.unmasked_padding(name, worker.vectors, texts))
    return found


def _sample(texts: list[str], slowest: float, config: BenchConfig, seed: int) -> list[str]:
    """All texts, or as many of them, drawn at random, as the slowest engine does in a fortieth of the time."""
    share = min(1.0, _RUN_SHARE * config.max_seconds / slowest)
    count = min(len(texts), max(_LEAST_TEXTS, int(share * len(texts))))
    chosen = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[row] for row in sorted(chosen)]


def _memory(worker: Worker) -> dict[str, int | None]:
    found = worker.memory()
    if found["gpu_peak_bytes"] is None and worker.device != "cpu":
        # ONNX Runtime keeps what it once took, so what it holds in the end is its peak.
        found["gpu_peak_bytes"] = gpu.memory_of_process(worker.pid)
    return found
