"""The gates on vectors: whatever makes them wrong or dependent on anything but their text is caught."""

import json

import numpy as np
import pytest
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from tiny import tiny_encoder
from tokenizers import normalizers
from verifying import LIMITS, change_graph, change_json, examined, failed, findings_of

from distillabse import layout
from distillabse.checksums import write_checksums
from distillabse.config import ExportConfig
from distillabse.corpus.records import Sentence
from distillabse.export.bundle import write_bundle
from distillabse.models.teacher import load_encoder
from distillabse.verification.examine import examine_bundle
from distillabse.verification.gates import failed_gates
from distillabse.verification.inputs import ODD_TEXTS
from distillabse.verification.kinds import FP32, INT8, TORCH
from distillabse.verification.subject import Subject
from distillabse.verification.vectors import examine_invariance, examine_loss

INT8_FILE = layout.ONNX_INT8["avx512_vnni"]


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
        for name in ("largest error of length", "spread of the vectors", "invariance, batch_min",
                     "invariance, twins_min", "cut text, least cosine to its tokens",
                     "odd texts, largest error of length", "odd texts, least cosine in a batch"):  # fmt: skip
            assert gates[name, artefact]["value"] is None and not gates[name, artefact]["passed"], (name, artefact)
    for name, artefact in (
        ("least cosine to torch", FP32), ("largest difference to torch", FP32),
        ("mean cosine to the fp32 student", INT8),
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
    subject.encoder(FP32)._tokenizer._tokenizer.enable_truncation(63)
    findings = findings_of(subject, ["truncation"])
    found = {(gate.gate, gate.artefact): gate.value for gate in findings.gates if not gate.passed}
    assert found["long texts not cut to their first tokens", TORCH] == 4
    assert found["tokens of a text of max_seq_length", TORCH] == 20
    assert found["tokens of a text of max_seq_length", FP32] == 63
    assert found["texts of max_seq_length that are cut", FP32] == 1
    assert found["cut text, least cosine to its tokens", TORCH] < 0.99999
    assert not {artefact for _, artefact in found} - {TORCH, FP32}


def test_a_reader_with_other_tokens_is_caught(bundle, texts):
    subject = Subject(bundle, texts, "texts")
    subject.encoder(FP32)._tokenizer._tokenizer.normalizer = normalizers.Lowercase()
    findings = findings_of(subject, ["odd_texts"])
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
    findings = findings_of(subject, ["odd_texts"])
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
