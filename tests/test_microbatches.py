"""Micro-batches as an axis in time: every value of captured models run per micro-batch and joined is the value of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autopar.capture.export import Captured, capture
from autopar.checks import threads
from autopar.errors import CommError, InputError
from autopar.ir.graph import Op, OpKind, Value
from autopar.ir.layout import PARTIAL, PASS_PARTIAL, REPLICATE, Mesh, Split, State, StateKind, local_shape, operand_layout, shard
from autopar.ops import comm, kernels, rng
from autopar.ops.comm import MicrobatchAxis
from autopar.ops.losses import count_targets, cross_entropy, nll_loss
from autopar.ops.parts import join_parts, take_part
from autopar.rules.notation import argument
from autopar.rules.table import find_spaces
from autopar.structure import microbatches
from autopar.structure.microbatches import MICROBATCH, MicroSplit, reads_locally, split_microbatches
from autopar.structure.roles import find_roles
from tests.zoo import ZOO

# Training batch norm couples the samples of a batch.
COUPLED = ("resnet",)
HEADLESS = ("lstm", "dlrm", "resnet")


class Subject:
    """A captured model with values for everything that its graph reads; `split` divides it into micro-batches."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.captured: Captured = _widened(capture(model, inputs))
        self.graph = self.captured.graph
        self.spaces, _ = find_spaces(self.graph)
        self.roles = find_roles(self.graph, self.spaces)
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.captured.fx.graph.nodes}
        known = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(self.captured.constants)
        given = {**known, **dict(zip(self.captured.inputs, self.captured.bind((), inputs), strict=True))}
        self.stored = {op.name: given[op.target] for op in self.graph.ops if op.kind not in (OpKind.CALL, OpKind.OUTPUT)}
        (self.output,) = self.graph.of_kind(OpKind.OUTPUT)

    def split(self, count: int) -> MicroSplit:
        return split_microbatches(self.graph, self.spaces, self.roles, count)

    def states(self, split: MicroSplit) -> list[State]:
        return [split.states[value] for value in self.output.operands]

    def leaves(self) -> dict[str, Tensor]:
        """Copies of what is stored; parameters take gradients."""
        copies = {name: tensor.detach().clone() for name, tensor in self.stored.items()}
        for op in self.graph.of_kind(OpKind.PARAMETER):
            copies[op.name].requires_grad_(op.results[0].requires_grad)
        return copies

    def run(self, leaves: Mapping[str, Tensor]) -> dict[Value, Tensor]:
        """All values of the whole batch."""
        values: dict[Value, Tensor] = {}
        for op in self.graph.ops:
            if op.kind is OpKind.CALL:
                self._keep(values, op, self._call(op, self.nodes[op.name].target, [values[value] for value in op.operands], {}))
            elif op.kind is not OpKind.OUTPUT:
                values[Value(op.name)] = leaves[op.name]
        return values

    def run_part(
        self, leaves: Mapping[str, Tensor], split: MicroSplit, whole: Mapping[Value, Tensor], axis: MicrobatchAxis
    ) -> dict[Value, Tensor]:
        """All values of one micro-batch, which sees the whole batch only where `split` says so."""
        values: dict[Value, Tensor] = {}
        mesh = Mesh((MICROBATCH,), (axis.size,))
        with comm.active({MICROBATCH: axis}), rng.isolated(3):
            for op in self.graph.ops:
                if op.kind is OpKind.CALL:
                    operands = [
                        self._take(values, whole, split, value, self._need(split, op, i), axis) for i, value in enumerate(op.operands)
                    ]
                    self._keep(values, op, self._call_part(op, split, operands, whole, mesh))
                elif op.kind is not OpKind.OUTPUT:
                    state = split.states[Value(op.name)]
                    full = leaves[op.name]
                    values[Value(op.name)] = full if state == REPLICATE else _cut(full, state, axis)
        return values

    def _need(self, split: MicroSplit, op: Op, index: int) -> State:
        space = self.spaces.get(op.name)
        return REPLICATE if space is None else operand_layout(space, (split.placements[op.name],), index)[0]

    def _take(
        self,
        values: Mapping[Value, Tensor],
        whole: Mapping[Value, Tensor],
        split: MicroSplit,
        value: Value,
        need: State,
        axis: MicrobatchAxis,
    ) -> Tensor:
        state = split.states[value]
        if not reads_locally(state, need):
            assert value in split.whole, f"{value} is {state}, needed as {need}"
            return whole[value].detach()
        return _cut(values[value], need, axis) if need.kind is StateKind.SHARD and state != need else values[value]

    def _call_part(self, op: Op, split: MicroSplit, operands: Sequence[Tensor], whole: Mapping[Value, Tensor], mesh: Mesh) -> Any:
        space, part = self.spaces.get(op.name), split.placements[op.name]
        target: Any = self.nodes[op.name].target
        changes: dict[int, Any] = {}
        extra: dict[str, Any] = {}
        if space is not None and space.shape_arg is not None:
            changes[space.shape_arg] = list(local_shape(op.results[0].shape, (split.states[Value(op.name)],), mesh))
        splits = {part.loop: (MICROBATCH,)} if space is not None and isinstance(part, Split) and part.loop in space.kernel_loops else {}
        if space is not None and space.kernel is not None and (splits or space.random):
            target = getattr(kernels, space.kernel)
            extra["splits"] = splits
        if op.name in split.counted:
            target_value = split.counted[op.name]
            assert target_value in split.whole
            weight = operands[2] if len(operands) > 2 else None
            extra["counted"] = count_targets(whole[target_value], weight, argument(op, 4, "ignore_index", -100))
        return self._call(op, target, operands, changes, **extra)

    def _call(self, op: Op, target: Any, operands: Sequence[Tensor], changes: Mapping[int, Any], **extra: Any) -> Any:
        node, order = self.nodes[op.name], iter(operands)
        args = list(fx.map_arg(node.args, lambda _: next(order)))
        kwargs = dict(fx.map_arg(node.kwargs, lambda _: next(order)))
        for place, new in changes.items():
            args[place] = new
        return target(*args, **kwargs, **extra)

    def _keep(self, values: dict[Value, Tensor], op: Op, made: Any) -> None:
        for index, tensor in enumerate([made] if isinstance(made, Tensor) else made):
            values[Value(op.name, index)] = tensor


