"""The Switch student as ONNX: parity, sparsity, INT8 and gates, on a tiny encoder."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from distillabse import layout
from distillabse.config import ExportConfig, GatesConfig, SwitchStudentConfig, TeacherConfig
from distillabse.corpus.records import Sentence
from distillabse.encoder import Encoder, session
from distillabse.errors import ConfigurationError
from distillabse.evaluation.bench import count_active_parameters, count_parameters
from distillabse.evaluation.fidelity import row_cosines
from distillabse.export.bundle import write_bundle
from distillabse.export.graph import count_after_optimisation, export_graph
from distillabse.export.switch import count_expert_products, expert_products, routers
from distillabse.models.student import build_student
from distillabse.models.switch import sparse_layers
from distillabse.models.teacher import load_encoder, load_teacher, transformer_of
from distillabse.pipeline import run_job
from distillabse.settings import validate
from distillabse.verification.graphs import examine_operators
from distillabse.verification.kinds import INT8
from distillabse.verification.subject import Subject
from distillabse.verification.vectors import examine_invariance

INT8_FILE = layout.ONNX_INT8["avx512_vnni"]
EXPERTS, LAYERS = 5, [0, 2]


@pytest.fixture(scope="module")
def exported(encoder_folder, tmp_path_factory):
    """(torch encoder with routers that tell tokens apart, bundle)."""
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    settings = SwitchStudentConfig(layers=3, experts=EXPERTS, sparse_layers=LAYERS, expert_noise=0.3)
    torch.manual_seed(3)
    encoder = build_student(teacher, settings).eval()
    for layer in sparse_layers(transformer_of(encoder)).values():
        layer.feed_forward.router.weight.data *= 3
    bundle = tmp_path_factory.mktemp("switch") / "bundle"
    bundle.mkdir()
    write_bundle(encoder, bundle, ExportConfig(), {"name": "tiny"})
    return encoder, bundle


def random_batch(batch, tokens):
    ids = np.random.default_rng(batch).integers(5, 150, size=(batch, tokens))
    mask = np.ones_like(ids)
    if tokens > 1:
        mask[-1, tokens // 2 :] = 0
    return ids, mask


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 5), (3, 7), (16, 48)])
def test_fp32_graph_equals_torch_for_any_shape(exported, batch, tokens):
    encoder, bundle = exported
    ids, mask = random_batch(batch, tokens)
    used = {}
    hooks = [
        layer.feed_forward.router.register_forward_hook(
            lambda module, arguments, logits, index=index: used.update({index: set(logits.argmax(dim=-1).tolist())})
        )
        for index, layer in sparse_layers(transformer_of(encoder)).items()
    ]
    with torch.no_grad():
        features = encoder({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
    for hook in hooks:
        hook.remove()
    if batch == 16:
        assert used == {layer: set(range(EXPERTS)) for layer in LAYERS}
    states, vectors = session(bundle / layout.ONNX_FP32).run(None, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(vectors, features["sentence_embedding"], atol=1e-4)
    np.testing.assert_allclose(states, features["token_embeddings"], atol=1e-4)


@pytest.mark.parametrize("opset", [17, 23])
def test_other_operator_sets_give_the_same_vectors(exported, tmp_path, opset):
    encoder, bundle = exported
    export_graph(encoder, tmp_path / "model.onnx", opset)
    ids, mask = random_batch(3, 7)
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = session(bundle / layout.ONNX_FP32).run(None, inputs)[1]
    np.testing.assert_allclose(session(tmp_path / "model.onnx").run(None, inputs)[1], expected, atol=1e-5)


def test_every_experts_weights_are_in_the_graph(exported):
    """The example input of an export routes to a few; a trace would lose the others."""
    encoder, bundle = exported
    graph = onnx.load(str(bundle / layout.ONNX_FP32)).graph
    found = expert_products(graph)
    assert count_expert_products(bundle / layout.ONNX_FP32) == 2 * EXPERTS * len(LAYERS)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrices = [[constants[name] for name in product.weights] for product in found.values()]
    expected = [
        weights.detach().numpy()
        for layer in sparse_layers(transformer_of(encoder)).values()
        for weights in (layer.feed_forward.experts.inner_weight, layer.feed_forward.experts.outer_weight)
    ]
    for stacked, weights in zip(expected, matrices, strict=True):
        np.testing.assert_array_equal(np.stack(weights), stacked)


@pytest.mark.parametrize("file", [layout.ONNX_FP32, INT8_FILE])
def test_each_real_token_meets_one_expert_and_padding_none(exported, tmp_path, file):
    """Sparse at run time: over all experts the multiplied rows are as many as there are real tokens."""
    _, bundle = exported
    model = onnx.load(str(bundle / file))
    splits = [node for node in model.graph.node if node.op_type == "Split" and len(node.output) == EXPERTS]
    products = [
        node for node in model.graph.node if set(node.input) & {part for node in splits for part in node.output}
    ]
    assert {node.op_type for node in products} == {"MatMul" if file == layout.ONNX_FP32 else "MatMulInteger"}
    for product in products:
        element = onnx.TensorProto.FLOAT if file == layout.ONNX_FP32 else onnx.TensorProto.INT32
        model.graph.output.append(onnx.helper.make_tensor_value_info(product.output[0], element, None))
    onnx.save(model, str(tmp_path / "open.onnx"))
    ids, mask = random_batch(6, 20)
    outputs = session(tmp_path / "open.onnx").run(None, {"input_ids": ids, "attention_mask": mask})[2:]
    rows = np.array([len(output) for output in outputs]).reshape(2 * len(LAYERS), EXPERTS)
    assert rows.sum(axis=1).tolist() == [mask.sum()] * 2 * len(LAYERS)
    assert rows.max() < mask.sum()


@pytest.mark.parametrize("sparse", [[1], "all"])
def test_int8_works_on_rows_again_after_a_sparse_layer(encoder_folder, tmp_path, sparse, sentences):
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    encoder = build_student(teacher, SwitchStudentConfig(layers=3, experts=2, sparse_layers=sparse)).eval()
    write_bundle(encoder, tmp_path, ExportConfig(), {"name": "tiny"}, texts=sentences * 4)
    graphs = [Encoder(tmp_path, file=file).encode(sentences) for file in (layout.ONNX_FP32, INT8_FILE)]
    assert row_cosines(*graphs).min() > 0.97


def test_an_expert_without_tokens_is_no_error(exported):
    _, bundle = exported
    one = {"input_ids": np.array([[7]]), "attention_mask": np.array([[1]])}
    for file in (layout.ONNX_FP32, INT8_FILE):
        assert np.isfinite(session(bundle / file).run(None, one)[1]).all()


def test_int8_has_integer_experts_a_float_router_and_no_neighbours(exported, sentences):
    _, bundle = exported
    fp32, int8 = Encoder(bundle, file=layout.ONNX_FP32), Encoder(bundle, file=INT8_FILE)
    cosines = row_cosines(fp32.encode(sentences), int8.encode(sentences))
    assert 0.97 < cosines.min() < 0.9999999
    subject = Subject(bundle, [Sentence(text, "en") for text in sentences * 5], "texts")
    found = examine_invariance(subject, INT8, GatesConfig(invariance_min=0.999999))
    assert len(found.gates) == 4 and all(gate.passed for gate in found.gates)
    graph = onnx.load(str(bundle / INT8_FILE)).graph
    float_matrices = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    assert float_matrices & constants.keys() == routers(graph) and len(routers(graph)) == len(LAYERS)
    integers = 4 * 3 + 2 + 2 * EXPERTS * len(LAYERS)  # attention, one dense block, experts
    assert count_after_optimisation(bundle / INT8_FILE)["MatMulInteger"] == integers
    assert json.loads((bundle / layout.PROVENANCE).read_text())["int8"]["matmuls"] == integers


def test_int8_experts_equal_their_formula(exported, tmp_path):
    """The integer product of every expert, taken out of the graph and compared with numpy."""
    _, bundle = exported
    fp32, int8 = (onnx.load(str(bundle / file)) for file in (layout.ONNX_FP32, INT8_FILE))
    (result, product), *_ = expert_products(fp32.graph).items()
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in fp32.graph.initializer}
    for name in (product.tokens, product.counts, result):
        element = onnx.TensorProto.INT64 if name == product.counts else onnx.TensorProto.FLOAT
        int8.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    onnx.save(int8, str(tmp_path / "open.onnx"))
    ids, mask = random_batch(6, 20)
    run = session(tmp_path / "open.onnx").run([product.tokens, product.counts, result],
                                              {"input_ids": ids, "attention_mask": mask})  # fmt: skip
    tokens, counts, output = run
    expected, start = [], 0
    for name, count in zip(product.weights, counts, strict=True):
        weight, x = weights[name], tokens[start : start + count]
        weight_scale = np.abs(weight).max(axis=0) / 127
        high, low = np.maximum(x.max(-1, keepdims=True), 0), np.minimum(x.min(-1, keepdims=True), 0)
        scale = (high - low) / 255
        zero = np.round(-low / scale)
        q = np.clip(np.round(x / scale) + zero, 0, 255)
        expected.append(((q - zero) @ np.round(weight / weight_scale)) * weight_scale * scale)
        start += count
    assert (counts > 0).all()
    np.testing.assert_allclose(output, np.concatenate(expected), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


ROUTING = {"kind": "routing", "load_balance": 0.05}


def test_a_switch_job_runs_from_corpus_to_report(job_folder):
    from tiny import tiny_job

    student = {"kind": "switch", "layers": 2, "experts": 4, "intermediate_size": 24}
    config = validate(tiny_job(job_folder, "switch", student=student, objectives=[{"kind": "cosine"}, ROUTING]))
    run = run_job(config)
    encoder = load_encoder(str(run.bundle))
    assert list(sparse_layers(transformer_of(encoder))) == [1]
    gates = {gate["gate"]: gate for gate in json.loads(run.verification.read_text())["gates"]}
    assert gates["expert products in the graph"]["value"] == 8 and all(gate["passed"] for gate in gates.values())
    logged = [entry for entry in json.loads(run.training_history.read_text())["log"] if "loss" in entry]
    assert {"cosine", "load_balance", "router_z", "router/layer_1/dropped"} <= logged[0].keys()
    assert sum(logged[0][f"router/layer_1/load_expert_{expert}"] for expert in range(4)) == pytest.approx(1)
    assert 'aria-label="Load of the experts by training step and layer"' in run.report_html.read_text()
    card = (run.bundle / layout.MODEL_CARD).read_text()
    assert count_parameters(encoder) - count_active_parameters(encoder) == 3 * (32 * 24 + 24 + 24 * 32 + 32)
    assert f"passes through {count_active_parameters(encoder):,} parameters" in card
    assert "import distillabse.models.switch" in card and "layers 1 have 4 experts of width 24" in card


def test_a_graph_that_lost_an_expert_fails_its_gate(job_folder):
    from tiny import tiny_job

    config = validate(tiny_job(job_folder, "switch", student={"kind": "switch", "layers": 2, "experts": 4,
                      "intermediate_size": 24}, objectives=[{"kind": "cosine"}, ROUTING]))  # fmt: skip
    bundle = config.run_folder / "bundle"
    settings = json.loads((bundle / layout.MODEL_SETTINGS).read_text())
    settings["num_experts"] = 5
    (bundle / layout.MODEL_SETTINGS).write_text(json.dumps(settings))
    subject = Subject(bundle, [Sentence("a dog", "en"), Sentence("a cat", "en")], "texts")
    gates = {gate.gate: gate for gate in examine_operators(subject, subject.graphs[0]).gates}
    gate = gates["expert products in the graph"]
    assert (gate.value, gate.limit, gate.passed) == (8, 10, False)


def test_one_job_trains_a_switch_assistant_and_distils_it_back_to_dense(job_folder):
    from tiny import tiny_job

    assistant = {
        "student": {"kind": "switch", "layers": 2, "experts": 4, "intermediate_size": 24},
        "objectives": [{"kind": "cosine"}, ROUTING],
        "training": {"max_steps": 3, "bf16": False, "report_to": [], "eval_strategy": "no", "save_strategy": "no",
                     "load_best_model_at_end": False},
    }  # fmt: skip
    config = validate(tiny_job(job_folder, "dense", assistant=assistant, student={"layers": 2}))
    run = run_job(config)
    assert list(sparse_layers(transformer_of(load_encoder(str(run.assistant))))) == [1]
    dense = transformer_of(load_encoder(str(run.bundle)))
    assert type(dense).__name__ == "BertModel" and dense.config.intermediate_size == 24
    assert "Switch" in (run.bundle / layout.MODEL_CARD).read_text()


def test_experts_over_several_processes_are_refused_before_any_stage(job_folder):
    from tiny import tiny_job

    student = {"kind": "switch", "layers": 2, "experts": 4, "expert_parallel_size": 2}
    config = validate(tiny_job(job_folder, "parallel", student=student, objectives=[{"kind": "cosine"}, ROUTING]))
    with pytest.raises(ConfigurationError, match=r"expert_parallel_size: 2 is for DeepSpeed scripts.*set 1"):
        run_job(config)
    assert not config.run_folder.exists()


def test_an_expert_wider_than_the_block_it_starts_from_is_refused_before_any_stage(job_folder):
    from tiny import tiny_job

    student = {"kind": "switch", "layers": 2, "expert_size": 65}
    config = validate(tiny_job(job_folder, "wide", student=student, objectives=[{"kind": "cosine"}, ROUTING]))
    with pytest.raises(ConfigurationError, match=r"expert_size: 65 is wider than the teacher's .* of 64"):
        run_job(config)
