"""Rules that users register for operators of their own: what is refused, checked, planned and run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.capture import capture
from autopar.checks import threads
from autopar.checks.oracle import describe, trace
from autopar.errors import InputError, PlanError, UnknownOpError, VerificationError
from autopar.ir.layout import Mesh
from autopar.ops import kernels, rng
from autopar.rewrite import rewrite
from autopar.rules import table

torch.set_num_threads(1)

RULE = "b s k!, k! i! -> b s i!"


def gated(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(x @ w) * x


@torch.library.custom_op("declared_rules::gate", mutates_args=())
def gate(x: Tensor, w: Tensor) -> Tensor:
    """An operator with a backward of its own, which torch can't look into."""
    return gated(x, w)


@gate.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, gradient: Tensor) -> Any:
    x, w = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
    with torch.enable_grad():
        return torch.autograd.grad(gated(x, w), (x, w), gradient)


gate.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.library.custom_op("declared_rules::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    """An operator that draws random numbers without saying so in its name."""
    return x + torch.rand_like(x)


@noisy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


noisy.register_autograd(lambda ctx, gradient: gradient)


@torch.library.custom_op("declared_rules::random_shift", mutates_args=())
def random_shift(x: Tensor) -> Tensor:
    """As `noisy`, with a name that says so."""
    return x + torch.rand_like(x)


@random_shift.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


random_shift.register_autograd(lambda ctx, gradient: gradient)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins without registered rules."""
    monkeypatch.setattr(table, "_DECLARED", {})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.ops.declared_rules.gate(x, self.weight))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def build() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Stack(), (torch.randn(8, 4, 8),)


def example() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 8), (8, 8)))  # type: ignore[return-value]


PIPELINE = {"pp": 2, "microbatches": 2}


def test_an_operator_without_a_rule_is_refused_by_micro_batches_with_line_and_remedy() -> None:
    model, call = build()
    with pytest.raises(InputError, match=r"declared_rules.gate.default at .*torch.ops.declared_rules.gate\(x, self.weight\)") as caught:
        autopar.plan(model, call, "2xcpu", pins=PIPELINE)
    assert 'autopar.register_rule("declared_rules::gate", ...)' in str(caught.value)


def test_strict_names_the_remedy() -> None:
    model, call = build()
    with pytest.raises(UnknownOpError, match=r'autopar.register_rule\("declared_rules::gate", ...\)'):
        autopar.plan(model, call, "2xcpu", strict=True)


@pytest.mark.parametrize("pins", [PIPELINE, {"pp": 2, "microbatches": 4, "recompute": "full"}, {"dp": 2}, {"tp": 2}], ids=str)
def test_a_registered_rule_is_planned_and_run_exactly(pins: dict[str, object]) -> None:
    autopar.register_rule("declared_rules::gate", RULE, flops=2.0, family="matmul")
    model, call = build()
    verification = autopar.verify(model, call, cluster="2xcpu", pins=pins)
    verification.check()
    assert not verification.plan.unruled
    if pins == {"dp": 2}:
        assert verification.splits["dp:b"]


def test_the_oracle_accepts_a_right_rule_and_names_what_it_compared() -> None:
    autopar.register_rule("declared_rules::gate", RULE)
    compared = autopar.check_rule("declared_rules::gate", *example())
    assert {"b over x=2", "s over x=4", "b,s over x=2 x y=2"} <= set(compared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b s k!, k! i -> b s i", "split i over x=2"),  # the result needs all features of x
        ("b s k!, k! i! -> s b i!", "doesn't have size|is|fits"),
    ],
)
def test_the_oracle_refuses_wrong_rules(text: str, message: str) -> None:
    autopar.register_rule("declared_rules::gate", text)
    with pytest.raises((VerificationError, InputError), match=message):
        autopar.check_rule("declared_rules::gate", *example())


def test_the_oracle_compares_gradients() -> None:
    """A backward that mixes samples is wrong to split, though the forward isn't."""

    @torch.library.custom_op("declared_rules::mixed_backward", mutates_args=())
    def mixed(x: Tensor) -> Tensor:
        return x.clone()

    mixed.register_fake(torch.empty_like)
    mixed.register_autograd(lambda ctx, gradient: gradient.mean(0, keepdim=True).expand_as(gradient))
    autopar.register_rule("declared_rules::mixed_backward", "b i -> b i")
    with pytest.raises(VerificationError, match="gradient of operand 0"):
        autopar.check_rule("declared_rules::mixed_backward", example()[1])


