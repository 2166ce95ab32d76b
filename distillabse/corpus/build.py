"""The corpus stage: read, clean, split, mix and write."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from distillabse.config import CorpusConfig, JobConfig
from distillabse.corpus.cleaning import Duplicates
from distillabse.corpus.records import Record, Rejected, write_records
from distillabse.corpus.splitting import SPLITS, mix_languages, split_records
from distillabse.corpus.streaming import stream_corpus
from distillabse.corpus.tally import Tally, clean_records, split_counts
from distillabse.layout import RunFolder
from distillabse.storage import new_folder, remove_leftovers, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """A corpus in memory.

    Attributes:
        splits: The records of "train", "dev" and "test", shuffled.
        counts: What corpus.json holds: rows of every source, rejected rows by reason, duplicates, dropped rows, splits.
        rejected: Samples of rejected rows, of every source and reason.
    """

    splits: dict[str, list[Record]]
    counts: dict[str, Any]
    rejected: list[Rejected]


def corpus_stage(config: JobConfig, run: RunFolder) -> None:
    """Build the corpus and write the folder `run.corpus`, whole or not at all.

    Raises:
        InputError: a source cannot be used, or the text cannot be split.
        StorageError: the folder cannot be written.
    """
    remove_leftovers(run.corpus)
    with new_folder(run.corpus) as folder:
        if config.corpus.streaming:
            paths = {name: folder / run.split(name).name for name in SPLITS}
            streamed = stream_corpus(config.corpus, config.seed, paths)
            counts, rejected = streamed.counts, streamed.rejected
            rows = sum(source["read"] for source in counts["sources"])
            for step, seconds in streamed.seconds.items():
                logger.info("%s %d rows took %.0f s, %.0f rows/s", step.capitalize(), rows, seconds, rows / seconds)
        else:
            corpus = build_corpus(config.corpus, config.seed)
            counts, rejected = corpus.counts, corpus.rejected
            for name, records in corpus.splits.items():
                write_records(folder / run.split(name).name, records)
        write_json(folder / run.corpus_counts.name, counts)
        with (folder / run.rejected.name).open("w", encoding="utf-8") as file:
            for row in rejected:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    logger.info("%s: %s", run.corpus, _summary(counts))


def build_corpus(config: CorpusConfig, seed: int) -> Corpus:
    """Read, clean, split and mix; the same config and seed give the same corpus.

    Raises:
        InputError: a source cannot be used, or the text cannot be split.
    """
    tally = Tally(config.rejected_sample)
    kept = list(_clean_records(config, seed, tally))
    splits = split_records(kept, config.split, seed)
    split_rows = sum(map(len, splits.values()))
    train_rows = len(splits["train"])
    limits = {"train": config.max_sentences}
    splits = {
        name: mix_languages(records, limits.get(name), config.temperature, seed) for name, records in splits.items()
    }
    counts = {
        "sources": tally.sources(),
        "duplicates": tally.duplicates(),
        "dropped": {
            "rest of held-out groups": len(kept) - split_rows,
            "beyond max_sentences": train_rows - len(splits["train"]),
        },
        "splits": {name: split_counts(records) for name, records in splits.items()},
    }
    return Corpus(splits, counts, tally.samples)


def counts_table(counts: dict[str, Any]) -> Table:
    """What corpus.json says, as a table for the terminal."""
    table = Table(title="Corpus", caption=_summary(counts))
    table.add_column("Source", overflow="fold")
    for heading in ("Read", "Kept"):
        table.add_column(heading, justify="right")
    table.add_column("Rejected")
    for source in counts["sources"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in source["rejected"].items())
        table.add_row(source["source"], f"{source['read']:,}", f"{source['kept']:,}", reasons)
    return table


def _clean_records(config: CorpusConfig, seed: int, tally: Tally) -> Iterator[Record]:
    duplicates = Duplicates(config.cleaning)
    for record in clean_records(config, seed, tally):
        if duplicate := duplicates.rejected(record):
            tally.reject(duplicate)
        else:
            yield record


def _summary(counts: dict[str, Any]) -> str:
    splits = (
        f"{name} {split['rows']:,} rows ({_sentences(split)}, {len(split['languages'])} languages)"
        for name, split in counts["splits"].items()
    )
    duplicates, dropped = counts["duplicates"], counts["dropped"]
    return (
        f"{'; '.join(splits)}; duplicates: {duplicates['exact']:,} exact, {duplicates['near']:,} near; not used: "
        + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    )


def _sentences(split: dict[str, Any]) -> str:
    if "sentences" in split:
        return f"{split['sentences']:,} sentences"
    return f"{split['sentences_with_repeats']:,} sentences with repeats"
