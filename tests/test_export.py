"""Graphs, INT8, bundle and gates on tiny encoders."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from distillabse import layout
from distillabse.checksums import broken_checksums
from distillabse.config import ExportConfig, TeacherConfig
from distillabse.encoder import Encoder, session
from distillabse.evaluation.fidelity import row_cosines
from distillabse.export.bundle import write_bundle
from distillabse.export.graph import count_after_optimisation, export_graph
from distillabse.export.quantize import quantize, quantize_columns
from distillabse.models.teacher import load_encoder, load_teacher

INT8_FILE = layout.ONNX_INT8["avx512_vnni"]


@pytest.fixture(scope="module", params=["encoder_folder", "labse_folder"])
def exported(request, tmp_path_factory):
    """(torch encoder, bundle folder) for mean pooling and for LaBSE's layout."""
    encoder = load_teacher(TeacherConfig(model=str(request.getfixturevalue(request.param))))
    bundle = tmp_path_factory.mktemp("export") / "bundle"
    bundle.mkdir()
    write_bundle(encoder, bundle, ExportConfig(), {"name": "tiny"})
    return encoder, bundle


def test_graph_has_the_agreed_inputs_and_outputs(exported):
    _, bundle = exported
    for file in (layout.ONNX_FP32, INT8_FILE):
        graph = session(bundle / file)
        assert [(node.name, node.type) for node in graph.get_inputs()] == [
            ("input_ids", "tensor(int64)"), ("attention_mask", "tensor(int64)"),
        ]  # fmt: skip
        assert [(node.name, node.type) for node in graph.get_outputs()] == [
            ("last_hidden_state", "tensor(float)"), ("sentence_embedding", "tensor(float)"),
        ]  # fmt: skip


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 5), (3, 7), (7, 48)])
def test_fp32_graph_equals_torch_for_any_shape(exported, batch, tokens):
    import torch

    encoder, bundle = exported
    random = np.random.default_rng(batch)
    ids = random.integers(5, 150, size=(batch, tokens))
    mask = np.ones_like(ids)
    if tokens > 1:
        mask[-1, tokens // 2 :] = 0
    with torch.no_grad():
        features = encoder({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
    states, vectors = session(bundle / layout.ONNX_FP32).run(None, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(vectors, features["sentence_embedding"], atol=2e-5)
    real = mask.astype(bool)
    np.testing.assert_allclose(states[real], features["token_embeddings"].numpy()[real], atol=1e-4)


@pytest.mark.parametrize(("limit", "files"), [(10**9, ["model.onnx"]), (1000, ["model.onnx", "model.onnx_data"])])
def test_weights_are_in_the_graph_or_beside_it(exported, sentences, tmp_path, monkeypatch, limit, files):
    """One file while protobuf can hold it; nothing that the exporter wrote in between stays behind."""
    encoder, bundle = exported
    monkeypatch.setattr("distillabse.export.graph.PROTOBUF_LIMIT", limit)
    export_graph(encoder, tmp_path / layout.ONNX_FP32)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == files
    inputs = Encoder(bundle, file=layout.ONNX_FP32).tokenize(sentences)
    vectors = session(tmp_path / layout.ONNX_FP32).run(["sentence_embedding"], inputs)[0]
    np.testing.assert_allclose(vectors, encoder.encode(sentences), atol=2e-5)
    quantize(tmp_path / layout.ONNX_FP32, tmp_path / "int8.onnx")
    assert row_cosines(session(tmp_path / "int8.onnx").run(["sentence_embedding"], inputs)[0], vectors).min() > 0.99


def test_everything_that_should_fuse_does(exported):
    _, bundle = exported
    found = count_after_optimisation(bundle / layout.ONNX_FP32)
    assert found["LayerNormalization"] == 2 * 4 + 1
    assert found["BiasGelu"] + found["Gelu"] == 4
    int8 = count_after_optimisation(bundle / INT8_FILE)
    assert int8["MatMulInteger"] == 6 * 4
    assert int8["QuantizeLinear"] == 4 * 4  # query, key and value share one quantised input
    assert int8["DynamicQuantizeMatMul"] == int8["DynamicQuantizeLinear"] == 0


def test_int8_keeps_the_vector(exported, sentences):
    _, bundle = exported
    fp32, int8 = Encoder(bundle, file=layout.ONNX_FP32), Encoder(bundle, file=INT8_FILE)
    cosines = row_cosines(fp32.encode(sentences), int8.encode(sentences))
    assert 0.99 < cosines.min() < 0.9999999


def one_matmul(path, weight):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))


@pytest.mark.parametrize("largest", [127, 63])
def test_int8_product_equals_its_formula(tmp_path, largest):
    random = np.random.default_rng(0)
    weight = (random.normal(size=(24, 10)) * random.uniform(0.1, 5, size=10)).astype(np.float32)
    x = (random.normal(size=(2, 5, 24)) * random.uniform(0.01, 30, size=(2, 5, 1)) + 0.5).astype(np.float32)
    x[0, 0] = 0.0  # a row without any range
    one_matmul(tmp_path / "fp32.onnx", weight)
    done = quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", largest=largest)
    assert (done.matmuls, done.embeddings) == (1, 0)
    result = session(tmp_path / "int8.onnx").run(None, {"x": x})[0]

    weight_scale = np.abs(weight).max(axis=0) / largest
    p = np.round(weight / weight_scale)
    high, low = np.maximum(x.max(-1, keepdims=True), 0), np.minimum(x.min(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / 255, 1e-12)
    zero = np.round(-low / scale)
    q = np.clip(np.round(x / scale) + zero, 0, 255)
    expected = ((q - zero) @ p) * weight_scale * scale
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=2e-3)
    assert np.abs(result - x @ weight).max() < 0.05 * np.abs(x @ weight).max()


def test_weights_round_trip_per_column():
    weight = np.array([[1.0, 0.001], [-2.0, 0.002]], dtype=np.float32)
    quantised, scale = quantize_columns(weight, 127)
    assert quantised.dtype == np.int8 and quantised.tolist() == [[64, 64], [-127, 127]]
    np.testing.assert_allclose(quantised * scale, weight, rtol=0.01)


def test_bundle_is_the_folder_that_consumers_expect(exported, sentences):
    encoder, bundle = exported
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "vocab.txt", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
        "1_Pooling/config.json", "distillabse.json", "SHA256SUMS", "onnx/model.onnx",
        "onnx/model_qint8_avx512_vnni.onnx",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    np.testing.assert_allclose(load_encoder(str(bundle)).encode(sentences), encoder.encode(sentences), atol=1e-6)
    np.testing.assert_allclose(
        Encoder(bundle, file=layout.ONNX_FP32).encode(sentences), encoder.encode(sentences), atol=2e-5
    )
    assert json.loads((bundle / "distillabse.json").read_text())["int8"] == {
        "kind": "per_token",
        "matmuls": 24,
        "embeddings": 1,
    }


def test_a_default_prompt_belongs_to_the_vector_everywhere(encoder_folder, tmp_path, sentences):
    encoder = load_encoder(str(encoder_folder))
    plain = encoder.encode(sentences)
    encoder.prompts, encoder.default_prompt_name = {"query": "my old friend "}, "query"
    write_bundle(encoder, tmp_path, ExportConfig(), {})
    expected = encoder.encode(sentences)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(Encoder(tmp_path, file=layout.ONNX_FP32).encode(sentences), expected, atol=2e-5)
    np.testing.assert_allclose(load_encoder(str(tmp_path)).encode(sentences), expected, atol=1e-6)


def test_checksums_notice_a_changed_and_a_missing_file(exported, tmp_path):
    import shutil

    copy = shutil.copytree(exported[1], tmp_path / "copy")
    assert broken_checksums(copy) == []
    (copy / "config.json").write_text("{}")
    (copy / "vocab.txt").unlink()
    assert broken_checksums(copy) == ["config.json", "vocab.txt"]


def test_the_embedding_table_is_int8_too(exported):
    _, bundle = exported
    tensors = {t.name: t for t in onnx.load(str(bundle / INT8_FILE)).graph.initializer}
    table = next(t for name, t in tensors.items() if "word_embeddings" in name and name.endswith("_int8"))
    assert table.data_type == TensorProto.INT8
    assert not any(name.endswith("word_embeddings.weight") for name in tensors)
    assert (bundle / INT8_FILE).stat().st_size < 0.6 * (bundle / layout.ONNX_FP32).stat().st_size
