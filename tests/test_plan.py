from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import yaml
from tiny import VOCABULARY, tiny_encoder

from distillabse import layout
from distillabse.config import BenchConfig, DenseStudentConfig, ExportConfig, PlanConfig, QuantizationConfig
from distillabse.encoder import Encoder, session
from distillabse.errors import ConfigurationError, DistillabseError, GateFailed
from distillabse.evaluation import plan as planner
from distillabse.evaluation import plan_build
from distillabse.evaluation.plan import forget_measurements, plan, plan_stage
from distillabse.evaluation.plan_build import build_candidates, fingerprint, parameter_counts, write_graph
from distillabse.evaluation.plan_space import SHAPE, candidates
from distillabse.evaluation.plan_views import plan_figure
from distillabse.export.graph import count_operators
from distillabse.layout import RunFolder
from distillabse.models.shape import TransformerShape
from distillabse.models.student import build_student
from distillabse.models.teacher import load_encoder
from distillabse.settings import validate
from distillabse.storage import read_json

TINY = TransformerShape(layers=4, hidden_size=32, intermediate_size=64, attention_heads=4, embedding_size=32)
JOB = {
    "name": "tiny", "corpus": {"sources": [{"kind": "phrasebook", "languages": ["en"]}]},
    "objectives": [{"kind": "cosine"}], "teacher": {"model": "teacher"},
}  # fmt: skip
INT8 = layout.ONNX_INT8["avx512_vnni"]


@pytest.fixture(scope="module")
def teacher(encoder_folder):
    return load_encoder(str(encoder_folder)).eval()


def test_a_fingerprint_is_of_what_decides_the_speed(teacher, encoder_folder, tmp_path):
    same = load_encoder(str(encoder_folder))
    assert fingerprint(load_encoder(str(tiny_encoder(tmp_path / "a", layers=4, seed=1)))) == fingerprint(teacher)
    same.encode(["texts are cut and padded by now"])
    assert fingerprint(same) == fingerprint(teacher)
    same.max_seq_length = 32
    assert fingerprint(same) != fingerprint(teacher)
    other_words = tuple(f"{word}x" if len(word) > 4 else word for word in VOCABULARY)
    other = tiny_encoder(tmp_path / "b", layers=4, vocabulary=other_words)
    assert fingerprint(load_encoder(str(other))) != fingerprint(teacher)


def test_parameters_of_the_encoder_are_those_outside_the_embeddings(teacher):
    # A layer: four 32 x 32 projections, two norms, and 32 x 64 there and back.
    layer = 4 * (32 * 32 + 32) + 2 * 2 * 32 + (32 * 64 + 64) + (64 * 32 + 32)
    embeddings = 32 * (len(VOCABULARY) + 64 + 2) + 2 * 32  # words, positions, types, norm
    assert parameter_counts(teacher) == {"parameters": 4 * layer + embeddings, "encoder_parameters": 4 * layer}


def test_a_candidate_has_the_graph_of_the_student_it_stands_for(tmp_path):
    teacher = load_encoder(str(tiny_encoder(tmp_path / "teacher", layers=4, max_length=128)))
    student = DenseStudentConfig(layers=1, hidden_size=16, embedding_size=8, initialisation="random")
    resolved = candidates(PlanConfig(layers=[1], hidden_size=[16], embedding_size=[8]), student, TINY)[0]
    (folder,) = build_candidates(teacher, resolved, tmp_path / "candidates", ExportConfig(), seed=0)
    encoder = build_student(teacher, student).eval()
    graph = write_graph(encoder, tmp_path / "whole", ExportConfig())

    def tensors(path):
        return {tensor.name: (tensor.dims, tensor.data_type) for tensor in onnx.load(path).graph.initializer}

    assert tensors(folder / INT8) == tensors(graph)
    assert count_operators(folder / INT8) == count_operators(graph)
    built = read_json(folder / "candidate.json")
    assert built == {"graph": INT8, **parameter_counts(encoder), "size_bytes": (folder / INT8).stat().st_size}
    layer = 4 * (16 * 16 + 16) + 2 * 2 * 16 + (16 * 32 + 32) + (32 * 16 + 16)
    assert built["encoder_parameters"] == layer  # without the 8 x 16 matrix between table and encoder


