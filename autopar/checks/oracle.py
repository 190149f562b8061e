"""One check for all rules: split each loop of an op, run the op on every part, join the results, and compare with the whole op.

Comes in: an op, the space that its rule gave, and tensors. Goes out: the placements that were compared, each in values, gradients and
second derivatives. A wrong rule raises VerificationError with the placement, the tensor and the largest difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar import ir
from autopar.checks import threads
from autopar.errors import InputError, VerificationError
from autopar.ir import (
    PASS_PARTIAL,
    AxisPlacement,
    Layout,
    Mesh,
    Op,
    Operand,
    OpKind,
    Placement,
    Space,
    Split,
    State,
    StateKind,
    Value,
    format_placement,
    is_legal,
    local_outer,
    local_shape,
    operand_layout,
    result_layout,
)
from autopar.ops import kernels, take_part

# Relative and absolute, by type: sums in another order differ by a few units in the last place per addition.
_TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


# What operators raise for sizes that don't fit together; those of users may raise what they like.
_SIZES = (RuntimeError, IndexError, ValueError, TypeError, AssertionError)


@dataclass(frozen=True, slots=True)
class _Run:
    """One run on one rank.

    Attributes:
        results: the op's results.
        gradients: the gradients of the operands.
        operands: the operands afterwards, which the op may have updated.
        second: the gradients of ``sum(gradients * directions)``, of the operands.
        second_of_cotangents: likewise of the results' gradients, from which `gradients` were computed.
    """

    results: list[Tensor]
    gradients: list[Tensor | None]
    operands: list[Tensor]
    second: list[Tensor | None]
    second_of_cotangents: list[Tensor | None]


def trace(target: str, *args: Any, **kwargs: Any) -> tuple[Op, list[Tensor]]:
    """Call an operator of torch once on real tensors, as `trace_function` does."""
    function = find_function(target)
    assert function is not None, f"torch has no operator {target}"
    return trace_function(function, target, args, kwargs)


def trace_function(function: Callable[..., Any], target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Op, list[Tensor]]:
    """Call a function once on real tensors; returns the `Op` that capture would make of the call, and the tensors that it reads."""
    tensors: list[Tensor] = []

    def as_operand(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return Operand(len(tensors) - 1)
        return type(value)(as_operand(item) for item in value) if isinstance(value, (list, tuple)) else value

    op_args = tuple(as_operand(value) for value in args)
    op_kwargs = {name: as_operand(value) for name, value in kwargs.items()}
    operands = _copies(tensors)
    results = _results(function(*_fill(op_args, operands), **_fill_by_name(op_kwargs, operands)))
    values = tuple(Value(f"x{index}") for index in range(len(tensors)))
    return Op("op", OpKind.CALL, target, values, tuple(map(_describe, results)), op_args, op_kwargs), tensors


def describe(tensors: Sequence[Tensor]) -> tuple[ir.Tensor, ...]:
    """The tensors as a rule sees them."""
    return tuple(_describe(tensor) for tensor in tensors)


def placements(space: Space) -> Iterator[tuple[Mesh, Placement]]:
    """The placements that are compared: each loop split 2, 3 and 4 ways, also inside 2 and 3 blocks; Partial sums; pairs on two axes."""
    single: list[tuple[Mesh, Placement]] = []
    for loop in space.splittable:
        for outer in (1, 2, 3):
            single += [(Mesh(("x",), (size,)), (Split(loop.name, outer),)) for size in (2, 3, 4)]
    if space.linear:
        single.append((Mesh(("x",), (2,)), (PASS_PARTIAL,)))
    yield from ((mesh, placement) for mesh, placement in single if is_legal(space, placement, mesh))
    double = Mesh(("x", "y"), (2, 2))
    per_axis: list[AxisPlacement] = [
        None,
        *(Split(loop.name) for loop in space.splittable),
        *([PASS_PARTIAL] if space.linear else []),
    ]
    for pair in itertools.product(per_axis, per_axis):
        if any(pair) and is_legal(space, pair, double):
            yield double, pair


def check_space(
    op: Op,
    space: Space,
    tensors: Sequence[Tensor],
    function: Callable[..., Any] | None = None,
    unused: Collection[int] = (),
) -> tuple[str, ...]:
    """Compare an op that is split in every way that its space allows with the whole op, in values, gradients and second derivatives.

    Second derivatives are compared if the whole op has them.

    Args:
        op: the op, with the arguments of the call.
        space: the space that its rule gave.
        tensors: the op's operands; float64 ones that require a gradient are differentiated.
        function: the op, when `op.target` isn't one of torch's.
        unused: indices of results that only the op's own backward reads, and which a kernel needn't make.

    Returns the placements compared, as text. Raises VerificationError at the first difference.
    """
    function = function or find_function(op.target)
    assert function is not None, f"torch has no operator {op.target}"
    generator = torch.Generator().manual_seed(0)
    whole = _run(function, op.args, op.kwargs, tensors, None)
    cotangents = [_random(x, generator) if x.is_floating_point() or x.is_complex() else None for x in whole.results]
    directions: list[Tensor | None] | None = [_random(x, generator) if x.requires_grad else None for x in tensors]
    try:
        whole = _run(function, op.args, op.kwargs, tensors, cotangents, directions)
    except (InputError, NotImplementedError, RuntimeError):  # the op itself has no second derivative
        directions = None
        whole = _run(function, op.args, op.kwargs, tensors, cotangents)
    compared = []
    for mesh, placement in placements(space):
        text = f"{op.target} [{space}] split {format_placement(placement)} over {mesh}"
        try:
            runs = _run_split(function, op, space, mesh, placement, tensors, cotangents, directions, generator)
        except _SIZES as error:
            raise VerificationError(f"{text}: a part can't be run: {error}") from error
        _compare(space, mesh, placement, whole, runs, text, unused)
        compared.append(f"{format_placement(placement)} over {mesh}")
    return tuple(compared)


def _run_split(
    function: Callable[..., Any],
    op: Op,
    space: Space,
    mesh: Mesh,
    placement: Placement,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    directions: Sequence[Tensor | None] | None,
    generator: torch.Generator,
) -> list[_Run]:
    splits = splits_of(space, mesh, placement)
    if splits:
        function = getattr(kernels, space.kernel or "")
    args = list(op.args)
    if space.shape_arg is not None:
        shape = local_shape(op.results[0].shape, result_layout(space, placement, 0), mesh)
        args[space.shape_arg] = list(shape)
    operand_layouts = [operand_layout(space, placement, index) for index in range(len(tensors))]
    result_layouts = [result_layout(space, placement, index) for index in range(len(cotangents))]
    parts = [_scatter(tensor, layout, mesh, generator) for tensor, layout in zip(tensors, operand_layouts, strict=True)]
    # A Partial result's gradient is whole on every rank, as a Replicate one's.
    rank_cotangents = [
        [None if whole is None else _cut(whole, layout, mesh, rank) for whole, layout in zip(cotangents, result_layouts, strict=True)]
        for rank in range(mesh.world_size)
    ]
    kwargs = {**op.kwargs, "splits": splits} if splits else op.kwargs
    # The gradient's gradient has the operand's own state: the dual of the dual.
    rank_directions: Sequence[Sequence[Tensor | None] | None] = [None] * mesh.world_size
    if directions is not None:
        scattered = [
            [None] * mesh.world_size if direction is None else _scatter(direction, layout, mesh, generator)
            for direction, layout in zip(directions, operand_layouts, strict=True)
        ]
        rank_directions = [[shares[rank] for shares in scattered] for rank in range(mesh.world_size)]

    def run(rank: int) -> _Run:
        return _run(function, args, kwargs, [part[rank] for part in parts], rank_cotangents[rank], rank_directions[rank])

    return threads.run(mesh, run) if splits else [run(rank) for rank in range(mesh.world_size)]


def splits_of(space: Space, mesh: Mesh, placement: Placement) -> dict[str, tuple[str, ...]]:
    """The ``splits`` argument of a kernel: split loop that needs it -> the axes that split it, outermost first."""
    splits: dict[str, tuple[str, ...]] = {}
    for axis_placement, axis in zip(placement, mesh.names, strict=True):
        if isinstance(axis_placement, Split) and axis_placement.loop in space.kernel_loops:
            splits[axis_placement.loop] = (*splits.get(axis_placement.loop, ()), axis)
    return splits


def _compare(space: Space, mesh: Mesh, placement: Placement, whole: _Run, runs: list[_Run], text: str, unused: Collection[int]) -> None:
    for index, expected in enumerate(whole.results):
        if index in unused:
            continue
        pieces = [run.results[index] for run in runs]
        joined = _join(pieces, result_layout(space, placement, index), mesh, expected, f"{text}: result {index}")
        _expect(joined, expected, f"{text}: result {index}")
    for index, expected in enumerate(whole.operands):
        layout = operand_layout(space, placement, index)
        gradient = whole.gradients[index]
        if gradient is not None:
            rank_gradients = [(run.gradients[index], run.operands[index]) for run in runs]
            pieces = [torch.zeros_like(operand) if piece is None else piece for piece, operand in rank_gradients]
            dual = tuple(_DUAL.get(state.kind, state) for state in layout)
            _expect(_join(pieces, dual, mesh, gradient, f"{text}: gradient {index}"), gradient, f"{text}: gradient of operand {index}")
            _compare_second([run.second[index] for run in runs], whole.second[index], gradient, dual, mesh, f"{text}: operand {index}")
        elif not any(state.kind is StateKind.PARTIAL for state in layout):
            # Buffers that the op updates in place; an operand with a partial gradient is whole on every rank.
            same = tuple(State(StateKind.REPLICATE) if state.kind is StateKind.REPLICATE_PARTIAL_GRAD else state for state in layout)
            pieces = [run.operands[index] for run in runs]
            _expect(_join(pieces, same, mesh, expected, f"{text}: operand {index}"), expected, f"{text}: operand {index} afterwards")

    for index, expected in enumerate(whole.results):
        if index not in unused and expected.is_floating_point():
            pieces_of_cotangent = [run.second_of_cotangents[index] for run in runs]
            layout, of_whole = result_layout(space, placement, index), whole.second_of_cotangents[index]
            _compare_second(pieces_of_cotangent, of_whole, expected, layout, mesh, f"{text}: gradient of result {index}")


def _compare_second(pieces: list[Tensor | None], whole: Tensor | None, like: Tensor, layout: Layout, mesh: Mesh, text: str) -> None:
    """Compare a second derivative, which is of the shape of `like`; None stands for zeros."""
    expected = torch.zeros_like(like) if whole is None else whole
    parts = [piece for piece in pieces if piece is not None]
    if not parts:
        _expect(torch.zeros_like(like), expected, f"{text}: second derivative, which no rank has,")
        return
    joined = _join(
        [torch.zeros_like(parts[0]) if piece is None else piece for piece in pieces], layout, mesh, like, f"{text}: second derivative"
    )
    _expect(joined, expected, f"{text}: second derivative")


# State of an operand -> state of its gradient, where these differ.
_DUAL: Mapping[StateKind, State] = {
    StateKind.REPLICATE_PARTIAL_GRAD: State(StateKind.PARTIAL),
    StateKind.PARTIAL: State(StateKind.REPLICATE),
}


def _expect(actual: Tensor, expected: Tensor, text: str) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise VerificationError(f"{text} is {actual.dtype}{list(actual.shape)}, expected {expected.dtype}{list(expected.shape)}")
    tolerance = _TOLERANCE.get(expected.dtype, 0.0)
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
        wide = torch.complex128 if expected.is_complex() else torch.float64
        largest = (actual.to(wide) - expected.to(wide)).abs().max()
        raise VerificationError(f"{text} differs by up to {float(largest):.3g}, tolerance {tolerance}")


def _cut(whole: Tensor, layout: Layout, mesh: Mesh, rank: int) -> Tensor:
    """A rank's part of a tensor, which is whole on axes that don't split it."""
    axes = [axis for axis, state in enumerate(layout) if state.kind is StateKind.SHARD]
    for axis in sorted(axes, key=lambda axis: layout[axis].outer):  # coarse blocks first, as `local_outer` counts
        position = mesh.coordinates(rank)[axis]
        whole = take_part(whole, layout[axis].dim, local_outer(layout, mesh, axis), position, mesh.sizes[axis])
    return whole


def _scatter(whole: Tensor, layout: Layout, mesh: Mesh, generator: torch.Generator) -> list[Tensor]:
    """Every rank's part of a tensor; on Partial axes it becomes random summands."""
    values: dict[tuple[int, ...], Tensor] = {(): whole}
    for state, size in zip(layout, mesh.sizes, strict=True):
        finer: dict[tuple[int, ...], Tensor] = {}
        for coordinates, value in values.items():
            shares = [value] * size
            if state.kind is StateKind.PARTIAL:
                shares = [_random(value, generator) for _ in range(size - 1)]
                shares.append(value.detach() - sum(shares))
                shares = [share.requires_grad_(value.requires_grad) for share in shares]
            finer |= {(*coordinates, position): share for position, share in enumerate(shares)}
        values = finer
    return [_cut(values[mesh.coordinates(rank)], layout, mesh, rank) for rank in range(mesh.world_size)]


