"""The experts of a Switch student spread over processes, for more experts than one GPU holds.

Every process keeps its share of each layer's experts and all of the rest; tokens travel to their expert and back in two
all-to-all exchanges. Router, capacity, gate and figures stay those of `SwitchFeedForward`: only where an expert runs
changes, so a sharded student computes what the whole one does. DeepSpeed's `MoE` brings the process groups, the
averaging of the experts' gradients, ZeRO 1 and 2 and checkpoints. Its gate is left out: it would route padding, or drop
tokens at random.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pad_sequence

from distillabse import processes
from distillabse.errors import ConfigurationError, InputError
from distillabse.models.switch import Experts, SwitchStudent, sparse_layers

# `mixture` is the attribute of ShardedExperts below, the rest is DeepSpeed's.
_EXPERTS = "mixture.deepspeed_moe.experts.deepspeed_experts"
_EXPERT_NAME = re.compile(rf"(?P<stack>.+)\.{re.escape(_EXPERTS)}\.(?P<expert>\d+)\.(?P<weight>\w+)")


class Expert(Experts):
    """A single expert: DeepSpeed keeps each in a module of its own."""

    def __init__(self, stack: Experts) -> None:
        nn.Module.__init__(self)  # parameters like those of `stack`, but of one expert
        self.activation, self.dropout = stack.activation, stack.dropout
        for name, weights in stack.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(weights[:1].detach().clone()))

    def forward(self, slots: Tensor) -> Tensor:  # type: ignore[override]  # as DeepSpeed calls it
        """[..., hidden size] -> the same shape."""
        return self.one(0, slots.flatten(0, -2)).view(slots.shape)


class NoGate(nn.Module):
    """In the place of DeepSpeed's gate: SwitchFeedForward has routed already."""

    def _set_ep_group(self, group: Any) -> None:
        """DeepSpeed tells its gate the process group."""


