"""Times steps of a model whose parameters are stored split over two ranks, with gathers begun ahead and without, in one run.

Two processes over gloo, one thread each: a Llama-like model under ``fsdp=True``. The compiled models take turns, in an order that rotates
from round to round, so that whatever slows the machine down slows all of them. Printed beside each is the step that its plan predicts,
and how long the process waited inside of collectives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from tests.processes import spawn

VOCABULARY = 2048


def build(layers: int, hidden: int) -> nn.Module:
    """A Llama-like model with random weights, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"  # what transformers would fall back on, with a message
    return model.train()


class Waits:
    """Seconds that this process waits for other ranks, summed up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, waits are added up."""
        wait = autopar.ops.comm._GroupMessage.wait

        def timed(message: Any) -> Any:
            start = time.perf_counter()
            result = wait(message)
            self.seconds += time.perf_counter() - start
            return result

        with mock.patch.object(autopar.ops.comm._GroupMessage, "wait", timed):
            yield


def _measure(rank: int, arguments: argparse.Namespace, out: str) -> None:
    ids = torch.randint(VOCABULARY, (arguments.batch, arguments.seq), generator=torch.Generator().manual_seed(1))
    steps: dict[int, Callable[[], None]] = {}
    predicted: dict[int, float] = {}
    for ahead in arguments.ahead:
        plan = autopar.plan(build(arguments.layers, arguments.hidden), {"input_ids": ids, "labels": ids}, "1x2xcpu",
                            pins={"dp": 2, "fsdp": True, "prefetch": ahead})  # fmt: skip
        predicted[ahead] = plan.proof.objective_ns / 1e9
        model = autopar.compile(build(arguments.layers, arguments.hidden), plan=plan)
        optimizer = torch.optim.AdamW(model.parameters())

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[ahead] = step
    waits = Waits()
    times: dict[int, list[tuple[float, float]]] = {ahead: [] for ahead in steps}
    names = list(steps)
    with waits.counted():
        for number in range(arguments.warmup + arguments.rounds):
            for ahead in names[number % len(names) :] + names[: number % len(names)]:
                dist.barrier()
                before, start = waits.seconds, time.perf_counter()
                steps[ahead]()
                if number >= arguments.warmup:
                    times[ahead].append((time.perf_counter() - start, waits.seconds - before))
    if rank == 0:
        base = names[0]
        rows = []
        for ahead in names:
            ratios = [mine[0] / theirs[0] for mine, theirs in zip(times[ahead], times[base], strict=True)]
            rows.append(
                {
                    "ahead": ahead,
                    "step_ms": 1e3 * statistics.median(seconds for seconds, _ in times[ahead]),
                    "waiting_ms": 1e3 * statistics.median(waited for _, waited in times[ahead]),
                    f"ratio_to_{base}": statistics.median(ratios),
                    "predicted_ms": 1e3 * predicted[ahead],
                }
            )
        Path(out).write_text(json.dumps(rows), encoding="utf-8")


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        spawn(2, Path(folder), _measure, arguments, str(out))
        for row in json.loads(out.read_text(encoding="utf-8")):
            print("  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
