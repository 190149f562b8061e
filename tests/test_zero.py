"""ZeRO levels 1 to 3: what is stored split, that steps are those of one device, and what a plan says of them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import autopar
from autopar.capture import call_in_precision, capture
from autopar.errors import InputError, PlanError
from autopar.ir import MESSAGE_NBYTES
from autopar.ir.layout import StateKind
from autopar.ir.precision import PRECISIONS
from autopar.plans.plan import from_json, to_json
from autopar.rewrite import rewrite
from autopar.runtime import sums
from autopar.torch_compat import StorageRef
from tests.helpers import CLOSE, assert_agree, whole_gradients
from tests.processes import Outcomes, run_cases, spawn
from tests.rounding import check_within_rounding
from tests.zoo import ZOO, in_float64, labels, tokens

LEVELS = (1, 2, 3)


def _model(name: str = "llama") -> nn.Module:
    model = ZOO[name]()[0]
    return in_float64(model) if name in ("llama", "gpt2") else model


def _batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed), "labels": labels(seed)}


def _compile(level: int, model: nn.Module | None = None, **pins: object) -> autopar.CompiledModule:
    return autopar.compile(model or _model(), pins={"dp": 2, "zero": level, **pins})


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> Iterator[Tensor]:
    for seed in range(count):
        loss = model(**_batch(seed)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def three_steps() -> None:
    for name in ("llama", "gpt2"):
        for level in (0, *LEVELS):
            twin, model = _model(name), _compile(level, _model(name))
            optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
            for loss, expected in zip(_steps(model, optimizers[0]), _steps(twin, optimizers[1]), strict=True):
                torch.testing.assert_close(loss, expected, **CLOSE)
            assert_agree({k: p.full_tensor() for k, p in model.named_parameters()}, dict(twin.named_parameters()))
            weight = dict(model.named_parameters())[next(k for k, p in twin.named_parameters() if p.ndim == 2)]
            assert isinstance(weight.placements[0], Shard) == (level > 0)
            assert optimizers[0].state[weight]["exp_avg"].placements == weight.placements


def gradients_add_up_without_sync() -> None:
    twin = _model()
    for seed in range(3):
        twin(**_batch(seed)).loss.backward()
    for level in LEVELS:
        model = _compile(level)
        for seed in range(2):
            with model.no_sync():
                model(**_batch(seed)).loss.backward()
        model(**_batch(2)).loss.backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))
        model.zero_grad()
        # A backward after another, each summed.
        for seed in range(3):
            model(**_batch(seed)).loss.backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))


def level_2_sums_in_every_backward_and_level_1_does_not() -> None:
    for level, has_gradient in ((1, False), (2, True)):
        model = _compile(level)
        with model.no_sync():
            model(**_batch(0)).loss.backward()
        assert any(p.grad is not None for p in model.parameters()) == has_gradient
        model.zero_grad()
        model(**_batch(1)).loss.backward()
        twin = _model()
        twin(**_batch(1)).loss.backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))


def two_calls_in_one_backward() -> None:
    twin = _model()
    (twin(**_batch(0)).loss + 2 * twin(**_batch(1)).loss).backward()
    for level in LEVELS:
        model = _compile(level)
        (model(**_batch(0)).loss + 2 * model(**_batch(1)).loss).backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))


def the_user_asks_for_gradients() -> None:
    twin = _model()
    names = [name for name, _ in twin.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(twin(**_batch(0)).loss, list(twin.parameters())), strict=True))
    for level in LEVELS:
        model = _compile(level)
        asked = torch.autograd.grad(model(**_batch(0)).loss, list(model.parameters()))
        assert_agree({name: x.full_tensor() for name, x in zip(names, asked, strict=True)}, expected)
        norms: list[float] = []
        weight = dict(model.named_parameters())["lm_head.weight"]
        weight.register_hook(lambda x, norms=norms: norms.append(float(x.full_tensor().norm())))
        model(**_batch(0)).loss.backward()
        assert norms == [pytest.approx(float(expected["lm_head.weight"].norm()), rel=1e-9)]
        assert_agree(whole_gradients(model), expected)


def frozen_and_unused_parameters() -> None:
    def build() -> nn.Module:
        model = _model()
        model.unused = nn.Parameter(torch.ones(4, 4))
        for p in model.model.layers[0].parameters():
            p.requires_grad_(False)
        return model

    twin = build()
    twin(**_batch(0)).loss.backward()
    for level in LEVELS:
        model = _compile(level, build())
        model(**_batch(0)).loss.backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))


def other_calls_over_the_same_parameters() -> None:
    twin = _model()
    for level in LEVELS:
        model = _compile(level)
        model(**_batch(0)).loss.backward()
        model.zero_grad()
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.data.mul_(0.5)
                q.data.mul_(0.5)
        model.eval()
        twin.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(5)[:2]).logits, twin(tokens(5)[:2]).logits, **CLOSE)
        with torch.inference_mode():
            torch.testing.assert_close(model(tokens(5)[:2]).logits, twin(tokens(5)[:2]).logits, **CLOSE)
        model.train()
        twin.train()
        substitutes = {name: p.detach() * 2 for name, p in twin.named_parameters()}
        loss = torch.func.functional_call(model, substitutes, (), _batch(1)).loss
        torch.testing.assert_close(loss, torch.func.functional_call(twin, substitutes, (), _batch(1)).loss, **CLOSE)
        with torch.no_grad():
            for q in twin.parameters():
                q.data.mul_(2)


def checkpoints_go_from_level_to_level() -> None:
    model = _compile(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    list(_steps(model, optimizer, 2))
    dcp.save(model.state_dict(), checkpoint_id=Path("saved"))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    for level in (0, 2, 3):
        other = _compile(level)
        list(_steps(other, torch.optim.AdamW(other.parameters(), lr=1e-1), 1))
        state = other.state_dict()
        dcp.load(state, checkpoint_id=Path("saved"))
        other.load_state_dict(state)
        assert_agree({name: p.full_tensor() for name, p in other.named_parameters()}, whole)


def an_optimizer_from_before_the_first_call() -> None:
    twin = _model()
    expected = list(_steps(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2)))
    for level in LEVELS:
        model = _model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        compiled = _compile(level, model)
        for loss, one in zip(_steps(compiled, optimizer), expected, strict=True):
            torch.testing.assert_close(loss, one, **CLOSE)


def what_no_rank_count_divides_is_stored_in_unequal_parts() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.odd = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x).sum() * self.odd).sum()

    torch.manual_seed(0)
    odd, x = Odd(), torch.randn(4, 8)
    twin = copy.deepcopy(odd)
    twin(x).backward()
    model = _compile(2, odd)
    model(x).backward()
    assert model.odd.placements == (Shard(0),)
    assert_agree(whole_gradients(model), whole_gradients(twin))


def gathered_parameters_are_freed_as_the_backward_goes() -> None:
    for level in (1, 2):
        model = _compile(level)
        refs: dict[int, tuple[str, StorageRef]] = {}
        names = {tuple(p.shape): name for name, p in model.named_parameters() if p.ndim == 2}
        left: list[int] = []

        def pack(x: Tensor, refs: dict[int, tuple[str, StorageRef]] = refs, names: dict[tuple[int, ...], str] = names) -> Tensor:
            if tuple(x.shape) in names or tuple(x.shape[::-1]) in names:
                ref = StorageRef(x)
                refs[ref.key] = names.get(tuple(x.shape)) or names[tuple(x.shape[::-1])], ref
            return x

        def unpack(x: Tensor, refs: dict[int, tuple[str, StorageRef]] = refs, left: list[int] = left) -> Tensor:
            left.append(sum(not ref.expired() for _, ref in refs.values()))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = model(**_batch(0)).loss
        assert len(refs) >= 10
        loss.backward()
        assert left[0] == len(refs)
        assert left[-1] <= 3


def sums_hold_no_more_than_a_bucket() -> None:
    twin = _model()
    twin(**_batch(0)).loss.backward()
    for level in (1, 2):
        held: dict[int, list[int]] = {}
        for nbytes in (1, 10**9):
            plan = autopar.plan(_model(), _batch(0), "2xcpu", pins={"dp": 2, "zero": level})
            model = autopar.compile(_model(), plan=replace(plan, bucket_nbytes=nbytes))
            seen = held.setdefault(nbytes, [])

            def start(members: Any, pending: Any, limit: int, seen: list[int] = seen) -> None:
                sums.start_sum(members, pending, limit)
                seen.append(sum(one.sent_nbytes > 0 for one in pending))

            with mock.patch("autopar.runtime.gradients.start_sum", start):
                model(**_batch(0)).loss.backward()
            assert_agree(whole_gradients(model), whole_gradients(twin))
        assert max(held[1]) == 1
        assert len(held[1]) > len(held[10**9])


def large_parameters_are_messages_of_their_own() -> None:
    # Beside small ones, split along any dim.
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm, self.odd = nn.Linear(512, 513), nn.LayerNorm(513), nn.Linear(513, 300)

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(self.norm(self.wide(x))).square().mean()

    torch.manual_seed(0)
    twin = Large()
    assert twin.wide.weight.nbytes > MESSAGE_NBYTES > twin.norm.weight.nbytes
    for level in (1, 2):
        torch.manual_seed(1)
        model, x = copy.deepcopy(twin), torch.randn(4, 512)
        compiled = autopar.compile(model, pins={"dp": 2, "zero": level})
        twin.zero_grad()
        for _ in range(2):
            twin(x).backward()
            compiled(x).backward()
        assert_agree(whole_gradients(compiled), whole_gradients(twin))


def a_call_that_fails_leaves_the_next_one_right() -> None:
    twin = _model()
    twin(**_batch(1)).loss.backward()
    for level in (1, 2):
        model = _compile(level)
        model(**_batch(0)).loss.backward()
        model.zero_grad()
        broken = _batch(0)
        broken["input_ids"] = broken["input_ids"] + 10**6
        with pytest.raises(Exception, match="index"):
            model(**broken)
        model(**_batch(1)).loss.backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))


def micro_batches() -> None:
    for precision in (None, "mixed"):
        twin, model = _model(), _model()
        if precision is not None:
            twin, model = twin.float(), model.float()
        compiled = autopar.compile(model, pins={"dp": 2, "zero": 1, "microbatches": 2}, precision=precision)
        if precision is None:
            _run_alike(compiled, twin)
        else:
            step = functools.partial(_mixed_step, twin)
            loss = compiled(**_batch(0)).loss
            loss.backward()
            check_within_rounding({"loss": loss.detach(), **whole_gradients(compiled)}, step)


def _mixed_step(twin: nn.Module, batch: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    twin.zero_grad()
    loss = call_in_precision(twin, (), batch or _batch(0), PRECISIONS["mixed"]).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}}


def _run_alike(model: nn.Module, twin: nn.Module) -> None:
    """Steps of an optimizer, gradients that add up under `no_sync`, and gradients that the user asks for, on both."""
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for loss, expected in zip(_steps(model, optimizers[0]), _steps(twin, optimizers[1]), strict=True):
        torch.testing.assert_close(loss, expected, **CLOSE)
    assert_agree({k: p.full_tensor() for k, p in model.named_parameters()}, dict(twin.named_parameters()))
    for seed in range(3):
        with model.no_sync() if seed < 2 else nullcontext():
            model(**_batch(seed)).loss.backward()
        (0.5 * twin(**_batch(seed)).loss).backward()
        (0.5 * twin(**_batch(seed)).loss).backward()
    assert_agree(whole_gradients(model), whole_gradients(twin))
    asked = torch.autograd.grad(model(**_batch(4)).loss, list(model.parameters()))
    expected_gradients = torch.autograd.grad(twin(**_batch(4)).loss, list(twin.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert_agree({n: x.full_tensor() for n, x in zip(names, asked, strict=True)}, dict(zip(names, expected_gradients, strict=True)))


def _pipeline(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    for tied in (False, True):
        for pins in ({"schedule": "1f1b", "microbatches": 2}, {"schedule": "zb-h1", "microbatches": 4}):
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                model = _model()
                if tied:
                    model.lm_head.weight = model.model.embed_tokens.weight
                models.append(model)
            compiled = autopar.compile(models[0], pins={"pp": 2, "dp": 2, "zero": 1, **pins})
            _run_alike(compiled, models[1])
            assert any(state.level for layout in compiled.plan.layouts.values() for state in layout)


def test_pipelines_of_level_1(tmp_path: Path) -> None:
    spawn(4, tmp_path, _pipeline)


def _groups(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    for level in (1, 2, 3):
        twin, model = _model(), autopar.compile(_model(), pins={"dp": 4, "zero": level, "zero_group": 2})
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
        for loss, expected in zip(_steps(model, optimizers[0]), _steps(twin, optimizers[1]), strict=True):
            torch.testing.assert_close(loss, expected, **CLOSE)
        assert_agree({k: p.full_tensor() for k, p in model.named_parameters()}, dict(twin.named_parameters()))
        assert {str(p.placements) for p in model.parameters()} >= {"(Replicate(), Shard(dim=0))"}


class _Twice(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return 2 * self.body(input_ids=input_ids, labels=labels).loss


def _shared_groups(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    pins = {"zero": 3, "zero_group": 2}
    for given in ({"pins": {"dp": 4, **pins}}, {"pins": pins, "mesh": {"dp": 4}}, {"pins": pins, "mesh": {"dp": 2, "dp2": 2}}):
        twin, body = _model(), _model()
        model, other = autopar.compile(body, **given), autopar.compile(_Twice(body), **given)
        for one, two in ((model, twin), (other, _Twice(twin))):
            for called in (one, two):
                output = called(**_batch(0))
                getattr(output, "loss", output).backward()
        assert {str(p.placements) for p in model.parameters()} >= {"(Replicate(), Shard(dim=0))"}
        assert_agree(whole_gradients(model), whole_gradients(twin))


def test_models_that_share_parameters_in_groups(tmp_path: Path) -> None:
    spawn(4, tmp_path, _shared_groups)


def test_groups_in_four_processes(tmp_path: Path) -> None:
    spawn(4, tmp_path, _groups)


CASES = (
    three_steps,
    gradients_add_up_without_sync,
    level_2_sums_in_every_backward_and_level_1_does_not,
    two_calls_in_one_backward,
    the_user_asks_for_gradients,
    frozen_and_unused_parameters,
    other_calls_over_the_same_parameters,
    checkpoints_go_from_level_to_level,
    an_optimizer_from_before_the_first_call,
    what_no_rank_count_divides_is_stored_in_unequal_parts,
    gathered_parameters_are_freed_as_the_backward_goes,
    sums_hold_no_more_than_a_bucket,
    large_parameters_are_messages_of_their_own,
    a_call_that_fails_leaves_the_next_one_right,
    micro_batches,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("zero"), CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_in_two_processes(outcomes: Outcomes, case: Callable[[], None]) -> None:
    outcomes.check(case.__name__)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "t5", "resnet"])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("more", [{"dp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_plans_agree_in_float64(name: str, level: int, more: Mapping[str, int]) -> None:
    model, batch = ZOO[name]()
    verification = autopar.verify(model, batch, ranks=4, pins={**more, "zero": level})
    verification.check()
    held = [layout for layout in verification.plan.layouts.values() if any(state.level for state in layout)]
    assert held
    assert {state.level for layout in held for state in layout if state.level} == {level}
    assert from_json(to_json(verification.plan)) == verification.plan


@pytest.mark.parametrize(
    ("level", "pins", "mesh"),
    [
        *((level, {"dp": 4}, "dp=2 x dp2=2") for level in (1, 2, 3)),
        *((level, {"dp": 4, "tp": 2}, "dp=2 x dp2=2 x tp=2") for level in (1, 2, 3)),
        *((level, {"pp": 1}, "dp=4 x dp2=2") for level in (2, 3)),
        *((level, {"pp": 2, "dp": 4, "microbatches": 2}, "dp=2 x dp2=2") for level in (1, 2, 3)),
    ],
)
def test_groups_of_ranks_store_the_same(level: int, pins: Mapping[str, object], mesh: str) -> None:
    model, batch = ZOO["llama"]()
    ranks = 4 if pins == {"dp": 4} else 8
    verification = autopar.verify(model, batch, ranks=ranks, pins={**pins, "zero": level, "zero_group": 2})
    verification.check()
    plan = verification.plan
    assert str(plan.mesh) == mesh
    outer, inner = ({str(layout[axis]) for layout in plan.layouts.values()} for axis in range(2))
    assert outer == {"R"}
    assert any(state.startswith("S") for state in inner)


@pytest.mark.parametrize(("ahead", "recompute"), [(0, "none"), (1, "none"), (2, "full")])
def test_gathers_for_the_whole_call_are_begun_ahead(ahead: int, recompute: str) -> None:
    model, batch = ZOO["llama"]()
    plan = autopar.plan(model, batch, "2xcpu", pins={"dp": 2, "zero": 2, "prefetch": ahead, "recompute": recompute})
    program = rewrite(capture(model, batch), plan)
    assert isinstance(program.module, torch.fx.GraphModule)
    given = {node.target for node in program.module.graph.find_nodes(op="placeholder")}
    begun: list[torch.fx.Node] = []
    taken: list[torch.fx.Node] = []
    gathered: list[str] = []
    for node in program.module.graph.nodes:
        if getattr(node.target, "__name__", "") == "begin_wholes":
            begun.append(node)
            gathered += [str(x.target) for x in node.all_input_nodes]
        elif getattr(node.target, "__name__", "") == "take_wholes":
            taken.append(node)
            # What this block reads, and the next ones' that were begun.
            assert len(begun) == min(len(taken) + ahead, 4)
            assert node.args == (begun[len(taken) - 1],)
    assert len(begun) == len(taken) == 4  # the embedding, two layers, the head
    held = [slot.name for slot in program.parameters if slot.stored is not None]
    assert len(gathered) == len(set(gathered)) == len(held)
    assert set(gathered) <= given


def test_memory_by_level() -> None:
    model, batch = ZOO["llama"]()
    model = model.float()
    numel = sum(p.numel() for p in model.parameters())
    for level, parameters, gradients, optimizer in (
        (0, 4 + 2, 4, 8),
        (1, 4 / 4 + 2, 4 / 4 + 4, 8 / 4),
        (2, 4 / 4 + 2, 4 / 4, 8 / 4),
        (3, 4 / 4, 4 / 4, 8 / 4),
    ):
        memory = autopar.plan(model, batch, "4xcpu", precision="mixed", pins={"dp": 4, "zero": level}).memory
        assert (memory.parameters, memory.gradients, memory.optimizer) == (parameters * numel, gradients * numel, optimizer * numel), level


@pytest.mark.parametrize(("name", "cluster", "precision"), [("llama", "4xcpu", "mixed"), ("gpt2", "8xH100", "model")])
def test_no_level_is_faster_than_what_the_search_chooses(name: str, cluster: str, precision: str) -> None:
    model, batch = ZOO[name]()
    model = model.float()
    free = autopar.plan(model, batch, cluster, precision=precision)
    for level in range(4):
        pinned = autopar.plan(model, batch, cluster, precision=precision, pins={"zero": level})
        assert free.seconds.step <= pinned.seconds.step * (1 + 1e-5), level
    for pins in ({"dp": 4}, {"dp": 2, "pp": 2, "microbatches": 2}):
        free = autopar.plan(model, batch, cluster, precision=precision, pins=pins)
        for level in range(4):
            pinned = autopar.plan(model, batch, cluster, precision=precision, pins={**pins, "zero": level})
            assert free.seconds.step <= pinned.seconds.step * (1 + 1e-5), (pins, level)


def test_levels_move_the_bytes_of_the_paper() -> None:
    # Rajbhandari et al. 2020, section 7: an all-reduce is a reduce-scatter and an all-gather; level 3 gathers once more.
    model, batch = ZOO["llama"]()
    nbytes = sum(p.nbytes for p in model.parameters())
    expected = {
        0: {("gradients", "all_reduce"): nbytes},
        1: {("gradients", "reduce_scatter"): nbytes, ("parameters", "all_gather"): nbytes},
        2: {("gradients", "reduce_scatter"): nbytes, ("parameters", "all_gather"): nbytes},
        3: {("gradients", "reduce_scatter"): nbytes, ("parameters", "all_gather"): 2 * nbytes},
    }
    for level, rows in expected.items():
        plan = autopar.plan(model, batch, "4xcpu", pins={"dp": 4, "zero": level})
        found = {(row.purpose, row.collective): row.nbytes for row in plan.traffic if row.purpose in ("gradients", "parameters")}
        assert found == rows


@pytest.mark.parametrize(("level", "pins"), [(1, {"cp": 2}), (2, {"cp": 2}), (3, {"dp": 1, "cp": 2}), (3, {"dp": 2, "cp": 2})])
def test_ranks_of_the_sequence_store_in_parts(level: int, pins: Mapping[str, int]) -> None:
    model, batch = ZOO["llama"]()
    verification = autopar.verify(model, batch, ranks=math.prod(pins.values()), pins={**pins, "zero": level})
    verification.check()
    axis = verification.plan.mesh.names.index("cp")
    stored = [layout[axis] for name, layout in verification.plan.layouts.items() if "proj" in name]
    assert stored
    assert {(state.kind, state.level) for state in stored} == {(StateKind.SHARD, level % 3)}


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"zero": 4}, "pin zero=4: an integer from 0 to 3 is needed, such as zero=2"),
        ({"zero": True}, "pin zero=True: an integer from 0 to 3 is needed, such as zero=2"),
        ({"zero": 2.0}, "pin zero=2.0: an integer from 0 to 3"),
        ({"zero": "2"}, "pin zero='2': an integer from 0 to 3 is needed, such as zero=2"),
        ({"zero": 1, "fsdp": True}, "fsdp=True and zero=1 contradict each other"),
        ({"zero": 2, "dp": 1}, "zero=2 stores parameters split over a dp or cp axis, but dp is pinned to 1"),
        ({"zero": 2, "tp": 4}, "zero=2 stores parameters split over a dp or cp axis, but all axes"),
        ({"zero_group": 2}, "says over how many ranks a ZeRO level stores in parts: pin zero=1, 2 or 3 too"),
        ({"zero_group": 2, "zero": 0}, "pin zero=1, 2 or 3 too"),
        ({"zero_group": 1, "zero": 3}, "zero_group=1: a number of ranks is needed, an integer from 2"),
        ({"zero_group": 3, "zero": 3}, "zero_group=3 can't form equal groups: 4 ranks split the batch; zero_group must divide 4"),
        ({"zero_group": 4, "zero": 3, "dp": 2}, "zero_group=4 can't form equal groups of dp=2 ranks"),
        ({"zero_group": 4, "zero": 3, "pp": 2}, "zero_group=4 can't form equal groups: 2 ranks split the batch; zero_group must divide 2$"),
    ],
)
def test_pins_that_cannot_be_had(pins: Mapping[str, object], message: str) -> None:
    model, batch = ZOO["llama"]()
    with pytest.raises(InputError, match=message):
        autopar.plan(model, batch, "4xcpu", pins=pins)


def test_fsdp_is_short_for_a_level() -> None:
    model, batch = ZOO["llama"]()
    for fsdp, level in ((True, 3), (False, 0)):
        plans = [autopar.plan(model, batch, "2xcpu", pins={"dp": 2, **pin}) for pin in ({"fsdp": fsdp}, {"zero": level})]
        assert plans[0].layouts == plans[1].layouts
    autopar.plan(model, batch, "2xcpu", pins={"dp": 2, "fsdp": True, "zero": 3})


def test_a_level_where_none_can_be_is_refused() -> None:
    model, batch = ZOO["llama"]()
    plan = autopar.plan(model, batch, "4xcpu", pins={"dp": 2, "tp": 2, "zero": 1})
    name = next(name for name, layout in plan.layouts.items() if any(state.level for state in layout))
    for text in ("S0z1,S0", "S0z1,S1z1", "S0/2z1,R"):
        document = to_json(plan)
        broken = from_json(document.replace(f'"{name}": "{_text(plan, name)}"', f'"{name}": "{text}"'))
        with pytest.raises(PlanError, match=r"a ZeRO level .* is for one axis|doesn't fit"):
            autopar.verify(model, batch, broken)


def _text(plan: autopar.Plan, name: str) -> str:
    return ",".join(map(str, plan.layouts[name]))
