"""What splitting a step into micro-batches does to every op and value of a graph.

Comes in: a graph, the spaces of its calls, the number of micro-batches. Goes out: a `MicroSplit`, which costs and rewrite follow.

Micro-batches are one more mesh axis, whose parts run one after the other instead of on several ranks. So each call has a placement on that
axis (`AxisPlacement`), and each value a state: in micro-batch ``m`` of ``n`` a value ``v`` is

- ``S<d>``: part ``m`` of dim ``d`` of the value that the whole batch has;
- ``R``: that value itself, the same in all micro-batches;
- ``P``: a summand: the values of all micro-batches add up to it.

Between ranks a collective leads from one state to another. Between micro-batches nothing can be exchanged, so each op must find its
operands as the ops before it left them, up to what needs no other micro-batch (`reads_locally`): one's own part of an ``R``, for example.
Gradients need no rule of their own: where the loss is the sum of the micro-batches' losses, its gradients are the sums of theirs.

Values that depend on no parameter may also be needed whole: they are computed once per step, from the whole batch, before the first
micro-batch runs.

Random numbers: every micro-batch must begin with the same state of the generator that seeds streams (`autopar.ops.rng`), as ranks do. A
call that is split then draws other numbers in each, because its stream counts the part; one that isn't split draws the same in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.ir import (
    MICROBATCH,
    PASS_PARTIAL,
    REPLICATE,
    REPLICATE_PARTIAL_GRAD,
    AxisPlacement,
    Dims,
    Graph,
    LoopKind,
    Mesh,
    Op,
    OpKind,
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
from autopar.rules import facts_of, is_random, readable_name
from autopar.structure.roles import GraphRoles, Role

WHOLE_NBYTES = 1 << 28
"""Bytes of the largest tensor that is computed from the whole batch at once: a step is split into micro-batches to have no large ones."""


@dataclass(frozen=True)
class MicroSplit:
    """How a graph splits into micro-batches.

    Attributes:
        placements: call -> its placement on the axis of micro-batches.
        states: value -> its state on that axis: a part, the same in all micro-batches, or a summand. Parameters and buffers are the same in
            all.
        whole: values that depend on no parameter and that some op needs whole although a micro-batch has a part or a summand: they are
            computed once per step from the whole batch.
        counted: loss that is a mean over targets, split by tokens -> its targets, which are in `whole` too: the loss divides by the number
            of targets of the whole batch (`autopar.ops.losses.count_targets`).
        reasons: why the graph can't be split so, each with op and line, what was needed and what to do; empty when it can.
    """

    placements: Mapping[str, AxisPlacement]
    states: Mapping[Value, State]
    whole: frozenset[Value]
    counted: Mapping[str, Value]
    reasons: tuple[str, ...]


def reads_locally(state: State, need: State) -> bool:
    """Whether a micro-batch that has `state` of a value can read it as `need` without any other micro-batch.

    It can if it has just that, or the whole value: it takes its part of it, or, for a sum, the first micro-batch takes the value and the
    others zeros.
    """
    return state in (need, REPLICATE)


def split_microbatches(
    graph: Graph, spaces: Mapping[str, Space], roles: GraphRoles, count: int, *, half_batches: bool = False
) -> MicroSplit:
    """Split the batch of `graph` into `count` micro-batches of equal size.

    The batch is dim 0 of the inputs. Where inputs differ in its size, those of the most frequent size are split; if there is a reason
    against that, those of the other sizes are tried.

    Args:
        graph: as captured for the whole batch.
        spaces: of every call that has a rule.
        roles: the roles of the inputs' dims.
        count: number of micro-batches. With 1 nothing is split and every value is the same in all.
        half_batches: whether they are the two halves of the batch that take turns, and reasons speak of that.

    Raises InputError when `count` is below 1. That the graph can't be split is no error: `MicroSplit.reasons` says why.
    """
    return MicroSplitter(graph, spaces, roles, half_batches=half_batches).split(count)


class MicroSplitter:
    """Splits one graph into several numbers of micro-batches, as `split_microbatches` does.

    A search asks for many numbers. Which loops are split depends on the number only by what it divides: numbers that divide the same loops
    share a split.
    """

    def __init__(self, graph: Graph, spaces: Mapping[str, Space], roles: GraphRoles, *, half_batches: bool = False) -> None:
        self.graph = graph
        self.spaces = spaces
        self.half_batches = half_batches
        self.batches = _find_batches(graph, roles)
        self._walks: list[tuple[_Walk, MicroSplit]] = []  # those that ended without a reason

    def split(self, count: int) -> MicroSplit:
        """The split into `count` micro-batches; raises InputError when that is below 1."""
        if count < 1:
            raise InputError(f"a step can't be split into {count} micro-batches; give 1 or more")
        if count == 1:
            return self._split_inputs(frozenset(), count)
        if not self.batches:
            named = ", ".join(f"{op.target} {op.results[0]}" for op in self.graph.of_kind(OpKind.INPUT)) or "none"
            return _refuse(
                f"no input has a batch to split into {_word_parts(count, self.half_batches)} (inputs: {named});"
                " give inputs whose first dim is the batch"
            )
        refusals: list[MicroSplit] = []
        for size, inputs in self.batches.items():
            if size % count:
                names = ", ".join(self.graph.by_name[name].target for name in inputs)
                split = _refuse(
                    f"an even batch is needed, this has {size} rows (dim 0 of {names}); take an even one, or leave out half_batches"
                    if self.half_batches
                    else f"the batch of {size} (dim 0 of {names}) can't be split into {count} micro-batches; take a divisor of {size}"
                )
            else:
                split = self._split_inputs(frozenset(inputs), count)
            if not split.reasons:
                return split
            refusals.append(split)
        return refusals[0]  # of the most likely batch

    def _split_inputs(self, inputs: frozenset[str], count: int) -> MicroSplit:
        """The split of dim 0 of these inputs."""
        for walk, split in self._walks:
            if walk.inputs == inputs and walk.holds_for(count):
                return split
        walk = _Walk(self.graph, self.spaces, inputs, count, self.half_batches)
        split = walk.run()
        if not split.reasons:  # reasons name the number of micro-batches, so they hold for no other
            self._walks.append((walk, split))
        return split


def _word_parts(count: int, half_batches: bool) -> str:
    """What a batch is split into, for messages."""
    return f"{count} halves" if half_batches else f"{count} micro-batches"


def _refuse(reason: str) -> MicroSplit:
    return MicroSplit({}, {}, frozenset(), {}, (reason,))


def batch_size(graph: Graph, roles: GraphRoles) -> int:
    """Number of samples of a step: the size of dim 0 that most inputs have; 1 without any input of more."""
    return next(iter(_find_batches(graph, roles)), 1)


def _find_batches(graph: Graph, roles: GraphRoles) -> dict[int, list[str]]:
    """Sizes that the batch may have, that of most inputs first -> names of the inputs whose dim 0 has this size."""
    inputs: dict[int, list[str]] = {}
    for op in graph.of_kind(OpKind.INPUT):
        shape, dims = op.results[0].shape, roles.of_dims[Value(op.name)]
        if shape and shape[0] > 1 and dims[0].get(1) is Role.BATCH:
            inputs.setdefault(shape[0], []).append(op.name)
    order = Counter({size: len(names) for size, names in inputs.items()}).most_common()
    return {size: inputs[size] for size, _ in order}


@dataclass(frozen=True, slots=True)
class _Origin:
    """What an op's results were computed from.

    Attributes:
        is_free: whether from no parameter, and no input that has a gradient.
        is_random: whether from random numbers.
        nbytes: of the largest tensor on the way.
    """

    is_free: bool = True
    is_random: bool = False
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class _Option:
    """A way to run an op on a micro-batch.

    Attributes:
        placement: of the op on the axis of micro-batches.
        whole: numbers of the operands that must be computed from the whole batch for it.
        nbytes: of these operands together.
    """

    placement: AxisPlacement
    whole: frozenset[int]
    nbytes: int


class _Walk:
    """One walk over the ops of a graph, which decides about each from the states of its operands.

    Attributes:
        inputs: names of the inputs that are split by dim 0.
        mesh: the axis of micro-batches alone.
        parts: what the batch is split into, for messages.
        whole_batch: how to run the batch whole, for messages.
        origins: op -> what its results were computed from.
        splits_work: whether any call that depends on a parameter is split: without one the split would be for nothing.
        options: what was decided for like calls with like operands.
        legality: (space, split) -> whether the number of micro-batches may split that loop so, for every pair that the walk asked about. It
            is a cache key: another number of micro-batches with the same answers gives the same walk (`holds_for`).
    """

    def __init__(self, graph: Graph, spaces: Mapping[str, Space], inputs: frozenset[str], count: int, half_batches: bool) -> None:
        self.graph = graph
        self.spaces = spaces
        self.inputs = inputs
        self.mesh = Mesh((MICROBATCH,), (count,))
        self.parts = _word_parts(count, half_batches)
        self.whole_batch = "leave out half_batches" if half_batches else f"pin microbatches=1 instead of {count}"
        self.placements: dict[str, AxisPlacement] = {}
        self.states: dict[Value, State] = {}
        self.whole: set[Value] = set()
        self.counted: dict[str, Value] = {}
        self.reasons: list[str] = []
        self.origins: dict[str, _Origin] = {}
        self.splits_work = False
        self.options: dict[tuple[object, ...], _Option | None] = {}
        self.legality: dict[tuple[int, Split], tuple[Space, bool]] = {}

    def holds_for(self, count: int) -> bool:
        """Whether a walk with another number of micro-batches would decide the same."""
        mesh = Mesh((MICROBATCH,), (count,))
        return all(is_legal(space, (split,), mesh) == legal for (_, split), (space, legal) in self.legality.items())

    def _is_legal(self, space: Space, split: Split) -> bool:
        key = id(space), split
        if key not in self.legality:
            self.legality[key] = space, is_legal(space, (split,), self.mesh)
        return self.legality[key][1]

    def run(self) -> MicroSplit:
        """Walk over all ops; an op that can't be run on a micro-batch adds a reason, and the walk goes on to find the others."""
        for op in self.graph.ops:
            if op.kind is OpKind.CALL:
                self._split_call(op)
            elif op.kind is not OpKind.OUTPUT:
                self.states[Value(op.name)] = shard(0) if op.name in self.inputs else REPLICATE
                self.origins[op.name] = _Origin(op.kind is not OpKind.PARAMETER and not op.results[0].requires_grad)
        self._check_updates()
        if self.inputs and not self.splits_work and not self.reasons:
            names = ", ".join(self.graph.by_name[name].target for name in sorted(self.inputs))
            self.reasons.append(f"splitting {names} into {self.parts} splits no op that reads a parameter")
        self._split_for_readers()
        return MicroSplit(self.placements, self.states, frozenset(self.whole), self.counted, tuple(self.reasons))

    def _split_call(self, op: Op) -> None:
        """Decide about a call whose operands' states are known, and note the states of its results."""
        space = self.spaces.get(op.name)
        self.origins[op.name] = self._find_origin(op, space)
        option = self._choose_once(op, space)
        if option is None:
            self.reasons.append(self._explain(op, space))
            option = _Option(None, frozenset(), 0)
        self.placements[op.name] = option.placement
        self.whole |= {op.operands[index] for index in option.whole}
        if (mean := _find_counted(space, option.placement)) is not None:
            self.counted[op.name] = op.operands[mean.target]
        self.splits_work |= option.placement is not None and not self.origins[op.name].is_free
        for value in op.values:
            self.states[value] = _result_state(space, option.placement, value.index)

    def _split_for_readers(self) -> None:
        """Split calls that read nothing split but of whose results every reader takes its micro-batch's part.

        A mask built from sizes alone would be built for the whole batch in each micro-batch; so it is built for a part. Readers come first,
        so that what a call reads is split too.
        """
        read_as: dict[Value, set[State]] = {}
        for op in reversed(self.graph.ops):
            space = self.spaces.get(op.name)
            if op.kind is OpKind.CALL and space is not None and self.placements[op.name] is None and not space.random:
                split = self._find_split_for_readers(op, space, read_as)
                if split is not None:
                    self.placements[op.name] = split
                    self.states |= {value: _result_state(space, split, value.index) for value in op.values}
            for index, value in enumerate(op.operands):
                read_as.setdefault(value, set()).add(_operand_state(space, self.placements.get(op.name), index))

    def _find_split_for_readers(self, op: Op, space: Space, read_as: Mapping[Value, set[State]]) -> Split | None:
        """The split with which every result has the state in which all its readers need it; None when there is none."""
        needs = {value: read_as[value] for value in op.values if value in read_as}
        if any(len(states) > 1 for states in needs.values()):
            return None
        for value, (state,) in needs.items():
            split = _split_at(space, space.results[value.index], state) if state.kind is StateKind.SHARD else None
            if split is None or _exchanges(space, split.loop) or not self._is_legal(space, split):
                return None
            made = {value: {_result_state(space, split, value.index)} for value in needs}
            return split if made == needs else None
        return None

    def _find_origin(self, op: Op, space: Space | None) -> _Origin:
        """What a call's results are computed from; a view's result is no tensor of its own."""
        origins = [self.origins[value.op] for value in op.operands]
        own_nbytes = 0 if space is not None and space.view else sum(tensor.nbytes for tensor in op.results)
        return _Origin(
            is_free=all(origin.is_free for origin in origins),
            is_random=is_random(op, space) or any(origin.is_random for origin in origins),
            nbytes=max([own_nbytes, *(origin.nbytes for origin in origins)]),
        )

    def _choose_once(self, op: Op, space: Space | None) -> _Option | None:
        """What `_choose` says, asked once for all calls with one space whose operands are alike."""
        if space is None:
            return self._choose(op, space)
        reads = tuple((self.states[value], self._why_not_whole(value), op.operands.index(value)) for value in op.operands)
        key = (id(space), op.target, reads)
        if key not in self.options:
            self.options[key] = self._choose(op, space)
        return self.options[key]

    def _choose(self, op: Op, space: Space | None) -> _Option | None:
        """The option that keeps most work split; None when the op can't run on a micro-batch.

        In this order: nothing is split if nothing that the op reads is; a loop by which an operand is split, if several are the one for
        which the fewest bytes are computed from the whole batch; sums passed through an op that is linear in them; not split, with
        operands computed from the whole batch.
        """
        if facts_of(op, space).writes and self.inputs:  # an op that changes what it reads must run once per step
            return None
        if all(self.states[value] == REPLICATE for value in op.operands):
            return _Option(None, frozenset(), 0)
        if space is None:
            return self._try(op, space, None)
        splits = [option for split in self._find_splits(op, space) if (option := self._try(op, space, split)) is not None]
        if splits:
            return min(splits, key=lambda option: option.nbytes)
        passed = self._try(op, space, PASS_PARTIAL) if space.linear else None
        # As a summand, a value that all micro-batches have would be the first one's alone: where one is added, reading it whole is better.
        if passed is not None and all(self.states[op.operands[index]] != REPLICATE for index in space.linear):
            return passed
        return self._try(op, space, None) or passed

    def _find_splits(self, op: Op, space: Space) -> Iterator[Split]:
        """Legal splits of the loops by which operands are split, without those whose kernel would exchange something."""
        for dims, value in zip(space.operands, op.operands, strict=True):
            state = self.states[value]
            if state.kind is StateKind.SHARD:
                split = _split_at(space, dims, state)
                if split is not None and not _exchanges(space, split.loop) and self._is_legal(space, split):
                    yield split

    def _try(self, op: Op, space: Space | None, placement: AxisPlacement) -> _Option | None:
        """The op with this placement, if every operand can be read as that needs it, or be computed from the whole batch."""
        whole: set[Value] = set()
        for index, value in enumerate(op.operands):
            need = _operand_state(space, placement, index)
            if reads_locally(self.states[value], need):
                continue
            if need not in (REPLICATE, REPLICATE_PARTIAL_GRAD) or self._why_not_whole(value):
                return None
            whole.add(value)
        if (mean := _find_counted(space, placement)) is not None:
            if any(self._why_not_whole(op.operands[index]) for index in (mean.target, mean.weight) if index is not None):
                return None
            whole.add(op.operands[mean.target])
        return _Option(placement, frozenset(map(op.operands.index, whole)), sum(self.graph.tensor(value).nbytes for value in whole))

    def _why_not_whole(self, value: Value) -> str:
        """Why a value can't be computed from the whole batch at once; empty when it can."""
        origin = self.origins[value.op]
        if not origin.is_free:
            return "depends on parameters"
        if origin.is_random:
            return "is random"
        if origin.nbytes > WHOLE_NBYTES:
            return f"takes {origin.nbytes} bytes for the whole batch, more than {WHOLE_NBYTES}"
        return ""

    def _explain(self, op: Op, space: Space | None) -> str:
        """Why an op can't be run on a micro-batch, with its line and what to do."""
        where = f"{op.target} at {op.source or op.layer or op.name}"
        if (needs_all := facts_of(op, space).microbatch_refusal) is not None:
            return f"{where} {needs_all.reason}, which no one of {self.parts} sees; {needs_all.remedy}, or {self.whole_batch}"
        blocked = []
        for value in dict.fromkeys(op.operands):
            state, why = self.states[value], self._why_not_whole(value)
            if state != REPLICATE and why:
                held = "a sum over the micro-batches" if state.kind is StateKind.PARTIAL else f"split by micro-batch on dim {state.dim}"
                blocked.append(f"{value} {self.graph.tensor(value)} is {held} and {why}")
        needs = "has no rule and so needs all operands whole" if space is None else "can't work on a micro-batch alone"
        remedy = f'Say how it splits with autopar.register_rule("{readable_name(op.target)}", ...), compute' if space is None else "Compute"
        return (
            f"{where} {needs}: {'; '.join(blocked) or 'its operands are split in ways that no loop of it joins'}. "
            f"{remedy} it for each sample, or from inputs alone, or {self.whole_batch}"
        )

    def _check_updates(self) -> None:
        """Add a reason for every buffer whose new value isn't the same in every micro-batch."""
        for name, value in self.graph.updates.items():
            state = self.states[value]
            if state != REPLICATE:
                producer = self.graph.by_name[value.op]
                self.reasons.append(
                    f"the new value of buffer {name}, made by {producer.target} at {producer.source or producer.layer or producer.name}, "
                    f"depends on the whole batch and each of {self.parts} has {state} of it; "
                    f"freeze the buffer, compute its update from inputs alone, or {self.whole_batch}"
                )


