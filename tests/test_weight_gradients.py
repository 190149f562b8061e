"""Backwards in two passes against torch's own: every operator, every order, and what waits between the passes."""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from autopar import torch_compat
from autopar.capture.export import capture
from autopar.checks import oracle, threads
from autopar.errors import AutoparError
from autopar.ir.layout import Mesh
from autopar.ops import collectives, comm, deferrable, kernels, regather, rng, weight_gradients
from autopar.ops.deferrable import DEFERRABLE
from autopar.ops.recompute import Recomputed
from autopar.ops.weight_gradients import Deferred, deferring
from autopar.rules.table import facts_of, find_spaces, rule
from autopar.torch_compat import StorageRef
from tests.helpers import tree_allclose
from tests.zoo import ZOO

Shape = tuple[int, ...]
Op = Callable[..., Tensor]


def _plain(name: str) -> Any:
    """The operator itself, by its name."""
    target: Any = operator.attrgetter(name)(torch.ops)
    return target


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Arguments of each operator: a shape is a tensor that needs a gradient, a list constant, everything else as it is.
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("aten.linear.default", ((5, 4), (3, 4)), {}),
    ("aten.linear.default", ((2, 5, 4), (3, 4), (3,)), {}),
    ("aten.linear.default", ((2, 2, 5, 4), (3, 4), (3,)), {}),
    ("aten.linear.default", ((4,), (3, 4), (3,)), {}),
    ("aten.linear.default", ((0, 5, 4), (3, 4), (3,)), {}),
    ("aten.linear.default", ((5, 4), (0, 4), (0,)), {}),
    ("aten.addmm.default", ((3,), (5, 4), (4, 3)), {}),
    ("aten.addmm.default", ((5, 3), (5, 4), (4, 3)), {"beta": 0.5, "alpha": 2.0}),
    ("aten.addmm.default", ((5, 1), (5, 4), (4, 3)), {"alpha": 3}),
    ("aten.mm.default", ((5, 4), (4, 3)), {}),
    ("aten.bmm.default", ((2, 5, 4), (2, 4, 3)), {}),
    ("aten.matmul.default", ((2, 5, 4), (4, 3)), {}),
    ("aten.matmul.default", ((4,), (4, 3)), {}),
    ("aten.matmul.default", ((2, 5, 4), (4,)), {}),
    ("aten.matmul.default", ((4,), (4,)), {}),
    ("aten.matmul.default", ((4,), (2, 4, 3)), {}),
    ("aten.matmul.default", ((5, 4), (2, 4, 3)), {}),
    ("aten.matmul.default", ((2, 5, 4), (6, 1, 4, 3)), {}),
    ("aten.convolution.default", ((2, 4, 7), (6, 2, 3), (6,), [2], [1], [1], False, [0], 2), {}),
    ("aten.convolution.default", ((2, 4, 7), (4, 3, 3), None, [2], [1], [1], True, [1], 2), {}),
    ("aten.conv1d.default", ((2, 4, 7), (6, 2, 3), (6,), [2], [1], [1], 2), {}),
    ("aten.conv1d.default", ((4, 7), (6, 4, 3)), {}),
    ("autopar.padded_conv1d.default", ((2, 4, 8), (6, 2, 4), (6,), 1, 3, 0, 1, 2), {}),
    ("autopar.padded_conv1d.default", ((2, 4, 8), (6, 4, 4), None, 2, 0, 3, 1, 1), {}),
    ("aten.conv2d.default", ((2, 4, 7, 6), (6, 4, 3, 2), (6,), [2, 1], [1, 0], [1, 2]), {}),
    ("aten.conv2d.default", ((0, 4, 7, 6), (6, 4, 3, 2), (6,)), {}),
    ("aten.conv2d.default", ((1, 4, 7, 6), (6, 4, 3, 2), None, [1]), {}),
    ("aten.conv3d.default", ((1, 2, 4, 3, 3), (4, 2, 2, 2, 2), (4,)), {}),
    ("aten.conv_transpose1d.default", ((2, 4, 5), (4, 3, 3), (6,), [2], [1], [1], 2), {}),
    ("aten.conv_transpose2d.input", ((2, 4, 3, 5), (4, 6, 3, 2), (6,), [2, 1], [1, 0], [1, 0], 1, [1, 1]), {}),
    ("aten.conv_transpose3d.input", ((1, 2, 3, 2, 2), (2, 3, 2, 2, 2)), {}),
    ("aten.embedding.default", ((7, 4), [[1, 2, 2], [0, 6, 2]]), {}),
    ("aten.embedding.default", ((7, 4), [1, 1, 2, 2], 2, True), {}),
]


