"""A graph -> parts of it that repeat, found in the sequence of its calls; names of modules play no role.

A run is a stretch of calls that looks the same one period later: same ops on tensors of the same shapes. Its periods are laid so that few
bytes are alive where one ends and the next begins, which is where a residual stream is all there is, and those that compute the same
function, down to the wiring, are alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from autopar.ir import Graph, Op, OpKind, Value, freeze

Instances = tuple[tuple[str, ...], ...]
"""Per instance of a repeated part the names of its ops: parameters and buffers by first use, then calls in order."""

STORED = (OpKind.PARAMETER, OpKind.BUFFER)

# Of how many later calls like it the distance to a call is taken as a period to try.
NEXT_ALIKE = 3

# How many ways to lay the periods of one run are checked for isomorphism, the best first.
PHASES = 8

# With less than this saved, two parts that are alike by chance (two linear layers) would be bound to one placement for nothing.
MIN_SAVED = 4


def signature(graph: Graph, block: Sequence[Op]) -> tuple[Any, ...]:
    """Equal for blocks that compute the same function of what they read from outside."""
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
                # Numbered by first use: two operands that are one value in this block are one value in the other.
                reads.append(("out", outside.setdefault(value, len(outside)), tensor.shape, tensor.dtype))
        results = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in op.results)
        target = op.target if op.kind is OpKind.CALL else op.kind.value
        lines.append((target, tuple(reads), results, freeze(op.args), freeze(op.kwargs)))
    return tuple(lines)


def find_repeats(graph: Graph, known: Sequence[Instances]) -> list[Instances]:
    """Repeated parts of `graph` that leave fewer distinct ops than those `known`, which they replace where they overlap.

    An instance reads what the one before it makes, so experts or heads that stand beside each other are none, and it reads at least two
    matrices of parameters: single linear layers are taken two at a time, of which one may be split by columns and the other by rows.
    """
    finder = _Finder(graph, known)
    found: list[Instances] = []
    for start, period, length in finder.find_runs():
        # What a better run has taken is gone; the rest may still hold some periods.
        free = [index for index in range(start, start + length) if not finder.taken[index]]
        for first, count in _stretches(free):
            if count >= 2 * period:
                found += finder.lay(first, period, count)
    return found


class _Finder:
    """The sequence of calls, what has been found in it, and what else there is to know of it."""

    def __init__(self, graph: Graph, known: Sequence[Instances]) -> None:
        self.graph = graph
        self.calls = graph.of_kind(OpKind.CALL)
        self.position = {op.name: index for index, op in enumerate(self.calls)}
        self.taken = [False] * len(self.calls)
        self.representative = {op.name: op.name for op in graph.ops}
        self.block: dict[str, tuple[str, ...]] = {}  # op -> the known instance it is in
        for instances in known:
            for instance in instances:
                self.representative.update(zip(instance, instances[0], strict=True))
                self.block.update(dict.fromkeys(instance, instance))
        self.counts = Counter(self.representative.values())

    def find_runs(self) -> list[tuple[int, int, int]]:
        """(first call, period, number of calls) of stretches that look periodic, those that could save most first."""
        numbers: dict[tuple[Any, ...], int] = {}
        looks = {op.name: numbers.setdefault(self._look(op), len(numbers)) for op in self.calls if self.representative[op.name] == op.name}
        sequence = np.array([looks[self.representative[op.name]] for op in self.calls], dtype=np.int64)
        alike: dict[int, list[int]] = defaultdict(list)
        # Only what is in no repeated part yet can become fewer.
        for index, op in enumerate(self.calls):
            if self.counts[self.representative[op.name]] == 1:
                alike[looks[op.name]].append(index)
        periods = {b - a for same in alike.values() for step in range(1, NEXT_ALIKE + 1) for a, b in zip(same, same[step:], strict=False)}
        runs = []
        for period in periods:
            same = np.flatnonzero(sequence[period:] == sequence[:-period])
            runs += [(start, period, length + period) for start, length in _stretches(same.tolist()) if length >= period]
        return sorted(runs, key=lambda run: (run[1] - run[1] * (run[2] // run[1]), run[1], run[0]))

    def _look(self, op: Op) -> tuple[Any, ...]:
        reads = tuple((self.graph.by_name[value.op].kind in STORED, self.graph.tensor(value).shape) for value in op.operands)
        return op.target, reads, tuple((tensor.shape, tensor.dtype) for tensor in op.results)

    def lay(self, start: int, period: int, length: int) -> list[Instances]:
        """The best way to lay periods over the stretch of `length` calls from `start`, if one saves enough; what it covers is taken."""
        if sum(self._reads_matrix(op) for op in self.calls[start : start + period]) < 2:
            return []
        phases = [start + shift for shift in range(period) if (length - shift) // period >= 2]
        fewest = (length - phases[-1] + start) // period if phases else 0
        phases.sort(key=lambda first: self._rate(range(first, start + length - period + 1, period), fewest))
        for first in phases[:PHASES]:
            blocks = [self._block(at, at + period) for at in range(first, start + length - period + 1, period)]
            groups: dict[tuple[Any, ...], list[tuple[str, ...]]] = defaultdict(list)
            for block in blocks:
                groups[signature(self.graph, block)].append(tuple(op.name for op in block))
            found = [tuple(group) for group in groups.values() if len(group) > 1]
            # What stands beside each other looks like a chain only when the periods are laid across it, and that isn't tried first.
            if not self._is_chain(blocks):
                return []
            if self._is_worth(found):
                for name in (name for instances in found for instance in instances for name in instance if name in self.position):
                    self.taken[self.position[name]] = True
                return found
        return []

    def _reads_matrix(self, op: Op) -> bool:
        stored = (value for value in op.operands if self.graph.by_name[value.op].kind is OpKind.PARAMETER)
        return any(len(self.graph.tensor(value).shape) > 1 for value in stored)

    def _rate(self, starts: range, fewest: int) -> tuple[int, int, int, int]:
        """Lower is better: bytes alive between the first `fewest` periods; more periods; not inside of a module; earlier."""
        between = starts[1]
        shared = _shared(self.calls[between - 1].layer, self.calls[between].layer)
        return max(self.alive[index] for index in starts[1:fewest]), -len(starts), shared, starts[0]

    @cached_property
    def alive(self) -> list[int]:
        """Bytes that the calls before each call make and others read."""
        last = {value: index for index, op in enumerate(self.calls) for value in op.operands if value.op in self.position}
        change = [0] * (len(self.calls) + 1)
        for value, index in last.items():
            nbytes = self.graph.tensor(value).nbytes
            change[self.position[value.op] + 1] += nbytes
            change[index + 1] -= nbytes
        return list(accumulate(change))

    @cached_property
    def readers(self) -> Mapping[str, tuple[int, ...]]:
        """Per op the positions of the calls that read it; the output's is behind all."""
        found: dict[str, list[int]] = defaultdict(list)
        for op in self.graph.ops:
            for value in op.operands:
                found[value.op].append(self.position.get(op.name, len(self.calls)))
        return {name: tuple(positions) for name, positions in found.items()}

    def _block(self, start: int, end: int) -> list[Op]:
        """The calls, after the parameters and buffers that nothing else reads, by first use."""
        calls = self.calls[start:end]
        read = dict.fromkeys(value.op for op in calls for value in op.operands)
        stored = [self.graph.by_name[name] for name in read if self.graph.by_name[name].kind in STORED]
        own = [op for op in stored if start <= min(self.readers[op.name]) and max(self.readers[op.name]) < end]
        return [*own, *calls]

    def _is_chain(self, blocks: Sequence[Sequence[Op]]) -> bool:
        made = [{op.name for op in block if op.kind is OpKind.CALL} for block in blocks]
        return all(
            any(value.op in before for op in block for value in op.operands) for before, block in zip(made, blocks[1:], strict=False)
        )

    def _is_worth(self, found: Sequence[Instances]) -> bool:
        """Whether fewer distinct ops are left when `found` replaces the known parts that it overlaps, none of which it may cut in two."""
        covered = [name for instances in found for instance in instances for name in instance]
        inside = set(covered)
        known = {self.block[name] for name in covered if name in self.block}
        if not inside.issuperset(name for block in known for name in block):
            return False
        gone = Counter(self.representative[name] for name in covered)
        saved = sum(count == self.counts[name] for name, count in gone.items()) - sum(len(instances[0]) for instances in found)
        # What is bound to one placement already may as well grow by a single op.
        return saved >= (1 if known else MIN_SAVED)


def _stretches(indices: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of the stretches of consecutive numbers in ascending `indices`."""
    breaks = [0, *(i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices)]
    return [(indices[a], b - a) for a, b in pairwise(breaks) if b > a]


def _shared(path: str, other: str) -> int:
    """How many modules two paths have in common."""
    count = 0
    for a, b in zip(path.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count
