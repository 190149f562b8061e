"""Runs a plan on all ranks in one process and compares it with the model itself: outputs, every gradient, updated buffers.

Comes in: a model, an example batch, and a plan. Goes out: a `Verification`, the largest relative error of each tensor. Two comparisons are
made: the captured graph with the model in the model's own dtype, and the ranks' program with the captured graph in float64, where rounding
can't hide a mistake.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.capture import Captured, ExampleInputs, call_in_precision, capture, split_call
from autopar.checks import threads
from autopar.checks.shards import cut, join
from autopar.errors import InputError, VerificationError
from autopar.ir import PARTIAL, PIPELINE, Layout, Mesh, OpKind, Split, StateKind, with_pipeline
from autopar.ops import AUTOCAST_OFF, Autocast, comm, regather
from autopar.plans import Plan
from autopar.rewrite import CrossingTensor, Program, Slot, rewrite
from autopar.runtime import Executor, StageTensors

ZERO_SCALE = 1e-6
"""Gradients smaller than the largest one by this factor are compared on its scale: some are zero but for rounding (a key's bias)."""

CHECKS_NOTHING = 0.1
"""A relative error from which on an accepted difference can be a wrong result: a tenth of a tensor's size."""


@dataclass(frozen=True)
class Verification:
    """What was compared, and by how much it differed.

    Attributes:
        errors: name of an output, gradient or updated buffer -> its largest relative error, in float64.
        capture_error: largest relative difference between the captured graph and the model, in the model's own dtype.
        rounding: the `capture_error` that is accepted.
        tolerance: the largest of `errors` that is accepted.
        splits: ``axis:loop`` -> how many placements of the plan split that loop over that axis, so that a plan that splits nothing shows.
        plan: the plan that was run.
    """

    errors: Mapping[str, float]
    capture_error: float
    rounding: float
    tolerance: float
    splits: Mapping[str, int]
    plan: Plan

    @property
    def worst(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values())

    @property
    def ok(self) -> bool:
        """Whether something was compared and everything agrees."""
        return bool(self.errors) and self.worst <= self.tolerance and self.capture_error <= self.rounding

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the comparisons can't have shown, and how to check it; a sentence each."""
        remarks: list[str] = []
        if self.rounding >= CHECKS_NOTHING:
            remarks.append(
                f"the captured graph was not checked against the model: in the model's dtype a relative error of {self.rounding:.2g} may be"
                " rounding, so any graph would pass; verify the model in float32 or float64, outside of torch.autocast"
            )
        if self.tolerance >= CHECKS_NOTHING:
            remarks.append(f"the plan was not checked: with a tolerance of {self.tolerance:g} wrong results pass; leave the tolerance out")
        if self.plan.world_size == 1:
            remarks.append("the plan is for one rank, so nothing that is split was checked; verify more ranks")
        elif not self.splits and self.plan.pipeline.ranks == 1:
            remarks.append("the plan splits nothing, every rank runs all of the model, so nothing that is split was checked; pin an axis")
        return tuple(remarks)

    def check(self) -> None:
        """Raises VerificationError that names what disagrees, the largest errors first."""
        if self.capture_error > self.rounding:
            raise VerificationError(
                f"the captured graph disagrees with the model: relative error {self.capture_error:.2e}, {self.rounding:.0e} accepted. "
                "If the model draws random numbers, set dropout to 0 or call eval()"
            )
        if not self.ok:
            largest = sorted(((error, name) for name, error in self.errors.items() if not error <= self.tolerance), reverse=True)[:8]
            lines = "\n".join(f"  {name}: relative error {error:.2e}" for error, name in largest)
            mesh = with_pipeline(self.plan.mesh, self.plan.pipeline.ranks)
            raise VerificationError(f"plan on {mesh} disagrees with the model (tolerance {self.tolerance:g}):\n{lines}")


@dataclass(frozen=True)
class _Run:
    """Outputs, gradients by parameter name and updated buffers by name."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """What plans of one model and batch are compared with; made by `prepare_reference`.

    Attributes:
        captured: the graph that plans are made for.
        wide: the same graph in float64.
        tensors: parameters, buffers and constants by name, in float64.
        inputs: the flat tensors of the batch, in float64.
        run: what the wide graph computes on one device.
        capture_error, rounding: as in `Verification`.
    """

    captured: Captured
    wide: Captured
    tensors: Mapping[str, Tensor]
    inputs: Sequence[Tensor]
    run: _Run
    capture_error: float
    rounding: float


def verify_plan(model: nn.Module, example_inputs: ExampleInputs, plan: Plan, *, tolerance: float = 1e-9) -> Verification:
    """Run all ranks of a plan, and compare them with the model.

    First the captured graph is compared with the model, in the model's own dtype and up to its rounding. Then the ranks' program is
    compared with the captured graph in float64, with every cast to a narrower float raised to float64: only the order of sums may differ.
    The backward starts from fixed random gradients of all outputs, so that each of them counts. Inside of ``torch.autocast``, the model is
    captured and run so.

    Args:
        model: a model with real parameters that computes the same twice (no dropout).
        example_inputs: one global batch, with values.
        plan: the plan to check.
        tolerance: the relative error that is accepted in float64.

    Raises PlanError when the plan was made for another graph, InputError for a model on the meta device.
    """
    captured = capture(model, example_inputs, precision=plan.precision)
    return verify_against(prepare_reference(model, example_inputs, captured), plan, tolerance=tolerance)


def prepare_reference(model: nn.Module, example_inputs: ExampleInputs, captured: Captured) -> Reference:
    """Run the model and its captured graph on one device, which serves any number of plans.

    Raises InputError for a model on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("verification runs the model: build it with real parameters, not on the meta device")
    autocast = Autocast.now()
    with AUTOCAST_OFF.active():
        return _prepare(model, example_inputs, captured, autocast)


def _prepare(model: nn.Module, example_inputs: ExampleInputs, captured: Captured, autocast: Autocast) -> Reference:
    inputs = captured.bind(*split_call(example_inputs))
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    tensors.update(captured.constants)
    capture_error = _capture_error(model, captured, example_inputs, tensors, inputs, autocast)
    wide = widen(captured)
    inputs = [_wide(x) for x in inputs]
    # Copies, since the caller may change the model later.
    tensors = {name: _wide(tensor).clone() for name, tensor in tensors.items()}
    run = _run_graph(wide, tensors, inputs)
    return Reference(captured, wide, tensors, inputs, run, capture_error, _rounding(captured))


def verify_against(reference: Reference, plan: Plan, *, tolerance: float = 1e-9) -> Verification:
    """`verify_plan` with a reference that was prepared before. Raises PlanError for a plan of another graph."""
    program = _widen_program(rewrite(reference.wide, plan))
    with AUTOCAST_OFF.active():
        actual, disagreements = _run_program(program, reference.tensors, reference.inputs, reference.run)
    errors = _compare(reference.run, actual)
    for name, disagreement in disagreements.items():
        errors[name] = max(errors.get(name, 0.0), disagreement)
    return Verification(errors, reference.capture_error, reference.rounding, tolerance, count_splits(plan), plan)


def widen(captured: Captured) -> Captured:
    """The graph with every float dtype that it names raised to float64, and complex ones to complex128; the same plans fit it."""
    module = copy.deepcopy(captured.fx)
    _widen_nodes(module)
    constants = {name: _wide(tensor) for name, tensor in captured.constants.items()}
    return dataclasses.replace(captured, fx=module, constants=constants)


def _widen_nodes(module: fx.GraphModule) -> None:
    """Raise every float dtype that a call of the graph names, in place."""

    def raised(value: Any) -> Any:
        return _wide_dtype(value) if isinstance(value, torch.dtype) else value

    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, raised)
            node.kwargs = fx.node.map_aggregate(node.kwargs, raised)
    module.recompile()


