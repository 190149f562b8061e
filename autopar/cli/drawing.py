"""``autopar draw``: a saved plan to a picture of it.

Comes in: arguments. Goes out: a file, and a line on stderr that says so.
"""

from __future__ import annotations

from pathlib import Path

import click

from autopar.cli.terminal import writing
from autopar.errors import InputError
from autopar.plans import Plan
from autopar.texts import check_writable, write_bytes


@click.command(
    short_help="Draw a plan: layers by stage, how they are split, what is communicated.",
    help="""Draw a plan: layers by stage, coloured by how they are split, with what the ranks communicate along the edges.

    How the file's name ends says what to make: .dot is text in the language of Graphviz; .svg, .png and .pdf are pictures, which Graphviz'
    program `dot` draws; .html is a page with the graph, the timeline, memory over time and tables, which needs no other file.

    \b
    Example:
      autopar draw plan.json -o plan.svg
      autopar draw plan.json -o plan.html
      autopar draw plan.json --level ops --layer "model.layers.0" -o layer.svg
    """,
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Write the picture to this file.")
@click.option("--level", type=click.Choice(["layers", "ops"]), default="layers", show_default=True, help="All layers, or one layer's ops.")
@click.option("--layer", metavar="PATH", help="With --level ops: whose ops, a module path or a group of layers; else the first group's.")
def draw(file: Path, output: Path, level: str, layer: str | None) -> None:
    """Run ``autopar draw``."""
    from autopar.pages import write_page
    from autopar.pictures import View, find_writer

    if layer is not None and level != "ops":
        raise InputError(f"--layer {layer} says whose ops to draw; add --level ops, or leave it out")
    writer = find_writer(output, {".html": write_page})
    check_writable(output)
    picture = writer(Plan.load(file), View(level, layer))
    with writing(output):
        write_bytes(output, picture)
