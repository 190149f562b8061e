"""Checks, times and weighs one-rank plans on this machine's GPU, against eager PyTorch, `torch.compile` and the plan's own numbers.

Four tables: whether loss and gradients are those of the eager model; seconds of a step; peak memory against what the plan predicts; seconds
of single ops against the machine's profile. They are printed, and written to a file after every row, so that a run which is cut off leaves
what it has. A row that fails says how, the others are made all the same, and the exit code is 1. After ``--minutes`` the remaining rows
are left out. ``--device cpu`` runs the same with tiny sizes, to test this script; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopar
from autopar.api import detect_cluster
from autopar.cost_models import Cluster, Device, op_seconds
from autopar.errors import InputError
from autopar.units import format_bytes, format_seconds
from tests.rounding import distance, rounding_of

RELATIVE = 1e-5
"""The relative error, of norms, up to which a float32 gradient is the eager model's."""
FALLBACK = "a100-80gb"
"""The machine whose profile stands in for that of an unknown GPU."""


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a model and of its batch."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    seq: int


SIZES = {
    "cuda": {"GPT-2": Size(12, 768, 12, 50304, 8, 1024), "Llama": Size(16, 1024, 16, 32000, 4, 2048)},  # 124M and 246M parameters
    "cpu": {"GPT-2": Size(2, 64, 4, 256, 4, 32), "Llama": Size(2, 64, 4, 256, 4, 32)},
}


