"""What calls need of memory while they run, forward and backward, beside the tensors that they read and make.

Comes in: a flat graph whose values are known as fake tensors. Goes out: an `ir.Working` per call. Each distinct call runs once on fake
tensors of its own, forward and backward, and every storage that lives meanwhile is counted. What a kernel allocates inside of itself isn't
seen; for torch's operators that is little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopar import ir
from autopar.torch_compat import StorageRef

Run = Callable[[fx.Node, Any, Any], Any]


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are made inside, and of some that are there before, as long as they live."""

    def __init__(self, known: Iterable[Tensor], before: Mapping[int, tuple[StorageRef, int]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {StorageRef.key_of(x) for x in known}
        self._living: dict[int, tuple[StorageRef, int]] = dict(before or {})
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageRef.key_of(x) for x in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for x in _tensors(results):
            key = StorageRef.key_of(x)
            if key not in self._known and key not in given:
                self._living[key] = StorageRef(x), _nbytes(x)
        self.peak = max(self.peak, self.now())
        return results

    def now(self) -> int:
        """Bytes that live now."""
        self._living = {key: entry for key, entry in self._living.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._living.values())


def find_working(
    graph: fx.Graph, values: Mapping[str, Any], mode: FakeTensorMode, run: Run, known: dict[object, ir.Working]
) -> dict[str, ir.Working]:
    """What every call of a graph needs while it runs, by the name of its node.

    Args:
        graph: the graph.
        values: name of a node -> its fake result or results, with ``requires_grad`` as autograd sets it.
        mode: the mode of those fake tensors.
        run: runs a node on arguments.
        known: what is known already, by `call_key`; what is found is added.
    """
    found: dict[str, ir.Working] = {}
    for node in graph.nodes:
        # Autograd functions and hooks run the user's code, which must see no fake tensors but those of the capture.
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        key = call_key(node, values)
        if key not in known:
            known[key] = _observe(node, values, mode, run)
        found[node.name] = known[key]
    return found


def call_key(node: fx.Node, values: Mapping[str, Any]) -> object:
    """Equal for calls of the same operator on tensors of the same types."""

    def describe(argument: fx.Node) -> Any:
        return tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in _tensors(values[argument.name]))

    arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Text(repr(describe(n))))
    return node.target, repr(arguments)


class _Text(str):
    """A text whose repr is itself."""

    def __repr__(self) -> str:
        return str(self)


def _observe(node: fx.Node, values: Mapping[str, Any], mode: FakeTensorMode, run: Run) -> ir.Working:
    operands: list[Tensor] = []

    def stand_in(argument: fx.Node) -> Any:
        value = values[argument.name]
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        operands.append(made.requires_grad_(value.requires_grad))
        return made

    try:
        with mode, torch.enable_grad():
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), stand_in)
            return _run_both_ways(node, args, kwargs, operands, run)
    except RuntimeError:  # torch's refusals to run an operator on fake tensors are all of this type
        return ir.Working()


def _run_both_ways(node: fx.Node, args: Any, kwargs: Any, operands: Sequence[Tensor], run: Run) -> ir.Working:
    place = {StorageRef.key_of(x): index for index, x in enumerate(operands)}
    packed: dict[int, tuple[StorageRef, int]] = {}

    def pack(x: Tensor) -> Tensor:
        ref = StorageRef(x)
        packed[ref.key] = ref, _nbytes(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _Living(operands) as living:
        results = run(node, args, kwargs)
    made = list(_tensors(results))
    # What was saved lives as long as the results, so that nothing else has its key.
    saves = frozenset(index for key, index in place.items() if key in packed)
    views = tuple(place.get(StorageRef.key_of(x), -1) for x in made)
    keeps = frozenset(index for index, x in enumerate(made) if StorageRef.key_of(x) in packed and views[index] < 0)
    seen = ir.Working(views=views, saves=saves, keeps=keeps, forward=living.peak - living.now())
    differentiable = [x for x in made if x.requires_grad]
    leaves = [x for x in operands if x.requires_grad]
    if not differentiable or not leaves:
        return seen
    gradients = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in differentiable]
    try:
        # What is saved beside operands and results is let go piece by piece, where the operator consists of several.
        given_keys = {StorageRef.key_of(x) for x in (*operands, *made)}
        beside = {key: entry for key, entry in packed.items() if key not in given_keys}
        with _Living([*operands, *made, *gradients], beside) as living:
            returned = torch.autograd.grad(differentiable, leaves, gradients, allow_unused=True)
    except RuntimeError:  # without a backward, or one that reads values
        return seen
    given = {StorageRef.key_of(x) for x in gradients}
    of_leaf = {id(leaf): gradient for leaf, gradient in zip(leaves, returned, strict=True)}
    passes = frozenset(index for index, x in enumerate(operands) if (g := of_leaf.get(id(x))) is not None and StorageRef.key_of(g) in given)
    saved = sum(nbytes for _, nbytes in beside.values())
    own = {StorageRef.key_of(x): _nbytes(x) for x in returned if x is not None and StorageRef.key_of(x) not in given}
    return dataclasses.replace(seen, passes=passes, backward=max(0, living.peak - sum(own.values()) - saved))


def _tensors(value: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(value) if isinstance(x, Tensor))


def _nbytes(x: Tensor) -> int:
    return int(x.untyped_storage().nbytes())
