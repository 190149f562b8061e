"""Numbers and names among a model's attributes that its forward reads, and on which the captured graph therefore depends.

Comes in: a model while its forward runs for an export. Goes out: the settings that it read, such as the temperature of a softmax, the
probability of a dropout or a flag. They are part of the graph as they were; a model whose settings have changed must be captured again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Settings = Mapping[tuple[str, str], Any]
"""Path of a module and name of an attribute -> its value."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@contextmanager
def reads_noted(model: nn.Module, internal: Collection[str], reads: dict[tuple[str, str], Any]) -> Iterator[None]:
    """Inside, the plain attributes that modules of `model` are asked for are noted in `reads`, with the value of the first time.

    Args:
        model: the model.
        internal: attributes of every module, which aren't the user's.
        reads: gets the settings.
    """
    original = nn.Module.__dict__.get("__getattribute__")
    get: Callable[[nn.Module, str], Any] = original or object.__getattribute__
    paths = {id(module): path for path, module in model.named_modules()}

    def read(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        if _is_setting(value) and name not in internal and id(module) in paths and name in object.__getattribute__(module, "__dict__"):
            reads.setdefault((paths[id(module)], name), value)
        return value

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if original is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = original  # type: ignore[method-assign]


def _is_setting(value: object) -> bool:
    """Whether a value is plain, or a tuple of plain values. What can change in place, a list or an object, would have to be copied."""
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_setting, value)))
