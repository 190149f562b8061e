"""Times what autopar emits with ``fuse=True`` against torch's compiler on the same model, in turns in one run.

One rank: ``torch.compile(model)``, which makes one graph of all layers, and the eager model. Two ranks over gloo: a tensor-parallel plan
against torch's ``parallelize_module`` whose result goes through ``torch.compile``. A step is forward and backward. Also the seconds that
the first step takes, with empty caches, for two numbers of layers: each distinct layer is compiled once. ``make fuse-bench`` runs it.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopar
from tests.benchmarks.speed import Times, plan_layers, race, run_ranks, save_slowest, with_named_loss

BATCH, SEQ, VOCABULARY, RANKS, WARMUP = 4, 128, 4096, 2, 3
OURS = "autopar, fused"


def build_llama(layers: int = 6) -> nn.Module:
    """Build a Llama with random weights, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQ,
        use_cache=False,
    )
    return with_named_loss(LlamaForCausalLM(config))


def build_gpt2(layers: int = 6) -> nn.Module:
    """Build a GPT-2 with random weights and without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=256,
        n_head=8,
        vocab_size=VOCABULARY,
        n_positions=SEQ,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return with_named_loss(GPT2LMHeadModel(config))


BUILDERS: Mapping[str, Callable[[int], nn.Module]] = {"llama": build_llama, "gpt2": build_gpt2}


def draw_batch() -> dict[str, Tensor]:
    """Draw token ids and labels ``(BATCH, SEQ)``, the same in every process."""
    ids = torch.randint(VOCABULARY, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True, slots=True)
class Entrant:
    """One program in the race."""

    model: nn.Module

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Do forward and backward, and return the loss."""
        loss = self.model(**batch).loss
        loss.backward()
        self.model.zero_grad()
        return float(loss.detach())


def race_one_rank(kind: str, rounds: int) -> Times:
    """The fused program, torch's compiler on the whole model, and the eager model."""
    eager = BUILDERS[kind](6)
    entrants = {
        OURS: Entrant(autopar.compile(copy.deepcopy(eager), draw_batch(), fuse=True)),
        "torch.compile": Entrant(torch.compile(copy.deepcopy(eager), dynamic=False)),  # type: ignore[arg-type]
        "eager": Entrant(eager),
    }
    return race(entrants, WARMUP, rounds, draw_batch())


def _run_rank(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(minutes=9))
    try:
        by_hand = build_llama()
        parallelize_module(by_hand, init_device_mesh("cpu", (RANKS,)), plan_layers(by_hand))
        entrants = {
            OURS: Entrant(autopar.compile(build_llama(), draw_batch(), pins={"tp": RANKS}, fuse=True)),
            "autopar": Entrant(autopar.compile(build_llama(), draw_batch(), pins={"tp": RANKS}, fuse=False)),
            "parallelize_module, torch.compile": Entrant(torch.compile(by_hand, dynamic=False)),  # type: ignore[arg-type]
        }
        save_slowest(race(entrants, WARMUP, rounds, draw_batch()), folder)
    finally:
        dist.destroy_process_group()


def race_two_ranks(rounds: int) -> Times:
    """Times of the tensor-parallel programs, the slower rank's."""
    return run_ranks(_run_rank, RANKS, rounds)


def time_first_step(kind: str, name: str, layers: int) -> float:
    """CPU seconds of compiling and the first step of a model, in this process and its children."""
    model = BUILDERS[kind](layers)
    plan = autopar.plan(model, draw_batch(), "1xcpu")
    torch.compile(lambda x: x.sin() + 1)(torch.ones(8))  # what a process, or a machine, does once
    before = sum(os.times()[:4])
    compiled = autopar.compile(model, draw_batch(), plan=plan, fuse=True) if name == OURS else torch.compile(model, dynamic=False)
    Entrant(compiled).step(draw_batch())  # type: ignore[arg-type]
    return sum(os.times()[:4]) - before


def _first_steps(kind: str) -> str:
    lines = [f"{kind}, one rank: CPU seconds of the first step, with empty caches"]
    for name in (OURS, "torch.compile"):
        seconds = []
        for layers in (2, 6):
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-m", "tests.benchmarks.fusion", "--first", kind, name, str(layers)]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
                seconds.append(
                    float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1])
                )
        lines.append(f"  {name:38} 2 layers {seconds[0]:.1f}, 6 layers {seconds[1]:.1f}")
    return "\n".join(lines)


def describe(title: str, times: Times, other: str, target: float) -> str:
    """Medians with quartiles, and the ratio of our median to another one's."""
    lines = [f"{title}, {len(times[OURS])} steps each: median [quartiles] of milliseconds, median of CPU milliseconds"]
    seconds = {name: [step[0] for step in steps] for name, steps in times.items()}
    cpu = {name: statistics.median(step[1] for step in steps) for name, steps in times.items()}
    for name, each in seconds.items():
        low, middle, high = statistics.quantiles([1e3 * x for x in each], n=4)
        lines.append(f"  {name:38} {middle:.1f} [{low:.1f}, {high:.1f}]  {1e3 * cpu[name]:.1f}")
    ratio = statistics.median(seconds[OURS]) / statistics.median(seconds[other])
    of_rounds = statistics.median(ours / theirs for ours, theirs in zip(seconds[OURS], seconds[other], strict=True))
    lines.append(f"  ratio to {other}: {ratio:.3f}, target {target:.2f}: {'met' if ratio <= target else 'MISSED'}")
    lines.append(f"  median of the rounds' ratios {of_rounds:.3f}; of CPU seconds {cpu[OURS] / cpu[other]:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Run the races and print what they showed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each program (default: 30)")
    parser.add_argument("--only", choices=("llama", "gpt2", "two", "first"), help="only one of the races")
    parser.add_argument("--first", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # The ranks are started from here and take it over; one thread each, as many as there are cores to share.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if options.first:
        kind, name, layers = options.first
        print(time_first_step(kind, name, int(layers)))
        return
    for kind in BUILDERS:
        if options.only in (None, kind):
            print(describe(f"{kind}, one rank", race_one_rank(kind, options.rounds), "torch.compile", 1.02), flush=True)
    if options.only in (None, "two"):
        print(describe("llama, two ranks", race_two_ranks(options.rounds), "parallelize_module, torch.compile", 1.0), flush=True)
    if options.only in (None, "first"):
        print(_first_steps("llama"), flush=True)


if __name__ == "__main__":
    main()
