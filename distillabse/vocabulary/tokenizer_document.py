"""A fast tokenizer as the content of its tokenizer.json: the rows that its rules need, and the same with fewer rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distillabse.errors import ConfigurationError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_FAMILIES = ("WordPiece", "Unigram", "BPE")
_WORD_START = "▁"  # how SentencePiece writes a space
_REMEDY = "Keep the vocabulary as it is with `vocabulary.kind: keep`, or choose another teacher."


@dataclass(frozen=True)
class TokenizerDocument:
    """What tokenizer.json says, by row of the embedding table.

    Attributes:
        content: the parsed tokenizer.json; its model is a WordPiece, Unigram or BPE model.
        tokens: the token of every row that has one, added tokens included.
        special: rows of the special tokens, that of the unknown token included.
    """

    content: Mapping[str, Any]
    tokens: Mapping[int, str]
    special: frozenset[int]

    @classmethod
    def of(cls, encoder: SentenceTransformer) -> TokenizerDocument:
        """The document of an encoder's tokenizer.

        Raises:
            ConfigurationError: a tokenizer written in Python, or one that is not WordPiece, Unigram or BPE.
        """
        tokenizer = encoder.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigurationError(
                f"vocabulary: {type(tokenizer).__name__} is not a fast tokenizer (it has no tokenizer.json), so it "
                f"cannot be trimmed. {_REMEDY}"
            )
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        family = content["model"].get("type")
        if family not in _FAMILIES:
            raise ConfigurationError(
                f"vocabulary: a {family} tokenizer cannot be trimmed; {', '.join(_FAMILIES)} can. {_REMEDY}"
            )
        vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        return cls(content, {row: token for token, row in vocabulary.items()}, frozenset(tokenizer.all_special_ids))

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of every token."""
        return {token: row for row, token in self.tokens.items()}

    @cached_property
    def needed(self) -> frozenset[int]:
        """Rows that the tokenizer cannot do without, whatever the corpus.

        Special, added and unknown tokens and those of the post-processor; byte tokens and the byte alphabet; the mark
        of a word's start; and in a Unigram model the piece with the lowest score: the score of an unknown character
        is that score less 10, so without it unknown characters would become cheaper than they were.
        """
        model = self.content["model"]
        rows = {token["id"] for token in self.content["added_tokens"]} | set(self.special)
        rows |= set(_processor_rows(self.content["post_processor"]))
        texts = {model.get("unk_token"), _WORD_START, *(f"<0x{byte:02X}>" for byte in range(256))}
        if self._bytes is not None:
            texts |= self._bytes.keys()
        rows |= {self.rows[text] for text in texts if text in self.rows}
        if model["type"] == "Unigram":
            scores = [score for _, score in model["vocab"]]
            rows.add(scores.index(min(scores)))
            if model["unk_id"] is not None:
                rows.add(model["unk_id"])
        return frozenset(rows)

    def characters(self, scripts: Iterable[str]) -> set[int]:
        """Rows of tokens that are a single character of these scripts, at a word's start or inside it.

        Args:
            scripts: ISO 15924 codes, for instance Latn.
        """
        from fontTools.unicodedata import script

        wanted = set(scripts)
        single = ((row, self._text(token)) for row, token in self.tokens.items())
        return {row for row, text in single if len(text) == 1 and script(text) in wanted}

    def closed(self, rows: Iterable[int]) -> set[int]:
        """These rows and, in a BPE model, the rows of everything that they are merged from."""
        closed = set(rows)
        waiting = [row for row in closed if row in self._parts]
        while waiting:
            new = self._parts.get(waiting.pop(), set()) - closed
            closed |= new
            waiting.extend(new)
        return closed

    def trimmed(self, rows: Iterable[int]) -> dict[str, Any]:
        """The content with these rows only, numbered from 0 in their old order.

        Args:
            rows: must hold `needed` and be `closed`.
        """
        new = {old: row for row, old in enumerate(sorted(rows))}
        return {
            **self.content,
            "padding": None,  # as transformers leaves it: it sets padding and truncation with every call
            "truncation": None,
            "added_tokens": [{**token, "id": new[token["id"]]} for token in self.content["added_tokens"]],
            "post_processor": _renumbered(self.content["post_processor"], new),
            "model": self._trimmed_model(new),
        }

    def _trimmed_model(self, new: Mapping[int, int]) -> dict[str, Any]:
        model = self.content["model"]
        if model["type"] == "Unigram":
            pieces = [piece for row, piece in enumerate(model["vocab"]) if row in new]
            return {**model, "vocab": pieces, "unk_id": new.get(model["unk_id"])}
        vocabulary = {token: new[row] for token, row in model["vocab"].items() if row in new}
        if model["type"] == "WordPiece":
            return {**model, "vocab": vocabulary}
        merges = [
            [left, right]
            for left, right in model["merges"]
            if left in vocabulary and right in vocabulary and self._merged(left, right) in vocabulary
        ]
        return {**model, "vocab": vocabulary, "merges": merges}

    @cached_property
    def _parts(self) -> dict[int, set[int]]:
        """For every row that merges make, the rows that they make it from."""
        parts: dict[int, set[int]] = defaultdict(set)
        for left, right in self.content["model"].get("merges") or ():
            parts[self.rows[self._merged(left, right)]] |= {self.rows[left], self.rows[right]}
        return dict(parts)

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self.content["model"]["continuing_subword_prefix"] or "") :]

    @cached_property
    def _bytes(self) -> dict[str, int] | None:
        """The byte that each symbol of a byte-level vocabulary stands for; None for a vocabulary of characters."""
        if not any(_holds_byte_level(self.content[part]) for part in ("normalizer", "pre_tokenizer")):
            return None
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {symbol: byte for byte, symbol in bytes_to_unicode().items()}

    def _text(self, token: str) -> str:
        """A token without the marks of its place in a word; empty where it is a part of a character."""
        model = self.content["model"]
        if self._bytes is not None:
            try:
                return bytes(self._bytes[symbol] for symbol in token).decode().removeprefix(" ")
            except (KeyError, UnicodeDecodeError):
                return ""
        token = token.removeprefix(model.get("continuing_subword_prefix") or "").removeprefix(_WORD_START)
        return token.removesuffix(model.get("end_of_word_suffix") or "")


def _holds_byte_level(part: Any) -> bool:
    """Whether a normalizer or pre-tokenizer, or one in its sequence, turns text into byte symbols."""
    if not isinstance(part, dict):
        return False
    inner = [*part.get("pretokenizers", ()), *part.get("normalizers", ())]
    return part.get("type") == "ByteLevel" or any(map(_holds_byte_level, inner))


def _processor_rows(processor: Mapping[str, Any] | None) -> list[int]:
    if processor is None:
        return []
    rows = [row for inner in processor.get("processors", ()) for row in _processor_rows(inner)]
    rows.extend(processor[name][1] for name in ("sep", "cls") if name in processor)
    if processor["type"] == "TemplateProcessing":
        rows.extend(row for token in processor["special_tokens"].values() for row in token["ids"])
    return rows


def _renumbered(processor: Mapping[str, Any] | None, new: Mapping[int, int]) -> dict[str, Any] | None:
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in processor:
        changed["processors"] = [_renumbered(inner, new) for inner in processor["processors"]]
    for name in ("sep", "cls"):
        if name in processor:
            changed[name] = [processor[name][0], new[processor[name][1]]]
    if processor["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**token, "ids": [new[row] for row in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    return changed
