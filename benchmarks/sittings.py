"""Speed over several sittings: what one run of a benchmark says must be what the next run says, too.

Within one sitting the engines alternate, and the spread over its rounds is that of the moment. It knows nothing of what
stays the same while processes live and differs between runs: where memory lies, which core a thread got, how warm the
machine was. So a sitting is repeated with new processes, and the stated range is that in which another run's ratio lies
with 95 % probability, from the spread between sittings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SITTINGS = 6


def sit(
    engines: Sequence[Any], texts: list[str], config: Any, seed: int, baselines: Sequence[str], sittings: int = SITTINGS
) -> dict[str, Any]:
    """Measure all engines in several sittings, each with processes of its own.

    Args:
        engines, texts, config, seed, baselines: as for `evaluation.latency.measure`.
        sittings: how often, at least two.

    Returns:
        What `measure` returns for the first sitting, with latency rows {"batch", "p50_ms" (median over sittings),
        "sentences_per_second", and for every baseline "speedup_vs_X" and "speedup_vs_X_range95"}, and "sittings".
    """
    from distillabse.evaluation.latency import measure

    found = []
    for number in range(sittings):
        print(f"sitting {number + 1} of {sittings}", flush=True)
        found.append(measure(list(engines), texts, config, seed + number, baselines))
    keys = [f"speedup_vs_{baseline.replace('-', '_')}" for baseline in baselines]
    latency = {
        name: [together([one["latency"][name][row] for one in found], keys) for row in range(len(rows))]
        for name, rows in found[0]["latency"].items()
    }
    others = max(one["cores_used_by_others"] for one in found)
    return {**found[0], "latency": latency, "sittings": sittings, "cores_used_by_others": others}


def together(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """One row of several sittings: medians of times, and of every ratio its mean and range."""
    p50 = float(np.median([row["p50_ms"] for row in rows]))
    found = {"batch": rows[0]["batch"], "p50_ms": p50, "sentences_per_second": 1000 * rows[0]["batch"] / p50}
    for key in keys:
        found[key], found[f"{key}_range95"] = ratio_of_sittings([row[key] for row in rows])
    return found


def ratio_of_sittings(ratios: Sequence[float]) -> tuple[float, list[float]]:
    """Geometric mean, and the 95 % range for that of another run of as many sittings.

    With n sittings and logarithms of standard deviation s, the difference of two runs' means has the standard deviation
    s * sqrt(2 / n), and s has n - 1 degrees of freedom: mean +- t * s * sqrt(2 / n).
    """
    from scipy.stats import t

    logarithms = np.log(ratios)
    n, mean = len(logarithms), float(np.mean(logarithms))
    half = float(t.ppf(0.975, n - 1) * np.std(logarithms, ddof=1) * math.sqrt(2 / n))
    return math.exp(mean), [math.exp(mean - half), math.exp(mean + half)]
