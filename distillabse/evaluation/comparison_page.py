"""The page of a comparison: what `distillabse bench` measured of several encoders, beside one baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillabse.evaluation.page_tables import grid_tint, resources
from distillabse.evaluation.plots.fidelity import histogram_limits, histogram_panel
from distillabse.evaluation.plots.pareto import Point, pareto
from distillabse.evaluation.plots.speed import Look, latency, looks_of, speedups
from distillabse.evaluation.templates import cosine, gain, megabytes, milliseconds, ratio, render

_SIGNIFICANT = 0.05

Row = Mapping[str, Any]
Place = tuple[int | None, int]
"""Tokens of a cell of the grid, None for the texts' own, and its batch size."""


def render_comparison(result: Mapping[str, Any]) -> str:
    """The page: one HTML file that loads nothing, for screens light and dark and for paper.

    Args:
        result: the content of comparison.json. Only "name", "baseline" and "encoders" must be there; what was not
            measured leaves its section out.
    """
    encoders = list(result["encoders"])
    looks = looks_of(encoders, result["baseline"])
    rows = {name: result.get("latency", {}).get(name, []) for name in encoders}
    return render(
        "comparison.html.j2",
        result=result,
        headline=headline(result),
        keys=key_figures(result),
        figures=_figures(result, rows, looks),
        grid=_grid(rows),
        lengths=_lengths(rows),
        fidelity={name: result["fidelity"][name] for name in _students(result)},
        resources=resources(result),
        significant=_SIGNIFICANT,
    )


def headline(result: Mapping[str, Any]) -> str:
    """What stays closest and what is fastest, in one sentence made of the figures."""
    baseline = result["baseline"]
    names = [name for name in result["encoders"] if name != baseline]
    skills, speeds = _skills(result), _speeds(result)
    closest = max(skills, key=lambda name: skills[name]["skill"], default=None)
    fastest = max(speeds, key=lambda name: speeds[name]["speedup"], default=None)
    kept = f"mean cosine {skills[closest]['cosine_mean']:.3f}, skill {skills[closest]['skill']:.3f}" if closest else ""
    gained = ""
    if fastest:
        speed = speeds[fastest]
        gained = f"{gain(speed['speedup'], 'faster', 'slower')} than {baseline} at batch {speed['batch']}"
    if not closest and not fastest:
        return f"{', '.join(names) or baseline}: no fidelity and no speed-up was measured."
    if len(names) == 1:
        return f"{names[0]}: {', '.join(filter(None, (kept, gained)))}."
    if closest == fastest:
        return f"{closest} stays closest to {baseline} ({kept}) and is fastest: {gained}."
    closeness = f"{closest} stays closest to {baseline} ({kept})" if closest else ""
    speediness = f"{fastest} is fastest: {gained}" if fastest else ""
    return f"{'; '.join(filter(None, (closeness, speediness)))}."


