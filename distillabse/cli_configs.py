"""Commands on the configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

import typer

from distillabse.errors import ConfigurationError

configs_app = typer.Typer(help="Configurations that come with the package.", no_args_is_help=True)


@configs_app.command("ls")
def configs_ls() -> None:
    """List them.

    Example: distillabse configs ls
    """
    from distillabse.settings import shipped_configs

    for name, path in shipped_configs().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:22} {first}")


@configs_app.command("show")
def configs_show(name: str) -> None:
    """Print one.

    Example: distillabse configs show quickstart
    """
    typer.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@configs_app.command("cp")
def configs_cp(name: str, target: Path) -> None:
    """Copy one, to change it.

    Example: distillabse configs cp labse-opensubtitles my.yaml
    """
    if target.exists():
        raise ConfigurationError(f"{target} exists already. Remove it, or choose another name.")
    target.write_text(_shipped(name).read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"{target} written. Check it with: distillabse validate {target}")


def _shipped(name: str) -> Path:
    from distillabse.settings import shipped_configs

    shipped = shipped_configs()
    if name not in shipped:
        raise ConfigurationError(f"There is no shipped configuration {name!r}. Shipped: {', '.join(shipped)}.")
    return shipped[name]
