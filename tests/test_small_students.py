"""Whole jobs with small students: trimmed teachers, reduced dimensions, assistants, maps to the teacher's width."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny import JOB_WORDS, VOCABULARY, tiny_job

from distillabse.config import (
    CosineObjective,
    DenseStudentConfig,
    HiddenObjective,
    JobConfig,
    TeacherConfig,
    TeacherStudentConfig,
)
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation.fidelity import cosine_and_skill
from distillabse.layout import RunFolder
from distillabse.models.reduction import load_reduction
from distillabse.models.student import build_student, take_weights
from distillabse.models.teacher import load_encoder, load_teacher, transformer_of
from distillabse.models.tokens import tokenise
from distillabse.pipeline import is_current, run_job, run_plan, run_stage, stages_of
from distillabse.settings import load_config, training_arguments, validate
from distillabse.storage import read_json
from distillabse.training.data import PaddingCollator, tokenised_sentences
from distillabse.training.distillation import distill, held_out_fidelity
from distillabse.training.distiller import Distiller


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the teacher (3 layers, width 32), the sentences and the runs are."""
    return tmp_path_factory.mktemp("place")


def job(place, name, **blocks):
    return validate(tiny_job(place, name, **blocks))


def trained(config):
    run = RunFolder(config.run_folder)
    for stage in ("corpus", "vocabulary", "distill"):
        run_stage(stage, config, run)
    return run


def texts_of(run, split):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(run.split(split)).column("text").to_pylist()


def test_the_trimmed_teacher_is_a_product_of_its_own(place):
    config = job(
        place, "trimmed", student={"kind": "teacher"}, objectives=[], vocabulary={"kind": "trim", "coverage": 1.0},
        gates={"int8_to_fp32_mean": 0.98, "teacher_cosine_mean": 0.99},
    )  # fmt: skip
    run = run_job(config)
    counts = read_json(run.vocabulary_counts)
    assert counts["rows"] == len(VOCABULARY) > counts["rows_kept"]
    assert all(row["identical"] == 1.0 for row in counts["languages"].values())
    texts = texts_of(run, "test")
    expected = load_encoder(str(place / "teacher")).encode(texts)
    bundle = SentenceTransformer(str(run.bundle), device="cpu")
    assert transformer_of(bundle).config.vocab_size == counts["rows_kept"]
    np.testing.assert_allclose(bundle.encode(texts), expected, atol=1e-6)
    np.testing.assert_allclose(Encoder(run.bundle, file="onnx/model.onnx").encode(texts), expected, atol=1e-5)
    report = read_json(run.report_json)
    assert report["training"] is None and report["fidelity"]["torch"]["test"]["cosine_mean"] == pytest.approx(
        1, abs=1e-5
    )
    card = (run.bundle / "README.md").read_text()
    assert "nothing was trained" in card and f"{counts['rows_kept']:,}" in card.replace("\u202f", ",")
    assert "Identical" in run.report_html.read_text()


def test_a_narrow_student_is_judged_in_the_teachers_principal_directions(place):
    student = {"layers": 2, "hidden_size": 16}
    run = run_job(job(place, "narrow", student=student, vocabulary={"kind": "trim", "coverage": 1.0}))
    matrix = load_reduction(run.bundle)
    assert matrix.shape == (32, 16)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(16), atol=1e-5)
    texts = texts_of(run, "test")
    targets = load_encoder(str(place / "teacher")).encode(texts) @ matrix
    vectors = load_encoder(str(run.bundle)).encode(texts)
    assert vectors.shape == (len(texts), 16)
    verification = read_json(run.verification)
    found = verification["fidelity"]["torch"]["test"]["cosine_mean"]
    assert found == pytest.approx(cosine_and_skill(targets, vectors)["cosine"], abs=1e-5)
    assert verification["reduction"]["dimension"] == 16
    assert 0.5 < verification["reduction"]["similarity_spearman"] < 1
    for page in (run.report_html, run.bundle / "README.md"):
        assert "16 dimensions" in page.read_text()
    assert "teacher_projection.safetensors" in (run.bundle / "SHA256SUMS").read_text()


