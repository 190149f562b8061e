"""Optimizers over parts and over float32 masters, on two ranks. Each case is one test."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.replaced import replaced
from autopar.runtime.dispatch import gather
from autopar.runtime.local_steps import ELEMENTWISE
from tests.processes import Case, Outcomes, run_cases

TP: Mapping[str, object] = {"tp": 2}
DP: Mapping[str, object] = {"dp": 2, "fsdp": False}
FSDP: Mapping[str, object] = {"dp": 2, "fsdp": True}
PP: Mapping[str, object] = {"pp": 2, "microbatches": 2}
ZERO: Mapping[str, object] = {"dp": 2, "zero": 2}
PLANS = (TP, DP, ZERO, FSDP, PP)
SIZE = 16

CASES: list[Case] = []


def case(function: Case) -> Case:
    """Mark a function that both ranks run."""
    CASES.append(function)
    return function


class Sums(nn.Module):
    """Four layers side by side. The loss is linear in their weights, so with small integers gradients are exact in any precision."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(4))
        self.gain = nn.Parameter(torch.randn(SIZE, dtype=torch.float32))
        self.unused, self.scalar = nn.Parameter(torch.randn(SIZE)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x * self.gain.to(x.dtype) + x * self.scalar
        for layer in self.layers:
            total = total + layer(x)
        return (total * y).sum()


def build(seed: int = 0, dtype: torch.dtype = torch.bfloat16, *, frozen: bool = False) -> Sums:
    """The model in low precision, but for one parameter; with `frozen`, that without a use needs no gradient either."""
    model = Sums(seed)
    model.unused.requires_grad_(not frozen)
    for p in [*model.layers.parameters(), model.unused, model.scalar]:
        p.data = p.data.to(dtype)
    return model


def batch(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-2, 3, (8, SIZE), generator=generator).to(dtype) for _ in range(2))
    return x, y


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather(p.detach()).clone() for name, p in model.named_parameters()}


def states_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The states of all parameters, as whole tensors, by name."""
    states = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return {f"{name} {key}": gather(x).clone() for name, state in states.items() for key, x in state.items() if isinstance(x, Tensor)}


def check_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal in every bit."""
    assert got
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), f"{name} differs by up to {float((got[name] - value).abs().max()):.1e}"


# --- parts ------------------------------------------------------------------------------------------------------------------------


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every elementwise optimizer, tensor by tensor and by lists, with the options that have states and branches of their own."""
    with_momentum = {"momentum": 0.9}
    options: dict[str, list[dict[str, Any]]] = {
        "SGD": [{}, with_momentum | {"nesterov": True}],
        "RMSprop": [with_momentum | {"centered": True}],
        "Adam": [{}, {"amsgrad": True, "maximize": True}],
        "NAdam": [{"decoupled_weight_decay": True}],
    }
    names = [name for name in vars(torch.optim) if name.lower() in {*ELEMENTWISE, "adamw"} and isinstance(getattr(torch.optim, name), type)]
    assert len(names) == len(ELEMENTWISE) + 1
    for name in names:
        for more in options.get(name, [{}]):
            decay = {} if name == "Rprop" else {"weight_decay": 0.1}
            for foreach in (None, True):
                yield name, {"lr": 0.01, "foreach": foreach} | decay | more
    for name in ("Adam", "AdamW"):
        yield name, {"lr": 0.01, "fused": True}
    yield "AdamW", {"lr": torch.tensor(0.01)}


@contextmanager
def torch_alone() -> Iterator[None]:
    """Inside, optimizers step DTensors as torch does."""
    with ExitStack() as stack:
        for name in ELEMENTWISE:
            module = importlib.import_module(f"torch.optim.{name}")
            stack.enter_context(replaced(module, name, getattr(module, name).__wrapped__))
        yield


class CountOps(TorchDispatchMode):
    """Counts ops that DTensors are dispatched for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += any(isinstance(x, DTensor) for x in pytree.tree_leaves((args, kwargs)))
        return func(*args, **kwargs)


