"""The command that turns texts into vectors."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TextIO

import typer

from distillabse.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encode(
    bundle: Annotated[Path, typer.Argument(help="Folder that `export` wrote.")],
    texts: Annotated[
        Path | None, typer.Argument(help="File with a text a line; by default standard input.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A .npy or .jsonl file; by default JSONL on stdout."),
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Graph in the bundle; by default INT8 where there is one.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, help="Texts of a micro-batch.")] = None,
    token_budget: Annotated[int | None, typer.Option(metavar="N", min=1, help="Or its tokens, with padding.")] = None,
    window: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Texts sorted together; few for live input.")
    ] = None,
    truncate_dim: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Keep this many leading components.")
    ] = None,
    no_normalize: Annotated[bool, typer.Option("--no-normalize", help="Leave truncated vectors as they are.")] = False,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or float16")] = "float32",
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="By default one per core.")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda")] = "cpu",
    engine: Annotated[str, typer.Option(metavar="NAME", help="onnxruntime or openvino")] = "onnxruntime",
) -> None:
    """Turn texts into vectors, in bounded memory however many there are.

    Example: echo "Where is the station?" | distillabse encode runs/quickstart/bundle
    """
    from distillabse.encoder import WINDOW, Encoder
    from distillabse.storage import new_file

    if output is not None and output.suffix not in (".npy", ".jsonl"):
        raise ConfigurationError(f"--output {output}: name a .npy or a .jsonl file.")
    if device not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {device}: give cpu or cuda.")
    if dtype not in ("float32", "float16"):
        raise ConfigurationError(f"--dtype {dtype}: give float32 or float16.")
    if texts is not None and not texts.is_file():
        raise InputError(f"{texts} is not a file.")
    encoder = Encoder(bundle, file=file, device=device, threads=threads, engine=engine)  # type: ignore[arg-type]
    if truncate_dim is not None and truncate_dim > encoder.dimension:
        raise ConfigurationError(
            f"--truncate-dim {truncate_dim}: the vectors of {bundle} have {encoder.dimension} components."
        )
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "token_budget": token_budget,
        "window": window or WINDOW,
        "truncate_dim": truncate_dim,
        "normalize": not no_normalize,
        "dtype": dtype,
        "show_progress": output is not None,
    }
    name = str(texts or "standard input")
    with texts.open("rb") if texts is not None else nullcontext(sys.stdin.buffer) as source:
        total = _count_lines(texts) if texts is not None and output is not None else None
        lines = _lines(source, name)
        if output is None:
            _write_jsonl(sys.stdout, lines, lambda texts: encoder.encode_stream(texts, **settings))
        elif output.suffix == ".jsonl":
            with new_file(output) as temporary, temporary.open("w", encoding="utf-8") as target:
                _write_jsonl(target, lines, lambda texts: encoder.encode_stream(texts, total=total, **settings))
        else:
            vectors = encoder.encode_stream(lines, total=total, **settings)
            with new_file(output) as temporary, temporary.open("wb") as target:
                _write_npy(target, vectors, truncate_dim or encoder.dimension, dtype)


def _lines(source: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a file without their ends; a byte order mark at the start is no text.

    Raises:
        InputError: a line is not UTF-8.
    """
    for number, line in enumerate(source, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{name}: line {number} is not UTF-8. Convert it first, e.g. with iconv.") from None
        yield text.removesuffix("\n").removesuffix("\r")


def _count_lines(path: Path) -> int:
    """How many lines `_lines` gives, without holding them."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _write_jsonl(
    target: TextIO, lines: Iterable[str], encode_stream: Callable[[Iterable[str]], Iterator[NDArray[Any]]]
) -> None:
    """Write texts with their vectors as these come; only the texts of a few windows are held."""
    waiting: deque[str] = deque()

    def remembered() -> Iterator[str]:
        for text in lines:
            waiting.append(text)
            yield text

    for vectors in encode_stream(remembered()):
        for vector in vectors.tolist():
            target.write(json.dumps({"text": waiting.popleft(), "vector": vector}, ensure_ascii=False) + "\n")
        target.flush()


def _write_npy(target: BinaryIO, parts: Iterable[NDArray[Any]], dimension: int, dtype: str) -> None:
    """Write a .npy file as its rows come: their number goes into the header at the end.

    NumPy leaves room in the header for the first axis to grow:
    https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    import numpy as np

    def write_header(rows: int) -> int:
        target.seek(0)
        description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, dimension)}
        np.lib.format.write_array_header_1_0(target, description)
        return target.tell()

    start, rows = write_header(0), 0
    for vectors in parts:
        target.write(vectors.tobytes())
        rows += len(vectors)
    if write_header(rows) != start:
        raise RuntimeError("the header of the .npy file has grown over its first row")
