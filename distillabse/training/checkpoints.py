"""Checkpoints that are whole or do not count, and which one training goes on from.

A checkpoint is a student folder beside the state of optimizer, schedule and random numbers. It counts once its list
of checksums is there, which is written last: whatever a killed process, a full disk or a failing one leaves behind is
never taken for one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from distillabse import layout
from distillabse.checksums import broken_checksums, write_checksums
from distillabse.errors import ConfigurationError, InputError
from distillabse.storage import read_json, write_json

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_DAMAGED = "damaged-"


@dataclass(frozen=True)
class Topology:
    """How the steps of a training are shared out.

    Attributes:
        processes: how many train together.
        sentences_per_step: of one optimizer step, over all processes and accumulated batches.
        zero_stage: DeepSpeed's, 0 to 3; None without DeepSpeed.
    """

    processes: int
    sentences_per_step: int
    zero_stage: int | None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies among the others in `folder`."""
    return folder / f"checkpoint-{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was trained.

    Raises:
        InputError: the folder does not have a checkpoint's name.
    """
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise InputError(f"{checkpoint} is not named checkpoint-<step>. Give a folder that training wrote.")
    return int(match[1])


def commit_checkpoint(checkpoint: Path, topology: Topology) -> None:
    """Make what is in the folder a checkpoint; all processes must have written their part.

    Files reach the disk before the list of checksums does, so that neither a killed process nor a lost node leaves a
    list of files that are not there.
    """
    write_json(checkpoint / layout.TOPOLOGY, asdict(topology))
    for path in checkpoint.rglob("*"):
        _to_disk(path)
    write_checksums(checkpoint)
    for path in (checkpoint / layout.CHECKSUMS, checkpoint, checkpoint.parent):
        _to_disk(path)


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that was not finished or has been damaged since.

    Raises:
        InputError: names what is missing or differs.
    """
    if broken := broken_checksums(checkpoint):
        why = "was never finished" if broken == [layout.CHECKSUMS] else f"is damaged ({_listed(broken)})"
        raise InputError(f"{checkpoint} {why}. Give another checkpoint of the same folder.")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none.

    Unfinished ones are removed. Damaged ones are set aside under another name, and said to be.
    """
    for checkpoint in _by_age(folder):
        if not (checkpoint / layout.CHECKSUMS).is_file():
            shutil.rmtree(checkpoint)
            continue
        broken = broken_checksums(checkpoint)
        if not broken:
            return checkpoint
        aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        logger.warning("%s is damaged (%s): it is now %s, and not used", checkpoint, _listed(broken), aside.name)
    return None


def has_whole_checkpoint(folder: Path) -> bool:
    """Whether there is something to go on from; nothing is removed."""
    return any(not broken_checksums(checkpoint) for checkpoint in _by_age(folder))


def remove_older_checkpoints(folder: Path, keep: int | None, best_step: int | None) -> None:
    """Keep the newest and the best ones, `keep` in all; None keeps every one.

    Args:
        folder: of the checkpoints.
        keep: as `TrainingArguments.save_total_limit`; with 1, the newest and the best stay, which may be two.
        best_step: step of the checkpoint with the best held-out figure, if there was one.
    """
    by_age = list(_by_age(folder))
    best_first = sorted(by_age, key=lambda checkpoint: checkpoint_step(checkpoint) != best_step)
    for checkpoint in best_first[keep:] if keep else []:
        if checkpoint != by_age[0]:
            shutil.rmtree(checkpoint)


def require_same_steps(checkpoint: Path, topology: Topology) -> Topology:
    """What a checkpoint was trained with, if this job can go on from it.

    Raises:
        ConfigurationError: a step has another number of sentences now, or DeepSpeed another stage.
    """
    earlier = Topology(**read_json(checkpoint / layout.TOPOLOGY))
    if earlier.sentences_per_step != topology.sentences_per_step:
        raise ConfigurationError(
            f"{checkpoint} was trained with {earlier.sentences_per_step} sentences a step on {earlier.processes} "
            f"process(es), and this job has {topology.sentences_per_step} on {topology.processes}. Set "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps so that processes x batch "
            f"size x accumulation is {earlier.sentences_per_step} again, or start over without --resume."
        )
    if earlier.zero_stage != topology.zero_stage:
        raise ConfigurationError(
            f"{checkpoint} was trained with {_stage_name(earlier.zero_stage)}, and training.deepspeed says "
            f"{_stage_name(topology.zero_stage)}: optimizer states are kept differently. Set it back, or start over "
            "without --resume."
        )
    return earlier


def _stage_name(stage: int | None) -> str:
    return "plain data parallel training" if stage is None else f"ZeRO stage {stage}"


def _by_age(folder: Path) -> Iterator[Path]:
    """The checkpoints of a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return iter(sorted(found, key=checkpoint_step, reverse=True))


def _listed(files: list[str]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(files[:3]) + more


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
