"""What the processes of a run reach on this machine, measured in turns with the steps that it predicts; and races of plans beside that.

In a profile that was measured on an idle machine the ranks have their cores, caches and memory to themselves. Here all ranks of a gloo
group do the same at the same time, one thread each, so that whatever slows the steps down slows the measured rates too. An exchange is
measured as a step has it, between products: what the products take longer with it is its price. That holds the wait for the slower rank
and caches that products have filled, neither of which shows where ranks do nothing but exchange. Run as a program it prints the rates of
two processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, final
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.cost_models import Cluster, Machine, find_machine
from autopar.ops import GroupAxis, comm
from tests.processes import spawn

# Bytes of what is exchanged for a block: norms and matrices of a small Llama; and of a block of nothing but small tensors.
_BLOCK = (2**11, 2**20, 2**19, 2**19, 2**20, 2**11, *[3 * 2**20] * 3)
_SMALL = (2**11,) * len(_BLOCK)
# Samples of each per turn: many, as they are as short as single ops of a step.
_SAMPLES = 3
# Rows, features in and features out of the products of a layer; the first counts for the price of a small one.
_PRODUCTS = ((32, 64, 64), (128, 512, 512), (128, 512, 1408))
# A step multiplies as often as the forward, for the gradients of inputs, and of weights.
_PASSES = 3
# The product between two exchanges, which takes as long as a step of such a model computes between two.
_BETWEEN = (256, 512, 512)


@final
class Probes:
    """Samples of the rates of this rank, some of each per `run`; every rank runs as often as the others.

    Args:
        axis: all ranks that compute at the same time.
    """

    def __init__(self, axis: GroupAxis) -> None:
        self._axis = axis
        # As in a step, what is sent isn't in a cache, and results are held for a while.
        self._sent = torch.randn(2**24)
        self._at = 0
        self._held: deque[Tensor] = deque(maxlen=2 * len(_BLOCK))
        self._operands = [(torch.randn(rows, features), torch.randn(out, features)) for rows, features, out in (*_PRODUCTS, _BETWEEN)]
        self._memory = torch.randn(2**19)
        self._times: list[dict[str, list[float]]] = []

    def run(self) -> None:
        """Take some samples of each."""
        self._times.append({})
        for _ in range(_SAMPLES):
            for number in range(len(_PRODUCTS)):
                self._time(f"product {number}", partial(self._multiply, number))
            self._time("pointwise", lambda: self._memory + self._memory)
            self._time("launch", lambda: [self._memory[:64] + 1 for _ in range(100)])
            self._time("block", self._compute)
            for kind, begin in (("gather", self._begin_gather), ("reduce", self._begin_reduce)):
                self._time(f"small {kind}", partial(self._compute, begin, _SMALL))
                self._time(kind, partial(self._compute, begin, _BLOCK))
                self._time(f"{kind} ahead", partial(self._compute, begin, _BLOCK, ahead=True))

    def machine(self, rounds: Sequence[int]) -> Machine:
        """The profile of CPUs, with the medians of the samples of some rounds in it."""
        profile = find_machine("cpu")
        kept = [self._times[number] for number in rounds]
        middle = {name: statistics.median(seconds for times in kept for seconds in times[name]) for name in kept[0]}
        kinds = "gather", "reduce"
        # What a block takes longer with its exchanges: where it waits for each on the spot, and where they are begun ahead.
        small, exposed, beside = (
            sum(middle[name.format(kind)] - middle["block"] for kind in kinds) / len(kinds) for name in ("small {}", "{}", "{} ahead")
        )
        latency = max(0.0, small / len(_SMALL))
        moved = (self._axis.size - 1) / self._axis.size * sum(_BLOCK)
        rate = moved / max(exposed - small, 1e-6)
        flops = [2.0 * _PASSES * rows * features * out for rows, features, out in _PRODUCTS]
        peak = max(flops[number] / middle[f"product {number}"] for number in range(1, len(flops)))
        device = dataclasses.replace(
            profile.device,
            name="CPU core, as measured",
            peak_flops={**profile.device.peak_flops, "float32": peak},
            matmul_efficiency=1.0,
            matmul_half_flops=max(0.0, middle["product 0"] * peak - flops[0]) / _PASSES,
            mem_bandwidth_bytes_per_s=3 * self._memory.nbytes / middle["pointwise"],
            mem_efficiency=1.0,
            launch_seconds=max(middle["launch"] / 100, profile.device.launch_seconds),
            overlap=min(1.0, max(0.0, 1 - beside / max(exposed, 1e-6))),
        )
        link = dataclasses.replace(profile.intra, latency_seconds=latency, bandwidth_bytes_per_s=rate)
        return dataclasses.replace(profile, device=device, intra=link, inter=link)

    def _next(self, nbytes: int) -> Tensor:
        """A tensor of so many bytes, a part per rank, that hasn't been sent for a while."""
        numel = nbytes // 4
        self._at = 0 if self._at + numel > self._sent.numel() else self._at
        self._at += numel
        return self._sent[self._at - numel : self._at].view(self._axis.size, -1)

    def _multiply(self, number: int) -> Tensor:
        """The product of a layer, and those of its backward."""
        x, weight = self._operands[number]
        made = torch.nn.functional.linear(x, weight)
        of_input, _ = made @ weight, made.T @ x
        return of_input

    def _begin_gather(self, nbytes: int) -> comm.Message:
        return self._axis.begin_gather_stack(self._next(nbytes)[0])

    def _begin_reduce(self, nbytes: int) -> comm.Message:
        return self._axis.begin_reduce_stack(self._next(nbytes))

    def _compute(self, begin: Callable[[int], comm.Message] | None = None, sizes: Sequence[int] = _SMALL, *, ahead: bool = False) -> None:
        """A block of products, each behind an exchange of its own; or all of them beside the exchanges, which are begun `ahead`."""
        begun = [begin(size) for size in sizes] if begin is not None and ahead else []
        for size in sizes:
            if begin is not None and not ahead:
                self._held.append(begin(size).wait())
            self._held.append(torch.nn.functional.linear(*self._operands[-1]))
        self._held.extend(message.wait() for message in begun)

    def _time(self, name: str, do: Callable[[], object]) -> None:
        dist.barrier()
        start = time.perf_counter()
        do()
        self._times[-1].setdefault(name, []).append(time.perf_counter() - start)


