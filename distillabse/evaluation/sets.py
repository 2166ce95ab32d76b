"""The texts that a student is judged on."""

from __future__ import annotations

import random

from distillabse.config import JobConfig
from distillabse.corpus.records import Record, Sentence, read_records, sentences
from distillabse.corpus.sources import read_source
from distillabse.errors import InputError
from distillabse.layout import RunFolder

TEST = "test"


def evaluation_sets(config: JobConfig, run: RunFolder) -> dict[str, list[Sentence]]:
    """The corpus's test split as 'test', then every set of `config.evaluation`, each a seeded sample of at most
    `max_sentences` distinct sentences.

    Raises:
        InputError: a set cannot be read or holds fewer than two sentences, or the corpus stage has not run.
    """  # noqa: D205
    limit = config.evaluation.max_sentences
    found = {TEST: _sample(sentences(read_records(run.split("test"))), limit, config.seed)}
    for name, source in config.evaluation.sets.items():
        records = [record for record in read_source(source, config.seed) if isinstance(record, Record)]
        found[name] = _sample(sentences(records), limit, config.seed)
    for name, chosen in found.items():
        if len(chosen) < 2:
            raise InputError(f"evaluation set {name!r} holds {len(chosen)} sentences; fidelity needs at least two.")
    return found


def _sample(available: list[Sentence], limit: int, seed: int) -> list[Sentence]:
    return available if len(available) <= limit else random.Random(seed).sample(available, limit)
