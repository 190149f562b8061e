"""Pipelines of real processes in which one rank fails as told: the side of the processes (``python -m tests.failing``).

A process that has imported everything and made the programs forks the ranks, which then start at once. Cases come in as JSON, one a line;
when all ranks of one have ended, a line goes out. Each rank's standard error is a file, and so is what it saw.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.ops.comm import GroupAxis
from autopar.rewrite.emit import rewrite
from autopar.rewrite.program import Program
from autopar.runtime import failures
from autopar.runtime.module import ParallelModule
from tests.planning import make_plan

ROWS, WIDTH, VOCABULARY = 8, 16, 48
LIMIT = 30.0
"""The most seconds that a case takes: a rank that still waits then is one that hangs."""


@dataclass(frozen=True)
class Case:
    """What is run, and how it fails.

    Attributes:
        ranks: number of processes; `pins` as for `autopar.compile`.
        rank: the one that fails.
        at: in its `number`-th forward or backward of `stage`, or in an exchange: "forward", "backward", "receive" of the shared parameter,
            "sum" of gradients, a "hook" of the user's on a parameter.
        how: "raise", "interrupt", "memory" (a real allocation fails), "kill", "stop" (it hangs for ever).
        loss: whether the model computes it; otherwise it is computed outside.
        timeout: of the process group, in seconds.
        stays: whether the failing rank lives on after its error, asleep.
        slow: a rank whose forwards take 0.3 s each.
    """

    ranks: int
    pins: Mapping[str, object]
    rank: int
    at: str
    how: str
    stage: int = 0
    number: int = 0
    loss: bool = True
    timeout: float = 60.0
    stays: bool = True
    slow: int = -1


@dataclass
class Seen:
    """What a rank saw: steps that worked, the error's type and text, seconds until then, gradients after it, and what a later call said."""

    steps: int = 0
    error: str = ""
    text: str = ""
    seconds: float = 0.0
    again: str = ""
    gradients: list[str] = field(default_factory=list)


class Layer(nn.Module):
    """A layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``(batch, seq, WIDTH)`` the same."""
        return x + torch.tanh(self.linear(x))


class Tied(nn.Module):
    """A language model of eight layers whose table is its head too, so that two stages share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(8))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of ids and labels ``(batch, seq)``; the logits without labels."""
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_batch(loss: bool = True) -> dict[str, Tensor]:
    """Token ids ``(ROWS, 4)``, and labels when the model computes its loss."""
    ids = torch.arange(ROWS * 4).view(ROWS, 4) % VOCABULARY
    return {"ids": ids, "labels": ids} if loss else {"ids": ids}


# --- faults ---


def _fail(how: str) -> None:
    if how == "raise":
        raise ValueError("it broke")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "memory":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
        torch.empty(2**28)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def _plant(case: Case, program: Any) -> None:
    """Let this rank fail in the step that comes."""
    calls = {"forward": 0, "backward": 0}

    def count(kind: str) -> None:
        calls[kind] += 1
        if case.at == kind and calls[kind] == case.number + 1:
            _fail(case.how)

    if case.at in calls:
        module = program.pipeline.stages[case.stage].module
        if case.at == "forward":
            module.register_forward_pre_hook(lambda *_: count("forward"))
        else:
            module.register_forward_hook(lambda _, __, results: [results[0].register_hook(lambda _: count("backward")), None][1])
    elif case.at == "receive":
        receive: Callable[..., Any] = GroupAxis.receive

        def fail(self: GroupAxis, source: int, shape: Any, *rest: Any) -> Any:
            if tuple(shape) == (VOCABULARY, WIDTH):
                _fail(case.how)
            return receive(self, source, shape, *rest)

        GroupAxis.receive = fail  # type: ignore[method-assign]
    elif case.at == "sum":
        reduce: Callable[..., Any] = dist.all_reduce

        def refuse(*arguments: Any, async_op: bool = False, **options: Any) -> Any:
            if async_op:
                _fail(case.how)
            return reduce(*arguments, async_op=async_op, **options)

        dist.all_reduce = refuse


# --- ranks ---


def _step(model: Any, case: Case) -> None:
    out = model(**make_batch(case.loss))
    loss = out if case.loss else out.square().mean()
    loss.backward()


def run_rank(case: Case, program: Program, rank: int, folder: Path) -> None:
    """A rank's life: a step that works, a step in which one of the ranks fails, and a call after that."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=case.timeout))
    seen = Seen()
    torch.manual_seed(0)
    model = ParallelModule(Tied(), lambda *_: program)
    _step(model, case)
    seen.steps = 1
    model.zero_grad()
    if case.at == "hook":  # on every rank, as all must have the same
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: _fail(case.how) if rank == case.rank else None)
    elif rank == case.rank:
        _plant(case, program)
    if rank == case.slow:
        for stage in program.pipeline.stages.values() if program.pipeline is not None else ():
            stage.module.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    dist.barrier()
    start = time.monotonic()
    try:
        _step(model, case)
        seen.steps = 2
    except BaseException as error:
        seen.seconds = time.monotonic() - start
        seen.error, seen.text = type(error).__name__, str(error)
        seen.gradients = [name for name, p in model.named_parameters() if p.grad is not None]
        traceback.print_exc()
    try:
        model(**make_batch(case.loss))
    except Exception as error:
        seen.again = f"{type(error).__name__}: {error}"
    sys.stderr.flush()
    (folder / "unfinished").with_suffix(f".{rank}").write_text(json.dumps(asdict(seen)), encoding="utf-8")
    (folder / "unfinished").with_suffix(f".{rank}").rename(folder / f"{rank}.json")
    if rank == case.rank and case.stays:
        time.sleep(600)


def _fork(case: Case, program: Program, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    errors = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        run_rank(case, program, rank, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(case: Case, ranks: Mapping[int, int], folder: Path) -> None:
    """Wait until all ranks have ended, or told what they saw; whoever lives after that, or too long, is killed."""
    end = time.monotonic() + LIMIT
    left = dict(ranks)
    while left and time.monotonic() < end:
        time.sleep(0.02)
        for rank, process in ranks.items():
            if rank in left and os.waitpid(process, os.WNOHANG)[0]:
                del left[rank]
        if set(left) == {case.rank} and (case.how == "stop" or (folder / f"{case.rank}.json").exists()):
            break
    for process in left.values():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _make_programs(case: Case) -> list[Program]:
    """The program of each rank."""
    captured = capture(Tied(), make_batch(case.loss))
    plan = make_plan(captured.graph, Cluster.parse(f"{case.ranks}xcpu"), pins=case.pins)
    groups = [rewrite(captured, plan, torch.device("cpu"), group) for group in range(plan.pipeline.ranks)]
    return [groups[rank // plan.mesh.world_size] for rank in range(case.ranks)]


def main() -> None:
    """Run the cases that come in, one after the other."""
    torch.set_num_threads(1)
    # The first rank's process waits for others to tell that they stop, which one that was killed never does.
    failures.LINGER = 1.0
    made: dict[str, list[Program]] = {}
    for line in sys.stdin:
        told = json.loads(line)
        folder, case = Path(told.pop("folder")), Case(**told)
        key = json.dumps([case.ranks, case.loss, case.pins])
        if key not in made:
            made[key] = _make_programs(case)
        port = _free_port()
        _wait(case, {rank: _fork(case, program, rank, port, folder) for rank, program in enumerate(made[key])}, folder)
        print("done", flush=True)


if __name__ == "__main__":
    main()
