"""The documentation is true: its commands and code run, its links lead somewhere, the keys that it names exist.

Commands meet small models and texts (stand_ins.py). What cannot run on any machine is in NOT_RUN of
documented_commands.py with the reason, and is checked as far as can be. A command that is neither is a failure.
"""

import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import stand_ins
import yaml
from documentation import (
    PAGES,
    ROOT,
    SHELLS,
    all_blocks,
    anchors,
    blocks,
    broken_links,
    commands,
    inline_code,
    page_text,
    without_comment,
    words,
    wrong_key,
)
from documented_commands import (
    NOT_RUN,
    WrongCommand,
    carry_out,
    check_benchmark,
    check_distillabse,
    check_make,
    check_pip,
    install,
)

from distillabse import cli
from distillabse.config import JobConfig
from distillabse.layout import RunFolder
from distillabse.pipeline import STAGES

SHELL_BLOCKS = all_blocks(*SHELLS)
PYTHON_BLOCKS = all_blocks("python")
# Blocks that are not run here: why, and where they are.
PYTHON_ELSEWHERE = {
    "docs/shipping.md": "other programs, each in an environment of its own: benchmarks/consumers",
    "docs/switch.md": "two processes of DeepSpeed: tests/test_switch_processes.py",
}
PYTHON_NEEDS_PACKAGE = {"docs/mteb.md": "mteb"}


def call(arguments):
    """Exit status of `distillabse` with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["distillabse", *arguments])
        cli.main()
    return left.value.code or 0


def measured_as(other):
    """A stage in the place of `bench` that takes its figures from another run folder: one real measurement will do."""
    return lambda config, run: shutil.copytree(RunFolder(other).bench, run.bench)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with everything that the pages name: text, configurations, and the run folders of three jobs."""
    folder = tmp_path_factory.mktemp("documentation")
    stand_ins.make_encoders(folder / "encoders")
    stand_ins.make_texts(folder)
    stand_ins.make_assets(folder / "cache")
    install(folder / "installed")
    mine = yaml.safe_load((ROOT / "configs" / "labse-opensubtitles.yaml").read_text(encoding="utf-8"))
    mine.update(name="my", tasks={"suite": "evaluation-data"})
    (folder / "my.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.use_stand_ins(patch, folder)
        assert call(["run", "quickstart"]) == 0
        patch.setitem(STAGES, "bench", replace(STAGES["bench"], run=measured_as(folder / "runs" / "quickstart")))
        for job in ("my.yaml", "multilingual-minilm"):
            assert call(["run", job]) == 0, job
        for flavor in ("optimum", "tei-int8"):
            assert call(["export", "runs/my/bundle", "--flavor", flavor]) == 0, flavor
    runs = folder / "runs"
    for name in ("labse-opensubtitles", "labse-small", "small"):
        shutil.copytree(runs / "my", runs / name)
    shutil.copytree(runs / "my" / "bundle", folder / "bundle")
    checkpoint = max((runs / "my" / "checkpoints").glob("checkpoint-*"))
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-5000"))
    shutil.copytree(folder / "encoders" / "minilm", folder / "my-student")
    return folder


@pytest.fixture
def sandbox(prepared, tmp_path, monkeypatch):
    """A copy of it as working directory, with stand-ins for the hub and a network in their places."""
    folder = stand_ins.copy_of(prepared, tmp_path / "sandbox")
    stand_ins.use_stand_ins(monkeypatch, folder)
    return folder


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_the_commands_of_a_block_run_in_their_order(block, sandbox):
    wanted = commands(block)
    assert wanted, "an empty block"
    for command in wanted:
        if made := re.match(r"distillabse configs cp \S+ (\S+)", command):
            (sandbox / made[1]).unlink(missing_ok=True)  # a reader who copies it does not have it yet
        carry_out(command, call)
