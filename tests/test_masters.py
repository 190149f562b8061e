"""Float32 masters on one device: the recipe of mixed precision training, bit by bit, for every optimizer that can have them."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import autopar
from autopar.errors import InputError
from autopar.runtime import masters


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).bfloat16()
    model[2].bias.data = torch.randn(4)
    return model


def forward(model: nn.Module, x: Tensor) -> Tensor:
    hidden = model[1](model[0](x))
    return nn.functional.linear(hidden, model[2].weight).float().add(model[2].bias).square().mean()


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    forward(model, torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()).backward()


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    backward(model, seed)
    optimizer.step()


class ByHand:
    """A model, its masters, and an optimizer over these."""

    def __init__(self, make: Any, **options: Any) -> None:
        self.model = build()
        self.masters = [nn.Parameter(p.detach().float()) for p in self.model.parameters()]
        self.optimizer = make(self.masters, **options)

    def step(self, seed: int) -> None:
        backward(self.model, seed)
        for p, master in zip(self.model.parameters(), self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.model.parameters(), self.masters, strict=True):
                p.copy_(master)

    def check(self, model: nn.Module, optimizer: Optimizer) -> None:
        """The other model and optimizer are equal to these in every bit."""
        for p, own, master in zip(model.parameters(), self.model.parameters(), self.masters, strict=True):
            assert torch.equal(p, own)
            state = dict(optimizer.state[p])
            assert ("master" in state) == (p.dtype == torch.bfloat16)
            assert torch.equal(state.pop("master", master.detach()), master)
            expected = self.optimizer.state.get(master, {})
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name
                assert not isinstance(value, Tensor) or state[name].dtype == value.dtype, name


class Counter(Optimizer):
    """Sign descent by a norm of all gradients, and with states from the beginning."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "steps": 0})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["scale"] = torch.full_like(p, 0.1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            norm = torch.stack([p.grad.square().sum() for p in group["params"]]).sum().sqrt()
            for p in group["params"]:
                scale = self.state[p]["scale"].mul_(1.1)
                p.sub_(p.grad.sign() * norm * scale, alpha=group["lr"] / group["steps"])


OPTIMIZERS = [
    (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.SGD, {"lr": 0.01}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.ASGD, {}),
    (Counter, {}),
]


