"""Figures of fine-tuned models by language, with intervals, and the table that shows them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse.console import figures_table
from distillabse.tasks.scores import Bootstrap

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

Scores = Mapping[str, "NDArray[np.float64]"]
"""For each metric the scores of all test rows, float64 [rows], 0 to 100."""

_LABELS = {"accuracy": "accuracy", "f1": "F1", "exact_match": "EM"}


def compare(
    scores: Mapping[str, Sequence[Scores]],
    languages: NDArray[Any],
    groups: NDArray[np.int64],
    metrics: Sequence[str],
    train_language: str,
    bootstrap_samples: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of every model, and how far each is from the first.

    Args:
        scores: for each model the scores of every seed.
        languages: code of every test row, [rows].
        groups: int64 [rows], rows that belong together, such as the questions of a paragraph; whole groups are drawn.
        metrics: names of the scores, the main one first.
        train_language: what was trained on.
        bootstrap_samples: resamples.
        seed: of the resamples.

    Returns:
        For each model under "models": its figures by language, the mean over languages (XTREME's figure), and the
        transfer gap, the training language minus the mean of the others, where both were tested. A figure is the mean
        over seeds with its 95 % interval over test rows and the figure of every seed. Models after the first also have
        the difference to the first by language, with an interval over the same draws of rows.
    """
    codes = sorted(set(languages.tolist()), key=lambda code: (code != train_language, code))
    models: dict[str, Any] = {}
    reference = {metric: _mean_over_seeds(next(iter(scores.values())), metric) for metric in metrics}
    for index, (name, runs) in enumerate(scores.items()):
        found: dict[str, Any] = {"languages": {}, "average": {}, "transfer_gap": {}}
        for code in codes:
            rows = languages == code
            found["languages"][code] = {"n": int(rows.sum())}
            for metric in metrics:
                values = _mean_over_seeds(runs, metric)[rows]
                figure = _figure(values, groups[rows], bootstrap_samples, seed)
                figure["seeds"] = [float(run[metric][rows].mean()) for run in runs]
                if index:
                    difference = values - reference[metric][rows]
                    figure["difference"] = _figure(difference, groups[rows], bootstrap_samples, seed)
                found["languages"][code][metric] = figure
        for metric in metrics:
            means = {code: found["languages"][code][metric]["mean"] for code in codes}
            found["average"][metric] = float(np.mean(list(means.values())))
            others = [mean for code, mean in means.items() if code != train_language]
            if others and train_language in means:
                found["transfer_gap"][metric] = float(means[train_language] - np.mean(others))
        models[name] = found
    return {"train_language": train_language, "languages": codes, "models": models}


def results_table(result: Mapping[str, Any]) -> Table:
    """Rows: languages and metrics; columns: the models, and how far they are from the first."""
    models: Mapping[str, Any] = result["models"]
    shown = [metric for metric in result["metrics"] if not metric.startswith("squad_")]
    names = list(models)
    headings = ["n"]
    for index, name in enumerate(names):
        headings += [f"{name}\n[95 %]", *(["difference\n[95 %]"] if index else [])]
    data = result["data"]
    language = data["train"]["language"]
    steps = models[names[0]]["runs"][0]["steps"]
    caption = (
        f"Fine-tuned on {data['train']['rows']:,} rows in {language}, {steps:,} steps, {len(result['seeds'])} seed(s). "
        f"Intervals: over test rows. Gap: {language} minus the mean of the others. {data['note'] or ''}"
    )
    table = figures_table(f"{result['title']}: zero-shot transfer", caption, ["", ""], headings, narrow=True)
    for code in result["languages"]:
        for metric in shown:
            cells = [str(models[names[0]]["languages"][code]["n"]) if metric == shown[0] else ""]
            for index, name in enumerate(names):
                figure = models[name]["languages"][code][metric]
                cells += [_cell(figure), *([_cell(figure["difference"], sign="+")] if index else [])]
            table.add_row(code if metric == shown[0] else "", _LABELS[metric], *cells)
    for key, label in (("average", "average"), ("transfer_gap", "gap")):
        for metric in (metric for metric in shown if metric in models[names[0]][key]):
            cells = [""]
            for index, name in enumerate(names):
                own, first = models[name][key][metric], models[names[0]][key][metric]
                cells += [f"{own:.1f}", *([f"{own - first:+.1f}"] if index else [])]
            table.add_row(label if metric == shown[0] else "", _LABELS[metric], *cells)
    return table


def _mean_over_seeds(runs: Sequence[Scores], metric: str) -> NDArray[np.float64]:
    return np.asarray(np.mean([run[metric] for run in runs], axis=0), dtype=np.float64)


def _figure(values: NDArray[np.float64], groups: NDArray[np.int64], samples: int, seed: int) -> dict[str, Any]:
    """The mean and its 95 % percentile-bootstrap interval over groups; no interval where there are not two."""
    _, own = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(own, weights=values), np.bincount(own).astype(np.float64)
    if len(sums) < 2:
        return {"mean": float(values.mean()), "ci95": None}

    def mean(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int = -1) -> Any:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    score = Bootstrap(samples, seed).score(mean, sums, counts)
    return {"mean": float(values.mean()), "ci95": score.as_json()["ci95"]}


def _cell(figure: Mapping[str, Any], sign: str = "") -> str:
    mean = f"{figure['mean']:{sign}.1f}"
    if figure["ci95"] is None:
        return mean
    low, high = figure["ci95"]
    return f"{mean} [{low:{sign}.1f}, {high:{sign}.1f}]"
