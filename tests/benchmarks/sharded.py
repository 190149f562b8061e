"""Times and weighs data parallelism with split storage against what a person writes with torch: FSDP2, and DDP with a ZeRO optimizer.

All programs train the same Llama in one run, over gloo, and take turns step by step (`tests.benchmarks.speed`). Their memory is measured
apart, each program in processes of its own: the peak of resident memory in some steps, after a few others, over what the process has before
it builds the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import autopar
from autopar.units import format_bytes
from tests.benchmarks.speed import OURS, Entrant, adamw, build_llama, describe, draw_batch, race, run_ranks, save_slowest

# Makes a program over a Llama of so many layers.
Make = Callable[[int], Entrant]

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _ours(zero: int, precision: Any) -> Make:
    def make(layers: int) -> Entrant:
        pins = {"dp": dist.get_world_size(), "zero": zero}
        model = autopar.compile(build_llama(layers), draw_batch(), pins=pins, precision=precision)
        return Entrant(model, adamw(model))

    return make


def _fsdp2(precision: MixedPrecisionPolicy | None, *, reshards: bool = True) -> Make:
    def make(layers: int) -> Entrant:
        model: Any = build_llama(layers)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshards}
        if precision is not None:
            options["mp_policy"] = precision
        for layer in model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        return Entrant(model, adamw(model))

    return make


def _ddp_with_zero(layers: int) -> Entrant:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # importing it warns of what torch has deprecated

    model = DistributedDataParallel(build_llama(layers), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=3e-4)
    return Entrant(model, optimizer)


@dataclass(frozen=True)
class Race:
    """Programs that compute the same; by hand each rank gets its rows of the batch, as torch's wrappers want."""

    title: str
    entrants: dict[str, Make]


RACES = (
    Race("ZeRO 3, mixed precision", {OURS: _ours(3, MIXED), "FSDP2": _fsdp2(MIXED)}),
    Race("ZeRO 2, mixed precision", {OURS: _ours(2, MIXED), "FSDP2, not resharded after the forward": _fsdp2(MIXED, reshards=False)}),
    Race("ZeRO 3, float32", {OURS: _ours(3, None), "FSDP2": _fsdp2(None)}),
    Race("ZeRO 1, float32", {OURS: _ours(1, None), "DDP with ZeroRedundancyOptimizer": _ddp_with_zero}),
)


class _OwnRows:
    """An entrant that is given the whole batch and trains on this rank's rows."""

    def __init__(self, entrant: Entrant) -> None:
        self.entrant = entrant

    def step(self, batch: Any) -> float:
        """Do one step on this rank's rows; returns the mean of the ranks' losses."""
        rows = {name: x.chunk(dist.get_world_size())[dist.get_rank()] for name, x in batch.items()}
        loss = torch.tensor(self.entrant.step(rows))
        dist.all_reduce(loss)
        return float(loss) / dist.get_world_size()


def _make(name: str, make: Make, layers: int) -> Any:
    return make(layers) if name == OURS else _OwnRows(make(layers))


def _start(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))


def _time(rank: int, folder: str, ranks: int, number: int, layers: int, warmup: int, rounds: int) -> None:
    _start(rank, ranks, folder)
    try:
        entrants = {name: _make(name, make, layers) for name, make in RACES[number].entrants.items()}
        save_slowest(race(entrants, warmup, rounds, draw_batch()), folder)
    except BaseException:
        dist.destroy_process_group()
        raise
    _leave()


def _weigh(rank: int, ranks: int, folder: str, number: int, layers: int, name: str) -> None:
    _start(rank, ranks, folder)
    try:
        batch = draw_batch()
        before = _resident("VmRSS")
        entrant = _make(name, RACES[number].entrants[name], layers)
        for _ in range(3):
            entrant.step(batch)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(3):
            entrant.step(batch)
        peaks: list[Any] = [None] * ranks
        dist.all_gather_object(peaks, _resident("VmHWM") - before)
        if rank == 0:
            Path(folder, "peak.json").write_text(json.dumps(max(peaks)))
    except BaseException:
        dist.destroy_process_group()
        raise
    _leave()


def _leave() -> None:
    """End this process when all ranks have come here: FSDP2 over gloo sometimes aborts where a process ends by itself."""
    dist.barrier()
    os._exit(0)


def _resident(field: str) -> int:
    """Bytes of resident memory of this process, now (VmRSS) or at its peak (VmHWM)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _measure(number: int, ranks: int, options: argparse.Namespace) -> str:
    entrants, layers = RACES[number].entrants, options.layers
    times = run_ranks(_time, ranks, ranks, number, layers, options.warmup, options.rounds)
    peaks: dict[str, list[int]] = {name: [] for name in entrants}
    for _ in range(options.repeats):
        for name in entrants:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_weigh, (ranks, folder, number, layers, name), nprocs=ranks)
                peaks[name].append(json.loads(Path(folder, "peak.json").read_text()))
    medians = {name: statistics.median(each) for name, each in peaks.items()}
    ratio = medians[OURS] / min(peak for name, peak in medians.items() if name != OURS)
    weights = ", ".join(f"{name} {format_bytes(int(peak))}" for name, peak in medians.items())
    return (
        describe(f"{RACES[number].title}, {layers} layers, {ranks} ranks over gloo", times, 1.0)
        + f"\n  peak of resident memory: {weights}; ratio {ratio:.3f}, target 1.00: {'met' if ratio <= 1 else 'MISSED'}"
    )


def main() -> None:
    """Run the races and print what they showed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default: 2 4)")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each program (default: 20)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before these (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of memory (default: 3)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the Llama (default: 4)")
    parser.add_argument("--only", type=int, choices=range(len(RACES)), help="only the race of this number")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for ranks in options.ranks:
        for number in range(len(RACES)) if options.only is None else [options.only]:
            print(_measure(number, ranks, options), flush=True)


if __name__ == "__main__":
    main()
