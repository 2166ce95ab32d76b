"""The stages in their order, each skipped when nothing it reads has changed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from distillabse import processes
from distillabse.config import JobConfig
from distillabse.corpus.build import corpus_stage
from distillabse.environment import check_onnxruntime, describe_environment, require_device
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation.bench import bench_stage
from distillabse.evaluation.plan import forget_measurements, plan_stage, require_plannable
from distillabse.evaluation.report import report_stage
from distillabse.export.bundle import export_stage
from distillabse.layout import RunFolder
from distillabse.requirements import refuse_spread_experts, require_fitting_shapes, require_learnable_pairs
from distillabse.settings import config_hash
from distillabse.storage import new_file, read_json, remove_leftovers, sha256_of_json, write_json
from distillabse.training.checkpoints import has_whole_checkpoint
from distillabse.training.quantization_aware import quantize_stage
from distillabse.training.stage import assistant_stage, distill_stage
from distillabse.verification.examine import verify_stage
from distillabse.vocabulary.stage import vocabulary_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of the job.

    Attributes:
        reads: blocks of the configuration that its result depends on, or single keys of them.
        after: the stages whose products it reads.
        run: the function that does it.
    """

    reads: tuple[str, ...]
    after: tuple[str, ...]
    run: Callable[..., object]


STAGES: dict[str, Stage] = {
    "corpus": Stage(("corpus", "seed"), (), corpus_stage),
    "vocabulary": Stage(("vocabulary", "teacher", "base_model"), ("corpus",), vocabulary_stage),
    "assistant": Stage(("teacher", "assistant", "seed"), ("corpus", "vocabulary"), assistant_stage),
    "distill": Stage(
        (
            "teacher",
            "base_model",
            "student",
            "objectives",
            "training",
            "teacher_cache",
            "aligner",
            "static_warmup",
            "early_stopping",
            "seed",
        ),
        ("corpus", "vocabulary", "assistant"),
        distill_stage,
    ),
    "quantize": Stage(
        (
            "teacher",
            "export.quantization.training",
            "export.quantization.calibration_sentences",
            "export.quantization.cpu",
            "seed",
        ),
        ("corpus", "vocabulary", "distill"),
        quantize_stage,
    ),
    "export": Stage(("export",), ("distill", "quantize"), export_stage),
    "verify": Stage(("teacher", "evaluation", "gates", "seed"), ("corpus", "export"), verify_stage),
    "bench": Stage(("teacher", "evaluation", "bench", "seed"), ("corpus", "export"), bench_stage),
    "report": Stage(("name",), ("corpus", "vocabulary", "distill", "verify", "bench"), report_stage),
}


_TRAINED = ("assistant", "distill", "quantize")

# The blocks that a job may go without, and their stages with them.
_OPTIONAL = {"assistant": "assistant", "quantize": "export.quantization.training"}

# How the steps of a training are shared out, and what it reports, may change while it is interrupted.
_MAY_CHANGE = {
    "training.deepspeed", "training.per_device_train_batch_size", "training.gradient_accumulation_steps",
    "training.dataloader_num_workers", "training.dataloader_prefetch_factor", "training.ddp_timeout",
    "training.logging_steps", "training.report_to", "training.save_total_limit", "teacher_cache", "shard_teacher",
}  # fmt: skip


def run_job(config: JobConfig, *, force: bool = False, until: str | None = None) -> RunFolder:
    """Run every stage, or those up to `until`, whose inputs have changed since they last ran; `force` runs them all.

    An interrupted training goes on from its newest checkpoint. Where a launcher started several processes, all of them
    train; the main one alone runs the other stages.
    """
    processes.wait_for_main()  # what keeps the processes apart is told before hours of work
    run, names = prepare(config), stages_of(config)
    if until is not None and until not in names:
        raise ConfigurationError(f"--until {until}: this job has no such stage. Its stages: {', '.join(names)}.")
    for name in filter(_takes_part, names[: names.index(until) + 1] if until else names):
        if _decided(name, partial(_may_skip, name, config, run, force)):
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
    """The stages of a job in their order: only one with an assistant trains it, and so on."""
    values = config.model_dump(mode="json")
    return [name for name in STAGES if name not in _OPTIONAL or _at(values, _OPTIONAL[name]) is not None]


