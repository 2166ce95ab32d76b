from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import VOCABULARY, tiny_bundle, tiny_encoder

from distillabse import encoder as module
from distillabse import layout
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError

TEXTS = ["the cat", "Where is the house? " * 3, "", "hello world 123", "über", "no " * 300]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("student"), pooling="cls", dense=True)


@pytest.fixture(scope="module")
def bundle(student, tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), student)


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def change(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_vectors_are_those_of_sentence_transformers_in_the_order_of_the_texts(student, bundle):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(student), device="cpu").encode(TEXTS)
    vectors = Encoder(bundle).encode(TEXTS, batch_size=2)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors @ vectors.T - np.eye(len(TEXTS))).max() < 0.99  # no two texts have the same vector


def test_batches_hold_texts_of_similar_length(bundle, monkeypatch):
    encoder, widths = Encoder(bundle), []
    run = encoder.run
    encoder.dimension  # noqa: B018 - computed by a run of its own
    monkeypatch.setattr(encoder, "run", lambda inputs: (widths.append(inputs["input_ids"].shape), run(inputs))[1])
    encoder.encode(["the", "the cat is old", "cat", "the dog is young"], batch_size=2)
    assert widths == [(2, 6), (2, 3)]


def test_no_texts_give_no_rows(bundle):
    assert Encoder(bundle).encode([]).shape == (0, 32)


def test_inputs_are_int64_padded_on_the_right(bundle):
    inputs = Encoder(bundle).tokenize(["the cat", "the"], pad_to=6)
    pad, cls, sep = (VOCABULARY.index(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
    the, cat = VOCABULARY.index("the"), VOCABULARY.index("cat")
    assert inputs["input_ids"].tolist() == [[cls, the, cat, sep, pad, pad], [cls, the, sep, pad, pad, pad]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert set(inputs) == {"input_ids", "attention_mask"}  # the graph declares no token_type_ids
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == np.int64


def test_padding_does_not_change_a_vector(bundle):
    encoder = Encoder(bundle)
    alone, padded = (encoder.run(encoder.tokenize(["hello world"], pad_to=width)) for width in (None, 40))
    np.testing.assert_allclose(alone, padded, atol=1e-6)


def test_long_texts_are_cut_at_max_seq_length(copy):
    change(copy / layout.TRANSFORMER_SETTINGS, max_seq_length=5)
    assert Encoder(copy).tokenize(["the cat is very old"])["input_ids"].shape == (1, 5)


def test_lower_case_follows_the_settings(copy):
    the = VOCABULARY.index("the")
    assert the not in Encoder(copy).tokenize(["THE"])["input_ids"]
    change(copy / layout.TRANSFORMER_SETTINGS, do_lower_case=True)
    assert the in Encoder(copy).tokenize(["THE"])["input_ids"]


def test_padding_token_may_be_spelled_as_an_object_and_must_exist(copy):
    change(copy / layout.TOKENIZER_SETTINGS, pad_token={"content": "[MASK]"})
    inputs = Encoder(copy).tokenize(["the"], pad_to=4)
    assert inputs["input_ids"][0, -1] == VOCABULARY.index("[MASK]")
    change(copy / layout.TOKENIZER_SETTINGS, pad_token="<pad>")
    with pytest.raises(InputError, match=r"tokenizer_config\.json names no `pad_token`"):
        Encoder(copy)


def token_type_graph(path):
    """A graph whose vector is (sum of ids, sum of token_type_ids)."""
    import onnx
    from onnx import TensorProto, helper

    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in names]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", 2])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ids", "axis"], ["first"], keepdims=1),
        helper.make_node("ReduceSum", ["types", "axis"], ["second"], keepdims=1),
        helper.make_node("Concat", ["first", "second"], ["sentence_embedding"], axis=1),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "sums", inputs, [output], [axis])
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


def test_int8_graph_is_the_default_on_a_cpu_and_declared_inputs_are_fed(copy):
    token_type_graph(copy / layout.ONNX_INT8["avx2"])
    assert Encoder(copy, file=layout.ONNX_FP32).dimension == 32
    encoder = Encoder(copy, threads=1)
    assert encoder.dimension == 2
    ids = sum(VOCABULARY.index(token) for token in ("[CLS]", "the", "[SEP]"))
    assert encoder.encode(["the"]).tolist() == [[ids, 0]]


def test_one_string_or_something_else_is_refused_with_a_remedy(bundle):
    encoder = Encoder(bundle)
    with pytest.raises(TypeError, match=r"write encode\(\[text\]\)"):
        encoder.encode("the cat")
    with pytest.raises(TypeError, match=r"text 1 is None, not a string"):
        encoder.encode(["the cat", None])
    with pytest.raises(ValueError, match="at least 1, not 0"):
        encoder.encode(["the cat"], batch_size=0)


@pytest.mark.parametrize(
    "file", [layout.ONNX_FP32, layout.TOKENIZER, layout.TOKENIZER_SETTINGS, layout.TRANSFORMER_SETTINGS]
)
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(InputError, match=file):
        Encoder(copy)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (layout.ONNX_FP32, r"ONNX Runtime cannot load .*onnx/model\.onnx"),
        (layout.TRANSFORMER_SETTINGS, r"sentence_bert_config\.json does not say `max_seq_length`"),
        (layout.TOKENIZER, r"tokenizer\.json is not a tokenizer"),
    ],
)
def test_a_file_without_its_content_is_named(copy, file, message):
    (copy / file).write_text("{}")
    with pytest.raises(InputError, match=message):
        Encoder(copy)


def test_a_wrong_folder_or_device_is_named(bundle, tmp_path):
    with pytest.raises(InputError, match=r"There is no bundle .*nowhere"):
        Encoder(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="'gpu' is not a device: choose 'cpu' or 'cuda'"):
        Encoder(bundle, device="gpu")


def test_a_graph_without_sentence_vectors_is_refused(copy):
    import onnx

    model = onnx.load(copy / layout.ONNX_FP32)
    del model.graph.output[1]
    onnx.save(model, copy / layout.ONNX_FP32)
    with pytest.raises(InputError, match="no output 'sentence_embedding'"):
        Encoder(copy)


def test_a_gpu_that_is_not_used_is_an_error(bundle, monkeypatch):
    """onnxruntime-gpu falls back to the CPU in silence; the test does so on every machine."""
    monkeypatch.setitem(module.PROVIDERS, "cuda", ["CUDAExecutionProvider"])
    runtime = module.import_onnxruntime()
    real = runtime.InferenceSession
    monkeypatch.setattr(
        runtime, "InferenceSession", lambda path, options, providers: real(path, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(ConfigurationError, match="ONNX Runtime uses CPUExecutionProvider"):
        Encoder(bundle, device="cuda")


def test_missing_onnxruntime_names_the_extras(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distillabse\[cpu\]'"):
        Encoder(bundle)


def test_sessions_run_on_the_threads_that_were_asked_for():
    options = module.session_options(threads=3)
    assert options.intra_op_num_threads == 3


def test_neither_torch_nor_transformers_is_imported(bundle):
    code = (
        "import sys; from distillabse.encoder import Encoder\n"
        f"print(Encoder({str(bundle)!r}).encode(['the cat']).shape, {{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 32) set()"
