from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import tempfile
import tracemalloc
from collections import Counter
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from distillabse.config import CleaningConfig, CorpusConfig, JobConfig, PhrasebookSource, SplitConfig
from distillabse.corpus.buckets import Buckets, Limits
from distillabse.corpus.build import build_corpus, corpus_stage, counts_table
from distillabse.corpus.cleaning import near_key, normalised_key
from distillabse.corpus.deduplication import SHARING
from distillabse.corpus.records import Record, read_records
from distillabse.corpus.splitting import SPLITS
from distillabse.corpus.streaming import stream_corpus, stream_records
from distillabse.corpus.tally import Tally
from distillabse.errors import InputError, StorageError
from distillabse.layout import RunFolder

NOTHING_HELD_OUT = SplitConfig(dev=0.0, test=0.0)
SMALL = Limits(block_rows=500, bucket_bits=2, bucket_bytes=20_000)


def stream(records, folder, limits=SMALL, seed=3, **config):
    """The splits and counts of these records."""
    config = CorpusConfig(sources=[PhrasebookSource()], streaming=True, **config)
    paths = {name: Path(folder) / f"{name}.parquet" for name in SPLITS}
    corpus = stream_records(records, config, seed, paths, Tally(samples=5), limits)
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(path.name for path in paths.values())
    return {name: read_records(path) for name, path in paths.items()}, corpus


