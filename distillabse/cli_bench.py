"""The command that measures: a job against its teacher, or any encoders against a baseline."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from distillabse.errors import ConfigurationError

if TYPE_CHECKING:
    from distillabse.config import BenchConfig


def bench(
    target: Annotated[str, typer.Argument(metavar="CONFIG|BASELINE", help="A job, or the encoder to compare with.")],
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENCODER|KEY=VALUE]...",
            help="Encoders, each a place or name=place; and settings, e.g. threads=1.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Compare encoders on this file.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The comparison's folder.")] = Path("comparison"),
    protocol: Annotated[Literal["standard", "thesis"], typer.Option(help="Grid or thesis.")] = "standard",
    lengths: Annotated[str | None, typer.Option(help="Tokens of texts: 16,64 or own.")] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where encoders run.")] = None,
    training_text: Annotated[Path | None, typer.Option(help="No text may be in this.")] = None,
    to_json: Annotated[Path | None, typer.Option("--json", help="Also here; - to print.")] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="Measure tasks instead of speed.")] = False,
    against: Annotated[list[str] | None, typer.Option(help="--tasks: also name=path.", show_default=False)] = None,
    only: Annotated[list[str] | None, typer.Option(help="--tasks: only this one.", show_default=False)] = None,
    mteb: Annotated[list[str] | None, typer.Option(help="Run this task of mteb.", show_default=False)] = None,
) -> None:
    """Measure a job against its teacher, or encoders against a baseline; exit status 1 when a guard fails.

    Example: distillabse bench packaged:all-MiniLM-L6-v2 runs/quickstart/bundle --texts sentences.txt
    """
    given = others or []
    if (against or only) and not tasks:
        raise ConfigurationError("--against and --only belong to --tasks; give it, too.")
    if tasks and mteb:
        raise ConfigurationError("--tasks and --mteb are two measurements; give one of them.")
    if mteb:
        from distillabse.mteb_adapter import run_mteb

        Console().print(run_mteb(target, given, mteb))
    elif tasks:
        _bench_tasks(target, given, against or [], only or [])
    elif texts is not None:
        _require_encoder(target)
        keys = {"lengths": _lengths(lengths), "device": device}
        overrides = [f"{key}={value}" for key, value in keys.items() if value is not None]
        places, config = _split(given, overrides)
        _compare([target, *places], texts, output, config, protocol, training_text, to_json)
    else:
        if training_text or to_json or lengths or device or protocol != "standard":
            raise ConfigurationError("--texts is missing: these options are for encoders. A job has `bench.` keys.")
        _bench_job(target, given)


def _compare(
    given: Sequence[str],
    texts: Path,
    output: Path,
    config: BenchConfig,
    protocol: Literal["standard", "thesis"],
    training_text: Path | None,
    to_json: Path | None,
) -> None:
    from distillabse.evaluation.comparison import PAGE, RESULT, compare_files
    from distillabse.evaluation.comparison_view import comparison_tables, failure_lines
    from distillabse.evaluation.guards import require_trusted
    from distillabse.storage import write_json

    result = compare_files(given, texts, output, config, protocol=protocol, training_text=training_text)
    to_standard_output = str(to_json) == "-"
    console = Console(stderr=to_standard_output)
    for table in comparison_tables(result):
        console.print(table)
        console.print()
    for cell in result["left_out"]:
        console.print(f"Batch {cell['batch']} was left out: {cell['reason']}.", soft_wrap=True)
    for name, reason in result["fidelity_left_out"].items():
        console.print(f"No fidelity of {name}: {reason}", soft_wrap=True, markup=False)
    for line in failure_lines(result):
        console.print(line, soft_wrap=True)
    console.print(f"Page: [bold]{output / PAGE}[/bold]   Figures: {output / RESULT}", soft_wrap=True)
    if to_standard_output:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    elif to_json is not None:
        write_json(to_json, result)
    require_trusted(result["guards"], str(output / RESULT))


def _require_encoder(target: str) -> None:
    from distillabse.settings import is_config

    if is_config(target):
        raise ConfigurationError(f"{target} is a configuration, which has texts of its own. Leave --texts out.")


def _bench_job(config: str, overrides: Sequence[str]) -> None:
    from distillabse.evaluation.guards import require_trusted
    from distillabse.pipeline import prepare, run_stage
    from distillabse.settings import is_config, load_config
    from distillabse.storage import read_json

    if not is_config(config):
        raise ConfigurationError(
            f"{config!r} is no configuration. To compare it as an encoder with others, say on which texts: "
            f"distillabse bench {config} ENCODER --texts FILE."
        )
    job = load_config(config, overrides)
    folder = prepare(job)
    run_stage("bench", job, folder)
    require_trusted(read_json(folder.measurements)["guards"], str(folder.measurements))


def _bench_tasks(config: str, overrides: Sequence[str], against: list[str], only: list[str]) -> None:
    from distillabse.pipeline import prepare
    from distillabse.settings import load_config
    from distillabse.tasks.run import bench_tasks, named_places
    from distillabse.tasks.views import task_tables

    job = load_config(config, overrides)
    folder, console = prepare(job), Console()
    result = bench_tasks(job, folder, against=named_places(against), only=only)
    for table in task_tables(result):
        console.print(table)
        console.print()
    console.print(f"Scores: [bold]{folder.task_scores}[/bold]", soft_wrap=True)


def _split(given: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], Any]:
    """The places among the arguments, and the settings that the others and the options make."""
    from distillabse.config import BenchConfig
    from distillabse.settings import load_bench

    def is_setting(item: str) -> bool:
        key, separator, _ = item.partition("=")
        return bool(separator) and (key.startswith("bench.") or key in BenchConfig.model_fields)

    settings = [item for item in given if is_setting(item)]
    return [item for item in given if item not in settings], load_bench([*settings, *overrides])


def _lengths(given: str | None) -> str | None:
    if given is None:
        return None
    return f"[{','.join('null' if part.strip() == 'own' else part.strip() for part in given.split(','))}]"
