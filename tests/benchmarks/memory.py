"""Compares the peak memory that plans predict with what a process allocates, to the byte, while it trains.

Every plan trains a small model of transformers on one rank, or on two over gloo: two steps of forward, backward, AdamW and ``zero_grad``,
measured after a first one, in which the optimizer makes its states. What is counted is every allocation of torch's CPU allocator since
before the model was made, as torch's profiler sees it, so stored parameters, inputs and results count, and what was freed doesn't. Buffers
that oneDNN, MKL and gloo allocate for themselves don't go through that allocator and aren't counted.

Training is as transformers' own loops are written: ``outputs = model(**batch); outputs.loss.backward()``, so logits live through the
backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import autopar

Batch = dict[str, Tensor]
STEPS = 3
"""Training steps; the first isn't measured."""


# --- what is counted ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """Allocations of a process, in order.

    Attributes:
        events: (nanoseconds, bytes that are allocated then; address, its bytes, 0 where it is freed, and the operators and marks inside
            which this happened).
        marks: (name, first, last nanosecond) of what stood inside `record_function`.
    """

    events: Sequence[tuple[int, int, int, int, tuple[str, ...]]]
    marks: Sequence[tuple[str, int, int]]

    def peak(self, mark: str) -> int:
        """The most bytes that were allocated at once since the trace began, while something of this name ran."""
        spans = [(first, last) for name, first, last in self.marks if name == mark]
        return max(total for when, total, _, _, _ in self.events if any(first <= when <= last for first, last in spans))

    def living(self, mark: str) -> list[tuple[int, str]]:
        """What was allocated at the moment of that peak: (bytes, where it was allocated), those of one place together, largest first."""
        spans = [(first, last) for name, first, last in self.marks if name == mark]
        peak = self.peak(mark)
        living: dict[int, tuple[int, str]] = {}
        for when, total, address, nbytes, inside in self.events:
            living[address] = nbytes, " > ".join(inside)
            if total == peak and any(first <= when <= last for first, last in spans):
                break
        places: Counter[str] = Counter()
        for nbytes, place in living.values():
            places[place] += nbytes
        return sorted(((nbytes, place) for place, nbytes in places.items() if nbytes), reverse=True)


def trace(run: Callable[[], None]) -> Trace:
    """Run something and note every allocation of torch's CPU allocator.

    What gloo's threads free isn't seen: they may hold a tensor for some microseconds longer than the collective lasts. So a thread that has
    waited for one waits a little longer before it goes on.
    """
    gc.collect()
    with _waiting_longer(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    found: list[tuple[int, int, int, tuple[str, ...]]] = []
    marks: list[tuple[str, int, int]] = []
    waiting: list[tuple[Any, tuple[str, ...]]] = [(event, ()) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while waiting:
        event, inside = waiting.pop()
        fields = event.typed[1]
        if hasattr(fields, "alloc_size"):
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size, inside))
        elif event.name.startswith("step "):
            marks.append((event.name.removeprefix("step "), event.start_time_ns, event.end_time_ns))
        waiting += [(child, (*inside, event.name)) for child in event.children]
    events: list[tuple[int, int, int, int, tuple[str, ...]]] = []
    living: dict[int, int] = {}
    total = 0
    for when, address, nbytes, inside in sorted(found, key=lambda event: event[0]):
        # An address that is allocated anew was freed before, seen or not.
        total += max(0, nbytes) - living.pop(address, 0)
        if nbytes > 0:
            living[address] = nbytes
        events.append((when, total, address, max(0, nbytes), inside))
    return Trace(events, marks)


@contextmanager
def _waiting_longer() -> Iterator[None]:
    wait = dist.Work.wait

    def wait_longer(self: dist.Work, *args: Any) -> Any:
        result = wait(self, *args)
        time.sleep(0.002)
        return result

    with mock.patch.object(dist.Work, "wait", wait_longer):
        yield


# --- what is trained ---------------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, HEADS, WORDS, BATCH, LENGTH = 256, 4, 4, 2048, 8, 64


def _tokens(batch: int = BATCH, length: int = LENGTH, words: int = WORDS) -> Tensor:
    return torch.randint(words, (batch, length), generator=torch.Generator().manual_seed(1))


def _causal(batch: int = BATCH, length: int = LENGTH, words: int = WORDS) -> Batch:
    ids = _tokens(batch, length, words)
    return {"input_ids": ids, "labels": ids.clone()}


def _gpt2(words: int = WORDS, batch: int = BATCH, layers: int = LAYERS, dropout: float = 0.0, tied: bool = True) -> tuple[nn.Module, Batch]:
    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=WIDTH,
        n_head=HEADS,
        vocab_size=words,
        n_positions=LENGTH,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model, _causal(batch, words=words)


def _llama(
    words: int = WORDS, batch: int = BATCH, layers: int = LAYERS, attention: str = "sdpa", tied: bool = False
) -> tuple[nn.Module, Batch]:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=words,
        max_position_embeddings=LENGTH,
        use_cache=False,
        attn_implementation=attention,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"
    return model, _causal(batch, words=words)


def _bert() -> tuple[nn.Module, Batch]:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config), _causal()


def _vit() -> tuple[nn.Module, Batch]:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=64,
        patch_size=8,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 64, 64, generator=generator)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": images,
        "labels": torch.randint(10, (BATCH,), generator=generator),
    }


def _t5() -> tuple[nn.Module, Batch]:
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=4 * WIDTH,
        num_layers=LAYERS // 2,
        num_decoder_layers=LAYERS // 2,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    ids = _tokens()
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids.clone(), "labels": ids.clone()}


@dataclass(frozen=True)
class Case:
    """A plan to measure: a model and a batch, numbers of ranks, and what is pinned."""

    name: str
    make: Callable[[], tuple[nn.Module, Batch]]
    ranks: int = 1
    pins: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None


_MODELS: Mapping[str, Callable[[], tuple[nn.Module, Batch]]] = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "vit": _vit, "t5": _t5}


def _large_vocabulary() -> tuple[nn.Module, Batch]:
    return _gpt2(words=16384, layers=2)


class _LossAlone(nn.Module):
    """A model that returns its loss and keeps the logits to itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """The loss of the model."""
        return self.model(input_ids=input_ids, labels=labels).loss


