"""Bytes of a block on one rank, by kind: what is stored, what a micro-batch saves for its backward, what is needed while the block runs.

Comes in: a chain of blocks under one solution (`SolvedChain`). Goes out: a `BlockMemory` per block and kind of recomputation. A rank with
the blocks b of its stages, of which at most n micro-batches are between forward and backward, needs about

    sum over b of (b.static + n b.saved) + the largest b.workspace

(the exact sum, with b.waiting and receive buffers, is in ``search.pipeline.assignment_problem``).

What counts as saved is what autograd saves (`SavedTensors`). A value that crosses from one block to another counts with the first block
that reads it: that block holds it whatever the maker runs again. Of a region that is run again, only what enters it counts, and results
that leave it for the same block if autograd saves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from autopar.costs.liveness import Held, find_workspace
from autopar.costs.solved import SolvedChain
from autopar.costs.tables import kept_nbytes, local_nbytes, reduced_nbytes
from autopar.ir import MESSAGE_NBYTES, MOMENTS, Collective, Graph, Layout, Op, OpKind, Value
from autopar.structure import find_source


@dataclass(frozen=True, slots=True)
class Scatters:
    """Bytes of local gradients in the dtype of sums, which a backward makes and a sum over ranks takes.

    Attributes:
        whole: of all that programs are given of the parameters.
        together: of those among them that share messages with others.
        largest: of the one with most.
        parts: of the parts of the sums that a rank gets.
    """

    whole: int = 0
    together: int = 0
    largest: int = 0
    parts: int = 0

    def add(self, whole: int, part: int) -> Scatters:
        """With one more gradient, of which this rank gets a part."""
        shared = whole if whole < MESSAGE_NBYTES else 0
        return Scatters(self.whole + whole, self.together + shared, max(self.largest, whole), self.parts + part)


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """Bytes of a block on one rank.

    Attributes:
        parameters, gradients, optimizer: a rank's parts of the parameters that the block reads, with their copies in the dtype in which
            the program reads them; the optimizer's state of a parameter that several blocks read counts with the first.
        outputs: the user's outputs that the block makes, of the whole batch.
        saved: per micro-batch, held from its forward to its backward.
        waiting: per micro-batch, held from its input gradients to its weight gradients, where a schedule runs these apart.
        workspace: needed while the block runs, forward or backward, and free afterwards.
        first_workspace: the same in a step's first backward, in which gradients of parameters come into being, with those of the block.
        forward_workspace: the same in the forward alone.
        copies: of parameters, in which the program reads them; part of `parameters`.
        unsaved: those copies that nothing needs for the backward, such as a table that is looked up: free when the forward has ended.
        arriving: gradients that the block's first backward makes; of a parameter that several blocks of a stage read, the last makes it.
        bucketed: local gradients that are summed over ranks in buckets.
        unsummed: those among them of which a rank keeps a part (ZeRO levels 1 and 2), and `scattered`: these parts.
        scatters: local gradients that are summed after every micro-batch (ZeRO level 2).
        unread: by how much `workspace` is less while gathered parameters are there, in a block whose backward comes first.
        largest: of the parameters that are gathered from parts, or of their whole gradients, the one with most.
        update: what a step of the optimizer needs beside its states, of the parameter with most: two tensors of the size of the stored
            part, and one of the part of the parameter before, since the loop over parameters still has its name for it.
        masters: gradients in float32 of the parameters of which the optimizer keeps copies in float32: a step makes all of them.
    """

    parameters: int
    gradients: int
    optimizer: int
    outputs: int
    saved: int
    waiting: int
    workspace: int
    first_workspace: int = 0
    forward_workspace: int = 0
    copies: int = 0
    unsaved: int = 0
    arriving: int = 0
    bucketed: int = 0
    unsummed: int = 0
    scattered: int = 0
    scatters: Scatters = Scatters()
    unread: int = 0
    largest: int = 0
    update: int = 0
    masters: int = 0

    @property
    def static(self) -> int:
        """Bytes that are there during the whole step."""
        return self.parameters + self.gradients + self.optimizer + self.outputs


def given_nbytes(graph: Graph) -> int:
    """Bytes of the inputs and buffers of a graph: every rank has them whole, whatever is decided."""
    return sum(op.results[0].nbytes for kind in (OpKind.INPUT, OpKind.BUFFER) for op in graph.of_kind(kind))


@dataclass(frozen=True, slots=True)
class PlainMemory:
    """A block without recomputation.

    Attributes:
        memory: its memory.
        held: what it saves.
        tied: bytes of gradients of parameters that other blocks read too (`_tied_nbytes`).
    """

    memory: BlockMemory
    held: Held
    tied: tuple[int, int]


def find_memory(solved: SolvedChain, number: int) -> PlainMemory:
    """The memory of block `number` of the chain without recomputation.

    Where all blocks run on the same ranks, a parameter that several blocks read counts with the first of them only.
    """
    parameters = copies = unsaved = gradients = optimizer = bucketed = unsummed = scattered = update = masters = 0
    scatters = Scatters()
    for name in solved.reads.parameters[number]:
        is_first = solved.reads.first_block[name] == number
        if solved.is_one_stage and not is_first:
            continue
        value = Value(name)
        kept, uses = kept_nbytes(solved.graph.tensor(value), solved.stored(name), solved.mesh), _find_uses(solved, value)
        parameters += kept.stored
        if kept.copy and not uses.is_gathered:
            parameters += kept.copy
            copies += kept.copy
            unsaved += kept.copy if not uses.is_saved and solved.reads.last_block[name] == number else 0
        gradients += kept.gradient
        optimizer += kept.optimizer if is_first else 0
        state, before = _state_nbytes(solved, name), solved.updated_before.get(name)
        update = max(update, MOMENTS * state + (0 if before is None else _state_nbytes(solved, before)))
        masters += state if len(solved.graph.tensor(value).states) > MOMENTS else 0
        if not kept.gradient or not uses.is_bucketed:
            continue
        whole = _given_gradient_nbytes(solved, value)
        if solved.tables.sums_each(solved.stored(name)):
            part = reduced_nbytes(solved.graph.tensor(value), local_nbytes(solved.graph.tensor(value), solved.stored(name), solved.mesh))
            scatters = scatters.add(whole, part)
        elif is_first:
            split = [state for state in solved.stored(name) if state.level]
            # Over micro-batches a whole gradient adds up: it is in `gradients`, and is sent from there if it can be.
            adds_up = bool(split) and solved.tables.has_microbatches
            is_sent_alone = adds_up and split[0].dim == 0 and MESSAGE_NBYTES <= whole == kept.gradient - kept.stored
            bucketed += 0 if is_sent_alone else whole
            if split and not adds_up:
                unsummed += whole
                scattered += kept.stored
    held = find_held(solved, number, ())
    workspace = find_workspace(solved, number, held)
    waiting, added = tied = _tied_nbytes(solved, number)
    memory = BlockMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        outputs=sum(solved.nbytes(value, solved.sharding.outputs[position]) for position, value in solved.reads.outputs[number]),
        saved=held.nbytes,
        waiting=_waiting_nbytes(solved, number),
        workspace=workspace.later + waiting + added,
        first_workspace=workspace.first + added,
        forward_workspace=workspace.forward,
        arriving=_arriving_nbytes(solved, number) if solved.is_one_stage else gradients,
        copies=copies,
        unsaved=unsaved,
        bucketed=bucketed,
        unsummed=unsummed,
        scattered=scattered,
        scatters=scatters,
        unread=workspace.unread,
        largest=_largest_gathered(solved, number),
        update=update,
        masters=masters,
    )
    return PlainMemory(memory, held, tied)


def _largest_gathered(solved: SolvedChain, number: int) -> int:
    """Bytes of the largest parameter that a call of the block gathers, or of its gradient before the sum."""
    largest = 0
    for name in solved.chain.blocks[number].ops:
        for journey in solved.journeys(solved.graph.by_name[name]):
            if solved.graph.by_name[journey.value.op].kind is OpKind.PARAMETER and solved.is_copied(journey):
                nbytes = solved.nbytes(journey.value, journey.need)
                largest = max(largest, nbytes, reduced_nbytes(solved.graph.tensor(journey.value), nbytes))
    return largest


def _tied_nbytes(solved: SolvedChain, number: int) -> tuple[int, int]:
    """Bytes of gradients of parameters that several blocks of a stage read: what waits for the other summands, and their sum.

    Autograd adds the summands before it adds them to what is there; in a step's first backward what waits is counted as arrived.
    """
    if not solved.is_one_stage:
        return 0, 0
    waiting = added = 0
    for name in solved.reads.tied:
        first, last = solved.reads.first_block[name], solved.reads.last_block[name]
        if first <= number <= last and solved.graph.tensor(Value(name)).requires_grad:
            nbytes = _given_gradient_nbytes(solved, Value(name))
            waiting += nbytes
            added += nbytes if number == first else 0
    return waiting, added


def _arriving_nbytes(solved: SolvedChain, number: int) -> int:
    """Bytes of the gradients of which the backward of block `number` makes the first summand: of parameters that no later block reads."""
    total = 0
    for name in solved.reads.parameters[number]:
        if solved.reads.last_block[name] == number:
            kept = kept_nbytes(solved.graph.tensor(Value(name)), solved.stored(name), solved.mesh)
            total += kept.gradient and kept.stored
    return total


def _state_nbytes(solved: SolvedChain, parameter: str) -> int:
    """Bytes of one of the optimizer's states of a parameter."""
    tensor = solved.graph.tensor(Value(parameter))
    return kept_nbytes(tensor, solved.stored(parameter), solved.mesh).optimizer // max(1, len(tensor.states))


