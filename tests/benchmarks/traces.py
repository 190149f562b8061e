"""Recorded steps beside those that plans predict, phase by phase, on this machine's CPUs.

Two processes of a thread each train a small Llama under four plans, and record every step (`model.trace`). In turns with the steps, what
the processes reach is measured (`tests.benchmarks.machine`), and the plans are made for that. The rounds in which other programs took
least of the machine count; of each plan the recorded step of median length is shown, in milliseconds of the mean rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import autopar
from autopar.cost_models import Cluster, Machine
from autopar.ops import GroupAxis
from autopar.plans import Plan
from autopar.timelines import COMPUTE, Trace, draw, from_chrome, predict
from autopar.timelines.trace import BUSY
from tests.benchmarks.machine import OtherWork, Probes
from tests.benchmarks.speed import build_llama, draw_batch
from tests.processes import spawn

PINS: Mapping[str, Mapping[str, Any]] = {
    "dp=2": {"dp": 2},
    "tp=2": {"tp": 2},
    "pp=2, gpipe": {"pp": 2, "schedule": "gpipe", "microbatches": 4},
    "pp=2, 1f1b": {"pp": 2, "schedule": "1f1b", "microbatches": 4},
}
WARMUP = 2
PHASES = ("forward", "backward", "optimizer", "communication", "waiting", "step")


def split_step(trace: Trace) -> dict[str, float]:
    """Milliseconds of the mean rank by phase, which add up to the step; communication is what computing waits for, waiting the rest."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for event in trace.events:
        if event.thread in BUSY:
            of_step = "optimizer" if event.phase == "step" else "backward"
            phase = "communication" if event.thread != COMPUTE else "forward" if event.phase == "forward" else of_step
            seconds[phase] += event.seconds / len(trace.ranks)
    seconds["waiting"] = trace.seconds - sum(seconds.values())
    seconds["step"] = trace.seconds
    return {phase: 1e3 * time for phase, time in seconds.items()}


def _work(rank: int, folder: Path, rounds: int, keep: int, layers: int) -> None:
    steps = {}
    for name, pins in PINS.items():
        plan = autopar.plan(build_llama(layers), draw_batch(), "1x2xcpu", pins=pins)
        model = autopar.compile(build_llama(layers), plan=plan)
        steps[name] = model, torch.optim.AdamW(model.parameters())
    axis = GroupAxis("probes", dist.group.WORLD)
    probes, others = Probes(axis), OtherWork(axis)
    shares = []
    for number in range(WARMUP + rounds):
        probes.run()
        for place, (model, optimizer) in enumerate(steps.values()):
            with model.trace(folder / f"{place}.{number}.json"):
                model(**draw_batch()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        shares.append(others.share())
    if rank == 0:
        quiet = sorted(range(WARMUP, len(shares)), key=shares.__getitem__)[:keep]
        machine = probes.machine(quiet)
        for place, pins in enumerate(PINS.values()):
            _plan(machine, pins, layers).save(folder / f"{place}.plan.json")
        (folder / "quiet.json").write_text(json.dumps([quiet, shares[quiet[-1]]]), encoding="utf-8")


def _plan(machine: Machine, pins: Mapping[str, Any], layers: int) -> Plan:
    return autopar.plan(build_llama(layers), draw_batch(), Cluster(nodes=1, devices_per_node=2, machine=machine), pins=pins)


def _read_median(folder: Path, place: int, numbers: Sequence[int]) -> Trace:
    traces = [from_chrome((folder / f"{place}.{number}.json").read_text(encoding="utf-8"))[0] for number in numbers]
    return sorted(traces, key=lambda trace: trace.seconds)[len(traces) // 2]


def main() -> None:
    """Record steps and print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--keep", type=int, default=9, help="count so many rounds, those in which other programs took least")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--picture", type=Path, help="draw the plan of this name, predicted and recorded, into this SVG file")
    parser.add_argument("--of", choices=list(PINS), default="pp=2, 1f1b", help="of which plan")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn(2, folder, _work, folder, arguments.rounds, arguments.keep, arguments.layers)
        quiet, share = json.loads((folder / "quiet.json").read_text(encoding="utf-8"))
        print(f"other programs keep {share:.2f} cores busy at most\n")
        print(f"| plan | | {' | '.join(PHASES)} |\n| --- | --- |{' --- |' * len(PHASES)}")
        for place, plan in enumerate(PINS):
            predicted = predict(Plan.load(folder / f"{place}.plan.json"))
            recorded = _read_median(folder, place, quiet)
            for title, trace in (("predicted", predicted), ("recorded", recorded)):
                print(
                    f"| {plan if trace is predicted else ''} | {title} | {' | '.join(f'{ms:.1f}' for ms in split_step(trace).values())} |"
                )
            if arguments.picture is not None and plan == arguments.of:
                arguments.picture.write_text(draw([predicted, recorded]), encoding="utf-8")


if __name__ == "__main__":
    main()
