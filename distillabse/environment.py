"""What this machine has: CPU, GPUs, packages, and the execution providers that really load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.table import Table

from distillabse.cores import usable_cores as usable_cores
from distillabse.encoder import import_onnxruntime, preload_cuda
from distillabse.errors import ConfigurationError

if TYPE_CHECKING:
    import onnx

PACKAGES = (
    *("distillabse", "torch", "transformers", "sentence-transformers", "tokenizers", "datasets", "accelerate"),
    *("deepspeed", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "optimum", "mteb", "numpy", "scipy"),
)
X86_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
ARM_FLAGS = ("asimddp", "i8mm", "bf16")
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}

CPU_INFORMATION = Path("/proc/cpuinfo")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
NVIDIA_DRIVER = Path("/sys/module/nvidia/version")

INSTALL_ONE_RUNTIME = (
    "Install exactly one: `pip uninstall -y onnxruntime onnxruntime-gpu`, and then "
    "`pip install 'distillabse[cpu]'`, or `pip install 'distillabse[gpu]'` for NVIDIA GPUs."
)


def describe_environment() -> dict[str, Any]:
    """Hardware and package versions, for the records that stages write; what cannot be found out is None."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_field("model name") or platform.processor() or platform.machine(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "flags": cpu_flags(),
            "governor": _read(GOVERNOR),
            "load_average": list(os.getloadavg()),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def cpu_flags() -> list[str]:
    """The CPU's flags that decide how fast INT8 and bfloat16 are; empty where the system does not tell."""
    present = (_cpu_field("flags") or _cpu_field("Features") or "").split()
    return [flag for flag in X86_FLAGS + ARM_FLAGS if flag in present]


def bf16_is_fast() -> bool:
    """Whether the GPU, or without one the CPU, has hardware for bfloat16 arithmetic."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(BF16_FLAGS.intersection(cpu_flags()))


def require_device(device: str) -> None:
    """Make sure that PyTorch can use the device, "cpu" or "cuda".

    Raises:
        ConfigurationError: a GPU is asked for and PyTorch has none.
    """
    if not device.startswith("cuda"):
        return
    import torch

    if torch.version.cuda is None:
        raise ConfigurationError(
            f"The device {device!r} was asked for, but this PyTorch ({torch.__version__}) is built without CUDA. "
            "Install a CUDA build as https://pytorch.org/get-started/locally tells, or choose the device 'cpu'."
        )
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"The device {device!r} was asked for, but PyTorch finds no usable GPU. Check `nvidia-smi`, the driver "
            f"(PyTorch wants CUDA {torch.version.cuda}) and CUDA_VISIBLE_DEVICES, or choose the device 'cpu'."
        )


def onnxruntime_distributions() -> list[str]:
    """Installed distributions that own the Python package `onnxruntime`; more than one overwrite each other's files."""
    return sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", [])))


def check_onnxruntime() -> None:
    """Make sure that exactly one build of ONNX Runtime is installed.

    Raises:
        ConfigurationError: there is none, or there are several.
    """
    installed = onnxruntime_distributions()
    if not installed:
        raise ConfigurationError(f"ONNX Runtime is not installed. {INSTALL_ONE_RUNTIME}")
    if len(installed) > 1:
        raise ConfigurationError(
            f"{' and '.join(installed)} are installed together and overwrite each other's files. {INSTALL_ONE_RUNTIME}"
        )


def execution_providers() -> dict[str, bool]:
    """For each provider that ONNX Runtime lists, whether it really loads: being listed says nothing about hardware."""
    runtime = import_onnxruntime()
    graph = _smallest_graph().SerializeToString()

    def loads(provider: str) -> bool:
        try:
            session = runtime.InferenceSession(graph, providers=[provider], enable_fallback=False)
        except Exception:  # ONNX Runtime's errors share no base class
            return False
        return bool(session.get_providers()[0] == provider)

    listed = runtime.get_available_providers()
    if "CUDAExecutionProvider" in listed:
        preload_cuda(runtime)
    with _quiet(runtime):
        return {provider: loads(provider) for provider in listed}


