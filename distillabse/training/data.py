"""Sentences as a dataset of token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from distillabse.models.tokens import tokenise

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from distillabse.training.cache import TeacherCache

_BLOCK = 20_000


def training_dataset(encoder: SentenceTransformer, texts: Sequence[str]) -> Dataset:
    """A dataset with columns input_ids, length and row (its own number), tokenised once."""
    from datasets import Dataset
    from rich.progress import track

    ids: list[list[int]] = []
    blocks = range(0, len(texts), _BLOCK)
    for start in track(blocks, description="Tokenising", transient=True, disable=len(blocks) < 2):
        ids.extend(tokenise(encoder, texts[start : start + _BLOCK]))
    return Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids], "row": range(len(ids))})


class PaddingCollator:
    """Pads a list of rows to their longest: int64 input_ids and attention_mask [batch, tokens]."""

    def __init__(self, pad_token_id: int, multiple_of: int = 1, cache: TeacherCache | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of
        self.cache = cache

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad on the right; with a cache the teacher's signals of the rows come along."""
        longest = max(len(row["input_ids"]) for row in rows)
        longest += -longest % self.multiple_of
        input_ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[index, :length] = torch.as_tensor(row["input_ids"])
            attention_mask[index, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.cache is not None:
            batch.update(self.cache.read([row["row"] for row in rows], longest))
        return batch
