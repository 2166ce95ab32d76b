"""Figures of fidelity: the distribution of the cosine, and its mean by language and length."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from distillabse.evaluation.plots.drawing import NARROW, PALETTE, both_widths, inline_svg, style, subplot
from distillabse.evaluation.templates import cosine

_HISTOGRAM = {
    "shuffled": ("shuffled pairs", PALETTE["slate"]),
    "constant": ("constant vector", PALETTE["amber"]),
    "student": ("student", PALETTE["blue"]),
}
# More slices than this are drawn as two figures, side by side on a wide page.
_ONE_COLUMN = 12

Slices = Mapping[str, Mapping[str, float]]


def histogram(counts: Mapping[str, Sequence[float]], name: str = "histogram") -> str:
    """Distribution of the cosine to the teacher and of both baselines, in both widths; `counts` as in verify.json."""
    return both_widths(partial(_histogram, counts, histogram_limits([counts]), 3.0), name)


def histogram_panel(counts: Mapping[str, Sequence[float]], limits: tuple[float, float], name: str) -> str:
    """The same of any encoder beside any baseline, at half the page's width, between limits that panels share."""
    return _histogram(counts, limits, 2.5, NARROW, name, student="encoder", teacher="baseline")


def histogram_limits(several: Sequence[Mapping[str, Sequence[float]]]) -> tuple[float, float]:
    """Between which cosines any of the distributions lies."""
    low, high = [], []
    for counts in several:
        edges = counts["edges"]
        filled = [index for key in _HISTOGRAM for index, count in enumerate(counts[key]) if count]
        low.append(edges[min(filled, default=0)])
        high.append(edges[max(filled, default=len(edges) - 2) + 1])
    return min(low), max(high)


def language_figures(slices: Slices, beside: int = 0) -> dict[str, str]:
    """Bars by language, best first: one figure, or two for many languages.

    Args:
        slices: figures by language, as in verify.json.
        beside: rows of what stands below the second figure; the first is made as much longer.

    Returns:
        SVG by name: "slices-language", and "slices-language-more" for what the first leaves over.
    """
    names = sorted(slices, key=lambda name: -slices[name]["cosine_mean"])
    limits = _limits(slices)
    if len(names) <= _ONE_COLUMN:
        return {"slices-language": _bars(slices, names, limits, "slices-language", "Mean cosine and skill by language")}
    first = min(len(names), math.ceil((len(names) + beside) / 2))
    halves = {"slices-language": names[:first], "slices-language-more": names[first:]}
    label = "Mean cosine and skill by language, part {}"
    return {
        key: _bars(slices, half, limits, key, label.format(part))
        for part, (key, half) in enumerate(halves.items(), 1)
        if half
    }


def length_figure(slices: Slices) -> str:
    """Bars by length, from short to long."""
    names = sorted(slices, key=_first_number)
    return _bars(slices, names, _limits(slices), "slices-length", "Mean cosine and skill by length")


def _histogram(
    counts: Mapping[str, Sequence[float]],
    limits: tuple[float, float],
    height: float,
    width: float,
    name: str,
    *,
    student: str = "student",
    teacher: str = "teacher",
) -> str:
    edges = counts["edges"]
    with style():
        figure, axes = subplot(width, height)
        for key, (label, colour) in _HISTOGRAM.items():
            total = sum(counts[key]) or 1
            shares = [100 * count / total for count in counts[key]]
            axes.stairs(shares, edges, fill=True, alpha=0.15, color=colour)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=student if key == "student" else label)
        axes.set_xlim(*limits)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"cosine to the {teacher}'s vector")
        axes.set_ylabel("% of sentences")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.2)
        return inline_svg(
            figure,
            name,
            f"Distribution of the {student}'s cosine to the {teacher}, of a constant vector and of shuffled pairs",
        )


def _bars(slices: Slices, names: Sequence[str], limits: tuple[float, float], figure_name: str, label: str) -> str:
    """Mean cosine as bars, skill as marks, and both as numbers."""
    rows = range(len(names))
    with style():
        figure, axes = subplot(NARROW, 0.75 + 0.25 * len(names), grid=None)
        axes.barh(rows, [slices[name]["cosine_mean"] for name in names], height=0.6, color=PALETTE["blue"], alpha=0.3)
        axes.plot([slices[name]["skill"] for name in names], rows, "D", color=PALETTE["blue"])
        for key, heading, offset in (("cosine_mean", "cosine", 44), ("skill", "skill", 88)):
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center_baseline"}
            axes.annotate(heading, (limits[1], -1), (offset, 0), color=PALETTE["muted"], annotation_clip=False, **place)
            for row, name in enumerate(names):
                axes.annotate(cosine(slices[name][key]), (limits[1], row), (offset, 0), **place)
        axes.set_yticks(rows, [f"{name}  ({slices[name]['n']:,})" for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(*limits)
        return inline_svg(figure, figure_name, label)


def _limits(slices: Slices) -> tuple[float, float]:
    return min(0.0, *(row[key] for row in slices.values() for key in ("cosine_mean", "skill"))), 1.0


def _first_number(name: str) -> int:
    """9 of "9-16 tokens"."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0
