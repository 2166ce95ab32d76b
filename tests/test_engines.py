"""What `benchmarks/engines.py` concludes from its measurements."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from engines import NNCF, claims, fidelity_to_torch

OURS, OTHER = "ours, qint8, ONNX Runtime", "fastembed, our ONNX fp32"
KEPT = {OURS: {"mean": 0.999}, NNCF: {"mean": 0.99}, OTHER: {"mean": 1.0}}


def row(milliseconds, against_nncf):
    return [{"batch": 1, "p50_ms": milliseconds, "speedup_vs_nncf_openvino_int8": against_nncf}]


@pytest.mark.parametrize(
    ("ours", "against_nncf", "other", "expected"),
    [
        (1.0, 0.96, 1.1, [True, True, True]),
        (1.0, 0.94, 1.1, [False, True, True]),
        (1.0, 1.20, 0.9, [True, True, False]),
    ],
)
def test_claims_follow_the_figures(ours, against_nncf, other, expected):
    latency = {OURS: row(ours, against_nncf), NNCF: row(1.0, 1.0), OTHER: row(other, 1.0)}
    assert list(claims(latency, KEPT).values()) == expected


def test_a_less_true_graph_is_no_success():
    latency = {OURS: row(1.0, 1.0), NNCF: row(1.0, 1.0), OTHER: row(2.0, 0.5)}
    found = claims(latency, {**KEPT, OURS: {"mean": 0.98}})
    assert [holds for claim, holds in found.items() if "truer" in claim] == [False]


def test_fidelity_sees_a_vector_that_depends_on_its_batch():
    torch = np.eye(4, dtype=np.float32)
    found = {"together": torch, "alone": torch[:2] + np.array([[0, 0, 0, 0], [1, 0, 0, 0]], dtype=np.float32)}
    kept = fidelity_to_torch(found, {"together": torch})
    assert kept["mean"] == kept["min"] == pytest.approx(1)
    assert kept["alone_to_batch_min"] == pytest.approx(np.sqrt(0.5))
