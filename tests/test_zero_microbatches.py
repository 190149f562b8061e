"""ZeRO level 2 where a step is many backwards: parts of sums after every micro-batch, with stages and without, what they cost and hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.cost_models import Cluster
from autopar.errors import PipelineError
from autopar.ir import StateKind
from autopar.runtime import scattered, sums
from tests.helpers import CLOSE, assert_agree, whole_gradients
from tests.processes import Outcomes, run_cases, spawn
from tests.rounding import check_within_rounding
from tests.test_zero import _mixed_step, _model, _run_alike
from tests.zoo import ZOO, labels, tokens


def _batch(seed: int) -> dict[str, Tensor]:
    """Eight samples, which four micro-batches and two ranks split."""
    return {name: torch.cat([make(seed), make(100 + seed)]) for name, make in (("input_ids", tokens), ("labels", labels))}


def _compile(model: nn.Module, level: int = 2, **pins: object) -> autopar.CompiledModule:
    return autopar.compile(model, pins={"dp": 2, "zero": level, "microbatches": 4, **pins})


def steps_are_those_of_one_device() -> None:
    compiled, twin = _compile(_model(), microbatches=2), _model()
    _run_alike(compiled, twin)
    assert compiled.plan.pipeline.microbatches == 2
    assert {state.level for layout in compiled.plan.layouts.values() for state in layout} >= {2}


def mixed_precision_within_rounding() -> None:
    twin, gradients = _model().float(), []
    for level in (1, 2):
        compiled = autopar.compile(_model().float(), pins={"dp": 2, "zero": level, "microbatches": 4}, precision="mixed")
        loss = compiled(**_batch(0)).loss
        loss.backward()
        gradients.append(whole_gradients(compiled))
    check_within_rounding({"loss": loss.detach(), **gradients[1]}, functools.partial(_mixed_step, twin, _batch(0)))
    # Both add up gradients of micro-batches in float32, in another order.
    for name, x in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], x, rtol=1e-4, atol=1e-6 * float(x.abs().max()))


def every_backward_leaves_parts() -> None:
    twin, model = _model(), _compile(_model())
    for seed in range(3):
        with model.no_sync() if seed < 2 else nullcontext():
            model(**_batch(seed)).loss.backward(retain_graph=seed == 1)
        twin(**_batch(seed)).loss.backward()
        # Under `no_sync` too.
        assert_agree(whole_gradients(model), whole_gradients(twin))


def sums_are_of_every_micro_batch_and_hold_a_bucket() -> None:
    twin = _model()
    twin(**_batch(0)).loss.backward()
    counts = {}
    for level in (1, 2):
        plan = autopar.plan(_model(), _batch(0), "2xcpu", pins={"dp": 2, "zero": level, "microbatches": 4})
        model = autopar.compile(_model(), plan=replace(plan, bucket_nbytes=1))
        seen: list[int] = []

        def start(members: Any, pending: Any, limit: int, seen: list[int] = seen) -> None:
            sums.start_sum(members, pending, limit)
            seen.append(sum(one.sent_nbytes > 0 for one in pending))

        with mock.patch.object(scattered, "start_sum", start), mock.patch("autopar.runtime.gradients.start_sum", start):
            model(**_batch(0)).loss.backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))
        counts[level] = len(seen)
        if level == 2:
            assert max(seen) == 1
    assert counts[2] == 4 * counts[1] > 40


def no_whole_gradient_waits() -> None:
    plan = autopar.plan(_model(), _batch(0), "2xcpu", pins={"dp": 2, "zero": 2, "microbatches": 4})
    model = autopar.compile(_model(), plan=replace(plan, bucket_nbytes=1))
    waiting: list[int] = []
    events: list[str] = []
    flush, receive = scattered.ScatteredSums.flush, scattered.ScatteredSums._receive

    def look(self: scattered.ScatteredSums, stage: int) -> None:
        waiting.append(sum(entry.gradient is not None for entry in self._tracked.values()))
        flush(self, stage)
        assert all(entry.receiver is None or entry.receiver.grad is None for entry in self._tracked.values())
        events.append("end")

    def take(self: scattered.ScatteredSums, entry: Any, gradient: Tensor) -> None:
        events.append("take")
        receive(self, entry, gradient)

    def unpack(x: Tensor) -> Tensor:
        events.append("compute")
        return x

    with (
        mock.patch.object(scattered.ScatteredSums, "flush", look),
        mock.patch.object(scattered.ScatteredSums, "_receive", take),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack),
    ):
        model(**_batch(0)).loss.backward()
    assert waiting == [0] * 4
    # Gradients are taken as the backward goes, not when it has ended.
    backwards = " ".join(events).split("end")[:4]
    assert all(backward.count("take compute") > 5 for backward in backwards)


def a_loss_outside_of_the_model() -> None:
    twin, model = _model(), _compile(_model())
    for called in (twin, model):
        logits = called(input_ids=_batch(0)["input_ids"]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), _batch(0)["labels"].flatten()).backward()
    assert_agree(whole_gradients(model), whole_gradients(twin))


class _Odd(nn.Module):
    """Sizes that two ranks don't divide, what every rank has whole, a scalar, and a parameter that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.odd, self.scale = nn.Linear(8, 5), nn.Linear(5, 5), nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.randn(3, 7))

    def forward(self, x: Tensor) -> Tensor:
        return (self.odd(torch.tanh(self.odd(self.inner(x)))) * self.scale).square().mean() + self.table.square().mean()


def unequal_parts_and_what_is_complete_on_every_rank() -> None:
    torch.manual_seed(0)
    odd, x = _Odd(), torch.randn(16, 8)
    twin = copy.deepcopy(odd)
    model = _compile(odd)
    for _ in range(2):
        twin(x).backward()
        model(x).backward()
    assert_agree(whole_gradients(model), whole_gradients(twin))
    assert any(state.padded for layout in model.plan.layouts.values() for state in layout)


