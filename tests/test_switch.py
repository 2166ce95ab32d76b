"""Routing, experts, capacity, upcycling and the way back, on tiny encoders."""

import logging
import math

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, BertModel

from distillabse.config import (
    CosineObjective,
    DenseStudentConfig,
    HiddenObjective,
    MiniLMObjective,
    MiniLMv2Objective,
    RoutingObjective,
    SwitchStudentConfig,
    TeacherConfig,
)
from distillabse.errors import ConfigurationError
from distillabse.models import upcycling
from distillabse.models.folder import save_encoder
from distillabse.models.initialisation import sampled_states
from distillabse.models.student import build_student
from distillabse.models.switch import (
    SwitchConfig,
    SwitchFeedForward,
    SwitchStudent,
    route,
    sparse_layers,
)
from distillabse.models.taps import shape_of
from distillabse.models.teacher import load_encoder, load_teacher, transformer_of
from distillabse.models.tokens import tokenise
from distillabse.models.upcycling import FeedForward, cluster_directions, dense_block
from distillabse.objectives.routing import load_balance, router_z
from distillabse.training.data import PaddingCollator
from distillabse.training.distiller import Distiller
from distillabse.training.router_health import RouterMonitor

HIDDEN, EXPERTS, SIZE = 8, 4, 6


def settings(**changes):
    values = {
        "vocab_size": 50, "embedding_size": HIDDEN, "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "sparse_layers": [1], "num_experts": EXPERTS,
        "expert_size": SIZE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "router_jitter": 0.0,
        "capacity_factor": float(EXPERTS),
    }  # fmt: skip
    return SwitchConfig(**values | changes)


def block_of(scale=1.0, **changes):
    """A block with weights large enough that its router has opinions, drawn from one seed."""
    torch.manual_seed(0)
    block = SwitchFeedForward(settings(**changes))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=scale)
    return block.eval()


def by_hand(block, token):
    """y = p_i(x) E_i(x), one token at a time."""
    p = (block.router.weight @ token).softmax(dim=0)
    i = int(p.argmax())
    experts = block.experts
    inner = nn.functional.gelu(token @ experts.inner_weight[i] + experts.inner_bias[i])
    return p[i] * (inner @ experts.outer_weight[i] + experts.outer_bias[i]), i


@pytest.fixture
def states():
    return torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def real():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = False
    return mask


def with_all_tokens_to(block, expert):
    """Make the router send every token whose first feature is positive to one expert."""
    block.router.weight.data.zero_()
    block.router.weight.data[expert, 0] = 5.0
    return block


@pytest.mark.parametrize("training", [False, True])
def test_each_token_gets_its_experts_output_times_the_gate(states, real, training):
    block = block_of().train(training)
    output = block(states, real)
    used = set()
    for row, column in real.nonzero().tolist():
        expected, expert = by_hand(block, states[row, column])
        torch.testing.assert_close(output[row, column], expected)
        used.add(expert)
    assert len(used) > 2
    assert output[~real].abs().max() == 0


def test_a_token_never_depends_on_its_neighbours_or_on_padding(states, real):
    block = block_of()
    together = block(states, real)
    alone = torch.cat([block(states[row : row + 1, :1], real[:1, :1]) for row in range(3)])
    torch.testing.assert_close(together[:, :1], alone)
    other = states.clone()
    other[~real] = 1e4
    torch.testing.assert_close(block(other, real), together)


def test_tokens_over_capacity_pass_through_the_residual_in_training_only(states):
    block = with_all_tokens_to(block_of(capacity_factor=1.25), 2)
    states = states.abs()
    everything = torch.ones(3, 5, dtype=torch.bool)
    everything[0, 0] = False  # padding takes no place
    complete = block(states, everything)
    assert (complete[everything].abs().sum(dim=-1) > 0).all()
    output = block.train()(states, everything)
    capacity = math.ceil(1.25 * 14 / EXPERTS)
    placed = output.flatten(0, 1).abs().sum(dim=-1) > 0
    assert placed.nonzero()[:, 0].tolist() == list(range(1, 1 + capacity))
    torch.testing.assert_close(output.flatten(0, 1)[placed], complete.flatten(0, 1)[placed])
    counts, dropped = block.health.read()[:EXPERTS], 14 - capacity
    assert counts.tolist() == [0, 0, 14, 0]
    block(states, everything)
    assert block.health.read()[-1] == dropped


