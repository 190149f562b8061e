"""Runs a function in real processes that form a gloo process group."""

from __future__ import annotations

from collections.abc import Callable
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
