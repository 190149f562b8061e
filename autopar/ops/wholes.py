"""Parameters that are stored in parts and computed with whole: ZeRO levels 1 and 2 (Rajbhandari et al. 2020).

Comes in: this rank's parts. Goes out: whole parameters, once per call of a program. `begin_wholes` begins the gathers of a block's
parameters, and `take_wholes` waits for them, where the block begins. What was gathered lives as long as something reads it: autograd saves
it for the backward, and frees it parameter by parameter while that runs.

A large parameter is gathered by a message of its own, into the memory in which it stays where its first dim is split. Small ones of a
block share a message, out of which they are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autopar.ir import MESSAGE_NBYTES
from autopar.ops import comm


@dataclass(frozen=True, slots=True)
class StoredPart:
    """How a parameter becomes whole.

    Attributes:
        axis: along which it is stored in parts.
        shape: sizes of a part as it is sent, which all ranks have in common.
        dtype: to which parts are cast before they are sent.
        send: gives this rank's part, of this shape.
        join: from the parts of all ranks (ranks, *shape) to what a program computes with, by which autograd's graph comes to the parameter.
    """

    axis: comm.Axis
    shape: torch.Size
    dtype: torch.dtype
    send: Callable[[], Tensor]
    join: Callable[[Tensor], Tensor]

    @property
    def sent(self) -> Tensor:
        """This rank's part, as it is sent."""
        return self.send().to(self.dtype)

    @property
    def is_large(self) -> bool:
        """Whether it is gathered by itself."""
        return self.shape.numel() * self.axis.size * self.dtype.itemsize >= MESSAGE_NBYTES


_STORED_PART = "_autopar_stored_part"


def stand_for_whole(x: Tensor, stored: StoredPart) -> Tensor:
    """Let `x` stand for a whole parameter in the arguments of a program, which gathers it; returns `x`."""
    setattr(x, _STORED_PART, stored)
    return x


@dataclass(slots=True)
class Wholes:
    """Parameters whose gathers were begun.

    Attributes:
        parameters: what stands for them, or those that were whole already.
        messages: gathers, each with the positions of its parameters.
    """

    parameters: list[Tensor]
    messages: list[tuple[comm.Message, list[int]]] = field(default_factory=list)


def begin_wholes(parameters: Sequence[Tensor]) -> Wholes:
    """Begin to gather the parameters that were let stand for whole ones (`stand_for_whole`); every rank begins the same ones."""
    wholes = Wholes(list(parameters))
    shared: dict[tuple[str, torch.dtype], list[int]] = {}
    for position, x in enumerate(parameters):
        stored = _stored_part_of(x)
        if stored is not None and stored.is_large:
            wholes.messages.append((stored.axis.begin_gather_stack(stored.sent), [position]))
        elif stored is not None:
            shared.setdefault((stored.axis.name, stored.dtype), []).append(position)
    for positions in shared.values():
        members = [stored for position in positions if (stored := _stored_part_of(parameters[position])) is not None]
        flat = torch.cat([member.sent.reshape(-1) for member in members])
        wholes.messages.append((members[0].axis.begin_gather_stack(flat), positions))
    return wholes


def take_wholes(wholes: Wholes) -> tuple[Tensor, ...]:
    """Wait for parameters whose gathers were begun; returns what the program computes with, in their order."""
    results, messages = list(wholes.parameters), wholes.messages
    while messages:
        message, positions = messages.pop(0)
        stack = message.wait()
        members = [stored for position in positions if (stored := _stored_part_of(results[position])) is not None]
        rows = [stack] if members[0].is_large else torch.split(stack, [member.shape.numel() for member in members], 1)
        for position, member, row in zip(positions, members, rows, strict=True):
            results[position] = member.join(row.view(-1, *member.shape))
    return tuple(results)


def _stored_part_of(x: Tensor) -> StoredPart | None:
    return getattr(x, _STORED_PART, None)
