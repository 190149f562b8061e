"""The user's module on hand-made programs: tensor parallel, data parallel and sharded storage, against one device."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import InputError, PlanError
from autopar.ir.layout import Mesh, format_layout, parse_layout
from autopar.ops import collectives
from autopar.rewrite.program import Program, Slot
from autopar.runtime.module import ParallelModule
from tests.helpers import tree_allclose
from tests.processes import spawn

BATCH, WIDTH, HIDDEN = 8, 6, 12


class Model(nn.Module):
    """Two layers; the first is gated, its weight a fused (two hidden), so that its useful shard is strided."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"hidden": HIDDEN}
        self.up = nn.Linear(WIDTH, 2 * HIDDEN, dtype=torch.float64)
        self.down = nn.Linear(HIDDEN, WIDTH, dtype=torch.float64)
        self.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        gate, value = self.up(x).chunk(2, -1)
        out = self.down(F.silu(gate) * value)
        return {"loss": F.mse_loss(out, y), "out": out}


@dataclass
class Call:
    """Binds ``model(x, y)``."""

    shapes: tuple[tuple[int, ...], ...]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        tensors = [*args, *kwargs.values()]
        if tuple(tuple(x.shape) for x in tensors) != self.shapes:
            raise InputError(f"shapes {[tuple(x.shape) for x in tensors]}")
        return tensors

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        return dict(zip(("loss", "out"), outputs, strict=True))


@dataclass(frozen=True)
class Kind:
    """How a hand-made plan splits the model over one axis."""

    name: str
    ranks: int
    up: str
    up_bias: str
    down: str
    batch: bool
    stored_whole: bool


KINDS = {
    kind.name: kind
    for kind in (
        Kind("tp", 2, "S0/2", "S0/2", "S1", batch=False, stored_whole=False),
        Kind("dp", 2, "R", "R", "R", batch=True, stored_whole=True),
        Kind("zero", 2, "S0/2", "R", "S0", batch=True, stored_whole=False),
        Kind("one", 1, "R", "R", "R", batch=True, stored_whole=True),
    )
}


