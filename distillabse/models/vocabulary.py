"""What a corpus uses of the teacher's vocabulary."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from distillabse.config import JobConfig
from distillabse.corpus.records import Sentence, read_records, sentences
from distillabse.layout import RunFolder
from distillabse.storage import new_folder, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


def vocabulary_stage(config: JobConfig, run: RunFolder) -> None:
    """Count tokens of the training split with the teacher's tokenizer and write `run.vocabulary`."""
    from distillabse.models.teacher import load_teacher

    counts = vocabulary_counts(
        load_teacher(config.teacher), sentences(read_records(run.split("train"))), config.vocabulary.coverage
    )
    with new_folder(run.vocabulary) as folder:
        write_json(folder / run.vocabulary_counts.name, counts)
    logger.info(
        "The corpus uses %d of %d vocabulary rows; %d cover %.1f %% of every language's tokens",
        counts["rows_used"], counts["rows"], counts["rows_for_coverage"], 100 * config.vocabulary.coverage,
    )  # fmt: skip


def vocabulary_counts(teacher: SentenceTransformer, corpus: Iterable[Sentence], coverage: float) -> dict[str, Any]:
    """Use of the teacher's vocabulary, per language.

    Args:
        teacher: its tokenizer counts; special tokens are left out.
        corpus: sentences with their language.
        coverage: share of each language's tokens that `rows_for_coverage` must cover.

    Returns:
        rows (of the embedding table), rows_used, rows_for_coverage (union over languages), and per language:
        sentences, tokens, tokens_per_sentence, unknown_rate, rows_used, rows_for_coverage.
    """
    from distillabse.training.data import tokenise

    by_language: dict[str, list[str]] = defaultdict(list)
    for sentence in corpus:
        by_language[sentence.language].append(sentence.text)
    special = set(teacher.tokenizer.all_special_ids)
    unknown = teacher.tokenizer.unk_token_id
    languages: dict[str, dict[str, Any]] = {}
    used: set[int] = set()
    covering: set[int] = set()
    for language, texts in sorted(by_language.items()):
        everything = Counter(token for row in tokenise(teacher, texts) for token in row)
        tokens = {token: count for token, count in everything.items() if token not in special}
        needed = rows_for_coverage(tokens, coverage)
        total = sum(tokens.values()) + everything[unknown]
        languages[language] = {
            "sentences": len(texts),
            "tokens": total,
            "tokens_per_sentence": total / len(texts),
            "unknown_rate": everything[unknown] / total if total else 0.0,
            "rows_used": len(tokens),
            "rows_for_coverage": len(needed),
        }
        used |= tokens.keys()
        covering |= set(needed)
    return {
        "rows": len(teacher.tokenizer),
        "rows_used": len(used),
        "coverage": coverage,
        "rows_for_coverage": len(covering),
        "languages": languages,
    }


def rows_for_coverage(counts: Mapping[int, int], coverage: float) -> Sequence[int]:
    """The fewest token ids, most frequent first, that make up at least `coverage` of all tokens."""
    wanted, total, chosen = coverage * sum(counts.values()), 0, []
    for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if total >= wanted:
            break
        chosen.append(token)
        total += count
    return chosen


def vocabulary_table(counts: Mapping[str, Any]) -> Table:
    """The same for people."""
    table = Table(title=f"Vocabulary: {counts['rows']:,} rows, the corpus uses {counts['rows_used']:,}")
    table.add_column("language")
    for title in (
        "sentences",
        "tokens",
        "tokens/sentence",
        "unknown",
        "rows used",
        f"rows for {counts['coverage']:.1%}",
    ):
        table.add_column(title, justify="right")
    for language, row in counts["languages"].items():
        table.add_row(
            language, f"{row['sentences']:,}", f"{row['tokens']:,}", f"{row['tokens_per_sentence']:.1f}",
            f"{row['unknown_rate']:.2%}", f"{row['rows_used']:,}", f"{row['rows_for_coverage']:,}",
        )  # fmt: skip
    return table
