"""Judging: what never passes, texts, limits, a teacher, and the command."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_encoder
from verifying import LIMITS

from distillabse import cli, layout
from distillabse.config import EvaluationConfig, GatesConfig
from distillabse.corpus.records import Sentence
from distillabse.errors import ConfigurationError, GateFailed, InputError
from distillabse.models.teacher import load_encoder
from distillabse.settings import load_gates
from distillabse.storage import read_json
from distillabse.verification.examine import examine_bundle, verify_bundle
from distillabse.verification.gates import (
    Check,
    Findings,
    Outcome,
    at_least,
    at_most,
    exactly,
    failed_gates,
    none_of,
    require_passed,
    run_checks,
)
from distillabse.verification.kinds import FP32, INT8, TORCH
from distillabse.verification.subject import Subject
from distillabse.verification.teacher import Teacher
from distillabse.verification.texts import built_in_texts, texts_of_file


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
    others = {sentence.text for sentence in texts}
    for entry in result["worst"]:
        assert entry["teacher_neighbour"] in others - {entry["text"]}
        assert entry["teacher_similarity"] == pytest.approx(entry["student_similarity"], abs=0.1)


def test_a_teacher_that_was_not_kept_is_seen(good, sentences, tmp_path):
    other = load_encoder(str(tiny_encoder(tmp_path / "other", layers=4, seed=5)))
    texts = [Sentence(text, "en") for text in sentences]
    limits = LIMITS.model_copy(update={"teacher_skill": 0.9, "teacher_cosine_mean": 0.9})
    failures = {(gate["gate"], gate["artefact"]) for gate in failed_gates(judged(good, other, texts, limits)["gates"])}
    artefacts = (TORCH, FP32, INT8)
    assert failures == {(gate, name) for gate in ("mean cosine to the teacher", "skill") for name in artefacts}


def test_a_teacher_of_another_dimension_is_named_and_fails(bundle, sentences, tmp_path):
    other = load_encoder(str(tiny_encoder(tmp_path / "other", hidden=48)))
    gates = failed_gates(judged(bundle, other, [Sentence(text, "en") for text in sentences], LIMITS)["gates"])
    assert {gate["artefact"] for gate in gates} == {TORCH, FP32, INT8}
    assert all("teacher's vectors have 48 dimensions, the bundle's 32" in gate["detail"] for gate in gates)


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
    assert "files that differ from SHA256SUMS of bundle: 1, needs exactly 0 (vocab.txt)" in printed.err.replace(
        "\n", ""
    )


def test_the_command_refuses_what_is_no_bundle(bundle, monkeypatch, capsys):
    assert call(monkeypatch, "verify", bundle.parent) == 2
    assert "is a folder without distillabse.json, so it is no bundle. Did you mean" in capsys.readouterr().err
    assert call(monkeypatch, "verify", "quickstart", "--teacher", "x") == 2
    assert "are for a bundle" in capsys.readouterr().err
    (bundle / layout.PROVENANCE).write_text("[]")
    assert call(monkeypatch, "verify", bundle) == 2
    assert "not the record of a bundle" in capsys.readouterr().err


def test_verification_is_not_imported_with_the_encoder():
    code = (
        "import sys, distillabse.encoder; sys.exit(any(name.startswith('distillabse.verif') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
