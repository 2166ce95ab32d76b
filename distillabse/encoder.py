"""Run a bundle with ONNX Runtime, `tokenizers` and numpy alone: neither torch nor transformers is imported.

    encoder = Encoder("bundle")
    vectors = encoder.encode(["Where is the station?", "Wo ist der Bahnhof?"])
    similarity = vectors @ vectors.T

This file is also the recipe for services in other languages: tokenise, pad, run the graph, take `sentence_embedding`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.progress import track
from tokenizers import Tokenizer, normalizers

from distillabse import layout
from distillabse.errors import ConfigurationError, InputError
from distillabse.storage import read_json

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
OUTPUT = "sentence_embedding"
TEXTS_PER_CALL = 10_000


class Encoder:
    """Turns texts into sentence vectors with one ONNX graph of a bundle.

    Args:
        bundle: Folder that `distillabse export` wrote.
        file: Path of the graph inside the bundle, e.g. "onnx/model.onnx". By default the INT8 graph on a CPU, where
            the bundle has one, else the fp32 graph.
        device: "cpu", or "cuda" for an NVIDIA GPU; a GPU that cannot be used is an error, never a silent fall back.
        threads: Threads of the graph; by default one per physical core.

    Raises:
        InputError: a file of the bundle is missing or cannot be read.
        ConfigurationError: ONNX Runtime is not installed, or `device` cannot be used.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        file: str | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int | None = None,
    ) -> None:
        folder = Path(bundle)
        self._tokenizer = load_tokenizer(folder)
        self._pad_id = _pad_id(self._tokenizer, folder)
        self._prompt = _default_prompt(folder)
        graph = _require(folder, file or _default_graph(folder, device))
        self._session = session(graph, device, threads)
        self._inputs = {node.name for node in self._session.get_inputs()}
        if OUTPUT not in {node.name for node in self._session.get_outputs()}:
            raise InputError(f"{graph} has no output {OUTPUT!r}. Export the model with `distillabse export`.")

    @property
    def max_length(self) -> int:
        """Longest input in tokens; longer texts are cut."""
        truncation = self._tokenizer.truncation
        assert truncation is not None  # load_tokenizer sets it
        return int(truncation["max_length"])

    @cached_property
    def dimension(self) -> int:
        """Length of a sentence vector."""
        return int(self.run(self.tokenize([""])).shape[1])

    def encode(self, texts: Sequence[str], batch_size: int = 32, show_progress: bool = False) -> NDArray[np.float32]:
        """Encode texts in batches of similar length.

        Returns:
            float32 array [number of texts, dimension], in the order of `texts`; rows have length 1.

        Raises:
            TypeError: `texts` is one string, or one of them is not a string.
            ValueError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        rows = self._token_ids(texts)
        # Longest first: what needs most memory is met at once, and the estimate of the time left errs on the high side.
        order = np.argsort([-len(row) for row in rows], kind="stable")
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        starts = range(0, len(rows), batch_size)
        for start in track(starts, "encoding", disable=not show_progress):
            chosen = order[start : start + batch_size]
            vectors[chosen] = self.run(self._pad([rows[index] for index in chosen]))
        return vectors

    def tokenize(self, texts: Sequence[str], pad_to: int | None = None) -> dict[str, NDArray[np.int64]]:
        """Make the inputs of the graph for one batch.

        Args:
            texts: At least one text; what is longer than the model's `max_seq_length` is cut.
            pad_to: Pad to at least this many tokens; by default to the longest text.

        Returns:
            For each input of the graph an int64 array [number of texts, tokens].
        """
        return self._pad(self._token_ids(texts), pad_to)

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Run the graph on what `tokenize` gave; returns float32 [number of texts, dimension]."""
        declared = {name: array for name, array in inputs.items() if name in self._inputs}
        vectors: NDArray[np.float32] = self._session.run([OUTPUT], declared)[0]
        return vectors

    def _token_ids(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        if isinstance(texts, str):
            raise TypeError("a list of texts is needed, not one string: write encode([text])")
        wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"text {wrong} is {texts[wrong]!r}, not a string: drop it, or convert it with str()")
        return [
            np.asarray(encoding.ids, dtype=np.int64)
            for start in range(0, len(texts), TEXTS_PER_CALL)
            for encoding in self._tokenizer.encode_batch_fast(
                [self._prompt + text for text in texts[start : start + TEXTS_PER_CALL]]
            )
        ]

    def _pad(self, rows: Sequence[NDArray[np.int64]], pad_to: int | None = None) -> dict[str, NDArray[np.int64]]:
        width = max((pad_to or 0, *(len(row) for row in rows)))
        input_ids = np.full((len(rows), width), self._pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "token_type_ids" in self._inputs:
            inputs["token_type_ids"] = np.zeros_like(input_ids)
        return inputs


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a bundle, which cuts at `max_seq_length` and lower-cases where the model wants it.

    Raises:
        InputError: tokenizer.json or sentence_bert_config.json is missing or cannot be read.
    """
    file = _require(folder, layout.TOKENIZER)
    settings_file = _require(folder, layout.TRANSFORMER_SETTINGS)
    settings = read_json(settings_file)
    if "max_seq_length" not in settings:
        raise InputError(f"{settings_file} does not say `max_seq_length`. Export the model with `distillabse export`.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise InputError(f"{file} is not a tokenizer ({error}). Export or download the bundle again.") from None
    if settings.get("do_lower_case"):
        steps = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    tokenizer.enable_truncation(max_length=settings["max_seq_length"])
    return tokenizer


def session(
    path: Path, device: Literal["cpu", "cuda"] = "cpu", threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Load a graph for inference on exactly the device that is asked for.

    Raises:
        InputError: the graph cannot be loaded.
        ConfigurationError: ONNX Runtime is not installed, or the GPU cannot be used.
    """
    if device not in PROVIDERS:
        raise ConfigurationError(f"{device!r} is not a device: choose 'cpu' or 'cuda'.")
    runtime = import_onnxruntime()
    if device == "cuda":
        preload_cuda(runtime)
    try:
        loaded = runtime.InferenceSession(str(path), session_options(threads), providers=PROVIDERS[device])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise InputError(f"ONNX Runtime cannot load {path}: {error}. Export or download the bundle again.") from error
    # onnxruntime-gpu lists CUDA on machines without a GPU, and then falls back to the CPU in silence.
    if (used := loaded.get_providers()[0]) != PROVIDERS[device][0]:
        raise ConfigurationError(
            f"A GPU was asked for, but ONNX Runtime uses {used}. Install exactly one runtime with "
            "`pip uninstall -y onnxruntime onnxruntime-gpu` and then `pip install 'distillabse[gpu]'`, check the "
            "driver with `nvidia-smi`, and see `distillabse doctor`; or choose the device 'cpu'."
        )
    return loaded


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """How every graph is run: one operator after the other, each on `threads` threads (default: one per core)."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def import_onnxruntime() -> Any:
    """The `onnxruntime` module.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigurationError(
            f"ONNX Runtime cannot be imported ({error}). Install exactly one of its two builds: "
            "`pip install 'distillabse[cpu]'`, or `pip install 'distillabse[gpu]'` for NVIDIA GPUs."
        ) from error
    return onnxruntime


def preload_cuda(runtime: Any) -> None:
    """Let ONNX Runtime find the CUDA and cuDNN libraries that were installed with pip."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        runtime.preload_dlls()


def _default_graph(folder: Path, device: str) -> str:
    candidates = layout.ONNX_INT8.values() if device == "cpu" else ()
    return next((file for file in candidates if (folder / file).is_file()), layout.ONNX_FP32)


def _require(folder: Path, file: str) -> Path:
    """The path of a file that a bundle cannot do without."""
    if not folder.is_dir():
        raise InputError(f"There is no bundle {folder}. Give the folder that `distillabse export` wrote.")
    if not (folder / file).is_file():
        raise InputError(f"The bundle {folder} has no {file}. Export or download it again.")
    return folder / file


def _default_prompt(folder: Path) -> str:
    """The prompt that belongs before every text, where the model has one."""
    path = folder / layout.SENTENCE_TRANSFORMERS_SETTINGS
    settings = read_json(path) if path.is_file() else {}
    name = settings.get("default_prompt_name")
    return str(settings["prompts"][name]) if name else ""


def _pad_id(tokenizer: Tokenizer, folder: Path) -> int:
    """The id of the padding token; switches off the padding that tokenizer.json may ask for."""
    if padding := tokenizer.padding:
        tokenizer.no_padding()
        return int(padding["pad_id"])
    file = _require(folder, layout.TOKENIZER_SETTINGS)
    token = read_json(file).get("pad_token")
    number = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
    if number is None:
        raise InputError(f"{file} names no `pad_token` of the vocabulary. Export or download the bundle again.")
    return int(number)
