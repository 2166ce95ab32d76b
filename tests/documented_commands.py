"""Carrying out a documented command as it is written: in this process, by bash, or, where neither can be, checked."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from documentation import ROOT, words

from distillabse import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

# What bash does by itself, and pipes of commands that need no stand-ins.
BY_BASH = re.compile(r"(cat|cp|printf|export|alias|ls|head|sha256sum) |distillabse (encode|configs) .*[|>]")
_PLACEHOLDERS = {"CONFIG": "quickstart", "BUNDLE": "runs/quickstart/bundle", "NAME": "quickstart"}


class WrongCommand(AssertionError):
    """A command that does not end well, or that nothing can be said of."""


@dataclass(frozen=True)
class NotRun:
    """Commands that cannot be carried out here.

    Attributes:
        pattern: what they begin with.
        reason: why not.
        check: what is looked at instead; raises where something is wrong.
    """

    pattern: str
    reason: str
    check: Callable[[list[str]], None]

    def matches(self, command: str) -> bool:
        return re.match(self.pattern, command) is not None


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a command, as the real parser reads it.

    Raises:
        click.UsageError: there is no such command, option or argument.
    """
    command: Any = typer.main.get_command(cli.app)
    context, names = command.make_context("distillabse", list(arguments)), []
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        names.append(str(name))
        context = command.make_context(name, rest, parent=context)
    return " ".join(names), dict(context.params)


def check_distillabse(arguments: list[str]) -> None:
    """The command, its options, its configuration with the overrides, and the stage that it names."""
    from distillabse.pipeline import stages_of
    from distillabse.settings import load_config

    _, parameters = parsed([_PLACEHOLDERS.get(word, word) for word in arguments])
    config = parameters.get("config") or parameters.get("target")  # of `verify` and `bench`, which take folders, too
    if config and not Path(config).is_dir() and not parameters.get("texts"):
        job = load_config(config, parameters.get("overrides") or parameters.get("others") or [])
        if (until := parameters.get("until")) and until not in stages_of(job):
            raise WrongCommand(f"there is no stage {until}")


