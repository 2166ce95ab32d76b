"""What a worker can load, with vectors worked out by hand, and what it says of its own process."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from distillabse import layout
from distillabse.config import BenchConfig
from distillabse.cores import cpus_for
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation import machine, measurement
from distillabse.evaluation.engines import OnnxFileEngine, StaticEngine, clocks_of
from distillabse.evaluation.latency import progress_bars
from distillabse.evaluation.measurement import cold_starts, measure_throughput
from distillabse.evaluation.onnx_file import OnnxFile, pooled, pooling_of
from distillabse.evaluation.places import count_parameters, default_name, find_places, run_of
from distillabse.evaluation.workers import Engine, Worker


def table_graph(file, table, kind="states"):
    """A graph that looks up a row for each token; with "mean" it gives their mean over all, padding included."""
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask")
    )
    name = "last_hidden_state" if kind == "states" else "sentence_embedding"
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["states" if kind == "mean" else name])]
    if kind == "mean":
        nodes.append(helper.make_node("ReduceMean", ["states"], [name], axes=[1], keepdims=0))
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(table.astype(np.float32), "table")]
    graph = helper.make_graph(nodes, "table", [ids, mask], [output], weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), file)
    return file


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)


@pytest.fixture
def bare(encoder_folder, table, tmp_path):
    """An ONNX file with a tokenizer above it, and nothing else."""
    shutil.copy(encoder_folder / layout.TOKENIZER, tmp_path / layout.TOKENIZER)
    return table_graph(tmp_path / "graphs" / "any.onnx", table)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_states_of_any_onnx_file_are_pooled_over_the_tokens(bare, table):
    encoder = OnnxFile(bare, threads=1)
    short, long = encoder.token_ids(["the cat", "Where is the old house by the water?"])
    assert len(short) == 4 and len(long) > 4  # with [CLS] and [SEP]
    vectors = encoder.encode(["the cat", "Where is the old house by the water?"])
    np.testing.assert_allclose(vectors, unit(np.stack([table[short].mean(0), table[long].mean(0)])), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "pool"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda rows: rows[0]),
        ({"pooling_mode": "max"}, lambda rows: rows.max(0)),
        ({"pooling_mode": ["lasttoken"]}, lambda rows: rows[-1]),
        ({"pooling_mode_mean_tokens": True}, lambda rows: rows.mean(0)),
    ],
)
def test_pooling_is_read_from_the_model(bare, table, settings, pool):
    (bare.parent.parent / "1_Pooling").mkdir()
    (bare.parent.parent / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    encoder = OnnxFile(bare, threads=1)
    rows = encoder.token_ids(["no", "the old man"])
    np.testing.assert_allclose(
        encoder.encode(["no", "the old man"]), unit(np.stack([pool(table[row]) for row in rows])), atol=1e-6
    )


def test_padding_is_never_pooled():
    states = np.array([[[1.0], [3.0], [100.0]]])
    mask = np.array([[1, 1, 0]])
    found = {name: pooled(states, mask, name)[0, 0] for name in ("mean", "max", "cls", "lasttoken")}
    assert found == {"mean": 2, "max": 3, "cls": 1, "lasttoken": 3}


def test_settings_of_the_encoder_cut_and_lower_case(bare):
    (bare.parent.parent / layout.TRANSFORMER_SETTINGS).write_text('{"max_seq_length": 5, "do_lower_case": true}')
    encoder = OnnxFile(bare, threads=1)
    assert encoder.token_ids(["THE CAT"]) == encoder.token_ids(["the cat"])
    assert len(encoder.token_ids(["the cat and the dog and the house"])[0]) == 5


def test_what_is_no_sentence_encoder_is_refused(bare, table, tmp_path):
    folder = bare.parent.parent
    with pytest.raises(InputError, match=r"no file .*nothing\.onnx"):
        OnnxFile(tmp_path / "nothing.onnx")
    (folder / layout.MODULES).write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    with pytest.raises(InputError, match="a module Dense after pooling"):
        OnnxFile(bare)
    (folder / layout.MODULES).unlink()
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "weightedmean"}')
    with pytest.raises(InputError, match="weightedmean"):
        pooling_of(folder)
    model = onnx.load(bare)
    model.graph.input[0].name = "tokens"
    model.graph.node[0].input[1] = "tokens"
    onnx.save(model, bare)
    with pytest.raises(InputError, match="no input 'input_ids'"):
        OnnxFile(bare)
    (folder / layout.TOKENIZER).unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json beside or above"):
        OnnxFile(bare)


def test_texts_in_bulk_come_back_in_their_order(bare):
    engine = OnnxFileEngine(bare, "cpu", 1)
    texts = [" ".join(["cat"] * (number % 7 + 1)) + f" {number}" for number in range(70)]
    np.testing.assert_allclose(engine.bulk(texts), np.concatenate([engine.encode([text]) for text in texts]), atol=1e-6)


def static_folder(folder, encoder_folder, table, normalize):
    folder.mkdir()
    shutil.copy(encoder_folder / layout.TOKENIZER, folder / layout.TOKENIZER)
    save_file({"embeddings": table}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": normalize}))
    return folder


@pytest.mark.parametrize("normalize", [True, False])
def test_a_static_model_in_either_layout(encoder_folder, table, tmp_path, normalize):
    from distillabse.tasks.encoders import is_static, load_static

    own = static_folder(tmp_path / "own", encoder_folder, table, normalize)
    load_static(own).save(str(tmp_path / "saved"))
    texts = ["the cat", "Where is the old house by the water?"]
    for folder in (own, tmp_path / "saved"):
        assert is_static(folder)
        engine = StaticEngine(folder, 1)
        assert engine.tokens(texts)[0] == 2  # no special tokens
        ids = [engine._model[0].tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        means = np.stack([table[row].mean(0) for row in ids])
        np.testing.assert_allclose(engine.encode(texts), unit(means) if normalize else means, atol=1e-6)
        np.testing.assert_allclose(engine.bulk(texts), engine.encode(texts), atol=1e-6)
    assert not is_static(encoder_folder)


WORKER = """
import os, sys
import numpy as np
from distillabse.evaluation import latency_worker

