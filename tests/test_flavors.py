"""Folders for one consumer, made from tiny bundles."""

import hashlib
import json
import re

import numpy as np
import onnx
import pytest
import yaml

from distillabse import layout
from distillabse.checksums import broken_checksums
from distillabse.config import ExportConfig, QuantizationConfig, TeacherConfig
from distillabse.encoder import Encoder, load_tokenizer, session
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation.fidelity import row_cosines
from distillabse.export import flavors
from distillabse.export.bundle import write_bundle
from distillabse.export.flavors import FLAVORS, make_flavor
from distillabse.export.float16 import to_float16
from distillabse.export.pooled import pooling_is_enough
from distillabse.models.teacher import load_teacher

INT8_FILE = layout.ONNX_INT8["avx512_vnni"]
JOB = {
    "teacher": {"model": "sentence-transformers/LaBSE", "revision": None},
    "student": {"kind": "dense"},
    "export": {},
}


def bundle_of(folder, path, provenance, **config):
    path.mkdir()
    write_bundle(load_teacher(TeacherConfig(model=str(folder))), path, ExportConfig(**config), provenance)
    return path


@pytest.fixture(scope="module")
def bundle(encoder_folder, tmp_path_factory):
    provenance = {"name": "tiny", "config": JOB | {"export": {"license": "apache-2.0"}}}
    return bundle_of(encoder_folder, tmp_path_factory.mktemp("flavors") / "bundle", provenance)


@pytest.fixture(scope="module")
def dense_bundle(labse_folder, tmp_path_factory):
    return bundle_of(labse_folder, tmp_path_factory.mktemp("flavors") / "bundle", {"name": "tiny"})


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_tei_gets_int8_under_the_only_name_it_reads(bundle, tmp_path):
    make_flavor(bundle, "tei-int8", tmp_path / "tei")
    assert [path.name for path in (tmp_path / "tei" / "onnx").iterdir()] == ["model.onnx"]
    assert digest(tmp_path / "tei" / layout.ONNX_FP32) == digest(bundle / INT8_FILE)
    assert not (tmp_path / "tei" / "model.safetensors").exists()
    assert broken_checksums(tmp_path / "tei") == []
    assert json.loads((tmp_path / "tei" / layout.PROVENANCE).read_text())["flavor"] == "tei-int8"
    for name in ("config.json", "modules.json", "1_Pooling/config.json", layout.TOKENIZER):
        assert digest(tmp_path / "tei" / name) == digest(bundle / name)


def test_optimum_gets_its_names_and_its_environment(bundle, tmp_path):
    make_flavor(bundle, "optimum", tmp_path / "optimum")
    assert digest(tmp_path / "optimum" / layout.ONNX_FP32) == digest(bundle / layout.ONNX_FP32)
    assert digest(tmp_path / "optimum" / layout.ONNX_QUANTIZED) == digest(bundle / INT8_FILE)
    assert "transformers==4.57.6" in (tmp_path / "optimum" / layout.REQUIREMENTS).read_text().splitlines()
    first = session(tmp_path / "optimum" / layout.ONNX_QUANTIZED).get_outputs()[0]
    assert first.name == "last_hidden_state"


def test_transformers_js_gets_three_precisions(bundle, sentences, tmp_path):
    make_flavor(bundle, "transformers-js", tmp_path / "js")
    assert sorted(path.name for path in (tmp_path / "js" / "onnx").iterdir()) == [
        "model.onnx", "model_fp16.onnx", "model_quantized.onnx",
    ]  # fmt: skip
    fp32 = Encoder(bundle, file=layout.ONNX_FP32).encode(sentences)
    half = Encoder(tmp_path / "js", file=layout.ONNX_FLOAT16).encode(sentences)
    assert 0.9999 < row_cosines(fp32, half).min() < 0.99999999


def test_a_flavor_has_a_card_of_its_own(bundle, tmp_path):
    for name in ("tei-int8", "optimum", "transformers-js"):
        make_flavor(bundle, name, tmp_path / name)
        card = (tmp_path / name / layout.MODEL_CARD).read_text()
        assert FLAVORS[name].use in card
        assert INT8_FILE not in card
        assert "With nothing but" not in card  # how to use the bundle itself
        assert card.count("## Licence and credit") == 1
        for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
            compile(block, "README.md", "exec")


def test_half_precision_halves_the_weights_and_keeps_the_interface(dense_bundle, sentences, tmp_path):
    to_float16(dense_bundle / layout.ONNX_FP32, tmp_path / "half.onnx")
    graph = onnx.load(tmp_path / "half.onnx").graph
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) > 32 * 32]
    assert large and {tensor.data_type for tensor in large} == {onnx.TensorProto.FLOAT16}
    assert [output.name for output in graph.output] == ["last_hidden_state", "sentence_embedding"]
    assert {output.type.tensor_type.elem_type for output in graph.output} == {onnx.TensorProto.FLOAT}
    inputs = Encoder(dense_bundle, file=layout.ONNX_FP32).tokenize(sentences, pad_to=40)
    states, vectors = session(tmp_path / "half.onnx").run(None, inputs)
    expected_states, expected = session(dense_bundle / layout.ONNX_FP32).run(None, inputs)
    assert row_cosines(expected, vectors).min() > 0.9999
    assert states.dtype == np.float32 and np.abs(states - expected_states).max() > 0


