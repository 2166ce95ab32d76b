"""A comparison as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distillabse.console import figures_table
from distillabse.evaluation.guards import failures

if TYPE_CHECKING:
    from rich.table import Table


def comparison_tables(result: Mapping[str, Any]) -> list[Table]:
    """What each encoder keeps and takes, then its latency in every cell of the grid.

    Args:
        result: The content of comparison.json.
    """
    return [_overview(result), _latency(result)]


def failure_lines(figures: Mapping[str, Any]) -> list[str]:
    """A line in red, as markup of rich, for every guard that failed."""
    from rich.markup import escape

    return [f"[bold red]✗ {escape(line)}[/bold red]" for line in failures(figures["guards"])]


def _overview(result: Mapping[str, Any]) -> Table:
    table = figures_table(
        f"{len(result['encoders'])} encoders on {result['texts']['count']:,} texts",
        f"Cosine and skill: to {result['baseline']}. Texts/s: in the encoder's own batches. Memory: peak.",
        ["encoder", "runtime"],
        ["size\nMB", "dim.", "mean\ncosine", "skill", "texts/s", "memory\nMB", "cold\nstart s", "J per\n1000"],
        narrow=True,
    )
    for name, encoder in result["encoders"].items():
        kept = result["fidelity"].get(name, {})
        memory, start = result["memory"][name], result["cold_start"].get(name, {})
        energy = result["energy"].get(name, {}) if "unavailable" not in result["energy"] else {}
        table.add_row(
            name,
            encoder["runtime"],
            f"{encoder['size_bytes'] / 1e6:.1f}",
            str(encoder["dimension"]),
            _figure(kept.get("cosine_mean"), ".4f"),
            _figure(kept.get("skill"), ".4f"),
            _figure(result["throughput"].get(name, {}).get("sentences_per_second"), ",.0f"),
            f"{memory['peak_bytes'] / 1e6:.0f}",
            _figure(start.get("median_seconds"), ".2f"),
            _figure(energy.get("joules_per_1000_sentences"), ".1f"),
        )
    return table


def _latency(result: Mapping[str, Any]) -> Table:
    thesis = result["protocol"] == "thesis"
    table = figures_table(
        "Latency" + (", protocol of the thesis" if thesis else ""),
        "Times: the baseline's, with the 95 % interval; ~: wider than asked for when time was used up.",
        ["encoder"],
        ["batch", "tokens", "median\nms", "99th\nms", "ms per\nsentence", "times", "interval", "rounds"],
        narrow=True,
    )
    for name, rows in result["latency"].items():
        for row in rows:
            low, high = row["speedup_ci95"]
            table.add_row(
                name,
                str(row["batch"]),
                "own" if row["length"] is None else str(row["length"]),
                _figure(row["p50_ms"], ".4g"),
                _figure(row["p99_ms"], ".4g"),
                _figure(row["ms_per_sentence"], ".4g"),
                f"{row['speedup']:.2f}{'' if row['converged'] else '~'}",
                "" if name == result["baseline"] else f"{low:.2f} to {high:.2f}",
                str(row["rounds"]),
            )
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