def _widen_program(program: Program) -> Program:
    """The program, with float64 in the place of narrower floats where it casts parameters, and in messages between stages."""
    modules = [program.module] if program.pipeline is None else [stage.module for stage in program.pipeline.stages.values()]
    for module in (child for outer in modules for child in outer.modules()):
        if isinstance(module, fx.GraphModule):
            _widen_nodes(module)
    if program.pipeline is None:
        return program

    def raised(tensor: CrossingTensor) -> CrossingTensor:
        return dataclasses.replace(tensor, dtype=_wide_dtype(tensor.dtype))

    stages = {
        number: dataclasses.replace(
            stage,
            receives={peer: tuple(map(raised, crossing)) for peer, crossing in stage.receives.items()},
            sends={peer: tuple((index, raised(tensor)) for index, tensor in sent) for peer, sent in stage.sends.items()},
        )
        for number, stage in program.pipeline.stages.items()
    }
    return dataclasses.replace(program, pipeline=dataclasses.replace(program.pipeline, stages=stages))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The widest dtype of the same kind: float64 for floats, complex128 for complex numbers."""
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide_dtype(tensor.dtype))


def _rounding(captured: Captured) -> float:
    """By how much another order of operations may change a result in the dtypes that the program computes in, relative to its size."""
    dtypes = {getattr(torch, tensor.dtype) for op in captured.graph.ops for tensor in op.results}
    narrowest = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=2**-52)
    # Transformers compute norms and losses in float32 whatever the model's dtype.
    return 1000 * max(narrowest, torch.finfo(torch.float32).eps)


def _capture_error(
    model: nn.Module,
    captured: Captured,
    example_inputs: ExampleInputs,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    autocast: Autocast,
) -> float:
    """Largest relative difference between the model's own outputs and gradients and those of its captured graph."""
    twin = copy.deepcopy(model)
    args, kwargs = split_call(example_inputs)
    with autocast.active():
        returned = call_in_precision(twin, args, kwargs, captured.precision)
    outputs = _outputs(captured, returned)
    _weighted_backward(outputs)
    gradients = {name: p.grad.detach() for name, p in twin.named_parameters() if p.grad is not None}
    buffers = {name: buffer.detach() for name, buffer in twin.named_buffers()}
    read = {op.target: getattr(torch, op.results[0].dtype) for op in captured.graph.of_kind(OpKind.PARAMETER)}
    actual = _run_graph(captured, {name: tensor.to(read.get(name, tensor.dtype)) for name, tensor in tensors.items()}, inputs)
    return max(_compare(_Run(outputs, gradients, buffers), actual).values(), default=0.0)


