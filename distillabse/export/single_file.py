"""One file from text to vector: the graph with the tokenizer inside, for languages without a tokenizer library.

The operators on text come from onnxruntime-extensions, one shared library that every ONNX Runtime can load. Its own
BertTokenizer splits and lower-cases otherwise than the tokenizer that the encoder was trained with, so the graph uses
smaller operators. What the tokenizer does to each character (drop it, change it, let it stand alone) is asked of the
tokenizer itself, for every character of Unicode, and becomes three regular expressions and a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse import layout
from distillabse.encoder import Encoder, import_onnxruntime, load_tokenizer
from distillabse.errors import ConfigurationError, InputError
from distillabse.export.characters import character_rules
from distillabse.export.graph import INPUTS, OUTPUTS, PROTOBUF_LIMIT
from distillabse.export.sample import SAMPLE
from distillabse.storage import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

INPUT = "text"
_DOMAIN = "ai.onnx.contrib"
_OPSETS = {"": 18, _DOMAIN: 1, "ai.onnx.ml": 3}
_IR_VERSION = 10  # of ONNX 1.16: what the runtimes of two years read
_LEAST_COSINE = 0.99999
_END = "\n"  # ends a text while the characters of a whole batch are looked up; no cleaned text holds one


def write_single_files(bundle: Path, graphs: Mapping[str, Path], texts: Sequence[str] = SAMPLE) -> None:
    """Write graphs of `bundle` with the tokenizer inside, if they give the same vectors.

    Their input is `text`, strings [batch]; their output is `sentence_embedding`, float32 [batch, dimension].

    Args:
        bundle: Folder that `distillabse export` wrote.
        graphs: For the path of each graph inside it, where to write.
        texts: What both must give the same vectors for, alone and as one batch.

    Raises:
        InputError: the tokenizer is not WordPiece, or differs from what the operators can do on one of `texts`.
        ConfigurationError: onnxruntime-extensions is not installed.
    """
    import onnx

    extensions_library()
    tokenizer = tokenizer_model(bundle)
    for graph, target in graphs.items():
        joined = _joined(tokenizer, onnx.load(str(bundle / graph)))
        if joined.ByteSize() > PROTOBUF_LIMIT:
            raise InputError(f"{bundle / graph} is over 2 GB and does not go into one file. Take the INT8 graph.")
        onnx.save(joined, str(target))
        _require_equal(Encoder(bundle, file=graph), target, texts)


def extensions_library() -> str:
    """Path of the shared library with the operators on text.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        from onnxruntime_extensions import get_library_path
    except ImportError as error:
        raise ConfigurationError(
            f"onnxruntime-extensions cannot be imported ({error}). Install it: "
            "`pip install 'distillabse[single-file]'`."
        ) from error
    return str(get_library_path())


