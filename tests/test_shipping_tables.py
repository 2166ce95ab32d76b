"""The measured tables of the documents on shipping are those of the results."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import shipping_tables  # noqa: E402


@pytest.mark.parametrize(("document", "marker"), list(shipping_tables.TABLES))
def test_a_table_is_that_of_its_result(document, marker):
    table = shipping_tables.TABLES[document, marker]()
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    assert shipping_tables.with_table(text, marker, table) == text and table in text


def test_a_table_is_put_between_its_markers():
    text = "a\n<!-- kinds -->\nold\n<!-- end of kinds -->\nb"
    assert shipping_tables.with_table(text, "kinds", "| new |") == (
        "a\n<!-- kinds -->\n\n| new |\n\n<!-- end of kinds -->\nb"
    )


def test_what_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert shipping_tables.readme_sentence() in " ".join(readme.split())