class Halved(torch.autograd.Function):
    """A backward that isn't the forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / 2


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + Halved.apply(layer(x))  # type: ignore[no-untyped-call]
        return x.square().mean()


def test_a_rule_of_an_autograd_function() -> None:
    """Its name is the one that a refusal names."""
    model, call = Halving(), (torch.randn(8, 8),)
    with pytest.raises(InputError, match=r"no rule and so needs all") as caught:
        autopar.plan(model, call, "2xcpu", pins=PIPELINE)
    (name,) = re.findall(r'register_rule\("([^"]+)"', str(caught.value))
    autopar.register_rule(name, "b i -> b i")
    assert autopar.check_rule(name, example()[1], function=Halved.apply)
    autopar.verify(model, call, cluster="2xcpu", pins=PIPELINE).check()


def test_examples_that_compare_nothing_are_refused() -> None:
    autopar.register_rule("declared_rules::gate", RULE)
    x, w = example()
    with pytest.raises(InputError, match="nothing can be split by b of size 5"):
        autopar.check_rule("declared_rules::gate", x.detach()[:1].expand(5, 4, 8), w)
    with pytest.raises(InputError, match="torch has no operator declared_rules::unknown"):
        autopar.check_rule("declared_rules::unknown", x)
    with pytest.raises(InputError, match="declared_rules::noisy has no rule for this call"):
        autopar.check_rule("declared_rules::noisy", x)
    autopar.register_rule("declared_rules::noisy", "b s i -> b s i", random=True)
    with pytest.raises(InputError, match="draws random numbers"):
        autopar.check_rule("declared_rules::noisy", x)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gate", "b -> b", "no operator's name"),
        ("aten::linear", "n i, o i -> n o", "has a rule of autopar's own"),
        ("m::op", "b s i, k i -> b s q", "loop q in a result and in no operand.* write q!"),
        ("m::op", "b i i -> b", "loop i twice in one tensor"),
        ("m::op", "b i, i o", "one ->"),
        ("m::op", "b i -> b i -> b", "one ->"),
        ("m::op", "b (i, i o -> b", r"'\(', which is no loop"),
        ("m::op", "b v* -> b v", r"has v\*; a loop marked \* is split by a kernel"),
        ("m::op", "b i $ -> b", r"has '\$'"),
        ("m::op", "b i -> b, i", "loop b in some results only"),
        ("m::op", [], "there is no text"),
        ("m::op", 3, "one ->"),
        ("m::op", ["b -> b", 3], "one ->"),
    ],
)
def test_what_is_no_rule_is_refused(name: str, text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        autopar.register_rule(name, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "product"}, "family 'product' is unknown; there are pointwise, matmul"),
        ({"flops": -1.0}, "flops=-1.0"),
        ({"sizes": {"h": 0}}, "sizes has h=0"),
        ({"linear": [-1]}, "numbers of operands, from 0; not -1"),
        ({"linear": 0}, "lists of numbers of operands"),
        ({"flops": "2"}, "flops='2'"),
        ({"shape_arg": -1}, "shape_arg=-1; the position of an argument"),
    ],
)
def test_options_that_cant_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        autopar.register_rule("m::op", "b i -> b i", **options)


def test_a_rule_is_exchanged_only_on_request() -> None:
    autopar.register_rule("declared_rules::gate", RULE)
    autopar.register_rule("declared_rules::gate", RULE)  # a module that is imported twice
    with pytest.raises(InputError, match=r"has a registered rule already, .* replace=True"):
        autopar.register_rule("declared_rules::gate", "b s! k!, k! i! -> b s! i!")
    autopar.register_rule("declared_rules::gate", "b s! k!, k! i! -> b s! i!", replace=True)
    assert not any("s" in text.split(" over")[0] for text in autopar.check_rule("declared_rules::gate", *example()))


def test_calls_with_other_numbers_of_dims_need_a_text_each() -> None:
    autopar.register_rule("declared_rules::gate", RULE)
    x, w = example()
    with pytest.raises(InputError, match=r"no text of the rule .* fits its call .*give register_rule a list of texts"):
        autopar.check_rule("declared_rules::gate", x[0], w)
    autopar.register_rule("declared_rules::gate", [RULE, "s k!, k! i! -> s i!"], replace=True)
    assert autopar.check_rule("declared_rules::gate", x[0], w)
    assert autopar.check_rule("declared_rules::gate", x, w)


def test_sizes_of_merged_dims_are_found_or_asked_for() -> None:
    @torch.library.custom_op("declared_rules::split_heads", mutates_args=())
    def split_heads(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2).clone(memory_format=torch.contiguous_format)

    @split_heads.register_fake
    def _(x: Tensor, heads: int) -> Tensor:
        return x.new_empty(x.shape[0], heads, x.shape[1], x.shape[2] // heads)

    x = torch.randn(2, 4, 12, dtype=torch.float64)
    autopar.register_rule("declared_rules::split_heads", "b s (h! d) -> b h! s d")
    assert autopar.check_rule("declared_rules::split_heads", x, 3)

    @torch.library.custom_op("declared_rules::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1))[:, 0].clone(memory_format=torch.contiguous_format)

    halve.register_fake(lambda x: x.new_empty(x.shape[0], x.shape[1] // 2))
    autopar.register_rule("declared_rules::halve", "b (two! i) -> b i")
    assert "i over x=2" in autopar.check_rule("declared_rules::halve", x[0])
    autopar.register_rule("declared_rules::halve", "b (p! q! i) -> b i", replace=True)
    with pytest.raises(InputError, match=r"the sizes of p and q in \(p q i\) aren't known; give them as sizes="):
        autopar.check_rule("declared_rules::halve", x[0])
    autopar.register_rule("declared_rules::halve", "b (p! q! i) -> b i", sizes={"p": 1}, replace=True)
    assert "i over x=2" in autopar.check_rule("declared_rules::halve", x[0])


def test_a_plan_and_a_program_need_the_same_rules(tmp_path: Path) -> None:
    model, call = build()
    without = autopar.plan(model, call, "2xcpu", pins={"dp": 2})
    autopar.register_rule("declared_rules::gate", RULE)
    with pytest.raises(PlanError, match=r"none of them was registered when it was made: declared_rules\.gate\.default: b s k!"):
        autopar.verify(model, call, without)
    autopar.plan(model, call, "2xcpu", pins=PIPELINE).save(tmp_path / "plan.json")
    plan = autopar.Plan.load(tmp_path / "plan.json")
    autopar.verify(model, call, plan).check()
    autopar.register_rule("declared_rules::gate", "b s! k!, k! i! -> b s! i!", replace=True)
    with pytest.raises(PlanError, match="they differ from those registered now"):
        autopar.verify(model, call, plan)
    table._DECLARED.clear()
    with pytest.raises(PlanError, match=r"none is registered now; ops without a rule are declared_rules\.gate\.default"):
        autopar.verify(model, call, plan)


def test_plans_of_graphs_without_registered_rules_are_as_before() -> None:
    torch.manual_seed(0)
    model, call = nn.Sequential(nn.Linear(8, 8)), (torch.randn(4, 8),)
    before = autopar.plan(model, call, "2xcpu").fingerprint
    autopar.register_rule("declared_rules::gate", RULE)
    assert autopar.plan(model, call, "2xcpu").fingerprint == before
    assert "+" not in before


class Noise(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.weight, self.op = nn.Parameter(torch.randn(8, 8)), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x @ self.weight).square().mean()


@pytest.mark.parametrize("op", ["declared_rules::noisy", "declared_rules::random_shift"])
def test_random_operators_draw_from_streams(op: str) -> None:
    """A declared one is split; one without a rule, known by its name, runs whole, and replicas must draw the same."""
    name = op.partition("::")[2]
    if name == "noisy":
        autopar.register_rule(op, "b i -> b i", random=True)
    model, call = Noise(getattr(torch.ops.declared_rules, name)), (torch.randn(4, 8),)
    plan = autopar.plan(model, call, "2xcpu", pins={"dp": 2})
    code = rewrite(capture(model, call), plan).module.code
    splits = "{'b': ('dp',)}" if name == "noisy" else "{}"
    assert f"draws_draw(torch.ops.declared_rules.{name}.default" in code
    assert f"splits = {splits}" in code


def test_every_loop_of_a_random_operator_that_may_be_split_has_a_stream() -> None:
    autopar.register_rule("declared_rules::noisy", "b ab! -> b ab!", random=True)
    op, tensors = trace("declared_rules.noisy.default", torch.randn(4, 6))
    space = table.rule(op, describe(tensors))
    assert space is not None
    assert space.kernel_loops == {"b"}


def test_a_shape_argument_that_a_call_lacks_is_refused() -> None:
    autopar.register_rule("declared_rules::noisy", "b s -> b s", shape_arg=1)
    with pytest.raises(InputError, match="shape_arg=1, but the call has 1 positional arguments"):
        autopar.check_rule("declared_rules::noisy", torch.randn(4, 6))


def test_replicas_of_a_random_operator_agree_and_parts_differ() -> None:
    def draw(splits: dict[str, tuple[str, ...]]) -> list[Tensor]:
        def run(rank: int) -> Tensor:
            with rng.isolated(3):
                return kernels.draw(torch.ops.aten.exponential.default, torch.ones(50), 2.0, splits=splits)

        return threads.run(Mesh(("x", "y"), (2, 2)), run)

    first, second, third, _ = draw({"a": ("x",)})
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert len({tuple(x.tolist()) for x in draw({})}) == 1
