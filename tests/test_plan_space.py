from __future__ import annotations

from io import StringIO
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console

from distillabse.config import DenseStudentConfig, PlanConfig
from distillabse.errors import ConfigurationError
from distillabse.evaluation.plan import write_plan
from distillabse.evaluation.plan_space import SHAPE, candidates, choose, pareto_set, student_block
from distillabse.evaluation.plan_views import plan_figure, plan_table, shape_title, student_yaml
from distillabse.layout import RunFolder
from distillabse.models.shape import TransformerShape
from distillabse.settings import validate

LABSE = TransformerShape(layers=12, hidden_size=768, intermediate_size=3072, attention_heads=12, embedding_size=768)
TINY = TransformerShape(layers=4, hidden_size=32, intermediate_size=64, attention_heads=4, embedding_size=32)
JOB = {
    "name": "tiny", "corpus": {"sources": [{"kind": "phrasebook", "languages": ["en"]}]},
    "objectives": [{"kind": "cosine"}], "teacher": {"model": "teacher"},
}  # fmt: skip


def shapes(space, student=None, teacher=LABSE):
    found, left_out = candidates(space, student or DenseStudentConfig(), teacher)
    return [tuple(getattr(one, key) for key in SHAPE) for one in found], left_out


def test_every_combination_with_all_widths_filled_in():
    space = PlanConfig(layers=[2, 6], hidden_size=[384, 256], embedding_size=[None, 128])
    assert shapes(space) == (
        [
            (2, 384, 1536, 12, 384), (2, 384, 1536, 12, 128),
            (2, 256, 1024, 4, 256), (2, 256, 1024, 4, 128),  # 12 heads do not divide 256: heads of the teacher's 64
            (6, 384, 1536, 12, 384), (6, 384, 1536, 12, 128),
            (6, 256, 1024, 4, 256), (6, 256, 1024, 4, 128),
        ],
        [],
    )  # fmt: skip


def test_the_default_widths_are_the_teachers_a_half_and_a_third():
    assert shapes(PlanConfig(layers=[3]))[0] == [
        (3, 768, 3072, 12, 768),
        (3, 384, 1536, 12, 384),
        (3, 256, 1024, 4, 256),
    ]
    assert shapes(PlanConfig(layers=[3]), teacher=TINY)[0] == [(3, 32, 64, 4, 32), (3, 16, 32, 4, 16)]  # 32 / 3 is none


def test_widths_and_heads_that_are_listed_or_set_in_the_student_block():
    space = PlanConfig(layers=[3], hidden_size=[384], intermediate_size=[512, 1024], attention_heads=[6, 12])
    assert [shape[2:4] for shape in shapes(space)[0]] == [(512, 6), (512, 12), (1024, 6), (1024, 12)]
    student = DenseStudentConfig(attention_heads=8, intermediate_size=999)
    assert shapes(PlanConfig(layers=[3], hidden_size=[384]), student)[0] == [(3, 384, 1536, 8, 384)]


def test_what_cannot_be_built_is_left_out_with_the_reason():
    space = PlanConfig(layers=[3, 24], hidden_size=[768, 100], attention_heads=[12], embedding_size=[None, 512])
    found, left_out = shapes(space)
    assert found == [(3, 768, 3072, 12, 768), (3, 768, 3072, 12, 512)]
    assert len(left_out) == 6
    assert left_out[0]["shape"] == {"layers": 3, "hidden_size": 100, "attention_heads": 12}
    assert "12 attention_heads do not divide hidden_size 100" in left_out[0]["reason"]
    assert left_out[2]["shape"] == {"layers": 24, "hidden_size": 768, "attention_heads": 12}
    assert "24 asked for, but the teacher has only 12" in left_out[2]["reason"]


def test_the_same_shape_is_measured_once():
    assert shapes(PlanConfig(layers=[3], hidden_size=[768], embedding_size=[None, 768], intermediate_size=[3072])) == (
        [(3, 768, 3072, 12, 768)],
        [],
    )


def test_nothing_to_measure_is_refused():
    with pytest.raises(ConfigurationError, match=r"none of its 3 shapes .* has only 12.* Change plan\.layers"):
        shapes(PlanConfig(layers=[13]))


def test_the_block_keeps_what_the_job_says_and_is_a_valid_student():
    job = DenseStudentConfig(layers=[1, 5], initialisation="teacher", head="dense", dropout=0.1, projection="pca")
    (candidate,), _ = candidates(PlanConfig(layers=[4], hidden_size=[256], embedding_size=[128]), job, LABSE)
    block = student_block(candidate)
    assert block == {
        "layers": 4, "hidden_size": 256, "intermediate_size": 1024, "attention_heads": 4, "embedding_size": 128,
        "projection": "pca", "head": "dense", "dropout": 0.1,
    }  # fmt: skip
    assert validate({**JOB, "student": block}).student == candidate


def test_pareto_set_by_hand():
    # Speed, size, depth. The first is beaten by the second, which equals the third; the others are best at one thing.
    points = [(10, 5, 3), (11, 5, 3), (11, 5, 3), (20, 1, 1), (9, 9, 2), (10, 5, 4)]
    assert pareto_set(points) == [False, True, True, True, True, True]
    assert pareto_set([(1, 1), (1, 2), (2, 1), (2, 2)]) == [False, False, False, True]


def row(layers, hidden, parameters, speedup, low, **more):
    shape = dict(zip(SHAPE, (layers, hidden, 4 * hidden, 12, hidden), strict=True))
    return {
        "student": {**shape, "head": "dense"}, "shape": shape, "size_bytes": 20_000_000,
        "parameters": parameters + 5_000_000, "encoder_parameters": parameters,
        "latency": {"1": {"p50_ms": 50 / speedup}, "32": {"p50_ms": 900 / speedup}},
        "speedup": {
            "1": {"value": speedup, "ci95": [low, speedup + 1]},
            "32": {"value": speedup / 2, "ci95": [low / 2, speedup]},
        },
        "pareto": True,
        **more,
    }  # fmt: skip