def take_steps(model: nn.Module, name: str, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Parameters and states after three steps from the same gradients, and how many ops of DTensors the last took."""
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    for _ in range(2):
        optimizer.step()
    with CountOps() as ops:
        optimizer.step()
    for p in model.parameters():
        for x in optimizer.state.get(p, {}).values():
            if isinstance(x, DTensor):
                assert (x.device_mesh, x.placements, x.shape) == (p.device_mesh, p.placements, p.shape)
            else:
                assert x.dim() == 0
    return whole(model), states_of(model, optimizer), ops.count


@case
def parts_are_stepped_as_torch_steps_the_whole() -> None:
    """Elementwise optimizers give torch's own parameters and states in every bit, without dispatching an op of a DTensor."""
    for pins in (FSDP, PP):
        model = autopar.compile(build(), pins=pins)
        model(*batch(0)).backward()
        start = {p: p.detach().clone() for p in model.parameters()}

        def restart(start: Mapping[Tensor, Tensor] = start) -> None:
            with torch.no_grad():
                for p, value in start.items():
                    p.copy_(value)

        for name, options in variants():
            restart()
            with torch_alone():
                expected, expected_states, slow = take_steps(model, name, options)
            restart()
            got, states, count = take_steps(model, name, options)
            check_same(got, expected)
            assert states.keys() == expected_states.keys()
            if states:
                check_same(states, expected_states)
            assert (count, slow > 0) == (0, True), f"{name} {options}: {count} ops of DTensors, {slow} of torch's own"


@case
def gradients_that_are_stored_otherwise() -> None:
    """A gradient that the user left as it came, whole on every rank, is brought to its parameter as torch does."""
    model = autopar.compile(build(), pins=FSDP)
    model(*batch(0)).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weight = model.layers[0].weight
    expected = gather(weight.detach()) - 0.5 * gather(weight.grad)
    weight.grad = weight.grad.redistribute(placements=[torch.distributed.tensor.Replicate()])
    optimizer.step()
    assert torch.equal(gather(weight.detach()), expected)


@case
def a_step_before_the_backward_is_noticed() -> None:
    """Autograd refuses the backward of what was computed with weights from before a step, however the optimizer makes it."""
    for options in ({}, {"foreach": True}, {"fused": True}):
        for optimizer_of in (lambda p, options=options: torch.optim.SGD(p, **options), lambda p: autopar.MasterWeights(torch.optim.SGD, p)):
            first = nn.Linear(SIZE, SIZE)
            model = autopar.compile(nn.Sequential(first, nn.Linear(SIZE, SIZE)).bfloat16(), pins=TP)
            x, _ = batch(0)
            model(x).sum().backward()
            losses = model(x).sum(), first.weight.square().sum()
            optimizer_of(model.parameters()).step()
            for loss in losses:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


# --- masters ----------------------------------------------------------------------------------------------------------------------


class ByHand:
    """The recipe of masters on one device, written out."""

    def __init__(self, make: type[Optimizer], **options: Any) -> None:
        self.model = build()
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in self.model.named_parameters()}
        self.optimizer = make(self.masters.values(), **options)

    def step(self, seed: int) -> None:
        self.model.zero_grad()
        self.model(*batch(seed)).backward()
        for name, p in self.model.named_parameters():
            self.masters[name].grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.masters[name])

    def states(self) -> dict[str, Tensor]:
        states = {name: self.optimizer.state.get(master, {}) for name, master in self.masters.items()}
        found = {f"{name} {key}": x for name, state in states.items() for key, x in state.items() if isinstance(x, Tensor)}
        low = {name for name, p in self.model.named_parameters() if p.dtype == torch.bfloat16 and p.grad is not None}
        return found | {f"{name} master": self.masters[name].detach() for name in low}


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(*batch(seed)).backward()
    optimizer.step()


@case
def masters_equal_the_recipe_on_one_device() -> None:
    """Weights, masters and moments are those of one device in every bit, with a schedule, a frozen group and a float32 parameter."""
    makes: tuple[tuple[type[Optimizer], dict[str, Any]], ...] = (
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 2**-10, "momentum": 0.9, "foreach": True}),
        (torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
    )
    for make, options in makes:
        hand = ByHand(make, **options)
        schedule = StepLR(hand.optimizer, 2)
        ours = []
        for pins in PLANS:
            model = autopar.compile(build(), pins=pins)
            optimizer = autopar.MasterWeights(make, model.parameters(), **options)
            ours.append((model, optimizer, StepLR(optimizer, 2)))
        for seed in range(4):
            hand.step(seed), schedule.step()
            for model, optimizer, scheduled in ours:
                step(model, optimizer, seed), scheduled.step()
                check_same(whole(model), whole(hand.model))
                states = {
                    name: x
                    for name, x in states_of(model, optimizer).items()
                    if not name.startswith("unused") or make is not torch.optim.Adagrad
                }
                expected = {name: x for name, x in hand.states().items() if name in states}
                assert any(name.endswith("master") for name in expected)
                check_same(states, expected)
        for model, optimizer, _ in ours:
            for p in model.parameters():
                assert p.grad is None or p.grad.dtype == p.dtype
                for name, x in optimizer.state.get(p, {}).items():
                    assert x.dim() == 0 or (x.device_mesh, x.placements, x.dtype) == (p.device_mesh, p.placements, torch.float32), name


def load_file(file: bytes, model: nn.Module, optimizer: Optimizer) -> None:
    loaded = torch.load(io.BytesIO(file))
    model.load_state_dict(loaded["m"])
    optimizer.load_state_dict(loaded["o"])


