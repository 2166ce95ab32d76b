"""What figures are made of, by hand: the frontier, places of labels, limits, loads of experts, and worst sentences."""

from __future__ import annotations

import re

import numpy as np
import pytest

from distillabse.evaluation.plots.drawing import EndLabel, end_labels, short_names, style, subplot
from distillabse.evaluation.plots.fidelity import histogram_limits, language_figures
from distillabse.evaluation.plots.pareto import Point, frontier, pareto
from distillabse.evaluation.plots.training import last_loads, training_figures
from distillabse.evaluation.worst import worst_sentences

TEACHER = np.array([[1, 0], [0.9, 0.1], [0, 1], [-1, 0.2]], dtype=np.float32)
# Row 2 is turned to where row 0 is, row 3 a little; 0 and 1 are kept.
STUDENT = np.array([[1, 0], [0.9, 0.1], [1, 0.05], [-1, 0.4]], dtype=np.float32)
TEXTS = ["a", "b", "c", "d"]


def point(label, latency, fidelity, size=10_000_000):
    return Point(label, latency, fidelity, size, "#2563ec")


def cosine(left, right):
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def test_the_frontier_is_what_nothing_else_beats():
    points = [
        point("teacher", 10.0, 1.0), point("teacher, slower", 20.0, 1.0), point("student", 2.0, 0.9),
        point("worse and slower", 3.0, 0.8), point("fast", 0.5, 0.4), point("as fast, worse", 0.5, 0.3),
    ]  # fmt: skip
    assert [best.label for best in frontier(points)] == ["fast", "student", "teacher"]
    assert frontier(points[:1]) == points[:1]
    assert [best.label for best in frontier([point("a", 1.0, 0.5), point("b", 1.0, 0.5)])] == ["a", "b"]


def test_every_encoder_is_named_with_its_figures_in_both_widths():
    points = [point("one", 1.25, 0.9, 123_400_000), point("two", 1.3, 0.901, None), point("three", 40.0, 1.0)]
    svg = pareto(points, "skill", 8)
    assert svg.count("<svg") == 2
    for text in (">one<", ">two<", ">three<", ">1.25 ms, 123.4 MB<", ">1.30 ms<", "for a batch of 8"):
        assert svg.count(text) == 2, text
    assert len(set(re.findall(r'\bid="([^"]+)"', svg))) == len(re.findall(r'\bid="', svg))


def test_labels_of_points_in_one_place_do_not_cover_each_other():
    """Six encoders within a hundredth of a decade: their twelve lines must lie apart."""
    from distillabse.evaluation.plots import pareto as module

    points = [point(f"encoder number {number}", 1.0 + 0.002 * number, 0.9 + 0.001 * number) for number in range(6)]
    placed = []
    original = module._Labels.place

    def place(self):
        original(self)
        placed.append(self.taken[len(points) :])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Labels, "place", place)
        pareto(points, "skill", 1)
    for labels in placed:
        assert len(labels) == 6
        for number, box in enumerate(labels):
            assert not any(box.overlaps(other) for other in labels[:number])


def test_labels_of_curves_that_end_together_are_a_line_apart_and_in_order():
    with style():
        figure, axes = subplot(4.7, 3.2)
        axes.plot([0, 1], [0, 1])
        values = [0.5, 0.501, 0.502, 0.9]
        end_labels(axes, [EndLabel(str(value), value, "#111827") for value in reversed(values)])
        figure.draw_without_rendering()
        heights = {text.get_text(): text.get_window_extent().y0 for text in axes.texts}
    placed = [heights[str(value)] * 72 / figure.dpi for value in values]
    assert np.diff(placed)[:2] == pytest.approx([12, 12], abs=0.5)
    assert np.diff(placed)[2] > 40


