"""Experts spread over two processes by DeepSpeed: the same training, and a checkpoint for one process."""

import os
import shutil
import sys

import pytest
import torch
from switch_worker import CLIPPING, EXPERT_STEPS, crowded_student, held_out_vectors, in_one_process, launch

from distillabse.errors import ConfigurationError, InputError
from distillabse.training.expert_parallel import (
    check_expert_parallelism,
    convert_checkpoint,
    gathered_state_dict,
    shard_experts,
)

STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def processes(folder):
    pytest.importorskip("deepspeed")
    return launch("experts", folder)


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def reference(stage):
    return in_one_process(crowded_student(), EXPERT_STEPS, separate=False, clipping=CLIPPING[stage])


def test_losses_weights_and_figures_are_those_of_one_process(processes, reference, stage):
    losses, state, figures = reference
    results = [result[str(stage)] for result in processes]
    both = [sum(pair) / 2 for pair in zip(*(result["losses"] for result in results), strict=True)]
    assert both == pytest.approx(losses, abs=1e-5)
    for result, expected in zip(results, figures, strict=True):
        assert expected[5] > 300  # tokens over capacity
        torch.testing.assert_close(result["figures"], expected)
        assert result["state"].keys() == state.keys()
        for name, weight in result["state"].items():
            torch.testing.assert_close(weight, state[name], atol=1e-5, rtol=0, msg=lambda text, name=name: name + text)


def test_a_process_keeps_half_of_the_experts(processes, stage):
    whole = crowded_student()
    experts = sum(weight.numel() for name, weight in whole.named_parameters() if "experts" in name)
    everything = sum(weight.numel() for weight in whole.parameters())
    assert [result[str(stage)]["parameters"] for result in processes] == [everything - experts // 2] * 2


def test_a_checkpoint_becomes_the_student_of_one_process(processes, folder, stage):
    state = convert_checkpoint(folder / f"stage-{stage}", "student.")
    for result in processes:
        gathered = result[str(stage)]["state"]
        assert state.keys() == gathered.keys()
        assert all(torch.equal(state[name], gathered[name]) for name in state)
    vectors = held_out_vectors(state, crowded_student(seed=1))
    for result, expected in zip(processes, vectors, strict=True):
        torch.testing.assert_close(result[str(stage)]["vectors"], expected, atol=1e-6, rtol=0)


def test_a_checkpoint_goes_on_in_new_processes(processes, stage):
    for result in processes:
        resumed, straight = result[str(stage)]["resumed"], result[str(stage)]["state"]
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_broken_checkpoint_is_refused(processes, folder, tmp_path):
    copy = shutil.copytree(folder / "stage-2", tmp_path / "copy")
    with pytest.raises(InputError, match=r"no student's names begin with ''.*student\.embeddings"):
        convert_checkpoint(copy)
    expert = copy / f"global_step{EXPERT_STEPS}" / "layer_1_expert_2_mp_rank_00_model_states.pt"
    expert.write_bytes(expert.read_bytes()[:100])
    with pytest.raises(InputError, match=r"layer_1_expert_2_mp_rank_00_model_states.pt is not a file"):
        convert_checkpoint(copy, "student.")
    expert.unlink()
    with pytest.raises(InputError, match="is incomplete: it has 7 files of experts, not 8"):
        convert_checkpoint(copy, "student.")


def test_what_is_no_checkpoint_of_spread_experts_is_refused(tmp_path):
    with pytest.raises(InputError, match="no file `latest`"):
        convert_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(InputError, match=r"mp_rank_00_model_states.pt is not a file"):
        convert_checkpoint(tmp_path)
    (tmp_path / "global_step1").mkdir()
    torch.save({"module": {}, "num_experts": []}, tmp_path / "global_step1" / "mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match=r"no experts.*zero_to_fp32"):
        convert_checkpoint(tmp_path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"module": Harm()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="Weights only load failed"):
        convert_checkpoint(tmp_path, tag=".")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 3, 3, 1), r"student.expert_parallel_size: 3 .* 4 experts .*Choose one of \[1, 2, 4\]"),
        ((4, 2, 1, 1), "a number of processes that it divides, and there is 1. .*--nproc_per_node 2"),
        ((4, 2, 3, 1), "a number of processes that it divides, and there are 3"),
        ((4, 2, 2, None), "needs DeepSpeed.*training.deepspeed"),
        ((4, 2, 2, 3), "does not work with ZeRO stage 3.*zero_optimization.stage: 2"),
    ],
)
def test_what_cannot_be_trained_is_refused(numbers, message):
    with pytest.raises(ConfigurationError, match=message):
        check_expert_parallelism(*numbers)


def test_deepspeed_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distillabse\[deepspeed\]'"):
        check_expert_parallelism(4, 2, 2, 2)


def test_one_process_is_refused_and_a_share_of_one_changes_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    student = crowded_student()
    with pytest.raises(ConfigurationError, match="there is 1"):
        shard_experts(student, 2, zero_stage=1)
    shard_experts(student, 1, zero_stage=3)
    state, expected = gathered_state_dict(student), student.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
