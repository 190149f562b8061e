"""Batches at the edge of what an op is defined for: split over ranks or micro-batches, an op gives what it gives whole.

Ignored labels, masked classes, indices out of range, rows that aren't finite, zeros, ties, nothing at all. `check_space` compares values,
gradients and second derivatives in every split, nan with nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar import torch_compat
from autopar.checks import threads
from autopar.checks.oracle import check_space, describe, trace
from autopar.ir.graph import Op
from autopar.ir.layout import MICROBATCH, Mesh
from autopar.ir.space import Space
from autopar.ops import comm, kernels, losses
from autopar.ops.bounds import check_bounds
from autopar.rules.table import rule

INF, NAN = math.inf, math.nan
GENERATOR = torch.Generator().manual_seed(2)
TWO = Mesh(("x",), (2,))


def real(*shape: int, holding: dict[int, float] | None = None, grad: bool = True) -> Tensor:
    """Random numbers, some of them (by position in the flat tensor) replaced."""
    made = torch.randn(shape, dtype=torch.float64, generator=GENERATOR)
    for position, value in (holding or {}).items():
        made.view(-1)[position] = value
    return made.requires_grad_(grad)


def filled(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64, requires_grad=True)


def classes(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def at(*positions: int, value: float = -INF) -> dict[int, float]:
    return dict.fromkeys(positions, value)


IGNORED = torch.full((4,), -100)
LABELS = classes(3, 4, 11, 0)
WEIGHTS = torch.rand(12, dtype=torch.float64, generator=GENERATOR)
LOSSES: dict[str, tuple[Any, ...]] = {
    "every label ignored": (real(4, 12), IGNORED),
    "every label ignored, with weights": (real(4, 12), IGNORED, WEIGHTS),
    "every label ignored, of rows": (real(4, 12, 6), torch.full((4, 6), -100)),
    "some labels ignored": (real(4, 12), classes(3, -100, -100, 0)),
    "a class masked out": (real(4, 12, holding=at(0, 14, 23)), LABELS),
    "the label's class masked out": (real(4, 12, holding=at(3)), LABELS),
    "half of the classes masked out": (real(4, 12, holding=at(*range(6))), classes(8, 4, 11, 0)),
    "all classes masked out": (real(4, 12, holding=at(*range(12))), LABELS),
    "an infinite logit": (real(4, 12, holding=at(2, value=INF)), LABELS),
    "a nan": (real(4, 12, holding=at(2, value=NAN)), LABELS),
    "a nan where the label is ignored": (real(4, 12, holding=at(2, value=NAN)), classes(-100, 4, 11, 0)),
    "an infinite weight that no label has": (real(4, 12), classes(3, -100, 3, 3), torch.where(torch.arange(12) == 0, INF, WEIGHTS)),
    "no token": (real(0, 12), torch.zeros(0, dtype=torch.int64)),
    "one token": (real(1, 12), classes(3)),
    "labels of a byte": (real(4, 12), classes(3, 4, 11, 0, dtype=torch.uint8)),
    "more classes than a byte holds": (real(4, 480), classes(3, 4, 255, 0, dtype=torch.uint8)),
}


def prepared(target: str, *args: Any, **kwargs: Any) -> tuple[Op, Space, list[Tensor]]:
    op, operands = trace(f"aten.{target}", *args, **kwargs)
    space = rule(op, describe(operands))
    assert space is not None
    return op, space, operands


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy(name: str, reduction: int, smoothing: float) -> None:
    logits, target, *weight = LOSSES[name]
    op, space, operands = prepared("cross_entropy_loss.default", logits, target, *(weight or [None]), reduction, -100, smoothing)
    assert check_space(op, space, operands)


@pytest.mark.parametrize("target", [classes(5, 5, 1, 11), classes(5, 5, 5, 5)], ids=["some", "all"])
def test_the_ignored_class_may_be_one_of_the_vocabulary(target: Tensor) -> None:
    assert check_space(*prepared("cross_entropy_loss.default", real(4, 12), target, None, 1, 5, 0.1))


def case(target: str, *args: Any, name: str = "", **kwargs: Any) -> Any:
    return pytest.param(target, args, kwargs, id=f"{target.split('.')[0]} {name}".strip())


def bag(
    indices: Tensor, starts: Tensor, padding: int | None = None, holding: dict[int, float] | None = None, weights: Tensor | None = None
) -> tuple[Any, ...]:
    return real(12, 4, holding=holding), indices, starts, False, 0, False, weights, False, padding


def running(channels: int) -> tuple[Any, ...]:
    zeros, ones = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    return real(channels), real(channels), zeros, ones, True, 0.1, 1e-5, False


BAGS, STARTS, NO_INDICES = classes(1, 3, 7, 8, 11, 2), classes(0, 2, 4, 4), classes()
ROWS_NOT_FINITE = {0: NAN, 24: INF}
MASK = torch.rand(2, 1, 6, 6, generator=GENERATOR).ge(0.5).index_fill(2, torch.tensor([1]), False)  # row 1 attends to nothing
CASES = [
    *(case("nll_loss_nd.default", real(4, 12), IGNORED, None, reduction, name=f"ignored {reduction}") for reduction in (0, 1, 2)),
    case("nll_loss_nd.default", real(4, 12), classes(3, 3, 3, 3), torch.zeros(12, dtype=torch.float64), name="weights of zero"),
    case("embedding.default", real(12, 4, holding=ROWS_NOT_FINITE), classes(1, 3, 5, 11), name="rows that aren't finite, not looked up"),
    case("embedding.default", real(12, 4, holding=ROWS_NOT_FINITE), classes(0, 3, 6, 11), name="rows that aren't finite, looked up"),
    case("embedding.default", real(12, 4), torch.zeros(0, 3, dtype=torch.int64), name="nothing"),
    case("embedding.default", real(12, 4), classes(6, 0, 6, 11, dtype=torch.int32), 6, name="padding"),
    *(
        case("embedding_bag.padding_idx", *bag(BAGS, STARTS, padding, ROWS_NOT_FINITE), name=f"rows that aren't finite, padding {padding}")
        for padding in (None, 0, 6)
    ),
    case("embedding_bag.padding_idx", *bag(BAGS, STARTS, 6, ROWS_NOT_FINITE, real(6)), name="rows that aren't finite, weighted"),
    case("embedding_bag.padding_idx", *bag(NO_INDICES, classes(0, 0, 0, 0)), name="nothing"),
    *(case("batch_norm.default", real(*shape), *running(6), name=str(shape)) for shape in ((1, 6), (2, 6), (4, 6, 1))),
    case("batch_norm.default", filled(1.0, 4, 6), *running(6), name="equal values"),
    case("batch_norm.default", real(4, 6, holding={0: INF, 7: NAN}), *running(6), name="not finite"),
    case("mean.dim", real(4, 0, 6), [1], name="of nothing"),
    case("mean.default", real(4, 6, holding={0: INF, 20: -INF}), name="infinite"),
    case("sum.default", torch.full((12, 8), 2**62), name="beyond 64 bits"),
    case("sum.dim_IntList", torch.full((12, 8), 100, dtype=torch.int8), [0], dtype=torch.int8, name="beyond a byte"),
    *(case(f"{name}.default", filled(1.0, 4, 12), [1], name="ties") for name in ("amax", "amin")),
    *(case(f"{name}.dim", filled(1.0, 4, 12), 1, name="ties") for name in ("max", "min")),
    case("argmax.default", torch.ones(4, 12), 1, name="ties"),
    case("sort.stable", filled(1.0, 4, 12), stable=True, dim=1, name="ties"),
    case("topk.default", filled(1.0, 4, 12), 3, name="ties"),
    case("cumsum.default", real(4, 12, holding={3: INF, 16: -INF}), 1, name="infinite"),
    case("logsumexp.default", real(4, 12, holding=at(*range(12), 15)), [1], name="masked"),
    case("softmax.int", real(4, 12, holding=at(*range(12), 15)), 1, name="masked"),
    case("std.correction", real(4, 1), [1], correction=0, name="of one"),
    case("var.correction", filled(1.0, 4, 6), [1], name="of equal values"),
    *(case("linalg_vector_norm.default", filled(0.0, 4, 6), order, [1], name=f"of zeros {order}") for order in (0, 1, 2, INF)),
    *(
        case("scaled_dot_product_attention.default", *(real(2, 4, 6, 8) for _ in range(3)), mask, name=f"rows without keys, {kind}")
        for kind, mask in (("bool", MASK), ("float", torch.zeros(MASK.shape, dtype=torch.float64).masked_fill(~MASK, -INF)))
    ),
    *(case(f"{loss}_loss.default", filled(1.0, 4, 6), torch.ones(4, 6).double(), name="equal") for loss in ("l1", "smooth_l1", "huber")),
    case("binary_cross_entropy_with_logits.default", real(4, 6, holding={0: 1e3, 1: -1e3, 2: INF, 3: -INF}), torch.ones(4, 6).double()),
]


@pytest.mark.parametrize(("target", "args", "kwargs"), CASES)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_other_ops(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert check_space(*prepared(target, *args, **kwargs), unused=(1, 2, 3) if "embedding_bag" in target else ())


# --- micro-batches ---


@pytest.mark.parametrize("target", [torch.full((8,), -100), torch.tensor([1, 2, *[-100] * 6])], ids=["all ignored", "most ignored"])
def test_micro_batches_without_a_label(target: Tensor) -> None:
    """The loss and its gradient are the batch's, though a micro-batch may have no label at all."""
    whole = real(8, 12)
    expected = torch.nn.functional.cross_entropy(whole, target)
    (gradient,) = torch.autograd.grad(expected, whole)
    counted = losses.count_targets(target, None, -100)
    parts, gradients = [], []
    for index in range(4):
        rows = slice(2 * index, 2 * index + 2)
        logits = whole[rows].detach().requires_grad_()
        with comm.active({MICROBATCH: comm.MicrobatchAxis(MICROBATCH, 4, index)}):
            parts.append(kernels.cross_entropy(logits, target[rows], splits={"n": (MICROBATCH,)}, counted=counted))
        gradients += torch.autograd.grad(parts[-1], logits)
    torch.testing.assert_close(torch.stack(parts).sum(), expected, rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=0)


