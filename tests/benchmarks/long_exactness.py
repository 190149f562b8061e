"""The exactness of attention on split sequences: every kind, mask and number of heads against one device, in float64.

Prints the tables of ``docs/long-sequences.md``. Every case is checked as `tests.long_exactness` says, by all ranks as threads; a dozen more
run in real processes. Stops at the first case that differs, crashes or runs otherwise than pinned without saying why.

With names of models, only these are run: ``python -m tests.benchmarks.long_exactness llama t5``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.architectures import power_of_ten
from tests.long_exactness import CASES, KINDS, REFUSED, WAYS, Case, Found, check, step_in_processes
from tests.long_models import MASKS, MODELS
from tests.processes import spawn

PROCESSES: Sequence[tuple[str, str, str, str]] = (
    ("llama", "causal", "GQA", "cp=2 zigzag"),
    ("gpt2", "packed", "MHA", "cp=2 ring"),
    ("mistral", "window", "MQA", "cp=2 ulysses"),
    ("bert", "padded", "MHA", "cp=2 gather"),
    ("llama", "padded", "GQA", "cp=4 zigzag"),
    ("gemma2", "window", "GQA", "cp=4 ring"),
    ("bert", "packed", "MHA", "cp=4 ulysses"),
    ("mistral", "packed", "GQA", "cp=2 tp=2 zigzag"),
    ("llama", "causal", "GQA", "cp=2 tp=2 ulysses"),
    ("gpt2", "causal", "MHA", "pp=2 cp=2 zigzag"),
    ("plain", "bidirectional", "GQA", "cp=2 cp2=2 ring"),
    ("plain", "causal", "MQA", "cp=2 cp2=2 zigzag"),
)
"""What runs in real processes: model, mask, heads and the name of a way."""


def find_processes(ranks: int) -> Sequence[Case]:
    """The cases that run in so many real processes."""
    ways = {way.name: way for way in WAYS}
    cases = [Case(model, mask, heads, ways[name]) for model, mask, heads, name in PROCESSES]
    return [case for case in cases if case.way.ranks == ranks]


Results = Sequence[tuple[Case, Found]]
"""Every case that was run, and what it came to."""


def write_kinds(found: Results) -> str:
    """A row per kind of attention, a column per mask: the worst error, and how many cases were compared."""
    rows = [f"| | {' | '.join(MASKS)} |", f"| --- |{' ---: |' * len(MASKS)}"]
    for kind in KINDS:
        cells = []
        for mask in MASKS:
            results = [result for case, result in found if (case.way.kind, case.mask) == (kind, mask)]
            errors = [result.error for result in results if result.error is not None]
            cells.append(f"{power_of_ten(max(errors))} ({len(errors)})" if errors else "")
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(rows)


def write_models(found: Results) -> str:
    """A row per model: what it covers, how many cases were compared and refused, and the worst error."""
    rows = ["| model | masks | heads | compared | refused | error |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for name, (title, masks) in MODELS.items():
        results = [result for case, result in found if case.model == name]
        errors = [result.error for result in results if result.error is not None]
        if errors:
            heads = dict.fromkeys(number for numbers in masks.values() for number in numbers)
            counts = f"{len(errors)} | {len(results) - len(errors)} | {power_of_ten(max(errors))}"
            rows.append(f"| {title} | {', '.join(masks)} | {', '.join(heads)} | {counts} |")
    return "\n".join(rows)


def write_exceptions(found: Results) -> str:
    """What ran otherwise than pinned, with the plans' reasons, and what was refused."""
    otherwise: dict[str, int] = defaultdict(int)
    refused: dict[str, int] = defaultdict(int)
    for case, result in found:
        for note in set(result.otherwise):
            where, _, reason = note.partition(" runs otherwise")
            otherwise[f"{MODELS[case.model][0]}: `{where}` runs otherwise{reason}"] += 1
        if result.refusal:
            refused[REFUSED[result.refusal]] += 1
    lines = [f"- {text} ({count} plans)" for text, count in otherwise.items()]
    return "\n".join([*lines, *(f"- refused: {text} ({count} cases)" for text, count in refused.items())])


def main(models: Sequence[str]) -> None:
    """Check all cases, or those of some models, and print the tables."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = [(case, check(case)) for case in CASES if not models or case.model in models]
    print(write_kinds(found), write_models(found), write_exceptions(found), sep="\n\n")
    print(f"\n{len(found)} cases in {time.perf_counter() - start:.0f} s")
    if models:
        return
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (2, 4):
            cases, place = find_processes(ranks), Path(folder, str(ranks))
            place.mkdir()
            spawn(ranks, place, step_in_processes, cases)
            print(f"in {ranks} processes: {'; '.join(map(str, cases))}")


if __name__ == "__main__":
    main(sys.argv[1:])
