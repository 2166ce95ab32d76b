"""The loss terms on translation pairs against values worked out by hand or by a slow loop."""

import math
from dataclasses import replace

import pytest
import torch
from pair_worker import batch, in_one_process, launch
from torch.nn.functional import normalize

from distillabse.config import (
    ContrastiveObjective,
    CosineObjective,
    FeatureObjective,
    LayerPair,
    LogitObjective,
    MultilingualObjective,
    StructureLevelObjective,
    TokenLevelObjective,
    WordLevelObjective,
    need_equal_dimensions,
    need_links,
    need_teacher_of_translations,
)
from distillabse.config.objectives import PairObjectiveConfig
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Signals, Tap
from distillabse.objectives import PairObjective, build_objective, require_enough_pairs

SHAPE = EncoderShape(layers=2, hidden_size=8, attention_heads=2, dimension=8)
NARROW = replace(SHAPE, hidden_size=4, dimension=6)
LAST = Tap("hidden", 1)
STRUCTURES = [StructureLevelObjective(form=form) for form in ("correlation", "mse", "kl")]
ON_WORDS = [TokenLevelObjective(), WordLevelObjective()]
ALL = [
    MultilingualObjective(), *ON_WORDS, *STRUCTURES, ContrastiveObjective(), FeatureObjective(),
    LogitObjective(temperature=1.0),
]  # fmt: skip
# Pair; word in the student's source, the student's translation, the teacher's source. Pair 1 has no links.
LINKS = torch.tensor([[0, 1, 3, 2, 3, 1, 2], [0, 3, 4, 3, 5, 2, 4], [2, 1, 2, 1, 2, 1, 2]])


def name(config):
    return f"{config.kind}-{getattr(config, 'form', '')}".rstrip("-")


def signals(seed, rows, width=8, dimension=8, tokens=6):
    torch.manual_seed(seed)
    taps = {Tap("hidden", layer): torch.randn(rows, tokens, width) for layer in range(2)}
    return Signals(normalize(torch.randn(rows, dimension), dim=-1), taps)


def both(seed, config, pairs=3, student=SHAPE):
    """Signals of teacher and student, as an objective gets them."""
    reads_translations = build_objective(config, SHAPE, student).teacher_reads_translations
    teacher = signals(seed, pairs * (2 if reads_translations else 1), tokens=5)
    return teacher, signals(seed + 1, 2 * pairs, student.hidden_size, student.dimension)


def part(original, rows):
    return Signals(original.sentence[rows], {tap: states[rows] for tap, states in original.taps.items()})


def terms_of(config, teacher, student, links=LINKS, shapes=(SHAPE, SHAPE)):
    return {name: value.item() for name, value in build_objective(config, *shapes)(teacher, student, links).items()}


def vectors(*rows):
    return Signals(torch.tensor(rows), {})


def test_the_configuration_knows_what_each_kind_needs():
    assert {type(config) for config in ALL} == set(PairObjectiveConfig.__subclasses__())
    for config in ALL:
        objective = build_objective(config, SHAPE, SHAPE)
        assert need_teacher_of_translations([config]) is objective.teacher_reads_translations, config.kind
        assert need_links([config]) is objective.needs_links, config.kind
        off = config.model_copy(update={"weight": 0.0})
        assert not need_teacher_of_translations([off]) and not need_links([off])


def test_only_what_takes_differences_of_vectors_needs_equal_dimensions():
    for config in (*ALL, CosineObjective()):
        try:
            build_objective(config, SHAPE, NARROW)
            refused = False
        except ConfigurationError:
            refused = True
        assert need_equal_dimensions([config]) is refused, config.kind
    assert not need_equal_dimensions([MultilingualObjective(weight=0)])


def test_the_map_of_feature_starts_from_given_directions():
    objective = build_objective(FeatureObjective(), SHAPE, NARROW)
    directions = torch.linalg.qr(torch.randn(8, 6))[0]
    objective.start_from(directions)
    teacher, student = signals(1, 4), signals(2, 4, 4, 6)
    expected = (teacher.sentence - student.sentence @ directions.T).square().sum(dim=1)
    found = objective(teacher, student, None)
    assert found["feature/source"].item() == pytest.approx(expected[:2].mean().item(), rel=1e-5)
    assert found["feature/translation"].item() == pytest.approx(expected[2:].mean().item(), rel=1e-5)


