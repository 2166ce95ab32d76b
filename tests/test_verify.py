"""The gates: a good bundle passes them all, and every planted fault is caught by the gate that is made for it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from tiny import tiny_encoder

from distillabse import cli, layout
from distillabse.checksums import write_checksums
from distillabse.config import EvaluationConfig, ExportConfig, GatesConfig, TeacherConfig
from distillabse.corpus.records import Sentence
from distillabse.encoder import session
from distillabse.errors import ConfigurationError, GateFailed, InputError
from distillabse.export.bundle import write_bundle
from distillabse.models.teacher import load_encoder, load_teacher
from distillabse.settings import load_gates
from distillabse.storage import read_json
from distillabse.verification.examine import bundle_checks, examine_bundle, verify_bundle
from distillabse.verification.gates import (
    Check, Findings, Outcome, at_least, at_most, exactly, failed_gates, none_of, require_passed, run_checks,
)  # fmt: skip
from distillabse.verification.inputs import ODD_TEXTS
from distillabse.verification.kinds import FP32, INT8, TORCH
from distillabse.verification.subject import Subject
from distillabse.verification.teacher import Teacher
from distillabse.verification.texts import built_in_texts, texts_of_file
from distillabse.verification.vectors import examine_invariance, examine_loss

INT8_FILE = layout.ONNX_INT8["avx512_vnni"]
# Weights of the tiny encoders are drawn wide, and INT8 keeps them less well than trained ones.
LIMITS = GatesConfig(int8_to_fp32_mean=0.99)


@pytest.fixture(scope="module", params=["encoder_folder", "labse_folder"])
def good(request, tmp_path_factory):
    """A bundle of mean pooling, and one of LaBSE's layout."""
    encoder = load_teacher(TeacherConfig(model=str(request.getfixturevalue(request.param))))
    bundle = tmp_path_factory.mktemp("verify") / "bundle"
    bundle.mkdir()
    write_bundle(encoder, bundle, ExportConfig(), {"name": "tiny", "config": {"export": {"opset": 18}}})
    return bundle


@pytest.fixture(scope="module")
def mean_pooled(encoder_folder, tmp_path_factory):
    bundle = tmp_path_factory.mktemp("planted") / "bundle"
    bundle.mkdir()
    write_bundle(load_encoder(str(encoder_folder)), bundle, ExportConfig(), {"config": {"export": {"opset": 18}}})
    return bundle


@pytest.fixture
def bundle(mean_pooled, tmp_path):
    """A copy to plant a fault in."""
    return shutil.copytree(mean_pooled, tmp_path / "bundle")


@pytest.fixture
def texts(sentences):
    return [Sentence(text, language) for text in sentences for language in ("en", "de")]


def examined(bundle, texts, sections=None):
    """The result of all checks, or of those of some sections."""
    subject, findings = Subject(bundle, texts, "texts"), Findings()
    checks = bundle_checks(subject, LIMITS)
    run_checks([check for check in checks if sections is None or check.section in sections], findings)
    return findings.result()


def failed(bundle, texts, *sections):
    """(gate, artefact) of what failed."""
    result = examined(bundle, texts, sections or None)
    assert result["gates"] and result["passed"] is (not failed_gates(result["gates"]))
    json.dumps(result, allow_nan=False)
    return {(gate["gate"], gate["artefact"]) for gate in failed_gates(result["gates"])}


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_graph(path, change):
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(path))


def test_a_good_bundle_passes_every_gate(good, texts):
    result = examine_bundle(Subject(good, texts, "texts"), LIMITS)
    assert failed_gates(result["gates"]) == [] and result["passed"] is True
    assert set(result["invariance"]) == set(result["odd_texts"]) == set(result["truncation"]) == {TORCH, FP32, INT8}
    assert result["parity"][FP32]["min"] > 0.99999 and result["parity"][FP32]["max_difference"] < 2e-5
    loss = result["loss"][INT8]
    assert set(loss["languages"]) == {"en", "de"} and loss["languages"]["de"]["n"] == 8
    assert 0.99 < loss["min"] <= loss["p01"] <= loss["mean"] < 0.9999999
    assert result["graphs"][INT8]["MatMulInteger"] == result["graphs"][FP32]["MatMul"] - 2 * 4
    assert result["contract"][FP32]["opset"] == 18
    assert set(result["odd_texts"][FP32]) == set(ODD_TEXTS)
    assert result["truncation"][FP32]["max_length"] == 64


