"""Pipelines against one device: loss, every gradient and updated buffer in float64, all ranks in one process.

Of the grid of models, pipeline ranks, devices of each, schedules and recomputation this runs a part in which every pair of choices occurs
(``python -m tests.exactness --pipelines`` runs it all). Besides, pipelines of which everything is drawn; micro-batches without any label;
losses computed outside; frozen layers; batch norms; dropout; parameters that several pipeline ranks use.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.capture.export import Captured, capture
from autopar.checks import threads
from autopar.checks.shards import cut
from autopar.checks.verification import Verification, prepare_reference, verify_against
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir.layout import PIPELINE, local_shape, with_pipeline
from autopar.ops import comm
from autopar.ops.recompute import Recomputed
from autopar.plans.plan import RECOMPUTE, Plan
from autopar.rewrite.emit import rewrite
from autopar.rewrite.program import Program
from autopar.runtime.gradients import StashedGradients
from autopar.runtime.pipeline import StageRunner
from autopar.runtime.sums import TrackedParameter
from autopar.schedules.families import SCHEDULES
from tests.emitted import subject
from tests.exactness import CASES, PIPELINED, Case, amiss, left_out, make_pipeline
from tests.helpers import tree_allclose
from tests.planning import make_plan
from tests.zoo import DEEP, bert_deep, gpt2_deep, resnet


def _choose() -> list[Case]:
    """One case for each model and schedule, such that any two choices meet."""
    chosen = []
    for (i, name), (j, schedule) in itertools.product(enumerate(PIPELINED), enumerate(SCHEDULES)):
        k = i + j
        chosen.append(Case(name, (2, 4)[k // 3 % 2], (1, 2)[k // 2 % 2], schedule, RECOMPUTE[k % 3]))
    return chosen


CHOSEN = _choose()


def _pairs(cases: Sequence[Case]) -> set[tuple[object, ...]]:
    return {(a, b, case[a], case[b]) for case in cases for a, b in itertools.combinations(range(len(case)), 2)}


def _check(name: str, found: Verification) -> None:
    found.check()
    assert not left_out(name, found)


def _plan(captured: Captured, ranks: int = 2, **pins: object) -> Plan:
    return make_plan(captured.graph, Cluster.parse(f"{ranks}xcpu"), pins=pins)


def _verify(model: nn.Module, inputs: Mapping[str, Tensor], ranks: int = 2, **pins: object) -> Verification:
    reference = prepare_reference(model, dict(inputs), capture(model, dict(inputs)))
    return verify_against(reference, _plan(reference.captured, ranks, **pins))


# --- the grid ---


def test_every_pair_of_choices_is_among_the_cases() -> None:
    assert set(CHOSEN) <= set(CASES)
    assert _pairs(CHOSEN) == _pairs(CASES)
    assert set(PIPELINED) == set(DEEP)
    assert len(CASES) == len(PIPELINED) * 2 * 2 * len(SCHEDULES) * len(RECOMPUTE)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: "-".join(map(str, case)))
def test_a_pipeline_computes_what_one_device_does(case: Case) -> None:
    plan = make_pipeline(case)
    assert not amiss(case, plan)
    _check(case.name, subject(case.name).verify(plan))


@pytest.mark.parametrize("name", PIPELINED)
def test_pipeline_ranks_that_split_the_batch_compute_what_one_device_does(name: str) -> None:
    """T5 makes its masks for the whole batch: what ranks have of those isn't part of what a micro-batch has."""
    plan = subject(name).pinned({"pp": 2, "dp": 2, "fsdp": True, "microbatches": 4, "schedule": "1f1b", "recompute": "full"})
    assert {"dp batch", "dp storage"} <= subject(name).uses(plan)
    _check(name, subject(name).verify(plan))


@pytest.mark.parametrize("seed", [25, 32, 116, 117])
@pytest.mark.parametrize("name", ["gpt2_deep", "llama_tied", "bert_deep", "t5_deep", "unet"])
def test_drawn_pipelines_compute_what_one_device_does(name: str, seed: int) -> None:
    _check(name, subject(name).verify(subject(name).random_pipeline(seed)))


def test_a_drawn_pipeline_on_meshes_of_two_axes() -> None:
    plan = subject("t5_deep").random_pipeline(2)
    assert plan.pipeline.ranks == 2
    assert plan.mesh.sizes == (2, 2)
    _check("t5_deep", subject("t5_deep").verify(plan))


