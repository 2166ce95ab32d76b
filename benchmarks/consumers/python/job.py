"""What every consumer does: load once, encode each text alone and all in batches, write the vectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32

Encode = Callable[[Sequence[str]], Any]


def answer(load: Callable[[str, dict[str, Any]], Encode], packages: Sequence[str]) -> None:
    """Run the job that the command line names.

    The job is a JSON file: `folder`, `file` (a graph inside it), `pooling` (mean or cls), `dimension`, `texts`, and
    `output`, a folder for alone.f32, batched.f32 and versions.json.
    """
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    encode = load(job["folder"], job)
    texts, output = job["texts"], Path(job["output"])
    alone = np.concatenate([np.asarray(encode([text]), dtype=np.float32) for text in texts])
    starts = range(0, len(texts), BATCH)
    batched = np.concatenate([np.asarray(encode(texts[start : start + BATCH]), dtype=np.float32) for start in starts])
    alone.tofile(output / "alone.f32")
    batched.tofile(output / "batched.f32")
    (output / "versions.json").write_text(json.dumps({name: version(name) for name in packages}))
