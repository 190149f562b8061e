"""Capture: the graph computes what the model does, says what it means, and leaves the model alone."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import SEQ, VOCAB, ZOO, labels, llama, padding, tokens

from autopar import ir
from autopar.capture.export import Captured, capture
from autopar.errors import CaptureError, InputError

torch.set_num_threads(1)

# These round to float32 inside (attention scores), where another order of summation shows; the others agree in float64.
ROUGH = {"gptj": 1e-6, "gemma2": 1e-6}


@functools.cache
def captured_zoo(name: str) -> tuple[nn.Module, dict[str, Tensor], Captured]:
    """A model of the zoo with its batch and its capture; not to be changed."""
    model, batch = ZOO[name]()
    return model, batch, capture(model, batch)


def run(captured: Captured, model: nn.Module, batch: dict[str, Any]) -> Any:
    parameters, buffers = dict(model.named_parameters()), {**dict(model.named_buffers()), **captured.constants}
    state = [parameters[name] for name in captured.parameters] + [buffers[name].clone() for name in captured.buffers]
    return captured.fx(*state, *captured.bind((), batch))


def loss_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.loss


def calls(captured: Captured, target: str) -> list[ir.Op]:
    return [op for op in captured.graph.of_kind(ir.OpKind.CALL) if op.target == target]


def score_shaped(captured: Captured, rows: int, columns: int) -> list[ir.Op]:
    """Ops with a result whose last two dims are those of an attention matrix."""
    return [op for op in captured.graph.ops if any(result.shape[-2:] == (rows, columns) for result in op.results)]


@pytest.mark.parametrize("name", ZOO)
def test_graph_computes_loss_and_gradients_of_the_model(name: str) -> None:
    original, batch, captured = captured_zoo(name)
    model, twin = copy.deepcopy(original), copy.deepcopy(original)
    expected = loss_of(twin(**batch))
    expected.backward()
    result = captured.unflatten(run(captured, model, batch))
    loss = loss_of(result)
    loss.backward()
    tolerance = ROUGH.get(name, 1e-12)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    gradients = {parameter: tensor.grad for parameter, tensor in model.named_parameters()}
    assert any(gradient is not None for gradient in gradients.values())
    for parameter, tensor in twin.named_parameters():
        scale = float(tensor.grad.abs().max())
        torch.testing.assert_close(gradients[parameter], tensor.grad, rtol=0, atol=tolerance * scale, msg=parameter)


@pytest.mark.parametrize("name", ZOO)
def test_ops_carry_names_layers_sources_and_shapes(name: str) -> None:
    model, _, captured = captured_zoo(name)
    placeholders = [node.name for node in captured.fx.graph.nodes if node.op == "placeholder"]
    targets = [captured.graph.by_name[placeholder].target for placeholder in placeholders]
    assert targets == [*captured.parameters, *captured.buffers, *captured.inputs]
    modules = dict(model.named_modules())
    ops = captured.graph.of_kind(ir.OpKind.CALL)
    assert all(op.layer in modules for op in ops)
    assert sum(bool(op.source) for op in ops) >= 0.98 * len(ops)
    assert not any(op.source.startswith("/") or "/torch/" in op.source for op in ops)
    for op in ops:
        sizes = [arg for arg in op.args[1:] if isinstance(arg, tuple)] if op.target.startswith(("aten.reshape", "aten.expand")) else []
        assert all(-1 not in size for size in sizes)
        assert "device" not in op.kwargs
    assert captured.graph.by_name["output"].operands[0].op in captured.graph.by_name


def real_saved_nbytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that the model itself keeps for its backward, parameters, buffers and inputs aside."""
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *batch.values())}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["gptj", "resnet", "lstm"])
def test_saved_bytes_are_those_of_the_real_model(name: str) -> None:
    """Of models whose attention isn't replaced by another operator."""
    model, batch, captured = captured_zoo(name)
    recorded = sum(op.extra_saved_nbytes + sum(op.results[i].nbytes for i in op.saved) for op in captured.graph.of_kind(ir.OpKind.CALL))
    assert recorded == real_saved_nbytes(model, batch) > 0