@pytest.mark.parametrize("share", [masters.SHARE_BYTES, 1])
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=lambda x: x.__name__ if isinstance(x, type) else "-".join(x))
def test_equals_the_recipe(make: Any, options: dict[str, Any], share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, masters and moments are equal in every bit, however many gradients there are at a time; float32 weights have no master."""
    monkeypatch.setattr(masters, "SHARE_BYTES", share)
    model, hand = build(), ByHand(make, **options)
    optimizer = autopar.MasterWeights(make, model.parameters(), **options)
    assert isinstance(optimizer, Optimizer)
    counted: list[Optimizer] = []
    for seed in range(4):
        handle = register_optimizer_step_post_hook(lambda stepped, *_: counted.append(stepped))
        step(model, optimizer, seed)
        handle.remove()
        hand.step(seed)
        hand.check(model, optimizer)
    # An optimizer that looks at all parameters at once gets all of them at once.
    shares = len(hand.masters) if share == 1 and make is not Counter else 1
    assert len(counted) == 4 * (shares + 1)
    assert all(state["master"].grad is None for state in optimizer.state.values() if "master" in state)
    groups = [{name: x for name, x in group.items() if name != "params"} for group in optimizer.param_groups]
    assert groups == [{name: x for name, x in group.items() if name != "params"} for group in hand.optimizer.param_groups]
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_small_updates_add_up() -> None:
    """What is lost in bfloat16 alone arrives in the weight."""
    plain, wide = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizers = torch.optim.SGD([plain], lr=2**-12), autopar.MasterWeights(torch.optim.SGD, [wide], lr=2**-12)
    for _ in range(64):
        plain.grad, wide.grad = torch.ones_like(plain), torch.ones_like(wide)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, torch.ones_like(plain))
    assert torch.equal(wide, torch.full_like(wide, 1 - 2**-6))


def test_schedules_groups_hooks_and_closures() -> None:
    """What is set or added beside the step means what it means to the optimizer alone."""
    model, hand = build(), ByHand(torch.optim.AdamW)
    optimizer = autopar.MasterWeights(torch.optim.AdamW, list(model.parameters())[:2])
    hand.optimizer = torch.optim.AdamW(hand.masters[:2])
    optimizer.add_param_group({"params": list(model.parameters())[2:], "weight_decay": 0.5})
    hand.optimizer.add_param_group({"params": hand.masters[2:], "weight_decay": 0.5})
    schedules = [OneCycleLR(x, max_lr=0.01, total_steps=8) for x in (optimizer, hand.optimizer)]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    listed = [group["params"] for group in optimizer.param_groups]
    for seed in range(4):

        def closure(seed: int = seed) -> float:
            assert torch.is_grad_enabled()
            backward(model, seed)
            return 7.0

        assert optimizer.step(closure) == 7.0
        hand.step(seed)
        for schedule in schedules:
            schedule.step()
        hand.check(model, optimizer)
    assert calls == ["before", "after"] * 4
    assert all(now["params"] is before for now, before in zip(optimizer.param_groups, listed, strict=True))


def test_without_a_gradient_and_without_a_step() -> None:
    """Parameters without a gradient stay as they are, without a master, until they get one."""
    model = build()
    optimizer = autopar.MasterWeights(torch.optim.AdamW, model.parameters(), weight_decay=0.5)
    first, *others = model.parameters()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    for p in others:
        p.grad = None
    optimizer.step()
    assert not torch.equal(first, before[0])
    assert all(torch.equal(p, value) for p, value in zip(others, before[1:], strict=True))
    assert set(optimizer.state) == {first}
    step(model, optimizer, 1)
    assert "master" in optimizer.state[others[0]]
    assert float(optimizer.state[others[0]]["step"]) == 1


def test_copies_and_files() -> None:
    """A deep copy, a pickle and a state go on alike; moments of the optimizer alone load in float32, with masters of the weights."""
    model, hand = build(), ByHand(torch.optim.AdamW)
    optimizer = autopar.MasterWeights(torch.optim.AdamW, model.parameters())
    for seed in range(2):
        step(model, optimizer, seed)
        hand.step(seed)
    both = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    loaded = build()
    loading = autopar.MasterWeights(torch.optim.AdamW, loaded.parameters())
    loaded.load_state_dict(model.state_dict())
    loading.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    hand.step(2)
    for other, their in (*both, (loaded, loading)):
        step(other, their, 2)
        hand.check(other, their)
    without = build()
    late = autopar.MasterWeights(torch.optim.AdamW, without.parameters())
    without.load_state_dict(model.state_dict())
    late.load_state_dict(copy.deepcopy(hand.optimizer.state_dict()))
    hand.step(3)
    step(without, late, 3)
    assert all(x.dtype == torch.float32 for state in late.state.values() for x in state.values())


def test_masters_of_other_weights() -> None:
    """A state that was saved with other weights doesn't bring these back: what a parameter holds counts."""
    models = build(), build()
    optimizers = [autopar.MasterWeights(torch.optim.AdamW, model.parameters(), weight_decay=0.0) for model in models]
    for seed, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        step(model, optimizer, seed)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    before = [p.detach().clone() for p in models[1].parameters()]
    optimizers[1].param_groups[0]["lr"] = 0.0
    step(models[1], optimizers[1], 2)
    assert not torch.equal(before[0], next(models[0].parameters()))
    assert all(torch.equal(p, value) for p, value in zip(models[1].parameters(), before, strict=True))


def test_a_step_that_fails_leaves_everything_in_place() -> None:
    """After an error of the optimizer, its groups, states and gradients are the user's own again, and a later step works."""
    model, hand = build(), ByHand(torch.optim.AdamW)
    optimizer = autopar.MasterWeights(torch.optim.AdamW, model.parameters())
    step(model, optimizer, 0)
    hand.step(0)
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        step(model, optimizer, 1)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    hand.check(model, optimizer)
    step(model, optimizer, 1)
    hand.step(1)
    hand.check(model, optimizer)


def test_refusals() -> None:
    """What masters can't do is refused with a remedy."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    made_already: Any = torch.optim.SGD([p], lr=1.0)
    with pytest.raises(InputError, match=r"pass its class, autopar\.MasterWeights\(torch\.optim\.SGD, model\.parameters\(\), lr=1e-4\)$"):
        autopar.MasterWeights(made_already)
    with pytest.raises(InputError, match="makes the optimizer itself"):
        autopar.MasterWeights(made_already, [p])
    with pytest.raises(InputError, match="use it on float32 parameters"):
        autopar.MasterWeights(torch.optim.LBFGS, [p])
    with pytest.raises(InputError, match="leave out differentiable"):
        autopar.MasterWeights(torch.optim.AdamW, [p], differentiable=True)
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(InputError, match="sparse=False"):
        autopar.MasterWeights(torch.optim.SGD, [p]).step()


@pytest.mark.parametrize(
    ("precision", "dtype", "warned"),
    [
        ("bfloat16", torch.bfloat16, "precision='bfloat16' plans .* bfloat16 parameters directly and loses updates below 2\\^-8 "),
        ("masters=True", torch.float16, "precision='masters=True' plans .* float16 parameters directly and loses updates below 2\\^-11 "),
        ("masters=True", torch.float32, None),
        ("model", torch.bfloat16, None),
    ],
)
def test_an_optimizer_without_masters_is_told_of_once(precision: str, dtype: torch.dtype, warned: str | None) -> None:
    model = autopar.compile(nn.Linear(4, 4).to(dtype), precision=precision)
    other, plain, second = (
        make(x.parameters()) for make, x in ((torch.optim.SGD, nn.Linear(4, 4).bfloat16()), *[(torch.optim.AdamW, model)] * 2)
    )
    masters = autopar.MasterWeights(torch.optim.AdamW, model.parameters())
    model(torch.randn(2, 4, dtype=dtype)).sum().backward()
    masters.step()  # what isn't to be told of warns here, which is an error
    other.step()
    remedy = r"of a weight: use autopar\.MasterWeights\(torch\.optim\.AdamW, model\.parameters\(\), \.\.\.\), or precision='model'$"
    with pytest.warns(UserWarning, match=f"^{warned}{remedy}") if warned else nullcontext():
        plain.step()
    plain.step()
    second.step()
