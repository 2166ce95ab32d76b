"""The stages in their order, each skipped when nothing it reads has changed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import yaml

from distillabse.config import JobConfig, SwitchStudentConfig, TrainedStudentConfig
from distillabse.corpus.build import corpus_stage
from distillabse.environment import check_onnxruntime, describe_environment, require_device
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation.bench import bench_stage
from distillabse.evaluation.plan import forget_measurements, plan_stage, require_plannable
from distillabse.evaluation.report import report_stage
from distillabse.export.bundle import export_stage
from distillabse.export.verify import verify_stage
from distillabse.layout import RunFolder
from distillabse.models.shape import resolve_shape, transformer_shape
from distillabse.models.teacher import teacher_settings
from distillabse.settings import config_hash
from distillabse.storage import new_file, read_json, sha256_of_json, write_json
from distillabse.training.stage import assistant_stage, distill_stage
from distillabse.vocabulary.stage import vocabulary_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of the job.

    Attributes:
        reads: blocks of the configuration that its result depends on.
        after: the stages whose products it reads.
        run: the function that does it.
    """

    reads: tuple[str, ...]
    after: tuple[str, ...]
    run: Callable[..., object]


STAGES: dict[str, Stage] = {
    "corpus": Stage(("corpus", "seed"), (), corpus_stage),
    "vocabulary": Stage(("vocabulary", "teacher"), ("corpus",), vocabulary_stage),
    "assistant": Stage(("teacher", "assistant", "seed"), ("corpus", "vocabulary"), assistant_stage),
    "distill": Stage(
        ("teacher", "student", "objectives", "training", "teacher_cache", "early_stopping", "seed"),
        ("corpus", "vocabulary", "assistant"),
        distill_stage,
    ),
    "export": Stage(("export",), ("distill",), export_stage),
    "verify": Stage(("teacher", "evaluation", "gates", "seed"), ("corpus", "export"), verify_stage),
    "bench": Stage(("teacher", "evaluation", "bench", "seed"), ("corpus", "export"), bench_stage),
    "report": Stage(("name",), ("corpus", "vocabulary", "distill", "verify", "bench"), report_stage),
}


_TRAINED = ("assistant", "distill")


def run_job(config: JobConfig, *, force: bool = False) -> RunFolder:
    """Run every stage whose inputs have changed since it last ran; `force` runs them all.

    An interrupted distill stage goes on from its newest checkpoint.
    """
    run = prepare(config)
    for name in stages_of(config):
        if not force and is_current(name, config, run):
            logger.info("%s: nothing has changed, skipped", name)
        else:
            run_stage(name, config, run, resume=not force)
    return run


def run_plan(config: JobConfig, *, force: bool = False) -> RunFolder:
    """Run the stages that the planner reads where they are not current, then the planner; `force` measures all again.

    Raises:
        GateFailed: no shape reaches the speedup.
    """
    run = prepare(config)
    require_plannable(config)
    for name in ("corpus", "vocabulary"):
        if not is_current(name, config, run):
            run_stage(name, config, run)
    if force:
        forget_measurements(run)
    plan_stage(config, run)
    return run


def stages_of(config: JobConfig) -> list[str]:
    """The stages of a job in their order: only one with an assistant trains it."""
    return [name for name in STAGES if name != "assistant" or config.assistant is not None]


def run_stage(name: str, config: JobConfig, run: RunFolder, *, resume: bool = False) -> None:
    """Run one stage and remember what it was made from.

    Raises:
        InputError: a stage that it builds on has not run.
        ConfigurationError: the job has no such stage.
    """
    if name not in stages_of(config):
        raise ConfigurationError(f"{name}: this configuration has no `{name}` block. Add one, or leave the stage out.")
    for needed in _before(name, config):
        if not run.stamp(needed).is_file():
            raise InputError(
                f"{name} builds on {needed}, which has not run in {run.root}. Run `distillabse {needed}` first."
            )
    logger.info("%s", name)
    fingerprint = _fingerprint(name, config, run)
    if name in _TRAINED:
        _train_with_checkpoints(name, config, run, fingerprint, resume)
    else:
        run.stamp(name).unlink(missing_ok=True)
        STAGES[name].run(config, run)
    write_json(run.stamp(name), {"fingerprint": fingerprint, "finished": _now()})


