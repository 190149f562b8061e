"""What a forward leaves behind in Python: attributes that it sets, lists that it appends to, parameters that it replaces.

Comes in: a model before, during and after an export. Goes out: the model as it was, or a CaptureError. A captured program makes tensors for
its own calls and returns some; no one sets attributes. So these are the cases, told apart while the graph is traced:

- a tensor that was computed from inputs, parameters or random numbers: the training loop may read it, so it is refused, but for modules
  of installed libraries only noted, as their users can't change them and seldom read their attributes;
- a tensor that was computed from nothing else, such as a mask that is made once: the attribute only spares making it again, and the program
  makes it itself, so the old value comes back;
- numbers, text and containers of these: if another run of the forward changes them again, such as a counter, they are refused, and
  otherwise the old value comes back.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from autopar import torch_compat
from autopar.capture.fx_nodes import is_installed
from autopar.capture.settings import DEPTH, LONGEST, OF_CLASS, Settings, reads_noted
from autopar.errors import CaptureError

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes of every module, which aren't the user's."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, set, dict, deque)


@dataclass(slots=True)
class ModelAttributes:
    """A model's attributes before an export, and what the forward did to them.

    Attributes:
        model: the model.
        before: per module its attributes.
        contents: containers among them, each with a copy.
        states: the plain values before the first run of the forward and after each one, by module and attribute.
        after: per module what the last run left in its attributes, containers as copies; an export undoes some of it.
        problems: what can't be part of a program.
        notes: what isn't done by a program, for the plan's report.
        reads: the attributes that the forward read, with the values that they had before it.
        parameters: at the start of a run, the parameters by module and name, and whether they need gradients.
    """

    model: nn.Module
    before: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    contents: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    states: list[Mapping[tuple[str, str], Any]] = field(default_factory=list)
    after: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: dict[tuple[str, str], tuple[Tensor | None, bool]] = field(default_factory=dict)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> ModelAttributes:
        """The attributes of a model as they are now."""
        made, seen = ModelAttributes(model), set[int]()
        for module in model.modules():
            made.before[module] = dict(vars(module))
            containers: list[Any] = [module._parameters, module._buffers, module._modules]
            for name, value in _own(module):
                containers += [_contents(part) for _, part in _walk(name, value, seen)]
            made.contents.update({id(part): (part, part.copy()) for part in containers if part is not None})
        return made

    def begin_run(self) -> None:
        """Note the state in which the forward starts."""
        self.parameters = _parameters(self.model)
        if not self.states:
            self.states.append(_plain_values(self.model))

    def end_run(self) -> None:
        """Look for what the forward, which has just run, did; must be called while the graph is still traced."""
        self.states.append(_plain_values(self.model))
        self.after = {
            module: {name: copy.copy(value) if isinstance(value, _CONTAINERS) else value for name, value in _own(module)}
            for module in self.model.modules()
        }
        for key, (tensor, needs_grad) in _parameters(self.model).items():
            name = ".".join(filter(None, key))
            if key not in self.parameters:
                self.problems.append(
                    f"the forward adds the parameter {name}. Call the model once before, so that it has all its parameters"
                )
            elif self.parameters[key][0] is not tensor:
                self.problems.append(
                    f"the forward replaces the parameter {name}. Make the new value a tensor of the forward, not a parameter"
                )
            elif self.parameters[key][1] != needs_grad:
                self.problems.append(f"the forward changes requires_grad of the parameter {name}. Do this outside of the forward")
        for prefix, module in self.model.named_modules():
            for kind, owner in (("module", module._modules), ("buffer", module._buffers)):
                _, before = self.contents.get(id(owner), (None, owner))
                names = ", ".join(f"{prefix}.{name}".lstrip(".") for name in owner if name not in before)
                if names:
                    self.problems.append(f"the forward adds the {kind} {names}. Call the model once before, or make it in __init__")
        own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        buffers = {torch_compat.traced_node(buffer) for buffer in self.model.buffers()}
        for owner, path, value in self._left_behind():
            if not isinstance(value, FakeTensor) or id(value) in own or not self._is_computed(value, buffers):
                continue
            kept = f"the forward keeps a tensor of shape {list(value.shape)} in {path}"
            if _is_installed(owner):
                self.notes.append(f"{kept}, which isn't done by the program: it stays as it was")
            else:
                remedy = "Return it from the forward, or make it a buffer (register_buffer)"
                self.problems.append(f"{kept}, which only the run that is captured would do. {remedy}")

    def continue_run(self) -> None:
        """Set the attributes as the last run of the forward left them."""
        for module, attributes in self.after.items():
            vars(module).update(attributes)

    def find_changed(self) -> frozenset[str]:
        """Names of the attributes whose plain values the last run changed. Raises CaptureError when no run was seen."""
        if not self.states:
            raise CaptureError("the model's class overrides __call__, which isn't captured. Do what it does in forward")
        before, now = self.states[-2:]
        return frozenset(".".join(filter(None, key)) for key, value in now.items() if key not in before or before[key] != value)

    def refuse_changes(self, names: Collection[str]) -> None:
        """Note that the forward changes these attributes in every call."""
        self.problems += [
            f"the forward changes {name} in every call, and a program makes tensors only. Change it outside of the forward, or make it"
            " a buffer (register_buffer) that the forward updates by operators"
            for name in sorted(names)
        ]

    def find_settings(self) -> Settings:
        """What the user gave the modules, or their classes, and the forward read."""
        before = {(path, name): value for path, module in self.model.named_modules() for name, value in self.before.get(module, {}).items()}
        return {key: value for key, value in self.reads.items() if before.get(key, OF_CLASS) is value}

    def watch_reads(self) -> AbstractContextManager[None]:
        """Inside, what the forward reads of its modules is noted."""
        return reads_noted(self.model, _INTERNAL, self.reads)

    def restore(self) -> None:
        """Give the model its attributes back."""
        for module, attributes in self.before.items():
            own = vars(module)
            for name in [name for name in own if name not in attributes]:
                del own[name]
            for name, value in attributes.items():
                if own.get(name) is not value and name not in _INTERNAL:
                    own[name] = value
        for container, contents in self.contents.values():
            if not _is_same(container, contents):
                _refill(container, contents)

    def raise_problems(self) -> None:
        """Raise CaptureError if the forward did what can't be part of a program."""
        if self.problems:
            raise CaptureError("; ".join(dict.fromkeys(self.problems[:3])))

    def _left_behind(self) -> Iterator[tuple[object, str, Any]]:
        """(owner, where, value) of what is reached from the model's attributes, its forward hooks, and global variables of its code."""
        seen: set[int] = set()
        for prefix, module in self.model.named_modules():
            derived = _derived_weights(module)
            for name, value in _own(module):
                if name not in derived:
                    yield from ((type(module), *found) for found in _walk(f"{prefix}.{name}".lstrip("."), value, seen))
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                yield from (
                    (hook, *found) for found in _walk(f"a variable of the forward hook {getattr(hook, '__name__', hook)}", hook, seen)
                )
        for kind in {type(module) for module in self.model.modules()}:
            variables = getattr(kind.forward, "__globals__", {})
            if not _is_installed(kind):
                for name, value in list(variables.items()):
                    if isinstance(value, (Tensor, *_CONTAINERS)):
                        yield from ((kind, *found) for found in _walk(f"the global variable {name}", value, seen))

    def _is_computed(self, tensor: Tensor, buffers: set[fx.Node | None]) -> bool:
        """Whether a traced tensor depends on inputs, parameters, random numbers, or a tensor that an attribute had before."""
        node = torch_compat.traced_node(tensor)
        pending, seen = [node] if node is not None else [], set[fx.Node]()
        while pending:
            current = pending.pop()
            if current in seen or current in buffers:
                continue
            seen.add(current)
            is_random = isinstance(current.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in current.target.tags
            if current.op == "placeholder" or is_random or (current.op == "get_attr" and self._is_attribute(current)):
                return True
            pending.extend(current.all_input_nodes)
        return False

    def _is_attribute(self, node: fx.Node) -> bool:
        """Whether a node reads a tensor that is a plain attribute of a module."""
        value = torch_compat.traced_constant(node)
        return any(part is value for attributes in self.before.values() for item in attributes.values() for _, part in _walk("", item))


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that its class or its user gave it."""
    return ((name, value) for name, value in list(vars(module).items()) if name not in _INTERNAL)


def _derived_weights(module: nn.Module) -> set[str]:
    """Names of the attributes that hooks of `torch.nn.utils` set anew in every call: spectral and weight norms, pruned weights."""
    hooks = (hook for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils."))
    return {str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", "")) for hook in hooks}


def _is_installed(value: object) -> bool:
    """Whether a class or function comes from an installed package other than torch, whose modules keep no tensors of their own accord."""
    if (getattr(value, "__module__", None) or "").partition(".")[0] == "torch":
        return False
    file = getattr(sys.modules.get(getattr(value, "__module__", None) or ""), "__file__", None)
    return file is not None and is_installed(file)


def _parameters(model: nn.Module) -> dict[tuple[str, str], tuple[Tensor | None, bool]]:
    return {
        (prefix, name): (tensor, tensor is not None and tensor.requires_grad)
        for prefix, module in model.named_modules()
        for name, tensor in module._parameters.items()
    }


def _plain_values(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Module and attribute -> a summary of what is plain of its value; attributes that have nothing plain are left out."""
    values = ((prefix, name, _summary(value, DEPTH)) for prefix, module in model.named_modules() for name, value in _own(module))
    return {(prefix, name): summary for prefix, name, summary in values if summary is not None}


def _summary(value: Any, depth: int) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _CONTAINERS) and depth:
        if len(value) > LONGEST:
            return len(value), _hash(value)
        items = value.items() if isinstance(value, dict) else sorted(value, key=repr) if isinstance(value, set) else value
        return len(value), [_summary(item, depth - 1) for item in items]
    return None