def key_figures(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The best of each kind, with the name of the encoder that it belongs to: value, label and note."""
    baseline, encoders = result["baseline"], result["encoders"]
    skills, speeds, found = _skills(result), _speeds(result), []
    if skills:
        name = max(skills, key=lambda name: skills[name]["skill"])
        row = skills[name]
        constant = f"; constant vector {cosine(row['constant_baseline'])}" if "constant_baseline" in row else ""
        found.append(
            {"value": cosine(row["cosine_mean"]), "label": "Closest: mean cosine", "note": f"{name}{constant}"}
        )
    if speeds:
        name = max(speeds, key=lambda name: speeds[name]["speedup"])
        row, bounds = speeds[name], speeds[name].get("speedup_ci95")
        interval = f" ({bounds[0]:.2f}\N{EN DASH}{bounds[1]:.2f})" if bounds else ""
        label = f"Fastest: speed-up, batch {row['batch']}"
        found.append({"value": ratio(row["speedup"]), "label": label, "note": f"{name}{interval}"})
        note = f"{name}; {baseline} {milliseconds(own['p50_ms'])} ms" if (own := _first_row(result, baseline)) else name
        found.append({"value": f"{milliseconds(row['p50_ms'])} ms", "label": "Its median latency", "note": note})
    sizes = {name: encoder["size_bytes"] for name, encoder in encoders.items() if encoder.get("size_bytes")}
    if others := {name: size for name, size in sizes.items() if name != baseline}:
        name = min(others, key=lambda name: others[name])
        note = f"{name}; {baseline} {megabytes(sizes[baseline])}" if baseline in sizes else name
        found.append({"value": megabytes(others[name]), "label": "Smallest on disk", "note": note})
    return found


def pareto_points(result: Mapping[str, Any], looks: Mapping[str, Look]) -> list[Point]:
    """Every encoder of known skill that was measured in the first cell of the grid; the baseline's own skill is 1."""
    points = []
    for name, encoder in result["encoders"].items():
        row = _first_row(result, name)
        skill = 1.0 if name == result["baseline"] else result.get("fidelity", {}).get(name, {}).get("skill")
        if row is not None and skill is not None:
            points.append(Point(name, row["p50_ms"], skill, encoder.get("size_bytes"), looks[name].colour))
    return points


def _figures(result: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], looks: Mapping[str, Look]) -> dict[str, str]:
    """Markup by name, which counts and never holds an encoder's name."""
    drawn = {}
    if (points := pareto_points(result, looks)) and len(points) > 1 and (first := _first_place(rows)):
        drawn["pareto"] = pareto(points, "skill", first[1])
    compared = _students(result)
    counts = {name: found for name in compared if (found := result["fidelity"][name].get("histogram"))}
    limits = histogram_limits(list(counts.values())) if counts else (-1.0, 1.0)
    for number, name in enumerate(compared):
        if name in counts:
            drawn[f"histogram-{number}"] = histogram_panel(counts[name], limits, f"histogram-{number}")
    for number, length in enumerate(_lengths(rows)):
        of_length = {
            name: found for name in rows if (found := [row for row in rows[name] if row.get("length") == length])
        }
        drawn[f"latency-{number}"] = latency(of_length, looks, f"latency-{number}")
        students = {name: found for name, found in of_length.items() if name != result["baseline"]}
        if number == 0 and any(row.get("speedup") for found in students.values() for row in found):
            drawn["speedup"] = speedups(students, looks, "speedup", looks[result["baseline"]].label)
    return drawn


def _grid(rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """A row of the table for each place of the grid: "length", "batch", and "cells" by encoder.

    A cell is the encoder's row with "tint", class and strength of its colour, or None where it was not measured.
    """
    table = []
    for length, batch in _places(rows):
        cells: dict[str, Any] = {}
        for name, measured in rows.items():
            row = _at(measured, (length, batch))
            tint = grid_tint(row["speedup"]) if row and row.get("speedup") else ("", 0.0)
            cells[name] = {**row, "tint": tint} if row else None
        table.append({"length": length, "batch": batch, "cells": cells})
    return table


def _places(rows: Mapping[str, Sequence[Row]]) -> list[Place]:
    """Places of the grid: the texts' own lengths first, then by length and batch size."""
    found = {(row.get("length"), row["batch"]) for measured in rows.values() for row in measured}
    return sorted(found, key=lambda place: (place[0] or 0, place[1]))


def _lengths(rows: Mapping[str, Sequence[Row]]) -> list[int | None]:
    return list(dict.fromkeys(length for length, _ in _places(rows)))


def _first_place(rows: Mapping[str, Sequence[Row]]) -> Place | None:
    """The smallest batch, with the texts' own lengths or else the shortest."""
    return min(_places(rows), key=lambda place: (place[1], place[0] or 0), default=None)


def _first_row(result: Mapping[str, Any], name: str) -> Row | None:
    rows = result.get("latency", {})
    place = _first_place(rows)
    return _at(rows.get(name, []), place) if place else None


def _at(measured: Sequence[Row], place: Place) -> Row | None:
    return next((row for row in measured if (row.get("length"), row["batch"]) == place), None)


def _students(result: Mapping[str, Any]) -> list[str]:
    """Encoders that were compared with the baseline, in the order they were given."""
    return [name for name in result["encoders"] if name in result.get("fidelity", {})]


def _skills(result: Mapping[str, Any]) -> dict[str, Row]:
    return {name: row for name in _students(result) if (row := result["fidelity"][name]).get("skill") is not None}


def _speeds(result: Mapping[str, Any]) -> dict[str, Row]:
    """Rows with a speed-up in the first cell of the grid, by encoder but the baseline."""
    rows = {name: _first_row(result, name) for name in result["encoders"] if name != result["baseline"]}
    return {name: row for name, row in rows.items() if row and row.get("speedup")}
