"""INT8 layers: what they compute, how they are found, and that graphs compute the same."""

import copy
import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from tiny import JOB_WORDS

from distillabse import layout
from distillabse.config import ExportConfig, QuantizationConfig
from distillabse.encoder import Encoder, session
from distillabse.errors import InputError
from distillabse.evaluation.fidelity import row_cosines
from distillabse.export.bundle import int8_file, write_bundle
from distillabse.export.flattening import flatten_tokens
from distillabse.export.graph import count_after_optimisation, export_graph, linear_of
from distillabse.models.teacher import load_encoder, transformer_of
from distillabse.quantization import (
    QuantizedLinear,
    calibrate,
    load_quantized_linears,
    rounded,
    save_quantized_linears,
)
from distillabse.quantization.calibration import smoothing_vector, static_range
from distillabse.quantization.linears import token_scales
from distillabse.quantization.rounding import round_to_nearest, round_with_inputs, weight_scales
from distillabse.quantization.statistics import input_statistics
from distillabse.verification.kinds import graphs_of

KINDS = ("per_token", "static", "block_weights")


def texts(n, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(JOB_WORDS, size=random.integers(1, 12))) for _ in range(n)]


@pytest.fixture(scope="module", params=["encoder_folder", "labse_folder"])
def encoder(request):
    return load_encoder(str(request.getfixturevalue(request.param)))