def _widened(captured: Captured) -> Captured:
    """The same in float64 throughout; models compute norms and losses in float32 whatever they are given."""
    for node in captured.fx.graph.nodes:
        raised = [torch.float64 if value is torch.float32 else value for value in node.args]
        node.args = tuple(raised)
        node.kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in node.kwargs.items()}
    return captured


def _cut(x: Tensor, state: State, axis: MicrobatchAxis) -> Tensor:
    return take_part(x, state.dim, state.outer, axis.index, axis.size)


def _join(parts: Sequence[Tensor], state: State) -> Tensor:
    if state.kind is StateKind.SHARD:
        return join_parts(parts, state.dim, state.outer)
    if state == PARTIAL:
        return torch.stack(list(parts)).sum(0)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], rtol=0, atol=0, equal_nan=True)
    return parts[0]


def _close(actual: Tensor, expected: Tensor, name: str) -> None:
    if not expected.is_floating_point():
        assert torch.equal(actual.to(expected.dtype), expected), name
    elif expected.numel():
        scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 1.0
        tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-3), msg=lambda text: f"{name}: {text}")


def check(subject: Subject, count: int) -> MicroSplit:
    """Split, run every micro-batch, and compare all joined values and the sums of gradients with those of the whole batch."""
    split = subject.split(count)
    assert split.reasons == ()
    mesh = Mesh((MICROBATCH,), (count,))
    whole_leaves, leaves = subject.leaves(), subject.leaves()
    whole = subject.run(whole_leaves)
    runs = [subject.run_part(leaves, split, whole, MicrobatchAxis(MICROBATCH, count, index)) for index in range(count)]
    for value, expected in whole.items():
        if value not in runs[0]:
            continue  # a kernel may leave out results that nothing reads
        shape = local_shape(tuple(expected.shape), (split.states[value],), mesh)
        assert all(run[value].shape == shape for run in runs), f"{value}: {runs[0][value].shape} instead of {shape}"
        _close(_join([run[value].detach() for run in runs], split.states[value]), expected.detach(), str(value))
    number = len(subject.output.operands) - len(subject.output.kwargs.get("updates", ()))
    returned = [value for value in subject.output.operands[:number] if whole[value].requires_grad]
    weights = {value: torch.randn_like(whole[value]) for value in returned}
    torch.autograd.backward([whole[value] for value in returned], [weights[value] for value in returned])
    for index, run in enumerate(runs):
        for value in returned:
            state, weight = split.states[value], weights[value]
            if state.kind is StateKind.SHARD:
                weight = _cut(weight, state, MicrobatchAxis(MICROBATCH, count, index))
            if state != REPLICATE or index == 0:
                run[value].backward(weight, retain_graph=True)  # type: ignore[no-untyped-call]
    names = [op.name for op in subject.graph.of_kind(OpKind.PARAMETER)]
    slopes = {name: slope for name in names if (slope := whole_leaves[name].grad) is not None}
    assert slopes or not names
    for name, slope in slopes.items():
        got = leaves[name].grad
        _close(torch.zeros_like(slope) if got is None else got, slope, f"gradient of {name}")
    return split


