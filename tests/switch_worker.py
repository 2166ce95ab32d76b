"""Two processes that train a tiny Switch student with DeepSpeed, and the same training in one process.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/switch_worker.py zero|experts FOLDER

Process r trains on the r-th half of every batch. The single process runs the halves one after the other and averages
their gradients: capacity and load balancing are those of a micro-batch. Each process writes FOLDER/<r>.pt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distillabse.models.switch import SwitchConfig, SwitchStudent, sparse_layers
from distillabse.training.expert_parallel import expert_parameter_groups, gathered_state_dict, shard_experts

PROCESSES = 2
ROWS, TOKENS, IDS, HIDDEN = 6, 9, 40, 16
ZERO_STEPS, EXPERT_STEPS = 6, 20
HELD_OUT = 99
CLIPPING = {0: 0.0, 1: 0.5, 2: 0.5}  # stage 0 averages norms of different experts


class Distance(nn.Module):
    """A student, the mean square distance of its vectors to fixed ones, and losses of its routers' logits."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.logits = []
        for layer in sparse_layers(student).values():
            layer.feed_forward.router.register_forward_hook(lambda module, inputs, output: self.logits.append(output))

    def vectors(self, ids, mask):
        states = self.student(input_ids=ids, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids, mask, targets):
        loss = (self.vectors(ids, mask) - targets).square().mean()
        for logits in self.logits:
            used = nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).float().mean(0)
            balance = logits.shape[1] * (used * logits.softmax(-1).mean(0)).sum()
            loss = loss + 0.1 * balance + 0.01 * logits.logsumexp(-1).square().mean()
        self.logits.clear()
        return loss


def tiny_student(experts, sparse, capacity_factor, seed=0):
    """No dropout, no jitter: what is left is the same in every process."""
    torch.manual_seed(seed)
    config = SwitchConfig(
        vocab_size=IDS, embedding_size=HIDDEN, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, initializer_range=0.2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, sparse_layers=sparse, num_experts=experts, expert_size=24,
        capacity_factor=capacity_factor, router_jitter=0.0,
    )  # fmt: skip
    student = SwitchStudent(config).train()
    with torch.no_grad():
        for layer in sparse_layers(student).values():
            layer.feed_forward.router.weight.normal_(std=0.5)
            for bias in (layer.feed_forward.experts.inner_bias, layer.feed_forward.experts.outer_bias):
                bias.normal_(std=0.1)
    return student


