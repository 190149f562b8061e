"""The command line of an emitted package: loads a checkpoint, trains, saves one. Started by torchrun, a process per device."""

from __future__ import annotations

import argparse
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


class Step(Protocol):
    """Runs the model on a batch, of which `inputs` are this rank's parts, and leaves every parameter its gradient."""

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The loss."""
        ...


MakeStep = Callable[[Model, Ranks, Stored], Step]


def train(model: Model, make_step: MakeStep, values: Path, arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train.

    Args:
        model: the model.
        make_step: makes what runs a step of it.
        values: the file that has the values of buffers.
        arguments: the command line; by default that of this process.
    """
    parser = argparse.ArgumentParser(description="Train the model; start it with torchrun, as README.md says.")
    parser.add_argument("--steps", type=int, default=10, help="Steps to train (10).")
    parser.add_argument("--checkpoint", type=Path, help="A state_dict of the original model: of torch.save, or .safetensors.")
    parser.add_argument("--data", type=Path, help="A file of torch.save: a list of batches, each the inputs by name. Else random ones.")
    parser.add_argument("--save", type=Path, help="Write the trained parameters here, as a state_dict of the original model.")
    parser.add_argument("--lr", type=float, default=1e-3, help="Learning rate of AdamW (0.001).")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="Weight decay of AdamW (0.01).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of random data and of dropout (0).")
    options = parser.parse_args(arguments)
    try:
        _train(model, make_step, values, options)
    except AutoparError as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(model: Model, make_step: MakeStep, values: Path, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    ranks = join(model)
    stored = Stored(model, ranks, values)
    if options.checkpoint is None:
        stored.draw()
    else:
        stored.load(options.checkpoint)
    step = make_step(model, ranks, stored)
    updates = Updates(stored.parts.values(), lr=options.lr, weight_decay=options.weight_decay, masters=model.masters)
    for number, batch in zip(range(options.steps), _batches(model, options), strict=False):
        loss = step.run([part_of_input(batch[x.name], x, model, ranks) for x in model.inputs])
        updates.step()
        if ranks.rank == 0:
            print(f"step {number}  loss {loss.item():.12g}", flush=True)
    if options.save is not None:
        stored.save(options.save)
    if dist.is_initialized():
        dist.barrier()  # torch aborts a process that ends while others still set up a group with it


def _batches(model: Model, options: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """The batches of a file, again and again, or random ones; the same on every rank."""
    if options.data is not None:
        yield from cycle(read_batches(options.data, model.inputs))
    if dist.get_rank() == 0:
        print("no --data: the batches are random, so losses say nothing of what the model has learned", flush=True)
    generator = torch.Generator().manual_seed(options.seed)
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
    return batches


def _draw(described: Input, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, described.dtype)
    if dtype.is_floating_point:
        return torch.randn(described.shape, generator=generator, dtype=dtype)
    return torch.randint(described.least, described.most + 1, described.shape, generator=generator).to(dtype)
