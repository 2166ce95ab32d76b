"""The measured tables in docs/scaling.md are those of the results."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_tables  # noqa: E402


@pytest.mark.parametrize("table", ["streaming_table", "cache_table", "throughput_table"])
def test_the_documents_hold_this_table(table):
    assert getattr(scaling_tables, table)() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