def _plan(kind: Kind, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> Program:
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.up.weight.shape == (2 * HIDDEN, WIDTH)
    shapes = tuple(tuple(x.shape) for x in (*args, *kwargs.values()))
    graph, axis = fx.Graph(), kind.name
    up, up_bias, down, down_bias, calls, x, y = map(graph.placeholder, ("up", "up_bias", "down", "down_bias", "calls", "x", "y"))
    call = graph.call_function
    if kind.name == "zero":
        up = call(collectives.all_gather, (up, axis, 0, 2), {"save": False})
        down = call(collectives.all_gather, (down, axis, 0), {"save": False})
    if kind.name == "tp":
        x = call(collectives.sum_gradient, (x, axis))
    halves = call(torch.chunk, (call(F.linear, (x, up, up_bias)), 2, -1))
    gate, value = (call(lambda pair, index: pair[index], (halves, index)) for index in (0, 1))
    hidden = call(torch.mul, (call(F.silu, (gate,)), value))
    out = call(F.linear, (hidden, down))
    if kind.name == "tp":
        out = call(collectives.all_reduce, (out, axis))
    out = call(torch.add, (out, down_bias))
    loss = call(F.mse_loss, (out, y))
    if kind.batch:
        loss = call(collectives.all_reduce, (call(torch.div, (loss, kind.ranks)), axis))
    graph.output((loss, out, call(torch.add, (calls, 1))))

    def slot(name: str, layout: str, shape: tuple[int, ...], partial: bool = False) -> Slot:
        return Slot(name, parse_layout(layout), shape, "float64", (axis,) if partial and kind.batch else (), partial)

    batch = "S0" if kind.batch else "R"
    return Program(
        module=fx.GraphModule(nn.Module(), graph),
        mesh=Mesh((axis,), (kind.ranks,)),
        parameters=(
            slot("up.weight", kind.up, (2 * HIDDEN, WIDTH), kind.stored_whole),
            slot("up.bias", kind.up_bias, (2 * HIDDEN,), True),
            slot("down.weight", kind.down, (WIDTH, HIDDEN), kind.stored_whole),
            slot("down.bias", "R", (WIDTH,), True),
        ),
        buffers=(slot("calls", "R", ()),),
        inputs=(slot("x", batch, shapes[0]), slot("y", batch, shapes[1])),
        outputs=(slot("loss", "R", ()), slot("out", batch, shapes[1])),
        captured=Call(shapes),
        mutated_buffers=("calls",),
        regather=kind.name == "zero",
        batch_axes=(axis,) if kind.batch else (),
    )


def _compile(kind: str, model: nn.Module, **options: Any) -> ParallelModule:
    return ParallelModule(model, lambda *call: _plan(KINDS[kind], *call), **options)


def _batch(seed: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, y


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _states(module: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(x).clone() for name, x in module.state_dict().items()}


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


def _reference() -> Model:
    torch.manual_seed(7)
    return Model()


def _train(kind: str) -> ParallelModule:
    """Three steps of the loop as users write it, equal to one device's; the loss is made inside, then outside the model."""
    reference, model = _reference(), _compile(kind, _reference())
    oracle = torch.optim.AdamW(reference.parameters(), lr=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(4):
        x, y = _batch(step, BATCH if step < 3 else 2 * BATCH)
        outputs, expected = model(x, y=y), reference(x, y)
        tree_allclose({name: _whole(value) for name, value in outputs.items()}, expected, rtol=1e-11)
        if step % 2:
            (_whole(outputs["out"]) - y).abs().sum().backward()
            (expected["out"] - y).abs().sum().backward()
        else:
            outputs["loss"].backward()
            expected["loss"].backward()
        assert tree_allclose(_gradients(model), _gradients(reference), rtol=1e-10) == 4
        norms = [nn.utils.clip_grad_norm_(module.parameters(), 0.1) for module in (model, reference)]
        tree_allclose(_whole(norms[0]), norms[1], rtol=1e-10)
        for each in (optimizer, oracle):
            each.step()
            each.zero_grad()
        tree_allclose(_states(model), _states(reference), rtol=1e-8)
    assert float(model.calls) == 4.0
    model.eval()
    assert not reference.eval().training
    with torch.no_grad():
        tree_allclose(_whole(model(x, y)["out"]), reference(x, y)["out"], rtol=1e-8)
    return model


def _on_two_ranks(rank: int, folder: str) -> None:
    for kind in ("tp", "dp", "zero"):
        model = _train(kind)
        layouts = {name: format_layout(layout) for name, layout in model.layouts.items()}
        assert layouts["up.weight"] == KINDS[kind].up
        assert layouts["spare"] == "R"
        assert model.data_shard == ((rank, 2) if kind != "tp" else (0, 1))
        _check_local_inputs(kind, rank)
        dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/{kind}")
        for other in ("tp", "dp", "zero"):
            loaded = _compile(other, Model())
            loaded.prepare(*_batch(0))
            state = {"model": loaded.state_dict()}
            dcp.load(state, checkpoint_id=f"{folder}/{kind}")
            loaded.load_state_dict(state["model"])
            tree_allclose(_states(loaded), _states(model), rtol=0)
            # Whole tensors, as a single device would save them.
            again = _compile(other, Model())
            again.prepare(*_batch(0))
            again.load_state_dict(_states(model))
            tree_allclose(_states(again), _states(model), rtol=0)
    _check_accumulation(rank)
    _check_meta()
    for kind in ("tp", "dp", "zero"):
        _check_hooks(kind)
    _check_random(rank)
    with pytest.raises(PlanError, match=r"the plan is for 1 ranks \(one=1\), 2 are running"):
        _compile("one", Model())(*_batch(0))


def _check_local_inputs(kind: str, rank: int) -> None:
    x, y = _batch(0)
    whole, local = _compile(kind, _reference()), _compile(kind, _reference(), inputs="local")
    with pytest.raises(PlanError, match="no plan yet"):
        local(x, y)
    local.prepare(x, y)
    index, count = local.data_shard
    expected = whole.train_step(x, y)
    tree_allclose(local.train_step(x.chunk(count)[index], y.chunk(count)[index]), expected, rtol=1e-12)
    tree_allclose(_gradients(local), _gradients(whole), rtol=1e-12)


def _check_accumulation(rank: int) -> None:
    reference, model = _reference(), _compile("dp", _reference())
    with model.no_sync():
        model.train_step(*_batch(1))
        model.train_step(*_batch(2, 2 * BATCH))
    assert not _gradients(model)
    model.train_step(*_batch(3))
    for seed, size in ((1, BATCH), (2, 2 * BATCH), (3, BATCH)):
        reference(*_batch(seed, size))["loss"].backward()
    tree_allclose(_gradients(model), _gradients(reference), rtol=1e-11)


def _check_hooks(kind: str) -> None:
    """Hooks of parameters run once a backward, on whole sums, whether registered before the plan or after."""
    reference, model = _reference(), _compile(kind, _reference())
    seen: list[Tensor] = []
    for module in (reference, model):
        module.up.weight.register_hook(lambda gradient: gradient * 3)
    for seed in range(2):
        reference(*_batch(seed))["loss"].backward()
        model(*_batch(seed))["loss"].backward()
        if seed == 0:
            model.down.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(_whole(parameter.grad).clone()))
    tree_allclose(_gradients(model), _gradients(reference), rtol=1e-11)
    assert len(seen) == 1
    tree_allclose(seen[0], reference.down.weight.grad, rtol=1e-11)


def _check_random(rank: int) -> None:
    """Replicas draw the same masks although the ranks' generators differ, and the generators go on differing."""
    torch.manual_seed(0)
    # Neither 3 rows nor 5 features can be split in two, nor does a sum pass the sigmoid, so the dropout runs on replicas.
    layers = nn.Sequential(nn.Linear(WIDTH, 5), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(5, WIDTH))
    nn.init.ones_(layers[3].weight)
    nn.init.zeros_(layers[3].bias)
    model = autopar.compile(layers, cluster="2xcpu", mesh={"tp": 2})
    torch.manual_seed(rank)
    x = torch.ones(3, WIDTH)
    outputs = [_whole(model(x)).detach().contiguous() for _ in range(2)]
    for output in outputs:
        first = output.clone()
        dist.broadcast(first, 0)
        assert torch.equal(output, first)
        # Every column sums the same five features: a rank that computed some of them from another mask shows.
        tree_allclose(output, output[:, :1].expand_as(output), rtol=1e-6)
    assert not torch.equal(*outputs)
    mine = torch.rand(())
    theirs = mine.clone()
    dist.broadcast(theirs, 1)
    assert rank == 1 or mine != theirs


def _check_meta() -> None:
    reference = _reference()
    with torch.device("meta"):
        empty, named = Model(), Model()
    model = _compile("zero", named, init=lambda name, _: reference.state_dict()[name])
    assert model.prepare(*_batch(0)).regather
    tree_allclose(_states(model), _states(reference), rtol=0)
    bare = _compile("zero", empty, device="cpu")
    bare.prepare(*_batch(0))
    assert bare.up.weight.to_local().shape == (HIDDEN, WIDTH)
    assert bare.up.weight.to_local().isnan().all()
    bare.load_state_dict(reference.state_dict())
    tree_allclose(_states(bare), _states(reference), rtol=0)


@pytest.mark.processes
def test_two_ranks_train_save_and_load_like_one_device(tmp_path: Path) -> None:
    spawn(2, tmp_path, _on_two_ranks, str(tmp_path))


def test_one_process_needs_no_process_group() -> None:
    model = _train("one")
    assert not dist.is_initialized()
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.data_shard == (0, 1)


def test_torch_compile_runs_the_module_as_it_is() -> None:
    reference, model = _reference(), _compile("one", _reference())
    torch.compile(model, backend="eager")(*_batch(0))["loss"].backward()
    reference(*_batch(0))["loss"].backward()
    tree_allclose(_gradients(model), _gradients(reference), rtol=1e-11)


def test_a_compiled_model_is_neither_copied_nor_pickled_nor_compiled_again() -> None:
    model = _compile("one", _reference())
    with pytest.raises(InputError, match="save its state_dict"):
        copy.deepcopy(model)
    with pytest.raises(InputError, match="save its state_dict"):
        pickle.dumps(model)
    with pytest.raises(InputError, match="compiled already"):
        _compile("one", model)


def test_names_and_attributes_are_the_originals() -> None:
    original = _reference()
    names = list(original.state_dict())
    model = _compile("one", original)
    assert list(model.state_dict()) == names
    assert model.config == {"hidden": HIDDEN}
    assert [name for name, _ in model.named_modules()] == ["", "up", "down"]
    assert not model.eval().up.training
    assert not original.training
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = model.nothing_of_this_name


def test_the_program_is_printed_stage_by_stage() -> None:
    x = torch.randn(8, WIDTH)
    whole = autopar.compile(nn.Linear(WIDTH, WIDTH), cluster="1xcpu")
    with pytest.raises(PlanError, match="call the module once"):
        whole.print_program()
    whole(x)
    assert "aten.linear.default" in whole.print_program()
    pipelined = autopar.compile(nn.Linear(WIDTH, WIDTH), (x,), cluster="1xcpu", pins={"microbatches": 2})
    assert pipelined.print_program().startswith("# stage 0\n")
    assert "take_microbatch" in pipelined.print_program()


def test_a_plan_for_more_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match=r"the plan is for 2 ranks \(tp=2\), 1 is running"):
        _compile("tp", _reference())(*_batch(0))


def test_a_later_plan_must_keep_the_layouts() -> None:
    model = _compile("one", _reference())
    model(*_batch(0))
    model._planner = lambda *call: _plan(Kind("one", 1, "S0", "R", "R", batch=True, stored_whole=True), *call)
    with pytest.raises(PlanError, match=r"up\.weight S0, not R"):
        model(*_batch(0, 2 * BATCH))


def test_a_step_without_a_loss_is_an_input_error() -> None:
    model = _compile("one", _reference())
    program = model.prepare(*_batch(0))
    object.__setattr__(program.captured, "unflatten", lambda outputs: {"out": outputs[1]})
    with pytest.raises(InputError, match="returned a dict without one"):
        model.train_step(*_batch(0))
