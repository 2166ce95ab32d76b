"""Splitting without leakage, and mixing languages."""

from __future__ import annotations

import random
from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillabse.config import SplitConfig
from distillabse.corpus.cleaning import normalised_key, stable_hash
from distillabse.corpus.records import Record
from distillabse.errors import InputError

SPLITS = ("train", "dev", "test")


def split_records(records: Sequence[Record], config: SplitConfig, seed: int) -> dict[str, list[Record]]:
    """Split into train, dev and test so that no normalised text and no group is on two sides.

    Rows that share a normalised text, on either side, or a group are connected, and a connected component goes to one
    side whole. Components fill dev, then test, in an order that depends only on the seed and their own texts, until
    the shares of rows are reached; one that is larger than the room left stays in train. Where `max_dev` or `max_test`
    is smaller than the share, that many rows are sampled from what is held out: components without a sampled row go
    back to train, other rows of sampled components are in no split.

    Args:
        records: The rows, in any order.
        config: Shares and most rows of dev and test.
        seed: Chooses the order of components and the sampled rows.

    Returns:
        The records of "train", "dev" and "test", each in the order of `records`.

    Raises:
        InputError: nothing is left for train, or nothing fits into a dev or test split that should have rows.
    """
    component_of, names = _components(records)
    sizes = np.bincount(component_of, minlength=len(names))
    room = {side: max(1, round(share * len(records))) if share else 0 for side, share in _shares(config).items()}
    held_out = _fill(sizes, names, dict(room), seed)
    rows: dict[str, list[int]] = {}
    unavailable: set[int] = set()
    for side, most in (("dev", config.max_dev), ("test", config.max_test)):
        rows[side] = [row for row, component in enumerate(component_of) if held_out.get(component) == side]
        if not rows[side] and room[side]:
            raise InputError(
                f"The corpus is too small or too connected to split: of its {len(records):,} rows no group that shares "
                f"sentences fits into a {side} split of {room[side]:,} rows; there are {len(sizes):,} such groups, the "
                f"largest has {sizes.max(initial=0):,} rows. Add text, raise corpus.split.{side}, or set it to 0."
            )
        if most is not None and len(rows[side]) > most:
            rows[side] = sorted(random.Random(f"{seed}:{side}").sample(rows[side], most))
        unavailable.update(component_of[row] for row in rows[side])
    rows["train"] = [row for row, component in enumerate(component_of) if component not in unavailable]
    if not rows["train"]:
        raise InputError("Nothing is left to train on. Lower corpus.split.dev and corpus.split.test, or add text.")
    return {side: [records[row] for row in rows[side]] for side in SPLITS}


def mix_languages(records: Sequence[Record], max_sentences: int | None, temperature: float, seed: int) -> list[Record]:
    """Draw rows without replacement so that languages are in proportion to count^(1/temperature), and shuffle them.

    A language that has fewer rows than its part gives all it has, and the others share the rest, so that the total is
    always reached. A row's language is that of its translation, or of its text where it has none.

    Args:
        records: The rows.
        max_sentences: How many rows to draw; None or more than there are draws all.
        temperature: 1 keeps the languages' proportions; the higher, the more equal they get.
        seed: Chooses rows and order.
    """
    generator = random.Random(f"{seed}:mix")
    rows = defaultdict(list)
    for row, record in enumerate(records):
        rows[record.translation_language or record.language].append(row)
    counts = {language: len(rows[language]) for language in sorted(rows)}
    total = len(records) if max_sentences is None else min(max_sentences, len(records))
    quotas = language_quotas(counts, total, temperature)
    chosen = sorted(row for language, quota in quotas.items() for row in generator.sample(rows[language], quota))
    generator.shuffle(chosen)
    return [records[row] for row in chosen]


def language_quotas(counts: dict[str, int], total: int, temperature: float) -> dict[str, int]:
    """Rows to draw of each language: water-filling, then largest remainders, so that they add up to `total`.

    Args:
        counts: Rows there are of each language.
        total: Rows to draw in all, at most as many as there are.
        temperature: As in `mix_languages`.
    """
    weights = {language: count ** (1 / temperature) for language, count in counts.items()}
    parts: dict[str, float] = {}
    free = set(counts)
    while free:
        rest = total - sum(parts.values())
        weight = sum(weights[language] for language in free)
        full = {language for language in free if rest * weights[language] / weight >= counts[language]}
        if not full:
            parts |= {language: rest * weights[language] / weight for language in free}
            break
        parts |= {language: counts[language] for language in full}
        free -= full
    quotas = {language: int(parts[language]) for language in counts}
    by_remainder = sorted(counts, key=lambda language: (quotas[language] - parts[language], language))
    for language in by_remainder[: total - sum(quotas.values())]:
        quotas[language] += 1
    return quotas


def _shares(config: SplitConfig) -> dict[str, float]:
    return {"dev": config.dev, "test": config.test}


def _components(records: Sequence[Record]) -> tuple[list[int], NDArray[np.uint64]]:
    """The number of each row's connected component, and each component's smallest key."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, hashes = array("q"), array("Q")
    for row, record in enumerate(records):
        keys = [normalised_key(text) for text in (record.text, record.translation) if text is not None]
        for key in keys if record.group is None else [*keys, f"group\0{record.group}"]:
            rows.append(row)
            hashes.append(stable_hash(key))
    keys_found, key_of = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    nodes = len(records) + len(keys_found)
    edges = (np.ones(len(rows), dtype=np.int8), (np.asarray(rows), len(records) + key_of))
    count, labels = connected_components(coo_array(edges, shape=(nodes, nodes)), directed=False)
    names = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(names, labels[len(records) :], keys_found)
    return labels[: len(records)].tolist(), names


def _fill(sizes: NDArray[Any], names: NDArray[np.uint64], room: dict[str, int], seed: int) -> dict[int, str]:
    """The side of every component that is held out."""
    sides: dict[int, str] = {}
    for component in sorted(range(len(names)), key=lambda component: stable_hash(f"{seed}:{names[component]}")):
        side = next((side for side, left in room.items() if sizes[component] <= left), None)
        if side is not None:
            sides[component] = side
            room[side] -= int(sizes[component])
    return sides
