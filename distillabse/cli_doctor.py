"""The command that shows what a machine can do."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from distillabse.errors import ConfigurationError


def doctor(
    device: Annotated[str | None, typer.Option(help="Fail unless this device, cpu or cuda, can be used.")] = None,
) -> None:
    """Show what this machine can do; exit status 2 when something is wrong.

    Example: distillabse doctor --device cuda
    """
    from distillabse.environment import doctor as examine
    from distillabse.environment import require_device

    table, problems = examine()
    console = Console()
    console.print(table)
    if device is not None:
        require_device(device)
    if problems:
        raise ConfigurationError("\n".join(problems))
    console.print("No problems found.")
