"""Pipelines in real processes: a user's loop under `autopar.compile` against the same loop on one device."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import InputError
from autopar.schedules.families import SCHEDULES
from tests.helpers import tree_allclose
from tests.processes import spawn
from tests.zoo import DEEP, ROWS, SEQ, VOCAB, gpt2_deep, in_float64, labels, tokens

TOLERANCE = 1e-9
RANKS = 4
PINS: Mapping[str, Mapping[str, object]] = {
    "pp=2 x tp=2": {"pp": 2, "tp": 2, "vocabulary": True, "schedule": "1f1b", "microbatches": 4, "recompute": "full"},
    "pp=2 x dp=2": {"pp": 2, "dp": 2, "fsdp": True, "schedule": "zb-v", "microbatches": 4},
    "tp=4": {"tp": 4, "vocabulary": True},
}
# What some schedules are pinned with.
WITH: Mapping[str, Mapping[str, object]] = {
    "1f1b": {"recompute": "full"},
    "interleaved": {"chunks": 2, "recompute": "selective"},
    "zb-h1": {"recompute": "full"},
    "v-half": {"recompute": "selective"},
}


def _model(name: str) -> nn.Module:
    return in_float64(DEEP[name]()[0])


def _compile(name: str, pins: Mapping[str, object], **options: Any) -> autopar.CompiledModule:
    return autopar.compile(_model(name), cluster=f"{dist.get_world_size()}xcpu", pins=pins, **options)


def _batch(seed: int, rows: int = ROWS) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed, rows), "labels": labels(seed, rows)}


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _states(module: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(x.detach()).clone() for name, x in module.named_parameters()}


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


def _agree(actual: Any, expected: Any) -> None:
    tree_allclose(actual, expected, rtol=TOLERANCE)


def _both(model: nn.Module, reference: nn.Module, work: Callable[[nn.Module], Tensor]) -> None:
    """Do something with both, starting without gradients; what it gives and all gradients agree."""
    results = []
    for module in (model, reference):
        module.zero_grad()
        results.append(_whole(work(module).detach()))
    _agree(results[0], results[1])
    found = _gradients(model)
    assert len(found) == len(list(model.parameters()))
    _agree(found, _gradients(reference))


# --- what users do ---


def _train(model: nn.Module, reference: nn.Module, steps: int = 3) -> None:
    """A loop as users write it, on both."""
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-3) for module in (model, reference)]
    for module in (model, reference):
        module.zero_grad()
    for seed in range(steps):
        losses, norms = [], []
        for module, optimizer in zip((model, reference), optimizers, strict=True):
            loss = module(**_batch(seed)).loss
            loss.backward()
            norms.append(_whole(nn.utils.clip_grad_norm_(module.parameters(), 0.1)))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert norms[1] > 0.1
        _agree(losses[0], losses[1])
        _agree(norms[0], norms[1])
        _agree(_states(model), _states(reference))


def _check_evaluation(model: nn.Module, reference: nn.Module) -> None:
    """Other numbers of rows, with labels and without, in between the forward and the backward of a step."""

    def work(module: nn.Module) -> Tensor:
        loss = module(**_batch(3)).loss
        module.eval()
        found = []
        with torch.no_grad():
            for rows in (4, 6):
                found.append(_whole(module(input_ids=tokens(5, rows)).logits).flatten())
            found.append(module(**_batch(6, 2)).loss.reshape(1))
        module.train()
        loss.backward()
        return torch.cat(found)

    _both(model, reference, work)


def _check_other_batches(model: nn.Module, reference: nn.Module) -> None:
    """More rows, shorter ones, and a last batch that fewer micro-batches divide."""
    for rows, length in ((16, SEQ // 2), (6, SEQ)):
        batch = {name: x[:, :length].contiguous() for name, x in _batch(7, rows).items()}

        def work(module: nn.Module, batch: Mapping[str, Tensor] = batch) -> Tensor:
            loss = module(**batch).loss
            loss.backward()
            return loss

        _both(model, reference, work)


def _check_accumulation(model: nn.Module, reference: nn.Module) -> None:
    """Sums over the ranks wait, those of batches of other sizes too."""

    def work(module: nn.Module) -> Tensor:
        (module(**_batch(9)).loss / 3).backward()
        if isinstance(module, autopar.CompiledModule):
            before = _gradients(module)
            with module.no_sync():
                (module(**_batch(10)).loss / 3).backward()
                loss = module(**_batch(11, 4)).loss / 3
                loss.backward()
            _agree(_gradients(module), before)
        else:
            (module(**_batch(10)).loss / 3).backward()
            loss = module(**_batch(11, 4)).loss / 3
            loss.backward()
        last = module(**_batch(12)).loss / 3
        last.backward()
        return torch.stack([loss.detach(), last.detach()])

    _both(model, reference, work)
    with model.no_sync():
        model(**_batch(0)).loss.backward()
    model.zero_grad()
    assert not _gradients(model)
    _both(model, reference, _step)


def _step(module: nn.Module) -> Tensor:
    loss = module(**_batch(8)).loss
    loss.backward()
    return loss


def _check_two_losses(model: nn.Module, reference: nn.Module) -> None:
    """Two steps under way at once, weighted, scaled as a gradient scaler does."""

    def work(module: nn.Module) -> Tensor:
        first, second = module(**_batch(13)).loss, module(**_batch(14, 4)).loss
        total = 1024.0 * (0.25 * first + 0.75 * second)
        total.backward()
        for parameter in module.parameters():
            parameter.grad /= 1024.0
        return total

    _both(model, reference, work)


def _check_loss_outside(model: nn.Module, reference: nn.Module) -> None:
    def work(module: nn.Module) -> Tensor:
        logits = _whole(module(input_ids=tokens(15, ROWS)).logits)
        loss = nn.functional.cross_entropy(logits.view(-1, VOCAB), labels(15, ROWS).view(-1)) + 1e-3 * logits.square().mean()
        loss.backward()
        return loss

    _both(model, reference, work)


def _check_refusals(model: nn.Module) -> None:
    model.zero_grad()
    output = model(**_batch(16))
    output.loss.backward(retain_graph=True)
    once = [_whole(parameter.grad).clone() for parameter in model.parameters() if parameter.grad is not None]
    output.loss.backward()  # a kept graph may be run again, as on one device
    twice = [_whole(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.allclose(second, 2 * first) for first, second in zip(once, twice, strict=True))
    with pytest.raises(InputError, match=r"has had its backward already: call the model again before the next backward\(\)"):
        output.loss.backward()
    with pytest.raises(InputError, match="returns its own loss: that backward has run already"):
        _whole(output.logits).sum().backward()
    outside = _whole(model(input_ids=tokens(17, ROWS)).logits).sum()
    outside.backward(retain_graph=True)
    with pytest.raises(InputError, match="has had its backward already"):
        outside.backward()
    model.zero_grad()


def _check_train_step(model: nn.Module, reference: nn.Module) -> None:
    def work(module: nn.Module) -> Tensor:
        if isinstance(module, autopar.CompiledModule):
            loss = module.train_step(**_batch(18))
            assert not loss.requires_grad
            return loss
        loss = module(**_batch(18)).loss
        loss.backward()
        return loss

    _both(model, reference, work)


def _check_local_inputs(name: str, pins: Mapping[str, object]) -> None:
    """Every rank passes its own rows only; groups along the pipeline pass the same."""
    model = _compile(name, pins, example_inputs=_batch(0), inputs="local")
    index, count = model.data_shard
    assert (index, count) == ((dist.get_rank() % 2, 2) if "dp" in pins else (0, 1))
    fresh = _model(name)
    rows = slice(index * ROWS // count, (index + 1) * ROWS // count)
    losses = []
    for module, batch in ((model, {key: x[rows] for key, x in _batch(19).items()}), (fresh, _batch(19))):
        loss = module(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    _agree(losses[0], losses[1])
    _agree(_gradients(model), _gradients(fresh))


def _check_stored(model: autopar.CompiledModule, pins: Mapping[str, object]) -> None:
    """That the plan is what was asked for, and no rank has everything."""
    pipeline = model.plan.pipeline
    assert (pipeline.ranks, pipeline.microbatches) == (pins.get("pp", 1), pins.get("microbatches", 1))
    assert pipeline.schedule == pins.get("schedule", pipeline.schedule)
    local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    whole = sum(p.numel() for p in model.parameters())
    assert 0 < local < (0.9 if pins.get("pp", 1) == dist.get_world_size() else 0.5) * whole


def _check_checkpoints(models: Mapping[str, autopar.CompiledModule], name: str, folder: str) -> None:
    """What one plan saved loads under the others and under none, by `torch.distributed.checkpoint` and as a plain state."""
    for saved, model in models.items():
        place = f"{folder}/{saved}"
        expected = _states(model)
        dcp.save({"model": model.state_dict()}, checkpoint_id=place)
        plain = {key: _whole(value) for key, value in model.state_dict().items()}
        for other in PINS:
            loaded = _compile(name, PINS[other], example_inputs=_batch(0))
            assert not all(torch.equal(x, expected[key]) for key, x in _states(loaded).items())
            state = {"model": loaded.state_dict()}
            dcp.load(state, checkpoint_id=place)
            loaded.load_state_dict(state["model"])
            tree_allclose(_states(loaded), expected, rtol=0)
            with torch.no_grad():
                for p in loaded.parameters():
                    p.zero_()
            assert not all(torch.equal(x, expected[key]) for key, x in _states(loaded).items())
            loaded.load_state_dict(plain)
            tree_allclose(_states(loaded), expected, rtol=0)
            with torch.no_grad():
                _agree(loaded(**_batch(0)).loss, model(**_batch(0)).loss)
        alone = _model(name)
        state = {"model": alone.state_dict()}
        dcp.load(state, checkpoint_id=place)
        alone.load_state_dict(state["model"])
        tree_allclose(_states(alone), expected, rtol=0)


def _check_optimizer_states(name: str, folder: str) -> None:
    """A run saved under a pipeline goes on under tensor parallelism, and the reverse, as if nothing had happened."""
    for before, after in (("pp=2 x tp=2", "tp=4"), ("tp=4", "pp=2 x dp=2")):
        reference, model = _model(name), _compile(name, PINS[before], example_inputs=_batch(0))
        both = [(module, torch.optim.AdamW(module.parameters(), lr=1e-3)) for module in (reference, model)]
        for module, optimizer in both:
            module(**_batch(0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        place = f"{folder}/optimizer {before}"
        model_state, optimizer_state = dcp.state_dict.get_state_dict(*both[1])
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=place)
        later = _compile(name, PINS[after], example_inputs=_batch(0))
        optimizer = torch.optim.AdamW(later.parameters(), lr=1e-3)
        model_state, optimizer_state = dcp.state_dict.get_state_dict(later, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=place)
        dcp.state_dict.set_state_dict(later, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for module, step in ((reference, both[0][1]), (later, optimizer)):
            module(**_batch(1)).loss.backward()
            step.step()
            step.zero_grad()
        _agree(_states(later), _states(reference))


def _on_four_ranks(rank: int, pins: str, folder: str) -> None:
    reference, model = _model("gpt2_deep"), _compile("gpt2_deep", PINS[pins])
    _train(model, reference)
    _check_stored(model, PINS[pins])
    _check_evaluation(model, reference)
    _check_other_batches(model, reference)
    _check_accumulation(model, reference)
    _check_two_losses(model, reference)
    _check_loss_outside(model, reference)
    _check_train_step(model, reference)
    _check_refusals(model)
    _check_local_inputs("gpt2_deep", PINS[pins])
    _train(model, reference, 1)


@pytest.mark.processes
@pytest.mark.parametrize("pins", ["pp=2 x tp=2", "pp=2 x dp=2"])
def test_a_training_loop_over_a_pipeline_is_that_of_one_device(pins: str, tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _on_four_ranks, pins, str(tmp_path))


def _save_and_load(rank: int, folder: str) -> None:
    models = {}
    for number, (pins, wanted) in enumerate(PINS.items()):
        models[pins] = _compile("llama_tied", wanted)
        optimizer = torch.optim.SGD(models[pins].parameters(), lr=0.1 * (number + 1))
        models[pins].train_step(**_batch(number))
        optimizer.step()
    _check_checkpoints(models, "llama_tied", folder)
    _check_optimizer_states("llama_tied", folder)


@pytest.mark.processes
def test_a_checkpoint_of_a_pipeline_loads_under_every_plan(tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _save_and_load, str(tmp_path))


def _every_schedule(rank: int) -> None:
    for schedule in SCHEDULES:
        pins = {"pp": 2, "microbatches": 4, "schedule": schedule, **WITH.get(schedule, {})}
        reference, model = _model("llama_tied"), _compile("llama_tied", pins)
        _train(model, reference, 2)
        _check_stored(model, pins)
        _check_loss_outside(model, reference)
        _check_evaluation(model, reference)


@pytest.mark.processes
def test_every_schedule_trains_in_two_processes(tmp_path: Path) -> None:
    spawn(2, tmp_path, _every_schedule)


def _with_dropout(rank: int) -> None:
    torch.manual_seed(100 + rank)  # as if every rank had drawn something else before
    model = gpt2_deep(dropout=0.2)[0]
    found = []
    # Streams are a stage's own, so the cut must be the same.
    cut = {"transformer.h.3": {"pp": 0}, "transformer.h.4": {"pp": 1}}
    for recompute in ("none", "full"):
        pins = {"pp": 2, "tp": 2, "schedule": "1f1b", "microbatches": 4, "recompute": recompute, **cut}
        compiled = autopar.compile(copy.deepcopy(model), cluster="4xcpu", pins=pins)
        compiled.prepare(**_batch(0))
        torch.manual_seed(7 + rank)
        losses = [compiled.train_step(**_batch(seed)) for seed in range(2)]
        same = [compiled.train_step(**_batch(0)) for _ in range(2)]
        assert same[0] != same[1]
        found.append((losses, _gradients(compiled)))
        for loss in losses:
            everywhere = loss.clone()
            dist.broadcast(everywhere, 0)
            assert everywhere == loss
    tree_allclose(found[1], found[0], rtol=1e-12)


@pytest.mark.processes
def test_ranks_agree_on_dropout_masks_and_draw_them_again(tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _with_dropout)


@pytest.mark.processes
def test_a_script_under_torchrun_trains_as_it_does_alone(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("training_script.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    lines = []
    for command in ([sys.executable, script], [*torchrun, script]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        lines.append([line for line in done.stdout.splitlines() if line.startswith("step")])
    assert len(lines[0]) == 3
    assert lines[0] == lines[1]
