"""Depth and widths of an encoder, and which of them fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distillabse.config import SwitchStudentConfig, TrainedStudentConfig
from distillabse.errors import ConfigurationError


@dataclass(frozen=True)
class TransformerShape:
    """Depth and widths of a BERT-like encoder. Where embedding_size < hidden_size, its embeddings are factorised."""

    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    embedding_size: int

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.attention_heads


def transformer_shape(settings: Mapping[str, Any]) -> TransformerShape:
    """The shape that a transformers config.json describes; the intermediate size of a Switch student is its experts'.

    Raises:
        ConfigurationError: it has not the fields of a BERT-like encoder.
    """
    try:
        return TransformerShape(
            layers=settings["num_hidden_layers"],
            hidden_size=settings["hidden_size"],
            intermediate_size=settings.get("expert_size") or settings["intermediate_size"],
            attention_heads=settings["num_attention_heads"],
            embedding_size=settings.get("embedding_size") or settings["hidden_size"],
        )
    except KeyError as missing:
        raise ConfigurationError(
            f"student: it starts from a model of type {settings.get('model_type')!r}, whose config.json has no "
            f"{missing}, so it is not built like BERT. Choose a BERT, RoBERTa, XLM-R or ELECTRA encoder as teacher, or "
            "as base_model."
        ) from None


def resolve_shape(student: TrainedStudentConfig, teacher: TransformerShape) -> tuple[TransformerShape, list[int]]:
    """The student's shape with every width filled in, and the teacher layer that each of its layers starts from.

    `teacher` is what the student starts from: with `base_model` that. Where layers start at random, a student may be
    deeper, and the layers that it starts from are none.

    Raises:
        ConfigurationError: heads that do not divide the width, an embedding wider than the hidden size, or layers that
            the teacher lacks.
    """
    hidden = student.hidden_size or teacher.hidden_size
    embedding = student.embedding_size or (teacher.embedding_size if student.hidden_size is None else hidden)
    if embedding > hidden:
        raise ConfigurationError(
            f"student.embedding_size: {embedding} is wider than the hidden size {hidden}; choose at most {hidden}."
        )
    if hidden > teacher.hidden_size and student.initialisation != "random":
        raise ConfigurationError(
            f"student.hidden_size: {hidden} is wider than the teacher's {teacher.hidden_size}, whose weights cannot "
            "fill it; choose at most that, or set student.initialisation: random."
        )
    shape = TransformerShape(
        layers=student.depth,
        hidden_size=hidden,
        intermediate_size=student.intermediate_size or hidden * teacher.intermediate_size // teacher.hidden_size,
        attention_heads=_attention_heads(student, hidden, teacher),
        embedding_size=embedding,
    )
    if student.initialisation != "teacher":
        return shape, []
    _require_slices(student, shape, teacher)
    return shape, choose_layers(student.layers, teacher.layers, student.layer_choice)


def choose_layers(wanted: int | list[int], available: int, choice: Literal["uniform", "last"] = "uniform") -> list[int]:
    """Teacher layers to start from, in order: evenly spaced with the last always kept, the last ones, or those listed.

    Raises:
        ConfigurationError: more layers than there are, or a layer that the teacher lacks.
    """
    if isinstance(wanted, int):
        if wanted > available:
            raise ConfigurationError(
                f"student.layers: {wanted} asked for, but the teacher has only {available}. Ask for at most that many, "
                "or set student.initialisation: embeddings or random."
            )
        if choice == "last":
            return list(range(available - wanted, available))
        if wanted == 1:
            return [available - 1]
        return [(index * (available - 1) + (wanted - 1) // 2) // (wanted - 1) for index in range(wanted)]
    missing = [layer for layer in wanted if layer >= available]
    if missing:
        raise ConfigurationError(
            f"student.layers: the teacher has no layer {missing[0]}; its layers are 0 to {available - 1}."
        )
    return list(wanted)


def _attention_heads(student: TrainedStudentConfig, hidden: int, teacher: TransformerShape) -> int:
    if student.attention_heads is not None:
        heads = student.attention_heads
    elif hidden % teacher.attention_heads == 0:
        heads = teacher.attention_heads
    else:
        heads = max(1, hidden // teacher.head_size)
    if hidden % heads:
        choices = [count for count in range(1, hidden + 1) if hidden % count == 0 and hidden // count >= 16]
        raise ConfigurationError(
            f"student.attention_heads: {heads} heads do not divide the hidden size {hidden}; choose one of {choices}."
        )
    return heads


def _require_slices(student: TrainedStudentConfig, shape: TransformerShape, teacher: TransformerShape) -> None:
    """An expert starts from the teacher's feed-forward block, so it is no wider than that."""
    if isinstance(student, SwitchStudentConfig):
        size = student.expert_size or shape.intermediate_size
        if size > teacher.intermediate_size:
            raise ConfigurationError(
                f"student.expert_size: {size} is wider than the teacher's feed-forward block of "
                f"{teacher.intermediate_size}, from which experts start; choose at most that, or set "
                "student.initialisation: random."
            )