class Engine:
    def __init__(self, **settings):
        self.kept = np.ones(40 * 2**20, dtype=np.uint8)
    def tokens(self, texts):
        return sorted(os.sched_getaffinity(0))
    def encode(self, batch):
        passing = np.ones(160 * 2**20, dtype=np.uint8)
        return np.array([[len(text), passing[0]] for text in batch], dtype=np.float32)
    bulk = encode

latency_worker.serve(Engine)
"""


@pytest.fixture
def counting(tmp_path):
    """An engine whose vectors hold the length of a text, and which takes memory in known pieces."""
    (tmp_path / "worker.py").write_text(WORKER)
    return Engine("counting", "any", tmp_path, None, (sys.executable, str(tmp_path / "worker.py")))


def test_a_worker_says_what_memory_it_took_and_is_pinned(counting):
    with ExitStack() as stack:
        worker = Worker(counting, "cpu", 1, stack)
        loaded = worker.memory()
        assert worker.tokens(["a"]) == cpus_for(1)
        np.testing.assert_array_equal(worker.vectors([["a", "abc"], ["ab"]]), [[1, 1], [3, 1], [2, 1]])
        after = worker.memory()
    mebibyte = 2**20
    assert after["loaded_bytes"] == loaded["loaded_bytes"] > 40 * mebibyte
    # The peak has grown by the array that was there for a while, and what it holds after loading has not.
    # Linux counts pages exactly only now and then.
    assert 158 * mebibyte <= after["peak_bytes"] - loaded["loaded_bytes"] < 200 * mebibyte
    assert after["gpu_peak_bytes"] is None


def test_cold_starts_are_of_fresh_processes_and_end_with_their_share_of_the_time(counting):
    config = BenchConfig(threads=1, max_seconds=10, cold_starts=5)
    with progress_bars() as progress:
        clock = iter([0.0, 0.5, 1.0, 1.5, 3.0]).__next__  # a fifth of 10 s is used up before the fifth run
        found = cold_starts([counting], "text", config, progress, clock)["counting"]
        assert found["runs"] == 4
        assert 0 < found["spread"][0] <= found["median_seconds"] <= found["spread"][1]
        none = BenchConfig(threads=1, cold_starts=0)
        assert cold_starts([counting], "text", none, progress) == {}


class Metered:
    """A worker that takes known seconds, and microjoules of a planted counter."""

    def __init__(self, name, counter, seconds, joules):
        self.engine, self.counter, self.seconds, self.joules = Engine(name, "any", None), counter, iter(seconds), joules

    def bulk_seconds(self, texts):
        self.counter.write_text(str(int(self.counter.read_text()) + round(self.joules * 1e6)))
        return next(self.seconds)


def test_throughput_and_energy_of_every_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "POWER_CAPPING", tmp_path)
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("0")
    (counter.parent / "max_energy_range_uj").write_text("1000000000")
    workers = [Metered("slow", counter, [10, 20, 40], 5.0), Metered("fast", counter, [1, 1, 2], 0.5)]
    with progress_bars() as progress:
        found = measure_throughput(workers, ["text"] * 200, 3, progress)
    assert found["throughput"]["slow"] == {"sentences_per_second": 10, "spread": [5, 20], "runs": 3, "texts": 200}
    assert found["throughput"]["fast"]["sentences_per_second"] == 200
    # 5 J for 200 sentences are 25 J for 1000.
    assert found["energy"]["slow"]["joules_per_1000_sentences"] == pytest.approx(25)
    assert found["energy"]["fast"]["joules_per_1000_sentences"] == pytest.approx(2.5)
    monkeypatch.setattr(machine, "POWER_CAPPING", tmp_path / "nowhere")
    with progress_bars() as progress:
        found = measure_throughput([Metered("slow", counter, [1], 1.0)], ["text"], 1, progress)
    assert "lists no package" in found["energy"]["unavailable"]


def test_a_slow_engine_makes_runs_over_fewer_texts():
    config = BenchConfig(max_seconds=40)  # a run may take a fortieth of it
    texts = [str(number) for number in range(1000)]
    assert measurement._sample(texts, 0.5, config, 0) == texts
    sample = measurement._sample(texts, 10.0, config, 0)
    assert len(sample) == 100 and sample == sorted(sample, key=int)
    assert len(measurement._sample(texts, 1000.0, config, 0)) == 32


def test_an_engine_with_a_clock_is_timed_on_the_wall_as_well():
    class WithGpu:
        clock = staticmethod(lambda: 0)

    assert len(clocks_of(WithGpu())) == 2 and clocks_of(WithGpu())[0]() == 0
    assert len(clocks_of(object())) == 1


def test_places_of_every_kind(mean_pooled, encoder_folder, bare, table, tmp_path, monkeypatch):
    static = static_folder(tmp_path / "static", encoder_folder, table, True)
    bundle = tmp_path / "runs" / "small" / "bundle"
    shutil.copytree(mean_pooled, bundle)
    given = [str(encoder_folder), str(bundle), f"fp32={bundle / layout.ONNX_FP32}", str(bare), str(static)]
    places = find_places(given)
    assert [place.name for place in places] == ["encoder", "small", "fp32", "graphs/any", "static"]
    assert [place.kind for place in places] == ["sentence-transformers", "bundle", "bundle", "onnx", "static"]
    assert [place.file for place in places] == [
        None,
        layout.int8_graph(bundle),
        layout.ONNX_FP32,
        "graphs/any.onnx",
        None,
    ]
    kinds = [[engine.kind for engine in place.engines("cpu")] for place in places]
    assert kinds == [["torch"], ["onnx"], ["onnx"], ["onnx-file"], ["static"]]
    assert find_places([str(bundle)], "cuda")[0].file == layout.ONNX_FP32
    on_gpu = places[1].engines("cuda", has_tensorrt=True)
    assert [(engine.name, engine.device) for engine in on_gpu] == [("small", "cuda"), ("small TensorRT", "tensorrt")]
    described = [place.description(place.engines("cpu")[0]) for place in places]
    assert [row["runtime"] for row in described] == ["PyTorch", *["ONNX Runtime CPU"] * 3, "PyTorch"]
    assert described[3]["size_bytes"] == bare.stat().st_size and described[3]["parameters"] is None
    assert described[4]["parameters"] == table.size
    # The tiny encoder without its pooler, as PyTorch counts it.
    from distillabse.evaluation.bench import count_parameters as in_torch
    from distillabse.models.teacher import load_encoder

    assert described[0]["parameters"] == described[1]["parameters"] == in_torch(load_encoder(str(encoder_folder)))
    assert run_of(places[1]) is None
    corpus = tmp_path / "runs" / "small" / "corpus" / "train.parquet"
    corpus.parent.mkdir()
    corpus.touch()
    assert run_of(places[1]) == corpus and run_of(places[0]) is None


def test_names_and_places_that_do_not_fit(encoder_folder, mean_pooled, tmp_path, monkeypatch):
    assert default_name("packaged:all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    assert default_name("sentence-transformers/LaBSE") == "LaBSE"
    assert default_name("runs/small/bundle/onnx/model.onnx") == "small/model"
    shutil.copytree(mean_pooled, tmp_path / "encoder")
    places = find_places([str(encoder_folder), str(tmp_path / "encoder")])
    assert [place.name for place in places] == ["encoder (sentence-transformers)", "encoder (bundle)"]
    with pytest.raises(ConfigurationError, match="Two encoders are named 'x'"):
        find_places([f"x={encoder_folder}", f"x={mean_pooled}"])
    with pytest.raises(ConfigurationError, match="name=place"):
        find_places(["=somewhere"])
    with pytest.raises(InputError, match="neither"):
        find_places([str(tmp_path)])
    with pytest.raises(InputError, match=r"no \./not/there"):
        find_places(["./not/there"])

    def offline(*given, **named):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"hub gives out right now \(no network\)"):
        find_places(["someone/model"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **named: str(encoder_folder))
    assert find_places(["someone/model"])[0].folder == encoder_folder


def test_parameters_are_counted_without_bert_s_own_pooler(tmp_path):
    save_file(
        {"bert.pooler.dense.weight": np.ones((9, 9), np.float32), "x": np.ones((2, 3), np.float32)}, tmp_path / "a"
    )
    assert count_parameters([tmp_path / "a"]) == 6
    assert count_parameters([]) is None