def test_a_table_is_filled_up_with_its_own_rows(tmp_path, monkeypatch):
    table = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "table")
    other = onnx.numpy_helper.from_array(np.zeros((3, 2), dtype=np.float32), "other")
    nodes = [
        onnx.helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        onnx.helper.make_node("Gather", ["other", "positions"], ["places"]),
    ]
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [None]) for name in ("input_ids", "positions")
    ]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("words", "places")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "lookup", inputs, outputs, [table, other]),
        ir_version=10,
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    for limit, files in ((10**6, ["model.onnx"]), (10, ["model.onnx", "model.onnx_data"])):
        graph = tmp_path / str(limit) / "model.onnx"
        graph.parent.mkdir()
        onnx.save(model, graph)
        monkeypatch.setattr("distillabse.export.graph.PROTOBUF_LIMIT", limit)
        plan_build._fill_table(graph, rows=500)
        assert sorted(path.name for path in graph.parent.iterdir()) == files
        found = session(graph).run(["words"], {"input_ids": np.array([1, 301, 499]), "positions": np.array([2])})[0]
        assert found.tolist() == [[2, 3], [2, 3], [2, 3]]  # 301 = 1, 499 = 1 modulo 3
        assert [list(tensor.dims) for tensor in onnx.load(graph).graph.initializer] == [[500, 2], [3, 2]]


class FakeMeasure:
    """In the place of `measure`: the teacher takes 10 ms a text, the first candidate 1 ms, the next 2 ms and so on."""

    def __init__(self):
        self.calls = []

    def __call__(self, engines, texts, config, seed, baselines):
        self.calls.append(engines)
        assert (engines[0].name, *baselines) == ("teacher-onnx", "teacher-onnx")
        for engine in engines:
            assert (engine.folder / engine.file).is_file()
        milliseconds = {engine.name: float(number or 10) for number, engine in enumerate(engines)}

        def figures(name, batch):
            found = 10 / milliseconds[name]
            times = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms"), batch * milliseconds[name])
            speedups = {"speedup_vs_teacher_onnx": found, "speedup_vs_teacher_onnx_ci95": [found - 1, found + 1]}
            return {"batch": batch, **times, "sentences_per_second": 1000 / milliseconds[name], **speedups}

        latency = {name: [figures(name, batch) for batch in config.batch_sizes] for name in milliseconds}
        return {
            "latency": latency, "tokens": {"mean": 4.0}, "threads": 1, "device": "cpu", "cores_used_by_others": 0.0
        }  # fmt: skip


def no_graph(encoder, folder, export):
    """In the place of `write_graph`: nothing is exported."""
    graph = folder / (INT8 if export.quantization.enabled else layout.ONNX_FP32)
    graph.parent.mkdir()
    graph.write_text(f"{encoder.get_embedding_dimension()}")
    return graph


@pytest.fixture
def fake(monkeypatch):
    fake = FakeMeasure()
    monkeypatch.setattr(planner, "measure", fake)
    monkeypatch.setattr(planner, "write_graph", no_graph)
    monkeypatch.setattr(plan_build, "write_graph", no_graph)
    monkeypatch.setattr(plan_build, "_fill_table", lambda graph, rows: None)
    return fake


SPACE = PlanConfig(layers=[1, 2], hidden_size=[16], rounds=5, batch_sizes=[1], speedup=0.01, batch=1)