@cache
def zoo(name: str) -> Subject:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    return Subject(model, inputs)


def work_parts(subject: Subject, split: MicroSplit) -> dict[str, int]:
    """Of the products, attentions and lookups, how many are split and how many aren't."""
    parts = [split.placements[name] for name, space in subject.spaces.items() if space.is_contraction]
    return {"split": sum(part is not None for part in parts), "whole": sum(part is None for part in parts)}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [name for name in ZOO if name not in COUPLED])
def test_values_and_gradients_of_micro_batches_join_to_those_of_the_batch(name: str, count: int) -> None:
    subject = zoo(name)
    split = check(subject, count)
    assert subject.states(split)[:2] == ([PARTIAL] if name in HEADLESS else [PARTIAL, shard(0)])
    found = work_parts(subject, split)
    # Tables of positions and token types are looked up alike for every sample; bags of embeddings aren't split in time.
    assert found["whole"] <= {"gpt2": 1, "bert": 2, "t5": 2, "dlrm": 4}.get(name, 0)
    assert found["split"] >= 4


def test_training_batch_norm_is_refused_with_its_lines_and_evaluation_is_not() -> None:
    split = zoo("resnet").split(2)
    assert len(split.reasons) == 8
    for reason in split.reasons:
        assert "aten.batch_norm.default at tests/zoo.py:" in reason
        assert "GroupNorm" in reason
        assert "microbatches=1" in reason
    model, inputs = ZOO["resnet"]()
    found = check(Subject(model.eval(), inputs), 4)
    assert not found.reasons


def test_one_micro_batch_leaves_everything_as_it_is() -> None:
    split = zoo("resnet").split(1)
    assert split.reasons == ()
    assert set(split.placements.values()) == {None}
    assert set(split.states.values()) == {REPLICATE}
    with pytest.raises(InputError, match="into 0 micro-batches"):
        zoo("resnet").split(0)


class Small(nn.Module):
    """Two linear layers around whatever a test wants to see split."""

    def __init__(self, function: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.randn(8))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.function = function
        self.double()

    def forward(self, x: Tensor, **others: Tensor) -> Any:
        return self.function(self, x, **others)


def small(function: Callable[..., Any], buffers: Mapping[str, Tensor] | None = None, **others: Tensor) -> Subject:
    torch.manual_seed(1)
    return Subject(Small(function, **(buffers or {})), {"x": torch.randn(8, 4, 6, dtype=torch.float64), **others})


def test_sequence_first_models_split_inside_merged_dims() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        hidden = model.first(x).transpose(0, 1)  # (sequence, batch, width)
        merged = model.second(hidden.reshape(-1, 8))  # (sequence batch, width)
        return merged, merged.view(4, 8, 6).mean()

    subject = small(forward)
    split = check(subject, 2)
    assert subject.states(split) == [shard(0, 4), PARTIAL]


