"""What every figure shares: inline SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Figures are drawn in these colours and leave with var(--name) instead, so that one SVG suits a light and a dark page.
PALETTE = {
    "page": "#fffffe",
    "text": "#111827",
    "muted": "#6b7281",
    "grid": "#e5e7ea",
    "blue": "#2563ec",
    "teal": "#0d9489",
    "amber": "#d97707",
    "rose": "#e11d49",
    "violet": "#7c3aee",
    "slate": "#64748c",
}
# Inches. A wide figure spans the page; what is wide is also drawn narrow, for telephones.
WIDE, NARROW = 9.6, 4.7
_LINE_POINTS = 12.0
# Characters of a name where there is little room.
_LONGEST = 22


class EndLabel(NamedTuple):
    """The name of a curve beside its last value."""

    text: str
    value: float
    colour: str


def both_widths(draw: Callable[[float, str], str], name: str) -> str:
    """A figure drawn twice, for wide and for narrow pages; the page's style shows one of them.

    Args:
        draw: gives the SVG for a width in inches and a name.
        name: of the figure.
    """
    wide, narrow = draw(WIDE, name), draw(NARROW, f"{name}-narrow")
    return f'<div class="on-wide">{wide}</div><div class="on-narrow">{narrow}</div>'


def style() -> AbstractContextManager[None]:
    """How every figure looks."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "distillabse",
            "text.parse_math": False,
            "font.size": 9.5,
            "font.sans-serif": ["DejaVu Sans"],
            "text.color": PALETTE["text"],
            "axes.labelcolor": PALETTE["muted"],
            "axes.edgecolor": PALETTE["grid"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.axisbelow": True,
            "grid.color": PALETTE["grid"],
            "grid.linewidth": 0.8,
            "xtick.color": PALETTE["grid"],
            "xtick.labelcolor": PALETTE["muted"],
            "xtick.minor.size": 0,
            "ytick.labelcolor": PALETTE["muted"],
            "ytick.major.size": 0,
            "ytick.minor.size": 0,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 4.5,
        }
    )


def subplot(width: float, height: float, grid: Literal["x", "y", "both"] | None = "y") -> tuple[Figure, Axes]:
    """A figure of `width` by `height` inches with one pair of axes. Plain `Figure`: pyplot would keep global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    if grid:
        axes.grid(axis=grid)
    return figure, axes


def end_labels(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Name curves at the right edge, at the height of their last value and never one over another.

    The axes' limits must be final. Heights are moved as little as possible: with a line's distance taken off for each
    label below, what is left is the isotonic regression of the wanted heights.
    """
    from scipy.optimize import isotonic_regression

    if not labels:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the layout, and so the height of the axes
    points = 72.0 / figure.dpi
    ordered = sorted(labels, key=lambda label: label.value)
    wanted = [float(axes.transData.transform((1.0, label.value))[1]) * points for label in ordered]
    shifted = [height - number * _LINE_POINTS for number, height in enumerate(wanted)]
    placed = [float(height) + number * _LINE_POINTS for number, height in enumerate(isotonic_regression(shifted).x)]
    for label, before, after in zip(ordered, wanted, placed, strict=True):
        axes.annotate(
            label.text, (1.0, label.value), (7, after - before), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", va="center", color=label.colour, annotation_clip=False,
        )  # fmt: skip


def short_names(names: Sequence[str]) -> list[str]:
    """Names without their middle where they are long, unless two would then be the same."""
    half = _LONGEST // 2
    short = [name if len(name) <= _LONGEST else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}" for name in names]
    return short if len(set(short)) == len(short) else list(names)


def plain_log_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20 ... as plain numbers, or 1, 10, 100 ... where more than three decades are shown."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element: ids begin with `name`, colours are the page's, no prolog and no metadata."""
    from markupsafe import escape

    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for colour, value in PALETTE.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg
