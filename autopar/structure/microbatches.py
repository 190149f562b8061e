"""What splitting a step into micro-batches does to every op and value of a graph.

Comes in: a graph, the spaces of its calls, the number of micro-batches. Goes out: a `MicroSplit`, which every rewrite into stages
follows. Micro-batches are one more mesh axis that is walked in time, so nothing can be exchanged along it: each op must find its
operands as the ops before left them, up to moves that need no other micro-batch (`reads_locally`). Then every value is a part, a
summand or the same in each micro-batch, and gradients add up by linearity. What needs no parameter can also be had whole: it is
computed once per step from the whole batch.

Random numbers: every micro-batch must begin with the same state of the generator that seeds streams (`autopar.ops.rng`), as ranks do.
A split op then draws anew in each, because its stream counts the part, and one that isn't split draws the same in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.ir import (
    BROADCAST,
    MICROBATCH,
    PASS_PARTIAL,
    REPLICATE,
    Dims,
    Graph,
    LoopKind,
    Mesh,
    Op,
    OpKind,
    PassPartial,
    Space,
    Split,
    State,
    StateKind,
    TargetMean,
    Value,
    is_legal,
    operand_layout,
    result_layout,
    shard,
)
from autopar.rules import facts_of, is_random
from autopar.structure.roles import Factors, Role

WHOLE_NBYTES = 1 << 28
"""The largest tensor that is made of the whole batch at once; a step is cut into micro-batches to have no large ones."""

Part = Split | PassPartial | None
"""What the time axis does to an op: one entry of a `Placement`."""


@dataclass(frozen=True)
class MicroSplit:
    """How a graph splits into micro-batches.

    Attributes:
        parts: per call what the axis does to it.
        states: per value what a micro-batch has of it: a part, the same as all others, or a summand. Parameters and buffers are
            the same for all.
        whole: values without parameters that some op needs whole although a micro-batch has a part or a summand: they are computed
            once per step from the whole batch.
        counted: op name of a mean loss over classes -> its target, whole (it is in `whole` too): the loss divides by what
            `losses.count_targets` says of all micro-batches.
        reasons: why the graph can't be split so; empty when it can. Each names op and line, what was needed and what to do.
    """

    parts: Mapping[str, Part]
    states: Mapping[Value, State]
    whole: frozenset[Value]
    counted: Mapping[str, Value]
    reasons: tuple[str, ...]


def reads_locally(state: State, need: State) -> bool:
    """Whether a micro-batch that has `state` of a value can be read as `need` without any other: it is that, or all of it.

    What all have is made a sum by the first keeping it and the others having zeros.
    """
    return state in (need, REPLICATE)


def split_microbatches(graph: Graph, spaces: Mapping[str, Space], factors: Factors, count: int) -> MicroSplit:
    """Split the batch of `graph` into `count` micro-batches of equal size.

    The batch is the first dim of the inputs. Where inputs differ in it, its size is that of most of them; when this gives a
    reason against it, the other sizes are tried.

    Args:
        graph: as captured for the whole batch.
        spaces: of every call that has a rule.
        factors: the roles of the inputs' dims.
        count: at least 1; InputError otherwise. With 1 every value is the same "in all".
    """
    return MicroSplitter(graph, spaces, factors).split(count)


class MicroSplitter:
    """Splits one graph into any number of micro-batches, as `split_microbatches` does; numbers that divide the same loops share a split."""

    def __init__(self, graph: Graph, spaces: Mapping[str, Space], factors: Factors) -> None:
        self.graph = graph
        self.spaces = spaces
        self.batches = _find_batches(graph, factors)
        self._done: list[tuple[_Pass, MicroSplit]] = []

    def split(self, count: int) -> MicroSplit:
        """The split into `count` micro-batches."""
        if count < 1:
            raise InputError(f"a step can't be split into {count} micro-batches; give 1 or more")
        if count == 1:
            return self._run(frozenset(), count)
        if not self.batches:
            named = ", ".join(f"{op.target} {op.results[0]}" for op in self.graph.of_kind(OpKind.INPUT)) or "none"
            return _refused(
                f"no input has a batch to split into {count} micro-batches (inputs: {named}); give inputs whose first dim is the batch"
            )
        first: MicroSplit | None = None
        for size, inputs in self.batches.items():
            if size % count:
                names = ", ".join(self.graph.by_name[name].target for name in inputs)
                found = _refused(
                    f"the batch of {size} (dim 0 of {names}) can't be split into {count} micro-batches; take a divisor of {size}"
                )
            else:
                found = self._run(frozenset(inputs), count)
            if not found.reasons:
                return found
            first = first or found
        assert first is not None
        return first

    def _run(self, cut: frozenset[str], count: int) -> MicroSplit:
        """The split of these inputs: one that was made for another count, where all that it asked has the same answer for this one."""
        for made, found in self._done:
            if made.cut == cut and made.holds_for(count):
                return found
        made = _Pass(self.graph, self.spaces, cut, count)
        found = made.run()
        if not found.reasons:  # which name the count
            self._done.append((made, found))
        return found


def _refused(reason: str) -> MicroSplit:
    return MicroSplit({}, {}, frozenset(), {}, (reason,))


def batch_size(graph: Graph, factors: Factors) -> int:
    """Rows of the batch: the first dim of most inputs that have one; 1 without any."""
    return next(iter(_find_batches(graph, factors)), 1)


def _find_batches(graph: Graph, factors: Factors) -> dict[int, list[str]]:
    """The sizes that the batch may have, most likely first, and the inputs that have it in their first dim."""
    inputs: dict[int, list[str]] = {}
    for op in graph.of_kind(OpKind.INPUT):
        shape, dims = op.results[0].shape, factors.of_dims[Value(op.name)]
        if shape and shape[0] > 1 and dims[0].get(1) is Role.BATCH:
            inputs.setdefault(shape[0], []).append(op.name)
    order = Counter({size: len(names) for size, names in inputs.items()}).most_common()
    return {size: inputs[size] for size, _ in order}


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a call's results are made of.

    Attributes:
        free: neither a parameter nor an input that has a gradient.
        random: some random numbers.
        nbytes: the largest tensor on the way.
    """

    free: bool = True
    random: bool = False
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class _Choice:
    """A part of an op, and the positions of the operands that it needs whole."""

    part: Part
    whole: frozenset[int]
    nbytes: int


