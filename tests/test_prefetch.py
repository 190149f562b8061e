"""Gathers begun ahead, and sums of gradients that run behind the backward: the same numbers as one device, and never too much in flight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.capture import capture
from autopar.cost_models import Cluster
from autopar.costs.ahead import BlockWork, Surroundings, find_surroundings
from autopar.errors import InputError
from autopar.ir import OpKind
from autopar.ops import collectives, gathers
from autopar.plans import Phase, Pins, Purpose
from autopar.rewrite import rewrite
from autopar.runtime.arrivals import Arrivals
from tests.helpers import tree_allclose
from tests.processes import Outcomes, run_cases, spawn

LAYERS, WIDTH, WORDS = 5, 16, 32
EXACT = 1e-9


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A loss over all layers, and another that only the first ones are needed for."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 1:
                early = x.square().mean()
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "early": early}


class OnlyLoss(Model):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, labels)["loss"]


def _make(kind: type[Model] = Model, **options: Any) -> Model:
    torch.manual_seed(7)
    return kind(**options)


def _batch(seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(WORDS, (rows, 6), generator=generator) for _ in range(2))
    return ids, labels


def _compile(prefetch: int, model: Model | None = None, **pins: Any) -> Any:
    return autopar.compile(model or _make(), pins={"dp": 2, "fsdp": True, "prefetch": prefetch, **pins})


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _check(compiled: nn.Module, reference: nn.Module) -> None:
    tree_allclose(_gradients(compiled), _gradients(reference), rtol=EXACT)


AHEAD = (0, 2)


def steps_of_an_optimizer() -> None:
    for ahead in AHEAD:
        compiled, reference = _compile(ahead), _make()
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in (compiled, reference)]
        for step in range(3):
            losses = [model(*_batch(step, 4 if step < 2 else 8))["loss"] for model in (compiled, reference)]
            torch.testing.assert_close(losses[0], losses[1], rtol=EXACT, atol=EXACT)
            for loss in losses:
                loss.backward()
            _check(compiled, reference)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            tree_allclose(dict(compiled.eval()(*_batch(9))), reference.eval()(*_batch(9)), rtol=EXACT)


def a_tied_embedding() -> None:
    compiled, reference = _compile(1, _make(tied=True)), _make(tied=True)
    for model in (compiled, reference):
        model(*_batch())["loss"].backward()
    _check(compiled, reference)


def regions_that_are_run_again() -> None:
    for ahead in (1, 2):
        compiled, reference = _compile(ahead, recompute="full"), _make()
        for model in (compiled, reference):
            model(*_batch())["loss"].backward()
        _check(compiled, reference)


def accumulated_on_each_rank() -> None:
    compiled, reference = _compile(1), _make()
    for seed in range(3):
        reference(*_batch(seed))["loss"].backward()
        with compiled.no_sync() if seed < 2 else mock.MagicMock():
            compiled(*_batch(seed))["loss"].backward()
    _check(compiled, reference)


def several_forwards_and_backwards() -> None:
    compiled, reference = _compile(1), _make()
    for model in (compiled, reference):
        # Two forwards before a backward, whose gradients add up; then the same graph twice.
        loss = model(*_batch(0))["loss"] + model(*_batch(1))["loss"]
        loss.backward(retain_graph=True)
        loss.backward()
    _check(compiled, reference)


def gradients_asked_for() -> None:
    compiled, reference = _compile(1), _make()
    found = []
    for model in (compiled, reference):
        loss = model(*_batch())["loss"]
        some = [model.layers[1].up.weight, model.head.weight]
        returned = torch.autograd.grad(loss, some, retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
        second = torch.autograd.grad(loss, some, create_graph=True)
        sum(x.square().sum() for x in second).backward()
        found.append([*returned, *second])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine.full_tensor(), expected, rtol=EXACT, atol=EXACT)
    _check(compiled, reference)


def parameters_with_hooks() -> None:
    compiled, reference = _compile(1), _make()
    for model in (compiled, reference):
        model.layers[2].up.weight.register_hook(lambda gradient: 2 * gradient)
        model.layers[0].down.bias.requires_grad_(False)
        model(*_batch())["loss"].backward()
    _check(compiled, reference)


def a_backward_through_a_part_of_the_model() -> None:
    compiled, reference = _compile(1), _make()
    for model in (compiled, reference):
        outputs = model(*_batch())
        outputs["early"].backward(retain_graph=True)  # from the third layer back to the first
        outputs["loss"].backward()
        model.embed.weight.requires_grad_(False)
    _check(compiled, reference)
    for model in (compiled, reference):
        for parameter in model.layers[:2].parameters():
            parameter.requires_grad_(False)
        model.zero_grad()
        model(*_batch(1))["loss"].backward()  # ends behind the frozen layers
    _check(compiled, reference)


class _Fails(TorchDispatchMode):
    """Fails at the n-th product."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("made to fail")
        return function(*args, **(kwargs or {}))


