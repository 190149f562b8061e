"""Times steps of a model whose parameters are stored split over two ranks, with gathers begun ahead and without, in one run.

Two processes over gloo, one thread each: a Llama-like model under ``fsdp=True``. The compiled models take turns, in an order that rotates
from round to round, so that whatever slows the machine down slows all of them. Printed beside each is what its plan predicts for the
machine as it was measured in the same rounds (`tests.benchmarks.machine`): the step, and the communication in it that nothing hides.
Measured, that is what a step takes longer than one in which nothing is exchanged; ``waiting`` is the part of it in which the process stood
still.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.machine import Race

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


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a race of such models."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", type=int, default=10, help="the rounds in which other programs took the least of the machine")
    return parser


def make_race(arguments: argparse.Namespace, pins: dict[str, dict[str, object]]) -> Race:
    """A race between plans with these pins, by name."""
    ids = torch.randint(VOCABULARY, (arguments.batch, arguments.seq), generator=torch.Generator().manual_seed(1))
    made = partial(build, arguments.layers, arguments.hidden)
    return Race(made, {"input_ids": ids, "labels": ids}, pins, arguments.warmup, arguments.rounds, arguments.keep)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    pins: dict[str, dict[str, object]] = {f"{ahead} ahead": {"dp": 2, "fsdp": True, "prefetch": ahead} for ahead in arguments.ahead}
    make_race(arguments, pins).run()


if __name__ == "__main__":
    main()
