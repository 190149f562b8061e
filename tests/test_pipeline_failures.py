"""What fails in a pipeline: every rank stops soon, and says which stage, action and micro-batch failed first.

In real processes one rank is killed, raises, runs out of memory or hangs, within a step that follows one that worked
(`tests.failing` is their side). The process groups would wait for a minute, so whoever stops sooner was told.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch.distributed as dist

import autopar
from autopar.errors import CommError, PipelineError
from autopar.runtime.executor import Executor
from autopar.runtime.failures import SILENT, Alarm, within
from autopar.schedules.actions import Action
from tests.failing import Case, Seen, Tied, make_batch
from tests.helpers import tree_allclose

ROOT = Path(__file__).parent.parent
SOON = 10.0
"""Seconds within which all ranks stop. It takes a few tenths, and some more where the first rank waits for one that was killed."""

TWO = {"pp": 2, "schedule": "1f1b", "microbatches": 4}
FOUR = {"pp": 4, "schedule": "1f1b", "microbatches": 8}
V = {"pp": 2, "schedule": "zb-v", "microbatches": 4}
LONG_V = {"pp": 4, "schedule": "zb-v", "microbatches": 8}
GRID = {"pp": 2, "dp": 2, "schedule": "1f1b", "microbatches": 4}


# --- real processes ---


@dataclass(frozen=True)
class Rank:
    """What a rank saw, and what it wrote to its standard error."""

    seen: Seen
    errors: str


Run = Callable[[Case], dict[int, Rank]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a case; what each of its ranks saw that lived."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.failing"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asks, answers = process.stdin, process.stdout
        yield lambda case: _ask(case, asks, answers, tmp_path_factory.mktemp("ranks"))
        process.kill()


def _ask(case: Case, asks: IO[str], answers: IO[str], folder: Path) -> dict[int, Rank]:
    asks.write(json.dumps({**asdict(case), "folder": str(folder)}) + "\n")
    asks.flush()
    assert answers.readline() == "done\n"
    found: dict[int, Rank] = {}
    for rank in range(case.ranks):
        errors = (folder / f"{rank}.err").read_text(encoding="utf-8")
        if (folder / f"{rank}.json").exists():
            found[rank] = Rank(Seen(**json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))), errors)
        else:
            assert rank == case.rank, f"rank {rank} waits for ever; it wrote {errors}"
    return found


def _check(case: Case, ranks: Mapping[int, Rank], soon: float = SOON) -> dict[int, str]:
    """What must be so wherever a step fails; the ranks' messages."""
    others = {rank: one for rank, one in ranks.items() if rank != case.rank}
    assert set(others) == set(range(case.ranks)) - {case.rank}
    for rank, one in ranks.items():
        seen = one.seen
        assert (seen.steps, seen.gradients) == (1, []), f"rank {rank}"
        assert seen.seconds < soon, f"rank {rank}: {seen}"
        assert seen.again.startswith("PipelineError: this pipeline has stopped in an earlier call"), f"rank {rank}: {seen.again}"
        if rank == case.rank and case.how == "interrupt":
            assert seen.error == "KeyboardInterrupt"
            assert one.errors.rstrip().endswith("KeyboardInterrupt")
            continue
        assert seen.error == "PipelineError", f"rank {rank}: {seen}"
        assert seen.text in seen.again
        assert one.errors.rstrip().endswith(f"autopar.errors.PipelineError: {seen.text}")
        # The stage, the action and the micro-batch.
        action = r"stage \d of \d, [a-z ]+ of micro-batch \d \(\d[A-Z]+\d\S*, pipeline rank \d\): "
        where = rf"{action}|stages? [\d, ]+ \(pipeline rank \d\), (before|after the last) micro-batch"
        assert re.match(where, seen.text), f"rank {rank}: {seen.text}"
        assert "/gloo/" not in seen.text
    return {rank: one.seen.text for rank, one in ranks.items()}


