"""Ring attention: the kernel against attention on one device, what it sends and computes, and plans that use it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autopar
from autopar.checks import threads
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir.graph import ITEMSIZE, OpKind
from autopar.ir.layout import Mesh, format_mesh
from autopar.ir.windows import HaloSize
from autopar.ops import comm
from autopar.ops.attention import attention
from autopar.ops.attention_blocks import Scores
from autopar.ops.positions import Positions, spans_of
from autopar.ops.ring import attention_of_rows, plan_ring, ring_attention
from autopar.plans.pins import Pins
from autopar.plans.plan import Plan
from autopar.report.difference import find_changes
from autopar.report.summary import describe_choice, summarize
from autopar.search import meshes
from autopar.search.meshes import find_pipeline_trials, find_trials
from tests.emitted import subject
from tests.processes import spawn
from tests.zoo import ZOO, in_float64, labels, tokens

TOLERANCE = 1e-9
LENGTH = 16


class Mask(NamedTuple):
    """What rows attend to."""

    causal: bool = False
    window: int | None = None
    padded: bool = False
    # "bool": sequences packed in one row; "added": added scores, some of minus infinity in "rows without keys"; "huge": all keys of some
    # rows get huge negative ones.
    bias: str = ""


MASKS = {
    "bidirectional": Mask(),
    "causal": Mask(causal=True),
    "causal window": Mask(causal=True, window=5),
    "narrow window": Mask(causal=True, window=2),
    "window": Mask(window=3),
    "padded": Mask(padded=True),
    "packed": Mask(causal=True, bias="bool"),
    "causal, padded, added": Mask(causal=True, padded=True, bias="added"),
    "rows without keys": Mask(bias="rows without keys"),
    "huge numbers": Mask(bias="huge"),
    "causal, huge numbers": Mask(causal=True, padded=True, bias="huge"),
}


class Case(NamedTuple):
    """An attention of one device: its operands, its result and gradients."""

    operands: tuple[Tensor, Tensor, Tensor]
    padding: Tensor | None
    bias: Tensor | None
    gradient: Tensor
    expected: tuple[Tensor, ...]


def _make_case(mask: Mask, kv_heads: int, softcap: float | None, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, 8, dtype=dtype, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    padding = torch.arange(LENGTH).expand(2, -1) < torch.tensor([[LENGTH - 3], [LENGTH - 9]]) if mask.padded else None
    document = torch.arange(LENGTH) // 6
    packed = (document[:, None] == document)[None, None]
    added = torch.randn(1, 4, LENGTH, LENGTH, dtype=dtype)
    sparse = added.masked_fill(torch.rand(LENGTH, LENGTH) < 0.8, -torch.inf).index_fill(2, torch.tensor([1, 9]), -torch.inf)
    huge = torch.zeros(2, 1, LENGTH, LENGTH, dtype=dtype)
    huge[0, :, :5], huge[0, :, 5:, :5], huge[1, :, :9], huge[1, :, 12:] = torch.finfo(dtype).min, torch.finfo(dtype).min, -1e9, 1e9
    bias = {"": None, "bool": packed, "added": added, "rows without keys": sparse, "huge": huge}[mask.bias]
    # torch's fused kernel of a CPU has wrong gradients of rows that get only huge numbers.
    with sdpa_kernel(SDPBackend.MATH) if mask.bias == "huge" else nullcontext():
        result = attention(q, k, v, padding, bias, mask.causal, mask.window, 0.3, softcap, 0.0)
        gradient = torch.randn_like(result)
        return Case((q, k, v), padding, bias, gradient, (result, *torch.autograd.grad(result, (q, k, v), gradient)))


def _rows(rank: int, ranks: int, *, zigzag: bool) -> Tensor:
    return torch.cat([torch.arange(s.start, s.start + s.length) for s in spans_of(rank, ranks, LENGTH // ranks, zigzag=zigzag)])


def _run(case: Case, mask: Mask, softcap: float | None, ranks: int, *, zigzag: bool, rotates: bool = False) -> list[tuple[Tensor, ...]]:
    """Per rank its part of the result and of the gradients."""

    def work(rank: int) -> tuple[Tensor, ...]:
        rows = _rows(rank, ranks, zigzag=zigzag)
        parts = [x.detach()[:, :, rows].requires_grad_() for x in case.operands]
        bias = None if case.bias is None else case.bias[:, :, rows]
        positions = Positions.of(causal=mask.causal, window=mask.window)
        scores = Scores(0.3, softcap)
        result = ring_attention(*parts, case.padding, bias, positions, scores, comm.axis("cp"), zigzag=zigzag, rotates=rotates)
        return result.detach(), *torch.autograd.grad(result, parts, case.gradient[:, :, rows])

    return threads.run(Mesh(("cp",), (ranks,)), work)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("ranks", "zigzag"), [(2, False), (2, True), (4, False), (4, True)])
def test_the_kernel_is_attention(mask: Mask, ranks: int, zigzag: bool) -> None:
    for kv_heads, softcap in itertools.product((4, 2, 1), (None, 2.0)):
        case = _make_case(mask, kv_heads, softcap, torch.float64)
        for rank, parts in enumerate(_run(case, mask, softcap, ranks, zigzag=zigzag)):
            for part, whole in zip(parts, case.expected, strict=True):
                torch.testing.assert_close(part, whole[:, :, _rows(rank, ranks, zigzag=zigzag)], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("zigzag", [False, True])
def test_parts_may_visit_ranks_that_need_nothing_of_them(mask: Mask, zigzag: bool) -> None:
    case = _make_case(mask, 2, None, torch.float64)
    for rank, parts in enumerate(_run(case, mask, None, 4, zigzag=zigzag, rotates=True)):
        for part, whole in zip(parts, case.expected, strict=True):
            torch.testing.assert_close(part, whole[:, :, _rows(rank, 4, zigzag=zigzag)], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rows_attend_to_all_keys_that_are_here(mask: Mask) -> None:
    positions = Positions.of(causal=mask.causal, window=mask.window)
    for kv_heads, softcap, ranks in itertools.product((4, 2, 1), (None, 2.0), (2, 4)):
        case = _make_case(mask, kv_heads, softcap, torch.float64)
        results = []
        for first in range(0, LENGTH, LENGTH // ranks):
            rows = slice(first, first + LENGTH // ranks)
            bias = None if case.bias is None else case.bias[:, :, rows]
            q, k, v = case.operands
            results.append(attention_of_rows(q[:, :, rows], k, v, case.padding, bias, positions, Scores(0.3, softcap), first))
        result = torch.cat(results, 2)
        found = (result, *torch.autograd.grad(result, case.operands, case.gradient))
        torch.testing.assert_close(found, case.expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_no_mask_of_all_rows_and_keys_is_made_of_a_causal_one() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)), 0)
            return result

    q, k, v = (torch.zeros(1, 2, tokens, 8, requires_grad=True) for tokens in (1024, 4096, 4096))
    with Largest() as largest:
        attention_of_rows(q, k, v, None, None, Positions.of(causal=True, window=None), Scores(0.3), 2048).sum().backward()
    assert largest.elements == k.numel()


def test_half_precision_is_merged_in_float32() -> None:
    """The results of four blocks are as near to the exact one as that of a single block is."""
    exact, rounded = (_make_case(MASKS["causal"], 2, None, dtype) for dtype in (torch.float64, torch.bfloat16))
    torch.manual_seed(0)
    ranks = _run(rounded, MASKS["causal"], None, 4, zigzag=True)
    for number in range(4):
        joined = torch.empty_like(rounded.expected[number])
        for rank, parts in enumerate(ranks):
            joined[:, :, _rows(rank, 4, zigzag=True)] = parts[number]
        off = (rounded.expected[number].double() - joined.double()).abs().max()
        assert off <= 2 * torch.finfo(torch.bfloat16).eps * exact.expected[number].abs().max()


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zigzag_gives_all_ranks_the_same_work(ranks: int) -> None:
    positions = Positions.of(causal=True, window=None)

    def pairs(rank: int, *, zigzag: bool) -> int:
        """Pairs of a row and a key that a rank computes, as the kernels skip what a causal mask leaves out of a block."""
        total = 0
        for stop in plan_ring(rank, ranks, 8, positions, zigzag=zigzag).stops:
            for block in stop.blocks:
                rows, keys = (s.stop - s.start for s in (block.row_slice, block.key_slice))
                assert not block.is_partial
                total += rows * (rows + 1) // 2 if block.is_causal else rows * keys
        return total

    assert len({pairs(rank, zigzag=True) for rank in range(ranks)}) == 1
    contiguous = [pairs(rank, zigzag=False) for rank in range(ranks)]
    assert sum(contiguous) == sum(pairs(rank, zigzag=True) for rank in range(ranks)) == 8 * ranks * (8 * ranks + 1) // 2
    assert contiguous == sorted(contiguous)
    assert contiguous[-1] > 1.3 * ranks * contiguous[0]


@pytest.mark.parametrize("zigzag", [False, True])
def test_what_no_row_attends_to_is_not_sent(zigzag: bool) -> None:
    ranks, length = 8, 8
    for window, hops in ((None, ranks - 1), (5, 1), (9, 1), (10, 2)):
        positions = Positions.of(causal=True, window=window)
        itineraries = [plan_ring(rank, ranks, length, positions, zigzag=zigzag) for rank in range(ranks)]
        for rank, itinerary in enumerate(itineraries):
            assert itinerary.stops[0].owner == rank
            assert all(stop.blocks for stop in itinerary.stops)
            for stop in itinerary.stops:
                sent_to = [s.owner for s in itineraries[stop.target].stops] if stop.target is not None else [stop.owner]
                assert stop.owner in sent_to
        if not zigzag:
            assert max(len(itinerary.stops) - 1 for itinerary in itineraries) == hops
            assert len(itineraries[0].stops) == 1, "nothing stands before the first rank's rows"


class _Counting(comm.Axis):
    """An axis that counts the bytes of what is sent along it."""

    def __init__(self, axis: comm.Axis) -> None:
        self.axis, self.name, self.size, self.index, self.sent = axis, axis.name, axis.size, axis.index, 0

    def send(self, x: Tensor, to: int) -> comm.Message:
        self.sent += x.numel() * x.element_size()
        return self.axis.send(x, to)

    def receive(self, source: int, shape: Any, dtype: torch.dtype, device: torch.device) -> comm.Message:
        return self.axis.receive(source, shape, dtype, device)

    def all_reduce(self, x: Tensor, op: comm.Reduction = "sum") -> Tensor:
        raise NotImplementedError

    gather_stack = reduce_stack = exchange_stack = all_reduce  # type: ignore[assignment]


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_the_closed_form(ranks: int) -> None:
    """Per rank and direction (N-1)/N of the keys and values; in the backward as much again of their gradients."""

    def work(rank: int) -> tuple[int, int]:
        axis = _Counting(comm.axis("cp"))
        q, k, v = (torch.randn(2, heads, LENGTH // ranks, 8, requires_grad=True) for heads in (4, 2, 2))
        positions = Positions.of(causal=True, window=None)
        result = ring_attention(q, k, v, None, None, positions, Scores(0.3), axis, zigzag=True)
        forward = axis.sent
        result.sum().backward()
        return forward, axis.sent - forward

    nbytes = 2 * (2 * 2 * LENGTH * 8 * 4)  # keys and values of the whole sequence
    share = (ranks - 1) * nbytes // ranks
    assert set(threads.run(Mesh(("cp",), (ranks,)), work)) == {(share, 2 * share)}


@pytest.mark.parametrize("window", [1, 2, 4, 5, 10, 16])
def test_with_a_window_only_the_keys_in_it_are_sent(window: int) -> None:
    """Forward, and again in the backward, the keys that rows after a rank's part attend to; then gradients of as many, at every stop."""
    ranks = 4

    def work(rank: int) -> tuple[int, int]:
        axis = _Counting(comm.axis("cp"))
        q, k, v = (torch.randn(2, heads, LENGTH // ranks, 8, requires_grad=True) for heads in (4, 2, 2))
        result = ring_attention(q, k, v, None, None, Positions.of(causal=True, window=window), Scores(0.3), axis)
        forward = axis.sent
        result.sum().backward()
        return forward, axis.sent - 2 * forward

    of_token = 2 * (2 * 2 * 8 * 4)  # keys and values of a token
    halo = HaloSize(window - 1, 0, LENGTH)
    sent = threads.run(Mesh(("cp",), (ranks,)), work)
    assert max(forward for forward, _ in sent) == of_token * halo.most_sent(ranks)
    assert sum(forward for forward, _ in sent) == of_token * sum(halo.sent(rank, ranks) for rank in range(ranks))
    if window - 1 <= LENGTH // ranks:
        assert [gradients for _, gradients in sent] == [of_token * (window - 1) * (rank > 0) for rank in range(ranks)]
        assert [forward for forward, _ in sent] == [of_token * (window - 1) * (rank < ranks - 1) for rank in range(ranks)]


PINS: Mapping[str, tuple[Mapping[str, object], str]] = {
    "ring": ({"cp": 2, "attention": "ring", "zigzag": False}, "ring"),
    "zigzag": ({"cp": 4, "attention": "ring", "zigzag": True}, "ring~"),
    "ulysses": ({"cp": 2, "attention": "ulysses"}, "heads"),
    "gather": ({"cp": 4, "attention": "gather"}, "s"),
    "ring beside heads": ({"cp": 2, "tp": 2, "attention": "ring"}, "ring"),
    "zigzag beside the batch": ({"cp": 2, "dp": 2, "attention": "ring", "zigzag": True}, "ring~"),
    "zigzag in stages": ({"pp": 2, "cp": 2, "microbatches": 2, "schedule": "1f1b", "attention": "ring", "zigzag": True}, "ring~"),
    "run again": ({"cp": 2, "attention": "ring", "recompute": "full"}, "ring"),
}


def _ranks(pins: Mapping[str, Any]) -> int:
    return math.prod(pins.get(axis, 1) for axis in ("pp", "cp", "dp", "tp"))


def _attentions(name: str, plan: Plan) -> set[str]:
    """What the attentions of a plan split over cp, in words; `heads` for a loop of heads."""
    spaces, axis = subject(name).model.spaces, plan.mesh.names.index("cp")
    parts = {str(splits[axis]) for op, splits in plan.placements.items() if op in spaces and spaces[op].family == "attention"}
    return {"heads" if part in ("h", "g", "r") else part for part in parts}


@pytest.mark.parametrize("pins", PINS)
@pytest.mark.parametrize("name", ["llama", "mistral"])  # others: tests.test_long_exactness
def test_plans_are_exact(name: str, pins: str) -> None:
    given, expected = PINS[pins]
    plan = subject(name).pinned(given, f"{_ranks(given)}xcpu")
    if pins == "ulysses" or "zigzag" in given:
        assert _attentions(name, plan) == {expected}
    else:
        assert _attentions(name, plan) <= {expected, f"{expected}~"}
    assert subject(name).verify(plan).worst < TOLERANCE
    assert not [note for note in plan.notes if "runs otherwise" in note]


def test_what_can_not_travel_is_gathered_and_noted() -> None:
    """T5 adds a bias that is trained to the scores of its own tokens; those of the encoder's results have none."""
    plan = subject("t5").pinned({"cp": 2, "attention": "ring"}, "2xcpu")
    assert "ring" in " ".join(_attentions("t5", plan))
    (note,) = [note for note in plan.notes if "runs otherwise" in note]  # all are of one line of T5
    assert "what is added to its scores needs a gradient" in note
    assert "modeling_t5.py" in note
    assert subject("t5").verify(plan).worst < TOLERANCE


def test_a_pin_is_kept_or_refused() -> None:
    with pytest.raises(InputError, match="no attention of this model"):
        subject("resnet").pinned({"cp": 2, "attention": "ring"}, "2xcpu")
    with pytest.raises(InputError, match=r"splits heads over cp=4, but .* has heads g=2"):
        subject("llama").pinned({"cp": 4, "attention": "ulysses"}, "4xcpu")
    with pytest.raises(InputError, match="unknown; there are ring, ulysses, gather"):
        subject("llama").pinned({"attention": "flash"}, "2xcpu")


def test_reports_say_how_attention_runs() -> None:
    pinned = subject("llama").pinned
    ring = pinned({"cp": 2, "attention": "ring", "zigzag": True}, "2xcpu")
    plain = pinned({"cp": 2, "attention": "ring", "zigzag": False}, "2xcpu")
    heads = pinned({"cp": 2, "attention": "ulysses"}, "2xcpu")
    for plan, said in ((ring, "ring attention over cp, zigzag"), (plain, "ring attention over cp")):
        (axes,) = [line for line in summarize(plan).splitlines() if line.startswith("axes")]
        assert axes.endswith(f"; {said}")
        assert f", {said}, step" in describe_choice(plan)
    assert "ring" not in describe_choice(heads)
    assert "ring attention" not in summarize(heads)
    changes = {change.name: (change.before, change.after) for change in find_changes(ring, heads) if change.about == "decisions"}
    assert changes["ring attention"] == ("over cp, zigzag", "none")


def test_a_plan_says_what_travels() -> None:
    """Keys and values forward and backward, and their gradients: of 4 x 16 tokens, 2 heads of 8, in 2 layers, N-1 times an N-th of it."""
    itemsize = ITEMSIZE[subject("llama").graph.of_kind(OpKind.PARAMETER)[0].results[0].dtype]
    for ranks in (2, 4):
        plan = subject("llama").pinned({"cp": ranks, "attention": "ring", "zigzag": True}, f"{ranks}xcpu")
        (row,) = [row for row in plan.traffic if row.collective == "ring"]
        assert row.nbytes == (2 + 2 + 2) * (4 * 16 * 2 * 8 * itemsize) * 2 * (ranks - 1) / ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plan_says_what_a_window_sends(ranks: int) -> None:
    """Three times, as keys and values and their gradients: of 4 samples, 2 heads of 8, in 2 layers, the tokens of the window but one."""
    itemsize = ITEMSIZE[subject("mistral").graph.of_kind(OpKind.PARAMETER)[0].results[0].dtype]
    pins = {"cp": ranks, "attention": "ring"}
    (op, *_) = (op for op in subject("mistral").graph.of_kind(OpKind.CALL) if op.target == "autopar.attention.default")
    plan = subject("mistral").pinned(pins | {"zigzag": False}, f"{ranks}xcpu")
    (row,) = [row for row in plan.traffic if row.purpose == "kernel" and row.collective in ("ring", "halo")]
    tokens = HaloSize(op.args[6] - 1, 0, 16).most_sent(ranks)
    assert (row.collective, row.nbytes) == ("halo", (2 + 2 + 2) * (4 * tokens * 2 * 8 * itemsize) * 2)
    plan = subject("mistral").pinned(pins | {"zigzag": True}, f"{ranks}xcpu")
    (row,) = [row for row in plan.traffic if row.purpose == "kernel" and row.collective in ("ring", "halo")]
    assert (row.collective, row.nbytes) == ("ring", (2 + 2 + 2) * (4 * 16 * 2 * 8 * itemsize) * 2 * (ranks - 1) / ranks)


def _train(rank: int, names: Sequence[str]) -> None:
    for name in names:
        _train_under(PINS[name][0])


def _train_under(pins: Mapping[str, Any]) -> None:
    reference = in_float64(ZOO["llama"]()[0])
    model = autopar.compile(copy.deepcopy(reference), cluster=f"{_ranks(pins)}xcpu", pins=pins)
    batch = {"input_ids": tokens(1), "labels": labels(1)}
    losses = []
    for module in (model, reference):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            outputs = module(**batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append((outputs.loss.detach(), outputs.logits.detach()))
    torch.testing.assert_close(losses[0], losses[1], rtol=TOLERANCE, atol=TOLERANCE)


def test_real_processes_train_as_one_device(tmp_path: Path) -> None:
    spawn(4, tmp_path, _train, ("zigzag", "ring beside heads"))


def _looked_at(pins: Mapping[str, object], cluster: str) -> set[str]:
    trials = find_trials(subject("llama").model, Cluster.parse(cluster), Pins.parse(pins), None, {})
    return {format_mesh(trial.mesh) for trial in trials if not trial.baseline}


def test_meshes_with_an_axis_of_the_sequence_are_looked_at_where_samples_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four samples of 16 tokens on eight machines of a device; on four there is one for each."""
    assert _looked_at({}, "8x1xcpu") == {"x=8", "x=4 x y=2", "x=2 x y=4"}, "parts of 16 tokens would be too short"
    monkeypatch.setattr(meshes, "SHORTEST", 2)
    assert _looked_at({}, "4x1xcpu") == {"x=4", "x=2 x y=2"}
    assert _looked_at({}, "8xcpu") == {"x=8", "x=4 x y=2", "x=2 x y=4"}, "features can be split inside the machine"
    monkeypatch.setattr(meshes, "LONG", 16)
    assert {"cp=8", "dp=4 x cp=2", "cp=2 x tp=4", "dp=2 x cp=2 x tp=2"} < _looked_at({}, "8xcpu")
    assert _looked_at({"cp": 2}, "8xcpu") >= {"free=4 x cp=2", "dp=4 x cp=2", "cp=2 x tp=4", "dp=2 x cp=2 x tp=2"}
    pipelines = find_pipeline_trials(subject("llama").model, Cluster.parse("8xcpu"), 2, Pins.parse({"pp": 2}), None, {})
    assert {"dp=2 x cp=2", "cp=4", "cp=2 x tp=2"} < {format_mesh(trial.mesh) for trial in pipelines}
