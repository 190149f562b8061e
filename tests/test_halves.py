"""Programs of two halves of the batch that take turns: exact, and in an order in which every exchange has computing to run behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.capture import capture
from autopar.checks import threads
from autopar.checks.shards import cut
from autopar.cost_models import Cluster
from autopar.errors import InputError, PlanError
from autopar.ir import HALVES
from autopar.ops import comm, exchanges, steps
from autopar.plans import Purpose, from_json, to_json
from autopar.report.summary import summarize
from autopar.rewrite import Program, rewrite
from tests.processes import Outcomes, run_cases
from tests.zoo import ZOO

BATCH, TOKENS, WIDTH, CLASSES = 8, 4, 16, 8


class Block(nn.Module):
    """A residual block whose features can be split, with or without dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        return y


class Stack(nn.Module):
    """Outputs of several kinds: a mean over those labels that count, a part per sample, a sum, a mean, and a number without a gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x * self.scale)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits, x.sum(), (x * self.scale.exp()).mean(), labels.sum()


def _make(dropout: float = 0.0) -> Stack:
    torch.manual_seed(0)
    return Stack(dropout)


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (BATCH, TOKENS), generator=generator)
    labels[:3] = -100  # most of one half's
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator), labels


def _compile(pins: Mapping[str, object], dropout: float = 0.0) -> Any:
    compiled = autopar.compile(_make(dropout), pins={**pins, "half_batches": True})
    return compiled


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _compare(expected: list[Tensor | None], actual: list[Tensor | None]) -> None:
    for one, other in zip(expected, actual, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert float((one - _whole(other)).abs().max()) < 1e-9


def outputs_and_gradients_are_those_of_one_device() -> None:
    for pins in ({"tp": 2}, {"dp": 2, "fsdp": True}, {"dp": 2, "fsdp": False}):
        model, compiled = _make(), _compile(pins)
        for _ in range(2):  # gradients add up over steps
            for mine in (model, compiled):
                outputs = mine(*_batch())
                (outputs[0] + outputs[1].pow(2).sum() + 2 * outputs[2] + outputs[3]).backward()
            expected, actual = model(*_batch()), compiled(*_batch())
            assert compiled.plan.half_batches
            _compare(list(expected), list(actual))
            _compare([p.grad for p in model.parameters()], [p.grad for p in compiled.parameters()])


def some_gradients_are_asked_for() -> None:
    model, compiled = _make(), _compile({"tp": 2})
    found = []
    for mine in (model, compiled):
        outputs = mine(*_batch())
        some = [mine.blocks[1].up.weight, mine.head.bias]
        found.append(torch.autograd.grad(outputs[3], some, retain_graph=True, allow_unused=True))
        found.append(torch.autograd.grad(outputs[0], some))
    _compare([*found[0], *found[1]], [*found[2], *found[3]])


def second_derivatives_are_those_of_one_device() -> None:
    model, compiled = _make(), _compile({"tp": 2})
    for mine in (model, compiled):
        loss, logits, *_ = mine(*_batch())
        weight = mine.blocks[0].down.weight
        first = [torch.autograd.grad(out, weight, create_graph=True)[0] for out in (loss, logits.sum())]
        # Two backwards of one graph, differentiated in one.
        sum(_whole(gradient).pow(2).sum() for gradient in first).backward()
    _compare([p.grad for p in model.parameters()], [p.grad for p in compiled.parameters()])


def without_gradients_it_runs_too() -> None:
    model, compiled = _make().eval(), _compile({"tp": 2}).eval()
    with torch.no_grad():
        _compare(list(model(*_batch())), list(compiled(*_batch())))
    with torch.inference_mode():
        _compare(list(model(*_batch())), [x.clone() for x in compiled(*_batch())])


def a_batch_without_halves_runs_whole() -> None:
    model, compiled = _make(), _compile({"tp": 2})
    compiled(*_batch())
    odd = [x[:5] for x in _batch()]
    _compare(list(model(*odd)), list(compiled(*odd)))


def halves_draw_masks_of_their_own() -> None:
    compiled = _compile({"tp": 2}, dropout=0.5)
    x = torch.ones(BATCH, TOKENS, WIDTH)
    torch.manual_seed(3)
    rows = compiled(x, _batch()[1])[1]
    # All tokens are the same, so only masks tell them apart.
    assert len({tuple(row.tolist()) for row in rows.detach().flatten(0, 1)}) == BATCH * TOKENS
    gathered = [torch.empty_like(rows) for _ in range(2)]
    torch.distributed.all_gather(gathered, rows.detach().contiguous())
    assert torch.equal(*gathered)


CASES = (
    outputs_and_gradients_are_those_of_one_device,
    some_gradients_are_asked_for,
    second_derivatives_are_those_of_one_device,
    without_gradients_it_runs_too,
    a_batch_without_halves_runs_whole,
    halves_draw_masks_of_their_own,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("halves"), CASES)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_in_processes(outcomes: Outcomes, case: str) -> None:
    outcomes.check(case)


@pytest.mark.parametrize(
    ("name", "pins", "ranks"), [("llama", {"tp": 2}, 2), ("t5", {"tp": 2}, 2), ("gpt2", {"dp": 2, "tp": 2, "fsdp": True}, 4)]
)
def test_programs_are_exact(name: str, pins: dict[str, object], ranks: int) -> None:
    """Under sequence parallelism too, which the profile of GPUs leads to, where parts are cut in two."""
    model, inputs = ZOO[name]()
    verification = autopar.verify(model, inputs, autopar.plan(model, inputs, f"{ranks}xH100", pins={**pins, "half_batches": True}))
    assert verification.plan.half_batches
    assert max(verification.errors.values()) < 1e-9


def _stack() -> tuple[nn.Module, dict[str, Tensor]]:
    return _make(), dict(zip(("x", "labels"), _batch(), strict=True))


# With all-reduces, and with all-gathers and reduce-scatters (sequence parallelism), between which there is but a norm.
KINDS = {"all_reduce": (_stack, "2xcpu"), "all_gather": (ZOO["llama"], "2xH100")}


def _rewrite(kind: str) -> Program:
    make, cluster = KINDS[kind]
    model, inputs = make()
    program = rewrite(capture(model, inputs), autopar.plan(model, inputs, cluster, pins={"tp": 2, "half_batches": True}))
    assert kind in [node.args[0] for node in program.module.graph.nodes if node.target is exchanges.begin]
    return program


@pytest.mark.parametrize("kind", KINDS)
def test_forward_every_exchange_runs_beside_a_product(kind: str) -> None:
    """Between a begin and its end stands a product of the other half; only the first and the last exchanges may have none."""
    nodes = list(_rewrite(kind).module.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    ends = [node for node in nodes if node.target is exchanges.end and node.args[0].args[0] not in exchanges.KINDS_OF_GRADIENTS]
    beside = [sum("linear" in str(node.target) for node in nodes[places[end.args[0]] : places[end]]) for end in ends]
    assert len(beside) >= 6
    assert 0 not in beside[2:-2], beside


class _Watch(TorchDispatchMode):
    """Notes when products are computed."""

    def __init__(self, events: list[tuple[str, int]]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self._events.append(("product", 0))
        return func(*args, **(kwargs or {}))


def _watch_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happens in a backward on one of two ranks, in order: products, and begins and ends of exchanges by the number of their run."""
    program, (model, inputs) = _rewrite(kind), KINDS[kind][0]()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    events: list[list[tuple[str, int]]] = [[], []]

    def note(name: str) -> None:
        method = getattr(exchanges._Run, f"{name}_dual")

        def noting(run: Any, x: Tensor) -> Tensor:
            if not isinstance(run.step.dual, steps.PassOn):
                events[run.step.axis.index].append((name, id(run)))
            return method(run, x)

        monkeypatch.setattr(exchanges._Run, f"{name}_dual", noting)

    note("begin")
    note("end")

    def run(rank: int) -> None:
        parts = [
            cut(tensors[slot.name].detach(), slot.layout, program.mesh, rank).clone() for slot in (*program.parameters, *program.buffers)
        ]
        for part, slot in zip(parts, program.parameters, strict=False):
            part.requires_grad_(slot.requires_grad)
        given = [cut(inputs[slot.name], slot.layout, program.mesh, rank) for slot in program.inputs]
        loss = next(out for out in program.module(*parts, *given) if out.dim() == 0)
        with _Watch(events[rank]):
            loss.backward()

    threads.run(program.mesh, run)
    assert [name for name, _ in events[0]] == [name for name, _ in events[1]]
    return events[0]


