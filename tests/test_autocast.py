"""``torch.autocast`` around a compiled model, and inside of its forward: the casts of one device, on one device bit for bit.

Roundings differ where a sum over ranks or micro-batches has parts: each part is rounded to bfloat16, and so is their sum, where one device
rounds once. So three roundings of at most `U` each differ per sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import autopar
from autopar.capture import Captured, capture, split_call
from autopar.capture.autocast import find_casts
from autopar.errors import CaptureError, InputError
from autopar.ir import OpKind
from autopar.ops import Autocast
from tests import zoo
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases

aten = torch.ops.aten

U = 2.0**-8
"""Unit roundoff of bfloat16: half the distance from 1 to the next number."""

State = Callable[[], AbstractContextManager[Any]]
BFLOAT16: State = partial(torch.autocast, "cpu", torch.bfloat16)


# --- one device: the captured graph against the model ---------------------------------------------------------------------------------


def _run(captured: Captured, model: nn.Module, inputs: Any) -> list[Tensor]:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    tensors |= captured.constants
    buffers = [tensors[name].clone() for name in captured.buffers]
    # The cast of a weight whose only reader it is, is how the program reads that weight.
    read = [node.meta["val"].dtype for node in captured.fx.graph.find_nodes(op="placeholder")]
    parameters = [tensors[name].to(dtype) for name, dtype in zip(captured.parameters, read, strict=False)]
    results = captured.fx(*parameters, *buffers, *captured.bind(*split_call(inputs)))
    return list(results[: len(results) - len(captured.mutated_buffers)])


def _differentiate(outputs: list[Tensor], model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Gradients of parameters and inputs, from the same gradients of the outputs in each call; they are removed from where they are."""
    torch.autograd.backward([out for out in outputs if out.requires_grad], [torch.ones_like(out) for out in outputs if out.requires_grad])
    leaves = dict(model.named_parameters())
    leaves |= {f"input {n}": x for n, x in enumerate(pytree.tree_leaves(inputs)) if isinstance(x, Tensor) and x.requires_grad}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return gradients


def _compare(model: nn.Module, inputs: Any, state: State = BFLOAT16, rtol: float = 0.0) -> Captured:
    """Check that the captured graph computes what the model does in `state`: outputs bit for bit, gradients to `rtol`; same dtypes."""
    args, kwargs = split_call(inputs)
    torch.manual_seed(1)
    with state():
        outputs = [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
        captured = capture(model, inputs)
    expected = _differentiate(outputs, model, inputs)
    torch.manual_seed(1)
    results = _run(captured, model, inputs)
    actual = _differentiate(results, model, inputs)
    assert [x.dtype for x in results] == [x.dtype for x in outputs]
    planned = [captured.graph.tensor(value).dtype for value in captured.graph.ops[-1].operands]
    assert [f"torch.{dtype}" for dtype in planned][: len(results)] == [str(x.dtype) for x in results]
    tree_allclose(results, outputs, rtol=0.0)
    tree_allclose(actual, expected, rtol=rtol)
    return captured


def _casts(captured: Captured) -> list[str]:
    """Names of the casts, and of the weights that are read in a narrower dtype than they have."""
    read = [
        op.target for op in captured.graph.of_kind(OpKind.PARAMETER) if op.results[0].requires_grad and op.results[0].dtype != "float32"
    ]
    return [*read, *(node.name for node in captured.fx.graph.nodes if node.target is aten.to.dtype)]


def _model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = getattr(zoo, name)()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model.float(), {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "t5", "gemma2", "resnet"])
def test_models_compute_what_they_do_under_autocast(name: str) -> None:
    dtype = torch.float16 if name == "bert" else torch.bfloat16
    model, inputs = _model(name)
    captured = _compare(model, inputs, partial(torch.autocast, "cpu", dtype))
    wide = capture(model, inputs)
    assert len(_casts(captured)) >= len(_casts(wide)) + 10
    assert not any(node.meta["val"].dtype == dtype for node in wide.fx.graph.nodes if isinstance(node.meta.get("val"), Tensor))