def _operand_state(space: Space | None, placement: AxisPlacement, index: int) -> State:
    """What an op with this placement needs of its operand number `index`; without a rule, or a placement (the output), all of it."""
    return REPLICATE if space is None else operand_layout(space, (placement,), index)[0]


def _result_state(space: Space | None, placement: AxisPlacement, index: int) -> State:
    """What an op with this placement makes of its result number `index`; without a rule, all of it."""
    return REPLICATE if space is None else result_layout(space, (placement,), index)[0]


def _split_at(space: Space, dims: Dims, state: State) -> Split | None:
    """The split of a loop of `dims` for which a tensor of these dims is in `state`, a shard of one of them.

    A dim that is the product of several loops may be split at each: inside of ``state.outer`` equal blocks. None when no loop begins there
    or has such blocks.
    """
    outer = 1
    for name in dims[state.dim]:
        size = space.loops[name].size
        inner, rest = divmod(state.outer, outer)
        if rest == 0 and 1 <= inner < size and size % inner == 0:
            return Split(name, inner)
        outer *= size
    return None


def _exchanges(space: Space, loop: str) -> bool:
    """Whether the kernel that a split of `loop` needs would exchange something with the other parts."""
    return space.loops[loop].kind is LoopKind.KERNEL or loop in space.facts.coupled


def _find_counted(space: Space | None, placement: AxisPlacement) -> TargetMean | None:
    """The mean over targets that an op is, if this placement splits its tokens: the op must then be told the targets of the whole batch."""
    if space is None or not isinstance(placement, Split):
        return None
    splits_tokens = placement.loop in space.kernel_loops and space.loops[placement.loop].kind is LoopKind.SUM
    return space.facts.target_mean if splits_tokens else None
