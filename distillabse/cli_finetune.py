"""The command that fine-tunes encoders on a task and judges them in other languages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    task: Annotated[str, typer.Argument(help="xnli, paws-x or xquad.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. training.learning_rate=1e-4 max_length=256", show_default=False),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="Folder or hub name; repeat it: the first, say the teacher, is compared to."
        ),
    ] = None,
    train: Annotated[Path | None, typer.Option(help="A local table to train on; by default from the hub.")] = None,
    test: Annotated[Path | None, typer.Option(help="A local table to test on; by default from the hub.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Test on this share of --train, e.g. 0.2.")] = None,
    train_language: Annotated[str, typer.Option(help="The language to train on.")] = "en",
    language: Annotated[list[str] | None, typer.Option(help="A language to test in; by default all.")] = None,
    train_revision: Annotated[str | None, typer.Option(help="Revision of the hub's training data.")] = None,
    test_revision: Annotated[str | None, typer.Option(help="Revision of the hub's test data.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat it to fine-tune several times. [default: 42]")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. [default: runs/finetune-TASK]")
    ] = None,
) -> None:
    """Fine-tune encoders on a task in one language, and test them in others without further training.

    Example: distillabse finetune xquad -m sentence-transformers/LaBSE -m runs/labse-small/bundle
    """
    from rich.console import Console

    from distillabse.errors import ConfigurationError
    from distillabse.finetuning.comparison import RESULTS, DataChoice, finetune_folders
    from distillabse.finetuning.scores import results_table
    from distillabse.finetuning.settings import finetuning_settings
    from distillabse.finetuning.tasks import find_task

    found = find_task(task)
    if not model:
        raise ConfigurationError("Name at least one model with --model, the teacher first.")
    settings = finetuning_settings(found, overrides or [])
    choice = DataChoice(train, test, held_out, train_language, tuple(language or ()), train_revision, test_revision)
    folder = output or Path("runs") / f"finetune-{found.name}"
    result = finetune_folders(found, model, choice, settings, seed or [42], folder)
    console = Console()
    console.print(results_table(result))
    console.print(f"Results: [bold]{folder / RESULTS}[/bold]", soft_wrap=True)
