from __future__ import annotations

import pytest

from distillabse.config import PHRASEBOOK_LANGUAGES, PhrasebookSource
from distillabse.corpus.phrasebook import expand, phrasebook_size, read_patterns
from distillabse.corpus.sources import read_source
from distillabse.errors import InputError

HEADER = "\t".join(PHRASEBOOK_LANGUAGES)


def topic(folder, pattern, slots):
    """A topic whose sentences are the pattern with the language code put in the place of `LANG`."""
    row = "\t".join(pattern.replace("LANG", language) for language in PHRASEBOOK_LANGUAGES)
    values = "".join(
        "\t".join([slot, *(f"{value}-{language}" for language in PHRASEBOOK_LANGUAGES)]) + "\n" for slot, value in slots
    )
    (folder / "t.patterns.tsv").write_text(f"{HEADER}\n{row}\n", encoding="utf-8")
    (folder / "t.slots.tsv").write_text(f"slot\t{HEADER}\n{values}", encoding="utf-8")
    return folder


def test_expansion_is_distinct_parallel_and_deterministic(tmp_path):
    slots = [("a", f"x{number}") for number in range(40)] + [("b", f"y{number}") for number in range(50)]
    (pattern,) = read_patterns(topic(tmp_path, "¿{a} LANG {b}, {a}?", slots))
    assert (pattern.source, pattern.group) == ("phrasebook:t", "phrasebook:t:1")
    drawn = list(expand(pattern, 30, seed=1))
    assert len({sentence["de"] for sentence in drawn}) == 30
    assert drawn == list(expand(pattern, 30, seed=1)) != list(expand(pattern, 30, seed=2))
    for count, expected in ((1900, 1900), (5000, 2000)):
        assert len({sentence["en"] for sentence in expand(pattern, count, seed=1)}) == expected
    for sentence in drawn:
        first, second = sentence["sv"].removeprefix("¿X").split("-sv, ")[0].split("-sv sv ")
        assert sentence["nl"] == f"¿X{first}-nl nl {second}-nl, x{first}-nl?"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("{a} LANG", "Ijs-en en"), ("« {a}", "« Ijs-en"), ("'s LANG", "'s en"), ("3 LANG", "3 en")],
)
def test_the_first_letter_is_in_upper_case(tmp_path, pattern, expected):
    (read,) = read_patterns(topic(tmp_path, pattern, [("a", "ijs")]))
    (sentence,) = expand(read, 9, seed=0)
    assert sentence["en"] == expected
    assert sentence["nl"] == expected.replace("Ijs", "IJs").replace("en", "nl")


@pytest.mark.parametrize(
    ("pattern", "slots", "message"),
    [
        ("{a} LANG", [("b", "x")], "line 2: no values for a in t.slots.tsv"),
        ("{a LANG", [("a", "x")], "line 2: the en sentence has other slots"),
        ("{LANG}", [("en", "x")], "line 2: the de sentence has other slots"),
        ("\t{a}", [("a", "x")], "line 2: 8 cells with text are needed"),
    ],
)
def test_malformed_data_names_its_line(tmp_path, pattern, slots, message):
    with pytest.raises(InputError, match=message):
        read_patterns(topic(tmp_path, pattern, slots))


def test_missing_files_and_headers(tmp_path):
    with pytest.raises(InputError, match=r"holds no <topic>\.patterns\.tsv"):
        read_patterns(tmp_path)
    topic(tmp_path, "LANG", [("a", "x")])
    (tmp_path / "t.slots.tsv").write_text("slot\ten\n")
    with pytest.raises(InputError, match=r"t\.slots\.tsv, line 1: the header"):
        read_patterns(tmp_path)
    (tmp_path / "t.slots.tsv").unlink()
    with pytest.raises(InputError, match=r"t\.slots\.tsv does not exist"):
        read_patterns(tmp_path)


def sides(*languages):
    records = read_source(PhrasebookSource(languages=list(languages), expansions_per_pattern=1), seed=0)
    return {(record.language, record.translation_language) for record in records}


def test_pairs_start_from_english_or_the_first_language():
    assert sides("de", "en", "sv") == {("en", "de"), ("en", "sv")}
    assert sides("de", "sv", "fr") == {("de", "sv"), ("de", "fr")}
    assert sides("pt") == {("pt", None)}


def test_the_built_in_data_is_large_enough():
    patterns, distinct = phrasebook_size(PhrasebookSource().expansions_per_pattern)
    assert patterns >= 300
    assert distinct >= 20_000