def _weighted_backward(outputs: Sequence[Tensor]) -> None:
    weighted = [(out, _weights(out, position)) for position, out in enumerate(outputs)]
    pairs = [(out, weight) for out, weight in weighted if weight is not None]
    torch.autograd.backward([out for out, _ in pairs], [weight for _, weight in pairs])


def _run_graph(captured: Captured, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> _Run:
    """Forward and backward of the captured graph on one device."""
    trained = {op.target for op in captured.graph.of_kind(OpKind.PARAMETER) if op.results[0].requires_grad}
    parameters = [tensors[name].detach().clone().requires_grad_(name in trained) for name in captured.parameters]
    buffers = [tensors[name].detach().clone() for name in captured.buffers]
    results = list(captured.fx(*parameters, *buffers, *inputs))
    outputs = results[: len(results) - len(captured.mutated_buffers)]
    _weighted_backward(outputs)
    gradients = {n: p.grad for n, p in zip(captured.parameters, parameters, strict=True) if p.grad is not None}
    updated = dict(zip(captured.buffers, buffers, strict=True))
    updated.update(zip(captured.mutated_buffers, results[len(outputs) :], strict=True))
    return _Run(outputs, gradients, {name: buffer.detach() for name, buffer in updated.items()})


def count_splits(plan: Plan) -> dict[str, int]:
    """How many placements split a loop over an axis, by ``tp:o``, and how many tensors are stored split over it, by ``dp:store``."""
    counts: Counter[str] = Counter()
    for placement in plan.placements.values():
        for axis, axis_placement in zip(plan.mesh.names, placement, strict=True):
            if isinstance(axis_placement, Split):
                counts[f"{axis}:{axis_placement.loop}"] += 1
    for layout in plan.layouts.values():
        for axis, state in zip(plan.mesh.names, layout, strict=True):
            if state.kind is StateKind.SHARD:
                counts[f"{axis}:store"] += 1
    return dict(counts)


def _weights(tensor: Tensor, position: int) -> Tensor | None:
    """Fixed random numbers as the gradient of an output; None for an output without one."""
    if not tensor.is_floating_point() or not tensor.requires_grad:
        return None
    generator = torch.Generator().manual_seed(position)
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


@dataclass(frozen=True, slots=True)
class _Position:
    """Stands for output `index` in the user's structure."""

    index: int


def _outputs(captured: Captured, returned: Any) -> list[Tensor]:
    """The model's own outputs in the order of the captured ones; what capture dropped (a cache) is left out."""
    count = sum(not constant for constant, _ in captured.results.constants)
    outputs: dict[int, Tensor] = {}

    def walk(template: Any, value: Any) -> None:
        if isinstance(template, _Position):
            outputs[template.index] = value
        elif isinstance(template, Mapping):
            for key, item in template.items():
                walk(item, value[key])
        elif isinstance(template, tuple | list):
            for item, inner in zip(template, value, strict=False):
                walk(item, inner)

    walk(captured.unflatten([_Position(index) for index in range(count)]), returned)
    return [outputs[index] for index in range(count)]


@dataclass(frozen=True)
class _Parts:
    """What one rank has at the end: its parts of outputs by position, of gradients and of updated buffers by name."""

    outputs: Mapping[int, Tensor]
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


def _run_program(
    program: Program, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], reference: _Run
) -> tuple[_Run, dict[str, float]]:
    """The program's outputs, gradients and buffers, joined from all ranks; and by name the relative difference between replicas."""
    mesh = program.mesh
    weights = [_weights(tensor, position) for position, tensor in enumerate(reference.outputs)]
    work = _run_whole if program.pipeline is None else _run_stages
    pipeline_ranks = 1 if program.pipeline is None else program.pipeline.schedule.ranks
    ranks = threads.run(with_pipeline(mesh, pipeline_ranks), lambda rank: work(program, tensors, inputs, weights, rank))
    by_pipeline_rank = [ranks[start : start + mesh.world_size] for start in range(0, len(ranks), mesh.world_size)]
    disagreements: dict[str, float] = {}

    def whole(name: str, parts: list[Tensor], layout: Layout) -> Tensor:
        joined = join(parts, layout, mesh)
        size = float(joined.whole.abs().max()) if joined.whole.is_floating_point() and joined.whole.numel() else 1.0
        disagreements[name] = joined.disagreement / max(size, ZERO_SCALE)
        return joined.whole

    outputs = [
        whole(slot.name, [rank.outputs[i] for rank in by_pipeline_rank[slot.owner]], slot.layout) for i, slot in enumerate(program.outputs)
    ]
    gradients = {}
    for slot in program.parameters:
        layout = tuple(PARTIAL if name in slot.partial_axes else state for name, state in zip(mesh.names, slot.layout, strict=True))
        # Of each pipeline rank that has a gradient of it, what the ranks of its mesh have.
        users = [by_pipeline_rank[user] for user in slot.users if slot.name in by_pipeline_rank[user][0].gradients]
        if users:
            summed = [
                sum((user[rank].gradients[slot.name] for user in users[1:]), users[0][rank].gradients[slot.name])
                for rank in range(mesh.world_size)
            ]
            gradients[slot.name] = whole(f"gradient of {slot.name}", summed, layout)
    buffers = {s.name: whole(s.name, [rank.buffers[s.name] for rank in by_pipeline_rank[s.owner]], s.layout) for s in program.buffers}
    return _Run(outputs, gradients, buffers), disagreements