def word(number):
    """A word of letters for each number, so that no two are near duplicates."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def sentence(number, language="en"):
    return Record(f"Sentence {word(number)}.", language, source="s")


def keys(records):
    texts = {normalised_key(text) for record in records for text in (record.text, record.translation) if text}
    return texts | {("group", record.group) for record in records if record.group}


@pytest.fixture
def files(tmp_path):
    """A .tsv of 3,000 pairs in two languages with duplicates, broken and short lines."""
    rows = [f"An English sentence {word(row)}.\tEin Satz {word(row)}.\tde" for row in range(2000)]
    rows += [f"An English sentence {word(row)}.\tUne phrase {word(row)}.\tfr" for row in range(900)]
    rows += [row.upper() for row in rows[:40]] + rows[100:150] + ["a\tb\tde"] * 7 + ["ragged"] * 3
    random.Random(0).shuffle(rows)
    (tmp_path / "pairs.tsv").write_text("\n".join(["en\txx\tlanguage", *rows]))
    columns = {"translation": "xx", "translation_language_column": "language", "text": "en", "language": "en"}
    return [{"kind": "files", "path": str(tmp_path / "pairs.tsv"), **columns}]


@pytest.mark.parametrize("near", [True, False])
def test_the_same_rows_are_kept_as_in_memory(files, tmp_path, near):
    config = CorpusConfig(sources=files, split=NOTHING_HELD_OUT, cleaning=CleaningConfig(near_duplicates=near))
    expected = build_corpus(config, seed=3)
    folder = tmp_path / "out"
    corpus = stream_corpus(config, 3, {name: folder / f"{name}.parquet" for name in SPLITS})
    train = read_records(folder / "train.parquet")
    assert len(train) == len(set(train)) == (2900 if near else 2940)
    assert set(train) == set(expected.splits["train"])
    assert train != expected.splits["train"]
    for key in ("sources", "duplicates"):
        assert corpus.counts[key] == expected.counts[key]
    assert corpus.counts["duplicates"] == {"exact": 50, "near": 40 if near else 0}
    assert Counter(row.reason for row in corpus.rejected) == Counter(row.reason for row in expected.rejected)
    languages = corpus.counts["splits"]["train"]["languages"]
    assert languages == Counter(code for row in train for code in (row.language, row.translation_language))
    assert corpus.counts["splits"]["train"]["sentences_with_repeats"] == 2 * len(train)


# Few letters make texts that are often shared, once normalised; the first letter keeps sides and languages apart.
TEXTS = st.text("abcd1", min_size=2, max_size=4).flatmap(lambda text: st.sampled_from([text, text.upper() + "!"]))
RECORDS = st.builds(
    lambda text, translation, group: Record(text, "en", translation, translation and "de", "s", group),
    TEXTS,
    st.none() | TEXTS.map("x".__add__) | TEXTS,
    st.none() | st.sampled_from("ghijklmnopqrst"),
)


@settings(deadline=None, max_examples=60)
@given(
    records=st.lists(RECORDS, min_size=20, max_size=60),
    share=st.sampled_from([0.1, 0.3]),
    most=st.sampled_from([1, 5, 50]),
    near=st.booleans(),
    seed=st.integers(0, 3),
    block_rows=st.sampled_from([1, 7, 100]),
)
def test_no_text_and_no_group_is_on_two_sides(records, share, most, near, seed, block_rows):
    split = SplitConfig(dev=share, test=share, max_dev=most, max_test=most)
    with tempfile.TemporaryDirectory() as folder:
        try:
            splits, corpus = stream(
                records,
                folder,
                Limits(block_rows=block_rows, bucket_bits=2),
                seed,
                split=split,
                cleaning=CleaningConfig(near_duplicates=near),
            )
        except InputError:
            assume(False)
    found = [keys(splits[side]) for side in SPLITS]
    assert len(set().union(*found)) == sum(map(len, found))
    kept = [record for rows in splits.values() for record in rows]
    assert not Counter(kept) - Counter(records)
    texts = [tuple(map(near_key if near else str, (row.text, row.translation or ""))) for row in kept]
    assert len(set(texts)) == len(texts)
    for name in ("dev", "test"):
        assert 1 <= len(splits[name]) <= most
    dropped = sum(corpus.counts["duplicates"].values()) + corpus.counts["dropped"][SHARING]
    assert len(kept) + dropped == len(records)
    assert {name: len(rows) for name, rows in splits.items()} == {
        name: corpus.counts["splits"][name]["rows"] for name in SPLITS
    }


def test_shares_are_shares_of_rows_and_what_is_beyond_the_maximum_goes_back(tmp_path):
    alone = [sentence(row) for row in range(6000)]
    pairs = [Record(f"Pair {word(row)}", "en", f"Paar {word(row)}", "de") for row in range(6000)]
    grouped = [Record(f"Row {word(row)}", "en", f"Zeile {word(row)}", "de", group=str(row)) for row in range(6000)]
    split = {"dev": 0.1, "test": 0.2}
    for records in (alone, pairs, grouped):
        splits, corpus = stream(records, tmp_path, split=SplitConfig(**split, max_dev=6000, max_test=6000))
        assert corpus.counts["dropped"][SHARING] == 0
        # Four standard deviations of the binomial distribution.
        assert abs(len(splits["dev"]) - 600) < 93
        assert abs(len(splits["test"]) - 1200) < 124
        fewer, corpus = stream(records, tmp_path, split=SplitConfig(**split, max_dev=70, max_test=30))
        assert [len(fewer[name]) for name in SPLITS] == [5900, 70, 30]
        assert corpus.counts["dropped"][SHARING] == 0
        assert fewer["dev"] == splits["dev"][:70] and fewer["test"] == splits["test"][:30]


def test_the_translations_of_a_held_out_sentence_are_held_out_with_it(tmp_path):
    records = [
        Record(f"English {word(row)}", "en", f"{language} {word(row)}", language)
        for language in ("de", "fr", "sv", "nl", "it")
        for row in range(1000)
    ]
    split = {"dev": 0.1, "test": 0.1}
    splits, corpus = stream(records, tmp_path, split=SplitConfig(**split, max_dev=5000, max_test=5000))
    assert corpus.counts["dropped"][SHARING] == 0
    assert set(Counter(row.text for row in splits["dev"]).values()) == {5}
    fewer, corpus = stream(records, tmp_path, split=SplitConfig(**split, max_dev=20, max_test=5000))
    sampled = {row.text for row in fewer["dev"]}
    assert len(fewer["dev"]) == 20 and corpus.counts["dropped"][SHARING] == 5 * len(sampled) - 20
    # With English on the other side a held-out row takes the other four out of train.
    turned = [Record(row.translation, row.translation_language, row.text, "en") for row in records]
    splits, corpus = stream(turned, tmp_path, split=SplitConfig(**split, max_dev=20, max_test=5000))
    assert len(splits["dev"]) == 20
    held_out = Counter(row.translation for name in ("dev", "test") for row in splits[name])
    assert corpus.counts["dropped"][SHARING] == sum(5 - rows for rows in held_out.values())


def test_neither_the_order_of_reading_nor_the_limits_change_the_result(tmp_path):
    records = [sentence(row) for row in range(500)]
    records += [Record(f"Pair {word(row)}", "en", "Paar " + word(row % 100), "de") for row in range(500)]
    split = SplitConfig(dev=0.05, test=0.05, max_dev=20, max_test=20)
    first, corpus = stream(records, tmp_path, split=split, max_sentences=800)
    assert corpus.counts["dropped"][SHARING] > 0
    for limits in (Limits(), Limits(block_rows=130, bucket_bits=2, bucket_bytes=3000)):
        shuffled = random.Random(1).sample(records, len(records))
        again, counted = stream(shuffled, tmp_path, limits, split=split, max_sentences=800)
        assert again == first and counted.counts == corpus.counts
    assert stream(records, tmp_path, seed=4, split=split, max_sentences=800)[0]["train"] != first["train"]


def test_duplicates_that_are_far_apart(tmp_path):
    records = [sentence(row) for row in range(3000)]
    copies = [sentence(0), Record("SENTENCE, " + word(1), "de", source="t"), sentence(2)]
    splits, corpus = stream([*records, *copies], tmp_path, split=NOTHING_HELD_OUT)
    assert set(splits["train"]) == set(records) and len(splits["train"]) == 3000
    assert corpus.counts["duplicates"] == {"exact": 2, "near": 1}
    assert {(row.source, row.reason, row.sample) for row in corpus.rejected} == {
        ("s", "exact duplicate", records[0].text),
        ("s", "exact duplicate", records[2].text),
        ("t", "near duplicate", "SENTENCE, " + word(1)),
    }


def test_a_near_duplicate_of_a_held_out_row_is_not_trained_on(tmp_path):
    records = [Record(f"Row {word(row)}", "en", source="s", group=str(row)) for row in range(500)]
    copies = [Record(f"ROW, {word(row)}!", "en", source="s", group=f"copy {row}") for row in range(500)]
    split = SplitConfig(dev=0.2, test=0.2)
    splits, corpus = stream([*records, *copies], tmp_path, split=split)
    assert corpus.counts["duplicates"] == {"exact": 0, "near": 500}
    assert (
        sum(map(len, splits.values())) == 500 == len({near_key(row.text) for rows in splits.values() for row in rows})
    )


def test_memory_holds_when_one_sentence_has_most_rows(tmp_path, monkeypatch):
    sizes = []
    add = Buckets.add
    monkeypatch.setattr(Buckets, "add", lambda self, table: (sizes.append(table.nbytes), add(self, table)))
    records = [Record(f"Line {row}.", "en", source="s") for row in range(5000)]
    splits, corpus = stream([*records, sentence(1)], tmp_path, split=NOTHING_HELD_OUT)
    assert set(splits["train"]) == {records[0], sentence(1)}
    assert corpus.counts["duplicates"] == {"exact": 0, "near": 4999}
    # Ten blocks of reading, of each of which one row is written.
    assert len(sizes) == 11 and len(corpus.rejected) == 5


def test_buckets_sort_by_the_whole_key(tmp_path):
    generator = np.random.default_rng(0)
    # The top 40 bits are the same: only the eleventh level of 16 tells them apart.
    keys = np.unique(generator.integers(1 << 24, size=5000, dtype=np.uint64) + np.uint64(7 << 40))
    buckets = Buckets(tmp_path / "b", lambda table: table.sort_by("key"), Limits(bucket_bits=4, bucket_bytes=100))
    for part in np.array_split(generator.permutation(keys), 10):
        buckets.add(pa.table({"key": part}))
    tables = list(buckets.tables())
    assert pa.concat_tables(tables).column("key").to_pylist() == keys.tolist()
    assert 1 < max(map(len, tables)) and max(part.nbytes for part in tables) <= 100
    assert not any(path.is_file() for path in (tmp_path / "b").rglob("*"))


def test_train_is_shuffled(tmp_path):
    records = [sentence(row, "de" if row < 5000 else "fr") for row in range(10_000)]
    splits, _ = stream(records, tmp_path, Limits(block_rows=1000, bucket_bits=4), split=NOTHING_HELD_OUT)
    place = {record: row for row, record in enumerate(records)}
    places = np.array([place[record] for record in splits["train"]])
    assert sorted(places) == list(range(10_000))
    assert abs(np.corrcoef(places, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.04
    for tenth in np.array_split(places < 5000, 10):
        assert abs(tenth.mean() - 0.5) < 0.07


@pytest.mark.parametrize(
    ("total", "temperature", "expected"),
    [
        (100, 1.0, {"de": 90, "fr": 9, "sv": 1}),
        (100, 2.0, {"de": 70, "fr": 22, "sv": 8}),
        (500, 1000.0, {"de": 400, "fr": 90, "sv": 10}),
        (5000, 5.0, {"de": 900, "fr": 90, "sv": 10}),
    ],
)
def test_languages_are_drawn_exactly(tmp_path, total, temperature, expected):
    counts = {"de": 900, "fr": 90, "sv": 10}
    records = [
        Record(f"{code} {word(row)}", "en", "x" + word(row), code) for code in counts for row in range(counts[code])
    ]
    splits, corpus = stream(
        [*records, *records[:50]], tmp_path, split=NOTHING_HELD_OUT, max_sentences=total, temperature=temperature
    )
    assert Counter(row.translation_language for row in splits["train"]) == expected
    assert set(splits["train"]) <= set(records)
    assert corpus.counts["dropped"] == {SHARING: 0, "beyond max_sentences": 1000 - min(total, 1000)}
    assert corpus.counts["duplicates"]["exact"] == 50
    languages = corpus.counts["splits"]["train"]["languages"]
    assert languages == {**expected, "en": sum(expected.values())}


def test_every_row_is_as_likely_to_be_drawn(tmp_path):
    records = [sentence(row) for row in range(200)]
    drawn = Counter()
    for seed in range(60):
        splits, _ = stream(records, tmp_path, seed=seed, split=NOTHING_HELD_OUT, max_sentences=50)
        drawn.update(splits["train"])
    # 60 draws with probability 1/4: mean 15, standard deviation 3.4.
    assert drawn.total() == 3000
    assert 2 < min(drawn[record] for record in records) and max(drawn.values()) < 29


def test_what_cannot_be_split(tmp_path):
    few = [sentence(row) for row in range(3)]
    with pytest.raises(InputError, match=r"hold out 0\.001 of it by hash.*no row is left for dev.*streaming off"):
        stream(few, tmp_path, split=SplitConfig(dev=0.001, test=0.0))
    with pytest.raises(InputError, match="Nothing is left to train on"):
        stream(few, tmp_path, split=SplitConfig(dev=1.0, test=0.0))
    assert not (tmp_path / "train.parquet").exists() and not (tmp_path / "train.partitions").exists()
    with pytest.raises(ValidationError, match=r"set corpus\.split\.max_dev and max_test"):
        CorpusConfig(sources=[PhrasebookSource()], streaming=True, split=SplitConfig(max_test=None))


@pytest.fixture
def job(files, tmp_path):
    corpus = {"sources": files, "streaming": True, "split": {"dev": 0.05, "test": 0.05, "max_test": 20}}
    blocks = {"corpus": corpus, "teacher": {"model": "m"}, "objectives": [{"kind": "cosine"}]}
    return JobConfig(name="job", output=tmp_path / "runs", **blocks)


def test_the_stage_writes_the_same_files(job):
    run = RunFolder(job.run_folder)
    corpus_stage(job, run)
    names = ["corpus.json", "dev.parquet", "rejected.jsonl", "test.parquet", "train.parquet"]
    assert sorted(file.name for file in run.corpus.iterdir()) == names
    assert [path.name for path in run.root.iterdir()] == ["corpus"]
    counts = json.loads(run.corpus_counts.read_text())
    assert counts["sources"][0]["read"] == 3000 and counts["sources"][0]["kept"] == 2900
    rows = {name: len(read_records(run.split(name))) for name in SPLITS}
    assert rows == {name: counts["splits"][name]["rows"] for name in SPLITS}
    assert 1 <= rows["test"] <= 20 and sum(rows.values()) + counts["dropped"][SHARING] == 2900
    assert counts["splits"]["dev"]["sentences"] == len(keys(read_records(run.split("dev"))))
    rejected = [json.loads(line) for line in run.rejected.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["reason"] for row in rejected) == {
        "too short": 7, "wrong number of columns": 3, "exact duplicate": 20, "near duplicate": 20
    }  # fmt: skip
    console = Console(file=StringIO(), width=300)
    console.print(counts_table(counts))
    assert f"train {rows['train']:,} rows ({2 * rows['train']:,} sentences with repeats" in console.file.getvalue()


def test_a_full_disk_leaves_nothing(job, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = RunFolder(job.run_folder)
    monkeypatch.setattr(Buckets, "tables", full)
    with pytest.raises(StorageError, match="No space left"):
        corpus_stage(job, run)
    assert list(run.root.iterdir()) == []


def _killed_in_the_second_pass(job, run):
    tables = Buckets.tables

    def killed(self):
        for number, table in enumerate(tables(self)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield table

    Buckets.tables = killed
    corpus_stage(job, run)


def test_a_killed_run_leaves_nothing_that_counts_and_the_next_one_tidies_up(job):
    run = RunFolder(job.run_folder)
    process = multiprocessing.get_context("fork").Process(target=_killed_in_the_second_pass, args=(job, run))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not run.corpus.exists()
    (leftover,) = run.root.iterdir()
    assert any(leftover.rglob("*.arrow"))
    corpus_stage(job, run)
    assert [path.name for path in run.root.iterdir()] == ["corpus"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    limits = Limits(block_rows=200, bucket_bits=4, bucket_bytes=50_000)
    split = SplitConfig(dev=0.1, test=0.1, max_dev=100, max_test=100)

    def peaks(rows):
        records = (Record(f"{word(row)} {'filler ' * 5}", "en", source="s") for row in range(rows))
        before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            splits = stream_records(
                records,
                CorpusConfig(sources=[PhrasebookSource()], streaming=True, split=split, max_sentences=rows // 2),
                0,
                {name: tmp_path / f"{name}.parquet" for name in SPLITS},
                Tally(5),
                limits,
            ).counts["splits"]
            assert splits["train"]["rows"] == rows // 2
            return tracemalloc.get_traced_memory()[1], pool.max_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(before)

    few, many = peaks(2000), peaks(20_000)
    assert many[0] < 1.3 * few[0]
    assert many[1] < 1.3 * few[1]
