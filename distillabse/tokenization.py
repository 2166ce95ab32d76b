"""From texts to the inputs of a bundle's graph, with the tokenizer that the bundle holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, normalizers

from distillabse import layout
from distillabse.errors import InputError
from distillabse.storage import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BundleTokenizer:
    """A bundle's tokenizer, its padding token, and the prompt that belongs before every text.

    Raises:
        InputError: a file of the bundle is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._pad_id = _pad_id(self._tokenizer, folder)
        self._prompt = _default_prompt(folder)

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        truncation = self._tokenizer.truncation
        assert truncation is not None  # load_tokenizer sets it
        return int(truncation["max_length"])

    def token_ids(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Int64 [tokens] for every text, special tokens included."""
        prompted = [self._prompt + text for text in texts]
        try:
            encodings = self._tokenizer.encode_batch_fast(prompted)
        except TypeError:  # what it says of halves of surrogate pairs
            encodings = self._tokenizer.encode_batch_fast([_whole_characters(text) for text in prompted])
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def pad(self, rows: Sequence[NDArray[np.int64]], pad_to: int | None = None) -> dict[str, NDArray[np.int64]]:
        """Int64 input_ids and attention_mask [rows, tokens], padded on the right to the longest row or to `pad_to`."""
        width = max((pad_to or 0, *(len(row) for row in rows)))
        input_ids = np.full((len(rows), width), self._pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a bundle, which cuts at `max_seq_length` and lower-cases where the model wants it.

    Raises:
        InputError: tokenizer.json or sentence_bert_config.json is missing or cannot be read.
    """
    file = require_file(folder, layout.TOKENIZER)
    settings_file = require_file(folder, layout.TRANSFORMER_SETTINGS)
    settings = read_json(settings_file)
    if "max_seq_length" not in settings:
        raise InputError(f"{settings_file} does not say `max_seq_length`. Export the model with `distillabse export`.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise InputError(f"{file} is not a tokenizer ({error}). Export or download the bundle again.") from None
    if settings.get("do_lower_case"):
        steps = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    tokenizer.enable_truncation(max_length=settings["max_seq_length"])
    return tokenizer


def require_file(folder: Path, file: str) -> Path:
    """The path of a file that a bundle cannot do without.

    Raises:
        InputError: the folder or the file is missing.
    """
    if not folder.is_dir():
        raise InputError(f"There is no bundle {folder}. Give the folder that `distillabse export` wrote.")
    if not (folder / file).is_file():
        raise InputError(f"The bundle {folder} has no {file}. Export or download it again.")
    return folder / file


def _whole_characters(text: str) -> str:
    """Join the halves of surrogate pairs; a half that stands alone becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _default_prompt(folder: Path) -> str:
    """The prompt that belongs before every text, where the model has one."""
    path = folder / layout.SENTENCE_TRANSFORMERS_SETTINGS
    settings = read_json(path) if path.is_file() else {}
    name = settings.get("default_prompt_name")
    return str(settings["prompts"][name]) if name else ""


def _pad_id(tokenizer: Tokenizer, folder: Path) -> int:
    """The id of the padding token; switches off the padding that tokenizer.json may ask for."""
    if padding := tokenizer.padding:
        tokenizer.no_padding()
        return int(padding["pad_id"])
    file = require_file(folder, layout.TOKENIZER_SETTINGS)
    token = read_json(file).get("pad_token")
    number = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
    if number is None:
        raise InputError(f"{file} names no `pad_token` of the vocabulary. Export or download the bundle again.")
    return int(number)
