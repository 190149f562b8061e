"""Graphs of a program as Python source that a person reads.

Comes in: fx modules of the rewrite. Goes out: functions as text. Like layers share one function, parameters are read where they are used
by the user's own names, each line of the user's stands above the calls that it became, and a name is deleted after its last use, so that
what nothing needs any more is freed as in the program itself.
"""

from __future__ import annotations

import builtins
import json
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from autopar.capture import source_of
from autopar.emit.prune import LIBRARY, Definition
from autopar.errors import InputError
from autopar.ops import Recomputed
from autopar.ops import recompute as recompute_module
from autopar.texts import printable

_WIDTH = 120
_RESERVED = {*keyword.kwlist, *dir(builtins), "torch", "math", "operator", "aten", "DEVICE", "p", "b"}
OPERATORS: Mapping[str, Definition] = {
    "attention": ("autopar.ops.attention", "attention"),
    "padded_conv1d": ("autopar.ops.padded", "padded_conv1d"),
}
"""Operator of this library -> the function that defines it."""


@dataclass(slots=True)
class Printer:
    """Functions printed so far.

    Attributes:
        layers: op of the captured graph -> path of the module that it was called in.
        functions: name -> text, in the order in which they must stand.
        definitions: what the functions call of this library.
    """

    layers: Mapping[str, str]
    functions: dict[str, str] = field(default_factory=dict)
    definitions: set[Definition] = field(default_factory=set)
    _by_body: dict[str, str] = field(default_factory=dict)
    _by_module: dict[nn.Module, tuple[str, frozenset[int], bool]] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """The modules of this library that functions call, as the copies are named."""
        return sorted({module.rpartition(".")[2] for module, _ in self.definitions - set(OPERATORS.values())})

    def print_program(self, module: fx.GraphModule, name: str, tables: Mapping[str, str], docstring: str) -> str:
        """Print the function `name` of a whole program or a stage.

        Args:
            module: its graph.
            name: of the function.
            tables: placeholder -> the expression that stands for it (``p["layers.0.weight"]``); others are arguments after ``p`` and ``b``.
            docstring: what it does, in a line.
        """
        return self._print(module, name, tables, docstring, ("p", "b"))

    def _print(
        self, module: fx.GraphModule, name: str, tables: Mapping[str, str], docstring: str, leading: Sequence[str], layer: str = ""
    ) -> str:
        body = _Body(self, module, tables, layer)
        lines = body.lines()
        arguments = ", ".join([*leading, *body.arguments])
        text = "\n".join(lines)
        key = f"{arguments}\n{_without_sources(text)}"
        if not leading and key in self._by_body:
            return self._by_body[key]
        while name in self.functions or name in _RESERVED:
            name += "_"
        self._by_body[key] = name
        head = f"def {name}({arguments}):"
        if len(head) > _WIDTH:
            head = _fold(f"def {name}(", [*leading, *body.arguments], "):", "")
        self.functions[name] = f'{head}\n    """{docstring}"""\n{text}\n'
        return name

    def function_of(self, module: nn.Module, name: str, layer: str) -> tuple[str, frozenset[int], bool]:
        """The function that runs a submodule, which positions it updates, and whether the backward runs it again.

        Args:
            module: the submodule.
            name: a name for the function.
            layer: path of the first layer that it runs.
        """
        if module not in self._by_module:
            inner = module.module if isinstance(module, Recomputed) else module
            if not isinstance(inner, fx.GraphModule):
                raise InputError(f"a program with {type(module).__name__} can't be written as source")
            function = self._print(inner, name, {}, _describe_layer(layer), (), layer)
            again = isinstance(module, Recomputed)
            self._by_module[module] = function, module.updates if isinstance(module, Recomputed) else frozenset(), again
        return self._by_module[module]


def _describe_layer(layer: str) -> str:
    return f"{in_docstring(layer)} and its like." if layer else "A part of the program."


def in_docstring(text: str) -> str:
    """Text without what would end a docstring, or be read as something else in it: names of a plan file may hold anything."""
    return printable(text).replace("\\", "/").replace('"', "'")


def _without_sources(text: str) -> str:
    return re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE)


