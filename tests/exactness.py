"""The table of exactness: which architecture is split how, and how far the parallel program is off; ``python -m tests.exactness``.

Writes ``docs/exactness.md``. The plans and what is expected of them are those that ``tests/test_numerics.py`` checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from autopar.plans import Plan
from tests.emitted import subject

PAGE = Path(__file__).parents[1] / "docs" / "exactness.md"

ARCHITECTURES: Mapping[str, str] = {
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "gptj": "GPT-J",
    "opt": "OPT",
    "bloom": "BLOOM",
    "llama": "Llama",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "phi3": "Phi-3",
    "falcon": "Falcon",
    "bert": "BERT",
    "t5": "T5",
    "vit": "ViT",
    "resnet": "ResNet",
    "lstm": "LSTM language model",
    "dlrm": "DLRM-like",
}

# Pins, and what a plan under them must split; None is a pair of free axes, which little memory forces to split.
PLANS: Mapping[str, tuple[Mapping[str, object] | None, frozenset[str]]] = {
    "tp=4": ({"tp": 4, "vocabulary": True}, frozenset({"tp features", "tp storage", "tp vocabulary"})),
    "dp=2 x tp=2, fsdp": (
        {"dp": 2, "tp": 2, "fsdp": True, "vocabulary": True},
        frozenset({"dp batch", "dp storage", "tp features", "tp storage", "tp vocabulary"}),
    ),
    "dp=4, fsdp": ({"dp": 4, "fsdp": True}, frozenset({"dp batch", "dp storage"})),
    "cp=2 x tp=2": (
        {"cp": 2, "tp": 2, "vocabulary": True},
        frozenset({"cp sequence", "tp features", "tp storage", "tp vocabulary"}),
    ),
    "x=2 x y=2 (free)": (None, frozenset()),
}

# What a model doesn't have, and why.
LACKING: Mapping[str, Mapping[str, str]] = {
    "vit": {"cp sequence": "16 patches and a class token: 2 doesn't divide a sequence of 17"},
    "resnet": {"cp sequence": "images have no sequence"},
    "dlrm": {
        "cp sequence": "no sequence",
        "tp vocabulary": "its tables are embedding bags, whose rows count as features; its loss has no classes",
    },
}

# Share of the memory of the fastest plan on free axes that is left, so that a plan must split.
CRAMPED = 0.65


def make(name: str, kind: str) -> Plan:
    """The plan of the table's row."""
    pins, _ = PLANS[kind]
    return subject(name).cramped((2, 2), CRAMPED) if pins is None else subject(name).pinned(pins)


def missing(name: str, kind: str, uses: frozenset[str]) -> frozenset[str]:
    """What the plan of the row should split and doesn't, or splits although it is said to be lacking."""
    pins, expected = PLANS[kind]
    lacking = frozenset(LACKING.get(name, {}))
    if pins is None:
        return frozenset() if uses else frozenset({"anything"})
    return (expected - lacking - uses) | (lacking & uses)


def write_row(name: str, kind: str) -> str:
    """A line of the table."""
    plan = make(name, kind)
    uses = subject(name).uses(plan)
    found = subject(name).verify(plan)
    assert found.ok
    assert not missing(name, kind, uses)
    gradients = sum(key.startswith("gradient") for key in found.errors)
    # Powers of ten: the digits are those of this machine's order of sums.
    digits = f"{found.worst:.0e}".partition("e")[2]
    return f"| {ARCHITECTURES[name]} | {kind} | {', '.join(sorted(uses))} | {gradients} | 1e{int(digits) + 1} |"


def write_page() -> str:
    """The page, made anew."""
    rows = [write_row(name, kind) for name in ARCHITECTURES for kind in PLANS]
    lacking = [f"- {ARCHITECTURES[name]}, {what}: {why}." for name, reasons in LACKING.items() for what, why in reasons.items()]
    return _PAGE.format(rows="\n".join(rows), lacking="\n".join(lacking))


_PAGE = """# Exactness

What a parallel plan computes is what one device computes: `autopar.verify` runs all ranks of a plan in one process, in float64, and
compares every output, every parameter's gradient and every updated buffer with the model's. More than 1e-9 of a tensor's largest
element is a failure; what is left below is the order of sums.

The table is that of `tests/test_numerics.py`, where every row is a test. Models are tiny (two layers, `tests/zoo.py`), without dropout,
with unequal numbers of ignored labels per row. *Splits* is what each axis of the four ranks does to the ops that hold the work, and
`storage` that parameters are kept split: a plan that only replicates has an empty cell and fails. The free axes are planned with
little memory, for models of this size run fastest replicated. *Error* is an upper bound, a power of ten.

Besides these, plans drawn at random from all that can be emitted are checked in the same way, on meshes of 2, 4, 2 x 2 and 2 x 2 x 2 ranks,
and DDP, FSDP, Megatron and Redco layouts. `tests/test_processes.py` trains in real processes.

Make this page again with `python -m tests.exactness`.

| architecture | plan | splits | gradients | error |
| --- | --- | --- | --- | --- |
{rows}

What a model has no loop for is left out, and tested to be left out:

{lacking}
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(write_page(), encoding="utf-8")
