"""The students of the comparison: the same shapes of two teachers, MiniLM for fidelity and LaBSE's shape for speed.

Those of MiniLM are trained, all on the same text for the same number of steps. Those of LaBSE's shape have random
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from real_text import places
from stages import run_missing

SENTENCES, EPOCHS = 25_000, 1.0
STATIC = "static (model2vec)"
TRIMMED = "trimmed teacher"

# Students of all-MiniLM-L6-v2 (6 layers, 384 wide). A narrower one has a Dense head back to the teacher's dimension.
MINILM: dict[str, dict[str, Any]] = {
    TRIMMED: {"kind": "teacher"},
    "4x384": {"layers": 4, "freeze_embeddings": True},
    "3x384": {"layers": 3, "freeze_embeddings": True},
    "3x384, 8 experts in one layer": {
        "layers": 3, "freeze_embeddings": True, "kind": "switch", "experts": 8, "sparse_layers": "every_other",
    },
    "2x384": {"layers": 2, "freeze_embeddings": True},
    "2x384, blocks of 384 (thesis)": {"layers": 2, "intermediate_size": 384, "freeze_embeddings": True},
    "1x384": {"layers": 1},
    "3x384 of 96": {"layers": 3, "embedding_size": 96},
    "6x192": {"layers": 6, "hidden_size": 192, "head": "dense"},
    "4x256 of 128": {"layers": 4, "hidden_size": 256, "embedding_size": 128, "head": "dense"},
    "12x128 (LEALLA's proportions)": {
        "layers": 12, "hidden_size": 128, "attention_heads": 8, "intermediate_size": 512, "head": "dense",
        "initialisation": "embeddings",
    },
}  # fmt: skip

# Students of LaBSE's shape (12 layers, 768 wide); the vocabulary is trimmed to 60,000 rows.
LABSE: dict[str, dict[str, Any]] = {
    "6x768": {"layers": 6},
    "3x768 of 192": {"layers": 3, "embedding_size": 192},
    "2x768, blocks of 768 (thesis)": {"layers": 2, "intermediate_size": 768},
    "6x384": {"layers": 6, "hidden_size": 384},
    "3x384": {"layers": 3, "hidden_size": 384},
    "3x384, 8 experts in one layer": {
        "layers": 3, "hidden_size": 384, "kind": "switch", "experts": 8, "sparse_layers": "every_other",
    },
    "12x192": {"layers": 12, "hidden_size": 192, "attention_heads": 3},
    "3x192": {"layers": 3, "hidden_size": 192, "attention_heads": 3},
    "2x256 of 128": {"layers": 2, "hidden_size": 256, "embedding_size": 128},
    "24x128 (LEALLA-small)": {"layers": 24, "hidden_size": 128, "attention_heads": 8, "intermediate_size": 512},
    "24x192 (LEALLA-base)": {"layers": 24, "hidden_size": 192, "attention_heads": 12, "intermediate_size": 768},
}  # fmt: skip


def job(name: str, data: Path, runs: Path) -> Any:
    """The configuration of one student of MiniLM."""
    from distillabse.settings import load_config, validate

    values = load_config("minilm-english", [f"output={runs}", *places(data)]).model_dump(mode="json")
    values["name"] = "comparison-" + "-".join("".join(c if c.isalnum() else " " for c in name).split())
    values["student"] = MINILM[name]
    values["corpus"]["max_sentences"] = None if name == TRIMMED else SENTENCES
    values["teacher_cache"] = str(runs / "comparison-teacher-cache")
    if name == TRIMMED:
        values["vocabulary"] = {"kind": "trim"}
    if MINILM[name].get("kind") == "switch":
        values["objectives"].append({"kind": "routing"})
    values["training"] |= {"num_train_epochs": EPOCHS, "eval_steps": 0.25, "save_steps": 0.25, "report_to": []}
    return validate(values)


def train(name: str, data: Path, runs: Path) -> Path:
    """Train and export one student of MiniLM where that is not done; the folder of its run."""
    return Path(run_missing(job(name, data, runs), ("corpus", "vocabulary", "distill", "export")).root)
