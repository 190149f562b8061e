"""What a rank passes to a compiled model: its samples of the batch, or all of it, to parts of the program's inputs.

Comes in: a user's call. Goes out: a `Call` whose tensors have the global sizes, and this rank's part of an input. With ``inputs="global"``
every rank passes the same whole batch. With ``inputs="local"`` a rank passes its samples of every input that has the batch as dim 0, and
whatever else there is (a table, a temperature) whole.

Gradients under ``inputs="local"``: as under DDP, a loss that a rank makes of its own samples is one of several whose mean is trained.
Outputs divide the gradient that comes in by their number (`autopar.runtime.outputs`), and the gradient of an input is multiplied by it, so
that it is the gradient of the ranks' own losses, which is what another model's outputs expect.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.capture import canonical, leaf_names
from autopar.errors import InputError
from autopar.ir import Layout, shard
from autopar.rewrite import Program
from autopar.runtime.dtensor import shard_whole
from autopar.runtime.outputs import Step, UnreadOutput
from autopar.runtime.parts import count_shares, gather_parts, samples_layout, samples_to_part
from autopar.runtime.storage import Deployment


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of the model.

    Attributes:
        args, kwargs: the arguments, in which this rank's samples are replaced by stand-ins of the global sizes without values.
        leaves: what this rank passed, flat.
        has_samples: per leaf, whether it is this rank's samples.
        given: by the id of a stand-in, what it stands for.
        signature: what programs are made for: structure, shapes, dtypes, values that aren't tensors.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: tuple[Any, ...]
    has_samples: tuple[bool, ...]
    given: Mapping[int, Tensor]
    signature: tuple[Hashable, ...]

    def passed(self, x: Tensor) -> Tensor:
        """What this rank passed where the arguments have `x`."""
        return self.given.get(id(x), x)

    def part(self, x: Tensor, layout: Layout, deployment: Deployment, step: Step) -> Tensor:
        """This rank's part, in `layout`, of the input that the arguments have as `x`."""
        own = self.given.get(id(x))
        if own is None:
            return shard_whole(x, layout, deployment.mesh, deployment.axes)
        return samples_to_part(_enter(own, deployment, step), samples_layout(shard(0), deployment), layout, deployment)

    def whole(self, x: Tensor, deployment: Deployment) -> Tensor:
        """All of the input that the arguments have as `x`."""
        own = self.given.get(id(x))
        return x if own is None else gather_parts(own, samples_layout(shard(0), deployment), deployment)


class InputReader:
    """Reads calls of one model.

    Args:
        model: the user's model.
        is_local: whether every rank passes its own samples.
    """

    def __init__(self, model: nn.Module, is_local: bool) -> None:
        self._model = model
        self._is_local = is_local
        self._has_batch: dict[str, bool] = {}

    def learn(self, program: Program) -> None:
        """Note which inputs of a program have the batch as dim 0; what the first one says of a name stays."""
        for slot in program.inputs:
            self._has_batch.setdefault(slot.name, slot.batch is not None and slot.shape != ())

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int = 1) -> Call:
        """A call whose samples are those of one of `count` shares of the batch; with 1 nothing is replaced."""
        leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        leaves = [self._read_leaf(leaf) for leaf in leaves]
        flags = self._find_samples(args, kwargs, leaves) if count > 1 else (False,) * len(leaves)
        given: dict[int, Tensor] = {}
        arguments = list(leaves)
        for position, leaf in enumerate(leaves):
            if flags[position]:
                # Sizes without memory: nothing reads the values of a stand-in.
                stand_in = leaf.detach().new_zeros(1).expand(leaf.shape[0] * count, *leaf.shape[1:]).requires_grad_(leaf.requires_grad)
                arguments[position] = stand_in
                given[id(stand_in)] = leaf
        args, kwargs = pytree.tree_unflatten(arguments, spec)
        return Call(args, kwargs, tuple(leaves), flags, given, (repr(spec), *map(_describe, arguments)))

    def names(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
        """Per leaf of the arguments its name: that of the forward's argument, and the keys that lead to it."""
        paths, spec = pytree.tree_flatten_with_path((args, dict(sorted(kwargs.items()))))
        names = [pytree.keystr(path[1:]) for path, _ in paths]
        places = list(map(_Place, range(len(names))))
        with suppress(InputError):  # arguments that don't fit, of which capture tells every rank
            call = canonical(inspect.signature(self._model.forward), *pytree.tree_unflatten(places, spec))
            for place, name in zip(pytree.tree_leaves(call), leaf_names(call), strict=True):
                names[place.position] = name
        return names

    def _read_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, UnreadOutput):
            return leaf.read()
        if isinstance(leaf, DTensor):
            if self._is_local:
                raise InputError(
                    'an input is a DTensor, of the whole batch, but with inputs="local" every rank passes its own samples: compile the '
                    'model that made it with inputs="local" and without outputs="sharded"'
                )
            return leaf.full_tensor()
        return leaf

    def _find_samples(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Sequence[Any]) -> tuple[bool, ...]:
        """Per leaf whether it has the batch as dim 0: as the first plan says of its name, else by its size."""
        names = self.names(args, kwargs)
        sizes = {
            position: leaf.shape[0]
            for position, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.ndim
        }
        known = Counter(size for position, size in sizes.items() if self._has_batch.get(names[position], False))
        ((batch, _),) = (known or Counter(sizes.values()) or Counter([0])).most_common(1)
        return tuple(position in sizes and self._has_batch.get(name, sizes[position] == batch) for position, name in enumerate(names))


@dataclass(frozen=True)
class _Place:
    """Stands for the leaf at this position of a call."""

    position: int


class _Enter(torch.autograd.Function):
    """This rank's samples as an input. The gradient is multiplied where it is wanted of the ranks' own losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, is_leaf: bool, step: Step) -> Tensor:
        ctx.step = (count, is_leaf, step)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, is_leaf, step = ctx.step
        # A leaf gets the gradient of the loss whose backward was called: of the whole batch's where the model made it.
        return grads[0] * count if step.has_own_loss or not is_leaf else grads[0], None, None, None


def _enter(x: Tensor, deployment: Deployment, step: Step) -> Tensor:
    if not x.requires_grad:
        return x
    entered: Tensor = _Enter.apply(x, count_shares(deployment), x.is_leaf, step)  # type: ignore[no-untyped-call]
    return entered


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), repr(leaf)