class _Uses(NamedTuple):
    """How programs use a parameter.

    Attributes:
        is_gathered: some reader gathers it from its parts, which then are cast as they are gathered.
        is_bucketed: its gradient is left to a sum over ranks once per step.
        is_saved: some reader needs it for the backward.
    """

    is_gathered: bool
    is_bucketed: bool
    is_saved: bool


def _find_uses(solved: SolvedChain, parameter: Value) -> _Uses:
    graph, tensor = solved.graph, solved.graph.tensor(parameter)
    is_gathered = is_bucketed = is_saved = False
    for reader in dict.fromkeys(graph.readers.get(parameter, ())):
        op = graph.by_name[reader]
        is_call = op.kind is OpKind.CALL
        memory = solved.kernel_memory(op) if is_call else None
        saves = op.working.saves if memory is None else memory.saves
        needs = solved.needs(op) if is_call else solved.sharding.outputs
        for position, (operand, need) in enumerate(zip(op.operands, needs, strict=True)):
            if operand == parameter:
                steps = solved.tables.steps(tensor, solved.made(parameter), need)
                is_gathered |= any(step.forward is Collective.ALL_GATHER for step, _ in steps)
                is_bucketed |= is_call and any(
                    step.forward is Collective.NONE and step.backward is not Collective.NONE for step, _ in steps
                )
                # Of what a view is of, and of calls that weren't seen to run, it isn't known.
                is_saved |= position in saves or position in op.working.views or not op.working.views
    return _Uses(is_gathered, is_bucketed, is_saved)


