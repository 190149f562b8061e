"""Calls of a module as flat lists of tensors, and flat lists of results as the user's own structure.

Comes in: an example call, and later calls. Goes out: a `CallSpec`, which turns a call into its flat tensors and refuses calls that differ
from the captured one, and a `ResultSpec`, which puts flat outputs into the containers that the model returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.parameter import is_lazy

from autopar.errors import InputError


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """Shape and dtype of a tensor among the arguments, with which later calls must agree."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class CallSpec:
    """The structure of the captured call, which every later call must have too.

    Attributes:
        signature: the signature of the module's forward.
        in_spec: the structure of (positional, keyword arguments) in canonical form, see `canonical`.
        names: per leaf its name, such as ``input_ids`` or ``batch.images``.
        leaves: per leaf a `TensorLeaf`, or the value itself where it isn't a tensor.
    """

    signature: inspect.Signature
    in_spec: pytree.TreeSpec
    names: tuple[str, ...]
    leaves: tuple[Any, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the leaves that are tensors, in order."""
        return tuple(name for name, leaf in zip(self.names, self.leaves, strict=True) if isinstance(leaf, TensorLeaf))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, flat, in the order of `inputs`.

        Raises InputError that names every argument which differs from the captured call, in structure, in shape or dtype, or in value where
        it isn't a tensor.
        """
        values, spec = pytree.tree_flatten(canonical(self.signature, args, kwargs))
        if spec != self.in_spec:
            raise InputError(self._structure_error(args, kwargs))
        differences = []
        for name, leaf, value in zip(self.names, self.leaves, values, strict=True):
            if isinstance(leaf, TensorLeaf):
                given = TensorLeaf(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
                if given != leaf:
                    differences.append(f"{name} is {given}, captured with {leaf}")
            elif isinstance(value, Tensor) or value != leaf:
                shown = TensorLeaf(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else repr(value)
                differences.append(f"{name} is {shown}, captured with {leaf!r}")
        if differences:
            raise InputError(f"the call differs from the captured one: {'; '.join(differences)}. Capture again to change these")
        return [value for leaf, value in zip(self.leaves, values, strict=True) if isinstance(leaf, TensorLeaf)]

    def _structure_error(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        names = leaf_names(canonical(self.signature, args, kwargs))
        missing = [name for name in self.names if name not in names]
        extra = [name for name in names if name not in self.names]
        captured = dict(zip(self.names, self.leaves, strict=True))
        parts = [f"{name} is {self._default(name)}, captured with {captured[name]!s}" for name in missing]
        parts += [f"{name} is given, captured with {self._default(name)}" for name in extra]
        return f"the call is built differently from the captured one: {'; '.join(parts) or 'other containers'}"

    def _default(self, name: str) -> str:
        """The default of an argument, as text."""
        parameter = self.signature.parameters.get(name)
        return "missing" if parameter is None or parameter.default is inspect.Parameter.empty else repr(parameter.default)


ExampleInputs = Mapping[str, Any] | tuple[Any, ...]
"""A call as users give it: a mapping is keyword arguments, a tuple positional ones, a pair of a tuple and a mapping both."""


def split_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The positional and the keyword arguments of an example call. Raises InputError for anything else than `ExampleInputs`."""
    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    if not isinstance(example_inputs, tuple):
        raise InputError(f"example_inputs is {type(example_inputs).__name__}; give a dict (keywords) or a tuple (positions)")
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
        return example_inputs[0], example_inputs[1]
    return example_inputs, {}


def read_call(forward: Callable[..., Any], example_inputs: ExampleInputs) -> tuple[CallSpec, list[Any]]:
    """The structure of an example call, and its leaves, which are its tensors and other values.

    Args:
        forward: the module's forward.
        example_inputs: the call, see `ExampleInputs`.

    Raises InputError for arguments that the forward doesn't take.
    """
    args, kwargs = split_call(example_inputs)
    signature = inspect.signature(forward)
    call = canonical(signature, args, kwargs)
    leaves, spec = pytree.tree_flatten(call)
    for name, leaf in zip(leaf_names(call), leaves, strict=True):
        if isinstance(leaf, Tensor) and (problem := find_problem(leaf)):
            raise InputError(f"the example input {name!r} {problem}")
    kinds = [TensorLeaf(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return CallSpec(signature, spec, leaf_names(call), tuple(kinds)), leaves


def find_problem(tensor: Tensor) -> str:
    """Why a tensor can't be in a graph, and what to do; empty for the plain tensors that can."""
    if is_lazy(tensor):
        return "has no sizes yet, because its module is lazy: call the model once before, or give the module its sizes"
    kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized, f"stored as {tensor.layout}": tensor.layout is not torch.strided}
    kind = next((kind for kind, is_so in kinds.items() if is_so), "")
    return kind and f"is {kind}: give a dense tensor of numbers"


def canonical(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with arguments by keyword where possible, in the signature's order, without those that are defaults."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the arguments don't fit the module's forward: {error}") from error
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if any(kinds[name] is inspect.Parameter.VAR_POSITIONAL and value for name, value in bound.arguments.items()):
        return bound.args, dict(sorted(bound.kwargs.items()))
    positional: list[Any] = []
    by_name: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        elif kinds[name] is inspect.Parameter.VAR_KEYWORD:
            by_name |= dict(sorted(value.items()))
        elif kinds[name] is not inspect.Parameter.VAR_POSITIONAL and value is not signature.parameters[name].default:
            by_name[name] = value
    return tuple(positional), by_name


def leaf_names(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[str, ...]:
    """Per leaf its name: the argument's, then the keys and indices that lead to it, joined by dots."""
    paths, _ = pytree.tree_flatten_with_path(call)
    return tuple(".".join(_key_text(key) for key in path[1:]) for path, _ in paths)


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


@dataclass(frozen=True, slots=True)
class ResultSpec:
    """The structure of what a module returns.

    Attributes:
        out_spec: the structure of the user's containers.
        constants: per leaf (True, value) where it isn't a tensor, and (False, None) where it is the next output tensor.
    """

    out_spec: pytree.TreeSpec
    constants: tuple[tuple[bool, Any], ...]

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's result: flat output tensors, and the values that were constant, in the user's containers."""
        tensors = iter(outputs)
        leaves = [value if is_constant else next(tensors) for is_constant, value in self.constants]
        return pytree.tree_unflatten(leaves, self.out_spec)
