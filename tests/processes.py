"""Runs a function, or cases one after the other, in real processes that form a gloo process group."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(size: int, folder: Path, fn: Callable[..., None], *arguments: Any) -> None:
    """Call ``fn(rank, *arguments)`` on `size` processes; any rank's error fails the test. `folder` must be new."""
    mp.spawn(_work, (size, str(folder / "rendezvous"), fn, arguments), nprocs=size)


def _work(rank: int, size: int, rendezvous: str, fn: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        fn(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Without Python's own end: threads of gloo outlive their groups, and one that wants the interpreter while it ends aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


Case = Callable[[], None]


@dataclass(frozen=True)
class Outcomes:
    """What the cases of `run_cases` raised on each rank: a file each, empty where it went well."""

    folder: Path

    def check(self, name: str) -> None:
        """Fail as the case of this name did on any rank."""
        for rank in range(2):
            file = self.folder / f"{name}.{rank}"
            assert file.exists(), "a case before this one failed"
            text = file.read_text(encoding="utf-8")
            assert not text, f"rank {rank}: {text}"


def run_cases(folder: Path, cases: Sequence[Case]) -> Outcomes:
    """Run functions of a test module one after the other in one pair of processes, in float64; `folder` must be new.

    Every case begins with the seed 0, in a working directory of its own that both ranks share. The ranks may be at different places
    after a case that failed, so none is run after it.
    """
    outcomes = Outcomes(folder)
    try:
        spawn(2, folder, _run_each, folder, tuple(cases))
    except mp.ProcessRaisedException:
        # The last case may end the process group that the processes say goodbye over.
        if not any(folder.glob("*.[01]")):
            raise
    return outcomes


def _run_each(rank: int, folder: Path, cases: Sequence[Case]) -> None:
    torch.set_default_dtype(torch.float64)
    store = dist.distributed_c10d._get_default_store()
    for case in cases:
        torch.manual_seed(0)
        place = folder / case.__name__
        place.mkdir(exist_ok=True)
        text = ""
        try:
            with chdir(place):
                case()
        except BaseException:
            text = traceback.format_exc()
        (folder / f"{case.__name__}.{rank}").write_text(text, encoding="utf-8")
        store.set(f"{case.__name__} {rank}", text[-2000:])
        if any(store.get(f"{case.__name__} {other}") for other in range(2)):
            return