class _Body:
    """The body of one function."""

    def __init__(self, printer: Printer, module: fx.GraphModule, tables: Mapping[str, str], layer: str) -> None:
        self._printer, self._module = printer, module
        # Of a layer's own parameters, the first layer's path is left out: its like have other ones.
        own = re.compile(rf"^[pb]_{re.sub(r'[^A-Za-z0-9]', '_', layer)}_(?=[A-Za-z])") if layer else None
        self._names: dict[fx.Node, str] = {}
        self._taken: set[str] = set(_RESERVED) | set(printer.functions)
        self.arguments: list[str] = []
        for node in module.graph.find_nodes(op="placeholder"):
            if node.name in tables:
                self._names[node] = tables[node.name]
            else:
                self._names[node] = self._name(own.sub("", node.name) if own else node.name)
                self.arguments.append(self._names[node])
        self._tables = set(tables.values())

    def lines(self) -> list[str]:
        """The statements of the body, with the user's lines above them."""
        last_use = self._last_uses()
        # Functions that are called are printed first, so that none of their names is taken by a variable.
        callees = {node: self._callee(node) for node in self._module.graph.nodes if node.op == "call_module"}
        self._taken |= set(self._printer.functions) | set(self._printer.modules)
        lines: list[str] = []
        source = ""
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                lines.append(self._statement("return ", *self._results(node.args[0])))
                continue
            if (here := _comment_of(node, self._printer.layers)) and here != source:
                lines.append(f"    # {here}")
                source = here
            lines.append(self._assign(node, callees.get(node)))
            dead = [self._names[x] for x in last_use.get(node, ()) if self._names[x] not in self._tables]
            if dead:
                deleted = f"del {', '.join(dead)}"
                if len(lines[-1].rpartition("\n")[2]) + len(deleted) + 2 <= _WIDTH:
                    lines[-1] += f"; {deleted}"
                else:
                    lines.append(f"    {deleted}")
        return lines

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """Node -> what is used for the last time there, and what is made there and never used."""
        seen: set[fx.Node] = set()
        last: dict[fx.Node, list[fx.Node]] = {}
        for node in reversed(self._module.graph.nodes):
            for used in (*node.all_input_nodes, *(() if node.op in ("output", "placeholder") else (node,))):
                if used not in seen:
                    seen.add(used)
                    last.setdefault(node, []).append(used)
        return last

    def _name(self, wanted: str) -> str:
        # Numbered from the beginning of the function, so that parts of different stages that are alike read alike.
        base = re.sub(r"_\d+$", "", re.sub(r"\W", "_", wanted)) or "x"
        base = f"_{base}" if base[:1].isdigit() else base
        number, name = 0, base
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def _callee(self, node: fx.Node) -> tuple[str, frozenset[int], bool]:
        target = str(node.target)
        return self._printer.function_of(self._module.get_submodule(target), target, str(node.meta.get("layer") or ""))

    def _assign(self, node: fx.Node, callee: tuple[str, frozenset[int], bool] | None) -> str:
        if callee is not None:
            name, updates, again = callee
            layer = str(node.meta.get("layer") or name)
            call = self._call_layer(name, updates, again, node)
            self._names[node] = self._name(f"{re.sub(r'[^A-Za-z0-9]+', '_', layer).strip('_')}_out")
            return self._statement(f"{self._names[node]} = ", *call)
        call = self._call(node)
        self._names[node] = self._name(node.name)
        return self._statement(f"{self._names[node]} = ", *call)

    def _call_layer(self, name: str, updates: frozenset[int], again: bool, node: fx.Node) -> tuple[str, list[str], str]:
        arguments = [self._text(x) for x in node.args]
        if not again:
            return f"{name}(", arguments, ")"
        self._printer.definitions.add((recompute_module.__name__, "recompute"))
        more = [f"updates={sorted(updates)}"] if updates else []
        return "recompute.recompute(", [name, *arguments, *more], ")"

    def _call(self, node: fx.Node) -> tuple[str, list[str], str]:
        if node.op != "call_function":
            raise InputError(f"{node.name}: a program with a {node.op} of {node.target} can't be written as source")
        arguments = [self._text(x) for x in node.args] + [f"{name}={self._text(x)}" for name, x in node.kwargs.items()]
        if node.target is operator.getitem:
            return f"{arguments[0]}[{arguments[1]}]", [], ""
        return f"{self._target(node.target, node)}(", arguments, ")"

    def _target(self, target: Any, node: fx.Node) -> str:
        if isinstance(target, torch._ops.OpOverload):
            namespace, name = target.namespace, target._schema.name.partition("::")[2]
            if namespace == "aten":
                return f"aten.{name}.{target._overloadname}"
            if namespace == LIBRARY and name in OPERATORS:
                self._printer.definitions.add(OPERATORS[name])
                return f"torch.ops.{namespace}.{name}.{target._overloadname}"
            raise InputError(
                f"{target} ({source_of(node) or node.name}) is an operator of your own or of another library, which a package that needs"
                " torch only doesn't have"
            )
        module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", "")
        if module.startswith(f"{LIBRARY}.ops.") and "." not in name and name:
            self._printer.definitions.add((module, name))
            return f"{module.rpartition('.')[2]}.{name}"
        if module in ("_operator", "math") and isinstance(target, Callable):  # type: ignore[arg-type]
            return f"{module.lstrip('_')}.{name}"
        kind = type(target).__name__ if not name else f"{module}.{name}"
        raise InputError(
            f"{kind} ({source_of(node) or node.name}) can't be written as source: autograd functions and gradient hooks of your own stay in"
            " your code"
        )

    def _results(self, results: Any) -> tuple[str, list[str], str]:
        if isinstance(results, tuple | list):
            return "(", [self._text(x) for x in results], ",)" if len(results) == 1 else ")"
        return self._text(results), [], ""

    def _text(self, x: Any) -> str:
        """The text of an argument."""
        if isinstance(x, fx.Node):
            return self._names[x]
        if isinstance(x, tuple):
            return f"({', '.join(map(self._text, x))}{',' if len(x) == 1 else ''})"
        if isinstance(x, list):
            return f"[{', '.join(map(self._text, x))}]"
        if isinstance(x, dict):
            return "{" + ", ".join(f"{self._text(key)}: {self._text(value)}" for key, value in x.items()) + "}"
        if isinstance(x, slice):
            return f"slice({self._text(x.start)}, {self._text(x.stop)}, {self._text(x.step)})"
        if isinstance(x, torch.device):
            return "DEVICE"
        if isinstance(x, torch._ops.OpOverload):
            return f"aten.{x._schema.name.partition('::')[2]}.{x._overloadname}"
        if isinstance(x, float) and not math.isfinite(x):
            return f'float("{x}")'
        if isinstance(x, str):
            return json.dumps(x)
        if x is None or isinstance(x, bool | int | float | torch.dtype | torch.layout | torch.memory_format):
            return repr(x)
        raise InputError(f"an argument {x!r} of a program can't be written as source")

    def _statement(self, before: str, head: str, arguments: Sequence[str], tail: str) -> str:
        line = f"    {before}{head}{', '.join(arguments)}{tail}"
        return line if len(line) <= _WIDTH or not arguments else _fold(f"    {before}{head}", arguments, tail.lstrip(","), "    ")


def _fold(head: str, arguments: Sequence[str], tail: str, indent: str) -> str:
    """A call whose arguments take several lines."""
    rows = [""]
    for argument in arguments:
        if rows[-1] and len(indent) + 4 + len(rows[-1]) + len(argument) + 2 > _WIDTH:
            rows.append("")
        rows[-1] += f"{' ' if rows[-1] else ''}{argument},"
    return f"{head}\n" + "".join(f"{indent}    {row}\n" for row in rows) + f"{indent}{tail}"


def _comment_of(node: fx.Node, layers: Mapping[str, str]) -> str:
    """Where a call comes from: the user's module and line, the latter without the folders of its file; of a layer its path."""
    if node.op == "call_module":
        return printable(str(node.meta.get("layer") or ""))
    path, colon, rest = printable(source_of(node)).partition(":")
    layer = printable(layers.get(str(node.meta.get("block") or ""), ""))
    line = " ".join(f"{path.rpartition('/')[2]}{colon}{rest}".split())
    return f"{layer} at {line}" if layer and line else layer or line
