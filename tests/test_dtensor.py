"""Stored layouts as torch's DTensors: parts, gathering, redistribution and checkpoints on four real ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autopar.checks import threads
from autopar.ir.layout import Mesh, fits, parse_layout
from autopar.ops import comm
from autopar.runtime.dtensor import as_dtensor, gather_whole, placements_of, shard_whole, take_local, teach_strided_shards
from tests.helpers import tree_allclose
from tests.processes import spawn

MESH = Mesh(("a", "b"), (2, 2))
SHAPE = (24, 12)
# Two axes on one tensor: on two dims, on one dim, and strided at equal, finer and coarser boundaries.
LAYOUTS = (
    *("R,R", "S0,R", "S0,S1", "S0,S0", "S0/3,R", "R,S0/3", "S0/3,S1", "S1,S0/3", "S0/3,S1/2", "S0/2,S0", "S0,S0/4"),
    *("S0/4,S0", "S0/3,S0/3", "S0/6,S0/3", "S0/3,S0/6", "S0/12,S0/3"),
)


def _numbered() -> Tensor:
    return torch.arange(24 * 12, dtype=torch.float64).view(SHAPE)


def _belongs(layout: str, rank: int, point: tuple[int, ...]) -> bool:
    """Whether a rank stores an element, by the words of the layout: where it is inside its block, coarse blocks first."""
    states = list(zip(parse_layout(layout), MESH.coordinates(rank), strict=True))
    for dim, index in enumerate(point):
        # Each boundary in turn: the block of this boundary that the element is in, then the half of it.
        for outer in sorted({state.outer for state, _ in states if state.dim == dim}):
            block = SHAPE[dim] // outer
            inside = index % block
            length = block
            for state, part in states:
                if state.dim == dim and state.outer == outer:
                    length //= 2
                    if inside // length != part:
                        return False
                    inside %= length
    return True


@pytest.mark.parametrize("text", LAYOUTS)
def test_parts_join_to_the_whole(text: str) -> None:
    layout, whole = parse_layout(text), _numbered()
    assert fits(SHAPE, layout, MESH)

    def check(rank: int) -> int:
        axes = comm.current()
        part = take_local(whole, layout, MESH, rank)
        points = itertools.product(range(SHAPE[0]), range(SHAPE[1]))
        assert part.flatten().tolist() == [whole[point].item() for point in points if _belongs(text, rank, point)]
        leaf = whole.clone().requires_grad_()
        again = shard_whole(leaf, layout, MESH, axes)
        assert torch.equal(again, part)
        if again.requires_grad and any(state.dim >= 0 for state in layout):
            again.backward(part)
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, whole)
        assert torch.equal(gather_whole(part, layout, MESH, axes), whole)
        return part.numel()

    sizes = threads.run(MESH, check)
    assert sizes == [whole.numel() // 2 ** sum(state.dim >= 0 for state in layout)] * 4


def _store(text: str, mesh: DeviceMesh, value: Tensor) -> DTensor:
    layout = parse_layout(text)
    return as_dtensor(take_local(value, layout, MESH, mesh.get_rank()).clone(), mesh, placements_of(layout, MESH), SHAPE)


def _check_layout(text: str, mesh: DeviceMesh, folder: str) -> None:
    whole = _numbered()
    stored = _store(text, mesh, whole)
    assert torch.equal(stored.full_tensor(), whole), text
    tree_allclose(torch.linalg.vector_norm(stored).full_tensor(), whole.norm(), rtol=1e-12)
    columns = stored.redistribute(placements=[Shard(1), Replicate()])
    assert torch.equal(columns.full_tensor(), whole), text
    back = columns.redistribute(placements=stored.placements)
    assert back.placements == stored.placements
    assert torch.equal(back.to_local(), stored.to_local()), text
    dcp.save({"x": stored}, checkpoint_id=f"{folder}/{text.replace('/', '_')}")
    for other in ("S0,S1", "S0/3,S0/3"):
        loaded = _store(other, mesh, torch.zeros(SHAPE, dtype=torch.float64))
        dcp.load({"x": loaded}, checkpoint_id=f"{folder}/{text.replace('/', '_')}")
        assert torch.equal(loaded.full_tensor(), whole), (text, other)


def _check_optimizer_state(mesh: DeviceMesh, folder: str) -> None:
    """The state of an optimizer goes from one layout to another, though it never passes through our module."""

    def step(text: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Module()
        model.weight = nn.Parameter(_store(text, mesh, _numbered()))
        optimizer = torch.optim.AdamW(model.parameters())
        model.weight.grad = _store(text, mesh, _numbered().sin())
        optimizer.step()
        return model, optimizer

    model, optimizer = step("S0/3,S0/3")
    dcp.save({"state": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=f"{folder}/state")
    other, fresh = step("S0/2,S1")
    fresh.state[other.weight]["exp_avg"].zero_()
    state = {"state": get_optimizer_state_dict(other, fresh)}
    dcp.load(state, checkpoint_id=f"{folder}/state")
    set_optimizer_state_dict(other, fresh, state["state"])
    tree_allclose(fresh.state[other.weight]["exp_avg"].full_tensor(), 0.1 * _numbered().sin(), rtol=1e-12)


def _check_broadcast(mesh: DeviceMesh) -> None:
    """A whole state that only the first rank has."""
    for text in ("S0/3,R", "S0/3,S0/3", "S0/2,S1"):
        model = nn.Module()
        model.weight = nn.Parameter(_store(text, mesh, torch.zeros(SHAPE, dtype=torch.float64)))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, {"weight": _numbered()} if mesh.get_rank() == 0 else {}, options=options)
        assert torch.equal(model.weight.detach().to_local(), _store(text, mesh, _numbered()).to_local()), text


def _on_four_ranks(rank: int, folder: str) -> None:
    teach_strided_shards()
    mesh = init_device_mesh("cpu", MESH.sizes, mesh_dim_names=MESH.names)
    for text in LAYOUTS:
        _check_layout(text, mesh, folder)
    _check_optimizer_state(mesh, folder)
    _check_broadcast(mesh)


@pytest.mark.processes
def test_gathering_and_checkpoints_of_every_layout(tmp_path: Path) -> None:
    spawn(4, tmp_path, _on_four_ranks, str(tmp_path))
