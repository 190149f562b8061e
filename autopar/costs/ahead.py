"""What gathers that are begun ahead change in the cost of a block: seconds that other blocks' computing hides, bytes that are in flight.

Comes in: the costs of a block and of its neighbours in the chain, as if every collective waited on the spot. Goes out: the cost of the
block in a program that begins gathers of parameters some blocks ahead (`Plan.prefetch`), and leaves sums of their gradients to run.

Of the communication that can be hidden the share `Device.overlap` runs beside computing, and no longer than that lasts. With W the seconds
that a block computes, F and B for forward and backward, G those of its gathers, S those of its sums, blocks being numbered b::

    forward    hidden G(b) = min(overlap G(b), W_F(b - 1) + own W_F(b))
    backward   hidden G(b) = min(overlap G(b), W_B(b + 1))
               hidden S(b) = min(overlap S(b), W_B(b - 1) - hidden G(b - 2) + own W_B(b))

A block's gathers are begun together, and each is waited for where it is read; a sum begins when its gradient is made. So all of them but
one run beside the block's own computing too, as far as that hides nothing of its neighbours ("own"). That counts where no neighbour has
enough to do: in the first block of the forward and in the last of the backward. The first gathers of the forward and of the backward and
the last sum have nothing to run behind. More than one block ahead evens out unlike blocks, which isn't counted.

In flight are, while block b runs, the gathered parameters of the blocks b to b + ahead in the forward; in the backward those of b - ahead
to b, and the gradients of b to b + ahead that aren't summed yet. A parameter of b is free when its gradient has been made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.costs.blocks import BlockCost
from autopar.costs.memory import BlockMemory
from autopar.plans import CostRow, Phase, Purpose

_BACKWARD = (Phase.BACKWARD_INPUT, Phase.BACKWARD_WEIGHT)


@dataclass(frozen=True, slots=True)
class BlockWork:
    """What a block does that neighbours' costs depend on.

    Attributes:
        forward, backward: seconds of computing.
        gathers: seconds of the gathers of its parameters in the backward.
        sums: seconds of the sums of their gradients.
        count: how many parameters it gathers.
        gathered, unsummed: bytes of its gathered parameters, and of their gradients before these are summed over ranks.
        largest: of the parameter with most among these.
    """

    forward: float = 0.0
    backward: float = 0.0
    gathers: float = 0.0
    sums: float = 0.0
    count: float = 0.0
    gathered: int = 0
    unsummed: int = 0
    largest: int = 0


NO_WORK = BlockWork()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the other blocks of a chain mean for one: seconds that hide its gathers in the forward, in the backward, and its sums; bytes.

    `is_last` says that it is the last of its stage, whose backward comes first.
    """

    forward: float
    backward: float
    sums: float
    nbytes: int
    is_last: bool = False


def find_work(cost: BlockCost) -> BlockWork:
    """The work of a block, whose cost is one without recomputation."""
    rows = cost.rows
    gathers = [row for row in rows if _is_gather(row)]
    return BlockWork(
        forward=sum(row.seconds for row in rows if row.phase == Phase.FORWARD and row.purpose == Purpose.COMPUTE),
        backward=sum(row.seconds for row in rows if row.phase in _BACKWARD and row.purpose == Purpose.COMPUTE),
        gathers=sum(row.seconds for row in gathers if row.phase != Phase.FORWARD),
        sums=sum(row.seconds for row in rows if _is_sum(row)),
        count=sum(row.count for row in gathers if row.phase == Phase.FORWARD),
        gathered=int(sum(row.nbytes for row in gathers if row.phase == Phase.FORWARD)),
        unsummed=int(sum(row.nbytes for row in rows if _is_sum(row))),
        largest=cost.memory.largest,
    )


