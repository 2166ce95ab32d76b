"""Graphs of a bundle in ONNX Runtime or OpenVINO, behind one interface."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from distillabse.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    Inputs = Mapping[str, NDArray[np.int64]]
    Vectors = NDArray[np.float32]

Device = Literal["cpu", "cuda", "tensorrt"]
EngineName = Literal["onnxruntime", "openvino"]

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
ENGINES = ("onnxruntime", "openvino")
OUTPUT = "sentence_embedding"
NEEDED_INPUTS = frozenset(("input_ids", "attention_mask"))
KNOWN_INPUTS = NEEDED_INPUTS | {"token_type_ids"}

# What ONNX Runtime says of a graph that is newer than itself.
_NEWER = (
    re.compile(r"Unsupported model IR version: (?P<has>\d+), max supported IR version: (?P<knows>\d+)"),
    re.compile(r"Opset (?P<has>\d+) is under development.*till opset (?P<knows>\d+)", re.DOTALL),
)


class Graph(Protocol):
    """A loaded graph; several Python threads may call it at a time."""

    inputs: frozenset[str]

    def run(self, inputs: Inputs) -> Vectors:
        """Int64 arrays [batch, tokens], exactly those named in `inputs` -> float32 [batch, dimension]."""
        ...


class OnnxRuntimeGraph:
    """A graph in ONNX Runtime; every call works on `threads` threads, its own among them."""

    def __init__(self, path: Path, device: Device, threads: int | None) -> None:
        self._session = session(path, device, threads)
        self.inputs = frozenset(node.name for node in self._session.get_inputs())
        _require_ours(path, self.inputs, {node.name for node in self._session.get_outputs()})

    def run(self, inputs: Inputs) -> Vectors:
        """See `Graph`."""
        vectors: Vectors = self._session.run([OUTPUT], dict(inputs))[0]
        return vectors


class OpenVinoGraph:
    """A graph in OpenVINO on the CPU: `calls` calls at a time, which share `threads` threads."""

    def __init__(self, path: Path, threads: int, calls: int) -> None:
        openvino = import_openvino()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the CPU has it: other vectors
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": calls,
            "PERFORMANCE_HINT": "THROUGHPUT" if calls > 1 else "LATENCY",
        }
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise InputError(
                f"OpenVINO cannot load {path} ({_last_line(error)}). Export or download the bundle again."
            ) from error
        self._of_thread = threading.local()
        self.inputs = frozenset(node.get_any_name() for node in self._model.inputs)
        _require_ours(path, self.inputs, {name for node in self._model.outputs for name in node.get_names()})
        try:  # OpenVINO 2026.4 compiles quantised graphs that it then cannot run, such as INT8 with a scale per token
            self.run(dict.fromkeys(self.inputs, np.ones((2, 2), dtype=np.int64)))
        except RuntimeError as error:
            raise InputError(
                f"OpenVINO cannot run {path} ({_last_line(error)}). Choose the fp32 graph, file='onnx/model.onnx', or "
                "the engine 'onnxruntime'."
            ) from error

    def run(self, inputs: Inputs) -> Vectors:
        """See `Graph`."""
        # A request holds the memory of one call at a time, so every Python thread has its own.
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._model.create_infer_request()
        request = self._of_thread.request
        request.infer(dict(inputs), share_inputs=True)
        return np.array(request.get_tensor(OUTPUT).data, dtype=np.float32)  # a copy: the next call writes there


def open_graph(path: Path, engine: EngineName, device: Device, threads: int, calls: int = 1) -> Graph:
    """Load a graph for `calls` calls at a time, on `threads` threads together.

    Raises:
        InputError: the graph cannot be loaded, or is not an encoder of `distillabse export`.
        ConfigurationError: the engine is unknown or not installed, or the device cannot be used with it.
    """
    if engine not in ENGINES:
        raise ConfigurationError(f"{engine!r} is not an engine: choose {' or '.join(map(repr, ENGINES))}.")
    if engine == "onnxruntime":
        return OnnxRuntimeGraph(path, device, max(1, threads // calls))
    if device != "cpu":
        raise ConfigurationError(f"OpenVINO runs on the CPU here, not on {device!r}: choose the engine 'onnxruntime'.")
    return OpenVinoGraph(path, threads, calls)


def session(path: Path, device: Device = "cpu", threads: int | None = None) -> onnxruntime.InferenceSession:
    """Load a graph for inference on exactly the device that is asked for.

    Raises:
        InputError: the graph cannot be loaded.
        ConfigurationError: ONNX Runtime is not installed, or the GPU cannot be used.
    """
    if device not in PROVIDERS:
        raise ConfigurationError(f"{device!r} is not a device: choose 'cpu', 'cuda' or 'tensorrt'.")
    runtime = import_onnxruntime()
    if device != "cpu":
        preload_cuda(runtime)
    try:
        loaded = runtime.InferenceSession(str(path), session_options(threads), providers=PROVIDERS[device])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise InputError(_cannot_load(path, str(error), runtime.__version__)) from error
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


def import_openvino() -> Any:
    """The `openvino` module.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ConfigurationError(
            f"OpenVINO cannot be imported ({error}). Install it with `pip install 'distillabse[openvino]'`, or choose "
            "the engine 'onnxruntime'."
        ) from error
    return openvino


def preload_cuda(runtime: Any) -> None:
    """Let ONNX Runtime find the CUDA and cuDNN libraries that were installed with pip."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        runtime.preload_dlls()


def _require_ours(path: Path, inputs: frozenset[str], outputs: set[str]) -> None:
    """Refuse a graph that is not (input_ids, attention_mask[, token_type_ids]) -> sentence_embedding."""
    remedy = "Export the model with `distillabse export`."
    if OUTPUT not in outputs:
        raise InputError(f"{path} has no output {OUTPUT!r}, only {', '.join(sorted(outputs))}. {remedy}")
    if missing := NEEDED_INPUTS - inputs:
        raise InputError(f"{path} has no input {min(missing)!r}, only {', '.join(sorted(inputs))}. {remedy}")
    if unknown := inputs - KNOWN_INPUTS:
        raise InputError(f"{path} has an input {min(unknown)!r} that no bundle has. {remedy}")


def _cannot_load(path: Path, reason: str, version: str) -> str:
    for what, pattern in zip(("IR version", "opset"), _NEWER, strict=True):
        if found := pattern.search(reason):
            return (
                f"{path} has {what} {found['has']}, and ONNX Runtime {version} knows those up to {found['knows']}. "
                "Update it with `pip install --upgrade onnxruntime`, or export the model for an older one with "
                "`distillabse export CONFIG export.opset=18`."
            )
    return f"ONNX Runtime cannot load {path}: {reason}. Export or download the bundle again."


def _last_line(error: Exception) -> str:
    """What OpenVINO's errors say after the places in its source that they come from."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
