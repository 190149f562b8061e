"""Bytes that a block needs while it runs, beside what it saves: which tensors are alive at which call, forward and backward.

Comes in: a block of a chain under one solution (`SolvedChain`), and what it saves. Goes out: its `Workspace`. The forward runs the calls in
order; a tensor lives from the call that makes it to the last that reads it, or on if autograd saves it. The backward runs them in reverse;
the gradient of a result lives from the last reader's backward to that of its maker; what a call has saved is free after its backward.
What a call needs beside its tensors is that of the whole call (`Op.working`), divided like its work.

Views share memory with what they are views of, and some gradients are that of the result itself: both as they were seen when the model was
captured, on whole tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.costs.solved import Journey, SolvedChain
from autopar.ir import ITEMSIZE, Collective, Layout, Op, OpKind, Value

Memory = tuple[Value, Layout]
"""What is in memory: a value that is no view, in a layout."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a micro-batch saves of a block from its forward to its backward.

    Attributes:
        values: bytes of each value that is saved, per layout.
        beside: call -> bytes that are saved beside operands and results.
    """

    values: dict[Memory, int]
    beside: dict[str, int]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.values.values()) + sum(self.beside.values())


@dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes at the peak of a block beside what it and the blocks before it save.

    Attributes:
        first: in a step's first backward, with the gradients of parameters that the block has made until then.
        later: while the gradients of all parameters are there, counted elsewhere.
        forward: in the forward alone.
        unread: by how much it is less before the backward reads a gathered parameter, and after the forward has read the last.
    """

    first: int
    later: int
    forward: int
    unread: int = 0


@dataclass(slots=True)
class _Buffer:
    """A gradient, and how many values have it."""

    nbytes: int
    owners: int = 1


def find_workspace(
    solved: SolvedChain, number: int, held: Held, held_inside: Held | None = None, regions: Sequence[Sequence[str]] = ()
) -> Workspace:
    """What block `number` needs while it runs.

    Args:
        solved: the chain.
        number: of the block.
        held: what it saves.
        held_inside: what the block saves where nothing is run again, if `regions` are.
        regions: sets of its calls, each run again in one go by the backward.
    """
    block = _Block(solved, number)
    forward = block.forward_peak(held)
    backward = block.backward_peaks(held if held_inside is None else held_inside, held, regions)
    first, later = (max(0, forward, peak) for peak in backward)
    reading = max(block.reading)
    return Workspace(first, later, max(0, forward), max(0, min(first, later) - reading))


def passing(solved: SolvedChain, number: int) -> tuple[Value, ...]:
    """The values that blocks before number `number` make and blocks after it read."""
    return tuple(value for value in solved.chain.blocks[number].crossing if solved.reads.block_of[value.op] < number)


