"""Figures of training: the loss, fidelity on the dev split, and the load of the experts of sparse layers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from distillabse.evaluation.plots.drawing import (
    NARROW,
    PALETTE,
    WIDE,
    EndLabel,
    both_widths,
    end_labels,
    inline_svg,
    plain_log_ticks,
    style,
    subplot,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TERM_COLOURS = [PALETTE[name] for name in ("blue", "amber", "teal", "violet", "rose", "slate")]
# What a trainer logs beside the terms of the loss.
_ROUTER = "router/"
_NOT_A_TERM = re.compile(rf"step|epoch|loss|learning_rate|grad_norm|total_flos|train_.*|eval_.*|{_ROUTER}.*")
_LOAD = "load_expert_"

Log = Sequence[Mapping[str, float]]


def training_figures(log: Log) -> dict[str, str]:
    """Every figure that a training log has data for."""
    drawn = {}
    if any("loss" in entry for entry in log):
        drawn["loss"] = losses(log)
    if any("eval_cosine" in entry or "eval_skill" in entry for entry in log):
        drawn["held-out"] = held_out_fidelity(log)
    if router_layers(log):
        drawn["routers"] = both_widths(partial(_routers, log), "routers")
    return drawn


def losses(log: Log) -> str:
    """The loss and each of its terms by step, logarithmic where all values allow it."""
    training = [entry for entry in log if "loss" in entry]
    terms = sorted({key for entry in training for key in entry if not _NOT_A_TERM.fullmatch(key)})
    with style():
        figure, axes = subplot(NARROW, 3.2)
        labels = []
        if len(terms) > 1:
            labels += _curve(axes, training, "loss", "total", PALETTE["text"], linewidth=1.8)
        for colour, term in zip(itertools.cycle(_TERM_COLOURS), terms or ["loss"], strict=False):
            labels += _curve(axes, training, term, term, colour)
        if all(entry.get(key, 1.0) > 0 for entry in training for key in ("loss", *terms)):
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        end_labels(axes, labels)
        return inline_svg(figure, "loss", "Loss by training step")


def held_out_fidelity(log: Log) -> str:
    """Cosine and skill on the dev split by step."""
    with style():
        figure, axes = subplot(NARROW, 3.2)
        labels = [
            *_curve(axes, log, "eval_cosine", "mean cosine", PALETTE["blue"], marker="o"),
            *_curve(axes, log, "eval_skill", "skill", PALETTE["teal"], marker="D"),
        ]
        axes.set_xlabel("step")
        axes.set_ylabel("dev split")
        end_labels(axes, labels)
        return inline_svg(figure, "held-out", "Held-out fidelity by training step")


def router_layers(log: Log) -> list[str]:
    """Sparse layers that the log has loads of, by their numbers: "layer_0", "layer_1" ..."""
    found = {name.split("/")[1] for entry in log for name in entry if name.startswith(_ROUTER)}
    return sorted(found, key=lambda layer: int("".join(filter(str.isdigit, layer)) or 0))


def expert_loads(entry: Mapping[str, float], layer: str) -> list[float]:
    """Share of the tokens by expert, in the order of the experts."""
    start = f"{_ROUTER}{layer}/{_LOAD}"
    return [
        entry[key]
        for key in sorted((key for key in entry if key.startswith(start)), key=lambda k: int(k[len(start) :]))
    ]


def last_loads(log: Log) -> dict[str, dict[str, Any]]:
    """By sparse layer what the last entry of the log says: "loads" by expert, and "dropped"; both shares of tokens."""
    layers = router_layers(log)
    entry: Mapping[str, float] = next((e for e in reversed(log) if any(key.startswith(_ROUTER) for key in e)), {})
    return {
        layer: {"loads": expert_loads(entry, layer), "dropped": entry.get(f"{_ROUTER}{layer}/dropped")}
        for layer in layers
    }


def _routers(log: Log, width: float, name: str) -> str:
    """A panel for each sparse layer: the share of the tokens of every expert by step, and of those left out."""
    from matplotlib.figure import Figure

    entries = [entry for entry in log if any(key.startswith(_ROUTER) for key in entry)]
    layers = router_layers(entries)
    columns = min(len(layers), 3 if width == WIDE else 1)
    rows = math.ceil(len(layers) / columns)
    with style():
        figure = Figure(figsize=(width, 2.4 * rows + 0.2), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
        highest = max(
            max(max(expert_loads(entry, layer), default=0.0), entry.get(f"{_ROUTER}{layer}/dropped", 0.0))
            for entry in entries
            for layer in layers
        )
        for axes, layer in itertools.zip_longest(panels, layers):
            if layer is None:
                axes.set_axis_off()
                continue
            axes.grid(axis="y")
            axes.set_ylim(0, 1.05 * highest)
            _router_panel(axes, entries, layer)
        figure.supxlabel("step", color=PALETTE["muted"], fontsize="medium")
        figure.supylabel("share of the tokens", color=PALETTE["muted"], fontsize="medium")
        return inline_svg(figure, name, "Load of the experts by training step and layer")


def _router_panel(axes: Axes, entries: Log, layer: str) -> None:
    """Every expert is a line; the most and the least used one at the end are named."""
    steps = [entry["step"] for entry in entries]
    loads = [expert_loads(entry, layer) for entry in entries]
    experts = list(zip(*loads, strict=True))
    for shares in experts:
        axes.plot(steps, shares, color=PALETTE["blue"], alpha=0.45, linewidth=1.1)
    last = [shares[-1] for shares in experts]
    axes.axhline(1 / len(experts), color=PALETTE["text"], linewidth=0.9, linestyle=":")
    labels = [EndLabel("even share", 1 / len(experts), PALETTE["text"])]
    for chosen in dict.fromkeys((last.index(max(last)), last.index(min(last)))):
        labels.append(EndLabel(f"expert {chosen}", last[chosen], PALETTE["blue"]))
    labels += _curve(axes, entries, f"{_ROUTER}{layer}/dropped", "dropped", PALETTE["rose"], linestyle="--")
    axes.set_title(layer.replace("_", " "), loc="left", fontsize="medium", color=PALETTE["text"])
    end_labels(axes, labels)


def _curve(axes: Axes, log: Log, key: str, label: str, colour: str, **style: Any) -> list[EndLabel]:
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    if not points:
        return []
    axes.plot(*zip(*points, strict=True), color=colour, **style)
    return [EndLabel(label, points[-1][1], colour)]
