"""What comes out: export, gates, evaluation and measurement."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distillabse.config.corpus import Source
from distillabse.config.models import EarlyStoppingConfig
from distillabse.config.objectives import (
    CosineObjective,
    HiddenObjective,
    ObjectiveConfig,
    RoutingObjective,
    learn_from_pairs,
)
from distillabse.config.schema import Cosine, Schema


def _quantization_objectives() -> list[ObjectiveConfig]:
    return [CosineObjective(), HiddenObjective()]


class QuantizationTrainingConfig(Schema):
    """A last training in which the student is rounded as its INT8 graph will be, and learns its scales, too."""

    target: Literal["student", "teacher"] = Field(
        "student",
        description="What it learns from: student, the fp32 student, so that INT8 keeps its vectors; or the job's "
        "teacher.",
    )
    objectives: list[ObjectiveConfig] = Field(
        default_factory=_quantization_objectives, description="Terms of the loss; none on pairs."
    )
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Any field of transformers.TrainingArguments. Where they say nothing: 600 steps of 32 sentences, "
        "learning rate 3e-5, no weight decay, fp32.",
    )
    early_stopping: EarlyStoppingConfig | None = None

    @model_validator(mode="after")
    def _objectives_fit(self) -> QuantizationTrainingConfig:
        used = [objective for objective in self.objectives if objective.weight > 0]
        if not used:
            raise ValueError("objectives: at least one must have a weight")
        if learn_from_pairs(used) or any(isinstance(objective, RoutingObjective) for objective in used):
            kinds = ", ".join(objective.kind for objective in used)
            raise ValueError(
                f"objectives: this training compares sentence by sentence, and is given {kinds}. Leave out those on "
                "translation pairs, and routing; cosine and hidden are the default"
            )
        return self


class QuantizationConfig(Schema):
    """The INT8 graph beside the fp32 graph. Weights have a scale per output channel, embeddings one per row."""

    kind: Literal["none", "per_token", "static", "block_weights"] = Field(
        "per_token",
        description="per_token: every token's activations have a scale of their own. static: a constant scale for all, "
        "in QuantizeLinear form, which is faster, and less exact unless trained. block_weights: 8-bit blocks of "
        "weights (MatMulNBits), without calibration. none: fp32 only.",
    )
    calibration_sentences: int = Field(
        1024, ge=1, description="Sentences of the training split on which scales are found and weights rounded."
    )
    cpu: Literal["avx512_vnni", "avx512", "avx2", "arm64"] = Field(
        "avx512_vnni", description="CPU to build for; avx512 and avx2 without VNNI get 7-bit weights, or they saturate."
    )
    embeddings: bool = Field(True, description="Store the embedding table as one INT8 row and one scale per token.")
    training: QuantizationTrainingConfig | None = Field(
        None, description="Quantisation-aware distillation: learn the scales; needs kind: static."
    )

    @model_validator(mode="after")
    def _scales_can_be_learnt(self) -> QuantizationConfig:
        if self.training is not None and self.kind != "static":
            raise ValueError(
                f"training: only constant scales can be learnt, and kind is {self.kind}. Set kind: static, or leave "
                "training out"
            )
        return self

    @property
    def enabled(self) -> bool:
        """Whether there is an INT8 graph."""
        return self.kind != "none"

    @property
    def calibrated(self) -> bool:
        """Whether scales are found on texts."""
        return self.kind in ("per_token", "static")

    @property
    def greatest_weight(self) -> int:
        """With 7 bits, the sum of two products fits into the 16 bits that a CPU without VNNI has for it."""
        return 63 if self.cpu in ("avx512", "avx2") else 127


Consumer = Literal[
    "onnxruntime", "fastembed", "vespa", "opensearch", "sentence-transformers", "optimum", "text-embeddings-inference",
    "transformers.js", "elasticsearch",
]  # fmt: skip
# They read the graph and the tokenizer alone; sentence-transformers finds the class where this package is installed.
SWITCH_CONSUMERS: tuple[Consumer, ...] = ("onnxruntime", "fastembed", "vespa", "opensearch", "sentence-transformers")


class ExportConfig(Schema):
    """The ONNX graphs of the bundle."""

    consumers: list[Consumer] = Field(
        default_factory=list,
        description="Programs that must be able to load the bundle; a student that one of them cannot load is refused "
        "before training.",
    )
    license: str | None = Field(
        None,
        description="Identifier of the licence for the model card, e.g. apache-2.0; by default that of the teacher's "
        "card, where it is at hand.",
    )
    opset: int = Field(18, ge=17, le=23, description="ONNX operator set.")
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    float16: bool = Field(False, description="Also write the graph in half precision, for GPUs.")


class GatesConfig(Schema):
    """`verify` fails, with exit status 1, when any of these is not met."""

    onnx_fp32_to_torch_min: Cosine = Field(
        0.99999, description="Least cosine of any sentence, ONNX fp32 against torch."
    )
    onnx_fp32_to_torch_max_difference: float = Field(
        1e-4, ge=0, description="Largest difference of any component of a vector, ONNX fp32 against torch."
    )
    int8_to_fp32_mean: Cosine = Field(0.998, description="Mean cosine, quantised graphs against the fp32 graph.")
    int8_to_fp32_p1: Cosine = Field(0.97, description="1st percentile of the same cosine.")
    int8_to_fp32_language_mean: Cosine = Field(0.99, description="Mean cosine of the language that loses most.")
    invariance_min: Cosine = Field(
        0.99999,
        description="Least cosine of a vector with itself: alone, in a batch, padded, cut, in another order, on other "
        "numbers of threads.",
    )
    teacher_cosine_mean: Cosine = Field(0.0, description="Mean cosine of every artefact to the teacher, test split.")
    teacher_skill: float = Field(0.0, description="Skill of every artefact on the test split.")


class EvaluationConfig(Schema):
    """What fidelity is measured on."""

    sets: dict[str, Source] = Field(
        default_factory=dict, description="More evaluation texts by name; the corpus's own test split is always 'test'."
    )
    max_sentences: int = Field(2000, ge=2, description="At most this many sentences of each set.")
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples for the 95 % interval.")


class BenchConfig(Schema):
    """How speed is measured: every batch size with every length is a cell of the grid."""

    batch_sizes: list[int] = Field(default_factory=lambda: [1, 8, 32, 128], min_length=1)
    lengths: list[int | None] = Field(
        [None],
        min_length=1,
        description="Tokens of the texts, special ones included; null: the texts as they are.",
    )
    threads: int | None = Field(None, ge=1, description="Threads per engine; by default every core.")
    rounds: int = Field(
        30, ge=5, description="Rounds, at least, in which the engines alternate; each gives one pair for the ratio."
    )
    interval: float | None = Field(
        0.05,
        gt=0,
        description="More rounds until the 95 % interval of every ratio is narrower than this share of it; null: "
        "exactly `rounds`, however long they take.",
    )
    max_seconds: float = Field(
        240, gt=0, description="Time for the whole measurement; cells whose rounds do not fit are left out."
    )
    seconds_per_round: float = Field(0.1, gt=0, description="Time an engine works per round and cell, at least once.")
    cold_starts: int = Field(5, ge=0, description="Fresh processes per engine that are timed to their first vector.")
    throughput_runs: int = Field(3, ge=0, description="Runs over all texts per engine, in its own batches.")
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _grid_can_be_measured(self) -> BenchConfig:
        for name, values in (("batch_sizes", self.batch_sizes), ("lengths", self.lengths)):
            if wrong := [value for value in values if value is not None and value < 1]:
                raise ValueError(f"{name}: {wrong[0]} is not positive")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {values} names a value twice; leave one out")
        return self


class PlanConfig(Schema):
    """The shapes that `plan` measures: every combination of the lists, over the job's own `student` block."""

    layers: list[int] = Field(default_factory=lambda: [2, 3, 4, 6], min_length=1)
    hidden_size: list[int] | None = Field(None, description="By default the teacher's own, a half and a third of it.")
    intermediate_size: list[int] | None = Field(None, description="By default in the teacher's proportion.")
    attention_heads: list[int] | None = Field(None, description="By default as in `student.attention_heads`.")
    embedding_size: list[int | None] = Field([None], min_length=1, description="null: as wide as hidden_size.")
    speedup: float = Field(10.0, gt=0, description="How many times the teacher in ONNX Runtime fp32 to choose for.")
    batch: int = Field(1, ge=1, description="The batch size at which `speedup` must be reached.")
    batch_sizes: list[int] = Field(default_factory=lambda: [1, 32], min_length=1, description="What is measured.")
    rounds: int = Field(10, ge=5, description="Rounds in which teacher and candidates alternate.")

    @model_validator(mode="after")
    def _target_is_measured(self) -> PlanConfig:
        if self.batch not in self.batch_sizes:
            raise ValueError(f"batch {self.batch} is not among batch_sizes {self.batch_sizes}; add it")
        return self
