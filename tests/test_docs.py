"""The pages hold what they show: their Python runs, their commands parse, their anchors exist."""

from __future__ import annotations

import copy
import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, PreTrainedModel

import autopar
from autopar.api import CompiledModule
from autopar.cli.commands import main
from autopar.report import Answer, Frontier
from autopar.schedules.families import SCHEDULES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class _Output:
    loss: Tensor


torch.export.register_dataclass(_Output, serialized_type_name="tests.test_docs._Output")


class _Regression(nn.Module):
    """Returns an object that has a loss, as transformers models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> _Output:
        return _Output(self.layers(x).square().mean())


def given() -> dict[str, Any]:
    """What a page's scripts may take as theirs: a model, and batches for it."""
    torch.manual_seed(0)
    return {"model": _Regression(), "loader": [{"x": torch.randn(4, 8)} for _ in range(2)]}


def read_blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, language, text) per fenced block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start()) + 1, found[1].strip(), found[2]) for found in BLOCK.finditer(text)]


def read_commands() -> list[tuple[str, str]]:
    """(page and line, command) per line of a block that calls autopar; lines of a synopsis, with brackets or dots, aren't commands."""
    found = []
    for page in PAGES:
        for start, language, text in read_blocks(page):
            for offset, line in enumerate(text.splitlines()):
                if not language and line.startswith("autopar ") and not re.search(r"\[|\.\.\.|\b[A-Z]{4,}\b", line):
                    found.append((f"{page.name}:{start + offset + 1}", re.split(r" #|   +", line)[0]))
    return found


def find_runnable() -> list[Path]:
    return [page for page in PAGES if any(language.startswith("python") for _, language, _ in read_blocks(page))]


@pytest.mark.parametrize("page", find_runnable(), ids=lambda page: page.name)
def test_python_on_the_page_runs(page: Path) -> None:
    """Sessions with ``>>>`` must print what they show; blocks marked ``python run`` must run, those marked
    ``python torchrun`` and ``python tutorial`` run elsewhere. A page shares its names."""
    torch.set_num_threads(1)
    names = given()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    ran = 0
    for line, language, text in read_blocks(page):
        if language == "python" and text.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(text, names, f"{page.name}:{line}", str(page), line)
            shown: list[str] = []
            assert runner.run(test, out=shown.append, clear_globs=False).failed == 0, "".join(shown)
            names = test.globs
        elif language == "python run":
            exec(compile(text, f"{page.name}:{line}", "exec"), names)
        elif language in ("python torchrun", "python tutorial"):
            compile(text, f"{page.name}:{line}", "exec")  # runs in tests/test_your_script.py, tests/test_tutorial.py
        else:
            assert not language.startswith("python"), f"{page.name}:{line}: mark the block `python run`, or write a session with >>>"
            continue
        ran += 1
    assert ran


@pytest.mark.parametrize(("where", "command"), read_commands(), ids=lambda value: value if ":" in value and " " not in value else "")
def test_commands_on_the_pages_parse(where: str, command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    found = main.commands[name]
    context = found.make_context(name, arguments)
    spec = context.params.get("model") or ""
    path = spec.removeprefix("hf:") if spec.startswith("hf:") else spec.partition(":")[0]
    assert not path.startswith("examples/") or (ROOT / path).exists(), where


def test_a_wrong_command_would_be_seen() -> None:
    assert len(read_commands()) > 5
    with pytest.raises(click.UsageError):
        main.commands["plan"].make_context("plan", ["examples/mlp.py:build", "--clusters", "8xH100"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, f"{target}#{anchor}"


DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
FILES = ("json", "md", "pt", "py", "toml", "txt")
# What the first part of a name means where it is no name of ours: for an object of the reader's, its type.
OUTSIDE: dict[str, Any] = {
    "answer": Answer,
    "aten": torch.ops.aten,
    "autopar": autopar,
    "copy": copy,
    "frontier": Frontier,
    "loss": Tensor,
    "model": (CompiledModule, PreTrainedModel, GenerationMixin),
    "nn": nn,
    "p": DTensor,
    "plan": autopar.Plan,
    "torch": torch,
    "w": DTensor,
}
# Objects of libraries that aren't installed for the tests.
ELSEWHERE = ("accelerator", "fabric")


def read_dotted_names(page: Path) -> set[str]:
    """Names with a dot between backticks in a page's prose, such as `costs.blocks`, `Plan.costs` or `plan.save(path)`."""
    return {name for name in DOTTED.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))) if not name.endswith(FILES)}


@cache
def load_modules() -> tuple[ModuleType, ...]:
    """Every module of ours."""
    names = [module.name for module in pkgutil.walk_packages(autopar.__path__, "autopar.")]
    return tuple(importlib.import_module(name) for name in names if not name.endswith("__main__"))


def find_meanings(name: str) -> Iterator[tuple[Any, list[str]]]:
    """(object, rest of the name) for everything that the beginning of a dotted name may mean: the end of a module's path, a name in one."""
    parts = name.split(".")
    outside = OUTSIDE.get(parts[0], ())
    for known in outside if isinstance(outside, tuple) else (outside,):
        yield known, parts[1:]
    for module in load_modules():
        if parts[0] in vars(module):
            yield vars(module)[parts[0]], parts[1:]
        for count in range(1, len(parts) + 1):
            if module.__name__.endswith("." + ".".join(parts[:count])):
                yield module, parts[count:]


def exists(name: str) -> bool:
    """Whether a dotted name leads to a module, a function, an attribute or a field of a dataclass."""
    return any(has_attribute(known, rest) for known, rest in find_meanings(name))


def has_attribute(known: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not hasattr(known, part):
            return part in getattr(known, "__annotations__", {})
        known = getattr(known, part)
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_names_on_the_page_exist(page: Path) -> None:
    """What a page calls a module, function or field must still have that name."""
    assert not [name for name in sorted(read_dotted_names(page)) if not exists(name) and not name.startswith(ELSEWHERE)]


def test_a_wrong_name_would_be_seen() -> None:
    assert "costs.blocks" in read_dotted_names(ROOT / "docs" / "costs.md")
    assert all(map(exists, ("costs.blocks", "search.placement.solve", "ir.reshard.PAIRS", "Plan.costs", "plan.save")))
    assert not any(map(exists, ("costs.menus", "search.menus.solve", "ir.reshard.MENUS", "Plan.menus", "plan.menus")))


def test_every_kind_of_error_is_explained() -> None:
    """The page on trouble names what users meet."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for name in (
        "CaptureError",
        "InputError",
        "InfeasibleError",
        "PlanError",
        "UnknownOpError",
        "VerificationError",
        "CommError",
        "SolverError",
    ):
        assert f"`{name}`" in text, name


def test_pages_that_list_schedules_list_all() -> None:
    """The plan's format says which there are, and the page on exactness has a column for each."""
    form, exactness = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("plan-format", "exactness"))
    (row,) = re.findall(r"^\| `schedule` \| (.*) \|$", form, flags=re.MULTILINE)
    assert re.findall(r"`([^`]+)`", row) == list(SCHEDULES)
    assert f"| model | gradients | {' | '.join(SCHEDULES)} |" in exactness