def test_a_batch_of_padding_alone_is_no_error(states):
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    for training in (False, True):
        assert block_of().train(training)(states, nothing).abs().max() == 0


def test_the_router_works_in_float32_under_bfloat16(states, real):
    block = block_of()
    seen = []
    block.router.register_forward_hook(lambda module, arguments, output: seen.append(output))
    block(states, real)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(states, real)
    assert seen[1].dtype == torch.float32 and torch.equal(seen[0], seen[1])
    assert output.dtype == states.dtype


def test_jitter_multiplies_the_routers_input_in_training_only():
    router = block_of(router_jitter=0.1).router
    router.weight.data.copy_(torch.eye(EXPERTS, HIDDEN))
    ones = torch.ones(500, HIDDEN)
    assert torch.equal(router.eval()(ones), torch.ones(500, EXPERTS))
    jittered = router.train()(ones)
    assert 0.9 <= jittered.min() < 0.905 and 1.095 < jittered.max() <= 1.1


def test_expert_dropout_is_inside_the_experts_and_the_students_own(encoder_folder, states, real):
    block = block_of(expert_dropout=1.0).train()
    output = block(states, real)
    for row, column in real.nonzero().tolist():
        p = (block.router.weight @ states[row, column]).softmax(dim=0)
        torch.testing.assert_close(output[row, column], p.max() * block.experts.outer_bias[p.argmax()])
    student = switch_student(teacher_of(encoder_folder), dropout=0.1, expert_dropout=0.4)
    rates = {name: one.p for name, one in transformer_of(student).named_modules() if isinstance(one, nn.Dropout)}
    assert {rate for name, rate in rates.items() if "experts" in name} == {0.4}
    assert {rate for name, rate in rates.items() if "experts" not in name} == {0.1}


def test_idle_experts_get_a_zero_gradient_not_none(states):
    block = with_all_tokens_to(block_of(), 1).train()
    block(states.abs(), torch.ones(3, 5, dtype=torch.bool)).sum().backward()
    for parameter in block.experts.parameters():
        assert parameter.grad[1].abs().sum() > 0
        assert parameter.grad[[0, 2, 3]].abs().sum() == 0


def test_gradients_equal_those_of_single_tokens(states, real):
    block = block_of().train()
    block(states, real).square().sum().backward()
    grouped = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    block.zero_grad()
    torch.stack([by_hand(block, states[row, column])[0] for row, column in real.nonzero()]).square().sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(grouped[name], parameter.grad)


def test_initial_weights_are_a_truncated_normal_of_scale_a_tenth():
    model = SwitchStudent(settings(hidden_size=64, embedding_size=64, expert_size=100, num_experts=16))
    block = model.encoder.layer[1].feed_forward
    for weight, inputs in (
        (block.router.weight, 64), (block.experts.inner_weight, 64), (block.experts.outer_weight, 100),
    ):  # fmt: skip
        deviation = math.sqrt(0.1 / inputs)
        assert weight.abs().max() <= 2 * deviation
        # A normal cut at two standard deviations has 0.8796 of its spread.
        assert weight.std().item() == pytest.approx(0.8796 * deviation, rel=0.05)
    assert block.experts.inner_bias.abs().max() == block.experts.outer_bias.abs().max() == 0


def test_automodel_loads_what_was_saved(tmp_path):
    model = SwitchStudent(settings()).eval()
    ids = torch.randint(1, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SwitchStudent) and loaded.config.sparse_layers == [1]
    assert list(sparse_layers(loaded)) == [1]
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(loaded(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    alone = loaded(input_ids=ids[1:, :4]).last_hidden_state
    torch.testing.assert_close(alone, expected[1:, :4])


def test_load_balance_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], requires_grad=True)
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(3))]
    mean = sum(p) / 3
    loss = load_balance(logits)
    assert loss.item() == pytest.approx(2 * (2 / 3 * mean + 1 / 3 * (1 - mean)))
    loss.backward()
    slope = p[0] * (1 - p[0]) / 3  # of the mean probability, by the first logit
    assert logits.grad[0, 0].item() == pytest.approx(2 * (2 / 3 - 1 / 3) * slope, rel=1e-4)
    even = torch.eye(4).repeat(3, 1) * 50
    assert load_balance(even).item() == pytest.approx(1)
    one = torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 6)
    assert load_balance(one).item() == pytest.approx(4)


