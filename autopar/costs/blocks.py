"""The table of costs of a block: rows of seconds by phase, purpose and axis, and bytes by kind, for each kind of recomputation.

Comes in: a chain of blocks under one solution of the placement problem (`SolvedChain`). Goes out: a `BlockCost` per block and kind of
recomputation. The search sums its rows, the plan stores them, the report prints them.

A block's rows are, by phase:

- FORWARD: compute of its calls, journeys of their operands, and of the outputs that it makes;
- BACKWARD_INPUT: the backward of its calls without weight gradients that can wait, what kernels exchange (of both directions), the
  journeys of gradients, ZeRO's second gathers, and the forward rows of the calls that are run again (Purpose.RECOMPUTE);
- BACKWARD_WEIGHT: the weight gradients that can wait: of a product with a weight half of the backward; sums of gradients over ranks where
  they are of one micro-batch (`CostTables.sums_each`);
- STEP: updates of parameters, the other sums of gradients over ranks, and gathers of parameters that are stored in parts (ZeRO levels 1
  and 2).

What several blocks share counts in one of them, as `ChainReads` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from autopar.costs.halves import Move, hide_exchanges
from autopar.costs.liveness import passing
from autopar.costs.memory import BlockMemory, find_memory, recompute_memory
from autopar.costs.solved import SolvedChain
from autopar.costs.tables import COLLECTIVE_KIND, parameter_backward, reduced_nbytes, sum_of
from autopar.ir import Collective, Layout, Op, OpKind, RouteStep, Value
from autopar.plans import LOCAL_COPY, CostRow, Phase, Purpose, RowSums, Seconds, seconds_of, sum_parts
from autopar.structure import find_cores


@dataclass(frozen=True)
class BlockCost:
    """What it takes to run a block for one micro-batch, and once per step (`Phase.STEP`).

    Attributes:
        rows: seconds of one micro-batch, those of phase STEP of one step.
        memory: bytes by kind.
    """

    rows: tuple[CostRow, ...]
    memory: BlockMemory

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        """Seconds of each phase."""
        return {phase: seconds_of(self.rows, phase) for phase in Phase}

    @cached_property
    def parts(self) -> tuple[Seconds, Seconds]:
        """What the seconds of one micro-batch are made of, and those once per step."""
        once = [row for row in self.rows if row.phase == Phase.STEP]
        return sum_parts(row for row in self.rows if row.phase != Phase.STEP), sum_parts(once)


def cost_block(solved: SolvedChain, number: int, recompute: Iterable[str]) -> Iterator[tuple[str, BlockCost]]:
    """The costs of a block under kinds of recomputation.

    Args:
        solved: the chain.
        number: of the block in it.
        recompute: kinds of recomputation: ``none``, ``selective`` (the attention cores are run again), ``full`` (the block is).

    Yields:
        Per kind (kind, cost). Where a kind finds nothing to run again, its cost and its name are those of ``none``.
    """
    block = solved.chain.blocks[number]
    moves = _moves_of_calls(solved, number)
    forward = _forward_rows(solved, moves)
    base = RowSums()
    for rows in forward.values():
        for row in rows:
            base.add_row(row)
    for _, add in _rest_of_block(solved, number, moves):
        add(base)
    plain, memory = base.rows(), find_memory(solved, number)
    if solved.tables.halved:
        plain = hide_exchanges(solved, {name: moves[name] for name in block.ops}, plain)
    for kind in recompute:
        rerun = _find_rerun(solved, number, kind)
        again = RowSums()
        for name in (name for region in rerun for name in region):
            for row in forward[name]:
                again.add_row(replace(row, phase=Phase.BACKWARD_INPUT, purpose=Purpose.RECOMPUTE))
        yield kind if rerun else "none", BlockCost((*plain, *again.rows()), recompute_memory(solved, number, memory, rerun))


def itemize_block(solved: SolvedChain, number: int, recompute: str) -> Iterator[tuple[str, CostRow]]:
    """The costs of a block op by op, as if every collective waited on the spot: their sums by kind are those of `cost_block`.

    Args:
        solved: the chain.
        number: of the block in it.
        recompute: what of the block is run again, as `cost_block` has it.

    Yields:
        Per entry (name of the call, or of the parameter, that it is for; the row).
    """
    moves = _moves_of_calls(solved, number)
    forward = _forward_rows(solved, moves)
    for name, rows in forward.items():
        yield from ((name, row) for row in rows)
    for name, add in _rest_of_block(solved, number, moves):
        sums = RowSums()
        add(sums)
        yield from ((name, row) for row in sums.rows())
    for name in (name for region in _find_rerun(solved, number, recompute) for name in region):
        yield from ((name, replace(row, phase=Phase.BACKWARD_INPUT, purpose=Purpose.RECOMPUTE)) for row in forward[name])


def _find_rerun(solved: SolvedChain, number: int, recompute: str) -> Sequence[Sequence[str]]:
    """The calls of a block that its backward runs again, region by region."""
    ops = solved.chain.blocks[number].ops
    if recompute == "selective":
        return find_cores(solved.graph, solved.model.spaces, ops)
    return (ops,) if recompute == "full" else ()


def block_kind(solved: SolvedChain, number: int) -> tuple[object, ...]:
    """A key that is equal for blocks of equal costs.

    Blocks of like layers may differ in costs: the first one counts what all of them read, and the last one may make an output.
    """
    reads, graph = solved.reads, solved.graph
    read = tuple((graph.tensor(value), solved.made(value), solved.is_saved_as_made(value)) for value in reads.first_read[number])
    cheap = tuple(
        solved.tables.op_seconds(solved.representative(op), solved.placement(op))
        for op in map(graph.by_name.__getitem__, reads.cheap[number])
    )
    shared = tuple(
        solved.is_moved_before(number, graph.by_name[name].operands[index], solved.needs(graph.by_name[name])[index])
        for name, index in reads.shared[number]
        if solved.is_one_stage
    )
    outputs = tuple(
        (graph.tensor(value), solved.made(value), solved.sharding.outputs[position]) for position, value in reads.outputs[number]
    )
    block = solved.chain.blocks[number]
    # Like blocks have like parameters, but other blocks may read them before, and the last block has those that none reads.
    parameters = tuple(
        (
            solved.representative(graph.by_name[name]).name,
            reads.first_block[name] == number,
            reads.last_block[name] == number,
            solved.model.folded.representative.get(solved.updated_before.get(name, "")),
        )
        for name in reads.parameters[number]
    )
    # Between the first and the last block that read a parameter, a summand of its gradient waits.
    tied = tuple(name for name in reads.tied if reads.first_block[name] < number <= reads.last_block[name])
    hides = _hides_gathers(solved, number) and any(state.level for name in reads.parameters[number] for state in solved.stored(name))
    through = tuple(
        (graph.tensor(value), solved.made(value), solved.is_saved_as_made(value), reads.first_reader[value] <= number)
        for value in passing(solved, number)
    )
    return block.like, read, cheap, shared, parameters, outputs, hides, tied, through


def _hides_gathers(solved: SolvedChain, number: int) -> bool:
    """Whether a block's gathers of parameters of ZeRO level 1 or 2 run behind the blocks before it, in a program of the whole batch."""
    return number > 0 and solved.runs_ahead


