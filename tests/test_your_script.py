"""The loops of `docs/your-script.md` print on two ranks, under torchrun, what they print on one device."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.page_scripts import read_scripts

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "your-script.md"
NUMBER = re.compile(r"-?\d+\.\d+")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str]]:
    """What every script prints on one device and on two ranks; all of them run in one process, or pair of processes."""
    folder = tmp_path_factory.mktemp("scripts")
    outputs = []
    for name, launcher, flags in (("one", (), ("--one-device",)), ("two", TORCHRUN, ())):
        command = [sys.executable, *launcher, "-m", "tests.page_scripts", str(PAGE), str(folder / name), *flags]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert finished.returncode == 0, finished.stderr[-4000:]
        outputs.append(json.loads((folder / name).read_text(encoding="utf-8")))
    return outputs[0], outputs[1]


def test_the_page_has_ten_loops() -> None:
    assert [name.split(".")[0] for name in read_scripts(PAGE)] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("name", read_scripts(PAGE))
def test_a_loop_prints_what_one_device_prints(name: str, printed: tuple[dict[str, str], dict[str, str]]) -> None:
    one, two = (output[name] for output in printed)
    assert "Traceback" not in one, one
    assert "Traceback" not in two, two
    numbers = NUMBER.findall(one)
    assert numbers
    assert NUMBER.sub("#", two) == NUMBER.sub("#", one)
    for number, number_of_two in zip(numbers, NUMBER.findall(two), strict=True):
        # Two units of the last decimal that is printed.
        assert float(number_of_two) == pytest.approx(float(number), rel=0, abs=2.1 * 10.0 ** -len(number.partition(".")[2]))
