"""Whether attention can run as the user pinned it.

Comes in: a model, pins. Goes out: notes on the calls that run otherwise; an InputError where none can run so.
"""

from __future__ import annotations

from autopar.errors import InputError
from autopar.ir import Family, Op, OpKind
from autopar.plans import Pins
from autopar.structure import AnalyzedGraph


def note_attention(model: AnalyzedGraph, pins: Pins) -> tuple[str, ...]:
    """A note per kind of call that can't pass its keys and values around as pinned, and gathers them.

    Raises InputError where no call can.
    """
    if pins.attention != "ring" and not pins.zigzag:
        return ()
    pinned = "attention=ring" if pins.attention == "ring" else "zigzag=true"
    graph, representative = model.folded.graph, model.folded.representative
    calls = [op for op in graph.of_kind(OpKind.CALL) if representative[op.name] == op.name and _is_attention(model, op)]
    refused = [(op, model.spaces[op.name].facts.ring_refusal) for op in calls]
    if not any(not reason for _, reason in refused):
        reasons = "; ".join(f"{_name(op)}: {reason}" for op, reason in refused)
        raise InputError(
            f"pin {pinned}: no attention of this model can pass its keys and values around"
            f" ({reasons or 'there is none that is one operator: transformers have one with attn_implementation sdpa'});"
            " leave the pin out, or use attention=ulysses or attention=gather"
        )
    return tuple(f"{_name(op)} runs otherwise than pinned ({pinned}), since {reason}" for op, reason in refused if reason)


def _is_attention(model: AnalyzedGraph, op: Op) -> bool:
    return op.name in model.spaces and model.spaces[op.name].family is Family.ATTENTION


def _name(op: Op) -> str:
    return f"{op.target} at {op.source or op.layer or 'the model itself'}"
