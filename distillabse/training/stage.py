"""The assistant and distill stages: from corpus and teacher to a student folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distillabse import layout, processes
from distillabse.config import (
    JobConfig,
    TeacherConfig,
    TeacherStudentConfig,
    TrainedStudentConfig,
    learn_from_pairs,
    need_equal_dimensions,
    need_links,
    need_teacher_of_translations,
)
from distillabse.corpus.records import iterate_records, known_texts, read_records, sentences, training_texts
from distillabse.errors import InputError
from distillabse.layout import RunFolder
from distillabse.models.folder import save_encoder
from distillabse.models.reduction import (
    REDUCTION_SAMPLE,
    chained,
    fit_reduction,
    load_reduction,
    reduced,
    save_reduction,
)
from distillabse.models.student import build_student, take_weights, with_unit_vectors
from distillabse.models.teacher import base_encoder, load_encoder, load_teacher, training_teacher
from distillabse.storage import new_folder, remove_folder, remove_leftovers, write_json
from distillabse.training.checkpoints import newest_checkpoint, require_same_steps
from distillabse.training.data import TokenisedSentences, tokenise_corpus
from distillabse.training.deepspeed import universal_checkpoint
from distillabse.training.distillation import distill, held_out_fidelity, trainer_arguments
from distillabse.training.pairs import TranslationPairs, prepare_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def assistant_stage(config: JobConfig, run: RunFolder, resume: bool = False) -> None:
    """Train the teacher assistant of `config` and write `run.assistant`, whole or not at all; see `distill_stage`."""
    job = config.of_assistant()
    arguments = trainer_arguments(job, run.assistant_checkpoints)
    teacher = training_teacher(job, run, str(arguments.device))
    _train(job, run, teacher, None, run.assistant, arguments, resume)


def distill_stage(config: JobConfig, run: RunFolder, resume: bool = False) -> None:
    """Train the student of `config` on the run's corpus and write `run.student`, whole or not at all.

    It learns from the teacher with the job's vocabulary, or from the assistant, if there is one. With student.kind:
    teacher that teacher itself is written. All processes of a job call this; the main one writes.

    Args:
        config: the job.
        run: its folder, the same for all processes; the corpus and vocabulary stages must have run, and the
            assistant's, if there is one.
        resume: go on from the newest whole checkpoint, if there is one.

    Raises:
        ConfigurationError: teacher, student and objectives do not fit together, or a checkpoint cannot be gone on from.
        TrainingError: the loss stopped being a number, or another process is gone.
        Interrupted: a signal asked to stop; a checkpoint was saved.
    """
    if isinstance(config.student, TeacherStudentConfig):
        if processes.is_main():
            with new_folder(run.student) as folder:
                save_encoder(with_unit_vectors(training_teacher(config, run)), folder)
            logger.info("The teacher, untrained, written to %s", run.student)
        return
    arguments = trainer_arguments(config, run.checkpoints)
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
    assert isinstance(config.student, TrainedStudentConfig)
    checkpoints = Path(str(arguments.output_dir))
    checkpoint = checkpoint_to_resume(checkpoints, arguments) if resume else None
    require_shared(checkpoints)
    base = teacher if config.shares_tokenizer else base_encoder(config, run, str(arguments.device))
    counts = np.load(run.token_counts, allow_pickle=False)
    student = build_student(base, config.student, counts, teacher.get_embedding_dimension())
    del base
    if config.student.continue_from is not None:
        take_weights(student, load_encoder(str(config.student.continue_from), device=str(arguments.device)))
    dimension = student.get_embedding_dimension()
    own = None
    if dimension < teacher.get_embedding_dimension():
        own = _fitted_reduction(config, run, teacher, dimension, checkpoints)
        reduction = chained(reduction, own)
    measure = None
    if processes.is_main():
        # Fidelity is always to the original teacher, whatever the student learns from.
        is_original = config.assistant is None and not (config.shares_tokenizer and config.vocabulary.kind == "trim")
        original = teacher if is_original else load_teacher(config.teacher, str(teacher.device))
        measured = original if reduction is None else reduced(original, reduction)
        dev = sentences(read_records(run.split("dev")))
        known = known_texts(dev, config.teacher.languages)
        measure = held_out_fidelity(measured, [sentence.text for sentence in dev], known)
        del original, measured  # may be many times as large as the one that teaches
    if own is not None and need_equal_dimensions(config.objectives):
        teacher, own = reduced(teacher, own), None
    data = checkpoints / layout.TRAINING_DATA
    processes.agreed(lambda: _prepare_data(config, run, student, teacher, data))
    opened = TranslationPairs.open(data) if learn_from_pairs(config.objectives) else TokenisedSentences.open(data)
    start = str(checkpoint) if checkpoint else None
    history = distill(config, teacher, student, opened, measure, arguments, start, own)
    if not processes.is_main():
        return
    with new_folder(product) as folder:
        save_encoder(student, folder)
        if reduction is not None:
            save_reduction(reduction, folder)
        write_json(folder / run.training_history.name, history)
    for working_area in (data, checkpoints / layout.TEACHER_CACHE, checkpoints / layout.UNIVERSAL_CHECKPOINT):
        # At once: what is half removed would be half there for a job that is killed now and started again.
        remove_folder(working_area)
        remove_leftovers(working_area)
    logger.info("Student written to %s", product)


def checkpoint_reduction(config: JobConfig, run: RunFolder, checkpoint: Path) -> NDArray[np.float32] | None:
    """The matrix from the original teacher's vectors to those of the student in a checkpoint, if they are narrower."""
    of_assistant = None if config.assistant is None else load_reduction(run.assistant)
    return chained(of_assistant, load_reduction(checkpoint.parent))


