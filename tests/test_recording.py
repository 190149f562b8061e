"""`model.trace`: what real processes record of a step, beside what the plan predicts."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.errors import InputError
from autopar.ops import GroupAxis
from autopar.runtime import watching
from autopar.timelines import Trace, from_chrome, predict
from autopar.timelines.trace import BUSY, COMMUNICATION, COMPUTE, Event
from tests.processes import Outcomes, run_cases, spawn
from tests.test_timelines import validate
from tests.zoo import DEEP

PINS: Mapping[str, Mapping[str, Any]] = {
    "zero": {"dp": 2, "fsdp": True},
    "tp": {"tp": 2, "vocabulary": True},
    "1f1b": {"pp": 2, "schedule": "1f1b", "microbatches": 4},
    "zb-v": {"pp": 2, "schedule": "zb-v", "microbatches": 4},
}


def _step(model: nn.Module, inputs: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _trace(rank: int, folder: Path) -> None:
    for name, pins in PINS.items():
        model, inputs = DEEP["gpt2_deep"]()
        plan = autopar.plan(model, inputs, "2xcpu", pins=pins)
        compiled = autopar.compile(model, plan=plan)
        optimizer = torch.optim.SGD(compiled.parameters(), lr=0.0)
        loss = _step(compiled, inputs, optimizer)
        with compiled.trace(folder / f"{name}.json"):
            assert _step(compiled, inputs, optimizer) == loss, "a step that is recorded computes the same"
        assert _step(compiled, inputs, optimizer) == loss
        if rank == 0:
            plan.save(folder / f"{name}.plan.json")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    (folder / "out").mkdir()
    spawn(2, folder, _trace, folder / "out")
    return folder / "out"


def _read(folder: Path, name: str) -> Trace:
    text = (folder / f"{name}.json").read_text(encoding="utf-8")
    validate(text)
    (trace,) = from_chrome(text)
    assert len(trace.ranks) == 2
    return trace


@pytest.mark.parametrize("name", [name for name in PINS if "pp" in PINS[name]])
def test_a_pipeline_runs_the_actions_that_the_plan_predicts(traced: Path, name: str) -> None:
    trace, predicted = _read(traced, name), predict(autopar.Plan.load(traced / f"{name}.plan.json"))
    for rank in range(2):
        found, expected = (_list_passes(one, rank) for one in (trace, predicted))
        assert found == expected
    assert Counter((arrow.name, arrow.source, arrow.target) for arrow in trace.arrows) == Counter(
        (arrow.name, arrow.source, arrow.target) for arrow in predicted.arrows
    )
    assert {arrow.name: arrow.nbytes for arrow in trace.arrows} == {arrow.name: arrow.nbytes for arrow in predicted.arrows}
    for arrow in trace.arrows:
        assert arrow.arrived <= arrow.used
    # Apart from when they are sent and how long that takes, messages are shown alike.
    shown, expected = ({event.name: replace(event, start=0.0, seconds=0.0) for event in _list_messages(one)} for one in (trace, predicted))
    assert shown == expected


def _list_messages(trace: Trace) -> list[Event]:
    return [event for event in trace.events if event.collective == "send"]


def _list_passes(trace: Trace, rank: int) -> list[str]:
    """Stages, passes and micro-batches in order. A whole backward counts as its halves, which are one where nothing comes between them."""
    own = [event for event in trace.events if event.rank == rank and event.thread == COMPUTE and event.microbatch is not None]
    names = [
        f"{event.stage}{kind}{event.microbatch}"
        for event in sorted(own, key=lambda event: event.start)
        for kind in ("IW" if event.name.startswith("B") else event.name[0])
    ]
    return list(dict.fromkeys(names))


@pytest.mark.parametrize("name", PINS)
def test_all_of_a_step_is_seen(traced: Path, name: str) -> None:
    trace = _read(traced, name)
    for rank in range(2):
        own = [event for event in trace.events if event.rank == rank]
        phases = {event.phase for event in own if event.thread == COMPUTE}
        assert "forward" in phases
        assert phases & {"backward", "input gradient"}
        assert any(event.purpose == "optimizer" for event in own)
        busy = sorted((event for event in own if event.thread in BUSY), key=lambda event: event.start)
        assert all(after.start >= before.end - 1e-8 for before, after in pairwise(busy))
        samples = [sample.nbytes for sample in trace.memory if sample.rank == rank]
        assert samples
        assert min(samples) > 2**20
    assert trace.seconds == pytest.approx(max(event.end for event in trace.events), abs=1e-8)


@pytest.mark.parametrize(("name", "collectives"), [("zero", {"all_gather", "reduce_scatter"}), ("tp", {"all_reduce"})])
def test_collectives_are_seen(traced: Path, name: str, collectives: set[str]) -> None:
    events = [event for event in _read(traced, name).events if event.thread == COMMUNICATION]
    axis = "tp" if name == "tp" else "dp"
    assert collectives <= {event.collective for event in events if event.axis == axis}
    assert any(event.nbytes for event in events if event.axis == axis)


@pytest.mark.parametrize(
    ("name", "axis", "collective"), [("zero", "dp", "reduce_scatter"), ("tp", "tp", "reduce_scatter"), ("tp", "tp", "all_gather")]
)
def test_bytes_are_counted_as_in_a_plan(traced: Path, name: str, axis: str, collective: str) -> None:
    """Of every call the larger of a rank's parts before and after it, once."""
    plan = autopar.Plan.load(traced / f"{name}.plan.json")
    rows = [row for row in plan.costs if (row.axis, row.collective) == (axis, collective)]
    events = [event for event in _read(traced, name).events if (event.axis, event.collective) == (axis, collective)]
    for rank in range(2):
        assert sum(event.nbytes for event in events if event.rank == rank) == sum(row.nbytes for row in rows) > 0
        assert sum(event.nbytes > 0 for event in events if event.rank == rank) == sum(row.count for row in rows)


