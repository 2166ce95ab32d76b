"""Every guard with its fault planted, and with a clean case beside it."""

from __future__ import annotations

import numpy as np
import pytest

from distillabse.errors import GateFailed
from distillabse.evaluation import guards
from distillabse.evaluation.machine import Throttling

TEXTS = ["the cat", "hello world", "Where is the old house by the water?", "no", "a b c", "one two three four five"]


def word_vector(word):
    return np.random.default_rng(sum(map(ord, word))).standard_normal(16)


def masked_mean(batches):
    """A bag of words: each text by itself."""
    return np.array(
        [np.mean([word_vector(word) for word in text.split()], axis=0) for batch in batches for text in batch]
    )


def counts_padding(batches):
    """The mean goes over padding, too."""
    rows = []
    for batch in batches:
        width = max(len(text.split()) for text in batch)
        for text in batch:
            words = text.split() + ["[PAD]"] * (width - len(text.split()))
            rows.append(np.mean([word_vector(word) for word in words], axis=0))
    return np.array(rows)


def one_scale_for_all(batches):
    """Rounded to 4 bits with one scale for the whole batch, as per-tensor dynamic INT8 does with 8."""
    rows = []
    for batch in batches:
        exact = masked_mean([batch])
        scale = np.abs(exact).max() / 7
        rows.append(np.round(exact / scale) * scale)
    return np.concatenate(rows)


def assert_found(guard, *words):
    assert guard.passed is False
    for word in words:
        assert word in guard.detail
    with pytest.raises(GateFailed, match=guard.guard):
        guards.require_trusted(guards.as_rows([guard]), "comparison.json")


@pytest.mark.parametrize("is_baseline", [True, False])
def test_constant_vectors(is_baseline):
    vectors = masked_mean([TEXTS]).astype(np.float32)
    clean = guards.constant_vectors("x", vectors, is_baseline=is_baseline)
    assert clean.passed and clean.encoder == "x"
    for constant in (np.tile(vectors[0], (6, 1)), np.arange(1, 7)[:, None] * vectors[0], np.full((6, 16), np.nan)):
        found = guards.constant_vectors("x", constant.astype(np.float32), is_baseline=is_baseline)
        assert found.guard == ("constant teacher" if is_baseline else "constant student")
        assert_found(found, "one vector for every text")


def test_vectors_that_depend_on_their_batch():
    assert guards.batch_dependence("x", masked_mean, TEXTS).passed
    assert_found(guards.batch_dependence("x", one_scale_for_all, TEXTS), "alone and in a batch", "0.99999")
    assert not guards.batch_dependence("x", lambda batches: masked_mean(batches) * np.nan, TEXTS).passed


def test_padding_that_is_not_masked():
    assert guards.unmasked_padding("x", masked_mean, TEXTS).passed
    assert_found(guards.unmasked_padding("x", counts_padding, TEXTS), "beside a long text")


def test_texts_of_the_training_corpus():
    corpus = ["something else", "HELLO,  world!!"]  # the same text, otherwise written
    assert guards.training_overlap(TEXTS, corpus[:1]).passed
    assert_found(guards.training_overlap(TEXTS, iter(corpus)), "1 of 6 texts", "'hello world'")
    unknown = guards.training_overlap(TEXTS, None)
    assert unknown.passed and "nothing was compared" in unknown.detail


def test_a_speedup_over_few_pairs():
    rows = {"teacher": [{"batch": 1, "rounds": 5}], "student": [{"batch": 1, "rounds": 30}, {"batch": 8, "rounds": 33}]}
    assert guards.few_pairs(rows, ["teacher"]).passed
    rows["student"][1]["rounds"] = 29
    assert_found(guards.few_pairs(rows, ["teacher"]), "batch 8: 29", "bench.rounds")


def test_a_debug_build():
    assert guards.debug_build([]).passed
    assert_found(guards.debug_build(["PYTHONDEVMODE=1"]), "PYTHONDEVMODE=1")


QUIET = Throttling(100.0, 5, 10.0, 1.0)
STEADY = [1.0, 1.1, 1.05, 1.2]


def test_a_cpu_that_runs_evenly():
    later = Throttling(200.0, 5, 12.0, 1.5)  # 2 of 400 CPU seconds stolen, half of 100 seconds stopped by a quota
    assert guards.cpu_throttling(QUIET, later, STEADY, cpus=4).passed
    assert guards.cpu_throttling(Throttling(0, None, None, None), Throttling(9, None, None, None), STEADY, 2).passed
    # One reading that something came between, and a governor that did no harm.
    assert guards.cpu_throttling(QUIET, later, [*STEADY, 9.0], 4, ["powersave"]).passed


@pytest.mark.parametrize(
    ("end", "references", "words"),
    [
        (Throttling(200.0, 7, 10.0, 1.0), STEADY, ["too hot 2 times"]),
        (Throttling(200.0, 5, 40.0, 1.0), STEADY, ["took 8% of it"]),  # 30 of 400 CPU seconds
        (Throttling(200.0, 5, 10.0, 3.0), STEADY, ["stopped it for 2% of the time"]),
        (Throttling(200.0, 5, 10.0, 1.0), [1.0, 1.4, 1.4, 1.4], ["40% longer", "governor powersave", "cpupower"]),
    ],
)
def test_a_cpu_that_was_throttled(end, references, words):
    assert_found(guards.cpu_throttling(QUIET, end, references, 4, ["powersave"]), *words)


def test_a_gpu_that_was_held_back():
    assert guards.gpu_throttling([]).passed
    assert_found(guards.gpu_throttling(["hardware thermal slowdown"]), "hardware thermal slowdown")


def test_other_processes_on_the_cores():
    assert guards.other_processes(0.1, 1, is_crowded=False).passed
    assert_found(guards.other_processes(1.5, 2, is_crowded=True), "1.5 cores", "bench.threads")


def test_nothing_examined_is_not_trusted():
    assert not guards.is_trusted([])
    with pytest.raises(GateFailed, match="no guard was examined"):
        guards.require_trusted([], "x")
    guards.require_trusted(guards.as_rows([guards.debug_build([])]), "x")


def test_a_failed_guard_is_told_with_its_encoder():
    rows = guards.as_rows(
        [guards.debug_build([]), guards.constant_vectors("small", np.ones((3, 4)), is_baseline=False)]
    )
    assert [line.split(":")[0] for line in guards.failures(rows)] == ["constant student of small"]
