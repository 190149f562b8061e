"""The smallest example: an MLP classifier that trains on one device or on many.

Alone: ``python examples/mlp.py``. On four processes: ``torchrun --standalone --nproc-per-node 4 examples/mlp.py``. For the
command line: ``autopar plan examples/mlp.py:build --cluster 4xA100``.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar

FEATURES, CLASSES, STEPS = 64, 10, 50


class Classifier(nn.Module):
    """Two hidden layers; returns its loss, as transformers models do."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Return the mean cross entropy of `x` ``(batch, FEATURES)`` against `label` ``(batch,)``."""
        return nn.functional.cross_entropy(self.layers(x), label)


def build(batch: int = 256) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model and one batch, as the command line's MODEL argument wants them."""
    torch.manual_seed(0)
    x = torch.randn(batch, FEATURES)
    label = (x @ torch.randn(FEATURES, CLASSES)).argmax(dim=1)
    return Classifier(), {"x": x, "label": label}


def main() -> None:
    """Train on one fixed batch, the same on every rank, and print the loss on rank 0."""
    model, batch = build()
    model = autopar.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if int(os.environ.get("RANK", "0")) == 0 and step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
