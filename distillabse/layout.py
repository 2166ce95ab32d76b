"""Every file name of a run folder and of a bundle. Nothing else spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODEL_SETTINGS = "config.json"
MODULES = "modules.json"
TRANSFORMER_SETTINGS = "sentence_bert_config.json"
SENTENCE_TRANSFORMERS_SETTINGS = "config_sentence_transformers.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
MODEL_CARD = "README.md"
CHECKSUMS = "SHA256SUMS"
PROVENANCE = "distillabse.json"
ONNX_FP32 = "onnx/model.onnx"
# What transformers.js, optimum and infinity call the INT8 and the half-precision graph; only flavours have them.
ONNX_QUANTIZED = "onnx/model_quantized.onnx"
ONNX_FLOAT16 = "onnx/model_fp16.onnx"
# Of the flavour for optimum: what its environment holds.
REQUIREMENTS = "requirements.txt"
OBJECTIVES = "objectives.safetensors"
# Of a checkpoint: how many processes wrote it, and how they shared its steps.
TOPOLOGY = "topology.json"
# Beside the checkpoints, until the student is written.
TRAINING_DATA = "training-data"
TEACHER_CACHE = "teacher-cache"
UNIVERSAL_CHECKPOINT = "universal"
CALIBRATED_LINEARS = "calibrated_linears.safetensors"
# Beside the weights of an encoder: its linear layers in INT8.
QUANTIZED_LINEARS = "quantized_linears.safetensors"
# Where a student's vectors are narrower than its teacher's: the matrix that takes a teacher's vector to them.
TEACHER_PROJECTION = "teacher_projection.safetensors"

# Token ids in files: int32 ids of all sentences in line, int64 starts, and their numbers and digest.
TOKEN_IDS = "ids.bin"
TOKEN_STARTS = "starts.bin"
TOKENS_RECORD = "tokens.json"

# Translation pairs: token ids of student and teacher in a folder each, int64 rows of both sides of every pair, and the
# words that mean the same: int64 starts, six int32 positions each.
STUDENT_TOKENS = "student"
TEACHER_TOKENS = "teacher"
PAIR_ROWS = "pairs.bin"
LINK_STARTS = "link-starts.bin"
LINK_SPANS = "link-spans.bin"

# Inside a teacher cache: what it was made from, the sentence vectors, and one array for every tapped tensor.
CACHE_RECORD = "cache.json"
CACHE_SENTENCES = "sentence.npy"
CACHE_TAP = "tap-{}.npy"

# What the static floor was distilled from.
STATIC_RECORD = "made_from.json"

# What is kept of each shape that the planner builds and measures.
CANDIDATE = "candidate.json"
MEASUREMENT = "measurement.json"

# The names that sentence-transformers and optimum use for INT8 graphs, by the CPU they are made for.
ONNX_INT8 = {
    "avx512_vnni": "onnx/model_qint8_avx512_vnni.onnx",
    "avx512": "onnx/model_qint8_avx512.onnx",
    "avx2": "onnx/model_quint8_avx2.onnx",
    "arm64": "onnx/model_qint8_arm64.onnx",
}


def int8_graph(bundle: Path) -> str | None:
    """The INT8 graph of a bundle, if it has one."""
    return next((name for name in ONNX_INT8.values() if (bundle / name).is_file()), None)


def served_graph(bundle: Path, device: str) -> str:
    """What ONNX Runtime runs of a bundle: INT8 on a CPU, half precision on a GPU, where it has them; else fp32."""
    if device == "cpu":
        return int8_graph(bundle) or ONNX_FP32
    return ONNX_FLOAT16 if (bundle / ONNX_FLOAT16).is_file() else ONNX_FP32


def pooled_graph(name: str) -> str:
    """The graph of sentence vectors alone beside one of a bundle, e.g. onnx/model_pooled.onnx of onnx/model.onnx."""
    return name.replace("onnx/model", "onnx/model_pooled", 1)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one job: a folder or file for each stage's product."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, ready to be run again."""
        return self.root / "config.yaml"

    @property
    def record(self) -> Path:
        """Hash of the resolved configuration and the versions of everything."""
        return self.root / "run.json"

    @property
    def corpus(self) -> Path:
        """Folder: train.parquet, dev.parquet, test.parquet, corpus.json, rejected.jsonl."""
        return self.root / "corpus"

    def split(self, name: str) -> Path:
        """The Parquet file of one split: train, dev or test."""
        return self.corpus / f"{name}.parquet"

    @property
    def corpus_counts(self) -> Path:
        """How many rows every source gave and every rule removed."""
        return self.corpus / "corpus.json"

    @property
    def rejected(self) -> Path:
        """A sample of the rejected lines of every source."""
        return self.corpus / "rejected.jsonl"

    @property
    def vocabulary(self) -> Path:
        """Folder: vocabulary.json, token_counts.npy, and with a trimmed or new vocabulary encoder/."""
        return self.root / "vocabulary"

    @property
    def vocabulary_counts(self) -> Path:
        """What the corpus uses of the teacher's vocabulary, per language."""
        return self.vocabulary / "vocabulary.json"

    @property
    def token_counts(self) -> Path:
        """How often the corpus uses each row of the student's vocabulary: int64 [rows]."""
        return self.vocabulary / "token_counts.npy"

    @property
    def base_encoder(self) -> Path:
        """What students start from, where its vocabulary was trimmed or made anew: loads in SentenceTransformer."""
        return self.vocabulary / "encoder"

    @property
    def plan(self) -> Path:
        """Folder: plan.json, plan.svg, student.yaml, and candidates/ with what was built and measured."""
        return self.root / "plan"

    @property
    def plan_result(self) -> Path:
        """What the planner measured."""
        return self.plan / "plan.json"

    @property
    def plan_figure(self) -> Path:
        """The same as a figure."""
        return self.plan / "plan.svg"

    @property
    def planned_student(self) -> Path:
        """The chosen student block, ready to paste into a configuration."""
        return self.plan / "student.yaml"

    @property
    def candidates(self) -> Path:
        """A folder for every shape: its graph, and what was measured of it."""
        return self.plan / "candidates"

    @property
    def assistant(self) -> Path:
        """The trained teacher assistant: a folder that SentenceTransformer loads."""
        return self.root / "assistant"

    @property
    def checkpoints(self) -> Path:
        """Working area of the trainer."""
        return self.root / "checkpoints"

    @property
    def assistant_checkpoints(self) -> Path:
        """Working area of the trainer for the assistant."""
        return self.root / "assistant-checkpoints"

    @property
    def quantize_checkpoints(self) -> Path:
        """Working area of the trainer for quantisation-aware distillation."""
        return self.root / "quantize-checkpoints"

    @property
    def quantized(self) -> Path:
        """The student trained with rounding: a folder that SentenceTransformer loads, and its INT8 layers."""
        return self.root / "quantized"

    @property
    def student(self) -> Path:
        """The trained student: a folder that SentenceTransformer loads."""
        return self.root / "student"

    @property
    def training_history(self) -> Path:
        """Every logged figure of the training run, inside the student folder."""
        return self.student / "training_history.json"

    @property
    def bundle(self) -> Path:
        """The product: the folder that production teams serve."""
        return self.root / "bundle"

    @property
    def verify(self) -> Path:
        """Folder: verify.json."""
        return self.root / "verify"

    @property
    def verification(self) -> Path:
        """Fidelity, invariance and the gates."""
        return self.verify / "verify.json"

    @property
    def bench(self) -> Path:
        """Folder: bench.json."""
        return self.root / "bench"

    @property
    def measurements(self) -> Path:
        """Latency, throughput and sizes."""
        return self.bench / "bench.json"

    @property
    def tasks(self) -> Path:
        """Folder: tasks.json."""
        return self.root / "tasks"

    @property
    def task_scores(self) -> Path:
        """Scores of teacher, student and baselines on tasks."""
        return self.tasks / "tasks.json"

    @property
    def static_floor(self) -> Path:
        """The teacher's tokens without context, as a folder that SentenceTransformer loads."""
        return self.root / "static-floor"

    @property
    def report(self) -> Path:
        """Folder: report.html and report.json."""
        return self.root / "report"

    @property
    def report_html(self) -> Path:
        """The page for people."""
        return self.report / "report.html"

    @property
    def report_json(self) -> Path:
        """The same figures for programs."""
        return self.report / "report.json"

    def product(self, stage: str) -> Path:
        """The folder that a stage writes."""
        named = {"distill": self.student, "quantize": self.quantized, "export": self.bundle}
        return named.get(stage, self.root / stage)

    def checkpoints_of(self, stage: str) -> Path:
        """Working area of the trainer in a stage that trains."""
        return self.checkpoints if stage == "distill" else self.root / f"{stage}-checkpoints"

    def stamp(self, stage: str) -> Path:
        """The fingerprint of a finished stage's inputs."""
        return self.root / "stamps" / f"{stage}.json"
