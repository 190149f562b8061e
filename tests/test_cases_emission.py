"""Models that were captured wrongly or crashed after capture: each is exact, or refused with the line and what to do."""

from __future__ import annotations

import copy
import logging
import operator
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import prune

import autopar
from autopar.capture.export import capture
from autopar.errors import CaptureError, InputError
from autopar.rules.table import RULES
from tests.processes import spawn

_TINY = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _ids() -> Tensor:
    return torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(1))


def _rows() -> Tensor:
    return torch.rand(16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- sizes in calls, constants, libraries ---


def test_a_size_in_a_call_is_that_of_the_part() -> None:
    """Mamba-2 repeats its groups with ``repeat_interleave(output_size=...)``, a size of the whole dim."""
    config = transformers.Mamba2Config(
        **_TINY, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8, n_groups=2, expand=2, chunk_size=8
    )
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(config).double()
    autopar.verify(model, {"input_ids": _ids(), "labels": _ids()}, pins={"tp": 2}, ranks=2).check()


# Arguments that are integers and no sizes of a tensor: dims, choices, steps between elements.
_NO_SIZES = """dim dims dim0 dim1 axis0 axis1 source destination start_dim end_dim dtype layout memory_format reduction ignore_index
    padding_idx mode padding_mode stride dilation padding groups num_layers kernel_size divisor_override diagonal offset shifts index
    step path n
    dim2 dimension normalization compute_mode interpolation_mode output_padding low high from to"""
# Why a part of a tensor can be given the same size, or is given another -> operators and arguments.
_SIZES = {
    "the rewrite replaces it by the sizes of the part (`shape_arg`)": """_unsafe_view.size view.size reshape.shape expand.size
        broadcast_to.size zeros.size ones.size full.size empty.size new_zeros.size new_ones.size new_full.size rand.size randn.size
        new_empty.size randint.size""",
    "the kernel takes it for the whole dim": """slice.start slice.end narrow.start narrow.length split.split_size
        split_with_sizes.split_sizes unsafe_split.split_size""",
    "its dims stay whole": """adaptive_avg_pool1d.output_size adaptive_avg_pool2d.output_size one_hot.num_classes topk.k
        slice_scatter.start slice_scatter.end pad.pad constant_pad_nd.pad layer_norm.normalized_shape rms_norm.normalized_shape
        group_norm.num_groups upsample_bicubic2d.output_size upsample_bilinear2d.output_size upsample_linear1d.output_size
        upsample_nearest1d.output_size upsample_nearest2d.output_size upsample_nearest3d.output_size upsample_trilinear3d.output_size
        adaptive_avg_pool3d.output_size adaptive_max_pool1d.output_size adaptive_max_pool2d.output_size adaptive_max_pool3d.output_size
        fractional_max_pool2d.output_size fractional_max_pool3d.output_size col2im.output_size unfold.size multinomial.num_samples
        _fft_c2r.last_dim_size stft.n_fft stft.hop_length stft.win_length
        pixel_shuffle.upscale_factor pixel_unshuffle.downscale_factor""",
    "its result stays whole": "tril_indices.row tril_indices.col triu_indices.row triu_indices.col linspace.steps",
    "its loops stay whole, but for the one size that is -1": "unflatten.sizes",
    "it says how many parts or how often, not how many elements": "chunk.chunks repeat.repeats repeat_interleave.repeats",
    "the capture drops it": "repeat_interleave.output_size",
}


def test_every_size_among_the_arguments_of_a_rule_is_accounted_for() -> None:
    found = set()
    for target in RULES:
        namespace, name, overload = target.split(".")
        if namespace == "aten":
            for argument in getattr(getattr(torch.ops.aten, name), overload)._schema.arguments:
                if "int" in str(argument.type) and argument.name not in _NO_SIZES.split():
                    found.add(f"{name}.{argument.name}")
    assert found == {name for names in _SIZES.values() for name in names.split()}


def test_tensors_that_forward_makes_of_numbers_are_constants() -> None:
    """Flaubert makes empty tensors; here also one that is read twice, and a plain attribute."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)
            self.scale = torch.tensor([1.0, 2.0, 3.0])
            self.temperature = torch.tensor(2.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(torch.cat([torch.tensor([]), x]))
            return (y * torch.tensor([3.0, 1.0, 2.0]) * self.scale / self.temperature + torch.tensor([3.0, 1.0, 2.0])).sum()

    model, x = Model(), torch.rand(4, 8)
    compiled = autopar.compile(copy.deepcopy(model), (x,))
    torch.testing.assert_close(compiled(x), model(x))
    for each in (model, compiled):  # the user may set attributes between calls, and change them in place
        each.temperature.fill_(0.5)
        each.scale = torch.tensor([5.0, 6.0, 7.0])
    torch.testing.assert_close(compiled(x), model(x))
    compiled.scale = torch.ones(1)
    with pytest.raises(InputError, match=r"scale was torch.float32 of shape \(3,\) when .* and is torch.float32 of shape \(1,\) now"):
        compiled(x)


def test_numbers_that_forward_reads_may_be_set_between_calls() -> None:
    """A temperature that is annealed, a dropout that is switched off, a flag: what a captured graph holds as it was."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.0)
            self.temperature, self.signed, self.steps, self.range = 1.0, True, 0, (-9.0, 9.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(self.linear(x) / self.temperature).clamp(*self.range)
            return (y if self.signed else y.abs()).sum()

    model, x = Model().double(), _rows()
    compiled = autopar.compile(copy.deepcopy(model), (x,))
    assert torch.equal(compiled(x), model(x))
    changes: tuple[tuple[str, Callable[[Any], None]], ...] = (
        (r"temperature was 1.0 and is 0.5", lambda each: setattr(each, "temperature", 0.5)),
        (r"signed was True and is False", lambda each: setattr(each, "signed", False)),
        (r"range was \(-9.0, 9.0\) and is \(-0.1, 0.1\)", lambda each: setattr(each, "range", (-0.1, 0.1))),
        (r"drop.p was 0.0 and is 1.0", lambda each: setattr(each.drop, "p", 1.0)),
    )
    for message, change in changes:
        change(model)
        change(compiled)
        with pytest.warns(UserWarning, match=f"{message}: Model is captured and planned again"):
            assert torch.equal(compiled(x), model(x))
    for each in (model, compiled):  # what was captured before is used again, and what forward doesn't read may change
        each.steps, each.drop.p = 5, 0.0
    assert torch.equal(compiled(x), model(x))


SCALE = 1.0
SETTINGS = types.SimpleNamespace(power=1.0, inner=[1.0])


def _scaled(x: Tensor) -> Tensor:
    return x * SCALE * SETTINGS.power * SETTINGS.inner[0]


class Reading(nn.Module):
    """Reads functions, containers and objects among its attributes, what its class has, and variables of its code."""

    bias = 0.0

    def __init__(self, options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.activation: Callable[[Tensor], Tensor] = torch.relu
        self.factors, self.options, self.config = [1.0, 2.0], {"by": 1.0}, options

    def between(self, x: Tensor) -> Tensor:
        return x + self.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.activation(self.linear(x)))
        return _scaled(y) * self.factors[0] * self.options["by"] * self.config.temperature * getattr(self, "late", 1.0)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"activation was relu and is gelu", lambda each: setattr(each, "activation", F.gelu)),
        (r"factors holds other values", lambda each: operator.setitem(each.factors, 0, 3.0)),
        (r"factors was \[1.0, 2.0\] and is \[4.0\]", lambda each: setattr(each, "factors", [4.0])),
        (r"options holds other values", lambda each: each.options.update(by=5.0)),
        (r"config holds other values", lambda each: setattr(each.config, "temperature", 6.0)),
        (r"config was .*1.0\) and is .*7.0\)", lambda each: setattr(each, "config", types.SimpleNamespace(temperature=7.0))),
        (r"bias was the class's or missing and is 8.0", lambda each: setattr(each, "bias", 8.0)),
        (r"late was the class's or missing and is 14.0", lambda each: setattr(each, "late", 14.0)),
        (r"Reading.bias is another", lambda each: setattr(Reading, "bias", 9.0)),
        (r"between was the class's or missing and is", lambda each: setattr(each, "between", torch.neg)),
        (r"linear.forward was the class's or missing and is", lambda each: setattr(each.linear, "forward", torch.sin)),
        (r"SCALE is another", lambda each: setattr(sys.modules[__name__], "SCALE", 10.0)),
        (r"SETTINGS is another", lambda each: operator.setitem(SETTINGS.inner, 0, 11.0)),
        (r"hooks of linear are others", lambda each: each.linear.register_forward_hook(lambda module, args, out: out * 12)),
        (r"hooks of linear are others", lambda each: each.linear.register_forward_pre_hook(lambda module, args: (args[0] * 13,))),
    ],
)
def test_what_forward_reads_of_python_may_be_changed_between_calls(
    monkeypatch: pytest.MonkeyPatch, message: str, change: Callable[[Any], object]
) -> None:
    """Also what is changed in place, belongs to the class, or is a variable of the code; the first program is used again afterwards."""
    monkeypatch.setattr(Reading, "bias", 0.0)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 1.0)
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", types.SimpleNamespace(power=1.0, inner=[1.0]))
    model, x = Reading(types.SimpleNamespace(temperature=1.0)).double(), _rows()
    compiled = autopar.compile(copy.deepcopy(model), (x,))
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(x), before)
        model.unread = compiled.unread = 5
        assert torch.equal(compiled(x), before)
    change(model)
    if "another" not in message:
        change(compiled)
    assert not torch.equal(model(x), before)
    with pytest.warns(UserWarning, match=f"{message}.*: Reading is captured and planned again"):
        assert torch.equal(compiled(x), model(x))


