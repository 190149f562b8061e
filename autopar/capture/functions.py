"""What autograd calls of the user's while a model is captured: `torch.autograd.Function` and hooks on intermediate tensors, kept whole.

An export shows the operators inside of a function's forward and nothing of its backward. So while the model runs for the export, each call
of a function becomes one call of ``autopar::function``, which has the number of the call as an argument; `restore_functions` replaces these
by calls of `autopar.ops.FunctionCall`. A hook is such a function, too: the identity, whose backward calls the hook; `place_hooks` puts it
where every reader of the tensor comes after it::

    z = tanh(f); hook = GradientHook(z); h = linear(z, ...)   ->   z = tanh(f); hook = GradientHook(z); h = linear(hook, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autopar import torch_compat
from autopar.capture.fx_nodes import is_getitem, users_line
from autopar.errors import CaptureError
from autopar.ops import FunctionCall, GradientHook, given_arguments

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("function(Tensor[] tensors, int number) -> Tensor[]")  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class _Call:
    """One call of a function while the model is captured.

    Attributes:
        target: what is called.
        given: its arguments, with None in the places of tensors.
        returns_view: whether a result shares its memory with an argument.
    """

    target: FunctionCall
    given: tuple[Any, ...]
    returns_view: bool

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Call the function."""
        remaining = iter(tensors)
        result = self.target(*(next(remaining) if value is None else value for value in self.given))
        return [result] if self.target.results == 1 else list(result)


_CALLS: dict[int, _Call] = {}
"""Number of a call -> the call, of all captures that run now. Numbers aren't used again, since torch remembers results by arguments."""

_NUMBERS = iter(range(1 << 62))


def _run(tensors: list[Tensor], number: int) -> list[Tensor]:
    return _CALLS[number].run(tensors)


