"""Graphs in the language of Graphviz to files: as text, and rendered by Graphviz' own program, ``dot``.

Comes in: a `pydot` graph. Goes out: bytes of a file. Text needs no program.
"""

from __future__ import annotations

import subprocess

import pydot

from autopar.errors import InputError
from autopar.texts import printable

PROGRAM = "dot"
"""Graphviz' layout of directed graphs."""

INSTALL = "`apt-get install graphviz` on Debian and Ubuntu, `brew install graphviz` on macOS, or `conda install -c conda-forge graphviz`"
"""How to get the program."""

# Seconds after which a layout is given up. Pictures of 126 layers on 16 stages take less than one.
_MOST_SECONDS = 300.0

# Characters of the program's own message at most.
_MESSAGE = 300


def to_text(graph: pydot.Dot) -> bytes:
    """The graph in the language of Graphviz (DOT), UTF-8."""
    text: str = graph.to_string()
    return text.encode("utf-8")


def render(graph: pydot.Dot, form: str) -> bytes:
    """A picture of the graph: ``svg``, ``png`` or ``pdf``. The same graph gives the same picture; a PDF has the time it was made in it too.

    Raises InputError when the program isn't installed, which says how to install it, and when it draws nothing.
    """
    try:
        done = subprocess.run(
            [PROGRAM, f"-T{form}"],
            input=to_text(graph),
            capture_output=True,
            check=False,
            timeout=_MOST_SECONDS,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"a .{form} picture is drawn by Graphviz, whose program `{PROGRAM}` isn't installed: {INSTALL}. A .dot file needs no program"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"`{PROGRAM}` drew nothing in {_MOST_SECONDS:.0f} s; write a .dot file, and lay it out by other means") from error
    except OSError as error:
        raise InputError(f"`{PROGRAM}` of Graphviz can't be run: {error.strerror}. A .dot file needs no program") from error
    if done.returncode or not done.stdout:
        said = printable(done.stderr.decode("utf-8", "replace").strip())[:_MESSAGE]
        raise InputError(f"`{PROGRAM}` of Graphviz ended with code {done.returncode} and drew nothing: {said or 'no message'}")
    return done.stdout