LOG = logging.getLogger("tests.reading")


class Logging(nn.Module):
    """Writes to a logger."""

    def forward(self, x: Tensor) -> Tensor:
        LOG.debug("forward")
        return (x * x).sum()


class Asserting(nn.Module):
    """Checks values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async((x < 9).all(), "too large")
        return (x * x).sum()


def test_assertions_about_values_are_noted_and_left_out() -> None:
    """Flaubert asserts how long its rows are, which it counts in the input."""
    plan = autopar.plan(Asserting(), (_rows(),), "2xcpu")
    assert [note.partition(" at ")[0] for note in plan.notes] == ["the assertion about values"]
    assert autopar.compile(Asserting(), (_rows(),))(_rows()) == (_rows() * _rows()).sum()
    sizes = {"vocab_size": 64, "n_words": 64, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16, "pad_index": 0}
    config = transformers.FlaubertConfig(**sizes, dropout=0.0, attention_dropout=0.0, layerdrop=0.0)
    model, words = transformers.FlaubertWithLMHeadModel(config).double(), torch.arange(5, 61).view(7, 8)
    batch = {"input_ids": words, "labels": words}
    plan = autopar.plan(model, batch, "2xcpu", pins={"tp": 2})
    assert any("assert lengths.max().item() <= slen` isn't checked by the program" in note for note in plan.notes)
    autopar.verify(model, batch, plan).check()


def test_objects_that_change_as_they_are_used_are_no_settings() -> None:
    """A logger remembers who asked for what, and knows all other loggers."""
    compiled, x = autopar.compile(Logging(), (_rows(),)), _rows()
    logging.getLogger("tests.reading.another").debug("new")
    LOG.isEnabledFor(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(x), (x * x).sum())


def test_a_call_that_asks_for_hidden_states_changes_nothing_for_others() -> None:
    """transformers puts hooks on the layers in the first such call."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False)).double()
    words = torch.arange(4, 60).view(7, 8)
    compiled = autopar.compile(copy.deepcopy(model), {"input_ids": words})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asks in (False, True, False, True):
            ours, expected = (one(input_ids=words, output_hidden_states=asks) for one in (compiled, model))
            assert torch.allclose(ours.logits, expected.logits)
            assert not asks or torch.allclose(ours.hidden_states[1], expected.hidden_states[1])


