"""What a forward does beside calling operators, seen while it runs for an export: kept, noted, or refused.

Comes in: a model that is about to be exported. Within `watched`, what an export would drop or change without a word is caught where the
model does it, so that its line can be named:

- kept: autograd functions and hooks on intermediate tensors (`autopar.capture.functions`), ``x.data``, `torch.inference_mode`;
- left to the plan, with a note: `torch.utils.checkpoint`, ``save_on_cpu``;
- refused with CaptureError: gradients inside of the forward, reading ``grad``, hooks on modules' backward and on the autograd graph, other
  hooks on saved tensors, random numbers of Python and numpy, seeds.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from autopar import torch_compat
from autopar.capture.attributes import ModelAttributes
from autopar.capture.functions import functions_kept_whole, hook_gradient
from autopar.capture.fx_nodes import is_installed, users_line
from autopar.errors import CaptureError
from autopar.replaced import on_this_thread, replaced


@contextmanager
def watched(model: nn.Module, attributes: ModelAttributes, notes: list[str]) -> Iterator[None]:
    """Inside, what the forward of `model` does beside calling operators is kept, noted in `notes`, or refused with CaptureError.

    `attributes` looks at the model before and after each run of the forward.
    """
    _refuse_backward_hooks(model)
    inside = ExitStack()
    depth = 0  # of calls, as a model may call itself

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > 1:
            return
        attributes.begin_run()
        inside.enter_context(attributes.watch_reads())
        inside.enter_context(_random_numbers_watched())
        inside.enter_context(functions_kept_whole(lambda: _note_checkpoint(notes)))
        inside.enter_context(torch_compat.backwards_go_to(_refuse_backward))
        inside.enter_context(_saved_tensors_stay(notes))
        inside.enter_context(_inference_is_no_grad())
        inside.enter_context(_compiler_questions_noted(notes))
        inside.enter_context(_TensorAccess(notes))

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            inside.close()
            attributes.end_run()

    # Hooks rather than contexts around the export, whose own work isn't to be watched.
    handles = [model.register_forward_pre_hook(enter, prepend=True), model.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        inside.close()  # raises if the forward, which an exit has left, drew random numbers


def _refuse_backward_hooks(model: nn.Module) -> None:
    names = [name or "the model itself" for name, module in model.named_modules() if module._backward_hooks or module._backward_pre_hooks]
    if torch_compat.global_backward_hooks():
        names.append("all modules")
    if names:
        raise CaptureError(
            f"a backward hook is registered on {', '.join(names[:3] + ['...'] * (len(names) > 3))}, and a program has no modules whose"
            " backward could call it. Remove the hook; to change or see gradients, use a hook on a parameter, or let the forward call"
            " x.register_hook on a tensor"
        )


def _refuse_backward(*args: object, **kwargs: object) -> NoReturn:
    raise CaptureError(
        f"the forward computes gradients itself at `{users_line()}`, which a program of the forward's operators can't repeat."
        " Return the value, and compute its gradient outside of the model"
    )


def _note_checkpoint(notes: list[str]) -> None:
    notes.append(f"torch.utils.checkpoint at {users_line()}: the plan chooses what is recomputed; pin recompute=full to recompute all")


@contextmanager
def _saved_tensors_stay(notes: list[str]) -> Iterator[None]:
    """Inside, contexts of hooks on saved tensors do nothing: they are noted where they change no number, else refused."""

    def enter(self: saved_tensors_hooks) -> None:
        if isinstance(self, save_on_cpu):
            notes.append(f"save_on_cpu at {users_line()} left out: what the backward needs stays on the device, and the plan counts it")
        elif type(self).__module__ == torch.utils.checkpoint.__name__:
            _note_checkpoint(notes)
        else:
            raise CaptureError(
                f"the forward sets hooks on saved tensors at `{users_line()}`, which a program of the forward's operators doesn't have."
                " Remove them; the plan decides what is saved for the backward"
            )

    with _methods(saved_tensors_hooks, __enter__=enter, __exit__=lambda self, *_: None):
        yield


@contextmanager
def _inference_is_no_grad() -> Iterator[None]:
    """Inside, `torch.inference_mode` is `torch.no_grad`, which an export has regions for."""
    before: list[bool] = []

    def enter(self: Any) -> None:
        before.append(torch.is_grad_enabled())
        torch.set_grad_enabled(not self.mode)

    def leave(self: Any, *_: object) -> None:
        torch.set_grad_enabled(before.pop())

    with _methods(torch.inference_mode, __enter__=enter, __exit__=leave):
        yield


@contextmanager
def _compiler_questions_noted(notes: list[str]) -> Iterator[None]:
    """Inside, a note says where the user's own code asks whether it is compiled or exported, and so runs the branch for that."""

    def noted(name: str, original: Callable[[], bool]) -> Callable[[], bool]:
        def ask() -> bool:
            # Libraries and torch ask often, and compute the same either way.
            if not is_installed(sys._getframe(1).f_code.co_filename):
                notes.append(
                    f"torch.compiler.{name}() at {users_line()} is true while the model is captured: the branch for that is what runs",
                )
            return original()

        return ask

    names = ("is_compiling", "is_exporting", "is_dynamo_compiling")
    originals = {name: getattr(torch.compiler, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(torch.compiler, name, noted(name, original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.compiler, name, original)


@contextmanager
def _methods(owner: type, **replacements: Callable[..., Any]) -> Iterator[None]:
    """Inside, on this thread, methods of a class are these."""
    with ExitStack() as undo:
        for name, replacement in replacements.items():
            undo.enter_context(replaced(owner, name, on_this_thread(replacement, vars(owner)[name])))
        yield


@contextmanager
def _random_numbers_watched() -> Iterator[None]:
    """Raises CaptureError when torch's generator is seeded inside, and at the end if Python's or numpy's random numbers were drawn."""
    sources: dict[str, Callable[[], object]] = {"Python's random": random.getstate}
    if (numpy := sys.modules.get("numpy")) is not None:
        sources["numpy.random"] = lambda: str(numpy.random.get_state())
    before = {name: state() for name, state in sources.items()}
    with torch_compat.default_generator_replaced(_Unseeded(torch.default_generator)):
        yield
    if changed := [name for name, state in sources.items() if state() != before[name]]:
        raise CaptureError(
            f"the forward draws from {' and '.join(changed)}, which would happen once, while the model is captured, and not in every call."
            " Draw with torch.rand and the like, or pass the numbers as arguments"
        )


class _Unseeded:
    """Torch's default generator, which the forward may read and draw from but not seed."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        if name in ("manual_seed", "seed") and threading.get_ident() == self._thread:
            raise CaptureError(
                f"the forward seeds torch's random numbers at `{users_line()}`, which would happen once, while the model is captured, and"
                " not in every call. Seed outside of the forward, or pass the numbers as arguments"
            )
        return getattr(self._generator, name)


class _Node:
    """A node of the autograd graph as the forward may see it: without hooks, which the graph of a program's own backward wouldn't have."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        if name in ("register_hook", "register_prehook"):
            raise CaptureError(
                f"the forward registers a hook on a node of the autograd graph at `{users_line()}`, and a program has a graph of its own."
                " Register it on the tensor: x.register_hook"
            )
        return getattr(self._node, name)


class HookHandle:
    """What ``register_hook`` returns while the model is captured; later calls have hooks of their own, which it doesn't remove."""

    def remove(self) -> None:
        """Does nothing."""


class _TensorAccess(TorchFunctionMode):
    """Sees what the forward does to tensors by attributes and methods that are no operators."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        handler = _HANDLERS.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(self._notes, func, *args, **(kwargs or {}))


def _read_data(notes: list[str], func: Any, x: Tensor) -> Tensor:
    return x.detach()


def _write_data(notes: list[str], func: Any, x: Tensor, value: Tensor) -> NoReturn:
    raise CaptureError(f"the forward assigns to .data at `{users_line()}`. Make a new tensor, or use a buffer, which a forward may update")


def _read_grad(notes: list[str], func: Any, x: Tensor, *value: Any) -> Any:
    node = torch_compat.traced_node(x)
    if node is None or node.op != "placeholder":
        return func(x, *value)
    raise CaptureError(
        f"the forward uses the gradient of a parameter or input at `{users_line()}`, of which a program knows nothing."
        " Do this in the loop, outside of the forward"
    )


def _read_grad_fn(notes: list[str], func: Any, x: Tensor) -> Any:
    node = func(x)
    return None if node is None else _Node(node)


def _register_hook(notes: list[str], func: Any, x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> HookHandle:
    if not x.requires_grad:
        func(x, hook)  # raises torch's own error
    hook_gradient(x, hook)
    return HookHandle()


def _register_post_accumulate_hook(notes: list[str], func: Any, x: Tensor, hook: Any) -> NoReturn:
    raise CaptureError(
        f"the forward registers a hook on the gradient of a parameter at `{users_line()}`, once more in every call."
        " Register it once, outside of the forward"
    )


def _retain_grad(notes: list[str], func: Any, x: Tensor) -> None:
    notes.append(
        f"retain_grad at {users_line()} left out: grad stays None. Return the tensor, and call retain_grad on what the model returns"
    )


_tensor: Any = Tensor  # whose properties have types of the values that they return

_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    _tensor.data.__get__: _read_data,
    _tensor.data.__set__: _write_data,
    _tensor.grad.__get__: _read_grad,
    _tensor.grad.__set__: _read_grad,
    _tensor.grad_fn.__get__: _read_grad_fn,
    Tensor.register_hook: _register_hook,
    Tensor.register_post_accumulate_grad_hook: _register_post_accumulate_hook,
    Tensor.retain_grad: _retain_grad,
}
"""What tensors are asked for, by what a TorchFunctionMode sees of it."""
