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

from autopar import comm, rng
from autopar.deferral import inside_region
from autopar.errors import InputError
from autopar.fxtools import source_of

# Operators that write to some of their arguments, by the name that the operator and our kernel share: running mean and variance.
_WRITES = {"batch_norm": (3, 4)}
_CHANCES = ("p", "dropout", "dropout_p")
_SWITCHES = ("train", "training")


class Recomputed(nn.Module):
    """A region that keeps its inputs only; the first use of anything else of it in a backward runs it again, as far as needed.

    May be called many times before the first backward (micro-batches in flight), and on other threads. A parameter gathered inside,
    with `collectives.regather` or without, is gathered once more, for the recomputation and the backward together. Buffers that
    the region writes to are written once.

    Args:
        module: a graph module whose placeholders are all that it reads.

    Raises InputError when an operator in it draws random numbers that aren't those of `autopar.rng`: it can't be run again alike.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        drawing = find_unrepeatable(module.graph)
        if drawing:
            raise InputError(
                "can't recompute a region that draws random numbers of its own: "
                + ", ".join(f"{node.target} ({source_of(node) or node.name})" for node in drawing)
                + ". Keep its activations"
            )
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
            with rng.recorded() as self._drawn, inside_region():
                return self._module.forward(*self._fill(inputs, self._written))
        throwaway = {at: buffer.clone() for at, buffer in self._written.items()}
        with comm.active(self._axes), rng.replayed(self._drawn), inside_region():
            return self._module.forward(*self._fill(inputs, throwaway))

    def _fill(self, inputs: tuple[Any, ...], written: dict[int, Tensor]) -> list[Any]:
        return [written.get(at, value) for at, value in enumerate(inputs)]


def find_unrepeatable(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Calls of operators that draw from torch's generators directly; those that draw through `autopar.rng` are no such."""
    return tuple(node for node in graph.nodes if node.op == "call_function" and _draws(node))


def _draws(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = dict(node.kwargs)
    for position, argument in enumerate(target._schema.arguments):
        value = node.args[position] if position < len(node.args) else given.get(argument.name, argument.default_value)
        if (argument.name in _CHANCES and value == 0) or (argument.name in _SWITCHES and value is False):
            return False
    return True


def _find_written(graph: fx.Graph) -> frozenset[int]:
    """Positions of the inputs that calls write to."""
    places = {node: at for at, node in enumerate(graph.find_nodes(op="placeholder"))}
    found = set()
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", "")).partition(".")[0]
        for position in _WRITES.get(name, ()) if node.op == "call_function" else ():
            if position < len(node.args) and node.args[position] in places:
                found.add(places[node.args[position]])
    return frozenset(found)
