"""Solutions that the blocks of a chain may mix: which ones these are, the block options of all of them, and the sharding that comes of it.

Where memory is short, some blocks may be split one way and others another. The costs of such a mixture are sums over its blocks only if no
block's costs depend on what other blocks chose. They don't for solutions of one placement problem that agree on what blocks share:

- the layouts of values that cross from one block to another,
- the placements of calls in no block, which every stage runs for itself,
- the layouts of parameters that several blocks read,
- the layouts of outputs.

So one solution, the *base*, decides these; the problem is restricted to options that agree with it (`find_compatible_options`, then
`placement.restrict`), and solved again at several prices of memory::

    base = PlacementSolver(problem).solution_at(0.0)
    inner = restrict(problem, find_compatible_options(model, reads, problem, base.choice))
    shardings = [sharding_of(inner, solution.choice) for solution in PlacementSolver(inner).frontier(price, most)]

Comes in: a placement problem and its base; the solutions, by their shardings, and their block options; which solution each block chose.
Goes out: the options that agree with the base; the options of every block under any of the solutions; the model and the sharding of a
mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autopar.costs import Sharding, result_layout_of
from autopar.ir import Layout, OpKind, Placement, Value
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.placement import Decision, DecisionKind, Problem
from autopar.structure import AnalyzedGraph, ChainReads, regroup


def find_compatible_options(
    model: AnalyzedGraph, reads: ChainReads, problem: Problem, base: Mapping[Decision, int]
) -> dict[Decision, list[int]]:
    """The options of a problem that agree with a base solution on what blocks share: arguments for `placement.restrict`.

    Args:
        model: the model that the problem places.
        reads: which block each call is in, and which values cross between blocks.
        problem: the placement problem.
        base: the base solution's `Solution.choice`: per decision the number of its option.

    Returns: per decision about something shared, the numbers of the options that agree. A decision of which all options do is left out, and
    so are fan-outs, whose options follow from those of a value's producer and readers.
    """
    graph, representative = model.folded.graph, model.folded.representative
    fixed: set[str] = set()  # representatives of calls in no block, and of parameters of several blocks or none
    for op in graph.ops:
        if op.kind is OpKind.CALL and op.name not in reads.block_of:
            fixed.add(representative[op.name])
        if op.kind is OpKind.PARAMETER and len({reads.block_of.get(name) for name in graph.readers.get(Value(op.name), ())}) != 1:
            fixed.add(representative[op.name])
    crossing: dict[str, set[int]] = {}  # per representative, the numbers of its results that cross to another block
    for value in reads.first_reader:
        crossing.setdefault(representative[value.op], set()).add(value.index)
    compatible: dict[Decision, list[int]] = {}
    for node in problem.nodes:
        decision, base_option = node.decision, base[node.decision]
        if decision.kind is DecisionKind.FAN_OUT:
            continue
        if decision.kind is DecisionKind.OUTPUT or decision.op in fixed:
            compatible[decision] = [base_option]
        elif decision.op in crossing:
            op = graph.by_name[decision.op]
            crossing_layouts = [
                [result_layout_of(model, op, option, index) for index in sorted(crossing[decision.op])]  # type: ignore[arg-type]
                for option in node.options
            ]
            compatible[decision] = [number for number, layouts in enumerate(crossing_layouts) if layouts == crossing_layouts[base_option]]
    return compatible


def join_block_options(by_solution: Sequence[Sequence[BlockOptions]]) -> tuple[BlockOptions, ...]:
    """Give every block the options that it has under any of the solutions.

    Args:
        by_solution: per solution, every block's options in chain order. The solutions agree on what blocks share, so that all of them have
            the same cut after a block: that of the first is taken.
    """
    return tuple(
        replace(same_block[0], options=tuple(option for block in same_block for option in block.options))
        for same_block in zip(*by_solution, strict=True)
    )


def mix_solutions(
    model: AnalyzedGraph, reads: ChainReads, shardings: Sequence[Sharding], solution_of_block: Sequence[int]
) -> tuple[AnalyzedGraph, Sharding]:
    """The mixture in which each block has the placements of a solution of its own.

    Args:
        model: the model that all of the solutions place.
        reads: which block each call is in.
        shardings: what each solution decides.
        solution_of_block: per block of the chain, which of them it has.

    Returns: the model, folded anew so that like blocks of different solutions have different representatives; and the sharding of these.
    """
    graph, representative = model.folded.graph, model.folded.representative
    solution_of = {name: solution_of_block[block] for name, block in reads.block_of.items()}
    for op in graph.of_kind(OpKind.PARAMETER):
        blocks = {reads.block_of.get(name) for name in graph.readers.get(Value(op.name), ())}
        if len(blocks) == 1 and (block := blocks.pop()) is not None:
            solution_of[op.name] = solution_of_block[block]
    folded = regroup(model.folded, solution_of)
    placements: dict[str, Placement] = {}
    layouts: dict[str, Layout] = {}
    for op in folded.ops:
        # What is in no block is the same in all solutions.
        sharding = shardings[solution_of.get(op.name, 0)]
        if op.kind is OpKind.CALL:
            placements[op.name] = sharding.placements[representative[op.name]]
        elif op.kind is not OpKind.OUTPUT:
            layouts[op.name] = sharding.layouts[representative[op.name]]
    return replace(model, folded=folded), Sharding(placements, layouts, shardings[0].outputs)
