"""What the command line shows beside its results: progress, messages that a terminal can take, and nothing of what libraries print.

Comes in: words on what is being done, files that are written, errors. Goes out: text on stderr, so that stdout holds results alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click
from rich.console import Console
from rich.text import Text

from autopar.errors import AutoparError, InputError
from autopar.texts import printable

PROGRESS_SECONDS = 10.0
"""Where stderr is no terminal, a line says every so many seconds what is being done."""

# Columns when the output is no terminal, such as a file: wide enough for a source line beside its op.
_PIPED_WIDTH = 120

# Columns that the variable COLUMNS may ask for.
_MOST_COLUMNS = 10_000

# Characters of a message at most: names of a user's files and models may have any length.
_MESSAGE = 2000

# How a line begins that HiGHS prints past its own switches when it repairs a solution.
_SOLVER_LINE = "HighsMipSolverData::"


def clean(message: object) -> str:
    """A message without characters that direct a terminal, and of bearable length."""
    text = "\n".join(map(printable, f"{message}".split("\n")))
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]} ..."


def make_console(stream: IO[str]) -> Console:
    """A console for tables: as wide as the terminal, or as the variable COLUMNS says, or as is good for a file."""
    columns = os.environ.get("COLUMNS", "")
    says_width = columns.isascii() and columns.isdigit() and 0 < int(columns[:9]) <= _MOST_COLUMNS
    width = int(columns) if says_width else _PIPED_WIDTH
    return Console(file=stream, width=None if stream.isatty() else width)


@contextmanager
def writing(path: Path, more: str = "") -> Iterator[None]:
    """Inside, the file of an option -o is written, whose place `check_writable` has looked at; then stderr says so, and `more`.

    Raises InputError where it can't be written after all.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from error
    click.echo(clean(f"written to {path}{more}"), err=True)


@contextmanager
def show_progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows what is being done: in a live line when stderr is a terminal, otherwise in a line now and then."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        with show_lines(sys.stderr, PROGRESS_SECONDS) as tell, _hold_back_stderr(), _keep_stdout_clean(sys.stderr):
            yield tell
        return
    with console.status(Text("starting")) as status, _hold_back_stderr(), _keep_stdout_clean(console.file):
        yield lambda text: status.update(Text(printable(text)))


@contextmanager
def show_lines(stream: IO[str], seconds: float) -> Iterator[Callable[[str], None]]:
    """Give a function that is told what is being done; every so many seconds a line with the last of it goes to `stream`."""
    start = time.monotonic()
    last = ["starting"]
    ended = threading.Event()

    def write_lines() -> None:
        while not ended.wait(seconds):
            stream.write(f"{time.monotonic() - start:.0f} s: {last[0]}\n")
            stream.flush()

    def tell(text: str) -> None:
        last[0] = printable(text)

    # A thread, since a step such as capturing a large model says nothing for long.
    thread = threading.Thread(target=write_lines, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        ended.set()
        thread.join()


@contextmanager
def _hold_back_stderr() -> Iterator[None]:
    """Keep what libraries say of a failure that we report off stderr: torch prints the graph at which an export gave up."""
    held = io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(held):
            yield
    except AutoparError:
        held = io.StringIO()
        raise
    finally:
        logging.disable(logging.NOTSET)
        sys.stderr.write(held.getvalue())


@contextmanager
def _keep_stdout_clean(stderr: IO[str]) -> Iterator[None]:
    """Send to `stderr` what a model's code prints, and what is printed past Python, but for what the solver says to itself."""
    try:
        sys.stdout.flush()
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, as in tests
        with contextlib.redirect_stdout(stderr):
            yield
        return
    saved_stdout = os.dup(stdout)
    with tempfile.TemporaryFile() as past_python, contextlib.redirect_stdout(stderr):
        os.dup2(past_python.fileno(), stdout)
        try:
            yield
        finally:
            # C has a buffer of its own, which would else be written when the process ends.
            ctypes.CDLL(None).fflush(None)
            os.dup2(saved_stdout, stdout)
            os.close(saved_stdout)
            past_python.seek(0)
            lines = past_python.read().decode("utf-8", "replace").splitlines(keepends=True)
            stderr.write("".join(line for line in lines if not line.startswith(_SOLVER_LINE)))