# --- half precision ---


@pytest.mark.parametrize("splits", [{"n": ("x",)}, {"v": ("x",)}], ids=["tokens", "vocabulary"])
def test_the_losses_of_many_tokens_fit_their_mean(splits: dict[str, tuple[str, ...]]) -> None:
    """Their sum, 2^17, is more than a half-precision number can hold."""
    logits, target = torch.zeros(2**14, 4, dtype=torch.half), torch.zeros(2**14, dtype=torch.int64)
    logits[:, 0] = -8.0

    def run(rank: int) -> Tensor:
        part = (logits.chunk(2)[rank], target.chunk(2)[rank]) if "n" in splits else (logits.chunk(2, 1)[rank], target)
        return kernels.cross_entropy(*part, splits=splits)

    ranks = threads.run(TWO, run)
    expected = torch.nn.functional.cross_entropy(logits.float(), target)
    actual = sum(ranks[1:], ranks[0]) if "n" in splits else ranks[0]
    assert actual.dtype is torch.half
    torch.testing.assert_close(actual.float(), expected, rtol=1e-3, atol=0)


# --- indices out of range ---


def _look_up(indices: Tensor) -> Tensor:
    return kernels.embedding(torch.zeros(8, 4), indices, splits={"v": ("x",)})


def _sum_rows(indices: Tensor) -> Tensor:
    return kernels.embedding_bag(torch.zeros(8, 4), indices, torch.zeros(1, dtype=torch.int64), splits={"v": ("x",)})[0]