def test_a_backward_hook_that_comes_later_is_refused() -> None:
    compiled = autopar.compile(Reading(types.SimpleNamespace(temperature=1.0)).double(), (_rows(),))
    compiled.linear.register_full_backward_hook(lambda module, inputs, outputs: None)
    with (
        pytest.warns(UserWarning, match="hooks of linear are others"),
        pytest.raises(CaptureError, match="backward hook is registered on linear"),
    ):
        compiled(_rows())


def test_a_part_of_the_library_that_is_not_loaded_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Funnel makes its masks itself, so that transformers hasn't loaded its own for it."""
    sizes = {"d_model": 32, "d_inner": 64, "n_head": 4, "d_head": 8, "block_sizes": [1, 1]}
    without_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    torch.manual_seed(0)
    model = transformers.FunnelForMaskedLM(transformers.FunnelConfig(vocab_size=64, **sizes, **without_dropout)).double()
    monkeypatch.delitem(sys.modules, "transformers.masking_utils", raising=False)
    autopar.verify(model, {"input_ids": _ids(), "labels": _ids()}, pins={"tp": 2}, ranks=2).check()


# --- what can't be a graph ---


class Lines(nn.Module):
    """A line of a forward, called with two layers and an input."""

    def __init__(self, line: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.line = line

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self, x)