def failures_in_the_middle() -> None:
    compiled, reference = _compile(1), _make()
    compiled(*_batch())["loss"].backward()
    compiled.zero_grad()
    for at in (3, 6):
        with pytest.raises(RuntimeError, match="made to fail"), _Fails(at):
            compiled(*_batch())
    for at in (4, 9):
        loss = compiled(*_batch())["loss"]
        with pytest.raises(RuntimeError, match="made to fail"), _Fails(at):
            loss.backward(retain_graph=True)
        compiled.zero_grad()
    loss.backward()  # the graph of the backward that failed, from its beginning
    reference(*_batch())["loss"].backward()
    _check(compiled, reference)
    with torch.no_grad():
        for model in (compiled, reference):
            for parameter in model.parameters():
                parameter.mul_(0.5)
    for model in (compiled, reference):
        model.zero_grad()
        model(*_batch(3))["loss"].backward()
    _check(compiled, reference)


def a_changed_parameter_is_refused() -> None:
    compiled = _compile(1)
    loss = compiled(*_batch())["loss"]
    with torch.no_grad():
        compiled.layers[3].up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def mixed_precision_is_bit_by_bit_the_same() -> None:
    results = []
    for ahead in (0, 1):
        compiled = autopar.compile(_make().float(), precision="mixed", pins={"dp": 2, "fsdp": True, "prefetch": ahead})
        loss = compiled(*_batch())["loss"]
        loss.backward()
        results.append({"loss": loss.detach(), **_gradients(compiled)})
    tree_allclose(results[1], results[0], rtol=0)


Event = tuple[str, int]


@contextmanager
def _watched() -> Iterator[list[Event]]:
    """The begins of gathers and what takes them, by block; the beginnings of sums, and their ends."""
    events: list[Event] = []
    block_of: dict[int, int] = {}
    begin, take, drop = gathers.Gather.begin, gathers.Gather.take, gathers.Gather.drop
    add, finish = Arrivals.add, Arrivals._finish_first

    def note_use(use: Any, block: int) -> None:
        block_of[id(use)] = block

    def watched_begin(gather: Any) -> None:
        if gather._begun is None and gather._full is None:
            events.append(("begin", block_of.get(id(gather), -1)))
        begin(gather)

    def watched_take(gather: Any) -> Tensor:
        events.append(("take" if gather._begun is not None else "gather", block_of.get(id(gather), -1)))
        return take(gather)

    def watched_drop(gather: Any) -> None:
        if gather._begun is not None:
            events.append(("drop", block_of[id(gather)]))
        drop(gather)

    def watched_add(arrivals: Arrivals, start: Any, dtype: Any, hand_over: Any, block: int, ahead: int) -> None:
        def noted_start() -> Any:
            events.append(("sum", block))
            return start()

        add(arrivals, noted_start, dtype, hand_over, block, ahead)

    def watched_finish(arrivals: Arrivals) -> None:
        events.extend(("summed", arrivals._blocks[0][0]) for _ in arrivals._blocks[0][1])
        finish(arrivals)

    original_add = gathers.Forward.add

    def noted_add(forward: Any, gather: Any, block: int, sink: Any) -> None:
        note_use(gather, block)
        kept.append(gather)  # so that its id stays its own
        original_add(forward, gather, block, sink)

    kept: list[Any] = []
    with (
        mock.patch.object(gathers.Gather, "begin", watched_begin),
        mock.patch.object(gathers.Gather, "take", watched_take),
        mock.patch.object(gathers.Gather, "drop", watched_drop),
        mock.patch.object(gathers.Forward, "add", noted_add),
        mock.patch.object(Arrivals, "add", watched_add),
        mock.patch.object(Arrivals, "_finish_first", watched_finish),
    ):
        yield events