@final
class OtherWork:
    """CPU seconds that programs other than the ranks take of this machine, as Linux counts them."""

    def __init__(self, axis: GroupAxis) -> None:
        self._axis = axis
        self._start = self._now()

    def share(self) -> float:
        """The mean number of cores that they kept busy since this was last asked for, on every rank the same."""
        before, self._start = self._start, self._now()
        wall, busy, own = (after - earlier for after, earlier in zip(self._start, before, strict=True))
        own = float(self._axis.all_reduce(torch.tensor(own, dtype=torch.float64)))
        return float(self._axis.all_reduce(torch.tensor((busy - own) / wall), "max"))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9])
        return time.perf_counter(), (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK"), time.process_time()


class Waits:
    """Seconds that this process waits for other ranks, summed up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, waits are added up."""
        wait = comm._GroupMessage.wait

        def timed(message: Any) -> Any:
            start = time.perf_counter()
            result = wait(message)
            self.seconds += time.perf_counter() - start
            return result

        with mock.patch.object(comm._GroupMessage, "wait", timed):
            yield


@contextmanager
def muted() -> Iterator[None]:
    """Inside, two ranks of a gloo group exchange nothing in programs: each gets its own tensors in the place of the other's.

    What a step takes longer without it is what its communication costs: waiting, and computing that is slower beside it.
    """
    receive = GroupAxis._receive

    def copy(axis: GroupAxis, received: Tensor, sent: Tensor) -> Any:
        if axis.name == "all ranks":  # where the ranks compare what they are called with
            return receive(axis, received, sent)
        received.copy_(sent.detach().reshape(received.shape))
        return comm._DeliveredMessage(received)

    with mock.patch.object(GroupAxis, "_receive", copy):
        yield


@dataclasses.dataclass(frozen=True)
class Race:
    """Plans of one model that are timed in turns.

    Attributes:
        build: the model, the same in every process.
        inputs: of a step, which returns a loss.
        pins: name -> pins of a plan for two ranks.
        warmup, rounds: turns that aren't and that are counted.
        keep: of the counted rounds, those in which other programs took the least of the machine.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    pins: Mapping[str, Mapping[str, Any]]
    warmup: int
    rounds: int
    keep: int

    def run(self) -> None:
        """Time two processes, and print a table."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            spawn(2, Path(folder), _measure, self, str(out))
            for row in json.loads(out.read_text(encoding="utf-8")):
                print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))


