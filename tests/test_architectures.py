"""Some of the architectures in the table of docs/exactness.md, checked anew; the table has them all."""

from __future__ import annotations

import re

import pytest

from tests.architectures import ARCHITECTURES, CRASH, PINS, check
from tests.exactness import PAGE

EXACT = (
    "causal mamba2",
    "causal deepseek_v2",
    "causal minicpm3",
    "causal olmo_hybrid",
    "masked funnel",
    "masked convbert",
    "mixture mixtral",
    "image resnet",  # a batch norm in a pipeline: a single micro-batch
)
REFUSED = {
    "masked longformer": r"CaptureError: .*modeling_longformer.py:\d+: if is_global_attn:.*reads a value out of a tensor",
    "seq2seq prophetnet": r"CaptureError: .*modeling_prophetnet.py:\d+: assert torch.all.*reads a value out of a tensor",
}


@pytest.mark.parametrize("row", EXACT)
def test_plans_are_exact(row: str) -> None:
    task, name = row.split()
    cells = check(name, task)
    assert all(isinstance(cell, float) and cell <= 1e-9 for cell in cells.values()), cells


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_planned_says_why(row: str) -> None:
    task, name = row.split()
    refusals = [cell for cell in check(name, task).values() if isinstance(cell, str)]
    assert refusals
    assert all(re.match(REFUSED[row], refusal) for refusal in refusals), refusals


def test_the_table_has_every_architecture_and_no_crash() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = {tuple(re.split(r" *\| *", line.strip("| "))[:2]) for line in page.splitlines() if line.count("|") == len(PINS) + 3}
    expected = {(name, task) for task, names in ARCHITECTURES.items() for name in names.split()}
    assert len(expected) >= 60
    assert expected <= rows
    assert CRASH not in page