def _most_in_flight(events: list[Event], begins: str, ends: str) -> int:
    """Of how many blocks something was begun and not ended, at most."""
    under_way: Counter[int] = Counter()
    most = 0
    for kind, block in events:
        under_way[block] += (kind == begins) - (kind == ends)
        most = max(most, sum(count > 0 for count in under_way.values()))
    assert not +under_way, f"never ended: {under_way}"
    return most


def what_is_in_flight() -> None:
    for ahead, recompute in ((1, "none"), (2, "full")):
        compiled = _compile(ahead, recompute=recompute)
        with _watched() as events:
            loss = compiled(*_batch())["loss"]
            forward = list(events)
            events.clear()
            loss.backward()
        blocks = sorted({block for _, block in forward})
        assert blocks == list(range(LAYERS + 2)), blocks  # embedding, layers, head
        for ran, order in ((forward, blocks), (events, blocks[:0:-1])):
            assert not [event for event in ran if event[0] in ("gather", "drop")], ran
            # The begins of a block come before the takes of the one before it, and not before those of the one `ahead` before that.
            for place, block in enumerate(order):
                begun = [number for number, event in enumerate(ran) if event == ("begin", block)]
                for distance in range(1, len(order)):
                    if place >= distance:
                        taken = [number for number, event in enumerate(ran) if event == ("take", order[place - distance])]
                        if distance <= ahead:
                            assert max(begun) < max(taken), (ahead, block, distance, ran)
                        else:
                            assert min(begun) > min(taken), (ahead, block, distance, ran)
            assert 1 < _most_in_flight(ran, "begin", "take") <= 1 + ahead
        # Every gradient but those of biases and norms of the first block is summed behind the backward.
        assert {block for kind, block in events if kind == "sum"} == set(blocks)
        assert _most_in_flight(events, "sum", "summed") == 1 + ahead


def what_a_part_of_the_model_does_not_read_is_dropped() -> None:
    for recompute in ("none", "full"):
        compiled, reference = _compile(2, recompute=recompute), _make()
        for model in (compiled, reference):
            for parameter in (model.embed.weight, *model.layers[:2].parameters()):
                parameter.requires_grad_(False)
        for seed in range(2):
            with _watched() as events:
                loss = compiled(*_batch(seed))["loss"]
                events.clear()
                loss.backward()
            # Of frozen layers nothing is saved; whether they are run again shows only when autograd comes to them.
            assert {block for kind, block in events if kind == "drop"} == ({1, 2} if recompute == "full" else set())
            assert _most_in_flight([("take" if kind == "drop" else kind, block) for kind, block in events], "begin", "take") <= 3
            assert {block for kind, block in events if kind == "sum"} == {3, 4, 5, 6}
            reference(*_batch(seed))["loss"].backward()
        _check(compiled, reference)


def without_prefetch_nothing_is_begun() -> None:
    compiled = _compile(0)
    with _watched() as events:
        compiled(*_batch())["loss"].backward()
    assert {kind for kind, _ in events} == {"gather"}


