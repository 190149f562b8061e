"""Modules import downwards only, in the order of the table in docs/overview.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "overview.md"


def read_rows() -> list[tuple[str, str]]:
    """(module, purpose) per row of the table, in order."""
    return re.findall(r"^\| `([\w.]+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def find_modules() -> dict[str, Path]:
    """Every module by its name below `autopar`, as the table writes it."""
    found: dict[str, Path] = {}
    for folder, prefix in ((ROOT / "autopar", ""), (ROOT / "cost_models", "cost_models.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            # The package itself is reached by name only, and `cost_models` below it is a link to the other folder.
            if (parts == ("__init__",) and not prefix) or parts[0] == "cost_models":
                continue
            found[(prefix + ".".join(part for part in parts if part != "__init__")).rstrip(".")] = path
    return found


MODULES = find_modules()
ROWS = [name for name, _ in read_rows()]
LATE = {name: set(re.findall(r"`([\w.]+)`, for", text)) for name, text in read_rows() if "*late*" in text}


def find_statements(tree: ast.AST, *, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports run when the module is loaded; with `late`, those inside functions instead. Those for type checkers don't count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if not late:
                yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if late:
                yield from find_statements(node, late=False)
        else:
            yield from find_statements(node, late=late)


def find_imports(name: str, *, late: bool) -> set[str]:
    """The modules of ours that `name` imports, as the table writes them."""
    path = MODULES[name]
    package = ["autopar", *name.split(".")][: None if path.name == "__init__.py" else -1]
    found: set[str] = set()
    for node in find_statements(ast.parse(path.read_text(encoding="utf-8")), late=late):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        ours = {target.removeprefix("autopar.") for target in targets}
        # `from autopar.rules import contract` runs the package too, but a module inside a package may leave that aside.
        found |= {target for target in ours & MODULES.keys() if not name.startswith(f"{target}.") and target != name}
    return found


def test_the_table_has_every_module_once() -> None:
    assert len(ROWS) == len(set(ROWS))
    assert set(ROWS) == MODULES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_imports_come_from_rows_above(name: str) -> None:
    below = find_imports(name, late=False) - set(ROWS[: ROWS.index(name)])
    assert not below, f"{name} imports {', '.join(sorted(below))}: below it in docs/overview.md"


@pytest.mark.parametrize("name", ROWS)
def test_imports_inside_functions_are_marked_or_come_from_above(name: str) -> None:
    inside = find_imports(name, late=True)
    below = inside - set(ROWS[: ROWS.index(name)]) - LATE.get(name, set())
    assert not below, f"{name} imports {', '.join(sorted(below))} inside a function without saying so in docs/overview.md"
    assert inside or name not in LATE, f"{name} is marked late in docs/overview.md and imports nothing late"


def test_the_finder_sees_imports() -> None:
    assert {"capture", "planner", "world"} <= find_imports("api", late=False)
    assert find_imports("plans", late=True) == {"report"}
    assert "report" not in find_imports("plans", late=False)
    assert find_imports("cost_models", late=False) == {"cost_models.hardware", "cost_models.collective", "cost_models.op"}