def _arguments(shapes: tuple[Any, ...], name: str) -> list[Any]:
    made: list[Any] = []
    for at, given in enumerate(shapes):
        if isinstance(given, tuple):
            made.append(_randn(*given, seed=at).requires_grad_())
        elif name == "aten.embedding.default" and isinstance(given, list):
            made.append(torch.tensor(given))
        else:
            made.append(given)
    return made


def _gradients(arguments: list[Any]) -> list[Tensor]:
    return [x.grad for x in arguments if isinstance(x, Tensor) and x.grad is not None]


def _seed_of(y: Tensor) -> Tensor:
    """A gradient for `y` whose memory isn't laid out as that of `y`."""
    return _randn(*reversed(y.shape), seed=9, dtype=y.dtype).permute(list(reversed(range(y.dim()))))


def _check(name: str, shapes: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Outputs and gradients of the operator, of its function in one pass, and of its function in two."""
    expected = _arguments(shapes, name)
    y = _plain(name)(*expected, **keywords)
    y.backward(_seed_of(y))
    at_once = _arguments(shapes, name)
    z = DEFERRABLE[name](*at_once, **keywords)
    z.backward(_seed_of(y))
    tree_allclose([z, *_gradients(at_once)], [y, *_gradients(expected)], rtol=1e-12) if y.numel() else None
    split = _arguments(shapes, name)
    op, operands = oracle.trace(name, *split, **keywords)
    parameters = [operands[index] for index in facts_of(op, rule(op, oracle.describe(operands))).weights]
    assert parameters
    with deferring() as deferred:
        z = DEFERRABLE[name](*split, **keywords)
        z.backward(_seed_of(y))
    assert all(x.grad is None for x in parameters)
    assert all(x.grad is not None for x in split if isinstance(x, Tensor) and x.requires_grad and all(x is not p for p in parameters))
    deferred.run()
    assert len(_gradients(split)) == len(_gradients(expected)) == len(_gradients(at_once))
    for got, want in zip(_gradients(split) + _gradients(at_once), 2 * _gradients(expected), strict=True):
        assert got.shape == want.shape
        assert not want.numel() or (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize(("name", "shapes", "keywords"), CASES)
def test_both_passes_give_what_the_operator_does(name: str, shapes: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    _check(name, shapes, keywords)


def test_every_function_is_tried() -> None:
    assert {name for name, _, _ in CASES} == set(DEFERRABLE)


SIZE = st.integers(0, 3)
SETTINGS = hypothesis.settings(max_examples=40, deadline=None)


@SETTINGS
@hypothesis.given(st.lists(SIZE, max_size=3), SIZE, SIZE, st.booleans())
def test_linear_of_any_sizes(batch: list[int], inner: int, outer: int, biased: bool) -> None:
    _check("aten.linear.default", ((*batch, inner), (outer, inner), (outer,) if biased else None), {})


BATCH = st.lists(st.tuples(SIZE, st.booleans(), st.booleans()), max_size=2)


@SETTINGS
@hypothesis.given(BATCH, st.integers(0, 2), st.integers(0, 2), st.none() | SIZE, SIZE, st.none() | SIZE)
def test_matmul_of_any_sizes(
    batch: list[tuple[int, bool, bool]], skipped: int, skipped_by_weight: int, rows: int | None, inner: int, columns: int | None
) -> None:
    """Sides lack batch dims in front, have some of size one, and are vectors when there are no rows or columns."""
    x = (inner,) if rows is None else (*[1 if one else size for size, one, _ in batch][skipped:], rows, inner)
    weight = (inner,) if columns is None else (*[1 if one else size for size, _, one in batch][skipped_by_weight:], inner, columns)
    _check("aten.matmul.default", (x, weight), {})


@SETTINGS
@hypothesis.given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 1),
    st.integers(1, 2),
    st.booleans(),
)
def test_convolutions_of_any_windows(
    batch: int, groups: int, inner: int, size: int, stride: int, padding: int, dilation: int, transposed: bool
) -> None:
    shapes = (
        (batch, 2 * groups, 7, 6),
        (2 * groups, inner, size, size) if transposed else (inner * groups, 2, size, size),
        (inner * groups,),
    )
    rest = ([stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups)
    _check("aten.convolution.default", (*shapes, *rest), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    def run(linear: Op) -> list[Tensor | None]:
        x, weight, bias = (_randn(*shape, seed=at, dtype=dtype).requires_grad_() for at, shape in enumerate([(3, 5, 8), (4, 8), (4,)]))
        with deferring() as deferred:
            linear(x, weight, bias).square().sum().backward()
        deferred.run()
        return [x.grad, weight.grad, bias.grad]

    # One rounding each, of sums in another order.
    assert tree_allclose(run(deferrable.linear), run(F.linear), rtol=4 * torch.finfo(dtype).eps) == 3


def test_what_needs_no_gradient() -> None:
    x, weight, bias = _randn(5, 4), _randn(3, 4, seed=1), _randn(3, seed=2)
    assert not deferrable.linear(x, weight, bias).requires_grad
    with torch.no_grad():
        assert not deferrable.linear(x, weight.clone().requires_grad_(), bias).requires_grad
    # A frozen weight: nothing is left, also not of the bias.
    bias.requires_grad_()
    x.requires_grad_()
    with deferring() as deferred:
        deferrable.linear(x, weight, bias).sum().backward()
    assert deferred.nbytes == 0
    tree_allclose([x.grad, bias.grad], [weight.sum(0).expand(5, 4), torch.full((3,), 5.0, dtype=torch.float64)])
    # A frozen bias, and an input without gradient: the weight waits.
    data, frozen = _randn(5, 4), torch.zeros(3, dtype=torch.float64)
    weight.requires_grad_()
    with deferring() as deferred:
        deferrable.linear(data, weight, frozen).sum().backward()
    assert weight.grad is None
    deferred.run()
    tree_allclose([weight.grad], [data.sum(0).expand(3, 4)])
    assert frozen.grad is None


def test_a_sparse_table_is_left_to_torch() -> None:
    table = _randn(7, 4).requires_grad_()
    with deferring() as deferred:
        deferrable.embedding(table, torch.tensor([1, 2]), -1, False, True).sum().backward()
    assert deferred.nbytes == 0
    assert table.grad is not None
    assert table.grad.is_sparse


@pytest.mark.parametrize("name", ["aten.linear.default", "aten.addmm.default", "aten.matmul.default", "aten.conv2d.default"])
def test_nothing_is_computed_twice(name: str) -> None:
    shapes = next(shapes for case, shapes, _ in CASES if case == name)

    def count(step: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            step()
        return int(counter.get_total_flops())

    arguments = _arguments(shapes, name)
    whole = count(_plain(name)(*arguments).sum().backward)
    with deferring() as deferred:
        inputs = count(DEFERRABLE[name](*arguments).sum().backward)
    weights = count(deferred.run)
    assert inputs > 0
    assert weights > 0
    assert inputs + weights == whole
    assert count(deferred.run) == 0
    assert count(DEFERRABLE[name](*arguments).sum().backward) == whole


def test_only_inputs_and_gradients_wait() -> None:
    """Three products of one input: it counts once; what is between them and the loss is gone after the first pass."""
    seen: list[StorageRef] = []
    x = _randn(5, 4).requires_grad_()
    weights = [_randn(3, 4, seed=at).requires_grad_() for at in range(3)]
    with deferring() as deferred:
        hidden = x * 2
        seen.append(StorageRef(hidden))
        products = [deferrable.linear(hidden, weight) for weight in weights]
        activations = [product.exp() for product in products]
        between = [StorageRef(activation) for activation in activations]
        loss = sum(activation.sum() for activation in activations)
        del hidden, products, activations
        loss.backward()
    del loss
    gc.collect()
    assert all(ref.expired() for ref in between)
    assert not seen[0].expired()
    assert deferred.nbytes == 8 * (5 * 4 + 3 * 5 * 3)
    deferred.run()
    assert deferred.nbytes == 0
    assert seen[0].expired()
    tree_allclose([w.grad for w in weights], [(2 * x @ w.T).exp().T @ (2 * x) for w in weights], rtol=1e-12)


def test_no_gradient_is_copied() -> None:
    """Neither that of the result while it waits, nor the weight's: autograd takes a fresh one for the leaf's own if nobody else has it."""
    weight = _randn(3, 4).requires_grad_()
    made: list[int] = []
    waited: list[int] = []
    original = deferrable._of_linear

    def note(has_bias: bool, x: Tensor, gradient: Tensor) -> weight_gradients.Gradients:
        gradients = original(has_bias, x, gradient)
        assert gradients[0] is not None
        made.append(gradients[0].data_ptr())
        waited.append(gradient.data_ptr())
        return gradients

    with pytest.MonkeyPatch.context() as patch, deferring() as deferred:
        patch.setattr(deferrable, "_of_linear", note)
        y = deferrable.linear(_randn(5, 4), weight)
        y.register_hook(lambda gradient: waited.append(gradient.data_ptr()))
        y.exp().sum().backward()
    deferred.run()
    assert weight.grad is not None
    assert not weight.grad.requires_grad
    assert made == [weight.grad.data_ptr()]
    assert waited[0] == waited[1]


def test_weights_get_their_gradients_in_one_backward() -> None:
    """Which is what tells the end of a step's gradients to those who sum them over ranks."""
    weights = [_randn(4, 4, seed=at).requires_grad_() for at in range(3)]
    backwards: list[int] = []
    x = _randn(5, 4)
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: backwards.append(torch_compat.backward_id()))
    with deferring() as deferred:
        for weight in weights:
            x = deferrable.linear(x, weight)
        x.sum().backward()
    assert not backwards
    deferred.run()
    assert len(backwards) == 3
    assert len(set(backwards)) == 1


