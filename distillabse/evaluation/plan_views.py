"""A plan for people: the table of the terminal, the figure, and the chosen student block."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distillabse.console import figures_table
from distillabse.evaluation.plan_space import merits, pareto_set
from distillabse.evaluation.plots.drawing import PALETTE, plain_log_ticks, style, subplot
from distillabse.evaluation.templates import megabytes, milliseconds, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

TIMES = "\N{MULTIPLICATION SIGN}"
_COLOURS = [PALETTE[name] for name in ("blue", "amber", "teal", "violet", "rose")]
_MARKERS = "os^Dv"
_STAND_IN = "The teacher's weights are a random stand-in: only size and speed mean anything."


def shape_title(shape: Mapping[str, int], *, every_width: bool = False) -> str:
    """A shape in short, as in 4x256/128: layers, hidden size, and the embedding size where it is narrower."""
    title = f"{shape['layers']}{TIMES}{shape['hidden_size']}"
    if shape["embedding_size"] != shape["hidden_size"]:
        title += f"/{shape['embedding_size']}"
    return f"{title} ({shape['intermediate_size']} inner, {shape['attention_heads']} heads)" if every_width else title


def plan_table(result: Mapping[str, Any]) -> Table:
    """What was measured, from the largest encoder to the smallest, at most 80 columns wide."""
    batch, others = _batches(result)
    table = figures_table(
        _verdict(result),
        _caption(result, batch),
        ["", "shape"],
        [
            *("inner", "heads", "size\nMB", "million\nparams", "in the\nencoder"),
            *(f"ms at\n{batch}", f"vs at\n{batch}", "least\n(95 %)"),
            *(f"vs at\n{other}" for other in others),
        ],
        narrow=True,
    )
    teacher = result["teacher"]
    latency = milliseconds(teacher["latency"][batch]["p50_ms"])
    table.add_row("", "teacher", "", "", *_sizes(teacher), latency, style="dim")
    for index in _largest_first(result["candidates"]):
        row = result["candidates"][index]
        shape, speedup = row["shape"], row["speedup"]
        table.add_row(
            "chosen" if index == result["chosen"] else "Pareto" if row["pareto"] else "",
            shape_title(shape),
            *(str(shape[key]) for key in ("intermediate_size", "attention_heads")),
            *_sizes(row),
            milliseconds(row["latency"][batch]["p50_ms"]),
            *(ratio(speedup[batch]["value"]), ratio(speedup[batch]["ci95"][0], 2)),
            *(ratio(speedup[other]["value"]) for other in others),
            style="bold green" if index == result["chosen"] else None if row["pareto"] else "dim",
        )
    return table


def student_yaml(result: Mapping[str, Any]) -> str:
    """The chosen student block, ready to paste into a configuration, with what was measured in its first lines."""
    import yaml

    chosen, target = result["candidates"][result["chosen"]], result["target"]
    lines = [
        f"The largest of {len(result['candidates'])} shapes that is at least {target['speedup']:g} times as fast as "
        f"the teacher at batch {target['batch']}.",
        f"{_setting(result)}, {result['environment']['cpu']['model']}; the teacher in ONNX Runtime fp32:",
        *(
            f"  batch {batch}: {times['p50_ms']:.2f} ms, {chosen['speedup'][batch]['value']:.1f} times as fast "
            "(95 % interval {:.1f} to {:.1f})".format(*chosen["speedup"][batch]["ci95"])
            for batch, times in chosen["latency"].items()
        ),
        f"  {megabytes(chosen['size_bytes'])}, {chosen['parameters'] / 1e6:.1f} million parameters, "
        f"{chosen['encoder_parameters'] / 1e6:.1f} million of them outside the embeddings",
    ]
    if result["random_weights"]:
        lines.append(_STAND_IN)
    comment = "".join(f"# {line}\n" for line in lines)
    return comment + yaml.safe_dump({"student": chosen["student"]}, sort_keys=False)


def plan_figure(result: Mapping[str, Any]) -> str:
    """The same as an SVG file: latency at the target's batch size against parameters of the encoder."""
    with style():
        buffer = io.StringIO()
        draw_plan(result).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def draw_plan(result: Mapping[str, Any]) -> Figure:
    """The figure itself. A latency is the teacher's divided by the speedup, so that all of them can be compared."""
    batch, target = result["target"]["batch"], result["target"]["speedup"]
    slowest = result["teacher"]["latency"][str(batch)]["p50_ms"]
    rows = result["candidates"]
    points = [(row["encoder_parameters"] / 1e6, slowest / merits(row, batch)[0]) for row in rows]

    figure, axes = subplot(9.0, 5.4, grid="both")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.1)
    for number, layers in enumerate(sorted({row["shape"]["layers"] for row in rows})):
        style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        for row, (x, y) in zip(rows, points, strict=True):
            if row["shape"]["layers"] == layers:
                low, high = row["speedup"][str(batch)]["ci95"]
                axes.vlines(x, slowest / high, slowest / low, color=style["color"], linewidth=1.0)
                axes.plot(x, y, **style, markersize=6, linestyle="", fillstyle="full" if row["pareto"] else "none")
        axes.plot([], [], **style, linestyle="", label=f"{layers} layer{'s' if layers > 1 else ''}")
    front = pareto_set([merits(row, batch)[:2] for row in rows])
    line = sorted(point for point, is_best in zip(points, front, strict=True) if is_best)
    axes.plot(*zip(*line, strict=True), color=PALETTE["muted"], linewidth=0.8, zorder=1)
    if not all(row["pareto"] for row in rows):
        axes.plot([], [], "o", color=PALETTE["muted"], fillstyle="none", label="another is as good in all")
    size = result["teacher"]["encoder_parameters"] / 1e6
    axes.plot(size, slowest, "*", color=PALETTE["slate"], markersize=10, label="teacher")
    goal = f"{target:g}x the teacher's speed"
    axes.axhline(slowest / target, color=PALETTE["rose"], linewidth=1.0, linestyle="--", label=goal)
    if result["chosen"] is not None:
        axes.plot(
            *points[result["chosen"]], "o", markersize=15, fillstyle="none", color=PALETTE["rose"], label="chosen"
        )
    _label(axes, rows, points)
    for axis in (axes.xaxis, axes.yaxis):
        plain_log_ticks(axis)
    axes.set_xlabel("million parameters in the encoder, without its embeddings")
    axes.set_ylabel(f"median latency at batch {batch}, ms (lines: 95 % interval)")
    axes.set_title(_verdict(result), loc="left", fontsize=9.5)
    axes.legend(loc="upper left")
    return figure


