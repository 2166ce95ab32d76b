"""Sentences as token ids, exactly as the encoder itself would see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def tokenise(encoder: SentenceTransformer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with its special tokens, prompt, lower-casing and truncation as in `encoder.encode`."""
    if not texts:
        return []
    prompt = encoder.prompts.get(encoder.default_prompt_name or "") or ""
    settings = getattr(encoder[0], "processing_kwargs", {}).get("text", {})
    features = encoder.tokenizer(
        [prompt + text for text in texts],
        **{"truncation": "longest_first", **settings, "padding": False},
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids: list[list[int]] = features["input_ids"]
    return ids
