"""The tables of exactness: which architecture is split how, and how far the parallel program is off; ``python -m tests.exactness``.

Writes ``docs/exactness.md``. The plans and what is expected of them are those that ``tests/test_numerics.py`` checks, every pipeline of
which ``tests/test_pipelines.py`` checks some, and the architectures of ``tests/architectures.py``. With ``--pipelines`` only the pipelines
are run, and with ``--architectures`` only these; their table is printed.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from autopar.checks.verification import Verification
from autopar.plans.plan import RECOMPUTE, Plan
from autopar.schedules.families import SCHEDULES
from tests.architectures import power_of_ten, run_all, write_table
from tests.emitted import subject

PAGE = Path(__file__).parents[1] / "docs" / "exactness.md"
RESULTS = Path(__file__).parents[1] / "build" / "architectures.jsonl"

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
    "resnet": {"cp sequence": "images have no sequence"},
    "dlrm": {
        "cp sequence": "no sequence",
        "tp vocabulary": "its tables are embedding bags, whose rows count as features; its loss has no classes",
    },
}

# Share of the memory of the fastest plan on free axes that is left, so that a plan must split.
CRAMPED = 0.65


PIPELINED: Mapping[str, str] = {
    "gpt2_deep": "GPT-2",
    "llama_deep": "Llama",
    "llama_tied": "Llama, tied embeddings",
    "bert_deep": "BERT",
    "t5_deep": "T5",
    "unet": "U-Net",
}


class Case(NamedTuple):
    """A pipeline of a deep model: pipeline ranks, ranks of each that split features, schedule, what is recomputed."""

    name: str
    pipeline_ranks: int
    tp: int
    schedule: str
    recompute: str


CASES: tuple[Case, ...] = tuple(Case(*one) for one in itertools.product(PIPELINED, (2, 4), (1, 2), SCHEDULES, RECOMPUTE))


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


def make_pipeline(case: Case) -> Plan:
    """The plan of a case."""
    return subject(case.name).pipelined(case.pipeline_ranks, case.tp, case.schedule, case.recompute)


def amiss(case: Case, plan: Plan) -> frozenset[str]:
    """What of a case the plan isn't."""
    pipeline = plan.pipeline
    kinds = {block.recompute for block in pipeline.blocks}
    # Blocks without an attention core have nothing to run again selectively.
    asked = kinds == {case.recompute} or (case.recompute == "selective" and kinds == {"none", "selective"})
    chunks = SCHEDULES[case.schedule].chunks or 2
    facts = {
        "pipeline ranks": pipeline.ranks == case.pipeline_ranks,
        "tp": plan.mesh.world_size == case.tp and (case.tp == 1 or "tp features" in subject(case.name).uses(plan)),
        "schedule": (pipeline.schedule, pipeline.chunks) == (case.schedule, chunks),
        "stages": {block.stage for block in pipeline.blocks} == set(range(case.pipeline_ranks * chunks)),
        "micro-batches": pipeline.microbatches == 4,
        "recompute": asked,
    }
    return frozenset(name for name, holds in facts.items() if not holds)


def left_out(name: str, found: Verification) -> frozenset[str]:
    """Gradients and outputs that a verification didn't compare."""
    wanted = {f"gradient of {parameter}" for parameter in subject(name).with_gradient} | {"output 0"}
    return frozenset(wanted - set(found.errors))


def write_pipelines() -> str:
    """The table of pipelines: a line per model, the worst of all cases per schedule."""
    worst: dict[tuple[str, str], float] = {}
    gradients: dict[str, int] = {}
    for case in CASES:
        plan = make_pipeline(case)
        found = subject(case.name).verify(plan)
        assert not amiss(case, plan), (case, amiss(case, plan))
        assert found.ok, (case, found.worst)
        assert not left_out(case.name, found), case
        key = case.name, case.schedule
        worst[key] = max(worst.get(key, 0.0), found.worst)
        gradients[case.name] = sum(error.startswith("gradient") for error in found.errors)
    header = f"| model | gradients | {' | '.join(SCHEDULES)} |\n| --- | --- |{' --- |' * len(SCHEDULES)}"
    rows = [
        f"| {PIPELINED[name]} | {gradients[name]} | {' | '.join(power_of_ten(worst[name, schedule]) for schedule in SCHEDULES)} |"
        for name in PIPELINED
    ]
    return "\n".join((header, *rows))


