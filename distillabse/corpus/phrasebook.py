"""The built-in parallel corpus: hand-written sentence patterns in eight languages, filled from lists of slot values."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distillabse.config import PHRASEBOOK_LANGUAGES, PhrasebookSource
from distillabse.corpus.records import Record
from distillabse.errors import InputError

FOLDER = Path(__file__).parent / "phrasebook"
_SLOT = re.compile(r"\{(\w+)\}")
_OPENING = '¿¡"“”„«»([…- \u2013\u2014\u00a0\u202f'

Translations = dict[str, str]
"""The same text in every language, by language code."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A sentence with slots.

    Attributes:
        source: phrasebook:<topic>.
        group: phrasebook:<topic>:<row>, rows counted from 1.
        sentence: The sentence with its slots in braces.
        slots: The values of every slot in the sentence, in the order of the English sentence.
    """

    source: str
    group: str
    sentence: Translations
    slots: dict[str, list[Translations]]


def read_phrasebook(source: PhrasebookSource, seed: int) -> Iterator[Record]:
    """Expand every pattern; deterministic for one seed.

    With English among the languages each sentence gives one English-to-other pair for every other language, otherwise
    one pair of the first language with each other one; a single language gives monolingual records.
    """
    languages = list(dict.fromkeys(source.languages))
    first = "en" if "en" in languages else languages[0]
    others = [language for language in languages if language != first]
    for pattern in read_patterns():
        for sentence in expand(pattern, source.expansions_per_pattern, seed):
            if not others:
                yield Record(sentence[first], first, source=pattern.source, group=pattern.group)
            for other in others:
                yield Record(sentence[first], first, sentence[other], other, pattern.source, pattern.group)


def phrasebook_size(expansions_per_pattern: int, seed: int = 0) -> tuple[int, int]:
    """How many patterns there are, and how many distinct sentences, each counted once for its eight translations."""
    patterns = read_patterns()
    tuples = {
        tuple(sentence[language] for language in PHRASEBOOK_LANGUAGES)
        for pattern in patterns
        for sentence in expand(pattern, expansions_per_pattern, seed)
    }
    return len(patterns), len(tuples)


def expand(pattern: Pattern, count: int, seed: int) -> Iterator[Translations]:
    """Fill the slots with at most `count` distinct combinations of values, drawn without replacement."""
    total = math.prod(len(values) for values in pattern.slots.values())
    combinations: Sequence[int] = range(total)
    if total > count:
        combinations = sorted(random.Random(f"{seed}:{pattern.group}").sample(combinations, count))
    for combination in combinations:
        values: dict[str, Translations] = {}
        for slot, choices in pattern.slots.items():
            combination, choice = divmod(combination, len(choices))
            values[slot] = choices[choice]
        yield {language: _filled(text, language, values) for language, text in pattern.sentence.items()}


def read_patterns(folder: Path = FOLDER) -> list[Pattern]:
    """Read every <topic>.patterns.tsv with its <topic>.slots.tsv.

    Raises:
        InputError: a file is missing or malformed; the message names the line.
    """
    files = sorted(folder.glob("*.patterns.tsv"))
    if not files:
        raise InputError(f"{folder} holds no <topic>.patterns.tsv. Install the package again.")
    return [pattern for file in files for pattern in _read_topic(file)]


def _read_topic(file: Path) -> Iterator[Pattern]:
    topic = file.name.removesuffix(".patterns.tsv")
    slots: dict[str, list[Translations]] = {}
    for _, row in _read_table(file.with_name(f"{topic}.slots.tsv"), ["slot", *PHRASEBOOK_LANGUAGES]):
        slots.setdefault(row.pop("slot"), []).append(row)
    for line, sentence in _read_table(file, list(PHRASEBOOK_LANGUAGES)):
        names = _SLOT.findall(sentence["en"])
        for language, text in sentence.items():
            if set(_SLOT.findall(text)) != set(names) or re.search(r"[{}]", _SLOT.sub("", text)):
                raise InputError(f"{file.name}, line {line}: the {language} sentence has other slots than the English.")
        if unknown := [name for name in names if name not in slots]:
            raise InputError(f"{file.name}, line {line}: no values for {', '.join(unknown)} in {topic}.slots.tsv.")
        values = {name: slots[name] for name in names}
        yield Pattern(f"phrasebook:{topic}", f"phrasebook:{topic}:{line - 1}", sentence, values)


def _read_table(file: Path, header: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column, of every line after the header."""
    if not file.is_file():
        raise InputError(f"{file} does not exist. Install the package again.")
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        cells = line.split("\t")
        if number == 1 and cells != header:
            raise InputError(f"{file.name}, line 1: the header is {cells}; it should be {header}.")
        if len(cells) != len(header) or not all(cell.strip() for cell in cells):
            raise InputError(f"{file.name}, line {number}: {len(header)} cells with text are needed.")
        if number > 1:
            yield number, dict(zip(header, cells, strict=True))


def _filled(text: str, language: str, values: dict[str, Translations]) -> str:
    """The sentence with its slots filled and its first letter in upper case, after opening marks such as ¿."""
    sentence = _SLOT.sub(lambda match: values[match[1]][language], text)
    start = len(sentence) - len(sentence.lstrip(_OPENING))
    letters = 2 if language == "nl" and sentence.startswith("ij", start) else 1  # Dutch IJ counts as one letter.
    return sentence[:start] + sentence[start : start + letters].upper() + sentence[start + letters :]
