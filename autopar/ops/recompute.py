"""Regions of a program whose activations aren't saved: the backward runs them again (activation checkpointing).

Comes in: a submodule of an emitted program, whose inputs are all that it reads. Goes out: a module that computes the same, of which
autograd saves only those inputs. `torch.utils.checkpoint` does the work; added is what it can't know of a program: which axes the names in
a region stand for, which numbers seeded its random masks, and which buffers it updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from autopar.ops import comm, rng
from autopar.ops.gathers import Use
from autopar.ops.weight_gradients import in_recomputed_region


class Recomputed(nn.Module):
    """A region of a program of which autograd saves the inputs only; the backward runs it again, as far as it needs to.

    It may be called many times before the first backward (micro-batches in flight), and its backward may run on another thread. A parameter
    that is gathered inside is gathered once more, for the recomputation and the backward together, with `gathers.regather` or without.
    Where the program begins that gather ahead, the backward does so too.
    Buffers that the region updates are updated once, not again by the recomputation.

    Args:
        module: a graph module whose placeholders are all that it reads, and that draws its random numbers through `autopar.ops.rng`.
            Nodes that write to what they read have the numbers of these operands in ``meta["writes"]``.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module
        self._updated = _find_updated(module.graph)

    def forward(self, *inputs: Any) -> Any:
        """Run the region on the module's inputs; returns the module's results."""
        # `forward`, not `__call__`: fx's formats the traceback of every exception, and an exception is how torch ends a recomputation
        # that has made all that is needed.
        return recompute(self.module.forward, *inputs, updates=self._updated)

    @property
    def updates(self) -> frozenset[int]:
        """Positions of the inputs that the region updates in place."""
        return self._updated


def recompute(run: Callable[..., Any], *inputs: Any, updates: Collection[int] = ()) -> Any:
    """Run a region, a function of which autograd saves the inputs only: the backward runs it again, as far as it needs to.

    Args:
        run: the region.
        inputs: its arguments.
        updates: positions of those that it updates in place.
    """
    if not torch.is_grad_enabled():
        return run(*inputs)
    buffers = {position: inputs[position] for position in updates}
    # Updated buffers aren't handed to torch, which would save them and refuse the backward, since they change.
    others = [None if position in buffers else value for position, value in enumerate(inputs)]
    for value in others:
        if isinstance(value, Use):
            value.note_run_again()
    return checkpoint(_Region(run, buffers), *others, use_reentrant=False, preserve_rng_state=False)


class _Region:
    """One call of a region: the first run, and any later run with the same axes and the same random numbers."""

    def __init__(self, run: Callable[..., Any], buffers: dict[int, Tensor]) -> None:
        self._run = run
        self._buffers = buffers
        # A backward may run while other axes are active, or on a thread with none.
        self._axes = comm.current()
        self._seeds: list[int] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self._seeds is None:
            with rng.recorded() as self._seeds, in_recomputed_region():
                return self._run(*self._fill(inputs, self._buffers))
        copies = {position: buffer.clone() for position, buffer in self._buffers.items()}
        with comm.active(self._axes), rng.replayed(self._seeds), in_recomputed_region():
            return self._run(*self._fill(inputs, copies))

    def _fill(self, inputs: tuple[Any, ...], buffers: dict[int, Tensor]) -> list[Any]:
        return [buffers.get(position, value) for position, value in enumerate(inputs)]


def _find_updated(graph: fx.Graph) -> frozenset[int]:
    """Positions of the inputs that calls update in place."""
    positions = {node: position for position, node in enumerate(graph.find_nodes(op="placeholder"))}
    updated: set[int] = set()
    for node in graph.nodes:
        if numbers := node.meta.get("writes"):
            operands: list[fx.Node] = []
            fx.map_arg((node.args, node.kwargs), operands.append)
            updated.update(positions[operands[number]] for number in numbers if operands[number] in positions)
    return frozenset(updated)