RAISES = {
    "a forward": (Case(2, TWO, 1, "forward", "raise", stage=1, number=2), "stage 1 of 2, forward of micro-batch 2 (1F2, pipeline rank 1)"),
    "the last backward": (Case(4, FOUR, 0, "backward", "raise", stage=0, number=7), "stage 0 of 4, backward of micro-batch 7 (0B7, "),
    "a V": (Case(4, LONG_V, 2, "forward", "raise", stage=5, number=3), "stage 5 of 8, forward of micro-batch 3 (5F3, pipeline rank 2)"),
    "half of a backward": (
        Case(2, V, 0, "backward", "raise", stage=3, number=1),
        "stage 3 of 4, backward of inputs of micro-batch 1 (3I1, ",
    ),
    "a loss outside": (
        Case(4, FOUR, 2, "backward", "raise", stage=2, number=3, loss=False),
        "stage 2 of 4, backward of micro-batch 3 (2B3, pipeline rank 2)",
    ),
    "values of a shared parameter": (
        Case(2, TWO, 1, "receive", "raise"),
        "stage 1 (pipeline rank 1), before micro-batch 0, the value of the shared parameter table.weight from pipeline rank 0: ",
    ),
    "gradients of a shared parameter": (
        Case(4, FOUR, 0, "receive", "raise"),
        "stage 0 (pipeline rank 0), after the last micro-batch, the gradient of the shared parameter table.weight from pipeline rank 3: ",
    ),
    "the sum of gradients": (Case(4, GRID, 2, "sum", "raise"), "stage 1 of 2, sum of gradients of micro-batch 0 (1G0, pipeline rank 1)"),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", RAISES)
def test_an_error_stops_all_ranks_and_each_says_what_failed_first(run: Run, name: str) -> None:
    case, where = RAISES[name]
    texts = _check(case, run(case))
    own = texts.pop(case.rank)
    assert own.startswith(where)
    assert own.endswith("ValueError: it broke")
    for text in texts.values():
        assert text.endswith(f"\nThe first to fail was rank {case.rank}: {own}")
        # What it waited for.
        assert re.search(
            r"\(pipeline rank \d\) never (came|took it): | from pipeline rank \d: | to other pipeline ranks: | to end the step: "
            r"| over the ranks ",
            text,
        )


@pytest.mark.processes
def test_the_process_of_the_first_rank_may_end_at_once(run: Run) -> None:
    # It holds the store in which the others read why they stop, and one of them is busy.
    case = Case(4, FOUR, 0, "forward", "raise", stage=0, number=4, stays=False, slow=3)
    texts = _check(case, run(case))
    assert all("The first to fail was rank 0: stage 0 of 4, forward of micro-batch 4 " in texts[rank] for rank in (1, 2, 3))


@pytest.mark.processes
def test_a_stage_that_runs_out_of_memory_says_so_on_all_ranks(run: Run) -> None:
    case = Case(2, V, 1, "forward", "memory", stage=2, number=1)
    texts = _check(case, run(case))
    assert texts[1].startswith("stage 2 of 4, forward of micro-batch 1 (2F1, pipeline rank 1): RuntimeError: ")
    assert "can't allocate memory: you tried to allocate 1073741824 bytes" in texts[1]
    assert texts[1].endswith(
        "Use more micro-batches, a schedule that holds fewer of them at once (1f1b instead of gpipe, v-half), "
        "recompute='full' or more pipeline ranks"
    )
    assert texts[0].endswith(f"The first to fail was rank 1: {texts[1]}")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "neighbour"),
    [
        (Case(4, FOUR, 2, "forward", "kill", stage=2, number=2), "stage 2 (pipeline rank 2)"),
        # With the first rank goes the store: nobody can tell anybody anything.
        (Case(4, LONG_V, 0, "backward", "kill", stage=7, number=2), "(pipeline rank 0)"),
        (Case(4, GRID, 1, "sum", "kill"), "the ranks of the mesh"),
    ],
    ids=["middle", "first", "sum"],
)
def test_a_killed_rank_stops_all_others(run: Run, case: Case, neighbour: str) -> None:
    ranks = run(case)
    assert case.rank not in ranks
    texts = _check(case, ranks)
    assert any(neighbour in text for text in texts.values())
    for text in texts.values():
        assert text.endswith(
            "\nNo rank has told of an error before: one was killed, lost its network or hangs; see the end of every rank's log"
        )