def test_router_z_by_hand():
    assert router_z(torch.zeros(3, 4)).item() == pytest.approx(math.log(4) ** 2)
    logits = torch.tensor([[math.log(1.0), math.log(2.0)], [0.0, 0.0]])
    assert router_z(logits).item() == pytest.approx((math.log(3) ** 2 + math.log(2) ** 2) / 2)


def teacher_of(folder):
    return load_teacher(TeacherConfig(model=str(folder)))


def batch_of(encoder, texts):
    return PaddingCollator(0)([{"input_ids": row} for row in tokenise(encoder, texts)])


def switch_student(teacher, **changes):
    values = {"layers": 4, "experts": 4, "sparse_layers": "all", "expert_noise": 0.0}
    return build_student(teacher, SwitchStudentConfig(**values | changes))


def even_routers(monkeypatch):
    """Routers that know next to nothing: every expert has the same probability."""
    monkeypatch.setattr(upcycling, "ROUTER_LENGTH", 1e-7)


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_size": 16, "intermediate_size": 64, "head": "dense"}, {"embedding_size": 8}]
)
def test_upcycled_from_whole_blocks_it_starts_as_the_dense_student(labse_folder, sentences, monkeypatch, changes):
    even_routers(monkeypatch)
    teacher = teacher_of(labse_folder)
    dense = build_student(teacher, DenseStudentConfig(layers=4, **changes)).eval()
    student = switch_student(teacher, **changes).eval()
    assert isinstance(transformer_of(student), SwitchStudent)
    assert abs(student.encode(sentences) - dense.encode(sentences)).max() < 2e-5
    router = transformer_of(student).encoder.layer[0].feed_forward.router
    gates = route(router(torch.randn(50, router.weight.shape[1]))).gate
    torch.testing.assert_close(gates, torch.full((50,), 0.25))


def test_routers_start_at_clusters_and_spread_tokens_whose_states_share_a_direction():
    generator = torch.Generator().manual_seed(5)
    corners = torch.eye(4, 16)[torch.randint(4, (400,), generator=generator)]
    common = torch.zeros(16)
    common[9] = 20.0
    states = 3 * corners + 0.1 * torch.randn(400, 16, generator=generator) + common
    directions = cluster_directions(states, 4)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(4))
    assert (directions @ states.mean(dim=0)).abs().max() < 1e-3 * states.mean(dim=0).norm()
    chosen = (states @ directions.T).argmax(dim=1)
    for expert in range(4):
        assert len(corners[chosen == expert].argmax(dim=1).unique()) == 1  # every cluster is one corner


def test_a_narrowed_block_keeps_what_varies_and_the_mean_of_the_rest():
    generator = torch.Generator().manual_seed(5)
    inner, outer = torch.randn(6, 4, generator=generator), torch.randn(4, 6, generator=generator)
    block = FeedForward(inner, torch.zeros(6), outer, torch.ones(4), nn.functional.gelu)
    block.inner_bias[:3], block.inner_weight[:3] = 2.0, 1e-3 * inner[:3]  # nearly constant, however loud
    states = torch.randn(200, 4, generator=generator)
    neurons = block.neurons(states)
    narrow = block.narrowed(neurons, 3)
    torch.testing.assert_close(narrow.inner_weight, inner[3:])
    torch.testing.assert_close(narrow.outer_bias, 1 + outer[:, :3] @ neurons[:, :3].mean(dim=0))
    expected = neurons @ outer.T + 1
    output = narrow.neurons(states) @ narrow.outer_weight.T + narrow.outer_bias
    assert (output - expected).abs().max() < 0.03
    assert block.narrowed(neurons, 6).outer_bias.tolist() == [1, 1, 1, 1]


def test_narrow_experts_take_the_neurons_of_their_own_tokens(encoder_folder):
    teacher = teacher_of(encoder_folder)
    block = transformer_of(teacher).encoder.layer[1]
    student = switch_student(teacher, expert_size=20, sparse_layers=[1])
    feed_forward = transformer_of(student).encoder.layer[1].feed_forward
    states = sampled_states(transformer_of(teacher), None).after_attention[1].flatten(0, 1)
    chosen = feed_forward.router.eval()(states).argmax(dim=1)
    gate = route(feed_forward.router(states)).gate.mean()
    assert 0.3 < gate < 0.9
    kept_by = []
    for expert in range(4):
        neurons = block.intermediate(states[chosen == expert])
        strength = neurons.std(dim=0) * block.output.dense.weight.norm(dim=0)
        kept = strength.argsort(descending=True)[:20].sort().values
        kept_by.append(set(kept.tolist()))
        torch.testing.assert_close(feed_forward.experts.inner_weight[expert].T, block.intermediate.dense.weight[kept])
        torch.testing.assert_close(
            feed_forward.experts.outer_weight[expert].T, block.output.dense.weight[:, kept] / gate
        )
    assert len(set().union(*kept_by)) > 24  # together they hold more of the teacher than one of them could