def is_current(name: str, config: JobConfig, run: RunFolder) -> bool:
    """Whether the stage has run on exactly these inputs, and its product is still there."""
    stamp = run.stamp(name)
    if not stamp.is_file() or not run.product(name).is_dir():
        return False
    if any(not run.stamp(needed).is_file() for needed in _before(name, config)):
        return False
    return bool(read_json(stamp)["fingerprint"] == _fingerprint(name, config, run))


def prepare(config: JobConfig) -> RunFolder:
    """Make the run folder with the resolved configuration, its hash and the versions of everything."""
    check_onnxruntime()
    require_device(config.bench.device)
    require_fitting_shapes(config)
    require_one_process(config)
    run = RunFolder(config.run_folder)
    write_config(config, run)
    write_json(
        run.record,
        {
            "name": config.name,
            "config_hash": config_hash(config),
            "distillabse": version("distillabse"),
            "config": config.model_dump(mode="json"),
            "environment": describe_environment(),
            "created": _now(),
        },
    )
    return run


def write_config(config: JobConfig, run: RunFolder) -> None:
    """Write the resolved configuration as YAML, ready to be run again."""
    with new_file(run.config) as temporary:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
        temporary.write_text(text, encoding="utf-8")


def require_fitting_shapes(config: JobConfig) -> None:
    """Refuse widths and layers that do not fit the teacher before any work is done; needs its config.json alone.

    Raises:
        ConfigurationError: names the key and the remedy.
    """
    settings = teacher_settings(config.teacher)
    if settings is None or not isinstance(config.student, TrainedStudentConfig):
        return  # a teacher that cannot be had now is an error of the stage that needs it
    shape = transformer_shape(settings)
    if config.assistant is not None:
        shape, _ = resolve_shape(config.assistant.student, shape)
    resolve_shape(config.student, shape)


def require_one_process(config: JobConfig) -> None:
    """Refuse experts that are spread over processes: the stages of a job run in one.

    Raises:
        ConfigurationError: names the key and the remedy.
    """
    students = (config.student, config.assistant.student if config.assistant else None)
    sizes = [student.expert_parallel_size for student in students if isinstance(student, SwitchStudentConfig)]
    size = max(sizes, default=1)
    if size > 1:
        raise ConfigurationError(
            f"student.expert_parallel_size: {size} needs as many processes, and a job runs in one. Set 1, or spread "
            "experts in a DeepSpeed script of your own with distillabse.training.expert_parallel (docs/switch.md)."
        )


def _before(name: str, config: JobConfig) -> list[str]:
    return [needed for needed in STAGES[name].after if needed in stages_of(config)]


def _train_with_checkpoints(name: str, config: JobConfig, run: RunFolder, fingerprint: str, resume: bool) -> None:
    """Checkpoints are only gone on from when they belong to exactly this job."""
    checkpoints = run.checkpoints if name == "distill" else run.assistant_checkpoints
    belongs_to = checkpoints / "job.json"
    same_job = belongs_to.is_file() and read_json(belongs_to)["fingerprint"] == fingerprint
    if not same_job and checkpoints.is_dir():
        shutil.rmtree(checkpoints)
    run.stamp(name).unlink(missing_ok=True)
    write_json(belongs_to, {"fingerprint": fingerprint})
    STAGES[name].run(config, run, resume=resume and same_job)


def _fingerprint(name: str, config: JobConfig, run: RunFolder) -> str:
    """Hash of everything a stage reads: its blocks of the configuration, and the stages before it."""
    stage = STAGES[name]
    values: dict[str, Any] = {key: config.model_dump(mode="json")[key] for key in stage.reads}
    before = {needed: read_json(run.stamp(needed))["finished"] for needed in _before(name, config)}
    return sha256_of_json({"values": values, "before": before, "version": version("distillabse")})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
