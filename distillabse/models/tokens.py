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
    texts = [prompt + text for text in texts]
    options = {
        **{"truncation": "longest_first", **settings, "padding": False},
        "return_attention_mask": False,
        "return_token_type_ids": False,
    }
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[list[int]] = encoder.tokenizer(texts, **options)["input_ids"]
        return ids
    # The call leaves truncation set in the backend, which is half as slow again when it also looks for offsets.
    encoder.tokenizer(texts[:1], **options)
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]
