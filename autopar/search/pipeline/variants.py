"""Chosen placements -> per block of the chain its menu: seconds and bytes of one micro-batch, without and with recomputation.

Comes in: placements and layouts (answers of ``search`` for one mesh, at several prices of memory), the chain of blocks. Goes out: what
``assignment`` chooses from. Costs are those of `CostTables`, which the search used. Like blocks are costed once.

Every block may take another answer than its neighbours where all answers agree on what blocks share: values that cross from one to
another, calls in no block, parameters of several blocks. `find_shared` says what that is.

Memory follows what autograd keeps. A result that a later block reads is counted by the first block that reads it, which holds it
whatever else is recomputed; results of a recomputed region that leave it for the same block count where autograd keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.cost_models import Link, collective_seconds
from autopar.costs import (
    OPTIMIZER_COPIES,
    CostTables,
    Kept,
    count_kept,
    count_uses,
    keeps_operand,
    local_nbytes,
    operand_layout_of,
    result_layout_of,
)
from autopar.ir import REPLICATE, Collective, Layout, Mesh, Op, OpKind, Placement, Split, StateKind, Tensor, Value, fits, shard
from autopar.plans import RECOMPUTE
from autopar.search.pipeline.block_options import BlockOption, BlockOptions, Cut
from autopar.search.placement import Decision, DecisionKind, Problem, output_decision
from autopar.structure import Block, Chain, Model, find_cores, find_source, is_deferrable, regroup


@dataclass(frozen=True)
class Choices:
    """What one solution of the placement problem decides.

    Attributes:
        placements: placement of each call, by representative.
        layouts: layout of each parameter, buffer and input, by representative.
        outputs: layout of each output, by position.
    """

    placements: Mapping[str, Placement]
    layouts: Mapping[str, Layout]
    outputs: tuple[Layout, ...]


def choices_of(problem: Problem, chosen_options: Mapping[Decision, int]) -> Choices:
    """The placements and layouts that a solution of the problem chose, by decision the number of the option."""
    chosen: dict[DecisionKind, dict[Decision, Any]] = {kind: {} for kind in DecisionKind}
    for node in problem.nodes:
        chosen[node.decision.kind][node.decision] = node.options[chosen_options[node.decision]]
    placements = {decision.op: option for decision, option in chosen[DecisionKind.CALL].items()}
    layouts = {decision.op: option for decision, option in chosen[DecisionKind.STORED].items()}
    outputs = chosen[DecisionKind.OUTPUT]
    return Choices(placements, layouts, tuple(outputs[output_decision(position)] for position in range(len(outputs))))


def once_seconds(model: Model, tables: CostTables, choices: Choices) -> float:
    """Seconds of a step that don't grow with its micro-batches: updates of parameters, and sums of their gradients that nothing hides."""
    folded, uses, total = model.folded, count_uses(model), 0.0
    for op in folded.ops:
        if op.kind is OpKind.PARAMETER:
            total += folded.count[op.name] * tables.optimizer_seconds(op.results[0], choices.layouts[op.name])
    for edge in folded.edges:
        producer, reader = folded.graph.by_name[edge.value.op], folded.graph.by_name[edge.consumer]
        if producer.kind is OpKind.PARAMETER and reader.kind is OpKind.CALL:
            need = operand_layout_of(model, reader, choices.placements[reader.name], edge.operand)
            start = choices.layouts[producer.name]
            total += edge.count * tables.parameter_seconds(producer.results[0], start, need, uses[producer.name])[1]
    return total


def output_seconds(model: Model, tables: CostTables, choices: Choices) -> float:
    """Seconds that a micro-batch takes to hand the user's outputs over."""
    (output,) = model.folded.graph.of_kind(OpKind.OUTPUT)
    total = 0.0
    for position, value in enumerate(output.operands):
        producer = model.folded.graph.by_name[model.folded.representative[value.op]]
        if producer.kind is OpKind.CALL:
            start = result_layout_of(model, producer, choices.placements[producer.name], value.index)
            need = choices.outputs[position]
            total += tables.journey_seconds(model.folded.graph.tensor(value), start, need, backward=False)[0]
    return total