class Lines(nn.Module):
    """A function of inputs and two weights of (4, 4)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.function = function
        self.first = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.second = nn.Parameter(torch.randn(4, 4, generator=generator))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, self.first, self.second)


def _input(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), requires_grad=True)


def _losses(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    classes = F.cross_entropy(x @ w, torch.arange(4))
    squares = F.mse_loss(x @ w, x)
    return classes + squares + F.kl_div((x @ v).log_softmax(-1), x.softmax(-1), reduction="batchmean")


LINES: Mapping[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "a weight read twice": (lambda x, w, v: (x @ w) @ w + x @ w, (3, 4)),
    "an activation read twice": (lambda x, w, v: (h := x @ w.float() + x, h @ w + h @ v)[1], (3, 4)),
    "a product of a tensor with itself": (lambda x, w, v: (x * 2) @ x @ x, (4, 4)),
    "views of a weight": (lambda x, w, v: x @ w.t() @ w[:, :4] + x @ w.T, (3, 4)),
    "a weight converted to its own dtype": (lambda x, w, v: x @ w + x @ w.float() + x @ w.contiguous(), (3, 4)),
    "dtypes that are promoted": (lambda x, w, v: torch.stack([torch.cat([x @ w, x]), torch.addcmul(x, x @ w, x).repeat(2, 1)]), (3, 4)),
    "in place": (lambda x, w, v: (x @ w).add_(x).mul_(2) + (x * 1).addmm_(x, w) + (x * 1).add_(x @ v), (4, 4)),
    "an einsum of one product": (lambda x, w, v: torch.einsum("bij,oj->bio", x, w), (2, 3, 4)),
    "einsums of a weight": (lambda x, w, v: torch.einsum("bij,oj->bio", x, w) + torch.einsum("bij,jo->bio", x, w), (2, 3, 4)),
    "an einsum that sums before": (lambda x, w, v: torch.einsum("bij,oj->bo", x, w), (2, 3, 4)),
    "an einsum of three": (lambda x, w, v: torch.einsum("bij,oj,op->bip", x, w, v), (2, 3, 4)),
    "powers of a matrix": (lambda x, w, v: torch.linalg.matrix_power(x, 3) @ w, (4, 4)),
    "attention with an added mask": (lambda x, w, v: F.scaled_dot_product_attention(x, x @ w, x @ v, w[:3, :3]), (2, 2, 3, 4)),
    "losses": (_losses, (4, 4)),
    "norms": (lambda x, w, v: F.layer_norm(x @ w, (4,), v[0], v[1]) + (x @ w).norm(dim=-1, keepdim=True) + (x @ w).cumsum(0), (4, 4)),
    "float64": (lambda x, w, v: x.double() @ w.double() + x @ w, (3, 4)),
    "random numbers": (lambda x, w, v: F.dropout(x @ w, 0.5) @ v, (3, 4)),
    "a choice by the state": (lambda x, w, v: x @ w if torch.is_autocast_enabled("cpu") else x @ v, (3, 4)),
    "a cell": (lambda x, w, v: torch.gru_cell(x, x, w.repeat(3, 1), v.repeat(3, 1)), (3, 4)),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_compute_what_they_do_under_autocast(name: str) -> None:
    function, shape = LINES[name]
    captured = _compare(Lines(function), (_input(*shape),))
    assert any(node.meta["val"].dtype == torch.bfloat16 for node in captured.fx.graph.nodes if isinstance(node.meta.get("val"), Tensor))


MODULES: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 2, 2)),
        (2, 3, 8, 8),
    ),
    "a recurrent layer": (lambda: nn.LSTM(4, 6, batch_first=True), (2, 3, 4)),
    "an encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 3, 8)),
    "a weight that is computed": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (3, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_compute_what_they_do_under_autocast(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    assert _casts(_compare(make(), (_input(*shape),)))


def _regions(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    outside = x @ w
    with torch.autocast("cpu", enabled=False):
        off = outside.float() @ w
        with torch.autocast("cpu", torch.bfloat16):
            inside = x @ w
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        uncached = off @ w
    with torch.no_grad():
        constant = x @ w
    with torch.autocast("cpu", torch.float16):
        other = (x * 1) @ v
    return outside, off, inside, uncached, constant, other, (x @ w) @ w


@pytest.mark.parametrize(
    "state",
    [
        BFLOAT16,
        partial(torch.autocast, "cpu", enabled=False),
        nullcontext,
        partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False),
        partial(torch.autocast, "cuda", torch.bfloat16),
    ],
    ids=["on", "off", "none", "without a cache", "for another device"],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_regions_inside_of_the_forward_have_their_state(state: State) -> None:
    # The capture may order calls of which none reads another, and so the gradients in float32 that are added.
    _compare(Lines(_regions), (_input(3, 4),), state, rtol=2.0**-21)


def test_weights_are_cast_once_and_activations_for_each_reader() -> None:
    model = Lines(lambda x, w, v: (h := x * 2, h @ w + h @ w)[1])
    with BFLOAT16():
        once = capture(model, (_input(3, 4),))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            twice = capture(model, (_input(3, 4),))
    assert _casts(once) == ["first", "mul_bfloat16", "mul_bfloat16_1"]
    assert _casts(twice) == ["mul_bfloat16", "p_first_bfloat16", "mul_bfloat16_1", "p_first_bfloat16_1"]


class Product(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


class WideProduct(Product):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight


@pytest.mark.parametrize("function", [Product, WideProduct])
def test_functions_of_the_user_run_in_the_state_of_their_call(function: type[torch.autograd.Function]) -> None:
    _compare(Lines(lambda x, w, v: function.apply(x @ v, w) * 2), (_input(3, 4),))


def test_an_operator_of_the_user_is_cast_as_registered() -> None:
    @torch.library.custom_op("autopar_tests::product", mutates_args=())
    def product(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    product.register_fake(lambda x, w: x @ w)
    product.register_autograd(
        lambda ctx, grad: (grad @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ grad),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    product.register_autocast("cpu", torch.bfloat16)
    captured = _compare(Lines(lambda x, w, v: torch.ops.autopar_tests.product(x, w) * 2), (_input(3, 4),))
    assert len(_casts(captured)) == 2


def test_casts_that_cannot_be_stated_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *inputs: Tensor) -> Any:
            return self.layer(*inputs)

    for layer, inputs in ((nn.GRU(4, 4), [_input(3, 2, 4)]), (nn.Bilinear(4, 4, 2), [_input(3, 4), _input(3, 4)])):
        capture(Net(layer), tuple(inputs))
        with BFLOAT16(), pytest.raises(CaptureError, match=r"bfloat16 on cpu.*return self.layer\(\*inputs\).*enabled=False"):
            capture(Net(layer), tuple(inputs))


def test_gradients_that_are_added_otherwise_are_noted() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), _input(2, 3, 4)
    with BFLOAT16():
        captured = capture(model, (x,))
        expected = model(x)[0]
    assert torch.equal(_run(captured, model, (x,))[0], expected)
    assert any("added in bfloat16" in note for note in captured.notes)
    assert not any("added in bfloat16" in note for note in capture(model, (x,)).notes)


# --- the casts for CUDA, which torch has without a device for fake tensors --------------------------------------------------------------

T = object()
HALF, FLOAT, INTEGER = torch.float16, torch.float32, torch.int64
ON_CUDA: Mapping[Any, tuple[list[tuple[tuple[int, ...], torch.dtype]], tuple[Any, ...], tuple[torch.dtype | None, ...]]] = {
    aten.linear.default: ([((2, 3, 4), FLOAT), ((5, 4), FLOAT), ((5,), FLOAT)], (T, T, T), (HALF, HALF, HALF)),
    aten.softmax.int: ([((2, 3), HALF)], (T, -1), (FLOAT,)),
    aten.layer_norm.default: ([((2, 4), HALF), ((4,), FLOAT), ((4,), FLOAT)], (T, [4], T, T), (FLOAT, None, None)),
    aten.sum.dim_IntList: ([((2, 4), HALF)], (T, [1]), (FLOAT,)),
    aten.mean.dim: ([((2, 4), HALF)], (T, [1]), (None,)),
    aten.norm.ScalarOpt_dim: ([((2, 4), HALF)], (T, 2, [1]), (FLOAT,)),
    aten.mse_loss.default: ([((2, 4), HALF), ((2, 4), FLOAT)], (T, T), (FLOAT, None)),
    aten.scaled_dot_product_attention.default: ([((2, 2, 3, 4), FLOAT)] * 3, (T, T, T), (HALF, HALF, HALF)),
    aten.einsum.default: ([((2, 3, 4), FLOAT), ((5, 4), FLOAT)], ("bij,oj->bio", [T, T]), (HALF, HALF)),
}


@pytest.mark.parametrize("target", ON_CUDA, ids=str)
def test_casts_for_cuda_are_read_off_torch_too(target: Any) -> None:
    tensors, template, casts = ON_CUDA[target]
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        fakes = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in tensors]
    operands = iter([graph.placeholder(f"x{number}") for number in range(len(tensors))])
    node = graph.call_function(target, fx.node.map_aggregate(template, lambda part: next(operands) if part is T else part))
    assert find_casts(node, fakes, Autocast((("cuda", HALF),)), mode).casts == casts
    assert find_casts(node, fakes, Autocast((("cpu", HALF),)), mode).casts == (None,) * len(casts)


def test_a_loss_without_its_weight_is_the_operator_that_has_a_rule() -> None:
    """CUDA's autocast casts between the log-softmax and the loss, where the operators below ``cross_entropy`` are left."""

    def loss(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return aten.nll_loss_forward.default(aten._log_softmax.default(x @ w, 1, False), torch.tensor([1, 2, -100]), None, 1, -100)[0]

    captured = _compare(Lines(loss), (_input(3, 4),), nullcontext)
    assert "aten.nll_loss_nd.default" in {op.target for op in captured.graph.ops}


def test_a_compiled_model_on_one_device_is_exact() -> None:
    def loss(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        low = x @ w
        with torch.autocast("cpu", enabled=False):
            high = low.float() @ v
        return (high @ w).float().square().mean() + (high @ v).sum()

    reference, model = Lines(loss), autopar.compile(Lines(loss))
    for step, state in enumerate((BFLOAT16, nullcontext, partial(torch.autocast, "cpu", torch.float16), BFLOAT16)):
        x = _input(3, 4).detach() * (step + 1)
        with state():
            expected = reference(x)
            actual = model.train_step(x)
            assert torch.is_autocast_enabled("cpu") is (state is not nullcontext)
        expected.backward()
        assert torch.equal(actual, expected)
        tree_allclose(*([p.grad for p in one.parameters()] for one in (model, reference)), rtol=0.0)
    assert len(model._programs._made) == 3


def test_a_device_without_tensors_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with Autocast((("cuda", torch.bfloat16),)).active(), pytest.raises(CaptureError, match="give example inputs on cuda"):
        capture(model, (torch.zeros(3, 4),))
    with BFLOAT16():
        assert len(_casts(capture(model, (torch.zeros(3, 4),)))) == 3


# --- plans, in float64 ------------------------------------------------------------------------------------------------------------------


PINS: Mapping[str, Mapping[str, object]] = {
    "dp": {"dp": 2},
    "fsdp": {"dp": 2, "fsdp": True},
    "tp": {"tp": 2, "vocabulary": True},
    "pp": {"pp": 2, "schedule": "1f1b", "microbatches": 2},
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_plans_with_casts_raised_to_float64_are_exact(name: str) -> None:
    model, inputs = _model(name)
    with BFLOAT16():
        for pins in PINS.values():
            plan = autopar.plan(model, inputs, "2xcpu", pins=pins)
            found = autopar.verify(model, inputs, plan)
            found.check()
            assert found.worst <= 1e-9
            assert len(found.errors) > 10
            assert found.capture_error == 0.0
            assert any("outside of torch.autocast" in remark for remark in found.remarks)


# --- two processes ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _single_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _distance(actual: Tensor, expected: Tensor, scale: float) -> float:
    """Distance relative to a tensor's norm, or to `scale` where that is larger: the gradient of a key's bias is rounding alone."""
    return float((actual.double() - expected.double()).norm() / max(float(expected.double().norm()), scale))


def _whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters() if p.grad is not None}


def _check_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    assert set(actual) == set(expected)
    scale = 1e-4 * max(float(x.norm()) for x in expected.values())
    distances = {name: _distance(actual[name], expected[name], scale) for name in expected}
    assert max(distances.values()) <= bound, max(distances.items(), key=lambda item: item[1])
    assert max(distances.values()) > 0.0, "parts of sums are rounded, so nothing was split"


def _bound(kind: str, layers: int) -> float:
    """How far gradients may be from those of one device.

    With a batch in parts only the gradients of weights are sums that differ, by three roundings. With features in parts the results of
    two products per layer, and the gradients of what two others read, and of what the head reads, are such sums; roundings are
    independent, so n of them add up to less than ``sqrt(n)`` times one (Higham and Mary 2019, "A New Approach to Probabilistic Rounding
    Error Analysis").
    """
    return U * (3 if kind != "tp" else (3 * (4 * layers + 1)) ** 0.5)


def models_under_autocast_train_as_on_one_device() -> None:
    with _single_precision():
        for name in ("gpt2", "llama"):
            model, inputs = _model(name)
            reference = copy.deepcopy(model)
            with BFLOAT16():
                expected = reference(**inputs)
            expected.loss.backward()
            gradients = _whole_gradients(reference)
            for kind, pins in PINS.items():
                compiled = autopar.compile(copy.deepcopy(model), pins=pins)
                with BFLOAT16():
                    actual = compiled(**inputs)
                actual.loss.backward()
                assert actual.logits.dtype == torch.bfloat16
                bound = _bound(kind, 2)
                assert abs(actual.loss - expected.loss) <= bound * abs(expected.loss)
                assert {p.grad.dtype for p in compiled.parameters()} == {torch.float32}
                _check_close(_whole_gradients(compiled), gradients, bound)


class Net(nn.Module):
    """Four blocks of products and a loss; the first weight is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.layers[0](x)
        for layer in self.layers:
            x = x + layer(x)
        return F.mse_loss(self.head(x), y)


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 8, generator=generator), torch.randn(8, 4, generator=generator)


def a_scaler_trains_in_float16_as_on_one_device() -> None:
    """The loss is small enough that gradients vanish in float16 without a scale; one step overflows and is skipped.

    A pipeline, whose backwards run before it knows the scale, uses that of the step before, and doesn't overflow where it would.
    """

    def train(model: nn.Module, factors: tuple[float, ...]) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**11)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales = []
        for step, factor in enumerate(factors):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(*_batch(step)) * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return [
            torch.tensor(scales),
            *(getattr(p, "full_tensor", lambda p=p: p)().detach() - q for p, q in zip(model.parameters(), start, strict=True)),
        ]

    with _single_precision():
        start = [p.detach().clone() for p in Net().parameters()]
        for kind, pins in PINS.items():
            small, large = 2.0**-14, 2.0**20
            factors = (small, small, small if kind == "pp" else large, small)
            expected, actual = train(Net(), factors), train(autopar.compile(Net(), pins=pins), factors)
            assert expected[0].tolist() == [2.0**10, 2.0**11, 2.0**11 if kind == "pp" else 2.0**10, 2.0 ** (12 if kind == "pp" else 10)]
            assert all(change.abs().max() > 1e-4 for change in expected[1:])
            assert torch.equal(actual[0], expected[0])
            # Unit roundoff of float16, 17 sums whose three roundings differ, in three steps.
            tree_allclose(actual[1:], expected[1:], rtol=2.0**-11 * 3 * 17)


def each_state_has_its_program_over_the_same_parameters() -> None:
    with _single_precision():
        for pins in ({"tp": 2}, {"pp": 2, "schedule": "1f1b", "microbatches": 2}):
            model, reference = autopar.compile(Net(), pins=pins), Net()
            optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, reference)]
            programs = []
            for step, state in enumerate((nullcontext, BFLOAT16, nullcontext, BFLOAT16, partial(torch.autocast, "cpu", enabled=False))):
                losses = []
                for one, optimizer in zip((model, reference), optimizers, strict=True):
                    optimizer.zero_grad()
                    with state():
                        losses.append(one(*_batch(step)))
                    losses[-1].backward()
                    optimizer.step()
                programs.append(model._last)
                # After the first step the weights differ by what bfloat16 rounds of their changes.
                assert abs(losses[0] - losses[1]) <= (3 * U if step else 1e-6) * losses[1]
                assert _computes_in_bfloat16(model._last.captured) is (state is BFLOAT16)
            assert programs[0] is programs[2] is programs[4]
            assert programs[1] is programs[3] is not programs[0]


def _computes_in_bfloat16(captured: Captured) -> bool:
    return any(tensor.dtype == "bfloat16" for op in captured.graph.ops for tensor in op.results)


def ranks_in_other_states_are_told() -> None:
    with _single_precision():
        model = autopar.compile(Net(), _batch(0), pins={"dp": 2})
        rank = torch.distributed.get_rank()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=rank == 1),
            pytest.raises(InputError, match=r"torch.autocast is off on rank 0, bfloat16 on cpu on rank 1"),
        ):
            model(*_batch(0))


CASES: tuple[Case, ...] = (
    models_under_autocast_train_as_on_one_device,
    a_scaler_trains_in_float16_as_on_one_device,
    each_state_has_its_program_over_the_same_parameters,
    ranks_in_other_states_are_told,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), CASES)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_on_two_ranks(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