def test_short_names_keep_both_ends_and_stay_different():
    assert short_names(["short", "abcdefghijklmnopqrstuvwxyz"]) == [
        "short",
        "abcdefghijk\N{HORIZONTAL ELLIPSIS}pqrstuvwxyz",
    ]
    alike = ["a" * 11 + "1" * 5 + "b" * 11, "a" * 11 + "2" * 5 + "b" * 11]
    assert short_names(alike) == alike


def test_many_languages_are_two_figures_that_hold_all_of_them_best_first():
    slices = {f"l{number:02}": {"n": 50, "cosine_mean": 1 - number / 100, "skill": 0.5} for number in range(30)}
    drawn = language_figures(slices, beside=6)
    assert list(drawn) == ["slices-language", "slices-language-more"]
    first, second = (re.findall(r"(l\d\d)  ?\(50\)", svg) for svg in drawn.values())
    assert (len(first), len(second)) == (18, 12)
    assert sorted(first) == [f"l{number:02}" for number in range(18)]
    assert list(language_figures({name: slices[name] for name in list(slices)[:12]})) == ["slices-language"]


def test_limits_of_panels_are_those_of_all_of_them():
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    none = [0, 0, 0, 0]
    left = {"edges": edges, "student": [0, 1, 0, 0], "constant": none, "shuffled": none}
    right = {"edges": edges, "student": [0, 0, 1, 0], "constant": none, "shuffled": none}
    assert histogram_limits([left]) == (-0.5, 0.0)
    assert histogram_limits([left, right]) == (-0.5, 0.5)


def test_loads_are_of_the_last_entry_and_in_the_order_of_the_experts():
    def entry(step, shift):
        loads = {f"router/layer_{layer}/load_expert_{e}": 0.05 * e + shift for layer in (10, 2) for e in range(12)}
        return {"step": step, "router/layer_2/dropped": 0.01 + shift, **loads}

    log = [entry(50, 0.1), entry(100, 0.2), {"step": 100, "eval_cosine": 0.9}]
    loads = last_loads(log)
    assert list(loads) == ["layer_2", "layer_10"]
    assert loads["layer_2"]["loads"] == pytest.approx([0.05 * expert + 0.2 for expert in range(12)])
    assert loads["layer_2"]["dropped"] == pytest.approx(0.21) and loads["layer_10"]["dropped"] is None
    assert last_loads([{"step": 1, "loss": 2.0}]) == {}
    svg = training_figures(log)["routers"]
    assert svg.count(">layer 2<") == svg.count(">layer 10<") == 2
    assert svg.count(">expert 11<") == svg.count(">expert 0<") == 4


def test_worst_sentences_and_their_neighbours_by_hand():
    worst = worst_sentences(TEACHER, STUDENT, TEXTS, ["en", None, "de", "fr"], count=2)
    assert [entry["text"] for entry in worst] == ["c", "d"]
    assert worst[0] == {
        "text": "c", "language": "de", "cosine": pytest.approx(cosine(TEACHER[2], STUDENT[2])),
        # For the teacher (0, 1) is nearest to (-1, 0.2); for the student it is next to (1, 0).
        "teacher_neighbour": "d", "teacher_similarity": pytest.approx(cosine(TEACHER[2], TEACHER[3])),
        "student_neighbour": "a", "student_similarity": pytest.approx(cosine(STUDENT[2], STUDENT[0])),
    }  # fmt: skip
    assert worst[1]["teacher_neighbour"] == "c" and worst[1]["student_neighbour"] == "b"
    assert [entry["language"] for entry in worst_sentences(TEACHER, STUDENT, TEXTS)] == [None] * 4


def test_a_text_is_not_its_own_neighbour():
    vectors = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    worst = worst_sentences(vectors, vectors, ["same", "same", "other"])
    assert [entry["teacher_neighbour"] for entry in worst] == ["other", "other", "same"]
    alone = worst_sentences(vectors[:2], vectors[:2], ["same", "same"])
    assert {alone[0][key] for key in alone[0] if key.endswith(("neighbour", "similarity"))} == {None}