def _part(slot: Slot, tensors: Mapping[str, Tensor], mesh: Mesh, rank: int) -> Tensor:
    local = cut(tensors[slot.name].detach(), slot.layout, mesh, rank).clone()
    return local.requires_grad_(slot.requires_grad)


def _run_whole(
    program: Program, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor | None], rank: int
) -> _Parts:
    """One rank of a program that runs the whole model on the whole batch."""
    mesh = program.mesh
    parameters = [_part(slot, tensors, mesh, rank) for slot in program.parameters]
    buffers = [_part(slot, tensors, mesh, rank) for slot in program.buffers]
    given = [cut(x, slot.layout, mesh, rank) for x, slot in zip(inputs, program.inputs, strict=True)]
    with regather(program.prefetch):
        results = list(program.module(*parameters, *buffers, *given))
    outputs = results[: len(program.outputs)]
    weighted = [(position, weight) for position, weight in enumerate(weights) if weight is not None]
    torch.autograd.backward(
        [outputs[position] for position, _ in weighted],
        [cut(weight, program.outputs[position].layout, mesh, rank).contiguous() for position, weight in weighted],
    )
    gradients = {s.name: p.grad for s, p in zip(program.parameters, parameters, strict=True) if p.grad is not None}
    updated = {s.name: b for s, b in zip(program.buffers, buffers, strict=True)}
    updated.update(zip(program.mutated_buffers, results[len(program.outputs) :], strict=True))
    return _Parts(dict(enumerate(out.detach() for out in outputs)), gradients, {n: b.detach() for n, b in updated.items()})