def test_every_gate_of_a_good_bundle_can_fail(good, texts):
    """With limits that nothing can meet every measured gate fails; those that count faults have tests of their own."""
    limits = GatesConfig(
        onnx_fp32_to_torch_min=1.0, onnx_fp32_to_torch_max_difference=0.0, int8_to_fp32_mean=1.0, int8_to_fp32_p1=1.0,
        int8_to_fp32_language_mean=1.0,
    )  # fmt: skip
    result = examine_bundle(Subject(good, texts, "texts"), limits)
    found = {(gate["gate"], gate["artefact"]) for gate in failed_gates(result["gates"])}
    assert found >= {
        ("least cosine to torch", FP32), ("largest difference to torch", FP32), ("mean cosine to the fp32 student", INT8),
        ("1st percentile of cosine to fp32", INT8), ("mean cosine to fp32, worst language", INT8),
        ("odd texts, least cosine to torch", FP32),
    }  # fmt: skip


def test_an_altered_a_missing_and_a_new_file_are_caught(bundle, texts):
    weights = bytearray((bundle / layout.ONNX_FP32).read_bytes())
    weights[-100] ^= 1
    (bundle / layout.ONNX_FP32).write_bytes(weights)
    (bundle / "vocab.txt").unlink()
    (bundle / "notes.txt").write_text("mine")
    (bundle / ".gitattributes").write_text("of the hub")
    gates = {gate["gate"]: gate for gate in examined(bundle, texts, ["files"])["gates"]}
    differ = gates["files that differ from SHA256SUMS"]
    assert (differ["value"], differ["passed"]) == (2, False)
    assert "onnx/model.onnx" in differ["detail"] and "vocab.txt" in differ["detail"]
    assert gates["files that SHA256SUMS does not list"]["detail"] == "notes.txt"


def test_without_checksums_nothing_passes_as_intact(bundle, texts):
    (bundle / layout.CHECKSUMS).unlink()
    found = failed(bundle, texts, "files")
    assert found >= {("files that differ from SHA256SUMS", "bundle"), ("required files that are missing", "bundle")}


