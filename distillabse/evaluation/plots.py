"""The report's figures as inline SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from distillabse.evaluation.templates import cosine, megabytes, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Figures are drawn in these colours and leave with var(--name) instead, so that one SVG suits a light and a dark page.
PALETTE = {
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
_ENGINES: dict[str, dict[str, Any]] = {
    "teacher-torch": {"color": PALETTE["slate"], "linestyle": "--"},
    "teacher-onnx": {"color": PALETTE["slate"]},
    "torch": {"color": PALETTE["amber"]},
    "onnx-fp32": {"color": PALETTE["teal"]},
    "onnx-int8": {"color": PALETTE["blue"]},
}
_HISTOGRAM = {
    "shuffled": ("shuffled pairs", PALETTE["slate"]),
    "constant": ("constant vector", PALETTE["amber"]),
    "student": ("student", PALETTE["blue"]),
}
_SIZES = {
    "teacher": ("Teacher", PALETTE["slate"]),
    "fp32": ("Student, fp32", PALETTE["teal"]),
    "int8": ("Student, INT8", PALETTE["blue"]),
}
_TERM_COLOURS = [PALETTE[name] for name in ("blue", "amber", "teal", "violet", "rose", "slate")]
# What a trainer logs beside the terms of the loss.
_ROUTER = "router/"
_NOT_A_TERM = re.compile(rf"step|epoch|loss|learning_rate|grad_norm|total_flos|train_.*|eval_.*|{_ROUTER}.*")


def figures(report: Mapping[str, Any]) -> dict[str, str]:
    """Every figure that the report has data for: SVG elements by name, to be put into one page as they are."""
    artefact = report["headline"]["artefact"]
    drawn = {"latency": latency(report["latency"]), "size": sizes(report["size_bytes"])}
    if any(row.get("speedup_vs_teacher_onnx") for rows in report["latency"].values() for row in rows):
        drawn["speedup"] = speedups(report["latency"])
    if counts := report["histograms"].get(artefact, {}).get("test"):
        drawn["histogram"] = histogram(counts)
    slices = report["slices"].get(artefact, {}).get("test", {})
    for kind in ("language", "length"):
        if slices.get(kind):
            drawn[f"slices-{kind}"] = slice_bars(kind, slices[kind])
    log = report["training"]["log"] if report["training"] else []
    if any("loss" in entry for entry in log):
        drawn["loss"] = losses(log)
    if any(name.startswith(_ROUTER) for entry in log for name in entry):
        drawn["routers"] = routers(log)
    if any("eval_cosine" in entry or "eval_skill" in entry for entry in log):
        drawn["held-out"] = held_out_fidelity(log)
    return drawn


def histogram(counts: Mapping[str, Sequence[float]]) -> str:
    """Distribution of the cosine to the teacher and of both baselines; `counts` as in verify.json."""
    edges = counts["edges"]
    filled = [index for name in _HISTOGRAM for index, count in enumerate(counts[name]) if count]
    with style():
        figure, axes = subplot(9.6, 3.2)
        for name, (label, colour) in _HISTOGRAM.items():
            total = sum(counts[name]) or 1
            shares = [100 * count / total for count in counts[name]]
            axes.stairs(shares, edges, fill=True, alpha=0.15, color=colour)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=label)
        axes.set_xlim(edges[min(filled, default=0)], edges[max(filled, default=len(edges) - 2) + 1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("cosine to the teacher's vector")
        axes.set_ylabel("% of sentences")
        axes.legend(loc="upper center")
        return inline_svg(figure, "histogram", "Distribution of the cosine to the teacher and of both baselines")


def slice_bars(kind: str, slices: Mapping[str, Mapping[str, float]]) -> str:
    """Mean cosine (bars) and skill (marks) per slice: lengths from short to long, all else from best to worst."""
    names = sorted(slices, key=_first_number if kind == "length" else lambda name: -slices[name]["cosine_mean"])
    rows = range(len(names))
    with style():
        figure, axes = subplot(4.7, 0.75 + 0.25 * len(names), grid=None)
        axes.barh(rows, [slices[name]["cosine_mean"] for name in names], height=0.6, color=PALETTE["blue"], alpha=0.3)
        axes.plot([slices[name]["skill"] for name in names], rows, "D", color=PALETTE["blue"])
        for key, heading, offset in (("cosine_mean", "cosine", 44), ("skill", "skill", 88)):
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center_baseline"}
            axes.annotate(heading, (1, -1), (offset, 0), color=PALETTE["muted"], annotation_clip=False, **place)
            for row, name in enumerate(names):
                axes.annotate(cosine(slices[name][key]), (1, row), (offset, 0), **place)
        axes.set_yticks(rows, [f"{name}  ({slices[name]['n']:,})" for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(min(0.0, *(slices[name][key] for name in names for key in ("cosine_mean", "skill"))), 1.0)
        return inline_svg(figure, f"slices-{kind}", f"Mean cosine and skill by {kind}")


def latency(engines: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Median latency by batch size, both axes logarithmic."""
    with style():
        figure, axes = subplot(4.7, 3.4, grid="both")
        for engine, rows in engines.items():
            points = [row["batch"] for row in rows], [row["p50_ms"] for row in rows]
            axes.plot(*points, marker="o", label=title(engine), **_ENGINES.get(engine, {}))
        axes.set_yscale("log")
        _plain_log_ticks(axes)
        _batch_axis(axes, engines)
        axes.set_ylabel("median latency, ms")
        axes.legend(loc="upper left")
        return inline_svg(figure, "latency", "Median latency by batch size")