_LIBRARY.impl("function", _run, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_function = torch.ops.autopar.function.default
# A hook's result isn't read until `place_hooks`, but its call must not be dropped as dead.
fx.node.has_side_effect(_function)


@contextmanager
def calls_remembered() -> Iterator[None]:
    """Inside, calls that are recorded can be restored by `restore_functions`."""
    before = set(_CALLS)
    try:
        yield
    finally:
        for number in set(_CALLS) - before:
            del _CALLS[number]


@contextmanager
def functions_kept_whole(on_checkpoint: Callable[[], None]) -> Iterator[None]:
    """Inside, on this thread, calls of the user's autograd functions are recorded whole in the graph that is traced.

    Regions of ``torch.utils.checkpoint`` with ``use_reentrant=True`` are such a function of torch's. They run as the plain calls that they
    stand for, and `on_checkpoint` is called.
    """
    inside = False

    def apply(function: type[torch.autograd.Function], original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        nonlocal inside
        if function is torch_compat.CheckpointFunction and not inside:
            on_checkpoint()
            return _run_checkpointed(*args)
        if inside or function.__module__.partition(".")[0] == "torch":
            return original(*args, **kwargs)
        inside = True
        try:
            return _apply_whole(function, original, args, kwargs)
        finally:
            inside = False

    with torch_compat.function_calls_go_to(apply):
        yield


def _run_checkpointed(region: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """A region's results, which have a gradient only if one of its arguments has, as with ``use_reentrant=True``."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
        return region(*args)


def _apply_whole(
    function: type[torch.autograd.Function], original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What ``function.apply`` returns, made by one call in the graph that is traced.

    The function first runs untraced, to see how many tensors it returns, and whether it is a function of its arguments alone.
    """
    inputs = [leaf for leaf in pytree.tree_leaves(tuple(args)) if isinstance(leaf, Tensor)]
    if kwargs or not inputs:
        return original(*args, **kwargs)
    with torch_compat.tracing_paused(), _Inspection(inputs) as inspection:
        result = original(*args)
    if (problem := inspection.find_problem()) is not None:
        raise CaptureError(f"{function.__qualname__}.apply at `{users_line()}` {problem}")
    leaves, out_spec = pytree.tree_flatten(result)
    count = sum(isinstance(leaf, Tensor) for leaf in leaves)
    if not count:
        return result
    storages = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
    returns_view = any(tensor.untyped_storage()._cdata in storages for tensor in inputs)
    made = iter(_call(FunctionCall(function, args, count), args, returns_view))
    return pytree.tree_unflatten([next(made) if isinstance(leaf, Tensor) else leaf for leaf in leaves], out_spec)


def _call(target: FunctionCall, args: Sequence[Any], returns_view: bool = False) -> list[Tensor]:
    """Call ``autopar::function`` for a call of `target`."""
    given = given_arguments(args)
    number = next(_NUMBERS)
    _CALLS[number] = _Call(target, tuple(None if isinstance(value, Tensor) else value for value in given), returns_view)
    return list(_function([value for value in given if isinstance(value, Tensor)], number))


class _Inspection(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the operators of a function's forward."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = {id(tensor) for tensor in inputs}
        self._known = list(inputs)  # kept alive, so that no other tensor gets one's id
        self._known_ids = set(self._inputs)
        self._foreign: Tensor | None = None
        self._written = False
        self._random = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, FakeTensor) and id(tensor) not in self._known_ids:
                self._foreign = tensor
        if func._schema.is_mutable:
            written = [value for value, argument in zip(args, func._schema.arguments, strict=False) if argument.is_write]
            self._written |= any(id(leaf) in self._inputs for leaf in pytree.tree_leaves(written))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._random = str(func)
        result = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._known.append(tensor)
                self._known_ids.add(id(tensor))
        return result

    def find_problem(self) -> str | None:
        """Why the function can't be one call of a graph, and the remedy; None when it can."""
        if self._foreign is not None:
            return f"reads a tensor of shape {list(self._foreign.shape)} that isn't among its arguments. Pass it to apply"
        if self._written:
            return "writes to an argument in place. Let its forward return a new tensor"
        if self._random:
            return f"draws random numbers ({self._random}), which would differ between ranks. Draw them outside, and pass them to apply"
        return None


def hook_gradient(x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """Record in the graph that is traced that `hook` is called on the gradient of `x`.

    Raises CaptureError for a leaf, and for a hook that holds a tensor of the run that is traced.
    """
    if x.is_leaf:
        raise CaptureError(
            f"the forward registers a hook on the gradient of a parameter or input at `{users_line()}`, once more in every call."
            " Register it once, outside of the forward"
        )
    if getattr(hook, "__module__", "") == torch.autograd.graph.__name__:
        raise CaptureError(
            f"the hook registered at `{users_line()}` waits for the gradients of several tensors, which a program doesn't order."
            " Register a hook on each tensor"
        )
    if _holds_fake_tensor(hook):
        raise CaptureError(
            f"the hook registered at `{users_line()}` reads a tensor that the forward made. Write a torch.autograd.Function"
            " that gets this tensor as an argument"
        )
    args = (x, hook)
    _call(FunctionCall(GradientHook, args, 1), args)


def _holds_fake_tensor(value: object, depth: int = 4) -> bool:
    """Whether a fake tensor is among what a callable has bound: closure, defaults, arguments of a partial, attributes of its object."""
    if isinstance(value, Tensor):
        return isinstance(value, FakeTensor)
    if depth == 0 or value is None or isinstance(value, torch.nn.Module):
        return False
    inner: list[object] = []
    if isinstance(value, (list, tuple, set)):
        inner += value
    elif isinstance(value, dict):
        inner += value.values()
    else:
        for cell in getattr(value, "__closure__", None) or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # a name that isn't bound yet
                continue
        bound = ("__defaults__", "__kwdefaults__", "__self__", "__dict__", "func", "args", "keywords")
        inner += [getattr(value, name, None) for name in bound]
    return any(_holds_fake_tensor(item, depth - 1) for item in inner)


def restore_functions(graph: fx.Graph) -> fx.Graph:
    """The graph with `FunctionCall` in the place of ``autopar::function``; must run while the model is captured.

    Calls whose results nothing reads are dropped, except hooks.
    """
    new = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.target is _function:
            call = _CALLS[node.args[1]]
            is_hook = call.target.function is GradientHook
            if node.users or is_hook:
                env[node] = _emit_call(new, node, call, [env[arg] for arg in node.args[0]])
        elif is_getitem(node) and isinstance(env[node.args[0]].target, FunctionCall) and env[node.args[0]].target.results == 1:
            env[node] = env[node.args[0]]
        else:
            env[node] = new.node_copy(node, env.__getitem__)
    return new


def _emit_call(graph: fx.Graph, node: fx.Node, call: _Call, tensors: Sequence[fx.Node]) -> fx.Node:
    remaining = iter(tensors)
    args = tuple(next(remaining) if value is None else value for value in call.given)
    made = graph.create_node("call_function", call.target, args, {}, name=call.target.function.__name__.lower())
    made.meta = dict(node.meta)
    values = node.meta["val"]
    made.meta["val"] = values[0] if call.target.results == 1 else tuple(values)
    made.meta["returns_view"] = call.returns_view
    return made


def place_hooks(graph: fx.Graph) -> None:
    """Let every reader of a tensor with hooks read it through them; the hook that was registered first runs first in the backward."""
    hooks = [node for node in graph.nodes if isinstance(node.target, FunctionCall) and node.target.function is GradientHook]
    for hook in reversed(hooks):
        source = hook.args[0]
        assert isinstance(source, fx.Node)
        source.append(hook)
        for reader in list(source.users):
            if reader is not hook:
                reader.replace_input_with(source, hook)
