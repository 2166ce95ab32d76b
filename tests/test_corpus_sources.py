from __future__ import annotations

import gzip
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from distillabse.config import FileSource, HubSource, MosesSource
from distillabse.corpus.records import Record, Rejected
from distillabse.corpus.sources import read_source
from distillabse.errors import InputError

PAIRS = {"translation": "xx", "translation_language_column": "lang", "text": "en", "language": "en"}
TSV = 'en\txx\tlang\tkind\nHello\tHallo\tde\ta\nSay "hi\tDis "salut\tfr\tb\n'


def read(**source):
    return list(read_source(FileSource(**source), seed=0))


def faults(rows):
    return [(row.line_number, row.reason) for row in rows if isinstance(row, Rejected)]


@pytest.mark.parametrize(
    ("name", "compress"), [("a.tsv", bytes), ("a.tsv.gz", gzip.compress), ("a.tsv.zst", zstandard.compress)]
)
def test_tsv_quotes_are_text_and_files_may_be_compressed(tmp_path, name, compress):
    path = str(tmp_path / name)
    (tmp_path / name).write_bytes(compress(("\ufeff" + TSV.replace("\n", "\r\n")).encode()))
    expected = [Record("Hello", "en", "Hallo", "de", path), Record('Say "hi', "en", 'Dis "salut', "fr", path)]
    assert read(path=path, **PAIRS) == expected
    assert read(path=path, where={"kind": "b"}, **PAIRS) == expected[1:]
    assert read(path=path, limit=1, **PAIRS) == expected[:1]


def test_csv_quoting_and_line_feeds_inside_fields(tmp_path):
    (tmp_path / "a.csv").write_text('text,lang\n"One, two\nthree",en\n"He said ""no""",en\n')
    rows = read(path=str(tmp_path / "a.csv"), language_column="lang")
    assert [row.text for row in rows] == ["One, two\nthree", 'He said "no"']


