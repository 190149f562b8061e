"""What it takes to end a stage after a block: the layouts in which values are sent, the seconds of their messages, their bytes.

Comes in: a chain of blocks under one solution (`SolvedChain`), the link between two pipeline ranks. Goes out: a `CutCost` per block.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cost_models import Link, collective_seconds
from autopar.costs.solved import SolvedChain
from autopar.costs.tables import local_nbytes
from autopar.ir import REPLICATE, Collective, Layout, State, StateKind, Value, fits, shard


@dataclass(frozen=True, slots=True)
class CutCost:
    """What it takes to end a stage after a block, for one micro-batch and one rank of a stage.

    Attributes:
        forward: seconds from the end of the stage until the next one has what crosses; no compute on either rank is in them.
        backward: the same for the gradients on their way back.
        nbytes: of the message forward, and so of one receive buffer.
        saved: bytes of values that a block before the cut reads and counts as saved, and of which the next stage has a copy of its own.
        backward_nbytes: of the message of gradients.
    """

    forward: float
    backward: float
    nbytes: int
    saved: int = 0
    backward_nbytes: int = 0

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of both messages, forward and backward."""
        return self.forward, self.backward


def travel_layout(solved: SolvedChain, value: Value, link: Link | None) -> Layout:
    """The layout in which a value is sent to another stage over `link`; None stands for no other stage.

    Shards are sent as they are. Sums over ranks are added up before they are sent. What all n ranks of an axis have is sent in parts, 1/n
    by each, and gathered by the receivers where that is faster: where the gather takes less than sending the other (n - 1)/n of the bytes
    (the scatter and gather of Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 4.1).
    """
    tensor, mesh = solved.graph.tensor(value), solved.mesh
    layout = list(solved.made(value))
    for axis in range(solved.tables.first_axis, len(layout)):
        if layout[axis].kind is StateKind.SHARD:
            continue
        is_sum = layout[axis].kind is StateKind.PARTIAL
        layout[axis] = REPLICATE
        nbytes = local_nbytes(tensor, tuple(layout), mesh)
        size = mesh.sizes[axis]
        gather = solved.tables.collective_seconds(Collective.ALL_GATHER, axis, nbytes)
        saved_seconds = (1 - 1 / size) * nbytes / link.rank_bytes_per_s if link is not None else 0.0
        if size > 1 and (is_sum or saved_seconds > gather):
            dims = range(len(tensor.shape))
            split = next((dim for dim in dims if fits(tensor.shape, _with_shard(layout, axis, dim), mesh)), None)
            if split is not None:
                layout[axis] = shard(split)
    return tuple(layout)


def _with_shard(layout: list[State], axis: int, dim: int) -> Layout:
    return (*layout[:axis], shard(dim), *layout[axis + 1 :])


def cut_kind(solved: SolvedChain, number: int) -> tuple[object, ...]:
    """A key that is equal for blocks after which a cut costs the same: after like layers values of the same types and layouts cross."""
    reads, graph = solved.reads, solved.graph
    crossing = solved.chain.blocks[number].crossing
    return (
        tuple((graph.tensor(value), solved.made(value), reads.first_reader[value] <= number) for value in crossing),
        tuple((graph.tensor(value), solved.made(value), solved.is_saved(value)) for value in reads.made_again[number]),
    )


def cost_cut(solved: SolvedChain, number: int, link: Link | None) -> CutCost:
    """What it takes to end a stage after block `number` of the chain.

    Both directions are the message plus half of the seconds that it takes, on both ends and in both directions, to bring what crosses into
    the layout in which it is sent and back.

    Args:
        solved: the chain.
        number: of the block.
        link: between the pipeline ranks; None where there are no other stages: then nothing takes time.
    """
    forward_nbytes = backward_nbytes = 0
    gathers = 0.0
    crossing = solved.chain.blocks[number].crossing
    for value in crossing:
        tensor, made = solved.graph.tensor(value), solved.made(value)
        layout = travel_layout(solved, value, link)
        nbytes = solved.nbytes(value, layout)
        forward_nbytes += nbytes
        backward_nbytes += nbytes if tensor.requires_grad else 0
        # The sender brings the value into the layout in which it is sent. The receiver brings it back, unless it was a sum: that is done.
        gathers += sum(solved.tables.journey_seconds(tensor, made, layout, backward=tensor.requires_grad))
        if made != layout and all(state.kind is not StateKind.PARTIAL for state in made):
            gathers += sum(solved.tables.journey_seconds(tensor, layout, made, backward=tensor.requires_grad))
    held = [value for value in crossing if solved.reads.first_reader[value] <= number]
    held += [value for value in solved.reads.made_again[number] if solved.is_saved(value)]
    saved = sum(solved.nbytes(value) for value in held)
    if link is None:
        return CutCost(0.0, 0.0, forward_nbytes, saved, backward_nbytes)
    forward, backward = (collective_seconds("p2p", nbytes, 2, link) if nbytes else 0.0 for nbytes in (forward_nbytes, backward_nbytes))
    return CutCost(forward + gathers / 2, backward + gathers / 2, forward_nbytes, saved, backward_nbytes)
