"""DeepSpeed: which settings are refused, whole weights from sharded ones, and checkpoints for other process counts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillabse import layout
from distillabse.errors import ConfigurationError, TrainingError
from distillabse.models.teacher import transformer_of
from distillabse.training.checkpoints import checkpoint_path, checkpoint_step

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainingArguments

_STAGES = (0, 1, 2, 3)
# What a checkpoint holds besides weights and optimizer states, which the universal form keeps in a way of its own.
_COPIED = ("trainer_state.json", "scheduler.pt", layout.OBJECTIVES)


def read_settings(value: str | dict[str, Any], shipped: dict[str, Path]) -> dict[str, Any]:
    """The DeepSpeed settings that `training.deepspeed` names, checked as far as they go by themselves.

    Args:
        value: a file, the name of a shipped file such as zero2, or the settings themselves.
        shipped: the files that come with the package, by name.

    Raises:
        ConfigurationError: DeepSpeed is not installed, there is no such file, or it is not a file of settings.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigurationError(
            "training.deepspeed: DeepSpeed is not installed. Install it with `pip install 'distillabse[deepspeed]'`, "
            "or leave the key out: torchrun alone trains data parallel."
        )
    settings = value if isinstance(value, dict) else _read_file(str(value), shipped)
    stage = zero_stage(settings)
    if stage not in _STAGES:
        raise ConfigurationError(
            f"training.deepspeed: zero_optimization.stage is {stage!r}. Accepted: {', '.join(map(str, _STAGES))}."
        )
    return settings


def zero_stage(settings: dict[str, Any]) -> Any:
    """The ZeRO stage of DeepSpeed settings; None where they name none."""
    block = settings.get("zero_optimization")
    return block.get("stage") if isinstance(block, dict) else None


def default_bf16(settings: dict[str, Any], fast: bool) -> bool:
    """Whether to train in bf16 where the training block does not say: as the settings do, else where it is fast.

    Stage 0 stays in fp32, see `require_agreement`.
    """
    enabled = settings.get("bf16", {}).get("enabled", "auto")
    if enabled == "auto":
        return fast and zero_stage(settings) > 0
    return bool(enabled)


def require_agreement(arguments: TrainingArguments, settings: dict[str, Any]) -> None:
    """Refuse DeepSpeed settings that contradict the training block, before anything is loaded.

    Raises:
        ConfigurationError: names each contradiction.
    """
    mismatches = arguments.hf_deepspeed_config.mismatches
    if mismatches:
        listed = "\n".join(
            f"  {line.removeprefix('- ').replace(' vs hf ', ', training block: ')}" for line in mismatches
        )
        raise ConfigurationError(
            f"training.deepspeed contradicts the training block:\n{listed}\n"
            'Write "auto" in the DeepSpeed settings: the training block then fills it in.'
        )
    if arguments.bf16 and zero_stage(settings) == 0:
        raise ConfigurationError(
            "training.bf16: with ZeRO stage 0 DeepSpeed's bf16 does not train as the other stages do. Set "
            "training.deepspeed=zero1 or higher, or training.bf16=false, or leave training.deepspeed out."
        )
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ConfigurationError("training.fp16: fp16 needs a GPU. Set training.bf16=true or neither.")


def prepare_environment() -> None:
    """What DeepSpeed expects of its launcher and of the shell, where they do not give it.

    It builds operators at first use: with ninja, which pip puts beside the interpreter, and into a folder that all
    environments of a user would share. And it asks for the address of a process group even where there is only one.
    """
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    own = Path(sys.prefix) / "torch_extensions"
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own))
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.update({**alone, "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port())})
    if not torch.cuda.is_available() and shutil.which("c++") is None:
        raise ConfigurationError(
            "training.deepspeed: on a CPU DeepSpeed builds an operator with a C++ compiler, and there is no c++. "
            "Install one (apt-get install g++), or leave the key out: torchrun alone trains data parallel."
        )


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of the module that is trained, whole and in float32, on the CPU; all processes must call this.

    ZeRO keeps the float32 weights that the optimizer moves apart from those that a bf16 or fp16 model runs with, and
    in stage 3 each process has a part of either: what is given here are the former, put together.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        sharded = hasattr(parameter, "ds_id")
        apart = sharded or parameter.dtype != torch.float32
        whole = safe_get_full_fp32_param(parameter) if apart else None
        if whole is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                whole = parameter.detach().clone()
        weights[name] = whole.float().cpu().clone()
    return weights


def universal_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """A copy of a DeepSpeed checkpoint in `folder` that any number of processes can go on from.

    Raises:
        TrainingError: DeepSpeed cannot convert it.
    """
    step = checkpoint_step(checkpoint)
    target = checkpoint_path(folder, step)
    shutil.rmtree(folder, ignore_errors=True)
    target.mkdir(parents=True)
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        "--input_folder", str(checkpoint / tag), "--output_folder", str(target / tag),
        "--num_extract_workers", "1", "--num_merge_workers", "1",
    ]  # fmt: skip
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in os.environ.items() if name not in launcher}
    done = subprocess.run(command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise TrainingError(
            f"DeepSpeed cannot convert {checkpoint} for another number of processes:\n{done.stdout[-2000:]}\n"
            "Start as many processes as wrote it."
        )
    for name in _COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)
    return target


def is_universal(checkpoint: Path) -> bool:
    """Whether `universal_checkpoint` made this one."""
    return (checkpoint / "latest_universal").is_file()


def mend_universal_state(optimizer: Any, weight_decays: list[float]) -> None:
    """Put right what DeepSpeed (0.19) loads wrongly from a universal checkpoint of stage 3.

    It gives all parts of the state one and the same step counter, so that each step counts many times, and all
    parameter groups the weight decay of the first.

    Args:
        optimizer: the torch optimizer that DeepSpeed steps.
        weight_decays: of each parameter group.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    for group, weight_decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay


def announce_checkpoint(arguments: TrainingArguments, checkpoint: str | None) -> None:
    """Tell DeepSpeed whether the checkpoint that it will load is a universal one; before the Trainer is made."""
    universal = checkpoint is not None and is_universal(Path(checkpoint))
    arguments.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = universal


def shard_teacher(teacher: SentenceTransformer, settings: dict[str, Any]) -> None:
    """Spread a frozen teacher's weights over all processes, in place (ZeRO-Inference, arXiv:2207.00032).

    Each layer's weights come together only while it runs, so all processes must run the teacher together, equally
    often. Its vectors do not change.

    Args:
        teacher: the whole one, in the memory of every process.
        settings: DeepSpeed's; with bf16 or fp16 the teacher runs in it.
    """
    import deepspeed

    precision = {name: {"enabled": settings.get(name, {}).get("enabled") is True} for name in ("bf16", "fp16")}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **precision}
    deepspeed.initialize(model=transformer_of(teacher), config=config)[0].eval()


def _read_file(value: str, shipped: dict[str, Path]) -> dict[str, Any]:
    path = shipped.get(value, Path(value))
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigurationError(
            f"training.deepspeed: {value!r} is neither a file nor one of {', '.join(shipped)}."
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"training.deepspeed: {value} is not JSON ({error}).") from None
    if not isinstance(settings, dict):
        raise ConfigurationError(f"training.deepspeed: {value} holds no DeepSpeed settings.")
    return settings


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
