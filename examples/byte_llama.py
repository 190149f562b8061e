"""A small Llama that learns a short text by heart, byte by byte: the model of ``docs/tutorial.md``.

Alone: ``python examples/byte_llama.py``. On two processes: ``torchrun --standalone --nproc-per-node 2 examples/byte_llama.py``. For the
command line: ``autopar plan examples/byte_llama.py:build --cluster 2xcpu``. Needs transformers.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar

BATCH, LENGTH, WORDS = 16, 64, 256


def build(batch: int = BATCH, seq: int = LENGTH) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model and one batch, as the command line's MODEL argument wants them; ``--batch`` and ``--seq`` arrive here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=128, intermediate_size=384, num_attention_heads=4, vocab_size=WORDS, max_position_embeddings=seq
    )
    return LlamaForCausalLM(config), cut_batch(read_text(), torch.Generator().manual_seed(0), batch, seq)


def read_text() -> Tensor:
    """The bytes of the Zen of Python, which every Python has, shape (bytes,)."""
    with contextlib.redirect_stdout(io.StringIO()):  # importing it prints it
        import this
    text = codecs.decode(this.s, "rot13").encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def cut_batch(text: Tensor, generator: torch.Generator, batch: int = BATCH, seq: int = LENGTH) -> dict[str, Tensor]:
    """Random pieces of `text`, after whose end it begins anew, shape (batch, seq); the model shifts its labels itself."""
    starts = torch.randint(len(text), (batch, 1), generator=generator)
    ids = text[(starts + torch.arange(seq)) % len(text)]
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    """Train, print the loss, and save the weights under the names of the original model."""
    parser = argparse.ArgumentParser(description="Train a small Llama on the Zen of Python.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plan", type=Path, help="run this plan instead of searching for one")
    parser.add_argument("--save", type=Path, help="write the weights to this file")
    parser.add_argument("--save-batches", type=Path, help="write ten batches that would come next to this file")
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
            print(f"step {step:3d}  loss {loss.item():.3f}", flush=True)
    if arguments.save is not None:
        weights = autopar.full_state_dict(model)  # all ranks take part; the first one gets it
        if is_first():
            torch.save(weights, arguments.save)
    if arguments.save_batches is not None and is_first():
        torch.save([cut_batch(text, generator) for _ in range(10)], arguments.save_batches)
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


if __name__ == "__main__":
    main()
