"""What a model does beside calling operators: a captured program does the same, or the model is refused with its line and a remedy."""

from __future__ import annotations

import copy
import functools
import queue
import random
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.capture import Captured, capture
from autopar.errors import CaptureError, InputError
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases

torch.set_num_threads(1)

WIDTH, ROWS = 8, 8


class Net(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.h = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.between = between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.between(self, self.f(x).tanh())).square().mean()


def rows() -> Tensor:
    return torch.linspace(-1, 1, ROWS * WIDTH, dtype=torch.float64).view(ROWS, WIDTH)


class Round(torch.autograd.Function):
    """Rounding whose gradient is the identity's (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is reversed and scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.scale * grad, None


class Several(torch.autograd.Function):
    """Several results, not all of them tensors, from arguments in a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: list[Any], dtype: torch.dtype) -> tuple[Tensor, None, Tensor, int]:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * options[0], None, x.sin().to(dtype), 7

    @staticmethod
    def backward(ctx: Any, first: Tensor, _: None, second: Tensor, __: None) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * first + second * x, None, None


class Nested(torch.autograd.Function):
    """A function whose forward and backward call others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * Round.apply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return Reverse.apply(grad, 0.5)


early_bound = Round.apply


def reverse_by_hook(net: Net, z: Tensor) -> Tensor:
    if z.requires_grad:
        z.register_hook(lambda grad: -0.1 * grad)
    return z


def hook_three_times(net: Net, z: Tensor) -> Tensor:
    z.register_hook(lambda grad: 2 * grad)
    y = 3 * z
    z.register_hook(lambda grad: grad + 1)
    z.register_hook(lambda grad: None)
    return y + z


def in_inference_mode(net: Net, z: Tensor) -> Tensor:
    with torch.inference_mode():
        fixed = net.g(z)
    return z + fixed.clone()


def make_mask_once(net: Net, z: Tensor) -> Tensor:
    if not hasattr(net, "mask"):
        net.mask = torch.arange(WIDTH, dtype=z.dtype)
    return z * net.mask


def grow(net: Net, z: Tensor) -> Tensor:
    net.longest = max(getattr(net, "longest", 4), len(z))
    return z * net.longest


EXACT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "straight_through": lambda net, z: Round.apply(3 * z),
    "straight_through_bound_early": lambda net, z: early_bound(3 * z),
    "gradient_reversal": lambda net, z: Reverse.apply(z, 0.5),
    "function_of_two_scales": lambda net, z: Reverse.apply(Reverse.apply(z, 0.5), 0.25),
    "function_of_several": lambda net, z: (lambda a, _, b, k: a + b * k)(*Several.apply(z, [2, True], torch.float64)),
    "function_that_calls_functions": lambda net, z: Nested.apply(3 * z),
    "function_without_gradient": lambda net, z: z + Round.apply(z.detach()),
    "hook": reverse_by_hook,
    "hooks_in_order": hook_three_times,
    "data": lambda net, z: z + (z.round() - z).data,
    "data_of_a_parameter": lambda net, z: z * net.g.weight.data.abs().mean(),
    "inference_mode": in_inference_mode,
    "reentrant_checkpoint": lambda net, z: checkpoint(net.g, z, use_reentrant=True),
    "reentrant_checkpoint_of_a_function": lambda net, z: checkpoint(lambda y: Round.apply(3 * net.g(y)), z, use_reentrant=True),
    "reentrant_checkpoint_without_gradient": lambda net, z: z + checkpoint(net.g, z.detach(), use_reentrant=True),
    "branch_on_grad_fn": lambda net, z: z if z.grad_fn is None else 2 * z,
    "mask_made_once": make_mask_once,
    "length_seen": grow,
}


def run(captured: Captured, model: nn.Module, x: Tensor) -> Tensor:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers()), **captured.constants}
    outputs = captured.fx(*(state[name] for name in (*captured.parameters, *captured.buffers)), *captured.bind((x,), {}))
    result = captured.unflatten(outputs)
    assert isinstance(result, Tensor)
    return result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in model.named_parameters()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("name", EXACT)
def test_graph_does_what_the_model_does(name: str) -> None:
    model, reference = Net(EXACT[name]), Net(EXACT[name])
    before = dict(vars(model))
    captured = capture(model, (rows(),))
    assert vars(model) == before, "capture leaves the model's attributes as they were"
    loss, expected = run(captured, model, rows()), reference(rows())
    loss.backward()
    expected.backward()
    tree_allclose({"loss": loss, **gradients(model)}, {"loss": expected, **gradients(reference)})


# --- on two ranks ---


def compare(between: Callable[[Net, Tensor], Tensor], **pins: object) -> None:
    """Loss and gradients on two ranks are those of one device."""
    model, reference = autopar.compile(Net(between), cluster="2xcpu", pins=pins), Net(between)
    losses = [whole(one(rows())) for one in (model, reference)]
    for loss in losses:
        loss.backward()
    tree_allclose({"loss": losses[0], **gradients(model)}, {"loss": losses[1], **gradients(reference)})


def hook_sees_the_whole_gradient() -> None:
    seen: list[Tensor] = []

    def between(net: Net, z: Tensor) -> Tensor:
        z.register_hook(lambda grad: seen.append(grad.clone()))
        return z

    for one in (autopar.compile(Net(between), cluster="2xcpu", pins={"dp": 2}), Net(between)):
        one(rows()).backward()
    tree_allclose(seen[0], seen[1])


def custom_backward_dropped() -> None:
    compare(EXACT["straight_through"], dp=2)
    compare(EXACT["gradient_reversal"], tp=2)


def tensor_hook_dropped() -> None:
    compare(reverse_by_hook, dp=2)
    compare(hook_three_times, tp=2)


def reentrant_checkpoint() -> None:
    compare(EXACT["reentrant_checkpoint"], dp=2, recompute="full")


def data_attribute_crash() -> None:
    compare(EXACT["data"], dp=2)


def several_results() -> None:
    compare(EXACT["function_of_several"], dp=2)


ON_TWO_RANKS: tuple[Case, ...] = (
    custom_backward_dropped,
    tensor_hook_dropped,
    reentrant_checkpoint,
    data_attribute_crash,
    several_results,
    hook_sees_the_whole_gradient,
)

_DEEPSEEK: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _words() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), ON_TWO_RANKS)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in ON_TWO_RANKS])
def test_two_ranks_do_what_one_device_does(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)


# --- functions and hooks in plans ---


def test_functions_run_whole_and_are_listed() -> None:
    plan = autopar.plan(Net(EXACT["straight_through"]), (rows(),), "2xcpu", pins={"dp": 2})
    assert [(op.target, op.source.partition(":")[0]) for op in plan.unruled] == [
        ("autograd_function.test_cases_fidelity_Round.T", "tests/test_cases_fidelity.py")
    ]
    with pytest.raises(InputError, match=r"Round\.T at tests/test_cases_fidelity\.py:.* has no rule and so needs all operands whole"):
        autopar.plan(Net(EXACT["straight_through"]), (rows(),), "2xcpu", pins={"microbatches": 2})


@pytest.mark.parametrize("name", ["straight_through", "hooks_in_order", "function_of_several"])
def test_functions_agree_on_all_ranks_also_when_run_again(name: str) -> None:
    plan = autopar.plan(Net(EXACT[name]), (rows(),), "4xcpu", pins={"dp": 2, "tp": 2, "recompute": "full"})
    autopar.verify(Net(EXACT[name]), (rows(),), plan).check()


def test_a_second_capture_fits_the_plan_of_the_first() -> None:
    model = Net(hook_three_times)
    assert str(capture(model, (rows(),)).graph) == str(capture(model, (rows(),)).graph)


def test_like_layers_keep_their_own_hooks() -> None:
    """Layers that are the same code but for a hook's variables run as one submodule only if the hooks are the same."""

    class Layer(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(WIDTH, WIDTH), scale

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x).tanh()
            x.register_hook(lambda grad: self.scale * grad)
            return x

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(Layer(2.0**number) for number in range(4))).double()

    autopar.verify(make(), (rows(),), ranks=2, pins={"dp": 2}).check()