def separating_student():
    """Ids below half of the vocabulary go to expert 0, the others to expert 1, whatever stands around them."""
    student = tiny_student(experts=2, sparse=[0, 1], capacity_factor=1.25)
    with torch.no_grad():
        words = student.embeddings.word_embeddings.weight
        words[:, 0] = torch.where(torch.arange(IDS) < IDS // 2, 3.0, -3.0)
        for layer in sparse_layers(student).values():
            layer.feed_forward.router.weight.zero_()
            layer.feed_forward.router.weight[:, 0] = torch.tensor([0.5, -0.5])
    return student


def crowded_student(seed=0):
    """Four experts with room for four fifths of the tokens at most."""
    return tiny_student(experts=4, sparse=[0, 1], capacity_factor=0.8, seed=seed)


def half(step, rank, separate=False):
    """Ids, mask with padding and targets of one process; with `separate`, of ids of its own."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    low, high = (rank * IDS // 2, (rank + 1) * IDS // 2) if separate else (0, IDS)
    ids = torch.randint(low, high, (ROWS, TOKENS), generator=random)
    lengths = torch.randint(2 + rank, TOKENS + 1, (ROWS,), generator=random)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return ids, mask, torch.randn(ROWS, HIDDEN, generator=random)


def adamw(parameters):
    # So large an epsilon that the size of a gradient counts, and one that is zero but for rounding moves nothing.
    return torch.optim.AdamW(parameters, lr=5e-3, eps=1e-3)


def in_one_process(student, steps, separate, clipping=0.0):
    """(mean loss of every step, final state dict, [experts + 2] router figures of each half, summed over layers)."""
    model = Distance(student)
    optimizer = adamw(model.parameters())
    losses, figures = [], torch.zeros(PROCESSES, student.config.num_experts + 2)
    for step in range(steps):
        halves = []
        for rank in range(PROCESSES):
            loss = model(*half(step, rank, separate))
            (loss / PROCESSES).backward()
            halves.append(float(loss.detach()))
            figures[rank] += router_figures(student)
        if clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(halves) / PROCESSES)
    return losses, student.state_dict(), figures


def held_out_vectors(state, student):
    """The vectors of both halves of the held-out batch by `student` with the weights of `state`."""
    student.load_state_dict(state)
    model = Distance(student.eval())
    with torch.no_grad():
        return [model.vectors(*half(HELD_OUT, rank)[:2]) for rank in range(PROCESSES)]


def router_figures(student):
    return sum(layer.feed_forward.health.read() for layer in sparse_layers(student).values())


def launch(job, folder):
    """What each process of `job` wrote; a process may abort while it exits, after its work, so one more try."""
    if shutil.which("c++") is None:
        pytest.skip("DeepSpeed builds an operator with a C++ compiler, and there is no c++")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja, which DeepSpeed calls
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # DeepSpeed builds an operator at its first use, in about a minute: once for all tests of this environment.
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    files = [folder / f"{rank}.pt" for rank in range(PROCESSES)]
    for _ in range(2):
        process = subprocess.Popen(
            [*command, __file__, job, str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes
            output, _ = process.communicate()
        if all(file.is_file() for file in files):
            return [torch.load(file, weights_only=True) for file in files]
    raise AssertionError(f"the processes did not finish:\n{output[-6000:]}")


def deepspeed_engine(model, groups, stage, clipping=0.0):
    import deepspeed

    zero = {"stage": stage, "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0}
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": clipping,
    }
    return deepspeed.initialize(model=model, optimizer=adamw(groups), config=settings)[0]


def train(engine, steps, separate):
    """(loss of every step in this process, router figures of this process)."""
    rank = torch.distributed.get_rank()
    student = engine.module.student
    losses, figures = [], 0
    for step in steps:
        loss = engine(*half(step, rank, separate))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        figures = figures + router_figures(student)
    return losses, figures


@torch.no_grad()
def evaluate(engine):
    """Vectors of this process's half of a batch that is no part of training."""
    engine.eval()
    vectors = engine.module.vectors(*half(HELD_OUT, torch.distributed.get_rank())[:2])
    engine.module.logits.clear()
    engine.train()
    return vectors


def zero(stage):
    """Ordinary ZeRO; process r uses expert r alone."""
    import deepspeed

    model = Distance(separating_student())
    engine = deepspeed_engine(model, model.parameters(), stage)
    losses, figures = train(engine, range(ZERO_STEPS), separate=True)
    vectors = evaluate(engine)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        state = {name: value.detach().clone() for name, value in model.student.state_dict().items()}
    engine.destroy()
    return {"losses": losses, "figures": figures, "vectors": vectors, "state": state}


def sharded_engine(stage, seed=0):
    """Expert parallelism: two of four experts in each process."""
    student = crowded_student(seed)
    shard_experts(student, PROCESSES, stage)
    model = Distance(student)
    groups = expert_parameter_groups([{"params": model.parameters()}])
    return deepspeed_engine(model, groups, stage, CLIPPING[stage])


def experts(stage, checkpoint):
    engine = sharded_engine(stage)
    losses, figures = train(engine, range(EXPERT_STEPS // 2), separate=False)
    engine.save_checkpoint(checkpoint, tag="half-way")
    more = train(engine, range(EXPERT_STEPS // 2, EXPERT_STEPS), separate=False)
    engine.save_checkpoint(checkpoint)
    result = {
        "losses": losses + more[0],
        "figures": figures + more[1],
        "state": gathered_state_dict(engine.module.student),
        "vectors": evaluate(engine),
        "parameters": sum(weight.numel() for weight in engine.module.student.parameters()),
    }
    engine.destroy()
    resumed = sharded_engine(stage, seed=1)
    resumed.load_checkpoint(checkpoint, tag="half-way")
    train(resumed, range(EXPERT_STEPS // 2, EXPERT_STEPS), separate=False)
    result["resumed"] = gathered_state_dict(resumed.module.student)
    resumed.destroy()
    return result


def main(job, folder):
    folder = Path(folder)
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    rank = torch.distributed.get_rank()
    if job == "zero":
        results = {str(stage): zero(stage) for stage in (1, 2, 3)}
    else:
        results = {str(stage): experts(stage, str(folder / f"stage-{stage}")) for stage in (0, 1, 2)}
    temporary = folder / f"{rank}.partial"
    torch.save(results, temporary)
    temporary.rename(folder / f"{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
