"""Stages of an interrupted job: what they go on from, what they refuse, and a bundle from a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_job

from distillabse import pipeline
from distillabse.checksums import broken_checksums
from distillabse.config import JobConfig
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError
from distillabse.models.teacher import load_encoder
from distillabse.training.trainer import DistillationTrainer


class Killed(Exception):
    """Takes the place of a kill after training, before the student is written."""


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("job"), "tiny")


def job(values, name, **training):
    return JobConfig.model_validate({**values, "name": name, "training": {**values["training"], **training}})


@pytest.fixture
def interrupted(values, request, monkeypatch):
    """A job whose training was killed after its last checkpoint."""
    config = job(values, request.node.name[:60].replace("[", "-").rstrip("]"))

    def die(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "take_trained_weights", die)
        with pytest.raises(Killed):
            pipeline.run_job(config, until="distill")
    run = pipeline.prepare(config)
    assert not run.stamp("distill").is_file() and not run.student.exists()
    return config, run


def history(run):
    return json.loads(run.training_history.read_text())


def test_a_killed_training_goes_on_from_its_checkpoint_and_cleans_up(interrupted):
    config, run = interrupted
    (run.root / ".student.abc.partial").mkdir()
    pipeline.run_job(config, until="distill")
    assert history(run)["resumed_from"] == "checkpoint-6" and history(run)["steps"] == 6
    assert not (run.root / ".student.abc.partial").exists()
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-6", "job.json"}
    assert not run.bundle.exists()


def test_checkpoints_of_another_job_are_refused_by_key(interrupted, values):
    config, run = interrupted
    changed = job(values, config.name, learning_rate=1e-5, max_steps=9)
    changed = changed.model_copy(update={"seed": 7})
    with pytest.raises(ConfigurationError) as error:
        pipeline.run_stage("distill", changed, run, resume=True)
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        "  seed: 42 then, 7 now",
        "  training.learning_rate: None then, 1e-05 now",
        "  training.max_steps: 6 then, 9 now",
    ]
    assert "--force" in lines[-1] and (run.checkpoints / "checkpoint-6").is_dir()
    pipeline.run_stage("distill", changed, run, resume=False)
    assert history(run)["resumed_from"] is None and history(run)["steps"] == 9


def test_steps_may_be_shared_out_differently_but_not_change(interrupted, values):
    config, run = interrupted
    smaller = job(values, config.name, per_device_train_batch_size=8)
    with pytest.raises(ConfigurationError, match=r"16 sentences a step on 1 process.* has 8 on 1.*is 16 again"):
        pipeline.run_stage("distill", smaller, run, resume=True)
    halves = job(values, config.name, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    pipeline.run_stage("distill", halves, run, resume=True)
    assert history(run)["resumed_from"] == "checkpoint-6"


def test_steps_of_an_assistant_may_be_shared_out_differently(values, monkeypatch):
    def with_assistant(**training):
        trained = {**values["training"], **training}
        assistant = {"student": {"layers": 2}, "objectives": [{"kind": "cosine"}], "training": trained}
        return JobConfig.model_validate({**values, "name": "with-assistant", "assistant": assistant})

    def die(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "take_trained_weights", die)
        with pytest.raises(Killed):
            pipeline.run_job(with_assistant(), until="assistant")
    faster = with_assistant(learning_rate=1e-5)
    run = pipeline.prepare(faster)
    with pytest.raises(ConfigurationError, match=r"assistant\.training\.learning_rate: None then, 1e-05 now"):
        pipeline.run_stage("assistant", faster, run, resume=True)
    halves = with_assistant(per_device_train_batch_size=8, gradient_accumulation_steps=2, logging_steps=2)
    pipeline.run_stage("assistant", halves, run, resume=True)
    found = json.loads((run.assistant / run.training_history.name).read_text())
    assert found["resumed_from"] == "checkpoint-6" and found["steps"] == 6


def test_a_finished_training_whose_job_changed_starts_over(values):
    config = job(values, "finished")
    run = pipeline.run_job(config, until="distill")
    changed = job(values, "finished", learning_rate=1e-5)
    pipeline.run_job(changed, until="distill")
    assert history(run)["resumed_from"] is None


def test_a_bundle_comes_from_a_checkpoint(interrupted):
    config, run = interrupted
    pipeline.export_checkpoint(config, run, run.checkpoints / "checkpoint-3")
    texts = ["the man", "my old house by the water"]
    expected = load_encoder(str(run.checkpoints / "checkpoint-3")).encode(texts)
    np.testing.assert_allclose(Encoder(run.bundle, file="onnx/model.onnx").encode(texts), expected, atol=1e-5)
    later = load_encoder(str(run.checkpoints / "checkpoint-6")).encode(texts)
    assert np.abs(later - expected).max() > 1e-4
    assert broken_checksums(run.bundle) == []
    assert not pipeline.is_current("export", config, run)  # the student's own bundle is another
    pipeline.run_stage("verify", config, run)
    assert run.verification.is_file()


def test_a_damaged_checkpoint_is_not_exported(interrupted):
    config, run = interrupted
    weights = run.checkpoints / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"checkpoint-3 is damaged \(model\.safetensors\)"):
        pipeline.export_checkpoint(config, run, weights.parent)
    with pytest.raises(InputError, match=r"nothing was never finished"):
        pipeline.export_checkpoint(config, run, Path("nothing"))


def test_the_reduction_of_a_narrower_student_is_exported_with_its_checkpoint(values, monkeypatch):
    narrow = {**values, "name": "narrow", "student": {"layers": 2, "hidden_size": 16, "attention_heads": 4}}
    config = JobConfig.model_validate(narrow)
    run = pipeline.run_job(config, until="distill")
    pipeline.export_checkpoint(config, run, run.checkpoints / "checkpoint-6")
    name = "teacher_projection.safetensors"
    assert (run.bundle / name).read_bytes() == (run.student / name).read_bytes()


def test_until_names_a_stage_of_the_job(values):
    with pytest.raises(ConfigurationError, match=r"--until assistant: .*corpus, vocabulary, distill, export"):
        pipeline.run_job(job(values, "until"), until="assistant")
