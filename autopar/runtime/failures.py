"""What a rank of a pipeline that fails does to the others: they stop at once, and say what it said.

Comes in: the groups over which the ranks of a pipeline wait for each other, and the process group's store, which all of them can read. A
rank that fails writes its error there and closes its connections. Whoever waits for it fails then, reads what was written, and closes its
own: so the failure comes to all ranks, much sooner than by a time limit. A rank that is killed writes nothing, but its connections close
too. Goes out: a PipelineError on every rank, and after it nothing but PipelineErrors: half of the messages of a step may be under way.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

import torch.distributed as dist

from autopar import torch_compat
from autopar.errors import CommError, PipelineError

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds for a few words with the store: where its host hangs, the error goes out without what others wrote."""
LINGER = 3.0
"""The most seconds that the store's host stays after a failure of its own, so that the others can read it."""
SILENT = "No rank has told of an error before: one was killed, lost its network or hangs; see the end of every rank's log"
# What gloo adds to its errors: the place in its source, and advice.
_GLOO = re.compile(r"\[\S*/gloo/\S*\] | This is typically caused by [^\n]*")


class Alarm:
    """Stops the ranks of one pipeline when one of them fails.

    Args:
        store: where all ranks can write and read; None without process groups. A rank alone has nobody to stop and can go on.
        rank: this rank's number, of `size`.

    Every rank must make the same alarms in one order.
    """

    def __init__(self, store: torch_compat.Store | None = None, rank: int = 0, size: int = 1) -> None:
        self._store = store if size > 1 else None
        self._rank = rank
        self._size = size
        self._groups: dict[int, dist.ProcessGroup] = {}
        self._failure = ""
        # The pipelines of a process have keys of their own: what stopped one doesn't concern the next.
        self._key = f"autopar/pipeline {store.add(f'autopar/pipelines of {rank}', 1)}" if store is not None else ""

    def watch(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """Close these groups too when something fails: the pipeline's ranks wait for each other over them.

        The default group is left out: it is the user's, and whoever waits over it does so until its time is up.
        """
        self._groups.update((id(group), group) for group in groups if group is not dist.group.WORLD)

    def check(self) -> None:
        """Raises PipelineError when this pipeline has failed before."""
        if self._failure:
            raise PipelineError(
                "this pipeline has stopped in an earlier call, and its ranks have lost their connections: end all processes and start "
                f"again, from a checkpoint if there is one. It stopped because of this: {self._failure}"
            )

    @contextmanager
    def guard(self, where: str) -> Iterator[None]:
        """Stop all ranks when what runs inside fails, and raise PipelineError, which says what failed first.

        `where` goes before an error that doesn't say where it happened. What isn't an Exception (an interrupt) passes through.
        """
        try:
            yield
        except Exception as error:
            if self._store is None or self._failure:
                raise
            self._stop(where, error)
        except BaseException as error:
            if self._store is not None and not self._failure:
                self._failure = f"{where}: {type(error).__name__}"
                self._tell()
                self._close()
            raise

    def _stop(self, where: str, error: Exception) -> NoReturn:
        own = str(error) if isinstance(error, PipelineError) else f"{where}: {type(error).__name__}: {error}"
        cause = error.__cause__ if isinstance(error, PipelineError) else error
        self._failure = _GLOO.sub("", own)
        first = self._tell(f"\n{SILENT}" if _is_lost(cause) else "")
        self._close()
        if self._rank == 0:
            self._linger()
        self._failure += first
        raise PipelineError(self._failure) from cause

    def _tell(self, unless: str = "") -> str:
        """Write this rank's failure; what to add to it: which rank failed before and how, or `unless` when none has told."""
        store = self._store
        assert store is not None

        def write() -> str:
            number = store.add(self._key, 1)
            store.set(f"{self._key}, failure {number}", f"rank {self._rank}: {self._failure}{unless if number == 1 else ''}")
            return f"\nThe first to fail was {store.get(f'{self._key}, failure 1').decode()}" if number > 1 else unless

        return within(PATIENCE, write, unless)

    def _close(self) -> None:
        for group in self._groups.values():
            torch_compat.close_group(group)

    def _linger(self) -> None:
        """The first rank's process usually holds the store: the others need it to read why they stop."""
        store = self._store
        assert store is not None
        end = time.monotonic() + LINGER
        while time.monotonic() < end:
            if within(PATIENCE, lambda: store.add(self._key, 0), self._size) >= self._size:
                return
            time.sleep(0.02)


def _is_lost(error: BaseException | None) -> bool:
    """Whether a rank was waited for in vain; torch has no error of its own for what gloo throws."""
    return isinstance(error, CommError | dist.DistError) or "/gloo/" in str(error)


def within(seconds: float, ask: Callable[[], T], otherwise: T) -> T:
    """What `ask` returns; `otherwise` when it fails or takes longer."""
    found: list[T] = []

    def work() -> None:
        with suppress(Exception):
            found.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # No memory is left for a thread, which may be the very failure to tell of.
        work()
    else:
        thread.join(seconds)
    return found[0] if found else otherwise
