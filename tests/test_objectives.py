"""The loss terms against values worked out by hand or by a slow loop."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, normalize, softmax

from distillabse.config import (
    CosineObjective,
    HiddenObjective,
    LayerPair,
    MiniLMObjective,
    MiniLMv2Objective,
    MSEObjective,
)
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Signals, Tap
from distillabse.objectives import build_objective
from distillabse.objectives.relations import relation_kl, relation_log_probabilities

SHAPE = EncoderShape(layers=2, hidden_size=8, attention_heads=2, dimension=8)
ALL = [MiniLMObjective(), MiniLMv2Objective(relation_heads=4), HiddenObjective(), CosineObjective(), MSEObjective()]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def signals(seed, width=8, layers=2, tokens=4):
    torch.manual_seed(seed)
    taps = {
        Tap(kind, layer): torch.randn(2, tokens, width)
        for kind in ("query", "key", "value", "hidden")
        for layer in range(layers)
    }
    return Signals(normalize(torch.randn(2, 8), dim=-1), taps)


def by_loop(left, right, other_left, other_right, heads, mask):
    """KL of relations one head, one sentence, one row at a time, padding cut out before the softmax."""
    size = left.shape[-1] // heads
    total = 0.0
    for b in range(left.shape[0]):
        real = int(mask[b].sum())
        for h in range(heads):
            cut = slice(h * size, (h + 1) * size)
            teacher = softmax(left[b, :real, cut] @ right[b, :real, cut].T / math.sqrt(size), dim=-1)
            student = log_softmax(other_left[b, :real, cut] @ other_right[b, :real, cut].T / math.sqrt(size), dim=-1)
            total += float(kl_div(student, teacher, reduction="sum")) / (heads * real)
    return total / left.shape[0]


def test_relation_of_two_tokens_by_hand():
    # One head of width 4: scores are the dot products over sqrt(4). Rows: [1, 0] and [0, 2].
    x = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]])
    log_probabilities = relation_log_probabilities(x, x, 1, torch.tensor([[1, 1]]))
    e = math.e
    expected = torch.tensor([[[[e / (e + 1), 1 / (e + 1)], [1 / (1 + e**2), e**2 / (1 + e**2)]]]])
    torch.testing.assert_close(log_probabilities.exp(), expected)


def test_kl_by_hand():
    teacher = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]]).log()
    student = torch.tensor([[[[0.25, 0.75], [0.25, 0.75]]]]).log()
    # First row 0.5 ln 2 + 0.5 ln(2/3), second row 0; mean over the two rows.
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert relation_kl(teacher, student, torch.tensor([[1, 1]])).item() == pytest.approx(expected)


def test_kl_is_teacher_to_student_not_the_reverse():
    teacher = torch.tensor([[[[0.9, 0.1], [0.9, 0.1]]]]).log()
    student = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]]).log()
    mask = torch.tensor([[1, 1]])
    assert relation_kl(teacher, student, mask).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert relation_kl(student, teacher, mask).item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))


def test_minilm_equals_a_loop_over_heads_and_rows():
    teacher, student = signals(1), signals(2)
    terms = build_objective(MiniLMObjective(), SHAPE, SHAPE)(teacher, student, MASK)
    t, s = teacher.taps, student.taps
    attention = by_loop(t[Tap("query", 1)], t[Tap("key", 1)], s[Tap("query", 1)], s[Tap("key", 1)], 2, MASK)
    value = by_loop(t[Tap("value", 1)], t[Tap("value", 1)], s[Tap("value", 1)], s[Tap("value", 1)], 2, MASK)
    assert terms["minilm/attention"].item() == pytest.approx(attention, rel=1e-5)
    assert terms["minilm/value"].item() == pytest.approx(value, rel=1e-5)


def test_minilm_v2_has_relation_heads_of_its_own_and_free_widths():
    narrow = EncoderShape(layers=2, hidden_size=4, attention_heads=1, dimension=8)
    teacher, student = signals(1), signals(2, width=4)
    config = MiniLMv2Objective(
        relation_heads=4, relations={"qq": 1.0, "vv": 0.5}, layers=[LayerPair(student=0, teacher=1)]
    )
    terms = build_objective(config, SHAPE, narrow)(teacher, student, MASK)
    assert set(terms) == {"minilm_v2/qq", "minilm_v2/vv"}
    expected = 0.0
    for b, real in enumerate((4, 2)):
        for h in range(4):
            t = teacher.taps[Tap("query", 1)][b, :real, 2 * h : 2 * h + 2]
            s = student.taps[Tap("query", 0)][b, :real, h : h + 1]
            target, output = softmax(t @ t.T / math.sqrt(2), -1), log_softmax(s @ s.T, -1)
            expected += float(kl_div(output, target, reduction="sum")) / (4 * real * 2)
    assert terms["minilm_v2/qq"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.kind)
def test_zero_when_student_equals_teacher(config):
    teacher = signals(3)
    for name, value in build_objective(config, SHAPE, SHAPE)(teacher, teacher, MASK).items():
        assert value.item() == pytest.approx(0.0, abs=1e-6), name


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.kind)
def test_positive_otherwise_and_gradient_is_finite(config):
    teacher, student = signals(3), signals(4)
    leaves = [student.sentence.requires_grad_(), *(tap.requires_grad_() for tap in student.taps.values())]
    total = sum(build_objective(config, SHAPE, SHAPE)(teacher, student, MASK).values())
    assert total.item() > 1e-3
    total.backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("config", ALL[:3], ids=lambda config: config.kind)
def test_more_padding_changes_nothing(config):
    teacher, student = signals(5), signals(6)

    def padded(original):
        junk = {tap: torch.cat([x, torch.full((2, 3, 8), 7.0)], dim=1) for tap, x in original.taps.items()}
        return Signals(original.sentence, junk)

    longer = torch.cat([MASK, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    objective = build_objective(config, SHAPE, SHAPE)
    before, after = objective(teacher, student, MASK), objective(padded(teacher), padded(student), longer)
    for name in before:
        torch.testing.assert_close(before[name], after[name])


def test_cosine_and_mse_by_hand():
    teacher = Signals(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), {})
    student = Signals(torch.tensor([[0.6, 0.8], [0.0, 1.0]]), {})
    shape = EncoderShape(1, 2, 1, 2)
    mask = torch.ones(2, 3)
    assert build_objective(CosineObjective(), shape, shape)(teacher, student, mask)["cosine"].item() == pytest.approx(
        0.2
    )
    assert build_objective(MSEObjective(), shape, shape)(teacher, student, mask)["mse"].item() == pytest.approx(0.4)


def test_hidden_is_a_mean_over_real_tokens_of_each_sentence():
    tap = Tap("hidden", 1)
    teacher, student = signals(1), signals(1)
    student.taps[tap] = student.taps[tap].clone()
    student.taps[tap][0, 0] += 3.0  # one of the four tokens of one of two sentences
    student.taps[tap][1, 3] += 100.0  # padding
    assert build_objective(HiddenObjective(), SHAPE, SHAPE)(teacher, student, MASK)["hidden"].item() == pytest.approx(
        9 / 4 / 2
    )


@pytest.mark.parametrize(
    ("config", "student", "words"),
    [
        (MiniLMObjective(), EncoderShape(2, 8, 4, 8), "minilm_v2"),
        (MiniLMObjective(attention=False, value=False), SHAPE, "at least one"),
        (MiniLMv2Objective(relation_heads=3), SHAPE, "Choose one of [1, 2, 4, 8]"),
        (MiniLMv2Objective(relation_heads=4, layers=[LayerPair(teacher=5)]), SHAPE, "the teacher has no layer 5"),
        (HiddenObjective(layers=[LayerPair(student=-3)]), SHAPE, "the student has no layer -3"),
        (CosineObjective(), EncoderShape(2, 8, 2, 4), "student.head"),
    ],
)
def test_impossible_pairs_are_refused_with_a_remedy(config, student, words):
    with pytest.raises(ConfigurationError) as error:
        build_objective(config, SHAPE, student)
    assert words in str(error.value)