def test_a_waiting_gradient_is_not_changed_by_a_later_backward() -> None:
    """A parameter added to the result takes a view of its gradient for its own, and adds to it in place."""

    def run(linear: Op, split: bool) -> list[Tensor | None]:
        added, weight = _randn(3, 4).requires_grad_(), _randn(4, 4, seed=1).requires_grad_()
        all_deferred = []
        for at in range(3):
            with deferring() as deferred:
                y = linear(_randn(1, 3, 4, seed=at + 2), weight) + added.unsqueeze(0)
                y.square().sum().backward()
            all_deferred.append(deferred)
            if not split:
                deferred.run()
        for deferred in all_deferred:
            deferred.run()
        return [added.grad, weight.grad]

    assert tree_allclose(run(deferrable.linear, True), run(F.linear, False), rtol=1e-12) == 2


@pytest.mark.parametrize(
    "move",
    [
        lambda y: y.view(5, 3),
        lambda y: y,
    ],
    ids=["a view", "itself"],
)
def test_the_first_gradient_of_a_leaf_is_its_own(move: Op) -> None:
    """Two products whose results are added get one gradient, or a view of it, and biases of the result's size get no more than that."""
    first, second, up, down = (_randn(*shape, seed=at).requires_grad_() for at, shape in enumerate([(5, 3), (5, 3), (4, 3), (4, 3)]))
    total = torch.zeros(5, 3, dtype=torch.float64)
    for at in range(2):
        x = _randn(5, 4, seed=at + 4).requires_grad_()
        with deferring() as deferred:
            y = (deferrable.addmm(first, x, up) + move(deferrable.addmm(second, x, down))).exp()
            y.sum().backward()
        deferred.run()
        total += y.detach()
    tree_allclose([first.grad, second.grad], [total, total], rtol=1e-12)


