"""What experts cost: training steps beside a loop over experts, and ONNX graphs beside the dense student.

    python benchmarks/switch.py --data data [--part training|onnx] [--rounds 16]

Training: forward and backward of a Switch feed-forward block, and whole steps of a 3x384 Switch student (forward,
backward, AdamW), against the same weights run by loops that a reader would write first: over the stacked parameters
with a mask for each expert, and over a list of modules. All alternate in one process.

ONNX: 3x384 students of MiniLM with 4, 8 and 16 experts in one layer or in all, fp32 and INT8, against the dense student
of equal active FLOPs, and one with blocks twice as wide, on real text, tokenisation included. Experts are upcycled and
not trained: how fast they are does not depend on what they learn, as long as they share the tokens, which the result
file says.

Writes benchmarks/results/switch.json and switch.svg; a part that is not run keeps its figures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SEED = 42
SIZES = (384, 1536)
BATCH_SIZES = [1, 32]
SPARSE = {"one of three layers": [1], "all layers": [0, 1, 2]}
TEXTS = 2000


def main() -> None:
    """Measure what is asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--part", choices=("training", "onnx"))
    parser.add_argument("--rounds", type=int, default=16)
    arguments = parser.parse_args()

    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    path = RESULTS / "switch.json"
    result = read_json(path) if path.is_file() else {}
    texts = english(arguments.data)
    for part, measured in (("training", training), ("onnx", onnx)):
        if arguments.part in (None, part):
            result[part] = {**measured(texts, arguments.rounds), "environment": describe_environment()}
            write_json(path, result)
    result["command"] = f"python benchmarks/switch.py --data {arguments.data}"
    write_json(path, result)
    if len(result) == 3:
        plot(result, RESULTS / "switch.svg")


def english(data: Path) -> list[str]:
    """The first English sentences of the data."""
    import csv
    import gzip
    from itertools import islice

    with gzip.open(data / "mono_train" / "en.tsv.gz", "rt", encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["text"] for row in islice(rows, TEXTS)]