def test_a_glob_is_sorted_and_plain_text_has_one_sentence_a_line(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(f"From {name}.\nA \u2028 separator ends no line.\n")
    rows = read(path=str(tmp_path / "*.txt"), language="en")
    assert [row.text for row in rows[::2]] == ["From a.", "From b."]
    assert rows[1] == Record("A \u2028 separator ends no line.", "en", source=str(tmp_path / "a.txt"))


def test_parquet_with_undecodable_and_missing_values(tmp_path):
    text = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0\5\0\0\0"), pa.py_buffer(b"ok\xffhi"))
    pq.write_table(pa.table({"text": text, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    rows = read(path=str(tmp_path / "a.parquet"), language="en", where={"other": "3"})
    assert [row.text for row in rows] == ["hi"]
    rows = read(path=str(tmp_path / "a.parquet"), language="en")
    assert faults(rows) == [(2, "broken UTF-8")]
    assert r"\udcff" in rows[1].sample


def test_bad_lines_are_rejected_with_their_numbers_and_reasons(tmp_path):
    lines = ["text\tlang", "fine\ten", "\udcff\ten", "one\ttwo\tthree", "", "  \ten", "text\t ", "a\rb\ten"]
    (tmp_path / "a.tsv").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    rows = read(path=str(tmp_path / "a.tsv"), language_column="lang")
    assert isinstance(rows[0], Record)
    assert faults(rows) == [
        (3, "broken UTF-8"),
        (4, "wrong number of columns"),
        (5, "empty line"),
        (6, "empty text"),
        (7, "no language"),
        (8, "malformed line"),
    ]
    assert rows[2].sample == "one\ttwo\tthree"


def test_bad_json_lines(tmp_path):
    good = [{"text": "fine", "lang": "en"}, {"text": 3, "lang": "en"}, {"lang": "en"}, {"text": None, "lang": "en"}]
    lines = [*map(json.dumps, good), "{broken", "[1]", '{"text": "\\ud800", "lang": "en"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = read(path=str(tmp_path / "a.jsonl"), language_column="lang")
    reasons = ["not text", "missing column", "empty text", "invalid JSON", "not a JSON object", "broken UTF-8"]
    assert faults(rows) == list(enumerate(reasons, start=2))


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.parquet"])
def test_a_missing_column_names_those_found_and_wanted(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"sentence": ["hi"]}), path)
    else:
        path.write_text({"a.tsv": "sentence\nhi\n", "a.jsonl": '{"sentence": "hi"}\n'}[name])
    with pytest.raises(InputError, match=r"no column 'text'\. Columns found: 'sentence'; columns wanted: 'text'"):
        read(path=str(path), language="en")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "is empty"),
        ("a.tsv", b"text\n", "is empty"),
        ("a.tsv", b"text\n\xff\n\n", "no usable row .*1 rows: broken UTF-8, 1 rows: empty line"),
        ("a.txt", b"PK\x03\x04rest", "zip archive"),
        ("a.txt", "hi".encode("utf-16"), "UTF-16"),
        ("a.tsv.gz", gzip.compress(TSV.encode() * 999)[:-20], "cut off"),
        ("a.tsv.zst", zstandard.compress(TSV.encode() * 999)[:-5], "cut off"),
        ("a.parquet", b"nonsense", "cannot be read as Parquet"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    columns = PAIRS if b"xx" in content or name.endswith(("gz", "zst")) else {"language": "en"}
    with pytest.raises(InputError, match=message):
        read(path=str(tmp_path / name), **columns)


def test_a_glob_or_filter_that_matches_nothing(tmp_path):
    with pytest.raises(InputError, match=r"No file matches .*\*\.tsv"):
        read(path=str(tmp_path / "*.tsv"), language="en")
    (tmp_path / "a.tsv").write_text(TSV)
    with pytest.raises(InputError, match="no row passes `where`"):
        read(path=str(tmp_path / "a.tsv"), where={"kind": "c"}, **PAIRS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "exactly one of language and language_column"),
        ({"language": "en", "language_column": "lang"}, "exactly one of language and language_column"),
        ({"language": "en", "translation": "xx"}, "exactly one of translation_language and"),
        ({"language": "en", "translation_language": "de"}, "'translation' names no column"),
    ],
)
def test_every_side_has_exactly_one_language(source, message):
    with pytest.raises(ValidationError, match=message):
        read(path="a.tsv", **source)


@pytest.mark.parametrize("form", ["files", "gzip", "zip"])
def test_moses_pairs(tmp_path, form):
    sides = {"en": "One.\n\nThree.\n", "de": "Eins.\nZwei.\nDrei.\n"}
    path = str(tmp_path / "corpus") if form != "zip" else str(tmp_path / "corpus.zip")
    for language, text in sides.items():
        if form == "files":
            (tmp_path / f"corpus.{language}").write_text(text)
        elif form == "gzip":
            (tmp_path / f"corpus.{language}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(f"Books.de-en.{language}", text)
    source = MosesSource(path=path, language="en", translation_language="de")
    first, second, third = read_source(source, seed=0)
    assert first == Record("One.", "en", "Eins.", "de", path)
    assert (second.line_number, second.reason) == (2, "empty text")
    assert third.translation == "Drei."


def test_moses_faults(tmp_path):
    (tmp_path / "c.en").write_text("1\n2\n3\n")
    (tmp_path / "c.de").write_text("1\n")
    source = MosesSource(path=str(tmp_path / "c"), language="en", translation_language="de")
    with pytest.raises(InputError, match="3 lines of 'en' but 1 lines of 'de'"):
        list(read_source(source, seed=0))
    with pytest.raises(InputError, match=r"c\.fr"):
        list(read_source(source.model_copy(update={"translation_language": "fr"}), seed=0))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("README", "")
    with pytest.raises(InputError, match=r"exactly one member that ends in \.en but holds 0.*README"):
        list(read_source(source.model_copy(update={"path": str(tmp_path / "c.zip")}), seed=0))


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A dataset with two configurations, laid out as on the hub, and no network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    blocks = ""
    for name in ("en-de", "en-fr"):
        (tmp_path / "data" / name).mkdir(parents=True)
        table = pa.table({"english": ["Hi.", None], "non_english": [f"{name}.", "x"], "score": [1, 2]})
        pq.write_table(table, tmp_path / "data" / name / "train-0.parquet")
        blocks += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{blocks}---\n")
    return tmp_path / "data"


def hub(folder, **changes):
    fields = {"configuration": "en-fr", "text": "english", "translation": "non_english", "language": "en"}
    return HubSource(**({"dataset": str(folder), "translation_language": "fr"} | fields | changes))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_dataset(hub_folder, streaming):
    first, second = read_source(hub(hub_folder, streaming=streaming), seed=0)
    assert first == Record("Hi.", "en", "en-fr.", "fr", f"{hub_folder}/en-fr")
    assert (second.line_number, second.reason) == (2, "empty text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "someone/unknown"}, "Couldn't reach.*HF_HOME.*HF_HUB_OFFLINE=1"),
        ({"configuration": "en-xx"}, r"no configuration 'en-xx'. Set one of: en-de, en-fr\."),
        ({"split": "dev"}, r"dev.*Available splits: \['train'\]"),
        ({"text": "sentence"}, "no column 'sentence'. Columns found: 'english', 'non_english', 'score'"),
    ],
)
def test_hub_faults(hub_folder, changes, message):
    with pytest.raises(InputError, match=message):
        list(read_source(hub(hub_folder, **changes), seed=0))


def test_a_dataset_with_a_loading_script(hub_folder):
    (hub_folder / "data.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match=r"no longer runs those.*refs/convert/parquet"):
        list(read_source(hub(hub_folder), seed=0))
