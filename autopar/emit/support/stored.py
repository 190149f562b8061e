"""This rank's parts of parameters, and the way from and to checkpoints of the original model.

A checkpoint is the original's ``state_dict``: whole tensors by the original's names, in a file of ``torch.save`` or of safetensors.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.emit.support.described import Input, Model, Parameter
from autopar.emit.support.ranks import Ranks
from autopar.errors import InputError
from autopar.ir import local_shape, parse_layout
from autopar.ops import join_parts, pad_part
from autopar.runtime import dtensor

_SHOWN = 5
"""Names in a message at most."""


class Stored:
    """What this rank stores.

    Attributes:
        parts: name -> this rank's part of a parameter, of those that its pipeline rank stores.
        buffers: name -> buffer, whole.
        extra: of a loaded checkpoint, the tensors that no program reads: they are saved again as they are.
    """

    def __init__(self, model: Model, ranks: Ranks, values: Path) -> None:
        """Read buffers from the file `values`; parameters have no values until `draw` or `load`."""
        self.model, self.ranks = model, ranks
        self.extra: dict[str, Tensor] = {}
        self.parts: dict[str, Tensor] = {}
        for parameter in model.parameters:
            if parameter.users[0] == ranks.pipeline_rank:
                shape = dtensor.shape_of_part(parameter.shape, parse_layout(parameter.layout), model.mesh, ranks.place)
                part = torch.empty(shape, dtype=getattr(torch, parameter.dtype), device=ranks.device)
                self.parts[parameter.name] = part.requires_grad_(parameter.trained and part.is_floating_point())
        saved = read_tensors(values)
        self.buffers = {buffer.name: saved[buffer.name].to(ranks.device) for buffer in model.buffers}

    def _cut(self, whole: Tensor, parameter: Parameter) -> Tensor:
        layout = parse_layout(parameter.layout)
        return dtensor.take_local(whole, layout, self.model.mesh, self.ranks.place)

    def draw(self) -> None:
        """Fill parameters with random numbers."""
        with torch.no_grad():
            for parameter in self.model.parameters:
                if (part := self.parts.get(parameter.name)) is not None:
                    part.copy_(self._cut(_draw(parameter), parameter))

    def load(self, path: Path) -> None:
        """Read a checkpoint of the original model; every rank keeps its parts. Raises InputError for another model's."""
        state = dict(read_tensors(path))
        wanted = {x.name: x.shape for x in self.model.parameters} | {x.name: x.shape for x in self.model.buffers if x.saved}
        for alias, name in self.model.aliases.items():
            if alias in state:
                state.setdefault(name, state.pop(alias))
        missing = [name for name in wanted if name not in state]
        if missing:
            raise InputError(f"{path} has no {', '.join(missing[:_SHOWN])} ({len(missing)} missing): is it a state_dict of the original?")
        unlike = [name for name, shape in wanted.items() if tuple(state[name].shape) != shape]
        if unlike:
            name = unlike[0]
            raise InputError(f"{path}: {name} has the sizes {tuple(state[name].shape)}, the model's has {wanted[name]}")
        with torch.no_grad():
            for parameter in self.model.parameters:
                if (part := self.parts.get(parameter.name)) is not None:
                    part.copy_(self._cut(state[parameter.name], parameter))
            for buffer in self.model.buffers:
                if buffer.saved:
                    self.buffers[buffer.name].copy_(state[buffer.name])
        self.extra = {name: x for name, x in state.items() if name not in wanted}

    def save(self, path: Path) -> None:
        """Write a checkpoint that the original model loads; the first rank writes, and all must call it."""
        state = dict(self.extra)
        for name, whole in self._wholes():
            state[name] = whole.cpu()
        state.update((x.name, self.buffers[x.name].cpu()) for x in self.model.buffers if x.saved)
        state.update((alias, state[name]) for alias, name in self.model.aliases.items() if name in state)
        if self.ranks.rank == 0:
            torch.save(state, path)
        if dist.is_initialized():
            dist.barrier()

    def _wholes(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, on the first pipeline rank."""
        pipeline = self.ranks.pipeline
        for parameter in self.model.parameters:
            owner, part = parameter.users[0], self.parts.get(parameter.name)
            whole = None if part is None else self._gather(part.detach(), parameter)
            if pipeline is not None and owner != 0:
                if whole is not None:
                    pipeline.send(whole, 0).wait()
                    whole = None
                elif pipeline.index == 0:
                    whole = pipeline.receive(owner, parameter.shape, getattr(torch, parameter.dtype), self.ranks.device).wait()
            if whole is not None and self.ranks.pipeline_rank == 0:
                yield parameter.name, whole

    def _gather(self, part: Tensor, parameter: Parameter) -> Tensor:
        """The whole parameter from the parts of all ranks of this pipeline rank."""
        mesh, layout = self.model.mesh, parse_layout(parameter.layout)
        for axis, dim, outer in reversed(dtensor.split_steps(layout, mesh)):
            along = self.ranks.axes[mesh.names[axis]]
            if layout[axis].padded:
                rows = parameter.shape[dim]
                part = join_parts(along.all_gather(pad_part(part, dim, rows, along.size)), dim, 1).narrow(dim, 0, rows).contiguous()
            else:
                part = join_parts(along.all_gather(part), dim, outer)
        return part


def part_of_input(whole: Tensor, described: Input, model: Model, ranks: Ranks) -> Tensor:
    """This rank's part of an input of the whole batch, on its device."""
    wanted = getattr(torch, described.dtype)
    part = dtensor.take_local(whole.to(wanted), parse_layout(described.layout), model.mesh, ranks.place)
    assert tuple(part.shape) == local_shape(described.shape, parse_layout(described.layout), model.mesh)
    return part.to(ranks.device)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, by name. Raises InputError for what holds something else."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise InputError(f"{path}: install safetensors, or save the state_dict with torch.save") from error
        loaded: Any = load_file(path)
    else:
        loaded = load_saved(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise InputError(f"{path} holds no state_dict: names and tensors are needed")
    return loaded


def load_saved(path: Path) -> Any:
    """What `torch.save` has written to a file, whose code isn't run. Raises InputError where it can't be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


def _draw(parameter: Parameter) -> Tensor:
    """Random numbers for a parameter that no checkpoint is loaded for, the same on every rank: normal with a deviation of 0.02.

    Vectors are ones, and zeros where they are called bias. The original's own initialisation isn't known here.
    """
    dtype = getattr(torch, parameter.dtype)
    if len(parameter.shape) < 2:
        return (torch.zeros if "bias" in parameter.name else torch.ones)(parameter.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode()))
    return torch.empty(parameter.shape, dtype=dtype).normal_(std=0.02, generator=generator)
