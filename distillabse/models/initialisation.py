"""A student's first weights, made from the teacher's: chosen layers, projected where the student is narrower.

The student's token states live in the span of a few directions of the teacher's hidden space, the columns of `basis`
[teacher's hidden size, student's hidden size]: state_student = state_teacher @ basis. By default they are the principal
directions of the teacher's own token states, on sequences of tokens drawn by their frequency in the corpus. Every
matrix that reads or writes token states is projected onto them. Inside a block the widths are reduced where they lose
least: attention heads by the truncated SVD of their products W_q^T W_k and W_o W_v, feed-forward blocks by leaving out
the neurons that vary least, whose mean goes into the bias. Layer normalisation does not commute with a projection, so
its scale and bias are fitted to the teacher's states on the same sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillabse.config import SwitchStudentConfig, TrainedStudentConfig
from distillabse.models.projection import projection_basis
from distillabse.models.switch import SwitchLayer
from distillabse.models.taps import encoder_layers
from distillabse.models.upcycling import FeedForward, dense_block, start_experts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_SAMPLED_SEQUENCES, _SAMPLED_TOKENS = 128, 32


@dataclass(frozen=True)
class States:
    """Token states by layer: what goes in, after attention, what comes out; [batch, tokens, width].

    `ids` are the tokens, int64 [batch, tokens].
    """

    ids: Tensor
    inputs: list[Tensor]
    after_attention: list[Tensor]
    outputs: list[Tensor]


@torch.no_grad()
def initialise_from_teacher(
    student: Any, teacher: Any, layers: list[int], config: TrainedStudentConfig, counts: NDArray[np.int64] | None
) -> Tensor:
    """Give `student` the projected weights of `teacher`.

    Args:
        student: BertModel or ElectraModel, at most as wide as the teacher, with the teacher's vocabulary.
        teacher: BERT-like transformers model.
        layers: the teacher layer that each student layer starts from; none: only the embeddings do.
        config: says what the projection is.
        counts: how often the corpus uses each row of the vocabulary, int64 [rows].

    Returns:
        The basis, float32 [teacher's hidden size, student's hidden size].
    """
    student.eval()  # what is fitted must not meet dropout
    words, positions, types = _embedding_tables(teacher)
    hidden, embedding = student.config.hidden_size, student.embeddings.word_embeddings.embedding_dim
    states = sampled_states(teacher, counts)
    basis = _basis(hidden, config, words, (*states.inputs, states.outputs[-1]), counts)
    narrow = basis if embedding == hidden else _basis(embedding, config, words, states.inputs[:1], counts)
    for target, table in (("word", words), ("position", positions), ("token_type", types)):
        getattr(student.embeddings, f"{target}_embeddings").weight.copy_(table @ narrow)
    for target, index in zip(encoder_layers(student), layers, strict=bool(layers)):
        attended = states.after_attention[index].flatten(0, 1)
        _project_layer(encoder_layers(teacher)[index], target, basis, attended, config)
    _fit(student, layers, basis, states)
    return basis


def _basis(
    width: int, config: TrainedStudentConfig, words: Tensor, states: Sequence[Tensor], counts: NDArray[np.int64] | None
) -> Tensor:
    if width >= words.shape[1]:
        return torch.eye(words.shape[1], width, device=words.device)
    if config.projection == "states":
        basis = projection_basis(torch.cat(list(states)).flatten(0, 1).cpu().numpy(), width)
    else:
        basis = projection_basis(words.cpu().numpy(), width, config.projection, counts)
    return torch.from_numpy(basis).to(words.device)


def _embedding_tables(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Word, position and token type rows as they enter the first layer, but for normalisation: [rows, hidden size]."""
    tables = [
        getattr(model.embeddings, f"{name}_embeddings").weight.float() for name in ("word", "position", "token_type")
    ]
    # RoBERTa counts positions from the row after the padding row.
    tables[1] = tables[1][first_position(model) :]
    if hasattr(model, "embeddings_project"):
        tables = [table @ model.embeddings_project.weight.T for table in tables]
    return tables[0], tables[1], tables[2]


