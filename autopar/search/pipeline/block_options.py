"""The ways to run a block of the chain: what each takes in seconds and bytes, and what it takes to end a stage after the block.

Comes in: what `variants` counts for every block. Goes out: to the assignment of blocks to stages, which chooses an option per block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from autopar.costs import BlockCost


@dataclass(frozen=True, slots=True)
class BlockOption:
    """One way to run a block; seconds are of one micro-batch.

    Attributes:
        name: what is run again; `solution`: index of its placements in the set of solutions that blocks may mix.
        forward, input, weight: seconds of the forward, the input gradients (with what is recomputed for them), the weight gradients.
        once: seconds per step outside of the schedule: the optimizer's update, reductions that nothing hides.
        kept: bytes per micro-batch from the forward to the backward; `waiting`: from the input to the weight gradients.
        static: bytes of parameters, gradients, optimizer state and the model's outputs that the block makes.
        workspace: bytes needed only while the block runs.
        cost: the table that the seconds and bytes are sums of; None for options that are made up.
    """

    name: str
    forward: float
    input: float
    weight: float
    once: float
    kept: int
    waiting: int
    static: int
    workspace: int
    solution: int = 0
    cost: BlockCost | None = field(default=None, compare=False, repr=False)


class Cut(NamedTuple):
    """What it takes to end a stage after a block: seconds to move what crosses, forward and backward, and bytes of one receive buffer.

    `kept` are the bytes per micro-batch that the next stage holds of values which a block before has read: the first block that reads a
    value counts it, and this stage has a copy of its own. `backward_nbytes` are those of a message of gradients.
    """

    forward: float
    backward: float
    nbytes: int
    kept: int = 0
    backward_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """A block of the chain, and the ways to run it; `stage` is the one that the user pinned it to."""

    name: str
    options: tuple[BlockOption, ...]
    cut: Cut
    stage: int | None = None
