"""The planner: what students of many shapes would cost in size and latency, before one of them is trained.

Latency depends on the shape and not on the weights, so every candidate is built with random ones, exported and
quantised as the student will be, and measured in ONNX Runtime on this machine beside the teacher. What was built and
what was measured stays in the folder: an interrupted plan goes on, and a changed one measures only what is new.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distillabse import layout
from distillabse.config import BenchConfig, DenseStudentConfig, ExportConfig, JobConfig, PlanConfig, QuantizationConfig
from distillabse.environment import describe_environment, usable_cores
from distillabse.errors import ConfigurationError, GateFailed
from distillabse.evaluation.bench import TEACHER_ONNX, graph_bytes
from distillabse.evaluation.latency import measure
from distillabse.evaluation.plan_build import build_candidates, fingerprint, parameter_counts, write_graph
from distillabse.evaluation.plan_space import SHAPE, candidates, choose, merits, pareto_set, student_block
from distillabse.evaluation.plan_views import plan_figure, shape_title, student_yaml
from distillabse.evaluation.sets import texts_for_speed
from distillabse.evaluation.workers import Engine
from distillabse.layout import RunFolder
from distillabse.models.shape import transformer_shape
from distillabse.storage import new_file, read_json, sha256_of_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

# Candidates are measured in groups: all with texts as they are, and as many rounds.
_SAME_ROUNDS: dict[str, Any] = {"lengths": [None], "interval": None}

# Each has a process with its weights in memory, and the longer a round, the less its pairs have in common.
LARGEST_GROUP = 6


def plan_stage(config: JobConfig, run: RunFolder) -> dict[str, Any]:
    """Measure the shapes of `config.plan` and write `run.plan`: plan.json, plan.svg and the chosen student.yaml.

    Raises:
        ConfigurationError: the student is the teacher itself, or no shape can be built from the teacher.
        GateFailed: no candidate reaches the speedup; plan.json and plan.svg are written all the same.
        InputError: the corpus or the vocabulary stage has not run.
    """
    from distillabse.models.teacher import base_encoder, load_teacher

    student = require_plannable(config)
    texts = texts_for_speed(config, run)
    teacher = load_teacher(config.teacher)
    result = plan(
        teacher,
        student,
        config.plan,
        texts,
        run.candidates,
        source=base_encoder(config, run),
        bench=config.bench,
        export=config.export,
        seed=config.seed,
        random_weights=config.teacher.random_weights,
    )
    write_plan(result, run)
    if result["chosen"] is None:
        raise GateFailed(_why_none(result))
    return result


def require_plannable(config: JobConfig) -> DenseStudentConfig:
    """The job's student, whose shape can be planned.

    Raises:
        ConfigurationError: the student is the teacher itself, or has experts.
    """
    if not isinstance(config.student, DenseStudentConfig):
        reasons = {
            "teacher": "has the shape of its teacher, so there is nothing to plan",
            "switch": "cannot be planned: the planner measures dense shapes",
        }
        raise ConfigurationError(
            f"student.kind: {config.student.kind} {reasons[config.student.kind]}. Set student.kind: dense."
        )
    return config.student


def plan(
    teacher: SentenceTransformer,
    student: DenseStudentConfig,
    space: PlanConfig,
    texts: Sequence[str],
    folder: Path,
    *,
    source: SentenceTransformer | None = None,
    bench: BenchConfig | None = None,
    export: ExportConfig | None = None,
    seed: int = 42,
    random_weights: bool = False,
) -> dict[str, Any]:
    """Measure every shape of `space` beside the teacher, and choose one.

    Args:
        teacher: What the candidates are compared with, in ONNX Runtime fp32.
        student: The block that the candidates share but for their shape.
        space: Shapes, batch sizes, rounds, and the speedup to reach at which batch size.
        texts: Texts of real lengths.
        folder: Where candidates and measurements are kept; those that are there already are used again.
        source: What the candidates are built from, where it is not the teacher but has another vocabulary.
        bench: Threads, device and seconds per round.
        export: Opset and INT8 settings; without INT8 the candidates are measured in fp32.
        seed: Seed of the weights, of the drawn batches and of the bootstrap.
        random_weights: The teacher's weights are a random stand-in; the result says so.

    Returns:
        "teacher" and "candidates" (parameters, bytes of the graph, latency in milliseconds by batch size, and for
        candidates the student block, speedups with their 95 % intervals and whether in the Pareto set), "chosen" (index
        or None), "target", "left_out" (shapes that cannot be built, with the reason), "tokens" (lengths of the texts),
        "threads", "device", "int8", "random_weights", "environment".

    Raises:
        ConfigurationError: no shape can be built from `source`.
        InputError: there are no texts.
        DistillabseError: an engine's process died.
    """
    from distillabse.models.teacher import transformer_of

    source, bench, export = source or teacher, bench or BenchConfig(), export or ExportConfig()
    students, left_out = candidates(space, student, transformer_shape(transformer_of(source).config.to_dict()))
    if left_out:
        logger.warning("%d shapes left out; the first: %s", len(left_out), left_out[0]["reason"])
    settings = bench.model_copy(update={"batch_sizes": space.batch_sizes, "rounds": space.rounds, **_SAME_ROUNDS})
    with _progress() as progress:
        tracked = progress.track(students, description="building")
        dimension = teacher.get_embedding_dimension()
        folders = build_candidates(source, tracked, folder, export, seed, dimension)
        measurements = _measure(teacher, folders, list(texts), settings, export.opset, seed, progress)
    rows = [
        _candidate(one, read_json(path / layout.CANDIDATE), measured)
        for one, path, measured in zip(students, folders, measurements, strict=True)
    ]
    for row, is_best in zip(rows, pareto_set([merits(row, space.batch) for row in rows]), strict=True):
        row["pareto"] = is_best
    return {
        "teacher": _teacher(parameter_counts(teacher), measurements),
        "candidates": rows,
        "chosen": choose(rows, space.speedup, space.batch),
        "target": {"speedup": space.speedup, "batch": space.batch},
        "left_out": left_out,
        **{key: measurements[0][key] for key in ("tokens", "threads", "device")},
        "int8": export.quantization.enabled,
        "random_weights": random_weights,
        "environment": describe_environment(),
    }


def write_plan(result: Mapping[str, Any], run: RunFolder) -> None:
    """Write plan.json and plan.svg, and student.yaml where a student was chosen."""
    write_json(run.plan_result, result)
    with new_file(run.plan_figure) as temporary:
        temporary.write_text(plan_figure(result), encoding="utf-8")
    run.planned_student.unlink(missing_ok=True)
    if result["chosen"] is not None:
        with new_file(run.planned_student) as temporary:
            temporary.write_text(student_yaml(result), encoding="utf-8")


def forget_measurements(run: RunFolder) -> None:
    """Let the next plan measure everything again, for instance because the machine was busy."""
    for measurement in run.candidates.glob(f"*/{layout.MEASUREMENT}"):
        measurement.unlink()


def _measure(
    teacher: SentenceTransformer,
    folders: Sequence[Path],
    texts: list[str],
    bench: BenchConfig,
    opset: int,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The measurement of every candidate, made where there is none yet for this machine, these texts and settings."""
    conditions = _conditions(teacher, texts, bench, seed)

    def is_measured(folder: Path) -> bool:
        file = folder / layout.MEASUREMENT
        return file.is_file() and bool(read_json(file)["conditions"] == conditions)

    missing = [folder for folder in folders if not is_measured(folder)]
    task = progress.add_task("measuring", total=len(folders), completed=len(folders) - len(missing))
    if missing:
        with tempfile.TemporaryDirectory(prefix="distillabse-teacher-") as temporary:
            logger.info("Exporting the teacher to ONNX as a baseline")
            fp32 = ExportConfig(opset=opset, quantization=QuantizationConfig(kind="none"))
            size = graph_bytes(write_graph(teacher, Path(temporary), fp32))
            baseline = Engine(TEACHER_ONNX, "onnx", Path(temporary), layout.ONNX_FP32)
            for start in range(0, len(missing), LARGEST_GROUP):
                group = missing[start : start + LARGEST_GROUP]
                _measure_group(baseline, size, group, texts, bench, seed, conditions)
                progress.advance(task, len(group))
    return [read_json(folder / layout.MEASUREMENT) for folder in folders]


