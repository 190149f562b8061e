"""The tutorial, from its first line to its last: every command and snippet runs, in order, in a folder that has the examples alone."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from autopar import counterfactuals
from tests.commands import run
from tests.test_docs import ROOT, read_blocks

PAGE = ROOT / "docs" / "tutorial.md"
LAUNCHERS = {"python": (), "torchrun": ("-m", "torch.distributed.run")}
ON_TWO_RANKS = "torchrun --standalone --nproc-per-node 2"
LOSS = re.compile(r"^step +\d+  loss ([\d.]+)$", re.MULTILINE)


def run_line(line: str, folder: Path) -> str:
    """What a line of the page prints; autopar itself runs in this process."""
    program, *arguments = shlex.split(line)
    if program == "autopar":
        result = run(*arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        return result.output
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCHERS[program], *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of the page printed, and under ``python`` what the snippet did; then what stands on the page."""
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "examples", folder / "examples")
    outputs: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # One budget instead of six, since each is a search.
        patch.setattr(counterfactuals, "memory_frontier", partial(counterfactuals.memory_frontier, budgets=1))
        for _, language, text in read_blocks(PAGE):
            if language:
                (folder / "snippet.py").write_text(text, encoding="utf-8")
                outputs["python"] = run_line("python snippet.py", folder)
            elif text.startswith("step"):
                outputs["page"] = text
            else:
                lines = [line for line in text.splitlines() if not line.endswith(".svg") or "draw" not in line or shutil.which("dot")]
                outputs |= {line: run_line(line, folder) for line in lines}
    return outputs


def read_losses(printed: dict[str, str], beginning: str) -> list[float]:
    """The losses that the command with this beginning printed."""
    (output,) = (text for line, text in printed.items() if line.startswith(beginning))
    return [float(loss) for loss in LOSS.findall(output)]


def test_the_losses_are_those_on_the_page(printed: dict[str, str]) -> None:
    page, alone = read_losses(printed, "page"), read_losses(printed, "python examples/")
    together = read_losses(printed, f"{ON_TWO_RANKS} examples/")
    assert len(page) == 5
    assert alone == pytest.approx(page, abs=0.02)  # another processor rounds elsewhere
    assert together == pytest.approx(alone, abs=2.1e-3)


def test_the_saved_weights_go_on_where_training_ended(printed: dict[str, str]) -> None:
    """In the original model, and in the emitted package on the batches that would come next."""
    last = read_losses(printed, "page")[-1]
    assert float(printed["python"]) == pytest.approx(last, abs=0.2)
    emitted = read_losses(printed, f"{ON_TWO_RANKS} out/")
    assert len(emitted) == 3
    assert emitted == pytest.approx([last] * 3, abs=0.2)


def test_a_batch_of_another_size_can_be_asked_for(printed: dict[str, str]) -> None:
    """What `--batch` and `--seq` need of the example."""
    assert "batch=64" in printed["autopar explain plan.json --what-if batch=64"]
    _, batch = runpy.run_path(str(ROOT / "examples" / "byte_llama.py"))["build"](batch=2, seq=1000)  # longer than the text
    assert batch["input_ids"].shape == (2, 1000)
