"""The command line from corpus to report, on a tiny teacher and a small table."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from tiny import tiny_job

from distillabse import cli
from distillabse.checksums import broken_checksums
from distillabse.layout import RunFolder
from distillabse.tasks.run import exported


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A YAML file for a job that takes seconds."""
    folder = tmp_path_factory.mktemp("job")
    bench = {"batch_sizes": [1, 4], "rounds": 5, "seconds_per_round": 0.001, "threads": 1, "interval": None,
             "cold_starts": 0, "throughput_runs": 1}  # fmt: skip
    values = tiny_job(folder, "tiny", objectives=[{"kind": "cosine"}, {"kind": "minilm"}], bench=bench)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def call(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distillabse", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0


def run_folder(job):
    return job.parent / "runs" / "tiny"


def test_run_makes_every_product_and_a_second_run_skips_every_stage(job, monkeypatch, capsys):
    assert call("run", job, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    run = run_folder(job)
    assert "onnx-int8" in printed and "report.html" in printed.replace("\n", "")
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["fidelity"]) == {"torch", "onnx-fp32", "onnx-int8"}
    assert {"teacher-torch", "teacher-onnx"} <= set(report["latency"])
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert "tiny" in (run / "bundle" / "README.md").read_text()
    assert broken_checksums(run / "bundle") == []
    provenance = json.loads((run / "bundle" / "distillabse.json").read_text())
    assert provenance["figures"]["fidelity"] == report["fidelity"]
    record = json.loads((run / "run.json").read_text())
    assert len(record["config_hash"]) == 64 and record["environment"]["versions"]["torch"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.json") if path.name != "run.json"}
    assert call("run", job, monkeypatch=monkeypatch) == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.json") if path.name != "run.json"}


def test_a_changed_gate_runs_verify_and_report_again_but_not_training(job, monkeypatch):
    run = run_folder(job)
    stamps = {name: (run / "stamps" / f"{name}.json").read_text() for name in ("distill", "export", "bench", "verify")}
    assert call("run", job, "gates.teacher_skill=-99", monkeypatch=monkeypatch) == 0
    after = {name: (run / "stamps" / f"{name}.json").read_text() for name in stamps}
    assert {name for name in stamps if stamps[name] != after[name]} == {"verify"}


def test_a_stand_in_with_random_weights_is_named_in_every_result(job, monkeypatch):
    assert call("run", job, "name=stand-in", "teacher.random_weights=true", monkeypatch=monkeypatch) == 0
    run = run_folder(job).with_name("stand-in")
    assert json.loads((run / "bench" / "bench.json").read_text())["random_weights"] is True
    for product in (run / "report" / "report.html", run / "bundle" / "README.md"):
        assert "Random weights stand in for the teacher" in product.read_text(), product


def test_a_failed_gate_is_exit_status_1_and_verify_json_is_written(job, monkeypatch, capsys):
    assert call("verify", job, "gates.teacher_cosine_mean=1.0", monkeypatch=monkeypatch) == 1
    assert "mean cosine to the teacher of onnx-int8" in capsys.readouterr().err
    gates = json.loads((run_folder(job) / "verify" / "verify.json").read_text())["gates"]
    assert any(not gate["passed"] for gate in gates)


def test_encode_from_a_file_to_npy_and_jsonl(job, monkeypatch, tmp_path, capsys):
    bundle = run_folder(job) / "bundle"
    (tmp_path / "texts").write_text("the dog\nmy old house\n")
    assert call("encode", bundle, tmp_path / "texts", "-o", tmp_path / "v.npy", monkeypatch=monkeypatch) == 0
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (2, 32) and vectors.dtype == np.float32
    assert call("encode", bundle, tmp_path / "texts", monkeypatch=monkeypatch) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["text"] for row in rows] == ["the dog", "my old house"]
    np.testing.assert_allclose([row["vector"] for row in rows], vectors, atol=1e-6)


def test_bench_tasks_puts_teacher_student_and_others_side_by_side(job, monkeypatch, capsys):
    run = run_folder(job)
    words = ["the dog", "my old house", "a blue tree", "she will read", "the night train", "good water"]
    rows = [f"{code}\t{number}\t{word} {end}" for code, end in (("eng", "now"), ("deu", "here"))
            for number, word in enumerate(words)]  # fmt: skip
    (job.parent / "lines.tsv").write_text("\n".join(["lang\tline\ttext", *rows]) + "\n")
    lines = {"path": str(job.parent / "lines.tsv"), "id": "line", "language_column": "lang"}
    suite = job.parent / "suite.yaml"
    suite.write_text(yaml.safe_dump({"tasks": [{"kind": "retrieval", "name": "lines", "aligned": lines}]}))
    measured = (run / "bench" / "bench.json").read_text()
    against = f"fp32={run / 'bundle' / 'onnx' / 'model.onnx'}"
    options = ["--tasks", "--against", against, "--only", "lines"]
    assert call("bench", job, f"tasks.suite={suite}", *options, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "lines: accuracy" in printed and "tasks.json" in printed.replace("\n", "")
    assert (run / "bench" / "bench.json").read_text() == measured
    scores = json.loads((run / "tasks" / "tasks.json").read_text())
    assert list(scores["encoders"]) == ["teacher", "student", "fp32", "random"]
    assert scores["encoders"]["teacher"]["texts"] == 12
    found = {name: measures["accuracy"] for name, measures in scores["tasks"]["lines"]["encoders"].items()}
    teacher = found["teacher"]["languages"]["de"]
    assert teacher["n"] == 6 and teacher["ci95"][0] <= teacher["value"] <= teacher["ci95"][1]
    assert teacher["value"] > found["random"]["mean"]["value"] + 0.2
    assert scores["places"]["student"] == str(run / "bundle" / "onnx" / "model_qint8_avx512_vnni.onnx")
    assert call("run", job, monkeypatch=monkeypatch) == 0  # the report is written again
    assert "<h2>Tasks</h2>" in (run / "report" / "report.html").read_text()
    assert call("export", job, monkeypatch=monkeypatch) == 0  # another student: its scores are not known
    assert exported(RunFolder(run)) != scores["export"]


def test_bench_of_a_job_fails_on_few_rounds_and_writes_what_it_measured(job, monkeypatch, capsys):
    stamp = run_folder(job) / "stamps" / "bench.json"
    before = stamp.read_text()
    assert call("bench", job, "bench.cold_starts=1", monkeypatch=monkeypatch) == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert "few pairs: Speedups over fewer than 30 pairs (batch 1: 5, batch 4: 5)" in printed
    assert "not to be trusted" in printed
    assert stamp.read_text() != before  # what is after it can go on
    found = json.loads((run_folder(job) / "bench" / "bench.json").read_text())
    engines = ["teacher-torch", "teacher-onnx", "torch", "onnx-fp32", "onnx-int8"]
    for part in ("latency", "throughput", "memory", "cold_start"):
        assert list(found[part]) == engines, part
    assert found["trusted"] is False
    judged = {(guard["guard"], guard["encoder"]): guard["passed"] for guard in found["guards"]}
    assert judged["few pairs", None] is False and judged["training overlap", None] is True
    assert judged["constant teacher", "teacher-onnx"] and judged["constant student", "onnx-int8"]
    for engine in engines:
        assert judged["batch-dependent vectors", engine] and judged["unmasked padding", engine]
        assert 0 < found["memory"][engine]["loaded_bytes"] <= found["memory"][engine]["peak_bytes"]
        assert found["cold_start"][engine]["runs"] == 1
    row = found["latency"]["onnx-int8"][0]
    assert 0 < row["speedup_vs_teacher_torch_wilcoxon_p"] <= 1 and row["converged"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "nowhere"], "distillabse bench nowhere ENCODER --texts FILE"),
        (["bench", "quickstart", "--texts", "x.txt"], "quickstart is a configuration"),
        (["bench", "quickstart", "--lengths", "16"], "--texts is missing"),
        (["bench", "quickstart", "--only", "x"], "belong to --tasks"),
        (["bench", "quickstart", "output=/tmp/distillabse-nothing-here", "--tasks"], "tasks.suite=evaluation-data"),
        (
            ["bench", "quickstart", "output=/tmp/distillabse-nothing-here", "--tasks", "--against", "teacher=x"],
            "choose another",
        ),
        (["run", "nowhere.yaml"], "neither a file nor a shipped configuration"),
        (["validate", "quickstart", "techer.model=x"], "did you mean 'teacher'"),
        (["validate", "quickstart", "training.lr_scheduler_type=nope"], "training:"),
        (["configs", "show", "nothing"], "Shipped:"),
        (["encode", "/nowhere"], "/nowhere"),
        (["encode", "/nowhere", "-o", "x.csv"], "name a .npy or a .jsonl"),
        (["nonsense"], "No such command"),
        (["export", "quickstart", "output=/tmp/distillabse-nothing-here"], "has not run"),
    ],
)
def test_wrong_use_is_exit_status_2(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert call(*arguments, monkeypatch=monkeypatch) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_configs_cp_never_overwrites(tmp_path, monkeypatch, capsys):
    target = tmp_path / "my.yaml"
    assert call("configs", "cp", "quickstart", target, monkeypatch=monkeypatch) == 0
    assert call("validate", target, monkeypatch=monkeypatch) == 0
    assert call("configs", "cp", "quickstart", target, monkeypatch=monkeypatch) == 2
    assert "exists already" in capsys.readouterr().err


def test_every_command_has_help_with_an_example_that_fits_a_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = [
        "run",
        "corpus",
        "vocabulary",
        "distill",
        "export",
        "verify",
        "bench",
        "report",
        "encode",
        "doctor",
        "validate",
    ]
    for name in [[name] for name in names] + [["configs", name] for name in ("ls", "show", "cp")]:
        assert call(*name, "--help", monkeypatch=monkeypatch) == 0
        text = capsys.readouterr().out
        assert f"distillabse {' '.join(name)}" in text.split("Usage:")[1].split("Example:")[-1], name
        assert len(text.splitlines()) <= 40, name


def test_starting_the_command_line_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "onnxruntime")
    code = f"import sys, distillabse.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
