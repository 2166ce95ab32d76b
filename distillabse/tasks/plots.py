"""Scores by language as figures for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from distillabse.evaluation.plots.drawing import PALETTE, WIDE, both_widths, inline_svg, style, subplot
from distillabse.tasks.run import RANDOM, STUDENT, TEACHER
from distillabse.tasks.views import MEASURES, languages_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = [PALETTE[name] for name in ("amber", "teal", "violet", "rose")]
_KNOWN = {STUDENT: PALETTE["blue"], TEACHER: PALETTE["slate"], RANDOM: PALETTE["muted"]}


def task_figures(tasks: Mapping[str, Any]) -> dict[str, str]:
    """A figure for each measure that the report shows of a task with several languages: SVG elements by name."""
    return {
        f"task-{name}-{measure}": language_bars(name, measure, task["encoders"])
        for name, measure, task in shown(tasks)
        if len(languages_of(measure, task["encoders"])) > 1
    }


def shown(tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, measure and scores of what the report shows: the headline, and what mixes encoder and teacher."""
    for name, task in tasks.items():
        for measure in (task["headline"], "mixed_accuracy", "cross_spearman"):
            if any(measure in measures for measures in task["encoders"].values()):
                yield name, measure, task


def language_bars(name: str, measure: str, encoders: Mapping[str, Any]) -> str:
    """By language: the student, or else the first encoder, as bars with 95 % intervals, and the others as marks."""
    return both_widths(partial(_language_bars, name, measure, encoders), f"task-{name}-{measure}")


def _language_bars(name: str, measure: str, encoders: Mapping[str, Any], width: float, figure_name: str) -> str:
    languages = list(languages_of(measure, encoders))
    first = STUDENT if STUDENT in encoders else next(iter(encoders))
    colours = iter(_COLOURS * len(encoders))
    with style():
        figure, axes = subplot(width, 0.9 + 0.22 * len(languages), grid="x")
        for encoder, measures in encoders.items():
            scores = measures.get(measure, {"languages": {}})["languages"]
            colour = _KNOWN.get(encoder) or next(colours)
            rows = [row for row, language in enumerate(languages) if language in scores]
            values = [scores[languages[row]]["value"] for row in rows]
            if encoder == first:
                axes.barh(rows, values, height=0.6, color=colour, alpha=0.3, label=encoder)
                _intervals(axes, rows, [scores[languages[row]]["ci95"] for row in rows], colour)
            else:
                axes.plot(values, rows, "x" if encoder == RANDOM else "D", color=colour, label=encoder, clip_on=False)
        axes.set_yticks(range(len(languages)), languages)
        axes.set_ylim(len(languages) - 0.5, -0.5)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]), right=1.0)
        axes.set_xlabel(MEASURES[measure])
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6 if width == WIDE else 3)
        return inline_svg(figure, figure_name, f"{name}: {MEASURES[measure]} by language")


def _intervals(axes: Axes, rows: list[int], intervals: list[list[float]], colour: str) -> None:
    for row, (low, high) in zip(rows, intervals, strict=True):
        axes.plot([low, high], [row, row], color=colour, linewidth=1.2)