def test_saved_names_the_result_that_a_view_looks_at() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.tanh(x).view(2, 3, 4)).exp().sum()

    graph = capture(Net(), (torch.randn(6, 4),)).graph
    found = {op.target: op.saved for op in graph.of_kind(ir.OpKind.CALL)}
    # The linear layer keeps its input: a view of tanh's result, in tanh's storage. exp keeps its own result.
    assert found["aten.tanh.default"] == {0}
    assert found["aten.reshape.default"] == found["aten.linear.default"] == found["aten.sum.default"] == frozenset()
    assert found["aten.exp.default"] == {0}
    assert not graph.by_name["tanh"].results[0].requires_grad
    assert graph.by_name["linear"].results[0].requires_grad


def test_grouped_attention_keeps_its_key_heads() -> None:
    model, batch = llama()
    captured = capture(model, batch)
    attentions = calls(captured, "aten.scaled_dot_product_attention.default")
    assert len(attentions) == 2
    for op in attentions:
        query, key, value = captured.graph.operand_tensors(op)
        assert (query.shape[1], key.shape[1], value.shape[1]) == (4, 2, 2)
        assert op.args[3:] == (None, 0.0, True)
        assert op.kwargs["enable_gqa"] is True


# Sequence lengths that no other size equals; two of them where the test is about lengths that differ.
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "qwen2", "qwen3", "mistral", "phi3", "falcon"])
def test_causal_masks_are_not_tensors(name: str) -> None:
    model, batch = ZOO[name]()
    batch = {key: torch.cat([value, value[:, :7]], dim=1) for key, value in batch.items()}
    captured = capture(model, batch)
    length = SEQ + 7
    assert score_shaped(captured, length, length) == []
    kernels = ("aten.scaled_dot_product_attention.default", "autopar.attention.default")
    assert sum(len(calls(captured, kernel)) for kernel in kernels) == 2


def test_sliding_window_softcap_and_padding_are_arguments() -> None:
    window = [op.args[6] for op in calls(captured_zoo("mistral")[2], "autopar.attention.default")]
    assert window == [5, 5]
    model, batch = ZOO["gemma2"]()
    model.set_attn_implementation("flex_attention")
    gemma = calls(capture(model, batch), "autopar.attention.default")
    assert [(op.args[6], op.args[8]) for op in gemma] == [(5, 50.0), (None, 50.0)]
    captured = captured_zoo("bert")[2]
    for op in calls(captured, "autopar.attention.default"):
        padding_tensor = captured.graph.tensor(op.operands[3])
        assert (padding_tensor.shape, padding_tensor.dtype, op.args[5]) == ((4, SEQ), "bool", False)


def test_window_as_long_as_the_sequence_is_plain_causal() -> None:
    model, batch = ZOO["mistral"]()
    captured = capture(model, {key: value[:, :5] for key, value in batch.items()})
    assert len(calls(captured, "aten.scaled_dot_product_attention.default")) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_with_padding_agrees(side: str) -> None:
    model, batch = llama()
    mask = padding() if side == "right" else padding().flip(1)
    batch = {**batch, "attention_mask": mask, "labels": labels().masked_fill(mask == 0, -100)}
    captured = capture(model, batch)
    assert [op.args[5] for op in calls(captured, "autopar.attention.default")] == [True, True]
    loss = captured.unflatten(run(captured, model, batch)).loss
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-12, atol=0)


def test_packed_sequences_stay_apart_where_the_model_keeps_them_apart() -> None:
    model, batch = llama()
    positions = torch.cat([torch.arange(10), torch.arange(6)]).expand(4, -1)
    losses = []
    for use_cache in (False, True):  # with a cache transformers doesn't look for packed sequences
        call = {**batch, "position_ids": positions, "use_cache": use_cache}
        captured = capture(model, call)
        assert any("packed_sequence" in note for note in captured.notes) is not use_cache
        losses.append(captured.unflatten(run(captured, model, call)).loss)
        torch.testing.assert_close(losses[-1], model(**call).loss, rtol=1e-12, atol=0)
    assert abs(losses[0].item() - losses[1].item()) > 1e-6  # the packing matters here


