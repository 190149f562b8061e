"""The programs of a model by what they were made for: the kind of call, and the numbers and names that forward reads of the model.

Comes in: programs as they are made. Goes out: the one for a call, if there is one. A forward that divides by ``self.temperature`` is
captured with the number that it has; when the user sets another, the model is captured anew, as it is for a batch of another size.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from autopar.rewrite import Program

_ABSENT = object()

_Read = tuple[Mapping[str, Any], str, Any]
"""A module's attributes, the name of one, and the value that forward read."""


class Programs:
    """The programs of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._attributes = {path: vars(module) for path, module in model.named_modules()}
        self._made: dict[Hashable, list[tuple[Program, list[_Read]]]] = {}

    def find(self, key: Hashable) -> Program | None:
        """The program for a kind of call and the settings that the model has now; None where it is still to be made."""
        made: Sequence[tuple[Program, list[_Read]]] = self._made.get(key, ())
        for program, settings in reversed(made):
            if all(_is_same(attributes.get(name, _ABSENT), value) for attributes, name, value in settings):
                return program
        if made:
            changes = ", ".join(self._changes(made[-1][0]))
            warnings.warn(
                f"{changes}: {self._name} is captured and planned again, since its forward reads that. For a value that changes often,"
                " let forward take it as an argument that is a tensor, or make it a buffer",
                stacklevel=2,
            )
        return None

    def add(self, key: Hashable, program: Program) -> None:
        """Keep a program that was made for a kind of call and the settings that the model has now."""
        settings = [(self._attributes[path], name, value) for (path, name), value in program.settings.items()]
        self._made.setdefault(key, []).append((program, settings))

    def _changes(self, program: Program) -> Iterator[str]:
        for (path, name), value in program.settings.items():
            now = self._attributes[path].get(name)
            if not _is_same(now, value):
                yield f"{path}.{name}".lstrip(".") + f" was {value!r} and is {now!r}"


def _is_same(now: Any, value: Any) -> bool:
    """Whether a forward that read `value` would do the same with `now`: 1 and 1.0 give results of other dtypes."""
    if now is value or type(now) is not type(value):
        return now is value
    return len(now) == len(value) and all(map(_is_same, now, value)) if isinstance(value, tuple) else bool(now == value)