def write_architectures() -> str:
    """The table of architectures; their results are kept in a file, so that it can be made in several goes."""
    RESULTS.parent.mkdir(exist_ok=True)
    run_all(RESULTS)
    return write_table(RESULTS)


def write_row(name: str, kind: str) -> str:
    """A line of the table."""
    plan = make(name, kind)
    uses = subject(name).uses(plan)
    found = subject(name).verify(plan)
    assert found.ok
    assert not missing(name, kind, uses)
    gradients = sum(key.startswith("gradient") for key in found.errors)
    return f"| {ARCHITECTURES[name]} | {kind} | {', '.join(sorted(uses))} | {gradients} | {power_of_ten(found.worst)} |"


def write_page() -> str:
    """The page, made anew."""
    rows = [write_row(name, kind) for name in ARCHITECTURES for kind in PLANS]
    lacking = [f"- {ARCHITECTURES[name]}, {what}: {why}." for name, reasons in LACKING.items() for what, why in reasons.items()]
    return _PAGE.format(
        architectures=write_architectures(), rows="\n".join(rows), lacking="\n".join(lacking), pipelines=write_pipelines(), cases=len(CASES)
    )


_PAGE = """# Exactness

This page shows how far a parallel program is from one device, for each architecture and kind of plan, and how that is measured.

`autopar.verify` runs all ranks of a plan in one process, in float64, and compares every output, every parameter's gradient and
every updated buffer with those of one device. An error of more than 1e-9 of a tensor's largest element is a failure. The errors
that remain come from sums in another order.

Every row of the table is a test of `tests/test_numerics.py`. Models are tiny (two layers, `tests/zoo.py`), without dropout, with
unequal numbers of ignored labels per row.

- *Splits* is what each axis of the four ranks does to products, attention and lookups; `storage` means that parameters are stored
  split. A plan that only replicates would have an empty cell, and fails.
- The free axes are planned with little memory, because models of this size run fastest replicated.
- *Error* is an upper bound, a power of ten.

Two more kinds of plans are checked in the same way: plans drawn at random from all that can be emitted, on meshes of 2, 4, 2 x 2
and 2 x 2 x 2 ranks, and DDP, FSDP, Megatron and Redco layouts. `tests/test_processes.py` trains in real processes.

[Situations](situations.md) has the other table: training loops and files in which such systems differ from one device in silence, what
happens here, and the test of each.

Make this page again with `python -m tests.exactness`.

| architecture | plan | splits | gradients | error |
| --- | --- | --- | --- | --- |
{rows}

Some models lack a loop that the plan's pins would split. That nothing is split there is tested too:

{lacking}

## Pipelines

{cases} plans are checked: each model

- on 2 and 4 pipeline ranks, each of 1 rank, or of 2 that split features and vocabulary;
- under every schedule;
- with nothing, the attention cores, or all blocks recomputed.

There are four micro-batches with unequal numbers of ignored labels; among the models are some with tied weights on the first and
the last stage, and some with long skips. The error is that of the worst of the twelve plans of a model and a schedule, an upper
bound. A gradient that is zero in exact arithmetic, such as that of a key's bias, is compared on the scale of a millionth of the
largest gradient.

{pipelines}

`tests/test_pipelines.py` runs some of these, chosen so that every pair of choices occurs, and pipelines drawn at random: pipeline
ranks and their mesh, schedule, micro-batches, where stages begin, what each block recomputes, every placement, and in which
layouts values travel. `tests/test_pipeline_processes.py` trains in real processes.

## Architectures of transformers

Each architecture is tiny (two layers of each kind, `tests/architectures.py`), in float64, without dropout, with a batch of 8. It is
captured once, planned under four pins, and each plan is compared with one device as above. A refusal is an error before anything
runs; what it says follows below the table. A mixture of experts is taken in the form `experts_implementation="batched_mm"`, which is
a graph.

{architectures}

`tests/test_architectures.py` checks some of these.
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--architectures" in sys.argv[1:]:
        print(write_architectures())
    elif "--pipelines" in sys.argv[1:]:
        start = time.perf_counter()
        print(write_pipelines())
        print(f"{len(CASES)} plans in {time.perf_counter() - start:.0f} s")
    else:
        PAGE.write_text(write_page(), encoding="utf-8")