@pytest.mark.parametrize(
    "line",
    [
        lambda m, x: torch.zeros_like(x).index_add_(0, (i := torch.where(x[:, 0] > 0.5)[0]), m.a(x[i])).sum(),
        lambda m, x: m.a(x[(x > 0.5).nonzero()[:, 0]]).sum(),
        lambda m, x: m.a(x)[x > 0.5].mean(),
        lambda m, x: m.a(x).masked_select(x > 0.5).mean(),
        lambda m, x: m.a(x).sum() + torch.unique(x).sum(),
        lambda m, x: torch.repeat_interleave(m.a(x), x.argmax(-1), dim=0).sum(),
        lambda m, x: m.a(x).sum() * torch.bincount(x.argmax(-1)).sum(),
    ],
    ids=["where", "nonzero", "mask", "masked_select", "unique", "repeat_interleave", "bincount"],
)
def test_sizes_that_depend_on_values_are_refused_with_the_line(line: Callable[[Any, Tensor], Tensor]) -> None:
    """A sparse mixture of experts picks its rows with ``torch.where(mask)[0]``, whose size only the values tell."""
    with pytest.raises(CaptureError, match=r"at `.*test_cases_emission.py:\d+: return self.line.*depends on the values.*torch.where\(mask"):
        capture(Lines(line), (torch.rand(16, 8),))


@pytest.mark.parametrize(
    "line",
    [
        lambda m, x: m.a(x).sum() * x.max().item(),
        lambda m, x: sum(m.a(x).sum() * value for value in x[0].tolist()),
        lambda m, x: m.a(x).sum() * float(x.detach().numpy().max()),
        lambda m, x: m.a(x).sum() * len(f"{x.mean():.3f}"),
    ],
    ids=["item", "tolist", "numpy", "format"],
)
def test_values_that_are_read_are_refused_with_the_line(line: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"at `.*test_cases_emission.py:\d+: .*reads a value out of a tensor.*torch.where"):
        capture(Lines(line), (torch.rand(16, 8),))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (lambda m, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (m.a(x),)).sum(), "cond isn't an operator|torch.cond"),
        (lambda m, x: torch.sparse.mm(x.to_sparse(), m.a.weight).sum(), "makes a sparse tensor. Use dense tensors"),
        (lambda m, x: torch._foreach_mul([m.a(x)], 2.0)[0].sum() + _double(m.a(x)), "_foreach_mul_.* copy the results with copy_"),
    ],
    ids=["cond", "sparse", "foreach"],
)
def test_what_is_no_operator_on_dense_tensors_is_refused(line: Callable[[Any, Tensor], Tensor], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Lines(line), (torch.rand(16, 8),))


def _double(x: Tensor) -> Tensor:
    torch._foreach_mul_([x], 2.0)
    return x.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"])
def test_wrapped_models_are_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A model that another library parallelizes or compiles already: its wrapper isn't part of the model."""
    with pytest.raises(CaptureError, match=r"is wrapped by .*: give autopar the model inside"):
        autopar.compile(wrap(nn.Linear(8, 8)))
    with pytest.raises(CaptureError, match=r"'0' is wrapped by"):
        capture(nn.Sequential(wrap(nn.Linear(8, 8))), (torch.rand(16, 8),))


# --- what a forward writes and assigns ---