def _run_stages(
    program: Program, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor | None], rank: int
) -> _Parts:
    """One rank of a pipeline: its stages, on all micro-batches."""
    mesh, pipeline = program.mesh, program.pipeline
    assert pipeline is not None
    pipeline_rank, mesh_rank = divmod(rank, mesh.world_size)
    axes = dict(comm.current())
    axis = axes.pop(PIPELINE, comm.alone(PIPELINE))
    input_parts = [cut(x, slot.layout, mesh, mesh_rank) for x, slot in zip(inputs, program.inputs, strict=True)]
    leaves = {slot.name: _part(slot, tensors, mesh, mesh_rank) for slot in program.parameters if pipeline_rank in slot.users}
    buffers = {slot.name: _part(slot, tensors, mesh, mesh_rank) for slot in program.buffers if pipeline_rank in slot.users}
    stage_tensors = {
        stage: StageTensors(
            [leaves[program.parameters[position].name] for position in stage_program.parameters],
            [buffers[program.buffers[position].name] for position in stage_program.buffers],
            input_parts,
        )
        for stage, stage_program in pipeline.stages.items()
        if pipeline.schedule.rank_of[stage] == pipeline_rank
    }
    output_gradients = {
        i: cut(w, slot.layout, mesh, mesh_rank).contiguous()
        for i, (w, slot) in enumerate(zip(weights, program.outputs, strict=True))
        if w is not None
    }
    executor = Executor(
        pipeline,
        pipeline.schedule,
        pipeline_rank,
        axis,
        axes,
        stage_tensors,
        output_gradients=output_gradients,
        regathers=True,
        ahead=program.prefetch,
    )
    executor.run()
    assert executor.is_idle, "a schedule ended with micro-batches still under way"
    outputs = {i: executor.join(i) for i, slot in enumerate(program.outputs) if slot.owner == pipeline_rank}
    updates = dict(enumerate(program.mutated_buffers, len(program.outputs)))
    buffers.update({updates[i]: executor.join(i) for i in [*executor.output_parts] if i in updates})
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return _Parts(outputs, gradients, buffers)


def _compare(reference: _Run, actual: _Run) -> dict[str, float]:
    errors: dict[str, float] = {}
    for position, (expected, output) in enumerate(zip(reference.outputs, actual.outputs, strict=True)):
        errors[f"output {position}"] = _relative(output, expected, 0.0)
    largest = max((float(g.abs().max()) for g in reference.gradients.values() if g.numel()), default=0.0)
    for name, expected in reference.gradients.items():
        if name in actual.gradients:
            errors[f"gradient of {name}"] = _relative(actual.gradients[name], expected, ZERO_SCALE * largest)
        else:
            errors[f"gradient of {name}"] = float("inf") if expected.abs().max() > 0 else 0.0
    for name, expected in reference.buffers.items():
        if name in actual.buffers:
            errors[f"buffer {name}"] = _relative(actual.buffers[name], expected, 0.0)
    return errors


def _relative(actual: Tensor, expected: Tensor, floor: float) -> float:
    """The largest difference relative to the largest expected element, or to `floor` if that is larger."""
    actual, expected = actual.detach(), expected.detach()
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    scale = max(float(expected.abs().max()), floor)
    difference = float((actual - expected).abs().max())
    if difference == 0.0:
        return 0.0
    # A NaN compares as neither small nor large; it is the worst there is.
    return difference / scale if scale and math.isfinite(difference) else float("inf")
