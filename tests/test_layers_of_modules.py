"""Modules import downwards only, in the order of the tables in docs/overview.md.

``python tests/test_layers_of_modules.py`` lists the arrows between packages.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "overview.md"

PLANNING = ("ir", "schedules", "rules", "structure", "costs", "plans", "search", "report", "timelines", "pictures", "pages")
ACTING = ("ops", "capture", "rewrite", "runtime", "emit", "checks")


def read_rows() -> list[tuple[str, str]]:
    """(module, purpose) per row of the tables, in order."""
    return re.findall(r"^\| `([\w.]+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def find_files() -> tuple[dict[str, Path], dict[str, Path]]:
    """Modules, and packages by their ``__init__``, by name below `autopar`."""
    modules: dict[str, Path] = {}
    packages: dict[str, Path] = {}
    for folder, prefix in ((ROOT / "autopar", ()), (ROOT / "cost_models", ("cost_models",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            # `cost_models` below autopar is a link to the other folder.
            if prefix or parts[0] != "cost_models":
                (packages if parts[-1] == "__init__" else modules)[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    del packages[""]  # autopar itself is reached by what users call only
    return modules, packages


MODULES, PACKAGES = find_files()
ROWS = [name for name, _ in read_rows()]
LATE = {name for name, text in read_rows() if "*late*" in text}


def package_of(name: str) -> str:
    """The first package that a module is in: ``search`` for ``search.placement.solve``; the module itself at the top."""
    return name.partition(".")[0]


def position(name: str) -> int:
    """Where a module stands; a package stands where its last module does."""
    if name in ROWS:
        return ROWS.index(name)
    return max(number for number, row in enumerate(ROWS) if row.startswith(f"{name}."))


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
    """The modules and packages of ours that `name` imports from, as the tables write them."""
    found: set[str] = set()
    for node in find_statements(ast.parse((MODULES | PACKAGES)[name].read_text(encoding="utf-8")), late=late):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = f"autopar.cost_models.{node.module}" if node.level else str(node.module)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            ours = {target.removeprefix("autopar.") for target in inner} & (MODULES.keys() | PACKAGES.keys())
            targets = [*inner] if len(ours) == len(inner) else [*inner, base]
        found |= {target.removeprefix("autopar.") for target in targets} & (MODULES.keys() | PACKAGES.keys())
    return found


def count_arrows() -> Counter[tuple[str, str]]:
    """Modules of one package that import from another, by both packages."""
    arrows: Counter[tuple[str, str]] = Counter()
    for name in MODULES:
        targets = {package_of(target) for target in find_imports(name, late=False) | find_imports(name, late=True)}
        arrows.update((package_of(name), target) for target in targets if target != package_of(name))
    return arrows


def test_the_tables_have_every_module_once() -> None:
    assert len(ROWS) == len(set(ROWS))
    assert set(ROWS) == MODULES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_imports_come_from_rows_above(name: str) -> None:
    below = sorted(target for target in find_imports(name, late=False) if position(target) >= position(name))
    assert not below, f"{name} imports {', '.join(below)}: below it in docs/overview.md"


@pytest.mark.parametrize("name", ROWS)
def test_imports_inside_functions_are_marked_or_come_from_above(name: str) -> None:
    inside = find_imports(name, late=True)
    below = sorted(target for target in inside if position(target) >= position(name) or name in LATE)
    assert name in LATE or not below, f"{name} imports {', '.join(below)} inside a function without saying so in docs/overview.md"
    assert inside or name not in LATE, f"{name} is marked late in docs/overview.md and imports nothing late"


@pytest.mark.parametrize("name", ROWS)
def test_other_packages_are_imported_as_a_whole(name: str) -> None:
    """A package's ``__init__`` says what others may use; a module of another package is used whole (``comm.active``) or not at all."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in [*find_statements(tree, late=False), *find_statements(tree, late=True)]:
        if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            target = node.module.removeprefix("autopar.")
            is_inner = target in MODULES and "." in target and package_of(target) != package_of(name)
            assert not is_inner, f"{name} imports names from {target}, a module of another package"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_modules_and_exports_what_is_used(package: str) -> None:
    tree = ast.parse(PACKAGES[package].read_text(encoding="utf-8"))
    if package != "cost_models":  # whose page is a table of its own
        listed = re.findall(r"``(\w+)``", (ast.get_docstring(tree) or "").partition("in reading order:")[2])
        inside = {name.removeprefix(f"{package}.").partition(".")[0] for name in ROWS if name.startswith(f"{package}.")}
        assert set(listed) == inside
        assert listed == sorted(listed, key=lambda module: position(f"{package}.{module}"))
    exported = {name for node in tree.body if isinstance(node, ast.Assign) for name in ast.literal_eval(node.value)}
    used: set[str] = set()
    folders = (ROOT / "autopar", ROOT / "cost_models") if package != "cost_models" else (ROOT / "autopar", ROOT / "tests")
    for path in [path for folder in folders for path in folder.rglob("*.py") if path != PACKAGES[package]]:
        for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(found, ast.ImportFrom) and found.module == f"autopar.{package}":
                used |= {alias.name for alias in found.names}
            elif isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name) and found.value.id == package:
                used.add(found.attr)  # `ir.Tensor`, where the bare name is another's
    # What only users call is listed in autopar/__init__.py.
    users = set(re.findall(r'"(\w+)": "autopar', (ROOT / "autopar" / "__init__.py").read_text(encoding="utf-8")))
    assert exported <= used | users, f"nobody outside uses {sorted(exported - used - users)}"


def run_without(blocked: tuple[str, ...], packages: tuple[str, ...]) -> None:
    """Import packages of ours in a process in which the modules called `blocked` can't be imported."""
    script = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(one + ".") for one in {blocked!r}):
            raise ImportError(f"{{name}} is blocked here")
sys.meta_path.insert(0, Blocker())
for package in {packages!r}:
    importlib.import_module(f"autopar.{{package}}")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def modules_of(packages: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in ROWS if package_of(name) in packages)


def test_planning_needs_no_torch() -> None:
    run_without(("torch", *(f"autopar.{package}" for package in ACTING)), modules_of(PLANNING))


def test_acting_needs_no_search() -> None:
    run_without(("ortools", "autopar.search", "autopar.report"), modules_of(ACTING))


def test_blocking_blocks() -> None:
    with pytest.raises(AssertionError, match="torch is blocked here"):
        run_without(("torch",), ("ops",))
    with pytest.raises(AssertionError, match="ortools is blocked here"):
        run_without(("ortools",), ("search",))


def test_no_two_packages_import_each_other() -> None:
    arrows = count_arrows()
    assert not [pair for pair in arrows if pair[::-1] in arrows]


def test_the_finder_sees_imports() -> None:
    assert {"capture", "search", "runtime"} <= find_imports("api", late=False)
    assert {"api", "report"} <= find_imports("cli.commands", late=True)
    assert "ops.comm" in find_imports("checks.threads", late=False)
    assert find_imports("cost_models", late=False) == {"cost_models.hardware", "cost_models.collective", "cost_models.op"}


if __name__ == "__main__":
    found = count_arrows()
    for (start, end), count in sorted(found.items(), key=lambda item: (position(item[0][0]), position(item[0][1]))):
        print(f"{start} -> {end}: {count}")
    packages = {package for pair in found for package in pair}
    print(f"{len(found)} arrows between {len(packages)} packages, {sum(found.values())} from modules to packages")
