"""The corpus stage: read, clean, split, mix and write."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from distillabse.config import CorpusConfig, JobConfig, Source
from distillabse.corpus.cleaning import EXACT_DUPLICATE, NEAR_DUPLICATE, Cleaner
from distillabse.corpus.records import Record, Rejected, sentences, write_records
from distillabse.corpus.sources import read_source
from distillabse.corpus.splitting import mix_languages, split_records
from distillabse.layout import RunFolder
from distillabse.storage import new_folder, write_json

logger = logging.getLogger(__name__)
_ROWS_PER_UPDATE = 1000


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
    corpus = build_corpus(config.corpus, config.seed)
    with new_folder(run.corpus) as folder:
        for name, records in corpus.splits.items():
            write_records(folder / run.split(name).name, records)
        write_json(folder / run.corpus_counts.name, corpus.counts)
        with (folder / run.rejected.name).open("w", encoding="utf-8") as file:
            for row in corpus.rejected:
                values = {
                    "source": row.source,
                    "line_number": row.line_number,
                    "reason": row.reason,
                    "sample": row.sample,
                }
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
    logger.info("%s: %s", run.corpus, _summary(corpus.counts))


def build_corpus(config: CorpusConfig, seed: int) -> Corpus:
    """Read, clean, split and mix; the same config and seed give the same corpus.

    Raises:
        InputError: a source cannot be used, or the text cannot be split.
    """
    kept, source_counts, samples = _read_and_clean(config, seed)
    splits = split_records(kept, config.split, seed)
    split_rows = sum(map(len, splits.values()))
    train_rows = len(splits["train"])
    limits = {"train": config.max_sentences}
    splits = {
        name: mix_languages(records, limits.get(name), config.temperature, seed) for name, records in splits.items()
    }
    counts = {
        "sources": source_counts,
        "duplicates": {
            "exact": sum(source["rejected"].get(EXACT_DUPLICATE, 0) for source in source_counts),
            "near": sum(source["rejected"].get(NEAR_DUPLICATE, 0) for source in source_counts),
        },
        "dropped": {
            "rest of held-out groups": len(kept) - split_rows,
            "beyond max_sentences": train_rows - len(splits["train"]),
        },
        "splits": {name: _split_counts(records) for name, records in splits.items()},
    }
    return Corpus(splits, counts, samples)


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


class _Rate(ProgressColumn):
    """Rows per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} rows/s", style="progress.data.speed")


def _read_and_clean(config: CorpusConfig, seed: int) -> tuple[list[Record], list[dict[str, Any]], list[Rejected]]:
    """The clean records, the counts of every source, and samples of what was rejected."""
    cleaner = Cleaner(config.cleaning)
    kept: list[Record] = []
    samples: list[Rejected] = []
    read: Counter[str] = Counter()
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in _read_all(config.sources, seed):
        read[row.source] += 1
        outcome = row if isinstance(row, Rejected) else cleaner.clean(row)
        if isinstance(outcome, Record):
            kept.append(outcome)
            continue
        reasons[outcome.source][outcome.reason] += 1
        if reasons[outcome.source][outcome.reason] <= config.rejected_sample:
            samples.append(outcome)
    counts = [
        {
            "source": source,
            "read": rows,
            "kept": rows - reasons[source].total(),
            "rejected": dict(sorted(reasons[source].items())),
        }
        for source, rows in read.items()
    ]
    return kept, counts, samples


def _read_all(sources: Sequence[Source], seed: int) -> Iterator[Record | Rejected]:
    """The rows of all sources, one after another, with a progress bar on a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} rows"), _Rate())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        rows = (row for source in sources for row in read_source(source, seed))
        for number, row in enumerate(rows, start=1):
            yield row
            if number % _ROWS_PER_UPDATE == 0:
                progress.update(task, completed=number, description=f"Reading {row.source}")


def _split_counts(records: Sequence[Record]) -> dict[str, Any]:
    distinct = sentences(records)
    languages = Counter(sentence.language for sentence in distinct)
    return {"rows": len(records), "sentences": len(distinct), "languages": dict(sorted(languages.items()))}


def _summary(counts: dict[str, Any]) -> str:
    splits = (
        f"{name} {split['rows']:,} rows ({split['sentences']:,} sentences, {len(split['languages'])} languages)"
        for name, split in counts["splits"].items()
    )
    duplicates, dropped = counts["duplicates"], counts["dropped"]
    return (
        f"{'; '.join(splits)}; duplicates: {duplicates['exact']:,} exact, {duplicates['near']:,} near; not used: "
        + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    )
