"""Deep self-attention distillation: MiniLM (Wang et al. 2020, arXiv:2002.10957) and MiniLMv2 (arXiv:2012.15828).

Both compare softmax relations between the tokens of a sentence,

    R(A, B) = softmax(A B^T / sqrt(d)),

per head, with the exact KL(teacher || student), averaged over heads and over the real tokens of each sentence, then
over the batch. Padding is masked as a key (it gets no probability) and as a row (it does not count).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from distillabse.config import MiniLMObjective, MiniLMv2Objective
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Kind, Signals, Tap
from distillabse.objectives.base import Objective, resolve_layers

_KIND: dict[str, Kind] = {"q": "query", "k": "key", "v": "value"}


def relation_log_probabilities(left: Tensor, right: Tensor, heads: int, attention_mask: Tensor) -> Tensor:
    """Logarithm of R(left, right).

    Args:
        left, right: [batch, tokens, width]; width is split into `heads` heads of width / heads each.
        heads: number of heads; must divide the width.
        attention_mask: [batch, tokens], 1 for real tokens.

    Returns:
        float32 [batch, heads, tokens, tokens]; padded keys hold the lowest float32.
    """
    left, right = _split_heads(left.float(), heads), _split_heads(right.float(), heads)
    scores = left @ right.transpose(-1, -2) / math.sqrt(left.shape[-1])
    padded_keys = attention_mask[:, None, None, :] == 0
    return scores.masked_fill(padded_keys, torch.finfo(torch.float32).min).log_softmax(dim=-1)


def relation_kl(teacher: Tensor, student: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean KL(teacher || student) of two sets of log relations (MiniLM equations 5 and 6, MiniLMv2 equation 5).

    Args:
        teacher, student: log probabilities, [batch, heads, tokens, tokens].
        attention_mask: [batch, tokens], 1 for real tokens.

    Returns:
        Scalar: per sentence 1 / (heads * tokens) times the sum over heads and real rows, then the mean over the batch.
    """
    mask = attention_mask.to(teacher.dtype)
    terms = teacher.exp() * (teacher - student) * mask[:, None, None, :]
    rows = terms.sum(dim=-1).mean(dim=1)
    return ((rows * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()


class MiniLM(Objective):
    """Attention distributions and value relations, head by head (MiniLM v1)."""

    def __init__(self, config: MiniLMObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        if teacher.attention_heads != student.attention_heads:
            raise ConfigurationError(
                f"objectives.minilm compares head by head, but the teacher has {teacher.attention_heads} attention "
                f"heads and the student {student.attention_heads}. Use kind: minilm_v2, whose relation heads are free."
            )
        if not config.attention and not config.value:
            raise ConfigurationError("objectives.minilm: set at least one of attention and value to true.")
        self.weight = config.weight
        self.heads = teacher.attention_heads
        self.layers = resolve_layers(config.layers, teacher, student, "minilm")
        relations: dict[str, tuple[Kind, Kind]] = {"attention": ("query", "key"), "value": ("value", "value")}
        self.relations = {name: pair for name, pair in relations.items() if getattr(config, name)}
        self.student_taps, self.teacher_taps = _taps(self.layers, self.relations.values())

    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """The terms minilm/attention and minilm/value, summed over layer pairs."""
        return {
            f"minilm/{name}": _kl_over_layers(teacher, student, attention_mask, self.layers, pair, self.heads)
            for name, pair in self.relations.items()
        }


class MiniLMv2(Objective):
    """Query-query, key-key and value-value relations with relation heads of their own (MiniLMv2 equation 4)."""

    def __init__(self, config: MiniLMv2Objective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        for owner, shape in (("teacher", teacher), ("student", student)):
            if shape.hidden_size % config.relation_heads:
                common = math.gcd(teacher.hidden_size, student.hidden_size)
                choices = [heads for heads in range(1, common + 1) if common % heads == 0 and heads <= 128]
                raise ConfigurationError(
                    f"objectives.minilm_v2.relation_heads: {config.relation_heads} does not divide the {owner}'s "
                    f"hidden size {shape.hidden_size}. Choose one of {choices}."
                )
        self.weight = config.weight
        self.heads = config.relation_heads
        self.layers = resolve_layers(config.layers, teacher, student, "minilm_v2")
        self.relation_weights = {str(name): weight for name, weight in config.relations.items()}
        self.relations: dict[str, tuple[Kind, Kind]] = {
            name: (_KIND[name[0]], _KIND[name[1]]) for name in config.relations
        }
        self.student_taps, self.teacher_taps = _taps(self.layers, self.relations.values())

    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """The terms minilm_v2/qq, /kk and /vv, each times its own weight, summed over layer pairs."""
        return {
            f"minilm_v2/{name}": self.relation_weights[name]
            * _kl_over_layers(teacher, student, attention_mask, self.layers, pair, self.heads)
            for name, pair in self.relations.items()
        }


def _split_heads(x: Tensor, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    return x.view(batch, tokens, heads, width // heads).transpose(1, 2)


def _taps(layers: list[tuple[int, int]], pairs: Iterable[tuple[Kind, Kind]]) -> tuple[frozenset[Tap], frozenset[Tap]]:
    kinds = {kind for pair in pairs for kind in pair}
    return (
        frozenset(Tap(kind, student) for student, _ in layers for kind in kinds),
        frozenset(Tap(kind, teacher) for _, teacher in layers for kind in kinds),
    )


def _kl_over_layers(
    teacher: Signals,
    student: Signals,
    attention_mask: Tensor,
    layers: list[tuple[int, int]],
    pair: tuple[Kind, Kind],
    heads: int,
) -> Tensor:
    losses = []
    for student_layer, teacher_layer in layers:
        target, output = (
            relation_log_probabilities(
                signals.taps[Tap(pair[0], layer)], signals.taps[Tap(pair[1], layer)], heads, attention_mask
            )
            for signals, layer in ((teacher, teacher_layer), (student, student_layer))
        )
        losses.append(relation_kl(target, output, attention_mask))
    return torch.stack(losses).sum()
