"""Texts inside of pictures: labels of Graphviz that look like HTML, in which names of any characters stand for themselves.

Comes in: names and numbers. Goes out: labels as `pydot` takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from autopar.texts import printable

MOST_CHARACTERS = 60
"""Of a name in a picture; the middle of a longer one is left out, since its ends tell more."""


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text of at most `most` characters, of whose middle the rest is left out."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[head + 1 - most :]}"


def markup(text: str, *, bold: bool = False, color: str = "", size: int = 0, most: int = MOST_CHARACTERS) -> str:
    """Text as a part of a label."""
    # Graphviz reads backslashes as commands here too (\N is the node's name): doubled, one is shown.
    inner = escape(shorten(printable(text), most)).replace("\\", "&#92;&#92;")
    if bold:
        inner = f"<B>{inner}</B>"
    look = (f' COLOR="{color}"' if color else "") + (f' POINT-SIZE="{size}"' if size else "")
    return f"<FONT{look}>{inner}</FONT>" if look else inner


def make_label(rows: Iterable[Sequence[str]], *, align: Sequence[str] = ("LEFT",), spacing: int = 0) -> str:
    """A label of rows of cells, each made by `markup`; `align` says per column where its text stands, the last for all further ones.

    Rows of fewer cells than the others have end with one that fills the rest.
    """
    listed = list(rows)
    width = max(map(len, listed), default=1)
    lines = []
    for row in listed:
        cells = []
        for index, cell in enumerate(row):
            span = width - len(row) + 1 if index == len(row) - 1 else 1
            where = align[min(index, len(align) - 1)]
            cells.append(f'<TD ALIGN="{where}"{f" COLSPAN={chr(34)}{span}{chr(34)}" if span > 1 else ""}>{cell}</TD>')
        lines.append(f"<TR>{''.join(cells)}</TR>")
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLPADDING="1" CELLSPACING="{spacing}">{"".join(lines)}</TABLE>>'
