"""Graphs whose only output is the sentence vector, for programs that pool by themselves but know no Dense head."""

from __future__ import annotations

from pathlib import Path

from distillabse import layout
from distillabse.storage import read_json

_POOLED_BY_CONSUMERS = {"pooling_mode_cls_token", "pooling_mode_mean_tokens"}


def write_pooled_graphs(folder: Path) -> list[str]:
    """Write `onnx/model_pooled*.onnx` beside every graph of a bundle whose vectors need more than pooling.

    fastembed, infinity and Vespa take the mean or the first of the token vectors and normalise it. Where the encoder
    has a Dense head, or another pooling, they need a graph that does everything. It holds the weights a second time,
    except where they lie in a file beside the graph, which both then share.

    Returns:
        Names of the files inside the bundle.
    """
    if pooling_is_enough(folder):
        return []
    graphs = [name for name in (layout.ONNX_FP32, *layout.ONNX_INT8.values()) if (folder / name).is_file()]
    for name in graphs:
        keep_sentence_embedding(folder / name, folder / layout.pooled_graph(name))
    return [layout.pooled_graph(name) for name in graphs]


def pooling_is_enough(folder: Path) -> bool:
    """Whether the mean or the first of the token vectors, normalised, is the sentence vector of this encoder."""
    modules = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in read_json(folder / layout.MODULES)}
    if not modules.keys() <= {"Transformer", "Pooling", "Normalize"}:
        return False
    pooling = read_json(folder / modules["Pooling"] / layout.MODEL_SETTINGS)
    modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value}
    return len(modes) == 1 and modes <= _POOLED_BY_CONSUMERS


def keep_sentence_embedding(source: Path, target: Path) -> None:
    """Write `source` without any output but the sentence vectors; weights beside the graph stay where they are."""
    import onnx

    from distillabse.encoder import OUTPUT

    model = onnx.load(str(source), load_external_data=False)
    kept = [output for output in model.graph.output if output.name == OUTPUT]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, str(target))
    onnx.checker.check_model(str(target))
