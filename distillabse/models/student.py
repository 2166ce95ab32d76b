"""The student: a stock BERT-like encoder, or a Switch student, initialised from the teacher's weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillabse.config import SwitchStudentConfig, TrainedStudentConfig
from distillabse.errors import ConfigurationError
from distillabse.models.initialisation import first_position, initialise_from_teacher
from distillabse.models.shape import TransformerShape, resolve_shape, transformer_shape
from distillabse.models.switch import SwitchConfig, SwitchStudent, sparse_layers
from distillabse.models.taps import encoder_layers
from distillabse.models.teacher import transformer_of, with_modules

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer


def build_student(
    teacher: SentenceTransformer,
    config: TrainedStudentConfig,
    token_counts: NDArray[np.int64] | None = None,
    dimension: int | None = None,
) -> SentenceTransformer:
    """A trainable student with weights of its own; the teacher is not changed.

    A dense student is a stock transformers model in a SentenceTransformer, so nobody needs this package to load it: the
    teacher's own class where only layers are left out, else BertModel, or ElectraModel where its embeddings are
    narrower than its hidden size. A Switch student has a class of its own. Either ends with L2 normalisation.

    Args:
        teacher: what it starts from, which need not be what it learns from.
        config: its shape, and how it starts.
        token_counts: how often the corpus uses each row of the vocabulary, int64 [rows]; weighs the projection.
        dimension: of its vectors with `head: dense`; by default that of `teacher`.

    Raises:
        ConfigurationError: widths that do not fit, a layer that the teacher lacks, a teacher not built like BERT, or
            for a Switch student one whose activation is not GELU.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    model = transformer_of(teacher)
    encoder_layers(model)
    own_shape = transformer_shape(model.config.to_dict())
    shape, layers = resolve_shape(config, own_shape)
    is_switch = isinstance(config, SwitchStudentConfig)
    only_layers = bool(layers) and shape == replace(own_shape, layers=shape.layers)
    if only_layers and not is_switch and not sparse_layers(model):
        transformer, basis = copy.deepcopy(teacher[0]), torch.eye(shape.hidden_size, device=model.device)
        _keep_layers(transformer.auto_model, layers)
        set_dropout(transformer.auto_model, config.dropout)
    else:
        student_model = _new_model(model, shape, config).to(model.device)
        basis = torch.eye(own_shape.hidden_size, shape.hidden_size, device=model.device)
        if config.initialisation != "random":
            basis = initialise_from_teacher(student_model, model, layers, config, token_counts)
        set_dropout(student_model, config.dropout)
        # The tokenizer and its settings are copied, the teacher's model is not.
        transformer = copy.deepcopy(teacher[0], {id(model): student_model})
    pooling = next(module for module in teacher if isinstance(module, Pooling))
    mode = pooling.pooling_mode if config.pooling == "teacher" else config.pooling
    modules: list[Any] = [transformer, Pooling(shape.hidden_size, mode, include_prompt=pooling.include_prompt)]
    if config.head == "dense":
        modules.extend(_dense_head(teacher, basis, dimension, config.initialisation != "teacher"))
    modules.append(Normalize())
    student = with_modules(teacher, modules)
    student.requires_grad_(True)
    freeze_pooler(transformer.auto_model)
    if config.freeze_embeddings:
        transformer.auto_model.embeddings.requires_grad_(False)
    return student.train()


def take_weights(student: SentenceTransformer, earlier: SentenceTransformer) -> None:
    """Give a student all weights of one that was trained before.

    Raises:
        ConfigurationError: the two differ in shape or in vocabulary.
    """
    own, taken = student.state_dict(), earlier.state_dict()
    for name in sorted(own.keys() | taken.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else "none" for weights in (own, taken)]
        if shapes[0] != shapes[1]:
            raise ConfigurationError(
                f"student.continue_from: {name} is {shapes[0]} in the student and {shapes[1]} in the one to go on "
                "from. Give this job the teacher, vocabulary and student of the one that trained it."
            )
    if student.tokenizer.get_vocab() != earlier.tokenizer.get_vocab():
        raise ConfigurationError(
            "student.continue_from: the rows of its vocabulary are other tokens than those of this job. Set "
            "vocabulary.kind: keep in both, or train the first anew on a corpus with the text of both."
        )
    student.load_state_dict(taken)