def test_gradient_checkpointing_is_the_plans_business() -> None:
    model, batch = llama()
    plain = str(capture(model, batch).graph)
    model.activation_checkpointing_enable()
    captured = capture(model, batch)
    assert str(captured.graph) == plain
    assert captured.notes == ("gradient checkpointing switched off: the plan chooses what is recomputed",)
    assert model.model.layers[0].gradient_checkpointing


def test_tied_weights_are_one_placeholder() -> None:
    model, batch = ZOO["gpt2"]()
    captured = capture(model, batch)
    assert captured.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert captured.parameters == tuple(name for name, _ in model.named_parameters())


def test_meta_device_gives_the_same_graph() -> None:
    model, batch = llama()
    there = capture(copy.deepcopy(model).to("meta"), {key: value.to("meta") for key, value in batch.items()})
    assert str(there.graph) == str(capture(model, batch).graph)


def test_model_is_left_as_it_was() -> None:
    model, batch = llama()
    model.model.layers[0].eval()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    capture(model, batch, training=True)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == {name: key for name, (key, _) in before.items()}
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in model.named_parameters())
    assert model.config.use_cache
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not model.model.layers[0].training
    assert model(**batch).past_key_values is not None


def test_one_tensor_passed_twice_stays_two_inputs() -> None:
    model, _ = llama()
    ids = tokens()
    captured = capture(model, {"input_ids": ids, "labels": ids})
    assert captured.inputs == ("input_ids", "labels")
    assert any(op.operands and op.operands[-1].op == "labels" for op in captured.graph.ops)
    assert calls(captured, "aten.embedding.default")[0].operands[1].op == "input_ids"


def test_dropout_follows_the_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    assert len(calls(capture(model, (torch.randn(2, 4),)), "aten.dropout.default")) == 1
    assert len(calls(capture(model, (torch.randn(2, 4),), training=False), "aten.dropout.default")) == 0
    assert model.training


class Masked(nn.Module):
    """Attention with a mask spelled by hand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.proj = nn.Linear(8, 8)
        self.register_buffer("lower", torch.tril(torch.ones(1, 1, 32, 32)))

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        if self.kind == "tril":
            mask = torch.tril(torch.ones(s, s)).bool()
        elif self.kind == "buffer":
            mask = self.lower[:, :, :s, :s] == 1
        elif self.kind == "triu":
            mask = torch.triu(torch.full((s, s), -torch.inf), diagonal=1)
        elif self.kind == "all":
            mask = torch.ones(s, s, dtype=torch.bool)
        elif self.kind == "banded":
            mask = torch.tril(torch.ones(s, s), diagonal=1).bool()
        elif self.kind == "one row":
            mask = (torch.arange(s) == 0)[None]
        else:
            mask = (x[:, None, :, :1] > x[:, None, None, :, 0]) | torch.eye(s, dtype=torch.bool)
        q = self.proj(x).unflatten(2, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum()


@pytest.mark.parametrize(
    ("kind", "causal", "kept"),
    [
        ("tril", True, False),
        ("buffer", True, False),
        ("triu", True, False),
        ("all", False, False),
        ("banded", False, True),
        ("one row", False, True),
        ("data", False, True),
    ],
)
def test_masks_are_proven_or_kept(kind: str, causal: bool, kept: bool) -> None:
    torch.manual_seed(0)
    model, x = Masked(kind), torch.randn(2, 6, 8)
    captured = capture(model, {"x": x})
    (op,) = calls(captured, "aten.scaled_dot_product_attention.default")
    assert (len(op.operands) == 4) is kept
    assert (len(op.args) > 5 and op.args[5]) is causal
    assert bool(captured.notes) is not kept
    torch.testing.assert_close(run(captured, model, {"x": x})[0], model(x))


def test_a_mask_of_one_row_is_causal_for_one_row_alone() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = (torch.arange(x.shape[2]) == 0)[None]
            first = nn.functional.scaled_dot_product_attention(x[:, :, :1], x, x, attn_mask=mask)
            return first + nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 2, 6, 4)
    captured = capture(model, {"x": x})
    assert [len(op.operands) for op in calls(captured, "aten.scaled_dot_product_attention.default")] == [3, 4]
    torch.testing.assert_close(run(captured, model, {"x": x})[0], model(x))


@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_attention_of_fewer_or_more_dims_than_kernels_take(blocks: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.proj(x).unflatten(1, blocks)[:, :, None] if blocks else self.proj(x)
            return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 6, 8)
    captured = capture(model, {"x": x})
    torch.testing.assert_close(run(captured, model, {"x": x})[0], model(x))


def test_masks_of_torchs_transformer_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1])).sum()

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 6, 16)
    captured = capture(model, {"x": x})
    attentions = calls(captured, "aten.scaled_dot_product_attention.default")
    assert [op.args[3:] for op in attentions] == [(None, 0.0, True)] * 2
    torch.testing.assert_close(run(captured, model, {"x": x})[0], model(x))


class Writes(nn.Module):
    """Everything in place: on intermediates, through views, on buffers, under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(self.fc(x).mean(0), alpha=0.1)
            self.count[1] += 1
        y = self.fc(x)
        rows = y.view(2, -1, 6)
        y.add_(1.0)
        rows[:, 0].mul_(2.0)
        y[:, 1:3] = y[:, 3:5] * 3
        y.t()[0].add_(1.0)
        return (y * rows.reshape(4, 6)).sum() + rows[1].exp().sum() + self.average.sum()


