"""Training loops as users write them, where a compiled model is easily off: each is run on two ranks and on one device, in float64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import AutoparError, PlanError
from autopar.runtime.executor import Executor
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases

WIDTH, WORDS = 8, 24
PIPELINE: Mapping[str, object] = {"pp": 2, "schedule": "1f1b", "microbatches": 4}
GPIPE: Mapping[str, object] = {"pp": 2, "schedule": "gpipe", "microbatches": 4}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Four blocks and a head; without a target it returns what the heads say, else the loss."""

    def __init__(self, *, heads: int = 1, loss_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(heads))
        self.loss_shape = loss_shape

    def forward(self, x: Tensor, y: Tensor | None = None, c: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        if c is not None:
            x = x + self.condition(c)
        for layer in self.layers:
            x = layer(x)
        results = tuple(head(x) for head in self.heads)
        if y is None:
            return results if len(results) > 1 else results[0]
        return (results[0] - y).square().mean().reshape(self.loss_shape)


class Early(Net):
    """A loss of the first block alone, beside the output."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        first = self.layers[0](x)
        x = first
        for layer in self.layers[1:]:
            x = layer(x)
        return (first.mean(-1, keepdim=True) - y).square().mean(), self.heads[0](x)


class Normed(Net):
    """Batch norms, and a scale that every call shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(4))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(layer(x))
            if number == 1:
                x = x * self.scale
                self.scale = self.scale * 0.9
        return self.heads[0](x)


