"""Frozen dataclasses as JSON texts: written, and read back with every field checked by its type.

Comes in: a dataclass, or what a file holds. Goes out: JSON data, or an instance of the class. What the fields mean isn't known here: `read`
follows their types, so that a class grows by a field alone. It refuses, naming the field, what no field can hold:

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Step:
    ...     seconds: float
    ...     layout: Layout
    >>> read(Step, {"seconds": 2, "layout": "S0,R"}, "step").seconds
    2.0
    >>> read(Step, {"seconds": -2, "layout": "S0,R"}, "step")
    Traceback (most recent call last):
    ...
    autopar.errors.PlanError: step.seconds is -2, a number from 0 is needed

Numbers are finite, from 0, and of 64 bits at most; texts hold printable characters only, since they are shown in terminals. A type may say
more: a `Count` is an integer from 1, a `Name` a text that isn't empty, an ``Annotated[str, Among(WORDS)]`` one of these words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from autopar.errors import InputError, PlanError
from autopar.ir import Layout, Mesh, Placement, Precision, format_layout, format_placement, parse_layout, parse_placement
from autopar.plans.pins import Pins
from autopar.texts import find_unprintable, printable

LARGEST = 2**63 - 1
"""No number in a file is larger: this is what 64 bits hold, which solvers, file formats and other languages count with."""

# More digits than any such number has: the rest is cut off, so that a number of a million digits is refused as quickly as any other.
_DIGITS = 21

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class AtLeast:
    """What a type is annotated with that holds numbers from `least`, or texts of so many characters."""

    least: int


@dataclass(frozen=True, slots=True)
class Among:
    """What a type is annotated with that holds one of `words`."""

    words: tuple[str, ...]


Count = Annotated[int, AtLeast(1)]
Name = Annotated[str, AtLeast(1)]


def parse_json(text: str) -> Any:
    """What JSON `text` stands for. Raises PlanError when it isn't JSON, is nested too deeply, or an object has a name twice."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits[:_DIGITS]), object_pairs_hook=_make_object)
    except PlanError:
        raise
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not whole JSON: {error}; was the file cut off? Make the plan again with `autopar plan`") from error


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise PlanError(f"the field {name!r} stands twice in one object; leave out one of the two")
        data[name] = value
    return data


def write(value: Any) -> Any:
    """JSON data of a dataclass instance, from which `read` makes an equal one."""
    return _write(type(value), value)


