"""The command line of an emitted package: loads a checkpoint, trains, saves one. Started by torchrun, a process per device."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.emit.support.described import Input, Model
from autopar.emit.support.ranks import Ranks, join
from autopar.emit.support.stored import Stored, load_saved, part_of_input
from autopar.emit.support.updates import Updates
from autopar.errors import AutoparError, InputError
from autopar.texts import check_writable


class Step(Protocol):
    """Runs the model on a batch, of which `inputs` are this rank's parts, and leaves every parameter its gradient."""

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The loss."""
        ...


MakeStep = Callable[[Model, Ranks, Stored], Step]


def train(model: Model, make_step: MakeStep, values: Path, arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train. What is wrong with it ends the process with the exit code 2, before the first step.

    Args:
        model: the model.
        make_step: makes what runs a step of it.
        values: the file that has the values of buffers.
        arguments: the command line; by default that of this process.
    """
    parser = argparse.ArgumentParser(description="Train the model; start it with torchrun, as README.md says.")
    parser.add_argument("--steps", type=_whole, default=10, help="Steps to train (10).")
    parser.add_argument("--checkpoint", type=Path, help="A state_dict of the original model: of torch.save, or .safetensors.")
    parser.add_argument("--data", type=Path, help="A file of torch.save: a list of batches, each the inputs by name. Else random ones.")
    parser.add_argument("--save", type=Path, help="Write the trained parameters here, as a state_dict of the original model.")
    parser.add_argument("--lr", type=_number, default=1e-3, help="Learning rate of AdamW (0.001).")
    parser.add_argument("--weight-decay", type=_number, default=0.01, help="Weight decay of AdamW (0.01).")
    parser.add_argument("--seed", type=_whole, default=0, help="Seed of random data and of dropout (0).")
    options = parser.parse_args(arguments)
    try:
        _train(model, make_step, values, options)
    except AutoparError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _whole(text: str) -> int:
    """A whole number from 0, of 63 bits at most, as seeds are. Raises ArgumentTypeError for another text."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 is needed")
    return int(text)


def _number(text: str) -> float:
    """A finite number from 0. Raises ArgumentTypeError for another text."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}: a finite number from 0 is needed")
    return number


def _train(model: Model, make_step: MakeStep, values: Path, options: argparse.Namespace) -> None:
    # What the first rank finds at the end, when the weights are lost, it finds now. The others don't write: they may lack the folder.
    if options.save is not None and os.environ.get("RANK", "0") == "0":
        check_writable(options.save)
    batches = None if options.data is None else read_batches(options.data, model.inputs)
    torch.manual_seed(options.seed)
    ranks = join(model)
    stored = Stored(model, ranks, values)
    if options.checkpoint is None:
        stored.draw()
    else:
        stored.load(options.checkpoint)
    step = make_step(model, ranks, stored)
    updates = Updates(stored.parts.values(), lr=options.lr, weight_decay=options.weight_decay, masters=model.masters)
    given = _draw_batches(model, options.seed) if batches is None else cycle(batches)
    for number, batch in zip(range(options.steps), given, strict=False):
        loss = step.run([part_of_input(batch[x.name], x, model, ranks) for x in model.inputs])
        updates.step()
        if ranks.rank == 0:
            print(f"step {number}  loss {loss.item():.12g}", flush=True)
    if options.save is not None:
        stored.save(options.save)
    if dist.is_initialized():
        dist.barrier()  # torch aborts a process that ends while others still set up a group with it


def _draw_batches(model: Model, seed: int) -> Iterator[dict[str, Tensor]]:
    """Random batches without end, the same on every rank."""
    if dist.get_rank() == 0:
        print("no --data: the batches are random, so losses say nothing of what the model has learned", flush=True)
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield {x.name: _draw(x, generator) for x in model.inputs}


def read_batches(path: Path, inputs: Sequence[Input]) -> list[dict[str, Tensor]]:
    """The batches of a file. Raises InputError where there are none, or one isn't what the model is given."""
    batches = load_saved(path)
    batches = [batches] if isinstance(batches, dict) else batches
    if not (isinstance(batches, list) and batches and all(isinstance(batch, dict) for batch in batches)):
        raise InputError(f"{path} holds no batches: a list of one or more dicts of the model's inputs is needed")
    for number, batch in enumerate(batches):
        for x in inputs:
            found = batch.get(x.name)
            if not isinstance(found, Tensor) or tuple(found.shape) != x.shape:
                has = f"has the sizes {tuple(found.shape)}" if isinstance(found, Tensor) else "is missing"
                raise InputError(f"{path}, batch {number}: {x.name} {has}; {x.shape} is needed, of the whole batch")
            if not _holds(found.dtype, getattr(torch, x.dtype)):
                given = str(found.dtype).removeprefix("torch.")
                raise InputError(
                    f"{path}, batch {number}: {x.name} is {given}, of which {x.dtype} would lose something; save it as {x.dtype}"
                )
    return batches


def _holds(given: torch.dtype, needed: torch.dtype) -> bool:
    """Whether numbers of `needed` hold those of `given`, but for the precision of real ones."""
    return (given.is_floating_point and needed.is_floating_point) or torch.promote_types(given, needed) == needed


def _draw(described: Input, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, described.dtype)
    if dtype.is_floating_point:
        return torch.randn(described.shape, generator=generator, dtype=dtype)
    return torch.randint(described.least, described.most + 1, described.shape, generator=generator).to(dtype)
