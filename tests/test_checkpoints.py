"""Checkpoints: when one counts, which is taken, which stay, and when a job cannot go on from one."""

import logging

import pytest

from distillabse.errors import ConfigurationError, InputError
from distillabse.training.checkpoints import (
    Topology,
    checkpoint_path,
    checkpoint_step,
    commit_checkpoint,
    has_whole_checkpoint,
    newest_checkpoint,
    remove_older_checkpoints,
    require_same_steps,
    require_whole,
)

TOPOLOGY = Topology(processes=2, sentences_per_step=64, zero_stage=None)


def written(folder, step):
    """A checkpoint that was not committed yet."""
    checkpoint = checkpoint_path(folder, step)
    (checkpoint / "2_Dense").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights %d" % step)
    (checkpoint / "2_Dense" / "model.safetensors").write_bytes(b"head")
    return checkpoint


def committed(folder, *steps):
    for step in steps:
        commit_checkpoint(written(folder, step), TOPOLOGY)
    return checkpoint_path(folder, steps[-1])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_commit_lists_every_file_and_how_it_was_trained(tmp_path):
    checkpoint = committed(tmp_path, 7)
    listed = {line.split("  ")[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()}
    assert listed == {"model.safetensors", "2_Dense/model.safetensors", "topology.json"}
    assert require_same_steps(checkpoint, TOPOLOGY) == TOPOLOGY
    require_whole(checkpoint)
    assert checkpoint_step(checkpoint) == 7


def test_all_files_are_on_the_disk_before_the_list_is_written(tmp_path, monkeypatch):
    import os

    from distillabse.training import checkpoints

    checkpoint, synced = written(tmp_path, 1), []
    fsync, write = os.fsync, checkpoints.write_checksums
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")) or fsync(number)
    )
    monkeypatch.setattr(checkpoints, "write_checksums", lambda folder: synced.append("list") or write(folder))
    commit_checkpoint(checkpoint, TOPOLOGY)
    before, after = synced[: synced.index("list")], synced[synced.index("list") + 1 :]
    files = {"model.safetensors", "2_Dense", "2_Dense/model.safetensors", "topology.json"}
    assert set(before) == {str(checkpoint / name) for name in files}
    assert after == [str(checkpoint / "SHA256SUMS"), str(checkpoint), str(tmp_path)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("SHA256SUMS", "was never finished"),
        ("model.safetensors", r"is damaged \(model.safetensors\)"),
        ("2_Dense/model.safetensors", r"is damaged \(2_Dense/model.safetensors\)"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, broken, message):
    checkpoint = committed(tmp_path, 1)
    (checkpoint / broken).unlink()
    with pytest.raises(InputError, match=message):
        require_whole(checkpoint)
    assert not has_whole_checkpoint(tmp_path)


def test_the_newest_is_the_one_of_most_steps(tmp_path):
    committed(tmp_path, 100, 9, 20)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert newest_checkpoint(tmp_path / "none") is None


def test_an_unfinished_checkpoint_is_removed_and_the_one_before_taken(tmp_path, caplog):
    committed(tmp_path, 10)
    written(tmp_path, 20)
    assert has_whole_checkpoint(tmp_path)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]  # to look changes nothing
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert names(tmp_path) == ["checkpoint-10"]
    assert not caplog.messages


def test_damaged_checkpoints_are_set_aside_and_told(tmp_path, caplog):
    committed(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"weights 31")
    (tmp_path / "checkpoint-20" / "topology.json").unlink()
    with caplog.at_level(logging.WARNING, "distillabse"):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert names(tmp_path) == ["checkpoint-10", "damaged-checkpoint-20", "damaged-checkpoint-30"]
    assert [message.removeprefix(f"{tmp_path}/") for message in caplog.messages] == [
        "checkpoint-30 is damaged (model.safetensors): it is now damaged-checkpoint-30, and not used",
        "checkpoint-20 is damaged (topology.json): it is now damaged-checkpoint-20, and not used",
    ]
    committed(tmp_path, 30)
    (tmp_path / "checkpoint-30" / "model.safetensors").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"  # one of this name was aside already


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (None, 10, [10, 20, 30, 100]),
        (2, None, [30, 100]),
        (2, 10, [10, 100]),
        (2, 100, [30, 100]),
        (3, 10, [10, 30, 100]),
        (1, 20, [20, 100]),
        (1, 100, [100]),
        (1, None, [100]),
        (2, 55, [30, 100]),  # the best one is gone
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, keep, best, kept):
    committed(tmp_path, 10, 20, 30, 100)
    committed(tmp_path / "other", 5)
    remove_older_checkpoints(tmp_path, keep, best)
    assert sorted(names(tmp_path)) == sorted([*(f"checkpoint-{step}" for step in kept), "other"])


def test_other_steps_or_another_stage_are_refused_with_the_remedy(tmp_path):
    checkpoint = committed(tmp_path, 1)
    assert require_same_steps(checkpoint, Topology(4, 64, None)).processes == 2
    with pytest.raises(ConfigurationError) as error:
        require_same_steps(checkpoint, Topology(3, 96, None))
    assert "64 sentences a step on 2 process(es), and this job has 96 on 3" in str(error.value)
    assert "processes x batch size x accumulation is 64 again" in str(error.value)
    with pytest.raises(ConfigurationError) as error:
        require_same_steps(checkpoint, Topology(2, 64, 2))
    assert "was trained with plain data parallel training, and training.deepspeed says ZeRO stage 2" in str(error.value)


@pytest.mark.parametrize("name", ["checkpoint-", "checkpoint-10a", "damaged-checkpoint-10", "student"])
def test_other_names_are_no_checkpoints(tmp_path, name):
    with pytest.raises(InputError, match="is not named checkpoint-<step>"):
        checkpoint_step(tmp_path / name)