def test_equal_experts_are_told_apart_by_noise(encoder_folder):
    teacher = teacher_of(encoder_folder)
    block = transformer_of(teacher).encoder.layer[1]
    noisy = transformer_of(switch_student(teacher, expert_noise=0.05)).encoder.layer[1].feed_forward.experts
    difference = (noisy.inner_weight[0] - noisy.inner_weight[1]).std().item()
    assert difference == pytest.approx(0.05 * math.sqrt(2) * block.intermediate.dense.weight.std().item(), rel=0.1)


def test_from_scratch_nothing_is_the_teachers(encoder_folder):
    teacher = teacher_of(encoder_folder)
    student = transformer_of(switch_student(teacher, initialisation="random"))
    experts = student.encoder.layer[0].feed_forward.experts
    assert experts.inner_weight.abs().max() <= 2 * math.sqrt(0.1 / 32)
    own, teachers = (model.embeddings.word_embeddings.weight for model in (student, transformer_of(teacher)))
    assert not torch.allclose(own, teachers, atol=0.1)


def test_experts_with_another_activation_are_refused(encoder_folder):
    teacher = teacher_of(encoder_folder)
    transformer_of(teacher).config.hidden_act = "relu"
    with pytest.raises(ConfigurationError, match=r"exact GELU.*'relu'"):
        switch_student(teacher)


def test_a_saved_switch_student_is_an_encoder(encoder_folder, tmp_path, sentences):
    student = switch_student(teacher_of(encoder_folder), layers=2, sparse_layers="every_other", expert_noise=0.1).eval()
    save_encoder(student, tmp_path)
    loaded = load_encoder(str(tmp_path))
    assert shape_of(loaded).sparse_layers == (1,)
    assert abs(loaded.encode(sentences) - student.encode(sentences)).max() < 1e-6
    assert isinstance(SentenceTransformer(str(tmp_path), device="cpu")[0].auto_model, SwitchStudent)


def test_back_to_dense_from_equal_experts_nothing_is_lost(labse_folder, sentences, monkeypatch):
    even_routers(monkeypatch)
    sparse = switch_student(teacher_of(labse_folder), sparse_layers=[1, 3]).eval()
    dense = build_student(sparse, DenseStudentConfig(layers=4)).eval()
    assert type(transformer_of(dense)) is BertModel
    assert abs(dense.encode(sentences) - sparse.encode(sentences)).max() < 2e-5


def test_back_to_dense_has_the_active_size_of_the_switch_student(encoder_folder):
    sparse = switch_student(teacher_of(encoder_folder), layers=2, expert_size=20, sparse_layers=[1]).eval()
    dense = transformer_of(build_student(sparse, DenseStudentConfig(layers=2)))
    assert dense.config.intermediate_size == 20
    assert [layer.intermediate.dense.out_features for layer in dense.encoder.layer] == [20, 20]


def layer_with_routed_tokens():
    layer = SwitchStudent(settings()).encoder.layer[1].eval()
    nn.init.normal_(layer.feed_forward.router.weight, std=2.0)
    attended = torch.randn(36, HIDDEN)
    return layer, attended, (attended @ layer.feed_forward.router.weight.T).softmax(dim=-1)


@torch.no_grad()
def test_near_copies_are_averaged_by_tokens_and_gates():
    layer, attended, probabilities = layer_with_routed_tokens()
    experts = layer.feed_forward.experts
    for parameter in experts.parameters():
        parameter.copy_(torch.randn_like(parameter[:1]) + 1e-3 * torch.randn_like(parameter))
    inner, outer = torch.zeros(SIZE, HIDDEN), torch.zeros(HIDDEN, SIZE)
    for p in probabilities:
        inner += experts.inner_weight[p.argmax()].T / 36
        outer += p.max() * experts.outer_weight[p.argmax()].T / 36
    block = dense_block(layer, attended)
    torch.testing.assert_close(block.inner_weight, inner)
    torch.testing.assert_close(block.outer_weight, outer)


