"""What a corpus uses of an encoder's vocabulary, and the encoder with no more than that, or with a new one."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distillabse.config import JobConfig
from distillabse.console import figures_table
from distillabse.corpus.records import Sentence, count_records, iterate_records, read_records, sentences
from distillabse.layout import RunFolder
from distillabse.models.teacher import transformer_of
from distillabse.models.tokens import tokenise
from distillabse.storage import new_folder, write_json
from distillabse.vocabulary.counting import (
    COMMON_SCRIPTS,
    count_tokens,
    coverage_thresholds,
    used_scripts,
)
from distillabse.vocabulary.making import make_tokenizer, with_tokenizer
from distillabse.vocabulary.selection import select_rows
from distillabse.vocabulary.trimming import table_rows, trim_encoder, trimmable

if TYPE_CHECKING:
    from rich.table import Table
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

STREAMED_ROWS = 1_000_000
"""Training rows, each a sentence or a pair, that are held in memory to count their tokens with corpus.streaming."""
_STEPS = 3
_RECOUNTED = 20_000  # sentences of each language that are counted again between the steps
_SCRIPT_COVERAGE = 0.999  # of a language's characters, where `size` is given instead of a coverage


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a student.

    Attributes:
        encoder: the teacher or base model, as it is, trimmed or with a new vocabulary.
        token_counts: how often the corpus uses each row of its embedding table, special tokens included: int64 [rows].
        report: what the corpus uses, and what trimming changes, per language.
    """

    encoder: SentenceTransformer
    token_counts: NDArray[np.int64]
    report: dict[str, Any]


def vocabulary_stage(config: JobConfig, run: RunFolder) -> None:
    """Trim the vocabulary or make one, as the configuration says, count what the corpus uses, write `run.vocabulary`.

    With corpus.streaming only the first `STREAMED_ROWS` rows are counted, which are a random sample, as the split is
    shuffled. The report then holds corpus_rows and corpus_rows_counted, too.

    Raises:
        ConfigurationError: a tokenizer that cannot be trimmed, or a size that is too small.
        InputError: a language of which the teacher knows nothing.
    """
    from distillabse.models.folder import save_encoder
    from distillabse.models.teacher import load_base

    base = load_base(config)
    settings = config.vocabulary
    rows = iterate_records(run.split("train"))
    train = sentences(islice(rows, STREAMED_ROWS) if config.corpus.streaming else rows)
    if settings.kind == "trim":
        held_out = sentences(read_records(run.split("dev")))
        vocabulary = trim_vocabulary(base, train, held_out, settings.coverage, settings.size)
    else:
        if settings.kind == "train":
            assert settings.size is not None
            logger.info("Making a %s tokenizer of %d tokens", settings.algorithm, settings.size)
            texts = (sentence.text for sentence in train)
            tokenizer = make_tokenizer(texts, settings.size, settings.algorithm, settings.lower_case)
            base = with_tokenizer(base, tokenizer, config.seed)
        vocabulary = keep_vocabulary(base, train, settings.coverage)
    if config.corpus.streaming:
        available = count_records(run.split("train"))
        counted = min(available, STREAMED_ROWS)
        vocabulary.report.update(corpus_rows=available, corpus_rows_counted=counted)
        logger.info("Tokens were counted in the first %d of %d training rows", counted, available)
    with new_folder(run.vocabulary) as folder:
        write_json(folder / run.vocabulary_counts.name, vocabulary.report)
        np.save(folder / run.token_counts.name, vocabulary.token_counts)
        if settings.kind != "keep":
            save_encoder(vocabulary.encoder, folder / run.base_encoder.name)
    report = vocabulary.report
    logger.info(
        "The corpus uses %d of %d vocabulary rows; %d cover %.4g %% of every language's tokens%s",
        report["rows_used"], report["rows"], report["rows_for_coverage"], 100 * report["coverage"],
        f"; {report['rows_kept']} rows are kept" if "rows_kept" in report else "",
    )  # fmt: skip


