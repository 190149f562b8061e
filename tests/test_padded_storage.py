"""Parameters of which no dim divides are stored in unequal parts: three processes train a Llama whose sizes are powers of two."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import Shard

import autopar
from autopar.errors import PlanError
from autopar.ir.layout import Mesh, fits, format_layout, local_shape, parse_layout
from autopar.plans.plan import from_json, to_json
from tests.helpers import CLOSE, assert_agree, whole_gradients
from tests.processes import spawn
from tests.zoo import ZOO, in_float64

RANKS = 3


class Odd(nn.Module):
    """Nothing of it divides by 2, 3, 4 or 5, but a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 13), nn.Linear(13, 11)
        self.scale, self.pair = nn.Parameter(torch.ones(())), nn.Parameter(torch.randn(1, 13))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.second(torch.relu(self.first(x)) * self.pair)).square().sum()


def _batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2 * RANKS, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return in_float64(ZOO["llama"]()[0])


def _compile(level: int, model: nn.Module | None = None, **pins: object) -> autopar.CompiledModule:
    return autopar.compile(model or _model(), pins={"dp": RANKS, "zero": level, **pins})


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> Iterator[Tensor]:
    for seed in seeds:
        loss = model(**_batch(seed)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def _train(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    for level in (1, 2, 3):
        twin, model = _model(), _compile(level)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
        for loss, expected in zip(_steps(model, optimizers[0], range(3)), _steps(twin, optimizers[1], range(3)), strict=True):
            torch.testing.assert_close(loss, expected, **CLOSE)
        assert_agree({k: p.full_tensor() for k, p in model.named_parameters()}, dict(twin.named_parameters()))
        weight = model.get_parameter("lm_head.weight")
        assert weight.placements == (Shard(0),)
        assert weight.to_local().shape[0] == [22, 22, 20][rank]
        assert optimizers[0].state[weight]["exp_avg"].placements == weight.placements
    _step_fused(rank)


class _Wide(nn.Module):
    """A parameter whose first dim is less than the ranks, so that a later one is split, in unequal parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Parameter(torch.randn(2, 13))
        self.out = nn.Linear(2, 11)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(x @ self.wide.T).square().sum()
        return result


def _step_fused(rank: int) -> None:
    """Fused optimizers read memory as if a gradient had no gaps, and say nothing."""
    torch.set_default_dtype(torch.float64)
    x = torch.randn(12, 13, generator=torch.Generator().manual_seed(1))
    for level in (1, 2, 3):
        twin, model = _Wide(), autopar.compile(_Wide(), pins={"dp": 3, "zero": level})
        for module in (twin, model):
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
            for _ in range(2):
                module(x).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert model.wide.to_local().shape == [(2, 5), (2, 5), (2, 3)][rank]
        assert_agree({k: p.full_tensor() for k, p in model.named_parameters()}, dict(twin.named_parameters()))


def _accumulate(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    for level in (1, 2, 3):
        twin, model = _model(), _compile(level)
        for seed in range(3):
            twin(**_batch(seed)).loss.backward()
        for seed in range(2):
            with model.no_sync():
                model(**_batch(seed)).loss.backward()
        model(**_batch(2)).loss.backward()
        assert_agree(whole_gradients(model), whole_gradients(twin))
        # The user asks for gradients, also of gradients, and of a hooked parameter.
        asked = torch.autograd.grad(model(**_batch(3)).loss, list(model.parameters()))
        expected = torch.autograd.grad(twin(**_batch(3)).loss, list(twin.parameters()))
        for x, y in zip(asked, expected, strict=True):
            torch.testing.assert_close(x.full_tensor(), y, **CLOSE)
        norms: list[float] = []
        model.get_parameter("lm_head.weight").register_hook(lambda x, norms=norms: norms.append(float(x.full_tensor().norm())))
        model(**_batch(3)).loss.backward()
        assert norms == [pytest.approx(float(expected[-1].norm()), rel=1e-9)]
        # Whole tensors in the places of parameters, and what is evaluated.
        whole = {name: 2 * p.detach() for name, p in twin.named_parameters()}
        with torch.no_grad():
            replaced = torch.func.functional_call(model, whole, (), _batch(0)).loss
            torch.testing.assert_close(replaced, torch.func.functional_call(twin, whole, (), _batch(0)).loss, **CLOSE)
            torch.testing.assert_close(model.eval()(**_batch(1)).loss, twin.eval()(**_batch(1)).loss, **CLOSE)


def _more(rank: int, folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    odd, x = Odd(), torch.randn(4 * RANKS, 7)
    for level in (1, 2, 3):
        for pins in ({"prefetch": 0}, {}) if level > 1 else ({"microbatches": 2}, {}):
            twin = copy.deepcopy(odd)
            twin(x).backward()
            model = _compile(level, copy.deepcopy(odd), **pins)
            model(x).backward()
            assert_agree(whole_gradients(model), whole_gradients(twin))
        (gradient,) = torch.autograd.grad(model(x), [model.first.weight], create_graph=True)
        (expected,) = torch.autograd.grad(twin(x), [twin.first.weight], create_graph=True)
        again = torch.autograd.grad(gradient.full_tensor().square().sum(), list(model.parameters()))
        for y, z in zip(again, torch.autograd.grad(expected.square().sum(), list(twin.parameters())), strict=True):
            torch.testing.assert_close(y.full_tensor(), z, **CLOSE)
    # A checkpoint of one level is read at another, and training goes on as on one device.
    twin = _model()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    expected_losses = list(_steps(twin, optimizer, range(4)))
    before, after = _compile(3), _compile(1)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (before, after)]
    losses = list(_steps(before, optimizers[0], range(2)))
    state = {"model": get_model_state_dict(before), "optimizer": get_optimizer_state_dict(before, optimizers[0])}
    dcp.save(state, checkpoint_id=folder)
    list(_steps(after, optimizers[1], range(5, 6)))
    read = {"model": get_model_state_dict(after), "optimizer": get_optimizer_state_dict(after, optimizers[1])}
    dcp.load(read, checkpoint_id=folder)
    set_model_state_dict(after, read["model"])
    set_optimizer_state_dict(after, optimizers[1], read["optimizer"])
    losses += list(_steps(after, optimizers[1], range(2, 4)))
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected_losses), **CLOSE)


def _masters(rank: int) -> None:
    for level in (1, 3):
        torch.manual_seed(0)
        twin, model = (ZOO["llama"]()[0].bfloat16() for _ in range(2))
        model.load_state_dict(twin.state_dict())
        compiled = autopar.compile(model, pins={"dp": RANKS, "zero": level}, precision="bfloat16")
        optimizers = [autopar.MasterWeights(torch.optim.AdamW, m.parameters(), lr=1e-2) for m in (compiled, twin)]
        for seed in range(2):
            losses = []
            for one, optimizer in zip((compiled, twin), optimizers, strict=True):
                losses.append(one(**_batch(seed)).loss)
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=0)


def _pipelines(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    odd, batches = Odd(), torch.randn(3, 8, 7)
    for level in (1, 3):
        for schedule in ("1f1b", "zb-h1"):
            twin, model = copy.deepcopy(odd), copy.deepcopy(odd)
            model = autopar.compile(model, pins={"pp": 2, "dp": 2, "zero": level, "microbatches": 4, "schedule": schedule})
            optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
            for x in batches:
                losses = []
                for one, optimizer in zip((model, twin), optimizers, strict=True):
                    optimizer.zero_grad()
                    losses.append(one(x))
                    losses[-1].backward()
                    torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
                    optimizer.step()
                torch.testing.assert_close(losses[0].detach(), losses[1].detach(), **CLOSE)
            assert any(state.padded for layout in model.plan.layouts.values() for state in layout)
            assert_agree(autopar.full_state_dict(model), twin.state_dict()) if rank == 0 else autopar.full_state_dict(model)


def test_pipelines(tmp_path: Path) -> None:
    spawn(4, tmp_path, _pipelines)


def test_training(tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _train)


def test_gradients(tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _accumulate)


def test_odd_sizes_and_checkpoints(tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _more, str(tmp_path / "checkpoint"))


def test_masters(tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _masters)


@pytest.mark.parametrize("ranks", [2, 4, 5])
@pytest.mark.parametrize(
    "more", [{"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 3, "prefetch": 0}, {"zero": 1, "microbatches": 2}], ids=str
)
@pytest.mark.parametrize("precision", ["model", "mixed"])
def test_plans_agree_in_float64(ranks: int, more: Mapping[str, object], precision: str) -> None:
    torch.manual_seed(0)
    verification = autopar.verify(Odd().float(), (torch.randn(4 * ranks, 7),), ranks=ranks, pins={"dp": ranks, **more}, precision=precision)
    verification.check()
    plan = verification.plan
    level = {0: "", 1: "z1", 2: "z2"}[more["zero"] % 3]
    layouts = {name: format_layout(layout) for name, layout in plan.layouts.items() if name.startswith("p_")}
    # A scalar stays whole, and what has one row is split along its other dim.
    assert (layouts.pop("p_scale"), layouts.pop("p_pair")) == ("R", f"S1p{level}")
    assert set(layouts.values()) == {f"S0p{level}"}
    assert from_json(to_json(plan)) == plan


@pytest.mark.parametrize(
    "pins", [{"dp": 3, "tp": 2, "zero": 3}, {"dp": 3, "tp": 2, "zero": 2}, {"dp": 3, "pp": 2, "zero": 3, "microbatches": 2}], ids=str
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mixes_agree_in_float64(name: str, pins: Mapping[str, object]) -> None:
    model = ZOO[name]()[0]
    ids = torch.randint(0, 64, (12, 8))
    verification = autopar.verify(model, {"input_ids": ids, "labels": ids}, ranks=6, pins=pins)
    verification.check()
    assert any("p" in str(state) for layout in verification.plan.layouts.values() for state in layout)


def test_memory_counts_the_largest_part() -> None:
    plan = autopar.plan(Odd(), (torch.randn(10, 7),), "5xcpu", pins={"dp": 5, "zero": 3})
    # Rows of the largest parts: first 3 of 13, its bias 3, second 3 of 11, its bias 3, pair 3 of 13, and the scalar.
    assert plan.memory.parameters == 4 * (3 * 7 + 3 + 3 * 13 + 3 + 3 + 1)
    assert plan.notes == ()


def test_what_is_padded_is_split_by_one_axis_along_the_dim() -> None:
    mesh = Mesh(("dp", "tp"), (3, 2))
    assert fits((4, 6), parse_layout("S0p,S1"), mesh)
    assert local_shape((4, 6), parse_layout("S0p,S1"), mesh) == (2, 3)
    for text in ("S0p,S0", "S0p,S0p", "S0/2p,R", "S2p,R"):
        assert not fits((4, 6), parse_layout(text), mesh)


def test_what_is_no_parameter_is_not_padded() -> None:
    model, call = nn.Linear(7, 5), (torch.randn(4, 7),)
    plan = autopar.plan(model, call, "2xcpu", pins={"dp": 2, "zero": 3})
    name = next(name for name in plan.layouts if not name.startswith("p_"))
    for broken, message in (
        (dataclasses.replace(plan, layouts={**plan.layouts, name: parse_layout("S0p")}), "only parameters are stored padded"),
        (dataclasses.replace(plan, outputs=(parse_layout("S0p"),)), "has the state S0p"),
    ):
        with pytest.raises(PlanError, match=message):
            autopar.verify(model, call, broken)
