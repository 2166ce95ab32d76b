"""A Switch student in ordinary ZeRO on two processes, each using one expert alone, trains as it does in one process."""

import pytest
import torch
from switch_worker import ZERO_STEPS, held_out_vectors, in_one_process, launch, separating_student

STAGES = ("1", "2", "3")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return launch("zero", tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def reference():
    return in_one_process(separating_student(), ZERO_STEPS, separate=True)


def test_every_process_uses_one_expert_alone_and_drops_what_is_over_its_capacity(processes, reference):
    for stage in STAGES:
        figures = torch.stack([result[stage]["figures"] for result in processes])
        assert torch.equal(figures[:, :2] > 0, torch.eye(2, dtype=torch.bool))
        assert (figures[:, 3] > 50).all()
        torch.testing.assert_close(figures, reference[2])


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_are_those_of_one_process(processes, reference, stage):
    losses, state, _ = reference
    both = [sum(pair) / 2 for pair in zip(*(result[stage]["losses"] for result in processes), strict=True)]
    assert both == pytest.approx(losses, abs=1e-5)
    begin = separating_student().state_dict()
    for result in processes:
        assert result[stage]["state"].keys() == state.keys()
        for name, weight in result[stage]["state"].items():
            torch.testing.assert_close(weight, state[name], atol=1e-5, rtol=0, msg=lambda text, name=name: name + text)
            if "experts" in name:  # both experts learn, each from one process
                assert ((weight - begin[name]).abs().flatten(1).amax(1) > 0.01).all()


@pytest.mark.parametrize("stage", STAGES)
def test_vectors_in_evaluation_are_those_of_one_process(processes, reference, stage):
    expected = held_out_vectors(reference[1], separating_student())
    for result, vectors in zip(processes, expected, strict=True):
        torch.testing.assert_close(result[stage]["vectors"], vectors, atol=1e-5, rtol=0)
