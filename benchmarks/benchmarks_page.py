"""The tables and the plot of docs/benchmarks.md, from results/.

python benchmarks/benchmarks_page.py            # prints the tables
python benchmarks/benchmarks_page.py --write    # and puts them into the page, between their markers
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scaling_tables import RESULTS, markdown, result
from shipping_tables import with_table

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BATCHES = (1, 32, 128)
SETS = ("in-domain", "banking77", "tweets")
# What is shown of a task: (task, measure, heading).
TASKS = (
    ("tatoeba", "accuracy", "Tatoeba, 37 languages"),
    ("stsb", "spearman", "STS-b, Spearman"),
    ("banking77", "accuracy", "banking77 probe"),
    ("massive", "accuracy", "MASSIVE intent probe"),
)


def main() -> None:
    """Print; with --write, write."""
    if "--write" in sys.argv:
        write_page()
    for marker in TABLES:
        print(f"{marker}\n\n{shown(marker)}\n")


def write_page() -> None:
    """Put every table into the page and draw the plot."""
    text = PAGE.read_text(encoding="utf-8")
    for marker in TABLES:
        text = with_table(text, marker, shown(marker))
    PAGE.write_text(text, encoding="utf-8")
    plot(result("comparison")["minilm"], RESULTS / "comparison.svg")


def shown(marker: str) -> str:
    """A table, or that there is none yet."""
    try:
        return TABLES[marker]()
    except (FileNotFoundError, KeyError):
        return "*Not measured yet.*"


def speed_table(teacher: str) -> str:
    """Size, and how many times as fast as the teacher in ONNX Runtime and in PyTorch."""
    found = result("comparison")[teacher]
    rows = [
        [name, *size_cells(found["teacher"]), *latency_cells(latency)]
        for name, latency in sorted(found["teacher"]["latency"].items(), reverse=True)
    ]
    rows += [
        [name, *size_cells(student), *latency_cells(student["latency"])] for name, student in found["students"].items()
    ]
    headings = ["student (INT8)", "parameters, M", "MB served", "batch 1, ms"]
    headings += [f"times ONNX fp32, batch {batch}" for batch in BATCHES]
    return markdown([*headings, *(f"times PyTorch, batch {batch}" for batch in BATCHES)], rows)


def size_cells(row: Mapping[str, Any]) -> list[str]:
    """Parameters in millions, and megabytes that a service copies."""
    served = row.get("served_bytes", row.get("fp32_graph_bytes"))
    return [f"{row['parameters'] / 1e6:.1f}", f"{served / 1e6:.0f}"]


def latency_cells(rows: list[Mapping[str, Any]]) -> list[str]:
    """Milliseconds at batch 1, then the speed-ups with the ranges in which another run's lie."""
    by_batch = {row["batch"]: row for row in rows}
    cells = [f"{by_batch[1]['p50_ms']:.2f}"]
    for baseline in ("onnx", "torch"):
        cells += [spread(by_batch[batch], f"speedup_vs_teacher_{baseline}") for batch in BATCHES]
    return cells


def spread(row: Mapping[str, Any], key: str) -> str:
    """A ratio with its range; 1 for an engine beside itself."""
    low, high = row[f"{key}_range95"]
    return "1" if low == high == 1.0 else f"{row[key]:.1f} ({low:.1f} to {high:.1f})"


def fidelity_table() -> str:
    """Cosine and skill of every student on every set."""
    found = result("comparison")["minilm"]["fidelity"]
    first = next(sets for sets in found.values() if sets)
    rows = [
        [name, *(f"{sets[key][field]:.3f}" if sets else "other dimension" for key in SETS for field in FIELDS)]
        for name, sets in found.items()
    ]
    rows.append(["constant vector", *(f"{first[key][field]:.3f}" for key in SETS for field in BASELINE)])
    headings = [f"{key}: {name}" for key in SETS for name in ("cosine", "skill")]
    rows[-1] = [cell if index % 2 else "0" if index else cell for index, cell in enumerate(rows[-1])]
    return markdown(["student (INT8)", *headings], rows)


FIELDS = ("cosine_mean", "skill")
BASELINE = ("constant_baseline", "constant_baseline")


