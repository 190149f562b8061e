"""Record what is planned for hundreds of models, clusters and pins, and compare two records: what moves when costs or the search change?

``python -m tests.benchmarks.plans record before.json`` on one commit and ``record after.json`` on another; then ``python -m
tests.benchmarks.plans compare before.json after.json`` lists every case whose objective, step, memory, mesh, pipeline or placements moved.
A file that is there is completed, so a run may be stopped; a second argument of ``record`` takes only cases whose names begin with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import autopar
from autopar.cli.models import load_model
from autopar.cost_models import Cluster
from autopar.errors import AutoparError
from autopar.ir import format_layout, format_placement
from autopar.plans import Plan
from autopar.schedules import SCHEDULES
from tests.test_planning_cases import CASES, PINS
from tests.zoo import DEEP, ZOO

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

ZOO_PINS: Mapping[str, Mapping[str, Any]] = {
    "free": {},
    "tp=4": {"tp": 4},
    "dp=2 x tp=2, fsdp": {"dp": 2, "tp": 2, "fsdp": True},
    "cp=2 x tp=2": {"cp": 2, "tp": 2},
    "dp=4": {"dp": 4, "fsdp": False},
    "dp=4, fsdp": {"dp": 4, "fsdp": True},
}
DEEP_PINS: tuple[Mapping[str, Any], ...] = ({"pp": 2, "tp": 2}, {"pp": 4}, {"pp": 2, "dp": 2, "fsdp": True})
RECOMPUTE: tuple[Mapping[str, str], ...] = ({"recompute": "none"}, {"recompute": "selective"}, {"recompute": "full"}, {})
PUBLISHED: tuple[tuple[str, str, int, int, Mapping[str, Any]], ...] = (
    ("gpt2", "8xH100", 32, 1024, {"dp": 8, "fsdp": False}),
    ("gpt2", "8xH100", 32, 1024, {}),
    ("gpt2", "4xA100", 16, 1024, {"pp": 2}),
    ("llama-3-8b", "8xH100", 8, 4096, {}),
    ("llama-3-8b", "8x8xH100", 64, 4096, {}),
    ("llama-3-8b", "8xH100", 16, 8192, {"tp": 8}),
    ("llama-3-8b", "8xH100", 8, 4096, {"dp": 8, "fsdp": True}),
    ("llama-3-70b", "8x8xH100", 8, 8192, {}),
    ("llama-3-70b", "8xH100", 1, 2048, {}),
    ("llama-3-70b", "4x8xH100", 64, 4096, {"pp": 4, "schedule": "1f1b"}),
)


class Case(NamedTuple):
    """What to plan. `memory_share` gives the devices that share of what the free plan takes beside what they reserve; None leaves them."""

    name: str
    build: Callable[[], tuple[torch.nn.Module, Any]]
    cluster: str
    pins: Mapping[str, Any]
    memory_share: float | None = None


def cases() -> Iterator[Case]:
    """Models at the edges of what can be planned, tiny models of the zoo, deep ones in pipelines, published configurations."""
    for name, (model, inputs) in CASES.items():
        for text, pins in PINS.items():
            yield Case(f"edge/{name}/{text}", lambda model=model, inputs=inputs: (model.double(), inputs), "4xcpu", pins)  # type: ignore[misc]
    for name, build in ZOO.items():
        for text, pins in ZOO_PINS.items():
            yield Case(f"zoo/{name}/{text}", build, "4xcpu", pins)
        yield Case(f"zoo/{name}/8xh100", build, "8xh100", {})
        yield Case(f"zoo/{name}/tight", build, "4xcpu", {}, 0.65)
    number = 0
    for name, build in DEEP.items():
        for schedule in SCHEDULES:
            for pins in DEEP_PINS:
                recompute = RECOMPUTE[number % len(RECOMPUTE)]
                number += 1
                asked = {**pins, "schedule": schedule, "microbatches": 4, **recompute}
                yield Case(f"deep/{name}/{' '.join(f'{key}={value}' for key, value in asked.items())}", build, "4xcpu", asked)
        yield Case(f"deep/{name}/free", build, "2x4xh100", {})
        yield Case(f"deep/{name}/tight", build, "4xcpu", {}, 0.6)
    for config, cluster, batch, seq, pins in PUBLISHED:
        text = " ".join(f"{key}={value}" for key, value in pins.items()) or "free"
        yield Case(f"published/{config}/{cluster}/{batch}x{seq}/{text}", lambda args=(config, batch, seq): _load(*args), cluster, pins)  # type: ignore[misc]


def _load(config: str, batch: int, seq: int) -> tuple[torch.nn.Module, Any]:
    loaded = load_model(f"hf:{CONFIGS / config}", batch=batch, seq=seq, dtype="bfloat16")
    return loaded.model, loaded.example_inputs


def plan_case(case: Case) -> Plan:
    """The plan of a case. Raises what planning raises."""
    torch.manual_seed(0)
    model, inputs = case.build()
    cluster = Cluster.parse(case.cluster)
    if case.memory_share is not None:
        memory = autopar.plan(model, inputs, cluster).memory
        cluster = cluster.with_memory(memory.reserved + int((memory.total - memory.reserved) * case.memory_share))
    return autopar.plan(model, inputs, cluster, pins=case.pins)


def describe(plan: Plan) -> dict[str, Any]:
    """What is compared of a plan."""
    pipeline = plan.pipeline
    placements = sorted((name, format_placement(placement)) for name, placement in plan.placements.items())
    layouts = sorted((name, format_layout(layout)) for name, layout in plan.layouts.items())
    return {
        "objective_ns": plan.proof.objective_ns,
        "step": plan.seconds.step,
        "memory": plan.memory.total,
        "mesh": str(plan.mesh),
        "pipeline": f"{pipeline.ranks} {pipeline.schedule} {pipeline.chunks} {pipeline.microbatches}",
        "blocks": _digest([(block.name, block.stage, block.recompute) for block in pipeline.blocks]),
        "placements": _digest(placements),
        "layouts": _digest(layouts),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def record(path: Path, prefix: str) -> None:
    """Plan every case whose name begins with `prefix` and that `path` doesn't hold yet, and write what came of it there."""
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for case in cases():
        if not case.name.startswith(prefix) or case.name in records:
            continue
        start = time.process_time()
        try:
            records[case.name] = describe(plan_case(case))
        except AutoparError as error:
            records[case.name] = {"error": f"{type(error).__name__}: {error}"}
        records[case.name]["cpu_seconds"] = time.process_time() - start
        path.write_text(json.dumps(records, indent=0))
        print(f"{len(records)} {case.name}", file=sys.stderr)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> int:
    """Print what moved, by more than `tolerance` of itself where it is a number; return in how many cases."""
    shared = [name for name in after if name in before]
    moved = 0
    for name in shared:
        old, new = before[name], after[name]
        if "error" in old or "error" in new:
            changes = [] if old.get("error") == new.get("error") else [f"{old.get('error', 'planned')} -> {new.get('error', 'planned')}"]
        else:
            ratios = {key: new[key] / old[key] - 1 if old[key] else 0.0 for key in ("objective_ns", "step", "memory")}
            changes = [f"{key} {ratio:+.2%}" for key, ratio in ratios.items() if abs(ratio) > tolerance]
            changes += [key for key in ("mesh", "pipeline", "blocks", "placements", "layouts") if old[key] != new[key]]
        if changes:
            moved += 1
            print(f"{name:<70} {', '.join(changes)}")
    seconds = [sum(records[name]["cpu_seconds"] for name in shared) for records in (before, after)]
    print(f"{len(shared)} cases, {moved} moved; planning took {seconds[0]:.1f} s of CPU before, {seconds[1]:.1f} s after")
    return moved


def main() -> int:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="plan the cases and write what came of them to a file")
    recorder.add_argument("path", type=Path)
    recorder.add_argument("prefix", nargs="?", default="", help="only cases whose names begin with it")
    comparer = commands.add_parser("compare", help="list what differs between two records")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.add_argument("--tolerance", type=float, default=1e-6, help="relative change of a number that is listed (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "record":
        record(args.path, args.prefix)
    else:
        compare(*(json.loads(path.read_text()) for path in (args.before, args.after)), args.tolerance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
