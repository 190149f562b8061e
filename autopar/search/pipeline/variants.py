"""Solutions of the placement problem -> options of every block of the chain, without and with recomputation, and mixtures of solutions.

Comes in: solutions for one mesh at several prices of memory, the chain of blocks. Goes out: what ``assignment`` chooses from. Costs are the
tables of `autopar.costs.blocks`.

Every block may take another solution than its neighbours where all solutions agree on what blocks share: values that cross from one to
another, calls in no block, parameters of several blocks. `find_shared` says what that is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autopar.cost_models import Link
from autopar.costs import (
    BlockCost,
    CostTables,
    Sharding,
    SolvedChain,
    block_kind,
    cost_block,
    cost_cut,
    count_uses,
    cut_kind,
    operand_layout_of,
    result_layout_of,
    travel_layout,
)
from autopar.ir import Layout, OpKind, Placement, Value
from autopar.plans import RECOMPUTE, Phase
from autopar.search.pipeline.block_options import BlockOption, BlockOptions, Cut
from autopar.search.placement import Decision, DecisionKind, Problem, output_decision
from autopar.structure import ChainReads, Model, regroup


def sharding_of(problem: Problem, chosen_options: Mapping[Decision, int]) -> Sharding:
    """The placements and layouts that a solution of the problem chose, by decision the number of the option."""
    chosen: dict[DecisionKind, dict[Decision, Any]] = {kind: {} for kind in DecisionKind}
    for node in problem.nodes:
        chosen[node.decision.kind][node.decision] = node.options[chosen_options[node.decision]]
    placements = {decision.op: option for decision, option in chosen[DecisionKind.CALL].items()}
    layouts = {decision.op: option for decision, option in chosen[DecisionKind.STORED].items()}
    outputs = chosen[DecisionKind.OUTPUT]
    return Sharding(placements, layouts, tuple(outputs[output_decision(position)] for position in range(len(outputs))))


def once_seconds(model: Model, tables: CostTables, sharding: Sharding) -> float:
    """Seconds of a step that don't grow with its micro-batches: updates of parameters, and sums of their gradients that nothing hides."""
    folded, uses, total = model.folded, count_uses(model), 0.0
    for op in folded.ops:
        if op.kind is OpKind.PARAMETER:
            total += folded.count[op.name] * tables.optimizer_seconds(op.results[0], sharding.layouts[op.name])
    for edge in folded.edges:
        producer, reader = folded.graph.by_name[edge.value.op], folded.graph.by_name[edge.consumer]
        if producer.kind is OpKind.PARAMETER and reader.kind is OpKind.CALL:
            need = operand_layout_of(model, reader, sharding.placements[reader.name], edge.operand)
            start = sharding.layouts[producer.name]
            total += edge.count * tables.parameter_seconds(producer.results[0], start, need, uses[producer.name])[1]
    return total


def output_seconds(model: Model, tables: CostTables, sharding: Sharding) -> float:
    """Seconds that a micro-batch takes to hand the user's outputs over."""
    (output,) = model.folded.graph.of_kind(OpKind.OUTPUT)
    total = 0.0
    for position, value in enumerate(output.operands):
        producer = model.folded.graph.by_name[model.folded.representative[value.op]]
        if producer.kind is OpKind.CALL:
            start = result_layout_of(model, producer, sharding.placements[producer.name], value.index)
            need = sharding.outputs[position]
            total += tables.journey_seconds(model.folded.graph.tensor(value), start, need, backward=False)[0]
    return total


def find_shared(model: Model, reads: ChainReads, problem: Problem, base: Mapping[Decision, int]) -> dict[Decision, list[int]]:
    """Which options of a problem agree with the choice `base` on what blocks share, for the nodes of which not all do.

    Blocks may mix answers that choose among these: each block's costs then depend on its own answer alone.
    """
    graph, representative = model.folded.graph, model.folded.representative
    fixed: set[str] = set()
    sent: dict[str, set[int]] = {}
    for op in graph.ops:
        if op.kind is OpKind.CALL and op.name not in reads.block_of:
            fixed.add(representative[op.name])
        if op.kind is OpKind.PARAMETER and len({reads.block_of.get(name) for name in graph.readers.get(Value(op.name), ())}) != 1:
            fixed.add(representative[op.name])
    for value in reads.first_reader:
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