@pytest.mark.processes
@pytest.mark.parametrize(
    "case",
    [
        Case(2, TWO, 1, "forward", "stop", stage=1, number=1, timeout=3),
        # The store hangs too.
        Case(2, TWO, 0, "backward", "stop", stage=0, number=1, timeout=3),
        # The other rank of the stage waits in a sum of gradients, over a group that the mesh has made.
        Case(4, GRID, 3, "sum", "stop", timeout=3),
    ],
    ids=["stage", "store", "sum"],
)
def test_a_rank_that_hangs_is_waited_for_as_long_as_the_default_group_says(run: Run, case: Case) -> None:
    texts = _check(case, run(case), soon=case.timeout + SOON)
    assert any("Timed out waiting 3000ms" in text for text in texts.values())


@pytest.mark.processes
def test_an_interrupt_passes_through_and_stops_the_others(run: Run) -> None:
    case = Case(2, V, 1, "backward", "interrupt", stage=2, number=1)
    texts = _check(case, run(case))
    assert texts[0].endswith("\nThe first to fail was rank 1: stages 1, 2 (pipeline rank 1): KeyboardInterrupt")


@pytest.mark.processes
def test_a_hook_that_fails_after_the_schedule_fails_on_its_rank_as_on_one_device(run: Run) -> None:
    """Autograd itself calls hooks of parameters, when no rank waits for another any more; a rank that catches the error may go on."""
    ranks = run(Case(2, TWO, 1, "hook", "raise"))
    assert ranks[0].seen.steps == 2
    assert (ranks[1].seen.error, ranks[1].seen.text) == ("ValueError", "it broke")
    assert [ranks[rank].seen.again for rank in (0, 1)] == ["", ""]


# --- one process ---


def _break(monkeypatch: pytest.MonkeyPatch, name: str, stage: int, microbatch: int, error: BaseException) -> None:
    """Let an action of the executor fail."""
    act: Callable[..., None] = getattr(Executor, name)

    def fail(self: Executor, action: Action) -> None:
        if (action.stage, action.microbatch) == (stage, microbatch):
            raise error
        act(self, action)

    monkeypatch.setattr(Executor, name, fail)


@pytest.mark.parametrize(("schedule", "name", "action"), [("1f1b", "_forward", "forward"), ("zb-v", "_weight", "backward of weights")])
def test_in_threads_the_first_error_ends_all_ranks(monkeypatch: pytest.MonkeyPatch, schedule: str, name: str, action: str) -> None:
    _break(monkeypatch, name, 1, 2, ValueError("it broke"))
    model = Tied().double()
    with pytest.raises(
        PipelineError, match=rf"stage 1 of \d, {action} of micro-batch 2 \(1\w2, pipeline rank 1\): ValueError: it"
    ) as caught:
        autopar.verify(model, make_batch(), pins={"pp": 2, "schedule": schedule, "microbatches": 4}, ranks=2)
    assert any("on rank 1 of" in note for note in caught.value.__notes__)
    assert isinstance(caught.value.__cause__, ValueError)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


