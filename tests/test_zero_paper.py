"""The memory in docs/scaling.md: reckoned as in the ZeRO paper, and measured as benchmarks/results has it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import zero_paper  # noqa: E402


@pytest.mark.parametrize(
    ("stage", "gigabytes"),
    # Figure 1 of arXiv:1910.02054: 7.5 billion parameters, 64 GPUs, K = 12.
    [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)],
)
def test_the_formula_gives_the_figures_of_the_paper(stage, gigabytes):
    held = zero_paper.bytes_per_parameter(stage, 64, **zero_paper.MIXED)
    assert held * 7.5 == pytest.approx(gigabytes, abs=0.05)


def test_on_one_gpu_every_stage_holds_sixteen_bytes():
    assert {zero_paper.bytes_per_parameter(stage, 1, **zero_paper.MIXED) for stage in range(4)} == {16}
    assert zero_paper.bytes_per_parameter(0, 1, **zero_paper.FP32) == 16


def test_frozen_weights_have_neither_gradients_nor_state():
    assert zero_paper.training_bytes(0, 100) == 400
    assert zero_paper.training_bytes(0, 100, stage=2, gpus=8) == 200
    assert zero_paper.training_bytes(0, 100, stage=3, gpus=8) == 25
    assert zero_paper.training_bytes(8, 0, stage=1, gpus=8) == 8 * 4 + 12


def test_parameters_are_counted_on_the_jobs_that_are_shipped():
    jobs = zero_paper.jobs()
    table, layer, width = 501_153 * 768, 7_087_872, 768
    rest = 512 * width + 2 * width + 2 * width  # positions, token types, normalisation
    head = width * width + width
    frozen, trained, *_ = [student for _, student, _ in jobs]
    assert zero_paper.trained_and_frozen(frozen) == (3 * layer + head, table + rest + head)
    assert zero_paper.trained_and_frozen(trained) == (3 * layer + head + table + rest, head)
    teacher = jobs[0][2]
    # LaBSE as the hub has it: 470,926,848 in BertModel, its own pooler included, and the head.
    assert sum(zero_paper.trained_and_frozen(teacher)) == 470_926_848 + head
    assert jobs[3][2][0].config.num_hidden_layers == 12 and jobs[3][2][0].config.hidden_size == 384


def test_the_documents_hold_this_table():
    assert zero_paper.paper_table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "benchmarks" / "results" / "zero_memory.json").read_text(encoding="utf-8"))["ways"]


def test_the_measured_table_is_that_of_the_results(measured):
    lines = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    written = {row[0].replace("`", ""): row[1:] for row in rows if len(row) == 10}
    for name, way in measured.items():
        process = way["processes"][-1]
        kinds = ("weights", "gradients", "moments", "float32 copy", "teacher")
        held = [f"{process['held']['before'][kind] / 1e6:,.0f}" for kind in kinds]
        resident = [
            f"{process['resident'][moment] / 1e6:,.0f} ({process['resident_to_ddp'][moment]:.2f})"
            for moment in ("between", "before", "after", "peak")
        ]
        assert written[name] == [*held, *resident]


def test_the_measured_shares_are_those_of_the_stages(measured):
    for name, way in measured.items():
        for process in way["processes"]:
            trained, held = process["trained_parameters"], process["held"]
            share = 2 if way["zero_stage"] else 1
            assert held["before"]["moments"] == pytest.approx(8 * trained / share, rel=1e-3), name
            copied = 4 * trained / 2 if way["zero_stage"] else 0
            assert held["before"]["float32 copy"] == pytest.approx(copied, rel=1e-3), name
            whole = (way["zero_stage"] or 0) < 2  # while gradients are accumulated
            assert held["between"]["gradients"] == pytest.approx(4 * trained / (1 if whole else 2), rel=0.1), name
