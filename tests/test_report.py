"""The report stage, from small but complete figures of the earlier stages."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re

import pytest
import yaml
from pages import BENCH, JOB, VERIFY, Page, latency, run_folder
from rich.console import Console

from distillabse import layout
from distillabse.config import JobConfig
from distillabse.errors import InputError
from distillabse.evaluation.model_card import model_card, write_model_card
from distillabse.evaluation.report import collect, render_page, report_stage, summary_table
from distillabse.evaluation.report_page import pareto_points

SECTIONS = [
    "Fidelity to the teacher", "Where it is strong and where weak", "Speed", "Size on disk", "Invariance and gates",
    "Training", "Corpus", "Worst sentences", "Environment, and how to reproduce",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    return collect(run_folder(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def html(report) -> str:
    return render_page(report)


def test_report_json_has_every_figure(report):
    assert report["teacher"] == {**JOB["teacher"], "parameters": 470_926_848}
    assert report["student"] == {"layers": 3, "hidden_size": 768, "parameters": 406_544_640}
    assert report["size_bytes"] == {"teacher": 1_883_730_160, "fp32": 1_621_000_000, "int8": 480_500_000}
    assert report["fidelity"]["onnx-int8"]["tatoeba"] == {
        "n": 1234, "cosine_mean": 0.9402, "cosine_p01": 0.7011, "cosine_p05": 0.8022, "ci95": [0.9392, 0.9412],
        "constant_baseline": 0.3112, "shuffled_baseline": 0.2954, "skill": 0.9448, "neighbour_top1": 0.8123,
        "similarity_spearman": 0.9321,
    }  # fmt: skip
    assert set(report["fidelity"]) == {"torch", "onnx-fp32", "onnx-int8"}
    assert report["invariance"]["onnx-int8"] == {"batch_min": 0.9999973, "padding_min": 0.9999982}
    assert report["latency"]["onnx-int8"][1]["speedup_vs_teacher_onnx"] == 4.6
    assert set(report["latency"]) == {"teacher-torch", "teacher-onnx", "torch", "onnx-fp32", "onnx-int8"}
    assert report["environment"]["threads"] == 2
    assert report["environment"]["versions"]["onnxruntime"] == "1.31.0"
    assert report["slices"]["onnx-int8"]["test"]["language"]["de"]["skill"] == 0.95
    assert report["config"]["objectives"][0]["weight"] == 0.5
    assert re.fullmatch("[0-9a-f]{64}", report["config_hash"])


def test_the_verdict_is_made_of_the_smallest_artefact_and_batch(report):
    assert report["verdict"] == (
        "INT8 student: mean cosine 0.962 to the teacher (a constant vector would score 0.31), "
        "4.6x faster than the teacher in ONNX Runtime at batch 1, 3.9x smaller."
    )


def test_the_verdict_does_not_hide_a_slower_student(tmp_path):
    bench = copy.deepcopy(BENCH)
    bench["latency"]["onnx-int8"] = [latency(8, 40.0, 0.5, 0.4)]
    slower = "2.5x slower than the teacher in ONNX Runtime at batch 8"
    assert slower in collect(run_folder(tmp_path, measurements=bench))["verdict"]


@pytest.mark.parametrize(("file", "stage"), [("verification", "verify"), ("measurements", "bench")])
def test_a_stage_that_was_not_run_is_named(tmp_path, file, stage):
    with pytest.raises(InputError, match=f"distillabse {stage} CONFIG"):
        collect(run_folder(tmp_path, **{file: None}))


def test_the_page_is_well_formed_and_loads_nothing(html):
    page = Page(html)
    assert html.count("<svg") == 10  # eight figures, two of them in a wide and in a narrow form
    assert len(page.ids) == len(set(page.ids)) > 100
    assert page.links
    assert set(page.links) <= {f"#{identifier}" for identifier in page.ids}
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe"} & page.tags


def test_figures_take_their_colours_from_the_page(html):
    used = set(re.findall(r"var\(--(\w+)\)", html)) - {"share", "tint"}  # of single cells
    assert {"text", "grid", "blue", "teal", "slate", "amber"} <= used
    for scheme in (html[html.index(":root") :], html[html.index("prefers-color-scheme: dark") :]):
        assert used <= set(re.findall(r"--(\w+):", scheme[: scheme.index("}\n")]))
    assert not re.findall(r"(?:fill|stroke): #", html)


def test_the_page_shows_every_key_figure(html, report):
    text = Page(html).text.replace("\N{EN DASH}", "-")
    for figure in (
        "mean cosine 0.962 to the teacher", "All 2 gates passed",
        "0.9619", "0.9609-0.9629", "0.3112", "0.2954", "0.9448", "0.7011", "0.8022", "0.8123", "0.9321", "0.9402",
        "3.48", "4.60x", "4.50-4.70", "5.75x", "287", "480.5 MB", "1,883.7 MB", "470,926,848", "406,544,640",
        "0.9999973", "0.9912000", "teacher_skill", "5,432", "too short 68", "7,654", "0.120 %", "0.4321",
        "Xeon <Gold>", "avx2, avx512_vnni", "minilm/attention", "de  (600)", report["config_hash"],
    ):  # fmt: skip
        assert figure in text, figure
    assert "Random weights" not in text


def test_everything_has_its_order(html):
    assert re.findall("<h2>(.*?)</h2>", html) == SECTIONS
    assert html.index("9-16 tokens") < html.index("17-32 tokens")
    assert html.index("de  (600)") < html.index("en  (634)")


def test_text_is_escaped(html):
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; co" in html


def test_a_failed_gate_is_named_on_top(tmp_path):
    verify = copy.deepcopy(VERIFY)
    verify["gates"][1].update(passed=False, value=None, relation="at least", detail="InputError: no such graph")
    text = Page(render_page(collect(run_folder(tmp_path, verification=verify)))).text
    assert "1 of 2 gates failed: teacher_skill (INT8 student)" in text
    assert "at least 0.5" in text and "failed: InputError: no such graph" in text
    assert "gates passed" not in text


def test_random_weights_are_announced(tmp_path):
    run = run_folder(tmp_path, measurements=BENCH | {"random_weights": True})
    report = collect(run)
    assert report["verdict"] == ("INT8 student: 4.6x faster than the teacher in ONNX Runtime at batch 1, 3.9x smaller.")
    notice = "Random weights stand in for the teacher."
    page = Page(render_page(report))
    assert notice in page.text
    assert "Mean cosine to teacher" not in page.text
    assert notice in model_card(run, report)


def test_the_plot_on_top_has_teacher_and_student_at_the_smallest_batch(html, report):
    batch, points = pareto_points(report)
    assert batch == 1
    assert [(point.label, point.latency_ms, point.fidelity, point.size_bytes) for point in points] == [
        ("Teacher, PyTorch", 20.0, 1.0, 1_883_730_160), ("Teacher, ONNX Runtime", 16.0, 1.0, 1_883_730_160),
        ("PyTorch student", 6.0, 0.9448, 1_621_000_000), ("ONNX fp32 student", 5.0, 0.9448, 1_621_000_000),
        ("INT8 student", 3.48, 0.9448, 480_500_000),
    ]  # fmt: skip
    assert html.index('aria-label="Fidelity (skill) against latency') < html.index("<h2>")
    for label in (">INT8 student<", ">3.48 ms, 480.5 MB<", ">20.00 ms, 1,883.7 MB<"):
        assert html.count(label) >= 2, label


def test_a_failed_guard_is_on_top_with_its_remedy_and_resources_have_a_table(tmp_path):
    guards = [
        {"guard": "constant student", "encoder": "onnx-int8", "passed": False, "detail": "Spread 0. Export it again."},
        {"guard": "throttling", "encoder": None, "passed": True, "detail": "0 events"},
    ]
    bench = BENCH | {
        "guards": guards,
        "memory": {"teacher-onnx": {"loaded_bytes": 1_900_000_000, "peak_bytes": 2_100_000_000, "gpu_peak_bytes": None},
                   "onnx-int8": {"loaded_bytes": 510_000_000, "peak_bytes": 611_100_000, "gpu_peak_bytes": None}},
        "energy": {"onnx-int8": {"joules_per_1000_sentences": 12.5}, "teacher-onnx": {"joules_per_1000_sentences": 50}},
        "cold_start": {"unavailable": "too few runs"},
    }  # fmt: skip
    html = render_page(collect(run_folder(tmp_path, measurements=bench)))
    text = Page(html).text
    banner = html[html.index('<div class="alarm"') : html.index("<dl")]
    assert "not to be trusted" in banner
    assert "constant student</strong> (INT8 student): Spread 0. Export it again." in banner
    assert "guards passed" not in text
    for value in ("611.1 MB", "2,100.0 MB", "12.50", "Cold start was not measured: too few runs"):
        assert value in text, value
    assert 'style="--share: 25.0%">12.50' in html
    passed = BENCH | {"guards": [guards[1]]}
    assert "All 1 guards passed" in Page(render_page(collect(run_folder(tmp_path / "b", measurements=passed)))).text


def test_worst_sentences_have_both_neighbours(tmp_path, html):
    assert "Nearest for the teacher" not in html  # an older verify.json
    verify = copy.deepcopy(VERIFY)
    verify["worst"][0] |= {
        "teacher_neighbour": "near & dear", "teacher_similarity": 0.8765, "student_neighbour": "x" * 400,
        "student_similarity": 0.5432,
    }  # fmt: skip
    page = render_page(collect(run_folder(tmp_path, verification=verify)))
    assert "near &amp; dear" in page and "0.8765" in page and "0.5432" in page
    assert "x" * 280 + "\N{HORIZONTAL ELLIPSIS}" in page and "x" * 281 not in page


def task_scores(export):
    def score(value):
        return {"value": value, "ci95": [value - 0.0111, value + 0.0222], "n": 100}

    def measures(value):
        return {"accuracy": {"languages": {"de": score(value), "sw": score(value / 2)}, "mean": score(0.75 * value)}}

    return {
        "encoders": {name: {"dimension": 4} for name in ("teacher", "student", "small")},
        "export": export,
        "tasks": {
            "tatoeba": {
                "kind": "retrieval",
                "headline": "accuracy",
                "encoders": {"teacher": measures(0.8), "student": measures(0.6) | {"mixed_accuracy": {
                    "languages": {"de": score(0.4321)}, "mean": score(0.4321)}}, "small": measures(0.4)},
            }
        },
    }  # fmt: skip


def test_tasks_are_a_table_of_means_and_a_figure_by_language(tmp_path):
    html = render_page(collect(run_folder(tmp_path, task_scores=task_scores(None))))
    page = Page(html)
    assert re.findall("<h2>(.*?)</h2>", html) == [*SECTIONS[:2], "Tasks", *SECTIONS[2:]]
    assert len(page.ids) == len(set(page.ids))
    section = html[html.index("<h2>Tasks</h2>") : html.index("<h2>Speed</h2>")].replace("\N{EN DASH}", "-")
    rows = [re.findall(r">([^<>]+)</(?:t[hd]|span)>", row) for row in re.findall("<tr>.*</tr>", section)]
    assert rows[0] == ["Task", "Measure", "Languages", "teacher", "student", "small"]
    assert rows[1] == ["tatoeba", "accuracy", "2", "0.589-0.622", "0.439-0.472", "0.289-0.322"]
    assert rows[2] == ["accuracy beside the teacher", "1", "-", "0.421-0.454", "-"]
    assert re.findall(r">(0\.\d+) <span", section) == ["0.600", "0.450", "0.300", "0.432"]
    figure = html[html.index('aria-label="tatoeba: accuracy by language"') :]
    assert {"de", "sw", "teacher", "student", "small"} <= set(re.findall(r"<text[^>]*>([^<]+)</text>", figure))
    assert not re.findall(r"(?:fill|stroke): #", html)


def test_tasks_of_an_earlier_student_are_left_out(tmp_path, caplog):
    assert collect(run_folder(tmp_path, task_scores=task_scores("yesterday")))["tasks"] is None
    assert "earlier student" in caplog.text


def test_what_is_absent_leaves_its_section_out(tmp_path):
    verify, bench = copy.deepcopy(VERIFY), copy.deepcopy(BENCH)
    del verify["fidelity"]["onnx-int8"], bench["latency"]["onnx-int8"], bench["size_bytes"]["int8"]
    for sets in verify["fidelity"].values():
        sets["test"]["slices"] = {"language": {}, "length": {}}
    verify["worst"] = []
    absent = dict.fromkeys(("training_history", "corpus_counts", "vocabulary_counts", "record"))
    run = run_folder(tmp_path, verification=verify, measurements=bench, **absent)
    report = collect(run)
    html = render_page(report)
    gone = {"Where it is strong and where weak", "Training", "Corpus", "Worst sentences"}
    assert set(re.findall("<h2>(.*?)</h2>", html)) == set(SECTIONS) - gone
    assert "ONNX fp32 student: mean cosine 0.965" in Page(html).text
    assert report["size_bytes"]["int8"] is None
    card = model_card(run, report)
    assert 'InferenceSession("onnx/model.onnx")' in card
    assert "is built for" not in card


def test_the_card_has_metadata_usage_and_the_figures_of_the_report(run):
    card = model_card(run, collect(run))
    _, metadata, body = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "language": ["de", "en"], "base_model": "sentence-transformers/LaBSE",
        "library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "distillation", "onnx"],
    }  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
    figures = "0.9619", "0.9609 to 0.9629", "0.8022", "0.7011", "0.3112", "0.2954", "0.9448", "0.8123"
    assert ["INT8 student", "test", "1,234", *figures] in rows
    assert ["INT8 student", "1", "3.48", "3.83", "4.18", "287", "4.60x", "5.75x"] in rows
    assert ["INT8 student", "480.5 MB"] in rows
    assert 'InferenceSession("onnx/model_qint8_avx512_vnni.onnx")' in body
    assert "enable_truncation(256)" in body
    assert "`minilm` (weight 0.5), `cosine` (weight 1.0)" in body
    assert "100 steps in 1.5 minutes on cpu, fp32" in body
    assert "with 2 threads, onnxruntime 1.31.0." in body
    for block in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        compile(block, "README.md", "exec")


def test_the_card_says_what_the_student_started_from(tmp_path):
    starts = {
        "trained on from a student that was trained before": {"continue_from": "/private/first/student"},
        "from random weights": {"continue_from": None, "initialisation": "random"},
        "with the weights of the teacher to start from": {},
    }
    for number, (expected, student) in enumerate(starts.items()):
        run = run_folder(tmp_path / str(number), job=JOB | {"student": JOB["student"] | student})
        card = model_card(run, collect(run))
        assert [start for start in starts if start in card] == [expected]
        assert "/private" not in card


def test_a_teacher_that_is_no_hub_id_is_no_base_model(tmp_path):
    for number, model in enumerate(("packaged:all-MiniLM-L6-v2", "/models/labse", "./labse", str(tmp_path))):
        run = run_folder(tmp_path / str(number), job=JOB | {"teacher": {"model": model}})
        card = model_card(run, collect(run))
        assert "base_model" not in card
        assert f"distilled from `{model}`" in card


def test_the_card_refreshes_its_checksum(run):
    write_model_card(run, collect(run))
    assert not (run.bundle / layout.CHECKSUMS).exists()

    other = f"{'a' * 64}  onnx/model.onnx\n"
    (run.bundle / layout.CHECKSUMS).write_text(f"{'b' * 64}  README.md\n{other}")
    write_model_card(run, collect(run))
    digest = hashlib.sha256((run.bundle / layout.MODEL_CARD).read_bytes()).hexdigest()
    assert (run.bundle / layout.CHECKSUMS).read_text() == f"{digest}  README.md\n{other}"


def test_the_card_needs_a_bundle(run):
    run.bundle.rename(run.root / "elsewhere")
    with pytest.raises(InputError, match="distillabse export CONFIG"):
        report_stage(JobConfig.model_validate(JOB), run)
    assert not run.report.exists()
    assert not run.bundle.exists()


def test_the_stage_writes_both_files_and_the_card(run, html):
    report = report_stage(JobConfig.model_validate(JOB), run)
    assert json.loads(run.report_json.read_text()) == report
    assert run.report_html.read_text() == html
    assert sorted(path.name for path in run.report.iterdir()) == ["report.html", "report.json"]
    assert (run.bundle / layout.MODEL_CARD).read_text() == model_card(run, report)


def test_the_summary_has_a_row_for_every_engine(report):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(report))
    lines = console.export_text().replace("\N{EN DASH}", "-").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["onnx-int8"] == ["480.5", "0.9619", "0.9448", "0.7011", "3.48", "90.00", "4.6x", "5.8x"]
    assert rows["teacher-torch"] == ["1,883.7", "-", "-", "-", "20.00", "400.00", "0.8x", "1.0x"]
    assert rows["torch"] == ["-", "0.9651", "0.9448", "0.7011", "6.00", "-", "2.7x", "3.3x"]
