"""Records with the hashes by which they are found, held out and shuffled, a block at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillabse.corpus.cleaning import near_key, normalised_key, stable_hash, texts_of
from distillabse.corpus.records import SCHEMA, Record, to_table
from distillabse.mixing import mixed

Hashes = NDArray[np.uint64]

KEYED_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("number", pa.int64()),  # in the order of reading
        pa.field("key", pa.uint64()),  # duplicates have the same; a random order
        pa.field("exact_key", pa.uint64()),  # exact duplicates have the same
        pa.field("text_key", pa.uint64()),  # of the normalised text, whichever side it is on
        pa.field("translation_key", pa.uint64()),  # likewise; 0 where there is none
        pa.field("group_key", pa.uint64()),  # 0 where there is none
    ]
)
SHARED_KEYS = ("text_key", "translation_key", "group_key")
"""What rows on two sides of the split must not have in common; 0 stands for nothing."""


def keyed_table(records: Sequence[Record], first_number: int, near_duplicates: bool, seed: int) -> pa.Table:
    """The records with their keys, as `KEYED_SCHEMA` has them.

    With `near_duplicates` texts that differ in digits only are the same text for the split, too.
    """
    normalise = near_key if near_duplicates else normalised_key
    exact = _hashes(["\0".join(texts_of(record)) for record in records])
    texts = _hashes([normalise(record.text) for record in records])
    translations = _hashes(
        [None if record.translation is None else normalise(record.translation) for record in records]
    )
    groups = _hashes([None if record.group is None else f"group\0{record.group}" for record in records])
    salt = np.uint64(stable_hash(f"{seed}:key"))
    near = texts + mixed(translations)  # the order of the two sides matters
    numbers = np.arange(first_number, first_number + len(records))
    keys = [numbers, mixed((near if near_duplicates else exact) ^ salt), exact, texts, translations, groups]
    columns = [*to_table(records).columns, *map(pa.array, keys)]
    return pa.Table.from_arrays(columns, schema=KEYED_SCHEMA)


def uniform(hashes: Hashes, salt: str) -> NDArray[np.float64]:
    """A number in [0, 1) for each hash, independent for every salt."""
    numbers = mixed(hashes ^ np.uint64(stable_hash(salt)))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hashes(texts: Sequence[str | None]) -> Hashes:
    hashes = (0 if text is None else stable_hash(text) for text in texts)
    return np.fromiter(hashes, dtype=np.uint64, count=len(texts))
