"""The command line, one thin command per stage.

Exit status: 0 done, 1 a gate failed, 2 wrong use or configuration, 3 a job that broke, for
instance on a full disk, 143 a training that a signal stopped in good order.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from distillabse.cli_bench import bench
from distillabse.cli_configs import configs_app
from distillabse.cli_doctor import doctor
from distillabse.cli_encode import encode
from distillabse.cli_finetune import finetune
from distillabse.cli_ship import demo, export, push
from distillabse.cli_verify import verify
from distillabse.errors import DistillabseError, GateFailed

if TYPE_CHECKING:
    from distillabse.config import JobConfig

app = typer.Typer(
    name="distillabse",
    help="Compress a sentence encoder into a small fast student, and prove what was kept.\n\n"
    "Example: distillabse run quickstart",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(configs_app, name="configs")

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped configuration.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. training.max_steps=100", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from distillabse import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def settings(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what libraries log, too.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="As launchers give it.")] = 0,
) -> None:
    """Set up logging; of several processes the main one alone tells what it does, and does what is not training."""
    from distillabse.processes import is_main

    if not is_main() and context.invoked_subcommand not in ("run", "assistant", "distill", "quantize"):
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%X")],
        force=True,
    )
    logging.getLogger("distillabse").setLevel(logging.INFO if is_main() else logging.WARNING)
    if not verbose:
        # Where DeepSpeed is installed, accelerate imports it, and on a machine without a GPU it says so every time.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage again.")] = False,
    until: Annotated[str | None, typer.Option(help="Stop after this stage, e.g. distill.")] = None,
) -> None:
    """Run the whole job; stages whose inputs have not changed are skipped, and interrupted training goes on.

    Example: distillabse run quickstart training.num_train_epochs=1
    """
    from distillabse.evaluation.report import summary_table
    from distillabse.pipeline import run_job
    from distillabse.processes import is_main
    from distillabse.storage import read_json

    folder = run_job(_load(config, overrides), force=force, until=until)
    if not is_main() or until not in (None, "report"):
        return
    console = Console()
    console.print(summary_table(read_json(folder.report_json)))
    console.print(f"Report: [bold]{folder.report_html}[/bold]   Bundle: [bold]{folder.bundle}[/bold]", soft_wrap=True)


@app.command()
def corpus(config: Config, overrides: Overrides = None) -> None:
    """Read, clean and split the text.

    Example: distillabse corpus labse-opensubtitles corpus.max_sentences=100000
    """
    from distillabse.corpus.build import counts_table
    from distillabse.storage import read_json

    folder = _stage("corpus", config, overrides)
    Console().print(counts_table(read_json(folder.corpus_counts)))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    speedup: Annotated[float | None, typer.Option(help="Times the teacher's speed in ONNX Runtime fp32.")] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size at which it must be reached.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure everything again.")] = False,
) -> None:
    """Measure students of many shapes before training one; exit status 1 when none is fast enough.

    Example: distillabse plan quickstart --speedup 4 --batch 1
    """
    from distillabse.evaluation.plan_views import plan_table
    from distillabse.layout import RunFolder
    from distillabse.pipeline import run_plan
    from distillabse.storage import read_json

    asked = {"plan.speedup": speedup, "plan.batch": batch}
    given = [f"{key}={value}" for key, value in asked.items() if value is not None]
    job = _load(config, [*(overrides or []), *given])
    folder, console = RunFolder(job.run_folder), Console()
    try:
        run_plan(job, force=force)
    except GateFailed:  # what was measured is worth seeing all the same
        console.print(plan_table(read_json(folder.plan_result)))
        raise
    console.print(plan_table(read_json(folder.plan_result)))
    block = folder.planned_student.read_text(encoding="utf-8")
    console.print(f"\n{block}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Student block: [bold]{folder.planned_student}[/bold]   Figure: {folder.plan_figure}", soft_wrap=True
    )


@app.command()
def vocabulary(config: Config, overrides: Overrides = None) -> None:
    """Count what the corpus uses of the teacher's vocabulary, and trim it where the configuration says so.

    Example: distillabse vocabulary quickstart vocabulary.kind=trim vocabulary.size=8000
    """
    from distillabse.storage import read_json
    from distillabse.vocabulary.stage import vocabulary_table

    folder = _stage("vocabulary", config, overrides)
    Console().print(vocabulary_table(read_json(folder.vocabulary_counts)))


@app.command()
def assistant(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train the teacher assistant, where the configuration has one.

    Example: distillabse assistant labse-small --resume
    """
    _stage("assistant", config, overrides, resume=resume)


@app.command()
def distill(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train the student.

    Example: distillabse distill quickstart --resume
    """
    _stage("distill", config, overrides, resume=resume)


@app.command()
def quantize(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train the student with rounded weights and activations, where the configuration says so, for a static INT8 graph.

    Example: distillabse quantize my.yaml --resume
    """
    _stage("quantize", config, overrides, resume=resume)


app.command()(export)
app.command()(verify)
app.command()(bench)


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Write report.html, report.json and the bundle's model card.

    Example: distillabse report quickstart
    """
    from distillabse.evaluation.report import summary_table
    from distillabse.storage import read_json

    folder = _stage("report", config, overrides)
    console = Console()
    console.print(summary_table(read_json(folder.report_json)))
    console.print(f"Report: [bold]{folder.report_html}[/bold]", soft_wrap=True)


app.command()(encode)
app.command()(finetune)
app.command()(push)
app.command()(demo)
app.command()(doctor)


@app.command()
def validate(config: Config, overrides: Overrides = None) -> None:
    """Check a configuration, TrainingArguments and the student's shape included, without running anything.

    Example: distillabse validate my.yaml training.learning_rate=1e-4
    """
    import tempfile

    from distillabse.requirements import require_fitting_shapes
    from distillabse.settings import config_hash, training_arguments, trainings_of

    job = _load(config, overrides)
    require_fitting_shapes(job)
    with tempfile.TemporaryDirectory() as folder:
        for trained in trainings_of(job):
            training_arguments(trained, Path(folder))
    typer.echo(f"{config} is valid (hash {config_hash(job)[:12]}).")


def main() -> None:
    """Run the command line and turn errors into messages and exit statuses."""
    try:
        app()
    except DistillabseError as error:
        Console(stderr=True).print(f"[bold red]Error:[/bold red] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)


def _stage(name: str, config: str, overrides: list[str] | None, *, resume: bool = False) -> Any:
    from distillabse.pipeline import prepare, run_stage

    job = _load(config, overrides)
    folder = prepare(job)
    run_stage(name, job, folder, resume=resume)
    return folder


def _load(config: str, overrides: list[str] | None) -> JobConfig:
    from distillabse.settings import load_config

    return load_config(config, overrides or [])


def _escaped(message: str) -> str:
    from rich.markup import escape

    return escape(message)