@pytest.mark.parametrize(("recompute", "regions"), [("none", 0), ("selective", 6), ("full", 8)])
def test_what_a_plan_recomputes_is_run_again(recompute: str, regions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = subject("gpt2_deep").pipelined(2, 1, "1f1b", recompute)
    ran = []
    forward = Recomputed.forward

    def count(self: Recomputed, *inputs: Any) -> Any:
        ran.append(self)
        return forward(self, *inputs)

    monkeypatch.setattr(Recomputed, "forward", count)
    subject("gpt2_deep").verify(plan).check()
    assert len(ran) == regions * plan.pipeline.microbatches


# --- other models and inputs ---


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_a_micro_batch_may_have_no_label_that_counts(schedule: str) -> None:
    model, inputs = bert_deep()
    inputs["labels"][5] = -100
    assert ((inputs["labels"] != -100).sum(1) == 0).sum() == 1
    found = _verify(model, inputs, pp=2, microbatches=8, schedule=schedule)
    found.check()
    assert found.plan.pipeline.microbatches == 8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_of_a_loss_outside_come_back_through_every_schedule(schedule: str) -> None:
    model, inputs = gpt2_deep()
    del inputs["labels"]
    found = _verify(model, inputs, pp=2, microbatches=4, schedule=schedule, **({"chunks": 2} if schedule == "interleaved" else {}))
    found.check()
    assert sum(name.startswith("gradient") for name in found.errors) == len(dict(model.named_parameters()))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "v-half"])
def test_frozen_layers_send_no_gradients(schedule: str) -> None:
    model, inputs = gpt2_deep()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("transformer.h.4", "transformer.h.5", "transformer.ln_f")))
    found = _verify(model, inputs, pp=2, microbatches=4, schedule=schedule, recompute="full")
    found.check()
    gradients = [name for name in found.errors if name.startswith("gradient")]
    assert len(gradients) == sum(parameter.requires_grad for parameter in model.parameters()) == 26


def test_batch_norms_see_the_whole_batch_or_are_refused() -> None:
    model, inputs = resnet()
    found = _verify(model, inputs, pp=2, microbatches=1, schedule="gpipe", recompute="full")
    found.check()
    statistics = [name for name, _ in model.named_buffers() if "running" in name]
    assert {f"buffer {name}" for name in statistics} <= set(found.errors)
    assert len({block.stage for block in found.plan.pipeline.blocks}) == 2
    with pytest.raises(InputError, match=r"batch_norm.*statistics over the whole batch, which no one of 4 micro-batches sees; use"):
        _verify(model, inputs, pp=2, microbatches=4)


def test_a_batch_that_micro_batches_do_not_divide_is_refused() -> None:
    model, inputs = gpt2_deep()
    with pytest.raises(InputError, match=r"the batch of 8 \(dim 0 of .*\) can't be split into 3 micro-batches; take a divisor of 8"):
        _verify(model, inputs, pp=2, microbatches=3)


# --- a step as the runtime runs it: shared parameters, dropout ---


@dataclass(frozen=True)
class _Step:
    """What each rank has after a step: the loss where it was made, gradients by name."""

    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]


