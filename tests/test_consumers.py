"""The snippets of docs/shipping.md are what benchmarks/consumers runs, and its environments are the shipped ones."""

import json
import re
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from distillabse.demo.assets import PACKAGES
from distillabse.export.flavors import FLAVORS, OPTIMUM_REQUIREMENTS

ROOT = Path(__file__).parents[1]
CONSUMERS = ROOT / "benchmarks" / "consumers"
sys.path.insert(0, str(CONSUMERS))

import run  # noqa: E402

SCRIPTS = sorted(path for path in CONSUMERS.glob("*/*") if "snippet" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_documentation_shows_what_is_run(script):
    found = re.search(r"^ *(?:#|//) snippet\n(.*?)^ *(?:#|//) end", script.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    shown = (ROOT / "docs" / "shipping.md").read_text(encoding="utf-8")
    assert without_blank_lines(dedent(found[1])) in without_blank_lines(shown)


def without_blank_lines(text):
    """At the top level a formatter leaves more of them than inside a function."""
    return re.sub(r"\n\s*\n", "\n", text).strip()


def test_every_consumer_has_its_script():
    assert len(SCRIPTS) == 8
    used = {consumer.script for consumer in run.CONSUMERS if consumer.script}
    assert used == {path.name for path in SCRIPTS}
    assert {consumer.flavor for consumer in run.CONSUMERS} - {None} <= set(FLAVORS)


def test_the_environment_of_the_flavor_is_the_one_that_was_run():
    listed = (ROOT / "benchmarks" / "environments" / "optimum.txt").read_text().split()
    assert set(OPTIMUM_REQUIREMENTS.split()) == set(listed) - {"torch==2.13.0"}


def test_the_page_and_node_use_one_tokenizer():
    wanted = json.loads((CONSUMERS / "node" / "package.json").read_text())["dependencies"]
    versions = {package.name: package.version for package in PACKAGES}
    assert wanted["@huggingface/tokenizers"] == versions["@huggingface/tokenizers"]


def test_cosines_are_those_of_rows():
    a, b = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[6.0, 8.0], [1.0, 1.0]])
    np.testing.assert_allclose(run._cosines(a, b), [1, 0.5**0.5])
