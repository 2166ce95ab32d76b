"""Cells of the grid: texts of exact length, passes over the cells, and when they end. Clocks are made up."""

from __future__ import annotations

import numpy as np
import pytest

from distillabse.config import BenchConfig
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation import latency
from distillabse.evaluation.grid import (
    Cell,
    affordable,
    cut_to_length,
    standard_cells,
    texts_of_length,
    thesis_cells,
    visit_in_turn,
)
from distillabse.evaluation.latency import measure_cells, progress_bars
from distillabse.evaluation.workers import Engine, Turn
from distillabse.settings import load_bench

TEXTS = ["the cat", "hello world, this is fine", "Where is the house?", "no", "一二三四五六七八九十", "a" * 200]
SPECIAL = 2


def count_words(texts):
    """A tokenizer with [CLS] and [SEP] whose tokens are words and ideographs, and which cuts at 40."""
    return [
        min(40, SPECIAL + len(text.split()) + sum("一" <= character <= "鿿" for character in text)) for text in texts
    ]


@pytest.mark.parametrize("length", [3, 4, 7, 16, 33])
def test_texts_of_a_cell_have_exactly_its_tokens(length):
    made = texts_of_length(TEXTS, length, count_words)
    assert len(made) == len(TEXTS)
    assert set(count_words(made)) == {length}
    assert len(set(made)) > 1


def test_real_tokens_are_counted_with_a_real_tokenizer(encoder_folder, sentences):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder_folder), device="cpu")

    def count(texts):
        return model.preprocess(texts)["attention_mask"].sum(dim=1).tolist()

    for length in (8, 24, 64):  # 64 is the model's greatest
        made = texts_of_length(sentences, length, count)
        assert len(made) >= 6
        assert set(count(made)) == {length}


def test_a_length_that_no_text_can_have_is_refused():
    with pytest.raises(InputError, match="No text of exactly 2 tokens"):
        texts_of_length(TEXTS, 2, count_words)
    with pytest.raises(InputError, match="No text of exactly 41 tokens"):
        texts_of_length(TEXTS, 41, count_words)


def test_cutting_takes_the_longest_beginning_that_fits_and_leaves_short_texts():
    cut = cut_to_length(["one two three four", "one", "one two"], 4, count_words)
    assert cut == ["one two ", "one", "one two"]


def test_the_grid_is_every_batch_size_with_every_length():
    cells = standard_cells(TEXTS, [1, 8], [None, 16], count_words)
    assert [(cell.batch, cell.length) for cell in cells] == [(1, None), (8, None), (1, 16), (8, 16)]
    assert cells[0].texts == TEXTS
    assert set(count_words(cells[3].texts)) == {16}
    assert cells[3].batches(0, seed=1) != cells[3].batches(1, seed=1)
    assert cells[3].batches(0, seed=1) == cells[3].batches(0, seed=1)


def test_the_thesis_takes_its_batches_in_order_cut_to_32_tokens():
    texts = [f"{number} " + "word " * 50 for number in range(10_050)]
    cells = thesis_cells(texts, count_words)
    assert [cell.batch for cell in cells] == [1, 64, 128, 256, 512]
    assert all(len(cell.texts) == 10_000 and cell.length == 32 for cell in cells)
    assert set(count_words(cells[0].texts)) == {32}
    assert cells[1].batches(0, seed=0)[0][0].startswith("0 ")
    assert cells[1].batches(1, seed=0)[0][0].startswith("64 ")


def test_milliseconds_per_sentence_are_over_the_sentences_really_encoded():
    """The thesis divided by 100 whatever was encoded: 4 s of 7 sentences would have been 40 ms instead of 571."""
    cell = Cell(4, 32, list("abcdefg"), in_order=True)
    cell.turns = {"labse": [Turn([1.5, 1.5], None, 4), Turn([1.0], None, 3)]}
    assert cell.milliseconds_per_sentence("labse") == pytest.approx(4000 / 7)


def visits(finished_after, seconds, per_visit=1.0):
    """The order of visits to cells that are finished after so many each."""
    now, order = [0.0], []
    cells = [Cell(batch, None, ["a"]) for batch in finished_after]

    def visit(cell):
        order.append(cell.batch)
        now[0] += per_visit

    visit_in_turn(
        cells, visit, lambda cell: order.count(cell.batch) >= finished_after[cell.batch], seconds, lambda: now[0]
    )
    return order


def test_cells_are_visited_in_turn_until_each_is_finished():
    assert visits({1: 1, 8: 3, 32: 2}, seconds=100) == [1, 8, 32, 8, 32, 8]