def _moves_of_calls(solved: SolvedChain, number: int) -> dict[str, list[Move]]:
    """The moves of the operands of every call of a block, and of the cheap calls that it is the first to need, which come first.

    What was moved into a layout for one call isn't moved again for another. But a parameter is moved for each use: a gathered one isn't
    held between them.
    """
    moved: set[tuple[Value, Layout]] = set()
    moves: dict[str, list[Move]] = {}
    for name in (*solved.reads.cheap[number], *solved.chain.blocks[number].ops):
        moves[name] = []
        for journey in solved.journeys(solved.graph.by_name[name]):
            is_parameter = solved.graph.by_name[journey.value.op].kind is OpKind.PARAMETER
            if not is_parameter:
                key = journey.value, journey.need
                if key in moved or solved.is_moved_before(number, *key):
                    continue
                moved.add(key)
            tensor = solved.graph.tensor(journey.value)
            pieces = 2 if solved.model.folded.representative[journey.value.op] in solved.tables.halved else 1
            moves[name] += [(tensor, is_parameter, *step, pieces) for step in solved.tables.steps(tensor, journey.start, journey.need)]
    return moves


def _forward_rows(solved: SolvedChain, moves: Mapping[str, Sequence[Move]]) -> dict[str, tuple[CostRow, ...]]:
    """Per call what its forward takes, the moves of its operands included."""
    rows: dict[str, tuple[CostRow, ...]] = {}
    for name in moves:
        op, sums = solved.graph.by_name[name], RowSums()
        layer = solved.layer_of.get(name, "")
        sums.add(Phase.FORWARD, Purpose.COMPUTE, solved.tables.op_seconds(solved.representative(op), solved.placement(op))[0], layer=layer)
        for _, is_parameter, move, nbytes, pieces in moves[name]:
            if move.forward is not Collective.NONE:
                purpose = Purpose.PARAMETERS if is_parameter else Purpose.ACTIVATIONS
                _add_move(solved, sums, Phase.FORWARD, purpose, move.forward, move, nbytes, layer, pieces)
        rows[name] = sums.rows()
    return rows


