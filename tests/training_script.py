"""A user's script: a pipeline of as many pipeline ranks as torchrun starts, or none, and the losses and gradient norms of three steps."""

from __future__ import annotations

import os

import torch

import autopar
from tests.zoo import ROWS, gpt2_deep, in_float64, labels, tokens

torch.set_num_threads(1)
ranks = int(os.environ.get("WORLD_SIZE", "1"))
pins: dict[str, object] = {"pp": ranks, "microbatches": 4, "schedule": "1f1b", "recompute": "full"}
model = autopar.compile(in_float64(gpt2_deep()[0]), cluster=f"{ranks}xcpu", pins=pins)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    loss = model(input_ids=tokens(step, ROWS), labels=labels(step, ROWS)).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"step {step}: loss {loss.item():.12f}, norm {norm.item():.12f}", flush=True)