def test_the_student_learns_from_the_assistant_and_is_judged_by_the_teacher(place):
    assistant = {
        "student": {"layers": 3, "hidden_size": 24, "attention_heads": 4, "head": "dense"},
        "objectives": [{"kind": "cosine"}],
        "training": job(place, "x").training,
    }
    config = job(place, "chain", assistant=assistant, student={"layers": 2, "hidden_size": 24, "head": "dense"})
    assert stages_of(config) == [
        "corpus", "vocabulary", "assistant", "distill", "export", "verify", "bench", "report",
    ]  # fmt: skip
    run = run_job(config)
    helper, student = load_encoder(str(run.assistant)), load_encoder(str(run.student))
    assert (
        transformer_of(helper).config.num_hidden_layers == 3 and transformer_of(student).config.num_hidden_layers == 2
    )
    # It started from the assistant's own layers: the first and the last.
    untrained = build_student(helper, config.student)
    first = transformer_of(untrained).encoder.layer[1].output.dense.weight
    assert torch.equal(first, transformer_of(helper).encoder.layer[2].output.dense.weight)
    # Held-out fidelity is to the teacher, not to the assistant.
    last = [entry for entry in read_json(run.training_history)["log"] if "eval_cosine" in entry][-1]
    dev = texts_of(run, "dev")
    to_teacher = cosine_and_skill(load_encoder(str(place / "teacher")).encode(dev), student.encode(dev))["cosine"]
    to_assistant = cosine_and_skill(helper.encode(dev), student.encode(dev))["cosine"]
    assert abs(last["eval_cosine"] - to_teacher) < 0.005 < abs(last["eval_cosine"] - to_assistant)
    assert "teacher assistant of 3 layers" in (run.bundle / "README.md").read_text()
    changed = config.model_copy(update={"training": {**config.training, "max_steps": 4}})
    assert is_current("assistant", changed, run) and not is_current("distill", changed, run)


def test_a_student_is_trained_on(place):
    shape = {"layers": 2, "hidden_size": 16}
    first = trained(job(place, "first", student=shape))
    small_steps = {**job(place, "x").training, "max_steps": 1, "learning_rate": 1e-12}
    again = job(place, "again", student={**shape, "continue_from": str(first.student)}, training=small_steps)
    again.corpus.max_sentences = 60  # other text, which would give other directions
    run = trained(again)
    np.testing.assert_array_equal(load_reduction(run.student), load_reduction(first.student))
    one, two = (load_encoder(str(run.student)).state_dict() for run in (first, run))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, atol=1e-6, rtol=0)
    for changed, message in (
        ({"student": {**shape, "layers": 1}}, r"layer\.1\..* is none in the student and \(16,"),
        ({"vocabulary": {"kind": "trim", "coverage": 0.5}}, r"word_embeddings\.weight is \(\d+, 16\) in the student"),
    ):
        blocks = {"student": shape, **changed}
        blocks["student"]["continue_from"] = str(first.student)
        with pytest.raises(ConfigurationError, match=message):
            trained(job(place, "other", **blocks))


def test_a_student_with_other_tokens_is_not_trained_on(place):
    teacher = load_encoder(str(place / "teacher"))
    one, two = (build_student(teacher, DenseStudentConfig(layers=1)) for _ in range(2))
    vocabulary = two.tokenizer.get_vocab()
    two.tokenizer.get_vocab = lambda: {token: len(vocabulary) - 1 - row for token, row in vocabulary.items()}
    with pytest.raises(ConfigurationError, match="rows of its vocabulary are other tokens"):
        take_weights(one, two)


def test_an_assistant_does_not_lead_to_a_trained_student(place):
    assistant = {"student": {"layers": 3}, "objectives": [{"kind": "cosine"}]}
    with pytest.raises(ConfigurationError, match="remove the assistant"):
        job(place, "x", assistant=assistant, student={"layers": 2, "continue_from": "runs/first/student"})