def _given_gradient_nbytes(solved: SolvedChain, parameter: Value) -> int:
    """Bytes of a parameter's local gradient, of all that programs are given of it."""
    return reduced_nbytes(solved.graph.tensor(parameter), solved.nbytes(parameter))


def recompute_memory(solved: SolvedChain, number: int, plain: PlainMemory, regions: Sequence[Sequence[str]]) -> BlockMemory:
    """The memory of block `number` when the backward runs regions of it again.

    Args:
        solved: the chain.
        number: of the block.
        plain: the block without recomputation (`find_memory`).
        regions: sets of its calls, each run again in one go.
    """
    if not regions:
        return plain.memory
    held = find_held(solved, number, regions)
    workspace = find_workspace(solved, number, held, plain.held, regions)
    waiting, added = plain.tied
    return replace(
        plain.memory,
        saved=held.nbytes,
        unsaved=0,  # what is run again reads parameters again
        workspace=workspace.later + waiting + added,
        first_workspace=workspace.first + added,
        forward_workspace=workspace.forward,
        unread=workspace.unread,
    )


def find_held(solved: SolvedChain, number: int, regions: Sequence[Sequence[str]]) -> Held:
    """What a micro-batch saves of a block from its forward to its backward when these regions, sets of its calls, are run again.

    A value counts once per layout in which it is saved.
    """
    reads, readers = solved.reads, solved.graph.readers
    block = solved.chain.blocks[number]
    again = {name for region in regions for name in region}
    inside = set(block.ops)
    held: dict[tuple[Value, Layout], int] = {}
    read_again: list[Value] = []
    beside: dict[str, int] = {}

    def hold(value: Value, layout: Layout) -> None:
        held[value, layout] = solved.nbytes(value, layout)

    for name in block.ops:
        op = solved.graph.by_name[name]
        # Values of other blocks and of cheap calls count with the first block that reads them, if they are saved or needed to run a call
        # again.
        for value in op.operands:
            if reads.first_reader.get(value) == number:
                if name in again or solved.is_saved_as_made(value):
                    hold(value, solved.made(value))
                # Of a view that a cheap call makes, what another cheap call made is saved.
                root = solved.root(value)
                if root != value and root.op in solved.chain.cheap and solved.is_saved_as_made(root):
                    hold(root, solved.made(root))
            elif name in again and value.op in inside and value.op not in again:
                read_again.append(value)
        if name in again:
            # Results that leave the region are inputs of the calls after it, and saved for these if autograd saves them.
            for value in op.values:
                leaves = any(reader in inside and reader not in again for reader in readers.get(value, ()))
                if leaves and solved.is_saved_as_made(value):
                    hold(value, solved.made(value))
            continue
        for value in op.values:
            # Results that no call of this block reads count with the first block that reads them, or with the outputs.
            is_read_here = any(reads.block_of.get(reader) == number for reader in readers.get(value, ()))
            if solved.is_saved_as_made(value) and is_read_here:
                hold(value, solved.made(value))
        beside[name] = solved.extra_saved_nbytes(op)
        for value in _saved_by_kernel(solved, op, number):
            hold(value, solved.made(value))
        for journey in solved.journeys(op):
            if solved.saves_copy(journey) and not solved.is_moved_before(number, journey.value, journey.need):
                hold(journey.value, journey.need)
    # What a region reads of its own block is held, unless it is a view of what is held already.
    for value in read_again:
        source = find_source(solved.graph, solved.model.spaces, value)
        if (source, solved.made(source)) not in held:
            hold(value, solved.made(value))
    return Held(held, beside)


def _saved_by_kernel(solved: SolvedChain, op: Op, number: int) -> Iterator[Value]:
    """What the kernel that replaces a call saves of its operands and nobody has otherwise; views of it share its memory."""
    memory = solved.kernel_memory(op)
    returned = {solved.root(value) for _, value in solved.reads.outputs[number]}
    for position in memory.saves if memory is not None else ():
        source = solved.root(op.operands[position])
        if source not in returned:
            yield source


def _waiting_nbytes(solved: SolvedChain, number: int) -> int:
    """Bytes that a micro-batch's deferrable weight gradients need: activations that their calls read, gradients of their results."""
    total = 0
    for name in solved.chain.blocks[number].ops:
        if name in solved.reads.deferrable:
            op = solved.graph.by_name[name]
            read = {j.value: j.need for j in solved.journeys(op) if solved.graph.by_name[j.value.op].kind is OpKind.CALL}
            total += sum(solved.nbytes(value, need) for value, need in read.items())
            total += sum(solved.nbytes(value) for value in op.values)
    return total