def test_functions_of_transformers_are_split() -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
    captured = capture(transformers.BloomForCausalLM(config), _words())
    names = {op.target for op in captured.graph.ops if op.target.startswith("autograd_function")}
    assert names == {"autograd_function.transformers_models_bloom_modeling_bloom_GeLUFunction.T"}
    assert autopar.plan(transformers.BloomForCausalLM(config), _words(), "2xcpu", pins={"tp": 2}).unruled == ()


# --- left to the plan, with a note ---


def test_users_checkpointing_ignored() -> None:
    """The plan decides what is recomputed, says so, and predicts the memory of what it decides."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(6))

        class Stack(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = layers

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = x + checkpoint(layer, x, use_reentrant=False)  # type: ignore[operator]
                return x.square().mean()

        return Stack()

    free, full = (autopar.plan(make(), (torch.rand(4096, 64),), "1xcpu", pins=pins) for pins in ({}, {"recompute": "full"}))
    (note,) = free.notes
    assert re.fullmatch(
        r"torch\.utils\.checkpoint at tests/test_cases_fidelity\.py:\d+: .*: the plan chooses what is recomputed; pin recompute=full .*",
        note,
    )
    assert full.memory.activations < 0.3 * free.memory.activations
    assert {block.recompute for block in full.pipeline.blocks} == {"full"}


@pytest.mark.parametrize(
    ("between", "note"),
    [
        (lambda net, z: _within(torch.autograd.graph.save_on_cpu(), lambda: net.g(z)), "save_on_cpu at .* left out"),
        (lambda net, z: (z.retain_grad(), z)[1], "retain_grad at .* left out: grad stays None"),
        (lambda net, z: z if torch.compiler.is_compiling() else 2 * z, r"torch\.compiler\.is_compiling\(\) at .* the branch for that"),
    ],
)
def test_what_is_left_out_is_noted(between: Callable[[Net, Tensor], Tensor], note: str) -> None:
    (found,) = capture(Net(between), (rows(),)).notes
    assert re.search(note, found)
    assert "tests/test_cases_fidelity.py:" in found


def _within(context: Any, body: Callable[[], Tensor]) -> Tensor:
    with context:
        return body()


# --- refused ---


class _State:
    """Something of the user's that isn't a module."""

    value: Any = None


def count(net: Net, z: Tensor) -> Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return z * net.calls


def remember(net: Net, z: Tensor) -> Tensor:
    net.history.append(len(z))
    return z


def decay(net: Net, z: Tensor) -> Tensor:
    net.scale = net.scale * 0.9
    return z * net.scale


def decay_in_place(net: Net, z: Tensor) -> Tensor:
    net.scale.mul_(0.9)
    return z * net.scale


def set_attribute(owner: Callable[[Net], Any], name: str, value: Callable[[Tensor], Any]) -> Callable[[Net, Tensor], Tensor]:
    def between(net: Net, z: Tensor) -> Tensor:
        setattr(owner(net), name, value(z))
        return z

    return between


def write_under_no_grad(net: Net, z: Tensor) -> Tensor:
    z = 1 * z
    with torch.no_grad():
        z[0] = 5
    return z


def hook_with_a_mask(net: Net, z: Tensor) -> Tensor:
    mask = (z > 0).to(z)
    z.register_hook(lambda grad: grad * mask)
    return z


def count_in_a_long_list(net: Net, z: Tensor) -> Tensor:
    net.counts[7] += 1
    return z


class Scaled:
    """A hook that holds a tensor."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * self.factor


