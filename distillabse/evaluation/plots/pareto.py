"""Fidelity against latency, with the size on disk as the area of a bubble and the Pareto frontier."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from distillabse.evaluation.plan_space import pareto_set
from distillabse.evaluation.plots.drawing import (
    PALETTE,
    WIDE,
    both_widths,
    inline_svg,
    plain_log_ticks,
    short_names,
    style,
    subplot,
)  # fmt: skip
from distillabse.evaluation.templates import megabytes, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

# Points of diameter of the largest bubble, by width of the figure.
_LARGEST = {True: 46.0, False: 34.0}
_DIRECTIONS = [(math.cos(math.pi * turn / 8), math.sin(math.pi * turn / 8)) for turn in range(16)]
_DISTANCES = (4.0, 14.0, 26.0, 40.0)
# A label that is further from its bubble is tied to it by a line.
_TIED = 12.0
_SMALLEST_RANGE = 0.05


@dataclass(frozen=True)
class Point:
    """An encoder in the plot.

    Attributes:
        label: its name for people.
        latency_ms: median milliseconds of a batch.
        fidelity: to the teacher; 1 for the teacher itself.
        size_bytes: on disk, or None where it is not known.
        colour: of PALETTE.
    """

    label: str
    latency_ms: float
    fidelity: float
    size_bytes: int | None
    colour: str


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points to which no other is at least as fast and at least as close, and better in one; fastest first."""
    best = pareto_set([(-point.latency_ms, point.fidelity) for point in points])
    chosen = (point for point, is_best in zip(points, best, strict=True) if is_best)
    return sorted(chosen, key=lambda point: point.latency_ms)


def pareto(points: Sequence[Point], measure: str, batch: int, name: str = "pareto") -> str:
    """The plot in both widths.

    Args:
        points: at least one.
        measure: what the fidelity is, such as "skill".
        batch: sentences of a batch that the latency is of.
        name: of the figure.
    """
    return both_widths(partial(_pareto, points, measure, batch), name)


def _pareto(points: Sequence[Point], measure: str, batch: int, width: float, name: str) -> str:
    with style():
        figure, axes = subplot(width, 3.7 if width == WIDE else 4.3, grid="both")
        axes.set_xscale("log")
        _limits(axes, points)
        plain_log_ticks(axes.xaxis)
        best = frontier(points)
        steps = _staircase(best, axes.get_xlim()[1], axes.get_ylim()[0])
        axes.plot(
            *steps, color=PALETTE["muted"], linewidth=1.2, linestyle="--", zorder=1.5,
        )  # fmt: skip
        largest = max((point.size_bytes or 0 for point in points), default=0) or 1
        diameters = [_LARGEST[width == WIDE] * math.sqrt((point.size_bytes or 0) / largest) for point in points]
        for point, diameter in zip(points, diameters, strict=True):
            place = (point.latency_ms, point.fidelity)
            axes.plot(*place, "o", markersize=diameter, color=point.colour, alpha=0.22, markeredgewidth=0, zorder=2)
            axes.plot(
                *place, "o", markersize=diameter, fillstyle="none", color=point.colour, markeredgewidth=1, zorder=2
            )
            axes.plot(*place, "o", markersize=4.5, color=point.colour, zorder=3)
        sentences = "one sentence" if batch == 1 else f"a batch of {batch}"
        axes.set_xlabel(f"\N{LEFTWARDS ARROW} faster (median ms for {sentences}, logarithmic)")
        axes.set_ylabel(f"{measure} (closer \N{RIGHTWARDS ARROW})")
        names = [point.label for point in points]
        _Labels(axes, points, names if width == WIDE else short_names(names), diameters, steps).place()
        return inline_svg(
            figure, name, f"Fidelity ({measure}) against latency of {len(points)} encoders, bubble area by size on disk"
        )


def _limits(axes: Axes, points: Sequence[Point]) -> None:
    """Room around the points for the bubbles and the labels."""
    latencies, fidelities = [point.latency_ms for point in points], [point.fidelity for point in points]
    room = max((max(latencies) / min(latencies)) ** 0.16, 1.5)
    axes.set_xlim(min(latencies) / room, max(latencies) * room)
    reach = max(max(fidelities) - min(fidelities), _SMALLEST_RANGE)
    axes.set_ylim(min(fidelities) - 0.28 * reach, max(fidelities) + 0.25 * reach)
    low, _ = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 1.0])  # nothing is closer than 1


def _staircase(best: Sequence[Point], right: float, bottom: float) -> tuple[list[float], list[float]]:
    """Corners of the line between what some encoder reaches (right and below) and what none does."""
    x, y = [best[0].latency_ms], [bottom]
    for point, following in itertools.zip_longest(best, best[1:]):
        x += [point.latency_ms, following.latency_ms if following else right]
        y += [point.fidelity, point.fidelity]
    return x, y


