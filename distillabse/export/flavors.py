"""Folders made from a bundle for one program that finds its graph by name, or wants another form of it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distillabse import layout
from distillabse.checksums import broken_checksums, write_checksums
from distillabse.config.product import SWITCH_CONSUMERS, Consumer
from distillabse.errors import ConfigurationError, InputError
from distillabse.export.card import with_use
from distillabse.export.float16 import to_float16
from distillabse.export.sample import SAMPLE
from distillabse.export.single_file import write_single_files
from distillabse.models.switch import MODEL_TYPE
from distillabse.storage import new_folder, read_json, write_json

logger = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"
_ONNX = "onnx"

# The newest environment in which optimum loads a graph: optimum-onnx 0.1.0 needs transformers before 4.58.
OPTIMUM_REQUIREMENTS = """\
optimum-onnx[onnxruntime]==0.1.0
optimum==2.1.0
transformers==4.57.6
sentence-transformers==5.7.0
onnxruntime==1.31.1
"""


@dataclass(frozen=True)
class Flavor:
    """A folder for one consumer.

    Attributes:
        consumer: the program, as `export.consumers` calls it.
        make: writes the graphs: (bundle, its INT8 graph or None, folder, texts for a tokenizer).
        int8: what its INT8 graph is called.
        use: what the model card says of its use.
    """

    consumer: Consumer
    make: Callable[[Path, str | None, Path, Sequence[str]], None]
    int8: str
    use: str


def make_flavor(bundle: Path, flavor: str, target: Path, texts: Sequence[str] = SAMPLE) -> None:
    """Write the folder `target` for one consumer, whole or not at all, with checksums of its own.

    Settings, tokenizer and model card are those of the bundle; the torch weights of the transformer stay behind.

    Args:
        bundle: Folder that `distillabse export` wrote.
        flavor: One of `FLAVORS`.
        target: The new folder; one that is there is replaced.
        texts: For "single-file": what the tokenizer in the graph must agree on with the bundle's.

    Raises:
        ConfigurationError: there is no such flavor, or the student is of a kind that its consumer cannot load.
        InputError: the bundle is not whole, or lacks the INT8 graph that the flavor is about.
    """
    if flavor not in FLAVORS:
        raise ConfigurationError(f"There is no flavor {flavor!r}. Flavors: {', '.join(FLAVORS)}.")
    require_whole(bundle)
    provenance = read_json(bundle / layout.PROVENANCE)
    if "flavor" in provenance:
        raise InputError(f"{bundle} is the flavor {provenance['flavor']!r} of a bundle. Give the bundle itself.")
    chosen = FLAVORS[flavor]
    is_switch = read_json(bundle / layout.MODEL_SETTINGS).get("model_type") == MODEL_TYPE
    if is_switch and chosen.consumer not in SWITCH_CONSUMERS:
        raise ConfigurationError(f"{chosen.consumer} cannot load a Switch student, so there is no {flavor!r} of it.")
    if target.resolve() == bundle.resolve() or (target.exists() and not (target / layout.PROVENANCE).is_file()):
        raise InputError(f"{target} is not a folder of a flavor. Choose another place with --output.")
    with new_folder(target) as folder:
        _copy_all_but_graphs(bundle, folder)
        (folder / _ONNX).mkdir()
        chosen.make(bundle, layout.int8_graph(bundle), folder, texts)
        write_json(folder / layout.PROVENANCE, {**provenance, "flavor": flavor})
        _rewrite_card(folder / layout.MODEL_CARD, chosen, layout.int8_graph(bundle))
        write_checksums(folder)
    logger.info("%s written to %s", flavor, target)


def require_whole(bundle: Path) -> None:
    """Make sure that a folder is a bundle and that no file of it is missing or changed.

    Raises:
        InputError: it is not; the message names the files.
    """
    if not (bundle / layout.PROVENANCE).is_file():
        raise InputError(f"{bundle} is no bundle. Give the folder that `distillabse export` wrote.")
    if broken := broken_checksums(bundle):
        raise InputError(
            f"{bundle} is not whole: {', '.join(broken)} missing, or not what {layout.CHECKSUMS} says. "
            "Export it again with `distillabse export`."
        )


def _rewrite_card(card: Path, flavor: Flavor, int8: str | None) -> None:
    if card.is_file():  # a bundle of an earlier release may have none
        text = with_use(card.read_text(encoding="utf-8"), flavor.use)
        card.write_text(text.replace(int8, flavor.int8) if int8 else text, encoding="utf-8")


def _copy_all_but_graphs(bundle: Path, folder: Path) -> None:
    def left_out(place: str, names: list[str]) -> set[str]:
        at_root = Path(place) == bundle
        return {_ONNX, _WEIGHTS, layout.CHECKSUMS, layout.PROVENANCE}.intersection(names) if at_root else set()

    shutil.copytree(bundle, folder, ignore=left_out, dirs_exist_ok=True)


def _tei_int8(bundle: Path, int8: str | None, folder: Path, _: Sequence[str]) -> None:
    _copy(bundle, _required(bundle, int8), folder, layout.ONNX_FP32)


def _optimum(bundle: Path, int8: str | None, folder: Path, _: Sequence[str]) -> None:
    _copy(bundle, layout.ONNX_FP32, folder, layout.ONNX_FP32)
    if int8 is not None:
        _copy(bundle, int8, folder, layout.ONNX_QUANTIZED)
    (folder / layout.REQUIREMENTS).write_text(OPTIMUM_REQUIREMENTS, encoding="utf-8")


def _transformers_js(bundle: Path, int8: str | None, folder: Path, _: Sequence[str]) -> None:
    _copy(bundle, layout.ONNX_FP32, folder, layout.ONNX_FP32)
    to_float16(bundle / layout.ONNX_FP32, folder / layout.ONNX_FLOAT16)
    if int8 is not None:
        _copy(bundle, int8, folder, layout.ONNX_QUANTIZED)


def _single_file(bundle: Path, int8: str | None, folder: Path, texts: Sequence[str]) -> None:
    graphs = {layout.ONNX_FP32: folder / layout.ONNX_FP32}
    if int8 is not None:
        graphs[int8] = folder / layout.ONNX_QUANTIZED
    write_single_files(bundle, graphs, texts)


def _copy(bundle: Path, name: str, folder: Path, new_name: str) -> None:
    """Copy a graph under a new name; weights in a file beside it keep theirs, by which the graph knows it."""
    shutil.copyfile(bundle / name, folder / new_name)
    for data in (bundle / name).parent.glob(f"{Path(name).name}_data"):
        shutil.copyfile(data, folder / _ONNX / data.name)


def _required(bundle: Path, int8: str | None) -> str:
    if int8 is None:
        raise InputError(
            f"{bundle} has no INT8 graph. Export it with `export.quantization.kind=per_token`, or serve the bundle "
            "itself: text-embeddings-inference takes its fp32 graph."
        )
    return int8


FLAVORS: dict[str, Flavor] = {
    "tei-int8": Flavor(
        "text-embeddings-inference",
        _tei_int8,
        layout.ONNX_FP32,
        "This folder is for text-embeddings-inference on CPUs, which reads `onnx/model.onnx` and no other name: here "
        "that file is the INT8 graph.\n\n"
        "```bash\n"
        "docker run -p 8080:80 -v $PWD:/model ghcr.io/huggingface/text-embeddings-inference:cpu-latest "
        "--model-id /model --dtype float32\n"
        "```",
    ),
    "optimum": Flavor(
        "optimum",
        _optimum,
        layout.ONNX_QUANTIZED,
        "This folder is for optimum, and for what loads graphs through it, such as infinity and the ONNX backend of "
        "sentence-transformers: `onnx/model_quantized.onnx` is the INT8 graph. optimum-onnx 0.1.0 needs "
        "`transformers<4.58`, so give it an environment of its own:\n\n"
        "```bash\n"
        "python -m venv optimum && optimum/bin/pip install --requirement requirements.txt\n"
        "```\n\n"
        "```python\n"
        "from sentence_transformers import SentenceTransformer\n\n"
        'options = {"file_name": "onnx/model_quantized.onnx"}\n'
        'encoder = SentenceTransformer("path/to/this/folder", backend="onnx", model_kwargs=options)\n'
        "```",
    ),
    "transformers-js": Flavor(
        "transformers.js",
        _transformers_js,
        layout.ONNX_QUANTIZED,
        'This folder is for transformers.js: `dtype: "q8"` takes the INT8 graph, `"fp16"` half precision and '
        '`"fp32"` the fp32 graph. A text over the longest input loses its last special token there; '
        "docs/shipping.md of distillabse shows how to put it back.\n\n"
        "```js\n"
        'import { AutoModel, AutoTokenizer } from "@huggingface/transformers";\n\n'
        "const tokenizer = await AutoTokenizer.from_pretrained(folder);\n"
        'const model = await AutoModel.from_pretrained(folder, { dtype: "q8" });\n'
        "const inputs = await tokenizer(texts, { padding: true, truncation: true });\n"
        "const { sentence_embedding } = await model(inputs);\n"
        "```",
    ),
    "single-file": Flavor(
        "onnxruntime",
        _single_file,
        layout.ONNX_QUANTIZED,
        "The graphs in this folder hold their tokenizer: input `text`, strings [batch]; output `sentence_embedding`. "
        "They need the library of onnxruntime-extensions, and nothing else beside ONNX Runtime. "
        "`onnx/model_quantized.onnx` is the INT8 graph.\n\n"
        "```python\n"
        "import numpy as np\n"
        "import onnxruntime\n"
        "from onnxruntime_extensions import get_library_path\n\n"
        "options = onnxruntime.SessionOptions()\n"
        "options.register_custom_ops_library(get_library_path())\n"
        'session = onnxruntime.InferenceSession("onnx/model_quantized.onnx", options)\n'
        '(vectors,) = session.run(None, {"text": np.array(["A sentence.", "Another one."], dtype=object)})\n'
        "```",
    ),
}
