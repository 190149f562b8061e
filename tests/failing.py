"""Pipelines of real processes in which one rank fails as told: the side of the processes (``python -m tests.failing``).

A process that has imported and planned everything forks the ranks, which then start at once. Cases come in as JSON, one a line; when all
ranks of one have ended, a line goes out. Each rank's standard error is a file, and so is what it saw.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.capture import capture
from autopar.comm import GroupAxis
from autopar.plans import Plan

ROWS, WIDTH, VOCABULARY = 8, 16, 48


@dataclass(frozen=True)
class Case:
    """What is run, and how it fails.

    Attributes:
        ranks: number of processes; `pins` as for `autopar.compile`.
        rank: the one that fails.
        at: in its `number`-th forward or backward of `stage`, or in an exchange: "forward", "backward", "receive" of the shared parameter,
            "sum" of gradients.
        how: "raise", "interrupt", "memory", "kill", "hang".
        loss: whether the model computes it; otherwise it is computed outside.
        timeout: of the process group, in seconds.
        stays: whether the failing rank lives on after its error, asleep.
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


@dataclass
class Seen:
    """What a rank saw: the error's type and text, seconds until then, and what a second call said."""

    steps: int = 0
    error: str = ""
    text: str = ""
    seconds: float = 0.0
    again: str = ""
    late: str = ""
    gradients: list[str] = field(default_factory=list)


class Tied(nn.Module):
    """A language model of four layers whose table is its head too, so that two stages share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of ids and labels ``(batch, seq)``; the logits without labels."""
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
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
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def _plant(case: Case, model: Any, program: Any) -> None:
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


def run_rank(case: Case, plan: Plan, rank: int, folder: Path) -> None:
    """A rank's life: a step that works, a step in which one of the ranks fails, and a call after that."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=case.timeout))
    seen = Seen()
    torch.manual_seed(0)
    model = autopar.compile(Tied(), make_batch(case.loss), plan=plan)
    _step(model, case)
    seen.steps = 1
    model.zero_grad()
    if rank == case.rank:
        _plant(case, model, model.prepare(**make_batch(case.loss)))
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
    (folder / f"{rank}.json").write_text(json.dumps(asdict(seen)), encoding="utf-8")
    if rank == case.rank and case.stays:
        time.sleep(600)


def _fork(case: Case, plan: Plan, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    errors = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        run_rank(case, plan, rank, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """Run the cases that come in, one after the other."""
    torch.set_num_threads(1)
    capture(Tied(), make_batch())  # what is imported at the first call, too
    print("ready", flush=True)
    plans: dict[str, Plan] = {}
    for line in sys.stdin:
        told = json.loads(line)
        folder, case = Path(told.pop("folder")), Case(**told)
        key = json.dumps([case.ranks, case.loss, case.pins])
        if key not in plans:
            plans[key] = autopar.plan(Tied(), make_batch(case.loss), f"{case.ranks}xcpu", pins=case.pins)
        port = _free_port()
        ranks = {rank: _fork(case, plans[key], rank, port, folder) for rank in range(case.ranks)}
        asleep = case.how == "hang" or (case.stays and case.how != "kill")
        for rank, process in ranks.items():
            if not (rank == case.rank and asleep):
                os.waitpid(process, 0)
        if asleep:
            seen = folder / f"{case.rank}.json"
            while case.how != "hang" and not seen.exists():
                time.sleep(0.02)
            with suppress(ProcessLookupError):
                os.kill(ranks[case.rank], signal.SIGKILL)
            os.waitpid(ranks[case.rank], 0)
        print("done", flush=True)


if __name__ == "__main__":
    main()