def _join(pieces: Sequence[Tensor], layout: Layout, mesh: Mesh, like: Tensor, text: str) -> Tensor:
    """The whole tensor from the ranks' parts: summed over Partial axes, equal over Replicate axes, joined over Shard axes."""
    places = torch.arange(like.numel(), device=like.device).view(like.shape)
    merged: dict[tuple[int, ...], Tensor] = {}
    for rank, piece in enumerate(pieces):
        coordinates = mesh.coordinates(rank)
        key = tuple(index if state.kind is not StateKind.PARTIAL else 0 for index, state in zip(coordinates, layout, strict=True))
        merged[key] = piece if key not in merged else merged[key] + piece
    joined = torch.zeros_like(like, memory_format=torch.contiguous_format)
    replica_of: dict[tuple[int, ...], Tensor] = {}
    for coordinates, piece in merged.items():
        rank = sum(index * stride for index, stride in zip(coordinates, _strides(mesh), strict=True))
        rank_places = _cut(places, layout, mesh, rank)
        if piece.shape != rank_places.shape:
            raise VerificationError(f"{text} has sizes {tuple(piece.shape)} on rank {rank}, expected {tuple(rank_places.shape)}")
        shards = tuple(index for index, state in zip(coordinates, layout, strict=True) if state.kind is StateKind.SHARD)
        _expect(piece, replica_of.setdefault(shards, piece), f"{text} isn't the same on replicas: rank {rank}")
        joined.view(-1)[rank_places.reshape(-1)] = piece.reshape(-1).to(joined.dtype)
    return joined


