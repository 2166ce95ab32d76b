"""Training on a CPU: attention in bfloat16, and memory that stays with the process."""

import json
import platform
import resource
import sys

import pytest
import torch
from transformers import TrainingArguments

from distillabse.config import DenseStudentConfig, TeacherConfig
from distillabse.models.folder import save_encoder
from distillabse.models.student import build_student
from distillabse.models.teacher import load_teacher, transformer_of
from distillabse.training.cpu import fast_on_cpu, keep_freed_memory


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


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    def page_faults():
        """Of writing to blocks of 48 MiB, each freed before the next; a page has 4 KiB unless it is huge."""
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.empty(48 * 2**18).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first

    outside = page_faults()
    with keep_freed_memory():
        page_faults()
        inside = page_faults()
    assert inside < outside / 10
    assert page_faults() > outside / 2
