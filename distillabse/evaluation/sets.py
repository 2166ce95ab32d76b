"""The texts that a student is judged on."""

from __future__ import annotations

import random

from distillabse.config import JobConfig
from distillabse.corpus.records import Record, Sentence, known_texts, read_records, sentences
from distillabse.corpus.sources import read_source
from distillabse.errors import InputError
from distillabse.layout import RunFolder

TEST = "test"


def corpus_test_set(config: JobConfig, run: RunFolder) -> list[Sentence]:
    """The corpus's own test split: a seeded sample of at most `max_sentences` distinct sentences.

    Raises:
        InputError: the corpus stage has not run, or held out fewer than two sentences.
    """
    return _sample(TEST, sentences(read_records(run.split("test"))), config)


def texts_for_speed(config: JobConfig, run: RunFolder) -> list[str]:
    """Texts of the test split in languages that teacher and student both know, each once.

    A tokenizer that takes a whole word of another script for one unknown token is fast there, and nothing follows.

    Raises:
        InputError: as `corpus_test_set`.
    """
    return list(dict.fromkeys(known_texts(corpus_test_set(config, run), config.teacher.languages)))


def evaluation_sets(config: JobConfig, run: RunFolder) -> dict[str, list[Sentence]]:
    """The test split as 'test', then every set of `config.evaluation`, sampled in the same way.

    Raises:
        InputError: a set cannot be read or holds fewer than two sentences, or the corpus stage has not run.
    """
    found = {TEST: corpus_test_set(config, run)}
    for name, source in config.evaluation.sets.items():
        records = [record for record in read_source(source, config.seed) if isinstance(record, Record)]
        found[name] = _sample(name, sentences(records), config)
    return found


def _sample(name: str, available: list[Sentence], config: JobConfig) -> list[Sentence]:
    if len(available) < 2:
        raise InputError(f"evaluation set {name!r} holds {len(available)} sentences; fidelity needs at least two.")
    limit = config.evaluation.max_sentences
    return available if len(available) <= limit else random.Random(config.seed).sample(available, limit)
