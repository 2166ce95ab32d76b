"""Jobs that are killed, damaged, out of disk or asked to stop end with the student of one that was left alone."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from distillation_worker import environment, launcher
from tiny import tiny_job

from distillabse.errors import StorageError, TrainingError
from distillabse.pipeline import run_job
from distillabse.settings import validate
from distillabse.training.checkpoints import has_whole_checkpoint, require_whole
from distillabse.training.interruption import leave_signals_to_trainer
from distillabse.training.trainer import DistillationTrainer

WORKER = Path(__file__).with_name("survival_worker.py")
TRAINING = {
    "max_steps": 24, "save_steps": 8, "eval_steps": 8, "logging_steps": 1, "per_device_train_batch_size": 16,
    "bf16": False, "report_to": [], "dataloader_num_workers": 1, "load_best_model_at_end": False,
    "lr_scheduler_type": "constant", "warmup_steps": 0,  # one step too many would show
}  # fmt: skip
STUDENT = {"layers": 2, "hidden_size": 16, "attention_heads": 4, "head": "dense"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A job that was left alone."""
    folder = tmp_path_factory.mktemp("survival")
    return folder, run_job(job(folder, folder / "reference"), until="distill")


@pytest.fixture
def config(reference, tmp_path):
    """A job whose text is prepared and whose training has not begun."""
    folder, run = reference
    prepared = tmp_path / "runs" / "job"
    for name in ("corpus", "vocabulary"):
        shutil.copytree(run.product(name), prepared / name)
        (prepared / "stamps").mkdir(exist_ok=True)
        shutil.copy(run.stamp(name), prepared / "stamps")
    return job(folder, tmp_path / "runs")


def job(folder, output, **training):
    blocks = {"student": STUDENT, "training": {**TRAINING, **training}, "output": str(output)}
    return validate(tiny_job(folder, "job", **blocks))


class Broken(Exception):
    """Stands for whatever ends a process."""


def break_at(monkeypatch, step, error=None):
    """End the next training within a step."""
    run, done = DistillationTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and not done:
            done.append(step)
            raise error or Broken
        return run(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", training_step)


def suffer(config, fault, processes=1):
    """Run the job in processes of their own, with a fault; their exit status."""
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    started = launcher(processes) if processes > 1 else [sys.executable]
    return subprocess.run(
        [*started, str(WORKER), str(path), fault], env=environment(), start_new_session=True, timeout=300, check=False
    ).returncode


def finish(config):
    return run_job(config, until="distill")


def resumed_from(run):
    return json.loads(run.training_history.read_text())["resumed_from"]


def assert_same(run, other):
    """Weights byte for byte, and every logged figure."""
    paths = sorted(path.relative_to(other.student) for path in other.student.rglob("*.safetensors"))
    assert [str(path) for path in paths] == ["2_Dense/model.safetensors", "model.safetensors"]
    for path in paths:
        assert (run.student / path).read_bytes() == (other.student / path).read_bytes(), path
    logs = [json.loads(each.training_history.read_text())["log"] for each in (run, other)]
    ours, theirs = ([entry for entry in log if "train_runtime" not in entry] for log in logs)
    assert ours == theirs and len(theirs) == 24 + 3
    assert not list(run.root.rglob(".*"))
    assert sorted(path.name for path in run.checkpoints.iterdir() if "damaged" not in path.name) == [
        "checkpoint-16", "checkpoint-24", "job.json",
    ]  # fmt: skip


def test_kill_9_within_a_checkpoint(reference, config):
    assert suffer(config, "killed_in_commit") == -signal.SIGKILL
    checkpoints = config.run_folder / "checkpoints"
    assert (checkpoints / "checkpoint-16" / "optimizer.pt").is_file()
    require_whole(checkpoints / "checkpoint-8")
    run = finish(config)
    assert resumed_from(run) == "checkpoint-8"
    assert_same(run, reference[1])


def test_a_signal_to_all_processes_saves_the_step_it_came_in(reference, config):
    """The DataLoader's worker gets it, too."""
    assert suffer(config, "group_asked_to_stop") == 143
    require_whole(config.run_folder / "checkpoints" / "checkpoint-11")
    run = finish(config)
    assert resumed_from(run) == "checkpoint-11"
    assert_same(run, reference[1])


def test_of_one_checkpoint_the_newest_stays_though_another_is_better(config):
    config.training["save_total_limit"] = 1
    assert suffer(config, "group_asked_to_stop") == 143
    checkpoints = config.run_folder / "checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-11"}
    assert resumed_from(finish(config)) == "checkpoint-11"


