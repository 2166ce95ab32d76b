"""Two processes that compute losses over the pairs of both, under DDP, and the same in one process.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/pair_worker.py FOLDER

Process r has the r-th half of the pairs. Each writes FOLDER/<r>.pt.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from distillation_worker import environment, launcher
from torch import distributed, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from distillabse.config import ContrastiveObjective, LogitObjective, StructureLevelObjective
from distillabse.models.taps import EncoderShape, Signals
from distillabse.objectives import build_objective

PAIRS, WIDTH = 8, 6
SHAPE = EncoderShape(layers=1, hidden_size=WIDTH, attention_heads=1, dimension=WIDTH)
OBJECTIVES = {
    "contrastive": ContrastiveObjective(scale=5.0),
    "logit": LogitObjective(temperature=1.0),
    "structure_level": StructureLevelObjective(),
}


class Student(nn.Module):
    """A small network with a loss on its vectors, as a distiller is."""

    def __init__(self, kind):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, WIDTH))
        self.objective = build_objective(OBJECTIVES[kind], SHAPE, SHAPE)

    def forward(self, texts, teacher):
        vectors = normalize(self.network(texts), dim=-1)
        if not self.objective.teacher_reads_translations:
            teacher = teacher[: len(teacher) // 2]
        return sum(self.objective(Signals(teacher, {}), Signals(vectors, {}), None).values())


def batch(rank=None):
    """Inputs and the teacher's vectors, each sources and then translations: of all pairs, or of one process."""
    generator = torch.Generator().manual_seed(1)
    sources = torch.randn(PAIRS, WIDTH, generator=generator)
    translations = sources + 0.5 * torch.randn(PAIRS, WIDTH, generator=generator)
    teacher = normalize(torch.randn(2 * PAIRS, WIDTH, generator=generator), dim=-1)
    rows = slice(None) if rank is None else slice(rank, None, 2)
    return tuple(torch.cat([half[rows] for half in halves]) for halves in ((sources, translations), teacher.chunk(2)))


def in_one_process(kind, inputs=None):
    """Loss and gradients of the network."""
    torch.manual_seed(0)
    student = Student(kind)
    loss = student(*(inputs or batch()))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


def launch(folder):
    """What each of two processes wrote. One may hang or abort while it exits, after its work."""
    files = [folder / f"{rank}.pt" for rank in range(2)]
    process = subprocess.Popen(
        [*launcher(2), __file__, str(folder)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = b""
    try:
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its workers
        said, _ = process.communicate()
    assert all(file.is_file() for file in files), said.decode()[-4000:]
    return [torch.load(file, weights_only=True) for file in files]


def main(folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    results = {}
    for kind in OBJECTIVES:
        torch.manual_seed(0)
        student = DistributedDataParallel(Student(kind))
        loss = student(*batch(rank))
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in student.module.named_parameters()}
        results[kind] = {"loss": loss.item(), "gradients": gradients}
    file = Path(folder) / f"{rank}.pt"
    torch.save(results, file.with_suffix(".partial"))
    file.with_suffix(".partial").rename(file)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