@dataclass(frozen=True)
class Reading:
    """Who reads what in a chain of blocks, whatever is decided.

    Attributes:
        kept: what autograd keeps.
        home: call -> its block, for those that are in one.
        readers: value -> the ops that read it.
        first: values that cross from one block to another, or that stages make again -> the first block that reads them, after their own.
        firsts: per block the values of which it is that.
        again: per block the values that a stage makes for the blocks behind it though this one or one before has read them.
        outputs: per block the user's outputs that it makes, and their positions.
        cheap: per block the calls in no block of which it is the first to need the results.
        deferrable: calls whose weight gradients can wait.
        owns: per block of each parameter that other blocks read too, whether this one is the first.
    """

    kept: Kept
    home: Mapping[str, int]
    readers: Mapping[Value, Sequence[str]]
    first: Mapping[Value, int]
    firsts: tuple[tuple[Value, ...], ...]
    again: tuple[tuple[Value, ...], ...]
    outputs: tuple[tuple[tuple[int, Value], ...], ...]
    cheap: tuple[tuple[str, ...], ...]
    deferrable: frozenset[str]
    owns: tuple[tuple[bool, ...], ...]


def read_chain(model: Model, chain: Chain) -> Reading:
    """Read a chain of blocks of the model's graph."""
    readers: dict[Value, list[str]] = {}
    for op in model.folded.graph.ops:
        for value in op.operands:
            readers.setdefault(value, []).append(op.name)
    home = {name: number for number, block in enumerate(chain.blocks) for name in block.ops}
    first: dict[Value, int] = {}
    for value in dict.fromkeys(value for block in chain.blocks for value in block.crossing):
        own = home[value.op]
        first[value] = min(block for reader in readers[value] if (block := home.get(reader, own)) != own)
    again: list[list[Value]] = [[] for _ in chain.blocks]
    for value, names in readers.items():
        blocks = [home[name] for name in names if name in home]
        if value.op in chain.cheap and blocks:
            first[value] = min(blocks)
            for number in range(min(blocks), max(blocks)):
                again[number].append(value)
    firsts: list[list[Value]] = [[] for _ in chain.blocks]
    for value, number in first.items():
        firsts[number].append(value)
    (output,) = model.folded.graph.of_kind(OpKind.OUTPUT)
    outputs: list[list[tuple[int, Value]]] = [[] for _ in chain.blocks]
    for position, value in enumerate(output.operands):
        if value.op in home:
            outputs[home[value.op]].append((position, value))
    owns: list[list[bool]] = [[] for _ in chain.blocks]
    for op in model.folded.graph.of_kind(OpKind.PARAMETER):
        blocks = sorted({home[name] for name in readers.get(Value(op.name), ()) if name in home})
        for number in blocks if len(blocks) > 1 else ():
            owns[number].append(number == blocks[0])
    needed: dict[str, int] = dict(home)
    cheap: list[list[str]] = [[] for _ in chain.blocks]
    for op in reversed(model.folded.graph.ops):
        if op.name in chain.cheap:
            read = [name for index in range(len(op.results)) for name in readers.get(Value(op.name, index), ())]
            if blocks := [needed[name] for name in read if name in needed]:
                needed[op.name] = min(blocks)
                cheap[min(blocks)].append(op.name)
    return Reading(
        kept=count_kept(model),
        home=home,
        readers=readers,
        first=first,
        firsts=tuple(map(tuple, firsts)),
        again=tuple(map(tuple, again)),
        outputs=tuple(map(tuple, outputs)),
        cheap=tuple(map(tuple, cheap)),
        owns=tuple(map(tuple, owns)),
        deferrable=frozenset(name for name in home if is_deferrable(model.folded.graph, model.spaces, model.folded.graph.by_name[name])),
    )