def build(name: str, size: Size) -> nn.Module:
    """A model with random float32 weights, without dropout, the same for the same arguments; on the CPU."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "GPT-2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": size.seq}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size.vocabulary, bos_token_id=0, eos_token_id=0, use_cache=False, **shape, **dropout))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=size.width,
                intermediate_size=size.width * 11 // 4,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                num_key_value_heads=max(1, size.heads // 4),
                vocab_size=size.vocabulary,
                max_position_embeddings=size.seq,
                use_cache=False,
            )
        )
    model.loss_type = "ForCausalLM"  # what transformers would fall back on, with a message
    return model.train()


def draw_batch(size: Size, device: torch.device) -> dict[str, Tensor]:
    """Token ids and labels ``(batch, seq)``."""
    ids = torch.randint(size.vocabulary, (size.batch, size.seq), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "labels": ids}


# --- the report ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Table:
    """A table of the report: its title, a sentence on how to read it, its columns, and rows so far."""

    title: str
    text: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join((f"## {self.title}\n\n{self.text}\n", *(f"| {' | '.join(line)} |" for line in lines)))


class Report:
    """Tables that are filled row by row, and written to a file after each.

    Attributes:
        failed: rows that failed or were beyond a bound, by what they are.
    """

    def __init__(self, heading: str, path: Path | None, minutes: float) -> None:
        self._heading, self._path = heading, path
        self._tables: list[Table] = []
        self._end = time.monotonic() + 60 * minutes
        self.failed: list[str] = []

    def add(self, table: Table) -> Table:
        """Begin a table."""
        self._tables.append(table)
        return table

    def fill(self, table: Table, *labels: str, make: Callable[[], tuple[Sequence[str], bool]]) -> None:
        """Add a row: labels, and what `make` returns: the other columns, and whether all is well. Its errors are told in the row."""
        label, others = " ".join((table.title, *labels)), len(table.columns) - len(labels)
        if self.is_late:
            table.rows.append((*labels, "left out: no time", *[""] * (others - 1)))
            return
        start = time.monotonic()
        try:
            columns, is_well = make()
        except Exception as error:  # one row's failure is told, and no reason to miss the others
            columns, is_well = [f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]], False
        if not is_well:
            self.failed.append(label)
        cells = [str(cell).replace("|", "\\|") for cell in columns]
        table.rows.append((*labels, *cells, *[""] * (others - len(cells))))
        clean()
        print(f"[{time.monotonic() - start:.1f} s] {label}: {', '.join(cells)}", file=sys.stderr, flush=True)
        self.write()

    @property
    def is_late(self) -> bool:
        """Whether the time for the report is over."""
        return time.monotonic() > self._end

    def write(self) -> None:
        """Write what there is to the file."""
        if self._path is not None:
            self._path.write_text(str(self), encoding="utf-8")

    def __str__(self) -> str:
        end = f"Failed: {', '.join(self.failed)}." if self.failed else "Nothing failed."
        return "\n\n".join((self._heading, *map(str, self._tables), end)) + "\n"


def clean() -> None:
    """Release what a row has used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_machine(device: torch.device, machine: str) -> str:
    """The report's heading."""
    name, driver = "CPU", "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            driver = "unknown"
    return (
        f"# One rank on {name}\n\ntorch {torch.__version__}, CUDA {torch.version.cuda}, driver {driver}, profile {machine}, "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


# --- programs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """What all parts of the report share."""

    device: torch.device
    cluster: Cluster
    sizes: Mapping[str, Size]
    is_quick: bool
    compiles: bool

    def eager(self, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model as PyTorch runs it."""
        return build(name, self.sizes[name]).to(self.device, dtype)

    def batch(self, name: str) -> dict[str, Tensor]:
        """The model's batch."""
        return draw_batch(self.sizes[name], self.device)

    def ours(self, name: str, precision: str | None, dtype: torch.dtype, pins: Mapping[str, object]) -> Any:
        """The compiled model."""
        model = self.eager(name, dtype)
        return autopar.compile(model, self.batch(name), cluster=self.cluster, precision=precision, pins=pins, progress=lambda _: None)


def run_step(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of a step, by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: x.grad.detach() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return {"the loss": loss.detach(), **gradients}


# --- (a) exactness --------------------------------------------------------------------------------------------------------------


def check_exactness(report: Report, setting: Setting) -> None:
    """Loss and gradients of one-rank plans against the eager model's."""
    table = report.add(
        Table(
            "Exactness",
            f"Loss and gradients against the eager model. float32 (without TF32): the largest relative error of norms, {RELATIVE} at most. "
            "Others: the largest error as a share of twice what roundings do to the eager bfloat16 model (Monte Carlo arithmetic).",
            ("model", "precision", "pins", "error", "of", "verdict"),
        )
    )
    every: list[dict[str, object]] = [
        {"recompute": "none"},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"microbatches": 2, "recompute": "none"},
    ]
    some = [every[0], {"microbatches": 2, "recompute": "selective"}]
    for name in setting.sizes:
        for precision in ("float32", "bfloat16", "mixed"):
            # The expected step is made once for all rows; when that fails, each of them says so.
            known: dict[str, Any] = {}
            for pins in every if precision == "float32" and not setting.is_quick else some:

                def make(
                    name: str = name, precision: str = precision, pins: dict[str, object] = pins, known: dict[str, Any] = known
                ) -> tuple[Sequence[str], bool]:
                    if not known:
                        known.update(_expect(setting, name, precision))
                    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
                    model = setting.ours(name, "mixed" if precision == "mixed" else None, dtype, pins)
                    error, worst = _largest_error(run_step(model, setting.batch(name)), known["step"], known["bounds"])
                    limit = RELATIVE if precision == "float32" else 1.0
                    return (f"{error:.2g}", worst, "same" if error <= limit else "OTHER"), error <= limit

                report.fill(table, name, precision, ", ".join(f"{key}={value}" for key, value in pins.items()), make=make)
            known.clear()
            clean()


def _expect(setting: Setting, name: str, precision: str) -> dict[str, Any]:
    """The eager model's step, and how far roundings may move it; no bounds in float32."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model, batch = setting.eager(name, dtype), setting.batch(name)
    step = run_step(model, batch)
    return {"step": step, "bounds": rounding_of(lambda: run_step(model, batch), 2) if precision != "float32" else None}


def _largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bounds: Mapping[str, float] | None) -> tuple[float, str]:
    """The largest error, relative or as a share of twice the bounds, and the name of its tensor."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(actual.keys() ^ expected.keys())}")
    errors = {}
    for name, x in expected.items():
        if bounds is None:
            errors[name] = float((actual[name] - x).norm() / x.norm().clamp_min(1e-30))
        else:
            errors[name] = distance(actual[name], x) / max(2 * bounds[name], 1e-30)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst], worst


# --- (b) seconds of a step ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds between two moments: on a GPU of its own work, by events."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def now(self) -> Any:
        """This moment."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two moments, after waiting for the second."""
        if not self._is_cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


