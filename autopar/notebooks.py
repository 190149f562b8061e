"""What notebooks show of an object: a small table of texts, without scripts and styles of its own.

Comes in: a title and rows of texts, which may hold anything. Goes out: HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from autopar.texts import printable


def show_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns under its title.

    >>> show_table("8 x <h100>", [("memory", "80.0 GB")])
    '<table><caption>8 x &lt;h100&gt;</caption><tr><th scope="row">memory</th><td>80.0 GB</td></tr></table>'
    """
    cells = "".join(f'<tr><th scope="row">{_show(name)}</th><td>{_show(value)}</td></tr>' for name, value in rows)
    return f"<table><caption>{_show(title)}</caption>{cells}</table>"


def _show(text: str) -> str:
    return escape(printable(text))
