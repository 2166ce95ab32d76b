"""The gates: a good bundle passes them all, and faults of files and graphs are caught by the gates made for them."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import exported
from onnx import helper
from verifying import LIMITS, change_graph, change_json, examined, failed

from distillabse import layout
from distillabse.checksums import write_checksums
from distillabse.config import GatesConfig
from distillabse.verification.examine import examine_bundle
from distillabse.verification.gates import failed_gates
from distillabse.verification.inputs import ODD_TEXTS
from distillabse.verification.kinds import FP32, INT8, TORCH
from distillabse.verification.subject import Subject

INT8_FILE = layout.ONNX_INT8["avx512_vnni"]


def test_a_good_bundle_passes_every_gate(good, texts):
    result = examine_bundle(Subject(good, texts, "texts"), LIMITS)
    assert failed_gates(result["gates"]) == [] and result["passed"] is True
    assert set(result["invariance"]) == set(result["odd_texts"]) == set(result["truncation"]) == {TORCH, FP32, INT8}
    assert result["parity"][FP32]["min"] > 0.99999 and result["parity"][FP32]["max_difference"] < 2e-5
    loss = result["loss"][INT8]
    assert set(loss["languages"]) == {"en", "de"} and loss["languages"]["de"]["n"] == 8
    assert 0.99 < loss["min"] <= loss["p01"] <= loss["mean"] < 0.9999999
    assert result["graphs"][INT8]["MatMulInteger"] == 6 * 4
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
        ("least cosine to torch", FP32), ("largest difference to torch", FP32),
        ("mean cosine to the fp32 student", INT8),
        ("1st percentile of cosine to fp32", INT8), ("mean cosine to fp32, worst language", INT8),
        ("odd texts, least cosine to torch", FP32),
    }  # fmt: skip


def test_a_pooled_graph_of_other_vectors_is_caught(labse_folder, texts, tmp_path_factory):
    folder = exported(labse_folder, tmp_path_factory)
    assert set(examined(folder, texts, "pooled")["pooled"]) == {FP32, INT8}
    shutil.copy(folder / layout.pooled_graph(INT8_FILE), folder / layout.pooled_graph(layout.ONNX_FP32))
    gates = examined(folder, texts, "pooled")["gates"]
    assert [(gate["artefact"], gate["passed"]) for gate in gates] == [(FP32, False), (INT8, True)]


def test_an_altered_a_missing_and_a_new_file_are_caught(bundle, texts):
    weights = bytearray((bundle / layout.ONNX_FP32).read_bytes())
    weights[-100] ^= 1
    (bundle / layout.ONNX_FP32).write_bytes(weights)
    (bundle / "vocab.txt").unlink()
    (bundle / "notes.txt").write_text("mine")
    (bundle / ".gitattributes").write_text("of the hub")
    gates = {gate["gate"]: gate for gate in examined(bundle, texts, "files")["gates"]}
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
    gates = {gate["gate"]: gate for gate in examined(bundle, texts, "files")["gates"]}
    assert gates["files that may hold pickled objects"]["detail"] == "objects.npy; pytorch_model.bin"


@pytest.mark.parametrize("name", [layout.SPECIAL_TOKENS, "1_Pooling/config.json", "model.safetensors"])
def test_a_required_file_that_is_missing_is_caught(bundle, texts, name):
    (bundle / name).unlink()
    write_checksums(bundle)
    gates = {gate["gate"]: gate for gate in examined(bundle, texts, "files")["gates"]}
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
    [gate] = examined(bundle, texts, "layout")["gates"]
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
        (
            swap_outputs,
            "outputs sentence_embedding, last_hidden_state instead of last_hidden_state, sentence_embedding",
        ),
        (fix_the_batch, "input_ids with a fixed axis"),
        (use_another_opset(24), "operator set 24, outside 17 to 23; operator set 24, where the record says 18"),
        (use_another_opset(19), "operator set 19, where the record says 18"),
        (lambda model: setattr(model, "ir_version", 11), "IR version 11, newer than 10"),
        (lambda model: setattr(model, "producer_name", "pytorch"), "written by 'pytorch', not by distillabse"),
        (add_function, "a function of its own, Twice"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_caught(bundle, texts, change, breach):
    change_graph(bundle / layout.ONNX_FP32, change)
    gates = examined(bundle, texts, "contract")["gates"]
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
    result = examined(bundle, texts, "files")
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
    gates = examined(bundle, texts, "graphs")["gates"]
    [gate] = failed_gates(gates)
    assert (gate["gate"], gate["value"], gate["limit"]) == ("integer products in the graph", 24, 23)
    change_json(bundle / layout.PROVENANCE, int8={"matmuls": 24, "kind": "made up"})
    [gate] = failed_gates(examined(bundle, texts, "graphs")["gates"])
    assert gate["gate"] == "graphs can be examined" and "made up" in gate["detail"]