def test_a_gradient_that_only_waiting_products_share_is_not_copied() -> None:
    x = _randn(5, 4).requires_grad_()
    first, second = (_randn(3, 4, seed=at).requires_grad_() for at in (1, 2))
    with deferring() as deferred:
        (deferrable.linear(x, first) + deferrable.linear(x, second).view(5, 3)).exp().sum().backward()
    assert deferred.nbytes == 8 * (5 * 4 + 5 * 3)
    deferred.run()
    tree_allclose([second.grad], [first.grad])


@pytest.mark.parametrize("with_gradient", [True, False], ids=["hidden", "data"])
def test_a_bias_made_of_a_leaf_beside_a_weight_that_is_one(with_gradient: bool) -> None:
    x = _randn(5, 4).requires_grad_(with_gradient)
    weight, bias = _randn(3, 4, seed=1).requires_grad_(), _randn(3, seed=2).requires_grad_()
    with deferring() as deferred:
        deferrable.linear(x, weight, 2 * bias).square().sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    deferred.run()
    y = F.linear(x, weight, 2 * bias)
    tree_allclose([weight.grad, bias.grad], [2 * y.T @ x, 4 * y.sum(0)], rtol=1e-12)


def test_one_pass_is_the_rule() -> None:
    """Outside of `deferring` everything is there when the backward ends, once for each backward, after what others do at its end."""
    weight, x = _randn(3, 4).requires_grad_(), _randn(5, 4).requires_grad_()
    found: list[bool] = []

    def at_the_end() -> None:
        found.append(weight.grad is None)

    y = deferrable.linear(x.sin(), weight)
    x.register_hook(lambda gradient: torch_compat.after_backward(at_the_end))
    y.sum().backward(retain_graph=True)
    first = None if weight.grad is None else weight.grad.clone()
    y.sum().backward()
    assert found == [True, False]
    tree_allclose([first, weight.grad], [x.sin().sum(0).expand(3, 4), 2 * x.sin().sum(0).expand(3, 4)])