def find_surroundings(
    works: Sequence[BlockWork], number: int, ahead: int, share: float, *, is_one_stage: bool, sums_run: bool
) -> Surroundings:
    """What the others mean for block `number`.

    Args:
        works: of all blocks of the chain, in order.
        number: of the block among them.
        ahead: how many blocks ahead gathers are begun.
        share: of communication that can be hidden, `Device.overlap`.
        is_one_stage: whether all of them run on the same ranks. If not, it isn't known which others do: nothing is counted as hidden, and
            they are taken to gather what this one does.
        sums_run: whether sums of gradients run behind the backward; a schedule of micro-batches waits for them.
    """

    def work(other: int) -> BlockWork:
        return works[other] if 0 <= other < len(works) else NO_WORK

    before, after, own = work(number - 1), work(number + 1), works[number]
    if not is_one_stage:
        return Surroundings(0.0, 0.0, 0.0, (1 + ahead) * own.gathered)
    next_gathers = min(share * work(number - 2).gathers, before.backward)
    all_but_one = 1 - 1 / own.count if own.count else 0.0
    own_forward = min(all_but_one * share * own.gathers, max(0.0, own.forward - share * after.gathers))
    own_backward = min(all_but_one * share * own.sums, max(0.0, own.backward - share * (before.gathers + after.sums)))
    following = [work(number + step) for step in range(1, ahead + 1)]
    forward_nbytes = own.gathered + sum(other.gathered for other in following)
    backward_nbytes = sum(work(number - step).gathered for step in range(1, ahead + 1))
    if sums_run:
        # What the block has read of a parameter is free before it has made the gradient of the next.
        backward_nbytes += max(own.gathered, own.unsummed) + own.largest + sum(other.unsummed for other in following)
    else:
        backward_nbytes += own.gathered
    return Surroundings(
        forward=before.forward + own_forward,
        backward=after.backward,
        sums=before.backward - next_gathers + own_backward if sums_run else 0.0,
        nbytes=max(forward_nbytes, backward_nbytes) if own.gathered else 0,
        is_last=number == len(works) - 1,
    )


def overlap(cost: BlockCost, around: Surroundings, share: float) -> BlockCost:
    """The cost of a block, of whose gathers and sums the share `share` is hidden as far as its surroundings allow."""
    rows = list(cost.rows)
    _hide(rows, [i for i, row in enumerate(rows) if _is_gather(row) and row.phase == Phase.FORWARD], share, around.forward)
    _hide(rows, [i for i, row in enumerate(rows) if _is_gather(row) and row.phase != Phase.FORWARD], share, around.backward)
    _hide(rows, [i for i, row in enumerate(rows) if _is_sum(row)], share, around.sums)
    return BlockCost(tuple(rows), _with_workspace(cost.memory, around))


def _with_workspace(memory: BlockMemory, around: Surroundings) -> BlockMemory:
    """The memory of a block with what is in flight while it runs; nothing is before the backward's first block reads a parameter."""
    nbytes = max(0, around.nbytes - memory.unread) if around.is_last else around.nbytes
    first = memory.first_workspace + nbytes
    forward = min(memory.forward_workspace + around.nbytes, first)
    return replace(memory, workspace=memory.workspace + nbytes, first_workspace=first, forward_workspace=forward)


def _hide(rows: list[CostRow], places: Sequence[int], share: float, window: float) -> None:
    """Of these rows, hide `share` together, but no more than `window` seconds."""
    total = sum(rows[place].seconds for place in places)
    hidden = min(share, window / total) if total > 0 else 0.0
    for place in places if hidden else ():
        row = rows[place]
        rows[place] = replace(row, seconds=row.seconds * (1 - hidden), hidden=row.hidden + row.seconds * hidden)


def _is_gather(row: CostRow) -> bool:
    return row.purpose == Purpose.PARAMETERS and row.collective == "all_gather"


def _is_sum(row: CostRow) -> bool:
    return row.purpose == Purpose.GRADIENTS and row.phase != Phase.STEP and row.collective == "reduce_scatter"
