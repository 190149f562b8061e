"""Measure the assignment search alone: 126 like layers between an embedding and a head, on 16 pipeline ranks with 512 micro-batches.

``python -m tests.benchmarks.assignment`` prints a table. Seconds and bytes of the layers are made up, of the size of a 405B model's on
8 devices; each further option saves less for the backward and takes longer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from autopar.costs.cuts import CutCost
from autopar.schedules.families import make_schedule
from autopar.search.pipeline.assignment import Assignment, assign
from autopar.search.pipeline.block_options import BlockOption, BlockOptions

LAYERS, RANKS, MICROBATCHES = 126, 16, 512
# Schedule, chunks, options, bytes of a rank: plenty, and little.
CASES = (
    ("1f1b", None, 3, 40),
    ("1f1b", None, 3, 11),
    ("1f1b", None, 9, 40),
    ("1f1b", None, 9, 10),
    ("zb-h1", None, 9, 12),
    ("zb-v", 2, 3, 14),
    ("interleaved", 3, 3, 20),
    ("interleaved", 7, 3, 20),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A case, the seconds its search took, and what was found."""

    case: tuple[str, int | None, int, int]
    seconds: float
    found: Assignment


def layers(options: int) -> list[BlockOptions]:
    """The chain's blocks; each option recomputes a larger share of the forward."""
    shares = [index / max(1, options - 1) for index in range(options)]
    layer = tuple(
        BlockOption(f"{share:.0%}", 1e-3, 1e-3 * (1 + share), 1e-3, 1e-4, int(76e6 - 60e6 * share), 10**7, 7 * 10**8, 2 * 10**8)
        for share in shares
    )
    embedding = BlockOption("all", 2e-4, 0.0, 3e-4, 1e-4, 16 * 10**6, 0, 2 * 10**9, 10**8)
    head = BlockOption("all", 1.5e-3, 1.5e-3, 1.5e-3, 1e-4, 64 * 10**6, 0, 2 * 10**9, 10**9)
    cut = CutCost(1e-4, 1e-4, 16 * 10**6)
    return [
        BlockOptions("embedding", (embedding,), cut),
        *(BlockOptions(f"layers.{index}", layer, cut) for index in range(LAYERS)),
        BlockOptions("head", (head,), cut),
    ]


def measure(case: tuple[str, int | None, int, int], gap: float = 5e-3) -> Row:
    """Search one case, the schedule made beforehand."""
    name, chunks, options, gigabytes = case
    schedule = make_schedule(name, RANKS, MICROBATCHES, chunks)
    blocks = layers(options)
    start = time.perf_counter()
    found = assign(blocks, schedule, gigabytes * 10**9, gap=gap)
    return Row(case, time.perf_counter() - start, found)


def main() -> int:
    """Run all cases and print the table."""
    print("| schedule | chunks | options | memory | search | step | above the bound | rounds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in CASES:
        row = measure(case)
        name, chunks, options, gigabytes = case
        above = row.found.simulated / row.found.bound - 1
        print(
            f"| {name} | {chunks or 1} | {options} | {gigabytes} GB | {row.seconds:.2f} s | {row.found.simulated:.3f} s"
            f" | {above:.2%} | {row.found.iterations} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