def doctor() -> tuple[Table, list[str]]:
    """What this machine can do: a table to show, and its problems, each with a remedy."""
    environment = describe_environment()
    cpu, runtimes = environment["cpu"], onnxruntime_distributions()
    providers = execution_providers() if runtimes else {}

    table = Table("what", "found", title="distillabse doctor")
    table.add_row("Python", f"{environment['python']} on {environment['platform']}")
    table.add_row("CPU", f"{cpu['model']}, {cpu['physical_cores']} cores, {usable_cores()} usable")
    table.add_row("CPU flags", " ".join(cpu["flags"]) or "unknown")
    table.add_row("memory", f"{environment['memory_bytes'] / 2**30:.1f} GiB")
    for gpu in environment["gpus"]:
        table.add_row(
            "GPU", f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, driver {gpu['driver'] or 'unknown'}"
        )
    if not environment["gpus"]:
        table.add_row("GPU", "none that PyTorch can use")
    for provider, loads in providers.items():
        table.add_row(provider, "loads" if loads else "listed, does not load")
    for package, version in environment["versions"].items():
        table.add_row(package, version or "not installed")
    return table, _problems(environment, runtimes, providers)


def _problems(environment: dict[str, Any], runtimes: list[str], providers: dict[str, bool]) -> list[str]:
    problems = []
    try:
        check_onnxruntime()
    except ConfigurationError as error:
        problems.append(str(error))
    flags = environment["cpu"]["flags"]
    if flags and not INT8_FLAGS.intersection(flags):
        target = "avx512" if "avx512f" in flags else "avx2"
        problems.append(
            f"This CPU has no INT8 dot product (VNNI): INT8 gains little here, and graphs for avx512_vnni lose "
            f"accuracy. To serve on this machine, set `export.quantization.cpu={target}`."
        )
    if environment["gpus"] and "onnxruntime-gpu" in runtimes and not providers.get("CUDAExecutionProvider"):
        problems.append(
            "PyTorch sees a GPU, but ONNX Runtime's CUDAExecutionProvider does not load: its CUDA or cuDNN libraries "
            "are missing. `pip install 'onnxruntime-gpu[cuda,cudnn]'`, and check the driver with `nvidia-smi`."
        )
    if not environment["gpus"] and _read(NVIDIA_DRIVER):
        problems.append(
            f"The NVIDIA driver {_read(NVIDIA_DRIVER)} is loaded, but PyTorch finds no usable GPU. Install a CUDA "
            "build as https://pytorch.org/get-started/locally tells, and check CUDA_VISIBLE_DEVICES."
        )
    if environment["cpu"]["governor"] == "powersave":
        problems.append(
            "The CPU governor is `powersave`: latencies will vary. Before `bench`: "
            "`sudo cpupower frequency-set -g performance`."
        )
    return problems


def _gpus() -> list[dict[str, Any]]:
    import torch

    return [
        {
            "name": torch.cuda.get_device_properties(index).name,
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "driver": _read(NVIDIA_DRIVER),
        }
        for index in range(torch.cuda.device_count())
    ]


def _smallest_graph() -> onnx.ModelProto:
    """One Identity node, in formats old enough for every ONNX Runtime that is supported."""
    from onnx import TensorProto, helper

    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", tensors[:1], tensors[1:])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@contextmanager
def _quiet(runtime: Any) -> Iterator[None]:
    """Failing to load is an answer here, not something to log."""
    fatal, warning = 4, 2
    runtime.set_default_logger_severity(fatal)
    try:
        yield
    finally:
        runtime.set_default_logger_severity(warning)


def _cpu_field(name: str) -> str | None:
    """A field of the first CPU in /proc/cpuinfo."""
    for line in (_read(CPU_INFORMATION) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
