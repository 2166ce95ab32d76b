"""report.html: the page of a job, for people who have ten seconds and for those who have an hour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distillabse.evaluation.page_tables import RESOURCES, resources
from distillabse.evaluation.plots.drawing import PALETTE
from distillabse.evaluation.plots.fidelity import histogram, language_figures, length_figure
from distillabse.evaluation.plots.pareto import Point, pareto
from distillabse.evaluation.plots.speed import Look, latency, speedups
from distillabse.evaluation.plots.training import last_loads, training_figures
from distillabse.evaluation.templates import render, title
from distillabse.tasks.plots import task_figures
from distillabse.tasks.views import MEASURES

_LOOKS = {
    "teacher-torch": Look("teacher, PyTorch", PALETTE["slate"], "--"),
    "teacher-onnx": Look("teacher, ONNX", PALETTE["slate"]),
    "torch": Look("student, PyTorch", PALETTE["amber"]),
    "onnx-fp32": Look("student, fp32", PALETTE["teal"]),
    "onnx-int8": Look("student, INT8", PALETTE["blue"]),
}
_TEACHERS = ("teacher-torch", "teacher-onnx")
# PyTorch reads the same weights from another file: it is shown with the size of the fp32 graph.
_SIZE_OF = {
    "teacher-torch": "teacher", "teacher-onnx": "teacher", "torch": "fp32", "onnx-fp32": "fp32", "onnx-int8": "int8",
}  # fmt: skip
_GRAPHS = {"teacher": "Teacher", "fp32": "Student, fp32", "int8": "Student, INT8"}


def render_page(report: Mapping[str, Any]) -> str:
    """The HTML page: one file that loads nothing, for screens light and dark and for paper.

    Args:
        report: what `report.collect` returned.
    """
    return render(
        "report.html.j2",
        report=report,
        headline=report["headline"],
        figures=_figures(report),
        failed=[gate for gate in report["gates"] if not gate["passed"]],
        sizes=_size_rows(report),
        guards=[{**guard, "encoder": title(guard.get("encoder") or "")} for guard in report["guards"]],
        resources=resources({key: _titled(report[key]) for key in RESOURCES if key in report}),
        loads=last_loads(report["training"]["log"]) if report["training"] else {},
        measures=MEASURES,
    )


def pareto_points(report: Mapping[str, Any]) -> tuple[int, list[Point]]:
    """The smallest batch size that was measured, and every engine of known fidelity that was measured at it.

    The fidelity is the skill on the test split; the teacher's own is 1.
    """
    batch = min((row["batch"] for rows in report["latency"].values() for row in rows), default=0)
    points = []
    for engine, rows in report["latency"].items():
        row = next((row for row in rows if row["batch"] == batch), None)
        skill = 1.0 if engine in _TEACHERS else report["fidelity"].get(engine, {}).get("test", {}).get("skill")
        if row is not None and skill is not None:
            size = report["size_bytes"].get(_SIZE_OF.get(engine, ""))
            points.append(Point(title(engine), row["p50_ms"], skill, size, _look(engine).colour))
    return batch, points


def _figures(report: Mapping[str, Any]) -> dict[str, str]:
    """Every figure that the report has data for: markup by name, to be put into one page as it is."""
    artefact = report["headline"]["artefact"]
    engines = report["latency"]
    looks = {engine: _look(engine) for engine in engines}
    drawn = {"latency": latency(engines, looks)}
    batch, points = pareto_points(report)
    if points and not report["random_weights"]:
        drawn["pareto"] = pareto(points, "skill", batch)
    key = "speedup_vs_teacher_onnx"
    students = {engine: rows for engine, rows in engines.items() if engine not in _TEACHERS}
    if any(row.get(key) for rows in students.values() for row in rows):
        drawn["speedup"] = speedups(students, looks, key, "teacher, ONNX")
    if counts := report["histograms"].get(artefact, {}).get("test"):
        drawn["histogram"] = histogram(counts)
    slices = report["slices"].get(artefact, {}).get("test", {})
    lengths = slices.get("length") or {}
    if slices.get("language"):
        drawn |= language_figures(slices["language"], len(lengths) + 3)
    if lengths:
        drawn["slices-length"] = length_figure(lengths)
    if report["training"]:
        drawn |= training_figures(report["training"]["log"])
    if report["tasks"]:
        drawn |= task_figures(report["tasks"]["tasks"])
    return drawn


def _size_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The graphs with their size, how many times smaller than the teacher's they are, and their parameters."""
    sizes = {key: size for key in _GRAPHS if (size := report["size_bytes"].get(key)) is not None}
    largest = max(sizes.values(), default=1)
    teacher = sizes.get("teacher")
    rows = []
    for key, size in sizes.items():
        model = report["teacher" if key == "teacher" else "student"]
        rows.append(
            {
                "label": _GRAPHS[key],
                "size_bytes": size,
                "share": 100 * size / largest,
                "smaller": teacher / size if teacher and size else None,
                "parameters": model.get("parameters"),
                "active": model.get("active_parameters", model.get("parameters")),
            }
        )
    return rows


def _titled(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same under the engines' names for people."""
    return {title(engine): row for engine, row in figures.items()}


def _look(engine: str) -> Look:
    return _LOOKS.get(engine, Look(engine, PALETTE["violet"]))
