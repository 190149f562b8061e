"""Which kinds of picture files there are, and what makes each.

Comes in: a `Plan` and what to show of it. Goes out: bytes of a file. A further kind is an entry in `WRITERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pydot

from autopar.errors import InputError
from autopar.pictures.layers import draw_layers
from autopar.pictures.ops import draw_ops
from autopar.pictures.outline import make_outline
from autopar.pictures.rendering import render, to_text
from autopar.plans import Plan


@dataclass(frozen=True, slots=True)
class View:
    """What to show of a plan.

    Attributes:
        level: ``layers``, the whole model by layers and stages, or ``ops``, the ops of one layer.
        layer: whose ops, as ``explain --layer`` takes it; None is the group of layers that takes most of the step. It has no say over a
            picture of all layers.
    """

    level: str = "layers"
    layer: str | None = None


def make_graph(plan: Plan, view: View) -> pydot.Dot:
    """The graph of what `view` shows of the plan. Raises InputError when no layer matches, or the plan doesn't have its ops."""
    return draw_ops(plan, view.layer) if view.level == "ops" else draw_layers(make_outline(plan))


def _render(form: str, plan: Plan, view: View) -> bytes:
    return render(make_graph(plan, view), form)


WRITERS: Mapping[str, Callable[[Plan, View], bytes]] = {
    ".dot": lambda plan, view: to_text(make_graph(plan, view)),
    ".svg": partial(_render, "svg"),
    ".png": partial(_render, "png"),
    ".pdf": partial(_render, "pdf"),
}
"""What makes a file, by how its name ends. All raise InputError."""


Writer = Callable[[Plan, View], bytes]


def find_writer(path: Path, others: Mapping[str, Writer] = MappingProxyType({})) -> Writer:
    """What makes the file of this name, of pictures and `others`. Raises InputError, listing the endings, for one that none makes."""
    writers = {**WRITERS, **others}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"{path}: how the name ends says what to make; known are {', '.join(writers)}")
    return writer