def check_torchrun(line: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(line[1:])
    assert read.module and read.training_script == "distillabse", read.training_script
    check_distillabse(read.training_script_args)


def check_deepspeed(line: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    read = parse_args(line[1:])
    assert read.module and read.user_script == "distillabse", read.user_script
    check_distillabse(read.user_args)


def check_sbatch(line: list[str]) -> None:
    """Variables before it, options of sbatch, the script, and a configuration with overrides."""
    variables = line[: line.index("sbatch")]
    script_text = (ROOT / "configs" / "slurm" / "distill.sbatch").read_text(encoding="utf-8")
    for variable in variables:
        assert variable.partition("=")[0] in script_text, variable
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("script")
    read, rest = parser.parse_known_args(line[line.index("sbatch") + 1 :])
    assert (ROOT / "configs" / "slurm" / read.script).is_file(), read.script
    check_distillabse(["run", *rest])


def check_docker(line: list[str]) -> None:
    """Files of a build; folders of this project that a container is given."""
    if line[1] == "build":
        assert (ROOT / line[line.index("-f") + 1]).is_file(), line
        assert line[line.index("-t") + 1] in _images(), line
        return
    assert line[1] == "run", line
    for folder in re.findall(r"\$PWD/(\S+?):", " ".join(line)):
        assert Path(folder).is_dir(), folder


def check_compose(line: list[str]) -> None:
    """`compose run --rm SERVICE [arguments of distillabse]`; without arguments the service has its own."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert line[1:3] == ["run", "--rm"] and line[3] in services, line
    check_distillabse(line[4:] or services[line[3]]["command"])


def check_image(line: list[str]) -> None:
    """A command that makes another form of an image of this project."""
    named = [word.split(":", 1)[1].removeprefix("//") for word in line if re.match(r"docker(d|-daemon):", word)]
    assert named and set(named) <= _images(), line


def check_pip(line: list[str]) -> None:
    """Every extra of this project that is asked for exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package in line[line.index("install") + 1 :]:
        if found := re.fullmatch(r"(?:distillabse|\.)\[([\w,-]+)\]", package):
            missing = set(found[1].split(",")) - set(project["optional-dependencies"])
            assert not missing, f"there is no extra {missing}"


def check_make(line: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in line[1:]:
        variable = word.partition("=")[0] if "=" in word else None
        found = re.search(rf"^{variable} \?=" if variable else rf"^{word}:", makefile, re.MULTILINE)
        assert found, f"the Makefile has no {word}"


def check_hf(line: list[str]) -> None:
    """The hub's program has this command."""
    names = [word for word in line[1:] if re.fullmatch(r"[a-z-]+", word)]
    program = Path(sys.executable).parent / "hf"
    assert not subprocess.run([program, *names, "--help"], capture_output=True).returncode, line


def check_benchmark(line: list[str]) -> None:
    """The script is there, and knows the options."""
    script = ROOT / line[1]
    assert script.is_file(), f"there is no {line[1]}"
    folder = script.parent
    text = script.read_text(encoding="utf-8")
    imported = [folder / f"{name}.py" for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)]
    known = "".join(path.read_text(encoding="utf-8") for path in [script, *filter(Path.is_file, imported)])
    for word in line[2:]:
        assert not word.startswith("--") or f'"{word}"' in known, f"{line[1]} has no option {word}"


def check_nothing(line: list[str]) -> None:
    """Of a program of others there is nothing to look at."""


def check_arguments(line: list[str]) -> None:
    check_distillabse(line[1:])


def _images() -> set[str]:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return {service["image"] for service in services.values()}


NOT_RUN = [
    NotRun(r"make ", "it installs everything from a package registry; `make quickstart` is in .ci/run", check_make),
    NotRun(r"pip install ", "it needs a package registry", check_pip),
    NotRun(r"distillabse doctor --device cuda", "it needs an NVIDIA GPU", check_arguments),
    NotRun(r"torchrun ", "it needs several GPUs or nodes; tests/test_distributed.py runs processes", check_torchrun),
    NotRun(r"deepspeed ", "it needs several GPUs or nodes", check_deepspeed),
    NotRun(r"(\w+=\S.* )?sbatch ", "it needs Slurm; tests/test_slurm.py runs the script", check_sbatch),
    NotRun(r"docker ", "it needs a Docker engine", check_docker),
    NotRun(r"compose ", "it needs a Docker engine", check_compose),
    NotRun(r"(enroot|apptainer) ", "it needs the image and a container runtime", check_image),
    NotRun(r"curl ", "it needs a server that a container runs", check_nothing),
    NotRun(r"hf ", "it needs an account of the hub and a network", check_hf),
    NotRun(r"python benchmarks/", "it takes a quiet machine and minutes to hours", check_benchmark),
]
# Extras that `make install` leaves out: where a package is absent, the command is checked alone.
NEEDS_PACKAGE = {
    r".* --mteb ": "mteb",
    r".*baselines=.*static": "model2vec",
    r".*single-file": "onnxruntime_extensions",
}


def carry_out(command: str, call: Callable[[list[str]], int]) -> str:
    """Run or check a command in the working directory, and say which: "run", "by bash", or the reason why not.

    Args:
        command: as it is written.
        call: runs `distillabse` with these arguments, and returns its exit status.

    Raises:
        WrongCommand: it fails, or it is neither run nor listed.
    """
    for listed in NOT_RUN:
        if listed.matches(command):
            _checked(command, listed.check)
            return listed.reason
    if absent := [name for pattern, name in NEEDS_PACKAGE.items() if re.match(pattern, command) and not _there(name)]:
        _checked(command, check_arguments)
        return f"it needs {absent[0]}"
    if BY_BASH.match(command):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], env=environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise WrongCommand(f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return "by bash"
    line = words(command)
    if line[0] != "distillabse":
        raise WrongCommand(f"{command}: neither run nor listed in NOT_RUN of {Path(__file__).name}")
    if status := call(line[1:]):
        raise WrongCommand(f"{command}: exit status {status}")
    return "run"


def _there(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _checked(command: str, check: Callable[[list[str]], None]) -> None:
    try:
        check(words(command))
    except SystemExit as error:  # how argparse says no
        raise WrongCommand(f"{command}: refused by its parser ({error})") from error
    except Exception as error:
        raise WrongCommand(f"{command}: {type(error).__name__}: {error}") from error


def environment() -> dict[str, str]:
    """For bash: `distillabse` and `python` are those of this checkout, laid out as the wheel lays it out."""
    installed = Path("installed").resolve()
    return {**os.environ, "PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(installed)}


def install(folder: Path) -> None:
    """What `environment` names: links to the package, to what the wheel adds to it, and two programs."""
    package = folder / "distillabse"
    package.mkdir(parents=True)
    for path in (ROOT / "distillabse").iterdir():
        (package / path.name).symlink_to(path)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    for source, target in wheel["force-include"].items():
        (folder / target).symlink_to(ROOT / source)
    programs = {"python": "", "distillabse": " -m distillabse"}
    (folder / "bin").mkdir()
    for name, options in programs.items():
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{options} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
