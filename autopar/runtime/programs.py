"""The programs of a model by what they were made for: the kind of call, and what forward reads of Python beside tensors.

Comes in: programs as they are made. Goes out: the one for a call, if there is one. A forward that divides by ``self.temperature`` is
captured with the number that it has; when the user sets another, the model is captured anew, as it is for a batch of another size. So it
is for functions, lists and objects among the attributes, for methods that are exchanged, global variables, and hooks of modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from autopar.capture import OF_CLASS, class_attribute, collects_outputs, contents_of, variables_of
from autopar.rewrite import Program

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(slots=True)
class _Read:
    """An attribute that forward read: of which module, its name, the value then and what that held."""

    module: nn.Module
    name: str
    value: Any
    contents: Any


@dataclass(slots=True)
class _Made:
    """A program, and what the model was when it was made.

    Attributes:
        program: the program.
        reads: what forward read of the modules' own attributes, in the order of the program's settings.
        contents: (name, value, what it held) of each of these values, once, as it may be changed in place.
        of_classes: class and name -> a module of it, and what the class had under that name.
        variables: variable of the code -> what it held.
        hooks: place in the list of all modules' hooks -> the user's hooks there.
    """

    program: Program
    reads: list[_Read]
    contents: list[tuple[str, Any, Any]]
    of_classes: dict[tuple[type, str], tuple[nn.Module, Any]]
    variables: dict[str, Any]
    hooks: dict[int, list[Any]]


class Programs:
    """The programs of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._modules = dict(model.named_modules())
        self._hooks_at = [(path, vars(module)[kind]) for path, module in self._modules.items() for kind in _HOOKS]
        self._variables = variables_of(model)
        self._made: dict[Hashable, list[_Made]] = {}

    def find(self, key: Hashable) -> tuple[int, Program | None]:
        """The program for a kind of call and the settings that the model has now, and its number from 1; (0, None) if it is to be made."""
        made = self._made.get(key)
        if not made:
            return 0, None
        for number, one in reversed(list(enumerate(made, 1))):
            if next(self._changes(one), None) is None:
                return number, one.program
        warnings.warn(
            f"{', '.join(self._changes(made[-1]))}: {self._name} is captured and planned again, since its forward reads that. For a value"
            " that changes often, let forward take it as an argument that is a tensor, or make it a buffer",
            stacklevel=2,
        )
        return 0, None

    def add(self, key: Hashable, program: Program) -> None:
        """Keep a program that was made for a kind of call and the settings that the model has now."""
        reads, held, of_classes = [], dict[int, tuple[str, Any, Any]](), dict[tuple[type, str], tuple[nn.Module, Any]]()
        for (path, name), value in program.settings.items():
            module = self._modules[path]
            if value is OF_CLASS:
                of_classes.setdefault((type(module), name), (module, contents_of(class_attribute(module, name))))
            elif id(value) not in held:
                held[id(value)] = name, value, contents_of(value)
            reads.append(_Read(module, name, value, None if value is OF_CLASS else held[id(value)][2]))
        variables = {label: contents_of(read()) for label, read in self._variables.items()}
        self._made.setdefault(key, []).append(_Made(program, reads, list(held.values()), of_classes, variables, self._hooks()))

    def _hooks(self) -> dict[int, list[Any]]:
        return {
            position: of_user
            for position, (_, hooks) in enumerate(self._hooks_at)
            if hooks and (of_user := [hook for hook in hooks.values() if not collects_outputs(hook)])
        }

    def _changes(self, made: _Made) -> Iterator[str]:
        """What isn't as it was when a program was made, in words."""
        for (path, _), read in zip(made.program.settings, made.reads, strict=True):
            now = vars(read.module).get(read.name, OF_CLASS)
            if now is not read.value and (OF_CLASS in (now, read.value) or contents_of(now) != read.contents):
                yield f"{path}.{read.name}".lstrip(".") + f" was {_show(read.value)} and is {_show(now)}"
        yield from (f"{name} holds other values" for name, value, held in made.contents if contents_of(value) != held)
        for (kind, name), (module, held) in made.of_classes.items():
            if contents_of(class_attribute(module, name)) != held:
                yield f"{kind.__name__}.{name} is another"
        yield from (f"{label} is another" for label, held in made.variables.items() if contents_of(self._variables[label]()) != held)
        hooks = self._hooks()
        if hooks != made.hooks:
            places = [at for at in {**hooks, **made.hooks} if hooks.get(at) != made.hooks.get(at)]
            yield f"hooks of {', '.join(dict.fromkeys(self._hooks_at[at][0] or 'the model' for at in places))} are others"


def _show(value: Any) -> str:
    if value is OF_CLASS:
        return "the class's or missing"
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) < 80 else f"another {type(value).__name__}"
