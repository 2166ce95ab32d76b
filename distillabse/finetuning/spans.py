"""Questions as windows of tokens, and the answers that start and end logits point to.

As in BERT (Devlin et al. 2019, arXiv:1810.04805, section 4.2): the answer is the span with the largest sum of start and
end logit. A context that is too long is cut into windows that share `doc_stride` tokens, as in transformers' run_qa.py;
the best span of all windows counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distillabse.finetuning.data import tokenised
from distillabse.finetuning.settings import FinetuningSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

OUTSIDE = -1


class Span(NamedTuple):
    """A candidate: the sum of its logits, and its characters [start, end) in the context."""

    score: float
    start: int
    end: int


def question_windows(rows: Dataset, tokenizer: Any, settings: FinetuningSettings, *, targets: bool) -> Dataset:
    """Tokenise questions with their contexts.

    Args:
        rows: questions.
        tokenizer: a fast one.
        settings: lengths and stride.
        targets: for training, add start_positions and end_positions, which are the CLS token's where the whole answer
            is not in the window; else, for predictions, add what `predicted_spans` needs.

    Returns:
        One row for every window: the model's inputs, not padded, and without `targets` also `row`, the index of the
        question, and `offsets`, int [tokens, 2], the characters of each token in the context, -1 outside of it.
    """

    def tokenise(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        questions = _cut_questions(batch["question"], tokenizer, settings.max_question_length)
        encoded = tokenizer(
            questions,
            batch["context"],
            truncation="only_second",
            max_length=settings.max_length,
            stride=settings.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = {name: encoded[name] for name in tokenizer.model_input_names}
        within = encoded["overflow_to_sample_mapping"]
        offsets = [_context_offsets(encoded, window) for window in range(len(within))]
        if not targets:
            return {**windows, "row": [indices[index] for index in within], "offsets": [o.tolist() for o in offsets]}
        spans = [
            target_tokens(
                offsets[window],
                batch["answer_start"][index],
                batch["answer_start"][index] + len(batch["answers"][index][0]),
                encoded["input_ids"][window].index(tokenizer.cls_token_id),
            )
            for window, index in enumerate(within)
        ]
        return {**windows, "start_positions": [s for s, _ in spans], "end_positions": [e for _, e in spans]}

    return tokenised(rows, tokenise)


def target_tokens(offsets: NDArray[np.int64], start: int, end: int, absent: int) -> tuple[int, int]:
    """First and last token of the answer's characters [start, end), or twice `absent` where the window cuts it.

    Args:
        offsets: int64 [tokens, 2], characters of each token in the context, -1 outside of it.
        start: first character of the answer.
        end: the character after its last one.
        absent: token to point to.
    """
    inside = np.flatnonzero(offsets[:, 0] != OUTSIDE)
    if start < 0 or not len(inside) or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return absent, absent
    touched = inside[(offsets[inside, 1] > start) & (offsets[inside, 0] < end)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else (absent, absent)


def best_spans(
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    offsets: NDArray[np.int64],
    max_answer_length: int,
    n_best: int,
) -> list[Span]:
    """The candidates of one window with the largest sums of logits, best first.

    Every candidate begins and ends inside the context, ends no earlier than it begins, and has at most
    `max_answer_length` tokens. All pairs of tokens are looked at, so the best one is found for certain.

    Args:
        start_logits: float [tokens] or longer, padding at the end is not read.
        end_logits: the same.
        offsets: int64 [tokens, 2], characters of each token in the context, -1 outside of it.
        max_answer_length: in tokens.
        n_best: how many to give at most.
    """
    inside = np.flatnonzero(offsets[:, 0] != OUTSIDE)
    if not len(inside):
        return []
    sums = start_logits[inside].astype(np.float64)[:, None] + end_logits[inside].astype(np.float64)[None, :]
    length = inside[None, :] - inside[:, None] + 1
    sums[(length < 1) | (length > max_answer_length)] = -np.inf
    flat = sums.ravel()
    count = min(n_best, int(np.isfinite(flat).sum()))
    chosen = np.argpartition(-flat, count - 1)[:count]
    chosen = chosen[np.argsort(-flat[chosen], kind="stable")]
    first, last = np.unravel_index(chosen, sums.shape)
    return [
        Span(float(flat[index]), int(offsets[inside[start], 0]), int(offsets[inside[end], 1]))
        for index, start, end in zip(chosen, first, last, strict=True)
    ]


def predicted_spans(
    windows: Dataset,
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    questions: int,
    settings: FinetuningSettings,
) -> list[list[Span]]:
    """For every question its best spans of all its windows, best first; at least one, if its context has a token.

    Args:
        windows: what `question_windows` made for predictions.
        start_logits: float32 [windows, tokens], padded.
        end_logits: the same.
        questions: how many there are.
        settings: n_best and max_answer_length.
    """
    found: list[set[Span]] = [set() for _ in range(questions)]
    for index, window in enumerate(windows.select_columns(["row", "offsets"])):
        offsets = np.asarray(window["offsets"], dtype=np.int64)
        spans = best_spans(start_logits[index], end_logits[index], offsets, settings.max_answer_length, settings.n_best)
        found[window["row"]].update(spans)
    return [sorted(spans, key=lambda span: (-span.score, span.start))[: settings.n_best] for spans in found]


def _context_offsets(encoded: Any, window: int) -> NDArray[np.int64]:
    offsets = np.asarray(encoded["offset_mapping"][window], dtype=np.int64)
    second = np.asarray([part == 1 for part in encoded.sequence_ids(window)])
    # Tokens without characters, which some tokenizers put before a word, are no answer.
    offsets[~second | (offsets[:, 0] == offsets[:, 1])] = OUTSIDE
    return offsets


def _cut_questions(questions: list[str], tokenizer: Any, max_length: int) -> list[str]:
    """Questions of at most so many tokens: only contexts are cut into windows."""
    offsets = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
    )["offset_mapping"]
    return [
        text[: own[-1][1]] if len(own) == max_length else text for text, own in zip(questions, offsets, strict=True)
    ]
