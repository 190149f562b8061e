"""Tables of plain text for a console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich import box
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

Justify = Literal["left", "right"]

NOTHING = "-"
"""What stands in a cell of which nothing is known, or where there is nothing."""


def make_table(
    title: str, columns: Mapping[str, Justify], rows: Iterable[Sequence[str]], *, total: bool = False, is_tight: bool = False
) -> Stack:
    """Make a table of plain text under its title; `total` sets the last row apart, `is_tight` leaves less space between columns.

    Where the console is too narrow, texts are broken, of a tight table those of the last column last: they are places to go to.
    """
    # Text, not str: names and source lines may hold square brackets, which rich would read as markup.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=is_tight)
    for number, (name, justify) in enumerate(columns.items(), start=1):
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=is_tight and number == len(columns))
    cells = [[Text(cell) for cell in row] for row in rows]
    for index, row in enumerate(cells):
        table.add_row(*row, end_section=total and index == len(cells) - 2)
    return Stack(Text(title, style="bold"), table)


def make_lines(lines: Iterable[tuple[str, str]]) -> Table:
    """Make lines of a label and a text each; texts that are longer than the console is wide go on under themselves."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(Text(label, style="bold"), Text(text))
    return table
