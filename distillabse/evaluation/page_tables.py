"""Rows of the pages' tables: what bench.json and comparison.json say, as text beside its share of the largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distillabse.evaluation.templates import megabytes

RESOURCES = ("throughput", "memory", "cold_start", "energy")
"""Keys of bench.json and comparison.json that `resources` reads."""

_PER_THOUSAND = "joules_per_1000_sentences"
# At this speed-up, or its inverse, a cell has its full colour.
_FULL_TINT = 8.0


class Cell(NamedTuple):
    """A number of a table.

    Attributes:
        text: the number.
        spread: between which values it was, or empty.
        share: of the column's largest, in per cent.
    """

    text: str
    spread: str
    share: float


class _Column(NamedTuple):
    key: str
    field: str
    heading: str
    spell: Callable[[float], str]


_COLUMNS = (
    _Column("throughput", "sentences_per_second", "Sentences per second", lambda value: f"{value:,.0f}"),
    _Column("memory", "loaded_bytes", "Memory when loaded", lambda value: megabytes(int(value))),
    _Column("memory", "peak_bytes", "Peak memory", lambda value: megabytes(int(value))),
    _Column("memory", "gpu_peak_bytes", "Peak GPU memory", lambda value: megabytes(int(value))),
    _Column("cold_start", "median_seconds", "Cold start, s", lambda value: f"{value:,.2f}"),
    _Column("energy", _PER_THOUSAND, "Joules per 1,000 sentences", lambda value: f"{value:,.2f}"),
)


def resources(result: Mapping[str, Any]) -> dict[str, Any]:
    """Throughput, memory, cold start and energy, as far as they were measured.

    Args:
        result: with any of RESOURCES, each a mapping of encoders to figures, or {"unavailable": why}.

    Returns:
        "columns": headings; "rows": by encoder a `Cell` or None for each column; "notes": what is unavailable and why.
    """
    known = {key: value for key in RESOURCES if isinstance(value := result.get(key), Mapping)}
    notes = [
        f"{key.replace('_', ' ').capitalize()} was not measured: {value['unavailable']}"
        for key, value in known.items()
        if isinstance(value.get("unavailable"), str)
    ]
    measured = {
        key: {name: row for name, row in value.items() if isinstance(row, Mapping)} for key, value in known.items()
    }
    names = list(dict.fromkeys(name for value in measured.values() for name in value))
    columns = [
        (column, cells) for column in _COLUMNS if any(cells := _cells(column, measured.get(column.key, {}), names))
    ]
    return {
        "columns": [column.heading for column, _ in columns],
        "rows": {name: [cells[number] for _, cells in columns] for number, name in enumerate(names)} if columns else {},
        "notes": notes,
    }


def grid_tint(speedup: float) -> tuple[str, float]:
    """Class and strength in per cent of a cell's colour, by the logarithm: half the speed is as strong as double."""
    strength = min(abs(math.log(speedup) / math.log(_FULL_TINT)), 1.0)
    return "above" if speedup >= 1 else "below-even", 35 * strength


def _cells(column: _Column, rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[Cell | None]:
    values = {name: rows[name][column.field] for name in names if rows.get(name, {}).get(column.field) is not None}
    largest = max(values.values(), default=0.0) or 1.0

    def cell(name: str) -> Cell | None:
        if name not in values:
            return None
        spread = rows[name].get("spread") if column.field != "gpu_peak_bytes" else None
        text = f"{column.spell(spread[0])}\N{EN DASH}{column.spell(spread[1])}" if spread else ""
        return Cell(column.spell(values[name]), text, 100 * values[name] / largest)

    return [cell(name) for name in names]
