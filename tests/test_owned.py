"""Parameters that live on one pipeline rank: on four real ranks, each against one process with plain tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import clip_grad_norm_, get_total_norm

from autopar.errors import InputError
from autopar.ir.layout import Mesh
from autopar.ops import take_part
from autopar.runtime.dtensor import as_dtensor, placement_steps, teach_strided_shards
from autopar.runtime.owned import Owned, as_owned, owner_of
from autopar.runtime.world import form_mesh
from autopar.torch_compat import StridedShard
from tests.helpers import tree_allclose
from tests.processes import spawn

Placements = tuple[Placement, ...]
R = Replicate()
FUSED = StridedShard(0, split_factor=3)

# Each kind of parameter that a model has; "none" is what a layer of width zero has.
SIZES = {"weight": (8, 4), "columns": (6, 8), "fused": (12, 4), "bias": (4,), "scale": (), "single": (1,), "none": (0, 4)}
# On (pp, tp): by both owners, and split over tp in every way that is stored.
OWNED: dict[str, Placements] = {
    "weight": (Owned(1), Shard(0)),
    "columns": (Owned(0), Shard(1)),
    "fused": (Owned(1), FUSED),
    "bias": (Owned(0), R),
    "scale": (Owned(1), R),
    "single": (Owned(0), R),
    "none": (Owned(1), R),
}
# As another plan would store it: other owners, other splits.
OTHER: dict[str, Placements] = {
    "weight": (Owned(0), Shard(1)),
    "columns": (Owned(0), FUSED),
    "fused": (Owned(0), R),
    "bias": (Owned(1), Shard(0)),
    "scale": (Owned(0), R),
    "single": (Owned(1), R),
    "none": (Owned(0), R),
}
REPLICATED: dict[str, Placements] = dict.fromkeys(SIZES, (R, R))
SPLIT: dict[str, Placements] = REPLICATED | {"weight": (Shard(0), Shard(1)), "columns": (R, Shard(1)), "fused": (FUSED, FUSED)}
FLAT: dict[str, Placements] = dict.fromkeys(SIZES, (R,)) | {"weight": (Shard(0),), "columns": (Shard(1),)}


def _values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(sizes, generator=generator, dtype=torch.float64) for name, sizes in SIZES.items()}


def _part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    where = mesh.get_coordinate()
    for axis, dim, outer in placement_steps(placements):
        whole = take_part(whole, dim, outer, where[axis], mesh.size(axis))
    return whole.clone()


def _store(whole: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    part = _part(whole, mesh, placements)
    if not isinstance(placements[0], Owned):
        return as_dtensor(part, mesh, placements, whole.shape)
    k = placements[0].index
    given = part if mesh.get_coordinate()[0] == k else None
    return as_owned(given, mesh, k, placements[1:], whole.shape, whole.dtype, "cpu")


def _check_stored(x: Tensor, whole: Tensor, placements: Placements, what: object = "") -> None:
    """`x` is `whole`, placed so, on this rank too; bit for bit."""
    assert isinstance(x, DTensor), what
    assert (x.placements, x.shape, x.dtype) == (placements, whole.shape, whole.dtype), what
    owner = placements[0].index if isinstance(placements[0], Owned) else None
    assert owner_of(x) == owner, what
    part = _part(whole, x.device_mesh, placements)
    if owner not in (None, x.device_mesh.get_coordinate()[0]):
        part = part.new_empty(0, *part.shape[1:])
    assert torch.equal(x.to_local(), part), what
    assert x.to_local().shape == part.shape, what


# --- placements as values -----------------------------------------------------------------------------------------------------


def test_owned_is_a_value() -> None:
    assert Owned(1) == Owned(1)
    assert len({Owned(0), Owned(1), Owned(1)}) == 2
    for other in (Owned(0), Replicate(), Shard(1), Partial(), FUSED):
        assert Owned(1) != other
        assert other != Owned(1)
    assert pickle.loads(pickle.dumps(Owned(1))) == copy.deepcopy(Owned(1)) == Owned(1)
    assert repr(Owned(1)) == "Owned(1)"
    assert [Owned(1).is_shard(), Owned(1).is_replicate(), Owned(1).is_partial()] == [False] * 3
    assert owner_of(torch.zeros(2)) is None


# --- on four ranks ------------------------------------------------------------------------------------------------------------


def _check_moves(mesh: DeviceMesh) -> None:
    """From every placement to every other, forward and backward."""
    ways: list[Placements] = [(Owned(0), Shard(1)), (Owned(1), R), (Owned(0), FUSED), (Owned(1), FUSED)]
    ways += [(R, R), (Shard(0), Shard(1)), (FUSED, FUSED)]
    whole = torch.arange(12.0 * 4, dtype=torch.float64).view(12, 4)
    for start in ways:
        x = _store(whole, mesh, start).requires_grad_()
        assert torch.equal(x.full_tensor(), whole), start
        for target in ways:
            if not any(isinstance(placements[0], Owned) for placements in (start, target)):
                continue
            y = x.redistribute(placements=target)
            _check_stored(y.detach(), whole, target, (start, target))
            slope = _store(whole.sin(), mesh, target)
            x.grad = None
            y.backward(slope)
            assert x.grad is not None
            _check_stored(x.grad, whole.sin(), start, (start, target))
            if start != target:
                # What was moved is another tensor: to write it changes nothing else, on no rank.
                y.detach().zero_()
                _check_stored(x.detach(), whole, start, (start, target))
    # Sums of what the ranks have, as gradients are.
    shares = DTensor.from_local(whole * (1 + mesh.get_coordinate()[0]), mesh, [Partial(), R], run_check=False)
    _check_stored(shares.redistribute(placements=(Owned(1), FUSED)), whole * 3, (Owned(1), FUSED))
    for name, placements in OWNED.items():
        whole = _values(3)[name]
        x = _store(whole, mesh, placements)
        _check_stored(x, whole, placements, name)
        assert torch.equal(x.full_tensor(), whole), name
        _check_stored(x.redistribute(placements=OTHER[name]), whole, OTHER[name], name)


def _check_ops(mesh: DeviceMesh) -> None:
    for name, placements in OWNED.items():
        whole = _values(0)[name]
        x = _store(whole, mesh, placements)
        ops: list[Callable[[Tensor], Tensor]] = [
            *(lambda v: v * 2, lambda v: v.detach(), lambda v: v.clone(), lambda v: v.sin() + v, lambda v: v / (v + 3.0) < 1),
            *(torch.zeros_like, torch.ones_like, lambda v: v.to(torch.float32), lambda v: torch.where(v > 0, v, -v)),
            *(lambda v: v.clone().mul_(v), lambda v: v.clone().fill_(3.0), lambda v: v.clone().zero_(), lambda v: v.clone().copy_(v.sin())),
            *(lambda v: v.add(torch.tensor(2.0)), lambda v: copy.deepcopy(v), lambda v: torch.lerp(v, v.sin(), 0.3)),
            *(lambda v: copy.deepcopy(nn.Parameter(v)).detach(), lambda v: pickle.loads(pickle.dumps(v.to_local())) * 0 + v),
        ][:-1]
        for number, op in enumerate(ops):
            _check_stored(op(x), op(whole), placements, (name, number))
        if whole.numel():
            for kind in (2.0, 1.0, 3.0, 0.0, float("inf"), -float("inf")):
                norm = torch.linalg.vector_norm(x, kind)
                tree_allclose(norm.full_tensor(), torch.linalg.vector_norm(whole, kind), rtol=1e-12)
                tree_allclose(torch._foreach_norm([x], kind)[0].full_tensor(), norm.full_tensor(), rtol=1e-12)
            tree_allclose(x.norm().full_tensor(), whole.norm(), rtol=1e-12)
            # Ops that do more than keep places run on gathered copies.
            tree_allclose(x.amax().full_tensor(), whole.amax(), rtol=0.0)
        tree_allclose(x.sum().full_tensor(), whole.sum(), rtol=1e-12)
        assert repr(placements) in repr(x)

    whole, scale = _values(0)["weight"], _values(0)["scale"]
    x, alone = _store(whole, mesh, OWNED["weight"]), _store(scale, mesh, OWNED["scale"])
    assert alone.item() == scale.item()
    for other, placements in ((whole.cos(), (R, R)), (whole.cos(), (Owned(0), R)), (whole.cos(), (Shard(0), Shard(1)))):
        y = _store(other, mesh, placements)
        _check_stored(x * y, whole * other, OWNED["weight"], placements)
        _check_stored(x.clone().mul_(y), whole * other, OWNED["weight"], placements)
        _check_stored(y.clone().mul_(x), whole * other, placements, placements)
    leaf = x.clone().requires_grad_()
    (leaf * leaf.sin()).sum().backward()
    assert leaf.grad is not None
    tree_allclose(leaf.grad.full_tensor(), whole.sin() + whole * whole.cos(), rtol=1e-12)
    # Broadcasting, of what the owner has and of what all have.
    for row in (whole[0], whole[:1], whole[:, :1]):
        for placements in ((R, R), (Owned(0), R)):
            _check_stored(x + _store(row, mesh, placements), whole + row, OWNED["weight"], (row.shape, placements))
    # Each of a list has its own owner.
    both = torch._foreach_mul([x, alone, _store(whole, mesh, (R, Shard(0)))], 2.0)
    for got, expected, placements in zip(both, (whole, scale, whole), (OWNED["weight"], OWNED["scale"], (R, Shard(0))), strict=True):
        _check_stored(got, expected * 2, placements)
    tree_allclose((x @ _store(whole, mesh, (R, R)).t()).full_tensor(), whole @ whole.t(), rtol=1e-12)
    assert torch.equal(x, _store(whole, mesh, (Owned(0), R)))
    # What would change a copy is refused instead.
    for lost in (lambda: x[0], lambda: x.view(-1), lambda: x.t(), lambda: x.index_fill_(0, torch.tensor([1]), 0.0)):
        with pytest.raises(RuntimeError, match="a copy of a tensor placed as"):
            lost()
    for placements in (OWNED["weight"], (Owned(0), R), (R, R)):
        torch.mul(x, 2, out=(out := _store(whole, mesh, placements)))
        _check_stored(out, whole * 2, placements, placements)
    with pytest.raises(RuntimeError, match="can't use 'out' placed as"):
        torch.amax(x, 0, out=_store(whole[0], mesh, (Owned(0), R)))
    with pytest.raises(InputError, match="one owner"):
        x.redistribute(placements=[Owned(0), Owned(1)])


def _check_arguments(mesh: DeviceMesh) -> None:
    local = torch.zeros(4, 4)
    for k in (-1, 2):
        with pytest.raises(InputError, match=f"index {k}"):
            as_owned(local, mesh, k, [R], (4, 4), torch.float32, "cpu")
    with pytest.raises(InputError, match="0 inner placements"):
        as_owned(local, mesh, 0, [], (4, 4), torch.float32, "cpu")
    k = mesh.get_coordinate()[0]
    for part, match in (
        (None, "nothing was passed"),
        (local, r"is \(2, 4\) of torch.float32: \(4, 4\) of"),
        (local[:2].double(), "float64"),
    ):
        with pytest.raises(InputError, match=match):
            as_owned(part, mesh, k, [Shard(0)], (4, 4), torch.float32, "cpu")


# --- training -----------------------------------------------------------------------------------------------------------------


class _Model(nn.Module):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, x in tensors.items():
            self.register_parameter(name, nn.Parameter(x))


def _plain_model(seed: int = 0) -> _Model:
    return _Model(_values(seed))


def _model(mesh: DeviceMesh, placements: Mapping[str, Placements], seed: int = 0) -> _Model:
    return _Model({name: _store(x, mesh, placements[name]) for name, x in _values(seed).items()})


MAKERS: dict[str, Callable[[_Model], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True),
    "adamw one by one": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False, amsgrad=True),
    "adamw fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd one by one": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
}


def _train(model: _Model, optimizer: torch.optim.Optimizer, steps: int = 3, kind: float = 2.0, foreach: bool = True) -> list[Tensor]:
    """Steps on the loss of half the sum of squares of ``sin(3 p + step)``, clipped; the gradient norms."""
    norms = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step == 0)
        for p in model.parameters():
            with torch.no_grad():
                inner = p * 3 + step
                gradient = 3 * inner.sin() * inner.cos()
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        gradients = [p.grad for p in model.parameters() if kind == 2.0 or p.numel()]
        total = get_total_norm(gradients, kind, foreach=foreach)
        parameters = [p for p in model.parameters() if kind == 2.0 or p.numel()]
        norm = clip_grad_norm_(parameters, 1.0, kind, error_if_nonfinite=False, foreach=foreach)
        wholes = [_whole(x) for x in (norm, total)]
        assert torch.equal(*wholes)
        assert wholes[0] > 1, "nothing was clipped"
        norms.append(wholes[0])
        optimizer.step()
    return norms


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _check_same(model: _Model, optimizer: torch.optim.Optimizer | None, plain: _Model, reference: torch.optim.Optimizer | None) -> None:
    mine, gradients, states = {}, {}, {}
    for name, p in plain.named_parameters():
        q = getattr(model, name)
        mine[name] = q.detach().full_tensor()
        if p.grad is not None and q.grad is not None:
            assert q.grad.placements == q.placements, name
            assert q.grad.to_local().shape == q.to_local().shape, name
            gradients[name] = q.grad.full_tensor()
        if optimizer is not None and reference is not None:
            for key, value in optimizer.state[q].items():
                assert key == "step" or value.placements == q.placements, (name, key)
            states[name] = {key: _whole(value) for key, value in optimizer.state[q].items()}
    tree_allclose(mine, {name: p.detach() for name, p in plain.named_parameters()}, rtol=1e-12)
    if gradients:
        tree_allclose(gradients, {name: p.grad for name, p in plain.named_parameters()}, rtol=1e-12)
    if reference is not None:
        tree_allclose(states, {name: reference.state[p] for name, p in plain.named_parameters()}, rtol=1e-12)


def _check_training(mesh: DeviceMesh) -> None:
    ways = [(kind, foreach) for kind in (2.0, 1.0, float("inf")) for foreach in (True, False)]
    for (what, make), (kind, foreach) in zip(MAKERS.items(), ways, strict=True):
        model, plain = _model(mesh, OWNED), _plain_model()
        optimizer, reference = make(model), make(plain)
        norms, expected = (_train(m, o, kind=kind, foreach=foreach) for m, o in ((model, optimizer), (plain, reference)))
        tree_allclose(norms, expected, rtol=1e-12)
        _check_same(model, optimizer, plain, reference)
        assert len(optimizer.state) == len(SIZES), what


def _check_one_reduction(mesh: DeviceMesh) -> None:
    """All gradient norms are summed at once over all ranks, however the parameters are placed."""
    model = _model(mesh, OWNED | {"bias": (R, Shard(0)), "columns": (R, R)})
    for p in model.parameters():
        p.grad = torch.ones_like(p.detach())
    for kind in (2.0, float("inf")):
        with CommDebugMode() as communication:
            clip_grad_norm_([p for p in model.parameters() if p.numel()], 1.0, kind)
        assert communication.get_total_counts() == 1, communication.get_comm_counts()
    optimizer = torch.optim.AdamW(model.parameters())
    with CommDebugMode() as communication:
        optimizer.step()
    assert communication.get_total_counts() == 0


def _check_swap(mesh: DeviceMesh) -> None:
    """What an optimizer was given stays the same object when its parameter gets an owner."""
    model, plain = _model(mesh, REPLICATED), _plain_model()
    optimizer, reference = MAKERS["adamw"](model), MAKERS["adamw"](plain)
    for name, p in model.named_parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().redistribute(placements=OWNED[name])))
        assert getattr(model, name) is p
        assert isinstance(p, nn.Parameter)
        assert p.requires_grad
        _check_stored(p.detach(), _values(0)[name], OWNED[name], name)
    _train(model, optimizer)
    _train(plain, reference)
    _check_same(model, optimizer, plain, reference)
    same = copy.deepcopy(model)
    _check_same(same, None, plain, None)
    for p in same.parameters():
        assert p.requires_grad
        p.requires_grad_(False)
        assert not p.requires_grad


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def _check_checkpoints(mesh: DeviceMesh, flat: DeviceMesh, folder: str) -> None:
    """What was saved under one plan goes on under another."""
    make = MAKERS["adamw one by one"]
    plans = {"owned": (mesh, OWNED), "other": (mesh, OTHER), "split": (mesh, SPLIT), "flat": (flat, FLAT)}
    plain = _plain_model()
    reference = make(plain)
    _train(plain, reference)
    _train(longer := copy.deepcopy(plain), further := make(longer), 1)  # for its shape of state only
    further.load_state_dict(copy.deepcopy(reference.state_dict()))
    longer.load_state_dict(plain.state_dict())
    _train(longer, further, 1)
    for start, target in (("owned", "other"), ("split", "owned"), ("owned", "flat")):
        model = _model(*plans[start])
        optimizer = make(model)
        _train(model, optimizer)
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{start}-{target}")
        again = _model(*plans[target], seed=1)
        resumed = make(again)
        weights, states = get_state_dict(again, resumed)
        dcp.load(loaded := {"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{start}-{target}")
        set_state_dict(again, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        _check_same(again, resumed, plain, reference)
        _train(again, resumed, 1)
        _check_same(again, resumed, longer, further)

    # What a module's own state_dict has, and torch's ways to whole states.
    model = _model(mesh, OWNED)
    optimizer = make(model)
    _train(model, optimizer)
    dcp.save(model.state_dict(), checkpoint_id=f"{folder}/plain")
    again = _model(mesh, OTHER, seed=1)
    dcp.load(loaded := again.state_dict(), checkpoint_id=f"{folder}/plain")
    again.load_state_dict(loaded)
    _check_same(again, None, plain, None)
    again = _model(mesh, OTHER, seed=1)
    again.load_state_dict({name: x.detach().redistribute(placements=[R, R]) for name, x in model.named_parameters()})
    _check_same(again, None, plain, None)
    whole, sent = StateDictOptions(full_state_dict=True), StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    weights, states = get_model_state_dict(model, options=whole), get_optimizer_state_dict(model, optimizer, options=whole)
    tree_allclose(weights, dict(plain.state_dict()), rtol=1e-12)
    for options, with_states in ((whole, True), (sent, mesh.get_rank() == 0)):
        again = _model(mesh, OTHER, seed=1)
        resumed = make(again)
        set_model_state_dict(again, copy.deepcopy(weights) if with_states else {}, options=options)
        set_optimizer_state_dict(again, resumed, copy.deepcopy(states) if with_states else {}, options=options)
        _check_same(again, resumed, plain, reference)


def _on_four_ranks(rank: int, folder: str) -> None:
    mesh = form_mesh(Mesh(("pp", "tp"), (2, 2)), "cpu")
    assert mesh is not None
    # As a module does for every model: what torch learned of owners stays.
    assert Owned(0)
    teach_strided_shards()
    _check_arguments(mesh)
    _check_moves(mesh)
    _check_ops(mesh)
    _check_training(mesh)
    _check_one_reduction(mesh)
    _check_swap(mesh)
    _check_checkpoints(mesh, init_device_mesh("cpu", (4,)), folder)


@pytest.mark.processes
def test_every_rank_sees_what_one_rank_owns(tmp_path: Path) -> None:
    spawn(4, tmp_path, _on_four_ranks, str(tmp_path))
