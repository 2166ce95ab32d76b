"""The documentation is true: its commands and code run, its links lead somewhere, the keys that it names exist.

Commands meet small models and texts (stand_ins.py). What cannot run on any machine is in NOT_RUN of
documented_commands.py with the reason, and is checked as far as can be. A command that is neither is a failure.
"""

import ast
import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import stand_ins
import yaml
from documentation import (
    PAGES,
    ROOT,
    SHELLS,
    all_blocks,
    commands,
    inline_code,
    page_text,
    without_comment,
    words,
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


@pytest.mark.parametrize("page", PAGES)
def test_commands_inside_a_sentence_have_real_names_and_options(page, sandbox):
    for code in inline_code(page):
        checked_inline(code)


def checked_inline(code):
    """Check a command that stands in a sentence, perhaps without its arguments; whether it is a command at all."""
    line = (
        words(without_comment(code)) if re.match(r"(distillabse|python benchmarks/|pip install|make) ?", code) else []
    )
    if code.startswith("python benchmarks/"):
        check_benchmark([word.strip("[]") for word in line])
    elif line[:2] == ["pip", "install"]:
        check_pip(line)
    elif line[:1] == ["make"] and len(line) > 1:
        check_make(line)
    elif line[:1] == ["distillabse"] and len(line) > 1 and not re.search(r"[.…]{2}|COMMAND", code):
        try:
            check_distillabse(line[1:])
        except Exception as error:
            if type(error).__name__ != "MissingParameter":
                raise WrongCommand(f"{code}: {error}") from error
    else:
        return False
    return True


def test_commands_in_sentences_are_found_and_wrong_ones_caught(sandbox):
    assert sum(checked_inline(code) for page in PAGES for code in inline_code(page)) > 60
    for wrong in ("distillabse verify BUNDLE --txts", "make nothing", "python benchmarks/int8.py --dota data",
                  "pip install 'distillabse[cqu]'", "distillabse distil"):  # fmt: skip
        with pytest.raises((WrongCommand, AssertionError)):
            checked_inline(wrong)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("distillabse encode runs/quickstart/bundle texts.txt --out vectors.npy", "exit status 2"),
        ("distillabse bundle runs/quickstart/bundle", "exit status 2"),
        ("distillabse verify my.yaml gates.teacher_skil=0.9", "exit status 2"),
        ("distillabse run my.yml", "exit status 2"),
        ("torchrun --nproc_per_node 8 --module distillabse run my.yaml training.deepsped=zero2", "deepsped"),
        ("torchrun --nproc_per_nodes 8 --module distillabse run my.yaml", "refused by its parser"),
        ("deepspeed --module distillabse run my.yaml --until distil", "no stage distil"),
        ("sbatch --nodes 4 distil.sbatch my.yaml", "distil.sbatch"),
        ("docker build -f docker/gpu.Dockerfile -t distillabse:train .", "Dockerfile"),
        ("compose run --rm gpu run my.yaml", "gpu"),
        ("compose run --rm cpu bench my.yaml bench.thread=1", "thread"),
        ("pip install 'distillabse[cuda]'", "cuda"),
        ("make quick", "quick"),
        ("hf auth logon", "logon"),
        ("cat text.txt | distillabse encode runs/quickstart/bundle > vectors.jsonl", "status 1"),
        ("cat texts.txt | distillabse encode runs/quickstart/bundel > vectors.jsonl", "status 2"),
        ("wget https://example.org/data.zip", "neither run nor listed"),
    ],
)
def test_a_wrong_command_is_caught(command, words, sandbox):
    with pytest.raises(WrongCommand, match=re.escape(words)):
        carry_out(command, call)


def test_every_reason_for_not_running_a_command_is_in_use():
    given = [command for block in SHELL_BLOCKS for command in commands(block)]
    given += [code for page in PAGES for code in inline_code(page)]
    assert [listed.pattern for listed in NOT_RUN if not any(map(listed.matches, given))] == []


def namespace(page):
    """What the code of a page is given by the text around it."""
    from distillabse.encoder import Encoder

    bundle = "runs/quickstart/bundle"
    if page == "docs/encoder.md":
        found = []
        return {"lines": lambda: ["Where is the station?"] * 9, "index": type("Index", (), {"add": found.append})}
    if page == "docs/mteb.md":
        import mteb

        return {"task": mteb.get_task("STSBenchmark")}
    return {"folder": Path(bundle), "encoder": Encoder(bundle)}


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON_BLOCKS} - set(PYTHON_ELSEWHERE)))
def test_the_code_of_a_page_runs_in_its_order(page, sandbox):
    if (package := PYTHON_NEEDS_PACKAGE.get(page)) and find_spec(package) is None:
        pytest.skip(f"needs {package}")
    names = namespace(page)
    for block in PYTHON_BLOCKS:
        if block.page == page:
            exec(compile(block.text, str(block), "exec"), names)


@pytest.mark.parametrize("page", sorted(PYTHON_ELSEWHERE))
def test_code_that_runs_elsewhere_is_python_and_imports_what_exists(page):
    found = [block for block in PYTHON_BLOCKS if block.page == page]
    assert found
    for block in found:
        tree = ast.parse(block.text, str(block))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("distillabse"):
                exec(compile(ast.Module([node], []), str(block), "exec"), {})


def test_the_quickstart_names_every_file_of_its_run(prepared):
    run = prepared / "runs" / "quickstart"
    first = [
        re.split(r"(?<!\\)\|", line)[1] for line in page_text("docs/quickstart.md").splitlines() if line.startswith("|")
    ]
    named = {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    on_disk = {path.name for path in run.iterdir()} | {f"{path.parent.name}/{path.name}" for path in run.glob("*/*.*")}
    in_bundle = {str(path.relative_to(run / "bundle")) for path in (run / "bundle").rglob("*") if path.is_file()}
    kept = {"bundle", "student", "checkpoints", "stamps"}
    missing = {name for name in on_disk if name.split("/")[0] not in kept | named and name not in named
               and not any(other.startswith(f"{name}/") for other in named)}  # fmt: skip
    assert missing == set()
    assert {name for name in named if "/" in name and not (run / name).exists() and name not in in_bundle} == set()
    # The rest of the bundle are what BERT's own tokenizer adds, and a module without settings.
    assert in_bundle - named == {"vocab.txt", "2_Normalize/config.json"}