def test_multilingual_by_hand():
    teacher = vectors([1.0, 0.0], [0.0, 1.0])
    student = vectors([0.6, 0.8], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0])
    # Squared distances 0.8 and 0 of the sources, 2 and 2 of the translations.
    assert terms_of(MultilingualObjective(), teacher, student) == pytest.approx(
        {"multilingual/source": 0.4, "multilingual/translation": 2.0}
    )


def test_token_level_by_loop():
    config = TokenLevelObjective(layers=[LayerPair(student=0, teacher=1), LayerPair(student=1, teacher=0)])
    teacher, student = both(1, config)
    expected = 0.0
    for own, teachers in ((0, 1), (1, 0)):
        for pair in range(3):
            squares = []
            for link in LINKS[LINKS[:, 0] == pair].tolist():
                target = teacher.taps[Tap("hidden", teachers)][pair, link[5] : link[6]].mean(dim=0)
                for token in range(link[3], link[4]):
                    squares.append(float((student.taps[Tap("hidden", own)][3 + pair, token] - target).pow(2).mean()))
            expected += sum(squares) / max(len(squares), 1) / 3
    assert terms_of(config, teacher, student)["token_level"] == pytest.approx(expected, rel=1e-5)


def test_token_level_of_a_narrower_student_starts_from_nothing_and_learns_its_map():
    teacher, student = both(1, TokenLevelObjective(), student=NARROW)
    objective = build_objective(TokenLevelObjective(), SHAPE, NARROW)
    targets = [teacher.taps[LAST][0, 1:2].mean(0), *2 * [teacher.taps[LAST][0, 2:4].mean(0)]]
    first = sum(float(target.square().mean()) for target in targets) / 3
    second = float(teacher.taps[LAST][2, 1].square().mean())
    loss = objective(teacher, student, LINKS)["token_level"]
    assert loss.item() == pytest.approx((first + second) / 3, rel=1e-5)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in objective.parameters())
    assert [tuple(parameter.shape) for parameter in objective.parameters()] == [(8, 4), (8,)]


def test_word_level_by_loop():
    config = WordLevelObjective(temperature=0.2, layer=0)
    teacher, student = both(1, config)
    states = student.taps[Tap("hidden", 0)]
    sources = [normalize(states[link[0], link[1] : link[2]].mean(0), dim=0) for link in LINKS.tolist()]
    translations = [normalize(states[3 + link[0], link[3] : link[4]].mean(0), dim=0) for link in LINKS.tolist()]
    expected = {}
    for name, own, other in (("to_translation", sources, translations), ("to_source", translations, sources)):
        losses = []
        for place, word in enumerate(own):
            scores = [math.exp(float(word @ candidate) / 0.2) for candidate in other]
            losses.append(-math.log(scores[place] / sum(scores)))
        expected[f"word_level/{name}"] = sum(losses) / 3
    assert terms_of(config, teacher, student) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", ON_WORDS, ids=name)
def test_batches_without_links_are_zero_and_leave_the_graph_whole(config):
    teacher, student = both(1, config, student=NARROW)
    objective = build_objective(config, SHAPE, NARROW)
    states = student.taps[LAST].requires_grad_()
    total = sum(objective(teacher, student, LINKS[:0]).values())
    assert total.item() == 0
    total.backward()
    assert states.grad is not None and not states.grad.any()
    assert all(not parameter.grad.any() for parameter in objective.parameters())


def test_one_link_has_no_negatives():
    assert set(terms_of(WordLevelObjective(), *both(1, WordLevelObjective()), LINKS[:1]).values()) == {0.0}