@case
def masters_in_checkpoints() -> None:
    """Masters and moments are saved and loaded in full precision, by rank and whole, before and after the first call, across plans."""
    hand = ByHand(torch.optim.AdamW, lr=1e-2)
    # Torch's distributed checkpoints ask for states of every parameter that requires a gradient, also of those that get none.
    model = autopar.compile(build(frozen=True), pins=TP)
    optimizer = autopar.MasterWeights(torch.optim.AdamW, model.parameters(), lr=1e-2)
    for seed in range(2):
        hand.step(seed), step(model, optimizer, seed)
    saved, states = get_state_dict(model, optimizer)
    dcp.save({"m": saved, "o": states}, checkpoint_id=Path("masters"))
    file = io.BytesIO()
    torch.save({"m": autopar.full_state_dict(model), "o": autopar.full_state_dict(optimizer)}, file)
    files = [file.getvalue()]
    dist.broadcast_object_list(files, 0)
    hand.step(2)
    for pins in (FSDP, PP):
        for steps in (0, 1):
            for kind in ("parts", "whole"):
                other = autopar.compile(build(seed=5, frozen=True), pins=pins)
                theirs = autopar.MasterWeights(torch.optim.AdamW, other.parameters(), lr=0.5)
                for seed in range(steps):
                    step(other, theirs, seed)
                if kind == "parts":
                    saved, states = get_state_dict(other, theirs)
                    loaded = {"m": saved, "o": states}
                    dcp.load(loaded, checkpoint_id=Path("masters"))
                    set_state_dict(other, theirs, model_state_dict=loaded["m"], optim_state_dict=loaded["o"])
                else:
                    load_file(files[0], other, theirs)
                step(other, theirs, 2)
                check_same(whole(other), whole(hand.model))
                states_now, expected = states_of(other, theirs), hand.states()
                check_same({name: states_now[name] for name in expected}, expected)
    if dist.get_rank() == 0:
        single = build(seed=6)
        alone = autopar.MasterWeights(torch.optim.AdamW, single.parameters(), lr=0.5)
        load_file(files[0], single, alone)
        step(single, alone, 2)
        check_same(whole(single), whole(hand.model))


@case
def masters_from_before_the_first_plan() -> None:
    """An optimizer that has stepped a model before it is compiled goes on, and so do states that are made before the first call."""
    for pins in (FSDP, PP):
        hand = ByHand(torch.optim.AdamW, lr=1e-2)
        model = build()
        optimizer = autopar.MasterWeights(torch.optim.AdamW, model.parameters(), lr=1e-2)
        hand.step(0), step(model, optimizer, 0)
        compiled = autopar.compile(model, pins=pins)
        get_state_dict(compiled, optimizer)
        for seed in (1, 2):
            hand.step(seed), step(compiled, optimizer, seed)
            check_same(whole(compiled), whole(hand.model))


@case
def masters_follow_what_is_written_to_parameters() -> None:
    """Weights that are loaded, clipped or edited stay so, and the others keep the precision of their masters."""
    edits: tuple[Any, ...] = (
        lambda p: p[:2].fill_(0.5),
        lambda p: p.data.clamp_(-0.1, 0.1),
        lambda p: p.copy_(torch.full(p.shape, 0.25)),
        lambda p: (p.to_local() if isinstance(p, DTensor) else p)[:1].zero_(),
    )
    for pins in (FSDP,):
        for number, edit in enumerate(edits):
            hand = ByHand(torch.optim.SGD, lr=2**-12)
            model = autopar.compile(build(), pins=pins)
            optimizer = autopar.MasterWeights(torch.optim.SGD, model.parameters(), lr=2**-12)
            hand.step(0), step(model, optimizer, 0)
            with torch.no_grad():
                edit(model.layers[1].weight)
                # On one device the same elements are written, and their masters with them.
                before, after = whole(hand.model)["layers.1.weight"], whole(model)["layers.1.weight"]
                assert not torch.equal(before, after), number
                hand.model.layers[1].weight.copy_(after)
                master = hand.masters["layers.1.weight"]
                master.copy_(torch.where(before == after, master, after.float()))
            hand.step(1), step(model, optimizer, 1)
            check_same(whole(model), whole(hand.model))
            check_same(states_of(model, optimizer), hand.states())


@case
def masters_under_a_scaler() -> None:
    """Scaled float16 gradients are divided in float32, and an infinite one in any rank's part stops the step on every rank."""
    half = torch.float16
    for pins in (TP, FSDP, PP):
        model, expected = autopar.compile(build(dtype=half), pins=pins), build(dtype=half)
        optimizer = autopar.MasterWeights(torch.optim.AdamW, model.parameters(), lr=1e-2)
        alone = autopar.MasterWeights(torch.optim.AdamW, expected.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for seed, spoilt in enumerate((False, True, False)):
            before = whole(model)
            optimizer.zero_grad()
            scaler.scale(model(*batch(seed, half))).backward()
            if spoilt:
                model.layers[3].weight.grad[1, 15] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (8.0 if seed else 16.0)
            if spoilt:
                check_same(whole(model), before)
            else:
                expected.zero_grad()
                expected(*batch(seed, half)).backward()
                alone.step()
            check_same(whole(model), whole(expected))
            check_same(states_of(model, optimizer), states_of(expected, alone))


# --- the tests --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), CASES)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_case(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
