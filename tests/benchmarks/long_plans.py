"""Plans of Llama-3-8B for sequences of 8k to 1M tokens: what is chosen, and what each other way of attention would take.

``python -m tests.benchmarks.long_plans`` plans 8 cases, free and with the pins of `ALTERNATIVES`, and prints a table in Markdown.
Nothing is measured: seconds and bytes are the plans' own. The model returns its loss alone, so the logits of a million tokens need
not exist at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.errors import InfeasibleError, InputError
from autopar.ir import Graph
from autopar.plans import Pins, Plan
from autopar.search import make_plan
from autopar.units import format_bytes, format_seconds
from examples.loss_only import build

CASES = {
    "8xH100": ((16, 8192), (4, 32768), (1, 131072), (1, 1048576)),
    "4x8xH100": ((64, 8192), (16, 32768), (4, 131072), (1, 1048576)),
}
"""Cluster -> (samples, tokens of each)."""

ALTERNATIVES: Mapping[str, Mapping[str, object]] = {
    "tp=8": {"tp": 8, "cp": 1},
    "cp=8 ring": {"cp": 8, "attention": "ring"},
    "cp=8 Ulysses": {"cp": 8, "attention": "ulysses"},
    "cp=8 gather": {"cp": 8, "attention": "gather"},
    "cp=8 ring, contiguous": {"cp": 8, "attention": "ring", "zigzag": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--clusters", nargs="*", default=list(CASES), help="of 8xH100 and 4x8xH100")
    options = parser.parse_args()
    heads = ["cluster", "samples x tokens", "mesh", "attention", "recompute", "memory", "step", *ALTERNATIVES, "CPU s"]
    print(f"| {' | '.join(heads)} |\n| {' | '.join('---' for _ in heads)} |", flush=True)
    for cluster in options.clusters:
        for batch, seq in CASES[cluster]:
            model, inputs = build(batch, seq, layers=options.layers)
            graph = capture(model, inputs).graph
            start = time.process_time()
            free = _describe(graph, cluster, {})
            seconds = time.process_time() - start
            others = [_describe(graph, cluster, pins)[-1] for pins in ALTERNATIVES.values()]
            print(f"| {' | '.join([cluster, f'{batch} x {seq:,}', *free, *others, f'{seconds:.0f}'])} |", flush=True)


def _describe(graph: Graph, cluster: str, pins: Mapping[str, object]) -> Sequence[str]:
    """Mesh, attention, recomputation, memory and step of a plan; where there is none, what is wrong."""
    try:
        plan = make_plan(graph, Cluster.parse(cluster), pins=Pins.parse(pins))
    except InfeasibleError as error:
        return ["", "", "", "", f"needs {format_bytes(error.needed)}" if error.needed else "no plan"]
    except InputError:
        return ["", "", "", "", "refused"]
    recompute = "/".join(sorted({block.recompute for block in plan.pipeline.blocks})) or "none"
    return [_mesh(plan), _attention(plan), recompute, format_bytes(plan.memory.total), format_seconds(plan.seconds.step)]


def _mesh(plan: Plan) -> str:
    """The mesh, with pipeline ranks and micro-batches where there are some."""
    pipeline = plan.pipeline
    outer = [f"pp={pipeline.ranks}"] if pipeline.ranks > 1 else []
    inner = [f"{pipeline.microbatches} micro-batches"] if pipeline.microbatches > 1 else []
    return ", ".join([" x ".join([*outer, str(plan.mesh)]), *inner])


def _attention(plan: Plan) -> str:
    """The loops by which attention is split, axis by axis."""
    words = {", ".join(str(part) for part in parts) for name, parts in plan.placements.items() if "attention" in name}
    return " or ".join(sorted(words)) or "whole"


if __name__ == "__main__":
    main()