@pytest.mark.parametrize("config", ON_WORDS, ids=name)
def test_padding_changes_nothing(config):
    teacher, student = both(1, config)

    def padded(original, more):
        junk = torch.full((1, more, 1), 7.0)
        taps = {
            tap: torch.cat([states, junk.expand(len(states), -1, states.shape[-1])], dim=1)
            for tap, states in original.taps.items()
        }
        return Signals(original.sentence, taps)

    assert terms_of(config, padded(teacher, 3), padded(student, 4)) == terms_of(config, teacher, student)


SIMILAR = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # cosines 0.6, 0, 0.8
OTHER = [[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]  # cosines 0, 0.8, 0.6


def structure(form, student=(*OTHER, *SIMILAR), **settings):
    config = StructureLevelObjective(form=form, **settings)
    return terms_of(config, vectors(*SIMILAR), vectors(*student), None)


def test_structure_level_mse_by_hand():
    terms = structure("mse")
    assert terms["structure_level/source"] == pytest.approx(2 * (0.6**2 + 0.8**2 + 0.2**2) / 9)
    assert terms["structure_level/translation"] == pytest.approx(0, abs=1e-7)
    # Student sources (rows) with translations (columns): [1, 0.6, 0], [0, 0.8, 1], [0.8, 0.96, 0.6].
    cross = [0, 0, 0, 0.6, 0.2, 0.2, 0.8, 0.16, 0.4]
    assert terms["structure_level/cross"] == pytest.approx(sum(value**2 for value in cross) / 9)


def test_structure_level_correlation_is_pearsons_of_different_sentences():
    terms = structure("correlation")
    left, right = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.8, 0.6]])
    assert terms["structure_level/source"] == pytest.approx(1 - torch.corrcoef(torch.stack([left, right]))[0, 1].item())
    assert terms["structure_level/translation"] == pytest.approx(0, abs=1e-6)
    cross = torch.tensor([[0.6, 0.0, 0.6, 0.8, 0.0, 0.8], [0.6, 0.0, 0.0, 1.0, 0.8, 0.96]])
    assert terms["structure_level/cross"] == pytest.approx(1 - torch.corrcoef(cross)[0, 1].item())


def test_structure_level_kl_by_hand():
    def kl(p, q, temperature=0.5):
        p, q = ([math.exp(x / temperature) for x in row] for row in (p, q))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    terms = structure("kl", temperature=0.5)
    rows = [((0.6, 0.0), (0.0, 0.8)), ((0.6, 0.8), (0.0, 0.6)), ((0.0, 0.8), (0.8, 0.6))]
    assert terms["structure_level/source"] == pytest.approx(sum(kl(*row) for row in rows) / 3, rel=1e-5)
    assert terms["structure_level/translation"] == pytest.approx(0, abs=1e-6)
    rows = [((0.6, 0.0), (0.6, 0.0)), ((0.6, 0.8), (0.0, 1.0)), ((0.0, 0.8), (0.8, 0.96))]
    assert terms["structure_level/cross"] == pytest.approx(sum(kl(*row) for row in rows) / 3, rel=1e-5)


@pytest.mark.parametrize("form", ["correlation", "kl"])
def test_two_pairs_have_no_structure(form):
    teacher, student = vectors(*SIMILAR[:2]), vectors(*OTHER[:2], *SIMILAR[:2])
    student.sentence.requires_grad_()
    total = sum(build_objective(StructureLevelObjective(form=form), SHAPE, SHAPE)(teacher, student, None).values())
    total.backward()
    assert total.item() == 0 and not student.sentence.grad.any()


def test_contrastive_by_hand():
    student = vectors([1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0])
    # Cosines of sources (rows) with translations: [0.6, 0], [0.8, 1].
    terms = terms_of(ContrastiveObjective(margin=0.3, scale=10.0), vectors([1.0, 0.0], [1.0, 0.0]), student)

    def loss(own, other):
        return -math.log(math.exp(10 * (own - 0.3)) / (math.exp(10 * (own - 0.3)) + math.exp(10 * other)))

    assert terms == pytest.approx(
        {
            "contrastive/to_translation": (loss(0.6, 0.0) + loss(1.0, 0.8)) / 2,
            "contrastive/to_source": (loss(0.6, 0.8) + loss(1.0, 0.0)) / 2,
        },
        rel=1e-5,
    )