def write_into_a_shared_result(net: Net, z: Tensor) -> Tensor:
    copy = 1 * z.detach()
    shared = Reverse.apply(copy, 0.5)
    copy.add_(1)
    return z + shared


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class ReadsModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Linear) -> Tensor:  # type: ignore[override]
        return x * module.weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def energy(net: Net, z: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(net.g(z).tanh().sum(), z, **options)[0]


LINE = r"`tests/test_cases_fidelity\.py:\d+: "
REFUSED: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "tensor_in_an_attribute": (set_attribute(lambda net: net, "aux", Tensor.mean), r"shape \[\] in aux, .* Return it from the forward"),
    "tensor_in_an_attribute_of_a_submodule": (set_attribute(lambda net: net.g, "stat", Tensor.detach), r"in g\.stat, .* Return it"),
    "tensor_in_a_list": (lambda net, z: (net.history.append(z), z)[1], r"in history\[0\], .* Return it"),
    "tensor_in_an_object": (set_attribute(lambda net: net.state, "value", Tensor.mean), r"in state\.value, .* Return it"),
    "random_tensor": (set_attribute(lambda net: net, "noise", lambda z: torch.rand(len(z))), r"in noise, .* Return it"),
    "tensor_replaced": (decay, r"in scale, .* make it a buffer"),
    "tensor_updated": (decay_in_place, r"writes in place to the plain tensor scale; make it a buffer"),
    "counter": (count, r"changes calls in every call.* make it a buffer"),
    "list_of_numbers": (remember, r"changes history in every call"),
    "long_list_of_numbers": (count_in_a_long_list, r"changes counts in every call"),
    "parameter_replaced": (set_attribute(lambda net: net.g, "weight", nn.Parameter), r"replaces the parameter g\.weight"),
    "parameter_frozen": (
        lambda net, z: (net.g.weight.requires_grad_(False), net.g(z))[1],
        r"changes requires_grad of the parameter g\.weight",
    ),
    "module_added": (
        set_attribute(lambda net: net, "extra", lambda z: nn.Linear(2, 2)),
        r"adds the (parameter|module) extra.* Call the model once",
    ),
    "buffer_added": (lambda net, z: (net.register_buffer("extra", torch.ones(2)), z)[1], r"adds the buffer extra\. Call the model once"),
    "parameter_written": (lambda net, z: (net.g.weight.data.clamp_(0, 1), net.g(z))[1], r"writes in place to the parameter g\.weight"),
    "parameter_assigned": (set_attribute(lambda net: net.g.weight, "data", lambda z: z), rf"assigns to \.data at {LINE}"),
    "gradient_inside": (
        lambda net, z: z + energy(net, z, create_graph=True),
        rf"computes gradients itself at {LINE}.*outside of the model",
    ),
    "gradient_inside_kept_graph": (lambda net, z: z + energy(net, z, retain_graph=True), rf"computes gradients itself at {LINE}"),
    "backward_inside": (lambda net, z: (net.g(z).sum().backward(retain_graph=True), z)[1], rf"computes gradients itself at {LINE}"),
    "torch_func_grad": (lambda net, z: torch.func.grad(lambda y: net.g(y).sum())(z), rf"computes gradients itself at {LINE}"),
    "torch_func_vmap": (lambda net, z: torch.func.vmap(net.g)(z), r"transforms a function by torch\.func .*tests/test_cases_fidelity\.py"),
    "torch_func_jvp": (lambda net, z: torch.func.jvp(net.g, (z,), (z,))[1], r"transforms a function by torch\.func"),
    "grad_read": (lambda net, z: z if net.g.weight.grad is None else 2 * z, rf"uses the gradient of a parameter or input at {LINE}"),
    "hook_on_a_parameter": (
        lambda net, z: (net.g.weight.register_hook(lambda grad: grad), z)[1],
        rf"hook on the gradient of a parameter.*{LINE}",
    ),
    "hook_after_accumulation": (
        lambda net, z: (net.g.weight.register_post_accumulate_grad_hook(lambda p: None), z)[1],
        rf"hook on the gradient of a parameter.*{LINE}",
    ),
    "hook_on_a_node": (
        lambda net, z: (z.grad_fn.register_hook(lambda *_: None), z)[1],
        rf"node of the autograd graph at {LINE}.*x\.register_hook",
    ),
    "hook_on_several": (
        lambda net, z: (torch.autograd.graph.register_multi_grad_hook([z], lambda grads: None), z)[1],
        rf"{LINE}.*waits for the gradients of several tensors",
    ),
    "hook_with_a_tensor": (hook_with_a_mask, rf"the hook registered at {LINE}.* reads a tensor that the forward made"),
    "hook_that_is_an_object": (lambda net, z: (z.register_hook(Scaled(z.detach())), z)[1], rf"{LINE}.* reads a tensor that the forward"),
    "exit_after_a_random_number": (lambda net, z: sys.exit(int(random.random())), "draws from Python's random"),
    "hooks_on_saved_tensors": (
        lambda net, z: _within(torch.autograd.graph.saved_tensors_hooks(lambda x: 2 * x, lambda x: x), lambda: z.tanh()),
        rf"hooks on saved tensors at {LINE}",
    ),
    "function_in_place": (lambda net, z: InPlace.apply(1 * z), rf"InPlace\.apply at {LINE}.* writes to an argument in place"),
    "function_of_a_module": (lambda net, z: ReadsModule.apply(z, net.g), r"ReadsModule\.apply .*\[8, 8\] that isn't among its arguments"),
    "function_with_noise": (lambda net, z: Noisy.apply(z), r"Noisy\.apply .* draws random numbers \(aten\.rand_like\.default\)"),
    "write_into_a_shared_result": (write_into_a_shared_result, r"what an autograd function's result shares memory with"),
    "write_past_autograd": (write_under_no_grad, r"past autograd, by detach, \.data or no_grad"),
    "write_to_data": (lambda net, z: _double_data(1 * z), r"past autograd"),
    "python_random": (lambda net, z: z * random.random(), "draws from Python's random"),
    "numpy_random": (lambda net, z: z * np.random.rand(), r"draws from numpy\.random"),
    "seed": (lambda net, z: (torch.manual_seed(3), z + torch.rand(WIDTH, dtype=z.dtype))[1], rf"seeds torch's random numbers at {LINE}"),
    "number_read": (lambda net, z: z * z.detach().mean().item(), r"reads a value out of a tensor"),
}


