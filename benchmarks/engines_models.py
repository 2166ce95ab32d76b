"""What other programs make of a student, for `engines.py`: each function runs in that program's own environment.

python benchmarks/engines_models.py FUNCTION SOURCE TARGET [TEXTS]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CALIBRATION_TEXTS = 300


def nncf(source: Path, target: Path, texts: Path) -> None:
    """NNCF's INT8 of the bundle's fp32 graph, calibrated on texts, as OpenVINO's model.xml."""
    import nncf as library
    import openvino

    from distillabse.tokenization import BundleTokenizer

    tokenizer = BundleTokenizer(source)
    rows = tokenizer.token_ids(json.loads(texts.read_text(encoding="utf-8"))[:CALIBRATION_TEXTS])
    quantised = library.quantize(
        openvino.convert_model(source / "onnx" / "model.onnx"),
        library.Dataset([tokenizer.pad([row]) for row in rows]),
        model_type=library.ModelType.TRANSFORMER,
        preset=library.QuantizationPreset.MIXED,
        subset_size=CALIBRATION_TEXTS,
    )
    openvino.save_model(quantised, target / "model.xml", compress_to_fp16=False)


def ctranslate2(source: Path, target: Path) -> None:
    """CTranslate2's INT8 of the torch student."""
    import ctranslate2 as library

    settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
    # Its converter asks for a key that transformers 5 no longer writes.
    settings.setdefault("position_embedding_type", "absolute")
    (target / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    library.converters.TransformersConverter(str(target)).convert(str(target / "ctranslate2"), quantization="int8")


def sentence_transformers(source: Path, target: Path) -> None:
    """The fp32 graph that sentence-transformers exports, and its dynamic INT8 for AVX512-VNNI."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    model = SentenceTransformer(
        str(target), backend="onnx", device="cpu", local_files_only=True,
        model_kwargs={"export": True, "provider": "CPUExecutionProvider"},
    )  # fmt: skip
    saved = target / "saved"
    model.save_pretrained(str(saved))
    export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(saved))
    # Its settings are spelt as older readers cannot read them; those of the bundle say the same.
    (saved / "onnx").rename(target / "onnx")


if __name__ == "__main__":
    {function.__name__: function for function in (nncf, ctranslate2, sentence_transformers)}[sys.argv[1]](
        *map(Path, sys.argv[2:])
    )
