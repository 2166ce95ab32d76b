"""The distill stage: from corpus and teacher to a student folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse.config import JobConfig
from distillabse.corpus.records import read_records, sentences
from distillabse.errors import ConfigurationError
from distillabse.evaluation.fidelity import cosine_and_skill
from distillabse.layout import RunFolder
from distillabse.models.folder import save_encoder
from distillabse.models.student import build_student
from distillabse.models.teacher import load_teacher
from distillabse.storage import new_folder, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def distill_stage(config: JobConfig, run: RunFolder, resume: bool = False) -> None:
    """Train the student of `config` on the run's corpus and write `run.student`, whole or not at all.

    Args:
        config: the job.
        run: its folder; the corpus stage must have run.
        resume: go on from the newest checkpoint, if there is one.

    Raises:
        ConfigurationError: teacher, student and objectives do not fit together.
        TrainingError: the loss stopped being a number.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from distillabse.settings import training_arguments

    train = [sentence.text for sentence in sentences(read_records(run.split("train")))]
    dev = [sentence.text for sentence in sentences(read_records(run.split("dev")))]
    arguments = training_arguments(config, run.checkpoints)
    teacher = load_teacher(config.teacher, device=str(arguments.device))
    checkpoint = get_last_checkpoint(str(run.checkpoints)) if resume and run.checkpoints.is_dir() else None
    if resume:
        logger.info("Resuming from %s", checkpoint or "the start: there is no checkpoint yet")
    student, history = distill(config, teacher, train, dev, arguments, checkpoint)
    with new_folder(run.student) as folder:
        save_encoder(student, folder)
        write_json(folder / run.training_history.name, history)
    logger.info("Student written to %s", run.student)


def distill(
    config: JobConfig,
    teacher: SentenceTransformer,
    train: Sequence[str],
    dev: Sequence[str],
    arguments: TrainingArguments,
    checkpoint: str | None = None,
) -> tuple[SentenceTransformer, dict[str, Any]]:
    """Train a student of `teacher`; returns it with the history of the run."""
    from transformers import EarlyStoppingCallback

    from distillabse.training.cache import build_cache
    from distillabse.training.data import training_dataset
    from distillabse.training.distiller import Distiller
    from distillabse.training.trainer import DistillationTrainer

    student = build_student(teacher, config.student)
    distiller = Distiller(student, teacher, config.objectives)
    callbacks: list[Any] = []
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping.patience, config.early_stopping.threshold))
    sentences = training_dataset(student, train)
    started = time.monotonic()
    with _cache_folder(arguments) as folder:
        cache = None
        if config.teacher_cache:
            cache = build_cache(distiller, sentences, folder, arguments.device, arguments.bf16)
        trainer = DistillationTrainer(
            distiller, arguments, sentences, held_out_fidelity(teacher, dev), callbacks, cache
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    trained = trainer.state.global_step * arguments.train_batch_size * arguments.gradient_accumulation_steps
    history = {
        "log": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "training_seconds": round(seconds, 1),
        "sentences": len(train),
        "sentences_per_second": round(trained * arguments.world_size / seconds, 1),
        "device": str(arguments.device),
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        "resumed_from": Path(checkpoint).name if checkpoint else None,
    }
    return student.eval(), history


@contextmanager
def _cache_folder(arguments: TrainingArguments) -> Iterator[Path]:
    """An empty folder beside the checkpoints, removed afterwards and, if a killed run left it behind, before."""
    folder = Path(arguments.output_dir) / "teacher-cache"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def held_out_fidelity(
    teacher: SentenceTransformer, texts: Sequence[str]
) -> Callable[[SentenceTransformer], dict[str, float]]:
    """A function that gives a student's mean cosine and skill on `texts`; the teacher encodes them once, now."""
    if len(texts) < 2:
        raise ConfigurationError("The dev split is too small to measure held-out fidelity: raise corpus.split.dev.")
    targets = teacher.encode(list(texts), batch_size=64, show_progress_bar=False)

    def measure(student: SentenceTransformer) -> dict[str, float]:
        return cosine_and_skill(targets, student.encode(list(texts), batch_size=64, show_progress_bar=False))

    return measure
