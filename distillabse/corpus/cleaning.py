"""Rules that a sentence must meet, and the keys by which texts count as the same."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Literal

from distillabse.config import CleaningConfig
from distillabse.corpus.records import Record, Rejected
from distillabse.corpus.rows import rejected

EXACT_DUPLICATE = "exact duplicate"
NEAR_DUPLICATE = "near duplicate"

# Control characters that are not white space, and invisible marks. The zero-width joiner and non-joiner stay: Persian,
# the languages of India and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)
_DIGITS = re.compile(r"\d+")


def clean(record: Record, config: CleaningConfig) -> Record | Rejected:
    """The cleaned record, or why it is dropped; what was read before does not matter."""
    sides = texts_of(record)
    cleaned = [clean_text(side, config.normalization) for side in sides]
    if reason := _fault(cleaned, config):
        return rejected(record.source, None, reason, " | ".join(sides))
    if cleaned == sides:
        return record
    translation = None if record.translation is None else cleaned[1]
    return Record(cleaned[0], record.language, translation, record.translation_language, record.source, record.group)


class Duplicates:
    """Remembers clean records, so that later duplicates are found.

    Memory: two sets of 64-bit hashes, about 150 bytes a record, whatever its length.
    """

    def __init__(self, config: CleaningConfig) -> None:
        self._near_duplicates = config.near_duplicates
        self._exact: set[int] = set()
        self._near: set[int] = set()

    def rejected(self, record: Record) -> Rejected | None:
        """Why a clean record is dropped, if it is."""
        sides = texts_of(record)
        if _seen(self._exact, sides):
            return duplicate(record, EXACT_DUPLICATE)
        if self._near_duplicates and _seen(self._near, [near_key(side) for side in sides]):
            return duplicate(record, NEAR_DUPLICATE)
        return None


def duplicate(record: Record, reason: str) -> Rejected:
    """A clean record that is dropped as a duplicate."""
    return rejected(record.source, None, reason, " | ".join(texts_of(record)))


def texts_of(record: Record) -> list[str]:
    """The text and, in a pair, its translation."""
    return [record.text] if record.translation is None else [record.text, record.translation]


def clean_text(text: str, normalization: Literal["NFC", "NFKC", "none"]) -> str:
    """Unicode-normalised text without control or invisible characters, white space collapsed to single spaces."""
    if normalization != "none":
        text = unicodedata.normalize(normalization, text)
    if not text.isprintable():  # None of the invisible ones is printable, and asking is faster than searching.
        text = _INVISIBLE.sub("", text)
    return " ".join(text.split())


def normalised_key(text: str) -> str:
    """What is left of a text for telling whether it is the same: NFKC, case-folded, letters, marks and digits only.

    A text without any of these, such as a row of emoji, is its own key.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_LETTERS_MARKS_DIGITS) or folded


def near_key(text: str) -> str:
    """`normalised_key` with every number the same: what near duplicates have in common."""
    return _DIGITS.sub("0", normalised_key(text))


def display_width(text: str) -> int:
    """Length in columns of a terminal: ideographs, kana and hangul count twice, which makes lengths comparable."""
    if text.isascii():
        return len(text)
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _fault(sides: list[str], config: CleaningConfig) -> str | None:
    if min(map(len, sides)) < config.min_characters:
        return "too short"
    if max(map(len, sides)) > config.max_characters:
        return "too long"
    if len(sides) == 2:
        widths = [display_width(side) for side in sides]
        if max(widths) > config.max_length_ratio * min(widths):
            return "length ratio"
        if sides[0] == sides[1]:
            return "identical sides"
    return None


def _seen(hashes: set[int], texts: list[str]) -> bool:
    """Whether the texts were seen before; they are remembered."""
    before = len(hashes)
    hashes.add(stable_hash("\0".join(texts)))
    return len(hashes) == before


class _LettersMarksDigits(dict[int, str | None]):
    """A table for str.translate that deletes every other character, filled as characters turn up."""

    def __missing__(self, codepoint: int) -> str | None:
        character = chr(codepoint)
        self[codepoint] = character if unicodedata.category(character)[0] in "LMN" else None
        return self[codepoint]


_LETTERS_MARKS_DIGITS = _LettersMarksDigits()
