"""A transformers model that returns its loss alone, so that its head and its cross entropy can be computed in chunks of the logits.

The command line's ``hf:CONFIG`` calls a model as it is. That returns the logits beside the loss, so they are needed whole. Instead:
``autopar plan examples/loss_only.py:build --cluster 8xH100 --pin loss_chunks=8``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

CONFIG = Path(__file__).parent / "configs" / "llama-3-8b"


class LossOnly(nn.Module):
    """A causal model, of whose outputs only the loss is returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of the next tokens, both inputs ``(batch, seq)``."""
        loss: Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return loss


def build(batch: int = 8, seq: int = 2048, dtype: str = "bfloat16", layers: int | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the configuration's model, or so many layers of it, and one batch, on the meta device: to plan with, not to run."""
    config = AutoConfig.from_pretrained(CONFIG, use_cache=False, **({} if layers is None else {"num_hidden_layers": layers}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        ids = torch.zeros(batch, seq, dtype=torch.int64)
    return LossOnly(model), {"input_ids": ids, "labels": ids}
