from __future__ import annotations

import logging
from itertools import accumulate, chain, repeat

import pytest
from tiny import tiny_bundle, tiny_encoder

from distillabse import layout
from distillabse.config import BenchConfig
from distillabse.cores import cpus_for
from distillabse.errors import ConfigurationError, DistillabseError, InputError
from distillabse.evaluation import latency
from distillabse.evaluation.latency import measure
from distillabse.evaluation.latency_worker import time_batches, timed_batches
from distillabse.evaluation.rounds import (
    batches_in_order,
    draw_batches,
    paired_p_value,
    paired_speedup,
    percentiles,
    rotated,
    summarise,
)
from distillabse.evaluation.workers import CpuTimes, Engine, cores_used_by_others

TEXTS = ["the cat", "hello world", "Where is the house?", "no", "the old man and the water", "always"]


def test_percentiles_are_interpolated_and_in_milliseconds():
    seconds = [0.001 * number for number in range(1, 102)]  # 1 ms to 101 ms: the p-th percentile is p + 1 ms
    assert percentiles(seconds) == pytest.approx({"p50_ms": 51, "p95_ms": 96, "p99_ms": 100})


def test_speedup_is_the_median_of_the_ratios_within_rounds():
    # Ratios of medians 2, 3, 10. The ratio of the overall medians would be 3 / 1 by batches, or 5 / 1.67 by means.
    baseline = [[2.0, 2.0, 9.0], [3.0], [10.0]]
    engine = [[1.0], [0.5, 1.0, 1.5], [1.0]]
    speedup, (low, high) = paired_speedup(baseline, engine, seed=0)
    assert speedup == 3.0
    assert (low, high) == (2.0, 10.0)


def test_a_machine_that_slows_down_does_not_change_a_paired_speedup():
    slowing = [1.0, 2.0, 4.0, 8.0, 16.0]
    speedup, interval = paired_speedup([[4 * s] for s in slowing], [[s] for s in slowing], seed=0)
    assert (speedup, interval) == (4.0, [4.0, 4.0])


def test_rounds_of_a_pass_are_resampled_together():
    # Two passes of three rounds: one ran at ratio 2, the other at 4. Drawing passes gives medians of 2, 3 or 4; drawing
    # rounds nearly always mixes both, and finds the interval narrower than two runs would differ.
    baseline, engine = [[2.0]] * 3 + [[4.0]] * 3, [[1.0]] * 6
    speedup, interval = paired_speedup(baseline, engine, seed=0, passes=[0, 0, 0, 1, 1, 1])
    assert (speedup, interval) == (3.0, [2.0, 4.0])
    # Passes of different lengths: the missing round of the second counts for nothing.
    speedup, interval = paired_speedup(baseline[:5], engine[:5], seed=0, passes=[0, 0, 0, 1, 1])
    assert (speedup, interval) == (2.0, [2.0, 4.0])


def test_the_test_on_pairs_takes_the_order_of_the_rounds_into_account():
    slow, fast = [[1.1 * second] for second in range(1, 11)], [[1.0 * second] for second in range(1, 11)]
    # All ten differences of one sign, all alike: 2 of 2^10 patterns of signs are as extreme.
    assert paired_p_value(slow, fast) == pytest.approx(2 / 1024)
    assert paired_p_value(slow, fast[::-1]) > 0.5
    assert paired_p_value(slow, slow) == 1.0


def test_an_interval_is_narrow_as_a_share_of_its_ratio():
    timings = {"slow": [[1.0], [1.02], [1.0]], "fast": [[0.1], [0.1], [0.1]]}  # ratios 10, 10.2, 10: interval 0.2
    wide, narrow = (summarise(timings, 1, 0, ["slow"], interval=share)["fast"] for share in (0.019, 0.021))
    assert (wide["converged"], narrow["converged"]) == (False, True)


def test_texts_in_their_order_come_once_before_any_is_repeated():
    texts = list("abcdefg")
    first = batches_in_order(texts, 3, 3, 0)
    assert first == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert batches_in_order(texts, 3, 2, 2) == [["g"], ["a", "b", "c"]]


def test_speedup_needs_the_same_rounds():
    with pytest.raises(ValueError, match="zip"):
        paired_speedup([[1.0], [1.0]], [[1.0]], seed=0)


def test_a_row_of_the_result():
    timings = {"teacher-torch": [[0.08], [0.08]], "onnx-int8": [[0.008, 0.008], [0.008]]}
    rows = summarise(timings, size=4, seed=0, baselines=["teacher-torch"])
    row = rows["onnx-int8"]
    assert row.pop("speedup_vs_teacher_torch_ci95") == pytest.approx([10, 10])
    assert row.pop("converged") is True
    assert row == pytest.approx(
        {
            "batch": 4,
            "p50_ms": 8,
            "p95_ms": 8,
            "p99_ms": 8,
            "sentences_per_second": 500,
            "rounds": 2,
            "speedup_vs_teacher_torch": 10,
            "speedup_vs_teacher_torch_wilcoxon_p": 0.5,  # of two pairs, both alike: 2 of the 4 signs are as extreme
        }
    )
    assert rows["teacher-torch"]["speedup_vs_teacher_torch"] == 1


