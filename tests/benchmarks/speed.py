"""Times what autopar emits against the same model by hand, step by step in one run.

Two ranks over gloo: a tensor-parallel plan against torch's ``parallelize_module`` in three variants. One rank: the compiled
module against the eager one. A step is forward, backward and AdamW; the programs take turns, in an order that rotates from
round to round, so that whatever slows the machine down slows all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopar

BATCH, SEQ, VOCABULARY = 8, 128, 8192
RANKS = 2
OURS = "autopar"


@dataclass(frozen=True, slots=True)
class Entrant:
    """One program in the race: its model, the optimizer of its parameters, and what a step must run inside."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Do one training step and return the loss before it."""
        with self.around():
            loss = self.model(**batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def build_llama(layers: int = 4) -> nn.Module:
    """Build a Llama with random weights, the same in every process: of 21M parameters, or 3.2M more or less per layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQ,
        use_cache=False,
    )
    return with_named_loss(LlamaForCausalLM(config))


def build_gpt2() -> nn.Module:
    """Build a 17M-parameter GPT-2 with random weights and without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4,
        n_embd=512,
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


def with_named_loss(model: nn.Module) -> nn.Module:
    """A model of transformers that trains, and knows which loss it has."""
    model.loss_type = "ForCausalLM"  # what transformers would fall back on, with a message
    return model.train()


def draw_batch() -> dict[str, Tensor]:
    """Draw token ids and labels ``(BATCH, SEQ)``, the same in every process."""
    ids = torch.randint(VOCABULARY, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


Times = dict[str, list[tuple[float, float]]]
"""Of every entrant and step: seconds, and CPU seconds, which other work on the machine disturbs less."""


class Steps(Protocol):
    """What can race: it does a step on a batch, and gives the loss."""

    def step(self, batch: Mapping[str, Tensor], /) -> float:
        """Do one step and return the loss before it."""
        ...


def race(entrants: Mapping[str, Steps], warmup: int, rounds: int, batch: Mapping[str, Tensor]) -> Times:
    """Let the entrants take turns, check that their losses agree, and return the times of each one's steps."""
    names = list(entrants)
    times: Times = {name: [] for name in names}
    for number in range(warmup + rounds):
        losses = {}
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if dist.is_initialized():
                dist.barrier()
            start, start_of_cpu = time.perf_counter(), time.process_time()
            losses[name] = entrants[name].step(batch)
            if number >= warmup:
                times[name].append((time.perf_counter() - start, time.process_time() - start_of_cpu))
        if max(losses.values()) - min(losses.values()) > 1e-3 * abs(losses[names[0]]):
            raise SystemExit(f"the programs don't compute the same: losses of step {number} are {losses}")
    return times


# --- by hand ----------------------------------------------------------------------------------------------------------------


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every entrant."""
    return torch.optim.AdamW(model.parameters(), lr=3e-4)


def plan_layers(model: Any) -> dict[str, Any]:
    """Attention and MLP split as Megatron does; one all-reduce after each."""
    styles: dict[str, Any] = {}
    for layer in range(len(model.model.layers)):
        path = f"model.layers.{layer}."
        styles |= {f"{path}self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        styles |= {f"{path}mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        styles |= {f"{path}self_attn.o_proj": RowwiseParallel(), f"{path}mlp.down_proj": RowwiseParallel()}
    return styles


def _plan_vocabulary() -> dict[str, Any]:
    """The embedding and the head split over the vocabulary, for a loss that doesn't gather the logits."""
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


def _plan_sequence(model: Any) -> dict[str, Any]:
    """Between attention and MLP the sequence is split: reduce-scatter and all-gather in the place of all-reduce."""
    styles: dict[str, Any] = {"model.norm": SequenceParallel(use_local_output=True)}
    for layer in range(len(model.model.layers)):
        path = f"model.layers.{layer}."
        styles |= {f"{path}{name}": SequenceParallel(use_local_output=True) for name in ("input_layernorm", "post_attention_layernorm")}
        styles[f"{path}self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
            use_local_output=True,
        )
        styles[f"{path}mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True)
        styles[f"{path}self_attn.o_proj"] = RowwiseParallel(output_layouts=Shard(1))
        styles[f"{path}mlp.down_proj"] = RowwiseParallel(output_layouts=Shard(1))
    styles["model.layers.0"] = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True)
    styles["lm_head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
    return styles


def enter_by_hand() -> dict[str, Entrant]:
    """The variants a person would write: Megatron's, with a split vocabulary, with a split sequence too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    entrants = {}
    for name in ("layers", "layers, vocabulary", "layers, vocabulary, sequence"):
        model = build_llama()
        styles = plan_layers(model)
        if "vocabulary" in name:
            styles |= _plan_vocabulary()
        if "sequence" in name:
            styles |= _plan_sequence(model)
        parallelize_module(model, mesh, styles)
        entrants[f"by hand: {name}"] = Entrant(model, adamw(model), loss_parallel if "vocabulary" in name else nullcontext)
    return entrants


# --- the races --------------------------------------------------------------------------------------------------------------


def save_slowest(times: Times, folder: str) -> None:
    """Write the times of the slowest rank to a file of the folder, on the first one: a step has ended when it has on all ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, times)
    if dist.get_rank() == 0:
        slowest = {name: [max(step) for step in zip(*(ranks[name] for ranks in gathered), strict=True)] for name in times}
        Path(folder, "times.json").write_text(json.dumps(slowest))


def run_ranks(work: Callable[..., None], ranks: int, *arguments: Any) -> Times:
    """What `work`, called with (rank, folder, *arguments) on each of some processes, saved by `save_slowest`."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, *arguments), nprocs=ranks)
        times: Times = json.loads(Path(folder, "times.json").read_text())
    return times


def _run_rank(rank: int, folder: str, warmup: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    try:
        model = autopar.compile(build_llama(), draw_batch(), pins={"tp": RANKS})
        entrants = {OURS: Entrant(model, adamw(model)), **enter_by_hand()}
        save_slowest(race(entrants, warmup, rounds, draw_batch()), folder)
    finally:
        dist.destroy_process_group()


def race_two_ranks(warmup: int, rounds: int) -> Times:
    """Times of the tensor-parallel programs, the slower rank's."""
    return run_ranks(_run_rank, RANKS, warmup, rounds)


def race_one_rank(build: Callable[[], nn.Module], warmup: int, rounds: int) -> Times:
    """Times of the compiled module and of the eager one, in this process."""
    eager = build()
    model = autopar.compile(copy.deepcopy(eager), draw_batch())
    return race({OURS: Entrant(model, adamw(model)), "eager": Entrant(eager, adamw(eager))}, warmup, rounds, draw_batch())


def describe(title: str, times: Times, target: float) -> str:
    """Medians with quartiles, and the ratio of our median to the fastest other one's."""
    lines = [f"{title}, {len(times[OURS])} steps each: median [quartiles] of seconds, median of CPU seconds"]
    seconds = {name: [step[0] for step in steps] for name, steps in times.items()}
    cpu = {name: statistics.median(step[1] for step in steps) for name, steps in times.items()}
    for name, each in seconds.items():
        lines.append(f"  {name:38} {_quartiles(each)}  {cpu[name]:.3f}")
    medians = {name: statistics.median(each) for name, each in seconds.items() if name != OURS}
    fastest = min(medians, key=lambda name: medians[name])
    ratio = statistics.median(seconds[OURS]) / medians[fastest]
    pairs = [ours / other for ours, other in zip(seconds[OURS], seconds[fastest], strict=True)]
    lines.append(f"  autopar / {fastest}: {ratio:.3f}, target {target:.2f}: {'met' if ratio <= target else 'MISSED'}")
    lines.append(f"  of the same round: {_quartiles(pairs)}; of CPU seconds: {cpu[OURS] / cpu[fastest]:.3f}")
    return "\n".join(lines)


def _quartiles(numbers: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Run the races and print what they showed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each program (default: 30)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before these (default: 5)")
    parser.add_argument("--only", choices=("two", "one"), help="only the races over this many ranks")
    options = parser.parse_args()
    # The ranks are started from here and take it over; one thread each, as many as there are cores to share.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if options.only != "one":
        print(describe("Llama, two ranks over gloo", race_two_ranks(options.warmup, options.rounds), 1.0), flush=True)
    if options.only != "two":
        for name, build in (("Llama", build_llama), ("GPT-2", build_gpt2)):
            print(describe(f"{name}, one rank", race_one_rank(build, options.warmup, options.rounds), 1.02), flush=True)


if __name__ == "__main__":
    main()
