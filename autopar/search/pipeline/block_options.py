"""The ways to run a block of the chain, in seconds and bytes, and what it takes to end a stage after the block.

Comes in: what `option_maker` sums up for every block. Goes out: to the assignment, which chooses a stage and an option for every block.

Some block options of a transformer layer (seconds of one micro-batch)::

    name       solution  forward  input  weight  saved
    none       0         1 ms     1 ms   1 ms    48 MB    nothing is run again
    selective  0         1 ms     1.2 ms 1 ms    30 MB    the backward runs the attention core again
    full       0         1 ms     2 ms   1 ms     8 MB    the backward runs the whole forward again
    none       1         1.5 ms   1.5 ms 1 ms    24 MB    placements that split more, and communicate more
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autopar.costs import BlockCost, CutCost


@dataclass(frozen=True, slots=True)
class BlockOption:
    """One way to run a block.

    Attributes:
        name: what the backward runs again, of `autopar.plans.RECOMPUTE`.
        forward, backward_input, backward_weight: seconds of one micro-batch: of the forward, of the input gradients (with the forward that
            is run again for them), of the weight gradients.
        per_step: seconds per step outside of the schedule: the optimizer's update, and gradient reductions that no computing overlaps.
        saved: bytes that one micro-batch holds from its forward to its input gradients.
        waiting: bytes that one micro-batch holds from its input gradients to its weight gradients.
        static: bytes all the time: parameters, gradients, optimizer state, and outputs of the model that the block makes.
        workspace: bytes only while the block runs.
        first_workspace, arriving: as in `autopar.costs.memory.BlockMemory`.
        solution: which solution its placements are of, by number among those that blocks may mix.
        cost: the rows and bytes that the numbers above are sums of; None for made-up options, as in tests.
    """

    name: str
    forward: float
    backward_input: float
    backward_weight: float
    per_step: float
    saved: int
    waiting: int
    static: int
    workspace: int
    first_workspace: int = 0
    arriving: int = 0
    solution: int = 0
    cost: BlockCost | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """A block of the chain and the ways to run it.

    Attributes:
        name: the block's, in the chain.
        options: the ways to run it, one of which is chosen.
        cut: what it takes to end a stage after it, whatever the option.
        stage: the stage that the user pinned it to; None leaves it to the search.
    """

    name: str
    options: tuple[BlockOption, ...]
    cut: CutCost
    stage: int | None = None
