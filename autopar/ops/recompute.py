"""Regions of a program whose activations aren't kept: the backward runs them again.

Comes in a submodule of an emitted program, whose inputs are all that it reads; goes out a module that computes the same, keeps only
those inputs, and can be the target of a ``call_module``. The engine is `torch.utils.checkpoint`; here is what it can't know of
our programs: which axes the names in a region stand for, which numbers its random masks came from, and what it writes to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from autopar.ops import comm, rng
from autopar.ops.weight_gradients import in_recomputed_region


class Recomputed(nn.Module):
    """A region that keeps its inputs only; the first use of anything else of it in a backward runs it again, as far as needed.

    May be called many times before the first backward (micro-batches in flight), and on other threads. A parameter gathered inside,
    with `collectives.regather` or without, is gathered once more, for the recomputation and the backward together. Buffers that
    the region writes to are written once.

    Args:
        module: a graph module whose placeholders are all that it reads, and that draws its random numbers through `autopar.ops.rng`.
            Nodes that write to what they read have the numbers of these operands in ``meta["writes"]``.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module
        self._written = _find_written(module.graph)

    def forward(self, *inputs: Any) -> Any:
        """Run the region on its inputs; results are those of the module itself."""
        if not torch.is_grad_enabled():
            return self.module(*inputs)
        written = {at: inputs[at] for at in self._written}
        # What the region writes to isn't handed to torch: it would be found changed when the backward wants it.
        rest = [None if at in written else value for at, value in enumerate(inputs)]
        region = _Region(self.module, written)
        return checkpoint(region, *rest, use_reentrant=False, preserve_rng_state=False)


class _Region:
    """One call of a region: runs it for the first time, then again as it was."""

    def __init__(self, module: fx.GraphModule, written: dict[int, Tensor]) -> None:
        self._module = module
        self._written = written
        # A backward may run while other axes are active, or on a thread with none.
        self._axes = comm.current()
        self._drawn: list[int] | None = None

    def __call__(self, *inputs: Any) -> Any:
        # Without the module's own __call__: fx's takes the traceback of every exception apart, and that's how torch ends a
        # recomputation that has made enough.
        if self._drawn is None:
            with rng.recorded() as self._drawn, in_recomputed_region():
                return self._module.forward(*self._fill(inputs, self._written))
        throwaway = {at: buffer.clone() for at, buffer in self._written.items()}
        with comm.active(self._axes), rng.replayed(self._drawn), in_recomputed_region():
            return self._module.forward(*self._fill(inputs, throwaway))

    def _fill(self, inputs: tuple[Any, ...], written: dict[int, Tensor]) -> list[Any]:
        return [written.get(at, value) for at, value in enumerate(inputs)]


def _find_written(graph: fx.Graph) -> frozenset[int]:
    """Positions of the inputs that calls write to."""
    places = {node: at for at, node in enumerate(graph.find_nodes(op="placeholder"))}
    written: set[int] = set()
    for node in graph.nodes:
        if numbers := node.meta.get("writes"):
            operands: list[fx.Node] = []
            fx.map_arg((node.args, node.kwargs), operands.append)
            written.update(places[operands[number]] for number in numbers if operands[number] in places)
    return frozenset(written)
