"""The command that turns texts into vectors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distillabse.errors import ConfigurationError, InputError


def encode(
    bundle: Annotated[Path, typer.Argument(help="Folder that `export` wrote.")],
    texts: Annotated[
        Path | None, typer.Argument(help="File with a text a line; by default standard input.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .npy or .jsonl file; by default JSONL on standard output.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Graph inside the bundle; by default INT8 where there is one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Turn texts into vectors.

    Example: echo "Where is the station?" | distillabse encode runs/quickstart/bundle
    """
    import numpy as np

    from distillabse.encoder import Encoder
    from distillabse.storage import new_file

    if output is not None and output.suffix not in (".npy", ".jsonl"):
        raise ConfigurationError(f"--output {output}: name a .npy or a .jsonl file.")
    if device not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {device}: give cpu or cuda.")
    lines = _read_lines(texts)
    encoder = Encoder(bundle, file=file, device=device)  # type: ignore[arg-type]
    vectors = encoder.encode(lines, batch_size=batch_size, show_progress=output is not None)
    if output is None:
        _write_jsonl(sys.stdout, lines, vectors)
    elif output.suffix == ".npy":
        with new_file(output) as temporary, temporary.open("wb") as target:
            np.save(target, vectors)
    else:
        with new_file(output) as temporary, temporary.open("w", encoding="utf-8") as target:
            _write_jsonl(target, lines, vectors)


def _read_lines(path: Path | None) -> list[str]:
    if path is not None and not path.is_file():
        raise InputError(f"{path} is not a file.")
    data = path.read_bytes() if path is not None else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path or 'standard input'}: line {line} is not UTF-8. Convert it first, e.g. with iconv."
        ) from None


def _write_jsonl(target: Any, lines: list[str], vectors: Any) -> None:
    for text, vector in zip(lines, vectors, strict=True):
        target.write(json.dumps({"text": text, "vector": vector.tolist()}, ensure_ascii=False) + "\n")