class _Block:
    """A block while it runs: its calls, the readers of its values."""

    def __init__(self, solved: SolvedChain, number: int) -> None:
        self.solved, self.number = solved, number
        self.ops = [solved.graph.by_name[name] for name in solved.chain.blocks[number].ops]
        self.place = {op.name: index for index, op in enumerate(self.ops)}
        self.root = solved.root
        self.returned = {self.root(value) for _, value in solved.reads.outputs[number]}
        self.reading = [0, 0]  # bytes at the peak of forward and backward while gathered parameters are there
        self.moved = [[journey for journey in solved.journeys(op) if solved.is_copied(journey)] for op in self.ops]

    def is_made_here(self, value: Value) -> bool:
        """Whether a value is a result of one of the block's calls."""
        return value.op in self.place

    def counts(self, value: Value) -> bool:
        """Whether the memory of a value that another block makes counts with this one, while this one runs."""
        op = self.solved.graph.by_name[value.op]
        if op.kind is not OpKind.CALL or value in self.returned:
            return False
        return self.solved.reads.first_reader.get(value) == self.number or not self.solved.is_saved_as_made(value)

    def forward_peak(self, held: Held, *, again: bool = False) -> int:
        """Bytes at the peak of the forward beside what the block saves; `again` says that the backward runs it."""
        solved, end = self.solved, len(self.ops)
        born: dict[Memory, int] = {}
        dies: dict[Memory, int] = {}
        sizes: dict[Memory, int] = {}
        beside = [0] * (end + 1)

        def note(value: Value, layout: Layout, index: int) -> None:
            key = value, layout
            if key not in born:
                born[key], sizes[key] = index, solved.nbytes(value, layout)
            dies[key] = max(dies.get(key, 0), index)

        for index, op in enumerate(self.ops):
            for journey in solved.journeys(op):
                root = self.root(journey.value)
                if root in self.returned:
                    continue
                if self.is_made_here(root):
                    note(root, solved.made(root), index)
                elif self.counts(root):
                    note(root, solved.made(root), 0)
                    note(root, solved.made(root), index)
            for journey in self.moved[index]:
                if solved.graph.by_name[journey.value.op].kind is OpKind.PARAMETER:
                    beside[index] += self.parameter_nbytes(journey)
                else:
                    note(journey.value, journey.need, index)
            for value in op.values:
                if self.root(value) == value and value not in self.returned:
                    note(value, solved.made(value), index)
                    if self.leaves(value):
                        dies[value, solved.made(value)] = end
            beside[index] += solved.working_nbytes(op)[0]
        for value, layout in held.values:
            key = self.root(value), layout
            if key in dies:
                dies[key] = end
        for value in () if again else passing(solved, self.number):
            is_counted = solved.is_saved_as_made(value) and solved.reads.first_reader[value] <= self.number
            if self.root(value) == value and value not in self.returned and not is_counted:
                note(value, solved.made(value), 0)
                dies[value, solved.made(value)] = end
        change = [0] * (end + 2)
        for key, nbytes in sizes.items():
            change[born[key]] += nbytes
            change[dies[key] + 1] -= nbytes
        peak = living = 0
        last_read = max((index for index in range(end) if self.reads_gathered(index)), default=-1)
        for index, op in enumerate(self.ops):
            living += change[index] + held.beside.get(op.name, 0)
            peak = max(peak, living + beside[index])
            if index == last_read:
                self.reading[0] = max(self.reading[0], peak - held.nbytes)
        return peak - held.nbytes

    def reads_gathered(self, index: int) -> bool:
        """Whether a call reads a parameter that is moved for it."""
        return any(self.solved.graph.by_name[journey.value.op].kind is OpKind.PARAMETER for journey in self.moved[index])

    def leaves(self, value: Value) -> bool:
        """Whether a value, or a view of it, is read by another block."""
        graph = self.solved.graph
        readers = list(graph.readers.get(value, ()))
        while readers:
            reader = readers.pop()
            if reader not in self.place:
                return graph.by_name[reader].kind is not OpKind.OUTPUT
            op = graph.by_name[reader]
            for index, view in enumerate(op.working.views):
                if view >= 0 and self.root(op.operands[view]) == value:
                    readers += graph.readers.get(Value(reader, index), ())
        return False

    def backward_peaks(self, held: Held, outside: Held, regions: Sequence[Sequence[str]]) -> tuple[int, int]:
        """Bytes at the peak of the backward beside what the block saves: with the gradients of its parameters, and without them.

        `held` is what is saved while the backward runs, of which `outside` already since the forward.
        """
        backward = _Backward(self, held, outside, regions)
        backward.run()
        self.reading[1] = max(self.reading[1], backward.reading_peak - outside.nbytes)
        return backward.peaks[0] - outside.nbytes, backward.peaks[1] - outside.nbytes

    def is_loss(self, op: Op) -> bool:
        """Whether a call makes an output from which the backward may begin."""
        values = [value for value in op.values if self.root(value) in self.returned]
        return any(self.solved.graph.tensor(value).requires_grad for value in values) and all(x.numel == 1 for x in op.results)

    def find_freed(self, held: Held) -> dict[int, int]:
        """Bytes of what is saved, by the number of the call after whose backward it is free."""
        freed: dict[int, int] = {}
        first_saver: dict[Value, int] = {}
        for index, op in enumerate(self.ops):
            memory = self.solved.kernel_memory(op)
            for position in op.working.saves if memory is None else memory.saves:
                if position < len(op.operands):
                    first_saver.setdefault(self.root(op.operands[position]), index)
        for (value, _), nbytes in held.values.items():
            root = self.root(value)
            maker = self.place.get(root.op, 0)
            saver = first_saver.get(root, maker)
            # A call that saves its result needs it for its own backward; others save only what they read.
            index = maker if root.op in self.place and self.saves_result(root) else saver
            freed[index] = freed.get(index, 0) + nbytes
        for name, nbytes in held.beside.items():
            if name in self.place:
                freed[self.place[name]] = freed.get(self.place[name], 0) + nbytes
        return freed

    def saves_result(self, value: Value) -> bool:
        """Whether the call that makes a value saves it for its own backward."""
        return value.index in self.solved.graph.by_name[value.op].working.keeps

    def rerun_nbytes(self, region: Sequence[str], held: Held) -> int:
        """Bytes that a region needs while it is run again, beside what it saves then."""
        if len(region) == len(self.ops):
            return max(0, self.forward_peak(held, again=True))
        needs = 0
        for name in region:
            op = self.solved.graph.by_name[name]
            unsaved = sum(self.solved.nbytes(value) for value in op.values if self.root(value) == value and not self.solved.is_saved(value))
            needs = max(needs, unsaved + self.solved.working_nbytes(op)[0])
        return needs

    def needs_sum(self, journey: Journey) -> bool:
        """Whether the gradient of an operand takes a journey back, into other memory."""
        steps = self.solved.tables.steps(self.solved.graph.tensor(journey.value), journey.start, journey.need)
        return any(step.backward is not Collective.NONE for step, _ in steps)

    def parameter_nbytes(self, journey: Journey, *, backward: bool = False) -> int:
        """Bytes of a parameter that was moved for a call, unless they count as in flight, and in the backward of its gradient."""
        solved = self.solved
        steps = solved.tables.steps(solved.graph.tensor(journey.value), journey.start, journey.need)
        nbytes = solved.nbytes(journey.value, journey.need)
        if not solved.tables.ahead or not any(step.forward is Collective.ALL_GATHER for step, _ in steps):
            return nbytes * (1 + backward)
        return nbytes if backward and not solved.runs_ahead else 0

    def gradient_nbytes(self, journey: Journey) -> int:
        """Bytes of the gradient of a parameter, of the part that is stored or given whole."""
        tensor, nbytes = self.solved.graph.tensor(journey.value), self.solved.nbytes(journey.value, journey.start)
        return nbytes if self.sums_each(journey) else nbytes * ITEMSIZE[tensor.stored_dtype] // ITEMSIZE[tensor.dtype]

    def sums_each(self, journey: Journey) -> bool:
        """Whether the gradient of a parameter is summed over ranks after every micro-batch."""
        return self.solved.tables.sums_each(self.solved.stored(journey.value.op))