def _double_data(z: Tensor) -> Tensor:
    z.data.mul_(2)
    return z


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_do_is_refused(name: str) -> None:
    between, message = REFUSED[name]
    model = Net(between)
    model.history, model.state, model.scale = [], _State(), torch.ones(WIDTH, dtype=torch.float64)
    model.counts = [0] * 1000
    before, state = dict(vars(model)), random.getstate()
    with pytest.raises(CaptureError, match=message):
        capture(model, (rows(),))
    random.setstate(state)
    assert vars(model) == before, "the model's attributes are as they were"
    assert (model.history, model.state.value) == ([], None)
    assert list(model._modules) == ["f", "g", "h"]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    capture(Net(EXACT["straight_through"]), (rows(),))  # and nothing of torch's stays changed


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"])
def test_backward_hooks_of_modules_are_refused(register: str) -> None:
    model = Net(lambda net, z: net.g(z))
    getattr(model.g, register)(lambda *_: None)
    with pytest.raises(CaptureError, match=r"a backward hook is registered on g, .* Remove the hook"):
        capture(model, (rows(),))


def test_forward_hooks_run_but_may_keep_no_tensor() -> None:
    model, reference = Net(lambda net, z: net.g(z)), Net(lambda net, z: net.g(z))
    for one in (model, reference):
        one.g.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(run(capture(model, (rows(),)), model, rows()), reference(rows()), rtol=1e-12, atol=0)
    features: dict[str, Tensor] = {}
    model.g.register_forward_hook(lambda module, inputs, output: features.update(g=output))
    with pytest.raises(CaptureError, match=r"in a variable of the forward hook <lambda>\.features\['g'\]"):
        capture(model, (rows(),))


