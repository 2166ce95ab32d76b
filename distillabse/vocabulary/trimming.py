"""The same encoder with fewer rows in its vocabulary, for any WordPiece, Unigram or BPE tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distillabse.errors import ConfigurationError, InputError
from distillabse.models.teacher import transformer_of
from distillabse.vocabulary.tokenizer_document import TokenizerDocument

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TOKEN_SETTINGS = ("pad", "bos", "eos", "unk", "cls", "sep", "mask", "decoder_start")


def trim_encoder(encoder: SentenceTransformer, rows: Iterable[int]) -> SentenceTransformer:
    """An encoder with these rows of the vocabulary and those of `rows_needed_by`, in their old order.

    A text whose tokens are all kept (those beyond the maximum length too) gets the same tokens and the same vector.
    That holds for every Unigram and BPE encoder, and for every text whose words a WordPiece encoder knows. A word that
    is unknown to it stays so where each character inside a token has a continuation piece of its own, as trained
    vocabularies have; without that piece, the greedy match may find another way through the word.

    Args:
        encoder: any sentence encoder whose first module is a Transformer; it is not changed.
        rows: rows of its embedding table.

    Raises:
        ConfigurationError: a tokenizer that cannot be trimmed.
        InputError: the tokenizer has tokens that the embedding table lacks.
    """
    import torch
    from tokenizers import Tokenizer

    document = trimmable(encoder)
    kept = rows_needed_by(encoder, document, rows)
    new = {old: row for row, old in enumerate(kept.tolist())}
    content = document.trimmed(new)
    backend = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    if backend.get_vocab() != {token: new[row] for row, token in document.tokens.items() if row in new}:
        raise ConfigurationError(
            "vocabulary: the tokenizer numbers its tokens in an unusual way and cannot be trimmed. "
            "Keep it as it is with `vocabulary.kind: keep`."
        )

    tokenizer = encoder.tokenizer
    parts = {"_tokenizer": backend, "_vocab": content["model"]["vocab"], "_merges": content["model"].get("merges")}
    replaced = {id(vars(tokenizer)[name]): part for name, part in parts.items() if name in vars(tokenizer)}
    table = transformer_of(encoder).get_input_embeddings()
    weight = torch.nn.Parameter(table.weight.detach()[torch.from_numpy(kept)], requires_grad=table.weight.requires_grad)
    trimmed_table = copy.deepcopy(table, {id(table.weight): weight})
    trimmed_table.num_embeddings = len(kept)
    if table.padding_idx is not None:
        trimmed_table.padding_idx = new[table.padding_idx]
    # What stands in the memo is taken for the copy already made: the whole table is never copied.
    trimmed = copy.deepcopy(encoder, {**replaced, id(table): trimmed_table})
    _renumber_settings(transformer_of(trimmed).config, new)
    return trimmed


def trimmable(encoder: SentenceTransformer) -> TokenizerDocument:
    """The tokenizer of an encoder that can be trimmed.

    Raises:
        ConfigurationError: no Transformer as the first module, or a tokenizer that cannot be trimmed.
        InputError: the tokenizer has tokens that the embedding table lacks.
    """
    if not hasattr(encoder[0], "auto_model"):
        raise ConfigurationError(
            f"vocabulary: the encoder starts with {type(encoder[0]).__name__}, not with a Transformer, and cannot be "
            "trimmed. Keep its vocabulary with `vocabulary.kind: keep`."
        )
    document = TokenizerDocument.of(encoder)
    rows = table_rows(encoder)
    if max(document.tokens) >= rows:
        raise InputError(
            f"The tokenizer has tokens up to row {max(document.tokens)}, but the embedding table has only {rows} rows. "
            "Add the missing rows with `encoder[0].auto_model.resize_token_embeddings(len(encoder.tokenizer))` and "
            "save the encoder."
        )
    return document


def rows_needed_by(encoder: SentenceTransformer, document: TokenizerDocument, rows: Iterable[int]) -> NDArray[np.int64]:
    """These rows and all that must be kept with them, ascending: int64 [kept rows].

    RoBERTa and its kin number positions from the padding row on, so that row keeps its number.
    """
    model = transformer_of(encoder)
    needed = set(document.needed)
    padding = model.get_input_embeddings().padding_idx
    if padding is not None:
        needed.add(padding)
    first_position = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    if first_position is not None:
        needed |= set(range(first_position + 1))
    return np.array(sorted(document.closed({int(row) for row in rows} | needed)), dtype=np.int64)


def table_rows(encoder: SentenceTransformer) -> int:
    """Rows of the embedding table."""
    return int(transformer_of(encoder).get_input_embeddings().weight.shape[0])


def _renumber_settings(config: Any, new: Mapping[int, int]) -> None:
    """Row numbers in the model's config; one that was of no use to the tokenizer is unset."""
    config.vocab_size = len(new)
    for name in (f"{token}_token_id" for token in _TOKEN_SETTINGS):
        row = getattr(config, name, None)
        if isinstance(row, int):
            setattr(config, name, new.get(row))