def test_a_backward_that_fails_leaves_nothing() -> None:
    weight, x = _randn(3, 4).requires_grad_(), _randn(5, 4).requires_grad_()

    def fail(gradient: Tensor) -> None:
        raise ValueError("on purpose")

    hidden = x.sin()
    kept = StorageRef(hidden)
    hidden.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        deferrable.linear(hidden, weight).sum().backward()
    del hidden
    gc.collect()
    assert kept.expired()
    # Somebody who holds on to what it left doesn't make the next backward leave anything there.
    seen: list[Deferred] = []
    hidden = x.sin()
    hidden.register_hook(lambda gradient: seen.append(weight_gradients._find_deferred()))
    hidden.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        deferrable.linear(hidden, weight).sum().backward()
    deferrable.linear(x, weight).sum().backward()
    assert seen[0].nbytes > 0
    tree_allclose([weight.grad], [x.sum(0).expand(3, 4)])


def test_passes_in_the_wrong_order_are_refused() -> None:
    weight = _randn(3, 4).requires_grad_()
    with deferring():
        y = deferrable.linear(_randn(5, 4), weight).sum()
        y.backward(retain_graph=True)
        with pytest.raises(AutoparError, match="a second backward came by before the weight gradients of the first"):
            y.backward()
    assert weight.grad is None


def test_a_backward_knows_where_it_was_called() -> None:
    """The threads of a GPU's backward have variables of their own."""
    variable: ContextVar[int] = ContextVar("variable")
    found: list[int | None] = []

    def look(gradient: Tensor) -> None:
        token = variable.set(2)
        found.append(torch_compat.read_in_backward(variable))
        variable.reset(token)

    x = _randn(3).requires_grad_()
    x.register_hook(look)
    variable.set(1)
    x.sum().backward()
    assert found == [1]
    assert torch_compat.read_in_backward(variable) == 1


# Whole programs.


def _attention(x: Tensor, norm: Tensor, qkv: Tensor, qkv_bias: Tensor, out: Tensor, linear: Op, addmm: Op) -> Tensor:
    rows = F.rms_norm(x, (x.shape[-1],), norm)
    q, k, v = addmm(qkv_bias, rows.flatten(0, 1), qkv).view(*x.shape[:2], 3, 2, -1).unbind(2)
    y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
    return x + kernels.dropout(linear(y.transpose(1, 2).flatten(2), out), 0.2, True, splits={})


def _mlp(x: Tensor, norm: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, linear: Op) -> Tensor:
    return x + linear(kernels.dropout(F.gelu(linear(x * norm, up, up_bias)), 0.2, True, splits={}), down)


