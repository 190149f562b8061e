"""A plan as one HTML page that needs nothing else: no network, no other file.

Comes in: a `Plan`. Goes out: the text of a page. The template and its libraries (`libraries`, with their licences) are files beside this
module; they are put into the page as they are, and the plan's data as one block of JSON, so a name in a plan is never markup or script.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from autopar.errors import InputError
from autopar.pages.content import describe_page
from autopar.pictures import View
from autopar.plans import Plan
from autopar.report import summarize

LIBRARIES = ("uPlot", "panzoom", "sortable")
"""Libraries of others in the page, each a file ``.js`` and its licence."""

_SCRIPTS = ("elements", "tables", "details", "graph", "timeline", "page")

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def make_page(plan: Plan) -> str:
    """The page of a plan. Raises PlanError for a plan whose seconds contradict each other."""
    content = describe_page(plan)
    libraries = [f"/*\n{_read('libraries', f'{name}.LICENSE').strip()}\n*/\n{_read('libraries', f'{name}.js')}" for name in LIBRARIES]
    scripts = [_read("template", f"{name}.js") for name in _SCRIPTS]
    return fill(
        _read("template", "page.html"),
        {
            "title": html.escape(content["title"]),
            "summary": html.escape(summarize(plan)),
            "styles": "\n".join((_read("libraries", "uPlot.css"), _read("template", "page.css"))),
            "libraries": "\n".join(libraries),
            "scripts": "\n".join(scripts),
            "data": encode(content),
        },
    )


def write_page(plan: Plan, view: View) -> bytes:
    """The page of a plan as the content of a file. Raises InputError for a view of one layer's ops, since a page shows all."""
    if view.level != "layers":
        raise InputError(f"--level {view.level} is for pictures; a page shows all layers, and the ops of the one that is chosen there")
    return make_page(plan).encode("utf-8")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """`template` with ``{{name}}`` replaced by a part; what stands in the parts isn't looked at."""
    return _PLACE.sub(lambda match: parts[match[1]], template)


def encode(content: Any) -> str:
    r"""JSON that may stand inside of a ``script`` element: no character in it ends the element, opens a comment, or ends a line.

    >>> encode("</script><!--")
    '"\\u003c/script\\u003e\\u003c!--"'
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # ASCII only, so U+2028 is written as \u2028
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _read(folder: str, name: str) -> str:
    return (resources.files("autopar.pages") / folder / name).read_text(encoding="utf-8")
