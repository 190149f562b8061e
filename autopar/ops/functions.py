"""A user's `torch.autograd.Function` as one call of a program, with the function's own backward.

Comes in: a function and the arguments of a call of it, which `autopar.capture.functions` finds while a model is captured. Goes out: a
`FunctionCall`, the target of a node of the captured graph, and its arguments. It has no rule of its own, so it runs whole on every rank,
where forward and backward see what they would see on one device.
"""

from __future__ import annotations

import copy
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from autopar.ops.autocast import Autocast

_MAX_INT = 1 << 63


class FunctionCall:
    """Calls a function with the given tensors, numbers and strings in the places that they had in the captured call.

    Everything else among the captured arguments is part of this object, such as a dtype or a callable.

    Attributes:
        function: the class whose ``apply`` is called.
        results: how many tensors it returns; a single one is returned as it is, several as a tuple.
        autocast: the state of autocast in which the function's forward runs; None for that of the caller.
        name: the function's module and name, and the kinds of its arguments, such as ``autograd_function.train_Round.T``. It is the same in
            every process that runs the same script, as plans and rules know ops by their names.
    """

    def __init__(self, function: type[torch.autograd.Function], args: Sequence[Any], results: int) -> None:
        leaves, self._in_spec = pytree.tree_flatten(tuple(args))
        self._fixed = [(not _letter(leaf), None if _letter(leaf) else leaf) for leaf in leaves]
        self.function = function
        self.autocast: Autocast | None = None
        self.results = results
        letters = "".join(map(_letter, leaves))
        self.name = f"autograd_function.{_identifier(function)}.{letters}{'' if results == 1 else results}{self._digest()}"
        self.__name__ = f"{function.__name__}_{letters}"  # as fx writes it in the code of programs
        fixed = tuple((type(value), value if isinstance(value, _PLAIN) else id(value)) for _, value in self._fixed)
        self._key: tuple[Any, ...] = function, repr(self._in_spec), results, fixed

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        """Whether both do the same for the same arguments; arguments that are part of them are the same objects or equal plain values."""
        return isinstance(other, FunctionCall) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def under(self, autocast: Autocast) -> FunctionCall:
        """The same call, whose forward runs in this state of autocast."""
        made = copy.copy(self)
        made.autocast = autocast
        made._key = (*self._key[:4], autocast)
        return made

    def __call__(self, *given: Any) -> Any:
        """The tensors that the function returns for these arguments."""
        values = iter(given)
        leaves = [value if is_fixed else next(values) for is_fixed, value in self._fixed]
        with nullcontext() if self.autocast is None else self.autocast.active():
            result = self.function.apply(*pytree.tree_unflatten(leaves, self._in_spec))  # type: ignore[no-untyped-call]
        tensors = tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return tensors[0] if self.results == 1 else tensors

    def _digest(self) -> str:
        """Text that differs where arguments that are part of the call differ in more than their identity; empty without such arguments."""
        fixed = [value for is_fixed, value in self._fixed if is_fixed]
        if not fixed and self._in_spec.num_children == len(self._fixed):
            return ""
        texts = [repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__ for value in fixed]
        return "_" + hashlib.blake2b(repr((texts, self._in_spec)).encode(), digest_size=4).hexdigest()


_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


def given_arguments(args: Sequence[Any]) -> list[Any]:
    """What a `FunctionCall` for these arguments must be given: the tensors, numbers and strings, also those inside of containers."""
    return [leaf for leaf in pytree.tree_leaves(tuple(args)) if _letter(leaf)]


def _letter(leaf: object) -> str:
    """The kind of an argument that a call is given, as a letter; empty for what is part of the call."""
    if isinstance(leaf, Tensor):
        return "T"
    if type(leaf) is int and not -_MAX_INT <= leaf < _MAX_INT:
        return ""
    return {bool: "b", int: "i", float: "f", str: "s"}.get(type(leaf), "")


def _identifier(function: type) -> str:
    """The function's module and name as an identifier; a script's module is its file's name, however it was started."""
    module = function.__module__.removeprefix("autopar_model_")  # the prefix of files that the command line imports
    if module in ("__main__", "__mp_main__") and (path := getattr(sys.modules["__main__"], "__file__", None)):
        module = Path(path).stem
    return re.sub(r"\W", "_", f"{module}.{function.__qualname__}".replace("<locals>.", ""))


class GradientHook(torch.autograd.Function):
    """The identity, whose backward calls a hook that the user registered on the gradient of an intermediate tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
        """Returns `x`."""
        ctx.hook = hook
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient that the hook returns, or the one that it was given where it returns none."""
        changed = ctx.hook(grad)
        return (grad if changed is None else changed), None
