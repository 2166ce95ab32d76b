"""The gates: a bundle that does not keep the vector does not pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse import layout
from distillabse.checksums import broken_checksums
from distillabse.config import EvaluationConfig, GatesConfig, JobConfig
from distillabse.corpus.records import Sentence, known_texts
from distillabse.encoder import Encoder
from distillabse.errors import GateFailed, InputError
from distillabse.evaluation.fidelity import Vectors, fidelity, neighbour_agreement, row_cosines
from distillabse.evaluation.sets import TEST, evaluation_sets
from distillabse.export.bundle import int8_file
from distillabse.layout import RunFolder
from distillabse.models.reduction import load_reduction, reduced
from distillabse.storage import new_folder, read_json, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

TORCH, FP32, INT8 = "torch", "onnx-fp32", "onnx-int8"
_INVARIANCE_TEXTS = 256
_WORST = 20


@dataclass(frozen=True)
class Gate:
    """One requirement and what was found."""

    gate: str
    artefact: str
    set: str | None
    value: float
    limit: float
    passed: bool


def verify_stage(config: JobConfig, run: RunFolder) -> None:
    """Measure fidelity, parity and invariance of `run.bundle`, write verify.json, then judge.

    Raises:
        GateFailed: at least one gate was not met; verify.json is written all the same.
        InputError: there is no bundle.
    """
    from distillabse.models.teacher import load_encoder, load_teacher

    if not (run.bundle / layout.PROVENANCE).is_file():
        raise InputError(f"{run.bundle} holds no bundle. Run `distillabse export` first.")
    encoders = {FP32: Encoder(run.bundle, file=layout.ONNX_FP32)}
    if config.export.quantization.enabled:
        encoders[INT8] = Encoder(run.bundle, file=int8_file(config.export.quantization))
    teacher, sets = load_teacher(config.teacher), evaluation_sets(config, run)
    reduction = load_reduction(run.bundle)
    result = verify(
        teacher if reduction is None else reduced(teacher, reduction),
        load_encoder(str(run.bundle)),
        encoders,
        sets,
        config.evaluation,
        config.gates,
        config.seed,
        config.teacher.languages,
    )
    if reduction is not None:
        read = known_texts(sets[TEST], config.teacher.languages)
        result["reduction"] = reduction_agreement(teacher, reduction, list(dict.fromkeys(read)), config.seed)
    graphs, gates = verify_files(run.bundle, config)
    result["graphs"] = graphs
    result["gates"] += [asdict(gate) for gate in gates]
    with new_folder(run.verify) as folder:
        write_json(folder / run.verification.name, result)
    failed = [gate for gate in result["gates"] if not gate["passed"]]
    if failed:
        lines = "\n".join(
            f"  {gate['gate']} of {gate['artefact']}: {gate['value']:.6g}, needs {gate['limit']:.6g}" for gate in failed
        )
        raise GateFailed(f"{len(failed)} of {len(result['gates'])} gates failed:\n{lines}\nSee {run.verification}.")
    logger.info("All %d gates passed", len(result["gates"]))


def verify(
    teacher: SentenceTransformer,
    student: SentenceTransformer,
    encoders: Mapping[str, Encoder],
    sets: Mapping[str, Sequence[Sentence]],
    evaluation: EvaluationConfig,
    gates: GatesConfig,
    seed: int,
    teacher_languages: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Fidelity of every artefact on every set, parity with torch and invariance, with the gates they give.

    A translation from one of `teacher_languages` into a language that is not is compared with the teacher's vector of
    its source; None says that the teacher knows all languages.
    """
    scores: dict[str, dict[str, Any]] = {}
    vectors: dict[str, dict[str, Vectors]] = {}
    for name, chosen in sets.items():
        texts = [sentence.text for sentence in chosen]
        logger.info("Encoding %d sentences of %r with teacher and student", len(texts), name)
        target = teacher.encode(known_texts(chosen, teacher_languages), batch_size=64, show_progress_bar=False)
        vectors[name] = {TORCH: student.encode(texts, batch_size=64, show_progress_bar=False)}
        vectors[name].update({artefact: encoder.encode(texts) for artefact, encoder in encoders.items()})
        lengths = [int(mask.sum()) for mask in (encoders[FP32].tokenize([text])["attention_mask"] for text in texts)]
        for artefact, rows in vectors[name].items():
            scores.setdefault(artefact, {})[name] = fidelity(
                target, rows, languages=[sentence.language for sentence in chosen], lengths=lengths,
                bootstrap_samples=evaluation.bootstrap_samples, seed=seed,
            )  # fmt: skip
        if name == TEST:
            worst = _worst(chosen, row_cosines(target, vectors[name][INT8 if INT8 in encoders else FP32]))
    parity = {artefact: _parity(vectors[TEST][artefact], vectors[TEST][TORCH]) for artefact in encoders}
    sample = [sentence.text for sentence in sets[TEST]][:_INVARIANCE_TEXTS]
    invariance = {artefact: onnx_invariance(encoder, sample) for artefact, encoder in encoders.items()}
    invariance[TORCH] = torch_invariance(student, sample)
    return {
        "fidelity": scores,
        "parity": parity,
        "invariance": invariance,
        "gates": [asdict(gate) for gate in _judge(scores, parity, invariance, gates)],
        "worst": worst,
    }


