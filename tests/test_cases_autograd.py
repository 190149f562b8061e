"""Gradients of parameters by every way that autograd has, on two ranks and on one device: each case is one test."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.errors import AutoparError, InputError, PlanError
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases

DP: Mapping[str, object] = {"dp": 2}
FSDP: Mapping[str, object] = {"dp": 2, "fsdp": True}
TP: Mapping[str, object] = {"tp": 2}
PP: Mapping[str, object] = {"pp": 2, "schedule": "1f1b", "microbatches": 4}
GPIPE: Mapping[str, object] = {"pp": 2, "schedule": "gpipe", "microbatches": 4}
FLAT = (DP, FSDP, TP)
ALL = (DP, FSDP, TP, PP)

Values = Sequence[Tensor | None]


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


class Loss(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.n = layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.n(x).square().mean()


class Head(nn.Module):
    """A body that other models may share, and a head."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.h = body, nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.body(x)).square().mean()


class Tied(nn.Module):
    """One weight in three places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(torch.tanh(self.a(x))) @ self.a.weight).square().mean()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def agree(left: Values, right: Values) -> None:
    """Equal values, and None at the same places."""
    for one, other in zip(left, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            tree_allclose(whole(one).detach(), whole(other).detach(), rtol=1e-9)


def compare(make: Callable[[], nn.Module], loop: Callable[[nn.Module], Values], plans: Sequence[Mapping[str, object]] = ALL) -> None:
    """The loop returns what it returns on one device, under each plan."""
    for pins in plans:
        agree(loop(autopar.compile(make(), pins=pins)), loop(make()))


# --- which gradients, and where they go ---


def autograd_grad_of_parameters() -> None:
    """``torch.autograd.grad(loss, model.parameters())``, as for gradient norms of tasks and influence functions."""
    compare(Loss, lambda model: grad(model(batch()), list(model.parameters())))


def gradients_of_some_parameters() -> None:
    """Only those that are asked for, and ``grad`` only of those that ``inputs=`` names."""

    def loop(model: nn.Module) -> Values:
        parameters, loss = list(model.parameters()), model(batch())
        some = grad(loss, parameters[1:2], retain_graph=True)
        assert gradients(model) == [None] * 4
        every = grad(loss, parameters)
        model(batch(1)).backward(inputs=[parameters[0]])
        return [*some, *every, *gradients(model)]

    compare(Loss, loop)


def a_loss_outside_of_the_model_for_each_task() -> None:
    """Two losses of one output, each with gradients of its own."""

    def loop(model: nn.Module) -> Values:
        out = model(batch())
        first = grad(out[:, 0].square().mean(), list(model.parameters()), retain_graph=True)
        second = grad(out[:, 1].square().mean(), list(model.parameters()), retain_graph=True)
        out.mean().backward()
        return [*first, *second, *gradients(model)]

    compare(layers, loop, FLAT)
    compare(layers, lambda model: grad(model(batch()).square().mean(), list(model.parameters())), [GPIPE])


def a_graph_that_is_retained() -> None:
    """Two backwards through one graph; a third without it fails, as on one device."""

    def loop(model: nn.Module) -> Values:
        loss = model(batch())
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises((RuntimeError, InputError)):
            loss.backward()
        return gradients(model)

    compare(Loss, loop)


def calls_that_share_a_backward() -> None:
    """Siamese calls, a call whose loss comes later than another's, an exception between forward and backward."""

    def loop(model: nn.Module) -> Values:
        late = model(batch(2))
        (model(batch(0)) * model(batch(1))).backward()
        late.backward()
        return gradients(model)

    compare(Loss, loop)


def an_adversarial_loop() -> None:
    """A critic's step, then gradients of its input."""

    def loop(model: nn.Module) -> Values:
        x, optimizer = batch().requires_grad_(), torch.optim.Adam(model.parameters(), lr=0.1)
        for seed in range(2):
            optimizer.zero_grad()
            (model(batch(seed)) - model(x.detach())).backward()
            optimizer.step()
            model.zero_grad()
            (-model(x)).backward()
        return [x.grad, *gradients(model), *model.parameters()]

    compare(Loss, loop, FLAT)