def _small() -> tuple[autopar.CompiledModule, dict[str, Tensor]]:
    model, inputs = DEEP["gpt2_deep"]()
    return autopar.compile(model, pins={"dp": 2}), inputs


def case_a_folder_that_isnt_there_is_refused_on_all_ranks() -> None:
    model, _ = _small()
    with pytest.raises(InputError, match="there is no folder"), model.trace("nowhere/trace.json"):
        pass


def case_other_files_are_refused_on_all_ranks() -> None:
    model, _ = _small()
    for path, message in (
        ("trace.svg", "trace.svg: a trace is written as JSON; name a file that ends in .json"),
        ("noext", "noext: a trace is written as JSON"),
        (3, "path=3: the name of a file is needed"),
        (None, "path=None: the name of a file is needed"),
    ):
        with pytest.raises(InputError, match=message), model.trace(path):  # type: ignore[arg-type]
            pass
    assert not Path("trace.svg").exists()


def case_an_error_inside_leaves_nothing_behind() -> None:
    model, inputs = _small()
    methods = dict(vars(GroupAxis))
    model(**inputs)
    error = ValueError("the user's")
    with pytest.raises(ValueError, match="the user's"), model.trace("trace.json"):
        raise error
    assert not Path("trace.json").exists()
    assert watching.current() is None
    assert dict(vars(GroupAxis)) == methods
    with model.trace("trace.json"):
        model(**inputs)
    dist.barrier()
    assert json.loads(Path("trace.json").read_text(encoding="utf-8"))["traceEvents"]


CASES = [value for name, value in list(globals().items()) if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), CASES)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_case(outcomes: Outcomes, case: str) -> None:
    outcomes.check(case)


def test_one_process_records_itself(tmp_path: Path) -> None:
    model, inputs = DEEP["gpt2_deep"]()
    compiled = autopar.compile(model)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    _step(compiled, inputs, optimizer)
    start = time.perf_counter()
    with compiled.trace(tmp_path / "trace.json"):
        _step(compiled, inputs, optimizer)
    wall = time.perf_counter() - start
    text = (tmp_path / "trace.json").read_text(encoding="utf-8")
    validate(text)
    (trace,) = from_chrome(text)
    assert trace.ranks == ("rank 0",)
    assert trace.title.endswith(", recorded (memory: resident, of the whole process)")
    assert trace.seconds < wall
    assert [event.name for event in trace.events] == ["forward", "backward", "optimizer"]
