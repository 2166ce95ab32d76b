"""Scores in the terminal: one table for each measure of a task, languages by encoders, and what both are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from distillabse.console import figures_table

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "\N{EN DASH}"
MEASURES = {
    "accuracy": "accuracy",
    "accuracy_to_pivot": "accuracy, to the pivot language",
    "accuracy_from_pivot": "accuracy, from the pivot language",
    "margin_accuracy": "accuracy by ratio margin",
    "margin_accuracy_to_pivot": "accuracy by ratio margin, to the pivot language",
    "margin_accuracy_from_pivot": "accuracy by ratio margin, from the pivot language",
    "mixed_accuracy": "accuracy beside the teacher",
    "teacher_cosine_other": "cosine to the teacher's vector of the translation",
    "teacher_cosine_pivot": "cosine to the teacher, pivot language",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "cross_spearman": "Spearman, across languages",
    "mixed_spearman": "Spearman, across languages beside the teacher",
    "macro_f1": "macro F1",
}
_IN_TERMINAL = {
    "retrieval": ("accuracy", "margin_accuracy", "mixed_accuracy", "teacher_cosine_other"),
    "similarity": ("spearman", "cross_spearman", "mixed_spearman"),
    "probe": ("accuracy", "macro_f1", "mixed_accuracy"),
}


def task_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Tables of what `run_tasks` gave: the measures that a first look needs; the others are in the JSON."""
    for name, task in result["tasks"].items():
        for measure in _IN_TERMINAL[task["kind"]]:
            if any(measure in measures for measures in task["encoders"].values()):
                yield _table(name, measure, task["encoders"])


def languages_of(measure: str, encoders: Mapping[str, Any]) -> dict[str, int]:
    """Number of rows by language, of every language that an encoder has a score in."""
    return {
        language: score["n"]
        for measures in encoders.values()
        for language, score in measures.get(measure, {"languages": {}})["languages"].items()
    }


def interval_text(score: Mapping[str, Any] | None) -> str:
    """The value and its interval."""
    if score is None:
        return MISSING
    low, high = score["ci95"]
    return f"{score['value']:.3f} {low:.3f}..{high:.3f}"


def _table(name: str, measure: str, encoders: Mapping[str, Any]) -> Table:
    table = figures_table(
        f"{name}: {MEASURES[measure]}",
        "Value and 95 % interval.",
        ["language"],
        ["rows", *encoders],
    )
    languages = languages_of(measure, encoders)
    scores = {encoder: measures.get(measure) for encoder, measures in encoders.items()}
    for language, n in languages.items():
        cells = [interval_text(found["languages"].get(language) if found else None) for found in scores.values()]
        table.add_row(language, f"{n:,}", *cells)
    if len(languages) > 1:
        table.add_section()
        means = [interval_text(found["mean"] if found else None) for found in scores.values()]
        table.add_row("mean", f"{sum(languages.values()):,}", *means, style="bold")
    return table