def _select_in_steps(
    teacher: SentenceTransformer,
    texts: Mapping[str, Sequence[str]],
    words: Mapping[str, NDArray[np.int64]],
    scripts: Sequence[str],
    size: int,
) -> NDArray[np.int64]:
    """At most `size` rows of the teacher, chosen from fewer and fewer; int64, ascending."""
    sample = {language: rows[:: -(-len(rows) // _RECOUNTED)] for language, rows in texts.items()}
    largest = np.count_nonzero(_sum(words))
    shrinkage = min(1.0, size / largest) ** (1 / _STEPS)
    encoder, rows = teacher, np.arange(table_rows(teacher))
    for step in range(1, _STEPS):
        kept = select_rows(encoder, words, scripts, 1.0, max(size, round(largest * shrinkage**step)))
        # What was of no use so far may be a piece of a word that goes.
        kept = np.union1d(kept, np.flatnonzero(_sum(words) == 0))
        rows, encoder = rows[kept], trim_encoder(encoder, kept)
        words = _words(encoder, count_tokens(encoder, sample))
    return rows[select_rows(encoder, words, scripts, 1.0, size)]


def keep_vocabulary(teacher: SentenceTransformer, corpus: Iterable[Sentence], coverage: float = 0.999) -> Vocabulary:
    """The teacher's own vocabulary, and what the corpus uses of it.

    Args:
        teacher: its tokenizer counts.
        corpus: sentences with their language.
        coverage: share of each language's tokens that `rows_for_coverage` of the report must cover.

    Returns:
        The teacher itself. The report holds rows (of the embedding table), rows_used, coverage, rows_for_coverage
        (union over languages), and per language: sentences, tokens, tokens_per_sentence, unknown_rate, rows_used,
        rows_for_coverage. Special tokens are left out of it.
    """
    texts = _by_language(corpus)
    counts = count_tokens(teacher, texts)
    return Vocabulary(teacher, _sum(counts), _usage(teacher, texts, counts, coverage))


def trim_vocabulary(
    teacher: SentenceTransformer,
    corpus: Iterable[Sentence],
    held_out: Iterable[Sentence] = (),
    coverage: float = 0.999,
    size: int | None = None,
) -> Vocabulary:
    """The teacher with the rows that a corpus needs: the most used of every language, and single characters.

    A text all of whose tokens are kept gets the same tokens and the same vector (see `trim_encoder`); in
    any other text the words without a row of their own fall back to pieces.

    Args:
        teacher: any WordPiece, Unigram or BPE sentence encoder; it is not changed.
        corpus: sentences with their language: what the rows are chosen by.
        held_out: sentences with their language: what the effect on the tokens is measured on.
        coverage: share of every language's tokens whose rows are kept.
        size: keep at most so many rows instead. They are chosen in a few steps, and the tokens counted again after
            each: the pieces of words that lose their row are more frequent then than they were.

    Returns:
        The trimmed teacher. The report holds what `keep_vocabulary` says of the whole vocabulary, and rows_kept, size,
        scripts (ISO 15924 codes whose single characters are kept), table_bytes_before, table_bytes_after, and per
        language: rows_kept (that it uses), tokens_kept (share of its tokens in the corpus), and of the held-out
        sentences, None where there are none: identical (share that gets the same tokens), tokens_per_sentence_before
        and _after, unknown_rate_before and _after.

    Raises:
        ConfigurationError: a tokenizer that cannot be trimmed, or a coverage or size that keeps nothing of a language.
        InputError: a language of which the teacher knows nothing.
    """
    trimmable(teacher)
    texts = _by_language(corpus)
    counts = count_tokens(teacher, texts)
    words = _words(teacher, counts)
    script_coverage = coverage if size is None else _SCRIPT_COVERAGE
    scripts = sorted(
        set(COMMON_SCRIPTS).union(*(used_scripts(language_texts, script_coverage) for language_texts in texts.values()))
    )
    # With `size` this is only the start, but one that is too small is refused before anything is counted again.
    rows = select_rows(teacher, words, scripts, coverage, size)
    if size is not None:
        rows = _select_in_steps(teacher, texts, words, scripts, size)
    trimmed = trim_encoder(teacher, rows)

    report = _usage(teacher, texts, counts, coverage)
    held_out_texts = _by_language(held_out)
    for language, row in report["languages"].items():
        row["rows_kept"] = int(np.count_nonzero(words[language][rows]))
        row["tokens_kept"] = float(words[language][rows].sum() / words[language].sum())
        row.update(_effect(teacher, trimmed, rows, held_out_texts.get(language, [])))
    report.update(
        rows_kept=len(rows),
        size=size,
        scripts=scripts,
        table_bytes_before=_table_bytes(teacher),
        table_bytes_after=_table_bytes(trimmed),
    )
    return Vocabulary(trimmed, _sum(count_tokens(trimmed, texts)), report)


def vocabulary_table(report: Mapping[str, Any]) -> Table:
    """The report for people, at most 80 columns wide."""
    trimmed = "rows_kept" in report
    title = f"Vocabulary: {report['rows']:,} rows, the corpus uses {report['rows_used']:,}"
    caption = None
    headings = ["sentences", "tokens", "rows\nused"]
    if trimmed:
        before, after = report["table_bytes_before"] / 1e6, report["table_bytes_after"] / 1e6
        title += f", {report['rows_kept']:,} are kept ({before:,.1f} MB → {after:,.1f} MB)"
        caption = "dev: held-out sentences that get the same tokens, tokens per sentence, unknown tokens"
        headings += ["rows\nkept", "tokens\nkept", "dev:\nsame", "dev: tokens/\nsentence", "dev:\nunknown"]
    else:
        headings += ["tokens/\nsentence", "unknown", f"rows for\n{100 * report['coverage']:.4g} %"]
    table = figures_table(title, caption, [""], headings)
    for language, row in report["languages"].items():
        cells = (f"{row['sentences']:,}", f"{row['tokens']:,}", f"{row['rows_used']:,}")
        table.add_row(language, *cells, *(_trimmed_cells(row) if trimmed else _usage_cells(row)))
    return table


def _usage_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return f"{row['tokens_per_sentence']:.1f}", f"{row['unknown_rate']:.2%}", f"{row['rows_for_coverage']:,}"


def _trimmed_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    kept = (f"{row['rows_kept']:,}", f"{row['tokens_kept']:.2%}")
    if row["identical"] is None:
        return (*kept, "-", "-", "-")
    return (
        *kept,
        f"{row['identical']:.1%}",
        f"{row['tokens_per_sentence_before']:.1f} → {row['tokens_per_sentence_after']:.1f}",
        f"{100 * row['unknown_rate_before']:.2f} → {row['unknown_rate_after']:.2%}",
    )


def _by_language(corpus: Iterable[Sentence]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    for sentence in corpus:
        texts[sentence.language].append(sentence.text)
    return dict(sorted(texts.items()))


def _sum(counts: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    total: NDArray[np.int64] = np.sum(list(counts.values()), axis=0, dtype=np.int64)
    return total


def _words(encoder: SentenceTransformer, counts: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
    """The counts of every language without special tokens."""
    return {language: _without_special(encoder, row_counts) for language, row_counts in counts.items()}


def _without_special(encoder: SentenceTransformer, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Without special tokens, the unknown token among them."""
    words = counts.copy()
    words[encoder.tokenizer.all_special_ids] = 0
    return words


def _usage(
    teacher: SentenceTransformer,
    texts: Mapping[str, Sequence[str]],
    counts: Mapping[str, NDArray[np.int64]],
    coverage: float,
) -> dict[str, Any]:
    unknown = teacher.tokenizer.unk_token_id
    languages: dict[str, dict[str, Any]] = {}
    lowest = np.full(table_rows(teacher), np.inf)
    for language, row_counts in counts.items():
        words = _without_special(teacher, row_counts)
        thresholds = coverage_thresholds(words)
        lowest = np.minimum(lowest, thresholds)
        unknown_tokens = 0 if unknown is None else int(row_counts[unknown])
        tokens = int(words.sum()) + unknown_tokens
        languages[language] = {
            "sentences": len(texts[language]),
            "tokens": tokens,
            "tokens_per_sentence": tokens / len(texts[language]),
            "unknown_rate": unknown_tokens / tokens if tokens else 0.0,
            "rows_used": int(np.count_nonzero(words)),
            "rows_for_coverage": int(np.count_nonzero(thresholds < coverage)),
        }
    return {
        "rows": table_rows(teacher),
        "rows_used": int(np.count_nonzero(np.isfinite(lowest))),
        "coverage": coverage,
        "rows_for_coverage": int(np.count_nonzero(lowest < coverage)),
        "languages": languages,
    }


def _effect(
    teacher: SentenceTransformer, trimmed: SentenceTransformer, rows: NDArray[np.int64], texts: Sequence[str]
) -> dict[str, float | None]:
    """What trimming to these rows does to the tokens of held-out texts of one language."""
    names = ("tokens_per_sentence", "unknown_rate")
    if not texts:
        return {"identical": None, **{f"{name}_{when}": None for name in names for when in ("before", "after")}}
    before, after = tokenise(teacher, texts), tokenise(trimmed, texts)
    same = sum(rows[new].tolist() == old for old, new in zip(before, after, strict=True))
    effect: dict[str, float | None] = {"identical": same / len(texts)}
    for when, encoder, ids in (("before", teacher, before), ("after", trimmed, after)):
        special = set(encoder.tokenizer.all_special_ids) - {encoder.tokenizer.unk_token_id}
        tokens = [token for row in ids for token in row if token not in special]
        unknown = sum(token == encoder.tokenizer.unk_token_id for token in tokens)
        effect[f"tokens_per_sentence_{when}"] = len(tokens) / len(texts)
        effect[f"unknown_rate_{when}"] = unknown / len(tokens) if tokens else 0.0
    return effect


def _table_bytes(encoder: SentenceTransformer) -> int:
    weight = transformer_of(encoder).get_input_embeddings().weight
    return int(weight.numel() * weight.element_size())