def speedups(engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many times faster than the teacher in ONNX Runtime, with 95 % intervals where they are known."""
    with style():
        figure, axes = subplot(4.7, 3.4)
        axes.axhline(1.0, label=title("teacher-onnx"), **_ENGINES["teacher-onnx"])
        for engine, rows in engines.items():
            known = [row for row in rows if row.get("speedup_vs_teacher_onnx")]
            if engine in ("teacher-torch", "teacher-onnx") or not known:
                continue
            batches = [row["batch"] for row in known]
            values = [row["speedup_vs_teacher_onnx"] for row in known]
            axes.plot(batches, values, marker="o", label=title(engine), **_ENGINES.get(engine, {}))
            for row in known:
                if interval := row.get("speedup_vs_teacher_onnx_ci95"):
                    axes.vlines(row["batch"], *interval, color=_ENGINES.get(engine, {}).get("color"))
        _batch_axis(axes, engines)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("times the teacher's speed in ONNX Runtime")
        axes.legend(loc="best")
        return inline_svg(figure, "speedup", "Speed-up over the teacher in ONNX Runtime by batch size")


def sizes(size_bytes: Mapping[str, int | None]) -> str:
    """Bytes on disk."""
    rows = [(*_SIZES[key], size) for key in _SIZES if (size := size_bytes.get(key)) is not None]
    largest = max((size for _, _, size in rows), default=1)
    with style():
        figure, axes = subplot(9.6, 0.3 + 0.4 * len(rows), grid=None)
        for row, (label, colour, size) in enumerate(rows):
            axes.barh(row, size, height=0.58, color=colour)
            axes.annotate(f"{label}", (0, row), (-8, 0), textcoords="offset points", va="center", ha="right")
            axes.annotate(megabytes(size), (size, row), (8, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, largest)
        axes.invert_yaxis()
        axes.set_axis_off()
        return inline_svg(figure, "size", "Size on disk")


def losses(log: Sequence[Mapping[str, float]]) -> str:
    """The loss and each of its terms by step, logarithmic where all values allow it."""
    training = [entry for entry in log if "loss" in entry]
    terms = sorted({key for entry in training for key in entry if not _NOT_A_TERM.fullmatch(key)})
    with style():
        figure, axes = subplot(4.7, 3.2)
        if len(terms) > 1:
            _curve(axes, training, "loss", "total", color=PALETTE["text"], linewidth=1.8)
        for index, term in enumerate(terms or ["loss"]):
            _curve(axes, training, term, term, color=_TERM_COLOURS[index % len(_TERM_COLOURS)])
        if all(entry.get(key, 1.0) > 0 for entry in training for key in ("loss", *terms)):
            axes.set_yscale("log")
            _plain_log_ticks(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(loc="best")
        return inline_svg(figure, "loss", "Loss by training step")


def held_out_fidelity(log: Sequence[Mapping[str, float]]) -> str:
    """Cosine and skill on the dev split by step."""
    with style():
        figure, axes = subplot(4.7, 3.2)
        _curve(axes, log, "eval_cosine", "mean cosine", color=PALETTE["blue"], marker="o")
        _curve(axes, log, "eval_skill", "skill", color=PALETTE["teal"], marker="D")
        axes.set_xlabel("step")
        axes.set_ylabel("dev split")
        axes.legend(loc="best")
        return inline_svg(figure, "held-out", "Held-out fidelity by training step")


def routers(log: Sequence[Mapping[str, float]]) -> str:
    """By step and sparse layer: between which shares of the tokens the experts lie, and what found its expert full."""
    entries = [entry for entry in log if any(name.startswith(_ROUTER) for name in entry)]
    layers = sorted({name.split("/")[1] for name in entries[0] if name.startswith(_ROUTER)})
    with style():
        figure, axes = subplot(4.7, 3.2)
        steps = [entry["step"] for entry in entries]
        for colour, layer in zip(itertools.cycle(_TERM_COLOURS), layers, strict=False):
            loads = [
                [entry[key] for key in entry if key.startswith(f"{_ROUTER}{layer}/load_expert_")] for entry in entries
            ]
            label = layer.replace("_", " ")
            axes.fill_between(
                steps, [min(load) for load in loads], [max(load) for load in loads], color=colour, alpha=0.3,
                label=f"{label}: least to most used expert",
            )  # fmt: skip
            _curve(axes, entries, f"{_ROUTER}{layer}/dropped", f"{label}: dropped", color=colour, linestyle="--")
        axes.axhline(1 / len(loads[0]), color=PALETTE["text"], linewidth=0.8, label="even share")
        axes.set_xlabel("step")
        axes.set_ylabel("share of the tokens")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
        return inline_svg(figure, "routers", "Load of the experts by training step")


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


def _curve(axes: Axes, log: Sequence[Mapping[str, float]], key: str, label: str, **style: Any) -> None:
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _batch_axis(axes: Axes, engines: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    batches = sorted({row["batch"] for rows in engines.values() for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:g}" for batch in batches])
    axes.set_xlabel("batch size")


def _first_number(name: str) -> int:
    """9 of "9-16 tokens"."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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
