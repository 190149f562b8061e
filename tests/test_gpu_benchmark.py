"""The script that measures a machine with one GPU, run on the CPU with tiny sizes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import gpu

OPTIONS = ("--device", "cpu", "--quick", "--no-compile", "--model", "GPT-2")


def test_every_part_makes_its_table(tmp_path: Path) -> None:
    file = tmp_path / "gpu.md"
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *OPTIONS, "-o", str(file)]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = file.read_text(encoding="utf-8")
    assert run.stdout.strip() == report.strip()
    assert re.findall("(?m)^## (.*)", report) == ["Exactness", "Peak memory", "Ops", "Seconds of a step"]
    assert report.count("| same |") == 6
    assert re.search(r"(?m)^\| GPT-2 \| bfloat16 \| autopar \| .* ms? \[.*\] \| \d+\.\d+ \| .* \| \d\.\d+ \|$", report)
    # Every row has as many columns as its table.
    widths = [[line.count(" | ") for line in part.splitlines() if line.startswith("|")] for part in report.split("## ")[1:]]
    assert all(len(set(part)) == 1 for part in widths), widths


def test_rows_that_fail_are_told_and_the_others_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The profile of a V100 has no peak of bfloat16, so plans for it are refused.
    file = tmp_path / "gpu.md"
    assert gpu.main([*OPTIONS, "--machine", "v100", "--only", "exactness", "--only", "ops", "-o", str(file)]) == 1
    report = file.read_text(encoding="utf-8")
    assert report == capsys.readouterr().out.removesuffix("\n")
    assert len(re.findall(r"(?m)^\| GPT-2 \| bfloat16 \| .* \| FAILED: HardwareError: ", report)) == 2
    assert report.count("| same |") == 2
    assert "| add, small 16 x 16 | float32 |" in report
    assert "Failed: Exactness GPT-2 bfloat16 recompute=none, " in report


def test_no_row_is_begun_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*OPTIONS, "--minutes", "1e-9"]) == 0
    report = capsys.readouterr().out
    assert report.count("left out: no time") == 6 + 3 + 12 + 2