def _hash(container: Any) -> int | None:
    """A number for what a long container holds; None where it holds other containers."""
    items = container.items() if isinstance(container, dict) else container
    try:
        return hash(frozenset(items) if isinstance(container, set) else tuple(items))
    except TypeError:
        return None


def _walk(path: str, value: Any, seen: set[int] | None = None, depth: int = DEPTH) -> Iterator[tuple[str, Any]]:
    """(path, part) of a value and what it holds: items of containers, attributes of objects, variables of functions."""
    seen = set() if seen is None else seen
    if isinstance(value, (*_PLAIN, type, nn.Module, ModuleType)) or id(value) in seen:
        return
    if not isinstance(value, Tensor):
        seen.add(id(value))
    yield path, value
    if depth == 0 or isinstance(value, Tensor):
        return
    if isinstance(value, _CONTAINERS):
        if len(value) <= LONGEST:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in list(items):
                yield from _walk(f"{path}[{key!r}]", item, seen, depth - 1)
        return
    if isinstance(value, functools.partial):
        inner: Mapping[str, Any] = {"args": value.args, "keywords": value.keywords, "func": value.func}
    else:
        cells = getattr(value, "__closure__", None) or ()
        names = getattr(getattr(value, "__code__", None), "co_freevars", ())
        inner = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True) if _is_filled(cell)}
        inner = {**inner, **(getattr(value, "__dict__", None) or {}), "__self__": getattr(value, "__self__", None)}
    for name, item in list(inner.items()):
        yield from _walk(f"{path}.{name}", item, seen, depth - 1)


def _contents(value: Any) -> Any:
    """What to copy of a value, to restore it later: the container itself, or an object's attributes; None where nothing can change."""
    if isinstance(value, _CONTAINERS):
        return None if isinstance(value, tuple) else value
    return None if isinstance(value, Tensor) else getattr(value, "__dict__", None)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that isn't bound yet
        return False


def _is_same(container: Any, contents: Any) -> bool:
    if isinstance(container, set):
        return bool(container == contents)
    if len(container) != len(contents):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in contents.items())
    return all(a is b for a, b in zip(container, contents, strict=True))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)