def find_shared(model: Model, reading: Reading, problem: Problem, base: Mapping[Decision, int]) -> dict[Decision, list[int]]:
    """Which options of a problem agree with the choice `base` on what blocks share, for the nodes of which not all do.

    Blocks may mix answers that choose among these: each block's costs then depend on its own answer alone.
    """
    graph, representative = model.folded.graph, model.folded.representative
    fixed: set[str] = set()
    sent: dict[str, set[int]] = {}
    for op in graph.ops:
        if op.kind is OpKind.CALL and op.name not in reading.home:
            fixed.add(representative[op.name])
        if op.kind is OpKind.PARAMETER and len({reading.home.get(name) for name in reading.readers.get(Value(op.name), ())}) != 1:
            fixed.add(representative[op.name])
    for value in reading.first:
        sent.setdefault(representative[value.op], set()).add(value.index)
    allowed: dict[Decision, list[int]] = {}
    for node in problem.nodes:
        decision, chosen = node.decision, base[node.decision]
        if decision.kind is DecisionKind.FAN_OUT:
            continue  # follows from what its value's maker and readers take
        if decision.kind is DecisionKind.OUTPUT or decision.op in fixed:
            allowed[decision] = [chosen]
        elif decision.op in sent:
            op = graph.by_name[decision.op]
            made = [
                [result_layout_of(model, op, option, index) for index in sorted(sent[decision.op])]  # type: ignore[arg-type]
                for option in node.options
            ]
            allowed[decision] = [number for number, layouts in enumerate(made) if layouts == made[chosen]]
    return allowed


@dataclass(frozen=True, slots=True)
class _Costs:
    """Seconds of one call for one micro-batch: forward, input gradients, weight gradients."""

    forward: float
    input: float
    weight: float


