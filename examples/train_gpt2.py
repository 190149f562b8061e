"""Train a small GPT-2 on the Python standard library's source text, in 4 processes, next to a single-process copy.

Run it with ``python examples/train_gpt2.py``: it starts itself under torchrun. Every rank reads the same global batches and
runs the training loop of a single-device script; the only added line is ``autopar.compile``. Rank 0 also trains a plain copy
on the same batches and prints both losses. It exits with 1 if they differ by more than rounding, or if the loss doesn't fall.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

import autopar

BATCH, SEQ = 8, 128
TEXT_BYTES = 2_000_000
LEARNING_RATE = 3e-4
MAX_NORM = 1.0
# Both runs compute in float32 and add in another order, which Adam, dividing each gradient by its own size, passes on to the
# weights. Adding the batch up in four parts in one process, and nothing else, moves the loss by 1.5e-7 and the gradient norm by
# 5e-6 in 30 steps. Mistakes move more: one layer norm's bias gradient times 4 moves them by 3e-6 and 2e-4, one weight's times
# 0.75 by 8e-5 and 5e-3. All gradients doubled leave Adam's steps, and so the loss, as they were: hence the norm as well.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4


def build_model() -> nn.Module:
    """Build a 3M-parameter GPT-2 over bytes with random weights, the same in every process."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4,
        n_embd=256,
        n_head=8,
        vocab_size=256,
        n_positions=SEQ,
        resid_pdrop=0.0,  # a dropout mask would differ from the single process's
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # what transformers would fall back on, with a message from every rank
    return model


def read_text() -> Tensor:
    """Read the standard library's source files, in the order of their names, as byte tokens ``(bytes,)`` int64."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= TEXT_BYTES:
            break
    return torch.frombuffer(text[:TEXT_BYTES], dtype=torch.uint8).long()


def draw_batches(tokens: Tensor, steps: int) -> Iterator[dict[str, Tensor]]:
    """Yield the same `steps` global batches of ``input_ids`` and ``labels`` ``(BATCH, SEQ)`` in every process."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - SEQ, (BATCH,), generator=generator).tolist()
        ids = torch.stack([tokens[start : start + SEQ] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Do one ordinary training step and return the loss before it and the norm of its gradients."""
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def train(steps: int, report_every: int) -> int:
    """Train the parallel model, and on rank 0 its plain copy, and return the exit code."""
    torch.set_num_threads(1)
    is_first = int(os.environ["RANK"]) == 0
    model = build_model()
    reference = copy.deepcopy(model)
    model = autopar.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE)

    losses: list[float] = []
    differences: list[float] = []
    norm_differences: list[float] = []
    seconds, counted = 0.0, 0
    for step, batch in enumerate(draw_batches(read_text(), steps), start=1):
        start = time.perf_counter()
        loss, norm = train_step(model, optimizer, batch)
        elapsed = time.perf_counter() - start
        if not is_first:
            continue
        if step == 1:
            print(f"first step, with capture and planning: {elapsed:.1f} s\n{autopar.summarize(model.plan)}\n", flush=True)
            print("step  tokens/s  loss, parallel  loss, one process  difference of loss  of gradient norm", flush=True)
        else:
            seconds, counted = seconds + elapsed, counted + 1
        expected, expected_norm = train_step(reference, reference_optimizer, batch)
        losses.append(loss)
        differences.append(abs(loss - expected) / expected)
        norm_differences.append(abs(norm - expected_norm) / expected_norm)
        if step == 1 or step % report_every == 0 or step == steps:
            rate = f"{counted * BATCH * SEQ / seconds:8.0f}" if counted else "       -"
            print(f"{step:4d}  {rate}  {loss:14.6f}  {expected:17.6f}", end="")
            print(f"  {differences[-1]:18.1e}  {norm_differences[-1]:16.1e}", flush=True)
            seconds, counted = 0.0, 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return judge(losses, differences, norm_differences) if is_first else 0


def judge(losses: list[float], differences: list[float], norm_differences: list[float]) -> int:
    """Print what the run showed, step by step, and return 0 if it is as it must be."""
    # Every step is asked, not the largest: max() passes over a NaN, which must not agree with anything.
    agrees = all(x <= LOSS_TOLERANCE for x in differences) and all(x <= NORM_TOLERANCE for x in norm_differences)
    falls = losses[-1] < 0.8 * losses[0]
    print(f"\nlargest relative difference: loss {max(differences):.1e} (allowed {LOSS_TOLERANCE:.0e})", end=", ")
    print(f"gradient norm {max(norm_differences):.1e} (allowed {NORM_TOLERANCE:.0e}): {'agrees' if agrees else 'DISAGREES'}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} ({'falls' if falls else 'DOES NOT FALL by a fifth'})", flush=True)
    return 0 if agrees and falls else 1


def main() -> int:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="processes to start (default: 4)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: 30)")
    parser.add_argument("--report-every", type=int, default=5, metavar="N", help="print every N steps (default: 5)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return train(options.steps, options.report_every)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    print(f"training in {options.ranks} processes on this machine", flush=True)
    return subprocess.call([*torchrun, __file__, *sys.argv[1:]], env={"OMP_NUM_THREADS": "1", **os.environ})


if __name__ == "__main__":
    sys.exit(main())