def _loss_alone() -> tuple[nn.Module, Batch]:
    model, batch = _large_vocabulary()
    return _LossAlone(model), batch


def _little_batch() -> tuple[nn.Module, Batch]:
    return _llama(batch=2)


def _dropout() -> tuple[nn.Module, Batch]:
    return _gpt2(dropout=0.1)


def _eager_attention() -> tuple[nn.Module, Batch]:
    return _llama(attention="eager")


def _tied_llama() -> tuple[nn.Module, Batch]:
    return _llama(tied=True, words=8192, layers=2)


def _cases() -> tuple[Case, ...]:
    cases = [Case(f"{name}", make) for name, make in _MODELS.items()]
    cases += [Case(f"{name} recomputed", make, 1, {"recompute": "full"}) for name, make in _MODELS.items()]
    cases += [
        Case("llama selective", _llama, 1, {"recompute": "selective"}),
        Case("llama eager selective", _eager_attention, 1, {"recompute": "selective"}),
        Case("llama eager", _eager_attention),
        Case("llama mixed", _llama, 1, {}, "mixed"),
        Case("gpt2 mixed", _gpt2, 1, {}, "mixed"),
        Case("llama bfloat16", _llama, 1, {}, "bfloat16"),
        Case("llama 4 micro-batches", _llama, 1, {"microbatches": 4}),
        Case("gpt2 2 micro-batches recomputed", _gpt2, 1, {"microbatches": 2, "recompute": "full"}),
        Case("gpt2 dropout", _dropout),
        Case("gpt2 16k words", _large_vocabulary),
        Case("gpt2 16k words, loss alone", _loss_alone),
        Case("gpt2 16k words, 4 loss chunks", _loss_alone, 1, {"loss_chunks": 4}),
        Case("llama tied 8k words", _tied_llama),
        Case("llama batch 2", _little_batch),
    ]
    cases += [Case(f"{name} dp=2", make, 2, {"dp": 2, "zero": 0}) for name, make in _MODELS.items()]
    cases += [Case(f"{name} tp=2", _MODELS[name], 2, {"tp": 2}) for name in ("gpt2", "llama", "bert")]
    cases += [Case(f"llama zero {level}", _llama, 2, {"dp": 2, "zero": level}) for level in (1, 2, 3)]
    cases += [Case(f"gpt2 zero {level}", _gpt2, 2, {"dp": 2, "zero": level}) for level in (1, 2, 3)]
    cases += [
        Case("llama zero 3 mixed", _llama, 2, {"dp": 2, "zero": 3}, "mixed"),
        Case("llama zero 2 mixed", _llama, 2, {"dp": 2, "zero": 2}, "mixed"),
        Case("llama zero 1 4 micro-batches", _llama, 2, {"dp": 2, "zero": 1, "microbatches": 4}),
        Case("llama zero 2 4 micro-batches", _llama, 2, {"dp": 2, "zero": 2, "microbatches": 4}),
        Case("llama zero 2 mixed 4 micro-batches", _llama, 2, {"dp": 2, "zero": 2, "microbatches": 4}, "mixed"),
        Case("gpt2 zero 2 4 micro-batches", _gpt2, 2, {"dp": 2, "zero": 2, "microbatches": 4}),
        Case("llama zero 3 recomputed", _llama, 2, {"dp": 2, "zero": 3, "recompute": "full"}),
        Case("llama dp=2 batch 2", _little_batch, 2, {"dp": 2, "zero": 0}),
        Case("llama zero 3 batch 2", _little_batch, 2, {"dp": 2, "zero": 3}),
        Case("gpt2 16k words tp=2", _large_vocabulary, 2, {"tp": 2}),
        Case("gpt2 16k words dp=2", _large_vocabulary, 2, {"dp": 2, "zero": 0}),
        Case("llama 1f1b", _llama, 2, {"pp": 2, "schedule": "1f1b", "microbatches": 4}),
        Case("gpt2 1f1b recomputed", _gpt2, 2, {"pp": 2, "schedule": "1f1b", "microbatches": 4, "recompute": "full"}),
        Case("llama gpipe", _llama, 2, {"pp": 2, "schedule": "gpipe", "microbatches": 4}),
        Case("llama 1f1b zero 2", _llama, 4, {"pp": 2, "dp": 2, "zero": 2, "schedule": "1f1b", "microbatches": 4}),
    ]
    return tuple(cases)