class Simulated(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def simulated(encoder, linears):
    """The encoder in PyTorch with its layers in INT8."""
    changed = copy.deepcopy(encoder)
    for name, linear in linears.items():
        transformer_of(changed).set_submodule(name, Simulated(linear))
    return changed


# One layer


def test_a_layer_by_hand():
    # Greatest magnitude 12.7: a step of 0.1, so 12.7 is 255 and -5 is 78. 0.04 is less than half a step.
    linear = QuantizedLinear(torch.tensor([[10, -20, 30]], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([1.0]))
    assert linear(torch.tensor([[12.7, -5.0, 0.04]])).item() == pytest.approx(0.5 * (127 - 20 * -5.0) + 1, rel=1e-6)


def test_shift_and_smoothing_move_the_inputs():
    linear = QuantizedLinear(
        torch.tensor([[10, 10]], dtype=torch.int8), torch.ones(1), torch.zeros(1),
        smoothing=torch.tensor([2.0, 4.0]), shift=torch.tensor([1.0, -1.0]),
    )  # fmt: skip
    # (255 - 1) / 2 = 127 and (-5 + 1) / 4 = -1: both on the grid of steps of 1.
    assert linear(torch.tensor([[255.0, -5.0]])).item() == pytest.approx(10 * 127 - 10)


def test_a_lopsided_zero_point_leaves_more_steps_to_what_is_above():
    assert token_scales(torch.tensor([[23.9, -0.5]]), 16).item() == pytest.approx(0.1)
    assert token_scales(torch.tensor([[0.1, -0.5]]), 16, least_scale=0.05).item() == pytest.approx(0.05)
    assert token_scales(torch.tensor([[1.0, -12.7]]), 128).item() == pytest.approx(0.1)


def test_rounding_with_inputs_makes_up_for_what_it_changes():
    torch.manual_seed(0)
    weight, mixing = torch.randn(8, 32), torch.randn(32, 32)
    inputs = torch.randn(500, 32) @ mixing
    scale, moments = weight_scales(weight, 7), inputs.T @ inputs
    errors = []
    for rounded_weight in (round_to_nearest(weight, scale, 7), round_with_inputs(weight, scale, moments, 7)):
        assert rounded_weight.abs().max() <= 7
        errors.append(float((inputs @ (rounded_weight * scale[:, None] - weight).T).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_rounding_with_inputs_is_rounding_to_the_nearest_where_inputs_have_nothing_in_common():
    weight = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    scale = weight_scales(weight)
    moments = torch.diag(torch.rand(300) + 0.5)
    assert torch.equal(round_with_inputs(weight, scale, moments), round_to_nearest(weight, scale))


def test_smoothing_by_hand():
    vector = smoothing_vector(torch.tensor([16.0, 1.0]), torch.tensor([4.0, 0.25]), 0.5)
    assert vector.tolist() == pytest.approx([16**0.5 / 4**0.5, 1 / 0.25**0.5])
    assert smoothing_vector(torch.tensor([16.0]), torch.tensor([4.0]), 1.0).item() == pytest.approx(16)


def test_a_static_range_cuts_off_what_is_rare():
    inputs = torch.cat([torch.linspace(-1, 1, 200_000), torch.tensor([3.0])])[:, None]
    scale, zero_point = static_range(inputs)
    assert 1 <= scale * (255 - zero_point) < 2.7 and scale * zero_point == pytest.approx(1, abs=0.1)


# An encoder


def test_layers_that_share_inputs_are_a_group_and_padding_does_not_count(encoder):
    chosen = ["the dog", "a cat in the house of the man"]
    groups = input_statistics(encoder, chosen)
    names = [[name.split(".", 3)[-1] for name in group.names] for group in groups]
    assert names[0] == ["attention.self.query", "attention.self.key", "attention.self.value"]
    assert [group.normalised for group in groups[:4]] == [True, False, True, False]
    lengths = [len(encoder.tokenizer(text)["input_ids"]) for text in chosen]
    assert lengths[0] != lengths[1] and {group.tokens for group in groups} == {sum(lengths)}
    rows = torch.cat([states_of(encoder, text) for text in chosen])
    torch.testing.assert_close(groups[0].mean, rows.mean(dim=0), rtol=1e-4, atol=1e-5)
    shift, smoothing = rows.mean(dim=0), rows.abs().amax(dim=0)
    moved = (rows - shift) / smoothing
    torch.testing.assert_close(groups[0].moments_of(shift, smoothing), moved.T @ moved, rtol=1e-3, atol=1e-3)


def states_of(encoder, text):
    features = encoder.preprocess([text])
    with torch.no_grad():
        return transformer_of(encoder).embeddings(features["input_ids"])[0]


def test_every_linear_layer_gets_its_numbers(encoder):
    linears = calibrate(encoder, texts(40))
    layers = transformer_of(encoder).config.num_hidden_layers
    kinds = Counter(name.split(".", 3)[-1] for name in linears)
    assert kinds["output.dense"] == kinds["attention.output.dense"] == kinds["attention.self.value"] == layers
    for name, linear in linears.items():
        assert linear.weight.dtype == torch.int8 and linear.weight.abs().max() <= 127, name
        moved = name.endswith(("query", "key", "value", "intermediate.dense"))
        assert (linear.smoothing is not None) is (linear.shift is not None) is moved, name
        assert linear.input_scale is None
    assert calibrate(encoder, texts(40), largest=63)["encoder.layer.0.output.dense"].weight.abs().max() <= 63
    assert all(linear.input_scale > 0 for linear in calibrate(encoder, texts(40), static=True).values())


def test_calibration_does_not_touch_the_encoder_and_needs_texts(encoder):
    before = copy.deepcopy(encoder.state_dict())
    calibrate(encoder, texts(10))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with pytest.raises(InputError, match="no texts to calibrate"):
        calibrate(encoder, [])


def test_calibration_keeps_more_than_rounding(encoder):
    held_out = texts(60, seed=9)
    wanted = encoder.encode(held_out)
    least = [
        row_cosines(simulated(encoder, linears).encode(held_out), wanted).mean()
        for linears in (rounded(encoder), calibrate(encoder, texts(200)))
    ]
    assert 0.99 < least[0] < least[1]


def test_layers_are_kept_in_a_file(encoder, tmp_path):
    linears = calibrate(encoder, texts(20), static=True)
    save_quantized_linears(linears, tmp_path / "linears.safetensors")
    found = load_quantized_linears(tmp_path / "linears.safetensors")
    assert found.keys() == linears.keys()
    for name, linear in linears.items():
        for key, value in vars(linear).items():
            same = torch.equal(value, getattr(found[name], key)) if torch.is_tensor(value) else None
            assert same or value == pytest.approx(getattr(found[name], key)) or value is None, (name, key)


# The graphs


@pytest.mark.parametrize("static", [False, True])
def test_a_graph_computes_what_its_layers_say(encoder, static, tmp_path):
    from distillabse.export.quantize import quantize

    linears = calibrate(encoder, texts(60), static=static)
    export_graph(encoder, tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", linears, embeddings=False)
    features = encoder.preprocess(texts(12, seed=3))
    inputs = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
    states, vectors = session(tmp_path / "int8.onnx").run(None, inputs)
    expected = simulated(encoder, linears)(features)
    assert row_cosines(vectors, expected["sentence_embedding"].detach().numpy()).min() > 0.99999
    mask = inputs["attention_mask"].astype(bool)
    wanted = expected["token_embeddings"].detach().numpy()
    # A value that lies in the middle of two integers may fall to either side.
    assert np.median(np.abs(states - wanted)[mask]) < 1e-4
    assert states.shape == wanted.shape


def test_flattening_changes_nothing(encoder, tmp_path):
    export_graph(encoder, tmp_path / "whole.onnx")
    model = onnx.load(str(tmp_path / "whole.onnx"))
    flatten_tokens(model)
    onnx.checker.check_model(model)
    onnx.save(model, str(tmp_path / "rows.onnx"))
    features = encoder.preprocess(texts(7))
    inputs = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
    for whole, rows in zip(
        *(session(tmp_path / name).run(None, inputs) for name in ("whole.onnx", "rows.onnx")), strict=True
    ):
        np.testing.assert_allclose(rows, whole, atol=2e-6)


def test_matrices_have_the_names_of_their_layers(encoder, tmp_path):
    export_graph(encoder, tmp_path / "graph.onnx")
    nodes = onnx.load(str(tmp_path / "graph.onnx")).graph.node
    layers = transformer_of(encoder).config.num_hidden_layers
    assert {name for node in nodes if (name := linear_of(node))} >= {
        f"encoder.layer.{layer}.{part}"
        for layer in range(layers)
        for part in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    }


@pytest.fixture(scope="module", params=KINDS)
def bundle(request, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    folder.mkdir()
    config = ExportConfig(quantization=QuantizationConfig(kind=request.param))
    write_bundle(encoder, folder, config, {}, texts(100))
    return request.param, folder, int8_file(config.quantization)


def test_every_kind_keeps_the_vector_and_does_not_depend_on_the_batch(bundle):
    kind, folder, file = bundle
    held_out = texts(64, seed=5)
    fp32, int8 = Encoder(folder, file=layout.ONNX_FP32), Encoder(folder, file=file)
    cosines = row_cosines(fp32.encode(held_out), int8.encode(held_out))
    # With one scale for all, a word that calibration has not seen may be cut off.
    assert cosines.mean() > 0.995 and cosines.min() > (0.95 if kind == "static" else 0.99)
    alone = np.concatenate([int8.run(int8.tokenize([text])) for text in held_out])
    padded = np.concatenate([int8.run(int8.tokenize([text], pad_to=int8.max_length)) for text in held_out])
    for other in (int8.run(int8.tokenize(held_out)), padded):
        assert row_cosines(alone, other).min() > 0.99999


def test_every_product_runs_in_integers(bundle, encoder):
    kind, folder, file = bundle
    operators = count_after_optimisation(folder / file)
    layers = transformer_of(encoder).config.num_hidden_layers
    assert operators["MatMulNBits" if kind == "block_weights" else "MatMulIntegerToFloat"] == 6 * layers
    assert operators["DequantizeLinear"] == operators["DynamicQuantizeLinear"] == 0
    if kind != "block_weights":
        assert operators["BiasGelu"] == 0  # slower than GELU and Add
        assert operators["QuantizeLinear"] == 4 * layers  # query, key and value share one
        assert operators["Gelu"] == layers and operators["LayerNormalization"] == 2 * layers + 1


def test_nothing_in_a_graph_is_computed_for_nobody(bundle):
    _, folder, file = bundle
    graph = onnx.load(str(folder / file)).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert [node.name for node in graph.node if not read.intersection(node.output)] == []
    assert {tensor.name for tensor in graph.initializer} <= read


def test_a_static_graph_is_written_in_operators_that_everybody_reads(bundle):
    kind, folder, file = bundle
    domains = {node.domain for node in onnx.load(str(folder / file)).graph.node}
    assert domains == ({""} if kind == "static" else {"", "com.microsoft"})


def test_a_static_graph_needs_texts(encoder, tmp_path):
    with pytest.raises(InputError, match="no texts to calibrate"):
        write_bundle(encoder, tmp_path, ExportConfig(quantization=QuantizationConfig(kind="static")), {})


def test_half_precision_is_for_gpus_and_keeps_the_vector(encoder, tmp_path):
    from distillabse.encoder import _default_graph

    write_bundle(encoder, tmp_path, ExportConfig(float16=True), {}, texts(30))
    held_out = texts(32, seed=4)
    half = Encoder(tmp_path, file=layout.ONNX_FLOAT16)
    cosines = row_cosines(Encoder(tmp_path, file=layout.ONNX_FP32).encode(held_out), half.encode(held_out))
    assert (
        0.9999 < cosines.min()
        and (tmp_path / layout.ONNX_FLOAT16).stat().st_size < 0.75 * (tmp_path / layout.ONNX_FP32).stat().st_size
    )
    assert _default_graph(tmp_path, "cuda", "onnxruntime") == layout.ONNX_FLOAT16
    assert _default_graph(tmp_path, "cpu", "onnxruntime") == layout.ONNX_INT8["avx512_vnni"]
    assert _default_graph(tmp_path, "cpu", "openvino") == layout.ONNX_FP32
    subject = graphs_of(tmp_path, json.loads((tmp_path / layout.PROVENANCE).read_text()))
    assert [graph.kind for graph in subject] == ["fp32", "per_token", "float16"]


def test_openvino_takes_a_static_graph(bundle):
    from distillabse.encoder import _default_graph

    kind, folder, file = bundle
    assert (_default_graph(folder, "cpu", "openvino") == file) is (kind == "static")


def test_the_planner_measures_the_graph_that_a_job_would_export(encoder, bundle, tmp_path):
    from distillabse.evaluation.plan_build import write_graph

    kind, folder, file = bundle
    graph = write_graph(encoder, tmp_path, ExportConfig(quantization=QuantizationConfig(kind=kind)))
    wanted, found = count_after_optimisation(folder / file), count_after_optimisation(graph)
    products = ("MatMulIntegerToFloat", "MatMulNBits", "QuantizeLinear", "LayerNormalization", "Gelu")
    assert {name: found[name] for name in products} == {name: wanted[name] for name in products}
