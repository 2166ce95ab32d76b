"""Encoders beside a baseline, on the command line and in parts; what is read of the machine is made up."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from scipy.stats import wilcoxon
from test_engines_of_bench import static_folder, table_graph

from distillabse import cli, layout
from distillabse.corpus.records import Record, write_records
from distillabse.errors import ConfigurationError
from distillabse.evaluation import comparison, machine, measurement
from distillabse.evaluation.comparison import (
    _targets,
    compare_students,
    latency_rows,
    require_own_folder,
)
from distillabse.evaluation.machine import Throttling
from distillabse.models.reduction import save_reduction
from distillabse.storage import sha256_of_file

WORDS = """the of and to in is was for on that with as at by it from be are this an have not or which but had they you
he she we his her their its all one two three more when there been who will would can what so out up about into than
them some could time these people first like other then now only new after also work well way even because any day"""


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """What else runs here is no part of these tests."""
    monkeypatch.setattr(machine, "throttling", lambda: Throttling(0.0, None, None, None))
    monkeypatch.setattr(machine, "reference_seconds", lambda: 1.0)
    monkeypatch.setattr(machine, "debug_signs", list)
    monkeypatch.setattr(measurement, "cores_used_by_others", lambda start, end: 0.0)


@pytest.fixture
def texts(tmp_path):
    words = WORDS.split()
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(words, size=random.integers(1, 12))) for _ in range(48)]
    file = tmp_path / "texts.tsv"
    rows = [f"{line}\t{'en' if number % 2 else 'de'}" for number, line in enumerate(dict.fromkeys(lines))]
    file.write_text("\n".join(["text\tlanguage", *rows]) + "\n")
    return file


def bench(*arguments, monkeypatch):
    quick = ("threads=1", "seconds_per_round=0.001", "interval=null", "cold_starts=1", "throughput_runs=2")
    monkeypatch.setattr(sys, "argv", ["distillabse", "bench", *map(str, arguments), *quick])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0


def bare_onnx(folder, encoder_folder, kind="states", dimension=32):
    folder.mkdir()
    shutil.copy(encoder_folder / layout.TOKENIZER, folder / layout.TOKENIZER)
    return table_graph(folder / "model.onnx", np.random.default_rng(1).standard_normal((400, dimension)), kind)


def test_every_kind_of_encoder_beside_a_baseline(encoder_folder, mean_pooled, texts, tmp_path, monkeypatch, capsys):
    table = np.random.default_rng(2).standard_normal((400, 16)).astype(np.float32)
    given = [
        f"teacher={encoder_folder}",
        f"student={mean_pooled}",
        f"words={bare_onnx(tmp_path / 'words', encoder_folder)}",
        f"static={static_folder(tmp_path / 'static', encoder_folder, table, True)}",
    ]
    output = tmp_path / "out"
    asked = ["--texts", texts, "-o", output, "--lengths", "own,12", "batch_sizes=[1,4]", "--json", tmp_path / "j.json"]
    assert bench(*given, *asked, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "4 encoders on" in printed and "comparison.html" in printed.replace("\n", "")
    result = json.loads((output / "comparison.json").read_text())
    assert result == json.loads((tmp_path / "j.json").read_text())
    assert "student" in (output / "comparison.html").read_text()
    names = ["teacher", "student", "words", "static"]
    assert (result["format"], result["name"], result["baseline"], result["protocol"]) == (
        1,
        "out",
        "teacher",
        "standard",
    )
    assert result["texts"]["sha256"] == sha256_of_file(texts)
    assert result["texts"]["count"] == len(texts.read_text().splitlines()) - 1
    encoders = result["encoders"]
    assert list(encoders) == names
    assert [row["kind"] for row in encoders.values()] == ["sentence-transformers", "bundle", "onnx", "static"]
    assert [row["dimension"] for row in encoders.values()] == [32, 32, 32, 16]
    int8 = layout.int8_graph(mean_pooled)
    assert encoders["student"]["file"] == int8 and encoders["student"]["sha256"] == sha256_of_file(mean_pooled / int8)
    # The INT8 graph of the same weights is close; a random table of words is not, and is no neighbour either.
    kept = result["fidelity"]
    assert list(kept) == ["student", "words"]
    assert kept["student"]["cosine_mean"] > 0.99 > kept["words"]["cosine_mean"]
    assert kept["student"]["ci95"][0] <= kept["student"]["cosine_mean"] <= kept["student"]["ci95"][1]
    assert set(kept["student"]["slices"]["language"]) == {"de", "en"}
    assert "16 dimensions, those of teacher 32" in result["fidelity_left_out"]["static"]
    (pair,) = result["fidelity_pairs"]
    assert (pair["left"], pair["right"]) == ("student", "words")
    assert pair["difference"] == pytest.approx(kept["student"]["cosine_mean"] - kept["words"]["cosine_mean"])
    assert pair["wilcoxon_p"] < 1e-6
    for name in names:
        rows = result["latency"][name]
        assert [(row["batch"], row["length"]) for row in rows] == [(1, None), (4, None), (1, 12), (4, 12)]
        for row in rows:
            assert row["rounds"] == 30 and row["speedup_ci95"][0] <= row["speedup"] <= row["speedup_ci95"][1]
            assert row["ms_per_sentence"] > 0 and 0 < row["wilcoxon_p"] <= 1
        assert result["throughput"][name]["runs"] == 2 and result["cold_start"][name]["runs"] == 1
        assert 0 < result["memory"][name]["loaded_bytes"] <= result["memory"][name]["peak_bytes"]
    assert [row["speedup"] for row in result["latency"]["teacher"]] == [1, 1, 1, 1]
    assert result["trusted"] is True and all(guard["passed"] for guard in result["guards"])
    examined = {guard["guard"] for guard in result["guards"] if guard["encoder"] == "static"}
    assert examined == {"constant student", "batch-dependent vectors", "unmasked padding"}
    worst = result["worst"]["words"]
    assert len(worst) == 20 and [row["cosine"] for row in worst] == sorted(row["cosine"] for row in worst)
    assert all(row["text"] not in (row["teacher_neighbour"], row["student_neighbour"]) for row in worst)
    environment = result["environment"]
    assert environment["threads"] == 1 and len(environment["cpus"]) == 1 and environment["gpu"] is None
    assert environment["versions"]["onnxruntime"]


def test_a_graph_that_counts_padding_is_caught_and_its_figures_are_written(
    encoder_folder, mean_pooled, texts, tmp_path, monkeypatch, capsys
):
    broken = bare_onnx(tmp_path / "broken", encoder_folder, kind="mean")
    run = tmp_path / "runs" / "leaky"
    shutil.copytree(mean_pooled, run / "bundle")
    seen = texts.read_text().splitlines()[5].partition("\t")[0]
    write_records(run / "corpus" / "train.parquet", [Record("something else", "en"), Record(f"{seen.upper()}!", "en")])
    output = tmp_path / "out"
    asked = ["--texts", texts, "-o", output, "batch_sizes=[2]", "rounds=29"]
    assert bench(run / "bundle", f"broken={broken}", *asked, monkeypatch=monkeypatch) == 1
    captured = capsys.readouterr()
    shown = " ".join(captured.out.split())
    assert "✗ unmasked padding of broken: Least cosine of a vector with itself" in shown
    assert "not to be trusted" in captured.err
    result = json.loads((output / "comparison.json").read_text())
    assert result["trusted"] is False
    failed = {(guard["guard"], guard["encoder"]) for guard in result["guards"] if not guard["passed"]}
    assert failed == {
        ("unmasked padding", "broken"),
        ("batch-dependent vectors", "broken"),
        ("training overlap", None),
        ("few pairs", None),
    }
    overlap = next(guard["detail"] for guard in result["guards"] if guard["guard"] == "training overlap")
    assert f"1 of {result['texts']['count']} texts" in overlap and repr(seen[:60]) in overlap


def test_a_constant_teacher_is_caught_and_what_was_measured_is_written(
    encoder_folder, mean_pooled, texts, tmp_path, monkeypatch, capsys
):
    bare = bare_onnx(tmp_path / "constant", encoder_folder)
    table_graph(bare, np.ones((400, 32)))
    asked = ["--texts", texts, "-o", tmp_path / "out", "batch_sizes=[2]"]
    assert bench(bare, f"student={mean_pooled}", *asked, monkeypatch=monkeypatch) == 1
    assert "constant teacher" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    failed = [(guard["guard"], guard["encoder"]) for guard in result["guards"] if not guard["passed"]]
    assert failed == [("constant teacher", "constant/model")]
    assert result["fidelity"] == {} and "same vector" in result["fidelity_left_out"]["student"]
    assert result["latency"]["student"][0]["rounds"] == 30


def test_the_protocol_of_the_thesis(mean_pooled, texts, tmp_path, monkeypatch):
    training = tmp_path / "training.txt"
    training.write_text("nothing of the kind\n")
    asked = ["--texts", texts, "-o", tmp_path / "out", "--protocol", "thesis", "--training-text", training]
    fp32 = f"fp32={mean_pooled / layout.ONNX_FP32}"
    assert bench(fp32, mean_pooled, *asked, "rounds=30", "max_seconds=100", monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["protocol"] == "thesis"
    rows = result["latency"]["fp32"]
    assert [(row["batch"], row["length"]) for row in rows] == [(size, 32) for size in (1, 64, 128, 256, 512)]
    # 48 texts fit into every batch but those of 1: sentences really encoded, not the size of the batch.
    last = rows[-1]
    assert last["ms_per_sentence"] > 2 * last["p50_ms"] / 512
    assert last["sentences_per_second"] == pytest.approx(1000 / last["ms_per_sentence"])


def test_a_folder_that_is_no_comparison_is_never_replaced(tmp_path, mean_pooled, texts, monkeypatch, capsys):
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    assert bench(mean_pooled, mean_pooled, "--texts", texts, "-o", tmp_path, monkeypatch=monkeypatch) == 2
    assert "would be replaced" in capsys.readouterr().err
    assert kept.read_text() == "years of work"
    with pytest.raises(ConfigurationError, match="a file"):
        require_own_folder(kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["BUNDLE", "--texts", "TEXTS"], "needs a baseline and at least one encoder"),
        (["BUNDLE", "x=BUNDLE", "--texts", "nowhere.txt"], "nowhere.txt"),
        (["BUNDLE", "nowhere.onnx", "--texts", "TEXTS"], "There is no file nowhere.onnx"),
        (["BUNDLE", "x=BUNDLE", "bench.nonsense=1", "--texts", "TEXTS"], "bench.nonsense"),
    ],
)
def test_wrong_use(arguments, words, mean_pooled, texts, tmp_path, monkeypatch, capsys):
    named = [argument.replace("BUNDLE", str(mean_pooled)).replace("TEXTS", str(texts)) for argument in arguments]
    assert bench(*named, "-o", tmp_path / "out", monkeypatch=monkeypatch) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_students_against_each_other_text_by_text():
    random = np.random.default_rng(0)
    target = random.standard_normal((200, 8)).astype(np.float32)
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    near = target + 0.05 * random.standard_normal(target.shape).astype(np.float32)
    far = target + 0.5 * random.standard_normal(target.shape).astype(np.float32)
    cosines = {
        name: (target * student).sum(1) / np.linalg.norm(student, axis=1)
        for name, student in (("near", near), ("far", far))
    }
    (pair,) = compare_students({"near": target, "far": target}, {"near": near, "far": far}, seed=0)
    differences = cosines["near"] - cosines["far"]
    assert pair["difference"] == pytest.approx(differences.mean(), abs=1e-6)
    standard_error = differences.std(ddof=1) / np.sqrt(200)
    assert pair["ci95"] == pytest.approx(
        [differences.mean() - 1.96 * standard_error, differences.mean() + 1.96 * standard_error],
        abs=0.2 * standard_error,
    )
    assert pair["wilcoxon_p"] == pytest.approx(wilcoxon(differences).pvalue, rel=1e-3)
    (same,) = compare_students({"a": target, "b": target}, {"a": near, "b": near}, seed=0)
    assert (same["difference"], same["ci95"], same["wilcoxon_p"]) == (0, [0, 0], 1)


def test_a_narrow_bundle_is_compared_in_its_own_space(tmp_path):
    """Its matrix keeps two of three components; without it there is no fidelity."""
    matrix = np.eye(3, 2, dtype=np.float32)
    (tmp_path / "narrow").mkdir()
    save_reduction(matrix, tmp_path / "narrow")
    teacher = np.array([[3, 4, 5], [0, 2, 1]], np.float32)
    narrow = np.array([[0.6, 0.8], [0, 1]], np.float32)
    folders = {"teacher": tmp_path, "narrow": tmp_path / "narrow", "other": tmp_path}
    targets, left_out = _targets(folders, {"teacher": teacher, "narrow": narrow, "other": narrow}, "teacher")
    np.testing.assert_allclose(targets["narrow"], narrow, atol=1e-6)
    assert list(targets) == ["narrow"] and list(left_out) == ["other"]


def test_keys_of_latency_do_not_name_the_baseline():
    row = {
        "batch": 1,
        "speedup_vs_my_model": 2.0,
        "speedup_vs_my_model_ci95": [1, 3],
        "speedup_vs_my_model_wilcoxon_p": 0.5,
    }
    assert latency_rows({"x": [row]}, "my-model") == {
        "x": [{"batch": 1, "speedup": 2.0, "speedup_ci95": [1, 3], "wilcoxon_p": 0.5}]
    }
    assert comparison.FORMAT == 1
