"""What a tokenizer does to single characters, asked of the tokenizer itself."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class Characters:
    """What a tokenizer does to single characters before it looks up words.

    Attributes:
        dropped: code points of which nothing is left.
        spaces: those that end a word.
        alone: those that are a word of their own.
        changed: characters that become others, as texts in which spaces part words.
    """

    dropped: list[int] = field(default_factory=list)
    spaces: list[int] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)


def character_rules(tokenizer: Tokenizer) -> Characters:
    """Ask `tokenizer` about every assigned character of Unicode; NUL, which ends a C string, is left out."""
    rules = Characters()
    apart = _Apart(tokenizer)
    for code in range(1, 0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Cs"):
            continue
        result = "".join(map(apart.spaced, tokenizer.normalizer.normalize_str(character)))
        if result == character:
            continue
        if not result:
            rules.dropped.append(code)
        elif result.isspace():
            rules.spaces.append(code)
        elif result.split() == [character]:
            rules.alone.append(code)
        else:
            rules.changed[character] = result
    return rules


class _Apart:
    """Knows which characters the pre-tokenizer makes a word of their own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._split: Callable[[str], list[Any]] = tokenizer.pre_tokenizer.pre_tokenize_str
        self._known: dict[str, str] = {}

    def spaced(self, character: str) -> str:
        """The character, between spaces if words end before and begin after it; a space for white space."""
        if character not in self._known:
            words = [word for word, _ in self._split(f"a{character}a")]
            alone = {1: character, 2: " ", 3: f" {character} "}
            self._known[character] = alone[len(words)]
        return self._known[character]