def test_half_precision_gives_numbers_even_for_padding_alone(bundle, tmp_path):
    to_float16(bundle / layout.ONNX_FP32, tmp_path / "half.onnx")
    nothing = {"input_ids": np.zeros((2, 5), np.int64), "attention_mask": np.zeros((2, 5), np.int64)}
    assert all(np.isfinite(output).all() for output in session(tmp_path / "half.onnx").run(None, nothing))


def test_a_graph_for_browsers_is_one_file(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("distillabse.export.float16.PROTOBUF_LIMIT", 1000)
    with pytest.raises(InputError, match="over 2 GB"):
        make_flavor(bundle, "transformers-js", tmp_path / "js")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_head_gets_graphs_that_pool(bundle, dense_bundle, sentences):
    """fastembed takes the first output as it is: there must be no other."""
    assert pooling_is_enough(bundle) and not pooling_is_enough(dense_bundle)
    assert not list((bundle / "onnx").glob("*pooled*"))
    for name in (layout.ONNX_FP32, INT8_FILE):
        pooled = session(dense_bundle / layout.pooled_graph(name))
        assert [output.name for output in pooled.get_outputs()] == ["sentence_embedding"]
        encoder = Encoder(dense_bundle, file=name)
        found = pooled.run(None, encoder.tokenize(sentences))[0]
        np.testing.assert_allclose(found, encoder.run(encoder.tokenize(sentences)), atol=1e-6)
    assert layout.pooled_graph(layout.ONNX_FP32) == "onnx/model_pooled.onnx"
    assert broken_checksums(dense_bundle) == []
    assert "onnx/model_pooled.onnx" in (dense_bundle / layout.CHECKSUMS).read_text()


def test_graphs_that_pool_share_weights_beside_the_graph(labse_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("distillabse.export.graph.PROTOBUF_LIMIT", 1000)
    made = bundle_of(labse_folder, tmp_path / "bundle", {}, quantization=QuantizationConfig(kind="none"))
    data = made / "onnx" / "model.onnx_data"
    assert (made / layout.pooled_graph(layout.ONNX_FP32)).stat().st_size < data.stat().st_size / 4
    assert [output.name for output in session(made / "onnx" / "model_pooled.onnx").get_outputs()] == [
        "sentence_embedding"
    ]
    make_flavor(made, "optimum", tmp_path / "optimum")
    assert sorted(path.name for path in (tmp_path / "optimum" / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    Encoder(tmp_path / "optimum").encode(["hello"])


def test_a_bundle_has_a_card_before_anything_is_measured(bundle):
    _, metadata, body = (bundle / layout.MODEL_CARD).read_text().split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": "sentence-transformers/LaBSE", "library_name": "sentence-transformers", "license": "apache-2.0",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "distillation", "onnx"],
    }  # fmt: skip
    assert body.startswith("\n# tiny\n")
    assert "Nothing was measured yet" in body
    assert f'InferenceSession("{INT8_FILE}")' in body and "enable_truncation(64)" in body
    assert "Licence: `apache-2.0`." in body and "https://huggingface.co/sentence-transformers/LaBSE" in body


def test_the_licence_is_that_of_the_teachers_card(bundle, tmp_path):
    from distillabse.export.card import card_values

    (tmp_path / layout.MODEL_CARD).write_text("---\nlicense: cc-by-4.0\n---\n# Teacher\n")
    config = JOB | {"teacher": {"model": str(tmp_path), "revision": None}}
    assert card_values(bundle, config, [])["license"] == "cc-by-4.0"
    (tmp_path / layout.MODEL_CARD).write_text("---\nlicense: [unclosed\n---\n# Teacher\n")
    assert card_values(bundle, config, [])["license"] is None
    assert card_values(bundle, config | {"export": {"license": "mit"}}, [])["license"] == "mit"


def test_bad_flavors_are_refused_and_leave_nothing(bundle, tmp_path):
    with pytest.raises(ConfigurationError, match=r"no flavor 'tei'.*tei-int8"):
        make_flavor(bundle, "tei", tmp_path / "out")
    with pytest.raises(InputError, match="is no bundle"):
        make_flavor(tmp_path, "tei-int8", tmp_path / "out")
    make_flavor(bundle, "tei-int8", tmp_path / "tei")
    with pytest.raises(InputError, match="is the flavor 'tei-int8' of a bundle"):
        make_flavor(tmp_path / "tei", "optimum", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="Choose another place"):
        make_flavor(bundle, "tei-int8", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    with pytest.raises(InputError, match="Choose another place"):
        make_flavor(bundle, "tei-int8", bundle)
    (tmp_path / "tei" / layout.TOKENIZER).write_text("{}")
    (tmp_path / "tei" / layout.PROVENANCE).write_text("{}")
    with pytest.raises(InputError, match=r"not whole: .*tokenizer\.json"):
        make_flavor(tmp_path / "tei", "optimum", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_int8_there_is_no_int8_flavor(encoder_folder, tmp_path):
    made = bundle_of(encoder_folder, tmp_path / "bundle", {}, quantization=QuantizationConfig(kind="none"))
    with pytest.raises(InputError, match="has no INT8 graph"):
        make_flavor(made, "tei-int8", tmp_path / "tei")
    make_flavor(made, "optimum", tmp_path / "optimum")
    assert [path.name for path in (tmp_path / "optimum" / "onnx").iterdir()] == ["model.onnx"]


def test_a_switch_student_is_refused_where_it_cannot_be_loaded(bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(flavors, "MODEL_TYPE", "bert")
    with pytest.raises(ConfigurationError, match="optimum cannot load a Switch student"):
        make_flavor(bundle, "optimum", tmp_path / "out")


def test_the_command_makes_a_flavor_of_a_bundle(bundle, tmp_path):
    from typer.testing import CliRunner

    from distillabse.cli import app

    result = CliRunner().invoke(app, ["export", str(bundle), "--flavor", "tei-int8", "--output", str(tmp_path / "tei")])
    assert result.exit_code == 0, result.output
    assert digest(tmp_path / "tei" / layout.ONNX_FP32) == digest(bundle / INT8_FILE)
    for wrong in (["--output", "x"], ["--flavor", "tei-int8", "--checkpoint", "x"]):
        result = CliRunner().invoke(app, ["export", str(bundle), *wrong])
        assert isinstance(result.exception, ConfigurationError)


def test_the_tokenizer_goes_into_the_graph(bundle, sentences):
    """The rules of single characters, without the operators that run them."""
    single_file = pytest.importorskip("distillabse.export.single_file")
    rules = single_file.character_rules(load_tokenizer(bundle))
    assert {ord("\t"), 0xA0, 0x3000} <= set(rules.spaces)
    assert {7, 0x200B, 0xFEFF, 0xFFFD} <= set(rules.dropped)
    assert {ord("!"), ord("-"), 0x0964, 0x061F, ord("東")} <= set(rules.alone)
    assert rules.changed == {}  # a cased tokenizer
    assert single_file.special_tokens(load_tokenizer(bundle)) == ([2], [3])


def test_a_single_file_gives_the_same_vectors(bundle, sentences, tmp_path):
    pytest.importorskip("onnxruntime_extensions")
    from distillabse.export.single_file import text_session

    make_flavor(bundle, "single-file", tmp_path / "single")
    texts = [*sentences, "", "äöü! naïve-ly zzqq##", "x" * 101, "the " * 200]
    for source, target in ((layout.ONNX_FP32, layout.ONNX_FP32), (INT8_FILE, layout.ONNX_QUANTIZED)):
        expected = Encoder(bundle, file=source).encode(texts)
        found = text_session(tmp_path / "single" / target)
        assert [(node.name, node.type) for node in found.get_inputs()] == [("text", "tensor(string)")]
        batched = found.run(None, {"text": np.array(texts, dtype=object)})[0]
        alone = [found.run(None, {"text": np.array([text], dtype=object)})[0][0] for text in texts]
        assert row_cosines(expected, batched).min() > 0.99999
        assert row_cosines(expected, np.stack(alone)).min() > 0.99999


def test_a_tokenizer_that_the_operators_cannot_follow_is_refused(bundle, tmp_path):
    pytest.importorskip("onnxruntime_extensions")
    import shutil

    from tokenizers import Tokenizer, normalizers

    from distillabse.checksums import write_checksums

    for name, change in (("replaced", normalizers.Replace("the house", "blue")), ("unigram", None)):
        copy = shutil.copytree(bundle, tmp_path / name)
        if change is None:
            settings = json.loads((copy / layout.TOKENIZER).read_text())
            settings["model"]["type"] = "Unigram"
            (copy / layout.TOKENIZER).write_text(json.dumps(settings))
        else:
            tokenizer = Tokenizer.from_file(str(copy / layout.TOKENIZER))
            tokenizer.normalizer = normalizers.Sequence([tokenizer.normalizer, change])
            tokenizer.save(str(copy / layout.TOKENIZER))
        write_checksums(copy)
    with pytest.raises(InputError, match="'in the house' gets another vector"):
        make_flavor(tmp_path / "replaced", "single-file", tmp_path / "out", ["hello", "in the house"])
    with pytest.raises(InputError, match="is a Unigram tokenizer"):
        make_flavor(tmp_path / "unigram", "single-file", tmp_path / "out")
    assert not (tmp_path / "out").exists()