def _measure(rank: int, race: Race, out: str) -> None:
    steps: dict[str, Callable[[], None]] = {}
    for name, pins in race.pins.items():
        model = autopar.compile(race.build(), plan=autopar.plan(race.build(), race.inputs, "1x2xcpu", pins=pins))
        optimizer = torch.optim.AdamW(model.parameters())

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(**race.inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    axis = GroupAxis("probes", dist.group.WORLD)
    waits, probes, others, shares = Waits(), Probes(axis), OtherWork(axis), list[float]()
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {(name, mute): [] for name in steps for mute in (False, True)}
    turns = list(times)
    for number in range(race.warmup + race.rounds):
        probes.run()
        for name, mute in turns[number % len(turns) :] + turns[: number % len(turns)]:
            with waits.counted(), muted() if mute else nullcontext():
                dist.barrier()
                before, start = waits.seconds, time.perf_counter()
                steps[name]()
                times[name, mute].append((time.perf_counter() - start, waits.seconds - before))
        shares.append(others.share())
    if rank == 0:
        quiet = sorted(range(race.warmup, len(shares)), key=shares.__getitem__)[: race.keep]
        Path(out).write_text(json.dumps(_compare(race, times, probes.machine(quiet), quiet, shares)), encoding="utf-8")


def _compare(
    race: Race,
    times: Mapping[tuple[str, bool], Sequence[tuple[float, float]]],
    machine: Machine,
    rounds: Sequence[int],
    shares: Sequence[float],
) -> list[dict[str, Any]]:
    """A row for what was measured of the machine, and one per plan: seconds measured beside those predicted, in milliseconds."""
    device, link = machine.device, machine.intra
    rows: list[dict[str, Any]] = [
        {
            "cores of others": shares[rounds[-1]],
            "overlap": device.overlap,
            "latency ms": 1e3 * link.latency_seconds,
            "GB/s": link.bandwidth_bytes_per_s / 1e9,
            "GFLOP/s": device.peak_flops["float32"] / 1e9,
            "memory GB/s": device.mem_bandwidth_bytes_per_s / 1e9,
        }
    ]
    for name, pins in race.pins.items():
        plan = autopar.plan(race.build(), race.inputs, Cluster(nodes=1, devices_per_node=2, machine=machine), pins=pins)
        sent = [row for row in plan.costs if row.is_communication]
        whole, silent = ([times[name, mute][number] for number in rounds] for mute in (False, True))
        rows.append(
            {
                "plan": name,
                "step": _middle(seconds for seconds, _ in whole),
                "predicted": plan.proof.objective_ns / 1e6,
                "without exchanges": _middle(seconds for seconds, _ in silent),
                "exposed": _middle(mine - other for (mine, _), (other, _) in zip(whole, silent, strict=True)),
                "waiting": _middle(waited for _, waited in whole),
                "predicted exposed": 1e3 * sum(row.seconds for row in sent),
                "predicted hidden": 1e3 * sum(row.hidden for row in sent),
            }
        )
    return rows


def _middle(seconds: Iterator[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _print_rates(rank: int, rounds: int) -> None:
    axis = GroupAxis("probes", dist.group.WORLD)
    probes, others = Probes(axis), OtherWork(axis)
    for _ in range(rounds):
        probes.run()
    share = others.share()
    if rank == 0:
        machine = probes.machine(range(rounds))
        print(f"other programs keep {share:.2f} cores busy")
        for thing in (machine.device, machine.intra):
            print(*(f"{field.name} = {getattr(thing, field.name)}" for field in dataclasses.fields(thing)), sep="\n")


def main() -> None:
    """Print what two processes reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    with tempfile.TemporaryDirectory() as folder:
        spawn(2, Path(folder), _print_rates, parser.parse_args().rounds)


if __name__ == "__main__":
    main()