CASES = _cases()


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank: what the plan predicts, by kind, and what was allocated at the peak, and in each part of a step."""

    predicted: Mapping[str, int]
    peaks: Mapping[str, int]
    living: Sequence[tuple[int, str]]

    @property
    def total(self) -> int:
        """Bytes that the plan predicts."""
        return sum(self.predicted[kind] for kind in _KINDS) - self.predicted["apart"]

    @property
    def peak(self) -> int:
        """Bytes allocated at the peak."""
        return max(self.peaks.values())

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.total / self.peak


def measure(case: Case) -> Measured:
    """Train a case on this process's ranks, and weigh it; in a pipeline, this rank's own part."""
    found: dict[str, Any] = {}

    def run() -> None:
        torch.manual_seed(0)
        with redirect_stdout(StringIO()):
            model, batch = case.make()
        if case.precision == "bfloat16":
            model = model.to(torch.bfloat16)
        compiled = autopar.compile(model.train(), batch, pins=dict(case.pins), precision=case.precision)
        del model
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-4)
        if case.precision == "bfloat16":
            optimizer = autopar.MasterWeights(torch.optim.AdamW, compiled.parameters(), lr=1e-4)
        for number in range(STEPS):
            step(compiled, batch, optimizer, number > 0)
        found["memory"] = compiled.plan.memory

    seen = trace(run)
    gc.collect()
    peaks = {part: seen.peak(part) for part in ("forward", "backward", "update")}
    memory = found["memory"]
    predicted = {kind: getattr(memory, kind) for kind in type(memory).__dataclass_fields__}
    return Measured(predicted, peaks, seen.living(max(peaks, key=peaks.__getitem__)))


def step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, is_measured: bool) -> None:
    """One step of training, whose parts are marked for `Trace.peak` if it is measured."""
    prefix = "step " if is_measured else "first "
    with record_function(f"{prefix}forward"):
        outputs = model(**batch)
    with record_function(f"{prefix}backward"):
        (outputs if isinstance(outputs, Tensor) else outputs.loss).backward()
    with record_function(f"{prefix}update"):
        optimizer.step()
    optimizer.zero_grad()


# --- processes ---------------------------------------------------------------------------------------------------------------------


def _work(rank: int, ranks: int, folder: str, names: Sequence[str], loud: bool) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    for case in CASES:
        if case.name in names:
            try:
                measured = measure(case)
            except Exception as error:
                if rank == 0:
                    print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
                if ranks > 1:
                    raise
                continue
            every: list[Any] = [None] * ranks
            dist.all_gather_object(every, measured)
            if rank == 0:
                fullest = max(every, key=lambda one: one.peak)
                print(describe(case, fullest), flush=True)
                if loud:
                    for nbytes, place in fullest.living[:25]:
                        print(f"    {nbytes / 1e6:9.3f} {place[-230:]}")
                with Path(folder, "measured.jsonl").open("a") as file:
                    file.write(json.dumps([case.name, fullest.total, fullest.peak]) + "\n")
    dist.barrier()
    dist.destroy_process_group()


_KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "workspace")
HEADER = f"| plan | ranks | {' | '.join(_KINDS)} | apart | predicted MB | measured MB | forward | backward | update | ratio |"


def describe(case: Case, measured: Measured) -> str:
    """A row of the table."""
    numbers = [measured.predicted[kind] for kind in (*_KINDS, "apart")] + [measured.total, measured.peak, *measured.peaks.values()]
    return f"| {case.name} | {case.ranks} | {' | '.join(f'{nbytes / 1e6:.2f}' for nbytes in numbers)} | {measured.ratio:.3f} |"


def main() -> None:
    """Measure all plans, or some, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="only the plans whose names contain one of these texts")
    parser.add_argument("--living", action="store_true", help="say what was allocated at the peak, and inside of which operators")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = [case for case in CASES if not options.only or any(text in case.name for text in options.only)]
    print(HEADER + "\n" + "| --- " * HEADER.count(" | ") + "|")
    rows: list[tuple[str, int, int]] = []
    for ranks in sorted({case.ranks for case in chosen}):
        with tempfile.TemporaryDirectory() as folder:
            names = [case.name for case in chosen if case.ranks == ranks]
            mp.spawn(_work, (ranks, folder, names, options.living), nprocs=ranks)
            rows += map(json.loads, Path(folder, "measured.jsonl").read_text().splitlines())
    ratios = sorted(total / peak for _, total, peak in rows)
    print(f"{len(ratios)} plans: {ratios[0]:.3f} to {ratios[-1]:.3f}; {sum(1 <= ratio <= 1.05 for ratio in ratios)} in 1 to 1.05")


if __name__ == "__main__":
    main()
