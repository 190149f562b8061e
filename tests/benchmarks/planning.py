"""Measure planning: capture, rules and costs, search, stages, for published Llama configurations on GPU clusters that aren't there.

``make plan-bench`` runs it. Each case runs in a process of its own, so that peak memory is its own; two threads are used at most.
The table is printed as it stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autopar.plans.plan import Plan

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
# Model, cluster, sequences, tokens of each, pipeline ranks (None leaves them to the planner).
CASES: tuple[tuple[str, str, int, int, int | None], ...] = (
    ("llama-3-8b", "8xH100", 8, 4096, None),
    ("llama-3-8b", "8x8xH100", 64, 4096, None),
    ("llama-3-70b", "8xH100", 1, 8192, None),
    ("llama-3-70b", "8xH100", 1, 2048, None),
    ("llama-3-70b", "8x8xH100", 8, 8192, None),
    ("llama-3.1-405b", "2048x8xH100", 2048, 8192, 16),
    ("llama-3.1-405b", "2048x8xH100", 2048, 8192, None),
)


def measure(config: str, cluster: str, batch: int, seq: int, pipeline_ranks: int | None) -> dict[str, object]:
    """Plan one case in this process and return what it took; an infeasible case says what would be needed."""
    import torch

    from autopar.capture.export import capture
    from autopar.cli.models import load_model
    from autopar.cost_models import Cluster
    from autopar.errors import InfeasibleError
    from autopar.plans import Pins
    from autopar.search.planner import make_plan

    torch.set_num_threads(2)
    loaded = load_model(f"hf:{CONFIGS / config}", batch=batch, seq=seq, dtype="bfloat16")
    start = time.perf_counter()
    captured = capture(loaded.model, loaded.example_inputs)
    captured_at = time.perf_counter()
    result: dict[str, object] = {"config": config, "cluster": cluster, "batch": f"{batch} x {seq}", "ops": len(captured.graph.ops)}
    steps: dict[str, float] = {}
    clock = captured_at

    def progress(what: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        steps[last[0]] = steps.get(last[0], 0.0) + now - clock
        clock, last[0] = now, what.partition(":")[0]

    last = ["start"]
    try:
        pins = {} if pipeline_ranks is None else {"pp": pipeline_ranks, "schedule": "1f1b"}
        plan = make_plan(captured.graph, Cluster.parse(cluster), pins=Pins.parse(pins), progress=progress)
    except InfeasibleError as error:
        result |= {"outcome": str(error)}
    else:
        result |= {
            "outcome": f"{_describe(plan)}, {plan.seconds.step:.2f} s a step, gap {100 * plan.proof.gap:.2f} %",
            "variables": plan.proof.variables,
            "candidates": len(plan.proof.candidates),
        }
    progress("end")
    result |= {
        "capture_s": captured_at - start,
        "costs_s": sum(steps.get(step, 0.0) for step in ("rules and costs", "costs", "estimates")),
        "search_s": steps.get("search", 0.0) + steps.get("memory", 0.0),
        "stages_s": sum(steps.get(step, 0.0) for step in ("greedy", "schedules", "stages")),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    return result


def _describe(plan: Plan) -> str:
    """The mesh, and the pipeline if there is one."""
    pipeline = plan.pipeline
    if pipeline.is_trivial:
        return str(plan.mesh)
    name = f"{pipeline.schedule} x{pipeline.chunks}" if pipeline.chunks > 1 else pipeline.schedule
    return f"pp={pipeline.ranks} x {plan.mesh}, {name}, {pipeline.microbatches} micro-batches"


def main() -> int:
    """Run all cases, or the one named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(measure(*CASES[case])))
        return 0
    print("| model | cluster | batch | pins | ops | capture s | costs s | search s | stages s | variables | peak GB | outcome |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = 0
    for number in range(len(CASES)):
        run = subprocess.run([sys.executable, __file__, "--case", str(number)], capture_output=True, text=True, check=False)
        if run.returncode:
            print(run.stderr, file=sys.stderr)
            failed = 1
            continue
        row = json.loads(run.stdout.splitlines()[-1])
        pipeline_ranks = CASES[number][-1]
        pins = f"pp={pipeline_ranks}, 1f1b" if pipeline_ranks else "-"
        print(
            f"| {row['config']} | {row['cluster']} | {row['batch']} | {pins} | {row['ops']}"
            f" | {row['capture_s']:.1f} | {row['costs_s']:.1f} | {row['search_s']:.1f} | {row['stages_s']:.1f}"
            f" | {row.get('variables', '-')} | {row['peak_gb']:.1f} | {row['outcome']} |",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
