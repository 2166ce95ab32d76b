"""What is said of rounds in which engines alternated: percentiles, ratios with their intervals, and tests on pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

BOOTSTRAP_SAMPLES = 2000

Rounds = list[list[float]]
"""Seconds of every batch, by round."""


def summarise(
    timings: Mapping[str, Rounds],
    size: int,
    seed: int,
    baselines: Sequence[str],
    *,
    passes: Sequence[int] | None = None,
    interval: float | None = None,
) -> dict[str, dict[str, Any]]:
    """One row of figures for every engine, from the seconds of its batches in one cell of the grid.

    Args:
        timings: Seconds of every batch by engine and round; all engines took part in all rounds.
        size: Sentences of a batch.
        seed: Seed of the bootstrap.
        baselines: The engines that the others are compared with.
        passes: See `paired_speedup`.
        interval: `converged` says whether all intervals are narrower than this share of their ratio.
    """
    rows = {}
    for name, rounds in timings.items():
        seconds = [second for one in rounds for second in one]
        row: dict[str, Any] = {"batch": size, **percentiles(seconds)}
        row |= {"sentences_per_second": size / float(np.median(seconds)), "rounds": len(rounds)}
        narrow = True
        for baseline in baselines:
            key = f"speedup_vs_{baseline.replace('-', '_')}"
            row[key], row[f"{key}_ci95"] = paired_speedup(timings[baseline], rounds, seed, passes)
            row[f"{key}_wilcoxon_p"] = paired_p_value(timings[baseline], rounds)
            narrow &= interval is None or is_narrow(row[key], row[f"{key}_ci95"], interval)
        rows[name] = {**row, "converged": narrow}
    return rows


def percentiles(seconds: ArrayLike) -> dict[str, float]:
    """50th, 95th and 99th percentile of times in seconds, linearly interpolated, in milliseconds."""
    values = 1000 * np.percentile(np.asarray(seconds, dtype=np.float64), [50, 95, 99])
    return dict(zip(("p50_ms", "p95_ms", "p99_ms"), values.tolist(), strict=True))


def paired_speedup(
    baseline: Rounds, engine: Rounds, seed: int, passes: Sequence[int] | None = None
) -> tuple[float, list[float]]:
    """How many times faster `engine` is than `baseline`, from rounds that both took part in.

    Rounds that follow each other share what the machine does at the time, so that an interval over single rounds is too
    narrow for what another run would find. Rounds of a pass, which are consecutive, are resampled as a block (Künsch
    1989, "The jackknife and the bootstrap for general stationary observations").

    Args:
        baseline: Seconds of the baseline's batches, by round.
        engine: Seconds of the engine's batches, for the same rounds.
        seed: Seed of the bootstrap.
        passes: The pass that each round belongs to; by default each is one of its own.

    Returns:
        The median over rounds of (baseline's median / engine's median), and its 95 % percentile-bootstrap interval over
        resampled passes.
    """
    ratios = np.array([np.median(slow) / np.median(fast) for slow, fast in zip(baseline, engine, strict=True)])
    blocks = _blocks(ratios, passes if passes is not None else range(len(ratios)))
    drawn = np.random.default_rng(seed).integers(len(blocks), size=(BOOTSTRAP_SAMPLES, len(blocks)))
    resampled = blocks[drawn].reshape(BOOTSTRAP_SAMPLES, -1)
    medians = np.nanmedian(resampled, axis=1) if np.isnan(blocks).any() else np.median(resampled, axis=1)
    return float(np.median(ratios)), np.percentile(medians, [2.5, 97.5]).tolist()


def paired_p_value(baseline: Rounds, engine: Rounds) -> float:
    """Wilcoxon's signed-rank test of no difference between two engines, on the logarithms of their medians by round."""
    logarithms = [np.log([np.median(one) for one in rounds]) for rounds in (baseline, engine)]
    return wilcoxon_p(logarithms[0] - logarithms[1])


def wilcoxon_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where nothing differs, of which the test itself says nothing."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def is_narrow(ratio: float, interval: Sequence[float], share: float) -> bool:
    """Whether an interval is narrower than this share of its ratio."""
    return interval[1] - interval[0] < share * ratio


def draw_batches(texts: Sequence[str], size: int, count: int, seed: Sequence[int]) -> list[list[str]]:
    """Draw `count` batches of `size` texts; within a batch no text twice, unless there are too few."""
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(len(texts), size, replace=size > len(texts)) for _ in range(count)]
    return [[texts[index] for index in batch] for batch in drawn]


def batches_in_order(texts: Sequence[str], size: int, count: int, start: int) -> list[list[str]]:
    """Batches number `start` to `start + count` of the texts as they stand; after the last comes the first again.

    The last batch of the texts holds what is left, which may be less than `size`.
    """
    batches = -(-len(texts) // size)
    numbers = [(start + step) % batches for step in range(count)]
    return [list(texts[number * size : (number + 1) * size]) for number in numbers]


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """The items in turn, starting with number `by`, counted around."""
    start = by % len(items)
    return [*items[start:], *items[:start]]


def _blocks(ratios: NDArray[np.float64], passes: Sequence[int]) -> NDArray[np.float64]:
    """The ratios with a row for each pass; shorter ones are filled with NaN."""
    members = [ratios[np.asarray(passes) == one] for one in dict.fromkeys(passes)]
    blocks = np.full((len(members), max(map(len, members))), np.nan)
    for row, member in zip(blocks, members, strict=True):
        row[: len(member)] = member
    return blocks
