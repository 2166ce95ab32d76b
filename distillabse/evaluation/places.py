"""The encoders that can be compared: what a place on the command line holds, and the engine that runs it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distillabse import layout
from distillabse.errors import ConfigurationError, InputError, first_line
from distillabse.evaluation.bench import graph_bytes
from distillabse.evaluation.onnx_file import tokenizer_folder
from distillabse.evaluation.workers import Engine
from distillabse.storage import sha256_of_file, sha256_of_json

Kind = Literal["bundle", "sentence-transformers", "onnx", "static"]

_RUNTIMES = {"cpu": "ONNX Runtime CPU", "cuda": "ONNX Runtime CUDA", "tensorrt": "ONNX Runtime TensorRT"}
_TENSORRT = "TensorrtExecutionProvider"


@dataclass(frozen=True)
class Place:
    """An encoder that a user has named.

    Attributes:
        name: what results call it.
        kind: what it is.
        folder: where it is.
        file: the graph inside the folder, if it is one.
        is_ours: the graph is that of a bundle, which `Encoder` reads.
    """

    name: str
    kind: Kind
    folder: Path
    file: str | None = None
    is_ours: bool = False

    def engines(self, device: str, has_tensorrt: bool = False) -> list[Engine]:
        """What runs it: ONNX Runtime for a graph, with TensorRT beside CUDA where it is; else PyTorch."""
        if self.kind == "static":
            return [Engine(self.name, "static", self.folder, device="cpu")]
        if self.file is None:
            return [Engine(self.name, "torch", self.folder)]
        kind = "onnx" if self.is_ours else "onnx-file"
        engines = [Engine(self.name, kind, self.folder, self.file, device=device)]
        if device == "cuda" and has_tensorrt:
            engines.append(dataclasses.replace(engines[0], name=f"{self.name} TensorRT", device="tensorrt"))
        return engines

    def description(self, engine: Engine) -> dict[str, Any]:
        """What is known of it without running it: an entry of "encoders" in comparison.json, but for "dimension"."""
        graph = self.folder / self.file if self.file else None
        weights = [] if graph else _weights(self.folder)
        digests = [sha256_of_file(path) for path in ([graph] if graph else weights)]
        return {
            "kind": self.kind,
            "file": self.file,
            "runtime": _RUNTIMES[engine.device or "cpu"] if graph else "PyTorch",
            "parameters": count_parameters(_weights(self.folder)) if self.is_ours or not graph else None,
            "size_bytes": graph_bytes(graph) if graph else sum(path.stat().st_size for path in weights),
            "sha256": digests[0] if len(digests) == 1 else sha256_of_json(digests),
        }


def find_places(given: Sequence[str], device: str = "cpu") -> list[Place]:
    """The encoders at these places, each `place` or `name=place`, with names of their own.

    A place is a bundle's folder (its INT8 graph where it has one, on a GPU its half-precision or fp32 graph), an ONNX
    file, a folder or hub id of sentence-transformers, "packaged:all-MiniLM-L6-v2", or a static model.

    Raises:
        InputError: there is nothing of the kind.
        ConfigurationError: two encoders have one name.
    """
    named = [_split(item) for item in given]
    places = [_find(name or default_name(place), place, device) for name, place in named]
    chosen = {name for name, _ in named if name}
    counts = Counter(place.name for place in places)
    places = [
        dataclasses.replace(place, name=f"{place.name} ({place.kind})")
        if counts[place.name] > 1 and place.name not in chosen
        else place
        for place in places
    ]
    if twice := [name for name, count in Counter(place.name for place in places).items() if count > 1]:
        raise ConfigurationError(f"Two encoders are named {twice[0]!r}. Name them: name=place.")
    return places


def has_tensorrt() -> bool:
    """Whether ONNX Runtime's TensorRT provider loads on this machine."""
    from distillabse.environment import execution_providers

    return execution_providers().get(_TENSORRT, False)


def default_name(place: str) -> str:
    """What an encoder is called when its user does not say: the run of a bundle, else the last part of its place."""
    path = Path(place)
    if path.suffix == ".onnx":
        folder = path.parent.parent if path.parent.name == "onnx" else path.parent
        return f"{default_name(str(folder.absolute()))}/{path.stem}"
    if path.name == "bundle":
        return path.absolute().parent.name
    return path.name.removeprefix("packaged:") or place


def run_of(place: Place) -> Path | None:
    """The training corpus of the run folder that a bundle lies in, if it does."""
    corpus = layout.RunFolder(place.folder.absolute().parent).split("train")
    return corpus if place.kind == "bundle" and corpus.is_file() else None


def count_parameters(weights: Sequence[Path]) -> int | None:
    """Numbers in files of safetensors, read from their headers; BERT's own pooler does not take part in a vector."""
    from safetensors import safe_open

    total = 0
    for path in weights:
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys() if not _is_idle(key))
    return total or None


def _split(item: str) -> tuple[str, str]:
    """Name and place; a place that exists may have an equals sign of its own."""
    name, separator, place = item.partition("=")
    if not separator or Path(item).exists():
        return "", item
    if not (name and place):
        raise ConfigurationError(f"{item!r}: write name=place, e.g. small=runs/small/bundle.")
    return name, place


def _find(name: str, place: str, device: str) -> Place:
    from distillabse.models.teacher import resolve_model
    from distillabse.tasks.encoders import is_static

    path = Path(place)
    if path.suffix == ".onnx":
        root = tokenizer_folder(path).absolute()
        file = str(path.absolute().relative_to(root))
        if (root / layout.PROVENANCE).is_file() and (root / layout.ONNX_FP32).is_file():
            return Place(name, "bundle", root, file, is_ours=True)
        return Place(name, "onnx", root, file)
    if (path / layout.ONNX_FP32).is_file() and (path / layout.PROVENANCE).is_file():
        return Place(name, "bundle", path, layout.served_graph(path, device), is_ours=True)
    folder = Path(resolve_model(place))
    if not folder.is_dir():
        folder = _downloaded(place)
    if is_static(folder):
        return Place(name, "static", folder)
    if not (folder / layout.MODULES).is_file():
        raise InputError(
            f"{place} is no encoder: it holds neither {layout.PROVENANCE} (a bundle), nor {layout.MODULES} "
            "(sentence-transformers), nor a static model of model2vec. Give one of these, or an .onnx file."
        )
    return Place(name, "sentence-transformers", folder)


def _downloaded(model: str) -> Path:
    """The local copy of a model of the hub, without the graphs and weights in other formats that may lie beside it."""
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise InputError(f"There is no {model}. Give a folder, an .onnx file, or a name on the hub.")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except Exception as error:  # the hub's errors and those of the network share no base class
        raise InputError(
            f"{model!r} is neither a local folder nor a model that the hub gives out right now ({first_line(error)}). "
            "Check the name and the network; HF_HOME names the local cache."
        ) from error


def _weights(folder: Path) -> list[Path]:
    """The weights that sentence-transformers loads: those of the folder and of its modules."""
    found = [folder, *(path for path in sorted(folder.glob("[0-9]*_*")) if path.is_dir())]
    return [path for part in found for path in sorted(part.glob("model*.safetensors"))]


def _is_idle(key: str) -> bool:
    return key.startswith("pooler.") or ".pooler." in key