def test_a_narrow_assistant_hands_its_reduction_on(place):
    narrow = {"layers": 2, "hidden_size": 16}
    assistant = {"student": narrow, "objectives": [{"kind": "cosine"}], "training": job(place, "x").training}
    config = job(place, "narrow-chain", assistant=assistant, student={"layers": 1, "hidden_size": 8})
    run = run_job(config)
    to_assistant, to_student = load_reduction(run.assistant), load_reduction(run.student)
    assert to_assistant.shape == (32, 16) and to_student.shape == (32, 8)
    # The student's directions lie within the assistant's.
    np.testing.assert_allclose(to_assistant @ (to_assistant.T @ to_student), to_student, atol=1e-5)


@pytest.mark.parametrize(
    ("assistant", "student", "message"),
    [
        ({"layers": 2}, {"layers": 3}, "2 layers are fewer than the student's 3"),
        ({"layers": 3, "hidden_size": 16}, {"layers": 2, "hidden_size": 24}, "hidden_size 16 is narrower than the"),
        ({"layers": 3, "hidden_size": 16}, {"layers": 2}, "hidden_size 16 is narrower than the student's own"),
    ],
)
def test_an_assistant_smaller_than_its_student_is_refused(place, assistant, student, message):
    block = {"student": assistant, "objectives": [{"kind": "cosine"}]}
    with pytest.raises(ConfigurationError, match=message):
        job(place, "x", assistant=block, student=student)


def test_objectives_are_needed_wherever_something_is_trained(place):
    with pytest.raises(ConfigurationError, match="objectives: a student needs at least one"):
        job(place, "x", objectives=[])
    with pytest.raises(ConfigurationError, match=r"assistant\.objectives: a student needs at least one"):
        job(place, "x", assistant={"student": {"layers": 3}})
    with pytest.raises(ConfigurationError, match="nothing is trained; remove the assistant"):
        assistant = {"student": {"layers": 3}, "objectives": [{"kind": "cosine"}]}
        job(place, "x", assistant=assistant, student={"kind": "teacher"})
    with pytest.raises(ConfigurationError, match=r"assistant\.training\.learning_rat: no such field"):
        job(place, "x", assistant={**assistant, "training": {"learning_rat": 1}})


def test_what_does_not_fit_the_teacher_is_refused_before_any_stage(place):
    for student, message in (
        ({"layers": 4}, "has only 3"),
        ({"hidden_size": 33, "attention_heads": 11, "initialisation": "teacher"}, "wider than the teacher's 32"),
        ({"attention_heads": 5}, "5 heads do not divide the hidden size 32"),
    ):
        config = job(place, "refused", student=student)
        with pytest.raises(ConfigurationError, match=message):
            run_job(config)
        assert not config.run_folder.exists()


def test_the_assistant_stage_needs_an_assistant(place):
    config = job(place, "none")
    with pytest.raises(ConfigurationError, match="no `assistant` block"):
        run_stage("assistant", config, RunFolder(config.run_folder))


def test_vocabulary_settings_that_contradict_each_other_are_refused(place):
    with pytest.raises(ConfigurationError, match="size has no effect with kind: keep"):
        job(place, "x", vocabulary={"size": 100})
    with pytest.raises(ConfigurationError, match="either size or coverage"):
        job(place, "x", vocabulary={"kind": "trim", "size": 100, "coverage": 0.9})
    with pytest.raises(ConfigurationError, match=r"vocabulary\.coverage"):
        job(place, "x", vocabulary={"kind": "trim", "coverage": 0})


def test_too_small_a_vocabulary_stops_the_job_with_the_least_size(place):
    config = job(place, "too-small", vocabulary={"kind": "trim", "size": 10})
    with pytest.raises((ConfigurationError, InputError), match=r"vocabulary\.size: 10 rows are too few.*at least \d+"):
        run_job(config)


