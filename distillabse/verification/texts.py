"""The texts that a bundle is examined on when it stands alone."""

from __future__ import annotations

import glob
import random
from pathlib import Path

from distillabse.config import PHRASEBOOK_LANGUAGES, FileSource, PhrasebookSource
from distillabse.corpus.files import is_table
from distillabse.corpus.records import Record, Sentence, sentences
from distillabse.corpus.sources import read_source

UNDETERMINED = "und"
TEXTS_PER_LANGUAGE = 40
MAX_TEXTS = 2000
_SEED = 0


def built_in_texts(per_language: int = TEXTS_PER_LANGUAGE) -> list[Sentence]:
    """Sentences of the packaged phrasebook, as many of each of its languages, shuffled."""
    found = _read(PhrasebookSource(expansions_per_pattern=1))
    by_language = {language: [row for row in found if row.language == language] for language in PHRASEBOOK_LANGUAGES}
    shuffle = random.Random(_SEED)
    chosen = [row for rows in by_language.values() for row in shuffle.sample(rows, min(per_language, len(rows)))]
    shuffle.shuffle(chosen)
    return chosen


def texts_of_file(path: Path, most: int = MAX_TEXTS) -> list[Sentence]:
    """The distinct texts of a file, at most `most` of them drawn at random.

    Args:
        path: as for `distinct_texts`.
        most: how many at most.

    Raises:
        InputError: the file does not exist, cannot be read, lacks a column, or holds no text.
    """
    found = distinct_texts(path)
    return found if len(found) <= most else random.Random(_SEED).sample(found, most)


def distinct_texts(path: Path) -> list[Sentence]:
    """The distinct texts of a file, in their order.

    Args:
        path: a text a line; or a TSV, CSV, JSONL or Parquet file with the columns text and language.

    Raises:
        InputError: the file does not exist, cannot be read, lacks a column, or holds no text.
    """
    if is_table(path):
        source = FileSource(path=glob.escape(str(path)), text="text", language_column="language")
    else:
        source = FileSource(path=glob.escape(str(path)), language=UNDETERMINED)
    return _read(source)


def _read(source: FileSource | PhrasebookSource) -> list[Sentence]:
    return sentences(row for row in read_source(source, _SEED) if isinstance(row, Record))
