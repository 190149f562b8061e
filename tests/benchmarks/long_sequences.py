"""Measures long sequences in real processes: the memory that training takes, and the bytes that attentions send.

``python -m tests.benchmarks.long_sequences PART`` prints tables, in Markdown; `tests.benchmarks.ring` measures rings by themselves:

- ``memory``: the longest sequence whose training fits a fixed memory per process on 1, 2 and 4 ranks, and the peak at a fixed length,
  predicted and measured as `tests.benchmarks.memory` does;
- ``bytes``: what each rank sends in a step of a Llama under ``attention=gather``, ``ring`` and ``ulysses``, beside closed forms.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import autopar
from autopar.ops import GroupAxis
from autopar.replaced import replaced
from tests.benchmarks import memory
from tests.benchmarks.ring import on_ranks

RANKS = (1, 2, 4)
WORDS, WIDTH, LAYERS, HEADS = 256, 64, 2, 4


def build(length: int, kv_heads: int = HEADS) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small Llama with random weights and one sequence: activations are nearly all of its memory."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=176,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        vocab_size=WORDS,
        max_position_embeddings=length,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"
    ids = torch.randint(WORDS, (1, length), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids.clone()}


def pins_of(ranks: int, attention: str = "ring") -> dict[str, Any]:
    """Pins that split the sequence over all ranks; a ring in zigzag."""
    if ranks == 1:
        return {"recompute": "none"}
    pins: dict[str, Any] = {"cp": ranks, "attention": attention, "recompute": "none"}
    return pins | {"zigzag": True} if attention == "ring" else pins


# --- memory ------------------------------------------------------------------------------------------------------------------------


def _weigh(ranks: int, length: int, attention: str = "ring") -> tuple[int, int]:
    """Predicted and measured bytes of the fullest rank, in a training step of this length."""
    measured = memory.measure(memory.Case("", partial(build, length), ranks, pins_of(ranks, attention)))
    return measured.total, int(GroupAxis("", dist.group.WORLD).all_reduce(torch.tensor(measured.peak), "max"))


def _find_longest(weigh: Callable[[int], int], budget: int, grain: int) -> tuple[int, int]:
    """The longest sequence, a multiple of `grain`, that fits, and its bytes; the next multiple doesn't fit.

    Bytes grow nearly in proportion to the length, so the search goes where a line through zero and the last point says.
    """
    known: dict[int, int] = {}
    length = grain
    while True:
        known[length] = weigh(length)
        fitting = max((each for each, nbytes in known.items() if nbytes <= budget), default=0)
        above = min((each for each, nbytes in known.items() if nbytes > budget), default=0)
        if above and above - fitting == grain:
            return fitting, known.get(fitting, 0)
        guess = round(length * budget / known[length] / grain) * grain
        length = min(max(guess, fitting + grain), above - grain if above else max(guess, fitting + grain))


def _measure_longest(axis: GroupAxis, budget: int, grain: int) -> list[Any]:
    _quieten()
    return [*_find_longest(lambda length: _weigh(axis.size, length)[1], budget, grain)]


def _measure_lengths(axis: GroupAxis, length: int) -> list[Any]:
    _quieten()
    attentions = ("ring", "gather", "ulysses") if axis.size > 1 else ("",)
    return [[attention, *_weigh(axis.size, length, attention)] for attention in attentions]


def _quieten() -> None:
    transformers.logging.set_verbosity_error()


def _predict(ranks: int, length: int) -> int:
    with redirect_stdout(StringIO()):
        model, batch = build(length)
    return autopar.plan(model, batch, f"{ranks}xcpu", pins=pins_of(ranks)).memory.total


def print_memory(budget: int, length: int, grain: int) -> None:
    """The tables of memory."""
    _quieten()
    print(f"\nThe longest sequence, in steps of {grain}, with at most {budget / 1e6:.0f} MB allocated on every rank at any time.\n")
    print("| ranks | predicted: longest | of one rank | measured: longest | of one rank | its peak MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    first: tuple[int, int] | None = None
    for ranks in RANKS:
        predicted, _ = _find_longest(partial(_predict, ranks), budget, grain)
        (measured, peak), _ = on_ranks(ranks, _measure_longest, budget, grain)
        first = first or (predicted, measured)
        print(
            f"| {ranks} | {predicted:,} | {predicted / first[0]:.2f} | {measured:,} | {measured / first[1]:.2f} | {peak / 1e6:.2f} |",
            flush=True,
        )
    print(f"\nPeak of the fullest rank, {length:,} tokens:\n")
    print(
        "| ranks | attention | predicted MB | measured MB | predicted / measured | of one rank |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    whole = 0
    for ranks in RANKS:
        rows, _ = on_ranks(ranks, _measure_lengths, length)
        for attention, predicted, peak in rows:
            whole = whole or peak
            title = "ring, zigzag" if attention == "ring" else attention
            numbers = f"{predicted / 1e6:.2f} | {peak / 1e6:.2f} | {predicted / peak:.3f} | {peak / whole:.3f}"
            print(f"| {ranks} | {title} | {numbers} |", flush=True)


# --- bytes -------------------------------------------------------------------------------------------------------------------------

_KINDS = {
    "send": "ring",
    "begin_rotate": "ring",
    "begin_exchange_stack": "ulysses",
    "begin_gather_stack": "gather",
    "begin_reduce_stack": "gather",
}
"""Methods of an axis by the attention that alone uses them in the step that is counted."""


@contextmanager
def counted(sent: Counter[str]) -> Iterator[None]:
    """Inside, the bytes are added up that this rank hands to the process group of the axis cp for other ranks, by `_KINDS`."""
    inside: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        method = getattr(GroupAxis, name)

        def run(axis: GroupAxis, x: Tensor, *arguments: Any) -> Any:
            # Some collectives are made of others, which aren't counted again.
            if axis.name == "cp" and not inside:
                # A message goes to one rank, a part that is gathered to all others; of a stack of parts all but the own one go away.
                copies = {"send": 1, "begin_rotate": 1, "begin_gather_stack": axis.size - 1}.get(name, (axis.size - 1) / axis.size)
                sent[_KINDS[name]] += round(copies * x.nbytes)
            inside.append(name)
            try:
                return method(axis, x, *arguments)
            finally:
                inside.pop()

        return run

    with ExitStack() as stack:
        for name in _KINDS:
            stack.enter_context(replaced(GroupAxis, name, counting(name)))
        yield


def expected_bytes(attention: str, ranks: int, length: int, kv_heads: int) -> tuple[float, float]:
    """What one rank sends for an attention of one layer in float32, forward and backward, by closed forms.

    With B the bytes of a whole tensor of queries, and B' those of one of keys: a ring sends keys and values on N-1 times, (N-1)/N * 2B',
    forward, and in the backward them and their gradients. A gather sends a part of keys and values to all others, and in the backward the
    parts of their gradients. Ulysses sends (N-1)/N of its N-th of queries, keys, values and results; in the backward of their gradients.
    """
    of_keys = length * kv_heads * (WIDTH // HEADS) * 4
    of_queries = length * WIDTH * 4
    share = (ranks - 1) / ranks
    forward = {"ring": 2 * share * of_keys, "gather": 2 * share * of_keys, "ulysses": share / ranks * (2 * of_queries + 2 * of_keys)}[
        attention
    ]
    return forward, 2 * forward if attention == "ring" else forward


def count_bytes(axis: GroupAxis, length: int) -> list[Any]:
    """(key/value heads, attention, bytes that every rank sends in the forward and in the backward of a Llama)."""
    _quieten()
    rows: list[Any] = []
    for kv_heads, attention in itertools.product((HEADS, HEADS // 2), ("gather", "ring", "ulysses")):
        if attention == "ulysses" and kv_heads % axis.size:
            continue
        torch.manual_seed(0)
        model, batch = build(length, kv_heads)
        compiled = autopar.compile(model.train(), batch, pins=pins_of(axis.size, attention))
        sent: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        with counted(sent[0]):
            loss = compiled(**batch).loss
        with counted(sent[1]):
            loss.backward()
        assert set(sent[0]) == set(sent[1]) == {attention}, f"{attention} sends {sent}"
        every: list[Any] = [None] * axis.size
        dist.all_gather_object(every, [phase[attention] for phase in sent])
        rows.append([kv_heads, attention, every])
    return rows


def print_bytes(length: int) -> None:
    """The table of what is sent."""
    print(f"\nBytes that a rank sends in a step of a Llama of {LAYERS} layers, {HEADS} heads of {WIDTH // HEADS}, {length:,} tokens.\n")
    print("| ranks | key/value heads | attention | forward: counted | closed form | backward: counted | closed form |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for ranks in (2, 4):
        rows, _ = on_ranks(ranks, count_bytes, length)
        for kv_heads, attention, every in rows:
            cells = []
            for phase, closed in enumerate(expected_bytes(attention, ranks, length, kv_heads)):
                counts = sorted({each[phase] for each in every})
                cells += [" to ".join(f"{count:,}" for count in counts), f"{LAYERS * closed:,.0f}"]
            print(f"| {ranks} | {kv_heads} | {attention} | {' | '.join(cells)} |", flush=True)


PARTS = ("memory", "bytes")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; both unless given")
    parser.add_argument("--budget", type=int, default=32, help="MB that a process may allocate (default: 32)")
    parser.add_argument("--grain", type=int, default=128, help="the longest sequence is found to this many tokens (default: 128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence whose peak is measured (default: 2048)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        if part == "memory":
            print_memory(options.budget * 10**6, options.length, options.grain)
        else:
            print_bytes(256)


if __name__ == "__main__":
    main()
