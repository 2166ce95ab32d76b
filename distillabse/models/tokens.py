"""Sentences as token ids, exactly as the encoder itself would see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distillabse.errors import ConfigurationError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def tokenise(encoder: SentenceTransformer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with its special tokens, prompt, lower-casing and truncation as in `encoder.encode`."""
    if not texts:
        return []
    prompt = _prompt(encoder)
    texts = [prompt + text for text in texts]
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[list[int]] = encoder.tokenizer(texts, **_options(encoder))["input_ids"]
        return ids
    # The call leaves truncation set in the backend, which is half as slow again when it also looks for offsets.
    encoder.tokenizer(texts[:1], **_options(encoder))
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def token_offsets(encoder: SentenceTransformer, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """The characters [start, end) of its text that each token of `tokenise` stands for, int64 [tokens, 2] of each text.

    Special tokens, and those of the prompt, stand for none: (0, 0).

    Raises:
        ConfigurationError: the tokenizer is a slow one, which does not know.
    """
    if not texts:
        return []
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigurationError(
            f"{type(encoder.tokenizer).__name__} does not tell where its tokens stand in the text, so words cannot be "
            "linked. Choose an encoder with a fast tokenizer, or leave out the objectives token_level and word_level."
        )
    prompt = _prompt(encoder)
    texts = [prompt + text for text in texts]
    encoder.tokenizer(texts[:1], **_options(encoder))
    offsets = [np.array(encoding.offsets, np.int64).reshape(-1, 2) for encoding in backend.encode_batch(texts)]
    return [(pairs - len(prompt)).clip(min=0) for pairs in offsets]


def _prompt(encoder: SentenceTransformer) -> str:
    return encoder.prompts.get(encoder.default_prompt_name or "") or ""


def _options(encoder: SentenceTransformer) -> dict[str, Any]:
    settings = getattr(encoder[0], "processing_kwargs", {}).get("text", {})
    return {
        **{"truncation": "longest_first", **settings, "padding": False},
        "return_attention_mask": False,
        "return_token_type_ids": False,
    }