def _measure_group(
    baseline: Engine,
    baseline_bytes: int,
    group: Sequence[Path],
    texts: list[str],
    bench: BenchConfig,
    seed: int,
    conditions: Mapping[str, Any],
) -> None:
    engines = [Engine(folder.name, "onnx", folder, read_json(folder / layout.CANDIDATE)["graph"]) for folder in group]
    result = measure([baseline, *engines], texts, bench, seed, baselines=(baseline.name,))
    latency = result.pop("latency")
    for folder in group:
        measured = {"latency": latency[folder.name], "teacher": latency[baseline.name], "teacher_bytes": baseline_bytes}
        write_json(folder / layout.MEASUREMENT, {"conditions": conditions, **measured, **result})


def _conditions(teacher: SentenceTransformer, texts: list[str], bench: BenchConfig, seed: int) -> dict[str, Any]:
    """What a measurement is only good for."""
    environment = describe_environment()
    cpu, versions = environment["cpu"], environment["versions"]
    return {
        "machine": {key: cpu[key] for key in ("model", "physical_cores", "logical_cores", "flags")},
        "gpus": [gpu["name"] for gpu in environment["gpus"]] if bench.device == "cuda" else [],
        "versions": {key: versions[key] for key in ("onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")},
        "bench": {**bench.model_dump(mode="json"), "threads": bench.threads or usable_cores()},
        "texts": sha256_of_json(texts),
        "teacher": fingerprint(teacher),
        "seed": seed,
    }


