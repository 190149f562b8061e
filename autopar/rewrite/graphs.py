"""The graphs that a rank runs: of the whole program, of a stage for one micro-batch, and of a stage's prologue.

Comes in: a `PlannedGraph`, and a `Stage` for the latter two. Goes out: an fx module whose placeholders are parts of parameters, buffers and
inputs, then what the whole batch gave and what other stages sent. The captured graph is left as it is. One graph serves every rank of the
mesh: what differs by rank (which part is mine) is asked of the axis when the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from autopar.ir import Op, OpKind, Value
from autopar.rewrite.builder import GraphBuilder, LocalValue
from autopar.rewrite.calls import call, count_targets
from autopar.rewrite.moves import move, read_operand
from autopar.rewrite.planned import PlannedGraph, made_layout, sent_layout
from autopar.rewrite.stages import Stage
from autopar.rewrite.whole_batch import BatchValue, find_ancestors


def build_whole(planned: PlannedGraph, calls: Sequence[str]) -> fx.GraphModule:
    """The whole graph on the whole batch, its calls in the order `calls`.

    Before, two products without a nonlinearity between them, on the mesh ``dp=2 x tp=2``::

        def forward(p_up_weight, p_down_weight, x):
            up = linear(x, p_up_weight)
            down = linear(up, p_down_weight)
            return (down,)

    After, where the plan stores ``x`` whole, splits rows over ``dp``, the features between the products over ``tp``, and returns rows
    split over ``dp``::

        def forward(p_up_weight, p_down_weight, x):
            shard = shard(x, 'dp', 0)
            up = linear(shard, p_up_weight)
            down = linear(up, p_down_weight)
            all_reduce = all_reduce(down, 'tp')
            return (all_reduce,)
    """
    graph, builder = planned.graph, GraphBuilder(planned)
    _place(builder, (op for kind in (OpKind.PARAMETER, OpKind.BUFFER, OpKind.INPUT) for op in graph.of_kind(kind)))
    for name in calls:
        call(builder, graph.by_name[name])
    return builder.finish([read_operand(builder, graph.output, position) for position in range(len(graph.output.operands))])


def build_stage(planned: PlannedGraph, stage: Stage, batch_values: Sequence[BatchValue], *, splits_backward: bool) -> fx.GraphModule:
    """A stage's calls on one micro-batch; `splits_backward` when the schedule runs weight gradients in a pass of their own.

    Before, the graph below, of which the stage has the last two calls::

        h = linear(x, p_0_weight)
        y = linear(h, p_1_weight)
        loss = cross_entropy(y, labels)

    After, it receives ``h``, takes its micro-batch's rows of the labels, and is given the number of labels of the whole batch. The results
    are what it sends to other stages (nothing here), then its outputs::

        def forward(p_1_weight, x, labels, whole_0_labels, h):
            y = linear(h, p_1_weight)
            take_microbatch = take_microbatch(labels, 'micro', 0, 1)
            loss = kernels.cross_entropy(y, take_microbatch, splits={'n': ('micro',)}, counted=whole_0_labels)
            return (loss,)
    """
    graph, builder = planned.graph, GraphBuilder(planned)
    _place(builder, [*(graph.by_name[name] for name in stage.stored), *graph.of_kind(OpKind.INPUT)])
    for number, batch_value in enumerate(batch_values):
        builder.whole_batch[batch_value] = builder.placeholder(f"whole_{number}_{batch_value.value.op}")
    for value in stage.received:
        node = builder.placeholder(f"{value.op}_{value.index}" if value.index else value.op)
        builder.made[value] = LocalValue(value, sent_layout(planned, value), node)
    for name in stage.calls:
        call(builder, graph.by_name[name], splits_backward=splits_backward)
    # These moves come after all calls and on behalf of the output, so that they belong to no block: a block may be run again as one.
    sent = [move(builder, builder.made[value], sent_layout(planned, value), graph.output).node for value in stage.sent]
    returned = [read_operand(builder, graph.output, position) for position in stage.outputs]
    return builder.finish([*sent, *returned])


def build_prologue(planned: PlannedGraph, stage: Stage, batch_values: Sequence[BatchValue]) -> fx.GraphModule:
    """What a stage needs of the whole batch, computed once per step from its buffers and all inputs.

    Before, a loss that each micro-batch computes of its own labels::

        loss = cross_entropy(y, labels)

    After, the number of labels in the whole batch, by which the loss of every micro-batch divides::

        def forward(x, labels):
            count_targets = losses.count_targets(labels, None, -100)
            return (count_targets,)
    """
    planned = replace(planned, micro_split=None)
    graph, builder = planned.graph, GraphBuilder(planned)
    buffers = (op for op in graph.of_kind(OpKind.BUFFER) if op.name in stage.stored)
    _place(builder, [*buffers, *graph.of_kind(OpKind.INPUT)])
    ancestors = find_ancestors(planned, batch_values)
    for op in graph.of_kind(OpKind.CALL):
        if op.name in ancestors:
            call(builder, op)
    results = [
        builder.made[batch_value.value].node if batch_value.loss is None else count_targets(builder, graph.by_name[batch_value.loss])
        for batch_value in batch_values
    ]
    return builder.finish(results)


def _place(builder: GraphBuilder, ops: Iterable[Op]) -> None:
    """Placeholders that take a rank's parts of parameters, buffers and inputs."""
    for op in ops:
        value = Value(op.name)
        builder.made[value] = LocalValue(value, made_layout(builder.planned, value), builder.placeholder(op.name))
