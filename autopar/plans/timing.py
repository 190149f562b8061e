"""What a plan says of single blocks, messages and moments, so that its step can be run again on paper (`autopar.timelines`).

Comes in: what the search decided by. Goes out: `Timing`, a part of the plan. `Plan.costs` are sums of these rows over blocks and
micro-batches, for the mean pipeline rank; `Plan.memory` is that of the fullest pipeline rank at its fullest moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from autopar.plans.rows import CostRow


@dataclass(frozen=True, slots=True)
class BlockRows:
    """What a block costs a rank: rows of one micro-batch, those of phase `Phase.STEP` of one step."""

    rows: tuple[CostRow, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """What crosses from a stage to the next one, for one micro-batch and one rank.

    Attributes:
        forward, backward: seconds from the end of a stage's pass until the other stage has what it needs, of values and of their gradients;
            0 where both stages are on one pipeline rank.
        forward_nbytes, backward_nbytes: bytes of the two messages.
    """

    forward: float
    backward: float
    forward_nbytes: int
    backward_nbytes: int


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes of a stage on one rank.

    The last three have an entry per block, in the order of the forward. They are what the micro-batch that runs needs while its forward or
    backward is at this block: what it saves, and what is needed only while the block runs. A program without stages and micro-batches
    holds what the blocks up to this one save; in a schedule the plan counts what all of them save.

    Attributes:
        static: parameters, gradients, optimizer state, the model's outputs.
        arriving: those among them, gradients, that aren't there before the stage's first backward.
        saved: what one micro-batch holds from its forward to its backward.
        waiting: what one micro-batch holds from its input gradients to its weight gradients, where these run apart.
        weight: what is needed while weight gradients run that have waited.
        forward: during the forward.
        first_backward: during a step's first backward, with the gradients of parameters that it has made.
        backward: during the other backwards.
    """

    static: int
    arriving: int
    saved: int
    waiting: int
    weight: int
    forward: tuple[int, ...]
    first_backward: tuple[int, ...]
    backward: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Bytes of a pipeline rank beside those of its stages.

    Attributes:
        messages: receive buffers.
        update: everything that is there while gradients are summed and the optimizer runs, what its stages have all the time included.
    """

    messages: int
    update: int


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds and bytes that a plan's step and peak are computed from.

    Attributes:
        forwards_first: whether all forwards run before the first backward, since the loss is computed outside of the model.
        kinds: the different costs that blocks have.
        kind_of: per block of `Pipeline.blocks` which of `kinds` it has, counted from 0.
        messages: per stage but the last, what crosses to the next.
        stages: bytes of each stage.
        ranks: bytes of each pipeline rank.
    """

    forwards_first: bool
    kinds: tuple[BlockRows, ...]
    kind_of: tuple[int, ...]
    messages: tuple[Message, ...]
    stages: tuple[StageBytes, ...]
    ranks: tuple[RankBytes, ...]

    def rows(self, block: int) -> tuple[CostRow, ...]:
        """The rows of a block, by its number."""
        return self.kinds[self.kind_of[block]].rows


RowKey = tuple[str, str, str, str, str]


def sum_rows(rows: Iterable[tuple[float, CostRow]]) -> dict[RowKey, tuple[float, float]]:
    """Exposed and hidden seconds by layer, phase, purpose, axis and collective, of (how often, row) pairs."""
    sums: dict[RowKey, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for times, row in rows:
        entry = sums[row.layer, row.phase, row.purpose, row.axis, row.collective]
        entry[0] += times * row.seconds
        entry[1] += times * row.hidden
    return {key: (seconds, hidden) for key, (seconds, hidden) in sums.items()}
