"""Captured graph + plan -> the local program of a rank, with explicit collectives that name mesh axes.

The same program serves every rank; what differs by rank (which part is mine) is asked of the axis at run time. The input graph is
left as it is. Collectives come from `reshard.journey` alone; a tensor that several ops need alike is moved once.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autopar import collectives, kernels
from autopar.capture import Captured
from autopar.ir import Graph, Op, OpKind, Tensor, Value
from autopar.layers import Folded, fan_key, fold
from autopar.layout import (
    REPLICATE,
    Layout,
    Mesh,
    Placement,
    Split,
    local_shape,
    operand_layout,
    result_layout,
)
from autopar.outline import outline
from autopar.planner import check_fits
from autopar.plans import Plan
from autopar.program import Program, Slot
from autopar.reshard import Collective, Step, journey
from autopar.rules import find_spaces
from autopar.space import Space

GRADIENT_OF_GATHER = {Collective.REDUCE_SCATTER: "reduce_scatter", Collective.SLICE: "slice"}


def rewrite(captured: Captured, plan: Plan, device: torch.device | None = None) -> Program:
    """Carry out `plan` on `captured`; new tensors that the program makes are made on `device`.

    Raises PlanError when the plan was made for another graph.
    """
    check_fits(plan, captured.graph)
    folded = fold(captured.graph)
    spaces, _ = find_spaces(captured.graph)
    work = _Rewriter(captured, plan, folded, spaces, device)
    module = work.run()
    return Program(
        module=outline(module, folded),
        mesh=plan.mesh,
        parameters=work.slots(OpKind.PARAMETER),
        buffers=work.slots(OpKind.BUFFER),
        inputs=work.slots(OpKind.INPUT),
        outputs=work.output_slots(),
        mutated_buffers=captured.mutated_buffers,
        batch_axes=plan.batch_axes,
        regather=work.regather,
        captured=captured,
    )


class _Rewriter:
    """Builds the new graph op by op; lives for one rewrite."""

    def __init__(self, captured: Captured, plan: Plan, folded: Folded, spaces: Mapping[str, Space], device: torch.device | None) -> None:
        self.captured = captured
        self.graph: Graph = captured.graph
        self.plan = plan
        self.mesh: Mesh = plan.mesh
        self.folded = folded
        self.spaces = spaces
        self.device = device
        self.new = fx.Graph()
        self.nodes: dict[Value, fx.Node] = {}
        self.moved: dict[tuple[Value, Layout], fx.Node] = {}
        self.captured_nodes: dict[str, fx.Node] = {node.name: node for node in captured.fx.graph.nodes}
        self.partial: dict[str, set[str]] = {}
        self.regather = False
        self.whole: Layout = tuple(REPLICATE for _ in plan.mesh.sizes)

    def run(self) -> fx.GraphModule:
        captured = self.captured_nodes
        self._find_deferred()
        for op in self.graph.ops:
            if op.kind is OpKind.OUTPUT:
                results = [self._take(v, self.output_layout(i), op, i) for i, v in enumerate(op.operands)]
                self.new.output(tuple(results))
            elif op.kind is OpKind.CALL:
                self._call(op, captured[op.name])
            else:
                node = self.new.placeholder(op.name)
                node.meta["block"] = None
                self.nodes[Value(op.name)] = node
        self.new.eliminate_dead_code()
        module = fx.GraphModule(self.captured.fx, self.new, class_name="LocalProgram")
        self.new.lint()
        return module

    def placement(self, op: Op) -> Placement:
        """The plan's placement of a call."""
        return self.plan.placements[self.folded.representative[op.name]]

    def stored(self, op: Op) -> Layout:
        """The plan's layout of a parameter, buffer or input."""
        return self.plan.layouts[self.folded.representative[op.name]]

    def output_layout(self, position: int) -> Layout:
        """The plan's layout of an output tensor."""
        return self.plan.layouts[f"output:{position}"]

    def made(self, value: Value) -> Layout:
        """The layout in which `value` is produced."""
        op = self.graph.by_name[value.op]
        if op.kind is not OpKind.CALL:
            return self.stored(op)
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
                steps = journey(producer.results[0].shape, self.stored(producer), self.needed(op, index), self.mesh)
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
        if _is_factory(op) and self.device is not None:
            kwargs["device"] = self.device
        node = self.new.create_node("call_function", target, tuple(args), kwargs, name=op.name)
        self._mark(node, op)
        if not isinstance(captured.meta["val"], (list, tuple)):
            self.nodes[Value(op.name)] = node
        else:
            for index in range(len(op.results)):
                item = self.new.call_function(operator.getitem, (node, index))
                self._mark(item, op)
                self.nodes[Value(op.name, index)] = item

    def _take(self, value: Value, need: Layout, op: Op, index: int) -> fx.Node:
        """The node that holds `value` in layout `need`, by way of the fan-out when the plan has one."""
        representative = self.folded.representative
        key = fan_key(Value(representative[value.op], value.index), op.target, index)
        start = self.made(value)
        if key in self.plan.layouts:
            between = self.plan.layouts[key]
            if between != need:
                self._move(value, start, between, op)
                return self._move(value, between, need, op, base=self.moved.get((value, between)))
        return self._move(value, start, need, op)

    def _move(self, value: Value, start: Layout, need: Layout, op: Op, base: fx.Node | None = None) -> fx.Node:
        source = base if base is not None else self.nodes[value]
        if start == need:
            return source
        if (value, need) in self.moved:
            return self.moved[value, need]
        producer = self.graph.by_name[value.op]
        tensor = producer.results[value.index]
        node = source
        steps = journey(tensor.shape, start, need, self.mesh)
        for step in steps:
            node = self._emit(node, step, tensor, producer, op)
        # A gathered parameter is gathered for each use, as it was priced: kept for a later one, a tied embedding would lie
        # whole in memory from the first layer to the last.
        if producer.kind is not OpKind.PARAMETER or all(step.forward is not Collective.ALL_GATHER for step in steps):
            self.moved[value, need] = node
        return node

    def _emit(self, x: fx.Node, step: Step, tensor: Tensor, producer: Op, consumer: Op) -> fx.Node:
        axis = self.mesh.names[step.axis]
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
                    kwargs["keep"] = False
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
                layout=self.stored(op),
                shape=op.results[0].shape,
                dtype=op.results[0].dtype,
                partial_axes=tuple(name for name in self.mesh.names if name in self.partial.get(op.name, ())),
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
            layout = self.output_layout(position)
            slots.append(Slot(f"output {position}", layout, tensor.shape, tensor.dtype, (), tensor.requires_grad))
        return tuple(slots)


def _kernel_splits(space: Space | None, placement: Placement, mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """The split loops that need the op's kernel, with the axes that split them, outermost first."""
    splits: dict[str, tuple[str, ...]] = {}
    for part, name in zip(placement, mesh.names, strict=True):
        if space is not None and isinstance(part, Split) and part.loop in space.kernel_loops:
            splits[part.loop] = (*splits.get(part.loop, ()), name)
    return splits


_FACTORIES = ("arange", "full", "zeros", "ones", "empty", "eye", "scalar_tensor", "rand", "randn", "linspace")


def _is_factory(op: Op) -> bool:
    return not op.operands and op.target.split(".")[1] in _FACTORIES
