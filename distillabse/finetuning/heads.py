"""The encoder of a sentence encoder under one of transformers' standard heads."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from distillabse.errors import ConfigurationError
from distillabse.finetuning.tasks import Task
from distillabse.models.initialisation import first_position
from distillabse.models.teacher import no_progress_bars, transformer_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def require_stock(encoder: SentenceTransformer, task: Task, max_length: int, name: str) -> None:
    """Refuse an encoder that the task's head does not exist for, or that cannot read inputs so long.

    Raises:
        ConfigurationError: names the model and the remedy.
    """
    model = transformer_of(encoder)
    auto, known = _auto_class(task)
    if type(model.config) not in known:
        raise ConfigurationError(
            f"{name}: its encoder is a {type(model).__name__}, for which transformers has no {auto.__name__}. "
            "Give a model with a stock encoder; a Switch student can be distilled back into a dense one "
            "(`distillabse configs cp minilm-switch-dense`)."
        )
    positions = model.config.max_position_embeddings - first_position(model)
    if max_length > positions:
        raise ConfigurationError(
            f"{name}: its encoder has {positions} positions, fewer than max_length {max_length}. Set "
            f"max_length={positions}, for all models alike."
        )
    if not getattr(encoder.tokenizer, "is_fast", False):
        raise ConfigurationError(f"{name} has no tokenizer.json, which gives the place of tokens in a text. Add one.")


def with_head(encoder: SentenceTransformer, task: Task, dropout: float) -> Any:
    """A new transformers model: the encoder's weights under the task's head, which is drawn at random.

    The encoder itself is not changed. A pooler that it lacks is drawn, too; one that the head does not use is left out.

    Args:
        encoder: what `require_stock` accepts.
        task: says which head, with how many classes.
        dropout: of hidden states and attention.
    """
    config = copy.deepcopy(transformer_of(encoder).config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    if task.labels:
        config.num_labels = len(task.labels)
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
        config.problem_type = "single_label_classification"
    else:
        config.num_labels = 2  # start and end
    with no_progress_bars():
        model = _auto_class(task)[0].from_config(config).float()
    left = model.base_model.load_state_dict(transformer_of(encoder).state_dict(), strict=False)
    if wrong := [name for name in (*left.missing_keys, *left.unexpected_keys) if not name.startswith("pooler.")]:
        raise ConfigurationError(
            f"The encoder's weights do not fit a {type(model).__name__}: {', '.join(wrong[:5])}. Is it a stock model?"
        )
    return model


def tokenizer_of(encoder: SentenceTransformer) -> Any:
    """A tokenizer of its own for the task, which lower-cases where the sentence encoder does.

    Segment ids are made only for encoders that have more than one segment.
    """
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(encoder.tokenizer)
    if getattr(encoder[0], "do_lower_case", False):
        backend = tokenizer.backend_tokenizer
        steps = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    segments = getattr(transformer_of(encoder).config, "type_vocab_size", 1) > 1
    tokenizer.model_input_names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    return tokenizer


def _auto_class(task: Task) -> tuple[Any, Any]:
    from transformers import (
        MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
    )

    if task.kind == "pairs":
        return AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return AutoModelForQuestionAnswering, MODEL_FOR_QUESTION_ANSWERING_MAPPING
