"""What all ranks compute together, as one function of whole tensors that torch's ``gradcheck`` and ``gradgradcheck`` can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.checks import threads
from autopar.ir.layout import PARTIAL as P
from autopar.ir.layout import REPLICATE_PARTIAL_GRAD, Layout, Mesh, State, StateKind, outer_when_cut
from autopar.ops.parts import join_parts, take_part

RankFunction = Callable[..., tuple[Tensor, ...]]
"""From a rank's parts of the inputs to its parts of the results."""


@dataclass(frozen=True)
class OnRanks:
    """A function that every rank of a mesh runs on its parts.

    Called with whole tensors it returns whole tensors. Its backward runs the ranks' own backwards, each on its parts of the gradients, and
    is itself such a function of inputs and gradients: so it can be differentiated any number of times.

    Attributes:
        mesh: the ranks.
        function: what each rank runs, with its axes active.
        inputs, results: the layouts of the inputs and of the results.
    """

    mesh: Mesh
    function: RankFunction
    inputs: tuple[Layout, ...]
    results: tuple[Layout, ...]

    def __call__(self, *wholes: Tensor) -> Any:
        results: Any = _Joint.apply(self, *wholes)  # type: ignore[no-untyped-call]
        return results[0] if len(results) == 1 else results

    def run(self, wholes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = [
            [_part(x, layout, self.mesh, rank) for x, layout in zip(wholes, self.inputs, strict=True)]
            for rank in range(self.mesh.world_size)
        ]

        def work(rank: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return tuple(y.detach() for y in self.function(*(x.detach().requires_grad_() for x in parts[rank])))

        ranks = threads.run(self.mesh, work)
        return tuple(_join([rank[index] for rank in ranks], layout, self.mesh) for index, layout in enumerate(self.results))

    def backward(self) -> OnRanks:
        """From the inputs and the gradients of the results to the gradients of the inputs."""

        def function(*given: Tensor) -> tuple[Tensor, ...]:
            inputs, gradients = given[: len(self.inputs)], given[len(self.inputs) :]
            with torch.enable_grad():
                results = self.function(*inputs)
                pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if y.requires_grad]
                found = torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True)
            return tuple(torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True))

        return OnRanks(self.mesh, function, (*self.inputs, *map(_dual, self.results)), tuple(map(_dual, self.inputs)))


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on_ranks: OnRanks, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.on_ranks = on_ranks
        ctx.save_for_backward(*wholes)
        return on_ranks.run(wholes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Joint.apply(ctx.on_ranks.backward(), *ctx.saved_tensors, *gradients)  # type: ignore[no-untyped-call]


def _dual(layout: Layout) -> Layout:
    """The layout of the gradient: a Partial tensor's is whole on every rank that has a summand, and the other way round."""
    swapped = {StateKind.PARTIAL: REPLICATE_PARTIAL_GRAD, StateKind.REPLICATE_PARTIAL_GRAD: P}
    return tuple(swapped.get(state.kind, state) for state in layout)


def _part(whole: Tensor, layout: Layout, mesh: Mesh, rank: int) -> Tensor:
    """What a rank has of a tensor; a Partial one is divided into unequal summands."""
    for axis, (state, index) in enumerate(zip(layout, mesh.coordinates(rank), strict=True)):
        size = mesh.sizes[axis]
        if state.kind is StateKind.SHARD:
            whole = take_part(whole, state.dim, outer_when_cut(layout, mesh, axis), index, size)
        elif state.kind is StateKind.PARTIAL:
            whole = whole * (2.0 * (index + 1) / (size * (size + 1)))
    return whole


def _join(parts: Sequence[Tensor], layout: Layout, mesh: Mesh) -> Tensor:
    pieces = list(parts)
    for axis in reversed(range(len(layout))):
        state, size = layout[axis], mesh.sizes[axis]
        groups = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        pieces = [_join_group(group, state, outer_when_cut(layout, mesh, axis) if state.kind is StateKind.SHARD else 1) for group in groups]
    return pieces[0]


def _join_group(group: Sequence[Tensor], state: State, outer: int) -> Tensor:
    if state.kind is StateKind.SHARD:
        return join_parts(group, state.dim, outer)
    if state.kind is StateKind.PARTIAL:
        return torch.stack(list(group)).sum(0)
    for replica in group[1:]:
        torch.testing.assert_close(replica, group[0], rtol=1e-12, atol=1e-12)
    return group[0].clone()