@dataclass(slots=True)
class Entrant:
    """A program in the race, and its steps' seconds so far."""

    model: Any
    around: Callable[[], AbstractContextManager[Any]]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0

    def step(self, batch: Mapping[str, Tensor], clock: Clock) -> float:
        """One training step."""
        start = clock.now()
        with self.around():
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = clock.now()
        self.loss = float(loss.detach())
        return clock.between(start, end)


def time_steps(report: Report, setting: Setting, rounds: int, warmup: int) -> None:
    """Steps of eager PyTorch, `torch.compile` and autopar, which take turns."""
    table = report.add(
        Table(
            "Seconds of a step",
            f"Median [quartiles] of {rounds} steps after {warmup}, in turns; forward, backward and fused AdamW. With mixed precision the "
            "others run under autocast. Predicted: by the plan.",
            ("model", "precision", "program", "seconds", "over eager's", "predicted", "loss"),
        )
    )
    for precision in ("bfloat16",) if setting.is_quick else ("bfloat16", "mixed"):
        for name in setting.sizes:
            entrants: dict[str, Entrant] = {}
            makers: dict[str, Callable[[], Entrant]] = {
                "eager": lambda name=name, precision=precision: _enter(setting, name, precision, compiles=False),
                "torch.compile": lambda name=name, precision=precision: _enter(setting, name, precision, compiles=True),
                "autopar": lambda name=name, precision=precision: _enter_ours(setting, name, precision),
            }
            if not setting.compiles:
                del makers["torch.compile"]
            failures: dict[str, Exception] = {}
            for program, make_entrant in makers.items() if not report.is_late else ():
                try:
                    entrants[program] = make_entrant()
                    entrants[program].step(setting.batch(name), Clock(setting.device))
                except Exception as error:  # told in its row
                    failures[program] = error
                    entrants.pop(program, None)
            failures |= _race(entrants, setting, name, rounds, warmup)
            for program in makers:

                def make(
                    program: str = program, entrants: dict[str, Entrant] = entrants, failures: dict[str, Exception] = failures
                ) -> tuple[Sequence[str], bool]:
                    if program in failures:
                        raise failures[program]
                    entrant = entrants[program]
                    low, middle, high = statistics.quantiles(entrant.seconds, n=4)
                    over = f"{middle / statistics.median(entrants['eager'].seconds):.3f}" if "eager" in entrants else ""
                    predicted = format_seconds(entrant.model.plan.seconds.step) if program == "autopar" else ""
                    shown = f"{format_seconds(middle)} [{format_seconds(low)}, {format_seconds(high)}]"
                    return (shown, over, predicted, f"{entrant.loss:.4f}"), True

                report.fill(table, name, precision, program, make=make)
            entrants.clear()
            failures.clear()
            clean()


def _race(entrants: dict[str, Entrant], setting: Setting, name: str, rounds: int, warmup: int) -> dict[str, Exception]:
    """Let the entrants take turns; one that fails leaves the race. Returns the failures."""
    batch, clock, failures = setting.batch(name), Clock(setting.device), {}
    for number in range(warmup + rounds):
        names = list(entrants)
        turn = number % len(names) if names else 0
        for program in names[turn:] + names[:turn]:
            try:
                seconds = entrants[program].step(batch, clock)
            except Exception as error:  # told in its row
                failures[program] = error
                del entrants[program]
                continue
            if number >= warmup:
                entrants[program].seconds.append(seconds)
    return failures


