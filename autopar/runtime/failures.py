"""How a rank of a pipeline that fails stops the others, so that all of them report what failed first.

Comes in: the process groups over which the ranks of a pipeline wait for each other, and the process group's key-value store. A rank that
fails writes its error into the store and closes its connections. Ranks that wait for it then fail too, read what was written, and close
theirs, so that the failure reaches all ranks much sooner than a timeout would. A rank that is killed writes nothing, but its connections
close as well. Goes out: a PipelineError on every rank, then and at every later use, since half of the messages of a step may be under way.
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
"""Seconds that reading and writing the store may take; where its host hangs, the error is raised without what others wrote."""
LINGER = 3.0
"""The most seconds for which the rank that hosts the store stays after a failure, so that the others can read the store."""
SILENT = "No rank has told of an error before: one was killed, lost its network or hangs; see the end of every rank's log"
# What gloo adds to its errors: the place in its source, and advice.
_GLOO = re.compile(r"\[\S*/gloo/\S*\] | This is typically caused by [^\n]*")


class Alarm:
    """Stops the ranks of one pipeline when one of them fails.

    Args:
        store: the key-value store that all ranks can read and write; None without process groups.
        rank: this process's rank, of `size`. With one rank there is nobody to stop, and it may continue after a failure.

    Every rank must make the same alarms in the same order.
    """

    def __init__(self, store: torch_compat.Store | None = None, rank: int = 0, size: int = 1) -> None:
        self._store = store if size > 1 else None
        self._rank = rank
        self._size = size
        self._groups: dict[int, dist.ProcessGroup] = {}
        self._failure = ""
        # Each pipeline of a process has its own key, so that the failure of one doesn't concern the next.
        self._key = f"autopar/pipeline {store.add(f'autopar/pipelines of {rank}', 1)}" if store is not None else ""

    def watch(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """Close these process groups too when something fails, since the pipeline's ranks wait for each other over them.

        The default group is never closed, as it is the user's; waiting over it ends with its timeout.
        """
        self._groups.update((id(group), group) for group in groups if group is not dist.group.WORLD)

    def check(self) -> None:
        """Raises PipelineError when this pipeline has failed before."""
        if self._failure:
            raise PipelineError(
                "this pipeline has stopped in an earlier call, and its ranks have lost their connections: end all processes and start "
                f"again, from a checkpoint if there is one. It stopped because of this: {self._failure}"
            )

    def has_been_raised(self) -> bool:
        """Whether some rank has told of a failure."""
        store = self._store
        return store is not None and within(PATIENCE, lambda: store.add(self._key, 0) > 0, False)

    @contextmanager
    def guard(self, where: str) -> Iterator[None]:
        """Stop all ranks when what runs inside fails, and raise PipelineError, which says what failed first.

        Args:
            where: put before errors that aren't PipelineErrors and so don't say where they happened.

        An error that isn't an Exception, such as a KeyboardInterrupt, stops the other ranks and is raised unchanged.
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
        origin = self._tell(f"\n{SILENT}" if _is_lost(cause) else "")
        self._close()
        if self._rank == 0:
            self._linger()
        self._failure += origin
        raise PipelineError(self._failure) from cause

    def _tell(self, default: str = "") -> str:
        """Write this rank's failure into the store; returns which rank failed first and how, or `default` when this is the first."""
        store = self._store
        assert store is not None

        def write() -> str:
            number = store.add(self._key, 1)
            store.set(f"{self._key}, failure {number}", f"rank {self._rank}: {self._failure}{default if number == 1 else ''}")
            return f"\nThe first to fail was {store.get(f'{self._key}, failure 1').decode()}" if number > 1 else default

        return within(PATIENCE, write, default)

    def _close(self) -> None:
        for group in self._groups.values():
            torch_compat.close_group(group)

    def _linger(self) -> None:
        """Wait until all ranks have written: the first rank's process usually hosts the store, which the others need to read."""
        store = self._store
        assert store is not None
        end = time.monotonic() + LINGER
        while time.monotonic() < end:
            if within(PATIENCE, lambda: store.add(self._key, 0), self._size) >= self._size:
                return
            time.sleep(0.02)


def _is_lost(error: BaseException | None) -> bool:
    """Whether the error is that another rank didn't answer; gloo's errors are known by their text only."""
    return isinstance(error, CommError | dist.DistError) or "/gloo/" in str(error)


def within(seconds: float, ask: Callable[[], T], default: T) -> T:
    """What `ask` returns; `default` when it fails or takes longer than `seconds`."""
    answers: list[T] = []

    def work() -> None:
        with suppress(Exception):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # There is no memory for a thread, which may be the very failure to report.
        work()
    else:
        thread.join(seconds)
    return answers[0] if answers else default