class Menus:
    """Costs of the blocks of one model under one answer; lives while the menus are made."""

    def __init__(
        self, model: Model, chain: Chain, reading: Reading, tables: CostTables, choices: Choices, link: Link | None, answer: int = 0
    ) -> None:
        """`link` is what stages talk over, None without a pipeline; `answer` numbers the choices among those that blocks may mix."""
        self.model = model
        self.graph = model.folded.graph
        self.chain = chain
        self.tables = tables
        self.mesh: Mesh = tables.mesh
        self.choices = choices
        self.link = link
        self.answer = answer
        self.kept, self.home, self.readers = reading.kept, reading.home, reading.readers
        self.first, self.firsts, self.again = reading.first, reading.firsts, reading.again
        self.outputs, self.cheap, self.deferrable, self.owns = reading.outputs, reading.cheap, reading.deferrable, reading.owns
        self._made: dict[Value, Layout] = {}
        self._read: dict[str, tuple[Layout, ...]] = {}
        self._ways: dict[str, tuple[tuple[Value, Layout, Layout, bool], ...]] = {}
        self._cuts: dict[tuple[object, ...], Cut] = {}
        self._blocks: list[tuple[object, Cut]] = []  # kind and cut of each, from when they are first asked for
        self._known: dict[tuple[object, str], BlockOption] = {}

    def make(self, recompute: Collection[str], splits_backward: bool, pins: Mapping[str, int]) -> tuple[BlockOptions, ...]:
        """The menu of every block, with the kinds of recomputation asked for; `pins` are stages by block name."""
        if not self._blocks:
            self._blocks = [(self._kind(number, block), self._cut(number, block)) for number, block in enumerate(self.chain.blocks)]
        variants: dict[object, tuple[BlockOption, ...]] = {}
        for number, (block, (kind, _)) in enumerate(zip(self.chain.blocks, self._blocks, strict=True)):
            if kind in variants:
                continue
            if missing := [name for name in recompute if (kind, name) not in self._known]:
                self._known |= {(kind, name): one for name, one in self._variants(number, block, missing)}
            # Selective recomputation of a block without an attention core is none.
            found = dict.fromkeys(self._known[kind, name] for name in RECOMPUTE if name in recompute)
            variants[kind] = tuple(found if splits_backward else map(_join_backward, found))
        return tuple(
            BlockOptions(block.name, variants[kind], cut, pins.get(block.name))
            for block, (kind, cut) in zip(self.chain.blocks, self._blocks, strict=True)
        )

    def _kind(self, number: int, block: Block) -> tuple[object, ...]:
        """Equal for blocks of equal costs: of like ones the first may be the first to read what all read, and the last make an output."""
        read = tuple((self.graph.tensor(value), self.made(value), self._is_saved(value)) for value in self.firsts[number])
        cheap = tuple(self._call_costs(self.graph.by_name[name]) for name in self.cheap[number])
        return block.like, read, cheap, self.owns[number], self._output_costs(number)

    def travel(self) -> dict[str, Layout]:
        """The layout in which each value that may cross a cut would travel, by value."""
        found: dict[str, Layout] = {}
        for block in self.chain.blocks:
            for value in block.crossing:
                found[str(value)] = self._travels(value)
        return found

    # --- layouts ---

    def made(self, value: Value) -> Layout:
        """The layout in which a value is made."""
        if value not in self._made:
            self._made[value] = self._find_made(value)
        return self._made[value]

    def _find_made(self, value: Value) -> Layout:
        op = self.graph.by_name[value.op]
        name = self.model.folded.representative[op.name]
        if op.kind is not OpKind.CALL:
            return self.choices.layouts[name]
        return result_layout_of(self.model, self.graph.by_name[name], self.choices.placements[name], value.index)

    def _travels(self, value: Value) -> Layout:
        """Sums are added up before they travel; what all ranks of an axis have is sent in parts and gathered, where that is faster.

        The scatter and gather of Narayanan et al. 2021, section 4.1.
        """
        tensor = self.graph.tensor(value)
        layout = list(self.made(value))
        for axis in range(self.tables.first, len(layout)):
            if layout[axis].kind is StateKind.SHARD:
                continue
            is_sum = layout[axis].kind is StateKind.PARTIAL
            layout[axis] = REPLICATE
            nbytes = local_nbytes(tensor, tuple(layout), self.mesh)
            size = self.mesh.sizes[axis]
            gather = self.tables.collective_seconds(Collective.ALL_GATHER, axis, nbytes)
            saved = (1 - 1 / size) * nbytes / self.link.rank_bytes_per_s if self.link is not None else 0.0
            if size > 1 and (is_sum or saved > gather):
                split = next((d for d in range(len(tensor.shape)) if fits(tensor.shape, _with(layout, axis, d), self.mesh)), None)
                if split is not None:
                    layout[axis] = shard(split)
        return tuple(layout)

    # --- one block ---

    def _variants(self, number: int, block: Block, recompute: Iterable[str]) -> Iterator[tuple[str, BlockOption]]:
        """The variants of a block that is run with these kinds of recomputation, with a backward in two passes."""
        cores = find_cores(self.graph, self.model.spaces, block.ops)
        regions: dict[str, Sequence[Sequence[str]]] = {"none": (), "selective": cores, "full": (block.ops,)}
        costs = {name: self._call_costs(self.graph.by_name[name]) for name in block.ops}
        moves = self._move_costs((*self.cheap[number], *block.ops))
        beside = self._output_costs(number)[1]
        beside += sum(self._call_costs(self.graph.by_name[name]).forward + moves[name].forward for name in self.cheap[number])
        forward = beside + sum(costs[one].forward + moves[one].forward for one in block.ops)
        inputs = sum(costs[one].input + moves[one].input for one in block.ops)
        weight = sum(costs[one].weight for one in block.ops)
        static, once = self._stored_costs(number, block)
        waiting, workspace = self._waiting_bytes(block), self._workspace(block)
        for name in recompute:
            groups = regions[name]
            repeated = sum(costs[one].forward + moves[one].forward for group in groups for one in group)
            yield (
                name,
                BlockOption(
                    name=name if groups else "none",
                    solution=self.answer,
                    forward=forward,
                    input=inputs + repeated,
                    weight=weight,
                    once=once,
                    kept=self._kept_bytes(number, block, groups),
                    waiting=waiting,
                    static=static,
                    # A region that is being run again is there as a whole.
                    workspace=workspace + max((self._saved_inside(group) for group in groups), default=0),
                ),
            )

    def _call_costs(self, op: Op) -> _Costs:
        stand_in = self.graph.by_name[self.model.folded.representative[op.name]]
        forward, backward = self.tables.op_seconds(stand_in, self.choices.placements[stand_in.name])
        # Of a product with a weight, one of two products is the weight's gradient.
        deferred = backward / 2 if op.name in self.deferrable and any(t.requires_grad for t in self._activations(op)) else 0.0
        return _Costs(forward, backward - deferred, deferred)

    def _activations(self, op: Op) -> list[Tensor]:
        return [self.graph.tensor(value) for value in op.operands if self.graph.by_name[value.op].kind is OpKind.CALL]

    def _journeys(self, op: Op) -> Sequence[tuple[Value, Layout, Layout, bool]]:
        """What an op's operands must go through: value, start, need, and whether the op keeps a copy that was made."""
        if op.name not in self._ways:
            self._ways[op.name] = tuple(self._find_journeys(op))
        return self._ways[op.name]

    def _find_journeys(self, op: Op) -> Iterator[tuple[Value, Layout, Layout, bool]]:
        representative = self.model.folded.representative
        for index, (value, need) in enumerate(zip(op.operands, self._needs(op), strict=True)):
            yield value, self.made(value), need, keeps_operand(self.model, representative[op.name], index)

    def _needs(self, op: Op) -> tuple[Layout, ...]:
        """The layouts in which an op reads its operands; like ops read alike."""
        name = self.model.folded.representative[op.name]
        if name not in self._read:
            stand_in, placement = self.graph.by_name[name], self.choices.placements[name]
            self._read[name] = tuple(operand_layout_of(self.model, stand_in, placement, index) for index in range(len(op.operands)))
        return self._read[name]

    def _move_costs(self, calls: Iterable[str]) -> dict[str, _Costs]:
        """Communication of the calls of a block; what several need alike is moved once."""
        moved: set[tuple[Value, Layout]] = set()
        found: dict[str, _Costs] = {}
        for name in calls:
            forward = backward = 0.0
            for value, start, need, _ in self._journeys(self.graph.by_name[name]):
                producer = self.graph.by_name[value.op]
                tensor = producer.results[value.index]
                if producer.kind is OpKind.PARAMETER:
                    ahead, back = self._gather_seconds(tensor, start, need)
                elif (value, need) in moved:
                    continue
                else:
                    moved.add((value, need))
                    ahead, back = self.tables.journey_seconds(tensor, start, need, backward=tensor.requires_grad)
                forward, backward = forward + ahead, backward + back
            found[name] = _Costs(forward, backward, 0.0)
        return found

    def _gather_seconds(self, tensor: Tensor, start: Layout, need: Layout) -> tuple[float, float]:
        """(forward, backward) seconds of bringing a parameter to an op, without the reduction that waits for the end of the step."""
        ahead = back = 0.0
        for move, nbytes in self.tables.legs(tensor, start, need):
            if move.forward is Collective.NONE:
                continue
            seconds = self.tables.collective_seconds(move.forward, move.axis, nbytes)
            ahead += seconds
            if tensor.requires_grad:
                back += self.tables.collective_seconds(move.backward, move.axis, nbytes)
                back += seconds if move.forward is Collective.ALL_GATHER else 0.0
        return ahead, back

    def _stored_costs(self, number: int, block: Block) -> tuple[int, float]:
        """(bytes, seconds once per step) of the parameters that a block reads; a shared one counts in full where it is read first."""
        static, once = 0, 0.0
        names: dict[str, None] = {}
        for name in block.ops:
            for value in self.graph.by_name[name].operands:
                if self.graph.by_name[value.op].kind is OpKind.PARAMETER:
                    names[value.op] = None
        for name in names:
            tensor = self.graph.by_name[name].results[0]
            layout = self.made(Value(name))
            nbytes = local_nbytes(tensor, layout, self.mesh)
            readers = [self.home[reader] for reader in self.readers[Value(name)] if reader in self.home]
            is_first = not readers or min(readers) == number
            if not tensor.requires_grad:
                static += nbytes
                continue
            static += nbytes * (2 + (OPTIMIZER_COPIES if is_first else 0))
            if is_first:
                once += self.tables.optimizer_seconds(tensor, layout)
                once += max(self._deferred_seconds(name, reader) for reader in self.readers[Value(name)])
        return static + self._output_costs(number)[0], once

    def _deferred_seconds(self, name: str, reader: str) -> float:
        """Seconds of the sum of a parameter's gradient over the ranks, as far as nothing hides it."""
        op = self.graph.by_name[reader]
        if op.kind is OpKind.OUTPUT:
            return 0.0
        tensor = self.graph.by_name[name].results[0]
        stand_in = self.graph.by_name[self.model.folded.representative[reader]]
        need = operand_layout_of(self.model, stand_in, self.choices.placements[stand_in.name], op.operands.index(Value(name)))
        return self.tables.parameter_seconds(tensor, self.made(Value(name)), need, 1)[1]

    def _output_costs(self, number: int) -> tuple[int, float]:
        """(bytes, seconds per micro-batch) of the user's outputs that a block makes: they are there, of the whole batch, at the end."""
        nbytes, seconds = 0, 0.0
        for position, value in self.outputs[number]:
            tensor, layout = self.graph.tensor(value), self.choices.outputs[position]
            nbytes += local_nbytes(tensor, layout, self.mesh)
            # Whether a gradient comes back depends on the user's loop; what is returned beside a loss gets none.
            seconds += self.tables.journey_seconds(tensor, self.made(value), layout, backward=False)[0]
        return nbytes, seconds

    # --- memory ---

    def _kept_bytes(self, number: int, block: Block, groups: Sequence[Sequence[str]]) -> int:
        """Bytes that a micro-batch keeps between its forward and its backward when these groups of calls are run again."""
        again = {name for group in groups for name in group}
        inside = set(block.ops)
        held: dict[tuple[Value, Layout], int] = {}
        read_again: list[Value] = []
        beside = 0

        def hold(value: Value, layout: Layout) -> None:
            held[value, layout] = local_nbytes(self.graph.tensor(value), layout, self.mesh)

        for name in block.ops:
            op = self.graph.by_name[name]
            # What other blocks or no block made is held here, by the first that reads it, if anyone needs it again.
            for value in op.operands:
                if self.first.get(value) == number:
                    if name in again or self._is_saved(value):
                        hold(value, self.made(value))
                elif name in again and value.op in inside and value.op not in again:
                    read_again.append(value)
            if name in again:
                # Results that leave the region are inputs of what comes after, which keeps them if autograd does.
                for value in self._results(op):
                    leaves = any(reader in inside and reader not in again for reader in self.readers.get(value, ()))
                    if leaves and self._is_saved(value):
                        hold(value, self.made(value))
                continue
            for value in self._results(op):
                # What the user gets of it is counted with the outputs.
                stays = any(self.home.get(reader) == number for reader in self.readers.get(value, ()))
                if self._is_saved(value) and stays:
                    hold(value, self.made(value))
            placement = self.choices.placements[self.model.folded.representative[name]]
            ways = math.prod(size for part, size in zip(placement, self.mesh.sizes, strict=True) if isinstance(part, Split))
            beside += -(-op.saved_nbytes // ways)
            for value, start, need, keeps in self._journeys(op):
                if keeps and self._is_copied(value, start, need):
                    hold(value, need)
        for value in read_again:
            source = find_source(self.graph, self.model.spaces, value)
            if (source, self.made(source)) not in held:
                hold(value, self.made(value))
        return beside + sum(held.values())

    def _is_copied(self, value: Value, start: Layout, need: Layout) -> bool:
        first = self.tables.first
        kind = self.graph.by_name[value.op].kind
        return self.kept.is_copied(kind, self.model.folded.representative_of(value), start[first:], need[first:])

    def _results(self, op: Op) -> list[Value]:
        return [Value(op.name, index) for index in range(len(op.results))]

    def _is_saved(self, value: Value) -> bool:
        return value.index in self.graph.by_name[value.op].saved

    def _waiting_bytes(self, block: Block) -> int:
        """Bytes that wait for the weight gradients: inputs and output gradients of the calls that read weights."""
        total = 0
        for name in block.ops:
            op = self.graph.by_name[name]
            if op.name in self.deferrable:
                read = {value: need for value, _, need, _ in self._journeys(op) if self.graph.by_name[value.op].kind is OpKind.CALL}
                total += sum(local_nbytes(self.graph.tensor(value), need, self.mesh) for value, need in read.items())
                total += sum(local_nbytes(self.graph.tensor(value), self.made(value), self.mesh) for value in self._results(op))
        return total

    def _workspace(self, block: Block) -> int:
        """Bytes that a block needs while it runs: the hungriest op's tensors and their gradients."""
        largest = 0
        for name in block.ops:
            op = self.graph.by_name[name]
            total = sum(local_nbytes(self.graph.tensor(value), self.made(value), self.mesh) for value in self._results(op))
            for value, need in dict.fromkeys(zip(op.operands, self._needs(op), strict=True)):
                is_stored = self.graph.by_name[value.op].kind is OpKind.PARAMETER
                if not is_stored or need[self.tables.first :] != self.made(value)[self.tables.first :]:
                    total += local_nbytes(self.graph.tensor(value), need, self.mesh)
            largest = max(largest, total)
        return 2 * largest

    def _saved_inside(self, group: Sequence[str]) -> int:
        total = 0
        for name in group:
            op = self.graph.by_name[name]
            placement = self.choices.placements[self.model.folded.representative[name]]
            ways = math.prod(size for part, size in zip(placement, self.mesh.sizes, strict=True) if isinstance(part, Split))
            total += -(-op.saved_nbytes // ways)
            total += sum(local_nbytes(self.graph.tensor(v), self.made(v), self.mesh) for v in self._results(op) if self._is_saved(v))
            for value, start, need, keeps in self._journeys(op):
                if keeps and self._is_copied(value, start, need):
                    total += local_nbytes(self.graph.tensor(value), need, self.mesh)
        return total

    # --- what crosses ---

    def _cut(self, number: int, block: Block) -> Cut:
        """What it takes to end a stage after a block."""
        # Behind like layers the same kinds of values cross.
        crossing = tuple((self.graph.tensor(value), self.made(value), self.first[value] <= number) for value in block.crossing)
        key = crossing, tuple((self.graph.tensor(value), self.made(value), self._is_saved(value)) for value in self.again[number])
        if key not in self._cuts:
            self._cuts[key] = self._cut_costs(number, block)
        return self._cuts[key]

    def _cut_costs(self, number: int, block: Block) -> Cut:
        ahead = back = 0
        gathers = 0.0
        for value in block.crossing:
            tensor = self.graph.tensor(value)
            layout = self._travels(value)
            nbytes = local_nbytes(tensor, layout, self.mesh)
            ahead += nbytes
            back += nbytes if tensor.requires_grad else 0
            # Both ends pay for the way to the layout that travels and back, in both directions.
            gathers += sum(self.tables.journey_seconds(tensor, self.made(value), layout, backward=tensor.requires_grad))
            if self.made(value) != layout and all(state.kind is not StateKind.PARTIAL for state in self.made(value)):
                gathers += sum(self.tables.journey_seconds(tensor, layout, self.made(value), backward=tensor.requires_grad))
        held = [value for value in block.crossing if self.first[value] <= number]
        held += [value for value in self.again[number] if self._is_saved(value)]
        kept = sum(local_nbytes(self.graph.tensor(value), self.made(value), self.mesh) for value in held)
        if self.link is None:
            return Cut(0.0, 0.0, ahead, kept)
        seconds = [collective_seconds("p2p", nbytes, 2, self.link) if nbytes else 0.0 for nbytes in (ahead, back)]
        return Cut(seconds[0] + gathers / 2, seconds[1] + gathers / 2, ahead, kept)


def _join_backward(variant: BlockOption) -> BlockOption:
    """The variant with its backward in one pass."""
    return replace(variant, input=variant.input + variant.weight, weight=0.0, waiting=0)


def join_menus(answers: Sequence[Sequence[BlockOptions]]) -> tuple[BlockOptions, ...]:
    """The menus of several answers that agree on what blocks share, as one: every block has the variants of all."""
    return tuple(replace(menus[0], options=tuple(one for menu in menus for one in menu.options)) for menus in zip(*answers, strict=True))


def mix(model: Model, reading: Reading, answers: Sequence[Choices], numbers: Sequence[int]) -> tuple[Model, Choices]:
    """What blocks come to that each take the answer of its number: the model folded so, and the choices of its representatives."""
    graph, before = model.folded.graph, model.folded.representative
    group_of = {name: numbers[block] for name, block in reading.home.items()}
    for op in graph.of_kind(OpKind.PARAMETER):
        blocks = {reading.home.get(name) for name in reading.readers.get(Value(op.name), ())}
        if len(blocks) == 1 and (block := blocks.pop()) is not None:
            group_of[op.name] = numbers[block]
    folded = regroup(model.folded, group_of)
    placements: dict[str, Placement] = {}
    layouts: dict[str, Layout] = {}
    for op in folded.ops:
        answer = answers[group_of.get(op.name, 0)]
        if op.kind is OpKind.CALL:
            placements[op.name] = answer.placements[before[op.name]]
        elif op.kind is not OpKind.OUTPUT:
            layouts[op.name] = answer.layouts[before[op.name]]
    return replace(model, folded=folded), Choices(placements, layouts, answers[0].outputs)


def _with(layout: Sequence[object], axis: int, dim: int) -> Layout:
    return (*layout[:axis], shard(dim), *layout[axis + 1 :])  # type: ignore[arg-type]
