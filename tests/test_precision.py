"""Mixed precision: two processes compute what one device computes under the same policy, in its dtypes; and what a plan says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import autopar
from autopar.capture import call_in_precision, capture
from autopar.errors import InputError, PlanError
from autopar.ir.precision import PRECISIONS, Precision
from autopar.ops.comm import GroupAxis
from autopar.plans.plan import from_json, to_json
from tests.precision_steps import MODELS, build, largest_error, loss_of, step_in_parallel, step_of_one_device
from tests.processes import Outcomes, run_cases, spawn
from tests.rounding import LOW, Moved, check_within_rounding

PINS: Mapping[str, Mapping[str, object]] = {
    "dp": {"dp": 2, "fsdp": False},
    "fsdp": {"dp": 2, "fsdp": True},
    "tp": {"tp": 2},
    "1f1b": {"pp": 2, "microbatches": 2, "schedule": "1f1b"},
    "zb-h1": {"pp": 2, "microbatches": 4, "schedule": "zb-h1"},
}
# Norms, a step of the update and sums of float32 roundings; float32's unit roundoff is 6e-8.
FLOAT32 = 1e-6


def _mixed_precision(name: str, pins: Sequence[str], precision: str = "mixed", dtype: torch.dtype = torch.float32) -> None:
    """Compare steps under some of `PINS`; ``tests.benchmarks.precision`` has all combinations."""
    step = functools.partial(step_of_one_device, name, Precision.parse(precision), dtype)
    for one in pins:
        _, actual = step_in_parallel(name, PINS[one], precision, dtype)
        check_within_rounding(actual, step)


def gpt2_in_mixed_precision() -> None:
    _mixed_precision("gpt2", ["dp", "tp", "1f1b"])


def llama_in_mixed_precision() -> None:
    _mixed_precision("llama", list(PINS))


def bert_in_mixed_precision() -> None:
    _mixed_precision("bert", ["fsdp", "tp"])


def vit_in_mixed_precision() -> None:
    _mixed_precision("vit", ["fsdp", "zb-h1"])


def gradients_summed_in_bfloat16() -> None:
    _mixed_precision("llama", ["dp", "fsdp", "zb-h1"], "param_dtype=bfloat16,reduce_dtype=bfloat16")


def half_precision() -> None:
    _mixed_precision("llama", ["fsdp", "tp"], "mixed-float16")


def parameters_in_bfloat16() -> None:
    _mixed_precision("llama", ["fsdp", "tp", "1f1b"], "bfloat16", torch.bfloat16)


def float32_policy() -> None:
    for number, name in enumerate(MODELS):
        expected = step_of_one_device(name, PRECISIONS["float32"])
        for pins in list(PINS)[number % 2 :: 2]:
            _, actual = step_in_parallel(name, PINS[pins], "float32")
            assert largest_error(actual, expected) <= FLOAT32, (name, pins)


def sums_and_gathers_have_the_dtypes_of_the_policy() -> None:
    sent: list[tuple[str, torch.dtype]] = []

    def noted(kind: str, of: Any, name: str) -> Callable[..., Any]:
        collective = getattr(of, name)

        def call(*arguments: Any, **options: Any) -> Any:
            sent.extend((kind, x.dtype) for x in arguments if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 1)
            return collective(*arguments, **options)

        return call

    for pins, precision, expected in (
        ("dp", "mixed", {("reduce", torch.float32)}),
        ("dp", "param_dtype=bfloat16", {("reduce", torch.bfloat16)}),
        ("fsdp", "mixed", {("gather", torch.bfloat16), ("reduce", torch.float32)}),
        ("fsdp", "param_dtype=bfloat16", {("gather", torch.bfloat16), ("reduce", torch.bfloat16)}),
    ):
        model, batch = build("llama")
        compiled = autopar.compile(model, precision=precision, pins={**PINS[pins], "microbatches": 1})
        compiled.prepare(**batch)
        sent.clear()
        with pytest.MonkeyPatch.context() as patch:
            for kind, of, name in (
                ("reduce", dist, "all_reduce"),
                ("reduce", GroupAxis, "begin_reduce_stack"),
                ("gather", GroupAxis, "begin_gather_stack"),
            ):
                patch.setattr(of, name, noted(kind, of, name))
            loss_of(compiled(**batch)).backward()
        assert set(sent) == expected, (pins, precision, sent)


def gradients_add_up_in_float32() -> None:
    # Of 64 calls under no_sync the last ones would vanish in a bfloat16 sum.
    for pins in ("dp", "fsdp"):
        model, batch = build("llama")
        compiled = autopar.compile(model, precision="mixed", pins=PINS[pins])
        loss_of(compiled(**batch)).backward()
        once = {name: p.grad.full_tensor().clone() for name, p in compiled.named_parameters()}
        compiled.zero_grad()
        for _ in range(15):
            with compiled.no_sync():
                loss_of(compiled(**batch)).backward()
        loss_of(compiled(**batch)).backward()
        for name, p in compiled.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), 16 * once[name], rtol=1e-5, atol=1e-6 * float(once[name].abs().max()))


def the_user_asks_for_gradients() -> None:
    for pins in ("dp", "fsdp", "tp"):
        model, batch = build("llama")
        compiled = autopar.compile(model, precision="mixed", pins=PINS[pins])
        named = dict(compiled.named_parameters())
        asked = torch.autograd.grad(loss_of(compiled(**batch)), list(named.values()))
        assert all(x.dtype == torch.float32 for x in asked)
        seen: list[torch.dtype] = []
        named["lm_head.weight"].register_hook(lambda x, seen=seen: seen.append(x.dtype))
        loss_of(compiled(**batch)).backward()
        assert seen == [torch.float32]
        for gradient, p in zip(asked, named.values(), strict=True):
            torch.testing.assert_close(gradient.full_tensor(), p.grad.full_tensor(), rtol=0, atol=0)


def an_update_reaches_the_next_call() -> None:
    for pins in PINS:
        (model, batch), (twin, _) = build("llama"), build("llama")
        compiled = autopar.compile(model, precision="mixed", pins=PINS[pins])
        loss_of(compiled(**batch)).backward()
        with torch.no_grad():
            for p in (*compiled.parameters(), *twin.parameters()):
                p.data.mul_(0.5)
        loss, expected = loss_of(compiled(**batch)), loss_of(call_in_precision(twin, (), batch, PRECISIONS["mixed"]))
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def outputs_have_the_dtype_that_was_asked_for() -> None:
    for output, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        model, batch = build("vit")
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None if output is None else torch.float32
        )
        compiled = autopar.compile(model, precision=policy, pins=PINS["dp"])
        assert compiled(**batch).logits.dtype == expected


def a_plan_brings_its_precision() -> None:
    model, batch = build("llama")
    plan = autopar.plan(model, batch, "2xcpu", pins=PINS["fsdp"], precision="mixed")
    compiled = autopar.compile(model, plan=from_json(to_json(plan)))
    loss_of(compiled(**batch)).backward()
    assert "dtype = torch.bfloat16, reduce_dtype = torch.float32" in compiled.print_program()


CASES = (
    gpt2_in_mixed_precision,
    llama_in_mixed_precision,
    bert_in_mixed_precision,
    vit_in_mixed_precision,
    gradients_summed_in_bfloat16,
    half_precision,
    parameters_in_bfloat16,
    float32_policy,
    sums_and_gathers_have_the_dtypes_of_the_policy,
    gradients_add_up_in_float32,
    the_user_asks_for_gradients,
    an_update_reaches_the_next_call,
    outputs_have_the_dtype_that_was_asked_for,
    a_plan_brings_its_precision,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("precision"), CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_in_two_processes(outcomes: Outcomes, case: Callable[[], None]) -> None:
    outcomes.check(case.__name__)


MIXES: Sequence[Mapping[str, object]] = (
    {"dp": 2, "tp": 2, "zero": 3},
    {"dp": 2, "tp": 2, "zero": 2},
    {"dp": 4, "zero": 3, "zero_group": 2},
    {"pp": 2, "dp": 2, "zero": 1, "microbatches": 2},
    {"pp": 2, "tp": 2, "microbatches": 2, "schedule": "zb-h1"},
)


def _mixes(rank: int) -> None:
    step = functools.partial(step_of_one_device, "llama", PRECISIONS["mixed"])
    for pins in MIXES:
        plan, actual = step_in_parallel("llama", pins, "mixed")
        assert plan.precision == PRECISIONS["mixed"]
        check_within_rounding(actual, step)


def test_mixes_in_four_processes(tmp_path: Path) -> None:
    spawn(4, tmp_path, _mixes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pins", [*PINS.values(), {"dp": 2, "tp": 2, "fsdp": True}, {"pp": 2, "dp": 2, "fsdp": True, "microbatches": 2}])
def test_plans_agree_in_float64(name: str, pins: Mapping[str, object]) -> None:
    model, batch = build(name)
    ranks = 4 if "dp" in pins and len(pins) > 2 else 2
    verification = autopar.verify(model, batch, ranks=ranks, pins=pins, precision="mixed")
    verification.check()
    assert verification.plan.precision == PRECISIONS["mixed"]


def test_one_process_computes_what_the_policy_says() -> None:
    for precision in ("mixed", "mixed-float16", autopar.Precision(param_dtype=torch.bfloat16, output_dtype=torch.float32)):
        (model, batch), (twin, _) = build("llama"), build("llama")
        compiled = autopar.compile(model, precision=precision)
        output, expected = compiled(**batch), call_in_precision(twin, (), batch, Precision.parse(precision))
        output.loss.backward()
        expected.loss.backward()
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.logits, expected.logits)
        for p, q in zip(compiled.parameters(), twin.parameters(), strict=True):
            assert p.grad.dtype == torch.float32
            assert torch.equal(p.grad, q.grad)


def test_batch_norms_keep_their_parameters() -> None:
    model, batch = build("resnet")
    captured = capture(model, batch, precision=PRECISIONS["mixed"])
    dtypes = {op.target: op.results[0].dtype for op in captured.graph.ops if op.target in dict(model.named_parameters())}
    assert dtypes["stem.0.weight"] == "bfloat16"
    assert dtypes["stem.1.weight"] == "float32"
    loss = autopar.compile(model, precision="mixed")(**batch)
    loss.backward()


def test_a_cast_in_the_forward_is_a_dtype_of_the_parameter() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.twice = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.linear(x.bfloat16(), self.weight.to(torch.bfloat16))
            return nn.functional.linear(y, self.twice.to(torch.bfloat16)).float().sum() + self.twice.sum()

    captured = capture(Head(), (torch.randn(4, 8),))
    weight, twice = (captured.graph.by_name[name].results[0] for name in ("p_weight", "p_twice"))
    assert (weight.dtype, weight.stored_dtype, weight.reduced_dtype) == ("bfloat16", "float32", "float32")
    assert (twice.dtype, twice.storage) == ("float32", None)
    autopar.verify(Head(), (torch.randn(4, 8),), ranks=2, pins={"dp": 2, "fsdp": True}).check()


@pytest.mark.parametrize("pins", [{"dp": 2, "zero": level} for level in range(4)] + [{"tp": 2}], ids=str)
def test_a_parameter_with_several_uses(pins: Mapping[str, object]) -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = nn.functional.linear(nn.functional.linear(x, self.first), self.second)
            return (y * self.first[:1]).sum(), self.first

    torch.manual_seed(0)
    autopar.verify(Uses(), (torch.randn(8, 16),), ranks=2, pins=pins, precision="param_dtype=bfloat16,reduce_dtype=float32").check()


def test_memory_counts_what_is_stored_copied_and_kept() -> None:
    model, batch = build("llama")
    numel = sum(p.numel() for p in model.parameters())
    for precision, dtype, parameters, gradients, optimizer in (
        ("float32", torch.float32, 4, 4, 8),
        ("mixed", torch.float32, 4 + 2, 4, 8),
        ("bfloat16", torch.bfloat16, 2, 2, 12),
        ("model", torch.bfloat16, 2, 2, 4),
    ):
        memory = autopar.plan(model.to(dtype), batch, "1xcpu", precision=precision).memory
        assert (memory.parameters, memory.gradients, memory.optimizer) == (parameters * numel, gradients * numel, optimizer * numel), (
            precision
        )
    # What is gathered is cast as it is gathered: no copy is held.
    memory = autopar.plan(model.float(), batch, "2xcpu", precision="mixed", pins={"dp": 2, "fsdp": True}).memory
    assert memory.parameters == memory.gradients


def test_traffic_is_counted_in_the_dtypes_of_the_policy() -> None:
    model, batch = build("llama")
    nbytes: dict[str, dict[str, int]] = {}
    for precision in ("float32", "mixed", "param_dtype=bfloat16"):
        plan = autopar.plan(model, batch, "2xcpu", precision=precision, pins={"dp": 2, "fsdp": True})
        nbytes[precision] = {}
        for row in plan.traffic:
            nbytes[precision][row.purpose] = nbytes[precision].get(row.purpose, 0) + row.nbytes
    assert nbytes["mixed"]["parameters"] * 2 == nbytes["float32"]["parameters"] == nbytes["param_dtype=bfloat16"]["parameters"] * 2
    assert nbytes["mixed"]["gradients"] == nbytes["float32"]["gradients"] == nbytes["param_dtype=bfloat16"]["gradients"] * 2


@pytest.mark.parametrize("precision", [*PRECISIONS, "param_dtype=float16, cast_forward_inputs=False", "reduce_dtype=float32"])
def test_a_precision_is_read_as_it_is_written(precision: str) -> None:
    assert str(Precision.parse(precision)) == precision
    assert Precision.parse(Precision.parse(precision)) == Precision.parse(precision)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("low", "precision='low' is unknown: use one of model, float32, mixed"),
        (
            torch.bfloat16,
            r"did you mean 'bfloat16' \(everything bfloat16, with float32 masters\) or 'mixed' \(.*\)\? There are model, float32",
        ),
        ("bf16", "precision='bf16' is unknown: did you mean 'bfloat16'"),
        ("fp16", "precision='fp16' is unknown: did you mean 'mixed-float16'"),
        ("float16", "precision='float16' is unknown: did you mean 'mixed-float16'"),
        (torch.float32, "did you mean 'float32'"),
        ("param_dtype=int8", "param_dtype='int8' is unknown; there are float16"),
        ("compute=float16", "'compute=float16' isn't understood; its fields are param_dtype"),
        ("masters=2", "masters='2', True or False is needed"),
        (3, "precision=3 is unknown"),
    ],
)
def test_a_bad_precision_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Precision.parse(value)


def test_a_model_stored_otherwise_is_refused() -> None:
    model, batch = build("llama", torch.bfloat16)
    with pytest.raises(
        InputError,
        match=r"'mixed' stores parameters as float32, model\.embed_tokens\.weight is bfloat16: call model\.to\(torch\.float32\) first,"
        " or precision='model' to train in the dtypes it has$",
    ):
        autopar.plan(model, batch, "2xcpu", precision="mixed")
    plan = autopar.plan(model, batch, "1xcpu")
    with pytest.raises(InputError, match="leave out pins, mesh and precision, or the plan"):
        autopar.compile(model, plan=plan, precision="mixed")
    with pytest.raises(PlanError, match="made for another model"):
        autopar.compile(model.float(), batch, plan=plan)


def test_moved_results_stay_numbers() -> None:
    # The measure of roundings would accept anything if it made infinities.
    for dtype in LOW:
        x = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.0, -1.0], dtype=dtype)
        for seed in range(8):
            with Moved(seed):
                moved = x + 0
            assert moved.isfinite().all()
            assert moved[2] == 0
            assert abs(float(moved[3]) + 1) <= 2 * torch.finfo(dtype).eps
