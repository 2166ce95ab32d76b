"""The report: report.json for programs, report.html for people, and the figures of the bundle's model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse import layout
from distillabse.config import JobConfig, TrainedStudentConfig
from distillabse.console import figures_table
from distillabse.errors import InputError
from distillabse.evaluation.model_card import write_model_card
from distillabse.evaluation.page_tables import RESOURCES
from distillabse.evaluation.report_page import render_page
from distillabse.evaluation.templates import cosine, gain, megabytes, milliseconds, ratio, title
from distillabse.export.bundle import replace_in_bundle
from distillabse.layout import RunFolder
from distillabse.settings import config_hash, load_config
from distillabse.storage import new_folder, read_json, write_json
from distillabse.tasks.run import exported

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

FIDELITY_KEYS = (
    "n", "cosine_mean", "cosine_p01", "cosine_p05", "ci95", "constant_baseline", "shuffled_baseline", "skill",
    "neighbour_top1", "similarity_spearman",
)  # fmt: skip
LATENCY_KEYS = (
    "batch", "p50_ms", "p95_ms", "p99_ms", "sentences_per_second",
    "speedup_vs_teacher_torch", "speedup_vs_teacher_onnx",
)  # fmt: skip
# From most to least compressed: the first one that was measured is what the headline speaks of.
_ARTEFACTS = ("onnx-int8", "onnx-fp32", "torch")
_SIZE_OF = {"onnx-int8": "int8", "onnx-fp32": "fp32", "teacher-torch": "teacher"}
_SHAPE = (
    "hidden_size", "embedding_size", "num_attention_heads", "intermediate_size", "vocab_size", "sparse_layers",
    "num_experts", "expert_size",
)  # fmt: skip


def report_stage(config: JobConfig, run: RunFolder) -> dict[str, Any]:
    """Write the report folder and the bundle's model card from what the earlier stages left in the run folder.

    Args:
        config: The job. What the report says of it is read from the run folder, where it was recorded.
        run: Its run folder, with `verify` and `bench` finished.

    Returns:
        The content of report.json.

    Raises:
        InputError: a stage that the report needs has not been run.
    """
    report = collect(run)
    page = render_page(report)
    write_model_card(run, report)
    _write_figures(run, report)
    with new_folder(run.report) as folder:
        write_json(folder / run.report_json.name, report)
        (folder / run.report_html.name).write_text(page, encoding="utf-8")
    return report


def collect(run: RunFolder) -> dict[str, Any]:
    """Gather every figure of the run folder into the content of report.json.

    Training history, corpus and vocabulary counts and run.json may be absent; their part is then None or empty.

    Raises:
        InputError: `verify` or `bench` has not been run.
        ConfigurationError: config.yaml is missing or not valid.
    """
    verify = _product_of("verify", run.verification)
    bench = _product_of("bench", run.measurements)
    job = load_config(run.config)
    parameters = bench.get("parameters", {})
    active = {"active_parameters": parameters["student_active"]} if "student_active" in parameters else {}
    report: dict[str, Any] = {
        "name": job.name,
        "config_hash": config_hash(job),
        "random_weights": bench.get("random_weights", False),
        "teacher": {
            "model": job.teacher.model,
            "revision": job.teacher.revision,
            "parameters": parameters.get("teacher"),
        },
        "student": {**_shape(run, job), "parameters": parameters.get("student"), **active},
        "size_bytes": {key: bench["size_bytes"].get(key) for key in ("teacher", "fp32", "int8")},
        "fidelity": _per_set(verify, lambda row: {key: row.get(key) for key in FIDELITY_KEYS}),
        "slices": _per_set(verify, lambda row: row.get("slices", {})),
        "histograms": _per_set(verify, lambda row: row.get("histogram")),
        "reduction": verify.get("reduction"),
        "invariance": verify.get("invariance", {}),
        "parity": verify.get("parity", {}),
        "gates": verify.get("gates", []),
        "worst": verify.get("worst", []),
        "latency": {
            engine: [{**dict.fromkeys(LATENCY_KEYS), **row} for row in rows]
            for engine, rows in bench["latency"].items()
        },
        "tokens": bench.get("tokens", {}),
        "guards": bench.get("guards", []),
        **{key: bench[key] for key in RESOURCES if key in bench},
        "environment": {
            **bench.get("environment", {}),
            "threads": bench.get("threads"),
            "device": bench.get("device"),
            "cores_used_by_others": bench.get("cores_used_by_others"),
            "throttling": bench.get("throttling"),
        },
        "tasks": _task_scores(run),
        "training": _if_present(run.training_history),
        "corpus": _if_present(run.corpus_counts),
        "vocabulary": _if_present(run.vocabulary_counts),
        "config": job.model_dump(mode="json"),
        "run": _if_present(run.record),
    }
    report["headline"] = _headline(report)
    report["verdict"] = verdict(report)
    return report


def verdict(report: dict[str, Any]) -> str:
    """What was kept and what was gained, in one sentence made of the figures."""
    headline = report["headline"]
    fidelity, speed, size = headline["fidelity"], headline["latency"], headline["size_bytes"]
    gains = []
    if not report["random_weights"]:
        gains.append(
            f"mean cosine {fidelity['cosine_mean']:.3f} to the teacher "
            f"(a constant vector would score {fidelity['constant_baseline']:.2f})"
        )
    for baseline, engine in (("onnx", "ONNX Runtime"), ("torch", "PyTorch")):
        if speed and (factor := speed[f"speedup_vs_teacher_{baseline}"]):
            gains.append(f"{gain(factor, 'faster', 'slower')} than the teacher in {engine} at batch {speed['batch']}")
            break
    if size and report["size_bytes"]["teacher"]:
        gains.append(gain(report["size_bytes"]["teacher"] / size, "smaller", "larger"))
    return f"{title(headline['artefact'])}: {', '.join(gains)}."


def summary_table(report: dict[str, Any]) -> Table:
    """The figures of every engine, for the terminal."""
    batches = sorted({row["batch"] for rows in report["latency"].values() for row in rows})
    table = figures_table(
        report["verdict"],
        "Median ms by batch size; vs: speed-up over the teacher at the smallest; fidelity on test.",
        ["engine"],
        [
            *("size\nMB", "mean\ncosine", "skill", "1st\npct."),
            *(f"ms at\n{batch}" for batch in batches),
            *("vs\nONNX", "vs\ntorch"),
        ],
    )
    for engine in dict.fromkeys([*report["latency"], *report["fidelity"]]):
        fidelity = report["fidelity"].get(engine, {}).get("test", {})
        by_batch = {row["batch"]: row for row in report["latency"].get(engine, [])}
        first = by_batch.get(min(batches), {})
        table.add_row(
            engine,
            megabytes(report["size_bytes"].get(_SIZE_OF.get(engine, ""))).removesuffix(" MB"),
            *(cosine(fidelity.get(key)) for key in ("cosine_mean", "skill", "cosine_p01")),
            *(milliseconds(by_batch.get(batch, {}).get("p50_ms")) for batch in batches),
            *(ratio(first.get(f"speedup_vs_teacher_{baseline}")) for baseline in ("onnx", "torch")),
        )
    return table


def _write_figures(run: RunFolder, report: dict[str, Any]) -> None:
    """The bundle says itself what was measured of it."""
    provenance = _if_present(run.bundle / layout.PROVENANCE) or {}
    provenance["figures"] = {key: report[key] for key in ("size_bytes", "fidelity", "invariance", "latency")}
    text = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
    replace_in_bundle(run.bundle, layout.PROVENANCE, text)


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    artefact = next(artefact for artefact in _ARTEFACTS if artefact in report["fidelity"])
    rows = report["latency"].get(artefact, [])
    return {
        "artefact": artefact,
        "fidelity": report["fidelity"][artefact]["test"],
        "latency": min(rows, key=lambda row: row["batch"], default=None),
        "size_bytes": report["size_bytes"].get(_SIZE_OF.get(artefact, "")),
    }


def _product_of(stage: str, path: Path) -> Any:
    if not path.exists():
        raise InputError(f"{path} does not exist. Run the stage {stage!r} first: distillabse {stage} CONFIG")
    return read_json(path)


def _if_present(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _task_scores(run: RunFolder) -> Any:
    """What `bench --tasks` measured, unless that was another student than the one in the bundle."""
    found = _if_present(run.task_scores)
    if found is not None and found["export"] != exported(run):
        logger.warning("%s is of an earlier student and left out. Run `distillabse bench --tasks` again.", run.tasks)
        return None
    return found


def _shape(run: RunFolder, job: JobConfig) -> dict[str, Any]:
    """Number of layers of the student, and its widths from its transformers settings where the bundle has them."""
    settings = _if_present(run.bundle / layout.MODEL_SETTINGS) or {}
    asked = job.student.depth if isinstance(job.student, TrainedStudentConfig) else None
    return {
        "layers": settings.get("num_hidden_layers", asked),
        **{key: settings[key] for key in _SHAPE if key in settings},
    }


def _per_set(verify: dict[str, Any], pick: Callable[[dict[str, Any]], Any]) -> dict[str, dict[str, Any]]:
    return {artefact: {name: pick(row) for name, row in sets.items()} for artefact, sets in verify["fidelity"].items()}
