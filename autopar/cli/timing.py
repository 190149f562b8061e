"""The command ``autopar timeline``: a plan's step, and a recorded one beside it, as a trace or a picture.

Comes in: a saved plan, traces that runs have recorded. Goes out: a file, and a few lines on what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from autopar.cli.terminal import clean, writing
from autopar.errors import InputError
from autopar.plans import Plan
from autopar.texts import check_writable, read_text, write_text
from autopar.timelines import MOST_BYTES, Trace, draw, from_chrome, predict, to_chrome
from autopar.units import format_bytes, format_seconds, format_share

_WRITERS = {".json": to_chrome, ".svg": draw}


@click.command(
    short_help="Show when each rank does what in a step, as a trace or a picture.",
    help="""Show when each rank does what in the step of a plan: FILE.json is a trace that ui.perfetto.dev opens, FILE.svg a picture.

    A trace has a process for each pipeline rank, whose ranks are alike, with its computing, communication and messages as threads, and its
    memory as a counter. `model.trace("real.json")` records the same of a real step.

    \b
    Example:
      autopar timeline plan.json -o trace.json
      autopar timeline plan.json -o step.svg
      autopar timeline plan.json --beside real.json -o both.svg
    """,
)
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="Write this file: .json or .svg.")
@click.option(
    "--beside",
    "recorded",
    multiple=True,
    metavar="TRACE",
    type=click.Path(path_type=Path),
    help="A recorded trace to show too. Repeatable.",
)
def timeline(plan_file: Path, output: Path, recorded: Sequence[Path]) -> None:
    """Run ``autopar timeline``."""
    writer = _WRITERS.get(output.suffix.lower())
    if writer is None:
        raise InputError(f"{output}: the file's name says what to write; end it with .json for a trace, or with .svg for a picture")
    check_writable(output)
    traces = [predict(Plan.load(plan_file))]
    for path in recorded:
        try:
            traces += from_chrome(read_text(path, MOST_BYTES))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    text = writer(traces)
    click.echo("\n".join(map(_describe, traces)))
    with writing(output, "; open it at https://ui.perfetto.dev" if output.suffix.lower() == ".json" else ""):
        write_text(output, text)


def _describe(trace: Trace) -> str:
    """A trace in one line."""
    count = len(trace.ranks)
    exchanging = sum(map(trace.exchanging, range(count)))
    computing = sum(map(trace.busy, range(count))) - exchanging
    peak = max((sample.nbytes for sample in trace.memory), default=0)
    shares = [format_share(seconds, count * trace.seconds) for seconds in (computing, exchanging)]
    text = f"{trace.title}: step {format_seconds(trace.seconds)}, of which ranks compute {shares[0]} and exchange {shares[1]}"
    return clean(f"{text}, {format_bytes(peak)} at the peak of the fullest" if peak else text)
