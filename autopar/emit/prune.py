"""Copies of autopar's own modules that hold only what an emitted package uses.

Comes in: names of functions and classes of this library. Goes out: the text of small modules, in which every definition stands as it does
here, with those that it refers to, and imports between the copies. So there is one piece of code for a collective or a kernel, whether a
program runs with autopar or without.

A definition refers to every name that its text has; a name that an import binds leads to the module that it is from. What a module does
when it is loaded beside defining names (the registration of an operator) belongs to the names that it mentions.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

LIBRARY = "autopar"

Definition = tuple[str, str]
"""A module and a name that it defines."""

_WIDTH = 140


@dataclass(frozen=True, slots=True)
class _Statement:
    """A statement at the top of a module: the names that it defines, those that it mentions, and its lines with the comments above."""

    defines: tuple[str, ...]
    mentions: frozenset[str]
    attributes: frozenset[tuple[str, str]]
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Module:
    """A module's text, statement by statement; `imports` has per name that an import binds the module and the name there, or None."""

    name: str
    is_package: bool
    lines: tuple[str, ...]
    docstring: str
    statements: tuple[_Statement, ...]
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def find(self, name: str) -> _Statement | None:
        """The statement that defines a name."""
        return next((statement for statement in self.statements if name in statement.defines), None)


def prune(roots: Iterable[Definition]) -> dict[str, str]:
    """File name -> text of the modules that together hold these definitions and all that they refer to.

    A copy is named by the last part of its module's name; raises ValueError where two modules have one.
    """
    kept: dict[str, set[str]] = {}
    pending = [resolved for root in roots if (resolved := _resolve(*root)) is not None]
    while pending:
        module, name = pending.pop()
        if name in kept.setdefault(module, set()):
            continue
        if (statement := _read(module).find(name)) is None:
            raise ValueError(f"{module} defines no {name}")
        kept[module].update(statement.defines)
        pending += _references(_read(module), statement)
        for more in _read(module).statements:
            if not more.defines and name in more.mentions:
                pending += _references(_read(module), more)
    files = {module: f"{module.rpartition('.')[2]}.py" for module in kept}
    if len(set(files.values())) < len(files):
        raise ValueError(f"two modules have one name: {', '.join(sorted(files))}")
    return {files[module]: _render(_read(module), names) for module, names in sorted(kept.items())}


def _references(module: _Module, statement: _Statement) -> Iterator[Definition]:
    """The definitions of this library that a statement refers to."""
    for name in statement.mentions:
        if module.find(name) is not None:
            yield module.name, name
        elif name in module.imports and module.imports[name][0].split(".")[0] == LIBRARY:
            source, attribute = module.imports[name]
            resolved = _resolve(source, attribute)
            if resolved is not None:
                yield resolved
                continue
            whole = source if attribute is None else f"{source}.{attribute}"
            for base, wanted in statement.attributes:
                if base == name and (found := _resolve(whole, wanted)) is not None:
                    yield found


def _resolve(module: str, name: str | None) -> Definition | None:
    """Where a name that is imported from a module is defined; None when it is a module itself."""
    if name is None:
        return None
    text = _read(module)
    if name not in text.imports and _is_module(f"{module}.{name}"):
        return None
    if text.find(name) is not None:
        return module, name
    if name in text.imports:
        source, attribute = text.imports[name]
        return _resolve(source, attribute)
    raise ValueError(f"{module} has no {name}")


@cache
def _is_module(name: str) -> bool:
    parent, _, last = name.rpartition(".")
    folder = _path_of(parent)
    return folder is not None and folder.name == "__init__.py" and any((folder.parent / file).exists() for file in (f"{last}.py", last))


@cache
def _path_of(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin)


@cache
def _read(name: str) -> _Module:
    """The statements of a module."""
    path = _path_of(name)
    assert path is not None, name
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), tuple(text.splitlines())
    imports: dict[str, tuple[str, str | None]] = {}
    statements: list[_Statement] = []
    body = list(tree.body)
    docstring = ast.get_docstring(tree, clean=False) or ""
    for node in body[1:] if docstring else body:
        inner = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else [node]
        if all(isinstance(x, ast.Import | ast.ImportFrom) for x in inner):
            for x in inner:
                imports.update(_bindings(x))
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and statements:
            before = statements.pop()  # the text below a constant, which says what it is
            statements.append(_Statement(before.defines, before.mentions, before.attributes, before.first, node.end_lineno or node.lineno))
            continue
        statements.append(_read_statement(node, lines))
    return _Module(name, path.name == "__init__.py", lines, docstring, tuple(statements), imports)