def reduction_agreement(
    teacher: SentenceTransformer, reduction: NDArray[np.float32], texts: Sequence[str], seed: int
) -> dict[str, float]:
    """How much of the teacher's own space its reduced vectors keep, since no cosine can be taken between the two.

    Returns:
        dimension; neighbour_top1 and similarity_spearman between the teacher and its reduced vectors.
    """
    vectors = teacher.encode(list(texts), batch_size=64, show_progress_bar=False)
    top1, spearman = neighbour_agreement(vectors, vectors @ reduction, np.random.default_rng(seed))
    return {"dimension": reduction.shape[1], "neighbour_top1": top1, "similarity_spearman": spearman}


def onnx_invariance(encoder: Encoder, texts: Sequence[str]) -> dict[str, float]:
    """Least cosine of a text's vector alone with its vector in a mixed batch, and with its vector padded.

    Texts are batched in the order given, so short ones stand beside long ones; padding is to twice the longest text
    of the batch, as far as the model goes.
    """
    alone = np.concatenate([encoder.run(encoder.tokenize([text])) for text in texts])
    batches = [texts[start : start + 32] for start in range(0, len(texts), 32)]
    together = np.concatenate([encoder.run(encoder.tokenize(batch)) for batch in batches])
    longest = max(encoder.tokenize(batch)["input_ids"].shape[1] for batch in batches)
    width = min(2 * longest, encoder.max_length)
    padded = np.concatenate([encoder.run(encoder.tokenize([text], pad_to=width)) for text in texts])
    return _invariance(alone, together, padded)


def torch_invariance(encoder: SentenceTransformer, texts: Sequence[str]) -> dict[str, float]:
    """The same of an encoder in PyTorch."""
    import torch

    from distillabse.models.tokens import tokenise
    from distillabse.training.data import PaddingCollator

    ids = [{"input_ids": row} for row in tokenise(encoder, texts)]
    width = min(2 * max(len(row["input_ids"]) for row in ids), encoder.max_seq_length)
    pad = encoder.tokenizer.pad_token_id

    def run(rows: list[Any], multiple_of: int = 1) -> Vectors:
        with torch.inference_mode():
            output: Vectors = encoder(PaddingCollator(pad, multiple_of)(rows))["sentence_embedding"].numpy()
        return output

    encoder.eval()
    return _invariance(
        np.concatenate([run([row]) for row in ids]),
        np.concatenate([run(ids[start : start + 32]) for start in range(0, len(ids), 32)]),
        np.concatenate([run([row], width) for row in ids]),
    )


