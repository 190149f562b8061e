"""``autopar diff``: two saved plans to what differs between them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from autopar.cli.terminal import clean, make_console
from autopar.plans import Plan


@click.command(
    short_help="Show what differs between two plans, and what it costs.",
    help="""Show what differs between two plans, and what it costs.

    Plans of different models, clusters or batches are compared too, with a warning.

    \b
    Example:
      autopar diff a.json b.json
      autopar diff a.json b.json --json
    """,
)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print data for programs: every change, seconds and bytes without units.")
def diff(before: Path, after: Path, as_json: bool) -> None:
    """Run ``autopar diff``."""
    from autopar import report

    plans = Plan.load(before), Plan.load(after)
    if as_json:
        click.echo(json.dumps(report.diff_data(*plans), indent=1))
        return
    names = (before.name, after.name) if before.name != after.name else (str(before), str(after))
    report.diff(*plans, make_console(sys.stdout), names=(clean(names[0]), clean(names[1])))