def test_passes_end_when_time_is_used_up_but_every_cell_was_seen():
    assert visits({1: 9, 8: 9}, seconds=5) == [1, 8, 1, 8, 1]
    assert visits({1: 9, 8: 9}, seconds=0.5) == [1, 8]


def test_cells_that_do_not_fit_are_left_out_from_the_dearest():
    cells = [Cell(batch, None, ["a"]) for batch in (1, 8, 32, 128)]
    chosen, left_out = affordable(cells, [10, 20, 80, 300], 120)
    assert [cell.batch for cell in chosen] == [1, 8, 32]
    assert [(row["batch"], row["length"]) for row in left_out] == [(128, None)]
    assert "some 300 s, and 10 s were left" in left_out[0]["reason"]
    chosen, _ = affordable(cells, [10, 20, 80, 300], 1)
    assert [cell.batch for cell in chosen] == [1]


class Fake:
    """An engine that takes the times it is told, one after the other, for every batch; the clock moves with them."""

    def __init__(self, name, now, times):
        self.engine, self.now, self.times, self.turns = Engine(name, "fake", None), now, times, 0

    def time(self, batches, seconds):
        spent = [self.times(self.turns)] * len(batches)
        self.turns += 1
        self.now[0] += sum(spent)
        return Turn(spent, None, sum(map(len, batches)))


def run_fakes(monkeypatch, fast, seconds=1e9, **settings):
    now = [0.0]
    visit_in_turn_by = lambda *given: visit_in_turn(*given, clock=lambda: now[0])  # noqa: E731
    monkeypatch.setattr(latency, "visit_in_turn", visit_in_turn_by)
    workers = [Fake("slow", now, lambda turn: 1.0), Fake("fast", now, fast)]
    config = BenchConfig(**{"batch_sizes": [4], "threads": 1, "seconds_per_round": 0.1, **settings})
    cells = [Cell(batch, None, TEXTS) for batch in config.batch_sizes]
    with progress_bars() as progress:
        found = measure_cells(workers, cells, config, 0, ["slow"], progress, seconds=seconds)
    return found["latency"]["fast"], found["left_out"]


def test_a_steady_ratio_ends_after_the_least_rounds(monkeypatch):
    rows, _ = run_fakes(monkeypatch, lambda turn: 0.25)
    assert rows[0]["rounds"] == 30
    assert rows[0]["speedup_vs_slow"] == 4.0 and rows[0]["speedup_vs_slow_ci95"] == [4.0, 4.0]
    assert rows[0]["converged"] is True
    assert rows[0]["ms_per_sentence"] == pytest.approx(250 / 4)
    assert rows[0]["length"] is None


def test_a_ratio_that_varies_takes_more_rounds_until_its_interval_is_narrow(monkeypatch):
    # Ratios between 10 and 16, drawn at random: their median is known better with every pass.
    ratios = np.random.default_rng(0).uniform(10, 16, size=3000)
    rows, _ = run_fakes(monkeypatch, lambda turn: 1 / ratios[turn])
    low, high = rows[0]["speedup_vs_slow_ci95"]
    assert rows[0]["rounds"] > 30 and rows[0]["rounds"] % 3 == 0
    assert rows[0]["converged"] is True and high - low < 0.05 * rows[0]["speedup_vs_slow"]


def test_a_ratio_that_never_settles_ends_with_the_time(monkeypatch):
    # Passes at ratio 10 and 20 by turns: whatever is drawn, the interval stays wide. A round takes 1.1 s or less.
    rows, _ = run_fakes(monkeypatch, lambda turn: 0.1 if turn // 3 % 2 else 0.05, seconds=60)
    assert rows[0]["converged"] is False
    assert 50 <= rows[0]["rounds"] <= 60


def test_without_an_interval_there_are_exactly_so_many_rounds_and_every_cell(monkeypatch):
    rows, left_out = run_fakes(
        monkeypatch, lambda turn: 0.1 if turn % 2 else 0.9, seconds=1, interval=None, rounds=7, batch_sizes=[1, 4]
    )
    assert [row["rounds"] for row in rows] == [7, 7] and left_out == []


def test_settings_of_a_bench_without_a_job():
    config = load_bench(["batch_sizes=[1,32]", "bench.threads=1", "lengths=[null,16]"])
    assert (config.batch_sizes, config.threads, config.lengths) == ([1, 32], 1, [None, 16])
    for wrong, message in (
        ("rouns=3", "bench.rouns"),
        ("lengths=[16,16]", "names a value twice"),
        ("batch_sizes=[0]", "0 is not positive"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            load_bench([wrong])
