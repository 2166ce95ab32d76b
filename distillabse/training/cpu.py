"""What makes training on a CPU faster and leaves its results alone."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distillabse.models.teacher import transformer_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainingArguments

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_NEVER = 2**30
# Where glibc's own thresholds end up once a process has freed large blocks.
_USUAL_MMAP = 32 * 2**20
_USUAL_TRIM = 2 * _USUAL_MMAP


@contextmanager
def fast_on_cpu(student: SentenceTransformer, arguments: TrainingArguments) -> Iterator[None]:
    """Train the student faster in here if training runs on a CPU; nothing is changed on a GPU, or afterwards.

    In bfloat16 the student attends with transformers' eager attention: on a CPU the backward pass of PyTorch's own
    takes several times as long there. The results differ by rounding. In float32 both are equally fast.
    """
    if arguments.device.type != "cpu":
        yield
        return
    model = transformer_of(student)
    own = model.config._attn_implementation
    if arguments.bf16:
        model.set_attn_implementation("eager")
    try:
        with keep_freed_memory():
            yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let glibc keep what is freed in here for the next request; afterwards it goes back to the system.

    Every step asks for the same large blocks again, such as the gradient of the embedding table. By default the system
    takes each back at once and fills it with zeros page by page when it is asked for again. Does nothing without glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _NEVER)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        libc.malloc_trim(0)