ROWS = [
    row(6, 768, 40_000_000, 10.5, 9.9),  # its interval reaches below ten
    row(4, 768, 28_000_000, 11.0, 10.0),
    row(3, 768, 21_000_000, 14.0, 13.5, pareto=False),
    row(2, 384, 4_000_000, 50.0, 48.0),
]


def test_the_largest_that_surely_reaches_the_speedup_is_chosen():
    assert choose(ROWS, speedup=10, batch=1) == 1
    assert choose(ROWS, speedup=10.1, batch=1) == 2
    assert choose(ROWS, speedup=10, batch=32) == 3  # half the speed: 6.75 for the third, 24 for the last
    assert choose(ROWS, speedup=60, batch=1) is None


def test_ties_go_to_depth_then_to_all_parameters_then_to_speed():
    first = row(2, 384, 1000, 11, 10)
    deeper, wider, faster = row(3, 192, 1000, 11, 10), row(2, 384, 1000, 11, 10), row(2, 384, 1000, 12, 10)
    wider["parameters"] += 1
    assert choose([first, deeper, wider], 10, 1) == 1
    assert choose([first, faster, wider], 10, 1) == 2
    assert choose([first, faster], 10, 1) == 1


def made_up(**changes):
    return {
        "teacher": {
            "parameters": 470_000_000, "encoder_parameters": 85_000_000, "size_bytes": 1_883_000_000,
            "latency": {"1": {"p50_ms": 50.0}, "32": {"p50_ms": 900.0}},
        },
        "candidates": ROWS, "chosen": 1, "target": {"speedup": 10.0, "batch": 1}, "threads": 1, "int8": True,
        "random_weights": False, "environment": {"cpu": {"model": "Abacus 9000"}},
        "left_out": [{"shape": {"layers": 24}, "reason": "24 asked for, but the teacher has only 12."}],
        **changes,
    }  # fmt: skip


def printed(result):
    console = Console(width=80, file=StringIO())
    console.print(plan_table(result))
    return console.file.getvalue()


def test_the_table_shows_every_figure_within_80_columns():
    text = printed(made_up())
    assert "…" not in text
    lines = {line.split()[1]: line.split() for line in text.splitlines() if "\N{MULTIPLICATION SIGN}" in line}
    times = "\N{MULTIPLICATION SIGN}"
    assert lines[f"4{times}768"] == [
        "chosen", f"4{times}768", "3072", "12", "20.0", "33.0", "28.0", "4.55", "11.0x", "10.00x", "5.5x",
    ]  # fmt: skip
    assert lines[f"2{times}384"][0] == "Pareto"
    assert f"\n       3{times}768 " in text  # neither
    assert "1 shapes left out, the first because: 24 asked for" in " ".join(text.split())
    assert f"4{times}768 is the largest that reaches 10x" in text
    assert "random stand-in" not in text
    assert "random stand-in" in printed(made_up(random_weights=True))
    assert "None of 4 shapes reaches 10x" in printed(made_up(chosen=None))


def test_the_chosen_block_says_what_was_measured_and_can_be_pasted():
    text = student_yaml(made_up(random_weights=True))
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments == [
        "# The largest of 4 shapes that is at least 10 times as fast as the teacher at batch 1.",
        "# INT8, random weights, 1 thread, Abacus 9000; the teacher in ONNX Runtime fp32:",
        "#   batch 1: 4.55 ms, 11.0 times as fast (95 % interval 10.0 to 12.0)",
        "#   batch 32: 81.82 ms, 5.5 times as fast (95 % interval 5.0 to 11.0)",
        "#   20.0 MB, 33.0 million parameters, 28.0 million of them outside the embeddings",
        "# The teacher's weights are a random stand-in: only size and speed mean anything.",
    ]
    assert text.splitlines()[len(comments)] == "student:"
    student = validate({**JOB, **yaml.safe_load(text)}).student
    assert student == DenseStudentConfig(
        layers=4, hidden_size=768, intermediate_size=3072, attention_heads=12, embedding_size=768, head="dense"
    )


def test_the_figure_is_a_file_of_its_own_and_always_the_same():
    svg = plan_figure(made_up())
    assert svg == plan_figure(made_up())
    root = ElementTree.fromstring(svg)
    words = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    times = "\N{MULTIPLICATION SIGN}"
    assert {"4 layers", "teacher", "chosen", "10x the teacher's speed", f"4{times}768", f"2{times}384"} <= words
    assert f"3{times}768" not in words  # not in the Pareto set, so without a name
    assert "chosen" not in plan_figure(made_up(chosen=None))


def test_shapes_that_differ_only_inside_are_named_in_full():
    wide, narrow = (dict(zip(SHAPE, (2, 384, inner, 12, 128), strict=True)) for inner in (1536, 768))
    times = "\N{MULTIPLICATION SIGN}"
    assert shape_title(wide) == shape_title(narrow) == f"2{times}384/128"
    svg = plan_figure(made_up(candidates=[row(2, 384, 9, 11, 10, shape=shape) for shape in (wide, narrow)], chosen=0))
    assert f"2{times}384/128 (1536 inner, 12 heads)" in svg
    assert f"2{times}384/128 (768 inner, 12 heads)" in svg


def test_nothing_chosen_removes_an_earlier_student(tmp_path):
    run = RunFolder(tmp_path)
    write_plan(made_up(), run)
    assert run.planned_student.is_file()
    write_plan(made_up(chosen=None), run)
    assert not run.planned_student.exists()
