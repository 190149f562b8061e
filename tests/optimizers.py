"""Which optimizers train a compiled model as on one device: each on split storage, split features and a pipeline.

``python -m tests.optimizers`` trains with every optimizer in two processes under each plan and writes ``docs/optimizers.md``; the suite
runs some of them (`tests/test_cases_tensors.py`).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers.optimization import Adafactor

import autopar
from autopar.runtime.dispatch import gather
from tests.processes import spawn

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
WIDTH, STEPS = 8, 3

PLANS: Mapping[str, Mapping[str, object]] = {
    "fsdp": {"dp": 2, "fsdp": True},
    "tp": {"tp": 2},
    "pp": {"pp": 2, "microbatches": 2},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """A few blocks, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


class Lion(Optimizer):
    """The sign of an interpolated momentum."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(momentum.mul(first).add(p.grad, alpha=1 - first).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - second)


class Shampoo(Optimizer):
    """A preconditioner per dim of a matrix, by inverse roots of sums of squared gradients."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                for dim, size in enumerate(p.shape):
                    flat = update.transpose(0, dim).contiguous().view(size, -1)
                    sums = self.state[p].setdefault(dim, torch.eye(size, dtype=p.dtype) * 1e-3)
                    sums.add_(flat @ flat.t())
                    values, vectors = torch.linalg.eigh(sums)
                    root = vectors @ torch.diag(values.clamp(min=1e-12) ** (-0.5 / p.dim())) @ vectors.t()
                    update = (root @ flat).view_as(update.transpose(0, dim)).transpose(0, dim)
                p.add_(update, alpha=-group["lr"])


class Sophia(Optimizer):
    """A clipped momentum over an estimate of curvature, here of squared gradients; indexes and writes through views."""

    def __init__(self, params: Any, lr: float = 1e-2, rho: float = 0.04) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p.data))
                curvature = state.setdefault("curvature", p.data.new_zeros(p.shape))
                momentum.mul_(0.9).add_(p.grad, alpha=0.1)
                curvature.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                ratio = (momentum.abs() / (group["rho"] * curvature + 1e-15)).clamp(None, 1)
                ratio[curvature == 0] = 0
                p.view(-1)[:].addcmul_(momentum.sign().view(-1), ratio.view(-1), value=-group["lr"])


class Sam(Optimizer):
    """A descent from where a step up the gradient leads; needs a closure."""

    def __init__(self, params: Any, lr: float = 1e-2, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        ascent = [p.grad * (self.defaults["rho"] / (norm + 1e-12)) for p in parameters]
        for p, step in zip(parameters, ascent, strict=True):
            p.add_(step)
        with torch.enable_grad():
            closure()
        for p, step in zip(parameters, ascent, strict=True):
            p.sub_(step).sub_(p.grad, alpha=self.defaults["lr"])


def _muon(parameters: list[nn.Parameter]) -> list[Optimizer]:
    matrices, rest = [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(rest)]


def _groups(parameters: list[nn.Parameter]) -> list[Optimizer]:
    matrices, rest = [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]
    return [torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3}], lr=1e-2)]


def _one(make: Callable[..., Optimizer], **options: Any) -> Callable[[list[nn.Parameter]], list[Optimizer]]:
    return lambda parameters: [make(parameters, **options)]


OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter]], list[Optimizer]]] = {
    "Adadelta": _one(torch.optim.Adadelta),
    "Adafactor": _one(torch.optim.Adafactor),
    "Adafactor, transformers": _one(Adafactor, lr=1e-2, relative_step=False),
    "Adagrad": _one(torch.optim.Adagrad),
    "Adam": _one(torch.optim.Adam, lr=1e-2),
    "Adam, amsgrad": _one(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "Adamax": _one(torch.optim.Adamax),
    "AdamW": _one(torch.optim.AdamW, lr=1e-2),
    "AdamW, foreach": _one(torch.optim.AdamW, lr=1e-2, foreach=True),
    "AdamW, for loop": _one(torch.optim.AdamW, lr=1e-2, foreach=False),
    "AdamW, fused": _one(torch.optim.AdamW, lr=1e-2, fused=True),
    "AdamW, tensor lr": lambda parameters: [torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), foreach=False)],
    "AdamW, two groups": _groups,
    "ASGD": _one(torch.optim.ASGD),
    "LBFGS": _one(torch.optim.LBFGS, lr=0.1, max_iter=3, history_size=4),
    "LBFGS, strong Wolfe": _one(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
    "Lion": _one(Lion),
    "Muon": _muon,
    "NAdam": _one(torch.optim.NAdam),
    "RAdam": _one(torch.optim.RAdam),
    "RMSprop": _one(torch.optim.RMSprop, centered=True, momentum=0.9),
    "Rprop": _one(torch.optim.Rprop),
    "SAM": _one(Sam),
    "SGD": _one(torch.optim.SGD, lr=0.1),
    "SGD, momentum": _one(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD, Nesterov, foreach": _one(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD, fused": _one(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Shampoo": _one(Shampoo),
    "Sophia": _one(Sophia),
    "SparseAdam": _one(torch.optim.SparseAdam),
}


def train(model: nn.Module, make: Callable[[list[nn.Parameter]], list[Optimizer]]) -> dict[str, Tensor]:
    """A few steps with clipping and a schedule; the parameters afterwards."""
    optimizers = make(list(model.parameters()))
    schedules = [CosineAnnealingLR(optimizer, STEPS + 1) for optimizer in optimizers]
    for number in range(STEPS):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64)

        def run(x: Tensor = x) -> float:
            model.zero_grad()
            loss = model(x)
            loss.backward()
            return float(loss.detach())

        run()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            if isinstance(optimizer, torch.optim.LBFGS | Sam):
                optimizer.step(run)
            else:
                optimizer.step()
            schedule.step()
    return {name: gather(p.detach()).clone() for name, p in model.named_parameters()}


def compare(rank: int, folder: Path, names: Iterable[str], plans: Iterable[str]) -> None:
    """On this rank of two: the largest error of each optimizer under each plan, or the error that refuses it, to a file."""
    results: dict[str, dict[str, float | str]] = {}
    for name in names:
        results[name] = {}
        try:
            expected = train(Net(), OPTIMIZERS[name])
        except Exception as error:
            results[name] = dict.fromkeys(plans, str(error).partition(",")[0])
            continue
        for plan in plans:
            try:
                got = train(autopar.compile(Net(), pins=PLANS[plan]), OPTIMIZERS[name])
                results[name][plan] = max(float((got[key] - value).abs().max() / value.abs().max()) for key, value in expected.items())
            except Exception as error:
                results[name][plan] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(results))


def measure(folder: Path, names: Iterable[str], plans: Iterable[str] = tuple(PLANS)) -> dict[str, dict[str, float | str]]:
    """By optimizer and plan, the largest error relative to a parameter's largest element; ranks must agree."""
    spawn(2, folder, compare, folder, list(names), list(plans))
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return dict(first)


def write_page(results: Mapping[str, Mapping[str, float | str]]) -> str:
    """The page with the table."""
    rows = "\n".join(f"| {name} | {' | '.join(_say(by_plan[plan]) for plan in PLANS)} |" for name, by_plan in results.items())
    return _PAGE.format(steps=STEPS, plans=" | ".join(PLANS), lines=" | ".join("---" for _ in PLANS), rows=rows)


def _say(result: float | str) -> str:
    if isinstance(result, str):
        return f"refused: {result}"
    return "equal" if result == 0 else f"{10.0 ** math.ceil(math.log10(result)):.0e}"


_PAGE = """# Optimizers

This page shows which optimizers train a compiled model as they train on one device.

Each trains a small model in float64 for {steps} steps, with gradients clipped by norm and by value and a learning rate that changes,
in two processes and on one device. The entries bound the largest difference of a parameter, relative to its largest element;
more than 1e-9 would be a failure. `fsdp` stores every parameter split, `tp` splits features, `pp` is a pipeline of two ranks, each of
which owns some parameters. Lion, SAM, Shampoo and Sophia are short ones written for the test (`tests/optimizers.py`), in the way that
such optimizers are written: through views, indices, matrix decompositions and plain tensors beside the parameters.

What one device refuses is refused here too, in the same words.

Make this page again with `python -m tests.optimizers`.

| optimizer | {plans} |
| --- | {lines} |
{rows}
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        measured = measure(Path(made), sys.argv[1:] or OPTIMIZERS)
    if len(sys.argv) > 1:
        print(measured)
    else:
        PAGE.write_text(write_page(measured), encoding="utf-8")