def with_unit_vectors(encoder: SentenceTransformer) -> SentenceTransformer:
    """The encoder itself, ending with L2 normalisation."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    if not isinstance(encoder[-1], Normalize):
        encoder.append(Normalize())
    return encoder


def _new_model(teacher: Any, shape: TransformerShape, config: TrainedStudentConfig) -> Any:
    """BertModel, ElectraModel or SwitchStudent of a shape, with random weights and whatever else is the teacher's."""
    from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

    settings = {
        "vocab_size": teacher.config.vocab_size,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.attention_heads,
        "max_position_embeddings": teacher.config.max_position_embeddings - first_position(teacher),
        "type_vocab_size": teacher.config.type_vocab_size,
        "layer_norm_eps": teacher.config.layer_norm_eps,
        "hidden_act": teacher.config.hidden_act,
        "pad_token_id": teacher.config.pad_token_id,
    }
    if isinstance(config, SwitchStudentConfig):
        if teacher.config.hidden_act != "gelu":
            raise ConfigurationError(
                f"student.kind: switch has experts with the exact GELU, and this teacher's activation is "
                f"{teacher.config.hidden_act!r}. Set student.kind: dense, or choose a teacher with GELU."
            )
        sparse = SwitchConfig(
            **settings,
            embedding_size=shape.embedding_size,
            sparse_layers=config.sparse_layer_indices,
            num_experts=config.experts,
            expert_size=config.expert_size or shape.intermediate_size,
            capacity_factor=config.capacity_factor,
            router_jitter=config.router_jitter,
            expert_dropout=config.expert_dropout,
        )
        return SwitchStudent(sparse)
    if shape.embedding_size < shape.hidden_size:
        return ElectraModel(ElectraConfig(embedding_size=shape.embedding_size, **settings))
    return BertModel(BertConfig(**settings))


def _dense_head(teacher: SentenceTransformer, basis: Tensor, dimension: int | None, random: bool) -> list[nn.Module]:
    """The teacher's Dense modules on the student's narrower states, or one that leads back to the teacher's width.

    Where neither gives `dimension`, a linear map with orthonormal rows or columns does: it keeps, as far as it can, the
    angles between vectors.
    """
    from sentence_transformers.sentence_transformer.modules import Dense

    hidden, narrow = basis.shape
    own = [copy.deepcopy(module) for module in teacher if isinstance(module, Dense)]
    if dimension not in (None, own[-1].out_features if own else hidden):
        weight = nn.init.orthogonal_(torch.empty(dimension, narrow, device=basis.device))
        return [Dense(narrow, dimension, bias=False, activation_function=nn.Identity(), init_weight=weight)]
    head: list[Any] = own or [
        Dense(
            hidden,
            hidden,
            bias=False,
            activation_function=nn.Identity(),
            init_weight=torch.eye(hidden, device=basis.device),
        )
    ]
    if narrow != hidden:
        first = head[0]
        projected = Dense(
            narrow,
            first.out_features,
            bias=first.bias,
            activation_function=first.activation_function,
            init_weight=first.linear.weight.detach() @ basis,
            init_bias=first.linear.bias.detach() if first.bias else None,
            use_residual=first.use_residual,
        )
        if first.use_residual:
            residual = (
                first.residual.weight.detach() if hasattr(first, "residual") else torch.eye(hidden, device=basis.device)
            )
            projected.residual.weight.data.copy_(residual @ basis)
        head[0] = projected
    if random:
        for linear in (module for dense in head for module in dense.modules() if isinstance(module, nn.Linear)):
            linear.reset_parameters()
    return head


def _keep_layers(model: Any, chosen: list[int]) -> None:
    layers = encoder_layers(model)
    model.encoder.layer = type(layers)([layers[index] for index in chosen])
    model.config.num_hidden_layers = len(chosen)


def set_dropout(model: Any, probability: float) -> None:
    """Set the probability of every dropout of a transformers model; experts have one of their own."""
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = probability
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    for layer in sparse_layers(model).values():
        layer.feed_forward.experts.dropout.p = model.config.expert_dropout


def freeze_pooler(model: Any) -> None:
    """BERT's own pooler takes no part in the sentence vector; kept so that the saved folder loads without a warning."""
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
