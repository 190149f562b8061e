"""Times the attention of rings alone: work of each rank, overlap of computing and exchange, and against torch's own ring.

Every measured step is a forward and a backward of one causal attention (bidirectional in one race) in gloo processes of a thread each; what
is compared takes turns, step by step. `python -m tests.benchmarks.ring PART` prints tables, in Markdown.

Torch's context parallelism knows kernels of GPUs only: on a CPU its dispatcher refuses the attention. So its ring is driven as that
dispatcher would, forward and backward by the functions that it has for all kernels, with torch's kernel for CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.nn.functional import scaled_dot_product_attention

from autopar.ops import GroupAxis, comm, ring
from autopar.ops.attention_blocks import Scores
from autopar.ops.positions import Positions, spans_of
from autopar.ops.ring import plan_ring, ring_attention
from autopar.replaced import replaced
from tests.benchmarks.machine import OtherWork
from tests.processes import spawn

WARMUP = 2
OURS = "autopar"


@dataclass(frozen=True)
class Shape:
    """The attention of one device: queries, keys and values are (1, heads, length, width), in float32."""

    heads: int
    length: int
    width: int = 64

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.width}, {self.length:,} tokens"


@final
class Part:
    """A rank's part of an attention, with what one device computes there.

    Args:
        shape: the whole attention.
        axis: the ranks that split its sequence.
        causal: row i attends to keys 0..i.
        zigzag: each rank has two pieces of the sequence.
    """

    def __init__(self, shape: Shape, axis: GroupAxis, *, causal: bool, zigzag: bool) -> None:
        self._axis, self._causal, self._zigzag = axis, causal, zigzag
        self._scale = shape.width**-0.5
        generator = torch.Generator().manual_seed(1)
        whole = [torch.randn(1, shape.heads, shape.length, shape.width, generator=generator) for _ in range(4)]
        spans = spans_of(axis.index, axis.size, shape.length // axis.size, zigzag=zigzag)
        self._rows = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans])
        self._whole, self._whole_gradient = [x.requires_grad_() for x in whole[:3]], whole[3]
        self._operands = [x.detach()[:, :, self._rows].requires_grad_() for x in whole[:3]]
        self._gradient = whole[3][:, :, self._rows]

    def run(self, axis: comm.Axis | None = None) -> tuple[Tensor, ...]:
        """Result and gradients by autopar's ring, over another axis if one is given."""
        positions = Positions.of(causal=self._causal, window=None)
        axis = self._axis if axis is None else axis
        result = ring_attention(*self._operands, None, None, positions, Scores(self._scale), axis, zigzag=self._zigzag)
        return result.detach(), *torch.autograd.grad(result, self._operands, self._gradient)

    def run_torch(self, method: str) -> tuple[Tensor, ...]:
        """The same by torch's ring; `method` says how its keys and values travel."""
        torch_ring.set_rotate_method(method)
        torch_ring._cp_options.enable_load_balance = self._zigzag
        result: Tensor = _TorchRing.apply(*self._operands, self._axis.group, self._causal, self._scale)  # type: ignore[no-untyped-call]
        return result.detach(), *torch.autograd.grad(result, self._operands, self._gradient)

    def error(self, run: Callable[[], tuple[Tensor, ...]]) -> float:
        """The largest difference of a result or gradient from those of one device."""
        result = scaled_dot_product_attention(*self._whole, is_causal=self._causal, scale=self._scale)
        expected = result.detach(), *torch.autograd.grad(result, self._whole, self._whole_gradient)
        return max(float((part - whole[:, :, self._rows]).abs().max()) for part, whole in zip(run(), expected, strict=True))


class _TorchRing(torch.autograd.Function):
    """Torch's ring with its kernel for CPUs, as `_sdpa_handler` of its context parallelism runs those for GPUs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, causal: bool, scale: float) -> Tensor:
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result, lse = torch_ring._templated_ring_attention(group, 2, kernel, q, k, v, is_causal=causal, dropout_p=0.0, scale=scale)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.call = group, causal, scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, causal, scale = ctx.call
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = torch_ring._templated_ring_attention_backward(
            group, 2, kernel, gradients[0], "grad_out", *ctx.saved_tensors, is_causal=causal, dropout_p=0.0, scale=scale
        )
        return *found[:3], None, None, None


# --- steps in turns ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Steps of one program: seconds and CPU seconds of the slowest rank, and the most bytes that the first one wrote to sockets."""

    seconds: Sequence[float]
    cpu: Sequence[float]
    nbytes: int = 0