def run_stage(name: str, config: JobConfig, run: RunFolder, *, resume: bool = False) -> None:
    """Run one stage and remember what it was made from; see `run_job` for several processes.

    Raises:
        InputError: a stage that it builds on has not run.
        ConfigurationError: the job has no such stage, or its checkpoints belong to another one.
    """
    if name not in stages_of(config):
        raise ConfigurationError(
            f"{name}: this configuration has no `{_OPTIONAL[name]}` block. Add one, or leave the stage out."
        )
    if not _takes_part(name):
        return
    if name in _TRAINED:
        processes.wait_for_main()
    for needed in _before(name, config):
        if not run.stamp(needed).is_file():
            raise InputError(
                f"{name} builds on {needed}, which has not run in {run.root}. Run `distillabse {needed}` first."
            )
    logger.info("%s", name)
    if processes.is_main():
        remove_leftovers(run.product(name))
    fingerprint = sha256_of_json(_inputs(name, config, run))
    if name in _TRAINED:
        resumes = processes.agreed(partial(_claim_checkpoints, name, config, run, resume))
        STAGES[name].run(config, run, resume=resumes)
    else:
        run.stamp(name).unlink(missing_ok=True)
        STAGES[name].run(config, run)
    if processes.is_main():
        write_json(run.stamp(name), {"fingerprint": fingerprint, "finished": _now()})


def export_checkpoint(config: JobConfig, run: RunFolder, checkpoint: Path) -> None:
    """Write the bundle from a checkpoint of a training, finished or not; `verify` and `bench` take it from there.

    Raises:
        InputError: the checkpoint is not whole.
    """
    run.stamp("export").unlink(missing_ok=True)
    export_stage(config, run, checkpoint)
    inputs = {"checkpoint": str(checkpoint.resolve())}
    write_json(run.stamp("export"), {"fingerprint": sha256_of_json(inputs), "finished": _now()})


def is_current(name: str, config: JobConfig, run: RunFolder) -> bool:
    """Whether the stage has run on exactly these inputs, and its product is still there."""
    stamp = run.stamp(name)
    if not stamp.is_file() or not run.product(name).is_dir():
        return False
    if any(not run.stamp(needed).is_file() for needed in _before(name, config)):
        return False
    return bool(read_json(stamp)["fingerprint"] == sha256_of_json(_inputs(name, config, run)))


def prepare(config: JobConfig) -> RunFolder:
    """Make the run folder with the resolved configuration, its hash and the versions of everything."""
    run = RunFolder(config.run_folder)
    if not processes.is_main():
        return run
    check_onnxruntime()
    require_device(config.bench.device)
    require_fitting_shapes(config)
    refuse_spread_experts(config)
    require_learnable_pairs(config)
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


def _before(name: str, config: JobConfig) -> list[str]:
    return [needed for needed in STAGES[name].after if needed in stages_of(config)]


def _takes_part(name: str) -> bool:
    """Whether this process has anything to do in a stage."""
    return processes.is_main() or name in _TRAINED


def _decided(name: str, decide: Callable[[], bool]) -> bool:
    """The decision of the main process, in all that take part in the stage."""
    return processes.agreed(decide) if name in _TRAINED else decide()


def _may_skip(name: str, config: JobConfig, run: RunFolder, force: bool) -> bool:
    return not force and is_current(name, config, run)


def _claim_checkpoints(name: str, config: JobConfig, run: RunFolder, resume: bool) -> bool:
    """Make the stage's checkpoints this job's own; whether training may go on from them.

    Raises:
        ConfigurationError: it is to go on from checkpoints of another job.
    """
    checkpoints = run.checkpoints_of(name)
    belongs_to = checkpoints / "job.json"
    inputs = _inputs(name, config, run)
    if belongs_to.is_file() and resume:
        changed = _changes(read_json(belongs_to), inputs)
        if changed and not run.stamp(name).is_file() and has_whole_checkpoint(checkpoints):
            listed = "\n".join(f"  {change}" for change in changed)
            raise ConfigurationError(
                f"The checkpoints in {checkpoints} belong to another job, which was not finished:\n{listed}\n"
                f"Set this back to go on from them, or start over: `distillabse {name}` without --resume, or "
                "`distillabse run --force`."
            )
        resume = not changed
    if checkpoints.is_dir() and not (resume and belongs_to.is_file()):
        shutil.rmtree(checkpoints)
    run.stamp(name).unlink(missing_ok=True)
    write_json(belongs_to, inputs)
    return resume


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the inputs of two jobs, a line for each key, apart from what may change on the way."""
    before, after = dict(_leaves(earlier)), dict(_leaves(now))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in sorted(keys)
        if not _may_change(key.removeprefix("assistant.").removeprefix("export.quantization.training."))
    ]


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted key."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _inputs(name: str, config: JobConfig, run: RunFolder) -> dict[str, Any]:
    """Everything a stage reads: its blocks of the configuration, the stages before it, and this package."""
    values = config.model_dump(mode="json")
    before = {f"{needed} (finished)": read_json(run.stamp(needed))["finished"] for needed in _before(name, config)}
    return {**{key: _at(values, key) for key in STAGES[name].reads}, **before, "distillabse": version("distillabse")}


def _at(values: dict[str, Any], key: str) -> Any:
    """The value at a dotted key of nested mappings."""
    return reduce(lambda inner, name: inner[name], key.split("."), values)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