def tasks_table() -> str:
    """What the vectors are worth."""
    tasks = result("comparison")["minilm"]["tasks"]
    names = list(next(iter(tasks.values()))["encoders"])
    rows = [[name, *(score(tasks, task, measure, name) for task, measure, _ in TASKS)] for name in names]
    return markdown(["encoder", *(heading for _, _, heading in TASKS)], rows)


def score(tasks: Mapping[str, Any], task: str, measure: str, name: str) -> str:
    """The score in English, which the teacher knows, or where there is none the mean over languages; its interval."""
    measured = tasks[task]["encoders"][name].get(measure)
    if measured is None:
        return "-"
    shown = measured["languages"].get("en", measured["mean"])
    return f"{shown['value']:.3f} ({shown['ci95'][0]:.3f} to {shown['ci95'][1]:.3f})"


def best_table() -> str:
    """The best students, set by set."""
    rows = []
    for teacher, group in result("best_students")["teachers"].items():
        for name, student in group["students"].items():
            by_batch = {row["batch"]: row for row in student["latency"]}
            speeds = [spread(by_batch[batch], "speedup_vs_teacher_onnx") for batch in BATCHES]
            sets = "; ".join(
                f"{key} {row['cosine_mean']:.3f} ({row['skill']:.3f})" for key, row in student["fidelity"].items()
            )
            sentences = sum(training["sentences_seen"] for training in student["trainings"])
            rows.append([teacher, name, f"{sentences / 1e6:.2f}", *size_cells(student), *speeds, sets])
    headings = ["teacher", "student", "sentences seen, M", "parameters, M", "MB served"]
    headings += [f"times ONNX fp32, batch {batch}" for batch in BATCHES]
    return markdown([*headings, "cosine (skill)"], rows)


def agreement_sentence() -> str:
    """What the second run said."""
    found = result("agreement")
    sentence = (
        f"{found['agree']} of {found['cells']} ratios of the second run ({found['share']:.1%}) lie in the range "
        f"that the first run states. Half the ranges are narrower than ±{found['half_widths']['p50']:.1%}, nine in ten "
        f"than ±{found['half_widths']['p90']:.1%}."
    )
    if found["outside"]:
        listed = ", ".join(
            f"{cell['cell']} ({cell['second']:.2f}; {cell['range'][0]:.2f} to {cell['range'][1]:.2f})"
            for cell in found["outside"]
        )
        sentence += f" Outside: {listed}."
    return sentence


def every_result() -> str:
    """Every result file, the command that makes it, and the machine it was made on."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        described = found.get("environment") or next(
            (one["environment"] for one in found.values() if isinstance(one, dict) and "environment" in one), {}
        )
        command = found.get("command") or next(
            (one["command"] for one in found.values() if isinstance(one, dict) and "command" in one), ""
        )
        cpu = described.get("cpu", {})
        machine = f"{cpu['model']}, {cpu['logical_cores']} threads" if cpu else ""
        rows.append([f"[{path.stem}](../benchmarks/results/{path.name})", f"`{command}`" if command else "", machine])
    return markdown(["result", "command", "machine"], rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Skill on held-out text against speed at batch 1; the area of a point is what is served."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "distillabse"
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    colours = matplotlib.colormaps["tab20"]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for axes, batch in zip(panels, (1, 32), strict=True):
        for index, (name, student) in enumerate(found["students"].items()):
            if not found["fidelity"].get(name):
                continue
            row = next(row for row in student["latency"] if row["batch"] == batch)
            speed, skill = row["speedup_vs_teacher_onnx"], found["fidelity"][name]["in-domain"]["skill"]
            colour = colours(index)
            axes.scatter(speed, skill, s=student["served_bytes"] / 1e5, color=colour, alpha=0.7, label=name)
            axes.hlines(skill, *row["speedup_vs_teacher_onnx_range95"], color=colour)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(
            xlabel=f"times as fast as the teacher in ONNX Runtime fp32, batch {batch}", ylabel="skill, held-out text"
        )
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    figure.savefig(path, metadata={"Date": None})


TABLES: dict[str, Callable[[], str]] = {
    "speed of MiniLM's students": lambda: speed_table("minilm"),
    "fidelity of MiniLM's students": fidelity_table,
    "tasks of MiniLM's students": tasks_table,
    "speed at LaBSE's shape": lambda: speed_table("labse"),
    "agreement": agreement_sentence,
    "best students": best_table,
    "every result": every_result,
}

if __name__ == "__main__":
    main()
