"""The assistant and distill stages: from corpus and teacher to a student folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse.config import JobConfig, TeacherConfig, TeacherStudentConfig, TrainedStudentConfig, TrainingConfig
from distillabse.corpus.records import read_records, sentences
from distillabse.errors import ConfigurationError
from distillabse.evaluation.fidelity import cosine_and_skill
from distillabse.layout import RunFolder
from distillabse.models.folder import save_encoder
from distillabse.models.reduction import fit_reduction, load_reduction, reduced, save_reduction
from distillabse.models.student import build_student, with_unit_vectors
from distillabse.models.teacher import load_teacher, training_teacher
from distillabse.storage import new_folder, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def assistant_stage(config: JobConfig, run: RunFolder, resume: bool = False) -> None:
    """Train the teacher assistant of `config` and write `run.assistant`, whole or not at all; see `distill_stage`."""
    from distillabse.settings import training_arguments

    job = config.of_assistant()
    arguments = training_arguments(job, run.assistant_checkpoints)
    _train(job, run, training_teacher(job, run, str(arguments.device)), None, run.assistant, arguments, resume)


def distill_stage(config: JobConfig, run: RunFolder, resume: bool = False) -> None:
    """Train the student of `config` on the run's corpus and write `run.student`, whole or not at all.

    It learns from the teacher with the job's vocabulary, or from the assistant, if there is one. With student.kind:
    teacher that teacher itself is written.

    Args:
        config: the job.
        run: its folder; the corpus and vocabulary stages must have run, and the assistant's, if there is one.
        resume: go on from the newest checkpoint, if there is one.

    Raises:
        ConfigurationError: teacher, student and objectives do not fit together.
        TrainingError: the loss stopped being a number.
    """
    from distillabse.settings import training_arguments

    if isinstance(config.student, TeacherStudentConfig):
        with new_folder(run.student) as folder:
            save_encoder(with_unit_vectors(training_teacher(config, run)), folder)
        logger.info("The teacher, untrained, written to %s", run.student)
        return
    arguments = training_arguments(config, run.checkpoints)
    device = str(arguments.device)
    if config.assistant is None:
        teacher, reduction = training_teacher(config, run, device), None
    else:
        assistant = TeacherConfig(model=str(run.assistant))
        teacher, reduction = load_teacher(assistant, device), load_reduction(run.assistant)
    _train(config, run, teacher, reduction, run.student, arguments, resume)


def _train(
    config: JobConfig,
    run: RunFolder,
    teacher: SentenceTransformer,
    reduction: NDArray[np.float32] | None,
    product: Path,
    arguments: TrainingArguments,
    resume: bool,
) -> None:
    """Train `config.student` on `teacher`, whose vectors are the original teacher's through `reduction`, if any."""
    from transformers.trainer_utils import get_last_checkpoint

    assert isinstance(config.student, TrainedStudentConfig)
    train = [sentence.text for sentence in sentences(read_records(run.split("train")))]
    dev = [sentence.text for sentence in sentences(read_records(run.split("dev")))]
    checkpoints = Path(str(arguments.output_dir))
    checkpoint = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if resume:
        logger.info("Resuming from %s", checkpoint or "the start: there is no checkpoint yet")
    student = build_student(teacher, config.student, np.load(run.token_counts, allow_pickle=False))
    # Fidelity is always to the original teacher, whatever the student learns from.
    is_original = config.vocabulary.kind == "keep" and config.assistant is None
    original = teacher if is_original else load_teacher(config.teacher, str(teacher.device))
    dimension = student.get_embedding_dimension()
    if dimension < teacher.get_embedding_dimension():
        own = fit_reduction(teacher, train, dimension)
        teacher, reduction = reduced(teacher, own), own if reduction is None else reduction @ own
    measure = held_out_fidelity(original if reduction is None else reduced(original, reduction), dev)
    del original  # it may be many times as large as the one that teaches
    history = distill(config, teacher, student, train, measure, arguments, checkpoint)
    with new_folder(product) as folder:
        save_encoder(student, folder)
        if reduction is not None:
            save_reduction(reduction, folder)
        write_json(folder / run.training_history.name, history)
    logger.info("Student written to %s", product)


def distill(
    config: TrainingConfig,
    teacher: SentenceTransformer,
    student: SentenceTransformer,
    train: Sequence[str],
    held_out: Callable[[SentenceTransformer], dict[str, float]],
    arguments: TrainingArguments,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Train `student` on `teacher`; returns the history of the run.

    Args:
        config: objectives, teacher cache, early stopping.
        teacher: what it learns from; same tokenizer and dimension.
        student: trained in place; in evaluation mode afterwards.
        train: sentences.
        held_out: figures of the student at every evaluation, as from `held_out_fidelity`.
        arguments: of the Trainer.
        checkpoint: folder to go on from.
    """
    from transformers import EarlyStoppingCallback

    from distillabse.training.cache import build_cache
    from distillabse.training.data import training_dataset
    from distillabse.training.distiller import Distiller
    from distillabse.training.trainer import DistillationTrainer

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
        trainer = DistillationTrainer(distiller, arguments, sentences, held_out, callbacks, cache)
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    earlier = int(Path(checkpoint).name.rsplit("-", 1)[1]) if checkpoint else 0
    trained = (trainer.state.global_step - earlier) * arguments.train_batch_size * arguments.gradient_accumulation_steps
    student.eval()
    return {
        "log": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "training_seconds": round(seconds, 1),
        "sentences": len(train),
        "sentences_per_second": round(trained * arguments.world_size / seconds, 1),
        "device": str(arguments.device),
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        "resumed_from": Path(checkpoint).name if checkpoint else None,
    }


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
