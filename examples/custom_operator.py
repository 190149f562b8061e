"""A model with an operator of its own, which a registered rule lets be split.

Alone: ``python examples/custom_operator.py``. In a pipeline: ``torchrun --standalone --nproc-per-node 2 examples/custom_operator.py``. For
the command line: ``autopar plan examples/custom_operator.py:build --cluster 8xA100``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar

WIDTH, LAYERS, STEPS = 64, 4, 50


@torch.library.custom_op("custom_operator::gate", mutates_args=())
def gate(x: Tensor, weight: Tensor) -> Tensor:
    """``sigmoid(x @ weight) * x``: a stand-in for a kernel of yours, which torch can't look into."""
    return torch.sigmoid(x @ weight) * x


@gate.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    share = torch.sigmoid(x @ weight)
    inner = gradient * x * share * (1 - share)
    return gradient * share + inner @ weight.T, x.flatten(0, -2).T @ inner.flatten(0, -2)


gate.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

# Samples and positions are independent. Features stay whole: each of the result needs all of x, and is multiplied with its own.
autopar.register_rule("custom_operator::gate", "b s k!, k! i! -> b s i!", flops=2.0, family="matmul")


class Layer(nn.Module):
    """A gate and a linear layer, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, sequence, WIDTH)``, as `x`."""
        made: Tensor = x + self.out(torch.ops.custom_operator.gate(x, self.weight))
        return made


class Model(nn.Module):
    """Some layers; returns the mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the error of what the layers make of `x` against `y`, both ``(batch, sequence, WIDTH)``."""
        return nn.functional.mse_loss(self.layers(x), y)


def build(batch: int = 32) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model and one batch, as the command line's MODEL argument wants them."""
    torch.manual_seed(0)
    x = torch.randn(batch, 8, WIDTH)
    return Model(), {"x": x, "y": x.roll(1, dims=2)}


def check() -> None:
    """Run the operator in parts and whole: is the rule right?"""
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6, 8), (8, 8)))
    print(f"rule checked: {len(autopar.check_rule('custom_operator::gate', x, weight))} ways to split", flush=True)


def main() -> None:
    """Check the rule, train on one fixed batch, and print the loss on rank 0; on two ranks or more, in a pipeline of two."""
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        check()
    model, batch = build()
    pins = {"pp": 2, "microbatches": 4} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    model = autopar.compile(model, pins=pins)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_first and step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