class CallsItself(nn.Module):
    """A layer that is run several times, by calling the model again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        x = Round.apply(3 * self.f(x))
        return self(x, times - 1) if times else x.square().mean()


class CalledDifferently(CallsItself):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.forward(x, 0)


def test_models_that_call_themselves() -> None:
    model, reference = CallsItself(), CallsItself()
    for loss in (run(capture(model, (rows(),)), model, rows()), reference(rows())):
        loss.backward()
    tree_allclose(gradients(model), gradients(reference))
    with pytest.raises(CaptureError, match=r"overrides __call__, .* Do what it does in forward"):
        capture(CalledDifferently(), (rows(),))


class Remembers(nn.Module):
    """Changes attributes in its first call only, and has a norm that counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.norm = {"nothing"}, nn.BatchNorm1d(WIDTH, momentum=None).double()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        self.seen.add("something")
        return self.norm(x).sum()


def test_what_is_remembered_once_is_as_it_was() -> None:
    model = Remembers()
    capture(model, (rows(),))
    assert model.seen == {"nothing"}


KEPT: dict[str, Tensor] = {}


def test_global_variables_may_keep_no_tensor() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            KEPT["mean"] = x.mean()
            return x.sum()

    with pytest.raises(CaptureError, match=r"in the global variable KEPT\['mean'\]"):
        capture(Keeps(), (rows(),))
    KEPT.clear()


def test_attributes_of_installed_modules_are_noted() -> None:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=4,
        lru_width=32,
        attention_window_size=16,
    )
    notes = capture(transformers.RecurrentGemmaForCausalLM(config), _words()).notes
    assert any(
        re.search(r"keeps a tensor of shape \[4, 32\] in model\.layers\.0\..*recurrent_states, .* it stays as it was", note)
        for note in notes
    )


# --- attention of transformers ---


def test_attention_name() -> None:
    """A model that asks for the name of its attention computes the same on two ranks as on one device: here the mask of its indexer."""
    torch.manual_seed(0)
    model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**_DEEPSEEK)).double()
    verification = autopar.verify(model, _words(), ranks=2, pins={"tp": 2})
    verification.check()
    captured, twin = capture(model, _words()), copy.deepcopy(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers()), **captured.constants}
    outputs = captured.fx(*(state[name] for name in (*captured.parameters, *captured.buffers)), *captured.bind((), _words()))
    loss, expected = captured.unflatten(outputs).loss, twin(**_words()).loss
    loss.backward()
    expected.backward()
    tree_allclose({"loss": loss, **gradients(model)}, {"loss": expected, **gradients(twin)})


