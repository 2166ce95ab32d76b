"""Running tasks: on encoders and tasks in memory, or on the teacher and the student of a run folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distillabse import layout
from distillabse.config import JobConfig, ProbeTask, RetrievalTask, SimilarityTask, TasksConfig
from distillabse.environment import describe_environment
from distillabse.errors import ConfigurationError, InputError
from distillabse.export.bundle import int8_file
from distillabse.layout import RunFolder
from distillabse.settings import load_suite
from distillabse.storage import new_folder, read_json, remove_leftovers, write_json
from distillabse.tasks.base import Task
from distillabse.tasks.encoders import (
    RandomVectors,
    TextEncoder,
    VectorTable,
    distil_static,
    load_static,
    open_encoder,
)
from distillabse.tasks.probe import load_probe
from distillabse.tasks.retrieval import load_retrieval
from distillabse.tasks.scores import Bootstrap, measures_as_json
from distillabse.tasks.similarity import load_similarity

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

TEACHER, STUDENT, RANDOM, STATIC = "teacher", "student", "random", "static"


def run_tasks(
    encoders: Mapping[str, TextEncoder],
    tasks: Sequence[Task],
    seed: int = 0,
    *,
    teacher: str | None = None,
    projection: NDArray[np.float32] | None = None,
    bootstrap_samples: int = 1000,
) -> dict[str, Any]:
    """Measure encoders side by side. Every encoder encodes every distinct text of all tasks once.

    Args:
        encoders: By name.
        tasks: Loaded tasks, such as `Retrieval`.
        seed: Of the bootstrap samples, which are the same for every encoder.
        teacher: Which encoder is the teacher, for figures that mix its vectors with those of another; none by default.
        projection: float32 [teacher's dimension, fewer], for encoders that have `fewer` dimensions.
        bootstrap_samples: for the 95 % intervals.

    Returns:
        {"encoders": {name: {"dimension", "texts", "seconds", "texts_per_second"}}, "tasks": {name: {"kind", "headline",
        "encoders": {name: {measure: {"languages": {language: score}, "mean": score}}}}}}, where a score is {"value",
        "ci95", "n"}. What mixes in the teacher's vectors is left out for encoders of other dimensions.

    Raises:
        InputError: no tasks, an encoder gives no usable vectors, or `teacher` is none of them.
    """
    if not tasks:
        raise InputError("There are no tasks to run. Name a suite or tasks in the configuration's `tasks` block.")
    if teacher is not None and teacher not in encoders:
        raise InputError(f"The teacher {teacher!r} is not among the encoders: {', '.join(encoders)}.")
    bootstrap = Bootstrap(bootstrap_samples, seed)
    texts = list(dict.fromkeys(text for task in tasks for text in task.texts()))
    described: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    targets: dict[int, VectorTable] = {}  # the teacher's vectors by dimension
    for name in sorted(encoders, key=lambda name: name != teacher):
        logger.info("Encoding %d texts with %s", len(texts), name)
        table = VectorTable(name, encoders[name], texts)
        if name == teacher:
            targets = {table.dimension: table}
            if projection is not None:
                targets[projection.shape[1]] = table.projected(projection)
        described[name] = {
            "dimension": table.dimension,
            "texts": len(table),
            "seconds": table.seconds,
            "texts_per_second": len(table) / max(table.seconds, 1e-9),
        }
        for task in tasks:
            measures = task.scores(table, targets.get(table.dimension), bootstrap)
            found[task.name][name] = measures_as_json(measures)
    return {
        "encoders": {name: described[name] for name in encoders},
        "tasks": {
            task.name: {
                "kind": task.kind,
                "headline": task.headline,
                "encoders": {name: found[task.name][name] for name in encoders},
            }
            for task in tasks
        },
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
    }


def load_tasks(config: TasksConfig, seed: int, only: Sequence[str] = ()) -> list[Task]:
    """Read the rows of the configured tasks, the suite's first; `only` those named.

    Raises:
        ConfigurationError: there are none, two have one name, or `only` names one that is not there.
        InputError: the rows of a task cannot be used.
    """
    configured = [*(load_suite(config.suite) if config.suite else []), *config.tasks]
    names = [task.name for task in configured]
    if not configured:
        raise ConfigurationError(
            "tasks: this configuration names none. Set tasks.suite, e.g. tasks.suite=evaluation-data, or tasks.tasks; "
            "see docs/tasks.md."
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"tasks: several tasks are named {', '.join(repeated)}. Rename one.")
    if missing := [name for name in only if name not in names]:
        raise ConfigurationError(f"--only {', '.join(missing)}: no such task. This job's tasks: {', '.join(names)}.")
    chosen = [
        task.model_copy(update={"max_pairs": task.max_pairs or config.max_pairs})
        for task in configured
        if not only or task.name in only
    ]
    return [_load(task, seed) for task in chosen]


def _load(task: RetrievalTask | SimilarityTask | ProbeTask, seed: int) -> Task:
    if isinstance(task, RetrievalTask):
        return load_retrieval(task, seed)
    if isinstance(task, SimilarityTask):
        return load_similarity(task, seed)
    return load_probe(task, seed)


def bench_tasks(
    config: JobConfig, run: RunFolder, *, against: Mapping[str, str] | None = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure the job's teacher and its student, baselines and others, and write `run.task_scores`.

    The student is the bundle's INT8 graph, or fp32 where there is no INT8 or the job's `bench.device` is a GPU; before
    the export it is the trained student, and before that it is left out.

    Args:
        config: The job.
        run: Its run folder.
        against: More encoders by name, as `open_encoder` takes them.
        only: Names of tasks; by default all.

    Returns:
        What was written: as from `run_tasks`, with "places", "random_weights", "export" and "environment".

    Raises:
        ConfigurationError: there are no tasks, a name is taken, or a baseline is not installed.
        InputError: an encoder or the rows of a task cannot be used.
    """
    from distillabse.models.reduction import load_reduction
    from distillabse.models.teacher import load_teacher

    against = against or {}
    if taken := sorted(set(against) & {TEACHER, STUDENT, RANDOM, STATIC}):
        raise ConfigurationError(f"--against {taken[0]}=...: this name has a meaning of its own; choose another.")
    tasks = load_tasks(config.tasks, config.seed, only)
    device = config.bench.device
    teacher = load_teacher(config.teacher, device)
    encoders: dict[str, TextEncoder] = {TEACHER: teacher}
    places = {TEACHER: config.teacher.model}
    projection = None
    if (student := student_of(config, run)) is not None:
        encoders[STUDENT], places[STUDENT] = open_encoder(str(student), device), str(student)
        projection = load_reduction(run.bundle if run.bundle in student.parents else student)
    else:
        logger.warning("%s holds neither a bundle nor a trained student: the teacher is measured alone", run.root)
    for name, place in against.items():
        encoders[name], places[name] = open_encoder(place, device), place
    if STATIC in config.tasks.baselines:
        encoders[STATIC], places[STATIC] = static_floor(config, run), str(run.static_floor)
    if RANDOM in config.tasks.baselines:
        encoders[RANDOM] = RandomVectors(len(teacher.encode([""])[0]), config.seed)
    result = run_tasks(
        encoders,
        tasks,
        config.seed,
        teacher=TEACHER,
        projection=projection,
        bootstrap_samples=config.tasks.bootstrap_samples,
    )
    result.update(
        places=places,
        random_weights=config.teacher.random_weights,
        export=exported(run),
        environment=describe_environment(),
    )
    remove_leftovers(run.tasks)
    with new_folder(run.tasks) as folder:
        write_json(folder / run.task_scores.name, result)
    run.stamp("report").unlink(missing_ok=True)  # the next `run` writes the report again
    return result


def named_places(given: Sequence[str]) -> dict[str, str]:
    """Places of encoders by name, from `name=place`.

    Raises:
        ConfigurationError: one has no name or place, or a name is given twice.
    """
    places: dict[str, str] = {}
    for item in given:
        name, separator, place = item.partition("=")
        if not (name and separator and place):
            raise ConfigurationError(f"--against {item}: write name=path, e.g. small=runs/small/bundle.")
        if name in places:
            raise ConfigurationError(f"--against: two encoders are named {name!r}. Rename one.")
        places[name] = place
    return places


def student_of(config: JobConfig, run: RunFolder) -> Path | None:
    """The bundle's graph that is served on the job's device, else the trained student's folder, else None."""
    if (run.bundle / layout.PROVENANCE).is_file():
        served = config.export.quantization.enabled and config.bench.device == "cpu"
        return run.bundle / (int8_file(config.export.quantization) if served else layout.ONNX_FP32)
    return run.student if (run.student / layout.MODULES).is_file() else None


def exported(run: RunFolder) -> str | None:
    """When the bundle was exported: scores are of this student and of no later one."""
    stamp = run.stamp("export")
    return str(read_json(stamp)["finished"]) if stamp.is_file() else None


def static_floor(config: JobConfig, run: RunFolder) -> SentenceTransformer:
    """The static encoder made of the job's teacher, distilled at first use and kept in the run folder.

    Raises:
        ConfigurationError: it is to be distilled and model2vec is not installed.
    """
    from distillabse.models.teacher import load_teacher

    record = run.static_floor / layout.STATIC_RECORD
    made_from = config.teacher.model_dump(mode="json")
    if not (record.is_file() and read_json(record) == made_from):
        remove_leftovers(run.static_floor)
        with new_folder(run.static_floor) as folder:
            distil_static(load_teacher(config.teacher), folder)
            write_json(folder / record.name, made_from)
    return load_static(run.static_floor)
