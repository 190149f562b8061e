"""Recomputed regions against the same regions kept: values, gradients, masks, messages, and what stays in memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import autopar
from autopar.capture.export import capture
from autopar.checks import threads
from autopar.errors import InputError
from autopar.ir.layout import Mesh
from autopar.ops import collectives, comm, kernels, regather, rng
from autopar.ops.recompute import Recomputed
from autopar.rewrite.emit import rewrite
from autopar.rewrite.outline import check_repeatable, find_unrepeatable
from autopar.torch_compat import StorageRef
from tests.helpers import tree_allclose

aten = torch.ops.aten
WIDTH = 6


def _graph(target: Callable[..., Any], count: int, *args: Any) -> fx.GraphModule:
    """A program of one call, of `count` inputs and further arguments that are constant."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{at}") for at in range(count)]
    graph.output(graph.call_function(target, (*inputs, *args)))
    return fx.GraphModule(nn.Module(), graph)


def _tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def _mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + F.gelu(x @ up).square() @ down


@contextmanager
def _alone() -> Iterator[None]:
    with comm.active({}):
        yield


def _differentiate(module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    for x in inputs:
        x.grad = None
    loss = module(*inputs).square().sum()
    loss.backward()
    return (loss.detach(), *(x.grad for x in inputs if x.grad is not None))


def test_values_and_gradients_are_those_of_the_region() -> None:
    region = _graph(_mlp, 3)
    inputs = _tensors((4, WIDTH), (WIDTH, 8), (8, WIDTH))
    with _alone():
        assert tree_allclose(_differentiate(Recomputed(region), inputs), _differentiate(region, inputs), rtol=0) == 4


def test_only_the_inputs_are_kept() -> None:
    made: list[StorageRef] = []

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = F.gelu(x @ up)
        made.append(StorageRef(hidden))
        return hidden.square() @ down

    inputs = _tensors((4, WIDTH), (WIDTH, 8), (8, WIDTH))
    kept = []
    for module in (_graph(mlp, 3), Recomputed(_graph(mlp, 3))):
        saved: list[Tensor] = []

        def keep(x: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(x)
            return x

        with _alone(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            result = module(*inputs)
        kept.append({x.data_ptr() for x in saved} - {x.data_ptr() for x in inputs})
        saved.clear()
        gc.collect()
        alive = not made[-1].expired()
        assert alive == (not isinstance(module, Recomputed))
        result.sum().backward()
    assert len(kept[0]) >= 3
    assert not kept[1]


def test_without_gradients_it_only_runs() -> None:
    runs: list[int] = []

    def double(x: Tensor) -> Tensor:
        runs.append(1)
        return x.exp()

    module = Recomputed(_graph(double, 1))
    (x,) = _tensors((3,))
    with torch.no_grad():  # without axes too
        assert not module(x).requires_grad
    assert len(runs) == 1


def test_nothing_runs_again_after_what_the_backward_needs() -> None:
    runs: list[str] = []

    def region(x: Tensor) -> Tensor:
        runs.append("needed")
        y = x.exp().sin()
        runs.append("not needed")
        return y + 1

    (x,) = _tensors((3,))
    with _alone():
        Recomputed(_graph(region, 1))(x).sum().backward()
    assert runs == ["needed", "not needed", "needed"]
    tree_allclose(x.grad, (x.exp() * x.exp().cos()).detach(), rtol=1e-14)


def _dropped(x: Tensor, weight: Tensor) -> Tensor:
    hidden = kernels.dropout(x @ weight, 0.5, True, splits={"b": ("x",)})
    return kernels.dropout(hidden.tanh(), 0.3, True, splits={"b": ("x",)}) @ weight.T


@pytest.mark.parametrize("where", ["isolated", "agreed"])
def test_masks_are_drawn_alike_with_other_micro_batches_between(where: str) -> None:
    """Forwards 0, 1, 2, backwards 1, 0, 2: outputs, gradients and the generator's state as without recomputation."""

    def run(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        weight, *inputs = _tensors((WIDTH, WIDTH), (4, WIDTH), (4, WIDTH), (4, WIDTH))
        draws = rng.isolated(5) if where == "isolated" else rng.agreed(lambda seed: seed)
        with comm.active({"x": comm.alone("x")}), draws:
            losses = [module(x, weight).square().sum() for x in inputs]
            for at in (1, 0, 2):
                losses[at].backward()
            last = _dropped(inputs[0], weight)
        gradients = [x.grad for x in (weight, *inputs) if x.grad is not None]
        return [*losses, *gradients, last, torch.default_generator.get_state()]

    region = _graph(_dropped, 2)
    assert tree_allclose(run(Recomputed(region)), run(region), rtol=0) == 9


def test_the_backward_may_run_on_another_thread() -> None:
    """As on a GPU: no axes are active there, and the generator of the simulated rank isn't known."""

    def run(module: nn.Module, elsewhere: bool) -> list[Tensor | None]:
        x, weight = _tensors((4, WIDTH), (WIDTH, WIDTH))
        with comm.active({"x": comm.alone("x")}), rng.isolated(5):
            loss = module(x, weight).square().sum()
            if not elsewhere:
                loss.backward()
        if elsewhere:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        return [x.grad, weight.grad]

    region = _graph(_dropped, 2)
    assert tree_allclose(run(Recomputed(region), True), run(region, False), rtol=0) == 2


def test_regions_within_regions_and_two_backwards() -> None:
    inner = _graph(_dropped, 2)

    def outer(module: nn.Module) -> fx.GraphModule:
        return _graph(lambda x, weight: kernels.dropout(module(x.sin(), weight), 0.5, True, splits={}).exp(), 2)

    def run(module: nn.Module) -> list[Tensor | None]:
        x, weight = _tensors((4, WIDTH), (WIDTH, WIDTH))
        with comm.active({"x": comm.alone("x")}), rng.isolated(5):
            loss = module(x, weight).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        return [x.grad, weight.grad]

    assert tree_allclose(run(Recomputed(outer(Recomputed(inner)))), run(outer(inner)), rtol=0) == 2


def _parallel(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Megatron's MLP, with dropout inside the split."""
    hidden = F.gelu(collectives.sum_gradient(x, "tp") @ up)
    hidden = kernels.dropout(hidden, 0.5, True, splits={"f": ("tp",)})
    return x + collectives.all_reduce((hidden * hidden) @ down, "tp").tanh()


def test_messages_between_ranks_are_sent_again() -> None:
    whole = _tensors((4, WIDTH), (WIDTH, 8), (8, WIDTH))

    def on(rank: int, module: nn.Module) -> tuple[Tensor, ...]:
        parts = [whole[0], whole[1].chunk(2, 1)[rank], whole[2].chunk(2, 0)[rank]]
        inputs = [part.detach().clone().requires_grad_() for part in parts]
        with rng.isolated(5):
            return _differentiate(module, inputs)

    region = _graph(_parallel, 3)
    mesh = Mesh(("tp",), (2,))
    expected = threads.run(mesh, lambda rank: on(rank, region))
    assert tree_allclose(threads.run(mesh, lambda rank: on(rank, Recomputed(region))), expected, rtol=0) == 8
    assert (expected[0][2] != expected[1][2]).any()


def test_the_backward_finds_the_axes_of_its_forward() -> None:
    """While another micro-batch's axes are active, or none."""

    def region(x: Tensor) -> Tensor:
        return (x * (comm.index(["micro"]) + 1)).exp()

    module = Recomputed(_graph(region, 1))
    (x,) = _tensors((3,))
    times = [{"micro": comm.ThreadAxis("micro", at, comm.Rendezvous(2))} for at in range(2)]
    results = []
    for time in times:
        with comm.active(time):
            results.append(module(x))
    gradients = [torch.autograd.grad(results[0].sum(), x)[0]]
    with comm.active(times[0]):
        gradients.append(torch.autograd.grad(results[1].sum(), x)[0])
    expected = [x.detach().exp(), 2 * (2 * x.detach()).exp()]
    tree_allclose(gradients, expected, rtol=1e-14)


def test_gathered_weights_are_forgotten_and_gathered_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gathers: list[int] = []
    original = comm.ThreadAxis.gather_stack

    def count(axis: comm.ThreadAxis, x: Tensor) -> Tensor:
        gathers.append(axis.index)
        return original(axis, x)

    monkeypatch.setattr(comm.ThreadAxis, "gather_stack", count)
    mesh = Mesh(("dp",), (2,))
    batch, whole = _tensors((4, WIDTH), (8, WIDTH))

    def on(rank: int, *, recomputed: bool) -> list[Any]:
        seen: list[StorageRef] = []

        def layer(x: Tensor, part: Tensor) -> Tensor:
            weight = collectives.all_gather(part, "dp", 0, save=False)
            seen.append(StorageRef(weight))
            return F.gelu(x @ weight.T) @ weight

        part = whole.chunk(2)[rank].detach().clone().requires_grad_()
        x = batch.detach().chunk(2)[rank].clone().requires_grad_()
        module: nn.Module = _graph(layer, 2)
        module = Recomputed(module) if recomputed else module  # type: ignore[arg-type]
        with regather():
            # What isn't recomputed may stand beside it, and two micro-batches may be under way.
            losses = [module(layer(x, part), part).square().sum() for _ in range(2)]
        gc.collect()
        forgotten = [ref.expired() for ref in seen]
        for loss in losses:
            loss.backward()
        del losses, loss
        gc.collect()
        return [x.grad, part.grad, len(seen), all(forgotten), all(ref.expired() for ref in seen)]

    expected = threads.run(mesh, lambda rank: on(rank, recomputed=False))
    before = len(gathers)
    actual = threads.run(mesh, lambda rank: on(rank, recomputed=True))
    tree_allclose([each[:2] for each in actual], [each[:2] for each in expected], rtol=1e-12)
    # Per micro-batch two layers, the recomputed one runs again in the backward.
    assert [each[2:] for each in actual] == [[6, True, True]] * 2
    assert before == len(gathers) - before == 2 * 2 * 4


def test_buffers_are_written_once() -> None:
    def run(module: nn.Module) -> list[Tensor | None]:
        x, scale, shift = _tensors((4, 3, 5), (3,), (3,))
        mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        with _alone():
            results = [module(x, scale, shift, mean, variance) for _ in range(2)]
            sum(result.exp().sum() for result in results).backward()
        return [x.grad, scale.grad, shift.grad, mean, variance]

    def region() -> fx.GraphModule:
        graph = fx.Graph()
        x, scale, shift, mean, variance = [graph.placeholder(f"x{at}") for at in range(5)]
        x = graph.call_function(aten.sin.default, (x,))
        norm = graph.call_function(aten.batch_norm.default, (x, scale, shift, mean, variance, True, 0.1, 1e-5, False))
        norm.meta["writes"] = frozenset({3, 4})
        graph.output(norm)
        return fx.GraphModule(nn.Module(), graph)

    assert tree_allclose(run(Recomputed(region())), run(region()), rtol=1e-14) == 5


@pytest.mark.parametrize("training", [True, False])
def test_programs_say_which_buffers_a_region_writes_to(training: bool) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3))).train(training)
    inputs = (torch.randn(4, 4, 2, 2, requires_grad=True),)
    plan = autopar.plan(model, inputs, "2xcpu", pins={"dp": 2, "recompute": "full"})
    program = rewrite(capture(model, inputs), plan)
    regions = [module for module in program.module.modules() if isinstance(module, Recomputed)]
    assert regions
    for region in regions:
        given = [node.name for node in region.module.graph.find_nodes(op="placeholder")]
        written = {name for name in given if "running" in name}
        assert {given[at] for at in region._updated} == (written if training else set())
        assert written


def test_random_numbers_of_torch_itself_are_refused() -> None:
    noise = _graph(aten.rand_like.default, 1)
    node = next(iter(noise.graph.find_nodes(op="call_function", target=aten.rand_like.default)))
    node.meta["stack_trace"] = '  File "train.py", line 7, in forward\n    noise = torch.rand_like(x)\n'
    with pytest.raises(InputError, match=r"draws random numbers of its own: aten.rand_like.default \(train.py:7: noise = .* activations"):
        check_repeatable(noise.graph)
    assert find_unrepeatable(_graph(aten.dropout.default, 1, 0.5, True).graph)
    assert find_unrepeatable(_graph(aten.multinomial.default, 1, 2).graph)


@pytest.mark.parametrize(
    ("target", "count", "args"),
    [
        (aten.dropout.default, 1, (0.5, False)),
        (aten.dropout.default, 1, (0.0, True)),
        (aten.scaled_dot_product_attention.default, 3, ()),
        (aten.lstm.input, 1, ([], [], True, 2, 0.0, True, False, False)),
        (kernels.dropout, 1, (0.5, True)),
    ],
)
def test_what_draws_nothing_or_through_us_is_not(target: Any, count: int, args: tuple[Any, ...]) -> None:
    assert not find_unrepeatable(_graph(target, count, *args).graph)
