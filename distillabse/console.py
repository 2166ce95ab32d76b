"""How tables of figures look in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def figures_table(
    title: str, caption: str | None, texts: Iterable[str], figures: Iterable[str], *, narrow: bool = False
) -> Table:
    """An open table: columns of text on the left, then columns of figures, aligned to the right.

    Args:
        title: what it shows.
        caption: how to read it.
        texts: headings of the columns of text.
        figures: headings of the columns of figures; a line break makes a column narrower.
        narrow: one space between columns instead of two.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE,
        padding=(0, 0 if narrow else 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
