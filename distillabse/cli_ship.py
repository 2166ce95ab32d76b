"""Commands that make a bundle, make it fit one consumer, publish it and show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from distillabse.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from distillabse.config import JobConfig

Bundle = Annotated[Path, typer.Argument(help="Folder that `export` wrote.")]


def export(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. export.opset=18", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Export this checkpoint of the training instead of the finished student.")
    ] = None,
    flavor: Annotated[
        str | None,
        typer.Option(
            help="Make the folder that one consumer wants: tei-int8, optimum, transformers-js or single-file. CONFIG "
            "may be a bundle."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --flavor: where; by default beside the bundle.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="With --flavor single-file: texts, one a line, that it must get right.")
    ] = None,
) -> None:
    """Write the bundle: ONNX fp32 and INT8 beside the torch student.

    Example: distillabse export quickstart export.quantization.cpu=avx2
    """
    if flavor is not None:
        folder = _export_flavor(config, overrides or [], flavor, output, texts, checkpoint)
        Console().print(f"{flavor}: [bold]{folder}[/bold]", soft_wrap=True)
    elif output or texts:
        raise ConfigurationError("--output and --texts belong to --flavor; give it, too.")
    else:
        _export(_load(config, overrides or []), checkpoint)


def push(
    bundle: Bundle,
    repo_id: Annotated[str, typer.Argument(help="user/name or organisation/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; by default as its owner has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; by default main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
) -> None:
    """Publish a bundle on the Hugging Face hub; HF_ENDPOINT names another one.

    Example: distillabse push runs/quickstart/bundle me/labse-small --private
    """
    from distillabse.export.push import push as upload

    done = upload(bundle, repo_id, private=private, revision=revision, create_pr=create_pr, message=message)
    Console().print(f"Published: [bold]{done.pull_request or done.commit}[/bold]", soft_wrap=True)


def demo(
    bundle: Annotated[Path | None, typer.Argument(help="Folder that `export` wrote.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    file: Annotated[
        str | None, typer.Option(help="Graph inside the bundle; by default INT8 where there is one.")
    ] = None,
    fetch_assets: Annotated[
        bool, typer.Option("--fetch-assets", help="First download what the page runs on, once, from the npm registry.")
    ] = False,
) -> None:
    """Serve a page that runs the bundle in the browser: type sentences, see how alike they are.

    Example: distillabse demo runs/quickstart/bundle --fetch-assets
    """
    from distillabse.demo.assets import fetch, require_assets
    from distillabse.demo.server import demo_server

    if bundle is None and not fetch_assets:
        raise ConfigurationError("Give a bundle, or --fetch-assets alone to download what the page runs on.")
    if fetch_assets:
        Console().print(f"The page runs on the files in [bold]{fetch()}[/bold]", soft_wrap=True)
    if bundle is None:
        return
    with demo_server(bundle, port, file=file, assets=require_assets()) as server:
        Console().print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", soft_wrap=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def _export_flavor(
    config: str, overrides: list[str], flavor: str, output: Path | None, texts: Path | None, checkpoint: Path | None
) -> Path:
    """Make the folder of a flavor from a bundle, or from the bundle of a job, which is exported first if need be.

    Args:
        config: A bundle, or a configuration.
        overrides: key=value for a configuration.
        flavor: One of `FLAVORS`.
        output: Where to write; by default `<bundle>-<flavor>`.
        texts: A file with a text a line, for "single-file".
        checkpoint: Export this checkpoint of the job first.
    """
    from distillabse import layout
    from distillabse.export.flavors import FLAVORS, make_flavor
    from distillabse.export.sample import SAMPLE

    if flavor not in FLAVORS:
        raise ConfigurationError(f"There is no flavor {flavor!r}. Flavors: {', '.join(FLAVORS)}.")
    if texts is not None and not texts.is_file():
        raise InputError(f"{texts} is not a file.")
    shown = texts.read_text(encoding="utf-8").splitlines() if texts is not None else SAMPLE
    if (Path(config) / layout.PROVENANCE).is_file():
        if overrides or checkpoint:
            raise ConfigurationError(f"{config} is a bundle: settings and checkpoints belong to a configuration.")
        bundle = Path(config)
    else:
        bundle = _export(_load(config, overrides), checkpoint, only_if_changed=True)
    target = output or bundle.parent / f"{bundle.resolve().name}-{flavor}"
    make_flavor(bundle, flavor, target, shown)
    return target


def _export(job: JobConfig, checkpoint: Path | None, *, only_if_changed: bool = False) -> Path:
    """Write the bundle of a job, of its student or of a checkpoint, and return it."""
    from distillabse.pipeline import export_checkpoint, is_current, prepare, run_stage

    run = prepare(job)
    if checkpoint is not None:
        export_checkpoint(job, run, checkpoint)
    elif not (only_if_changed and is_current("export", job, run)):
        run_stage("export", job, run)
    return run.bundle


def _load(config: str, overrides: list[str]) -> JobConfig:
    from distillabse.settings import load_config

    return load_config(config, overrides)
