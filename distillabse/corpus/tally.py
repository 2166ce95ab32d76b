"""What becomes of the rows: counts by source and reason, and samples of what was rejected."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from distillabse.config import CorpusConfig
from distillabse.corpus.cleaning import EXACT_DUPLICATE, NEAR_DUPLICATE, clean
from distillabse.corpus.records import Record, Rejected, sentences
from distillabse.corpus.sources import read_sources


class Tally:
    """Counts rows as they are read and rejected.

    Attributes:
        read: Rows of every source.
        most: How many samples of every source and reason are kept.
        samples: The first rejected rows of every source and reason, as many as asked for.
    """

    def __init__(self, samples: int) -> None:
        self.read: Counter[str] = Counter()
        self.samples: list[Rejected] = []
        self.most = samples
        self._reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def reject(self, row: Rejected) -> None:
        """Count a rejected row."""
        self.reject_alike(row.source, row.reason, 1, (row,))

    def reject_alike(self, source: str, reason: str, count: int, rows: Iterable[Rejected]) -> None:
        """Count so many rows of one source, rejected for one reason; of `rows`, some of them, samples are taken."""
        wanted = self.most - self._reasons[source][reason]
        self._reasons[source][reason] += count
        if wanted > 0:
            self.samples.extend(islice(rows, wanted))

    def sources(self) -> list[dict[str, Any]]:
        """Of every source: source, read, kept, and rejected by reason."""
        return [
            {
                "source": source,
                "read": rows,
                "kept": rows - self._reasons[source].total(),
                "rejected": dict(sorted(self._reasons[source].items())),
            }
            for source, rows in self.read.items()
        ]

    def duplicates(self) -> dict[str, int]:
        """Exact and near duplicates of all sources."""
        return {
            name: sum(reasons[reason] for reasons in self._reasons.values())
            for name, reason in (("exact", EXACT_DUPLICATE), ("near", NEAR_DUPLICATE))
        }


def clean_records(config: CorpusConfig, seed: int, tally: Tally) -> Iterator[Record]:
    """Read all sources and clean their rows; duplicates are still among them.

    Raises:
        InputError: a source cannot be used.
    """
    for row in read_sources(config.sources, seed):
        tally.read[row.source] += 1
        outcome = row if isinstance(row, Rejected) else clean(row, config.cleaning)
        if isinstance(outcome, Rejected):
            tally.reject(outcome)
        else:
            yield outcome


def split_counts(records: Sequence[Record]) -> dict[str, Any]:
    """Rows, distinct sentences, and the latter by language."""
    distinct = sentences(records)
    languages = Counter(sentence.language for sentence in distinct)
    return {"rows": len(records), "sentences": len(distinct), "languages": dict(sorted(languages.items()))}