CASES: tuple[Callable[[], None], ...] = (
    steps_of_an_optimizer,
    a_tied_embedding,
    regions_that_are_run_again,
    accumulated_on_each_rank,
    several_forwards_and_backwards,
    gradients_asked_for,
    parameters_with_hooks,
    a_backward_through_a_part_of_the_model,
    failures_in_the_middle,
    a_changed_parameter_is_refused,
    mixed_precision_is_bit_by_bit_the_same,
    what_is_in_flight,
    what_a_part_of_the_model_does_not_read_is_dropped,
    without_prefetch_nothing_is_begun,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("prefetch"), CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_in_two_processes(outcomes: Outcomes, case: Callable[[], None]) -> None:
    outcomes.check(case.__name__)


FOUR: Mapping[str, Mapping[str, object]] = {
    "dp x tp": {"dp": 2, "tp": 2, "fsdp": True},
    "all of dp": {"dp": 4, "fsdp": True},
    "1f1b": {"pp": 2, "dp": 2, "fsdp": True, "microbatches": 2, "schedule": "1f1b"},
    "zb-h1, run again": {"pp": 2, "dp": 2, "fsdp": True, "microbatches": 4, "schedule": "zb-h1", "recompute": "full"},
}


def _on_four(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    reference = _make(OnlyLoss)
    expected = reference(*_batch())
    expected.backward()
    for pins in FOUR.values():
        compiled = autopar.compile(_make(OnlyLoss), pins={**pins, "prefetch": 1})
        for _ in range(2):
            compiled.zero_grad()
            loss = compiled(*_batch())
            loss.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=EXACT, atol=EXACT)
        _check(compiled, reference)


def test_in_four_processes(tmp_path: Any) -> None:
    spawn(4, tmp_path, _on_four)


# --- the program and the plan ------------------------------------------------------------------------------------------------------


def _plan(cluster: str = "1x2xcpu", **pins: Any) -> Any:
    return autopar.plan(_make(), _batch(), cluster, pins=pins)


def _begins(program: Any) -> list[tuple[str, int, int]]:
    """(parameter, block, number of calls of submodules before it) of every begin in a program."""
    found, calls = [], 0
    for node in program.module.graph.nodes:
        calls += node.op == "call_module"
        if node.target is collectives.begin_all_gather:
            found.append((node.args[0].name, node.kwargs["block"], calls))
    return found


def test_the_program_says_what_is_begun() -> None:
    captured = capture(_make(), _batch())
    for ahead in range(3):
        begins = _begins(rewrite(captured, _plan(dp=2, fsdp=True, prefetch=ahead)))
        if not ahead:
            assert not begins
            continue
        assert {name for name, _, _ in begins} == {op.name for op in captured.graph.of_kind(OpKind.PARAMETER)}
        for name, block, calls in begins:
            layer = int(name.split("_")[2]) if "layers" in name else None
            if layer is not None:
                assert block == layer + 1
                assert calls == max(0, layer - ahead)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_ranks_as_threads_compute_what_one_device_does(recompute: str) -> None:
    for ahead in (0, 2):
        plan = _plan(dp=2, fsdp=True, prefetch=ahead, recompute=recompute)
        assert plan.prefetch == ahead
        assert max(autopar.verify(_make(), _batch(), plan).errors.values()) < EXACT


def test_the_pin() -> None:
    assert Pins.parse_texts(["prefetch=3"]).ahead == 3
    assert Pins().ahead == 1
    for wrong in (-1, True, "one", 1.5):
        with pytest.raises(InputError, match="pin prefetch="):
            Pins.parse({"prefetch": wrong})


# --- costs --------------------------------------------------------------------------------------------------------------------------


NO_SURROUNDINGS = Surroundings(0.0, 0.0, 0.0, 0)


def test_what_hides_what() -> None:
    share = 0.5
    works = [
        BlockWork(forward=number + 1.0, backward=2.0 * (number + 1), gathers=4.0, gathered=100, unsummed=200, largest=60)
        for number in range(4)
    ]
    options = {"is_one_stage": True, "sums_run": True}
    first, second, third, last = (find_surroundings(works, number, 1, share, **options) for number in range(4))
    assert (first.forward, second.forward, last.forward) == (0.0, 1.0, 3.0)  # of the block before
    assert (first.backward, third.backward, last.backward) == (4.0, 8.0, 0.0)  # of the block after
    # The backward of the block before, without what it hides of the gathers of the one before that: 0.5 * 4.
    assert (first.sums, second.sums, third.sums, last.sums) == (0.0, 2.0, 4.0 - 2.0, 6.0 - 2.0)
    # Gathered of the block before, gradients of the one after; of its own either, and one parameter as both.
    assert (first.nbytes, second.nbytes, last.nbytes) == (260 + 200, 100 + 260 + 200, 100 + 260)
    assert find_surroundings(works, 1, 1, share, is_one_stage=True, sums_run=False).nbytes == 2 * 100
    assert find_surroundings(works, 1, 2, share, is_one_stage=False, sums_run=False) == replace(NO_SURROUNDINGS, nbytes=3 * 100)


def test_a_block_hides_all_but_one_of_its_own() -> None:
    """A block that begins the forward, and ends the backward: its gathers, and its sums, run beside its own computing too."""
    first = BlockWork(forward=10.0, backward=20.0, gathers=8.0, sums=6.0, count=4)
    second = BlockWork(forward=1.0, backward=1.0, gathers=14.0, sums=12.0, count=2)
    found = find_surroundings([first, second], 0, 1, 0.5, is_one_stage=True, sums_run=True)
    # Of 4 gathers 3, of which half can be hidden; 10 seconds less half of 14 for the next one's are just these 3.
    assert found.forward == 3.0 == min(0.75 * 0.5 * 8.0, 10.0 - 0.5 * 14.0)
    assert found.sums == 0.75 * 0.5 * 6.0 < 20.0 - 0.5 * 12.0
    # What is left when the neighbour has had its share is less.
    busy = replace(first, forward=8.0, backward=7.0)
    found = find_surroundings([busy, second], 0, 1, 0.5, is_one_stage=True, sums_run=True)
    assert (found.forward, found.sums) == (1.0, 1.0)


def _rows(plan: Any, phase: Phase, purpose: Purpose) -> tuple[float, float]:
    rows = [row for row in plan.costs if row.phase == phase and row.purpose == purpose]
    return sum(row.seconds for row in rows), sum(row.hidden for row in rows)


def test_what_is_hidden_is_in_the_rows() -> None:
    share = Cluster.parse("1x8xh100").machine.device.overlap
    # Between nodes the sums take longer than the computing that they run beside; inside of a node little is left but the first gathers.
    for cluster, is_slow in (("1x8xh100", False), ("8x1xh100", True)):
        plans = [autopar.plan(_make(OnlyLoss), _batch(rows=64), cluster, pins={"dp": 8, "fsdp": True, "prefetch": n}) for n in range(2)]
        waiting, ahead = plans
        assert (waiting.placements, waiting.layouts) == (ahead.placements, ahead.layouts)
        assert ahead.proof.objective_ns < waiting.proof.objective_ns
        for phase, purpose in (
            (Phase.FORWARD, Purpose.PARAMETERS),
            (Phase.BACKWARD_INPUT, Purpose.PARAMETERS),
            (Phase.BACKWARD_INPUT, Purpose.GRADIENTS),
        ):
            all_of_it, nothing = _rows(waiting, phase, purpose)
            exposed, hidden = _rows(ahead, phase, purpose)
            assert nothing == 0 < hidden
            assert exposed + hidden == pytest.approx(all_of_it, rel=1e-9)
            assert hidden < share * all_of_it
            if purpose == Purpose.GRADIENTS:
                assert (hidden < 0.7 * share * all_of_it) == is_slow
        assert ahead.memory.workspace > waiting.memory.workspace
        # The placement problem takes all of the share for hidden, which is a bound.
        assert ahead.proof.bound_ns < ahead.proof.objective_ns
        assert waiting.proof.bound_ns == pytest.approx(waiting.proof.objective_ns, rel=1e-5)


def test_a_block_alone_hides_nothing() -> None:
    alone = [BlockWork(1.0, 2.0, 3.0, count=1, gathered=4, unsummed=5)]
    assert find_surroundings(alone, 0, 1, 0.8, is_one_stage=True, sums_run=True) == replace(NO_SURROUNDINGS, nbytes=5, is_last=True)