def a_rank_that_fails_stops_the_others() -> None:
    model, rank = _compile(_model()), dist.get_rank()
    model(**_batch(0))  # whose backward never comes
    model(**_batch(1)).loss.backward()
    twin = _model()
    twin(**_batch(1)).loss.backward()
    assert_agree(whole_gradients(model), whole_gradients(twin))
    calls = []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3 and rank == 1:
            raise ValueError("on this rank")
        sums.start_sum(*arguments)

    with (
        mock.patch.object(scattered, "start_sum", fail),
        pytest.raises(PipelineError, match=r"stage 0 of 1, backward of micro-batch \d .*on this rank"),
    ):
        model(**_batch(0))


CASES = (
    steps_are_those_of_one_device,
    mixed_precision_within_rounding,
    every_backward_leaves_parts,
    sums_are_of_every_micro_batch_and_hold_a_bucket,
    no_whole_gradient_waits,
    a_loss_outside_of_the_model,
    unequal_parts_and_what_is_complete_on_every_rank,
    a_rank_that_fails_stops_the_others,  # the last: it closes process groups
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("zero"), CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_in_two_processes(outcomes: Outcomes, case: Callable[[], None]) -> None:
    outcomes.check(case.__name__)


PIPELINES = (
    ("llama", {"schedule": "1f1b", "microbatches": 4}),
    ("llama", {"schedule": "zb-v", "microbatches": 4}),
    ("gpt2", {"schedule": "interleaved", "microbatches": 2}),  # its embedding and its head are one parameter, on two pipeline ranks
    ("gpt2", {"schedule": "zb-h1", "microbatches": 2, "recompute": "full"}),
    ("gpt2", {"schedule": "zb-v", "microbatches": 2}),  # and on one, in two stages
)


def _pipelines(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    for name, pins in PIPELINES:
        torch.manual_seed(0)
        twin = _model(name)
        torch.manual_seed(0)
        model = _compile(_model(name), pp=2, **pins)
        for seed in range(2):
            with model.no_sync() if seed == 0 else nullcontext():
                loss = model(**_batch(seed)).loss
                loss.backward()
            expected = twin(**_batch(seed)).loss
            expected.backward()
            torch.testing.assert_close(loss, expected, **CLOSE)
        assert model.plan.pipeline.ranks == 2
        assert any(state.level == 2 for layout in model.plan.layouts.values() for state in layout)
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), dict(twin.named_parameters())[key].grad, rtol=0, atol=1e-12)
        asked = torch.autograd.grad(model(**_batch(4)).loss, list(model.parameters()))
        wanted = torch.autograd.grad(twin(**_batch(4)).loss, list(twin.parameters()))
        for x, y in zip(asked, wanted, strict=True):
            torch.testing.assert_close(x.full_tensor(), y, rtol=0, atol=1e-12)


def test_pipelines_in_four_processes(tmp_path: Path) -> None:
    spawn(4, tmp_path, _pipelines)


def _rows(plan: autopar.Plan, purpose: str) -> dict[str, int]:
    return {row.collective: row.nbytes for row in plan.traffic if row.purpose == purpose and row.axis == "dp"}


@pytest.mark.parametrize("pins", [{}, {"pp": 2, "schedule": "1f1b"}])
def test_the_price_of_parts(pins: Mapping[str, object]) -> None:
    model, batch = ZOO["llama"]()[0].float(), _batch(0)
    ranks = 2 * (2 if pins else 1)
    plans = {
        (level, count): autopar.plan(
            model, batch, f"{ranks}xcpu", pins={"dp": 2, "zero": level, "microbatches": count, "recompute": "none", **pins}
        )
        for level in (1, 2)
        for count in (2, 4)
    }
    nbytes = sum(p.nbytes for p in model.parameters()) // (ranks // 2)
    for (level, count), plan in plans.items():
        sums_per_step = count if level == 2 else 1
        assert _rows(plan, "gradients")["reduce_scatter"] == pytest.approx(sums_per_step * nbytes, rel=1e-6)
        assert _rows(plan, "parameters") == {"all_gather": pytest.approx(nbytes, rel=1e-6)}
    for count in (2, 4):
        whole, parts = plans[1, count], plans[2, count]
        assert whole.seconds.step < parts.seconds.step
        if not pins:
            assert whole.memory.gradients == 3 * parts.memory.gradients


def test_the_search_pays_for_parts_where_memory_needs_them() -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, vocab_size=8192
    )
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(config), torch.zeros(8, 64, dtype=torch.int64)
    batch, pins = {"input_ids": ids, "labels": ids}, {"dp": 4, "microbatches": 2, "recompute": "none", "prefetch": 0}
    roomy = Cluster.parse("4xcpu")
    pinned = {level: autopar.plan(model, batch, roomy, pins={**pins, "zero": level}) for level in range(4)}
    plan = autopar.plan(model, batch, roomy, pins=pins)
    for level, other in pinned.items():
        assert plan.seconds.step <= other.seconds.step * (1 + 1e-5), level
    assert 2 not in _levels(plan)
    total = {level: other.memory.total for level, other in pinned.items()}
    assert total[3] < total[2] < total[1] < total[0] + total[0] // 4
    tight = autopar.plan(model, batch, roomy.with_memory(total[2] * 101 // 100), pins=pins)
    assert 2 in _levels(tight)
    assert tight.seconds.step <= pinned[2].seconds.step * (1 + 1e-5)


def _levels(plan: autopar.Plan) -> set[int]:
    return {3 if state.level == 0 else state.level for layout in plan.layouts.values() for state in layout if state.kind is StateKind.SHARD}