def _write(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    kind, _ = _unwrap(kind)
    if kind in _FORMS:
        return _FORMS[kind][1](value)
    if _has_fields(kind):
        return {name: _write(inner, getattr(value, name)) for name, inner in _types_of(kind).items()}
    if get_origin(kind) is tuple:
        return [_write(get_args(kind)[0], item) for item in value]
    if get_origin(kind) is Mapping:
        return {name: _write(get_args(kind)[1], item) for name, item in value.items()}
    return value


def read(cls: type[_T], data: Any, where: str) -> _T:
    """The instance of dataclass `cls` that `data` describes; `where` names the data in messages, such as ``plan.seconds``.

    Fields are numbers, texts, dataclasses, layouts, placements, meshes, tuples of these and mappings from names to them; None where the
    type allows it.

    Raises PlanError, naming the field, for a field that is missing, unknown, of another type, or holds what it can't hold.
    """
    if not isinstance(data, dict):
        raise PlanError(f"{where}: an object is needed, not {type(data).__name__}")
    kind: Any = cls
    types = _types_of(kind)
    if wrong := wrong_fields(data, types):
        raise PlanError(f"{where}: {wrong}")
    return cls(**{name: _read(inner, data[name], f"{where}.{name}") for name, inner in types.items()})


def wrong_fields(data: Mapping[str, Any], needed: Collection[str]) -> str:
    """Which of the needed fields `data` lacks, and which it has beside them, in words; empty when neither."""
    missing, unknown = sorted(set(needed) - data.keys()), sorted(data.keys() - set(needed))
    texts = [f"fields {what}: {', '.join(map(printable, names))}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    return "; ".join(texts)


def _unwrap(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without what it is annotated with and without its None, and the annotations."""
    limits: tuple[Any, ...] = ()
    if type(None) in get_args(kind):
        (kind,) = (inner for inner in get_args(kind) if inner is not type(None))
    if get_origin(kind) is Annotated:
        kind, *annotations = get_args(kind)
        limits = tuple(annotations)
    return kind, limits


def _has_fields(kind: Any) -> bool:
    return is_dataclass(kind)


@lru_cache(maxsize=64)
def _types_of(cls: Any) -> Mapping[str, Any]:
    """The type of each field of a dataclass, in their order."""
    hints = get_type_hints(cls, include_extras=True)
    return {part.name: hints[part.name] for part in fields(cls)}


def _read(kind: Any, value: Any, where: str) -> Any:
    """The value of type `kind` that JSON data describes."""
    if value is None and type(None) in get_args(kind):
        return None
    kind, limits = _unwrap(kind)
    if kind in _FORMS:
        return _FORMS[kind][0](value, where)
    if kind is str:
        return _read_text(value, where, *limits)
    if kind is bool:
        if not isinstance(value, bool):
            raise PlanError(f"{where}: true or false is needed, not {type(value).__name__}")
        return value
    if kind in (int, float):
        return _read_number(kind, value, where, *limits)
    if _has_fields(kind):
        return read(kind, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise PlanError(f"{where}: a list is needed, not {type(value).__name__}")
        return tuple(_read(get_args(kind)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    assert get_origin(kind) is Mapping, f"{where}: no reader for {kind}"
    if not isinstance(value, dict):
        raise PlanError(f"{where}: an object is needed, not {type(value).__name__}")
    for name in value:
        _read(Name, name, f"{where}: a name")
    return {name: _read(get_args(kind)[1], item, f"{where}[{name!r}]") for name, item in value.items()}


def _read_text(value: Any, where: str, *limits: AtLeast | Among) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{where}: str is needed, not {type(value).__name__}")
    if character := find_unprintable(value):
        raise PlanError(f"{where} holds {character!a}, which is no printable character")
    for limit in limits:
        if isinstance(limit, AtLeast) and len(value) < limit.least:
            raise PlanError(f"{where} is empty")
        if isinstance(limit, Among) and value not in limit.words:
            raise PlanError(f"{where} is {value!r}; known are {', '.join(limit.words)}")
    return value


def _read_number(kind: type[int] | type[float], value: Any, where: str, limit: AtLeast = AtLeast(0)) -> int | float:
    # bool is an int in Python, but no number. A whole number may stand for a real one.
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise PlanError(f"{where}: {kind.__name__} is needed, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise PlanError(f"{where}: a finite number is needed, not {value}")
    if value < limit.least:
        raise PlanError(f"{where} is {value}, {'an integer' if kind is int else 'a number'} from {limit.least} is needed")
    # After the conversion, which rounds: a number that is read can be written again.
    if (number := kind(value)) > LARGEST:
        raise PlanError(f"{where} is larger than any number of 64 bits")
    return number


def _read_layout(value: Any, where: str) -> Layout:
    layout: Layout = _parse(parse_layout, value, where)
    for state in layout:
        _check_split(f"{state}", state.outer, where)
        if state.dim > LARGEST:
            raise PlanError(f"{where}: the dim is larger than any number of 64 bits")
    return layout


def _read_placement(value: Any, where: str) -> Placement:
    placement: Placement = _parse(parse_placement, value, where)
    for part in placement:
        _check_split(f"{part}", getattr(part, "outer", 1), where)
    return placement


def _parse(parse: Callable[[str], _T], value: Any, where: str) -> _T:
    text = _read_text(value, where)
    try:
        return parse(text)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from error


def _check_split(text: str, outer: int, where: str) -> None:
    if not 1 <= outer <= LARGEST:
        raise PlanError(f"{where}: {text} splits inside {outer} outer blocks, a number from 1 of at most 64 bits is needed")


def _read_mesh(value: Any, where: str) -> Mesh:
    if (
        not isinstance(value, dict)
        or set(value) != {"names", "sizes"}
        or not all(isinstance(item, list) for item in value.values())
        or not all(isinstance(name, str) for name in value["names"])
        or not all(type(size) is int and size >= 1 for size in value["sizes"])
    ):
        raise PlanError(f"{where}: an object with lists names (texts) and sizes (integers from 1) is needed")
    names = _read(tuple[Name, ...], value["names"], f"{where}.names")
    sizes = _read(tuple[Count, ...], value["sizes"], f"{where}.sizes")
    try:
        return Mesh(names, sizes)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from error


def _write_mesh(mesh: Mesh) -> dict[str, list[Any]]:
    return {"names": list(mesh.names), "sizes": list(mesh.sizes)}


def _read_precision(value: Any, where: str) -> Precision:
    try:
        return Precision.parse(_read_text(value, where))
    except InputError as error:
        raise PlanError(f"{where} is {value!r}: {error}") from error


def _read_pins(value: Any, where: str) -> Pins:
    texts: Mapping[str, str] = _read(Mapping[str, str], value, where)
    try:
        return Pins.from_texts(texts)
    except InputError as error:
        raise PlanError(f"{where}: {error}") from error


def _write_pins(pins: Pins) -> dict[str, str]:
    return pins.texts


# Types that have a form of their own in JSON: how they are read and written.
_FORMS: Mapping[Any, tuple[Callable[[Any, str], Any], Callable[[Any], Any]]] = {
    Layout: (_read_layout, format_layout),
    Placement: (_read_placement, format_placement),
    Mesh: (_read_mesh, _write_mesh),
    Precision: (_read_precision, str),
    Pins: (_read_pins, _write_pins),
}