def test_two_batches_one_after_the_other_are_split_inside_each() -> None:
    def forward(model: Small, x: Tensor, other: Tensor) -> Any:
        hidden = model.first(torch.cat([x, other]))
        first, second = hidden.chunk(2)
        return hidden, (first - second).square().mean()

    subject = small(forward, other=torch.randn(8, 4, 6, dtype=torch.float64))
    assert subject.states(check(subject, 4)) == [shard(0, 2), PARTIAL]


def test_sums_pass_through_linear_ops_and_stop_at_others() -> None:
    def linear(model: Small, x: Tensor) -> Any:
        total = model.first(x).sum(0)
        return (total * 2.0 - total / 3.0).to(torch.float32).sum()

    split = check(subject := small(linear), 4)
    assert subject.states(split) == [PARTIAL]
    assert PASS_PARTIAL in split.placements.values()

    def squared(model: Small, x: Tensor) -> Any:
        return model.first(x).mean(0).square().sum()

    (reason,) = small(squared).split(4).reasons
    assert reason.startswith("aten.square.default at tests/test_microbatches.py")
    assert "mean float64[4, 8] is a sum over the micro-batches and depends on parameters" in reason
    assert "instead of 4" in reason


def test_load_balancing_loss_of_experts_is_refused() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        weights = model.first(x).flatten(0, 1).softmax(-1)
        used = F.one_hot(weights.argmax(-1), 8).to(x.dtype).mean(0)
        return model.second(weights).sum() + (used * weights.mean(0)).sum()

    reasons = small(forward).split(2).reasons
    assert any("aten.mul.Tensor" in reason and "sum over the micro-batches" in reason for reason in reasons)


def test_numbers_of_labels_are_counted_once_from_the_whole_batch() -> None:
    def forward(model: Small, x: Tensor, mask: Tensor) -> Any:
        losses = model.first(x).square().mean(-1) * mask
        return losses.sum() / mask.sum().clamp(min=1), losses

    mask = (torch.arange(32).view(8, 4) % 5 > 1).double()
    subject = small(forward, mask=mask)
    split = check(subject, 4)
    assert subject.states(split) == [PARTIAL, shard(0)]
    assert len(split.whole) == 1
    (whole,) = split.whole
    assert split.states[whole] == PARTIAL


def test_what_needs_no_parameter_may_be_needed_whole() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        normal = (x - x.mean(0)) / x.amax((0, 1))  # statistics of the whole batch, of inputs only
        same = normal[:, 0] @ normal[:, 0].T  # each sample against all
        return (model.first(normal).sum((1, 2)) * same.sum(-1)).mean()

    subject = small(forward)
    split = check(subject, 2)
    assert subject.states(split) == [PARTIAL]
    assert len(split.whole) >= 3
    found = work_parts(subject, split)
    assert found["split"] >= 1


def test_inputs_with_gradients_are_not_computed_with_apart() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        return model.first(x - x.exp().amax(0)).sum()

    assert not small(forward).split(2).reasons
    model = Small(forward)
    (reason,) = Subject(model, {"x": torch.randn(8, 4, 6, dtype=torch.float64, requires_grad=True)}).split(2).reasons
    assert "aten.amax.default" in reason


def test_large_values_are_not_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Small, x: Tensor) -> Any:
        return model.first(x - x.exp().amax(0)).sum()

    subject = small(forward)
    assert {str(value) for value in subject.split(2).whole} == {"exp"}
    monkeypatch.setattr(microbatches, "WHOLE_NBYTES", 8 * 8 * 4 * 6 - 1)
    (reason,) = subject.split(2).reasons
    assert "aten.amax.default at tests/test_microbatches.py" in reason
    assert "takes 1536 bytes for the whole batch, more than 1535" in reason