def _label(axes: Axes, rows: Sequence[Mapping[str, Any]], points: Sequence[tuple[float, float]]) -> None:
    """Name the points of the Pareto set."""
    names = [shape_title(row["shape"]) for row in rows]
    if len(set(names)) < len(names):
        names = [shape_title(row["shape"], every_width=True) for row in rows]
    best = sorted((point, name) for row, name, point in zip(rows, names, points, strict=True) if row["pareto"])
    # In turn below and above the line, which rises to the right: neighbours keep out of each other's way.
    sides = itertools.cycle([((7, -10), "left"), ((-7, 4), "right")])
    for (point, name), (offset, side) in zip(best, sides, strict=False):
        axes.annotate(name, point, offset, textcoords="offset points", horizontalalignment=side, fontsize=8)


def _verdict(result: Mapping[str, Any]) -> str:
    speedup, batch = result["target"]["speedup"], result["target"]["batch"]
    goal = f"{speedup:g}x the teacher's speed in ONNX Runtime fp32 at batch {batch}"
    if result["chosen"] is None:
        return f"None of {len(result['candidates'])} shapes reaches {goal}"
    return f"{shape_title(result['candidates'][result['chosen']]['shape'])} is the largest that reaches {goal}"


def _caption(result: Mapping[str, Any], batch: str) -> str:
    lines = [
        f"{_setting(result)}, median ms; vs: times as fast as the teacher. "
        f"Pareto: no other is as fast at batch {batch}, as large in its encoder and as deep."
    ]
    if result["left_out"]:
        lines.append(f"{len(result['left_out'])} shapes left out, the first because: {result['left_out'][0]['reason']}")
    if result["random_weights"]:
        lines.append(_STAND_IN)
    return "\n".join(lines)


def _setting(result: Mapping[str, Any]) -> str:
    """What was measured, and on how many threads."""
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return f"{'INT8' if result['int8'] else 'fp32'}, random weights, {threads}"


def _batches(result: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The target's batch size, and the others that were measured, as keys of plan.json."""
    batch = str(result["target"]["batch"])
    return batch, [other for other in result["teacher"]["latency"] if other != batch]


def _largest_first(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted(range(len(rows)), key=lambda index: -rows[index]["encoder_parameters"])


def _sizes(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        megabytes(row["size_bytes"]).removesuffix(" MB"),
        f"{row['parameters'] / 1e6:,.1f}",
        f"{row['encoder_parameters'] / 1e6:,.1f}",
    )