class _Pass:
    """One walk over the ops; lives for one split."""

    def __init__(self, graph: Graph, spaces: Mapping[str, Space], cut: frozenset[str], count: int) -> None:
        self.graph = graph
        self.spaces = spaces
        self.cut = cut
        self.mesh = Mesh((MICROBATCH,), (count,))
        self.parts: dict[str, Part] = {}
        self.states: dict[Value, State] = {}
        self.whole: set[Value] = set()
        self.counted: dict[str, Value] = {}
        self.reasons: list[str] = []
        self.origins: dict[str, _Origin] = {}
        self.splits_work = False
        self.known: dict[tuple[object, ...], _Choice | None] = {}
        self.legal: dict[tuple[int, Split], tuple[Space, bool]] = {}  # what was asked of the number of micro-batches, by space and split

    def holds_for(self, count: int) -> bool:
        """Whether as many micro-batches are split in the same way."""
        mesh = Mesh((MICROBATCH,), (count,))
        return all(is_legal(space, (split,), mesh) == legal for (_, split), (space, legal) in self.legal.items())

    def _is_legal(self, space: Space, split: Split) -> bool:
        key = id(space), split
        if key not in self.legal:
            self.legal[key] = space, is_legal(space, (split,), self.mesh)
        return self.legal[key][1]

    def run(self) -> MicroSplit:
        for op in self.graph.ops:
            if op.kind is OpKind.CALL:
                self._call(op)
            elif op.kind is OpKind.OUTPUT:
                self._check_updates(op)
            else:
                tensor = op.results[0]
                self.states[Value(op.name)] = shard(0) if op.name in self.cut else REPLICATE
                self.origins[op.name] = _Origin(op.kind is not OpKind.PARAMETER and not tensor.requires_grad)
        if self.cut and not self.splits_work and not self.reasons:
            names = ", ".join(self.graph.by_name[name].target for name in sorted(self.cut))
            self.reasons.append(f"splitting {names} into {self.mesh.sizes[0]} micro-batches splits no op that reads a parameter")
        self._narrow()
        return MicroSplit(self.parts, self.states, frozenset(self.whole), self.counted, tuple(self.reasons))

    def _call(self, op: Op) -> None:
        space = self.spaces.get(op.name)
        self.origins[op.name] = self._origin(op, space)
        choice = self._choose_once(op, space)
        if choice is None:
            self.reasons.append(self._explain(op, space))
            # Going on as if the op could have been run whole finds the other reasons too.
            choice = _Choice(None, frozenset(), 0)
        self.parts[op.name] = choice.part
        self.whole |= {op.operands[index] for index in choice.whole}
        if (mean := _find_counted(space, choice.part)) is not None:
            self.counted[op.name] = op.operands[mean.target]
        self.splits_work |= choice.part is not None and not self.origins[op.name].free
        for index in range(len(op.results)):
            made = REPLICATE if space is None else result_layout(space, (choice.part,), index)[0]
            self.states[Value(op.name, index)] = made

    def _narrow(self) -> None:
        """Split too what reads nothing split and of which every reader takes a part: a mask that is made for the whole batch."""
        wanted: dict[Value, set[State]] = {}
        for op in reversed(self.graph.ops):
            space = self.spaces.get(op.name)
            if op.kind is OpKind.CALL and space is not None and self.parts[op.name] is None and not space.random:
                split = self._split_as_read(op, space, wanted)
                if split is not None:
                    self.parts[op.name] = split
                    self.states |= {Value(op.name, index): result_layout(space, (split,), index)[0] for index in range(len(op.results))}
            for index, value in enumerate(op.operands):
                wanted.setdefault(value, set()).add(self._needed(op, space, index))

    def _needed(self, op: Op, space: Space | None, index: int) -> State:
        return REPLICATE if op.kind is not OpKind.CALL or space is None else operand_layout(space, (self.parts[op.name],), index)[0]

    def _split_as_read(self, op: Op, space: Space, wanted: Mapping[Value, set[State]]) -> Split | None:
        """The split that makes of every result the part that all its readers want; None when they don't agree."""
        read = {index: wanted[value] for index in range(len(op.results)) if (value := Value(op.name, index)) in wanted}
        if any(len(states) > 1 for states in read.values()):
            return None
        for index, (state,) in read.items():
            split = _split_at(space, space.results[index], state) if state.kind is StateKind.SHARD else None
            if split is None or _exchanges(space, split.loop) or not self._is_legal(space, split):
                return None
            made = {other: {result_layout(space, (split,), other)[0]} for other in read}
            return split if made == read else None
        return None

    def _origin(self, op: Op, space: Space | None) -> _Origin:
        before = [self.origins[value.op] for value in op.operands]
        own = 0 if space is not None and space.view else sum(tensor.nbytes for tensor in op.results)
        return _Origin(
            free=all(one.free for one in before),
            random=is_random(op, space) or any(one.random for one in before),
            nbytes=max([own, *(one.nbytes for one in before)]),
        )

    def _choose_once(self, op: Op, space: Space | None) -> _Choice | None:
        """The same choice for like ops that read the like."""
        if space is None:
            return self._choose(op, space)
        reads = tuple((self.states[value], self._keeps_from_whole(value), op.operands.index(value)) for value in op.operands)
        key = (id(space), op.target, reads)
        if key not in self.known:
            self.known[key] = self._choose(op, space)
        return self.known[key]

    def _choose(self, op: Op, space: Space | None) -> _Choice | None:
        """The part that keeps most work split: a loop that an operand is split by, else Partial sums passed through, else nothing."""
        if facts_of(op, space).writes and self.cut:  # an op that changes what it reads must run once per step
            return None
        if all(self.states[value] == REPLICATE for value in op.operands):
            return _Choice(None, frozenset(), 0)
        if space is not None:
            splits = [choice for part in self._splits(op, space) if (choice := self._try(op, space, part)) is not None]
            if splits:
                return min(splits, key=lambda choice: choice.nbytes)
            summed = self._try(op, space, PASS_PARTIAL) if space.linear else None
            # A value that all micro-batches have is better read whole than kept by the first of them only.
            if summed is not None and all(self.states[op.operands[index]] != REPLICATE for index in space.linear):
                return summed
            return self._try(op, space, None) or summed
        return self._try(op, space, None)

    def _splits(self, op: Op, space: Space) -> Iterator[Split]:
        """Splits of the loops by which operands are split."""
        for dims, value in zip(space.operands, op.operands, strict=True):
            state = self.states[value]
            if state.kind is StateKind.SHARD:
                split = _split_at(space, dims, state)
                if split is not None and not _exchanges(space, split.loop) and self._is_legal(space, split):
                    yield split

    def _try(self, op: Op, space: Space | None, part: Part) -> _Choice | None:
        """A part of an op, if all operands can be had as it needs them."""
        whole: set[Value] = set()
        for index, value in enumerate(op.operands):
            need = REPLICATE if space is None else operand_layout(space, (part,), index)[0]
            if reads_locally(self.states[value], need):
                continue
            if need not in (REPLICATE, BROADCAST) or self._keeps_from_whole(value):
                return None
            whole.add(value)
        if (mean := _find_counted(space, part)) is not None:
            if any(self._keeps_from_whole(op.operands[index]) for index in (mean.target, mean.weight) if index is not None):
                return None
            whole.add(op.operands[mean.target])
        return _Choice(part, frozenset(map(op.operands.index, whole)), sum(self.graph.tensor(value).nbytes for value in whole))

    def _keeps_from_whole(self, value: Value) -> str:
        """Why `value` can't be computed from the whole batch at once; empty when it can."""
        origin = self.origins[value.op]
        if not origin.free:
            return "depends on parameters"
        if origin.random:
            return "is random"
        if origin.nbytes > WHOLE_NBYTES:
            return f"takes {origin.nbytes} bytes for the whole batch, more than {WHOLE_NBYTES}"
        return ""

    def _explain(self, op: Op, space: Space | None) -> str:
        """Why no part of an op can be run per micro-batch."""
        where = f"{op.target} at {op.source or op.layer or op.name}"
        count = self.mesh.sizes[0]
        if (needs_all := facts_of(op, space).whole_batch) is not None:
            return f"{where} {needs_all.reason}, which no one of {count} micro-batches sees; {needs_all.remedy}, or pin microbatches=1"
        blocked = []
        for value in dict.fromkeys(op.operands):
            state, why = self.states[value], self._keeps_from_whole(value)
            if state != REPLICATE and why:
                held = "a sum over the micro-batches" if state.kind is StateKind.PARTIAL else f"split by micro-batch on dim {state.dim}"
                blocked.append(f"{value} {self.graph.tensor(value)} is {held} and {why}")
        needs = "has no rule and so needs all operands whole" if space is None else "can't work on a micro-batch alone"
        return (
            f"{where} {needs}: {'; '.join(blocked) or 'its operands are split in ways that no loop of it joins'}. "
            f"Compute it for each sample, or from inputs alone, or pin microbatches=1 instead of {count}"
        )

    def _check_updates(self, op: Op) -> None:
        """The new values of buffers must be the same in every micro-batch."""
        names = op.kwargs.get("updates", ())
        for name, value in zip(names, op.operands[len(op.operands) - len(names) :], strict=True):
            state = self.states[value]
            if state != REPLICATE:
                producer = self.graph.by_name[value.op]
                self.reasons.append(
                    f"the new value of buffer {name}, made by {producer.target} at {producer.source or producer.layer or producer.name}, "
                    f"depends on the whole batch and each of {self.mesh.sizes[0]} micro-batches has {state} of it; "
                    "freeze the buffer, compute its update from inputs alone, or pin microbatches=1"
                )


def _split_at(space: Space, dims: Dims, state: State) -> Split | None:
    """The split of a loop of `dims` that needs a tensor in `state`; None when the boundary is inside no loop."""
    outer = 1
    for name in dims[state.dim]:
        size = space.loops[name].size
        inner, rest = divmod(state.outer, outer)
        if rest == 0 and 1 <= inner < size and size % inner == 0:
            return Split(name, inner)
        outer *= size
    return None


def _exchanges(space: Space, loop: str) -> bool:
    """Whether the kernel that a split of `loop` needs talks to the other parts."""
    return space.loops[loop].kind is LoopKind.KERNEL or loop in space.facts.coupled


def _find_counted(space: Space | None, part: Part) -> TargetMean | None:
    """The mean over targets that an op is, if this part is one of its tokens: it divides by the number of targets of the whole batch."""
    if space is None or not isinstance(part, Split):
        return None
    is_part_of_tokens = part.loop in space.kernel_loops and space.loops[part.loop].kind is LoopKind.SUM
    return space.facts.target_mean if is_part_of_tokens else None
