"""What it changes in the cost of a block that the two halves of the batch take turns: exchanges that the other half's computing hides.

Comes in: the rows of a block whose calls and moves are those of two halves, as if every collective waited on the spot, and the moves of its
calls. Goes out: the rows in a program that begins them and waits for them when the other half has computed (`Plan.half_batches`).

The calls of a block are cut where activations are exchanged: in the forward by the collectives of activations, in the backward by those of
their gradients. With C the seconds of a collective for both halves together, W those that the block computes for both in the part before
it, V in the part after it, the part before the first collective continuing the one after the last of the block before, hidden are::

    every part has products        min(overlap C / 2, W / 2) + min(overlap C / 2, V / 2)
    some parts have no products    min(overlap C, max(W, V) / 2)

since a program of the first kind runs a part of one half and the same part of the other in turns, and one of the second kind runs half of
a part with products beside each collective (`autopar.rewrite.halves`). Hidden is the share `Device.overlap` of a collective at most.

What a half costs beside half of the whole is in the rows: each call is launched twice, products are smaller, a collective has its latency
twice, parameters are read twice, and their two gradients are added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from autopar.costs.solved import SolvedChain
from autopar.costs.tables import COLLECTIVE_KIND
from autopar.ir import RouteStep, Tensor
from autopar.plans import CostRow, Phase, Purpose

Move = tuple[Tensor, bool, RouteStep, int, int]
"""A tensor that is moved for a call, whether it is a parameter, a step of its journey, the bytes of the larger of a rank's parts before and
after that step, and in how many pieces it is moved: the two halves of the batch, where they take turns."""

_Kind = tuple[str, str]
"""Axis and collective of a row."""


@dataclass(slots=True)
class _Part:
    """What a block computes, for both halves, between exchanges of activations.

    Attributes:
        exchanged: seconds of the collectives before it, for both halves, by kind.
        seconds: of computing.
        has_product: whether any of it is a product.
    """

    exchanged: dict[_Kind, float] = field(default_factory=dict)
    seconds: float = 0.0
    has_product: bool = False


def hide_exchanges(solved: SolvedChain, moves: Mapping[str, Sequence[Move]], rows: Sequence[CostRow]) -> tuple[CostRow, ...]:
    """The rows of a block in halves, with what is hidden of its exchanges of activations; `moves` are those of its calls, in order."""
    share = solved.tables.device.overlap
    forward, backward = (_find_parts(solved, moves, backward=backward) for backward in (False, True))
    is_cut = not all(part.has_product for part in forward)
    hidden: dict[tuple[str, str], dict[_Kind, float]] = {
        (Phase.FORWARD, Purpose.ACTIVATIONS): _find_hidden(forward, share, is_cut=is_cut),
        (Phase.BACKWARD_INPUT, Purpose.ACTIVATION_GRADIENTS): _find_hidden(backward, share, is_cut=is_cut),
    }
    made = []
    for row in rows:
        seconds = hidden.get((row.phase, row.purpose), {}).get((row.axis, row.collective), 0.0)
        made.append(replace(row, seconds=row.seconds - seconds, hidden=row.hidden + seconds) if seconds else row)
    return tuple(made)


def _find_parts(solved: SolvedChain, moves: Mapping[str, Sequence[Move]], *, backward: bool) -> list[_Part]:
    """The parts of a block that begin with an exchange; the last goes on with what comes before the first exchange of the next block."""
    parts = [_Part()]
    for name, of_call in moves.items():
        op = solved.representative(solved.graph.by_name[name])
        exchanged: dict[_Kind, float] = defaultdict(float)
        for tensor, is_parameter, step, nbytes, pieces in of_call:
            collective = step.backward if backward else step.forward
            if pieces > 1 and not is_parameter and collective in COLLECTIVE_KIND and (tensor.requires_grad or not backward):
                seconds = solved.tables.collective_seconds(collective, step.axis, nbytes // pieces)
                exchanged[solved.mesh.names[step.axis], COLLECTIVE_KIND[collective]] += pieces * seconds
        if exchanged:
            parts.append(_Part(exchanged))
        placement, space = solved.placement(op), solved.model.spaces.get(op.name)
        forward_s, backward_s = solved.tables.op_seconds(op, placement)
        # What kernels exchange is counted with the backward, and isn't computing.
        kernel_s = sum(exchange.seconds for exchange in solved.tables.exchanges(op, placement))
        parts[-1].seconds += backward_s - kernel_s if backward else forward_s
        parts[-1].has_product |= space is not None and space.is_contraction
    first, *others = parts
    if others:
        others[-1].seconds += first.seconds
        others[-1].has_product |= first.has_product
    return others


def _find_hidden(parts: Sequence[_Part], share: float, *, is_cut: bool) -> dict[_Kind, float]:
    """Hidden seconds of the exchanges of a block, by kind."""
    hidden: dict[_Kind, float] = defaultdict(float)
    for before, part in zip([*parts[-1:], *parts[:-1]], parts, strict=True):
        total = sum(part.exchanged.values())
        can = share * total
        if is_cut:
            seconds = min(can, max(before.seconds, part.seconds) / 2)
        else:
            seconds = min(can / 2, before.seconds / 2) + min(can / 2, part.seconds / 2)
        for kind, exchanged in part.exchanged.items():
            hidden[kind] += exchanged * seconds / total
    return hidden
