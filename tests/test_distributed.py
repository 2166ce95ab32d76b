"""Two processes train as one does: plain data parallel and every ZeRO stage; their checkpoints fit one process, too."""

import numpy as np
import pytest
import torch
from distillation_worker import corpus, in_one_process, job, launch
from tiny import tiny_encoder

from distillabse.checksums import broken_checksums
from distillabse.models.teacher import load_encoder
from distillabse.training.checkpoints import Topology, require_same_steps
from distillabse.training.deepspeed import universal_checkpoint

STAGES = ("zero0", "zero1", "zero2", "zero3")
KINDS = ("ddp", *STAGES)
HALF_WAY = 10


def deepspeed(kind):
    return {} if kind == "ddp" else {"deepspeed": kind}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("distributed")
    tiny_encoder(folder / "teacher", layers=3)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return in_one_process(job(folder / "teacher", folder / "one", per_device_train_batch_size=16))


@pytest.fixture(scope="module")
def processes(folder):
    def jobs(suffix, kinds, **settings):
        return {
            kind + suffix: job(folder / "teacher", folder / (kind + suffix), **settings, **deepspeed(kind))
            for kind in kinds
        }

    unmeasured = {"eval_strategy": "no", "save_steps": 30}
    return launch(
        {
            # A process that has used DeepSpeed once does not train without it any more.
            **jobs("-pairs", ("ddp",), on_pairs=True, **unmeasured),
            **jobs("", KINDS),
            **jobs("-sharded", ("zero2", "zero3"), shard_teacher=True, **unmeasured),
            **jobs("-bf16", ("zero1", "zero2", "zero3"), bf16=True, **unmeasured),
            **jobs("-shared", ("zero2",), shared_weight=True, **unmeasured),
            **jobs("-pairs", ("zero2",), on_pairs=True, **unmeasured),
        },
        folder,
    )


@pytest.fixture(scope="module")
def resumed(folder, processes):
    """Every kind from half way, in two processes again."""
    jobs = {}
    for kind in KINDS:
        checkpoint = str(folder / kind / f"checkpoint-{HALF_WAY}")
        jobs[kind] = job(folder / "teacher", folder / f"{kind}-resumed", checkpoint=checkpoint, **deepspeed(kind))
    return launch(jobs, folder, name="resumed")


