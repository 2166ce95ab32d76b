"""Fidelity figures that a useless student cannot reach."""

import numpy as np
import pytest

from distillabse.errors import InputError
from distillabse.evaluation.fidelity import constant_cosines, cosine_and_skill, fidelity, skill_of


def teacher_vectors(n=300, seed=0):
    random = np.random.default_rng(seed)
    # A common direction, as sentence encoders have one, so that a constant vector scores well above zero.
    return (random.normal(size=(n, 16)) + 1.0).astype(np.float32)


def test_by_hand():
    teacher = np.array([[1, 0], [0, 1]], dtype=np.float32)
    student = np.array([[0.6, 0.8], [0, 2]], dtype=np.float32)
    figures = fidelity(teacher, student)
    assert figures["cosine_mean"] == pytest.approx(0.8)
    assert figures["constant_baseline"] == pytest.approx(np.sqrt(0.5))
    assert figures["skill"] == pytest.approx((0.8 - np.sqrt(0.5)) / (1 - np.sqrt(0.5)))
    # Shuffled: each teacher row against the other student row, 0.0 and 0.8.
    assert figures["shuffled_baseline"] == pytest.approx(0.4)
    assert figures["cosine_p01"] == pytest.approx(0.6 + 0.01 * 0.4)


def test_the_teacher_itself_scores_one():
    teacher = teacher_vectors()
    figures = fidelity(teacher, 3 * teacher)
    assert figures["cosine_mean"] == pytest.approx(1)
    assert figures["skill"] == pytest.approx(1)
    assert figures["neighbour_top1"] == 1
    assert figures["similarity_spearman"] == pytest.approx(1)
    assert figures["shuffled_baseline"] < 0.9


def test_a_constant_student_has_no_skill():
    teacher = teacher_vectors()
    best = (teacher / np.linalg.norm(teacher, axis=1, keepdims=True)).mean(axis=0)
    figures = fidelity(teacher, np.tile(best, (len(teacher), 1)).astype(np.float32))
    assert figures["cosine_mean"] > 0.6
    assert figures["cosine_mean"] == pytest.approx(figures["constant_baseline"], abs=1e-6)
    assert figures["skill"] == pytest.approx(0, abs=1e-6)
    assert figures["similarity_spearman"] == 0
    assert figures["neighbour_top1"] < 0.05


def test_any_other_constant_scores_below_zero():
    teacher = teacher_vectors()
    other = np.zeros_like(teacher)
    other[:, 0] = 1
    assert cosine_and_skill(teacher, other)["skill"] < 0


def test_constant_teacher_is_refused():
    with pytest.raises(InputError, match="same vector for every sentence"):
        fidelity(np.ones((10, 4), dtype=np.float32), np.ones((10, 4), dtype=np.float32))


def test_interval_holds_the_mean_and_narrows_with_more_texts():
    random = np.random.default_rng(1)
    widths = []
    for n in (50, 5000):
        teacher = teacher_vectors(n)
        figures = fidelity(teacher, teacher + random.normal(size=teacher.shape).astype(np.float32))
        low, high = figures["ci95"]
        assert low < figures["cosine_mean"] < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_slices_have_their_own_baselines():
    teacher = teacher_vectors(40)
    student = teacher.copy()
    student[20:] = -student[20:]
    figures = fidelity(teacher, student, languages=["en"] * 20 + ["de"] * 20, lengths=[4] * 35 + [100] * 5)
    assert figures["slices"]["language"]["en"]["cosine_mean"] == pytest.approx(1)
    assert figures["slices"]["language"]["de"]["cosine_mean"] == pytest.approx(-1)
    assert set(figures["slices"]["length"]) == {"1-8 tokens"}  # five texts are too few to report
    expected = skill_of(-1, float(constant_cosines(teacher[20:]).mean()))
    assert figures["slices"]["language"]["de"]["skill"] == pytest.approx(expected)


def test_histogram_counts_every_text():
    teacher = teacher_vectors(100)
    histogram = fidelity(teacher, teacher)["histogram"]
    assert len(histogram["edges"]) == len(histogram["student"]) + 1
    assert sum(histogram["student"]) == sum(histogram["constant"]) == sum(histogram["shuffled"]) == 100
    assert histogram["student"][-1] == 100