def _spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)), nn.Tanh(), nn.Linear(4, 1))


def _old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 4)), nn.Tanh(), nn.Linear(4, 1))


def _cumulative_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 1))


class Outs(nn.Module):
    """Results written to tensors that are given: a buffer, a view of it, one of another dtype, and one that forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("number", torch.zeros(8, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.empty(16, 8, dtype=x.dtype)
        with torch.no_grad():
            torch.mul(x.mean(0), 2.0, out=self.mean)
            torch.neg(x[0, :4], out=self.mean[4:])
            torch.arange(8, out=self.number)
            torch.sub(x, 1.0, out=shifted)
        return (self.linear(shifted) * self.mean * self.number).sum(1)


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 4)), nn.Tanh(), nn.Linear(4, 1))


def _pruned() -> nn.Module:
    linear = nn.Linear(8, 4)
    prune.l1_unstructured(linear, "weight", amount=0.5)
    return nn.Sequential(linear, nn.Tanh(), nn.Linear(4, 1))


MAKERS = (_spectral_norm, _old_spectral_norm, _old_weight_norm, _pruned, _cumulative_batch_norm, Outs)
WRITING = {make.__name__: make for make in MAKERS}


@pytest.mark.parametrize("name", WRITING)
def test_writes_to_buffers_are_those_of_the_model(name: str) -> None:
    """Spectral norm writes with ``normalize(..., out=buffer)``; a batch norm without momentum divides by the number of batches."""
    x = _rows()
    torch.manual_seed(0)
    expected = WRITING[name]().double()
    torch.manual_seed(0)
    model = autopar.compile(WRITING[name]().double(), (x,))
    for step in range(3):
        for each in (expected, model):
            each(x * (step + 1)).square().mean().backward()
    _compare(model, expected)


def _compare(model: nn.Module, expected: nn.Module) -> None:
    """Gradients and buffers, for as long as gradients add up."""
    parameters = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        gradient: Any = parameters[name].grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
    buffers = dict(model.named_buffers())
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-12)


def test_a_plain_tensor_that_would_be_trained_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.ones(8, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum()

    with pytest.raises(CaptureError, match=r"'weight' requires a gradient and is no parameter: make it an nn\.Parameter"):
        capture(Model(), (torch.rand(16, 8),))


# --- graphs that differ from process to process ---

KINDS = ("full", "sliding", "chunked", "linear")


class Tables(nn.Module):
    """A buffer per kind, registered and read in the order of a set."""

    def __init__(self) -> None:
        super().__init__()
        for kind in set(KINDS):
            self.register_buffer(kind, torch.arange(8.0, dtype=torch.float64) / len(kind) - ord(kind[0]))

    @torch.no_grad()
    def forward(self, x: Tensor, kind: str) -> Tensor:
        table = getattr(self, kind)[None].expand(x.shape[0], -1)
        if kind == "sliding":
            table = table * 0.5
        return table.cos()


class Kinds(nn.Module):
    """Walks over a set of names three times: in one line, in a loop of several lines in another loop, and through another module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({kind: nn.Linear(8, 8) for kind in KINDS})
        self.tables = Tables()

    def forward(self, x: Tensor) -> Tensor:
        made = {kind: x * len(kind) + x.new_tensor([float(ord(kind[0]))] * 8) for kind in set(KINDS)}
        tables = {}
        for kind in set(KINDS):
            tables[kind] = self.tables(x, kind)
        for _ in range(2):
            for kind in set(KINDS):
                y = made[kind].clone()
                y.mul_(0.1)
                if kind == "chunked":
                    y = y + 1.0
                made[kind] = y.sin() * tables[kind]
            for kind in KINDS:
                x = x + self.layers[kind](made[kind])
        return x.square().mean()


class Sums(nn.Module):
    """Adds in the order of a set, which rounds otherwise in each process."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({kind: nn.Linear(8, 8) for kind in KINDS})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layers[kind](x) for kind in set(KINDS)]).sum(0).square().mean()


class Unordered(nn.Module):
    """Registers its layers in the order of a set."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({kind: nn.Linear(8, 8) for kind in set(KINDS)})

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.layers[kind](x) for kind in KINDS), x).square().mean()