def take_turns(programs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Run programs step by step, in an order that rotates, on all ranks at once."""
    names = list(programs)
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    for number in range(WARMUP + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            written, cpu, start = _written(), time.process_time(), time.perf_counter()
            programs[name]()
            step = time.perf_counter() - start, time.process_time() - cpu, _written() - written
            steps: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(steps, step)
            if number >= WARMUP:
                times[name].append((max(each[0] for each in steps), max(each[1] for each in steps), step[2]))
    return {
        name: Times(*(list(column) for column in list(zip(*steps, strict=True))[:2]), max(x[2] for x in steps))
        for name, steps in times.items()
    }


def _written() -> int:
    """Bytes that this process has written to files and sockets."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("wchar:")[1].split()[0])


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(axis, *arguments)`` returns on the first of so many processes; and how many cores other programs kept busy."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(ranks, Path(folder), _work, folder, work, arguments)
        return json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))


def _work(rank: int, folder: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    axis = GroupAxis("cp", dist.group.WORLD)
    others = OtherWork(axis)
    found = work(axis, *arguments)
    share = others.share()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps([found, share]), encoding="utf-8")


# --- work of each rank -------------------------------------------------------------------------------------------------------------


@contextmanager
def _counted(seconds: list[float]) -> Iterator[None]:
    """Inside, the CPU seconds of the kernels of blocks are added up in the list's only element."""

    def counting(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.thread_time()
            found = kernel(*arguments)
            seconds[0] += time.thread_time() - start
            return found

        return run

    with replaced(ring, "attend", counting(ring.attend)), replaced(ring, "attend_backward", counting(ring.attend_backward)):
        yield


def _measure_work(axis: GroupAxis, shape: Shape, rounds: int) -> list[Any]:
    """Per layout the CPU seconds of every rank's kernels in a step, the least of some, and the pairs of row and key that it computes."""
    parts = {zigzag: Part(shape, axis, causal=True, zigzag=zigzag) for zigzag in (False, True)}
    least = dict.fromkeys(parts, float("inf"))
    for number in range(1 + rounds):
        for zigzag, part in parts.items():
            dist.barrier()
            seconds = [0.0]
            with _counted(seconds):
                part.run()
            if number:
                least[zigzag] = min(least[zigzag], seconds[0])
    rows: list[Any] = []
    for zigzag in parts:
        pairs = _count_pairs(axis, shape.length // axis.size, zigzag=zigzag)
        every: list[Any] = [None] * axis.size
        dist.all_gather_object(every, (least[zigzag], pairs))
        rows.append([zigzag, *([each[place] for each in every] for place in (0, 1))])
    return rows


def _count_pairs(axis: GroupAxis, length: int, *, zigzag: bool) -> int:
    pairs = 0
    for stop in plan_ring(axis.index, axis.size, length, Positions.of(causal=True, window=None), zigzag=zigzag).stops:
        for block in stop.blocks:
            rows, keys = (place.stop - place.start for place in (block.row_slice, block.key_slice))
            pairs += rows * (rows + 1) // 2 if block.is_causal else rows * keys
    return pairs


def print_work(shape: Shape, rounds: int) -> None:
    """The table of each rank's work, in Markdown."""
    print(f"\nA causal attention of {shape}, CPU seconds of the kernels of a step, the least of {rounds}.\n")
    print("| ranks | layout | CPU s of each rank | imbalance | by pairs | closed form |\n| --- | --- | --- | ---: | ---: | ---: |")
    for ranks in (2, 4):
        rows, share = on_ranks(ranks, _measure_work, shape, rounds)
        for zigzag, seconds, pairs in rows:
            each = ", ".join(f"{second:.3f}" for second in seconds)
            closed = 1.0 if zigzag else 2 - 1 / ranks
            layout = "zigzag" if zigzag else "contiguous"
            print(f"| {ranks} | {layout} | {each} | {_imbalance(seconds):.2f} | {_imbalance(pairs):.2f} | {closed:.2f} |")
        _print_others(ranks, share)


def _imbalance(work: Sequence[float]) -> float:
    return max(work) / statistics.fmean(work)


def _print_others(ranks: int, share: float) -> None:
    print(f"<!-- {ranks} ranks: other programs keep {share:.2f} cores busy -->", flush=True)


# --- overlap -----------------------------------------------------------------------------------------------------------------------


@final
class _Muted(comm.Axis):
    """An axis on which nothing is exchanged: what is received is whatever stands in memory that stays allocated."""

    def __init__(self, axis: comm.Axis) -> None:
        self.name, self.size, self.index = axis.name, axis.size, axis.index
        self._received: dict[tuple[int, torch.dtype], Tensor] = {}

    def send(self, x: Tensor, to: int) -> comm.Message:
        return comm._DeliveredMessage(x)

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> comm.Message:
        numel = torch.Size(shape).numel()
        received = self._received.setdefault((numel, dtype), torch.zeros(numel, dtype=dtype))
        return comm._DeliveredMessage(received.view(tuple(shape)))

    def all_reduce(self, x: Tensor, op: comm.Reduction = "sum") -> Tensor:
        raise NotImplementedError

    gather_stack = reduce_stack = exchange_stack = all_reduce  # type: ignore[assignment]


@contextmanager
def _not_computing() -> Iterator[None]:
    """Inside, the kernels of blocks return what they are given in the place of what they compute."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q, q[..., 0]

    def attend_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    with (
        replaced(ring, "attend", attend),
        replaced(ring, "attend_backward", attend_backward),
        replaced(ring, "merge", lambda *_: None),
        replaced(
            ring,
            "_add",
            lambda total, part, place, tokens, dtype: part.new_zeros((*part.shape[:2], tokens, part.shape[3])) if total is None else total,
        ),
    ):
        yield


def _measure_overlap(axis: GroupAxis, shape: Shape, rounds: int) -> list[Any]:
    part = Part(shape, axis, causal=True, zigzag=True)
    muted = _Muted(axis)

    def exchange() -> None:
        with _not_computing():
            part.run()

    times = take_turns({"step": part.run, "computing": partial(part.run, muted), "exchange": exchange}, rounds)
    return [[statistics.median(times[name].seconds), min(times[name].seconds)] for name in ("step", "computing", "exchange")]


def print_overlap(shapes: Sequence[Shape], rounds: int) -> None:
    """The table of rings beside their parts, in Markdown."""
    print(f"\nA causal zigzag ring, forward and backward, medians of {rounds} steps of the slowest rank; ms.\n")
    print("| attention | ranks | step | computing alone | exchange alone | sum | maximum | step / sum | step / maximum |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for ranks in (2, 4):
        for shape in shapes:
            found, share = on_ranks(ranks, _measure_overlap, shape, rounds)
            step, computing, exchange = (1e3 * median for median, _ in found)
            total, most = computing + exchange, max(computing, exchange)
            numbers = " | ".join(f"{ms:.1f}" for ms in (step, computing, exchange, total, most))
            print(f"| {shape} | {ranks} | {numbers} | {step / total:.2f} | {step / most:.2f} |")
            _print_others(ranks, share)


# --- against torch's ring ----------------------------------------------------------------------------------------------------------

RACES = {"causal": (True, False), "causal, balanced": (True, True), "bidirectional": (False, False)}
"""Name -> (causal, zigzag); torch calls a zigzag head-tail load balancing."""
METHODS = ("alltoall", "allgather")


def _race(axis: GroupAxis, shape: Shape, rounds: int) -> list[Any]:
    rows: list[Any] = []
    for name, (causal, zigzag) in RACES.items():
        part = Part(shape, axis, causal=causal, zigzag=zigzag)
        programs = {OURS: part.run, **{method: partial(part.run_torch, method) for method in METHODS}}
        errors = [float(axis.all_reduce(torch.tensor(part.error(run)), "max")) for run in programs.values()]
        times = take_turns(programs, rounds)
        for (method, each), error in zip(times.items(), errors, strict=True):
            pairs = [ours / other for ours, other in zip(times[OURS].seconds, each.seconds, strict=True)]
            figures = [statistics.median(each.seconds), min(each.seconds), statistics.median(each.cpu), statistics.median(pairs)]
            rows.append([name, method, *figures, each.nbytes, error])
    return rows


def print_race(shape: Shape, rounds: int) -> None:
    """The table of autopar's ring and torch's, in Markdown."""
    print(f"\nAttention of {shape}, forward and backward, {rounds} steps of each in turns; ms of the slowest rank.\n")
    print("| ranks | attention | ring | median | least | CPU | autopar / this | of the same round | of CPU | MB written | largest error |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for ranks in (2, 4):
        rows, share = on_ranks(ranks, _race, shape, rounds)
        ours: list[float] = []
        for name, method, median, least, cpu, same_round, nbytes, error in rows:
            if method == OURS:
                ours = [median, cpu]
                ratios = "| | |"
            else:
                ratios = f"| {ours[0] / median:.3f} | {same_round:.3f} | {ours[1] / cpu:.3f}"
            title = OURS if method == OURS else f"torch, {method}"
            numbers = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (median, least, cpu))
            print(f"| {ranks} | {name} | {title} | {numbers} {ratios} | {nbytes / 1e6:.2f} | {error:.1e} |")
        _print_others(ranks, share)


PARTS = ("work", "overlap", "torch")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all unless given")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each program (default: 20; of work at most 5)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens, of overlap and torch (default: 1024 4096)")
    parser.add_argument("--work-length", type=int, default=8192, help="tokens, of work (default: 8192)")
    parser.add_argument("--heads", type=int, default=4, help="heads of the attention (default: 4)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    shapes = [Shape(options.heads, length) for length in options.lengths]
    for part in options.parts or PARTS:
        if part == "work":
            print_work(Shape(options.heads, options.work_length), min(options.rounds, 5))
        elif part == "overlap":
            print_overlap(shapes, options.rounds)
        else:
            for shape in shapes:
                print_race(shape, options.rounds)


if __name__ == "__main__":
    main()
