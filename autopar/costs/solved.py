"""A chain of blocks under one solution of the placement problem: in which layout each value is made, read, moved and saved.

Comes in: an `AnalyzedGraph`, its chain of blocks, and a `Sharding`, what one solution of the placement problem decides. Goes out: a
`SolvedChain`, which answers for every op and value of the whole graph what the sharding says of their representatives. ``memory``,
``blocks`` and ``cuts`` price what it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from autopar.costs.tables import CostTables, local_nbytes, operand_layout_of, result_layout_of
from autopar.ir import Collective, Graph, KernelMemory, Layout, Mesh, Op, OpKind, Placement, Split, Value, program_layout
from autopar.structure import AnalyzedGraph, Chain, ChainReads


@dataclass(frozen=True)
class Sharding:
    """What one solution of the placement problem decides; a `Plan` has the same three fields, without the axis of micro-batches.

    Attributes:
        placements: representative of calls -> their placement.
        layouts: representative of parameters, buffers and inputs -> the layout in which they are stored.
        outputs: per output of the graph the layout in which the user gets it.
    """

    placements: Mapping[str, Placement]
    layouts: Mapping[str, Layout]
    outputs: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Journey:
    """An operand of a call on its way from the layout in which it is made to the one in which the call reads it.

    Attributes:
        value: the operand.
        start: the layout in which it is made or stored.
        need: the layout in which the call reads it.
        is_saved: whether the call may save its operand for the backward, and so a copy that the journey makes.
    """

    value: Value
    start: Layout
    need: Layout
    is_saved: bool


class SolvedChain:
    """A chain of blocks under one solution; what was asked for once is remembered.

    Attributes:
        model: the folded model; `graph` is its whole graph, `layer_of` the name of the group of each op's layer.
        chain: the blocks, and `reads` who reads what in them.
        tables: prices of single decisions on `mesh`.
        sharding: what the solution decides.
        is_one_stage: whether all blocks run on the same ranks, so that what several blocks need is moved and stored once.
    """

    def __init__(
        self, model: AnalyzedGraph, chain: Chain, reads: ChainReads, tables: CostTables, sharding: Sharding, *, is_one_stage: bool
    ) -> None:
        self.model = model
        self.graph: Graph = model.folded.graph
        self.chain = chain
        self.reads = reads
        self.tables = tables
        self.mesh: Mesh = tables.mesh
        self.sharding = sharding
        self.is_one_stage = is_one_stage
        self.layer_of = model.folded.layer_of
        self._made: dict[Value, Layout] = {}
        self._needs: dict[str, tuple[Layout, ...]] = {}
        self._journeys: dict[str, tuple[Journey, ...]] = {}
        self._saved_as_made: dict[Value, bool] = {}
        self._copied: dict[tuple[Value, Layout, Layout], bool] = {}

    @property
    def runs_ahead(self) -> bool:
        """Whether sums of gradients run while the backward goes on, and gathers for the whole step behind the forward.

        Schedules of micro-batches wait for both.
        """
        return self.tables.ahead > 0 and self.is_one_stage and (not self.tables.first_axis or self.mesh.sizes[0] == 1)

    def representative(self, op: Op) -> Op:
        """The op that stands for `op`, by whose name the sharding decides about it."""
        return self.graph.by_name[self.model.folded.representative[op.name]]

    def placement(self, op: Op) -> Placement:
        """The placement of a call."""
        return self.sharding.placements[self.model.folded.representative[op.name]]

    def ways(self, op: Op) -> int:
        """Into how many parts a call's work is split, over ranks and micro-batches together."""
        return math.prod(size for part, size in zip(self.placement(op), self.mesh.sizes, strict=True) if isinstance(part, Split))

    def kernel_memory(self, op: Op) -> KernelMemory | None:
        """What the kernel of a call saves and needs, if its placement splits a loop that makes one necessary whose memory is known."""
        space = self.model.spaces.get(op.name)
        memory = None if space is None else space.facts.kernel_memory
        if memory is None or not any(
            isinstance(part, Split) and part.loop in memory.split for part in self.placement(op)[self.tables.first_axis :]
        ):
            return None
        return memory

    def points(self, op: Op, loops: Iterable[str]) -> int:
        """How many points of these loops of a call's space a rank runs over."""
        space, named = self.model.spaces[op.name], set(loops)
        ways = math.prod(
            size for part, size in zip(self.placement(op), self.mesh.sizes, strict=True) if isinstance(part, Split) and part.loop in named
        )
        return math.prod(space.loops[name].size for name in named) // ways

    def extra_saved_nbytes(self, op: Op) -> int:
        """Bytes that a rank's part of a call saves beside operands and results."""
        memory = self.kernel_memory(op)
        if memory is not None:
            return memory.saved * self.points(op, set(memory.loops) - memory.split)
        return -(-op.extra_saved_nbytes // self.ways(op))

    def working_nbytes(self, op: Op) -> tuple[int, int]:
        """Bytes that a rank's part of a call needs while it runs, forward and backward (`Op.working`)."""
        memory = self.kernel_memory(op)
        if memory is not None:
            points = self.points(op, memory.loops)
            return memory.forward * points, memory.backward * points
        ways, beside = self.ways(op), self._chunk_nbytes(op)
        return -(-op.working.forward // ways) + beside, -(-op.working.backward // ways) + beside

    def _chunk_nbytes(self, op: Op) -> int:
        """Bytes of what an op holds of one of its chunks (`Facts.workspace`)."""
        space = self.model.spaces.get(op.name)
        if space is None or space.facts.workspace is None:
            return 0
        workspace = space.facts.workspace
        return workspace.itemsize * -(-self.points(op, workspace.loops) // workspace.chunks)

    def made(self, value: Value) -> Layout:
        """The layout in which a value is made by its call, or in which the program is given it."""
        if value not in self._made:
            op = self.representative(self.graph.by_name[value.op])
            if op.kind is OpKind.CALL:
                self._made[value] = result_layout_of(self.model, op, self.sharding.placements[op.name], value.index)
            else:
                self._made[value] = program_layout(self.sharding.layouts[op.name])
        return self._made[value]

    def stored(self, parameter: str) -> Layout:
        """The layout in which a parameter is stored."""
        return self.sharding.layouts[self.model.folded.representative[parameter]]

    def needs(self, op: Op) -> tuple[Layout, ...]:
        """The layouts in which a call reads its operands; like calls read alike."""
        representative = self.representative(op)
        if representative.name not in self._needs:
            placement = self.sharding.placements[representative.name]
            self._needs[representative.name] = tuple(
                operand_layout_of(self.model, representative, placement, index) for index in range(len(op.operands))
            )
        return self._needs[representative.name]

    def journeys(self, op: Op) -> tuple[Journey, ...]:
        """The journeys of a call's operands, in operand order."""
        if op.name not in self._journeys:
            representative = self.model.folded.representative[op.name]
            self._journeys[op.name] = tuple(
                Journey(value, self.made(value), need, self.model.saves_operand(representative, index))
                for index, (value, need) in enumerate(zip(op.operands, self.needs(op), strict=True))
            )
        return self._journeys[op.name]

    def nbytes(self, value: Value, layout: Layout | None = None) -> int:
        """Bytes of a rank's part of a value, for one micro-batch, in a layout or as it is made."""
        return local_nbytes(self.graph.tensor(value), self.made(value) if layout is None else layout, self.mesh)

    def is_saved(self, value: Value) -> bool:
        """Whether autograd saves the value itself for the backward."""
        return value.index in self.graph.by_name[value.op].saved

    def is_saved_as_made(self, value: Value) -> bool:
        """Whether autograd saves a value in the layout in which it is made: for its maker, or for a reader that doesn't read a copy."""
        if value not in self._saved_as_made:
            self._saved_as_made[value] = self._find_saved_as_made(value)
        return self._saved_as_made[value]

    def _find_saved_as_made(self, value: Value) -> bool:
        op = self.graph.by_name[value.op]
        if not self.is_saved(value):
            return False
        if value.index in op.working.keeps or len(op.working.views) <= value.index:
            return True
        waiting = [value]
        while waiting:
            value = waiting.pop()
            for name in self.graph.readers.get(value, ()):
                reader = self.graph.by_name[name]
                if reader.kind is not OpKind.CALL:
                    continue
                memory = self.kernel_memory(reader)
                saves = reader.working.saves if memory is None else memory.saves
                for position, journey in enumerate(self.journeys(reader)):
                    if journey.value != value or self.is_copied(journey):
                        continue
                    if position in saves or not reader.working.views:
                        return True
                    waiting += [Value(name, index) for index, view in enumerate(reader.working.views) if view == position]
        return False

    def is_copied(self, journey: Journey) -> bool:
        """Whether a journey makes a copy in memory."""
        key = journey.value, journey.start, journey.need
        if key not in self._copied:
            steps = self.tables.steps(self.graph.tensor(journey.value), journey.start, journey.need)
            self._copied[key] = any(step.forward is not Collective.NONE for step, _ in steps)
        return self._copied[key]

    def root(self, value: Value) -> Value:
        """The value whose memory a value shares, as a view or a view of views; itself when it has memory of its own."""
        while True:
            op = self.graph.by_name[value.op]
            if op.kind is not OpKind.CALL or len(op.working.views) <= value.index or op.working.views[value.index] < 0:
                return value
            value = op.operands[op.working.views[value.index]]

    def saves_copy(self, journey: Journey) -> bool:
        """Whether autograd saves the copy that a journey makes."""
        first_axis, kind = self.tables.first_axis, self.graph.by_name[journey.value.op].kind
        representative = self.model.folded.representative_of(journey.value)
        return journey.is_saved and self.model.saved.saves_copy(kind, representative, journey.start[first_axis:], journey.need[first_axis:])

    @cached_property
    def updated_before(self) -> Mapping[str, str]:
        """Parameter that is trained -> the one that an optimizer updates before it, in the order of the model."""
        trained = [op.name for op in self.graph.of_kind(OpKind.PARAMETER) if op.results[0].requires_grad]
        return dict(zip(trained[1:], trained, strict=False))

    @cached_property
    def first_movers(self) -> Mapping[tuple[Value, Layout], int]:
        """(value that several blocks read, layout in which it is read) -> the first block that reads it in this layout.

        That block brings the value into the layout, for the others too. Empty unless all blocks run on the same ranks: under a pipeline
        every stage moves for itself what it needs.
        """
        movers: dict[tuple[Value, Layout], int] = {}
        for number, operands in enumerate(self.reads.shared if self.is_one_stage else ()):
            for name, index in operands:
                op = self.graph.by_name[name]
                movers.setdefault((op.operands[index], self.needs(op)[index]), number)
        return movers

    def is_moved_before(self, number: int, value: Value, need: Layout) -> bool:
        """Whether a block before number `number` has brought a value into the layout `need`."""
        return self.first_movers.get((value, need), number) < number
