"""The places of a model's parameters and buffers, and whether its modules changed since it was compiled.

Comes in: the user's model. Goes out: every name's place, from which a call reads what stands there now without walking the modules; and an
error that names what the programs of the model can't know of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from autopar.errors import InputError

Place = tuple[dict[str, Any], str]
"""A module's dict of parameters or buffers, and a name in it."""


def find_places(model: nn.Module, kind: Literal["_parameters", "_buffers"]) -> dict[str, Place]:
    """Every place of a tensor, by its full name; a tied parameter has several."""
    return {
        f"{path}.{name}" if path else name: (module.__dict__[kind], name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in module.__dict__[kind].items()
        if tensor is not None
    }


def read(place: Place) -> Any:
    """What is at a place now."""
    return place[0][place[1]]


class Structure:
    """Which modules a model is made of, which of them has which parameters, and which parameters are tied, when it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.named_modules())
        self._children = [(path, module._modules, list(module._modules.values())) for path, module in modules if module._modules]
        self._names = [(path, module._parameters, _names_of(module._parameters)) for path, module in modules if module._parameters]
        places = find_places(model, "_parameters")
        first_name: dict[int, str] = {}
        for name, place in places.items():
            first_name.setdefault(id(read(place)), name)
        firsts = [(name, first_name[id(read(place))]) for name, place in places.items()]
        self._ties = [(name, places[name], first, places[first]) for name, first in firsts if name != first]

    def check(self) -> None:
        """Raise InputError when something has changed."""
        for path, modules, before in self._children:
            if list(modules.values()) != before:
                raise InputError(f"modules of {path or 'the model'} were added, removed or exchanged {_SINCE}")
        for path, parameters, names in self._names:
            if _names_of(parameters) != names:
                raise InputError(f"parameters of {path or 'the model'} were added or removed {_SINCE}")
        for name, place, first, first_place in self._ties:
            if read(place) is not read(first_place):
                raise InputError(f"{name} and {first} were one parameter, and aren't any more {_SINCE}")


_SINCE = "since the model was compiled, which its programs don't know: make such changes first, or compile the changed model again"


def _names_of(parameters: Mapping[str, nn.Parameter | None]) -> list[str]:
    return [name for name, parameter in parameters.items() if parameter is not None]
