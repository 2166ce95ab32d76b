"""The student: the teacher's own architecture with fewer layers, initialised from the teacher's weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from distillabse.config import StudentConfig
from distillabse.errors import ConfigurationError
from distillabse.models.taps import encoder_layers
from distillabse.models.teacher import transformer_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def build_student(teacher: SentenceTransformer, config: StudentConfig) -> SentenceTransformer:
    """A trainable student with its own copy of the chosen teacher layers; the teacher is not changed.

    It is a stock transformers model in a SentenceTransformer, so nobody needs this package to load it, and always ends
    with L2 normalisation.

    Raises:
        ConfigurationError: a layer that the teacher lacks, or a teacher that is not built like BERT.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

    model = transformer_of(teacher)
    chosen = choose_layers(config.layers, len(encoder_layers(model)))

    transformer = copy.deepcopy(teacher[0])
    _keep_layers(transformer.auto_model, chosen)
    _set_dropout(transformer.auto_model, config.dropout)
    pooling = next(module for module in teacher if isinstance(module, Pooling))
    modules: list[Any] = [
        transformer,
        copy.deepcopy(pooling)
        if config.pooling == "teacher"
        else Pooling(model.config.hidden_size, pooling_mode=config.pooling),
    ]
    if config.dense == "copy":
        modules.extend(copy.deepcopy(module) for module in teacher if isinstance(module, Dense))
    modules.append(Normalize())
    # A prompt that the teacher prepends by default belongs to its vectors, so the student prepends it too.
    student = SentenceTransformer(
        modules=modules,
        device=str(teacher.device),
        prompts=teacher.prompts,
        default_prompt_name=teacher.default_prompt_name,
    )
    student.requires_grad_(True)
    _freeze_pooler(transformer.auto_model)
    if config.freeze_embeddings:
        transformer.auto_model.embeddings.requires_grad_(False)
    return student.train()


def choose_layers(wanted: int | list[int], available: int) -> list[int]:
    """Teacher layers to keep, in order: evenly spaced with the last always kept, or exactly the ones listed.

    Raises:
        ConfigurationError: more layers than there are, or a layer that the teacher lacks.
    """
    if isinstance(wanted, int):
        if wanted > available:
            raise ConfigurationError(f"student.layers: {wanted} asked for, but the teacher has only {available}.")
        if wanted == 1:
            return [available - 1]
        return [(index * (available - 1) + (wanted - 1) // 2) // (wanted - 1) for index in range(wanted)]
    missing = [layer for layer in wanted if layer >= available]
    if missing:
        raise ConfigurationError(
            f"student.layers: the teacher has no layer {missing[0]}; its layers are 0 to {available - 1}."
        )
    return list(wanted)


def _keep_layers(model: Any, chosen: list[int]) -> None:
    layers = encoder_layers(model)
    model.encoder.layer = type(layers)([layers[index] for index in chosen])
    model.config.num_hidden_layers = len(chosen)


def _set_dropout(model: Any, probability: float) -> None:
    from torch import nn

    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = probability
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _freeze_pooler(model: Any) -> None:
    """BERT's own pooler takes no part in the sentence vector; kept so that the saved folder loads without a warning."""
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