@pytest.mark.parametrize("name", ["_forward", "_backward"])
@pytest.mark.parametrize("loss", [True, False], ids=["loss inside", "loss outside"])
def test_one_process_goes_on_after_an_error_with_right_gradients(monkeypatch: pytest.MonkeyPatch, name: str, loss: bool) -> None:
    reference = Tied()
    model = autopar.compile(copy.deepcopy(reference), make_batch(loss), cluster="1xcpu", pins={"microbatches": 4})

    def step(model: Any) -> None:
        out = model(**make_batch(loss))
        (out if loss else out.square().mean()).backward()

    with model.no_sync():
        step(model)
    _break(monkeypatch, name, 0, 2, ValueError("it broke"))
    with pytest.raises(PipelineError, match=r"stage 0 of 1, \w+ of micro-batch 2 \(0\w2, pipeline rank 0\): ValueError: it broke"):
        step(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.undo()
    step(model)
    for _ in range(2):
        step(reference)
    tree_allclose({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in reference.named_parameters()}, rtol=1e-5)


def test_an_interrupt_of_one_process_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = autopar.compile(Tied(), make_batch(), cluster="1xcpu", pins={"microbatches": 4})
    _break(monkeypatch, "_backward", 0, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model(**make_batch())
    monkeypatch.undo()
    model(**make_batch()).backward()


@pytest.mark.parametrize("loss", [True, False], ids=["loss inside", "loss outside"])
def test_a_backward_after_the_pipeline_has_stopped_computes_nothing(monkeypatch: pytest.MonkeyPatch, loss: bool) -> None:
    model = autopar.compile(Tied(), make_batch(loss), cluster="1xcpu", pins={"microbatches": 4})
    out = model(**make_batch(loss))
    assert model._storage.deployment is not None
    model._storage.deployment.alarm._failure = "rank 1: it broke"
    monkeypatch.setattr(Executor, "run", lambda *_: pytest.fail("the backward runs"))
    with pytest.raises(PipelineError, match=r"stopped in an earlier call[\s\S]*It stopped because of this: rank 1: it broke"):
        (out if loss else out.square().mean()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the alarm ---


class _Board(dist.Store):
    """A store of this process; `hangs` seconds go by before it answers."""

    hangs = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        time.sleep(self.hangs)
        self.values[key] = str(int(self.values.get(key, 0)) + amount)
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def _alarms(count: int) -> tuple[_Board, list[Alarm]]:
    store = _Board()
    return store, [Alarm(store, rank, count) for rank in range(count)]


def _fails(alarm: Alarm, error: BaseException) -> str:
    with pytest.raises(BaseException) as caught, alarm.guard("here"):  # noqa: PT011
        raise error
    assert isinstance(caught.value, PipelineError)
    return str(caught.value)


def test_the_first_failure_is_what_all_tell() -> None:
    _, (first, second, third) = _alarms(3)
    assert _fails(second, ValueError("it broke")) == "here: ValueError: it broke"
    assert _fails(third, PipelineError("stage 2")) == "stage 2\nThe first to fail was rank 1: here: ValueError: it broke"
    first.check()
    assert _fails(first, RuntimeError("lost")).endswith("rank 1: here: ValueError: it broke")
    with pytest.raises(PipelineError, match=r"stopped in an earlier call[\s\S]*It stopped because of this: stage 2\nThe first to fail"):
        third.check()


def test_pipelines_of_one_process_do_not_hear_each_other() -> None:
    store, (_, second) = _alarms(2)
    assert _fails(second, ValueError("it broke")) == "here: ValueError: it broke"
    later = [Alarm(store, rank, 2) for rank in range(2)]
    later[1].check()
    assert _fails(later[1], ValueError("again")) == "here: ValueError: again"


def test_a_failure_is_told_once_however_many_guards_it_passes() -> None:
    store, (_, second) = _alarms(2)
    with second.guard("outside"):
        text = _fails(second, ValueError("it broke"))
        with pytest.raises(ValueError, match="later"), second.guard("again"):
            raise ValueError("later")
    assert text == "here: ValueError: it broke"
    assert [key for key in store.values if "failure" in key] == ["autopar/pipeline 1, failure 1"]


@pytest.mark.parametrize(
    "error",
    [
        CommError("pipeline rank 1 never sent it"),
        dist.DistBackendError("NCCL communicator was aborted"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
    ],
    ids=["ours", "torch's", "gloo's"],
)
def test_who_waits_in_vain_says_that_nobody_has_told_why(error: Exception) -> None:
    _, (first, second) = _alarms(2)
    assert _fails(second, error).endswith(f"\n{SILENT}")
    assert _fails(first, ValueError("it broke")).endswith(f"\n{SILENT}")
    _, (_, other) = _alarms(2)
    assert SILENT not in _fails(other, ValueError("it broke"))


def test_the_groups_of_the_pipeline_are_closed_and_the_users_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr("autopar.runtime.failures.torch_compat.close_group", closed.append)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        own = dist.new_group([0])
        _, (_, alarm) = _alarms(2)
        alarm.watch([dist.group.WORLD, own])
        _fails(alarm, ValueError("it broke"))
        assert closed == [own]
    finally:
        dist.destroy_process_group()


def test_a_store_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    store, (_, second) = _alarms(2)
    monkeypatch.setattr("autopar.runtime.failures.PATIENCE", 0.05)
    store.hangs = 2.0
    start = time.monotonic()
    assert _fails(second, ValueError("it broke")) == "here: ValueError: it broke"
    assert time.monotonic() - start < 1.5


def test_what_is_asked_is_asked_here_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    assert within(1.0, lambda: threading.current_thread().name, "") != threading.current_thread().name
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert within(1.0, lambda: threading.current_thread().name, "") == threading.current_thread().name
    assert within(1.0, lambda: 1 // 0, 7) == 7
