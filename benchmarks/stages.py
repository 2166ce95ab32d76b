"""The stages of a job that a benchmark needs, run where they are not done yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def run_missing(config: Any, stages: Sequence[str]) -> Any:
    """Run these stages of a job unless they are current, going on from checkpoints; its run folder."""
    from distillabse.pipeline import is_current, prepare, run_stage

    run = prepare(config)
    for stage in stages:
        if not is_current(stage, config, run):
            print(f"{config.name}: {stage}", flush=True)
            run_stage(stage, config, run, resume=True)
    return run