def test_pickles_are_caught(bundle, texts):
    torch.save({"weight": torch.zeros(2)}, bundle / "pytorch_model.bin")
    np.save(bundle / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(bundle / "plain.npy", np.zeros(3))
    write_checksums(bundle)
    gates = {gate["gate"]: gate for gate in examined(bundle, texts, ["files"])["gates"]}
    assert gates["files that may hold pickled objects"]["detail"] == "objects.npy; pytorch_model.bin"


@pytest.mark.parametrize("name", [layout.SPECIAL_TOKENS, "1_Pooling/config.json", "model.safetensors"])
def test_a_required_file_that_is_missing_is_caught(bundle, texts, name):
    (bundle / name).unlink()
    write_checksums(bundle)
    gates = {gate["gate"]: gate for gate in examined(bundle, texts, ["files"])["gates"]}
    assert gates["required files that are missing"]["detail"] == name
    assert [gate for gate in gates.values() if not gate["passed"]] == [gates["required files that are missing"]]


def plant_architectures(bundle):
    change_json(bundle / layout.MODEL_SETTINGS, architectures=[])


def plant_new_spelling(bundle):
    modules = json.loads((bundle / layout.MODULES).read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.Pooling"
    (bundle / layout.MODULES).write_text(json.dumps(modules))


def plant_short_pooling(bundle):
    settings = {"embedding_dimension": 32, "pooling_mode": "mean"}
    (bundle / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def plant_no_pad_token(bundle):
    settings = json.loads((bundle / layout.TOKENIZER_SETTINGS).read_text())
    del settings["pad_token"]
    (bundle / layout.TOKENIZER_SETTINGS).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("plant", "detail"),
    [
        (plant_architectures, "config.json: no architectures"),
        (plant_new_spelling, "sentence_transformers.sentence_transformer.modules.Pooling"),
        (plant_short_pooling, "Pooling: pooling_mode_cls_token"),
        (plant_no_pad_token, "tokenizer_config.json: no pad_token"),
    ],
)
def test_settings_that_a_consumer_cannot_read_are_caught(bundle, texts, plant, detail):
    plant(bundle)
    [gate] = examined(bundle, texts, ["layout"])["gates"]
    assert not gate["passed"] and detail in gate["detail"]


def foreign_graph(path):
    """A valid ONNX file that is not an encoder."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "foreign",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))


def test_a_foreign_graph_fails_and_the_other_checks_still_run(bundle, texts):
    foreign_graph(bundle / layout.ONNX_FP32)
    write_checksums(bundle)
    result = examined(bundle, texts)
    found = failed_gates(result["gates"])
    gates = {(gate["gate"], gate["artefact"]): gate for gate in found}
    contract = gates["breaches of what consumers rely on", FP32]["detail"]
    assert "inputs x instead of input_ids, attention_mask" in contract and "written by" in contract
    parity = gates["parity can be examined", FP32]
    assert parity["value"] is None and "InputError" in parity["detail"] and "sentence_embedding" in parity["detail"]
    assert {gate["artefact"] for gate in found if gate["gate"] != "loss can be examined"} == {FP32}
    assert result["invariance"][INT8]["batch_min"] > 0.99999 and result["parity"][INT8]["min"] > 0.9


def test_what_is_no_onnx_at_all_fails(bundle, texts):
    (bundle / layout.ONNX_FP32).write_bytes(b"not a graph")
    write_checksums(bundle)
    assert ("contract can be examined", FP32) in failed(bundle, texts, "contract")


def swap_outputs(model):
    first, second = (onnx.ValueInfoProto() for _ in range(2))
    first.CopyFrom(model.graph.output[0])
    second.CopyFrom(model.graph.output[1])
    del model.graph.output[:]
    model.graph.output.extend([second, first])


def fix_the_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def use_another_opset(version):
    def change(model):
        model.opset_import[0].version = version

    return change


def add_function(model):
    model.functions.append(
        helper.make_function("own", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])],
                             [helper.make_opsetid("", 18)])
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        (swap_outputs, "outputs sentence_embedding, last_hidden_state instead of last_hidden_state, sentence_embedding"),
        (fix_the_batch, "input_ids with a fixed axis"),
        (use_another_opset(24), "operator set 24, outside 17 to 23"),
        (use_another_opset(19), "operator set 19, where the record says 18"),
        (lambda model: setattr(model, "ir_version", 11), "IR version 11, newer than 10"),
        (lambda model: setattr(model, "producer_name", "pytorch"), "written by 'pytorch', not by distillabse"),
        (add_function, "a function of its own, Twice"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_caught(bundle, texts, change, breach):
    change_graph(bundle / layout.ONNX_FP32, change)
    gates = examined(bundle, texts, ["contract"])["gates"]
    [gate] = failed_gates(gates)
    assert gate["artefact"] == FP32 and gate["detail"] == breach


def test_weights_outside_a_small_file_are_caught(bundle, texts):
    path = bundle / layout.ONNX_FP32
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert failed(bundle, texts, "contract") == {("weights outside a file under 2 GB", FP32)}


def test_a_graph_that_nobody_promised_is_caught(bundle, texts):
    record = json.loads((bundle / layout.PROVENANCE).read_text())
    del record["int8"]
    (bundle / layout.PROVENANCE).write_text(json.dumps(record))
    write_checksums(bundle)
    result = examined(bundle, texts, ["files"])
    [gate] = failed_gates(result["gates"])
    assert gate["gate"] == "graphs that the record does not name" and gate["detail"] == INT8_FILE


def test_a_promised_graph_that_is_missing_is_caught(bundle, texts):
    (bundle / INT8_FILE).unlink()
    write_checksums(bundle)
    found = failed(bundle, texts)
    assert {("promised graphs that are missing", "bundle"), ("graphs can be examined", INT8)} <= found
    assert {artefact for _, artefact in found} == {"bundle", INT8}


def test_a_bundle_without_graphs_fails(bundle, texts):
    shutil.rmtree(bundle / "onnx")
    change_json(bundle / layout.PROVENANCE, int8=None)
    write_checksums(bundle)
    found = failed(bundle, texts)
    assert {("promised graphs that are missing", "bundle"), ("parity can be examined", FP32)} <= found


def test_a_tampered_record_is_caught(bundle, texts):
    change_json(bundle / layout.PROVENANCE, int8={"matmuls": 23, "embeddings": 1})
    write_checksums(bundle)
    gates = examined(bundle, texts, ["graphs"])["gates"]
    [gate] = failed_gates(gates)
    assert (gate["gate"], gate["value"], gate["limit"]) == ("integer products in the graph", 24, 23)
    change_json(bundle / layout.PROVENANCE, int8={"matmuls": 24, "kind": "made up"})
    [gate] = failed_gates(examined(bundle, texts, ["graphs"])["gates"])
    assert gate["gate"] == "graphs can be examined" and "made up" in gate["detail"]


def test_plain_dynamic_int8_is_caught(bundle, texts):
    """Its vectors depend on the batch: were this to pass, the gates on invariance would prove nothing."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(bundle / layout.ONNX_FP32, bundle / INT8_FILE, per_channel=True, op_types_to_quantize=["MatMul"])
    found = failed(bundle, texts * 4, "invariance", "contract")
    assert ("invariance, batch_min", INT8) in found
    assert {artefact for _, artefact in found} == {INT8}


def test_a_graph_that_is_not_the_students_is_caught(good, bundle, texts, tmp_path):
    other = load_encoder(str(tiny_encoder(tmp_path / "other", layers=4, seed=5)))
    subject = Subject(bundle, texts, "texts")
    subject.student = other
    gates = examine_bundle(subject, LIMITS)["gates"]
    found = {(gate["gate"], gate["artefact"]) for gate in failed_gates(gates)}
    assert {("least cosine to torch", FP32), ("largest difference to torch", FP32)} <= found


def test_wrong_pooling_settings_are_caught(bundle, texts):
    change_json(bundle / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    write_checksums(bundle)
    found = failed(bundle, texts)
    assert ("least cosine to torch", FP32) in found
    change_json(bundle / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True, pooling_mode_cls_token=True)
    assert ("dimension, as the modules say", FP32) in failed(bundle, texts, "vectors")


def test_weights_that_are_no_numbers_are_caught_everywhere(bundle, texts):
    def change(model):
        for tensor in model.graph.initializer:
            if "LayerNorm.weight" in tensor.name:
                nan = np.full_like(numpy_helper.to_array(tensor), np.nan)
                tensor.CopyFrom(numpy_helper.from_array(nan, tensor.name))

    for file in (layout.ONNX_FP32, INT8_FILE):
        change_graph(bundle / file, change)
    weights = load_file(bundle / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, bundle / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    write_checksums(bundle)
    result = examined(bundle, texts)
    gates = {(gate["gate"], gate["artefact"]): gate for gate in result["gates"]}
    for artefact in (TORCH, FP32, INT8):
        for name in ("largest error of length", "spread of the vectors", "invariance, batch_min", "invariance, twins_min",
                     "cut text, least cosine to its tokens", "odd texts, largest error of length",
                     "odd texts, least cosine in a batch"):  # fmt: skip
            assert gates[name, artefact]["value"] is None and not gates[name, artefact]["passed"], (name, artefact)
    for name, artefact in (
        ("least cosine to torch", FP32), ("largest difference to torch", FP32), ("mean cosine to the fp32 student", INT8),
        ("mean cosine to fp32, worst language", INT8), ("least cosine over threads and runs", FP32),
    ):  # fmt: skip
        assert gates[name, artefact]["value"] is None and not gates[name, artefact]["passed"], name
    assert "NaN" not in json.dumps(result)


def test_a_constant_model_is_caught(labse_folder, texts, tmp_path):
    encoder = load_encoder(str(labse_folder))
    encoder[2].linear.weight.data.zero_()
    encoder[2].linear.bias.data.fill_(0.5)
    write_bundle(encoder, tmp_path, ExportConfig(), {})
    assert failed(tmp_path, texts) == {("spread of the vectors", artefact) for artefact in (TORCH, FP32, INT8)}


def test_vectors_that_are_not_of_unit_length_are_caught(bundle, texts):
    def change(model):
        last = next(node for node in model.graph.node if "sentence_embedding" in node.output)
        last.output[0] = "unit"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "stretch"))
        model.graph.node.append(helper.make_node("Mul", ["unit", "stretch"], ["sentence_embedding"]))

    change_graph(bundle / layout.ONNX_FP32, change)
    found = failed(bundle, texts, "vectors", "odd_texts")
    assert found == {("largest error of length", FP32), ("odd texts, largest error of length", FP32)}


def test_a_tokenizer_with_a_wrong_truncation_is_caught(bundle, texts):
    tokenizer = json.loads((bundle / layout.TOKENIZER).read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 10, "strategy": "LongestFirst", "stride": 0}
    (bundle / layout.TOKENIZER).write_text(json.dumps(tokenizer))
    assert failed(bundle, texts, "limits") == {("lengths of its own in tokenizer.json", "bundle")}


def test_files_that_disagree_on_the_greatest_length_are_caught(bundle, texts):
    change_json(bundle / layout.TOKENIZER_SETTINGS, model_max_length=20)
    assert failed(bundle, texts, "limits") == {("model_max_length, as max_seq_length", "bundle")}
    change_json(bundle / layout.TOKENIZER_SETTINGS, model_max_length=65)
    change_json(bundle / layout.TRANSFORMER_SETTINGS, max_seq_length=65)
    found = failed(bundle, texts, "limits", "truncation")
    assert ("max_seq_length, within the positions", "bundle") in found
    assert ("truncation can be examined", FP32) in found


def test_a_reader_that_cuts_at_another_place_is_caught(bundle, texts):
    subject = Subject(bundle, texts, "texts")
    subject.student.max_seq_length = 20
    subject.encoder(FP32)._tokenizer.enable_truncation(63)
    findings = Findings()
    run_checks([check for check in bundle_checks(subject, LIMITS) if check.section == "truncation"], findings)
    found = {(gate.gate, gate.artefact): gate.value for gate in findings.gates if not gate.passed}
    assert found["long texts not cut to their first tokens", TORCH] == 4
    assert found["tokens of a text of max_seq_length", TORCH] == 20
    assert found["tokens of a text of max_seq_length", FP32] == 63
    assert found["texts of max_seq_length that are cut", FP32] == 1
    assert found["cut text, least cosine to its tokens", TORCH] < 0.99999
    assert not {artefact for _, artefact in found} - {TORCH, FP32}


def test_a_reader_with_other_tokens_is_caught(bundle, texts):
    change_json(bundle / layout.TRANSFORMER_SETTINGS, do_lower_case=True)
    subject = Subject(bundle, texts, "texts")
    subject.student[0].do_lower_case = False
    findings = Findings()
    run_checks([check for check in bundle_checks(subject, LIMITS) if check.section == "odd_texts"], findings)
    gates = {(gate.gate, gate.artefact): gate for gate in findings.gates if not gate.passed}
    assert "mixed scripts" in gates["odd texts, other tokens than in torch", FP32].detail
    assert gates["odd texts, least cosine to torch", FP32].value < 0.99999


def test_a_reader_that_refuses_an_odd_text_is_caught_and_the_others_are_examined(bundle, texts, monkeypatch):
    subject = Subject(bundle, texts, "texts")
    encode = subject.encoder(INT8).encode

    def picky(given, *arguments):
        if any("\x00" in text for text in given):
            raise ValueError("NUL in a text")
        return encode(given, *arguments)

    monkeypatch.setattr(subject.encoder(INT8), "encode", picky)
    findings = Findings()
    run_checks([check for check in bundle_checks(subject, LIMITS) if check.section == "odd_texts"], findings)
    [gate] = [gate for gate in findings.gates if not gate.passed and "wrong types" not in gate.gate]
    assert gate.artefact == INT8 and gate.detail == "NUL (ValueError: NUL in a text)"
    assert findings.sections["odd_texts"][INT8]["emoji"]["batch"] > 0.99999


def test_odd_texts_are_what_they_are_called():
    assert len(ODD_TEXTS["10,000 characters"]) == 10_000 and " " not in ODD_TEXTS["10,000 characters without a space"]
    assert len(ODD_TEXTS["10,000 characters without a space"]) == 10_000
    assert "\x00" in ODD_TEXTS["NUL"] and "\u200d" in ODD_TEXTS["emoji"]
    assert ODD_TEXTS["accents composed"] != ODD_TEXTS["accents decomposed"]
    with pytest.raises(UnicodeEncodeError):
        ODD_TEXTS["lone surrogates"].encode()


def test_a_language_that_int8_breaks_is_named(bundle, texts):
    subject = Subject(bundle, [*texts, Sentence("my blue house", "fr")], "texts")
    subject._vectors[INT8] = subject.encode(FP32, subject.plain_texts)
    subject._vectors[INT8][-1] *= -1
    outcome = examine_loss(subject, INT8, LIMITS)
    worst = next(gate for gate in outcome.gates if "worst language" in gate.gate)
    assert not worst.passed and worst.detail == "fr" and worst.value == pytest.approx(-1)
    assert outcome.figures["languages"]["en"]["mean"] == pytest.approx(1)


def test_the_order_and_a_twin_are_seen(bundle, texts, monkeypatch):
    subject = Subject(bundle, texts, "texts")
    run = subject.encode_batch

    def drifting(artefact, batch, width=1):
        vectors = run(artefact, batch, width).copy()
        vectors[len(vectors) // 2 :] += 0.05 * np.arange(vectors.shape[1]) if len(vectors) > 1 else 0
        return vectors

    monkeypatch.setattr(subject, "encode_batch", drifting)
    found = {gate.gate: gate.passed for gate in examine_invariance(subject, FP32, LIMITS).gates}
    assert found == {
        "invariance, batch_min": False, "invariance, padding_min": True, "invariance, order_min": True,
        "invariance, twins_min": False,
    }  # fmt: skip


def test_figures_that_are_no_numbers_never_pass():
    nan = float("nan")
    gates = [at_least("a", FP32, nan, 0.5), at_most("b", FP32, nan, 0.5), exactly("c", FP32, nan, 0)]
    assert [gate.passed for gate in gates] == [False] * 3 and [gate.value for gate in gates] == [None] * 3
    assert not at_least("d", FP32, float("inf"), 0.5).passed
    assert not none_of("e", FP32, ["x"]).passed and none_of("e", FP32, []).passed


def test_no_gate_is_no_pass():
    with pytest.raises(GateFailed, match="gates that were examined"):
        require_passed([], "nowhere")
    assert Findings().result()["passed"] is False


def test_a_check_that_judges_nothing_or_breaks_off_fails_and_the_next_one_runs():
    def broken():
        raise KeyError("no such thing")

    findings = Findings()
    checks = [
        Check("one", FP32, broken),
        Check("two", FP32, lambda: Outcome([], {"a": 1})),
        Check("three", FP32, lambda: Outcome([exactly("it", FP32, 1, 1)], {"a": 1})),
    ]
    run_checks(checks, findings)
    assert [gate.passed for gate in findings.gates] == [False, False, True]
    assert "KeyError" in findings.gates[0].detail and "judged nothing" in findings.gates[1].detail
    assert findings.sections == {"three": {FP32: {"a": 1}}}


def test_too_few_texts_are_an_error(bundle, tmp_path):
    with pytest.raises(InputError, match="fewer than two"):
        Subject(bundle, [], "texts")
    with pytest.raises(InputError, match="fewer than two"):
        Subject(bundle, [Sentence("one", "en")] * 3, "texts")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match="no usable row"):
        texts_of_file(tmp_path / "empty.txt")


def test_built_in_texts_are_of_eight_languages():
    texts = built_in_texts(10)
    languages = [text.language for text in texts]
    assert {language: languages.count(language) for language in languages} == dict.fromkeys(
        ["en", "de", "fr", "es", "it", "pt", "nl", "sv"], 10
    )
    assert len({text.language for text in texts[:20]}) > 4


def test_texts_of_a_file_have_the_languages_that_it_names(tmp_path):
    (tmp_path / "a[1].txt").write_text("the dog\nmy old house\n")
    assert texts_of_file(tmp_path / "a[1].txt") == [Sentence("the dog", "und"), Sentence("my old house", "und")]
    (tmp_path / "a.tsv").write_text("language\ttext\nen\tthe dog\nde\tder Hund\n")
    assert texts_of_file(tmp_path / "a.tsv") == [Sentence("the dog", "en"), Sentence("der Hund", "de")]
    (tmp_path / "b.tsv").write_text("text\nthe dog\n")
    with pytest.raises(InputError, match="language"):
        texts_of_file(tmp_path / "b.tsv")


def test_gates_of_a_bundle_take_overrides():
    assert load_gates(["gates.int8_to_fp32_p1=0.5"]).int8_to_fp32_p1 == 0.5
    assert load_gates([]) == GatesConfig()
    with pytest.raises(ConfigurationError, match=r"gates\.int8_p1: no such key"):
        load_gates(["gates.int8_p1=0.5"])
    with pytest.raises(ConfigurationError, match=r"'seed=1'.*gates\.key=value"):
        load_gates(["seed=1"])
    with pytest.raises(ConfigurationError, match=r"gates\.int8_to_fp32_p1"):
        load_gates(["gates.int8_to_fp32_p1=high"])


def judged(folder, encoder, texts, limits):
    teacher = Teacher(encoder, {"texts": texts}, EvaluationConfig(bootstrap_samples=100), 0)
    return examine_bundle(Subject(folder, texts, "texts"), limits, teacher)


def test_with_a_teacher_every_artefact_is_measured_against_it(good, sentences):
    texts = [Sentence(text, "en") for text in [*sentences, *(f"{text} Yes." for text in sentences)]]
    student = load_encoder(str(good))
    result = judged(good, student, texts, LIMITS.model_copy(update={"teacher_skill": 0.9}))
    assert result["passed"] and set(result["fidelity"]) == {TORCH, FP32, INT8}
    assert result["fidelity"][TORCH]["texts"]["skill"] == pytest.approx(1, abs=1e-6)
    assert result["fidelity"][INT8]["texts"]["slices"]["language"]["en"]["n"] == 16
    cosines = [entry["cosine"] for entry in result["worst"]]
    assert cosines == sorted(cosines) and len(cosines) == 16


def test_a_teacher_that_was_not_kept_is_seen(good, sentences, tmp_path):
    other = load_encoder(str(tiny_encoder(tmp_path / "other", layers=4, seed=5)))
    texts = [Sentence(text, "en") for text in sentences]
    limits = LIMITS.model_copy(update={"teacher_skill": 0.9, "teacher_cosine_mean": 0.9})
    failures = {(gate["gate"], gate["artefact"]) for gate in failed_gates(judged(good, other, texts, limits)["gates"])}
    artefacts = (TORCH, FP32, INT8)
    assert failures == {(gate, name) for gate in ("mean cosine to the teacher", "skill") for name in artefacts}


def test_verify_bundle_needs_no_job_and_says_on_what_it_looked(good, encoder_folder):
    result = verify_bundle(good, built_in_texts(4), LIMITS, str(encoder_folder))
    assert result["texts"] == {"n": 32, "languages": ["de", "en", "es", "fr", "it", "nl", "pt", "sv"]}
    assert result["limits"]["int8_to_fp32_mean"] == 0.99 and result["environment"]["versions"]["onnx"]
    assert set(result["fidelity"][INT8]) == {"texts"}


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["distillabse", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0


def test_the_command_judges_a_bundle(bundle, monkeypatch, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("the dog\nmy old house\na blue tree\n")
    options = ["--texts", tmp_path / "texts.txt", "--json", tmp_path / "out.json"]
    gates = ["gates.int8_to_fp32_mean=0.98", "gates.int8_to_fp32_language_mean=0.98"]
    assert call(monkeypatch, "verify", bundle, *gates, *options) == 0
    assert "gates passed" in capsys.readouterr().out
    assert read_json(tmp_path / "out.json")["passed"] is True
    (bundle / "vocab.txt").write_text("altered")
    assert call(monkeypatch, "verify", bundle, *gates, "--texts", tmp_path / "texts.txt", "--json", "-") == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["passed"] is False and [gate["detail"] for gate in failed_gates(result["gates"])] == ["vocab.txt"]
    assert "files that differ from SHA256SUMS of bundle: 1, needs exactly 0 (vocab.txt)" in printed.err.replace("\n", "")


def test_the_command_refuses_what_is_no_bundle(bundle, monkeypatch, capsys):
    assert call(monkeypatch, "verify", bundle.parent) == 2
    assert "is a folder without distillabse.json, so it is no bundle. Did you mean" in capsys.readouterr().err
    assert call(monkeypatch, "verify", "quickstart", "--teacher", "x") == 2
    assert "are for a bundle" in capsys.readouterr().err
    (bundle / layout.PROVENANCE).write_text("[]")
    assert call(monkeypatch, "verify", bundle) == 2
    assert "not the record of a bundle" in capsys.readouterr().err


def test_a_graph_runs_whatever_the_gates_say(good):
    """What the contract names is what ONNX Runtime sees."""
    for file in (layout.ONNX_FP32, INT8_FILE):
        graph = session(good / file)
        assert [node.name for node in graph.get_outputs()] == ["last_hidden_state", "sentence_embedding"]


def test_verification_is_not_imported_with_the_encoder():
    code = "import sys, distillabse.encoder; sys.exit(any(name.startswith('distillabse.verif') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