def test_two_candidates_are_built_and_measured_beside_the_teacher(teacher, sentences, tmp_path, monkeypatch):
    job = DenseStudentConfig(head="dense")
    bench = BenchConfig(threads=1, seconds_per_round=0.01)
    first = plan(teacher, job, SPACE, sentences, tmp_path, bench=bench)

    folders = {read_json(path)["parameters"]: path.parent for path in tmp_path.glob("*/candidate.json")}
    layer = 4 * (16 * 16 + 16) + 2 * 2 * 16 + (16 * 32 + 32) + (32 * 16 + 16)
    for layers, candidate in zip((1, 2), first["candidates"], strict=True):
        assert candidate["student"] == {**dict(zip(SHAPE, (layers, 16, 32, 4, 16), strict=True)), "head": "dense"}
        assert candidate["encoder_parameters"] == layers * layer + 16 * 32  # the head gives the teacher's 32
        folder = folders[candidate["parameters"]]
        assert candidate["size_bytes"] == (folder / INT8).stat().st_size
        assert [path.name for path in (folder / "onnx").iterdir()] == [(folder / INT8).name]  # no fp32
        assert not list(folder.rglob("*.safetensors"))
        vectors = Encoder(folder).encode(sentences)
        assert vectors.shape == (len(sentences), 32)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(sentences)), abs=1e-5)
        assert 0 < candidate["latency"]["1"]["p50_ms"] <= candidate["latency"]["1"]["p99_ms"]
        low, high = candidate["speedup"]["1"]["ci95"]
        assert 0 < low <= candidate["speedup"]["1"]["value"] <= high
    assert first["teacher"]["parameters"] == parameter_counts(teacher)["parameters"]
    assert first["teacher"]["size_bytes"] > 4 * first["teacher"]["parameters"]
    assert first["teacher"]["latency"]["1"]["p50_ms"] > 0
    assert (first["threads"], first["device"], first["int8"]) == (1, "cpu", True)
    assert first["chosen"] == 1  # two layers are larger than one, and both reach a hundredth of the teacher's speed

    monkeypatch.setattr(planner, "measure", None)
    monkeypatch.setattr(planner, "write_graph", None)
    monkeypatch.setattr(plan_build, "write_graph", None)
    again = plan(teacher, job, SPACE, sentences, tmp_path, bench=bench)
    assert again["candidates"] == first["candidates"]
    assert again["teacher"] == first["teacher"]


