"""The gates as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distillabse.console import figures_table

if TYPE_CHECKING:
    from rich.table import Table

_SIGNS = {"at least": "≥", "at most": "≤", "exactly": "="}


def gates_table(result: Mapping[str, Any]) -> Table:
    """A row for every gate of a verification, a column for every artefact; what failed is marked."""
    gates = result["gates"]
    artefacts = list(dict.fromkeys(gate["artefact"] for gate in gates))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for gate in gates:
        needs = "" if gate["limit"] is None else f"{_SIGNS[gate['relation']]}{_figure(gate['limit'])}"
        found = "none" if gate["value"] is None else _figure(gate["value"])
        shown = found if gate["passed"] else f"[bold red]✗ {found}[/bold red]"
        rows.setdefault((gate["gate"], needs), {})[gate["artefact"]] = shown
    passed = sum(gate["passed"] for gate in gates)
    headings = ["needs", *(name.replace("-", "\n") for name in artefacts)]
    table = figures_table(f"{passed} of {len(gates)} gates passed", None, ["gate"], headings, narrow=True)
    for (name, needs), by_artefact in rows.items():
        table.add_row(name, needs, *(by_artefact.get(artefact, "") for artefact in artefacts))
    return table


def _figure(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.5g}"
