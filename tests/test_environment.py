from __future__ import annotations

import importlib.metadata

import pytest
from rich.console import Console

from distillabse import environment
from distillabse.errors import ConfigurationError

X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16\n\nprocessor\t: 1\n"
X86_WITHOUT_VNNI = "model name\t: Old CPU\nflags\t\t: fpu avx2 avx\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Puts a text in the place of /proc/cpuinfo, and no governor and no driver."""

    def use(cpu_information, governor=None, driver=None):
        for name, text in (
            ("CPU_INFORMATION", cpu_information),
            ("GOVERNOR", governor),
            ("NVIDIA_DRIVER", driver),
        ):
            file = tmp_path / name
            if text is not None:
                file.write_text(text)
            monkeypatch.setattr(environment, name, file)

    return use


@pytest.fixture
def installed(monkeypatch):
    """Pretends that these distributions own the package `onnxruntime`."""

    def use(*names):
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": list(names)})

    return use


@pytest.mark.parametrize(
    ("text", "flags", "bf16"),
    [
        (X86, ["avx2", "avx512f", "avx512_vnni", "amx_bf16"], True),
        (X86_WITHOUT_VNNI, ["avx2"], False),
        (ARM, ["asimddp", "i8mm"], False),
        (None, [], False),
    ],
)
def test_cpu_flags(machine, monkeypatch, text, flags, bf16):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine(text)
    assert environment.cpu_flags() == flags
    assert environment.bf16_is_fast() is bf16


def test_describe_environment(machine):
    import onnx

    machine(X86, governor="performance\n")
    described = environment.describe_environment()
    assert described["cpu"]["model"] == "Some CPU"
    assert described["cpu"]["governor"] == "performance"
    assert described["memory_bytes"] > 2**28
    assert described["versions"]["onnx"] == onnx.__version__
    assert described["versions"].keys() >= {"torch", "onnxruntime-gpu", "deepspeed"}


def test_absent_packages_are_none(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("there-is-no-such-package",))
    assert environment.describe_environment()["versions"] == {"there-is-no-such-package": None}


def test_usable_cores_are_at_most_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(environment.psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert environment.usable_cores() == 3
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert environment.usable_cores() == 8


def test_exactly_one_onnxruntime(installed):
    installed("onnxruntime")
    environment.check_onnxruntime()
    installed("onnxruntime-gpu", "onnxruntime", "onnxruntime")
    assert environment.onnxruntime_distributions() == ["onnxruntime", "onnxruntime-gpu"]
    with pytest.raises(ConfigurationError, match=r"onnxruntime and onnxruntime-gpu are installed .*pip uninstall -y"):
        environment.check_onnxruntime()
    installed()
    with pytest.raises(ConfigurationError, match=r"not installed\. .*distillabse\[cpu\]"):
        environment.check_onnxruntime()


def test_a_provider_counts_only_when_it_loads(monkeypatch):
    import onnxruntime

    listed = ["NoSuchExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.warns(UserWarning, match="NoSuchExecutionProvider"):
        assert environment.execution_providers() == {"NoSuchExecutionProvider": False, "CPUExecutionProvider": True}


def test_a_gpu_asked_for_must_be_there(monkeypatch):
    import torch

    environment.require_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigurationError, match="built without CUDA"):
        environment.require_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigurationError, match=r"PyTorch wants CUDA 13\.0"):
        environment.require_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment.require_device("cuda")


def text_of(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_doctor_on_a_healthy_machine(machine, installed, monkeypatch):
    machine(X86)
    installed("onnxruntime")
    monkeypatch.setattr(environment, "_gpus", list)
    monkeypatch.setattr(environment, "execution_providers", lambda: {"CPUExecutionProvider": True})
    table, problems = environment.doctor()
    assert problems == []
    assert "Some CPU" in text_of(table)
    assert "avx2 avx512f avx512_vnni amx_bf16" in text_of(table)


def test_doctor_names_each_problem_and_its_remedy(machine, installed, monkeypatch):
    machine(X86_WITHOUT_VNNI, governor="powersave", driver="580.65.06")
    installed("onnxruntime", "onnxruntime-gpu")
    monkeypatch.setattr(environment, "execution_providers", lambda: {"CUDAExecutionProvider": False})
    monkeypatch.setattr(environment, "_gpus", list)
    table, problems = environment.doctor()
    assert [problem.split(".")[0] for problem in problems] == [
        "onnxruntime and onnxruntime-gpu are installed together and overwrite each other's files",
        "This CPU has no INT8 dot product (VNNI): INT8 gains little here, and graphs for avx512_vnni lose accuracy",
        "The NVIDIA driver 580",
        "The CPU governor is `powersave`: latencies will vary",
    ]
    assert "export.quantization.cpu=avx2" in problems[1]
    assert "listed, does not load" in text_of(table)


def test_doctor_sees_a_gpu_that_onnxruntime_cannot_use(machine, installed, monkeypatch):
    machine(X86)
    installed("onnxruntime-gpu")
    gpu = {"name": "Some GPU", "memory_bytes": 80 * 2**30, "driver": "580.65.06"}
    monkeypatch.setattr(environment, "_gpus", lambda: [gpu])
    monkeypatch.setattr(environment, "execution_providers", lambda: {"CUDAExecutionProvider": False})
    table, problems = environment.doctor()
    assert len(problems) == 1
    assert "CUDAExecutionProvider does not load" in problems[0]
    assert "Some GPU, 80.0 GiB, driver 580.65.06" in text_of(table)
