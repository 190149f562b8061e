"""Whether attention can run as the user pinned it.

Comes in: a model, pins, a mesh where one is given. Goes out: notes on the calls that run otherwise; an InputError where none can run so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopar.errors import InputError
from autopar.ir import Family, Mesh, Op, OpKind, Placement, Split
from autopar.plans import Pins
from autopar.search.options import AxisKind, kind_of
from autopar.structure import AnalyzedGraph, Role, role_of


def note_attention(model: AnalyzedGraph, pins: Pins, mesh: Mesh | None, ranks: int, *, is_later: bool = False) -> tuple[str, ...]:
    """A note per line with attention that can't run as pinned: its keys and values can't travel, or no axis can cut its rows.

    Args:
        model: whose attention is meant.
        pins: `attention`, `zigzag` and `cp` are looked at.
        mesh: of a pipeline rank, if one is given; an axis of kind cp is as good as the pin.
        ranks: devices of a pipeline rank.
        is_later: whether this is a later program over stored parameters, which can be planned without these pins.

    Raises InputError where `attention` or `zigzag` is pinned and no call can run so, or no axis may split the sequence. With ``cp`` alone
    there are only notes in a first program.
    """
    axes = _context_axes(pins, mesh) if pins.cp is not None or not is_later else {}
    is_ring = pins.attention == "ring" or bool(pins.zigzag)
    if not axes and not is_ring and pins.attention is None:
        return ()
    _check_attention(pins, mesh, ranks, axes)
    graph, representative = model.folded.graph, model.folded.representative
    calls = [op for op in graph.of_kind(OpKind.CALL) if representative[op.name] == op.name and _is_attention(model, op)]
    refused = [model.spaces[op.name].facts.ring_refusal if is_ring else "" for op in calls]
    uneven = [_refuse_rows(model, op, pins, axes) for op in calls]
    batches = [_refuse_batch(model, op) if axes and pins.attention != "ulysses" else "" for op in calls]
    reasons = [(op, other or rows or batch) for op, other, rows, batch in zip(calls, refused, uneven, batches, strict=True)]
    pinned = _describe(pins, axes)
    if (is_ring or pins.attention or (is_later and calls)) and all(reason for _, reason in reasons):
        what = "pass its keys and values around" if is_ring else "be split so"
        told = "; ".join(f"{_name(op)}: {reason}" for op, reason in reasons)
        remedy = "leave the pin out, or use attention=ulysses or attention=gather" if calls else "leave the pin out, or build the model so"
        if any(uneven):
            remedy = f"pad the sequence to a multiple of {max(_pieces(pins, size) for size in axes.values())}, or pin fewer ranks"
        elif any(batches):
            remedy = "pass inputs whose dim 0 is the batch"
        raise InputError(
            f"pin {pinned}: no attention of this model can {what}"
            f" ({told or 'there is none that is one operator: transformers have one with attn_implementation sdpa'}); {remedy}"
        )
    notes = (f"{_name(op)} runs otherwise than pinned ({pinned}), since {reason}" for op, reason in reasons if reason)
    return tuple(dict.fromkeys(notes))  # calls of one line have one note


def _check_attention(pins: Pins, mesh: Mesh | None, ranks: int, axes: Mapping[str, int]) -> None:
    """Raise InputError for attention or a zigzag that is pinned where no axis may split the sequence."""
    if pins.attention is None and not pins.zigzag:
        return
    is_taken = mesh is None and math.prod(pins.axis_sizes.values()) >= ranks
    if mesh is not None:
        is_taken = not any(kind_of(name) in (AxisKind.CP, AxisKind.FREE) for name in mesh.names)
    if not axes and (is_taken or pins.cp == 1):
        raise InputError(f"pin {_describe(pins, axes)}: no axis splits the sequence ({mesh or pins}); pin cp=N beside it, or leave it out")


def note_unused(model: AnalyzedGraph, pins: Pins, placements: Mapping[str, Placement]) -> tuple[str, ...]:
    """A note where `attention` or `zigzag` is pinned, and the placements that were chosen split no sequence, or not so."""
    parts = [
        part
        for name, placement in placements.items()
        for part in placement
        if name in model.roles.of_loops and isinstance(part, Split) and role_of(model.roles.of_loops[name], part) is Role.SEQUENCE
    ]
    if pins.attention and not parts:
        return (f"pin attention={pins.attention} has no effect, as no axis splits the sequence; cp=N splits it over N ranks",)
    if pins.zigzag and not any(part.zigzag for part in parts):
        return ("pin zigzag=true has no effect, as no axis of kind cp splits the sequence; cp=N splits it over N ranks",)
    return ()


def _context_axes(pins: Pins, mesh: Mesh | None) -> Mapping[str, int]:
    """Name and size of the axes that split the sequence, as far as they are known before the search."""
    if mesh is not None:
        sizes = zip(mesh.names, mesh.sizes, strict=True)
        return {name: size for name, size in sizes if size > 1 and kind_of(name) is AxisKind.CP}
    return {"cp": pins.cp} if pins.cp is not None and pins.cp > 1 else {}


def _pieces(pins: Pins, size: int) -> int:
    """Into how many equal pieces an axis of this size cuts the rows: two for each rank if the pins say zigzag."""
    return 2 * size if pins.zigzag else size


def _refuse_rows(model: AnalyzedGraph, op: Op, pins: Pins, axes: Mapping[str, int]) -> str:
    """Why no axis can cut the rows of an attention; empty where one can, and where no axis is known."""
    rows: int = model.folded.graph.tensor(op.operands[0]).shape[-2]
    counts = [_pieces(pins, size) for size in axes.values()]
    if not counts or any(rows % count == 0 for count in counts):
        return ""
    pieces = " or ".join(str(count) for count in counts)
    return f"its {rows} rows can't be cut into {pieces} equal pieces{', two for each rank' if pins.zigzag else ''}"


def _refuse_batch(model: AnalyzedGraph, op: Op) -> str:
    """Why axes of the sequence leave the rows of an attention whole; empty where they don't."""
    loops = model.spaces[op.name].operands[0][-2]
    roles = {role for name in loops for role in model.roles.of_loops[op.name][name].values()}
    is_batch = Role.BATCH in roles and Role.SEQUENCE not in roles
    return "its rows are taken for the batch, as they come from dim 0 of an input" if is_batch else ""


def _describe(pins: Pins, axes: Mapping[str, int]) -> str:
    """What is pinned, for messages."""
    if pins.attention:
        return f"attention={pins.attention}"
    return "zigzag=true" if pins.zigzag else ", ".join(f"{name}={size}" for name, size in axes.items())


def _is_attention(model: AnalyzedGraph, op: Op) -> bool:
    return op.name in model.spaces and model.spaces[op.name].family is Family.ATTENTION


def _name(op: Op) -> str:
    return f"{op.target} at {op.source or op.layer or 'the model itself'}"
