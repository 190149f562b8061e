"""Running the command line in this process, for the tests of it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from autopar.cli.commands import main

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))).square().mean()"""
"""How a file begins that MODEL arguments of tests name: a small model."""


def run(*arguments: str | Path) -> Result:
    """Run ``autopar`` with these arguments."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refuse(*arguments: str | Path, code: int = 2) -> str:
    """The message of a command that must fail: one line on stderr, nothing on stdout, no traceback."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ").strip()