def test_an_interrupted_plan_measures_only_what_is_missing(teacher, sentences, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(planner, "LARGEST_GROUP", 1)

    def dies_after_one(*arguments, **options):
        if fake.calls:
            raise DistillabseError("no memory left")
        return fake(*arguments, **options)

    monkeypatch.setattr(planner, "measure", dies_after_one)
    with pytest.raises(DistillabseError, match="no memory left"):
        plan(teacher, DenseStudentConfig(), SPACE, sentences, tmp_path)
    monkeypatch.setattr(planner, "measure", fake)
    result = plan(teacher, DenseStudentConfig(), SPACE, sentences, tmp_path)
    measured = [engine.name for call in fake.calls for engine in call if engine.name != "teacher-onnx"]
    assert len(measured) == len(set(measured)) == 2
    assert [one["speedup"]["1"]["value"] for one in result["candidates"]] == [10, 10]  # each was alone in its group


def test_candidates_alternate_with_the_teacher_in_groups(teacher, sentences, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(planner, "LARGEST_GROUP", 2)
    space = SPACE.model_copy(update={"layers": [1, 2, 3], "batch_sizes": [1, 8], "speedup": 8.0})
    result = plan(teacher, DenseStudentConfig(), space, sentences, tmp_path)
    assert [len(call) for call in fake.calls] == [3, 2]
    assert result["teacher"]["latency"]["8"] == {
        "p50_ms": 80.0, "p95_ms": 80.0, "p99_ms": 80.0, "sentences_per_second": 100.0
    }  # fmt: skip
    assert [one["speedup"]["1"] for one in result["candidates"]] == [
        {"value": 10, "ci95": [9, 11]}, {"value": 5, "ci95": [4, 6]}, {"value": 10, "ci95": [9, 11]}
    ]  # fmt: skip
    assert [one["pareto"] for one in result["candidates"]] == [False, False, True]  # three layers are as fast as one
    assert result["chosen"] == 2
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    "changed",
    [
        {"texts": ["other texts", "than before"]},
        {"bench": BenchConfig(threads=1)},
        {"space": SPACE.model_copy(update={"rounds": 6})},
        {"export": ExportConfig(quantization=QuantizationConfig(kind="none"))},
        {"student": DenseStudentConfig(head="dense")},
    ],
)
def test_other_conditions_are_measured_again(changed, teacher, sentences, tmp_path, fake):
    same = {"student": DenseStudentConfig(), "space": SPACE, "texts": sentences, "bench": BenchConfig(threads=2)}
    plan(teacher, folder=tmp_path, **same)
    plan(teacher, folder=tmp_path, **same)
    assert len(fake.calls) == 1
    plan(teacher, folder=tmp_path, **{**same, **changed})
    assert len(fake.calls) == 2


def test_what_is_asked_of_the_result_costs_no_measurement(teacher, sentences, tmp_path, fake):
    run = RunFolder(tmp_path)
    plan(teacher, DenseStudentConfig(), SPACE, sentences, run.candidates)
    slow = SPACE.model_copy(update={"speedup": 20.0})
    others = DenseStudentConfig(dropout=0.1, initialisation="random", freeze_embeddings=True)
    assert plan(teacher, others, slow, sentences, run.candidates)["chosen"] is None
    assert len(fake.calls) == 1
    forget_measurements(run)
    plan(teacher, others, slow, sentences, run.candidates)
    assert len(fake.calls) == 2


def test_candidates_have_the_trimmed_vocabulary(teacher, sentences, tmp_path, fake):
    fewer = load_encoder(str(tiny_encoder(tmp_path / "trimmed", layers=4, vocabulary=VOCABULARY[:150])))
    result = plan(teacher, DenseStudentConfig(), SPACE, sentences, tmp_path / "plan", source=fewer)
    kept = plan(teacher, DenseStudentConfig(), SPACE, sentences, tmp_path / "plan")
    assert result["teacher"]["parameters"] == kept["teacher"]["parameters"]
    for small, large in zip(result["candidates"], kept["candidates"], strict=True):
        assert large["parameters"] - small["parameters"] == 16 * (len(VOCABULARY) - 150)
        assert large["encoder_parameters"] == small["encoder_parameters"]


def job(encoder_folder, tmp_path, **changes):
    plan_block = {"layers": [1, 2], "hidden_size": [16], "batch_sizes": [1], "rounds": 5, "speedup": 4.0}
    values = {**JOB, "output": str(tmp_path), "teacher": {"model": str(encoder_folder)}, "plan": plan_block}
    config = validate({**values, **changes})
    return config, RunFolder(config.run_folder)


@pytest.fixture
def corpus(monkeypatch, sentences):
    monkeypatch.setattr(planner, "texts_for_speed", lambda config, run: list(sentences))


def test_the_stage_writes_plan_figure_and_student(encoder_folder, tmp_path, corpus, fake):
    config, run = job(encoder_folder, tmp_path)
    result = plan_stage(config, run)
    assert read_json(run.plan / "plan.json") == result
    assert result["target"] == {"speedup": 4.0, "batch": 1}
    assert (run.plan / "plan.svg").read_text(encoding="utf-8") == plan_figure(result)
    student = yaml.safe_load((run.plan / "student.yaml").read_text(encoding="utf-8"))["student"]
    assert student == dict(zip(SHAPE, (2, 16, 32, 4, 16), strict=True))  # 5 times as fast, surely 4 times


def test_a_speedup_that_nothing_reaches_fails_after_writing(encoder_folder, tmp_path, corpus, fake):
    config, run = job(encoder_folder, tmp_path)
    plan_stage(config, run)
    config.plan.speedup = 10.0  # the fastest is 10 times as fast, give or take one
    times = "\N{MULTIPLICATION SIGN}"
    reason = rf"None of the 2 .* fastest, 1{times}16, is 10.0 times .* 9.0 to 11.0\)\. Add smaller .*plan\.speedup"
    with pytest.raises(GateFailed, match=reason):
        plan_stage(config, run)
    assert len(fake.calls) == 1
    assert read_json(run.plan / "plan.json")["chosen"] is None
    assert "None of 2 shapes reaches 10x" in (run.plan / "plan.svg").read_text(encoding="utf-8")
    assert not (run.plan / "student.yaml").exists()  # that of the earlier plan


def test_the_teacher_as_its_own_student_has_nothing_to_plan(encoder_folder, tmp_path):
    config, run = job(encoder_folder, tmp_path, student={"kind": "teacher"})
    with pytest.raises(ConfigurationError, match=r"nothing to plan. Set student\.kind: dense"):
        plan_stage(config, run)


def test_random_stand_ins_are_named(encoder_folder, tmp_path, corpus, fake):
    config, run = job(encoder_folder, tmp_path, teacher={"model": str(encoder_folder), "random_weights": True})
    assert plan_stage(config, run)["random_weights"] is True
    assert "random stand-in" in (run.plan / "student.yaml").read_text(encoding="utf-8")
