"""What a program for one micro-batch needs of the whole batch: values that the stage's prologue computes once per step.

Comes in: a `PlannedGraph` with micro-batches and a `Stage`. Goes out: `BatchValue`s, and the calls that make them.

Nothing is exchanged between micro-batches. An op that needs more of a value than its micro-batch has (a mask's maximum over the batch, the
number of labels in a mean) reads what was computed from the whole batch before the first micro-batch. That is possible for values that
depend on no parameter; `autopar.structure.split_microbatches` has refused all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.ir import Layout, OpKind, StateKind, TargetMean, Value
from autopar.rewrite.planned import PlannedGraph, made_layout, needed_layout
from autopar.rewrite.stages import Stage


@dataclass(frozen=True, slots=True)
class BatchValue:
    """Something of the whole batch: `value` itself, or the number of targets in it that the mean called `loss` counts."""

    value: Value
    loss: str | None = None


def find_batch_values(planned: PlannedGraph, stage: Stage) -> tuple[BatchValue, ...]:
    """What the calls of `stage` need of the whole batch, each once; nothing without micro-batches."""
    if planned.micro_split is None:
        return ()
    needed: dict[BatchValue, None] = {}
    for name in stage.calls:
        op = planned.graph.by_name[name]
        for index, value in enumerate(op.operands):
            if needs_whole_batch(planned, value, needed_layout(planned, op, index)):
                needed[BatchValue(value)] = None
        if name in planned.micro_split.counted:
            needed[BatchValue(planned.micro_split.counted[name], name)] = None
    return tuple(needed)


def needs_whole_batch(planned: PlannedGraph, value: Value, need: Layout) -> bool:
    """Whether an op that works on a micro-batch needs all of `value`, of which the micro-batch makes a part or a summand."""
    return (
        planned.micro_split is not None
        and need[0].kind in (StateKind.REPLICATE, StateKind.REPLICATE_PARTIAL_GRAD)
        and made_layout(planned, value)[0].kind is not StateKind.REPLICATE
    )


def find_ancestors(planned: PlannedGraph, batch_values: Sequence[BatchValue]) -> frozenset[str]:
    """Names of all ops, stored tensors among them, from which these values are computed."""
    pending = [batch_value.value for batch_value in batch_values]
    for loss in (batch_value.loss for batch_value in batch_values if batch_value.loss is not None):
        weight = target_mean_of(planned, loss).weight
        if weight is not None:
            pending.append(planned.graph.by_name[loss].operands[weight])
    ancestors: set[str] = set()
    while pending:
        name = pending.pop().op
        if name not in ancestors:
            ancestors.add(name)
            pending += planned.graph.by_name[name].operands
    return frozenset(ancestors)


def with_prologue(planned: PlannedGraph, stage: Stage) -> Stage:
    """`stage` with those buffers among its stored tensors that only its prologue reads."""
    ancestors = find_ancestors(planned, find_batch_values(planned, stage))
    graph = planned.graph
    stored = {*stage.stored, *(op.name for op in graph.of_kind(OpKind.BUFFER) if op.name in ancestors)}
    return replace(stage, stored=tuple(op.name for op in graph.ops if op.name in stored))


def target_mean_of(planned: PlannedGraph, loss: str) -> TargetMean:
    """How the call `loss`, a mean over targets, counts them."""
    mean = planned.spaces[loss].facts.target_mean
    assert mean is not None, f"{loss} is no mean over targets"
    return mean