def _strides(mesh: Mesh) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(mesh.sizes[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor | None] | None,
    directions: Sequence[Tensor | None] | None = None,
) -> _Run:
    """Run the op, its backward from `cotangents`, and the backward's backward from `directions`."""
    operands = _copies(tensors)
    results = _results(function(*_fill(args, operands), **_fill_by_name(kwargs, operands)))
    gradients: list[Tensor | None] = [None] * len(operands)
    second: list[Tensor | None] = [None] * len(operands)
    second_of_cotangents: list[Tensor | None] = [None] * len(results)
    starts = {
        index: gradient.detach().requires_grad_(directions is not None)
        for index, gradient in enumerate(cotangents or [])
        if gradient is not None and results[index].requires_grad
    }
    trained = [index for index, operand in enumerate(operands) if operand.requires_grad]
    if starts and trained:
        leaves = [operands[index] for index in trained]
        computed = torch.autograd.grad(
            [results[index] for index in starts], leaves, [*starts.values()], allow_unused=True, create_graph=directions is not None
        )
        for index, gradient in zip(trained, computed, strict=True):
            gradients[index] = None if gradient is None else gradient.detach()
        pairs = [
            (g, directions[index]) for index, g in zip(trained, computed, strict=True) if directions and g is not None and g.requires_grad
        ]
        if pairs:
            again = torch.autograd.grad(
                [g for g, _ in pairs], [*leaves, *starts.values()], [direction for _, direction in pairs], allow_unused=True
            )
            for index, derivative in zip(trained, again, strict=False):
                second[index] = derivative
            for index, derivative in zip(starts, again[len(trained) :], strict=True):
                second_of_cotangents[index] = derivative
    return _Run([y.detach() for y in results], gradients, [x.detach() for x in operands], second, second_of_cotangents)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]


def _fill(args: Any, operands: Sequence[Tensor]) -> Any:
    if isinstance(args, Operand):
        return operands[args.index]
    return type(args)(_fill(item, operands) for item in args) if isinstance(args, (list, tuple)) else args


def _fill_by_name(kwargs: Mapping[str, Any], operands: Sequence[Tensor]) -> dict[str, Any]:
    return {name: value if name == "splits" else _fill(value, operands) for name, value in kwargs.items()}


def find_function(target: str) -> Callable[..., Any] | None:
    """The operator of this name, ``aten.linear.default``; None when none is loaded."""
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)


def _results(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _describe(tensor: Tensor) -> ir.Tensor:
    return ir.Tensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)