class ShardedExperts(nn.Module):
    """This process's share of a layer's experts, called as `Experts` is."""

    def __init__(self, stack: Experts, expert_parallel_size: int) -> None:
        super().__init__()
        experts, hidden_size, _ = stack.inner_weight.shape
        layer = _deepspeed("deepspeed.moe.layer")
        self.mixture = layer.MoE(hidden_size, Expert(stack), experts, ep_size=expert_parallel_size)
        self.mixture.deepspeed_moe.gate = NoGate()
        self.mixture.set_deepspeed_parallelism()
        first = distributed.get_rank(self.group) * len(self.local)
        with torch.no_grad():
            for index, expert in enumerate(self.local, start=first):
                for name, weight in expert.named_parameters():
                    weight.copy_(getattr(stack, name)[index])

    @property
    def group(self) -> Any:
        """The processes that share these experts, in the order of their shares."""
        return self.mixture.deepspeed_moe.ep_group

    @property
    def local(self) -> nn.ModuleList:
        """The experts that this process keeps."""
        experts: nn.ModuleList = self.mixture.deepspeed_moe.experts.deepspeed_experts
        return experts

    def forward(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """As `Experts.forward`, all processes of the group together; each may come with its own number of tokens."""
        if counts is not None:
            slots = pad_sequence(list(torch.split(tokens, list(counts))), batch_first=True)
            return torch.cat([row[:count] for row, count in zip(self._exchanged(slots), counts, strict=True)])
        return self._exchanged(tokens)

    def _exchanged(self, slots: Tensor) -> Tensor:
        """[experts, slots, hidden size] -> the same shape, by way of the processes that keep the experts."""
        exchange = _deepspeed("deepspeed.moe.sharded_moe")._AllToAll.apply
        count, most = slots.shape[1], self._most(slots)
        received = exchange(self.group, nn.functional.pad(slots, (0, 0, 0, most - count)))
        # By process of origin, then by expert of this process.
        output = self.mixture.deepspeed_moe.experts(received.unflatten(0, (-1, len(self.local))))
        returned: Tensor = exchange(self.group, output.flatten(0, 1))
        return returned[:, :count]

    def _most(self, slots: Tensor) -> int:
        """The largest number of slots in the group: in an exchange all send equally much."""
        most = torch.tensor(slots.shape[1], device=slots.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, self.group)
        return int(most)


def check_expert_parallelism(experts: int, expert_parallel_size: int, processes: int, zero_stage: int | None) -> None:
    """Refuse what cannot be trained, before anything is loaded.

    Args:
        experts: of a sparse layer.
        expert_parallel_size: processes that share them; with 1 there is nothing to refuse.
        processes: of the whole job.
        zero_stage: DeepSpeed's, 0 to 3; None where the job does not train with DeepSpeed.

    Raises:
        ConfigurationError: the numbers do not fit, the job trains without DeepSpeed or with ZeRO stage 3, or DeepSpeed
            is not installed.
    """
    if expert_parallel_size == 1:
        return
    key = f"student.expert_parallel_size: {expert_parallel_size}"
    if experts % expert_parallel_size:
        sizes = [size for size in range(1, experts + 1) if experts % size == 0]
        raise ConfigurationError(
            f"{key} processes cannot evenly share {experts} experts (student.experts). Choose one of {sizes}."
        )
    if processes % expert_parallel_size:
        raise ConfigurationError(
            f"{key} needs a number of processes that it divides, and there "
            f"{'is 1' if processes == 1 else f'are {processes}'}. Start the job with "
            f"`torchrun --nproc_per_node {expert_parallel_size}`, or set student.expert_parallel_size: 1."
        )
    if zero_stage is None:
        raise ConfigurationError(
            f"{key} needs DeepSpeed, which alone averages the gradients of spread experts rightly. Set "
            "training.deepspeed to its configuration, or student.expert_parallel_size: 1."
        )
    if zero_stage == 3:
        raise ConfigurationError(
            f"{key} does not work with ZeRO stage 3, which splits experts itself. Set zero_optimization.stage: 2 in "
            "training.deepspeed, or student.expert_parallel_size: 1."
        )
    _deepspeed("deepspeed")


def shard_experts(model: SwitchStudent, expert_parallel_size: int, zero_stage: int | None) -> None:
    """Spread the experts of every sparse layer over processes, in place; before `deepspeed.initialize`.

    Afterwards every forward pass, also in evaluation, is one of all processes together, and `model.state_dict()` holds
    this process's share: `gathered_state_dict` gives the whole.

    Args:
        model: the whole student, in the memory of every process; process r of a group of `expert_parallel_size` keeps
            the r-th share of the experts, with their weights, dtype and device.
        expert_parallel_size: processes that share the experts of a layer; with 1 nothing changes.
        zero_stage: DeepSpeed's, 0 to 2; None is refused. Stage 0 clips by a slightly wrong norm (it averages the norms
            of processes with different experts); stages 1 and 2 clip as one process does.

    Raises:
        ConfigurationError: see `check_expert_parallelism`.
    """
    check_expert_parallelism(model.config.num_experts, expert_parallel_size, _processes(), zero_stage)
    if expert_parallel_size == 1:
        return
    _deepspeed("deepspeed").init_distributed(verbose=False)
    for layer in sparse_layers(model).values():
        sharded = ShardedExperts(layer.feed_forward.experts, expert_parallel_size)
        layer.feed_forward.add_module("experts", sharded)


def expert_parameter_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizer parameter groups as DeepSpeed needs them: those of experts apart from the others.

    Args:
        groups: as any torch optimizer takes them; `params` and options such as weight_decay, which are kept.

    Returns:
        New groups, each with a `name`; those of experts are marked with `moe: True`.

    Raises:
        ConfigurationError: DeepSpeed is not installed.
    """
    named = [
        {"name": f"parameters-{index}", **group, "params": list(group["params"])} for index, group in enumerate(groups)
    ]
    split = _deepspeed("deepspeed.moe.utils").split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in split if group["params"]]


def gathered_state_dict(model: SwitchStudent) -> dict[str, Tensor]:
    """The state dict of the whole student, on the CPU of every process; all processes must call this.

    Each layer's experts are stacked, as `SwitchStudent` has them: [experts, ...], in their dtype. A student that was
    never sharded gives its own state dict.
    """
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for index, layer in sparse_layers(model).items():
        experts: nn.Module = layer.feed_forward.experts
        if isinstance(experts, ShardedExperts):
            prefix = f"encoder.layer.{index}.feed_forward.experts."
            state = {name: value for name, value in state.items() if not name.startswith(prefix)}
            for name, _ in experts.local[0].named_parameters():
                share = torch.cat([expert.get_parameter(name).detach() for expert in experts.local])
                shares = [torch.empty_like(share) for _ in range(distributed.get_world_size(experts.group))]
                distributed.all_gather(shares, share, experts.group)
                state[prefix + name] = torch.cat(shares).cpu()
    return state


def convert_checkpoint(folder: Path, prefix: str = "", tag: str | None = None) -> dict[str, Tensor]:
    """The state dict of the whole student from a DeepSpeed checkpoint of a sharded one; no process group is needed.

    DeepSpeed's own zero_to_fp32 refuses such a folder.

    Args:
        folder: what `engine.save_checkpoint` was given.
        prefix: what stands before the student's names in the trained module, such as "student.0.model."; other
            parameters are left out.
        tag: the checkpoint's folder in `folder`; by default the one that the file `latest` names.

    Returns:
        On the CPU, in the dtype of the trained module, experts stacked: `SwitchStudent.load_state_dict` takes it.

    Raises:
        InputError: there is no such checkpoint, it is incomplete, or it holds more than tensors and plain values.
    """
    checkpoint = folder / (_latest(folder) if tag is None else tag)
    shared = _load(checkpoint / "mp_rank_00_model_states.pt")
    files = sorted(checkpoint.glob("layer_*_expert_*_mp_rank_00_model_states.pt"))
    if not files or not {"module", "num_experts"} <= shared.keys():
        raise InputError(
            f"{checkpoint} holds no experts that were spread over processes. Convert a checkpoint of ordinary ZeRO "
            "with DeepSpeed's zero_to_fp32.py."
        )
    if len(files) != sum(shared["num_experts"]):
        raise InputError(
            f"{checkpoint} is incomplete: it has {len(files)} files of experts, not {sum(shared['num_experts'])}. "
            "Convert another checkpoint, with tag."
        )
    names: dict[str, Tensor] = {**shared["module"], **_stacked(files)}
    state = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
    if "embeddings.word_embeddings.weight" not in state:
        raise InputError(
            f"{checkpoint}: no student's names begin with {prefix!r}. Give the prefix of names such as {min(names)}."
        )
    return state


def _stacked(files: Iterable[Path]) -> dict[str, Tensor]:
    """The experts' parameters from one file for each layer and expert, stacked by layer."""
    stacks: dict[str, dict[int, Tensor]] = {}
    for file in files:
        for name, value in _load(file).items():
            parts = _EXPERT_NAME.fullmatch(name)
            if parts is None:
                raise InputError(f"{file}: {name} is not a weight of a Switch student's expert.")
            stacks.setdefault(f"{parts['stack']}.{parts['weight']}", {})[int(parts["expert"])] = value
    return {name: torch.cat([stack[index] for index in sorted(stack)]) for name, stack in stacks.items()}


def _latest(folder: Path) -> str:
    try:
        return (folder / "latest").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InputError(
            f"{folder} is not a checkpoint of DeepSpeed: it has no file `latest`. Give the folder that "
            "`engine.save_checkpoint` wrote."
        ) from error


def _load(file: Path) -> dict[str, Any]:
    """Tensors and plain values of a file; nothing else is unpickled."""
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{file} is not a file of a DeepSpeed checkpoint, or is damaged ({error}).") from error
    return content


def _processes() -> int:
    """Processes of this job, as its launcher or torch knows them."""
    return distributed.get_world_size() if distributed.is_initialized() else processes.count()


def _deepspeed(module: str) -> Any:
    """A module of DeepSpeed, which is optional."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            "student.expert_parallel_size: experts are spread over processes by DeepSpeed, which is not installed. "
            "Install it with `pip install 'distillabse[deepspeed]'`, or set student.expert_parallel_size: 1."
        ) from error