def test_feature_by_hand_and_through_its_map():
    teacher = vectors([1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8])
    student = vectors([0.6, 0.8], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0])
    shape = EncoderShape(1, 2, 1, 2)
    assert terms_of(FeatureObjective(), teacher, student, None, (shape, shape)) == pytest.approx(
        {"feature/source": 0.4, "feature/translation": 0.2}
    )
    objective = build_objective(FeatureObjective(), shape, EncoderShape(1, 3, 1, 3))
    own = signals(1, 4, dimension=3)
    # Nothing at first, so the distance to unit vectors is 1.
    assert [term.item() for term in objective(teacher, own, None).values()] == [1.0, 1.0]
    with torch.no_grad():
        objective.to_teacher.weight.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]))
    x = own.sentence
    mapped = torch.stack([x[:, 0] + 2 * x[:, 1], 3 * x[:, 2]], dim=1)
    expected = (teacher.sentence - mapped).square().sum(1)
    terms = objective(teacher, own, None)
    assert terms["feature/source"].item() == pytest.approx(expected[:2].mean().item(), rel=1e-5)
    assert terms["feature/translation"].item() == pytest.approx(expected[2:].mean().item(), rel=1e-5)


def test_logit_by_hand():
    teacher = vectors([1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8])  # sources with translations [1, 0.6], [0, 0.8]
    student = vectors([1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0])  # [0.6, 0], [0.8, 1]
    squares = 0.4**2 + 0.6**2 + 0.8**2 + 0.2**2
    assert terms_of(LogitObjective(temperature=0.5), teacher, student)["logit"] == pytest.approx(squares / 0.25 / 4)
    assert terms_of(LogitObjective(), teacher, student)["logit"] == pytest.approx(squares / 100**2 / 4)


@pytest.mark.parametrize(
    "config", [config for config in ALL if config.kind not in ("word_level", "contrastive")], ids=name
)
def test_zero_where_the_student_and_its_translations_equal_the_teacher(config):
    teacher, _ = both(1, config)
    half = part(teacher, slice(0, 3))
    twice = Signals(torch.cat([half.sentence] * 2), {tap: torch.cat([states] * 2) for tap, states in half.taps.items()})
    if build_objective(config, SHAPE, SHAPE).teacher_reads_translations:
        twice = teacher
    # Words of one token, at the same place everywhere.
    links = torch.tensor([[0, 1, 2, 1, 2, 1, 2], [2, 3, 4, 3, 4, 3, 4]])
    assert terms_of(config, teacher, twice, links) == pytest.approx(
        dict.fromkeys(terms_of(config, teacher, twice, links), 0.0), abs=1e-6
    )


@pytest.mark.parametrize("config", ALL, ids=name)
def test_it_learns_by_gradients_of_the_student_and_its_own_map_alone(config):
    """A few steps of gradient descent on the student's signals lower the loss, and the teacher's get no gradient."""
    narrow = NARROW if config.kind in ("token_level", "feature") else SHAPE
    teacher, student = both(3, config, student=narrow)
    objective = build_objective(config, SHAPE, narrow)
    assert isinstance(objective, PairObjective)
    assert objective.needs_links == config.needs_links == (config.kind in ("token_level", "word_level"))
    assert objective.teacher_reads_translations == (config.kind in ("feature", "logit"))
    leaves = [student.sentence.requires_grad_(), *(states.requires_grad_() for states in student.taps.values())]
    optimizer = torch.optim.Adam([*leaves, *objective.parameters()], lr=0.01)
    losses = []
    for _ in range(10):
        loss = sum(objective(teacher, Signals(normalize(leaves[0], dim=-1), student.taps), LINKS).values())
        assert loss.dtype == torch.float32 and loss.shape == ()
        optimizer.zero_grad()
        loss.backward()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert teacher.sentence.grad is None and not teacher.sentence.requires_grad
    needed = {Tap("hidden", 1)} if config.kind == "token_level" else set()
    assert objective.teacher_taps == needed


