"""The assistant and distill stages: from corpus and teacher to a student folder."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse import layout, processes
from distillabse.config import JobConfig, TeacherConfig, TeacherStudentConfig, TrainedStudentConfig, TrainingConfig
from distillabse.corpus.records import read_records, sentences, training_texts
from distillabse.errors import ConfigurationError, InputError, Interrupted
from distillabse.evaluation.fidelity import cosine_and_skill
from distillabse.layout import RunFolder
from distillabse.models.folder import save_encoder
from distillabse.models.reduction import REDUCTION_SAMPLE, fit_reduction, load_reduction, reduced, save_reduction
from distillabse.models.student import build_student, with_unit_vectors
from distillabse.models.teacher import load_teacher, training_teacher, transformer_of
from distillabse.storage import new_folder, remove_folder, remove_leftovers, write_json
from distillabse.training.cache import TeacherCache, cache_identity, open_cache, teacher_cache
from distillabse.training.checkpoints import checkpoint_step, newest_checkpoint, require_same_steps
from distillabse.training.data import TokenisedSentences, tokenise_corpus
from distillabse.training.deepspeed import announce_checkpoint, universal_checkpoint
from distillabse.training.distiller import Distiller

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


def trainer_arguments(config: JobConfig, checkpoints: Path) -> TrainingArguments:
    """The training block as TrainingArguments, in a state in which encoders load whole; see `training_arguments`.

    Random numbers begin at the job's seed: even weights that nothing reads, such as BERT's pooler, come out the same.
    """
    from transformers import set_seed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from distillabse.settings import training_arguments

    arguments = training_arguments(config, checkpoints)
    set_seed(arguments.seed)
    # With stage 3 transformers would split models while it loads them, and a student is built from whole weights.
    unset_hf_deepspeed_config()
    return arguments


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
    checkpoint = _checkpoint_to_resume(checkpoints, arguments) if resume else None
    if not checkpoints.is_dir():
        raise InputError(
            f"Process {processes.rank()} does not see {checkpoints}, which the main process made. All nodes must share "
            "the run folder: set `output` to a place on a shared file system."
        )
    student = build_student(teacher, config.student, np.load(run.token_counts, allow_pickle=False))
    dimension = student.get_embedding_dimension()
    own = None
    if dimension < teacher.get_embedding_dimension():
        own = _fitted_reduction(config, run, teacher, dimension, checkpoints)
        reduction = own if reduction is None else reduction @ own
    measure = None
    if processes.is_main():
        # Fidelity is always to the original teacher, whatever the student learns from.
        is_original = config.vocabulary.kind == "keep" and config.assistant is None
        original = teacher if is_original else load_teacher(config.teacher, str(teacher.device))
        measured = original if reduction is None else reduced(original, reduction)
        dev = [sentence.text for sentence in sentences(read_records(run.split("dev")))]
        measure = held_out_fidelity(measured, dev)
        del original, measured  # may be many times as large as the one that teaches
    if own is not None:
        teacher = reduced(teacher, own)
    data = checkpoints / layout.TRAINING_DATA
    processes.agreed(lambda: _prepare_data(config, run, student, data))
    history = distill(
        config, teacher, student, TokenisedSentences.open(data), measure, arguments,
        str(checkpoint) if checkpoint else None,
    )  # fmt: skip
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
    own = load_reduction(checkpoint.parent)
    earlier = load_reduction(run.assistant) if config.assistant is not None else None
    return earlier @ own if earlier is not None and own is not None else own if earlier is None else earlier


def _fitted_reduction(
    config: JobConfig, run: RunFolder, teacher: SentenceTransformer, dimension: int, checkpoints: Path
) -> NDArray[np.float32]:
    """Fitted once, by the main process: a resumed training, and every other process, has the same targets."""

    def fit() -> None:
        if load_reduction(checkpoints) is None:
            texts = list(islice(_texts(config, run), REDUCTION_SAMPLE))
            save_reduction(fit_reduction(teacher, texts, dimension), checkpoints)

    processes.agreed(fit)
    fitted = load_reduction(checkpoints)
    assert fitted is not None
    return fitted


def _texts(config: JobConfig, run: RunFolder) -> Iterator[str]:
    return training_texts(run.split("train"), distinct=not config.corpus.streaming)


def _prepare_data(config: JobConfig, run: RunFolder, student: SentenceTransformer, folder: Path) -> None:
    """Token ids of the training split, once for all processes and all parts of an interrupted training."""
    remove_leftovers(folder)
    if not folder.is_dir():
        tokenise_corpus(student, _texts(config, run), folder)


def _checkpoint_to_resume(checkpoints: Path, arguments: TrainingArguments) -> Path | None:
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


def distill(
    config: TrainingConfig,
    teacher: SentenceTransformer,
    student: SentenceTransformer,
    sentences: TokenisedSentences,
    held_out: Callable[[SentenceTransformer], dict[str, float]] | None,
    arguments: TrainingArguments,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Train `student` on `teacher`; returns the history of the run. All processes of a job call this.

    Args:
        config: objectives, teacher cache, early stopping.
        teacher: what it learns from; same tokenizer and dimension.
        student: trained in place; in evaluation mode afterwards. Under DeepSpeed only the main process has it whole.
        sentences: what to train on.
        held_out: figures of the student at every evaluation, as from `held_out_fidelity`; the main process needs it.
        arguments: of the Trainer.
        checkpoint: folder to go on from.

    Raises:
        TrainingError: the loss stopped being a number, or another process is gone.
        Interrupted: a signal asked to stop; a checkpoint was saved.
    """
    from transformers import EarlyStoppingCallback

    from distillabse.training.cpu import fast_on_cpu
    from distillabse.training.trainer import DistillationTrainer

    copied = None
    if arguments.deepspeed:
        announce_checkpoint(arguments, checkpoint)
        copied = copy.deepcopy(student).cpu() if processes.is_main() else None
    distiller = Distiller(student, teacher, config.objectives)
    callbacks: list[Any] = []
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping.patience, config.early_stopping.threshold))
    started = time.monotonic()
    cache = _teacher_cache(config, distiller, sentences, arguments) if config.teacher_cache else None
    if config.shard_teacher:
        distiller.shard_teacher(arguments.hf_deepspeed_config.config)
    trainer = DistillationTrainer(distiller, arguments, sentences, held_out, callbacks, cache, copied)
    with fast_on_cpu(student, arguments):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    if trainer.stop.requested:
        raise Interrupted(
            f"Stopped by a signal after step {trainer.state.global_step}; its checkpoint is in "
            f"{arguments.output_dir}. The same command with --resume, or `distillabse run`, goes on from there."
        )
    trainer.take_trained_weights()
    earlier = checkpoint_step(Path(checkpoint)) if checkpoint else 0
    trained = (trainer.state.global_step - earlier) * trainer.topology.sentences_per_step
    student.eval()
    return {
        "log": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "training_seconds": round(seconds, 1),
        "sentences": len(sentences),
        "sentences_per_second": round(trained / seconds, 1),
        "device": str(arguments.device),
        "processes": trainer.topology.processes,
        "zero_stage": trainer.topology.zero_stage,
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        "resumed_from": Path(checkpoint).name if checkpoint else None,
    }


def _teacher_cache(
    config: TrainingConfig, distiller: Distiller, sentences: TokenisedSentences, arguments: TrainingArguments
) -> TeacherCache:
    """The teacher's signals: from a cache that is there, else the main process makes one for all."""
    own = Path(str(arguments.output_dir)) / layout.TEACHER_CACHE
    shared = config.teacher_cache.expanduser() if isinstance(config.teacher_cache, Path) else None
    folder = shared or own
    loaded_from = transformer_of(distiller.teacher).config
    identity = cache_identity(
        distiller, sentences, arguments.bf16, str(loaded_from._name_or_path), getattr(loaded_from, "_commit_hash", None)
    )

    def fill() -> None:
        teacher_cache(distiller, sentences, folder, identity, arguments.device, replace=shared is None)

    processes.agreed(fill)
    cache = open_cache(sentences, folder, identity, verify=False)
    if cache is None:
        raise InputError(
            f"Process {processes.rank()} does not see the teacher cache in {folder}. All nodes must share it: set "
            "teacher_cache, or `output`, to a place on a shared file system."
        )
    return cache


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
