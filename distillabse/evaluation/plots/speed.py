"""Figures of speed: latency and speed-up by batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillabse.evaluation.plots.drawing import (
    NARROW,
    PALETTE,
    EndLabel,
    end_labels,
    inline_svg,
    plain_log_ticks,
    short_names,
    style,
    subplot,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows of latency, one for each batch size, by name of the encoder."""

_COLOURS = ("blue", "teal", "amber", "violet", "rose")
_LINES = ("-", "-.", ":")
# Speed-ups that are further apart than this are drawn on a logarithmic axis.
_WIDE_RANGE = 8.0


@dataclass(frozen=True)
class Look:
    """How an encoder is drawn.

    Attributes:
        label: its name for people, in short.
        colour: of PALETTE.
        line: matplotlib's name of a line style.
    """

    label: str
    colour: str
    line: str = "-"


def looks_of(names: Sequence[str], baseline: str) -> dict[str, Look]:
    """The baseline grey and dashed, the others in colours of their own, then in other lines."""
    labels = dict(zip(names, short_names(names), strict=True))
    looks = {baseline: Look(labels.get(baseline, baseline), PALETTE["slate"], "--")}
    for number, name in enumerate(name for name in names if name != baseline):
        colour, line = _COLOURS[number % len(_COLOURS)], _LINES[number // len(_COLOURS) % len(_LINES)]
        looks[name] = Look(labels[name], PALETTE[colour], line)
    return looks


def latency(rows: Rows, looks: Mapping[str, Look], name: str = "latency") -> str:
    """Median latency by batch size, both axes logarithmic, with a band up to the 95th percentile."""
    with style():
        figure, axes = subplot(NARROW, 3.4, grid="both")
        labels = []
        axes.set_yscale("log")
        for encoder, measured in rows.items():
            known = sorted(measured, key=lambda row: row["batch"])
            look, batches = looks[encoder], [row["batch"] for row in known]
            medians = [row["p50_ms"] for row in known]
            slow = [row.get("p95_ms") or row["p50_ms"] for row in known]
            axes.fill_between(batches, medians, slow, color=look.colour, alpha=0.15, linewidth=0)
            axes.plot(batches, medians, marker="o", color=look.colour, linestyle=look.line)
            if known:
                labels.append(EndLabel(look.label, medians[-1], look.colour))
        plain_log_ticks(axes.yaxis)
        _batch_axis(axes, rows)
        axes.set_ylabel("median latency, ms")
        end_labels(axes, labels)
        return inline_svg(figure, name, "Median latency by batch size, with bands up to the 95th percentile")


def speedups(rows: Rows, looks: Mapping[str, Look], key: str, baseline: str, name: str = "speedup") -> str:
    """How many times faster than the baseline, with 95 % intervals where they are known.

    Args:
        rows: of the encoders that are drawn.
        looks: of them.
        key: of the factor in a row; its interval is under the same key with "_ci95".
        baseline: its name for people.
        name: of the figure.
    """
    with style():
        figure, axes = subplot(NARROW, 3.4)
        axes.axhline(1.0, color=PALETTE["slate"], linestyle="--")
        labels = [EndLabel(baseline, 1.0, PALETTE["slate"])]
        factors = [1.0, *(row[key] for measured in rows.values() for row in measured if row.get(key))]
        if max(factors) > _WIDE_RANGE * min(factors):
            axes.set_yscale("log")
        for encoder, measured in rows.items():
            known = sorted((row for row in measured if row.get(key)), key=lambda row: row["batch"])
            if not known:
                continue
            look, values = looks[encoder], [row[key] for row in known]
            axes.plot([row["batch"] for row in known], values, marker="o", color=look.colour, linestyle=look.line)
            for row in known:
                if interval := row.get(f"{key}_ci95"):
                    axes.vlines(row["batch"], *interval, color=look.colour)
            labels.append(EndLabel(look.label, values[-1], look.colour))
        _batch_axis(axes, rows)
        if axes.get_yscale() == "log":
            plain_log_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel("times the speed")
        end_labels(axes, labels)
        return inline_svg(figure, name, f"Speed-up over {baseline} by batch size, with 95 % intervals")


def _batch_axis(axes: Axes, rows: Rows) -> None:
    batches = sorted({row["batch"] for measured in rows.values() for row in measured})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:g}" for batch in batches])
    axes.set_xlabel("batch size")