def closeness(result, expected):
    """Largest difference of the losses, and of the vectors."""
    assert len(result["losses"]) == len(expected["losses"]) == 30
    return (
        np.abs(np.subtract(result["losses"], expected["losses"])).max(),
        np.abs(np.subtract(result["vectors"], expected["vectors"])).max(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_with_twice_the_batch(processes, reference, kind):
    losses, vectors = closeness(processes[kind], reference)
    assert losses < 1e-5 and vectors < 1e-5
    assert processes[kind]["skills"] == pytest.approx(reference["skills"], abs=1e-5)
    assert processes[kind]["cosines"] == pytest.approx(reference["cosines"], abs=1e-5)
    stage = None if kind == "ddp" else int(kind[-1])
    assert processes[kind]["history"] == {
        "processes": 2, "zero_stage": stage, "precision": "fp32", "resumed_from": None,
    }  # fmt: skip
    assert reference["losses"][-1] < 0.6 * reference["losses"][0]  # something was learnt


def test_accumulating_four_batches_equals_one_of_four_times_the_size(folder, reference):
    accumulated = in_one_process(
        job(folder / "teacher", folder / "accumulated", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    )
    losses, vectors = closeness(accumulated, reference)
    assert losses < 1e-5 and vectors < 1e-5


@pytest.mark.parametrize("kind", ("zero2-sharded", "zero3-sharded"))
def test_a_teacher_spread_over_the_processes_teaches_the_same(processes, reference, kind):
    losses, vectors = closeness(processes[kind], reference)
    assert losses < 1e-5 and vectors < 1e-5


@pytest.fixture(scope="module")
def pair_reference(folder):
    return in_one_process(job(folder / "teacher", folder / "one-pairs", per_device_train_batch_size=16, on_pairs=True))


@pytest.mark.parametrize("kind", ("ddp-pairs", "zero2-pairs"))
def test_pairs_of_both_processes_are_compared_with_each_other(processes, pair_reference, kind):
    losses, vectors = closeness(processes[kind], pair_reference)
    first, last = pair_reference["losses"][0], pair_reference["losses"][-1]
    assert losses < 1e-5 * first and vectors < 1e-5
    assert last < 0.9 * first  # something was learnt


def test_stages_train_the_same_student_in_bf16(processes, reference):
    for kind in ("zero1", "zero2", "zero3"):
        losses, vectors = closeness(processes[f"{kind}-bf16"], processes["zero2-bf16"])
        assert losses < 5e-3 and vectors < 5e-3
        assert 1e-5 < closeness(processes[f"{kind}-bf16"], reference)[0] < 0.05
        assert processes[f"{kind}-bf16"]["history"]["precision"] == "bf16"


@pytest.mark.parametrize("kind", [*KINDS, "zero1-bf16", "zero2-bf16", "zero3-bf16", "zero2-shared"])
def test_a_checkpoint_is_the_whole_student_in_float32(folder, processes, kind):
    checkpoint = folder / kind / "checkpoint-30"
    assert broken_checksums(checkpoint) == []
    student = load_encoder(str(checkpoint))
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    np.testing.assert_allclose(student.encode(corpus(10, seed=2)), processes[kind]["vectors"], atol=1e-7)


def test_a_shared_weight_is_still_one_after_training(folder, processes):
    student = load_encoder(str(folder / "zero2-shared" / "checkpoint-30"))
    first, second = student[0].auto_model.encoder.layer
    assert torch.equal(first.attention.self.query.weight, second.attention.self.query.weight)
    assert not torch.equal(first.attention.self.key.weight, second.attention.self.key.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_no_interruption_bit_for_bit(processes, resumed, kind):
    assert resumed[kind]["history"]["resumed_from"] == f"checkpoint-{HALF_WAY}"
    for what in ("losses", "cosines", "skills", "vectors"):
        assert resumed[kind][what] == processes[kind][what]


@pytest.fixture(scope="module")
def alone(folder, processes):
    """Every kind from half way, in one process with twice the batch."""
    jobs = {}
    for kind in ("ddp", "zero1", "zero2", "zero3"):
        checkpoint = folder / kind / f"checkpoint-{HALF_WAY}"
        if kind != "ddp":
            checkpoint = universal_checkpoint(checkpoint, folder / f"{kind}-universal")
        jobs[kind] = job(
            folder / "teacher", folder / f"{kind}-alone", per_device_train_batch_size=16, checkpoint=str(checkpoint),
            **deepspeed(kind),
        )  # fmt: skip
    return launch(jobs, folder, processes=1, name="alone")


@pytest.mark.parametrize("kind", ("ddp", "zero1", "zero2", "zero3"))
def test_one_process_goes_on_from_a_checkpoint_of_two(processes, alone, kind):
    losses, vectors = closeness(alone[kind], processes[kind])
    assert losses < 1e-5 and vectors < 1e-5
    assert alone[kind]["history"]["processes"] == 1


def test_a_checkpoint_says_how_its_steps_were_shared(folder, processes):
    ours = Topology(2, 16, 2)
    assert require_same_steps(folder / "zero2" / "checkpoint-30", ours) == ours
    assert require_same_steps(folder / "ddp" / "checkpoint-30", Topology(1, 16, None)) == Topology(2, 16, None)


def test_there_is_one_set_of_rng_states_for_each_process(folder, processes):
    for kind in KINDS:
        names = {path.name for path in (folder / kind / "checkpoint-30").glob("rng_state*")}
        assert names == {"rng_state_0.pth", "rng_state_1.pth"}