def training(texts: list[str], rounds: int) -> dict[str, Any]:
    """Medians of training steps, and how many times as long the loops take."""
    import torch

    rounds = max(7, rounds // 3)  # steps of the loops take seconds
    found = []
    for experts in (8, 32):
        for size in SIZES:
            for precision in ("fp32", "bf16"):
                for what, steps in (("block", block_steps), ("student", student_steps)):
                    torch.manual_seed(SEED)
                    row = {"what": what, "experts": experts, "expert_size": size, "precision": precision}
                    row |= alternate(steps(texts, experts, size, precision == "bf16"), rounds)
                    print(row, flush=True)
                    found.append(row)
    return {"batch": 32, "rounds": rounds, "steps": found}


def alternate(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of each step, and of the ratios to the first within a round, with their quartiles."""
    for step in steps.values():
        for _ in range(2):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    ours, *others = steps
    ratios = {name: [b / a for a, b in zip(seconds[ours], seconds[name], strict=True)] for name in others}
    return {
        "ms": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "times_as_long": {name: statistics.median(values) for name, values in ratios.items()},
        "quartiles": {name: statistics.quantiles(values)[::2] for name, values in ratios.items()},
    }


def student_of(texts: list[str], size: int, **student: Any) -> Any:
    """An upcycled 3x384 student of MiniLM, as a sentence encoder, with routers made for the tokens of `texts`."""
    import numpy as np
    import torch

    from distillabse.config import PACKAGED_TEACHER, DenseStudentConfig, SwitchStudentConfig, TeacherConfig
    from distillabse.models.student import build_student
    from distillabse.models.teacher import load_teacher
    from distillabse.models.tokens import tokenise

    torch.manual_seed(SEED)
    shape = {"layers": 3, "intermediate_size": size, "freeze_embeddings": True, **student}
    config = SwitchStudentConfig(**shape) if "experts" in student else DenseStudentConfig(**shape)
    teacher = load_teacher(TeacherConfig(model=PACKAGED_TEACHER))
    counts = np.bincount(np.concatenate(tokenise(teacher, texts)), minlength=len(teacher.tokenizer))
    return build_student(teacher, config, counts)


def batches(encoder: Any, texts: list[str]) -> list[dict[str, Any]]:
    """Batches of 32 sentences of similar length, as in training."""
    from distillabse.models.tokens import tokenise
    from distillabse.training.data import PaddingCollator

    rows = sorted(tokenise(encoder, texts), key=len)
    collate = PaddingCollator(encoder.tokenizer.pad_token_id)
    starts = range(0, len(rows), len(rows) // 16)
    return [collate([{"input_ids": row} for row in rows[start : start + 32]]) for start in starts][:16]


def block_steps(texts: list[str], experts: int, size: int, bf16: bool) -> dict[str, Callable[[], None]]:
    """Forward and backward of one block on the states of a middling batch."""
    import copy

    import torch

    from distillabse.models.initialisation import sampled_states
    from distillabse.models.teacher import transformer_of

    encoder = student_of(texts, size, experts=experts, sparse_layers=[1]).train()
    model = transformer_of(encoder)
    mask = batches(encoder, texts)[8]["attention_mask"].bool()
    states = sampled_states(model, None).after_attention[1][: mask.shape[0], : mask.shape[1]].clone().requires_grad_()
    block = model.encoder.layer[1].feed_forward
    stacked = copy.deepcopy(block)
    stacked.__class__ = loop_over_stacked_parameters()
    modules = copy.deepcopy(block)
    modules.__class__ = loop_over_modules()
    modules.make_list()

    def step(chosen: Any) -> Callable[[], None]:
        def run() -> None:
            chosen.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = chosen(states, mask)
            output.float().square().sum().backward()

        return run

    return {"ours": step(block), "mask for each expert": step(stacked), "list of modules": step(modules)}


def student_steps(texts: list[str], experts: int, size: int, bf16: bool) -> dict[str, Callable[[], None]]:
    """Whole steps with experts in all three layers: forward, backward, AdamW."""
    import itertools

    import torch

    from distillabse.models.switch import sparse_layers
    from distillabse.models.teacher import transformer_of

    def step(kind: type | None) -> Callable[[], None]:
        encoder = student_of(texts, size, experts=experts, sparse_layers="all").train()
        for layer in sparse_layers(transformer_of(encoder)).values():
            if kind is not None:
                layer.feed_forward.__class__ = kind
        chosen = itertools.cycle(batches(encoder, texts))
        optimizer = torch.optim.AdamW([one for one in encoder.parameters() if one.requires_grad], lr=1e-6)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = encoder(dict(next(chosen)))["sentence_embedding"]
            output.float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {"ours": step(None), "mask for each expert": step(loop_over_stacked_parameters())}


def loop_over_stacked_parameters() -> type:
    """The block as a straight loop: a mask for each expert, and its slice of the stacked parameters."""
    import math

    import torch

    from distillabse.models.switch import Routing, SwitchFeedForward

    class Loop(SwitchFeedForward):
        def _with_capacity(self, tokens: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
            experts = len(routing.counts)
            capacity = max(1, math.ceil(self.capacity_factor * len(tokens) / experts))
            expert = torch.empty(len(tokens), dtype=torch.long)
            expert[routing.order] = torch.repeat_interleave(torch.arange(experts), routing.counts)
            output = torch.zeros_like(tokens)
            kept = []
            for index in range(experts):
                mine = (expert == index).nonzero()[:, 0][:capacity]
                if len(mine):
                    output[mine] = self.run_expert(index, tokens[mine]).to(output.dtype)
                    kept.append(mine)
            places = torch.cat(kept)
            return places, output[places]

        def run_expert(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
            return self.experts.one(index, tokens)

    return Loop


def loop_over_modules() -> type:
    """The same loop with a module for each expert, whose gradients are no slices of stacked ones."""
    import torch
    from torch import nn

    class ModuleLoop(loop_over_stacked_parameters()):  # type: ignore[misc]
        def make_list(self) -> None:
            stack = self.experts
            self.modules_of_experts = nn.ModuleList()
            for index in range(len(stack.inner_weight)):
                inner, outer = (nn.Linear(*getattr(stack, f"{name}_weight").shape[1:]) for name in ("inner", "outer"))
                for linear, name in ((inner, "inner"), (outer, "outer")):
                    linear.weight.data.copy_(getattr(stack, f"{name}_weight")[index].T)
                    linear.bias.data.copy_(getattr(stack, f"{name}_bias")[index])
                self.modules_of_experts.append(nn.Sequential(inner, nn.GELU(), outer))
            del self.experts

        def run_expert(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.modules_of_experts[index](tokens)
            return output

    return ModuleLoop


def onnx(texts: list[str], rounds: int) -> dict[str, Any]:
    """All graphs alternating in one run for each expert size; costs against the dense graph of the same precision."""
    return {"rounds": rounds, "sizes": {str(size): onnx_of_size(size, texts, rounds) for size in SIZES}}


def onnx_of_size(size: int, texts: list[str], rounds: int) -> dict[str, Any]:
    """One dense student and its sparse relatives."""
    from distillabse import layout
    from distillabse.config import BenchConfig, ExportConfig
    from distillabse.evaluation.bench import count_parameters, graph_bytes
    from distillabse.evaluation.latency import measure
    from distillabse.evaluation.workers import Engine
    from distillabse.export.bundle import write_bundle

    students: dict[str, dict[str, Any]] = {"dense": {}}
    if size == SIZES[0]:
        students["dense, twice as wide"] = {"intermediate_size": 2 * size}
    for name, layers in SPARSE.items():
        for experts in (4, 8, 16):
            students[f"{experts} experts, {name}"] = {"experts": experts, "sparse_layers": layers}
    files = {"fp32": layout.ONNX_FP32, "int8": layout.ONNX_INT8["avx512_vnni"]}
    found: dict[str, Any] = {}
    engines = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, settings in students.items():
            encoder, folder = student_of(texts, size, **settings).eval(), Path(temporary) / name
            folder.mkdir()
            write_bundle(encoder, folder, ExportConfig(), {})
            engines += [Engine(f"{name} {precision}", "onnx", folder, file) for precision, file in files.items()]
            found[name] = {
                "parameters": count_parameters(encoder),
                "bytes": {precision: graph_bytes(folder / file) for precision, file in files.items()},
                "busiest_expert": busiest_expert(encoder, texts),
            }
        config = BenchConfig(batch_sizes=BATCH_SIZES, rounds=rounds, seconds_per_round=0.2, interval=None)
        measured = measure(engines, texts, config, SEED, baselines=("dense fp32", "dense int8"))
    for name, row in found.items():
        row["latency"] = {
            precision: costs(measured["latency"][f"{name} {precision}"], precision) for precision in files
        }
    return {"students": found, **{key: measured[key] for key in ("tokens", "threads", "cores_used_by_others")}}


def costs(rows: list[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """Median milliseconds, and time over that of the dense graph with its 95 % interval, by batch size."""
    key = f"speedup_vs_dense {precision}"
    return [
        {
            "batch": row["batch"],
            "p50_ms": row["p50_ms"],
            "cost": 1 / row[key],
            "cost_ci95": [1 / row[f"{key}_ci95"][1], 1 / row[f"{key}_ci95"][0]],
        }
        for row in rows
    ]


def busiest_expert(encoder: Any, texts: list[str]) -> float | None:
    """Share of the tokens that the most used expert of any layer gets; None for a dense student."""
    import torch

    from distillabse.models.switch import sparse_layers
    from distillabse.models.teacher import transformer_of

    shares: list[float] = []
    for layer in sparse_layers(transformer_of(encoder)).values():
        layer.feed_forward.router.register_forward_hook(
            lambda module, inputs, logits: shares.append(
                float(logits.argmax(dim=-1).bincount(minlength=logits.shape[1]).max() / len(logits))
            )
        )
    with torch.inference_mode():
        for batch in batches(encoder, texts):
            encoder(batch)
    return max(shares, default=None)


def plot(result: dict[str, Any], path: Path) -> None:
    """Costs of the graphs, and how much longer the loops take."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "distillabse"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axes, batch in zip(panels, BATCH_SIZES, strict=False):
        for size, colour in zip(SIZES, ("C0", "C1"), strict=True):
            for name, marker in zip(SPARSE, "os", strict=True):
                for precision, line in (("fp32", "-"), ("int8", "--")):
                    rows = {
                        experts: next(
                            row
                            for row in result["onnx"]["sizes"][str(size)]["students"][f"{experts} experts, {name}"][
                                "latency"
                            ][precision]
                            if row["batch"] == batch
                        )
                        for experts in (4, 8, 16)
                    }
                    label = f"{size} wide, {name}, {precision}"
                    axes.plot(
                        list(rows),
                        [row["cost"] for row in rows.values()],
                        line,
                        marker=marker,
                        color=colour,
                        label=label,
                    )
                    for experts, row in rows.items():
                        axes.vlines(experts, *row["cost_ci95"], color=colour, linewidth=1)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(
            title=f"ONNX, batch {batch}", xlabel="experts", ylabel="time over the dense student's", xticks=(4, 8, 16)
        )
    panels[0].legend(fontsize=6.5)
    steps = result["training"]["steps"]
    labels = [f"{row['what']}, {row['experts']}x{row['expert_size']}, {row['precision']}" for row in steps]
    panels[2].barh(labels, [row["times_as_long"]["mask for each expert"] for row in steps])
    panels[2].axvline(2, color="black", linewidth=0.8)
    panels[2].set(xscale="log", title="Training step: loop over ours", xlabel="times as long")
    panels[2].tick_params(axis="y", labelsize=7)
    panels[2].invert_yaxis()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
