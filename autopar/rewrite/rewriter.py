"""Builds the graph of a local program: the captured ops on their parts, and between them the collectives that their layouts need.

The same program serves every rank; what differs by rank (which part is mine) is asked of the axis at run time. The input graph is
left as it is. Collectives come from `reshard.journey` alone; a tensor that several ops need alike is moved once. Along time nothing is
exchanged: a micro-batch takes its part of what is there whole, and what it needs of the whole batch is made before (the prologue).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autopar.capture import Captured, takes
from autopar.errors import PlanError
from autopar.ir import (
    MICROBATCH,
    REPLICATE,
    Collective,
    Graph,
    Layout,
    Mesh,
    Op,
    OpKind,
    Placement,
    ReshardStep,
    Space,
    Split,
    State,
    StateKind,
    TargetMean,
    Tensor,
    Value,
    fits,
    journey,
    local_outer,
    local_shape,
    operand_layout,
    result_layout,
    shard,
)
from autopar.ops import DEFERRABLE, collectives, kernels, losses
from autopar.plans import Plan
from autopar.rewrite.program import Boundary, Program, Slot
from autopar.rewrite.stages import Stage
from autopar.rules import facts_of
from autopar.structure import Folded, MicroSplit, is_deferrable

GRADIENT_OF_GATHER = {Collective.REDUCE_SCATTER: "reduce_scatter", Collective.SLICE: "slice"}


@dataclass(frozen=True, slots=True)
class Whole:
    """Something that a micro-batch needs of the whole batch: a value, or how many targets in it the mean of `loss` counts."""

    value: Value
    loss: str | None = None


class Rewriter:
    """Builds a new graph op by op; lives for one rewrite.

    With `micro`, time is the outermost axis of the mesh: the program works on one micro-batch, whose number the axis knows.
    """

    def __init__(
        self,
        captured: Captured,
        plan: Plan,
        folded: Folded,
        spaces: Mapping[str, Space],
        device: torch.device | None,
        micro: MicroSplit | None = None,
        splits_backward: bool = False,
    ) -> None:
        self.captured = captured
        self.graph: Graph = captured.graph
        self.plan = plan
        self.micro = micro
        self.mesh: Mesh = plan.mesh
        if micro is not None:
            self.mesh = Mesh((MICROBATCH, *plan.mesh.names), (plan.pipeline.microbatches, *plan.mesh.sizes))
        self.folded = folded
        self.spaces = spaces
        self.device = device
        self.splits_backward = splits_backward
        self.new = fx.Graph()
        self.nodes: dict[Value, fx.Node] = {}
        self.moved: dict[tuple[Value, Layout], fx.Node] = {}
        self.captured_nodes: dict[str, fx.Node] = {node.name: node for node in captured.fx.graph.nodes}
        self.partial: dict[str, set[str]] = {}
        self.regather = False
        self.whole: Layout = tuple(REPLICATE for _ in self.mesh.sizes)
        self.received: frozenset[Value] = frozenset()
        self.wholes: tuple[Whole, ...] = ()
        self.whole_nodes: dict[Whole, fx.Node] = {}
        self._find_deferred()

    def run(self) -> fx.GraphModule:
        """The whole graph, in its own order."""
        for op in self.graph.ops:
            if op.kind is OpKind.OUTPUT:
                self.new.output(tuple(self._take(v, self.needed(op, i), op, i) for i, v in enumerate(op.operands)))
            elif op.kind is OpKind.CALL:
                self._call(op, self.captured_nodes[op.name])
            else:
                self._place(op)
        return self._finish()

    def run_stage(self, stage: Stage) -> tuple[fx.GraphModule, list[Value]]:
        """A stage's part of the graph, and the values that its results begin with, which others receive."""
        graph = self.graph
        (output,) = graph.of_kind(OpKind.OUTPUT)
        whole_stage = not stage.receives and not stage.sends
        for kind in (OpKind.PARAMETER, OpKind.BUFFER, OpKind.INPUT):
            for op in graph.of_kind(kind):
                if kind is OpKind.INPUT or op.name in stage.stored or (whole_stage and self.micro is None):
                    self._place(op)
        self.wholes = self.find_wholes(stage)
        for number, whole in enumerate(self.wholes):
            self.whole_nodes[whole] = self.new.placeholder(f"whole_{number}_{whole.value.op}")
        received = [value for start in sorted(stage.receives) for value in stage.receives[start]]
        self.received = frozenset(received)
        for value in received:
            node = self.nodes[value] = self.new.placeholder(_name_of(value))
            node.meta["block"] = None
        for name in stage.calls:
            self._call(graph.by_name[name], self.captured_nodes[name])
        sent = list(dict.fromkeys(value for end in sorted(stage.sends) for value in stage.sends[end]))
        # These moves stand after all blocks, so that they belong to none: the block that made the value may be run again as one.
        results = [self._move(value, self.made(value), self.travels(value), output) for value in sent]
        results += [self._take(output.operands[i], self.output_layout(i), output, i) for i in stage.outputs]
        self.new.output(tuple(results))
        return self._finish(), sent

    def run_prologue(self, stage: Stage, wholes: Sequence[Whole]) -> fx.GraphModule:
        """What is computed once per step from the whole batch: takes the stage's buffers and all inputs."""
        graph = self.graph
        for kind in (OpKind.BUFFER, OpKind.INPUT):
            for op in graph.of_kind(kind):
                if kind is OpKind.INPUT or op.name in stage.stored:
                    self._place(op)
        needed = self.find_ancestors(wholes)
        for op in graph.ops:
            if op.name in needed and op.kind is OpKind.CALL:
                self._call(op, self.captured_nodes[op.name])
        results = []
        for whole in wholes:
            if whole.loss is None:
                results.append(self.nodes[whole.value])
                continue
            loss = graph.by_name[whole.loss]
            mean = self._target_mean_of(whole.loss)
            target, weight = (
                None if index is None else self._take(loss.operands[index], self.needed(loss, index), loss, index)
                for index in (mean.target, mean.weight)
            )
            results.append(self.new.call_function(losses.count_targets, (target, weight, mean.ignore_index)))
        self.new.output(tuple(results))
        return self._finish()

    def _place(self, op: Op) -> None:
        node = self.new.placeholder(op.name)
        node.meta["block"] = None
        self.nodes[Value(op.name)] = node

    def _finish(self) -> fx.GraphModule:
        self.new.eliminate_dead_code()
        module = fx.GraphModule(self.captured.fx, self.new, class_name="LocalProgram")
        self.new.lint()
        return module

    def program(self, module: nn.Module) -> Program:
        """The program around `module`."""
        return Program(
            module=module,
            mesh=self.plan.mesh,
            parameters=self.slots(OpKind.PARAMETER),
            buffers=self.slots(OpKind.BUFFER),
            inputs=self.slots(OpKind.INPUT),
            outputs=self.output_slots(),
            mutated_buffers=self.captured.mutated_buffers,
            batch_axes=self.plan.batch_axes,
            bucket_nbytes=self.plan.bucket_nbytes,
            regather=self.regather,
            captured=self.captured,
        )

    def placement(self, op: Op) -> Placement:
        """The plan's placement of a call; along time, what a micro-batch does of it."""
        inner = self.plan.placements[self.folded.representative[op.name]]
        return inner if self.micro is None else (self.micro.parts[op.name], *inner)

    def stored(self, op: Op) -> Layout:
        """The plan's layout of a parameter, buffer or input; every micro-batch sees all of it."""
        inner = self.plan.layouts[self.folded.representative[op.name]]
        return inner if self.micro is None else (REPLICATE, *inner)

    def output_layout(self, position: int) -> Layout:
        """The plan's layout of an output tensor; along time as it is made."""
        inner = self.plan.outputs[position]
        if self.micro is None:
            return inner
        (output,) = self.graph.of_kind(OpKind.OUTPUT)
        return (self.made(output.operands[position])[0], *inner)

    def joined(self, layout: Layout) -> Layout:
        """The layout over ranks of what a rank has of all micro-batches together."""
        if self.micro is None:
            return layout
        time, *inner = layout
        size = self.mesh.sizes[0]
        # What ranks split of each micro-batch, they split inside each of the blocks that the micro-batches are of the whole.
        return tuple(shard(one.dim, one.outer * size) if time.kind is StateKind.SHARD and one == time else one for one in inner)

    def in_time(self, layout: Layout) -> State:
        """A micro-batch's part of what a rank has, with the number of blocks that the rank's part has."""
        time = layout[0]
        return shard(time.dim, local_outer(layout, self.mesh, 0)) if time.kind is StateKind.SHARD else time

    def travels(self, value: Value) -> Layout:
        """The layout in which a value crosses to another stage; along time as it is made."""
        inner = self.plan.pipeline.travel.get(str(value))
        if inner is None:
            raise PlanError(f"plan.pipeline.travel has no layout for {str(value)!r}, which crosses from a stage to another; plan again")
        return inner if self.micro is None else (self.micro.states[value], *inner)

    def boundary(self, value: Value) -> Boundary:
        """What a stage that reads `value` receives per micro-batch."""
        tensor = self.graph.tensor(value)
        shape = local_shape(tensor.shape, self.travels(value), self.mesh)
        return Boundary(str(value), shape, getattr(torch, tensor.dtype), tensor.requires_grad)

    def made(self, value: Value) -> Layout:
        """The layout in which `value` is produced or received."""
        op = self.graph.by_name[value.op]
        if op.kind is not OpKind.CALL:
            return self.stored(op)
        if value in self.received:
            return self.travels(value)
        space = self.spaces.get(op.name)
        return self.whole if space is None else result_layout(space, self.placement(op), value.index)

    def needed(self, op: Op, index: int) -> Layout:
        """The layout in which `op` reads operand `index`."""
        if op.kind is OpKind.OUTPUT:
            return self.output_layout(index)
        space = self.spaces.get(op.name)
        return self.whole if space is None else operand_layout(space, self.placement(op), index)

    def _find_deferred(self) -> None:
        """Axes over which a parameter's gradient stays Partial until the end of the backward: where every use makes it so.

        Being returned is a use: that part of the gradient comes back whole, and to sum it again would count it several times.
        """
        for op in self.graph.ops:
            for index, value in enumerate(op.operands):
                producer = self.graph.by_name[value.op]
                if producer.kind is not OpKind.PARAMETER:
                    continue
                need = self.needed(op, index)
                # Along time gradients add up where they arrive, whatever the layout says.
                start = self.stored(producer) if self.micro is None else (need[0], *self.stored(producer)[1:])
                steps = journey(producer.results[0].shape, start, need, self.mesh)
                names = {self.mesh.names[step.axis] for step in steps if step.forward is Collective.NONE}
                self.partial[value.op] = self.partial.get(value.op, names) & names

    def _call(self, op: Op, captured: fx.Node) -> None:
        target: Any = captured.target
        space = self.spaces.get(op.name)
        placement = self.placement(op)
        operands = [self._take(value, self.needed(op, i), op, i) for i, value in enumerate(op.operands)]
        # The fx node's own arguments, for they hold what the IR keeps as text (dtypes); tensors come in operand order.
        order = iter(operands)
        args = list(fx.map_arg(captured.args, lambda _: next(order)))
        kwargs = dict(fx.map_arg(captured.kwargs, lambda _: next(order)))
        if space is not None and space.shape_arg is not None:
            args[space.shape_arg] = list(local_shape(op.results[0].shape, self.made(Value(op.name)), self.mesh))
        splits = _kernel_splits(space, placement, self.mesh)
        if space is not None and space.kernel is not None and (splits or space.random):
            target = getattr(kernels, space.kernel)
            kwargs["splits"] = splits
            if self.micro is not None and op.name in self.micro.counted:
                kwargs["counted"] = self.whole_nodes[Whole(self.micro.counted[op.name], op.name)]
        elif self.splits_backward and is_deferrable(self.graph, self.spaces, op):
            target = DEFERRABLE[op.target]
        if self.device is not None and not op.operands and takes(captured.target, "device"):
            kwargs["device"] = self.device
        node = self.new.create_node("call_function", target, tuple(args), kwargs, name=op.name)
        node.meta["writes"] = facts_of(op, space).writes  # for `Recomputed`
        self._mark(node, op)
        if not isinstance(captured.meta["val"], (list, tuple)):
            self.nodes[Value(op.name)] = node
        else:
            for index in range(len(op.results)):
                item = self.new.call_function(operator.getitem, (node, index))
                self._mark(item, op)
                self.nodes[Value(op.name, index)] = item

    def find_wholes(self, stage: Stage) -> tuple[Whole, ...]:
        """What this stage needs of the whole batch, each once."""
        found: dict[Whole, None] = {}
        for name in stage.calls if self.micro is not None else ():
            op = self.graph.by_name[name]
            found.update((Whole(value), None) for index, value in enumerate(op.operands) if self._is_whole(value, self.needed(op, index)))
            if self.micro is not None and name in self.micro.counted:
                found[Whole(self.micro.counted[name], name)] = None
        return tuple(found)

    def find_ancestors(self, wholes: Sequence[Whole]) -> set[str]:
        """Names of all ops that make these."""
        needed: set[str] = set()
        waiting = [whole.value.op for whole in wholes]
        for loss in (self.graph.by_name[whole.loss] for whole in wholes if whole.loss):
            if (weight := self._target_mean_of(loss.name).weight) is not None:
                waiting.append(loss.operands[weight].op)
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += [value.op for value in self.graph.by_name[name].operands]
        return needed

    def _target_mean_of(self, loss: str) -> TargetMean:
        """How the mean over targets that the call `loss` is counts them."""
        mean = self.spaces[loss].facts.target_mean
        assert mean is not None
        return mean

    def _is_whole(self, value: Value, need: Layout) -> bool:
        """Whether an op that works on a micro-batch needs this value of the whole batch."""
        return (
            self.micro is not None
            and need[0].kind in (StateKind.REPLICATE, StateKind.BROADCAST)
            and self.made(value)[0].kind is not StateKind.REPLICATE
        )

    def _take(self, value: Value, need: Layout, op: Op, index: int) -> fx.Node:
        """The node that holds `value` in layout `need`; what several ops need alike is made once."""
        start = self.made(value)
        if self.micro is not None:
            if self._is_whole(value, need):
                return self._journey(self.whole_nodes[Whole(value)], value, (need[0], *start[1:]), need, op)
            start = self._split_in_time(value, start, need[0], op)
        return self._move(value, start, need, op)

    def _split_in_time(self, value: Value, start: Layout, need: State, op: Op) -> Layout:
        """Cut a micro-batch's part out of a value that is there whole; gives the layout in which `moved` has it afterwards."""
        after = (need, *start[1:])
        if start == after or (value, after) in self.moved:
            return after
        node = self.moved.get((value, start), self.nodes[value])
        if need.kind is StateKind.SHARD:
            whole = self._without(start, need, value)
            after = (need, *whole[1:])
            if (value, after) in self.moved:
                return after
            node = self._move(value, start, whole, op)
            outer = local_outer(after, self.mesh, 0)
            node = self.new.call_function(collectives.take_microbatch, (node, MICROBATCH, need.dim, outer))
            self._mark(node, op)
        elif need.kind is StateKind.PARTIAL:
            node = self.new.call_function(collectives.keep_in_first_microbatch, (node, MICROBATCH))
            self._mark(node, op)
        self.moved[value, after] = node
        return after

    def _without(self, start: Layout, time: State, value: Value) -> Layout:
        """A layout of a value that is there whole from which `time` can be cut: ranks' parts lie inside of a micro-batch's, not around."""
        along = [state for state in start if state.kind is StateKind.SHARD and state.dim == time.dim]
        nests = fits(self.graph.tensor(value).shape, (time, *start[1:]), self.mesh) and all(state.outer != time.outer for state in along)
        return start if nests or not along else tuple(REPLICATE if state in along else state for state in start)

    def _move(self, value: Value, start: Layout, need: Layout, op: Op) -> fx.Node:
        source = self.moved.get((value, start), self.nodes[value])
        if start == need:
            return source
        if (value, need) in self.moved:
            return self.moved[value, need]
        producer = self.graph.by_name[value.op]
        tensor = producer.results[value.index]
        steps = journey(tensor.shape, start, need, self.mesh)
        node = source
        for step in steps:
            node = self._emit(node, step, tensor, producer, op)
        # A gathered parameter is gathered for each use, as it was priced: kept for a later one, a tied embedding would lie
        # whole in memory from the first layer to the last.
        if producer.kind is not OpKind.PARAMETER or all(step.forward is not Collective.ALL_GATHER for step in steps):
            self.moved[value, need] = node
        return node

    def _journey(self, node: fx.Node, value: Value, start: Layout, need: Layout, op: Op) -> fx.Node:
        """A node of `value` in another layout, not remembered."""
        producer = self.graph.by_name[value.op]
        tensor = producer.results[value.index]
        for step in journey(tensor.shape, start, need, self.mesh):
            node = self._emit(node, step, tensor, producer, op)
        return node

    def _emit(self, x: fx.Node, step: ReshardStep, tensor: Tensor, producer: Op, consumer: Op) -> fx.Node:
        axis = self.mesh.names[step.axis]
        assert axis != MICROBATCH, "ranks can't exchange along time"
        kwargs: dict[str, Any] = {}
        args: tuple[Any, ...] = (x, axis)
        if step.forward is Collective.NONE:
            is_deferred = producer.kind is OpKind.PARAMETER and axis in self.partial.get(producer.name, ())
            if step.backward is Collective.NONE or not tensor.requires_grad or is_deferred:
                return x
            function: Any = collectives.broadcast
        elif step.forward is Collective.ALL_TO_ALL:
            function = collectives.all_to_all
            args = (x, axis, step.dim, step.to_dim)
            kwargs = {"from_outer": step.outer, "to_outer": step.to_outer}
            kwargs = {name: outer for name, outer in kwargs.items() if outer != 1}
        elif step.forward in (Collective.ALL_REDUCE, Collective.KEEP_FIRST):
            function = getattr(collectives, step.forward.value)
            if step.backward is Collective.ALL_REDUCE and tensor.requires_grad:
                kwargs["grad"] = "all_reduce"
        else:
            function = getattr(collectives, step.forward.value)
            args = (x, axis, step.dim)
            if step.outer != 1:
                kwargs["outer"] = step.outer
            if step.forward is Collective.ALL_GATHER:
                kwargs["grad"] = GRADIENT_OF_GATHER[step.backward]
                if producer.kind is OpKind.PARAMETER and tensor.requires_grad:
                    kwargs["save"] = False
                    self.regather = True
        node = self.new.call_function(function, args, kwargs)
        self._mark(node, consumer)
        return node

    def _mark(self, node: fx.Node, op: Op) -> None:
        """Note on a new node the op that it belongs to and the user's lines that the op came from."""
        node.meta["block"] = op.name if op.kind is OpKind.CALL else None
        trace = self.captured_nodes[op.name].meta.get("stack_trace") if op.kind is OpKind.CALL else None
        if trace is not None:
            node.meta["stack_trace"] = trace

    def slots(self, kind: OpKind) -> tuple[Slot, ...]:
        """Inputs of the program of one kind, in placeholder order."""
        return tuple(
            Slot(
                name=op.target,
                layout=self.plan.layouts[self.folded.representative[op.name]],
                shape=op.results[0].shape,
                dtype=op.results[0].dtype,
                partial_axes=tuple(name for name in self.plan.mesh.names if name in self.partial.get(op.name, ())),
                requires_grad=op.results[0].requires_grad,
            )
            for op in self.graph.of_kind(kind)
        )

    def output_slots(self) -> tuple[Slot, ...]:
        """Outputs of the program that are the user's, in order."""
        (output,) = self.graph.of_kind(OpKind.OUTPUT)
        number = len(output.operands) - len(self.captured.mutated_buffers)
        slots = []
        for position, value in enumerate(output.operands[:number]):
            tensor = self.graph.tensor(value)
            layout = self.joined(self.output_layout(position))
            slots.append(Slot(f"output {position}", layout, tensor.shape, tensor.dtype, (), tensor.requires_grad))
        return tuple(slots)


def _kernel_splits(space: Space | None, placement: Placement, mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """The split loops that need the op's kernel, with the axes that split them, outermost first."""
    splits: dict[str, tuple[str, ...]] = {}
    for part, name in zip(placement, mesh.names, strict=True):
        if space is not None and isinstance(part, Split) and part.loop in space.kernel_loops:
            splits[part.loop] = (*splits.get(part.loop, ()), name)
    return splits


def _name_of(value: Value) -> str:
    return f"{value.op}_{value.index}" if value.index else value.op