def test_views_take_no_memory_to_be_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Small, x: Tensor) -> Any:
        wide = x[..., :1].expand(8, 4, 600).amax(0).amax(-1, keepdim=True)
        return model.first(x - wide).sum()

    subject = small(forward)
    monkeypatch.setattr(microbatches, "WHOLE_NBYTES", 8 * 4 * 600)
    assert not check(subject, 2).reasons


def test_random_values_are_not_made_whole() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        noise = torch.rand_like(x)
        return model.first(x - noise.amax(0)).sum()

    (reason,) = small(forward).split(2).reasons
    assert "rand_like float64[8, 4, 6] is split by micro-batch on dim 0 and is random" in reason


def test_random_ops_differ_between_micro_batches_only_where_they_are_split() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        own = F.dropout(torch.ones_like(model.first(x)), 0.5)
        shared = F.dropout(torch.ones_like(model.scale), 0.5)
        return own, shared, (own * shared * model.first(x)).sum()

    subject = small(forward)
    split = subject.split(2)
    assert split.reasons == ()
    assert subject.states(split) == [shard(0), REPLICATE, PARTIAL]
    leaves = subject.leaves()
    whole = subject.run(leaves)
    own, shared, _ = subject.output.operands
    first, second = (subject.run_part(leaves, split, whole, MicrobatchAxis(MICROBATCH, 2, index)) for index in range(2))
    assert not torch.equal(first[own], second[own])
    assert torch.equal(first[shared], second[shared])
    assert 0 < int((first[shared] == 0).sum()) < 8


def test_new_values_of_buffers_must_be_the_same_for_all() -> None:
    def from_inputs(model: Small, x: Tensor) -> Any:
        model.average.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return model.first(x - model.average).sum()

    average = {"average": torch.zeros(6, dtype=torch.float64)}
    subject = small(from_inputs, average)
    split = check(subject, 4)
    assert subject.states(split) == [PARTIAL, REPLICATE]

    def from_hidden(model: Small, x: Tensor) -> Any:
        hidden = model.first(x)
        model.average.copy_(hidden.detach().mean((0, 1)))
        return hidden.sum()

    average = {"average": torch.zeros(8, dtype=torch.float64)}
    (reason,) = small(from_hidden, average).split(4).reasons
    assert "new value of buffer average, made by aten.mean.dim at tests/test_microbatches.py" in reason
    assert "each of 4 micro-batches has P of it" in reason


def test_batch_norm_on_what_all_micro_batches_share_would_count_several_times() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Parameter(torch.randn(5, 6)), nn.BatchNorm1d(6)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.norm(self.table).sum(0)).sum()

    (reason,) = Subject(Shared(), {"x": torch.randn(4, 6, dtype=torch.float64)}).split(2).reasons
    assert "aten.batch_norm.default" in reason


def test_ops_without_a_rule_need_what_they_read_whole() -> None:
    def of_inputs(model: Small, x: Tensor) -> Any:
        return model.first(x).sum() * torch.trace(x[:, 0])

    def of_hidden(model: Small, x: Tensor) -> Any:
        return torch.trace(model.first(x)[:, 0])

    check(small(of_inputs), 2)
    (reason,) = small(of_hidden).split(2).reasons
    assert "aten.trace.default at tests/test_microbatches.py" in reason
    assert "has no rule" in reason


def test_the_batch_is_what_most_inputs_begin_with() -> None:
    def forward(model: Small, x: Tensor, labels: Tensor, bias: Tensor, one: Tensor, number: Tensor) -> Any:
        hidden = model.first(x) + bias[:8].sum(-1) * one * number
        return F.mse_loss(hidden.sum((1, 2)), labels)

    def others(rows: int) -> dict[str, Tensor]:
        made = {"bias": torch.randn(rows, 8), "labels": torch.randn(8), "one": torch.randn(1, 4, 8), "number": torch.randn(())}
        return {name: tensor.double() for name, tensor in made.items()}

    subject = small(forward, **others(12))
    split = check(subject, 4)
    named = {op.target: split.states[Value(op.name)] for op in subject.graph.of_kind(OpKind.INPUT)}
    assert named == {"x": shard(0), "labels": shard(0), "bias": REPLICATE, "one": REPLICATE, "number": REPLICATE}
    (reason,) = subject.split(3).reasons
    assert reason.startswith("the batch of 8 (dim 0 of x, labels) can't be split into 3 micro-batches")