def _step(model: nn.Module, captured: Captured, plan: Plan, inputs: Mapping[str, Tensor], *, number: int = 0) -> _Step:
    """A step of every rank's `StageRunner`. Parameters that other pipeline ranks own are garbage before."""
    program = rewrite(captured, plan)
    assert program.pipeline is not None
    mesh, named = program.mesh, dict(model.named_parameters(remove_duplicate=False))
    buffers = {**dict(model.named_buffers()), **captured.constants}

    def work(rank: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        pipeline_rank, place = divmod(rank, mesh.world_size)
        axes = dict(comm.current())
        axis = axes.pop(PIPELINE, None)
        leaves, tracked, parameters = {}, [], {}
        for slot in program.parameters:
            owns, uses = slot.owner == pipeline_rank, pipeline_rank in slot.users
            local = cut(named[slot.name].detach(), slot.layout, mesh, place).clone() if owns else torch.zeros(0, dtype=torch.float64)
            parameters[slot.name] = nn.Parameter(local)
            leaf = parameters[slot.name].detach().requires_grad_()
            tracked.append(TrackedParameter(slot.name, parameters[slot.name], leaf, None))
            if uses and not owns:
                leaf = torch.full(local_shape(slot.shape, slot.layout, mesh), float("nan"), dtype=torch.float64, requires_grad=True)
            if uses:
                leaves[slot.name] = leaf
        runner = StageRunner(program, pipeline_rank, axis, axes, leaves, StashedGradients(tracked, program.bucket_nbytes))
        held = {slot.name: cut(buffers[slot.name], slot.layout, mesh, place).clone() for slot in program.buffers}
        parts = [cut(x, slot.layout, mesh, place) for x, slot in zip(captured.bind((), inputs), program.inputs, strict=True)]
        run = runner.run(held, parts, random_seed=number, trains=True, syncs=True)
        run.hand_over(torch.tensor(1.0, dtype=torch.float64), dict.fromkeys(parameters, "added"))
        loss = run.executor.join(0) if program.outputs[0].owner == pipeline_rank else None
        return loss, {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}

    ranks = threads.run(with_pipeline(mesh, plan.pipeline.ranks), work)
    return _Step([loss for loss, _ in ranks if loss is not None], [gradients for _, gradients in ranks])


def _shared(program: Program) -> list[str]:
    return [slot.name for slot in program.parameters if len(slot.users) > 1]


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("name", ["llama_tied", "t5_deep"])
def test_values_of_shared_parameters_are_sent_and_their_gradients_summed(name: str, schedule: str) -> None:
    model, inputs = DEEP[name]()
    captured = capture(model, inputs)
    plan = _plan(captured, 4, pp=4, microbatches=4, schedule=schedule)
    # In a V of stages the first and the last are one pipeline rank's.
    expected = (
        [] if (name, schedule) == ("llama_tied", "zb-v") else [{"llama_tied": "model.embed_tokens.weight"}.get(name, "shared.weight")]
    )
    assert _shared(rewrite(captured, plan)) == expected
    step = _step(model, captured, plan, inputs)
    model(**inputs).loss.backward()
    found: dict[str, Tensor] = {}
    for gradients in step.gradients:
        found.update({name: gradient for name, gradient in gradients.items() if gradient.numel()})
    tree_allclose(found, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-5)


def _with_recompute(plan: Plan, recompute: str) -> Plan:
    blocks = tuple(replace(block, recompute=recompute) for block in plan.pipeline.blocks)
    return replace(plan, pipeline=replace(plan.pipeline, blocks=blocks))


@pytest.mark.parametrize(("ranks", "pins"), [(2, {"pp": 2}), (4, {"pp": 2, "tp": 2}), (4, {"pp": 2, "dp": 2, "fsdp": True})], ids=str)
def test_dropout_masks_are_the_same_when_run_again(ranks: int, pins: Mapping[str, object]) -> None:
    model, inputs = gpt2_deep(dropout=0.2)
    captured = capture(model, inputs)
    plan = _plan(captured, ranks, **pins, microbatches=4, schedule="zb-h1")
    steps = {recompute: _step(model, captured, _with_recompute(plan, recompute), inputs, number=11) for recompute in RECOMPUTE}
    assert len(steps["none"].losses) == ranks // 2
    for recompute in ("selective", "full"):
        tree_allclose(steps[recompute].losses, steps["none"].losses, rtol=0)
        tree_allclose(steps[recompute].gradients, steps["none"].gradients, rtol=1e-12)
    other = _step(model, captured, plan, inputs, number=12)
    assert not torch.allclose(other.losses[0], steps["none"].losses[0], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_dropout_does_not_depend_on_the_schedule(schedule: str) -> None:
    model, inputs = gpt2_deep(dropout=0.2)
    captured = capture(model, inputs)
    plan = _plan(captured, 2, pp=2, microbatches=4, schedule="zb-h1")
    other = replace(plan, pipeline=replace(plan.pipeline, schedule=schedule))
    tree_allclose(_step(model, captured, other, inputs).losses, _step(model, captured, plan, inputs).losses, rtol=0)


def test_micro_batches_layers_and_calls_draw_masks_of_their_own() -> None:
    model, inputs = gpt2_deep(dropout=0.2)
    same = {name: x[:1].expand_as(x).contiguous() for name, x in inputs.items()}
    compiled = autopar.compile(model, same, cluster="1xcpu", pins={"microbatches": 4, "recompute": "full"})
    assert compiled.plan.pipeline.microbatches == 4
    with torch.no_grad():
        first, second = (compiled(**same).logits for _ in range(2))
    assert not torch.equal(first, second)
    for row, other in itertools.combinations(range(8), 2):
        assert not torch.allclose(first[row], first[other], rtol=1e-6), (row, other)
