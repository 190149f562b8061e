"""The optimizer over this rank's parts: AdamW, elementwise, so that parts are updated as the whole would be."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Updates:
    """AdamW over parts of parameters; those of a lower precision have a float32 copy that is updated, if `masters`."""

    def __init__(self, parts: Iterable[Tensor], *, lr: float, weight_decay: float, masters: bool) -> None:
        self.parts = [part for part in parts if part.requires_grad]
        self.masters = [part.detach().float().requires_grad_() if masters and part.dtype.itemsize < 4 else part for part in self.parts]
        # A pipeline rank may store nothing.
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=weight_decay) if self.masters else None

    def step(self) -> None:
        """Update every part by its gradient, and drop the gradients."""
        if self.optimizer is None:
            return
        for part, master in zip(self.parts, self.masters, strict=True):
            if master is not part and part.grad is not None:
                master.grad, part.grad = part.grad.float(), None
        self.optimizer.step()
        with torch.no_grad():
            for part, master in zip(self.parts, self.masters, strict=True):
                if master is not part:
                    part.copy_(master)
        self.optimizer.zero_grad()