@pytest.mark.parametrize("config", [MultilingualObjective(), TokenLevelObjective(), FeatureObjective()], ids=name)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(config):
    teacher, student = both(5, config, pairs=4)
    whole = terms_of(config, teacher, student)
    parts = []
    for first in (0, 2):
        rows = [first, first + 1]
        links = LINKS[(LINKS[:, 0] >= first) & (LINKS[:, 0] < first + 2)].clone()
        links[:, 0] -= first
        both_sides = rows + [row + 4 for row in rows]
        teachers = both_sides if len(teacher.sentence) == 8 else rows
        parts.append(terms_of(config, part(teacher, teachers), part(student, both_sides), links))
    assert {name: (parts[0][name] + parts[1][name]) / 2 for name in whole} == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("config", [MultilingualObjective(), *ON_WORDS], ids=name)
def test_low_precision_states_are_compared_in_float32(config):
    teacher, student = both(7, config)
    low = {tap: states.bfloat16() for tap, states in student.taps.items()}
    exact = {tap: states.float() for tap, states in low.items()}
    found = terms_of(config, teacher, Signals(student.sentence, low))
    assert found == pytest.approx(terms_of(config, teacher, Signals(student.sentence, exact)), rel=1e-2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MultilingualObjective(), "student.head: dense"),
        (WordLevelObjective(layer=2), "objectives.word_level.layer: the student has no layer 2"),
        (TokenLevelObjective(layers=[LayerPair(teacher=-3)]), "the teacher has no layer -3"),
    ],
)
def test_impossible_shapes_are_refused_with_a_remedy(config, words):
    with pytest.raises(ConfigurationError, match=words):
        build_objective(config, SHAPE, NARROW)


def test_similarities_of_students_with_fewer_dimensions_are_compared():
    for config in (*STRUCTURES, LogitObjective(), ContrastiveObjective()):
        teacher, student = both(1, config, student=NARROW)
        assert all(math.isfinite(value) for value in terms_of(config, teacher, student, None, (SHAPE, NARROW)).values())


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (ContrastiveObjective(), 2), (WordLevelObjective(), 2), (LogitObjective(), 2),
        (StructureLevelObjective(form="mse"), 2), (StructureLevelObjective(form="kl"), 3),
        (StructureLevelObjective(), 3), (MultilingualObjective(), 1), (CosineObjective(), 1),
    ],
    ids=lambda value: name(value) if hasattr(value, "kind") else "",
)  # fmt: skip
def test_batches_too_small_to_compare_pairs_are_refused(config, least):
    require_enough_pairs([CosineObjective(), config], least)
    if least > 1:
        with pytest.raises(ConfigurationError, match=f"{config.kind}.*{least}.*per_device_train_batch_size"):
            require_enough_pairs([CosineObjective(), config], least - 1)
        require_enough_pairs([config.model_copy(update={"weight": 0.0})], least - 1)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("kind", ["contrastive", "logit", "structure_level"])
def test_two_processes_have_the_losses_and_gradients_of_one(processes, kind):
    """Data parallel training averages the gradients: with negatives of all processes they are those of one batch."""
    loss, gradients = in_one_process(kind)
    for result in processes:
        assert result[kind]["loss"] == pytest.approx(loss, rel=1e-5)
        assert result[kind]["gradients"].keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(result[kind]["gradients"][parameter], gradient, rtol=1e-4, atol=1e-6)
            assert gradient.abs().max() > 1e-4


def test_negatives_of_other_processes_count():
    """Two halves by themselves have an easier task, and other gradients: the test above can fail."""
    loss, gradients = in_one_process("contrastive")
    halves = [in_one_process("contrastive", batch(rank)) for rank in range(2)]
    assert sum(half[0] for half in halves) / 2 < loss - 0.1
    for parameter, gradient in gradients.items():
        average = (halves[0][1][parameter] + halves[1][1][parameter]) / 2
        assert (average - gradient).abs().max() > 1e-2 * gradient.abs().max()
