"""The repository's own frame: what the documents and the build files say must be so."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not broken


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= linked


def test_constraints_pin_every_requirement_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    required = [Requirement(text) for text in requires("autopar") or []]
    assert len(required) > 5
    for requirement in required:
        if requirement.name != "autopar":
            assert Version(pins[requirement.name.lower()]) in requirement.specifier, requirement
    assert pins["torch"] == torch.__version__.partition("+")[0]


def test_every_package_is_in_the_build() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "autopar").rglob("*.py")} | {ROOT / "autopar" / "cost_models"}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(packages)


def test_cost_models_is_one_module_under_one_name() -> None:
    path = importlib.import_module("autopar.cost_models").__file__
    assert path is not None
    assert Path(path).resolve() == ROOT / "cost_models" / "__init__.py"