def test_writes_in_place_become_values() -> None:
    torch.manual_seed(0)
    model = Writes().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    captured = capture(model, (x,))
    assert captured.mutated_buffers == ("average", "count")
    loss, average, count = run(captured, model, {"x": x})
    loss.backward()
    gradient = model.fc.weight.grad.clone()
    model.zero_grad()
    expected = model(x)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, model.fc.weight.grad)
    torch.testing.assert_close(average, model.average)
    torch.testing.assert_close(count, model.count)
    assert not any(op.target.split(".")[1].endswith("_") for op in captured.graph.of_kind(ir.OpKind.CALL))


def test_batch_norm_statistics() -> None:
    model, batch = ZOO["resnet"]()
    captured = capture(model, batch)
    assert [name.rpartition(".")[2] for name in captured.mutated_buffers] == ["num_batches_tracked"] * 8
    outputs = run(captured, model, batch)
    assert [int(value) for value in outputs[1:]] == [1] * 8
    assert all(op.args[5] is True for op in calls(captured, "aten.batch_norm.default"))


class Point(NamedTuple):
    x: Tensor
    scale: float


def test_any_structure_in_and_out() -> None:
    class Net(nn.Module):
        def forward(self, points: list[Point], *, flip: bool = False, extra: dict[str, Tensor] | None = None) -> dict[str, Any]:
            total = sum(point.x * point.scale for point in points)
            return {"sum": (total, None, 3), "flip": -total if flip else total, "extra": extra}

    model = Net()
    points = [Point(torch.randn(2), 2.0), Point(torch.randn(2), 3.0)]
    captured = capture(model, ((points,), {"flip": True}))
    assert captured.inputs == ("points.0.x", "points.1.x")
    result = captured.unflatten(captured.fx(*captured.bind((), {"flip": True, "points": points})))
    expected = model(points, flip=True)
    assert result["sum"][1:] == (None, 3)
    assert result["extra"] is None
    torch.testing.assert_close(result["flip"], expected["flip"])
    with pytest.raises(InputError, match=r"flip is False, captured with True"):
        captured.bind((points,), {"flip": False, "extra": None})
    with pytest.raises(InputError, match=r"points.1.x is float32\[3\], captured with float32\[2\]"):
        captured.bind(([points[0], Point(torch.randn(3), 3.0)],), {"flip": True})
    with pytest.raises(InputError, match=r"points.1.x is missing"):
        captured.bind(([points[0]],), {"flip": True})
    with pytest.raises(InputError, match=r"unexpected keyword argument 'size'"):
        captured.bind((points,), {"size": 3})