def test_the_batch_needn_t_be_that_of_the_first_input() -> None:
    def forward(model: Small, x: Tensor, left: Tensor, right: Tensor) -> Any:
        return model.first(x).mean(), (model.second(left) * right).mean()

    subject = small(forward, left=torch.randn(16, 8, dtype=torch.float64), right=torch.randn(16, 6, dtype=torch.float64))
    assert subject.states(check(subject, 4)) == [REPLICATE, PARTIAL]


def test_another_input_may_hold_the_batch() -> None:
    def forward(model: Small, x: Tensor, rows: Tensor) -> Any:
        return model.second(model.first(x[:, 0])[rows]).mean()

    subject = small(forward, rows=torch.randint(0, 8, (16, 2)))
    split = check(subject, 4)
    named = {op.target: split.states[Value(op.name)] for op in subject.graph.of_kind(OpKind.INPUT)}
    assert named == {"x": REPLICATE, "rows": shard(0)}


def test_a_graph_without_a_batch_says_so() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        return model.first(x).sum()

    model = Small(forward)
    (reason,) = Subject(model, {"x": torch.randn(1, 6, dtype=torch.float64)}).split(2).reasons
    assert "no input has a batch to split into 2 micro-batches (inputs: x float64[1, 6])" in reason

    def unused(model: Small, x: Tensor) -> Any:
        return model.first(x.sum(0)).sum() if x.dim() == 2 else x

    (reason,) = Subject(Small(unused), {"x": torch.randn(4, 6, dtype=torch.float64)}).split(2).reasons
    assert "splits no op that reads a parameter" in reason


def test_new_tensors_and_broadcasts_tie_no_batches_together() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        hidden = model.first(x)
        return (hidden + hidden.new_zeros(8, 1, 8) + hidden.new_ones(8) + hidden.new_full((4, 8), 2.0)).sum()

    subject = small(forward)
    assert not any("new_" in op.target for op in subject.graph.ops)
    assert not check(subject, 2).whole

    def broadcast(model: Small, x: Tensor) -> Any:
        hidden, scale = torch.broadcast_tensors(model.first(x), model.scale)
        return F.mse_loss(hidden, hidden.detach() * 2.0) + (hidden * scale).mean()

    subject = small(broadcast)
    assert not any("broadcast_tensors" in op.target for op in subject.graph.ops)
    assert not check(subject, 2).whole


LABELS = torch.randint(0, 8, (8, 4), generator=torch.Generator().manual_seed(5))
LABELS[0] = 255
LABELS[3, :2] = 255
CLASS_WEIGHT = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 0.5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["cross_entropy", "smoothed", "nll_loss", "probabilities"])
def test_losses_over_classes(kind: str, reduction: str, weighted: bool) -> None:
    def forward(model: Small, x: Tensor, labels: Tensor) -> Tensor:
        logits = model.first(x).flatten(0, 1)
        weight = model.weight if weighted else None
        if kind == "probabilities":
            return F.cross_entropy(logits, labels.flatten(0, 1), weight, reduction=reduction)
        if kind == "nll_loss":
            return F.nll_loss(logits.log_softmax(-1), labels.flatten(), weight, ignore_index=255, reduction=reduction)
        smoothing = 0.1 if kind == "smoothed" else 0.0
        return F.cross_entropy(logits, labels.flatten(), weight, ignore_index=255, reduction=reduction, label_smoothing=smoothing)

    labels = torch.rand(8, 4, 8, dtype=torch.float64).softmax(-1) if kind == "probabilities" else LABELS
    buffers = {"weight": CLASS_WEIGHT} if weighted else {}
    subject = small(forward, buffers, labels=labels)
    split = check(subject, 4)
    assert subject.states(split) == [shard(0) if reduction == "none" else PARTIAL]
    assert bool(split.counted) == (reduction == "mean" and kind != "probabilities")