def _layer(split: bool, recomputed: bool) -> nn.Module:
    linear, addmm = (deferrable.linear, deferrable.addmm) if split else (F.linear, torch.addmm)

    def layer(x: Tensor, *w: Tensor) -> Tensor:
        return _mlp(_attention(x, *w[:4], linear, addmm), *w[4:], linear)

    graph = fx.Graph()
    graph.output(graph.call_function(layer, tuple(graph.placeholder(f"x{at}") for at in range(9))))
    module = fx.GraphModule(nn.Module(), graph)
    return Recomputed(module) if recomputed else module


WIDTH = 8
SHAPES: list[Shape] = [(WIDTH,), (WIDTH, 3 * WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (12, WIDTH), (12,), (WIDTH, 12)]
ORDERS = {
    "zero bubble": "F0 F1 F2 I0 I1 W0 I2 W2 W1",
    "weights at once": "F0 I0 W0 F1 F2 I2 W2 I1 W1",
    "one pass between": "F0 F1 I1 F2 B0 W1 I2 W2",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_transformer_over_micro_batches(order: str, recomputed: bool) -> None:
    def run(module: nn.Module, table: Op, actions: str) -> list[Tensor]:
        parameters = [_randn(*shape, seed=at).requires_grad_() for at, shape in enumerate([(11, WIDTH), *SHAPES, *SHAPES])]
        matrices = [p for p in parameters if p.dim() == 2]
        losses: dict[str, Tensor] = {}
        all_deferred: dict[str, Deferred] = {}
        with comm.active({}):
            for action in actions.split():
                kind, batch = action
                if kind == "F":
                    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(int(batch)))
                    with rng.isolated(int(batch)):
                        x = table(parameters[0], tokens)
                        for weights in (parameters[1:9], parameters[9:17]):
                            x = module(x, *weights)
                        losses[batch] = x.square().mean()
                elif kind == "B":
                    losses[batch].backward()
                elif kind == "I":
                    before = [p.grad if p.grad is None else p.grad.clone() for p in matrices]
                    with deferring() as all_deferred[batch]:
                        losses.pop(batch).backward()
                    assert all(p.grad is was if was is None else p.grad.equal(was) for p, was in zip(matrices, before, strict=True))
                else:
                    all_deferred.pop(batch).run()
        assert all(p.grad is not None for p in parameters)
        return [p.grad for p in parameters if p.grad is not None]

    expected = run(_layer(False, False), torch.ops.aten.embedding.default, "F0 B0 F1 B1 F2 B2")
    actual = run(_layer(True, recomputed), deferrable.embedding, ORDERS[order])
    assert tree_allclose(actual, expected, rtol=1e-12) == 17


def test_a_recomputed_layer_runs_no_further_than_its_last_product_needs() -> None:
    """The pass of the weights computes with what the pass of the inputs recomputed; the last product isn't run again.

    Products with weights alone are counted: torch doesn't count the attention of this device.
    """
    x, *weights = [_randn(*shape, seed=at).requires_grad_() for at, shape in enumerate([(2, 6, WIDTH), *SHAPES])]
    flops = {}
    for recomputed in (False, True):
        with comm.active({}), rng.isolated(0):
            loss = _layer(True, recomputed)(x, *weights).sum()
            with FlopCounterMode(display=False) as counter, deferring() as deferred:
                loss.backward()
            inputs = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                deferred.run()
        flops[recomputed] = (inputs, counter.get_total_flops())
    rows = 2 * 6
    products = 2 * rows * (WIDTH * 3 * WIDTH + WIDTH * WIDTH + WIDTH * 12)
    assert flops[True][1] == flops[False][1] == products + 2 * rows * WIDTH * 12
    assert flops[True][0] - flops[False][0] == products


def test_after_a_region_within_a_region_the_outer_one_goes_on() -> None:
    """A product of a region is no node of its own, which would be run again with its last input."""
    x, weight = _randn(5, 4).requires_grad_(), _randn(3, 4, seed=1).requires_grad_()
    with weight_gradients.in_recomputed_region():
        with weight_gradients.in_recomputed_region():
            pass
        inside = deferrable.linear(x, weight)
    outside = deferrable.linear(x, weight)
    assert ["_Product" in str(y.grad_fn) for y in (inside, outside)] == [False, True]


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_gathered_and_broadcast_weights(recomputed: bool) -> None:
    """ZeRO with a tensor-parallel product, on two ranks: the second pass sums and scatters, and no gathered weight waits for it."""
    whole = [_randn(*shape, seed=at) for at, shape in enumerate([(4, WIDTH), (12, WIDTH), (12,), (WIDTH, 12)])]
    scatters: list[bool] = []
    later = [False, False]

    def on(rank: int, split: bool) -> list[Tensor | None]:
        linear = deferrable.linear if split else F.linear
        seen: list[StorageRef] = []

        def layer(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
            full = collectives.all_gather(up, "dp", 0, save=False)
            seen.append(StorageRef(full))
            y = F.gelu(linear(x, full, collectives.sum_gradient(bias, "dp")))
            return x + linear(y, collectives.sum_gradient(down.to(torch.float64), "dp"))

        graph = fx.Graph()
        graph.output(graph.call_function(layer, tuple(graph.placeholder(f"x{at}") for at in range(4))))
        module: nn.Module = fx.GraphModule(nn.Module(), graph)
        module = Recomputed(module) if recomputed and split else module  # type: ignore[arg-type]
        parts = [whole[0].chunk(2)[rank], whole[1].chunk(2)[rank], whole[2], whole[3]]
        x, *parameters = [part.clone().requires_grad_() for part in parts]
        all_deferred = []
        with regather():
            losses = [module(x * at, *parameters).square().sum() for at in (1, 2)]
        for loss in losses:
            with deferring() as deferred:
                loss.backward()
            all_deferred.append(deferred)
        del losses, loss
        gc.collect()
        if split:
            assert all(p.grad is None for p in parameters)
            assert all(ref.expired() for ref in seen)
        later[rank] = split
        for deferred in reversed(all_deferred):
            deferred.run()
        later[rank] = False
        return [x.grad, *(p.grad for p in parameters)]

    original = comm.ThreadAxis.reduce_stack

    def note(axis: comm.ThreadAxis, parts: Tensor) -> Tensor:
        scatters.append(later[axis.index])
        return original(axis, parts)

    mesh = Mesh(("dp",), (2,))
    expected = threads.run(mesh, lambda rank: on(rank, False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm.ThreadAxis, "reduce_stack", note)
        actual = threads.run(mesh, lambda rank: on(rank, True))
    assert tree_allclose(actual, expected, rtol=1e-12) == 8
    assert scatters == [True] * 4


@pytest.mark.parametrize("name", ["gpt2", "vit", "falcon"])
def test_captured_models(name: str) -> None:
    """Every operator on parameters of a captured graph replaced: the loss, and each gradient after its pass."""
    model, inputs = ZOO[name]()
    captured = capture(model, inputs)
    module = captured.fx
    spaces, _ = find_spaces(captured.graph)
    named = dict(model.named_parameters())
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    parameters: set[fx.Node] = set()
    replaced: list[str] = []
    for node in module.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        is_moved = str(node.target) in ("aten.t.default", "aten.to.dtype") and node.args[0] in parameters
        if is_moved or (node.op == "placeholder" and node.name.startswith("p_")):
            parameters.add(node)
        op = captured.graph.by_name.get(node.name)
        weights = [] if op is None else [op.operands[index].op for index in facts_of(op, spaces.get(op.name)).weights]
        if weights and {parameter.name for parameter in parameters}.issuperset(weights):
            env[node].target = DEFERRABLE[str(node.target)]
            replaced.append(str(node.target))
    assert len(replaced) >= 8

    def run(program: fx.GraphModule, split: bool) -> tuple[Tensor, dict[str, Tensor], set[str]]:
        model.zero_grad()
        state = {**dict(model.named_buffers()), **captured.constants, **named}
        bound = [*(state[key] for key in (*captured.parameters, *captured.buffers)), *captured.bind((), inputs)]
        loss = program(*bound)[0]
        early: set[str] = set()
        if split:
            with deferring() as deferred:
                loss.sum().backward()
            early = {key for key, p in named.items() if p.grad is not None}
            deferred.run()
        else:
            loss.sum().backward()
        return loss.detach(), {key: p.grad.clone() for key, p in named.items() if p.grad is not None}, early

    expected = run(module, False)
    actual = run(fx.GraphModule(module, graph), True)
    tree_allclose(actual[:2], expected[:2], rtol=1e-11)
    waited = {key for key, p in named.items() if p.dim() >= 2} - actual[2]
    assert len(waited) >= 8