def _candidate(student: DenseStudentConfig, built: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of "candidates" in plan.json, but for "pareto"."""
    key = f"speedup_vs_{TEACHER_ONNX.replace('-', '_')}"
    return {
        "student": student_block(student),
        "shape": {name: getattr(student, name) for name in SHAPE},
        **{name: built[name] for name in ("parameters", "encoder_parameters", "size_bytes")},
        "latency": {str(row["batch"]): _times(row) for row in measured["latency"]},
        "speedup": {str(row["batch"]): {"value": row[key], "ci95": row[f"{key}_ci95"]} for row in measured["latency"]},
        "cores_used_by_others": measured["cores_used_by_others"],
    }


def _teacher(parameters: Mapping[str, int], measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The teacher's figures: it was measured beside every group, so the medians over the candidates."""
    columns = zip(*(measured["teacher"] for measured in measurements), strict=True)
    return {
        **parameters,
        "size_bytes": measurements[0]["teacher_bytes"],
        "latency": {
            str(rows[0]["batch"]): {key: median(row[key] for row in rows) for key in _times(rows[0])}
            for rows in columns
        },
    }


def _times(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("p50_ms", "p95_ms", "p99_ms", "sentences_per_second")}


def _why_none(result: Mapping[str, Any]) -> str:
    speedup, batch = result["target"]["speedup"], result["target"]["batch"]
    fastest = max(result["candidates"], key=lambda row: merits(row, batch)[0])
    found = fastest["speedup"][str(batch)]
    low, high = found["ci95"]
    return (
        f"None of the {len(result['candidates'])} shapes is surely {speedup:g} times as fast as the teacher at batch "
        f"{batch}. The fastest, {shape_title(fastest['shape'])}, is {found['value']:.1f} times as fast (95 % interval "
        f"{low:.1f} to {high:.1f}). Add smaller ones to plan.layers, plan.hidden_size or plan.intermediate_size, or "
        "ask for less with plan.speedup (--speedup)."
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns)