def _lose(target: Tensor) -> Tensor:
    return kernels.cross_entropy(torch.zeros(target.numel(), 8), target, splits={"v": ("x",)})


@pytest.mark.parametrize("index", [16, 17, -1, -16, 10**9])
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (_look_up, "index out of range in self: {}, of 16 rows"),
        (_sum_rows, "index out of range in self: {}, of 16 rows"),
        (_lose, "Target {} is out of bounds"),
    ],
)
def test_an_index_that_no_rank_has_is_an_error(call: Callable[[Tensor], Tensor], text: str, index: int) -> None:
    with pytest.raises(IndexError, match=text.format(index)):
        threads.run(TWO, lambda _: call(torch.tensor([3, index, 15])))
    threads.run(TWO, lambda _: call(torch.tensor([3, 0, 15])))


@pytest.mark.parametrize("splits", [{"a": ("x",)}, {"b": ("x",)}])
def test_masked_scatter_from_too_short_and_empty_sources(splits: dict[str, tuple[str, ...]]) -> None:
    def run(selected: int, source: int) -> list[Tensor]:
        mask = torch.arange(4)[:, None] < selected  # of two elements each
        part = torch.zeros(2, 2) if "a" in splits else torch.zeros(4, 1)
        return threads.run(TWO, lambda _: kernels.masked_scatter(part, mask, torch.ones(source), splits=splits))

    with pytest.raises(RuntimeError, match="the mask selects 8 elements, the source has 7"):
        run(4, 7)
    assert sum(float(part.sum()) for part in run(3, 7)) == 6
    assert sum(float(part.sum()) for part in run(0, 0)) == 0


def test_ignored_indices_are_not_checked_and_other_devices_are_left_alone() -> None:
    check_bounds(torch.tensor([3, -100]), 4, "", ignored=torch.tensor([False, True]))
    check_bounds(torch.tensor([], dtype=torch.int64), 4, "")
    check_bounds(torch.tensor([9], device="meta"), 4, "")


def test_a_check_on_a_device_fails_with_its_message() -> None:
    torch_compat.assert_on_device(torch.tensor(True), "unused")
    with pytest.raises(RuntimeError, match="an index is out of range"):
        torch_compat.assert_on_device(torch.tensor(False), "an index is out of range")