def tied_parameters() -> None:
    compare(Tied, lambda model: [*grad(model(batch()), list(model.parameters())), model(batch()).backward(), *gradients(model)])


def a_closure() -> None:
    """LBFGS runs several steps in one."""

    def loop(model: nn.Module) -> Values:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(batch())
            loss.backward()
            return loss

        optimizer.step(closure)
        return list(model.parameters())

    compare(Loss, loop, [DP, TP])


# --- what users do to gradients and parameters ---


def frozen_parameters() -> None:
    """Frozen between calls, and between a forward and its backward; all of them, with a gradient of the input."""

    def loop(model: nn.Module) -> Values:
        first, second, *_ = model.parameters()
        first.requires_grad_(False)
        model(batch()).backward()
        seen = gradients(model)
        first.requires_grad_(True)
        loss = model(batch(1))
        second.requires_grad_(False)
        loss.backward()
        return [*seen, *gradients(model)]

    compare(Loss, loop)

    def all_frozen(model: nn.Module) -> Values:
        x = batch().requires_grad_()
        model.requires_grad_(False)(x).backward()
        return [x.grad, *gradients(model)]

    compare(Loss, all_frozen, FLAT)


def gradients_that_are_edited() -> None:
    """Scaled, dropped, zeroed or set by the user between backwards."""

    def loop(model: nn.Module) -> Values:
        model(batch()).backward()
        first, second, third, _ = model.parameters()
        first.grad *= 3
        second.grad = None
        third.grad = torch.ones_like(third)
        model(batch(1)).backward()
        model.zero_grad(set_to_none=False)
        model(batch(2)).backward()
        return gradients(model)

    compare(Loss, loop)


