"""The command that judges a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from distillabse import layout
from distillabse.errors import ConfigurationError, GateFailed, InputError


def verify(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG|BUNDLE", help="A job's configuration, or the folder of a bundle.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. gates.int8_to_fp32_mean=0.999", show_default=False)
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Of a bundle: a file with a text a line, or a TSV, CSV, JSONL or Parquet with the columns text and "
            "language; by default sentences in eight languages that come with the package."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Of a bundle: compare it with this teacher, too, a folder or hub name.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the result here; - for standard output.")] = None,
) -> None:
    """Put a bundle, or the bundle of a job, through its gates; exit status 1 when one fails.

    Example: distillabse verify runs/quickstart/bundle --json verify.json
    """
    from distillabse.verification.gates import require_passed

    folder = Path(target)
    if folder.is_dir():
        result = _verify_folder(folder, overrides or [], texts, teacher)
    elif texts or teacher:
        raise ConfigurationError("--texts and --teacher are for a bundle; a job has its own. Leave them out.")
    else:
        result = _verify_job(target, overrides or [])
    _show(result, output)
    require_passed(result["gates"], str(output) if output and str(output) != "-" else "the table above")


def _verify_folder(folder: Path, overrides: list[str], texts: Path | None, teacher: str | None) -> dict[str, Any]:
    from distillabse.settings import load_gates
    from distillabse.verification.examine import verify_bundle
    from distillabse.verification.texts import built_in_texts, texts_of_file

    if not (folder / layout.PROVENANCE).is_file():
        inside = f" Did you mean {folder / 'bundle'}?" if (folder / "bundle").is_dir() else ""
        raise InputError(f"{folder} is a folder without {layout.PROVENANCE}, so it is no bundle.{inside}")
    limits = load_gates(overrides)
    return verify_bundle(folder, texts_of_file(texts) if texts else built_in_texts(), limits, teacher)


def _verify_job(config: str, overrides: list[str]) -> dict[str, Any]:
    from distillabse.layout import RunFolder
    from distillabse.pipeline import prepare, run_stage
    from distillabse.settings import load_config
    from distillabse.storage import read_json

    job = load_config(config, overrides)
    run: RunFolder = prepare(job)
    run.verification.unlink(missing_ok=True)
    try:
        run_stage("verify", job, run)
    except GateFailed:  # judged below, when the gates have been shown
        if not run.verification.is_file():
            raise
    return dict(read_json(run.verification))


def _show(result: dict[str, Any], output: Path | None) -> None:
    from distillabse.storage import write_json
    from distillabse.verification.views import gates_table

    to_standard_output = output is not None and str(output) == "-"
    Console(stderr=to_standard_output).print(gates_table(result))
    if to_standard_output:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    elif output is not None:
        write_json(output, result)
