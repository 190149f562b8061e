"""A small Llama that learns to write these docs, byte by byte: the model of ``docs/tutorial.md``.

Alone: ``python examples/byte_llama.py``. On two processes: ``torchrun --standalone --nproc-per-node 2 examples/byte_llama.py``. For the
command line: ``autopar plan examples/byte_llama.py:build --cluster 2xcpu``. Needs transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar

BATCH, LENGTH, WORDS = 16, 128, 256
DOCS = Path(__file__).parent.parent / "docs"


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model and one batch, as the command line's MODEL argument wants them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=128, intermediate_size=384, num_attention_heads=4, vocab_size=WORDS, max_position_embeddings=LENGTH
    )
    return LlamaForCausalLM(config), cut_batch(read_text(), torch.Generator().manual_seed(0))


def read_text() -> Tensor:
    """The bytes of all pages, shape (bytes,)."""
    text = b"\n".join(page.read_bytes() for page in sorted(DOCS.glob("*.md")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def cut_batch(text: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random pieces of `text`, shape (BATCH, LENGTH); the model shifts its labels itself."""
    starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
    ids = text[starts + torch.arange(LENGTH)]
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    """Train, print the loss, and save the weights under the names of the original model."""
    parser = argparse.ArgumentParser(description="Train a small Llama on the pages of docs/.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plan", type=Path, help="run this plan instead of searching for one")
    parser.add_argument("--save", type=Path, help="write the weights to this file")
    arguments = parser.parse_args()

    model, _ = build()
    model = autopar.compile(model, plan=None if arguments.plan is None else autopar.Plan.load(arguments.plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text, generator = read_text(), torch.Generator().manual_seed(1)  # every rank cuts the same global batches
    for step in range(arguments.steps):
        loss = model(**cut_batch(text, generator)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and is_first():
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    if arguments.save is not None:
        weights = autopar.full_state_dict(model)  # all ranks take part; the first one gets it
        if is_first():
            torch.save(weights, arguments.save)
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


if __name__ == "__main__":
    main()