def two_parameters_with_one_gradient() -> None:
    """Autograd hands both the same tensor; each has a ``grad`` of its own, which may be changed in place."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x * (self.a + self.b)).square().mean()

    def loop(model: nn.Module) -> Values:
        model(batch()).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(3)
        model(batch(1)).backward()
        return gradients(model)

    def hooked(model: nn.Module) -> Values:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: None)
        return loop(model)

    compare(Sum, loop, [DP, FSDP, TP])
    compare(Sum, hooked, [DP, FSDP, TP])


def hooks_of_parameters() -> None:
    """Hooks get the gradient of the whole backward once, also of two calls, and whenever they were registered."""

    def loop(model: nn.Module) -> Values:
        seen: list[Tensor] = []
        first, second, third, _ = parameters = list(model.parameters())
        handle = first.register_hook(lambda gradient: gradient * 2)
        second.register_post_accumulate_grad_hook(lambda parameter: seen.append(whole(parameter.grad).clone()))
        register_multi_grad_hook(parameters, lambda got: seen.extend(whole(one).clone() for one in got if one is not None))
        (model(batch()) + model(batch(1))).backward()
        third.register_hook(lambda gradient: gradient * 3)
        model(batch(2)).backward()
        handle.remove()
        model(batch(3)).backward()
        assert len(seen) == 3 * 5
        return [*seen, *gradients(model)]

    compare(Loss, loop)
    for pins in ALL:
        models = Loss(), Loss()
        for model in models:
            model.n[0].weight.register_hook(lambda gradient: gradient * 3)
        compiled = autopar.compile(models[0], pins=pins)
        for model in (compiled, models[1]):
            model(batch()).backward()
        agree(gradients(compiled), gradients(models[1]))


def windows_without_sums() -> None:
    """Accumulation under ``no_sync``; gradients that are returned or go through hooks are complete there too."""

    def loop(model: nn.Module) -> Values:
        parameters = list(model.parameters())
        parameters[0].register_hook(lambda gradient: gradient * 2)
        returned: Values = []
        for seed in range(2):
            with model.no_sync() if isinstance(model, autopar.CompiledModule) else nullcontext():
                model(batch(seed)).backward()
                returned = grad(model(batch(9)), parameters)
        model(batch(2)).backward()
        return [*returned, *gradients(model)]

    compare(Loss, loop)


def a_parameter_that_changes_before_the_backward() -> None:
    """Changed in place between a forward and its backward, which needs the old value: autograd refuses, as on one device."""
    for make, pins in ((Loss, DP), (Loss, {**DP, "zero": 0}), (Loss, FSDP), (Loss, TP), (layers, GPIPE)):
        model = autopar.compile(make(), pins=pins)
        loss = model(batch()).mean()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        with pytest.raises((RuntimeError, AutoparError), match="inplace operation"):
            loss.backward()
        if pins is not GPIPE:  # a failure in a pipeline ends it
            model.zero_grad()
            model(batch()).mean().backward()


def a_parameter_that_changes_before_the_backward_of_a_copy() -> None:
    """At ZeRO levels 1 and 2 a forward computes with what it has gathered, so its backward doesn't see the change."""
    for level in (1, 2):
        twin, model = Loss(), autopar.compile(Loss(), pins={**DP, "zero": level})
        losses = [one(batch()).mean() for one in (twin, model)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        for loss in losses:
            loss.backward()
        agree(gradients(model), gradients(twin))


# --- higher derivatives ---


def products_with_the_hessian() -> None:
    """Derivatives of gradients of parameters, twice."""

    def loop(model: nn.Module) -> Values:
        parameters, loss = list(model.parameters()), model(batch())
        first = grad(loss, parameters, create_graph=True)
        second = grad(sum((one * (n + 1)).sum() for n, one in enumerate(first)), parameters, create_graph=True)
        third = grad(sum(one.square().sum() for one in second), parameters)
        return [*first, *second, *third]

    compare(Loss, loop, FLAT)


def a_penalty_on_gradients_of_parameters() -> None:
    """Beside the loss, and by ``backward(create_graph=True)``."""

    def loop(model: nn.Module) -> Values:
        loss = model(batch())
        inner = grad(loss, list(model.parameters()), create_graph=True)
        (loss + sum(one.square().sum() + one.norm() for one in inner)).backward()
        seen = gradients(model)
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")  # torch warns of a reference cycle
            model(batch()).backward(create_graph=True)
        penalty = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        penalty.backward()
        return [*seen, *gradients(model)]

    compare(Loss, loop, FLAT)


def a_penalty_on_gradients_of_the_input() -> None:
    """WGAN-GP."""

    def loop(model: nn.Module) -> Values:
        x = batch().requires_grad_()
        score = model(x)
        (inner,) = grad(score, x, create_graph=True)
        (score / 8 + 10 * (inner.norm(dim=1) - 1).square().mean()).backward()
        return gradients(model)

    compare(Loss, loop, FLAT)


def higher_derivatives_through_a_pipeline_are_refused() -> None:
    for make, pins in ((Loss, PP), (layers, GPIPE)):
        model = autopar.compile(make(), pins=pins)
        loss = model(batch()).square().mean()
        with pytest.raises(InputError, match="create_graph=True"):
            grad(loss, list(model.parameters()), create_graph=True)
        with pytest.raises(InputError, match="needs a gradient"):
            model(batch().requires_grad_())
        model(batch())


# --- other tensors in the places of parameters ---


def steps_on_steps() -> None:
    """MAML: a loss of parameters after a step, differentiated through the step."""

    def loop(model: nn.Module) -> Values:
        parameters = dict(model.named_parameters())
        inner = grad(functional_call(model, parameters, (batch(),)), list(parameters.values()), create_graph=True)
        fast = {name: value - 0.1 * one for (name, value), one in zip(parameters.items(), inner, strict=True)}
        functional_call(model, fast, (batch(1),)).backward()
        return gradients(model)

    compare(Loss, loop, FLAT)


def substitutes_for_parameters() -> None:
    """``functional_call`` with whole tensors, and with DTensors from before the plan; the model's own parameters stay as they are."""

    def loop(model: nn.Module) -> Values:
        before = {name: (value.detach().clone() * 2).requires_grad_() for name, value in model.named_parameters()}
        first = functional_call(model, before, (batch(),))
        first.backward()
        plain = {name: torch.full(value.shape, 0.1).requires_grad_() for name, value in model.named_parameters()}
        second = grad(functional_call(model, plain, (batch(1),)), list(plain.values()))
        model(batch(2)).backward()
        with torch.no_grad():
            third = functional_call(model, before, (batch(),))
        assert whole(first) == whole(third)
        return [first, *(value.grad for value in before.values()), *second, *gradients(model)]

    compare(Loss, loop, FLAT)


def substitutes_that_can_not_be_used() -> None:
    """Not the same on all ranks; other sizes; in a pipeline; inside of a transform of ``torch.func``."""
    for pins in (DP, TP):
        model = autopar.compile(Loss(), pins=pins)
        unlike = {name: torch.full(value.shape, 0.1 + dist.get_rank()) for name, value in model.named_parameters()}
        with pytest.raises(InputError, match=r"n\.0\.weight isn't the same on rank 0 and rank 1"):
            functional_call(model, unlike, (batch(),))
        with pytest.raises(InputError, match=r"n\.2\.bias has the sizes \(1,\)"):
            functional_call(model, {"n.2.bias": torch.ones(1)}, (batch(),))
        with pytest.raises(InputError, match=r"torch\.func\.grad"):
            torch.func.grad(lambda bias, model=model: functional_call(model, {"n.2.bias": bias}, (batch(),)))(torch.ones(2))
        with pytest.raises(InputError, match=r"torch\.func\.grad"):
            torch.vmap(model)(torch.ones(2, 8, 8))
        model(batch())
    model = autopar.compile(Loss(), pins=PP)
    model(batch())
    with pytest.raises(InputError, match=r"n\.0\.weight is not the model's own at this call"):
        functional_call(model, {"n.0.weight": torch.ones(8, 8)}, (batch(),))
    model(batch()).backward()


def a_sparse_gradient() -> None:
    """Refused before a step begins; without gradients the table may say that it has sparse ones."""
    for pins in ALL:
        model = autopar.compile(nn.Sequential(nn.Embedding(8, 8, sparse=True), nn.Linear(8, 2)), pins=pins)
        words = torch.arange(8)
        with pytest.raises(InputError, match=r"the gradient of 0\.weight is sparse"):
            model(words)
        with torch.no_grad():
            model(words)


def a_parameter_that_is_exchanged() -> None:
    """A new parameter in the place of an old one is trained; one that a file brought is stored as the old one."""

    def loop(model: nn.Module) -> Values:
        model(batch()).backward()
        model.n[2].weight = weight = nn.Parameter(torch.full((2, 8), 0.25))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(2):
            optimizer.zero_grad()
            model(batch(seed)).backward()
            optimizer.step()
        pending = model(batch(3))
        model.load_state_dict({name: whole(value).clone() * 1.5 for name, value in model.state_dict().items()}, assign=True)
        pending.backward()
        model(batch(4)).backward()
        return [weight, *gradients(model)]

    compare(Loss, loop, FLAT)


def modules_that_change_after_compile() -> None:
    """Exchanged, added and removed modules and parameters, and ties that are cut: programs don't know of them."""
    model = autopar.compile(Loss(), pins=DP)
    model(batch())
    last, model.n[2] = model.n[2], nn.Linear(8, 3)
    with pytest.raises(InputError, match="modules of n were added, removed or exchanged since the model was compiled"):
        model(batch())
    model.n[2] = last
    last.register_parameter("extra", nn.Parameter(torch.ones(1)))
    with pytest.raises(InputError, match=r"parameters of n\.2 were added or removed"):
        model(batch())
    del last.extra, last.bias
    with pytest.raises(InputError, match=r"parameters of n\.2 were added or removed"):
        model(batch())
    tied = autopar.compile(Tied(), pins=DP)
    tied(batch())
    tied.b.weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(InputError, match=r"b\.weight and a\.weight were one parameter"):
        tied(batch())


# --- models that share parameters ---


def _actor_and_critic(pins: Mapping[str, object] | None, second: Mapping[str, object] | None = None) -> Values:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    one, two = Head(body, 2), Head(body, 4)
    if pins is not None:
        one, two = autopar.compile(one, pins=pins), autopar.compile(two, pins=second)
    optimizer = torch.optim.AdamW([*one.parameters(), *two.h.parameters()], lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        one(batch(seed)).backward()
        two(batch(seed)).backward()
        (one(batch(5 + seed)) + two(batch(6 + seed))).backward()
        optimizer.step()
    return [*one.parameters(), *two.parameters(), *gradients(one), *gradients(two)]


def two_models_share_a_body() -> None:
    """Each is compiled; the second one pinned alike, or left to the search, stores the body as the first does."""
    expected = _actor_and_critic(None)
    for pins in ALL:
        agree(_actor_and_critic(pins, pins), expected)
    for pins in (FSDP, TP, PP):
        agree(_actor_and_critic(pins), expected)


def two_models_share_a_body_on_other_meshes() -> None:
    for first, second in ((DP, TP), (DP, PP), (PP, DP), (FSDP, {"dp": 2, "fsdp": False})):
        body = nn.Linear(8, 8)
        one, two = autopar.compile(Head(body, 2), pins=first), autopar.compile(Head(body, 4), pins=second)
        one(batch())
        with pytest.raises(PlanError, match=r"body\.weight is stored for another compiled model already.*one module that holds both"):
            two(batch())


def a_model_in_several_hands() -> None:
    """Compiled twice; a part of it compiled too, or called; a weight tied to another model's, compiled or not."""
    for pins in FLAT:
        results = []
        for is_compiled in (False, True):
            model = Loss()
            tied, other, outside = (Head(model.n[0], 8) for _ in range(3))
            outside.h.weight = other.h.weight = tied.h.weight
            calls: list[nn.Module] = [model, model, model.n, tied, other, outside]
            if is_compiled:
                calls[:5] = [autopar.compile(call, pins=pins) for call in calls[:5]]
            for seed, call in enumerate(calls):
                call(batch(seed)).mean().backward()
            results.append([*gradients(model), *gradients(tied), *gradients(other)])
        agree(*results)


def parameters_of_something_else() -> None:
    """DTensors that weren't made here are refused: the model is split already."""
    model = Loss()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("mine",))
    model.n[0].weight = nn.Parameter(distribute_tensor(model.n[0].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(InputError, match="weight is a DTensor on the mesh"):
        autopar.compile(model, pins=DP)


# --- around the call ---


def checkpoints_around_a_model() -> None:
    """Both kinds, also around the first call, which plans."""
    for reentrant in (False, True):
        compare(
            Loss,
            lambda model, reentrant=reentrant: [  # type: ignore[misc]
                checkpoint(model, batch().requires_grad_(), use_reentrant=reentrant).backward(),
                *gradients(model),
            ],
            [DP, TP],
        )


def a_checkpoint_beside_a_call() -> None:
    """The backward of a reentrant checkpoint runs inside of the backward that has summed gradients already."""

    def loop(model: nn.Module) -> Values:
        inside = checkpoint(model, batch().requires_grad_(), use_reentrant=True)
        (inside + 3 * model(batch(1).requires_grad_())).backward()
        return gradients(model)

    compare(Loss, loop, FLAT)


def a_backward_after_one_that_failed() -> None:
    """On the same graph, without a forward between them."""

    def loop(model: nn.Module) -> Values:
        x, fails = batch().requires_grad_(), [True]
        inner = 2 * x
        inner.register_hook(lambda gradient: 1 / 0 if fails[0] else None)  # type: ignore[no-untyped-call]
        loss = model(inner)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        torch.optim.SGD(model.parameters()).zero_grad()
        fails[0] = False
        loss.backward()
        return gradients(model)

    compare(Loss, loop, FLAT)


class WithWeight(Loss):
    """Returns a weight beside its loss."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.n[2].weight


def a_weight_that_is_returned() -> None:
    """Its gradient is that of both ways, and it doesn't collect hooks from call to call."""

    def loop(model: nn.Module) -> Values:
        for seed in range(4):
            loss, weight = model(batch(seed))
            (loss + weight.square().sum()).backward()
        counts = [len(x._backward_hooks or ()) for x in gc.get_objects() if type(x) is Tensor and x.shape == weight.shape]
        assert max(counts, default=0) <= 3
        return gradients(model)

    compare(WithWeight, loop, FLAT)


def modules_that_are_called_on_own_samples() -> None:
    """A module of a model with ``inputs="local"`` gets the gradient of the mean of the ranks' losses, the same on all ranks."""
    x, model = batch(), layers()
    model[0](x).square().mean().backward()
    expected = gradients(model)[:2]
    index = dist.get_rank()
    for pins in (DP, FSDP):
        model = autopar.compile(layers(), (batch(),), pins=pins, inputs="local")  # type: ignore[assignment]
        model.get_submodule("0")(x[4 * index :][:4]).square().mean().backward()
        agree(gradients(model)[:2], expected)


def modes_threads_and_failures() -> None:
    """Calls without gradients before, anomaly detection, a backward on another thread, and one that failed."""

    def loop(model: nn.Module) -> Values:
        with torch.no_grad():
            first = model(batch())
        with torch.inference_mode():
            second = model(batch()).clone()
        with torch.autograd.set_detect_anomaly(True):
            model(batch()).backward()
        loss = model(batch(1))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return [first, second, *gradients(model)]

    compare(Loss, loop)

    def failing(model: nn.Module) -> Values:
        with saved_tensors_hooks(lambda x: x, lambda x: 1 / 0), pytest.raises(ZeroDivisionError):
            model(batch()).backward()
        model.zero_grad()
        model(batch(1)).backward()
        return gradients(model)

    compare(Loss, failing, [DP, TP])


CASES: tuple[Case, ...] = (
    autograd_grad_of_parameters,
    gradients_of_some_parameters,
    a_loss_outside_of_the_model_for_each_task,
    a_graph_that_is_retained,
    calls_that_share_a_backward,
    an_adversarial_loop,
    tied_parameters,
    a_closure,
    frozen_parameters,
    gradients_that_are_edited,
    two_parameters_with_one_gradient,
    hooks_of_parameters,
    windows_without_sums,
    products_with_the_hessian,
    a_penalty_on_gradients_of_parameters,
    a_penalty_on_gradients_of_the_input,
    higher_derivatives_through_a_pipeline_are_refused,
    steps_on_steps,
    substitutes_for_parameters,
    substitutes_that_can_not_be_used,
    a_sparse_gradient,
    a_parameter_that_is_exchanged,
    modules_that_change_after_compile,
    two_models_share_a_body,
    two_models_share_a_body_on_other_meshes,
    a_model_in_several_hands,
    parameters_of_something_else,
    checkpoints_around_a_model,
    a_checkpoint_beside_a_call,
    a_backward_after_one_that_failed,
    a_weight_that_is_returned,
    modules_that_are_called_on_own_samples,
    modes_threads_and_failures,
    a_parameter_that_changes_before_the_backward,  # ends a pipeline, and with it the process group
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), CASES)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_case(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
