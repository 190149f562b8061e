"""Times the executor of pipeline schedules against torch's own pipeline runtime, step by step in one run.

Both run the same modules: the stages that autopar emits become torch `PipelineStage`s under a stock schedule of the same order. A step is
forward and backward, without an optimizer; the two take turns, so that whatever slows the machine down slows both. Before the race their
losses and gradients are compared. Beside the seconds stand the bytes of buffers that messages are received into.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.ir import MICROBATCH
from autopar.ops import comm
from autopar.ops.deferrable import DEFERRABLE
from autopar.rewrite.program import Program, StageProgram
from autopar.torch_compat import StorageRef

BATCH, SEQ, VOCABULARY = 16, 64, 2048
OURS, THEIRS = "autopar", "torch"


@dataclass(frozen=True, slots=True)
class Race:
    """One schedule: ours by name and theirs by class, of this many processes."""

    schedule: str
    theirs: type
    ranks: int
    chunks: int = 1
    microbatches: int = 8

    @property
    def title(self) -> str:
        """What the race is called in the output and for ``--only``."""
        return f"{self.schedule}-{self.ranks}"


RACES = tuple(
    Race(name, theirs, ranks, chunks)
    for ranks in (2, 4)
    for name, theirs, chunks in (
        ("gpipe", ScheduleGPipe, 1),
        ("1f1b", Schedule1F1B, 1),
        ("interleaved", ScheduleInterleaved1F1B, 2),
        ("zb-h1", ScheduleInterleavedZeroBubble, 1),
        ("zb-v", ScheduleZBVZeroBubble, 2),
    )
)


class LossOnly(nn.Module):
    """A model whose only output is its loss, so that neither program joins outputs that nobody reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of ids and labels ``(batch, seq)``."""
        loss: Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return loss


def build_model(width: int) -> nn.Module:
    """Build a Llama of 8 layers with random weights, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=8,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQ,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"  # what transformers would fall back on, with a message
    return LossOnly(model.train())