class BlockOptionMaker:
    """Makes the options of every block of a chain under one solution; like blocks are costed once, and each kind of recomputation once."""

    def __init__(self, solved: SolvedChain, link: Link | None, solution: int = 0) -> None:
        """`link` is what stages talk over, None without a pipeline; `solution` numbers this one among those that blocks may mix."""
        self.solved = solved
        self.link = link
        self.solution = solution
        self._kinds: list[tuple[object, Cut]] = []  # kind and cut of each block, from when they are first asked for
        self._known: dict[tuple[object, str], BlockOption] = {}

    def make(self, recompute: Collection[str], splits_backward: bool, pins: Mapping[str, int]) -> tuple[BlockOptions, ...]:
        """Every block's options, with the kinds of recomputation asked for; `pins` are stages by block name."""
        blocks = self.solved.chain.blocks
        if not self._kinds:
            self._kinds = self._find_kinds()
        options: dict[object, tuple[BlockOption, ...]] = {}
        for number, (kind, _) in enumerate(self._kinds):
            if kind in options:
                continue
            if missing := [name for name in recompute if (kind, name) not in self._known]:
                costs = cost_block(self.solved, number, missing)
                self._known |= {(kind, name): self._make_option(*cost) for name, cost in zip(missing, costs, strict=True)}
            # Selective recomputation of a block without an attention core is none.
            distinct = dict.fromkeys(self._known[kind, name] for name in RECOMPUTE if name in recompute)
            options[kind] = tuple(distinct if splits_backward else map(_join_backward, distinct))
        return tuple(
            BlockOptions(block.name, options[kind], cut, pins.get(block.name))
            for block, (kind, cut) in zip(blocks, self._kinds, strict=True)
        )

    def _find_kinds(self) -> list[tuple[object, Cut]]:
        cuts: dict[object, Cut] = {}
        kinds: list[tuple[object, Cut]] = []
        for number in range(len(self.solved.chain.blocks)):
            key = cut_kind(self.solved, number)
            if key not in cuts:
                cost = cost_cut(self.solved, number, self.link)
                cuts[key] = Cut(cost.forward, cost.backward, cost.nbytes, cost.saved, cost.backward_nbytes)
            kinds.append((block_kind(self.solved, number), cuts[key]))
        return kinds

    def _make_option(self, name: str, cost: BlockCost) -> BlockOption:
        seconds, memory = cost.seconds, cost.memory
        return BlockOption(
            name=name,
            forward=seconds[Phase.FORWARD],
            input=seconds[Phase.INPUT],
            weight=seconds[Phase.WEIGHT],
            once=seconds[Phase.STEP],
            kept=memory.saved,
            waiting=memory.waiting,
            static=memory.static,
            workspace=memory.workspace,
            solution=self.solution,
            cost=cost,
        )

    def travel(self) -> dict[str, Layout]:
        """The layout in which each value that may cross a cut would travel, by value."""
        values = dict.fromkeys(value for block in self.solved.chain.blocks for value in block.crossing)
        return {str(value): travel_layout(self.solved, value, self.link) for value in values}


def _join_backward(variant: BlockOption) -> BlockOption:
    """The variant with its backward in one pass."""
    return replace(variant, input=variant.input + variant.weight, weight=0.0, waiting=0)


def join_menus(answers: Sequence[Sequence[BlockOptions]]) -> tuple[BlockOptions, ...]:
    """The menus of several answers that agree on what blocks share, as one: every block has the variants of all."""
    return tuple(replace(menus[0], options=tuple(one for menu in menus for one in menu.options)) for menus in zip(*answers, strict=True))


def mix(model: Model, reads: ChainReads, answers: Sequence[Sharding], numbers: Sequence[int]) -> tuple[Model, Sharding]:
    """What blocks come to that each take the answer of its number: the model folded so, and the sharding of its representatives."""
    graph, before = model.folded.graph, model.folded.representative
    group_of = {name: numbers[block] for name, block in reads.block_of.items()}
    for op in graph.of_kind(OpKind.PARAMETER):
        blocks = {reads.block_of.get(name) for name in graph.readers.get(Value(op.name), ())}
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
    return replace(model, folded=folded), Sharding(placements, layouts, answers[0].outputs)
