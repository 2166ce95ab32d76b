"""Which rows are for training and which for the test: nothing may be on both sides."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from distillabse.errors import InputError
from distillabse.finetuning.data import NUMBERED

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def groups_of(rows: Dataset) -> NDArray[np.int64]:
    """Numbers of the groups that rows belong to, int64 [rows].

    Two rows are in one group if they share an id, in whatever language, or the context or first text in one language,
    or a row between them does. So all translations of a paragraph and all of its questions are one group.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    keys: dict[tuple[str, str], int] = {}
    own = [
        [keys.setdefault(("", identity), len(keys)), keys.setdefault((language, text), len(keys))]
        for language, identity, text in zip(rows["language"], rows["id"], rows[_text_column(rows)], strict=True)
    ]
    columns = np.asarray(own, dtype=np.int64).reshape(-1)
    size = len(own) + len(keys)
    links = (np.ones(len(columns)), (np.repeat(np.arange(len(own)), 2), len(own) + columns))
    _, labels = connected_components(coo_matrix(links, shape=(size, size)), directed=False)
    return np.unique(labels[: len(own)], return_inverse=True)[1].astype(np.int64)


def held_out_split(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into training and test rows by groups: no id, paragraph or first text is on both sides.

    Args:
        rows: examples of a task, in one or several languages.
        share: of the groups, how many are for the test; at least one is on either side.
        seed: of the choice.

    Raises:
        InputError: there are not two groups.
    """
    groups = groups_of(rows)
    count = int(groups.max()) + 1
    if count < 2:
        raise InputError("All rows share an id or a text, so none can be held out. Give --train and --test instead.")
    size = min(max(round(share * count), 1), count - 1)
    chosen = np.isin(groups, np.random.default_rng(seed).permutation(count)[:size])
    return rows.select(np.flatnonzero(~chosen)), rows.select(np.flatnonzero(chosen))


def shared_rows(train: Dataset, test: Dataset) -> int:
    """How many test rows share their id or context, or of pairs both texts, with a training row."""
    texts = ("language", "context") if _text_column(train) == "context" else ("language", "first", "second")
    known = set(zip(*(train[column] for column in texts), strict=True))
    shared = np.asarray([key in known for key in zip(*(test[column] for column in texts), strict=True)])
    if "context" in texts:  # questions have ids of their own; pairs may have plain numbers
        identities = {identity for identity in train["id"] if not identity.startswith(NUMBERED)}
        shared |= np.asarray([identity in identities for identity in test["id"]])
    return int(shared.sum())


def sample_rows(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most so many rows of every language, the same ids in all of them."""
    if limit is None:
        return rows
    identities = np.asarray(rows["id"])
    distinct = np.unique(identities)
    if len(distinct) <= limit:
        return rows
    chosen = np.random.default_rng(seed).choice(distinct, size=limit, replace=False)
    return rows.select(np.flatnonzero(np.isin(identities, chosen)))


def _text_column(rows: Dataset) -> str:
    return "context" if "context" in rows.column_names else "first"