def test_a_reader_of_data_ends_when_its_parent_says_so_and_at_no_other_signal():
    """The DataLoader ends its workers with SIGTERM, too."""
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()

    def read():
        leave_signals_to_trainer(0)
        ready.set()
        time.sleep(60)

    worker = forked.Process(target=read)
    worker.start()
    assert ready.wait(20)
    for number in ("SIGTERM", "SIGUSR1"):
        send = f"import os, signal; os.kill({worker.pid}, signal.{number})"
        subprocess.run([sys.executable, "-c", send], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(config):
    config.training["per_device_train_batch_size"] = 8
    assert suffer(config, "one_process_asked_to_stop", processes=2) != 0
    for rank in range(2):
        assert "after step 11;" in Path(f"{config.output}.rank-{rank}").read_text()
    checkpoint = config.run_folder / "checkpoints" / "checkpoint-11"
    require_whole(checkpoint)
    assert (checkpoint / "rng_state_0.pth").is_file() and (checkpoint / "rng_state_1.pth").is_file()


def test_a_truncated_checkpoint_is_told_and_the_one_before_taken(reference, config, caplog, monkeypatch):
    break_at(monkeypatch, 20)
    with pytest.raises(Broken):
        finish(config)
    newest = config.run_folder / "checkpoints" / "checkpoint-16"
    os.truncate(newest / "optimizer.pt", 100)
    with caplog.at_level(logging.WARNING, "distillabse"):
        run = finish(config)
    assert f"{newest} is damaged (optimizer.pt): it is now damaged-checkpoint-16, and not used" in caplog.messages
    assert resumed_from(run) == "checkpoint-8"
    assert_same(run, reference[1])


def test_a_disk_that_fills_within_a_checkpoint(reference, config, monkeypatch):
    """/dev/full is a disk without space: the error is torch's own."""
    save = DistillationTrainer._save_optimizer_and_scheduler

    def fills(self, output_dir):
        if self.state.global_step == 16:
            torch.save(self.optimizer.state_dict(), "/dev/full")
        save(self, output_dir)

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "_save_optimizer_and_scheduler", fills)
        with pytest.raises(StorageError, match=r"No space left on the disk while writing \S*checkpoint-16\."):
            finish(config)
    assert sorted(path.name for path in (config.run_folder / "checkpoints").iterdir()) == [
        "checkpoint-8", "job.json", "training-data",
    ]  # fmt: skip
    assert has_whole_checkpoint(config.run_folder / "checkpoints")
    run = finish(config)
    assert resumed_from(run) == "checkpoint-8"
    assert_same(run, reference[1])


@pytest.mark.parametrize("what", ["student", "training-data"])
def test_an_end_after_the_last_checkpoint_costs_nothing(reference, config, monkeypatch, what):
    """Before the student is written, and while the working areas are removed."""
    from distillabse.training import stage

    name = "new_folder" if what == "student" else "remove_folder"
    kept = getattr(stage, name)

    def ends(path):
        if path.name != what:
            return kept(path)
        if what == "training-data":  # moved aside, and half removed
            aside = path.rename(path.with_name(f".{path.name}.0badcafe.building"))
            next(aside.iterdir()).unlink()
        raise Broken

    with monkeypatch.context() as patched:
        patched.setattr(stage, name, ends)
        with pytest.raises(Broken):
            finish(config)
    run = finish(config)
    assert resumed_from(run) == "checkpoint-24"
    assert_same(run, reference[1])


def test_early_stopping_remembers_how_long_it_has_waited(config, monkeypatch):
    """A learning rate of nothing: no evaluation is better than the first."""
    training = {"learning_rate": 1e-12, "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    waiting = {"early_stopping": {"patience": 2, "threshold": 0.01}, "training": {**config.training, **training}}
    config = validate({**config.model_dump(mode="json"), **waiting})
    break_at(monkeypatch, 9)
    with pytest.raises(Broken):
        finish(config)
    run = finish(config)
    history = json.loads(run.training_history.read_text())
    assert (history["resumed_from"], history["steps"]) == ("checkpoint-8", 12)
    shutil.rmtree(run.student)  # as if it had been killed before it wrote the student
    history = json.loads(finish(config).training_history.read_text())
    assert (history["resumed_from"], history["steps"]) == ("checkpoint-12", 12)


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "Connection reset by peer"), EOFError(), RuntimeError("DataLoader worker (pid 1)")],
)
def test_what_is_said_of_a_process_that_is_gone(config, monkeypatch, error):
    """A DataLoader whose worker was killed says it in any of these ways, depending on the moment."""
    break_at(monkeypatch, 2, error)
    with pytest.raises(TrainingError, match=r"is gone at step 2 .*start the job again with --resume"):
        finish(config)


def test_other_errors_of_training_are_not_hidden(config, monkeypatch):
    break_at(monkeypatch, 2, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        finish(config)


def test_weights_that_are_no_numbers_are_not_saved(config, monkeypatch):
    """The loss of a step tells of the weights before it."""

    def break_weights(self, *args, **kwargs):
        if self.state.global_step == 16:
            next(parameter for parameter in self.distiller.student.parameters()).data[0, 0] = float("nan")
        return save(self, *args, **kwargs)

    save = DistillationTrainer._save_checkpoint
    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", break_weights)
    with pytest.raises(TrainingError, match=r"no longer numbers at step 16 .*word_embeddings.*1 in all"):
        finish(config)
    require_whole(config.run_folder / "checkpoints" / "checkpoint-8")
    assert not (config.run_folder / "checkpoints" / "checkpoint-16").exists()