def _adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def _enter(setting: Setting, name: str, precision: str, *, compiles: bool) -> Entrant:
    model = setting.eager(name, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    if precision == "mixed":

        def around() -> AbstractContextManager[Any]:
            return torch.autocast(setting.device.type, torch.bfloat16)

    return Entrant(torch.compile(model) if compiles else model, around, _adamw(model))


def _enter_ours(setting: Setting, name: str, precision: str) -> Entrant:
    is_mixed = precision == "mixed"
    model = setting.ours(name, "mixed" if is_mixed else None, torch.float32 if is_mixed else torch.bfloat16, {})
    return Entrant(model, nullcontext, _adamw(model))


# --- (c) memory ---------------------------------------------------------------------------------------------------------------------


def weigh_steps(report: Report, setting: Setting) -> None:
    """Peak memory of steps against the plan's prediction."""
    kinds = ("parameters", "gradients", "optimizer", "activations", "buffers", "workspace")
    table = report.add(
        Table(
            "Peak memory",
            "Measured over three steps, without what the process had before: allocated by tensors, and reserved by the allocator. "
            "Predicted: by the plan, all kinds but the reserve for context and fragmentation.",
            ("model", "precision", "recompute", "allocated", "reserved", "predicted", "allocated / predicted", *kinds),
        )
    )
    for precision in ("bfloat16",) if setting.is_quick else ("float32", "bfloat16", "mixed"):
        for name in setting.sizes:
            for recompute in ("none", "selective", "full"):

                def make(name: str = name, precision: str = precision, recompute: str = recompute) -> tuple[Sequence[str], bool]:
                    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
                    before = _start_weighing(setting.device)
                    model = setting.ours(name, "mixed" if precision == "mixed" else None, dtype, {"recompute": recompute})
                    entrant = Entrant(model, nullcontext, _adamw(model))
                    for _ in range(3):
                        entrant.step(setting.batch(name), Clock(setting.device))
                    memory = model.plan.memory
                    predicted = memory.total - memory.reserved
                    measured = ("", "", format_bytes(predicted), "")
                    if setting.device.type == "cuda":
                        peak = torch.cuda.max_memory_allocated() - before
                        reserved = format_bytes(torch.cuda.max_memory_reserved())
                        measured = (format_bytes(peak), reserved, format_bytes(predicted), f"{peak / predicted:.3f}")
                    return (*measured, *(format_bytes(getattr(memory, kind)) for kind in kinds)), True

                report.fill(table, name, precision, recompute, make=make)


def _start_weighing(device: torch.device) -> int:
    """Bytes that are allocated before."""
    clean()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


# --- (d) ops ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Op:
    """An op to be timed: its flops, the bytes that it reads and writes, its family in `op_seconds`, and a function that runs it."""

    name: str
    dtype: torch.dtype
    flops: float
    nbytes: float
    family: str
    run: Callable[[], object]


def make_ops(device: torch.device) -> list[Callable[[], Op]]:
    """Functions that make the ops; each makes its own tensors."""
    is_cuda = device.type == "cuda"
    low = torch.bfloat16 if is_cuda else torch.float32

    def matmul(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Op:
        a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
        nbytes = (rows * inner + inner * columns + rows * columns) * a.element_size()
        return Op(f"matmul {rows} x {inner} x {columns}", dtype, 2.0 * rows * inner * columns, nbytes, "matmul", lambda: a @ b)

    def attention(batch: int, heads: int, rows: int, size: int, *, is_causal: bool) -> Op:
        q, k, v = (torch.randn(batch, heads, rows, size, device=device, dtype=low) for _ in range(3))
        name = f"attention {batch} x {heads} x {rows} x {size}{', causal' if is_causal else ''}"
        flops = 4.0 * batch * heads * rows * rows * size
        nbytes = 4 * q.nbytes
        return Op(name, low, flops, nbytes, "attention", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal))

    def rowwise(name: str, rows: int, width: int, run: Callable[[Tensor], Tensor], passes: int) -> Op:
        x = torch.randn(rows, width, device=device, dtype=low)
        return Op(f"{name} {rows} x {width}", low, 0.0, passes * x.nbytes, "pointwise", lambda: run(x))

    sizes = (512, 1024, 2048, 4096, 8192) if is_cuda else (64, 128)
    rows, width = (8192, 4096) if is_cuda else (64, 128)
    batch, heads, seq, size = (4, 16, 2048, 64) if is_cuda else (2, 2, 64, 16)
    return [
        *(lambda n=n: matmul(n, n, n, low) for n in sizes),
        lambda: matmul(rows, width // 4, width, low),
        lambda: matmul(sizes[-2], sizes[-2], sizes[-2], torch.float32),
        lambda: attention(batch, heads, seq, size, is_causal=False),
        lambda: attention(batch, heads, seq, size, is_causal=True),
        lambda: rowwise("layer_norm", rows, width, lambda x: F.layer_norm(x, x.shape[-1:]), 2),
        lambda: rowwise("rms_norm", rows, width, lambda x: F.rms_norm(x, x.shape[-1:]), 2),
        lambda: rowwise("gelu", rows, width, F.gelu, 2),
        lambda: rowwise("add", rows, width, lambda x: x + x, 3),
        lambda: rowwise("softmax", rows, width, lambda x: F.softmax(x, -1), 2),
        lambda: rowwise("add, small", 16, 16, lambda x: x + x, 3),
    ]


def time_ops(report: Report, setting: Setting, repeats: int) -> None:
    """Single ops against the machine's profile."""
    table = report.add(
        Table(
            "Ops",
            f"Forward; the mean of {repeats} in a row, the best of five such runs. Predicted: `op_seconds` of the profile.",
            ("op", "dtype", "measured", "predicted", "measured / predicted", "TFLOP/s", "GB/s"),
        )
    )
    for number, make_op in enumerate(make_ops(setting.device)):

        def make(make_op: Callable[[], Op] = make_op) -> tuple[Sequence[str], bool]:
            op = make_op()
            measured = _time_op(op, Clock(setting.device), repeats)
            device: Device = setting.cluster.machine.device
            dtype = str(op.dtype).removeprefix("torch.")
            predicted = op_seconds(device, flops=op.flops, nbytes=op.nbytes, dtype=dtype, family=op.family)
            rates = (f"{op.flops / measured / 1e12:.2f}" if op.flops else "", f"{op.nbytes / measured / 1e9:.0f}")
            return (op.name, dtype, format_seconds(measured), format_seconds(predicted), f"{measured / predicted:.2f}", *rates), True

        before = len(table.rows)
        report.fill(table, make=make)
        if table.rows[before][0].startswith(("FAILED", "left out")):
            table.rows[before] = (f"op {number}: {table.rows[before][0]}", *table.rows[before][1:])


def _time_op(op: Op, clock: Clock, repeats: int) -> float:
    op.run()
    best = float("inf")
    for _ in range(5):
        start = clock.now()
        for _ in range(repeats):
            op.run()
        best = min(best, clock.between(start, clock.now()) / repeats)
    return best


# --- the script -----------------------------------------------------------------------------------------------------------------------


def find_cluster(device: torch.device, machine: str | None) -> Cluster:
    """One device of this machine's kind, with its memory."""
    if machine is not None:
        return Cluster.parse(machine)
    try:
        return detect_cluster(device.type)
    except InputError:
        return Cluster.parse(FALLBACK).with_memory(torch.cuda.get_device_properties(device).total_memory)


PARTS = ("exactness", "memory", "ops", "steps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code. The arguments are those of the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="the file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--machine", help="whose profile is compared with: a name or a file (default: this GPU's)")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--model", choices=tuple(SIZES["cpu"]), help="only this model")
    parser.add_argument("--quick", action="store_true", help="fewer rows and steps, three minutes")
    parser.add_argument("--minutes", type=float, help="after which rows are left out (default: 7.5, 2.5 with --quick)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="whether torch.compile takes part")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tests this script")
    torch.set_float32_matmul_precision("highest")
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    cluster = find_cluster(device, options.machine)
    sizes = {name: size for name, size in SIZES[options.device].items() if options.model in (None, name)}
    setting = Setting(device, cluster, sizes, options.quick, options.compile)
    minutes = options.minutes or (2.5 if options.quick else 7.5)
    report = Report(describe_machine(device, cluster.machine.name), options.output, minutes)
    rounds, warmup = (5, 2) if options.device == "cpu" else (10, 3) if options.quick else (20, 5)
    parts: dict[str, Callable[[], None]] = {
        "exactness": lambda: check_exactness(report, setting),
        "memory": lambda: weigh_steps(report, setting),
        "ops": lambda: time_ops(report, setting, 20 if options.device == "cuda" else 3),
        "steps": lambda: time_steps(report, setting, rounds, warmup),
    }
    for name in options.only or PARTS:
        try:
            parts[name]()
        except Exception as error:  # the other parts are worth having all the same
            report.failed.append(f"{name} ({type(error).__name__}: {error})")
    report.write()
    print(report)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