def text_session(path: Path) -> Any:
    """An ONNX Runtime session on a graph with operators on text."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.register_custom_ops_library(extensions_library())
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def tokenizer_model(bundle: Path) -> Any:
    """The tokenizer of a bundle as an ONNX model: from strings [batch] to input_ids and attention_mask.

    Both are int64 [batch, tokens], cut at the longest input of the encoder and padded to the longest text.

    Raises:
        InputError: the tokenizer is not WordPiece.
    """
    from onnx import TensorProto, helper

    settings = read_json(bundle / layout.TOKENIZER)["model"]
    if settings["type"] != "WordPiece":
        raise InputError(
            f"{bundle / layout.TOKENIZER} is a {settings['type']} tokenizer; only WordPiece goes into a single file. "
            "Use the bundle with a tokenizer library."
        )
    tokenizer = load_tokenizer(bundle)
    pad_token = read_json(bundle / layout.SPECIAL_TOKENS)["pad_token"]
    nodes = _Nodes()
    _add_ids(nodes, _add_words(nodes, tokenizer), settings, tokenizer, pad_token)
    outputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in INPUTS]
    graph = helper.make_graph(
        nodes.nodes,
        "tokenizer",
        [helper.make_tensor_value_info(INPUT, TensorProto.STRING, ["batch"])],
        outputs,
        list(nodes.constants.values()),
    )
    opsets = [helper.make_opsetid(*item) for item in _OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


class _Nodes:
    """A graph that grows: every method adds nodes and returns the name of their result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        """One node; inputs are names or arrays. Returns the name of its last output."""
        from onnx import helper

        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        made = [f"{operator}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, names, made, name=made[-1], domain=domain, **attributes))
        return made[-1]

    def text(self, operator: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> str:
        """One node of onnxruntime-extensions."""
        return self.add(operator, *inputs, domain=_DOMAIN, outputs=outputs, **attributes)

    def output(self, index: int) -> str:
        """Another output of the node that was added last."""
        return str(self.nodes[-1].output[index])

    def give(self, value: str, name: str) -> None:
        """Make `value` an output of the graph."""
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))

    def _constant(self, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name


def _add_words(nodes: _Nodes, tokenizer: Tokenizer) -> str:
    """Strings [batch] in which spaces, and nothing else, part the words that the tokenizer would look up."""
    rules = character_rules(tokenizer)
    text = INPUT
    for characters, replacement in ((rules.spaces, " "), (rules.dropped, "")):
        if characters:
            text = nodes.text("StringRegexReplace", text, _strings(_class(characters)), _strings(replacement))
    if rules.changed:
        text = _looked_up(nodes, text, rules.changed)
    if rules.alone:
        text = nodes.text("StringRegexReplace", text, _strings(f"({_class(rules.alone)})"), _strings(r" \1 "))
    return text


def _looked_up(nodes: _Nodes, text: str, table: dict[str, str]) -> str:
    """Replace every character of a batch by what the table says: all texts in one string, cut into characters."""
    # A text ends with _END, so that an empty one, or a batch of them, has a character, too.
    ended = nodes.text("StringRegexReplace", text, _strings(r"\z"), _strings(_END))
    whole = nodes.text("StringJoin", ended, _strings(""), _integers(0))
    whole = nodes.add("Reshape", whole, _integers(1))
    nodes.text("StringRegexSplitWithOffsets", whole, _strings(r"([\s\S])"), _strings(r"([\s\S])"), outputs=4)
    pairs = "\n".join(f"{character}\t{result}" for character, result in table.items())
    changed = nodes.text("StringMapping", nodes.output(0), map=pairs)
    joined = nodes.add("Reshape", nodes.text("StringJoin", changed, _strings(""), _integers(0)), _integers(1))
    nodes.text("StringSplit", joined, _strings(_END), np.array([False]), outputs=3)
    # What stands after the last _END is no text.
    return nodes.add("Slice", nodes.output(1), _integers(0), nodes.add("Shape", text), _integers(0))


def _add_ids(nodes: _Nodes, words: str, settings: dict[str, Any], tokenizer: Tokenizer, pad_token: str) -> None:
    """From words to the inputs of the encoder: look up pieces, cut, add the special tokens and pad."""
    ids, counts = _add_pieces(nodes, words, settings, pad_token)
    pad = settings["vocab"][pad_token]
    before, after = special_tokens(tokenizer)
    truncation = tokenizer.truncation
    assert truncation is not None  # load_tokenizer sets it
    starts = nodes.add("CumSum", counts, np.int64(0), exclusive=1)
    lengths = nodes.add("Min", counts, _integers(truncation["max_length"] - len(before) - len(after)))
    width = nodes.add("ReduceMax", lengths, keepdims=0)
    column = np.array([-1, 1], dtype=np.int64)
    starts, lengths = (nodes.add("Reshape", value, column) for value in (starts, lengths))
    # Column 0 is the first token of the text: the special tokens before it have negative columns.
    columns = nodes.add("Range", np.int64(-len(before)), nodes.add("Add", width, np.int64(len(after))), np.int64(1))
    last = nodes.add("Sub", nodes.add("Shape", ids), _integers(1))
    places = nodes.add("Min", nodes.add("Max", nodes.add("Add", starts, columns), _integers(0)), last)
    tokens = nodes.add("Gather", ids, places)
    tokens = nodes.add("Where", nodes.add("Less", columns, lengths), tokens, np.int64(pad))
    for index, token in enumerate(before):
        tokens = nodes.add("Where", nodes.add("Equal", columns, np.int64(index - len(before))), np.int64(token), tokens)
    for index, token in enumerate(after):
        place = nodes.add("Add", lengths, np.int64(index))
        tokens = nodes.add("Where", nodes.add("Equal", columns, place), np.int64(token), tokens)
    nodes.give(tokens, "input_ids")
    real = nodes.add("Less", columns, nodes.add("Add", lengths, np.int64(len(after))))
    nodes.give(nodes.add("Cast", real, to=7), "attention_mask")  # 7 is int64


def _add_pieces(nodes: _Nodes, words: str, settings: dict[str, Any], pad_token: str) -> tuple[str, str]:
    """Look up the pieces of every word; of a word that is known in part the operator gives these parts, too.

    Returns:
        Ids of all texts in line, int64, and behind them one of padding; and how many each text has, int64 [batch].
    """
    vocabulary: dict[str, int] = settings["vocab"]
    unknown = vocabulary[settings["unk_token"]]
    nodes.text("StringSplit", words, _strings(" "), np.array([True]), outputs=3)
    indices, split = nodes.output(0), nodes.output(1)
    # A last word behind the last text, so that there is one where a batch has none.
    split = nodes.add("Concat", split, _strings(pad_token), axis=0)
    batch = nodes.add("Shape", words)
    text_of_word = nodes.add("Concat", nodes.add("Gather", indices, np.int64(0), axis=1), batch, axis=0)
    nodes.text(
        "WordpieceTokenizer", split, np.array([], dtype=np.int64), outputs=4,
        vocab=json.dumps(vocabulary, ensure_ascii=False), suffix_indicator=settings["continuing_subword_prefix"],
        unknown_token=settings["unk_token"], max_input_chars_per_word=settings["max_input_chars_per_word"],
    )  # fmt: skip
    pieces, starts, ends = nodes.output(0), nodes.output(2), nodes.output(3)
    ids = nodes.add(
        "LabelEncoder", pieces, domain="ai.onnx.ml", keys_strings=list(vocabulary),
        values_int64s=list(vocabulary.values()), default_int64=unknown,
    )  # fmt: skip
    shape = nodes.add("Shape", ids)
    nothing = nodes.add("Expand", np.int64(0), shape)
    first_of_word = nodes.add(
        "ScatterElements", nothing, starts, nodes.add("Expand", np.int64(1), nodes.add("Shape", starts))
    )
    word = nodes.add("Sub", nodes.add("CumSum", first_of_word, np.int64(0)), np.int64(1))
    last_place = nodes.add("Gather", nodes.add("Sub", ends, np.int64(1)), word)
    is_known = nodes.add("Not", nodes.add("Equal", nodes.add("Gather", ids, last_place), np.int64(unknown)))
    place = nodes.add("Range", np.int64(0), nodes.add("Squeeze", shape), np.int64(1))
    kept = nodes.add("Or", is_known, nodes.add("Equal", place, last_place))
    ids = nodes.add("Compress", ids, kept, axis=0)
    text = nodes.add("Compress", nodes.add("Gather", text_of_word, word), kept, axis=0)
    ones = nodes.add("Expand", np.int64(1), nodes.add("Shape", text))
    none = nodes.add("Expand", np.int64(0), nodes.add("Add", batch, _integers(1)))
    counts = nodes.add("ScatterElements", none, text, ones, reduction="add")
    return ids, nodes.add("Slice", counts, _integers(0), batch, _integers(0))


def special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    start = next(place for place in range(len(ids)) if ids[place : place + len(inner)] == inner)
    return ids[:start], ids[start + len(inner) :]


def _joined(tokenizer: Any, encoder: Any) -> Any:
    from onnx import compose

    joined = compose.merge_models(
        compose.add_prefix(tokenizer, "text_"),
        _at_opset(encoder),
        io_map=[(f"text_{name}", name) for name in INPUTS],
        outputs=[OUTPUTS[1]],
    )
    _rename_input(joined, f"text_{INPUT}", INPUT)
    joined.producer_name = "distillabse"
    return joined


def _require_equal(encoder: Encoder, path: Path, texts: Sequence[str]) -> None:
    """Compare both on every text alone, and on all of them as one batch.

    Raises:
        InputError: a vector differs, naming the first such text.
    """
    session = text_session(path)
    expected = encoder.encode(texts)
    batched = session.run([OUTPUTS[1]], {INPUT: np.array(list(texts), dtype=object)})[0]
    for index, text in enumerate(texts):
        alone = session.run([OUTPUTS[1]], {INPUT: np.array([text], dtype=object)})[0][0]
        cosine = min(float(vector @ expected[index]) for vector in (alone, batched[index]))
        if cosine < _LEAST_COSINE:
            raise InputError(
                f"With the tokenizer inside, {text[:60]!r} gets another vector (cosine {cosine:.4f}): its normaliser "
                "does more than one character at a time can show. Use the bundle with a tokenizer library, or, if such "
                "texts do not matter, give texts that do with --texts FILE."
            )


def _at_opset(model: Any) -> Any:
    """The model with operator sets that go together with those of the tokenizer."""
    from onnx import helper, version_converter

    found = {entry.domain: entry.version for entry in model.opset_import}
    if found.get("", 0) != _OPSETS[""]:
        model = version_converter.convert_version(model, _OPSETS[""])
        found[""] = _OPSETS[""]
    model.ir_version = _IR_VERSION
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*item) for item in {**_OPSETS, **found}.items())
    return model


def _rename_input(model: Any, old: str, new: str) -> None:
    for value in model.graph.input:
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def _class(codes: list[int]) -> str:
    """A character class of RE2 that holds these code points."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in ranges) + "]"


def _strings(value: str) -> NDArray[Any]:
    return np.array([value], dtype=object)


def _integers(value: int) -> NDArray[np.int64]:
    return np.array([value], dtype=np.int64)