def test_classes_that_are_samples_of_the_batch_are_refused() -> None:
    def scores(model: Small, x: Tensor) -> Tensor:
        return model.second(model.first(x[:, 0])) @ x[:, 1].T  # each sample against all

    def by_row(model: Small, x: Tensor) -> Any:
        return F.cross_entropy(scores(model, x), torch.arange(8))

    def by_column(model: Small, x: Tensor) -> Any:
        return F.cross_entropy(scores(model, x).T, torch.arange(8))

    check(small(by_row), 4)
    (reason,) = small(by_column).split(4).reasons
    assert "aten.cross_entropy_loss.default" in reason
    assert "is split by micro-batch on dim 1 and depends on parameters" in reason


def test_bags_are_looked_up_for_all_samples() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags, self.head = nn.EmbeddingBag(10, 6, mode="sum"), nn.Linear(6, 2)
            self.double()

        def forward(self, indices: Tensor, offsets: Tensor, scale: Tensor) -> Tensor:
            return self.head(self.bags(indices, offsets) * scale[:, None]).mean()

    offsets = torch.tensor([0, 3, 3, 4])
    inputs = {"indices": torch.randint(0, 10, (9,)), "offsets": offsets, "scale": torch.randn(4, dtype=torch.float64)}
    subject = Subject(Bags(), inputs)
    split = check(subject, 2)
    assert {str(value) for value in split.whole} == {"offsets"}
    assert split.placements["linear"] is not None


def test_targets_of_a_mean_loss_that_come_from_parameters_are_refused() -> None:
    def forward(model: Small, x: Tensor) -> Any:
        logits = model.first(x).flatten(0, 1)
        return F.cross_entropy(logits, logits.detach().argmax(-1))

    (reason,) = small(forward).split(2).reasons
    assert "aten.cross_entropy_loss.default" in reason
    assert "argmax int64[32] is split by micro-batch on dim 0 and depends on parameters" in reason


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss])
def test_a_mean_loss_over_ranks_and_time_counts_what_it_is_told_over_the_ranks(loss: Callable[..., Tensor]) -> None:
    logits = torch.randn(8, 8, dtype=torch.float64).log_softmax(-1)
    target = torch.tensor([1, -100, 3, 3, -100, -100, 2, 7])

    def run(rank: int) -> Tensor:
        mine = slice(4 * rank, 4 * rank + 4)
        counted = count_targets(target[mine], None, -100)
        total = torch.zeros((), dtype=torch.float64)
        for index in range(2):
            part = slice(4 * rank + 2 * index, 4 * rank + 2 * index + 2)
            with comm.active({**comm.current(), MICROBATCH: MicrobatchAxis(MICROBATCH, 2, index)}):
                total = total + loss(logits[part], target[part], splits={"n": (MICROBATCH, "x")}, counted=counted)
                with pytest.raises(CommError, match=f"along time: all_reduce on axis 'micro', micro-batch {index} of 2"):
                    loss(logits[part], target[part], splits={"n": (MICROBATCH, "x")})
        return total

    torch.testing.assert_close(sum(threads.run(Mesh(("x",), (2,)), run)), F.nll_loss(logits, target))


def test_time_has_positions_and_no_collectives() -> None:
    axis = MicrobatchAxis("micro", 4, 3)
    with comm.active({"micro": axis}):
        assert comm.index(("micro",)) == 3
        assert comm.count(("micro",)) == 4
    x = torch.ones(4)
    calls: list[Callable[[], object]] = [
        lambda: axis.all_reduce(x),
        lambda: axis.all_gather(x),
        lambda: axis.reduce_scatter([x] * 4),
        lambda: axis.all_to_all([x] * 4),
        lambda: axis.send(x, 1),
        lambda: axis.receive(1, (4,), x.dtype, x.device),
    ]
    for call in calls:
        with pytest.raises(CommError, match="ranks can't exchange along time"):
            call()
    with pytest.raises(ValueError, match="position 4"):
        MicrobatchAxis("micro", 4, 4)