_JOB = """
import os, sys, torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import autopar
from autopar.errors import AutoparError
from tests.test_cases_emission import Kinds, Sums, Unordered, _rows

rank, x = int(sys.argv[1]), _rows()
print(autopar.plan(Kinds().double(), (x,), "2xcpu", pins={{"tp": 2}}).fingerprint)
expected = Kinds().double()
expected(x).backward()
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = autopar.compile(Kinds().double(), pins={{"tp": 2}})
loss = model(x)
loss.backward()
for name, parameter in expected.named_parameters():
    torch.testing.assert_close(dict(model.named_parameters())[name].grad.full_tensor(), parameter.grad, rtol=1e-9, atol=1e-12)
print(f"{{loss.item() - expected(x).item():.0e}}")
for make in (Sums, Unordered):
    try:
        autopar.compile(make().double(), pins={{"dp": 2}})(x)
    except AutoparError as error:
        print(f"{{type(error).__name__}}: {{error}}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What two processes of one job print, whose hashes differ."""
    folder = tmp_path_factory.mktemp("job")
    script = folder / "job.py"
    script.write_text(_JOB.format(tests=str(Path(__file__).parents[1])))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder / "store")],
            env={**os.environ, "PYTHONHASHSEED": str(rank + 1)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    return [out.splitlines() for out, _ in printed]


@pytest.mark.processes
def test_a_graph_is_the_same_in_every_process(job: list[list[str]]) -> None:
    """Published models walk over a set of their kinds of layers, whose order is that of hashes, which differ by process."""
    (first, first_loss, *_), (second, second_loss, *_) = job
    assert first == second
    assert abs(float(first_loss)) < 1e-9
    assert abs(float(second_loss)) < 1e-9


@pytest.mark.processes
def test_graphs_that_differ_by_rank_are_refused_on_all_ranks(job: list[list[str]]) -> None:
    """Another order of a sum is another function; every rank says which call differs first."""
    for printed in job:
        assert printed[2].startswith("CaptureError: the ranks capture different graphs: rank 1 has aten.")
        assert "test_cases_emission.py" in printed[2]
        assert printed[3].startswith("InputError: the ranks build different models: rank 1 has layers.")
        assert "where the first rank has layers." in printed[3]


def _on_two_ranks(rank: int) -> None:
    x = _rows()
    for make in WRITING.values():
        torch.manual_seed(0)
        expected = make().double()
        torch.manual_seed(rank)
        model = autopar.compile(make().double(), pins={"dp": 2})
        for step in range(2):
            for each in (expected, model):
                each(x * (step + 1)).square().mean().backward()
        _compare(model, expected)
    _shares_values(rank, x)
    _refuses_together(rank, x)


class Stored(nn.Module):
    """Buffers that process groups don't broadcast as they are, and a plain attribute."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("turned", torch.rand(8, 8).T)
        self.register_buffer("angles", torch.rand(4, dtype=torch.complex128))
        self.register_buffer("mask", torch.rand(8) > 0.5)
        self.scale = torch.rand(8)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_real(torch.view_as_complex((self.linear(x) @ self.turned).view(-1, 4, 2)) * self.angles).flatten(1)
        return (turned * self.scale).masked_fill(self.mask, 0.0).square().mean()


def _shares_values(rank: int, x: Tensor) -> None:
    for pins in ({"dp": 2}, {"tp": 2}):
        loss = autopar.compile(Stored(rank).double(), pins=pins)(x)
        expected = Stored(0).double()
        expected.scale = expected.scale.double()
        torch.testing.assert_close(loss, expected(x), rtol=1e-7, atol=0.0)


def _refuses_together(rank: int, x: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"rank 1 has CaptureError: .* where the first rank has|reads a value out of a tensor"):
        autopar.compile(Lines(_reads if rank else _adds).double(), pins={"dp": 2})(x)


def _adds(model: nn.Module, x: Tensor) -> Tensor:
    return model.a(x).sum()


def _reads(model: nn.Module, x: Tensor) -> Tensor:
    return model.a(x).sum() * x.max().item()


@pytest.mark.processes
def test_buffers_and_constants_are_those_of_the_first_rank(tmp_path: Path) -> None:
    spawn(2, tmp_path, _on_two_ranks)
