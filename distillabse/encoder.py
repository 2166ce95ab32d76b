"""Run a bundle with ONNX Runtime, `tokenizers` and numpy alone: neither torch nor transformers is imported.

    encoder = Encoder("bundle")
    vectors = encoder.encode(["Where is the station?", "Wo ist der Bahnhof?"])
    similarity = vectors @ vectors.T

`tokenize` and `run` are also the recipe for services in other languages: tokenise, pad, run the graph, take
`sentence_embedding`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from distillabse import layout
from distillabse.batching import micro_batches, overlapped, windows
from distillabse.cores import usable_cores
from distillabse.inference import (
    OUTPUT,
    PROVIDERS,
    Device,
    EngineName,
    Graph,
    import_onnxruntime,
    open_graph,
    preload_cuda,
    session,
    session_options,
)
from distillabse.storage import read_json
from distillabse.tokenization import BundleTokenizer, load_tokenizer, require_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[Any]  # float32 or float16, as `dtype` says
    _Part = tuple[NDArray[np.intp], Vectors]

__all__ = [
    "OUTPUT",
    "PROVIDERS",
    "Encoder",
    "import_onnxruntime",
    "load_tokenizer",
    "preload_cuda",
    "session",
    "session_options",
]

# Padded tokens of a micro-batch: its activations stay in a core's cache. A GPU wants work for thousands of lanes.
TOKEN_BUDGET = {"cpu": 256, "cuda": 16_384, "tensorrt": 16_384}
WINDOW = 4096
# So few texts are encoded at once, without starting threads.
FEW = 32


class Encoder:
    """Turns texts into sentence vectors with one ONNX graph of a bundle.

    One encoder may be used from several threads at a time.

    Args:
        bundle: Folder that `distillabse export` wrote.
        file: Path of the graph inside the bundle, e.g. "onnx/model.onnx". By default the INT8 graph in ONNX Runtime
            on a CPU, where the bundle has one, else the fp32 graph.
        device: "cpu", or "cuda" or "tensorrt" for an NVIDIA GPU; one that cannot be used is an error, no fall back.
        threads: Threads of the graph; by default one per physical core that the process may use.
        engine: "onnxruntime", or "openvino" where `distillabse[openvino]` is installed (CPU only).

    Raises:
        InputError: a file of the bundle is missing or cannot be read, or the graph is not an encoder of ours.
        ConfigurationError: the engine is not installed, or `device` cannot be used.
        ValueError: `threads` is not positive.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        file: str | None = None,
        device: Device = "cpu",
        threads: int | None = None,
        engine: EngineName = "onnxruntime",
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        folder = Path(bundle)
        self._tokenizer = BundleTokenizer(folder)
        self._path = require_file(folder, file or _default_graph(folder, device, engine))
        self._engine, self._device, self._threads = engine, device, threads or usable_cores()
        self._graph = open_graph(self._path, engine, device, self._threads)
        self._loading = threading.Lock()
        self._graph_of_workers: Graph | None = None

    @property
    def max_length(self) -> int:
        """Longest input in tokens; longer texts are cut."""
        return self._tokenizer.max_length

    @cached_property
    def dimension(self) -> int:
        """Length of a sentence vector."""
        return int(self.run(self.tokenize([""])).shape[1])

    def encode(
        self,
        texts: Iterable[str] | str,
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        normalize: bool = True,
        dtype: Literal["float32", "float16"] = "float32",
        truncate_dim: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Encode texts in micro-batches of like length, several at a time, while the next texts are tokenised.

        A vector does not depend on the other texts. Halves of a surrogate pair that stand alone, which UTF-8 cannot
        hold, count as U+FFFD.

        Args:
            texts: A list, tuple, array, column of a data frame or generator of texts; or one text.
            batch_size: Texts of a micro-batch; by default as many as fit into `token_budget`.
            token_budget: Tokens of a micro-batch, padding included.
            normalize: Scale what `truncate_dim` cut to length 1 again. Whole vectors always have length 1: the graph
                ends with the normalisation.
            dtype: "float32" or "float16"; computed in float32.
            truncate_dim: Keep this many leading components, for models trained with a Matryoshka objective.
            show_progress: Show a bar on standard error.

        Returns:
            Array [number of texts, dimension or `truncate_dim`], in the order of `texts`; for one text [dimension].

        Raises:
            TypeError: one of the texts is not a string.
            ValueError: an argument is out of its range.
        """
        if isinstance(texts, str):
            vector: Vectors = self.encode([texts], normalize=normalize, dtype=dtype, truncate_dim=truncate_dim)[0]
            return vector
        parts = self.encode_stream(
            texts,
            batch_size=batch_size,
            token_budget=token_budget,
            normalize=normalize,
            dtype=dtype,
            truncate_dim=truncate_dim,
            show_progress=show_progress,
        )
        width = truncate_dim or self.dimension
        if not isinstance(texts, Sized):
            return np.concatenate([np.empty((0, width), dtype=dtype), *parts])
        vectors = np.empty((len(texts), width), dtype=dtype)
        done = 0
        for part in parts:
            vectors[done : done + len(part)] = part
            done += len(part)
        return vectors

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        normalize: bool = True,
        dtype: Literal["float32", "float16"] = "float32",
        truncate_dim: int | None = None,
        window: int = WINDOW,
        total: int | None = None,
        show_progress: bool = False,
    ) -> Iterator[Vectors]:
        """Encode any number of texts, also without end, in bounded memory.

        Texts are sorted by length within a window. At most four windows are held: one that is yielded, one that is
        encoded and two that are read and tokenised ahead. So the first vectors come when three windows are read, or
        the texts end; a source that is slow wants a small `window`.

        Args:
            window: Texts that are sorted together; very long texts make it end earlier.
            total: How many texts there are, for the progress bar, where an iterator cannot tell.
            texts, batch_size, token_budget, normalize, dtype, truncate_dim, show_progress: as in `encode`.

        Yields:
            Array [texts of a window, dimension], window by window, in the order of `texts`.

        Raises:
            TypeError: one of the texts is not a string; vectors of earlier windows may have been yielded by then.
            ValueError: an argument is out of its range; raised by the call itself.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"a list of texts is needed, not one {type(texts).__name__}: give [text]")
        for name, value in (("batch_size", batch_size), ("token_budget", token_budget), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dimension:
            raise ValueError(f"truncate_dim must be between 1 and the dimension {self.dimension}, not {truncate_dim}")
        if dtype not in ("float32", "float16", np.float32, np.float16):
            raise ValueError(f"dtype must be 'float32' or 'float16', not {dtype!r}")
        form = _Form(truncate_dim, normalize, dtype)
        size = _Size(batch_size, token_budget or TOKEN_BUDGET[self._device])
        if total is None and isinstance(texts, Sized):
            total = len(texts)
        return self._stream(texts, total, window, size, form, show_progress)

    def tokenize(self, texts: Sequence[str], pad_to: int | None = None) -> dict[str, NDArray[np.int64]]:
        """Make the inputs of the graph for one batch.

        Args:
            texts: At least one text; what is longer than the model's `max_seq_length` is cut.
            pad_to: Pad to at least this many tokens; by default to the longest text.

        Returns:
            For each input of the graph an int64 array [number of texts, tokens].
        """
        return self._inputs(self._tokenizer.token_ids(texts), pad_to)

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Run the graph on what `tokenize` gave; returns float32 [number of texts, dimension]."""
        return self._graph.run({name: array for name, array in inputs.items() if name in self._graph.inputs})

    def _stream(
        self, texts: Iterable[str], total: int | None, window: int, size: _Size, form: _Form, show_progress: bool
    ) -> Iterator[Vectors]:
        """What `encode_stream` yields."""
        few = total is not None and total <= FEW
        graph = self._graph if few else self._bulk_graph()

        def prepare(part: list[str]) -> list[Callable[[], _Part]]:
            rows = self._tokenizer.token_ids(part)
            return [
                partial(encode_rows, rows, chosen)
                for chosen in micro_batches([len(row) for row in rows], size.batch_size, size.token_budget)
            ]

        def encode_rows(rows: list[NDArray[np.int64]], chosen: NDArray[np.intp]) -> _Part:
            vectors = form.of(graph.run(self._inputs([rows[index] for index in chosen])))
            advance(len(chosen))
            return chosen, vectors

        with _progress(total, show_progress) as advance:
            parts = windows(texts, window)
            if few:
                yield from (_in_order([task() for task in prepare(part)]) for part in parts)
            else:
                with contextlib.closing(overlapped(parts, prepare, self._workers)) as results:
                    yield from map(_in_order, results)

    def _inputs(self, rows: Sequence[NDArray[np.int64]], pad_to: int | None = None) -> dict[str, NDArray[np.int64]]:
        inputs = self._tokenizer.pad(rows, pad_to)
        if "token_type_ids" in self._graph.inputs:
            inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
        return inputs

    @property
    def _workers(self) -> int:
        """How many micro-batches are encoded at a time."""
        return self._threads if self._device == "cpu" else 1

    def _bulk_graph(self) -> Graph:
        """The graph for `_workers` calls at a time, with one thread each.

        Threads that share a call wait for each other after every operator; with a call each, none waits.
        """
        if self._workers == 1:
            return self._graph
        with self._loading:
            if self._graph_of_workers is None:
                self._graph_of_workers = open_graph(
                    self._path, self._engine, self._device, self._threads, calls=self._workers
                )
            return self._graph_of_workers


class _Size(NamedTuple):
    """How large a micro-batch is."""

    batch_size: int | None
    token_budget: int


class _Form(NamedTuple):
    """What vectors look like in the end."""

    truncate_dim: int | None
    normalize: bool
    dtype: str

    def of(self, vectors: NDArray[np.float32]) -> Vectors:
        """Cut, scale to length 1, and convert rows of the graph's output."""
        if self.truncate_dim is not None:
            vectors = vectors[:, : self.truncate_dim]
            if self.normalize:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors.astype(self.dtype, copy=False)


def _in_order(parts: Sequence[_Part]) -> Vectors:
    """Put the vectors of all micro-batches of a window into the order of its texts."""
    order, vectors = (np.concatenate(column) for column in zip(*parts, strict=True))
    placed = np.empty_like(vectors)
    placed[order] = vectors
    return placed


@contextlib.contextmanager
def _progress(total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """Show how many texts are done, how fast, and the time left; yields what counts finished texts."""
    if not show:
        yield lambda texts: None
        return
    # Not imported at the top: it costs more than everything else here but ONNX Runtime and numpy.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Texts a second."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} texts/s")

    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress("encoding", *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("encoding", total=total)
        yield lambda texts: bar.advance(task, texts)


def _default_graph(folder: Path, device: str, engine: str) -> str:
    """That of ONNX Runtime. With a scale per token INT8 has its operators; OpenVINO runs static INT8, else fp32."""
    if device == "cpu" and engine == "openvino" and not _is_static(folder):
        return layout.ONNX_FP32
    return layout.served_graph(folder, device)


def _is_static(folder: Path) -> bool:
    record = folder / layout.PROVENANCE
    return record.is_file() and read_json(record).get("int8", {}).get("kind") == "static"
