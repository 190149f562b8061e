"""Ops on DTensors give what they give on plain tensors: read, written, viewed and written through the view, however they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils import _pytree as pytree

from autopar import torch_compat
from autopar.errors import InputError
from autopar.runtime import dispatch
from autopar.runtime.checkpoints import teach_pickling
from autopar.runtime.owned import Owned
from autopar.runtime.tensor_methods import teach_methods
from autopar.torch_compat import StridedShard
from tests.processes import spawn

ROWS, COLUMNS = 8, 6
Op = Callable[[Tensor], Any]


def _other() -> Tensor:
    return torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS).cos()


def _index() -> Tensor:
    return torch.tensor([1, 6])


READ: dict[str, Op] = {
    "sum, mean, std, norms": lambda x: [x.sum(), x.mean(0), x.std(1), x.norm(), x.norm(1), x.norm(float("inf")), torch.linalg.norm(x, 2)],
    "max, argmax, median": lambda x: [x.max(), x.max(0), x.argmax(), x.argmin(0), x.median(), x.median(0), x.aminmax()],
    "numbers": lambda x: [x.norm().item(), float(x.sum()), bool((x > 0).any()), int(x.argmax()), x.tolist(), f"{x.norm():.6f}"],
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "comparisons": lambda x: [torch.equal(x, x.clone()), torch.allclose(x, _other()), (x > 0.9).all(1), x.isnan().any(), 1.0 in x],
    "sorted": lambda x: [x.sort(0), x.topk(3, 0), x.unique(), x.quantile(0.3), x.kthvalue(2, 0), x.cumsum(0), x.logsumexp(0)],
    "with plain tensors": lambda x: [
        x + _other(),
        _other() * x,
        x * torch.arange(6.0),
        torch.where(_other() > 0, x, 0.0),
        x.lerp(_other(), 0.3),
    ],
    "products": lambda x: [
        x @ x.t(),
        x.t() @ x,
        _other().t() @ x,
        torch.einsum("ij,kj->ik", x, x),
        torch.addmm(torch.ones(6, 6), x.t(), x),
    ],
    "decompositions": lambda x: [torch.linalg.qr(x), torch.linalg.svdvals(x), torch.linalg.inv(x.t() @ x + torch.eye(6)), x.cov()],
    "functions": lambda x: [
        F.linear(_other(), x),
        F.embedding(_index(), x),
        F.softmax(x, 0),
        F.layer_norm(x, (6,)),
        F.mse_loss(x, _other()),
    ],
    "attention, convolution": lambda x: [
        F.scaled_dot_product_attention(x[None], x[None], x[None]),
        F.conv1d(_other()[None], x.view(2, 8, 3)),
    ],
    "elements": lambda x: [x[3], x[:, 2], x[1:5], x[::2], x[-1], x[6, 3], x[[0, 7]], x[_index()], x[x > 0], x[_index(), _index() % 3]],
    "by index": lambda x: [x.index_select(0, _index()), x.gather(0, torch.tensor([[7, 6, 5, 4, 3, 2]])), x.take(torch.tensor([40, 3]))],
    "copies by index": lambda x: [x.index_add(0, _index(), torch.ones(2, 6)), x.scatter(0, torch.tensor([[7, 6, 5, 4, 3, 2]]), 9.0)],
    "views": lambda x: [x.t(), x.view(-1), x.view(4, 2, 6), x.view(8, 3, 2), x.reshape(6, 8), x[None].expand(2, 8, 6), x.unfold(0, 3, 2)],
    "lists": lambda x: [x.chunk(3), x.split([2, 4], 1), x.unbind(0), torch.cat([x, _other()]), torch.stack([x, x]), [r.sum() for r in x]],
    "more views": lambda x: [x.diagonal(), x.as_strided((4, 3), (6, 2)), x.flip(0), x.roll(1, 0), F.pad(x, (1, 1)), x.tril(), x.rot90()],
    "foreach": lambda x: [torch._foreach_norm([x, x]), torch._foreach_max([x, x]), torch._foreach_add([x, x], [_other(), x])],
    "vectors": lambda x: [
        nn.utils.parameters_to_vector([x, x]),
        nn.utils.get_total_norm([x, x], float("inf")),
        torch.dot(x.view(-1), x.view(-1)),
    ],
}


def _assign(index: Any, value: Any) -> Op:
    return lambda x: x.__setitem__(index, value)


def _random(draw: Op) -> Op:
    def run(x: Tensor) -> None:
        torch.manual_seed(3)
        draw(x)

    return run


WRITTEN: dict[str, Op] = {
    "elementwise": lambda x: x.add_(_other()).mul_(torch.arange(6.0)).clamp_(-1, 1).lerp_(_other(), 0.1).div_(x.norm()),
    "copies": lambda x: x.copy_(_other()).sub_(x.mean(0)).copy_(torch.arange(6.0)),
    "masks": lambda x: x.masked_fill_(_other() > 0.5, 0.0).masked_fill_(x > 0.5, 1.0),
    "a row": _assign(3, 1.0),
    "rows": _assign(slice(1, 5), 2.0),
    "columns": _assign((slice(None), slice(0, 3)), 0.5),
    "an element": _assign((6, 3), 7.0),
    "a list": _assign([1, 6], 3.0),
    "where positive": lambda x: x.__setitem__(x > 0, 0.0),
    "where a plain mask": lambda x: x.__setitem__(_other() > 0, 0.0),
    "a row of itself": lambda x: x.__setitem__(0, x[5]),
    "a block": lambda x: x.__setitem__((slice(0, 4), slice(2, 4)), _other()[:4, 2:4]),
    "by index": lambda x: (
        x.index_fill_(0, _index(), 3.0).index_add_(0, _index(), torch.ones(2, 6)).index_copy_(1, _index() % 5, _other()[:, :2])
    ),
    "by place": lambda x: x.scatter_(0, torch.tensor([[7, 6, 5, 4, 3, 2]]), 9.0).put_(torch.tensor([3, 40]), torch.ones(2)),
    "a view of rows": lambda x: x[1:5].add_(1),
    "a view of columns": lambda x: x[:, 2].mul_(3),
    "a view of a view": lambda x: x[2:][1:3][:, 1].fill_(-1),
    "a transposed view": lambda x: x.t()[1].fill_(8),
    "a flat view": lambda x: x.view(-1)[3:29].zero_(),
    "a view of heads": lambda x: x.view(2, 4, 6)[1].mul_(0),
    "a reshaped view": lambda x: x.reshape(6, 8)[0].zero_(),
    "parts": lambda x: [x.chunk(3)[1].zero_(), *(row.mul_(number) for number, row in enumerate(x.unbind(0)))],
    "a diagonal": lambda x: x.diagonal().fill_(0),
    "a view of another written one": lambda x: [first := x[0], x.mul_(2), first.add_(1)],
    "data": lambda x: setattr(x, "data", _other()),
    "data of itself": lambda x: setattr(x, "data", x.data * 2),
    "a vector": lambda x: nn.utils.vector_to_parameters(torch.arange(48.0), [x]),
    "foreach": lambda x: [torch._foreach_add_([x], [_other()]), torch._foreach_mul_([x], 2.0), torch._foreach_lerp_([x], [_other()], 0.5)],
    "normal": _random(lambda x: x.normal_()),
    "noise": _random(lambda x: x.add_(torch.randn_like(x))),
    "orthogonal": _random(lambda x: nn.init.orthogonal_(x)),
    "truncated normal": _random(lambda x: nn.init.trunc_normal_(x)),
    "dropout": _random(lambda x: x.copy_(F.dropout(x, 0.5))),
}

PLAIN: dict[str, Op] = {
    "elementwise": lambda x: _other().mul_(0.9).add_(x, alpha=0.1),
    "a copy": lambda x: _other().copy_(x),
    "rows": lambda x: [y := _other(), y.__setitem__(slice(0, 2), x[:2])][0],
    "out": lambda x: torch.add(x, 1, out=_other()),
    "foreach": lambda x: [y := _other(), torch._foreach_lerp_([y], [x], 0.5)][0],
}

STORED: Sequence[Placement] = (Shard(0), Shard(1), Owned(0), Owned(1), StridedShard(0, split_factor=2), Replicate())


def _check(what: object, got: Any, expected: Any) -> None:
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(ours) == len(theirs), what
    for x, y in zip(ours, theirs, strict=True):
        if isinstance(y, Tensor):
            x = dispatch.gather(x)
            assert (x.shape, x.dtype) == (y.shape, y.dtype), what
            assert torch.allclose(x, y, atol=1e-9), what
        else:
            assert x == pytest.approx(y, rel=1e-9) if isinstance(y, float) else x == y, what


def _run(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    for teach in (dispatch.teach_whole_values, teach_methods, teach_pickling, torch_compat.count_plain_as_replicated):
        teach()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dispatch.adopt(mesh)
    whole = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    for placement in STORED:

        def fresh(placement: Placement = placement) -> DTensor:
            return DTensor.from_local(whole.clone(), mesh, [Replicate()]).redistribute(placements=[placement])

        for name, op in READ.items():
            _check((name, placement), op(fresh()), op(whole.clone()))
        for name, op in WRITTEN.items():
            x, y = fresh(), whole.clone()
            op(x), op(y)
            assert x.placements == (placement,)
            _check((name, placement), x, y)
        for name, op in PLAIN.items():
            x = op(fresh())
            assert type(x) is Tensor, name
            _check((name, placement), x, op(whole.clone()))
        with pytest.raises(InputError, match="keeps its sizes"):
            fresh().unsqueeze_(0)
        with pytest.raises(InputError, match="has no storage to write to a file"):
            fresh().storage()
        with pytest.raises(RuntimeError, match=r"must match|not aligned|broadcast"):
            fresh() + torch.ones(5, 5)


def _run_beside(rank: int) -> None:
    """DTensors that aren't ours, on a mesh of any name, are torch's; what torch refuses is done on whole copies."""
    before = _describe_own("world")
    for teach in (dispatch.teach_whole_values, teach_methods, teach_pickling, torch_compat.count_plain_as_replicated):
        teach()
    ours = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dispatch.adopt(ours)
    assert _describe_own("world") == before
    own = _make_own("world")
    assert (own + DTensor.from_local(torch.ones(2), ours, [Shard(0)]).sum()).full_tensor().sum() == 28 + 8 * 4
    assert own.placements == (Shard(0),)
    assert own.index_copy_(0, torch.tensor([3]), torch.ones(1, 2)).full_tensor()[3].tolist() == [1, 1]


def _make_own(name: str) -> DTensor:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
    return DTensor.from_local(torch.arange(8.0).view(4, 2), mesh, [Replicate()]).redistribute(placements=[Shard(0)])


def _describe_own(name: str) -> list[object]:
    own, done = _make_own(name), []
    for op in (lambda x: x[:3], lambda x: x.t(), lambda x: x.cumsum(0), torch.rand_like, lambda x: x.zero_()):
        y = op(own)  # type: ignore[no-untyped-call]
        y.full_tensor()  # waits for what is under way
        done.append((type(y), y.placements))
    own.data = own.data.new_empty(0)
    with pytest.raises(NotImplementedError):
        dist.all_reduce(_make_own(name))
    own.storage()
    return done


@pytest.mark.processes
def test_other_dtensors_are_left_to_torch(tmp_path: Path) -> None:
    spawn(2, tmp_path, _run_beside)


@pytest.mark.processes
def test_ops_do_what_they_do_on_one_device(tmp_path: Path) -> None:
    spawn(2, tmp_path, _run)
