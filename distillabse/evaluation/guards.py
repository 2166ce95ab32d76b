"""What makes figures worthless although they look fine: each guard finds one such thing, and says how to mend it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distillabse.config import GatesConfig
from distillabse.corpus.cleaning import normalised_key
from distillabse.errors import GateFailed
from distillabse.evaluation.fidelity import Vectors, constant_cosines, row_cosines
from distillabse.evaluation.machine import Throttling
from distillabse.verification.vectors import BATCH, LEAST_SPREAD

logger = logging.getLogger(__name__)

LEAST_PAIRS = 30
# Of the reference calculation, over the fastest time it was seen to take.
TOLERATED_DRIFT = 0.25
# Of the time that was measured.
TOLERATED_STEAL = 0.05
TOLERATED_QUOTA = 0.01
SAMPLE = 64
_PADDED = 16
_NAMED = 3


@dataclass(frozen=True)
class Guard:
    """One thing that was looked for.

    Attributes:
        guard: what would make the figures worthless.
        encoder: whose; None for the machine, or for all.
        passed: it was not found.
        detail: what was found, and the remedy where it must be mended.
    """

    guard: str
    encoder: str | None
    passed: bool
    detail: str


def constant_vectors(name: str, vectors: Vectors, *, is_baseline: bool) -> Guard:
    """One vector for all texts: every cosine to it is the same, and a constant student agrees with it fully."""
    spread = 1 - float(constant_cosines(vectors).mean())
    found = spread >= LEAST_SPREAD  # never of NaN
    role = "teacher" if is_baseline else "student"
    remedy = "" if found else ": it gives one vector for every text. Check its pooling, attention mask and weights"
    return Guard(f"constant {role}", name, found, f"1 - mean cosine to the mean direction {spread:.2g}{remedy}.")


def batch_dependence(name: str, encode: Callable[[list[list[str]]], Vectors], texts: Sequence[str]) -> Guard:
    """A vector that depends on the texts beside it, as with one scale for all activations of a batch.

    Args:
        name: what the encoder is called.
        encode: vectors of texts in exactly these batches: float32 [texts, dimension].
        texts: the first 64 are run alone and in batches of 32, short ones beside long ones.
    """
    sample = list(texts[:SAMPLE])
    batches = [sample[start : start + BATCH] for start in range(0, len(sample), BATCH)]
    least = float(row_cosines(encode([[text] for text in sample]), encode(batches)).min())
    return _invariance("batch-dependent vectors", name, least, "alone and in a batch")


def unmasked_padding(name: str, encode: Callable[[list[list[str]]], Vectors], texts: Sequence[str]) -> Guard:
    """Padding that counts: a short text has another vector beside a long one.

    Args:
        name, encode: as for `batch_dependence`.
        texts: the longest is put beside each of the 16 shortest.
    """
    ordered = sorted(texts, key=len)
    longest, short = ordered[-1], ordered[: min(_PADDED, len(ordered) - 1)]
    alone = encode([[text] for text in short])
    padded = encode([[text, longest] for text in short])[::2]
    least = float(row_cosines(alone, padded).min())
    return _invariance("unmasked padding", name, least, "alone and beside a long text")


def training_overlap(texts: Sequence[str], training: Iterable[str] | None) -> Guard:
    """Texts that the student was trained on: fidelity on them is not what others will see.

    Args:
        texts: what is measured on.
        training: the corpus of the training; None where none is known.
    """
    name = "training overlap"
    if training is None:
        return Guard(
            name, None, True, "No training corpus is known, so nothing was compared: --training-text names one."
        )
    keys = {normalised_key(text): text for text in texts}
    seen = {key for text in training if (key := normalised_key(text)) in keys}
    if not seen:
        return Guard(name, None, True, f"None of {len(keys)} texts is in the training corpus.")
    some = "; ".join(repr(keys[key][:60]) for key in sorted(seen)[:_NAMED])
    return Guard(
        name, None, False, f"{len(seen)} of {len(keys)} texts are in the training corpus ({some}). Leave them out."
    )


def few_pairs(latency: Mapping[str, Sequence[Mapping[str, Any]]], baselines: Sequence[str]) -> Guard:
    """A speedup over fewer than 30 pairs of rounds."""
    few = {
        f"batch {row['batch']}: {row['rounds']}"
        for name, rows in latency.items()
        for row in rows
        if row["rounds"] < LEAST_PAIRS and name not in baselines
    }
    if not few:
        return Guard("few pairs", None, True, f"Every speedup is over at least {LEAST_PAIRS} pairs.")
    return Guard(
        "few pairs",
        None,
        False,
        f"Speedups over fewer than {LEAST_PAIRS} pairs ({', '.join(sorted(few))}). Set bench.rounds to at least "
        f"{LEAST_PAIRS}, raise bench.max_seconds, or ask for fewer batch sizes.",
    )


def debug_build(signs: Sequence[str]) -> Guard:
    """Code that is slower than what people run; `signs` are those of `machine.debug_signs`."""
    if not signs:
        return Guard("debug build", None, True, "Python, PyTorch and ONNX Runtime are release builds.")
    return Guard("debug build", None, False, f"{'; '.join(signs)}. Install release builds and unset these.")


def cpu_throttling(
    start: Throttling, end: Throttling, references: Sequence[float], cpus: int, governors: Sequence[str] = ()
) -> Guard:
    """A CPU that ran slower for a while: by heat, by a quota, for its neighbours' sake, or for no known reason.

    Args:
        start, end: counters before and after.
        references: seconds of `machine.reference_seconds`, before, between and after.
        cpus: how many there are.
        governors: of the CPUs.
    """
    seconds = max(end.clock - start.clock, 1e-9)
    found = []
    if (events := _rise(start.thermal_events, end.thermal_events)) > 0:
        found.append(f"it was too hot {events:.0f} times: cool it, or measure fewer things at a time")
    if (stolen := _rise(start.stolen_seconds, end.stolen_seconds) / (seconds * cpus)) > TOLERATED_STEAL:
        found.append(f"neighbours of this virtual machine took {stolen:.0%} of it: take one with CPUs of its own")
    if (stopped := _rise(start.quota_seconds, end.quota_seconds) / seconds) > TOLERATED_QUOTA:
        found.append(f"its quota stopped it for {stopped:.0%} of the time: raise it, or lower bench.threads")
    # Three quarters of the readings: one that something came between is no throttling.
    drift = float(np.percentile(references, 75)) / min(references) - 1
    if not drift <= TOLERATED_DRIFT:
        slow = f" under the governor {', '.join(governors)}" if "powersave" in governors else ""
        found.append(
            f"a fixed calculation took {drift:.0%} longer than at its fastest{slow}: stop what else runs here, and "
            "before measuring `sudo cpupower frequency-set -g performance`"
        )
    if not found:
        return Guard("CPU throttling", None, True, f"A fixed calculation varied by {drift:.0%}.")
    return Guard("CPU throttling", None, False, f"The CPU did not run evenly: {'; '.join(found)}.")


def gpu_throttling(reasons: Sequence[str]) -> Guard:
    """A GPU that was held back; `reasons` are those of `gpu.held_back_by`."""
    if not reasons:
        return Guard("GPU throttling", None, True, "Nothing held the GPU back.")
    return Guard(
        "GPU throttling", None, False, f"The GPU was held back by {', '.join(reasons)}. Cool it or lower load."
    )


def other_processes(others: float, threads: int, is_crowded: bool) -> Guard:
    """Other processes on the cores that were measured on."""
    detail = f"Other processes used {others:.1f} cores while {threads} threads were measured"
    remedy = ". Stop them and measure again, or set bench.threads to what is free." if is_crowded else "."
    return Guard("other processes", None, not is_crowded, detail + remedy)


def is_trusted(guards: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all guards, as in the JSON, passed; without any nothing is to be trusted."""
    return bool(guards) and all(guard["passed"] is True for guard in guards)