class Wider(Net):
    """A loss of a wider dtype than the parameters."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return (super().forward(x) - y).float().square().mean() * 2.0**-10


class Tied(nn.Module):
    """A table that the last layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class SharedNorm(Net):
    """One batch norm behind every block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = self.norm(layer(x))
        return (self.heads[0](x) - y).square().mean()


def _batch(seed: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, 1, generator=generator)


def _words(seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, (8, 4), generator=torch.Generator().manual_seed(seed))


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else _whole(p.grad).clone() for name, p in model.named_parameters()}


def _compile(model: nn.Module, pins: Mapping[str, object]) -> autopar.CompiledModule:
    return autopar.compile(model, cluster="2xcpu", pins=pins)


def _compare(make: Callable[[], nn.Module], pins: Mapping[str, object], loop: Callable[[nn.Module], object]) -> None:
    """The loop leaves the same gradients, parameters and buffers as on one device."""
    model, reference = _compile(make(), pins), make()
    for one in (reference, model):
        loop(one)
    tree_allclose(_gradients(model), _gradients(reference), rtol=1e-9)
    states = [{name: _whole(x) for name, x in one.state_dict().items()} for one in (model, reference)]
    tree_allclose(*states, rtol=1e-9)


def _outside(model: nn.Module, seed: int = 0) -> None:
    x, y = _batch(seed)
    (_whole(model(x)) - y).square().mean().backward()


# --- what a loss doesn't reach ---


def an_output_that_is_not_used_gives_no_gradients() -> None:
    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        for seed in range(2):
            optimizer.zero_grad()
            x, y = _batch(seed)
            (_whole(model(x)[0]) - y).square().mean().backward()
            optimizer.step()

    _compare(lambda: Net(heads=2), GPIPE, loop)


def a_loss_of_the_first_block_gives_the_others_none() -> None:
    pins = {**PIPELINE, "layers.1": {"pp": 0}, "layers.2": {"pp": 0}, "layers.3": {"pp": 1}}

    def loop(model: nn.Module) -> None:
        model(*_batch())[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    _compare(Early, pins, loop)


# --- steps that fail, and windows without sums ---


class _Broken(Exception):
    pass


def _break_after(count: int) -> torch.autograd.graph.saved_tensors_hooks:
    left = [count]

    def unpack(x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise _Broken
        return x

    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack)


def a_step_after_a_backward_that_failed_is_right() -> None:
    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with _break_after(9), pytest.raises(_Broken):
            model(*_batch(0)).backward()
        optimizer.zero_grad()
        model(*_batch(1)).backward()

    _compare(Net, {"tp": 2}, loop)
    _compare(Net, {"dp": 2}, loop)


def a_forward_without_sums_whose_backward_has_them() -> None:
    def loop(model: nn.Module) -> None:
        if isinstance(model, autopar.CompiledModule):
            with model.no_sync():
                loss = model(*_batch())
        else:
            loss = model(*_batch())
        loss.backward()

    for pins in ({"dp": 2}, PIPELINE):
        _compare(Net, pins, loop)


# --- modes ---


def a_first_call_in_inference_mode_spoils_nothing() -> None:
    def loop(model: nn.Module) -> None:
        with torch.inference_mode():
            model.eval()(*_batch())
        model.train()(*_batch()).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    for pins in ({"tp": 2}, {"dp": 2, "fsdp": True}, PIPELINE):
        _compare(Net, pins, loop)


def a_model_in_stages_is_not_run_inside_of_a_backward() -> None:
    model = _compile(Net(), PIPELINE)
    with pytest.raises(AutoparError, match="inside of a backward"):
        torch.utils.checkpoint.checkpoint(model, *_batch(), use_reentrant=False).backward()


# --- buffers, other shapes, shared parameters ---


def buffers_that_the_forward_writes_with_the_loss_outside() -> None:
    def loop(model: nn.Module) -> None:
        for seed in range(2):
            _outside(model, seed)
        model.eval()
        _outside(model, 3)

    _compare(Normed, {"pp": 2, "schedule": "gpipe", "microbatches": 1}, loop)
    _compare(Normed, {"tp": 2}, loop)


def a_loss_may_have_a_dim() -> None:
    _compare(lambda: Net(loss_shape=(1,)), PIPELINE, lambda model: model(*_batch()).backward())


def two_forwards_before_the_backward_share_a_table() -> None:
    def loop(model: nn.Module) -> None:
        first, second = _whole(model(_words(0))), _whole(model(_words(1)))
        with torch.no_grad():
            model(_words(2))
        (first.square().mean() + second.mean()).backward()

    _compare(Tied, GPIPE, loop)


def an_input_that_comes_later_lends_its_parameters() -> None:
    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for seed in range(4):
            x, y = _batch(seed)
            optimizer.zero_grad()
            (model(x, y, x) if seed % 2 else model(x, y)).backward()
            optimizer.step()

    _compare(Net, PIPELINE, loop)


def a_norm_on_two_stages_is_refused() -> None:
    with pytest.raises(PlanError, match=r"norm\.running_mean is written to on pipeline ranks 0, 1"):
        _compile(SharedNorm(), {"pp": 2, "schedule": "gpipe", "microbatches": 1})(*_batch())


# --- what users put on parameters, scale, keep ---


def attributes_and_hooks_of_parameters_stay() -> None:
    for pins in ({"tp": 2}, PIPELINE):
        net, seen = Net(), list[Tensor]()
        weight = net.layers[0].up.weight
        weight.no_decay = True
        weight.register_hook(lambda gradient: gradient * 2)
        weight.register_post_accumulate_grad_hook(seen.append)
        model, reference = _compile(net, pins), Net()
        model.layers[0].up.bias.flag = 7
        for one in (model, reference):
            one(*_batch()).backward()
        assert model.layers[0].up.weight.no_decay
        assert model.layers[0].up.bias.flag == 7
        assert len(seen) == 1
        tree_allclose(2 * _gradients(reference)["layers.0.up.weight"], _gradients(model)["layers.0.up.weight"])


def scaled_losses_of_half_precision_do_not_vanish() -> None:
    def scaled(model: nn.Module, scale: float) -> dict[str, Tensor | None]:
        model.zero_grad()
        x, y = (one.half() for one in _batch())
        (model(x, y) * scale).backward()
        return _gradients(model)

    model, reference = _compile(Wider().half(), PIPELINE), Wider().half()
    for scale in (2.0**16, 2.0**10, 2.0**16):
        tree_allclose(scaled(model, scale), scaled(reference, scale), rtol=2e-2)


def a_scale_that_changes_gives_the_gradients_of_that_scale() -> None:
    def loop(model: nn.Module) -> None:
        for seed, scale in enumerate((1.0, 1024.0, 0.3, 0.0, 7.0)):
            (model(*_batch(seed)) * scale).backward()

    _compare(Net, PIPELINE, loop)


def steps_leave_nothing_behind() -> None:
    gc.collect()
    gc.disable()
    try:
        for pins in (PIPELINE, GPIPE):
            model = _compile(Net(), pins)
            model(*_batch()).backward()
            model(_batch()[0])  # no backward follows
            with torch.no_grad():
                model(_batch()[0])
            assert not any(type(one) is Executor for one in gc.get_objects())
    finally:
        gc.enable()
    x, y = _batch()
    loss, seen = model(x, y), weakref.ref(x)
    loss.backward()
    del x
    assert seen() is None, "a loss that is kept keeps the inputs of its step"


class Seen(nn.Module):
    """Returns a hidden tensor, and what it computes from it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = Block(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        return hidden, self.last(torch.tanh(hidden))


def a_hook_on_an_output_sees_all_of_its_gradient_or_is_refused() -> None:
    x, _ = _batch()
    for pins in ({"dp": 2, "zero": 3}, {"tp": 2}, {"dp": 2, "half_batches": True}, {"pp": 2, "microbatches": 2}):
        model, twin = autopar.compile(Seen(), pins=pins), Seen()
        for stop in (lambda h: h.register_hook(torch.zeros_like), lambda h: h.retain_grad()):
            hidden, scores = model(x)
            stop(hidden)
            with pytest.raises(AutoparError, match=r"output\[0\] of call \d+ .* has a hook or retains its gradient"):
                scores.square().mean().backward()
        for _ in range(3):
            grads = []
            for each in (twin, model):
                # Of a hook that is gone, of the last output, and of a backward that comes through the hooked one alone.
                hidden, scores = each(x)
                hidden.register_hook(torch.zeros_like).remove()
                scores.register_hook(lambda gradient: 2 * gradient)
                (hidden.square().mean() + scores.mean()).backward()
                hidden = each(x)[0]
                hidden.retain_grad()
                hidden.square().mean().backward()
                grads.append((hidden.grad, _gradients(each)))
                each.zero_grad()
            tree_allclose(grads[1], grads[0])


LOOPS: tuple[Case, ...] = (
    a_hook_on_an_output_sees_all_of_its_gradient_or_is_refused,
    an_output_that_is_not_used_gives_no_gradients,
    a_loss_of_the_first_block_gives_the_others_none,
    a_step_after_a_backward_that_failed_is_right,
    a_forward_without_sums_whose_backward_has_them,
    a_first_call_in_inference_mode_spoils_nothing,
    buffers_that_the_forward_writes_with_the_loss_outside,
    a_loss_may_have_a_dim,
    two_forwards_before_the_backward_share_a_table,
    an_input_that_comes_later_lends_its_parameters,
    a_norm_on_two_stages_is_refused,
    attributes_and_hooks_of_parameters_stay,
    scaled_losses_of_half_precision_do_not_vanish,
    a_scale_that_changes_gives_the_gradients_of_that_scale,
    steps_leave_nothing_behind,
    a_model_in_stages_is_not_run_inside_of_a_backward,  # ends the process group
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), LOOPS)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in LOOPS])
def test_loop_on_two_ranks_does_what_it_does_on_one_device(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