def test_plan_runs_what_it_reads_and_its_block_makes_a_job(place):
    plan = {
        "layers": [1, 2],
        "hidden_size": [16],
        "embedding_size": [8],
        "speedup": 0.001,
        "batch_sizes": [1],
        "rounds": 5,
    }
    config = job(place, "planned", plan=plan, vocabulary={"kind": "trim", "coverage": 1.0})
    run = run_plan(config)
    result = read_json(run.plan_result)
    assert [row["shape"]["layers"] for row in result["candidates"]] == [1, 2] and result["chosen"] == 1
    rows = read_json(run.vocabulary_counts)["rows_kept"]
    student = DenseStudentConfig(**result["candidates"][1]["student"])
    built = build_student(load_encoder(str(run.base_encoder)), student)
    assert result["candidates"][1]["parameters"] == sum(
        parameter.numel() for name, parameter in built.named_parameters() if ".pooler." not in name
    )
    assert transformer_of(built).config.vocab_size == rows
    pasted = load_config(run.planned_student.parent / "student.yaml", [
        f"{key}={json.dumps(value)}" for key, value in config.model_dump(mode="json").items() if key != "student"
    ])  # fmt: skip
    assert pasted.student.hidden_size == 16 and pasted.student.embedding_size == 8
    with pytest.raises(ConfigurationError, match="nothing to plan"):
        run_plan(config.model_copy(update={"student": TeacherStudentConfig()}))


def test_hidden_states_of_other_widths_are_compared_through_a_map_that_starts_at_zero(encoder_folder, sentences):
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    student = build_student(teacher, DenseStudentConfig(layers=2, hidden_size=16, head="dense"))
    distiller = Distiller(student, teacher, [HiddenObjective()])
    batch = PaddingCollator(0)([{"input_ids": row} for row in tokenise(student, sentences)])
    outputs = distiller(**batch)
    with torch.no_grad():
        states = transformer_of(teacher)(**batch).last_hidden_state[batch["attention_mask"].bool()]
    assert outputs["loss"].item() == pytest.approx(states.square().mean().item(), rel=1e-5)
    outputs["loss"].backward()
    linear = distiller.objectives[0].maps[0]
    assert linear.weight.shape == (32, 16) and linear.weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in student.parameters())
    assert not any("maps" in name for name, _ in student.named_parameters())
    same = Distiller(build_student(teacher, DenseStudentConfig(layers=2)), teacher, [HiddenObjective()])
    assert not list(same.objectives.parameters())


def test_resuming_goes_on_with_what_the_objectives_have_learnt(encoder_folder, tmp_path):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(JOB_WORDS, size=5)) for _ in range(96)]
    config = JobConfig.model_validate(
        {
            "name": "maps",
            "teacher": {"model": str(encoder_folder)},
            "corpus": {"sources": [{"kind": "phrasebook"}]},
            "student": {"layers": 2, "hidden_size": 16, "head": "dense"},
            "objectives": [CosineObjective(), HiddenObjective(weight=5.0)],
            "training": {"per_device_train_batch_size": 8, "learning_rate": 2e-3, "max_steps": 8, "logging_steps": 1,
                         "eval_steps": 4, "save_steps": 4, "bf16": False, "report_to": []},
        }
    )  # fmt: skip
    results = []
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-4")):
        teacher = load_teacher(config.teacher)
        torch.manual_seed(0)
        student = build_student(teacher, config.student)
        arguments = training_arguments(config, tmp_path / name)
        held_out = held_out_fidelity(teacher, texts[:20])
        sentences = tokenised_sentences(teacher, texts)
        history = distill(config, teacher, student, sentences, held_out, arguments, checkpoint and str(checkpoint))
        results.append((student.state_dict(), [row["hidden"] for row in history["log"] if "hidden" in row][-4:]))
    assert (tmp_path / "whole" / "checkpoint-4" / "objectives.safetensors").is_file()
    assert results[0][1] == results[1][1]
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name]), name