def as_rows(guards: Iterable[Guard]) -> list[dict[str, Any]]:
    """Guards as they stand in the JSON."""
    return [asdict(guard) for guard in guards]


def failures(guards: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every guard that failed, which names the thing and the remedy."""
    return [
        f"{guard['guard']}{' of ' + guard['encoder'] if guard['encoder'] else ''}: {guard['detail']}"
        for guard in guards
        if guard["passed"] is not True
    ]


def require_trusted(guards: Sequence[Mapping[str, Any]], see: str) -> None:
    """Judge guards as they stand in the JSON.

    Raises:
        GateFailed: one of them failed, or there is none.
    """
    if not is_trusted(guards):
        names = dict.fromkeys(guard["guard"] for guard in guards if guard["passed"] is not True)
        raise GateFailed(
            f"These figures are not to be trusted: {', '.join(names) or 'no guard was examined'}. They stand in {see} "
            "all the same."
        )
    logger.info("All %d guards passed", len(guards))


def _invariance(guard: str, name: str, least: float, where: str) -> Guard:
    limit = GatesConfig().invariance_min
    passed = least >= limit  # never of NaN
    remedy = "" if passed else f", needs {limit:.6g}. Mend the graph; a text's vector must depend on it alone"
    return Guard(guard, name, passed, f"Least cosine of a vector with itself, {where}: {least:.6g}{remedy}.")


def _rise(start: float | None, end: float | None) -> float:
    return 0.0 if start is None or end is None else end - start
