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

from distillabse.config import JobConfig
from distillabse.corpus.build import corpus_stage
from distillabse.environment import check_onnxruntime, describe_environment, require_device
from distillabse.errors import InputError
from distillabse.evaluation.bench import bench_stage
from distillabse.evaluation.report import report_stage
from distillabse.export.bundle import export_stage
from distillabse.export.verify import verify_stage
from distillabse.layout import RunFolder
from distillabse.models.vocabulary import vocabulary_stage
from distillabse.settings import config_hash
from distillabse.storage import new_file, read_json, sha256_of_json, write_json
from distillabse.training.stage import distill_stage

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
    run: Callable[[JobConfig, RunFolder], object]


STAGES: dict[str, Stage] = {
    "corpus": Stage(("corpus", "seed"), (), corpus_stage),
    "vocabulary": Stage(("vocabulary", "teacher"), ("corpus",), vocabulary_stage),
    "distill": Stage(
        ("teacher", "student", "objectives", "training", "teacher_cache", "early_stopping", "seed"),
        ("corpus", "vocabulary"),
        distill_stage,
    ),
    "export": Stage(("export",), ("distill",), export_stage),
    "verify": Stage(("teacher", "evaluation", "gates", "seed"), ("corpus", "export"), verify_stage),
    "bench": Stage(("teacher", "evaluation", "bench", "seed"), ("corpus", "export"), bench_stage),
    "report": Stage(("name",), ("corpus", "vocabulary", "distill", "verify", "bench"), report_stage),
}


def run_job(config: JobConfig, *, force: bool = False) -> RunFolder:
    """Run every stage whose inputs have changed since it last ran; `force` runs them all.

    An interrupted distill stage goes on from its newest checkpoint.
    """
    run = prepare(config)
    for name in STAGES:
        if not force and is_current(name, config, run):
            logger.info("%s: nothing has changed, skipped", name)
        else:
            run_stage(name, config, run, resume=not force)
    return run


def run_stage(name: str, config: JobConfig, run: RunFolder, *, resume: bool = False) -> None:
    """Run one stage and remember what it was made from.

    Raises:
        InputError: a stage that it builds on has not run.
    """
    for needed in STAGES[name].after:
        if not run.stamp(needed).is_file():
            raise InputError(
                f"{name} builds on {needed}, which has not run in {run.root}. Run `distillabse {needed}` first."
            )
    logger.info("%s", name)
    fingerprint = _fingerprint(name, config, run)
    if name == "distill":
        _distill_with_checkpoints(config, run, fingerprint, resume)
    else:
        run.stamp(name).unlink(missing_ok=True)
        STAGES[name].run(config, run)
    write_json(run.stamp(name), {"fingerprint": fingerprint, "finished": _now()})


def is_current(name: str, config: JobConfig, run: RunFolder) -> bool:
    """Whether the stage has run on exactly these inputs, and its product is still there."""
    stamp = run.stamp(name)
    if not stamp.is_file() or not run.product(name).is_dir():
        return False
    if any(not run.stamp(needed).is_file() for needed in STAGES[name].after):
        return False
    return bool(read_json(stamp)["fingerprint"] == _fingerprint(name, config, run))


def prepare(config: JobConfig) -> RunFolder:
    """Make the run folder with the resolved configuration, its hash and the versions of everything."""
    check_onnxruntime()
    require_device(config.bench.device)
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


def _distill_with_checkpoints(config: JobConfig, run: RunFolder, fingerprint: str, resume: bool) -> None:
    """Checkpoints are only gone on from when they belong to exactly this job."""
    belongs_to = run.checkpoints / "job.json"
    same_job = belongs_to.is_file() and read_json(belongs_to)["fingerprint"] == fingerprint
    if not same_job and run.checkpoints.is_dir():
        shutil.rmtree(run.checkpoints)
    run.stamp("distill").unlink(missing_ok=True)
    write_json(belongs_to, {"fingerprint": fingerprint})
    distill_stage(config, run, resume=resume and same_job)


def _fingerprint(name: str, config: JobConfig, run: RunFolder) -> str:
    """Hash of everything a stage reads: its blocks of the configuration, and the stages before it."""
    stage = STAGES[name]
    values: dict[str, Any] = {key: config.model_dump(mode="json")[key] for key in stage.reads}
    before = {needed: read_json(run.stamp(needed))["finished"] for needed in stage.after}
    return sha256_of_json({"values": values, "before": before, "version": version("distillabse")})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
