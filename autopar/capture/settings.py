"""What a forward reads of Python beside tensors, and on which the captured graph therefore depends.

Comes in: a model while its forward runs for an export, and its code. Goes out: the settings that it read, such as the temperature of a
softmax, an activation, a list of scales, a configuration, a global variable. They are part of the graph as they were; a model whose
settings have changed must be captured again.
"""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from autopar.capture.fx_nodes import is_installed
from autopar.replaced import replaced

Settings = Mapping[tuple[str, str], Any]
"""Path of a module and name of an attribute -> its value, or `OF_CLASS`."""

OF_CLASS = "<of the class>"
"""In the place of a value, by identity: the module itself has no such attribute; its class may have one, such as a method."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_BY_IDENTITY = (*(Tensor, nn.Module, type, ModuleType), *(FunctionType, BuiltinFunctionType, MethodType, functools.partial))
_OF_MODULE = frozenset(dir(nn.Module)) - {"forward"}
DEPTH = 4
"""How far containers, objects and closures are followed."""
LONGEST = 256
"""The longest container whose contents are looked at."""
_ABSENT = object()


@contextmanager
def reads_noted(model: nn.Module, internal: Collection[str], reads: dict[tuple[str, str], Any]) -> Iterator[None]:
    """Inside, the attributes that modules of `model` are asked for are noted in `reads`, with the value of the first time.

    Args:
        model: the model.
        internal: attributes of every module, which aren't the user's.
        reads: gets the settings. Tensors and modules aren't among them.
    """
    get, find = nn.Module.__getattribute__, nn.Module.__getattr__
    paths = {id(module): path for path, module in model.named_modules()}

    def read(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        if name not in internal and name not in _OF_MODULE and id(module) in paths:
            if name not in object.__getattribute__(module, "__dict__"):
                reads.setdefault((paths[id(module)], name), OF_CLASS)
            elif not isinstance(value, (Tensor, nn.Module)):
                reads.setdefault((paths[id(module)], name), value)
        return value

    def miss(module: nn.Module, name: str) -> Any:
        try:
            return find(module, name)
        except AttributeError:
            if id(module) in paths:
                reads.setdefault((paths[id(module)], name), OF_CLASS)
            raise

    with replaced(nn.Module, "__getattribute__", read), replaced(nn.Module, "__getattr__", miss):
        yield


# --- values that may be changed in place --------------------------------------------------------------------------------------------------


class _Same:
    """An object that is compared by identity, as nothing is known of its contents."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def contents_of(value: Any, depth: int = DEPTH) -> Any:
    """What a forward may read of a value, to be compared by ``==`` with what it holds later: 1 and 1.0 differ, as their results do."""
    if type(value) in _PLAIN:
        return type(value), value
    inner: Any = None
    if isinstance(value, (list, tuple, deque)):
        inner = value
    elif isinstance(value, dict):
        inner = [part for item in value.items() for part in item]
    elif isinstance(value, (set, frozenset)):
        return (type(value), frozenset(value)) if len(value) <= LONGEST else _Same(value)
    elif not _is_opaque(value) and isinstance(attributes := getattr(value, "__dict__", None), dict):
        inner = [part for item in attributes.items() for part in item]
    if inner is None or not depth or len(inner) > 2 * LONGEST:
        return _Same(value)
    return type(value), [contents_of(part, depth - 1) for part in inner]


def _is_opaque(value: object) -> bool:
    """Whether the attributes of an object are no settings: those of a logger, a lock or a summary writer change as it is used."""
    library = type(value).__module__.partition(".")[0]
    return isinstance(value, _BY_IDENTITY) or (
        (library == "torch" or library in sys.stdlib_module_names) and not isinstance(value, (SimpleNamespace, Namespace))
    )


def class_attribute(module: nn.Module, name: str) -> Any:
    """What the class of a module has under a name, such as a method or a number."""
    return next((vars(kind)[name] for kind in type(module).__mro__ if name in vars(kind)), _ABSENT)


# --- variables of code ----------------------------------------------------------------------------------------------------------------


def variables_of(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Global variables, and those of enclosing functions, that the user's forwards name: how each is called -> a function that reads it."""
    found: dict[str, Callable[[], Any]] = {}
    seen = set[CodeType]()
    for kind in dict.fromkeys(map(type, model.modules())):
        if isinstance(forward := getattr(kind, "forward", None), FunctionType):
            _find_variables(forward, kind, found, seen)
    return found


def _find_variables(function: FunctionType, kind: type, found: dict[str, Callable[[], Any]], seen: set[CodeType]) -> None:
    """Those of a function, of the functions that it names, and of the methods of `kind` that it names."""
    code = function.__code__
    if code in seen or is_installed(code.co_filename):
        return
    seen.add(code)
    variables = function.__globals__
    names = set(_names_of(code))
    places = [
        (f"the variable {function.__module__}.{name}", functools.partial(variables.get, name))
        for name in sorted(names)
        if name in variables
    ]
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    places += [(f"the variable {name} of {function.__qualname__}", functools.partial(_read_cell, cell)) for name, cell in cells]
    for label, read in places:
        value = read()
        if isinstance(value, FunctionType):
            _find_variables(value, kind, found, seen)
        if isinstance(value, ModuleType) and not is_installed(getattr(value, "__file__", None) or "site-packages"):
            inner = vars(value)
            found |= {f"{value.__name__}.{name}": functools.partial(inner.get, name) for name in sorted(names) if name in inner}
        elif not isinstance(value, (ModuleType, type)):
            found[label] = read
    for name in names:
        method = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        if isinstance(method, FunctionType):
            _find_variables(method, kind, found, seen)


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)


def _read_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that isn't bound yet
        return None
