"""What the tests of gates share: bundles to plant faults in, and what the gates say of them."""

import json

import onnx

from distillabse.config import GatesConfig
from distillabse.verification.examine import bundle_checks
from distillabse.verification.gates import Findings, failed_gates, run_checks
from distillabse.verification.subject import Subject

# Weights of the tiny encoders are drawn wide, and INT8 keeps them less well than trained ones.
LIMITS = GatesConfig(int8_to_fp32_mean=0.99)


def findings_of(subject, sections=None):
    """What all checks find, or those of some sections."""
    findings = Findings()
    checks = bundle_checks(subject, LIMITS)
    run_checks([check for check in checks if sections is None or check.section in sections], findings)
    return findings


def examined(bundle, texts, *sections):
    """The result of all checks, or of those of some sections."""
    return findings_of(Subject(bundle, texts, "texts"), sections or None).result()


def failed(bundle, texts, *sections):
    """(gate, artefact) of what failed."""
    result = examined(bundle, texts, *sections)
    assert result["gates"] and result["passed"] is (not failed_gates(result["gates"]))
    json.dumps(result, allow_nan=False)
    return {(gate["gate"], gate["artefact"]) for gate in failed_gates(result["gates"])}


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_graph(path, change):
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(path))