def draw_batch() -> dict[str, Tensor]:
    """Draw token ids and labels ``(BATCH, SEQ)``, the same in every process."""
    ids = torch.randint(VOCABULARY, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


# --- ours -------------------------------------------------------------------------------------------------------------------


class Ours:
    """The compiled module."""

    def __init__(self, race: Race, model: nn.Module) -> None:
        pins = {
            "pp": race.ranks,
            "schedule": race.schedule,
            "chunks": race.chunks,
            "microbatches": race.microbatches,
            "recompute": "none",
        }
        batch = draw_batch()
        self.model = autopar.compile(model, batch, pins=pins)
        self.program: Program = self.model.prepare(**batch)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Forward and backward; returns the loss."""
        loss = self.model(**batch)
        loss.backward()
        return float(loss.detach())

    def gradients(self) -> dict[str, Tensor | None]:
        """This rank's gradients, by name."""
        return {name: None if p.grad is None else _local(p.grad) for name, p in self.parameters.items()}

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


# --- torch's ----------------------------------------------------------------------------------------------------------------


class StageModule(nn.Module):
    """A stage's module as torch's runtime calls it: what is received goes in, what is sent (or the loss) comes out.

    It has parameters of its own over the same memory as ours. The micro-batch is told by its number.
    """

    def __init__(self, program: Program, stage: StageProgram, ours: Ours, inputs: Sequence[Tensor], microbatches: int) -> None:
        super().__init__()
        assert program.pipeline is not None
        self.stage = stage
        self.names = [program.parameters[i].name for i in stage.parameters]
        self.weights = nn.ParameterList(nn.Parameter(_local(ours.parameters[name].detach())) for name in self.names)
        # Walking a ParameterList costs time that belongs to neither runtime.
        self.leaves = list(self.weights)
        buffers = dict(ours.model.named_buffers())
        self.fixed = [*(buffers[program.buffers[i].name] for i in stage.buffers), *inputs]
        self.run = _without_deferral(stage.module)
        axes = {name: comm.alone(name) for name in program.mesh.names}
        self.axes = axes
        self.times = [{**axes, MICROBATCH: comm.MicrobatchAxis(MICROBATCH, microbatches, i)} for i in range(microbatches)]
        self.wholes: tuple[Tensor, ...] = ()
        ends = [[index for index, _ in sent] for sent in stage.sends.values()]
        if len(stage.receives) > 1 or len(ends) > 1:
            raise SystemExit("torch's runtime takes chains of stages only")
        self.results = ends[0] if ends else [out.result for out in stage.outputs]

    def forward(self, *received: Tensor, number: Tensor) -> tuple[Tensor, ...] | Tensor:
        """The tensors that go to the next stage, or the loss' part; `number` is ``(1,)``."""
        index = int(number)
        if self.stage.prologue is not None and index == 0:
            with comm.active(self.axes), torch.no_grad():
                self.wholes = self.stage.prologue(*self.fixed)
        with comm.active(self.times[index]):
            results = self.run(*self.leaves, *self.fixed, *self.wholes, *received)
        found = tuple(results[i] for i in self.results)
        return found if len(found) > 1 else found[0]


def _without_deferral(module: nn.Module) -> nn.Module:
    """A copy of the module with plain operators: torch's runtime has its own way of splitting a backward."""
    module = copy.deepcopy(module)
    for one in module.modules():
        if isinstance(one, fx.GraphModule):
            for node in one.graph.nodes:
                node.target = PLAIN.get(node.target, node.target)
            one.recompile()
    return module


def _operator(name: str) -> Any:
    """What ``aten.linear.default`` stands for."""
    return attrgetter(name)(torch.ops)


PLAIN: Mapping[Any, Any] = {function: _operator(name) for name, function in DEFERRABLE.items()}


class Theirs:
    """The same stages under torch's schedule."""

    def __init__(self, race: Race, ours: Ours) -> None:
        program = ours.program
        pipeline = program.pipeline
        assert pipeline is not None
        inputs = program.captured.bind((), draw_batch())
        self.stages = []
        for index, stage in sorted(pipeline.stages.items()):
            module = StageModule(program, stage, ours, inputs, race.microbatches)
            self.stages.append(PipelineStage(module, index, len(pipeline.schedule.rank_of), torch.device("cpu")))
        one = {"stage": self.stages[0]} if race.theirs in (ScheduleGPipe, Schedule1F1B) else {"stages": self.stages}
        self.schedule = race.theirs(**one, n_microbatches=race.microbatches, loss_fn=lambda loss, _: loss, scale_grads=False)
        self.numbers = torch.arange(race.microbatches)

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Forward and backward; returns the loss, 0 where the last stage isn't."""
        losses: list[Tensor] = []
        self.schedule.step(number=self.numbers, target=self.numbers, losses=losses, return_outputs=False)
        return float(sum(float(loss.detach()) for loss in losses))

    def gradients(self) -> dict[str, Tensor | None]:
        """This rank's gradients, by name."""
        found: dict[str, Tensor | None] = {}
        for stage in self.stages:
            found.update({name: p.grad for name, p in zip(stage.submod.names, stage.submod.weights, strict=True)})
        return found

    def clear(self) -> None:
        """Drop the gradients."""
        for stage in self.stages:
            for parameter in stage.submod.weights:
                parameter.grad = None

    @property
    def received_nbytes(self) -> int:
        """Bytes of the buffers that this runtime keeps for messages from other ranks, from the first step on."""
        infos = []
        for stage in self.stages:
            for table in (stage.args_recv_info, stage.grad_recv_info):
                infos += [info for infos in table.values() for info in infos if not info.is_root_arg and info.buffer is not None]
        rank_of = self.stages[0].stage_index_to_group_rank
        # A stage of this rank hands its tensors over itself.
        away = [info.buffer for info in infos if rank_of[info.source] != dist.get_rank()]
        return sum(buffer.nbytes for buffer in away)


# --- buffers ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Counter:
    """Bytes of our receive buffers at their peaks: those that wait for their message or their use, and all that are still held."""

    waiting: dict[int, int] = field(default_factory=dict)
    held: list[tuple[StorageRef, int]] = field(default_factory=list)
    most_waiting: int = 0
    most_held: int = 0

    def note(self) -> None:
        """A buffer was posted: what is held never grows otherwise."""
        self.held = [(ref, nbytes) for ref, nbytes in self.held if not ref.expired()]
        waiting = sum(self.waiting.values())
        self.most_waiting = max(self.most_waiting, waiting)
        self.most_held = max(self.most_held, waiting + sum(nbytes for _, nbytes in self.held))


@dataclass(slots=True)
class _Counted:
    """A message whose buffer is counted."""

    message: comm.Message
    counter: Counter

    def is_done(self) -> bool:
        return self.message.is_done()

    def wait(self) -> Tensor:
        x = self.message.wait()
        self.counter.waiting.pop(id(self))
        self.counter.held.append((StorageRef(x), x.nbytes))
        return x


@contextmanager
def counting() -> Iterator[Counter]:
    """Count the buffers of messages that begin inside."""
    counter = Counter()
    receive = comm.GroupAxis.receive

    def counted(self: comm.GroupAxis, source: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> comm.Message:
        message = _Counted(receive(self, source, shape, dtype, device), counter)
        counter.waiting[id(message)] = math.prod(shape) * dtype.itemsize
        counter.note()
        return message

    with mock.patch.object(comm.GroupAxis, "receive", counted):
        yield counter


# --- the races --------------------------------------------------------------------------------------------------------------


def check(entrants: Mapping[str, Ours | Theirs]) -> None:
    """Raise SystemExit when a rank's gradients, or the losses, differ."""
    batch = draw_batch()
    losses = torch.tensor([entrants[name].step(batch) for name in (OURS, THEIRS)])
    theirs = losses[1:].clone()
    dist.all_reduce(theirs)
    torch.testing.assert_close(losses[:1], theirs, rtol=1e-5, atol=0)
    gradients = {name: entrants[name].gradients() for name in entrants}
    assert gradients[THEIRS]
    for name, gradient in gradients[THEIRS].items():
        torch.testing.assert_close(gradients[OURS][name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for entrant in entrants.values():
        entrant.clear()


@dataclass(frozen=True, slots=True)
class Result:
    """Of one rank: seconds and CPU seconds of each one's steps, and bytes of receive buffers."""

    times: dict[str, list[tuple[float, float]]]
    waiting: int
    held: int
    theirs: int


def run_race(race: Race, width: int, warmup: int, rounds: int) -> Result:
    """Let the two take turns on this rank."""
    ours = Ours(race, build_model(width))
    theirs = Theirs(race, ours)
    entrants: dict[str, Ours | Theirs] = {OURS: ours, THEIRS: theirs}
    check(entrants)
    batch = draw_batch()
    with counting() as counter:
        ours.step(batch)
    ours.clear()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in entrants}
    for number in range(warmup + rounds):
        for name in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
            dist.barrier()
            start, start_of_cpu = time.perf_counter(), time.process_time()
            entrants[name].step(batch)
            if number >= warmup:
                times[name].append((time.perf_counter() - start, time.process_time() - start_of_cpu))
            entrants[name].clear()
    return Result(times, counter.most_waiting, counter.most_held, theirs.received_nbytes)


def _run_rank(rank: int, folder: str, race: Race, width: int, warmup: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=race.ranks, timeout=timedelta(minutes=5)
    )
    try:
        result = run_race(race, width, warmup, rounds)
        Path(folder, f"{rank}.json").write_text(json.dumps(asdict(result)))
    finally:
        dist.destroy_process_group()


def run(race: Race, width: int, warmup: int, rounds: int) -> list[Result]:
    """Every rank's result."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (folder, race, width, warmup, rounds), nprocs=race.ranks)
        return [Result(**json.loads(Path(folder, f"{rank}.json").read_text())) for rank in range(race.ranks)]


def describe(race: Race, results: Sequence[Result]) -> str:
    """Medians with quartiles over the steps of the slowest rank each, ratios, and bytes of the rank with the most."""
    seconds, cpu = ({name: _per_step(results, name, column) for name in (OURS, THEIRS)} for column in (0, 1))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = medians[OURS] / medians[THEIRS]
    pairs = [ours / theirs for ours, theirs in zip(seconds[OURS], seconds[THEIRS], strict=True)]
    of_cpu = statistics.median(cpu[OURS]) / statistics.median(cpu[THEIRS])
    lines = [f"{race.title}: {race.microbatches} micro-batches, {len(pairs)} steps each: median [quartiles] of seconds"]
    lines += [f"  {name:8} {_quartiles(each)}" for name, each in seconds.items()]
    lines.append(f"  ratio {ratio:.3f}, target 1.00: {'met' if ratio <= 1 else 'MISSED'}")
    lines.append(f"  of the same round {_quartiles(pairs)}; of CPU seconds {of_cpu:.3f}")
    waiting, held, theirs = (max(getattr(one, name) for one in results) for name in ("waiting", "held", "theirs"))
    lines.append(
        f"  receive buffers, MB: autopar {waiting / 1e6:.2f}, torch {theirs / 1e6:.2f}: {'lower' if waiting < theirs else 'NOT LOWER'}; "
        f"with what was received and is kept for a backward, autopar {held / 1e6:.2f}"
    )
    return "\n".join(lines)


def _per_step(results: Sequence[Result], name: str, column: int) -> list[float]:
    """Per step the slowest rank's seconds (column 0), or the CPU seconds of all (column 1)."""
    combine = max if column == 0 else sum
    return [combine(rank[column] for rank in step) for step in zip(*(one.times[name] for one in results), strict=True)]


def _quartiles(numbers: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Run the races and print what they showed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each program (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before these (default: 3)")
    parser.add_argument("--width", type=int, default=256, help="width of the model (default: 256); less of it shows more of the runtimes")
    parser.add_argument("--only", nargs="+", choices=[race.title for race in RACES], help="only these races")
    options = parser.parse_args()
    # The ranks are started from here and take it over.
    os.environ["OMP_NUM_THREADS"] = "1"
    for race in RACES:
        if options.only is None or race.title in options.only:
            print(describe(race, run(race, options.width, options.warmup, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