def _add_move(
    solved: SolvedChain,
    sums: RowSums,
    phase: str,
    purpose: str,
    collective: Collective,
    move: RouteStep,
    nbytes: int,
    layer: str,
    pieces: int = 1,
) -> None:
    """Add an entry for one direction of a step of a journey: `collective` along its axis, in so many pieces."""
    sums.add(
        phase,
        purpose,
        pieces * solved.tables.collective_seconds(collective, move.axis, nbytes // pieces),
        layer=layer,
        axis=solved.mesh.names[move.axis],
        collective=COLLECTIVE_KIND.get(collective, LOCAL_COPY),
        count=pieces,
        nbytes=nbytes,
    )


def _rest_of_block(
    solved: SolvedChain, number: int, moves: Mapping[str, Sequence[Move]]
) -> Iterator[tuple[str, Callable[[RowSums], None]]]:
    """What a block takes beside the forward of its calls: per call, output and parameter its name, and what adds its rows to sums."""
    for name in solved.chain.blocks[number].ops:
        yield name, partial(_add_backward, solved, name, moves[name])
    for position, value in solved.reads.outputs[number]:
        yield value.op, partial(_add_output, solved, position, value)
    for name in solved.reads.parameters[number]:
        yield name, partial(_add_step, solved, number, name)


def _add_backward(solved: SolvedChain, name: str, moves: Sequence[Move], sums: RowSums) -> None:
    """The backward of a call: its computing, what its kernel exchanges in either direction, and the moves of its operands."""
    op, layer = solved.graph.by_name[name], solved.layer_of.get(name, "")
    representative, placement = solved.representative(op), solved.placement(op)
    exchanged = 0.0
    for exchange in solved.tables.exchanges(representative, placement):
        exchanged += exchange.seconds
        sums.add(
            Phase.BACKWARD_INPUT,
            Purpose.KERNEL,
            exchange.seconds,
            layer=layer,
            axis=solved.mesh.names[exchange.axis],
            collective=exchange.collective,
            nbytes=exchange.nbytes,
            hidden=exchange.hidden,
        )
    backward = solved.tables.op_seconds(representative, placement)[1] - exchanged
    # Of a product with a weight, one of two products is the weight's gradient.
    weight = backward / 2 if name in solved.reads.deferrable and _has_activation(solved, op) else 0.0
    sums.add(Phase.BACKWARD_INPUT, Purpose.COMPUTE, backward - weight, layer=layer)
    if weight:
        sums.add(Phase.BACKWARD_WEIGHT, Purpose.COMPUTE, weight, layer=layer)
    for tensor, is_parameter, move, nbytes, pieces in moves:
        if is_parameter:
            for purpose, direction, moved in parameter_backward(tensor, move, nbytes):
                _add_move(solved, sums, Phase.BACKWARD_INPUT, purpose, direction, move, moved, layer)
        elif tensor.requires_grad and move.backward is not Collective.NONE:
            _add_move(solved, sums, Phase.BACKWARD_INPUT, Purpose.ACTIVATION_GRADIENTS, move.backward, move, nbytes, layer, pieces)


def _has_activation(solved: SolvedChain, op: Op) -> bool:
    """Whether a call reads an activation that needs a gradient, besides parameters."""
    return any(solved.graph.by_name[value.op].kind is OpKind.CALL and solved.graph.tensor(value).requires_grad for value in op.operands)


def _add_output(solved: SolvedChain, position: int, value: Value, sums: RowSums) -> None:
    """The journey of an output to the layout in which the user gets it.

    Only forward: whether an output gets a gradient depends on the user's loop; one that is returned beside a loss gets none.
    """
    layer = solved.layer_of.get(value.op, "")
    for move, nbytes in solved.tables.steps(solved.graph.tensor(value), solved.made(value), solved.sharding.outputs[position]):
        if move.forward is not Collective.NONE:
            _add_move(solved, sums, Phase.FORWARD, Purpose.ACTIVATIONS, move.forward, move, nbytes, layer)


def _add_step(solved: SolvedChain, number: int, name: str, sums: RowSums) -> None:
    """What a parameter of a block takes once per step: the optimizer's update, and sums of its gradient over ranks.

    A parameter that several blocks read counts with the first of them; of its uses that leave a sum over ranks the dearest counts, as their
    gradients are added up before. The share `Device.overlap` of a sum is overlapped with the backward. What is summed after every
    micro-batch isn't, and blocks that may be on several stages each sum their own.
    """
    tensor, stored = solved.graph.by_name[name].results[0], solved.stored(name)
    layer = solved.layer_of.get(name, "")
    is_first = solved.reads.first_block[name] == number
    sums_each = solved.tables.sums_each(stored)
    if tensor.requires_grad and (is_first or (sums_each and not solved.is_one_stage)):
        _add_sums(solved, name, sums, layer, Phase.BACKWARD_WEIGHT if sums_each else Phase.STEP)
    if not is_first:
        return
    hidden_share = solved.tables.gather_overlap if _hides_gathers(solved, number) else 0.0
    for axis, nbytes, seconds in solved.tables.held_gathers(tensor, stored):
        moved = axis, COLLECTIVE_KIND[Collective.ALL_GATHER], nbytes, seconds
        _add_moved(solved, sums, Phase.STEP, Purpose.PARAMETERS, moved, hidden_share, layer)
    if tensor.requires_grad:
        sums.add(Phase.STEP, Purpose.OPTIMIZER, solved.tables.optimizer_seconds(tensor, stored), layer=layer)


def _add_sums(solved: SolvedChain, parameter: str, sums: RowSums, layer: str, phase: str) -> None:
    """The sums over ranks of the gradient of a parameter, of one step or of one micro-batch."""
    uses = [list(_reductions(solved, parameter, reader)) for reader in solved.graph.readers.get(Value(parameter), ())]
    hidden_share = solved.tables.device.overlap if phase == Phase.STEP else 0.0
    for moved in max(uses, key=_total_seconds, default=[]):
        _add_moved(solved, sums, phase, Purpose.GRADIENTS, moved, hidden_share, layer)


Moved = tuple[int, str, int, float]
"""A collective for a parameter: axis, name, bytes, seconds."""


def _add_moved(solved: SolvedChain, sums: RowSums, phase: str, purpose: str, moved: Moved, hidden_share: float, layer: str) -> None:
    """Add the entry of a collective of whose seconds the share `hidden_share` runs beside computing."""
    axis, collective, nbytes, seconds = moved
    sums.add(
        phase,
        purpose,
        seconds * (1 - hidden_share),
        layer=layer,
        axis=solved.mesh.names[axis],
        collective=collective,
        nbytes=nbytes,
        hidden=seconds * hidden_share,
    )


def _reductions(solved: SolvedChain, parameter: str, reader: str) -> Iterator[Moved]:
    """The sums over ranks that the gradient of a parameter needs after its use by one reader."""
    op = solved.graph.by_name[reader]
    if op.kind is OpKind.OUTPUT:
        return
    value = Value(parameter)
    tensor, need = solved.graph.tensor(value), solved.needs(op)[op.operands.index(value)]
    for move, nbytes in solved.tables.steps(tensor, solved.made(value), need):
        if move.forward is Collective.NONE and move.backward is not Collective.NONE:
            summed = reduced_nbytes(tensor, nbytes)
            collective = sum_of(solved.stored(parameter)[move.axis], move)
            yield move.axis, COLLECTIVE_KIND[collective], summed, solved.tables.bucket_seconds(collective, move.axis, summed)


def _total_seconds(reductions: Sequence[Moved]) -> float:
    return sum(seconds for *_, seconds in reductions)