@torch.no_grad()
def test_of_experts_that_differ_the_neurons_that_vary_most_are_taken():
    layer, attended, probabilities = layer_with_routed_tokens()
    experts = layer.feed_forward.experts
    nn.init.normal_(experts.inner_weight, std=2.0)
    nn.init.normal_(experts.outer_weight, std=0.01)
    experts.outer_weight[1] *= 300  # one expert says nearly everything
    block = dense_block(layer, attended)
    gate = (probabilities.max(dim=-1).values * (probabilities.argmax(dim=-1) == 1)).mean()
    torch.testing.assert_close(block.inner_weight, experts.inner_weight[1].T)
    torch.testing.assert_close(block.outer_weight, gate * experts.outer_weight[1].T)


def test_objectives_are_unchanged_and_the_routing_losses_reach_the_router(encoder_folder, sentences, monkeypatch):
    """A Switch student that computes what the dense one computes has the same loss, term by term."""
    even_routers(monkeypatch)
    teacher = teacher_of(encoder_folder)
    objectives = [CosineObjective(), HiddenObjective(), MiniLMObjective(), MiniLMv2Objective(relation_heads=4)]
    student = switch_student(teacher, sparse_layers=[1, 2], capacity_factor=8.0, router_jitter=0.0)
    routing = RoutingObjective(load_balance=0.5, z_loss=0.25)
    distiller = Distiller(student, teacher, [*objectives, routing])
    outputs = distiller(**batch_of(student, sentences))
    dense = Distiller(build_student(teacher, DenseStudentConfig(layers=4)), teacher, objectives)
    for name, term in dense(**batch_of(student, sentences))["terms"].items():
        torch.testing.assert_close(outputs["terms"][name], term, atol=1e-5, rtol=1e-3)
    # Probabilities are even in both layers: N sum f P = 1, and the logits are zero.
    assert outputs["terms"]["load_balance"].item() == pytest.approx(2 * 0.5)
    assert outputs["terms"]["router_z"].item() == pytest.approx(2 * 0.25 * math.log(4) ** 2)
    outputs["loss"].backward()
    for layer in sparse_layers(transformer_of(student)).values():
        assert layer.feed_forward.router.weight.grad.abs().max() > 0


def test_a_dense_student_has_no_router_to_balance(encoder_folder):
    teacher = teacher_of(encoder_folder)
    with pytest.raises(ConfigurationError, match=r"objectives\.routing: the student is dense"):
        Distiller(build_student(teacher, DenseStudentConfig(layers=2)), teacher, [RoutingObjective()])


def test_router_figures_by_hand_and_a_warning_when_an_expert_dies(states, caplog):
    model = SwitchStudent(settings(capacity_factor=1.0))
    block = with_all_tokens_to(model.encoder.layer[1].feed_forward, 3).train()
    block.router.weight.data[0, 0] = -5.0
    states = torch.cat([states, -states])
    states[:, :, 0] = torch.tensor([1.0] * 3 + [-1.0] * 3)[:, None]
    block(states, torch.ones(6, 5, dtype=torch.bool))
    monitor = RouterMonitor(model)
    with caplog.at_level(logging.WARNING, logger="distillabse"):
        figures = monitor.figures()
    assert [figures[f"router/layer_1/load_expert_{expert}"] for expert in range(4)] == [0.5, 0, 0, 0.5]
    assert figures["router/layer_1/load_entropy"] == pytest.approx(math.log(2) / math.log(4))
    assert figures["router/layer_1/dropped"] == pytest.approx((30 - 2 * math.ceil(30 / 4)) / 30)
    p = torch.tensor([-5.0, 0.0, 0.0, 5.0]).softmax(dim=0)
    assert figures["router/layer_1/router_entropy"] == pytest.approx(
        -(p * p.log()).sum().item() / math.log(4), rel=1e-4
    )
    assert [record.getMessage()[:17] for record in caplog.records] == ["Layer 1, expert 1", "Layer 1, expert 2"]
    assert "load_balance" in caplog.records[0].getMessage()
    assert monitor.figures() == {}
    block(states, torch.ones(6, 5, dtype=torch.bool))
    monitor.figures()
    assert len(caplog.records) == 2  # told once
