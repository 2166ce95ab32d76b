"""Training a student on a teacher, all in memory: what the stages, the tests and the benchmarks call."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse import layout, processes
from distillabse.config import JobConfig, TrainingConfig
from distillabse.errors import ConfigurationError, InputError, Interrupted
from distillabse.evaluation.fidelity import cosine_and_skill
from distillabse.models.teacher import transformer_of
from distillabse.training.cache import TeacherCache, cache_identity, teacher_cache
from distillabse.training.checkpoints import checkpoint_step
from distillabse.training.cpu import fast_on_cpu
from distillabse.training.data import TokenisedSentences
from distillabse.training.deepspeed import announce_checkpoint
from distillabse.training.distiller import Distiller
from distillabse.training.pairs import TranslationPairs
from distillabse.training.static_warmup import warm_up_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from transformers import TrainingArguments

    from distillabse.quantization.fake import FakeQuantization


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


def distill(
    config: TrainingConfig,
    teacher: SentenceTransformer,
    student: SentenceTransformer,
    sentences: TokenisedSentences | TranslationPairs,
    held_out: Callable[[SentenceTransformer], dict[str, float]] | None,
    arguments: TrainingArguments,
    checkpoint: str | None = None,
    reduction: NDArray[np.float32] | None = None,
    quantization: FakeQuantization | None = None,
) -> dict[str, Any]:
    """Train `student` on `teacher`; returns the history of the run. All processes of a job call this.

    Of a pair the history counts both sentences.

    Args:
        config: objectives, teacher cache, early stopping.
        teacher: what it learns from; same tokenizer but for pairs.
        student: trained in place; in evaluation mode afterwards. Under DeepSpeed only the main process has it whole.
        sentences: what to train on; pairs for objectives that compare pairs.
        held_out: figures of the student at every evaluation, as from `held_out_fidelity`; the main process needs it.
        arguments: of the Trainer.
        checkpoint: folder to go on from.
        reduction: where the student's vectors are narrower; see `Distiller`.
        quantization: how the student is rounded in training; its scales are trained with it.

    Raises:
        TrainingError: the loss stopped being a number, or another process is gone.
        Interrupted: a signal asked to stop; a checkpoint was saved.
    """
    from transformers import EarlyStoppingCallback

    from distillabse.training.trainer import DistillationTrainer

    copied = None
    if arguments.deepspeed:
        announce_checkpoint(arguments, checkpoint)
        copied = copy.deepcopy(student).cpu() if processes.is_main() else None
    distiller = Distiller(student, teacher, config.objectives, reduction, quantization)
    callbacks: list[Any] = []
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping.patience, config.early_stopping.threshold))
    started = time.monotonic()
    read = sentences.teacher if isinstance(sentences, TranslationPairs) else sentences
    cache = _teacher_cache(config, distiller, read, arguments) if config.teacher_cache else None
    if config.static_warmup is not None and cache is not None and checkpoint is None:
        warm_up_table(student, sentences, cache, config.static_warmup, arguments.seed, arguments.device)
        if copied is not None:
            copied.load_state_dict(student.state_dict())
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
    sides = 2 if isinstance(sentences, TranslationPairs) else 1
    trained = sides * (trainer.state.global_step - earlier) * trainer.topology.sentences_per_step
    student.eval()
    return {
        "log": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "training_seconds": round(seconds, 1),
        "sentences": sides * len(sentences),
        "pairs": len(sentences) if sides == 2 else None,
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

    def fill() -> None:
        loaded_from = transformer_of(distiller.teacher).config
        revision = getattr(loaded_from, "_commit_hash", None)
        identity = cache_identity(distiller, sentences, arguments.bf16, str(loaded_from._name_or_path), revision)
        teacher_cache(distiller, sentences, folder, identity, arguments.device, replace=shared is None)

    processes.agreed(fill)
    if not folder.is_dir():
        raise InputError(
            f"Process {processes.rank()} does not see the teacher cache in {folder}. All nodes must share it: set "
            "teacher_cache, or `output`, to a place on a shared file system."
        )
    return TeacherCache(folder, sentences.starts)


def held_out_fidelity(
    teacher: SentenceTransformer, texts: Sequence[str], known: Sequence[str] | None = None
) -> Callable[[SentenceTransformer], dict[str, float]]:
    """A function that gives a student's mean cosine and skill on `texts`; the teacher encodes them once, now.

    Args:
        teacher: gives the vectors to compare with.
        texts: what the student reads.
        known: what the teacher reads in place of each, where it does not know every language.
    """
    if len(texts) < 2:
        raise ConfigurationError("The dev split is too small to measure held-out fidelity: raise corpus.split.dev.")
    targets = teacher.encode(list(known or texts), batch_size=64, show_progress_bar=False)

    def measure(student: SentenceTransformer) -> dict[str, float]:
        return cosine_and_skill(targets, student.encode(list(texts), batch_size=64, show_progress_bar=False))

    return measure
