from __future__ import annotations

import pytest

from distillabse.config import CleaningConfig
from distillabse.corpus.cleaning import Duplicates, clean, clean_text, display_width, normalised_key, stable_hash
from distillabse.corpus.records import Record, Rejected


def outcomes(*rows, **config):
    """What becomes of each row, a text or a pair of texts: the cleaned texts or the reason."""
    settings = CleaningConfig(**config)
    duplicates = Duplicates(settings)
    results = []
    for row in rows:
        text, translation = row if isinstance(row, tuple) else (row, None)
        result = clean(Record(text, "en", translation, translation and "de", "s", "g"), settings)
        if isinstance(result, Record):
            result = duplicates.rejected(result) or result
        if isinstance(result, Rejected):
            results.append(result.reason)
        else:
            assert (result.language, result.source, result.group) == ("en", "s", "g")
            results.append(result.text if result.translation is None else (result.text, result.translation))
    return results


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" a\t\u00a0 b\r\n", "a b"),
        ("so\u00adft\u200b \x07bell\ufeff \u202aleft\u202c", "soft bell left"),
        ("क्\u200dष", "क्\u200dष"),
        ("cafe\u0301", "café"),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw, "NFC") == clean


def test_normal_forms():
    assert clean_text("ﬁne", "NFC") == "ﬁne"
    assert clean_text("ﬁne", "NFKC") == "fine"
    assert clean_text("e\u0301", "none") == "e\u0301"


def test_normalised_key_keeps_letters_marks_and_digits():
    assert normalised_key("“Straße” Nr. 5½!") == "strassenr512"
    assert normalised_key("नमस्ते, दुनिया।") == "नमस्तेदुनिया"
    assert normalised_key("🙂!") == "🙂!"


def test_lengths_and_ratio():
    assert outcomes("a", "a" * 11, "okay", min_characters=2, max_characters=10) == ["too short", "too long", "okay"]
    assert outcomes(("abcdefgh", "ab"), ("abcdefgh", "a.")) == [("abcdefgh", "ab"), ("abcdefgh", "a.")]
    assert outcomes(("abcdefghi", "ab"), ("ab", "abcdefghi")) == ["length ratio"] * 2
    assert display_width("星期五早上叫醒") == 14
    assert outcomes(("wake me up at nine am on friday", "星期五早上叫醒")) != ["length ratio"]
    assert outcomes(("Taxi", " Taxi")) == ["identical sides"]


def test_exact_and_near_duplicates_are_told_apart():
    rows = ["At 7:45.", "At  7:45.", "at 12 30", "At seven.", ("At 7:45.", "Um 8."), ("AT 7:45", "um 9!")]
    kept = ["At 7:45.", "exact duplicate", "near duplicate", "At seven.", ("At 7:45.", "Um 8.")]
    assert outcomes(*rows) == [*kept, "near duplicate"]
    assert outcomes("🙂🙂", "🙁🙁") == ["🙂🙂", "🙁🙁"]
    assert outcomes(*rows[:3], near_duplicates=False) == ["At 7:45.", "exact duplicate", "at 12 30"]


def test_hashes_are_the_same_everywhere():
    assert stable_hash("abc").to_bytes(8, "little").hex() == "d8bb14d833d59559"  # printf abc | b2sum -l 64