def _fitted_reduction(
    config: JobConfig, run: RunFolder, teacher: SentenceTransformer, dimension: int, checkpoints: Path
) -> NDArray[np.float32]:
    """Fitted once, by the main process: a resumed training, and every other process, has the same targets.

    A student that is trained on keeps the one that it was trained with.
    """
    assert isinstance(config.student, TrainedStudentConfig)
    earlier = config.student.continue_from

    def fit() -> None:
        if load_reduction(checkpoints) is None:
            if earlier is not None and (its_own := load_reduction(earlier)) is not None:
                save_reduction(its_own, checkpoints)
                return
            if learn_from_pairs(config.objectives):  # their sources are what the teacher knows
                known: Iterator[str] = (record.text for record in iterate_records(run.split("train")))
            else:
                known = training_texts(run.split("train"), distinct=not config.corpus.streaming)
            texts = list(islice(known, REDUCTION_SAMPLE))
            save_reduction(fit_reduction(teacher, texts, dimension), checkpoints)

    processes.agreed(fit)
    fitted = load_reduction(checkpoints)
    assert fitted is not None
    return fitted


def _prepare_data(
    config: JobConfig, run: RunFolder, student: SentenceTransformer, teacher: SentenceTransformer, folder: Path
) -> None:
    """Token ids of the training split, once for all processes and all parts of an interrupted training."""
    remove_leftovers(folder)
    if folder.is_dir():
        return
    split, distinct = run.split("train"), not config.corpus.streaming
    if learn_from_pairs(config.objectives):
        prepare_pairs(
            student,
            teacher,
            lambda: iterate_records(split),
            folder,
            need_teacher_of_translations(config.objectives),
            config.teacher.languages,
            distinct,
            config.aligner if need_links(config.objectives) else None,
        )
    else:
        tokenise_corpus(student, training_texts(split, distinct), folder)


def require_shared(checkpoints: Path) -> None:
    """Refuse to go on where this process does not see the folder of checkpoints.

    Raises:
        InputError: it is not there.
    """
    if not checkpoints.is_dir():
        raise InputError(
            f"Process {processes.rank()} does not see {checkpoints}, which the main process made. All nodes must share "
            "the run folder: set `output` to a place on a shared file system."
        )


def checkpoint_to_resume(checkpoints: Path, arguments: TrainingArguments) -> Path | None:
    """The newest whole checkpoint, in a form that as many processes as there are now can load."""
    from distillabse.training.trainer import topology_of

    topology = topology_of(arguments)

    def choose() -> str | None:
        checkpoint = newest_checkpoint(checkpoints)
        logger.info("Resuming from %s", checkpoint or "the start: there is no checkpoint yet")
        if checkpoint is None:
            return None
        earlier = require_same_steps(checkpoint, topology)
        if topology.zero_stage is not None and earlier.processes != topology.processes:
            logger.info("Converting it from %d to %d processes", earlier.processes, topology.processes)
            checkpoint = universal_checkpoint(checkpoint, checkpoints / layout.UNIVERSAL_CHECKPOINT)
        return str(checkpoint)

    chosen = processes.agreed(choose)
    return Path(chosen) if chosen else None