@pytest.mark.parametrize("kind", KINDS)
def test_backward_every_exchange_runs_beside_a_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is in the backward, whose order autograd makes of the order of the forward."""
    events = _watch_backward(kind, monkeypatch)
    ends = {run: place for place, (name, run) in enumerate(events) if name == "end"}
    begins = [(place, run) for place, (name, run) in enumerate(events) if name == "begin"]
    beside = [[name for name, _ in events[place : ends[run]]].count("product") for place, run in begins]
    assert len(beside) >= 6
    assert 0 not in beside[2:-2], beside


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"pin half_batches=True can't be had: an even batch is needed, this has 7 rows \(dim 0 of .*\);"
        " take an even one, or leave out half_batches$",
    ):
        autopar.plan(nn.Linear(WIDTH, WIDTH), (torch.randn(7, WIDTH),), "2xcpu", pins={"tp": 2, "half_batches": True})


def test_what_needs_the_whole_batch_is_refused() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.up(x)).sum()
            return y

    call = (torch.randn(BATCH, WIDTH),)
    with pytest.raises(
        InputError,
        match=r"pin half_batches=True can't be had: aten.batch_norm.default at .*test_halves.py:\d+: .*whole batch, "
        r"which no one of 2 halves sees; .*, or leave out half_batches$",
    ):
        autopar.plan(Normed(), call, "2xcpu", pins={"tp": 2, "half_batches": True})
    assert not autopar.plan(Normed(), call, "2xH100", pins={"tp": 2}).half_batches
    plan = replace(autopar.plan(Normed(), call, "2xcpu", pins={"tp": 2}), half_batches=True)
    with pytest.raises(PlanError, match=r"the plan runs in half batches, but aten.batch_norm.default at .*test_halves.py:\d+"):
        rewrite(capture(Normed(), call), plan)


def test_pins_and_plans_that_contradict_halves() -> None:
    for pins in ({"pp": 2}, {"microbatches": 2}, {"recompute": "full"}, {"schedule": "1f1b"}, {"blocks.0": {"pp": 0}}):
        with pytest.raises(InputError, match="pin half_batches=True is for programs without stages, micro-batches and recomputation"):
            autopar.plan(_make(), _batch(), "2xcpu", pins={**pins, "half_batches": True})
    plan = autopar.plan(_make(), _batch(), "2xcpu", pins={"tp": 2, "half_batches": True})
    assert from_json(to_json(plan)) == plan
    same = {"pp": 1, "microbatches": 1, "recompute": "none"}
    assert autopar.plan(_make(), _batch(), "2xcpu", pins={"tp": 2, "half_batches": True, **same}).half_batches
    pipelined = autopar.plan(_make(), _batch(), "2xcpu", pins={"pp": 2, "microbatches": 2})
    with pytest.raises(PlanError, match=r"plan\.half_batches is true, but plan\.pipeline has stages"):
        to_json(replace(pipelined, half_batches=True))


def _wide() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with much to exchange and to compute, on the meta device."""
    with torch.device("meta"):
        sizes = {"hidden_size": 4096, "intermediate_size": 11264, "num_attention_heads": 32, "num_key_value_heads": 8}
        config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=32000, use_cache=False)
        model = LlamaForCausalLM(config).bfloat16()
        model.loss_type = "ForCausalLM"
        ids = torch.zeros(8, 4096, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def test_the_search_takes_halves_where_they_are_faster() -> None:
    model, inputs = _wide()
    whole, halves, free = (autopar.plan(model, inputs, "8xH100", pins={"tp": 8, "half_batches": pin}) for pin in (False, True, None))
    assert free.half_batches
    assert free.costs == halves.costs
    assert halves.seconds.step < whole.seconds.step
    assert halves.seconds.communication < 0.5 * whole.seconds.communication
    # Halves compute no less, since they launch each call twice.
    assert halves.seconds.forward + halves.seconds.backward > whole.seconds.forward + whole.seconds.backward
    cluster = Cluster.parse("8xH100")
    device = replace(cluster.machine.device, overlap=0.0)
    alone = replace(cluster, machine=replace(cluster.machine, device=device))
    assert not autopar.plan(model, inputs, alone, pins={"tp": 8}).half_batches


def test_hidden_is_the_share_that_a_device_overlaps_and_no_longer_than_it_computes() -> None:
    model, inputs = _wide()
    cluster = Cluster.parse("8xH100")

    def plan(**changes: float) -> autopar.Plan:
        link = replace(cluster.machine.intra, bandwidth_bytes_per_s=cluster.machine.intra.bandwidth_bytes_per_s * changes.pop("rate", 1.0))
        device = replace(cluster.machine.device, **changes)
        own = replace(cluster, machine=replace(cluster.machine, device=device, intra=link, inter=replace(link, local_ranks=1)))
        return autopar.plan(model, inputs, own, pins={"tp": 8, "half_batches": True})

    exchanges_of = (Purpose.ACTIVATIONS, Purpose.ACTIVATION_GRADIENTS)
    fast = [row for row in plan(overlap=0.5).costs if row.purpose in exchanges_of and row.hidden]
    assert fast
    assert all(row.hidden == pytest.approx(row.seconds, rel=1e-6) for row in fast if row.layer)
    slow = plan(overlap=1.0, rate=0.01)
    hidden = sum(row.hidden for row in slow.costs if row.purpose in exchanges_of)
    assert 0.4 * (slow.seconds.forward + slow.seconds.backward) < hidden < slow.seconds.forward + slow.seconds.backward


def test_tell_of_halves(tmp_path: Path) -> None:
    plan = autopar.plan(_make(), _batch(), "2xcpu", pins={"tp": 2, "half_batches": True})
    assert "halves  of the batch take turns" in summarize(plan)
    plan.save(tmp_path / "plan.json")
    assert autopar.Plan.load(tmp_path / "plan.json").half_batches


def test_the_names_of_halves_are_taken() -> None:
    assert [(comm.axis(name).name, comm.axis(name).index, comm.axis(name).size) for name in HALVES] == [("half_0", 0, 2), ("half_1", 1, 2)]