def test_data_dependence_names_the_line_and_the_remedy(capfd: pytest.CaptureFixture[str]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() > 0:
                return x
            return -x

    with pytest.raises(CaptureError) as caught:
        capture(Net(), (torch.randn(3),))
    text = str(caught.value)
    assert f"{Path(__file__).name}:" in text
    assert "if x.sum().item() > 0:" in text
    assert "torch.where" in text
    assert str(Path(__file__).parent.parent) not in text
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


def test_errors_of_the_model_name_their_line() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(7, 7)

    with pytest.raises(CaptureError, match=r"return x @ torch.ones\(7, 7\)"):
        capture(Net(), (torch.randn(3, 3),))
    with pytest.raises(InputError, match="give a dict"):
        capture(Net(), torch.randn(3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="missing a required argument: 'x'"):
        capture(Net(), {})


def test_constants_become_buffers_or_calls() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.tensor([1.0, 2.0, 3.0])

        def forward(self, x: Tensor) -> Tensor:
            return x[:, [1, 2]].sum() * torch.tensor(2.5) + (x * self.table).sum()

    model, x = Net(), torch.randn(2, 3)
    captured = capture(model, (x,))
    assert captured.buffers == ("table",)
    assert captured.constants["table"].tolist() == [1.0, 2.0, 3.0]
    assert len(calls(captured, "aten.slice.Tensor")) == 1
    torch.testing.assert_close(run(captured, model, {"x": x})[0], model(x))


def test_gradient_stays_out_of_no_grad_regions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.fc(x).exp()
            return ((self.fc(x) - target) ** 2).sum()

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3)
    captured = capture(model, (x,))
    run(captured, model, {"x": x})[0].backward()
    gradient = model.fc.weight.grad.clone()
    model.zero_grad()
    model(x).backward()
    torch.testing.assert_close(gradient, model.fc.weight.grad)
    frozen = captured.graph.by_name["exp"]
    assert not frozen.results[0].requires_grad


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("bias", ["none", "bool", "float"])
def test_attention_operator_against_its_definition(softcap: float | None, causal: bool, window: int | None, bias: str) -> None:
    torch.manual_seed(1)
    q = torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keys = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    scores = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    added = {"none": None, "bool": (scores > -1) | torch.eye(6, dtype=torch.bool), "float": scores}[bias]
    out = torch.ops.autopar.attention(q, k, v, keys, added, causal, window, 0.3, softcap, 0.0)
    dense = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.3
    dense = dense if softcap is None else softcap * torch.tanh(dense / softcap)
    row, column = torch.arange(6)[:, None], torch.arange(6)[None]
    allowed = keys[:, None, None, :].expand(2, 4, 6, 6)
    if causal:
        allowed = allowed & (column <= row)
    if window is not None:
        allowed = allowed & ((column > row - window) if causal else ((column - row).abs() <= window))
    if bias == "bool":
        allowed = allowed & added
    if bias == "float":
        dense = dense + added
    weights = torch.softmax(dense.masked_fill(~allowed, -torch.inf), -1).nan_to_num()
    expected = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    given = torch.autograd.grad(out.sin().sum(), (q, k, v))
    wanted = torch.autograd.grad(torch.sin(weights.detach() @ v.repeat_interleave(2, 1)).sum(), (v,))
    torch.testing.assert_close(given[2], wanted[0], rtol=1e-12, atol=1e-12)
    assert all(torch.isfinite(gradient).all() for gradient in given)


def test_logits_and_loss_outside() -> None:
    model, batch = llama()
    captured = capture(model, {"input_ids": batch["input_ids"]}, training=False)
    result = captured.unflatten(run(captured, model, {"input_ids": batch["input_ids"]}))
    assert isinstance(result, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert result.loss is None
    assert result.logits.shape == (4, SEQ, VOCAB)
    assert captured.notes == ("use_cache switched off: past_key_values isn't returned",)
