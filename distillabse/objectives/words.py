"""Objectives on the words of translation pairs that mean the same (MMKD-style token and word levels)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from distillabse.config import TokenLevelObjective, WordLevelObjective
from distillabse.models.taps import EncoderShape, Signals, Tap
from distillabse.objectives.base import PairObjective, resolve_layer, resolve_layers
from distillabse.objectives.hidden import linear_map

# Columns of the links: see PairObjective.forward.
_PAIR, _STUDENT_SOURCE, _STUDENT_TRANSLATION, _TEACHER_SOURCE = 0, slice(1, 3), slice(3, 5), slice(5, 7)


class TokenLevel(PairObjective):
    """The student's tokens of a translation follow the teacher's state of the source word that they translate.

    For every link, mean squared error over dimensions between each token of the translation's word and the mean of the
    teacher's states of the source word; mean over such tokens of a pair, then over the pairs. A pair without links
    counts as 0, so the loss of a batch is the mean of the losses of its parts. A narrower student has a linear map to
    the teacher's width, as in `distillabse.objectives.hidden.Hidden`.
    """

    def __init__(self, config: TokenLevelObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__(config)
        self.layers = resolve_layers(config.layers, teacher, student, "token_level")
        self.student_taps = frozenset(Tap("hidden", layer) for layer, _ in self.layers)
        self.teacher_taps = frozenset(Tap("hidden", layer) for _, layer in self.layers)
        self.maps = nn.ModuleList(linear_map(student.hidden_size, teacher.hidden_size) for _ in self.layers)

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """The term token_level, summed over layer pairs."""
        assert links is not None
        pairs = len(student.sentence) // 2
        row = links[:, _PAIR]
        translation = pairs + row, links[:, _STUDENT_TRANSLATION]
        losses = []
        for (own, teachers), to_teacher in zip(self.layers, self.maps, strict=True):
            target = word_means(teacher.taps[Tap("hidden", teachers)], row, links[:, _TEACHER_SOURCE])
            tokens, link = word_tokens(student.taps[Tap("hidden", own)], *translation)
            squares = (to_teacher(tokens).float() - target[link]).square().mean(dim=-1)
            counts = torch.bincount(row[link], minlength=pairs).clamp(min=1)
            losses.append((squares / counts[row[link]]).sum() / pairs)
        return {"token_level": torch.stack(losses).sum()}


class WordLevel(PairObjective):
    """A word is nearer to its translation than to the other words of that language in the batch (InfoNCE).

    A word's vector is the mean of the student's states of its tokens, normalised. The candidates are the linked words
    of the other language; a word that occurs in two pairs is a negative of itself there, for nothing tells them apart.
    With fewer than two links there is no negative, and the terms are 0.
    """

    def __init__(self, config: WordLevelObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__(config)
        self.temperature = config.temperature
        self.tap = Tap("hidden", resolve_layer(config.layer, student.layers, "objectives.word_level.layer", "student"))
        self.student_taps = frozenset({self.tap})

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """The terms word_level/to_translation and word_level/to_source, means over the links of the batch."""
        assert links is not None
        pairs = len(student.sentence) // 2
        states, row = student.taps[self.tap], links[:, _PAIR]
        sources = normalize(word_means(states, row, links[:, _STUDENT_SOURCE]), dim=-1)
        translations = normalize(word_means(states, pairs + row, links[:, _STUDENT_TRANSLATION]), dim=-1)
        logits = sources @ translations.T / self.temperature
        own = torch.arange(len(links), device=links.device)
        count = max(len(links), 1)
        return {
            "word_level/to_translation": cross_entropy(logits, own, reduction="sum") / count,
            "word_level/to_source": cross_entropy(logits.T, own, reduction="sum") / count,
        }


def word_tokens(states: Tensor, rows: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """The states of all tokens of some words, and the number of the word that each belongs to.

    Args:
        states: [batch, tokens, width].
        rows: int64 [words], sentence of each word.
        spans: int64 [words, 2], its first token and end (exclusive).

    Returns:
        [tokens of all words, width] and int64 [tokens of all words].
    """
    first, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    word = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
    before = lengths.cumsum(0) - lengths
    token = torch.arange(len(word), device=rows.device) - before[word] + first[word]
    return states[rows[word], token], word


def word_means(states: Tensor, rows: Tensor, spans: Tensor) -> Tensor:
    """Mean state of the tokens of each word, float32 [words, width]; arguments as in `word_tokens`."""
    tokens, word = word_tokens(states, rows, spans)
    sums = tokens.new_zeros((len(rows), states.shape[-1]), dtype=torch.float32).index_add(0, word, tokens.float())
    return sums / (spans[:, 1] - spans[:, 0]).unsqueeze(-1)
