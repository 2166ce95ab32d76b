from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distillabse.config import SplitConfig
from distillabse.corpus.cleaning import normalised_key
from distillabse.corpus.records import Record
from distillabse.corpus.splitting import mix_languages, split_records
from distillabse.errors import InputError

# Two letters and two spellings make texts that are often the same once normalised.
TEXTS = st.text("ab1", min_size=1, max_size=3).flatmap(lambda text: st.sampled_from([text, text.upper() + "!"]))
RECORDS = st.builds(
    lambda text, translation, group: Record(text, "en", translation, translation and "de", "s", group),
    TEXTS,
    st.none() | TEXTS.map("x".__add__),
    st.none() | st.sampled_from("ghijkl"),
)


def keys(records):
    texts = {normalised_key(text) for record in records for text in (record.text, record.translation) if text}
    return texts | {("group", record.group) for record in records if record.group}


def pattern(name, rows):
    return [Record(f"{name} {row}", "en", group=name) for row in range(rows)]


@given(
    records=st.lists(RECORDS, min_size=4, max_size=40),
    share=st.sampled_from([0.1, 0.3, 0.45]),
    most=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 3),
)
def test_no_text_and_no_group_is_on_two_sides(records, share, most, seed):
    try:
        splits = split_records(records, SplitConfig(dev=share, test=share, max_dev=most, max_test=most), seed)
    except InputError:
        assume(False)
    assert all(splits.values())
    found = [keys(splits[side]) for side in ("train", "dev", "test")]
    assert len(set().union(*found)) == sum(map(len, found))
    rows = Counter(record for split in splits.values() for record in split)
    assert not rows - Counter(records)
    for side in ("dev", "test"):
        assert len(splits[side]) <= min(round(share * len(records)) or 1, most or len(records))
    if most is None:
        assert rows == Counter(records)


def test_the_split_does_not_depend_on_the_order_of_rows():
    records = [Record(f"sentence {row // 2}", "en", f"Satz {row}", "de") for row in range(200)]
    config = SplitConfig(dev=0.1, test=0.2)
    splits = split_records(records, config, seed=5)
    backwards = split_records(records[::-1], config, seed=5)
    assert {side: len(rows) for side, rows in splits.items()} == {"train": 140, "dev": 20, "test": 40}
    assert all(set(splits[side]) == set(backwards[side]) for side in splits)
    assert set(splits["dev"]) != set(split_records(records, config, seed=6)["dev"])


def test_patterns_are_held_out_whole_and_then_sampled():
    records = [record for number in range(50) for record in pattern(f"p{number}", 20)]
    splits = split_records(records, SplitConfig(dev=0.1, test=0.06, max_dev=40, max_test=None), seed=1)
    assert Counter(len(split) for split in splits.values()) == Counter([40, 60, 1000 - 100 - 60])
    assert len({record.group for record in splits["dev"]}) == 5
    assert Counter(record.group for record in splits["test"]).most_common()[-1][1] == 20


def test_held_out_rows_beyond_the_maximum_go_back_to_train():
    records = [Record(f"sentence {row}", "en") for row in range(100)]
    splits = split_records(records, SplitConfig(dev=0.3, test=0.3, max_dev=5, max_test=7), seed=1)
    assert [len(splits[side]) for side in ("train", "dev", "test")] == [88, 5, 7]


def test_a_giant_component_stays_in_train():
    giant = [Record("Yes.", "en", f"Ja {row}", "de") for row in range(90)]
    splits = split_records([*giant, *pattern("p", 1), *pattern("q", 1)], SplitConfig(dev=0.01, test=0.01), seed=0)
    assert splits["train"] == giant


def test_a_split_that_cannot_be():
    with pytest.raises(InputError, match=r"no group .* fits into a dev split of 3 rows.*the largest has 10 rows"):
        split_records([record for name in "pqr" for record in pattern(name, 10)], SplitConfig(dev=0.1), seed=0)
    with pytest.raises(InputError, match="Nothing is left to train on"):
        split_records([Record("a", "en"), Record("b", "en")], SplitConfig(dev=0.5, test=0.5), seed=0)
    whole = split_records(pattern("p", 10), SplitConfig(dev=0.0, test=0.0), seed=0)
    assert {side: len(rows) for side, rows in whole.items()} == {"train": 10, "dev": 0, "test": 0}


def mixed(total, temperature, seed=0):
    counts = {"de": 900, "fr": 90, "sv": 10}
    rows = [(language, row) for language, count in counts.items() for row in range(count)]
    records = [Record(f"{language} {row}", "en", "x", language) for language, row in rows]
    drawn = mix_languages(records, total, temperature, seed)
    assert len(set(drawn)) == len(drawn)
    return drawn, dict(Counter(record.translation_language for record in drawn))


@pytest.mark.parametrize(
    ("total", "temperature", "expected"),
    [
        (100, 1.0, {"de": 90, "fr": 9, "sv": 1}),
        (100, 2.0, {"de": 70, "fr": 22, "sv": 8}),  # 30 : 9.49 : 3.16
        (500, 1000.0, {"de": 400, "fr": 90, "sv": 10}),  # the small ones give all they have
        (None, 1.0, {"de": 900, "fr": 90, "sv": 10}),
        (5000, 5.0, {"de": 900, "fr": 90, "sv": 10}),
    ],
)
def test_languages_are_mixed_by_temperature(total, temperature, expected):
    assert mixed(total, temperature)[1] == expected


def test_mixing_shuffles_deterministically():
    first, _ = mixed(300, 2.0)
    assert first == mixed(300, 2.0)[0] != mixed(300, 2.0, seed=1)[0]
    records = [Record(f"text {row}", "de") for row in range(100)]
    shuffled = mix_languages(records, None, 1.0, seed=0)
    assert shuffled != records
    assert set(shuffled) == set(records)


def test_monolingual_rows_count_for_their_own_language():
    records = [Record(f"text {row}", "de" if row % 2 else "sv") for row in range(20)]
    assert Counter(record.language for record in mix_languages(records, 10, 1.0, seed=0)) == {"de": 5, "sv": 5}