def tiny_llama(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, attn_implementation=name
    )
    return transformers.LlamaForCausalLM(config).double(), _words()


def targets(captured: Captured) -> set[str]:
    return {op.target for op in captured.graph.ops}


def test_eager_attention_is_what_the_model_computes() -> None:
    fused, eager = (targets(capture(*tiny_llama(name))) for name in ("sdpa", "eager"))
    assert "aten.scaled_dot_product_attention.default" in fused - eager
    assert {"aten.softmax.int", "aten.matmul.default"} <= eager - fused


def test_attention_that_the_user_registered_stays() -> None:
    def double(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
        return (2 * value).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("double", double)
    captured = capture(*tiny_llama("double"))
    assert not any("attention.default" in target for target in targets(captured))


def test_model_sees_the_name_that_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    kind = transformers.models.llama.modeling_llama.LlamaAttention
    forward = kind.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.config._attn_implementation)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", functools.wraps(forward)(spy))
    for name in ("sdpa", "eager", "flex_attention"):
        capture(*tiny_llama(name))
    assert seen == ["sdpa", "eager", "flex_attention"]


def test_other_threads_go_on_while_a_model_is_captured() -> None:
    done: queue.SimpleQueue[object] = queue.SimpleQueue()  # a list would be as it was, like all that the model refers to

    def work() -> None:
        x = torch.ones(3, requires_grad=True)
        (2 * x).sum().backward()
        with torch.inference_mode():
            done.put((x.grad is not None, (2 * x).is_inference()))
        torch.manual_seed(0)
        done.put("seeded")

    def between(net: Net, z: Tensor) -> Tensor:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return z

    capture(Net(between), (rows(),))
    assert [done.get_nowait() for _ in range(2)] == [(True, True), "seeded"]


def test_captures_of_several_threads_take_turns() -> None:
    model, errors = Net(EXACT["straight_through"]), list[BaseException]()

    def run_one() -> None:
        try:
            capture(model, (rows(),))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run_one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("sdpa", {"indices": torch.zeros(1)}, "the model passes indices to sdpa attention"),
        ("sdpa", {"s_aux": torch.zeros(4)}, "the model passes s_aux to sdpa attention"),
        ("sdpa", {"softcap": 5.0}, "the model passes softcap to sdpa attention"),
        ("flex_attention", {"block_indices": torch.zeros(1)}, "the model passes block_indices to flex_attention attention"),
        ("sdpa", {"mask": torch.ones(4, 16)}, r"a mask of shape \[4, 16\]"),
        ("flex_attention", {"mask": None, "sliding_window": 4}, "the model passes a sliding window without a mask to flex_attention"),
    ],
)
def test_what_attention_does_not_know_is_refused(name: str, extra: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = transformers.models.llama.modeling_llama
    interface = library.ALL_ATTENTION_FUNCTIONS
    original = type(interface).get_interface

    def get(self: Any, *args: Any) -> Callable[..., Any]:
        function = original(self, *args)
        if "mask" in extra:
            given = dict(extra)
            other = given.pop("mask")
            return lambda module, q, k, v, mask, **kwargs: function(module, q, k, v, other, **{**kwargs, **given})
        return lambda *positional, **kwargs: function(*positional, **kwargs, **extra)

    monkeypatch.setattr(type(interface), "get_interface", get)
    with pytest.raises(CaptureError, match=f"{message}.*Set attn_implementation="):
        capture(*tiny_llama(name))


def test_arguments_of_the_call_pass_by_attention() -> None:
    model, batch = tiny_llama("sdpa")
    capture(model, {**batch, "num_items_in_batch": torch.tensor(4)})


# --- memory of recurrent layers ---


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("dtype", "layers", "both"), [(torch.float32, 2, False), (torch.bfloat16, 1, True), (torch.float64, 1, False)])
def test_lstm_memory_underestimated(kind: type[nn.RNNBase], dtype: torch.dtype, layers: int, both: bool) -> None:
    """Predicted activations are not below what training holds on the CPU, and not far above."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = kind(64, 128, layers, batch_first=True, bidirectional=both)

        def forward(self, x: Tensor) -> Tensor:
            return self.r(x)[0].sum()

    model, x = Model().to(dtype), torch.rand(16, 12, 64, dtype=dtype)
    held: dict[int, Tensor] = {}
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), x)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t):
        model(x)
    nbytes = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
    predicted = autopar.plan(model, (x,), "1xcpu").memory.activations
    assert nbytes <= predicted < 1.35 * nbytes