def first_position(model: Any) -> int:
    """Row of the position table that a text's first token gets."""
    padding = getattr(model.embeddings, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _project_layer(source: Any, target: Any, basis: Tensor, attended: Tensor, student: TrainedStudentConfig) -> None:
    """`attended` are the teacher's states that go into the feed-forward block, [tokens, teacher's hidden size]."""
    _project_attention(source.attention, target.attention, basis)
    block = _feed_forward(source, attended).projected(basis)
    if isinstance(target, SwitchLayer):
        assert isinstance(student, SwitchStudentConfig)
        start_experts(target.feed_forward, block, attended @ basis, student.expert_noise)
        return
    size = target.intermediate.dense.out_features
    narrow = block.narrowed(block.neurons(attended @ basis), size)
    kept = len(narrow.inner_bias)
    # More neurons than the teacher's: the new ones start with random inputs and say nothing yet.
    target.output.dense.weight.zero_()
    target.intermediate.dense.weight[:kept] = narrow.inner_weight
    target.intermediate.dense.bias[:kept] = narrow.inner_bias
    target.output.dense.weight[:, :kept] = narrow.outer_weight
    target.output.dense.bias.copy_(narrow.outer_bias)


def _feed_forward(layer: Any, attended: Tensor) -> FeedForward:
    """The weights of a layer's block; of a sparse layer, those of one block in the place of its experts."""
    if isinstance(layer, SwitchLayer):
        return dense_block(layer, attended)
    inner, outer = layer.intermediate.dense, layer.output.dense
    return FeedForward(inner.weight, inner.bias, outer.weight, outer.bias, layer.intermediate.intermediate_act_fn)


def _project_attention(source: Any, target: Any, basis: Tensor) -> None:
    """Keep the heads that write most, and of each what its products W_q^T W_k and W_o W_v do, as far as it is wide."""
    heads, new_heads = source.self.num_attention_heads, target.self.num_attention_heads
    size, new_size = source.self.attention_head_size, target.self.attention_head_size
    # A bias is one more input that is always 1.
    query, key, value = (
        torch.cat([layer.weight @ basis, layer.bias[:, None]], dim=1).view(heads, size, -1)
        for layer in (source.self.query, source.self.key, source.self.value)
    )
    output = (basis.T @ source.output.dense.weight).view(-1, heads, size).permute(1, 2, 0)
    strength = torch.stack([torch.linalg.matrix_norm(output[head].T @ value[head]) for head in range(heads)])
    kept = strength.topk(min(new_heads, heads)).indices.sort().values.tolist()
    target.self.query.weight.zero_()
    target.output.dense.weight.zero_()
    for position, head in enumerate(kept):
        here = slice(position * new_size, (position + 1) * new_size)
        if new_size >= size:
            # Scores are divided by the root of the head size, so a wider head needs larger queries.
            left, right = query[head] * math.sqrt(new_size / size), key[head]
            written, read = output[head], value[head]
        else:
            left, right = _factorise(query[head], key[head], new_size)
            left = left * math.sqrt(new_size / size)
            written, read = _factorise(output[head], value[head], new_size)
        for layer, rows in ((target.self.query, left), (target.self.key, right), (target.self.value, read)):
            layer.weight[here][: len(rows)] = rows[:, :-1]
            layer.bias[here][: len(rows)] = rows[:, -1]
        target.output.dense.weight[:, here][:, : len(written)] = written.T
    target.output.dense.bias.copy_(source.output.dense.bias @ basis)


def _factorise(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[rank, a] and [rank, b] whose product left^T right is the best of that rank, for [n, a] and [n, b]."""
    q_left, r_left = torch.linalg.qr(left.T)
    q_right, r_right = torch.linalg.qr(right.T)
    u, singular, v = torch.linalg.svd(r_left @ r_right.T)
    root = singular[:rank].sqrt()
    return root[:, None] * (q_left @ u[:, :rank]).T, root[:, None] * (q_right @ v[:rank].T).T


def _fit(student: Any, layers: list[int], basis: Tensor, states: States) -> None:
    """Fit every layer normalisation, and the projection of factorised embeddings, to the teacher's own states."""
    modules = student.embeddings
    if hasattr(student, "embeddings_project"):
        _reset(modules.LayerNorm)
        _fit_linear(student.embeddings_project, modules(input_ids=states.ids), states.inputs[0] @ basis)
    else:
        _fit_layer_norm(modules, modules.LayerNorm, (states.ids,), states.inputs[0] @ basis)
    for target, index in zip(encoder_layers(student), layers, strict=bool(layers)):
        given, attended = states.inputs[index] @ basis, states.after_attention[index] @ basis
        attention = target.attention.self(given)[0]
        _fit_layer_norm(target.attention.output, target.attention.output.LayerNorm, (attention, given), attended)
        inner = _inner(target, attended)
        _fit_layer_norm(target.output, target.output.LayerNorm, (inner, attended), states.outputs[index] @ basis)


def _inner(layer: Any, attended: Tensor) -> Tensor:
    """What goes into the layer's last block, whose residual is `attended`, [batch, tokens, width]."""
    if isinstance(layer, SwitchLayer):
        experts: Tensor = layer.feed_forward(attended, torch.ones_like(attended[..., 0], dtype=torch.bool))
        return experts
    neurons: Tensor = layer.intermediate(attended)
    return neurons


def _sampled_ids(rows: int, counts: NDArray[np.int64] | None, padding: int | None) -> Tensor:
    weights = torch.ones(rows) if counts is None or not counts.any() else torch.from_numpy(counts).double()
    if padding is not None:
        weights[padding] = 0  # RoBERTa would leave it out when it numbers positions
    generator = torch.Generator().manual_seed(0)
    # `torch.multinomial` draws among at most 2^24 categories, enough for any vocabulary.
    drawn = torch.multinomial(weights, _SAMPLED_SEQUENCES * _SAMPLED_TOKENS, replacement=True, generator=generator)
    return drawn.view(_SAMPLED_SEQUENCES, _SAMPLED_TOKENS)


@torch.no_grad()
def sampled_states(model: Any, counts: NDArray[np.int64] | None) -> States:
    """The states of a BERT-like model on sequences of tokens drawn by their frequency in the corpus.

    Args:
        model: BERT-like transformers model.
        counts: how often the corpus uses each row of the vocabulary, int64 [rows]; None: all alike.
    """
    training = model.training
    ids = _sampled_ids(model.config.vocab_size, counts, model.config.pad_token_id).to(model.device)
    after_attention: list[Tensor] = []
    hooks = [
        layer.attention.register_forward_hook(lambda module, arguments, output: after_attention.append(output[0]))
        for layer in encoder_layers(model)
    ]
    try:
        states = list(model.eval()(input_ids=ids, output_hidden_states=True).hidden_states)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return States(ids, states[:-1], after_attention, states[1:])


def _fit_layer_norm(block: Any, norm: nn.LayerNorm, arguments: tuple[Tensor, ...], wanted: Tensor) -> None:
    """Scale and bias, one least-squares fit for each dimension; `block(*arguments)` ends with `norm`."""
    _reset(norm)
    plain = block(*arguments).flatten(0, 1)
    wanted = wanted.flatten(0, 1)
    mean, target_mean = plain.mean(dim=0), wanted.mean(dim=0)
    centred = plain - mean
    scale = (centred * (wanted - target_mean)).mean(dim=0) / centred.square().mean(dim=0).clamp_min(1e-6)
    norm.weight.copy_(scale)
    norm.bias.copy_(target_mean - scale * mean)


def _fit_linear(layer: nn.Linear, inputs: Tensor, wanted: Tensor) -> None:
    flat = torch.cat([inputs.flatten(0, 1), inputs.new_ones(inputs.shape[0] * inputs.shape[1], 1)], dim=1)
    # Normalised rows sum to the same, so the rank is short by one: of all solutions take the smallest.
    left, right = flat.double().cpu(), wanted.flatten(0, 1).double().cpu()
    solution = torch.linalg.lstsq(left, right, rcond=1e-6, driver="gelsd").solution
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


def _reset(norm: nn.LayerNorm) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
