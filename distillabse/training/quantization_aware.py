"""Quantisation-aware distillation: a last training in which the student is rounded as its INT8 graph will be.

It starts from the post-training form of the student (`distillabse.quantization.calibrate`), and learns weights and
scales together: what comes out is an encoder and its quantised layers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse import layout, processes
from distillabse.config import JobConfig, TrainingConfig
from distillabse.corpus.records import read_records, sentences, training_texts
from distillabse.errors import ConfigurationError
from distillabse.layout import RunFolder
from distillabse.models.folder import save_encoder
from distillabse.models.reduction import load_reduction, reduced, save_reduction
from distillabse.models.student import freeze_pooler, set_dropout
from distillabse.models.switch import sparse_layers
from distillabse.models.teacher import load_encoder, training_teacher, transformer_of
from distillabse.quantization.calibration import calibrate
from distillabse.quantization.fake import FakeQuantization, take_weights
from distillabse.quantization.linears import QuantizedLinear, load_quantized_linears, save_quantized_linears
from distillabse.quantization.statistics import linear_layers, shared_inputs
from distillabse.quantization.texts import calibration_texts
from distillabse.storage import new_file, new_folder, remove_folder, remove_leftovers, write_json
from distillabse.training.data import TokenisedSentences, tokenise_corpus
from distillabse.training.distillation import distill, held_out_fidelity, trainer_arguments
from distillabse.training.stage import checkpoint_to_resume, require_shared

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def quantize_stage(config: JobConfig, run: RunFolder, resume: bool = False) -> None:
    """Train the run's student with rounding and write `run.quantized`, whole or not at all.

    All processes of a job call this; the main one calibrates, measures and writes.

    Args:
        config: the job, with `export.quantization.training`.
        run: its folder; the corpus, vocabulary and distill stages must have run.
        resume: go on from the newest whole checkpoint, if there is one.

    Raises:
        ConfigurationError: target, student and objectives do not fit, or a checkpoint cannot be gone on from.
        TrainingError, Interrupted: as `distill_stage`.
    """
    job, quantization = config.of_quantization(), config.export.quantization
    assert quantization.training is not None
    checkpoints = run.quantize_checkpoints
    arguments = trainer_arguments(job, checkpoints)
    checkpoint = checkpoint_to_resume(checkpoints, arguments) if resume else None
    require_shared(checkpoints)
    device = str(arguments.device)
    student, reduction = load_encoder(str(run.student), device=device).eval(), load_reduction(run.student)
    teacher = student
    if quantization.training.target == "teacher":
        teacher = training_teacher(config, run, device)
        teacher = teacher if reduction is None else reduced(teacher, reduction)
    largest = quantization.greatest_weight
    data, calibrated = checkpoints / layout.TRAINING_DATA, checkpoints / layout.CALIBRATED_LINEARS

    def prepare() -> None:
        remove_leftovers(data)
        if not data.is_dir():
            tokenise_corpus(student, training_texts(run.split("train"), not config.corpus.streaming), data)
        if not calibrated.is_file():
            logger.info("Calibrating scales")
            texts = calibration_texts(config, run)
            with new_file(calibrated) as temporary:
                save_quantized_linears(calibrate(student, texts, static=True, largest=largest), temporary)

    processes.agreed(prepare)
    measure = None
    if processes.is_main():
        measure = held_out_fidelity(teacher, [sentence.text for sentence in sentences(read_records(run.split("dev")))])
    trained, linears, history = quantization_aware_distill(
        job,
        teacher,
        student,
        load_quantized_linears(calibrated),
        TokenisedSentences.open(data),
        measure,
        arguments,
        str(checkpoint) if checkpoint else None,
        largest,
    )
    if not processes.is_main():
        return
    with new_folder(run.quantized) as folder:
        save_quantized_encoder(trained, linears, folder)
        if reduction is not None:
            save_reduction(reduction, folder)
        write_json(folder / run.training_history.name, history)
    for working_area in (data, checkpoints / layout.UNIVERSAL_CHECKPOINT):
        remove_folder(working_area)
        remove_leftovers(working_area)
    logger.info("Student with INT8 layers written to %s", run.quantized)


def quantization_aware_distill(
    config: TrainingConfig,
    teacher: SentenceTransformer,
    student: SentenceTransformer,
    calibrated: Mapping[str, QuantizedLinear],
    sentences: TokenisedSentences,
    held_out: Callable[[SentenceTransformer], dict[str, float]] | None,
    arguments: TrainingArguments,
    checkpoint: str | None = None,
    largest: int = 127,
) -> tuple[SentenceTransformer, dict[str, QuantizedLinear], dict[str, Any]]:
    """Train a copy of `student` with rounded weights and inputs; all processes of a job call this.

    The embedding table is not trained: rows that the text does not use would be left behind. Neither is there dropout:
    averages of values must stay averages, and a last phase needs none.

    Args:
        config: objectives and early stopping.
        teacher: what it learns from; `student` itself, to keep the vectors it has in fp32.
        student: what it starts from; not changed, except that as the teacher it is frozen.
        calibrated: its layers, from `calibrate(student, texts, static=True, largest=largest)`.
        sentences: what to train on.
        held_out: as in `distill`; measures the rounded student.
        arguments: of the Trainer.
        checkpoint: folder to go on from.
        largest: greatest weight, as in `calibrate`.

    Returns:
        The trained encoder, its quantised layers, and the history of `distill`. With its linear layers computed by
        the quantised ones (`quantized_forward`) the encoder gives the vectors that the INT8 graph gives.

    Raises:
        ConfigurationError: the layers have no constant scales, or the student is a mixture of experts.
        TrainingError, Interrupted: as `distill`.
    """
    trained = _prepared(student, calibrated)
    layers = linear_layers(trained)
    # BERT's unused pooler stays as it was calibrated.
    learning = {name: linear for name, linear in calibrated.items() if layers[name].weight.requires_grad}
    groups = [named for group in shared_inputs(trained) if (named := [name for name in group if name in learning])]
    quantization = FakeQuantization(learning, groups, largest)
    trained.train()
    history = distill(config, teacher, trained, sentences, held_out, arguments, checkpoint, quantization=quantization)
    return trained, {**calibrated, **quantization.linears(trained)}, history


def save_quantized_encoder(encoder: SentenceTransformer, linears: Mapping[str, QuantizedLinear], folder: Path) -> None:
    """Write what `quantization_aware_distill` made into `folder`."""
    save_encoder(encoder, folder)
    save_quantized_linears(dict(linears), folder / layout.QUANTIZED_LINEARS)
    (folder / layout.QUANTIZED_LINEARS).chmod(0o644)


def load_quantized_encoder(folder: Path) -> tuple[SentenceTransformer, dict[str, QuantizedLinear]]:
    """What `save_quantized_encoder` wrote."""
    return load_encoder(str(folder)), load_quantized_linears(folder / layout.QUANTIZED_LINEARS)


def _prepared(student: SentenceTransformer, calibrated: Mapping[str, QuantizedLinear]) -> SentenceTransformer:
    """A copy of the student that computes, as floats, with the weights that were calibrated."""
    model = transformer_of(student)
    if sparse_layers(model):
        raise ConfigurationError(
            "Quantisation-aware distillation is for dense students: the experts of a Switch student are no linear "
            "layers. Leave export.quantization.training out, or distil it into a dense student first."
        )
    trained = copy.deepcopy(student).requires_grad_(True)
    model = transformer_of(trained)
    take_weights(trained, calibrated)
    set_dropout(model, 0.0)
    freeze_pooler(model)
    model.get_input_embeddings().requires_grad_(False)
    return trained