def test_batches_depend_on_the_seed_alone_and_repeat_no_text():
    batches = draw_batches(TEXTS, 4, 3, [42, 4, 0])
    assert batches == draw_batches(TEXTS, 4, 3, [42, 4, 0])
    assert batches[:2] == draw_batches(TEXTS, 4, 2, [42, 4, 0])
    assert batches != draw_batches(TEXTS, 4, 3, [42, 4, 1])
    assert [len(set(batch)) for batch in batches] == [4, 4, 4]
    assert set(chain(*batches)) <= set(TEXTS)
    assert [len(batch) for batch in draw_batches(["one"], 3, 1, [0])] == [3]  # too few texts


def test_order_rotates():
    assert [rotated("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def clock(seconds_per_call):
    """A clock that moves by this much during each call that is timed, and not between them."""
    moves = chain([0], *repeat((round(seconds_per_call * 1e9), 0), 100))
    return accumulate(moves).__next__


def test_all_batches_are_encoded_again_until_the_time_is_used_up():
    done = []
    spent = time_batches(done.append, [["a"], ["b"]], seconds=0.5, clock=clock(0.1))
    assert done == [["a"], ["b"]] * 3  # 0.2, 0.4, 0.6 seconds
    assert spent == pytest.approx([0.1] * 6)


def test_all_batches_are_encoded_at_least_once():
    done = []
    assert time_batches(done.append, [["a"], ["b"]], seconds=0, clock=clock(5)) == [5, 5]
    assert done == [["a"], ["b"]]


def test_a_second_clock_runs_beside_the_first():
    gpu, wall = clock(0.1), clock(0.3)
    times = timed_batches(lambda batch: None, [["a"], ["b"]], 0.3, [gpu, wall])
    assert times[0] == pytest.approx([0.1] * 4)  # the first says when time is used up
    assert times[1] == pytest.approx([0.3] * 4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("teacher"), layers=1)


@pytest.fixture(scope="module")
def bundle(teacher, tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), teacher)


def test_cores_used_by_others():
    # In ten seconds the machine used 25 CPU seconds, 10 of them ours.
    assert cores_used_by_others(CpuTimes(5, 100, 7), CpuTimes(15, 125, 17)) == 1.5
    assert cores_used_by_others(CpuTimes(0, 0, 0), CpuTimes(10, 9.9, 10)) == 0  # clocks of different resolution


def test_two_engines_in_processes_of_their_own(teacher, bundle, monkeypatch, caplog):
    crowded = iter([CpuTimes(0, 0, 0), CpuTimes(1, 1000, 0)])
    monkeypatch.setattr(latency, "cpu_times", lambda workers: next(crowded))
    caplog.set_level(logging.WARNING, latency.__name__)
    engines = [Engine("teacher-torch", "torch", teacher), Engine("onnx-fp32", "onnx", bundle, layout.ONNX_FP32)]
    config = BenchConfig(batch_sizes=[1, 4], threads=1, rounds=5, seconds_per_round=0.01, interval=None)
    result = measure(engines, TEXTS, config, seed=42, baselines=("teacher-torch",))
    assert result["threads"] == 1
    assert result["device"] == "cpu"
    assert result["cores_used_by_others"] == 1000
    assert "Other processes used 1000.0 cores while 1 threads were measured" in caplog.text
    # With [CLS] and [SEP]: 4 (the cat), 4, 11 (W ##h ##e ##r ##e is the house ?), 3 (no), 8, 3
    assert result["tokens"] == pytest.approx({"mean": 5.5, "p50": 4, "p95": 10.25, "max": 11})
    for name in ("teacher-torch", "onnx-fp32"):
        rows = result["latency"][name]
        assert [(row["batch"], row["rounds"]) for row in rows] == [(1, 5), (4, 5)]
        for row in rows:
            assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
            assert row["sentences_per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
            low, high = row["speedup_vs_teacher_torch_ci95"]
            assert low <= row["speedup_vs_teacher_torch"] <= high
    assert [row["speedup_vs_teacher_torch"] for row in result["latency"]["teacher-torch"]] == [1, 1]
    assert result["left_out"] == []
    assert result["cpus"] == cpus_for(1) and len(result["cpus"]) == 1


def test_an_engine_that_dies_leaves_its_last_words(tmp_path):
    engines = [Engine("onnx-fp32", "onnx", tmp_path / "nowhere")]
    with pytest.raises(DistillabseError, match=r"measures onnx-fp32 (.|\n)*There is no bundle .*nowhere"):
        measure(engines, TEXTS, BenchConfig(), seed=0, baselines=())


def test_what_cannot_be_measured_is_refused(tmp_path):
    engines = [Engine("torch", "torch", tmp_path)]
    with pytest.raises(ConfigurationError, match="baseline teacher-torch is not among the engines: torch"):
        measure(engines, TEXTS, BenchConfig(), seed=0)
    with pytest.raises(InputError, match="no texts"):
        measure(engines, [], BenchConfig(), seed=0, baselines=())
