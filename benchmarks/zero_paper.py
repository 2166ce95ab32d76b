"""Memory of weights, gradients and AdamW's state on every GPU, reckoned for the jobs in `configs/`.

    python benchmarks/zero_paper.py    # prints the table of docs/scaling.md

The reckoning is that of ZeRO (arXiv:1910.02054, section 5 and figure 1). Parameters are counted on models without
memory. Activations, communication buffers and what PyTorch itself takes are left out; zero_memory.py measures.
"""

from __future__ import annotations

from typing import Any

import torch
from labse_stand_in import LABSE, VOCABULARY_ROWS
from torch import nn

from distillabse.config import TrainedStudentConfig
from distillabse.models.shape import TransformerShape, resolve_shape, transformer_shape
from distillabse.settings import load_config

GPUS = (8, 64)
# Bytes of AdamW in fp32: the optimizer's are two moments.
FP32 = {"weights": 4, "gradients": 4, "optimizer": 8}
# In bf16 a float32 copy of the weights comes to them. DeepSpeed 0.19 keeps gradients in the type of the model, since
# configs/deepspeed sets no data_types.grad_accum_dtype.
MIXED = {"weights": 2, "gradients": 2, "optimizer": 12}


def bytes_per_parameter(stage: int, processes: int, weights: int, gradients: int, optimizer: int) -> float:
    """Bytes that a process holds for each trained parameter (arXiv:1910.02054, section 5).

    Args:
        stage: of ZeRO; 0 is plain data parallel.
        processes: among which the stage shares out.
        weights: bytes of one.
        gradients: bytes of one.
        optimizer: bytes of the optimizer's state of one, its own copy of the weight included; the paper's K.
    """
    shared = [processes if stage >= since else 1 for since in (3, 2, 1)]
    return sum(size / share for size, share in zip((weights, gradients, optimizer), shared, strict=True))


def paper_table() -> str:
    """Gigabytes of weights, gradients and optimizer state on every GPU, as the Markdown table of docs/scaling.md."""
    lines = [
        "| student | trained | frozen | DDP | ZeRO 1 | ZeRO 2 | ZeRO 3 | teacher | teacher, sharded |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, student, teacher in jobs():
        trained, frozen = trained_and_frozen(student)
        taught = sum(trained_and_frozen(teacher))
        cells = [name, f"{trained / 1e6:.1f} M", f"{frozen / 1e6:.1f} M", gigabytes(training_bytes(trained, frozen))]
        for stage in (1, 2, 3):
            cells.append(gigabytes(*(training_bytes(trained, frozen, stage, gpus) for gpus in GPUS)))
        cells.append(gigabytes(taught * FP32["weights"]))
        cells.append(gigabytes(*(taught * MIXED["weights"] / gpus for gpus in GPUS)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trained_and_frozen(model: nn.Module) -> tuple[int, int]:
    """Numbers of weights that are trained and that are not."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters()) - trained


def training_bytes(trained: int, frozen: int, stage: int = 0, gpus: int = 1) -> float:
    """Bytes on every GPU of a student's weights, gradients and optimizer state.

    Args:
        trained: number of weights that are.
        frozen: number of those that are not: they have neither gradient nor state.
        stage: of ZeRO, in bf16; 0 is DDP, whose weights are float32 under autocast.
        gpus: how many share.
    """
    kinds = MIXED if stage else FP32
    resting = bytes_per_parameter(stage, gpus, weights=kinds["weights"], gradients=0, optimizer=0)
    return trained * bytes_per_parameter(stage, gpus, **kinds) + frozen * resting


def gigabytes(*sizes: float) -> str:
    """Bytes as GB, side by side."""
    return " / ".join(f"{size / 1e9:.2f}" for size in sizes)


def jobs() -> list[tuple[str, nn.Module, nn.Module]]:
    """Name, student and teacher of the jobs in `configs/`; labse-small's assistant is also the teacher of its student.

    All without memory for their weights.
    """
    large, small = load_config("labse-opensubtitles"), load_config("labse-small")
    assert isinstance(large.student, TrainedStudentConfig) and isinstance(small.student, TrainedStudentConfig)
    assert small.assistant is not None and small.vocabulary.size is not None
    rows = small.vocabulary.size
    labse = transformer_shape(LABSE)
    whole, trimmed = encoder(labse, VOCABULARY_ROWS), encoder(labse, rows)
    unfrozen = large.student.model_copy(update={"freeze_embeddings": False})
    assistant = small.assistant.student
    taught = [
        ("`labse-opensubtitles`", large.student, VOCABULARY_ROWS, whole),
        ("with `freeze_embeddings: false`", unfrozen, VOCABULARY_ROWS, whole),
        ("`labse-small`, its assistant", assistant, rows, trimmed),
        ("`labse-small`", small.student, rows, student_of(assistant, labse, rows)),
    ]
    return [
        (f"{name}: {described(config, labse, rows)}", student_of(config, labse, rows), teacher)
        for name, config, rows, teacher in taught
    ]


def described(config: TrainedStudentConfig, teacher: TransformerShape, rows: int) -> str:
    """Layers, width and table of a student in words."""
    shape, _ = resolve_shape(config, teacher)
    frozen = ", frozen" if config.freeze_embeddings else ""
    return f"{shape.layers} x {shape.hidden_size}, table {rows:,} x {shape.embedding_size}{frozen}"


def student_of(config: TrainedStudentConfig, teacher: TransformerShape, rows: int) -> nn.Module:
    """The student that a `student` block describes; what `build_student` freezes is frozen."""
    shape, _ = resolve_shape(config, teacher)
    student = encoder(shape, rows)
    student[0].embeddings.requires_grad_(not config.freeze_embeddings)  # type: ignore[union-attr]
    return student


def encoder(shape: TransformerShape, rows: int) -> nn.Sequential:
    """Transformer and dense head of a shape on the meta device, with what else LaBSE has."""
    from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

    settings: dict[str, Any] = {
        "vocab_size": rows, "num_hidden_layers": shape.layers, "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size, "num_attention_heads": shape.attention_heads,
        "max_position_embeddings": LABSE["max_position_embeddings"],
    }  # fmt: skip
    with torch.device("meta"):
        head = nn.Linear(shape.hidden_size, LABSE["hidden_size"])
        if shape.embedding_size < shape.hidden_size:
            return nn.Sequential(ElectraModel(ElectraConfig(embedding_size=shape.embedding_size, **settings)), head)
        bert = BertModel(BertConfig(**settings))
        bert.pooler.requires_grad_(False)
        return nn.Sequential(bert, head)


if __name__ == "__main__":
    print(paper_table())