class _Labels:
    """Labels beside their bubbles: each takes the free place that is nearest to its point, the frontier's first."""

    def __init__(
        self,
        axes: Axes,
        points: Sequence[Point],
        names: Sequence[str],
        diameters: Sequence[float],
        line: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        from matplotlib.transforms import Bbox

        self.axes = axes
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.draw_without_rendering()  # settles the layout, and so where the points are
        self.scale = figure.dpi / 72.0
        self.centres = [axes.transData.transform((point.latency_ms, point.fidelity)) for point in points]
        self.radii = [self.scale * max(diameter, 4.5) / 2 for diameter in diameters]
        self.points, self.names = points, names
        self.taken = [
            Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius)
            for (x, y), radius in zip(self.centres, self.radii, strict=True)
        ]
        corners = axes.transData.transform(list(zip(*line, strict=True)))
        self.line = [
            Bbox.from_extents(min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1)
            for (x0, y0), (x1, y1) in itertools.pairwise(corners)
        ]

    def place(self) -> None:
        best = frontier(self.points)
        for index in sorted(range(len(self.points)), key=lambda index: self.points[index] not in best):
            self._place(index)

    def _place(self, index: int) -> None:
        """Two lines: the name, then its figures; measured first, and put where they cover least."""
        point = self.points[index]
        size = f", {megabytes(point.size_bytes)}" if point.size_bytes else ""
        lines = self.names[index], f"{milliseconds(point.latency_ms)} ms{size}"
        extents = [self._extent(line) for line in lines]
        width, height = max(extent.width for extent in extents), sum(extent.height for extent in extents)
        boxes = list(self._boxes(index, width, height))
        box = min(boxes, key=lambda box: self._cost(index, box))
        self.taken.append(box)
        self._tie(index, box)
        centre = self.centres[index][0]
        side, edge = ("right", box.x1) if box.x1 < centre else ("left", box.x0) if box.x0 > centre else ("center", None)
        inverse = self.axes.transData.inverted()
        for line, bottom, colour in ((lines[1], box.y0, "muted"), (lines[0], box.y0 + height / 2, "text")):
            place: dict[str, Any] = {"ha": side, "va": "baseline", "color": PALETTE[colour], "zorder": 5}
            x, y = inverse.transform((box.x0 + width / 2 if edge is None else edge, bottom + 0.12 * height))
            self.axes.text(
                x, y, line,
                bbox={"facecolor": PALETTE["page"], "edgecolor": "none", "pad": 0.5, "alpha": 0.7}, **place,
            )  # fmt: skip

    def _tie(self, index: int, box: Bbox) -> None:
        """A line between a bubble and a label that had to be put further away."""
        import numpy as np

        centre = np.asarray(self.centres[index])
        end = np.clip(centre, (box.x0, box.y0), (box.x1, box.y1))
        if (length := float(np.linalg.norm(end - centre))) > self.radii[index] + self.scale * _TIED:
            start = centre + (end - centre) * self.radii[index] / length
            x, y = zip(*self.axes.transData.inverted().transform([start, end]), strict=True)
            self.axes.plot(x, y, color=self.points[index].colour, linewidth=0.8, zorder=1.8)

    def _extent(self, text: str) -> Bbox:
        drawn = self.axes.text(0.5, 0.5, text, transform=self.axes.transAxes)
        extent: Bbox = drawn.get_window_extent()
        drawn.remove()
        return extent

    def _boxes(self, index: int, width: float, height: float) -> Any:
        """Places around a bubble, near ones first."""
        from matplotlib.transforms import Bbox

        x, y = self.centres[index]
        for distance, (right, up) in itertools.product(_DISTANCES, _DIRECTIONS):
            reach = self.radii[index] + self.scale * distance
            left = x + right * reach + (right - 1) * width / 2
            bottom = y + up * reach + (up - 1) * height / 2
            yield Bbox.from_bounds(left, bottom, width, height)

    def _cost(self, index: int, box: Bbox) -> float:
        """What a label covers, in its own areas, and how far it is from its point; outside the axes it is cut off."""
        from matplotlib.transforms import Bbox

        frame = self.axes.get_window_extent()
        inside = Bbox.intersection(frame, box)
        area = box.width * box.height
        outside = 1 - (inside.width * inside.height / area if inside else 0.0)
        covered = sum(
            common.width * common.height / area for other in self.taken if (common := Bbox.intersection(box, other))
        )
        crossed = sum(Bbox.intersection(box, step) is not None for step in self.line)
        x, y = self.centres[index]
        centre_x, centre_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        away = math.hypot(max(abs(centre_x - x) - box.width / 2, 0), max(abs(centre_y - y) - box.height / 2, 0))
        return 20 * outside + 10 * covered + crossed + away / (100 * self.scale)
