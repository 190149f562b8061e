"""A graph -> parts of it that repeat, found in the sequence of its calls. Names of modules play no role.

Comes in: a `Graph`, and the repeated layers that module paths gave already. Goes out: more repeated parts, where they leave fewer distinct
ops to decide about.

How: write the calls ``c[0], c[1], ...`` as letters, where equal letters mean the same operator on tensors of the same shapes. A *run* with
period p is a longest stretch of calls in which ``c[i] == c[i + p]``; six layers of p calls each make a run of 6 p calls. A run says how
long a layer is, not where it begins: any of p offsets cuts it into instances of p calls. The offset is taken that has the fewest bytes
alive between instances, which in a transformer is where only the residual stream is alive. Instances are alike when their `signature`s are
equal: when they compute the same function, down to the wiring.

    calls       up relu down add  up relu down add  up relu down add
    period 4    [-- instance --]  [-- instance --]  [-- instance --]
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from autopar.ir import Graph, Op, OpKind, Value, freeze
from autopar.structure.measures import find_alive

Instances = tuple[tuple[str, ...], ...]
"""Per instance of a repeated part the names of its ops: parameters and buffers by first use, then calls in order. Ops at the same place of
two instances are alike."""

STORED = (OpKind.PARAMETER, OpKind.BUFFER)

# Periods to try are the distances from a call to this many of the next calls with its letter.
NEXT_ALIKE = 3

# How many offsets of one run are checked for isomorphism, the best first.
OFFSETS = 8

# Two parts that are alike by chance (two linear layers) would be bound to one placement for nothing: a repeat must save so many ops.
MIN_SAVED = 4


def signature(graph: Graph, block: Sequence[Op]) -> tuple[Any, ...]:
    """A key that is equal for blocks of ops that compute the same function of what they read from outside of themselves.

    It has per op the operator with its arguments, which ops of the block it reads, the shapes and dtypes of what it reads from outside, and
    the types of its results. Values from outside are numbered by first use: where two operands are one value in this block, they must be
    one value in the other block too.
    """
    position = {op.name: index for index, op in enumerate(block)}
    outside: dict[Value, int] = {}
    lines = []
    for op in block:
        reads: list[tuple[Any, ...]] = []
        for value in op.operands:
            if value.op in position:
                reads.append(("in", position[value.op], value.index))
            else:
                tensor = graph.tensor(value)
                reads.append(("out", outside.setdefault(value, len(outside)), tensor.shape, tensor.dtype))
        results = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in op.results)
        target = op.target if op.kind is OpKind.CALL else op.kind.value
        lines.append((target, tuple(reads), results, freeze(op.args), freeze(op.kwargs)))
    return tuple(lines)


def find_repeats(graph: Graph, known: Sequence[Instances]) -> list[Instances]:
    """Repeated parts of `graph` that leave fewer distinct ops than those `known`, which they replace where they overlap.

    Every instance reads what the one before it makes, so that experts or heads, which run side by side, are no instances. And it reads at
    least two matrices of parameters: single linear layers are paired, as one of a pair may be split by columns and the other by rows.
    """
    finder = _RepeatFinder(graph, known)
    repeats: list[Instances] = []
    for run in finder.find_runs():
        # An earlier, better run may have covered some of these calls; what is left of the run may still hold some periods.
        free = [index for index in range(run.start, run.start + run.length) if not finder.is_covered[index]]
        for start, length in _stretches(free):
            if length >= 2 * run.period:
                repeats += finder.cut_run(_Run(start, run.period, length))
    return repeats


@dataclass(frozen=True, slots=True)
class _Run:
    """The `length` calls from call number `start`, each of which has the letter of the call `period` further, if that is in the run too."""

    start: int
    period: int
    length: int


class _RepeatFinder:
    """The search for repeats in one graph.

    Attributes:
        calls: the calls of the graph, in order; `position` has the number of each.
        is_covered: per call whether a repeat that was found covers it.
        representative: op -> the op at its place in the first of the known instances; itself outside of these.
        counts: representative -> number of ops that it stands for.
        known_instance: op -> all ops of the known instance that it is in.
    """

    def __init__(self, graph: Graph, known: Sequence[Instances]) -> None:
        self.graph = graph
        self.calls = graph.of_kind(OpKind.CALL)
        self.position = {op.name: index for index, op in enumerate(self.calls)}
        self.is_covered = [False] * len(self.calls)
        self.representative = {op.name: op.name for op in graph.ops}
        self.known_instance: dict[str, tuple[str, ...]] = {}
        for instances in known:
            for instance in instances:
                self.representative.update(zip(instance, instances[0], strict=True))
                self.known_instance.update(dict.fromkeys(instance, instance))
        self.counts = Counter(self.representative.values())

    def find_runs(self) -> list[_Run]:
        """All runs of at least two periods, those first that could save most ops.

        A run with n whole periods of p calls has n p ops, of which folding leaves p to decide about.
        """
        numbers: dict[tuple[Any, ...], int] = {}
        letters = {
            op.name: numbers.setdefault(self._letter(op), len(numbers)) for op in self.calls if self.representative[op.name] == op.name
        }
        sequence = np.array([letters[self.representative[op.name]] for op in self.calls], dtype=np.int64)
        # Only what is in no known repeat can become fewer, so only such calls suggest periods.
        alike: dict[int, list[int]] = defaultdict(list)
        for index, op in enumerate(self.calls):
            if self.counts[self.representative[op.name]] == 1:
                alike[letters[op.name]].append(index)
        periods = {
            later - earlier
            for places in alike.values()
            for step in range(1, NEXT_ALIKE + 1)
            for earlier, later in zip(places, places[step:], strict=False)
        }
        runs = []
        for period in periods:
            equal = np.flatnonzero(sequence[period:] == sequence[:-period])
            runs += [_Run(start, period, length + period) for start, length in _stretches(equal.tolist()) if length >= period]
        return sorted(runs, key=lambda run: (run.period - run.period * (run.length // run.period), run.period, run.start))

    def _letter(self, op: Op) -> tuple[Any, ...]:
        """Operator, shapes of operands and whether each is a parameter or buffer, and types of results."""
        reads = tuple((self.graph.by_name[value.op].kind in STORED, self.graph.tensor(value).shape) for value in op.operands)
        return op.target, reads, tuple((tensor.shape, tensor.dtype) for tensor in op.results)

    def cut_run(self, run: _Run) -> list[Instances]:
        """Cut a run into instances at its best offset and mark their calls as covered; empty when no offset saves enough."""
        if sum(self._reads_matrix(op) for op in self.calls[run.start : run.start + run.period]) < 2:
            return []
        last_start = run.start + run.length - run.period
        offsets = [run.start + shift for shift in range(run.period) if (run.length - shift) // run.period >= 2]
        fewest = (run.length - offsets[-1] + run.start) // run.period if offsets else 0
        offsets.sort(key=lambda offset: self._rank_offset(range(offset, last_start + 1, run.period), fewest))
        for offset in offsets[:OFFSETS]:
            blocks = [self._block(start, start + run.period) for start in range(offset, last_start + 1, run.period)]
            alike: dict[tuple[Any, ...], list[tuple[str, ...]]] = defaultdict(list)
            for block in blocks:
                alike[signature(self.graph, block)].append(tuple(op.name for op in block))
            repeats = [tuple(instances) for instances in alike.values() if len(instances) > 1]
            # Experts that run side by side look like a chain only at offsets in the middle of one, which aren't the first to be tried.
            if not self._is_chain(blocks):
                return []
            if self._saves_enough(repeats):
                covered = (name for instances in repeats for instance in instances for name in instance)
                for name in covered:
                    if name in self.position:
                        self.is_covered[self.position[name]] = True
                return repeats
        return []

    def _reads_matrix(self, op: Op) -> bool:
        parameters = (value for value in op.operands if self.graph.by_name[value.op].kind is OpKind.PARAMETER)
        return any(len(self.graph.tensor(value).shape) > 1 for value in parameters)

    def _rank_offset(self, starts: range, fewest: int) -> tuple[int, int, int, int]:
        """A key that is less for better places to begin instances at.

        In this order: the most bytes alive between two of the first `fewest` instances; more instances; instances that begin outside of a
        module rather than inside; the first.
        """
        second = starts[1]
        shared = _count_shared_modules(self.calls[second - 1].layer, self.calls[second].layer)
        return max(self.alive[index] for index in starts[1:fewest]), -len(starts), shared, starts[0]

    @cached_property
    def alive(self) -> list[int]:
        """Per call the bytes that calls before it make and it or later ones read."""
        return [nbytes for nbytes, _ in find_alive(self.graph, self.calls)]

    def _block(self, start: int, end: int) -> list[Op]:
        """The calls from number `start` to before `end`, after the parameters and buffers that only these calls read, by first use."""
        calls = self.calls[start:end]
        names = {op.name for op in calls}
        read = dict.fromkeys(value for op in calls for value in op.operands if self.graph.by_name[value.op].kind in STORED)
        return [*(self.graph.by_name[value.op] for value in read if names.issuperset(self.graph.readers[value])), *calls]

    def _is_chain(self, blocks: Sequence[Sequence[Op]]) -> bool:
        """Whether every block but the first reads what a call of the one before it makes."""
        made = [{op.name for op in block if op.kind is OpKind.CALL} for block in blocks]
        return all(
            any(value.op in before for op in block for value in op.operands) for before, block in zip(made, blocks[1:], strict=False)
        )

    def _saves_enough(self, repeats: Sequence[Instances]) -> bool:
        """Whether `repeats` leave fewer distinct ops than the known instances that they overlap, and cut none of these in two."""
        covered = [name for instances in repeats for instance in instances for name in instance]
        inside = set(covered)
        known = {self.known_instance[name] for name in covered if name in self.known_instance}
        if not inside.issuperset(name for instance in known for name in instance):
            return False
        replaced = Counter(self.representative[name] for name in covered)
        before = sum(count == self.counts[name] for name, count in replaced.items())
        after = sum(len(instances[0]) for instances in repeats)
        # Where instances are known, these ops are bound to one placement already: then a single op less is worth it.
        return before - after >= (1 if known else MIN_SAVED)


def _stretches(indices: Sequence[int]) -> list[tuple[int, int]]:
    """(start, length) of the stretches of consecutive numbers in ascending `indices`."""
    breaks = [0, *(i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices)]
    return [(indices[begin], end - begin) for begin, end in pairwise(breaks) if end > begin]


def _count_shared_modules(path: str, other_path: str) -> int:
    """How many modules around the two paths are the same, from the root."""
    count = 0
    for module, other_module in zip(path.split("."), other_path.split("."), strict=False):
        if module != other_module:
            break
        count += 1
    return count