def verify_files(bundle: Path, config: JobConfig) -> tuple[dict[str, dict[str, int]], list[Gate]]:
    """Checksums, and that ONNX Runtime finds in the graphs what they were written to hold.

    Returns:
        Operators by graph after optimisation, and the gates: every file intact; per encoder layer two layer
        normalisations and one fused GELU; every quantised product still an integer product; every expert.
    """
    from distillabse.export.graph import count_after_optimisation
    from distillabse.export.switch import count_expert_products
    from distillabse.models.switch import MODEL_TYPE as SWITCH

    settings = read_json(bundle / layout.MODEL_SETTINGS)
    layers = settings["num_hidden_layers"]
    graphs = {FP32: dict(count_after_optimisation(bundle / layout.ONNX_FP32))}
    wanted = [(FP32, "LayerNormalization", 2 * layers + 1), (FP32, "fused GELU", layers)]
    if config.export.quantization.enabled:
        graphs[INT8] = dict(count_after_optimisation(bundle / int8_file(config.export.quantization)))
        wanted.append((INT8, "integer products", read_json(bundle / layout.PROVENANCE)["int8"]["matmuls"]))
    if settings["model_type"] == SWITCH:
        graphs[FP32]["expert products"] = count_expert_products(bundle / layout.ONNX_FP32)
        wanted.append((FP32, "expert products", 2 * settings["num_experts"] * len(settings["sparse_layers"])))
    broken = broken_checksums(bundle)
    gates = [Gate("files that differ from SHA256SUMS", "bundle", None, len(broken), 0, not broken)]
    for artefact, what, count in wanted:
        found = sum(graphs[artefact].get(operator, 0) for operator in _OPERATORS[what])
        gates.append(Gate(f"{what} in the graph", artefact, None, found, count, found == count))
    return graphs, gates


_OPERATORS = {
    "LayerNormalization": ("LayerNormalization", "SkipLayerNormalization"),
    "expert products": ("expert products",),
    "fused GELU": ("Gelu", "BiasGelu", "FastGelu"),
    "integer products": ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
}


def _parity(artefact: Vectors, torch_vectors: Vectors) -> dict[str, float]:
    cosines = row_cosines(artefact, torch_vectors)
    return {"min": float(cosines.min()), "mean": float(cosines.mean())}


def _invariance(alone: Vectors, together: Vectors, padded: Vectors) -> dict[str, float]:
    return {
        "batch_min": float(row_cosines(alone, together).min()),
        "padding_min": float(row_cosines(alone, padded).min()),
    }


def _worst(chosen: Sequence[Sentence], cosines: Any) -> list[dict[str, Any]]:
    return [
        {"text": chosen[index].text, "language": chosen[index].language, "cosine": float(cosines[index])}
        for index in np.argsort(cosines)[:_WORST]
    ]


def _judge(
    scores: Mapping[str, Mapping[str, Any]],
    parity: Mapping[str, Mapping[str, float]],
    invariance: Mapping[str, Mapping[str, float]],
    limits: GatesConfig,
) -> list[Gate]:
    def at_least(gate: str, artefact: str, where: str | None, value: float, limit: float) -> Gate:
        return Gate(gate, artefact, where, value, limit, value >= limit)

    gates = [at_least("least cosine to torch", FP32, TEST, parity[FP32]["min"], limits.onnx_fp32_to_torch_min)]
    if INT8 in parity:
        gates.append(
            at_least("mean cosine to the fp32 student", INT8, TEST, parity[INT8]["mean"], limits.int8_to_fp32_mean)
        )
    for artefact, found in invariance.items():
        for name, value in found.items():
            gates.append(at_least(f"invariance, {name}", artefact, TEST, value, limits.invariance_min))
    for artefact, by_set in scores.items():
        gates.append(
            at_least(
                "mean cosine to the teacher", artefact, TEST, by_set[TEST]["cosine_mean"], limits.teacher_cosine_mean
            )
        )
        gates.append(at_least("skill", artefact, TEST, by_set[TEST]["skill"], limits.teacher_skill))
    return gates