def _bindings(node: ast.stmt) -> Iterator[tuple[str, tuple[str, str | None]]]:
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, (node.module or "", alias.name)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name, (alias.name, None)


def _read_statement(node: ast.stmt, lines: tuple[str, ...]) -> _Statement:
    """What a statement at the top of a module defines and mentions."""
    defines: tuple[str, ...] = ()
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        defines = (node.name,)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        defines = tuple(x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name))
    walked = list(ast.walk(node))
    if any(isinstance(x, ast.ImportFrom) and (x.module or "").startswith(LIBRARY) for x in walked):
        raise ValueError(f"{defines}: an import inside of a function can't be followed")
    mentions = frozenset(x.id for x in walked if isinstance(x, ast.Name)) - frozenset(defines)
    attributes = frozenset((x.value.id, x.attr) for x in walked if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name))
    first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
    while first > 1 and lines[first - 2].startswith("#") and not lines[first - 2].startswith("# ---"):
        first -= 1
    return _Statement(defines, mentions, attributes, first, node.end_lineno or node.lineno)


def _render(module: _Module, names: set[str]) -> str:
    """The text of a copy that holds the definitions of these names."""
    kept = [x for x in module.statements if names & set(x.defines) or (not x.defines and names & x.mentions)]
    local = {name for statement in module.statements for name in statement.defines}
    used = {name: module.imports[name] for x in kept for name in x.mentions if name in module.imports and name not in local}
    parts = [f'"""{module.docstring}"""\n\nfrom __future__ import annotations\n']
    if used:
        parts.append("\n" + "".join(f"{line}\n" for line in _imports(used)))
    last = 0
    for statement in kept:
        text = "\n".join(module.lines[statement.first - 1 : statement.last])
        is_block = text.lstrip("#").lstrip().startswith(("def ", "class ", "@")) or "\n" in text
        gap = 0 if last and statement.first == last + 1 else 2 if is_block or not last else 1
        parts.append("\n" * gap + text + "\n")
        last = statement.last
    return _readdress("".join(parts))


def _imports(used: dict[str, tuple[str, str | None]]) -> list[str]:
    """Import statements that bind these names: of Python and torch, then of other copies."""
    plain: list[str] = []
    froms: dict[str, list[str]] = {}
    for name, (module, attribute) in used.items():
        if module.split(".")[0] != LIBRARY:
            if attribute is None:
                plain.append(f"import {module}" if name == module else f"import {module} as {name}")
            else:
                froms.setdefault(module, []).append(attribute if name == attribute else f"{attribute} as {name}")
            continue
        resolved = _resolve(module, attribute)
        if resolved is None:
            last = module.rpartition(".")[2] if attribute is None else attribute
            froms.setdefault(".", []).append(last if last == name else f"{last} as {name}")
        else:
            source = f".{resolved[0].rpartition('.')[2]}"
            froms.setdefault(source, []).append(resolved[1] if resolved[1] == name else f"{resolved[1]} as {name}")
    lines = sorted(plain)
    for source in sorted(froms, key=lambda text: (text.startswith("."), text)):
        line = f"from {source} import {', '.join(sorted(froms[source]))}"
        if len(line) > _WIDTH:
            line = f"from {source} import (\n" + "".join(f"    {name},\n" for name in sorted(froms[source])) + ")"
        lines.append(line)
    return lines


def _readdress(text: str) -> str:
    """The text with other modules of this library named as their copies are: ``autopar.ops.comm`` as ``comm``."""
    return re.sub(rf"\b{LIBRARY}\.(?:\w+\.)*?(?=(\w+)\b(?!\.\w))", _shorten, text)


def _shorten(match: re.Match[str]) -> str:
    """Leave out of a dotted name the packages that the copies don't have."""
    parts = match[0].rstrip(".").split(".")
    keep = [part for number, part in enumerate(parts) if number and _is_file(".".join(parts[: number + 1]))]
    return ".".join(keep) + "." if keep else ""


def _is_file(name: str) -> bool:
    return _is_module(name) and (path := _path_of(name)) is not None and path.name != "__init__.py"
