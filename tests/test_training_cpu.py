"""Training on a CPU: attention in bfloat16, and memory that stays with the process."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

from distillabse.config import DenseStudentConfig, TeacherConfig
from distillabse.models.folder import save_encoder
from distillabse.models.student import build_student
from distillabse.models.teacher import load_teacher, transformer_of
from distillabse.training.cpu import fast_on_cpu


@pytest.fixture
def student(encoder_folder):
    return build_student(load_teacher(TeacherConfig(model=str(encoder_folder))), DenseStudentConfig(layers=2))


@pytest.mark.parametrize(("bf16", "expected"), [(True, "eager"), (False, "sdpa")])
def test_attention_is_eager_only_while_training_in_bf16(student, tmp_path, bf16, expected):
    model = transformer_of(student)
    batch = {
        "input_ids": torch.tensor([[2, 9, 8, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
    }
    before = student(dict(batch))["sentence_embedding"]
    with fast_on_cpu(student, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=bf16)):
        assert model.config._attn_implementation == expected
        inside = student(dict(batch))["sentence_embedding"]
        (tmp_path / "saved").mkdir()
        save_encoder(student, tmp_path / "saved")
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(inside, before, atol=1e-6, rtol=0)
    assert not [key for key in json.loads((tmp_path / "saved" / "config.json").read_text()) if "attn_impl" in key]


KEEPING = """
import psutil, torch
from distillabse.training.cpu import keep_freed_memory

def held():
    return psutil.Process().memory_info().rss >> 20

def use():
    torch.empty(48 * 2**18).fill_(1)  # 48 MiB, freed at once

use()
before = held()
with keep_freed_memory():
    use()
    inside = held()
print(inside - before, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_while_training_and_no_longer():
    """In MiB, in a process of its own: how an allocator behaves depends on all that it gave out before."""
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True)
    inside, afterwards = map(int, done.stdout.split())
    assert inside > 40 and afterwards < 10
