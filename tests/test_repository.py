"""The repository's own frame: what the documents and the build files say must be so."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
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


def copy_repository(folder: Path) -> None:
    """Copy the files under version control, as a clone would have them."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():  # else it was removed, and that isn't committed yet
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def make_environment(folder: Path) -> Path:
    """Make an environment in which autopar isn't installed; returns its site-packages.

    torch and the other libraries are large: they are read where the tests have them. A path in a .pth file brings no other .pth files with
    it, so that the repository's own installation isn't found.
    """
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return site


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a release would be, built from a copy of the files under version control."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_repository(folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_every_module_profile_and_page(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "autopar").rglob("*.py")}
    files |= {
        f"autopar/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "cost_models").rglob("*") if path.suffix in (".py", ".toml")
    }
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "autopar" / "pages").rglob("*.*") if path.suffix != ".pyc"}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files | {"autopar/py.typed"}


def test_the_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed into an environment of its own and away from the repository, it plans and verifies a model."""
    site = make_environment(tmp_path / "env")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    shutil.copy(ROOT / "examples" / "mlp.py", tmp_path)

    def run(*arguments: str) -> str:
        python = str(tmp_path / "env" / "bin" / "python")
        done = subprocess.run([python, *arguments], cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import autopar; print(autopar.__file__)").startswith(str(site))
    assert "tp=4" in run("-m", "autopar", "plan", "mlp.py:build", "--cluster", "4xh100", "--pin", "tp=4")
    run("-m", "autopar", "plan", "mlp.py:build", "--cluster", "4xh100", "-o", "plan.json")
    run("-m", "autopar", "draw", "plan.json", "-o", "plan.html")
    assert "uPlot" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert run("-m", "autopar", "verify", "mlp.py:build", "--ranks", "2").startswith("ok: ")


def test_a_script_beside_a_clone_imports_the_package(tmp_path: Path) -> None:
    """After ``git clone .../autopar; pip install -e ./autopar``, `autopar` is the package, not the clone's folder."""
    copy_repository(tmp_path / "autopar")
    make_environment(tmp_path / "env")
    python = str(tmp_path / "env" / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "-e", str(tmp_path / "autopar")]
    subprocess.run(install, check=True)
    (tmp_path / "train.py").write_text("import autopar\nprint(autopar.compile, autopar.Cluster.parse('8xH100'))\n")
    for arguments in (["train.py"], ["-m", "autopar", "machines"]):
        done = subprocess.run([python, *arguments], cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "h100" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_benchmarks_can_be_imported(path: Path) -> None:
    """No other test runs them, so that a name which is gone would only show when somebody measures."""
    assert callable(importlib.import_module(f"tests.benchmarks.{path.stem}").main)


def test_cost_models_is_one_module_under_one_name() -> None:
    path = importlib.import_module("autopar.cost_models").__file__
    assert path is not None
    assert Path(path).resolve() == ROOT / "cost_models" / "__init__.py"
