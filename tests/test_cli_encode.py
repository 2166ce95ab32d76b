from __future__ import annotations

import io
import itertools
import json
import sys

import numpy as np
import pytest
from tiny import tiny_bundle, tiny_encoder

from distillabse import cli, cli_encode
from distillabse.encoder import Encoder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), tiny_encoder(tmp_path_factory.mktemp("student")))


@pytest.fixture
def run(bundle, monkeypatch):
    """Run `distillabse encode BUNDLE ...`; gives its exit status."""

    def start(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["distillabse", "encode", str(bundle), *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0

    return start


LINES = [f"the cat is {'very ' * (number % 7)}old {number}" for number in range(90)]


def test_a_file_becomes_npy_in_the_order_of_its_lines(bundle, run, tmp_path, capsys):
    (tmp_path / "texts").write_text("\n".join(LINES))
    assert run(tmp_path / "texts", "-o", tmp_path / "v.npy", "--window", 20, "--threads", 2) == 0
    vectors = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, Encoder(bundle).encode(LINES), atol=1e-5)
    progress = capsys.readouterr().err
    assert "90/90" in progress and "texts/s" in progress
    assert [path.name for path in tmp_path.iterdir() if path.name != "texts"] == ["v.npy"]


def test_jsonl_holds_each_text_with_its_vector(bundle, run, tmp_path, capsys):
    assert run("--window", 20, stdin="\n".join(LINES).encode()) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert run("-o", tmp_path / "v.jsonl", stdin="\n".join(LINES).encode()) == 0
    written = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    for rows in (printed, written):
        assert [row["text"] for row in rows] == LINES
        np.testing.assert_allclose([row["vector"] for row in rows], Encoder(bundle).encode(LINES), atol=1e-5)


def test_settings_reach_the_encoder(bundle, run, tmp_path):
    (tmp_path / "texts").write_text("\n".join(LINES))
    options = ["--truncate-dim", 8, "--no-normalize", "--dtype", "float16", "--token-budget", 50]
    assert run(tmp_path / "texts", "-o", tmp_path / "v.npy", *options) == 0
    vectors = np.load(tmp_path / "v.npy")
    expected = Encoder(bundle).encode(LINES, truncate_dim=8, normalize=False, dtype="float16")
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, expected, atol=2e-3)
    assert np.linalg.norm(vectors.astype(np.float32), axis=1).max() < 0.99


def test_a_line_ends_with_a_line_feed_and_nothing_else(run, capsys):
    assert run(stdin="\ufeffa\u2028b\r\n\n\x0bc".encode()) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.split("\n")[:-1]] == ["a\u2028b", "", "\x0bc"]


def test_no_lines_give_an_empty_array(run, tmp_path):
    assert run("-o", tmp_path / "v.npy", stdin=b"") == 0
    assert np.load(tmp_path / "v.npy").shape == (0, 32)


def test_a_line_that_is_not_utf8_is_named_and_nothing_is_left(run, tmp_path, capsys):
    (tmp_path / "texts").write_bytes(b"good\n" * 30 + b"b\xe4d\n")
    assert run(tmp_path / "texts", "-o", tmp_path / "v.npy", "--window", 4) == 2
    assert "line 31 is not UTF-8" in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "--dtype int8: give float32 or float16"),
        (["--device", "tpu"], "--device tpu: give cpu or cuda"),
        (["--engine", "tensorrt"], "'tensorrt' is not an engine"),
        (["--truncate-dim", "33"], "--truncate-dim 33: the vectors of"),
        (["-o", "v.csv"], "name a .npy or a .jsonl file"),
        (["/nowhere"], "/nowhere is not a file"),
    ],
)
def test_bad_options_are_named(run, capsys, options, message):
    assert run(*options, stdin=b"the cat\n") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_lines_are_not_all_held_in_memory():
    """Writing goes on while lines are read: after 10 windows of an endless input, 10 windows are written."""
    target = io.StringIO()
    endless = (str(number) for number in itertools.count())

    def encode_stream(texts):
        texts = iter(texts)
        for window in range(10):
            yield np.array([[float(text)] for text in itertools.islice(texts, 5)])
            assert target.getvalue().count("\n") == 5 * (window + 1)

    cli_encode._write_jsonl(target, endless, encode_stream)
    rows = [json.loads(line) for line in target.getvalue().splitlines()]
    assert rows == [{"text": str(number), "vector": [float(number)]} for number in range(50)]
