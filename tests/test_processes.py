"""The whole path in real processes: `autopar.compile` around a user's loop on four ranks, against the same loop on one device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import AutoparError, PlanError
from autopar.runtime import world
from tests.helpers import tree_allclose
from tests.processes import spawn
from tests.zoo import BATCH, SEQ, VOCAB, ZOO, in_float64, labels, tokens

PINS: Mapping[str, Mapping[str, object]] = {
    "tp": {"tp": 4, "vocabulary": True},
    "fsdp": {"dp": 2, "tp": 2, "fsdp": True},
}
TOLERANCE = 1e-9


def _model(name: str) -> nn.Module:
    return in_float64(ZOO[name]()[0])


def _compile(name: str, pins: str, **options: Any) -> autopar.CompiledModule:
    return autopar.compile(_model(name), cluster="4xcpu", pins=PINS[pins], **options)


def _batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed), "labels": labels(seed)}


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _states(module: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(x.detach()).clone() for name, x in module.named_parameters()}


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


def _agree(actual: Any, expected: Any) -> None:
    tree_allclose(actual, expected, rtol=TOLERANCE)


def _train(model: nn.Module, reference: nn.Module) -> None:
    """Three steps of a loop as users write it, on both."""
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-3) for module in (model, reference)]
    for seed in range(3):
        losses, norms = [], []
        for module, optimizer in zip((model, reference), optimizers, strict=True):
            loss = module(**_batch(seed)).loss
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        _agree(losses[0], losses[1])
        _agree(_whole(norms[0]), norms[1])
        _agree(_states(model), _states(reference))


def _check_split(model: autopar.CompiledModule, pins: str) -> None:
    """That no rank has everything: the plan really split the parameters."""
    assert model.plan.mesh.world_size == 4
    local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    whole = sum(p.numel() for p in model.parameters())
    assert 0 < local < 0.5 * whole, pins
    assert model.data_shard[1] == (1 if pins == "tp" else 2)


def _check_evaluation(model: nn.Module, reference: nn.Module) -> None:
    for module in (model, reference):
        module.eval()
    with torch.no_grad():
        _agree(_whole(model(input_ids=tokens(5)).logits), reference(input_ids=tokens(5)).logits)
        _agree(_whole(model(**_batch(6)).loss), reference(**_batch(6)).loss)
    for module in (model, reference):
        module.train()


def _check_other_shapes(model: nn.Module, reference: nn.Module) -> None:
    """A larger batch of shorter rows needs a plan of its own, in which parameters stay where they are."""
    larger = {key: torch.cat([x, x.flip(0)])[:, : SEQ // 2].contiguous() for key, x in _batch(7).items()}
    for module in (model, reference):
        module.zero_grad()
        module(**larger).loss.backward()
    _agree(_gradients(model), _gradients(reference))


def _check_loss_outside(model: nn.Module, reference: nn.Module) -> None:
    losses = []
    for module in (model, reference):
        module.zero_grad()
        logits = _whole(module(input_ids=tokens(8)).logits)
        loss = nn.functional.cross_entropy(logits.view(-1, VOCAB), labels(8).view(-1))
        loss.backward()
        losses.append(loss.detach())
    _agree(losses[0], losses[1])
    _agree(_gradients(model), _gradients(reference))


def _check_accumulation(model: nn.Module, reference: nn.Module) -> None:
    for module in (model, reference):
        module.zero_grad()
        for seed in (9, 10):
            (module(**_batch(seed)).loss / 2).backward()
    _agree(_gradients(model), _gradients(reference))
    model.zero_grad()
    assert not _gradients(model)


def _check_local_inputs(name: str, pins: str, reference: nn.Module) -> None:
    """Every rank passes its own rows only. Labels count unequally per row; the mean is the whole batch's all the same."""
    model = autopar.compile(_model(name), _batch(0), cluster="4xcpu", pins=PINS[pins], inputs="local")
    index, count = model.data_shard
    fresh = _model(name)
    rows = slice(index * BATCH // count, (index + 1) * BATCH // count)
    for module, batch in ((model, {key: x[rows] for key, x in _batch(11).items()}), (fresh, _batch(11))):
        module(**batch).loss.backward()
    _agree(_gradients(model), _gradients(fresh))


def _check_checkpoints(models: Mapping[str, autopar.CompiledModule], name: str, folder: str) -> None:
    """What one plan saved loads under the other, and under none."""
    for saved, model in models.items():
        place = f"{folder}/{name}-{saved}"
        dcp.save({"model": model.state_dict()}, checkpoint_id=place)
        for other in PINS:
            loaded = autopar.compile(_model(name), _batch(0), cluster="4xcpu", pins=PINS[other])
            state = {"model": loaded.state_dict()}
            dcp.load(state, checkpoint_id=place)
            loaded.load_state_dict(state["model"])
            tree_allclose(_states(loaded), _states(model), rtol=0)
        plain = _model(name)
        state = {"model": plain.state_dict()}
        dcp.load(state, checkpoint_id=place)
        plain.load_state_dict(state["model"])
        tree_allclose(_states(plain), _states(model), rtol=0)


def _on_four_ranks(rank: int, name: str, folder: str) -> None:
    models = {}
    for pins in PINS:
        reference, model = _model(name), _compile(name, pins)
        _train(model, reference)
        _check_split(model, pins)
        _check_evaluation(model, reference)
        _check_other_shapes(model, reference)
        _check_loss_outside(model, reference)
        _check_accumulation(model, reference)
        _check_local_inputs(name, pins, reference)
        models[pins] = model
    _check_checkpoints(models, name, folder)
    small = autopar.plan(_model(name), _batch(0), "2xcpu", pins={"tp": 2})
    with pytest.raises(
        PlanError, match=r"the plan is for 2 ranks \(tp=2\), 4 are running: start with `torchrun --nproc-per-node 2 SCRIPT`"
    ):
        autopar.compile(copy.deepcopy(_model(name)), _batch(0), plan=small)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_training_loop_on_four_ranks_is_that_of_one_device(name: str, tmp_path: Path) -> None:
    spawn(4, tmp_path, _on_four_ranks, name, str(tmp_path))


class _Refused(ValueError):
    """An error that is none of autopar's."""


def _fail_to_plan(rank: int, error: type[Exception]) -> None:
    def plan() -> Any:
        raise error("no such plan")

    expected = error if rank == 0 or issubclass(error, AutoparError) else AutoparError
    with pytest.raises(expected, match="no such plan") as caught:
        world.agree(plan)
    assert ("on the first rank" in str(caught.value)) == (rank == 1)


@pytest.mark.parametrize("error", [PlanError, _Refused])
def test_no_rank_waits_for_a_plan_that_the_first_cannot_make(error: type[Exception], tmp_path: Path) -> None:
    spawn(2, tmp_path, _fail_to_plan, error)


class _Scorer(nn.Module):
    """A loss of features that may be trained outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, dtype=torch.float64), nn.Linear(256, 64, dtype=torch.float64)

    def forward(self, features: Tensor) -> Tensor:
        return (features + self.down(nn.functional.gelu(self.up(features)))).square().mean()


def _train_features(rank: int, pins: Mapping[str, object]) -> None:
    features = torch.randn(32, 64, dtype=torch.float64)
    scorer = _Scorer()
    expected = features.clone().requires_grad_()
    copy.deepcopy(scorer)(expected).backward()
    for inputs in ("global", "local"):
        model = autopar.compile(copy.deepcopy(scorer), (features,), cluster="2xcpu", pins=pins, inputs=inputs)
        index, count = model.data_shard if inputs == "local" else (0, 1)
        assert count == (pins.get("dp", 1) if inputs == "local" else 1)
        own = features.chunk(count)[index].clone().requires_grad_()
        model(own).backward()
        assert expected.grad is not None
        _agree(own.grad, expected.grad.chunk(count)[index])


@pytest.mark.parametrize("pins", [{"tp": 2}, {"dp": 2}], ids=["tp", "dp"])
def test_inputs_have_gradients(pins: Mapping[str, object], tmp_path: Path) -> None:
    spawn(2, tmp_path, _train_features, pins)