class _Backward:
    """The backward of a block, call by call in reverse.

    Attributes:
        peaks: bytes at the peak, with the gradients of all parameters that were made, and with those of the call that runs alone.
        reading_peak: the first of these while gathered parameters are there.
    """

    def __init__(self, block: _Block, held: Held, outside: Held, regions: Sequence[Sequence[str]]) -> None:
        self.block, self.solved, self.held = block, block.solved, held
        self.peaks, self.reading_peak = [0, 0], 0
        self._saved = held.nbytes + sum(nbytes for key, nbytes in outside.values.items() if key not in held.values)
        self._freed = block.find_freed(held)
        # Number of the last call of a region -> its calls, and the bytes that running it again saves.
        self._regions = {max(block.place[name] for name in region): region for region in regions}
        self._of_region: dict[int, int] = {}
        last_of = {name: last for last, region in self._regions.items() for name in region}
        again = [(value.op, nbytes) for (value, layout), nbytes in held.values.items() if (value, layout) not in outside.values]
        for name, nbytes in [*again, *held.beside.items()]:
            if name in last_of:
                self._of_region[last_of[name]] = self._of_region.get(last_of[name], 0) + nbytes
        self._unsaved_yet = sum(self._of_region.values())
        self._buffers: list[_Buffer] = []
        self._gradients: dict[Value, _Buffer] = {}
        self._own = [0, 0]  # gradients of parameters: of all that were made, and of the call that runs
        self._at_once = 0  # of the call that runs, those that are summed over ranks at once (`BlockMemory.scatters`)
        self._is_reading = bool(regions)

    def run(self) -> None:
        """Find the peaks."""
        block, graph = self.block, self.solved.graph
        for value in (value for op in block.ops for value in op.values):
            is_read_elsewhere = any(
                reader not in block.place and graph.by_name[reader].kind is not OpKind.OUTPUT for reader in graph.readers.get(value, ())
            )
            if graph.tensor(value).requires_grad and is_read_elsewhere:
                self._gradients[value] = self._make(self.solved.nbytes(value))
        # Of values that blocks before this one make and later ones read, gradients are there already.
        for value in passing(self.solved, block.number):
            if graph.tensor(value).requires_grad:
                self._gradients[value] = self._make(self.solved.nbytes(value))
        for index in range(len(block.ops) - 1, -1, -1):
            op = block.ops[index]
            self._own = [self._own[0] - self._at_once, 0]
            self._at_once = 0
            self._is_reading = self._is_reading or block.reads_gathered(index)
            arrived = [self._gradients.pop(value) for value in op.values if value in self._gradients]
            if index in self._regions:
                self._unsaved_yet -= self._of_region.get(index, 0)
                self._note(block.rerun_nbytes(self._regions[index], self.held))
            if arrived or block.is_loss(op):
                self._run_call(op, index, arrived)
            self._buffers = [buffer for buffer in self._buffers if buffer.owners]
            self._saved -= self._freed.get(index, 0)

    def _note(self, beside: int) -> None:
        """What is alive now is a peak, or isn't."""
        alive = self._saved - self._unsaved_yet + beside + sum(buffer.nbytes for buffer in self._buffers if buffer.owners)
        for which in (0, 1):
            self.peaks[which] = max(self.peaks[which], alive + self._own[which])
        if self._is_reading:
            self.reading_peak = max(self.reading_peak, alive + self._own[0])

    def _make(self, nbytes: int) -> _Buffer:
        self._buffers.append(_Buffer(nbytes))
        return self._buffers[-1]

    def _run_call(self, op: Op, index: int, arrived: Sequence[_Buffer]) -> None:
        """The backward of a call, whose results' gradients have `arrived`: makes those of its operands, and frees the former."""
        solved, block = self.solved, self.block
        beside = solved.working_nbytes(op)[1]
        made: list[tuple[Journey, _Buffer]] = []
        for position, journey in enumerate(solved.journeys(op)):
            if not solved.graph.tensor(journey.value).requires_grad:
                continue
            if position in op.working.passes and arrived:
                arrived[0].owners += 1
                made.append((journey, arrived[0]))
            elif solved.graph.by_name[journey.value.op].kind is OpKind.PARAMETER:
                nbytes = block.gradient_nbytes(journey)
                self._own = [own + nbytes for own in self._own]
                self._at_once += nbytes if block.sums_each(journey) else 0
            else:
                made.append((journey, self._make(solved.nbytes(journey.value, journey.need))))
        for journey in block.moved[index]:
            if solved.graph.by_name[journey.value.op].kind is OpKind.PARAMETER:
                beside += block.parameter_nbytes(journey, backward=True)
        self._note(beside)
        for buffer in arrived:
            buffer.owners -= 1
        for journey, buffer in made:
            self._add(journey, buffer)

    def _add(self, journey: Journey, buffer: _Buffer) -> None:
        """Add the gradient of an operand to what is there of its value's: in place, unless others have that too."""
        if self.block.needs_sum(journey):
            moved = self._make(self.solved.nbytes(journey.value))
            self._note(0)
            buffer.owners -= 1
            buffer = moved
        before = self._gradients.get(journey.value)
        if before is None:
            self._gradients[journey.value] = buffer
            return
        if before.owners > 1:
            self._gradients[journey.value] = self._make(before.nbytes)
            self._note(0)
            before.owners -= 1
        buffer.owners -= 1
