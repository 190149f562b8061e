"""Convolutions whose positions are split: the kernel against one device, what it sends, what capture makes of models, and plans."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import autopar
from autopar.capture.export import capture
from autopar.checks import oracle, threads
from autopar.checks.verification import Reference, prepare_reference, verify_against
from autopar.cost_models import Cluster, axis_link, collective_seconds
from autopar.emit.package import make_texts
from autopar.ir import ITEMSIZE, HaloSize, Mesh, OpKind, Split, is_legal, parse_placement
from autopar.ops import comm, kernels
from autopar.ops.halo import Halo, fetch, give_back
from autopar.plans.plan import Plan
from autopar.rewrite import rewrite
from autopar.rules.table import rule
from autopar.timelines import from_chrome
from tests.planning import make_plan
from tests.processes import spawn
from tests.zoo import in_float64, labels, tokens

TOLERANCE = 1e-9
LENGTH = 16


class Case(NamedTuple):
    """A convolution over one dim."""

    size: int
    before: int
    behind: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = True


CASES = {
    "same": Case(3, 1, 1),
    "even size": Case(4, 1, 2),
    "causal, depthwise": Case(4, 3, 0, groups=8),
    "causal, dilated": Case(3, 4, 0, dilation=2, groups=2, bias=False),
    "looks ahead": Case(3, 0, 2),
    "stride": Case(3, 1, 1, stride=2),
    "stride, long": Case(8, 3, 3, stride=2, groups=4),
    "longer than a part": Case(12, 6, 5, groups=2),
    "longer than all": Case(18, 17, 0, groups=8),
    "dilated beyond a part": Case(3, 6, 6, dilation=6),
}


def _tensors(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
    """Operands on one device, a gradient of the result; the result and the operands' gradients."""
    torch.manual_seed(0)
    shapes = [(2, 8, LENGTH), (8, 8 // case.groups, case.size), *([(8,)] if case.bias else [])]
    operands = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    bias = operands[2] if case.bias else None
    padded = F.pad(operands[0], (case.before, case.behind))
    result = F.conv1d(padded, operands[1], bias, case.stride, 0, case.dilation, case.groups)
    gradient = torch.randn(result.shape, dtype=torch.float64).to(dtype)
    return operands, gradient, (result, *torch.autograd.grad(result, operands, gradient))


def _part(x: Tensor, rank: int, ranks: int) -> Tensor:
    return x.chunk(ranks, 2)[rank]


def _run(case: Case, operands: Sequence[Tensor], gradient: Tensor, ranks: int) -> list[tuple[Tensor, ...]]:
    """Per rank its part of the result and of the input's gradient, and its summands of the others."""

    def work(rank: int) -> tuple[Tensor, ...]:
        x, weight, *rest = (y.detach().requires_grad_() for y in (_part(operands[0], rank, ranks), *operands[1:]))
        arguments = (case.stride, case.before, case.behind, case.dilation, case.groups)
        result = kernels.padded_conv1d(x, weight, rest[0] if rest else None, *arguments, splits={"p0": ("cp",)})
        return result.detach(), *torch.autograd.grad(result, (x, weight, *rest), _part(gradient, rank, ranks))

    return threads.run(Mesh(("cp",), (ranks,)), work)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_is_the_convolution(case: Case, ranks: int) -> None:
    operands, gradient, expected = _tensors(case)
    results = _run(case, operands, gradient, ranks)
    for number, whole in enumerate(expected):
        parts = [result[number] for result in results]
        joined = torch.cat(parts, 2) if number < 2 else torch.stack(parts).sum(0)
        torch.testing.assert_close(joined, whole, rtol=TOLERANCE, atol=TOLERANCE)


def test_gradients_of_half_precision_are_added_in_float32() -> None:
    """An element that three ranks read has a sum of three gradients, rounded once."""
    (halo,), ones = [HaloSize(4, 4, 8)], torch.ones(1, 1, 10, dtype=torch.bfloat16)

    def work(rank: int) -> Tensor:
        # 256 + 0.75 + 0.75 is 258 in bfloat16 if it is rounded at the end, and 256 if after every sum.
        return give_back(ones * (256.0 if rank == 1 else 0.75), Halo(2, halo.before, halo.behind, comm.axis("cp")))

    middle = threads.run(Mesh(("cp",), (3,)), work)[1]
    assert middle.tolist() == [[[258.0, 258.0]]]


def test_images_are_split_along_both_dims() -> None:
    """Every rank of 2 x 2 has a quarter of the image, and also needs what is in the corner of the quarter across."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, 3, 5, dtype=torch.float64)
    whole = F.conv2d(x, weight, None, [1, 1], [1, 2])
    gradient = torch.randn_like(whole)
    (expected,) = torch.autograd.grad(whole, x, gradient)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        def quarter(y: Tensor) -> Tensor:
            return y.chunk(2, 2)[rank // 2].chunk(2, 3)[rank % 2]

        part = quarter(x.detach()).requires_grad_()
        result = kernels.convolution(part, weight, None, [1, 1], [1, 2], splits={"p0": ("a",), "p1": ("b",)})
        torch.testing.assert_close(result, quarter(whole), rtol=TOLERANCE, atol=TOLERANCE)
        return torch.autograd.grad(result, part, quarter(gradient))[0], quarter(expected)

    for part, wanted in threads.run(Mesh(("a", "b"), (2, 2)), work):
        torch.testing.assert_close(part, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("before", "behind"), [(3, 0), (0, 2), (1, 1), (5, 7), (15, 15)])
def test_what_is_sent_is_the_closed_form(ranks: int, before: int, behind: int) -> None:
    """A rank sends as many elements as the others lack, and no message without any."""

    class Counting(comm.ThreadAxis):
        sent = 0

        def send(self, x: Tensor, to: int) -> comm.Message:
            assert x.numel()
            self.sent += x.numel()
            return super().send(x, to)

    def work(rank: int) -> int:
        given = comm.axis("cp")
        assert isinstance(given, comm.ThreadAxis)
        axis = Counting(given.name, given.index, given.exchange)
        strips = fetch(torch.full((1, 1, LENGTH // ranks), 1.0), Halo(2, before, behind, axis))
        # Zeros stand beyond the ends.
        assert strips.before.sum() == min(before, rank * LENGTH // ranks)
        assert strips.behind.sum() == min(behind, (ranks - 1 - rank) * LENGTH // ranks)
        return axis.sent

    size = HaloSize(before, behind, LENGTH)
    sent = threads.run(Mesh(("cp",), (ranks,)), work)
    assert sent == [size.sent(rank, ranks) for rank in range(ranks)]
    assert max(sent) == size.most_sent(ranks)


def test_what_neighbours_can_not_give_is_not_split() -> None:
    op, operands = oracle.trace("aten.conv1d.default", torch.randn(4, 6, 16), torch.randn(6, 6, 3), None, [1], [1])
    space = rule(op, oracle.describe(operands))
    assert space is not None
    one, two = Mesh(("x",), (2,)), Mesh(("x", "y"), (2, 2))
    assert is_legal(space, parse_placement("p0"), one)
    assert not is_legal(space, parse_placement("p0~"), one), "the next tokens are on another rank"
    assert not is_legal(space, parse_placement("p0/2"), one)
    assert not is_legal(space, parse_placement("p0,p0"), two), "neighbours along one axis aren't the neighbours along two"
    assert is_legal(space, parse_placement("p0,o"), two)
    uneven, operands = oracle.trace("aten.conv1d.default", torch.randn(4, 6, 16), torch.randn(6, 6, 3), None, [1], [2])
    assert "p0" not in str(rule(uneven, oracle.describe(operands)))


# --- what models do -------------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A model of convolutions over time; `convolve` is what it does to (batch, width, tokens)."""

    def __init__(self, convolve: Callable[[nn.Conv1d, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 16), nn.Linear(16, 96)
        self.conv = nn.Conv1d(16, 16, **options)
        self.convolve = convolve

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        h = self.embedding(input_ids).transpose(1, 2)
        h = h + torch.tanh(self.convolve(self.conv, h))
        return F.cross_entropy(self.head(h.transpose(1, 2)).flatten(0, 1), labels.flatten())


FORMS: Mapping[str, tuple[Callable[[nn.Conv1d, Tensor], Tensor], Mapping[str, Any], str]] = {
    "same": (lambda conv, h: conv(h), {"kernel_size": 3, "padding": 1}, "aten.conv1d.default (1, 3)"),
    "cut": (lambda conv, h: conv(h)[..., :16], {"kernel_size": 4, "padding": 3, "groups": 16}, "autopar.padded_conv1d.default 3 0"),
    "padded": (lambda conv, h: conv(F.pad(h, (6, 0))), {"kernel_size": 4, "dilation": 2}, "autopar.padded_conv1d.default 6 0"),
    "padded and cut": (
        lambda conv, h: conv(F.pad(h, (1, 2)))[:, :, 1:17],
        {"kernel_size": 5, "padding": 1, "bias": False},
        "autopar.padded_conv1d.default 1 3",
    ),
    "cut behind other padding": (
        lambda conv, h: conv(F.pad(h[:, 8:], (0, 0, 8, 0)))[..., :16],
        {"kernel_size": 4, "padding": 3},
        "autopar.padded_conv1d.default 3 0",
    ),
    "cut behind a shift": (
        lambda conv, h: conv(F.pad(h, (-1, 1)))[..., :16],
        {"kernel_size": 4, "padding": 3},
        "autopar.padded_conv1d.default 3 0",
    ),
    "cut in front": (lambda conv, h: conv(h)[..., 3:], {"kernel_size": 4, "padding": 3}, "autopar.padded_conv1d.default 0 3"),
}


@cache
def _reference(name: str) -> Reference:
    torch.manual_seed(0)
    model, batch = MODELS[name]() if name in MODELS else _mixer(name)
    return prepare_reference(model, batch, capture(model, batch))


def _mixer(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    convolve, options, _ = FORMS[name]
    return Mixer(convolve, **options).double(), {"input_ids": tokens(), "labels": labels()}


def _plan(name: str, pins: Mapping[str, object], ranks: int) -> Plan:
    return make_plan(_reference(name).captured.graph, Cluster.parse(f"{ranks}xcpu"), pins=pins)


def _convolutions(name: str, plan: Plan) -> set[str]:
    """What the axis cp splits of the convolutions of a plan."""
    graph, axis = _reference(name).captured.graph, plan.mesh.names.index("cp")
    return {str(placement[axis]) for op, placement in plan.placements.items() if "conv1d" in graph.by_name[op].target}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_convolutions_of_all_forms_are_split(form: str, ranks: int) -> None:
    (op,) = [op for op in _reference(form).captured.graph.of_kind(OpKind.CALL) if "conv1d" in op.target]
    expected = FORMS[form][2]
    assert op.target == expected.split()[0]
    if op.target.startswith("autopar"):
        assert expected.split()[1:] == [str(amount) for amount in op.args[4:6]]
    plan = _plan(form, {"cp": ranks}, ranks)
    assert _convolutions(form, plan) == {"p0"}
    assert "halo" in {row.collective for row in plan.traffic}
    assert verify_against(_reference(form), plan).worst < TOLERANCE


@pytest.mark.parametrize(
    "convolve",
    [
        lambda conv, h: (lambda y: y[..., :16] + y.mean())(conv(h)),  # what is cut off is read too
        lambda conv, h: conv(F.pad(h, (2, 0), value=1.0))[..., 3:19],
        lambda conv, h: conv(F.pad(h, (2, 0), mode="reflect"))[..., 3:19],
        lambda conv, h: (lambda y: conv(y)[..., 3:19] + y.mean())(F.pad(h, (3, 0))),  # what is padded is read too
        lambda conv, h: conv(h)[..., :16:2].repeat_interleave(2, 2),
    ],
)
def test_other_calls_are_left_as_they_are(convolve: Callable[[nn.Conv1d, Tensor], Tensor]) -> None:
    model = Mixer(convolve, kernel_size=4, padding=3)
    captured = capture(model, {"input_ids": tokens(), "labels": labels()})
    merged = [op for op in captured.graph.of_kind(OpKind.CALL) if op.target == "autopar.padded_conv1d.default"]
    assert len(merged) < len([op for op in captured.graph.of_kind(OpKind.CALL) if "conv1d" in op.target])


def _lfm2() -> tuple[nn.Module, dict[str, Tensor]]:
    """Short convolutions, depthwise and causal, and attention with grouped heads."""
    config = transformers.Lfm2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=64,
        block_multiple_of=8,
        use_cache=False,
    )
    return in_float64(transformers.Lfm2ForCausalLM(config)), {"input_ids": tokens(), "labels": labels()}


def _canine() -> tuple[nn.Module, dict[str, Tensor]]:
    """A convolution that makes one of four tokens, and one whose padding differs at both ends."""
    config = transformers.CanineConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        local_transformer_stride=8,
        num_hash_buckets=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.CanineForTokenClassification(config)
    return in_float64(model), {"input_ids": tokens(), "labels": tokens(1) % 2}


def _whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    """Sounds, of which a convolution makes half as many positions, and an encoder of these."""
    config = transformers.WhisperConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=24,
        max_target_positions=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_features": torch.randn(4, 8, 48, generator=generator), "decoder_input_ids": tokens(), "labels": tokens(1)}
    return in_float64(model), batch


MODELS = {"lfm2": _lfm2, "canine": _canine, "whisper": _whisper}

PINS: Mapping[str, Mapping[str, object]] = {
    "cp=2": {"cp": 2},
    "cp=4": {"cp": 4},
    "beside channels": {"cp": 2, "tp": 2},
    "beside the batch, run again": {"cp": 2, "dp": 2, "recompute": "full"},
    "zigzag": {"cp": 2, "attention": "ring", "zigzag": True},
    "in stages": {"cp": 2, "pp": 2, "microbatches": 2, "schedule": "zb-h1"},
}


def _ranks(pins: Mapping[str, Any]) -> int:
    return math.prod(pins.get(axis, 1) for axis in ("pp", "cp", "dp", "tp"))


@pytest.mark.parametrize("pins", PINS.values(), ids=PINS)
def test_plans_of_a_model_are_exact(pins: Mapping[str, object]) -> None:
    plan = _plan("lfm2", pins, _ranks(pins))
    assert _convolutions("lfm2", plan) == {"p0"}
    assert verify_against(_reference("lfm2"), plan).worst < TOLERANCE


def test_a_convolution_that_reads_no_neighbours_sends_nothing() -> None:
    plan = _plan("canine", {"cp": 2}, 2)
    assert _convolutions("canine", plan) == {"p0"}
    (row,) = [row for row in plan.traffic if row.collective == "halo"]
    # One element before and two behind of 4 x 64, forward and backward; of two ranks one sends two.
    assert row.nbytes == 2 * 2 * (4 * 64) * ITEMSIZE["float32"]
    assert verify_against(_reference("canine"), plan).worst < TOLERANCE


def test_sounds_are_split_though_no_input_is_a_sequence_of_tokens() -> None:
    plan = _plan("whisper", {"cp": 4}, 4)
    assert _convolutions("whisper", plan) == {"p0"}
    graph = _reference("whisper").captured.graph
    encoder = [op for op in graph.of_kind(OpKind.CALL) if op.layer.startswith("model.encoder.layers") and op.name in plan.placements]
    assert encoder
    assert all(isinstance(plan.placements[op.name][0], Split) for op in encoder)
    assert verify_against(_reference("whisper"), plan).worst < TOLERANCE


@pytest.mark.parametrize(("pins", "copies"), [({"cp": 2}, {"halo.py", "windows.py"}), ({"dp": 2}, {"padded.py"})])
def test_packages_have_what_convolutions_need(pins: Mapping[str, object], copies: set[str]) -> None:
    captured = _reference("cut").captured
    plan = _plan("cut", pins, 2)
    texts = make_texts(*_mixer("cut"), plan, rewrite(captured, plan), captured)
    assert {name.rpartition("/")[2] for name in texts} & {"halo.py", "windows.py", "padded.py"} == copies
    assert "padded_conv1d" in texts["parallel/model.py"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plan_says_what_is_sent_and_what_it_costs(ranks: int) -> None:
    """Two elements of 4 x 32, forward and backward, of each of two layers."""
    plan = _plan("lfm2", {"cp": ranks}, ranks)
    (row,) = [row for row in plan.traffic if row.collective == "halo"]
    once = 2 * (4 * 32) * ITEMSIZE["float32"]
    assert row.nbytes == 2 * once * 2
    link = axis_link(Cluster.parse(f"{ranks}xcpu"), (ranks,), 0)
    assert row.seconds == pytest.approx(2 * 2 * collective_seconds("halo", ranks * once, ranks, link), rel=1e-9)


def _train(rank: int, folder: Path) -> None:
    reference, batch = _mixer("cut")
    model = autopar.compile(copy.deepcopy(reference), cluster="2xcpu", pins={"cp": 2})
    losses = []
    for module in (model, reference):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            loss = module(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(module(**batch).detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=TOLERANCE, atol=TOLERANCE)
    with model.trace(folder / "trace.json"):
        model(**batch).backward()


def test_real_processes_train_as_one_device_and_record_what_they_send(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    spawn(2, tmp_path, _train, tmp_path / "out")
    (trace,) = from_chrome((tmp_path / "out" / "trace.json").read_text(encoding="utf-8"))
    nbytes = 3 * (4 * 16) * ITEMSIZE["float64"]
    for rank in range(2):
        sent = [event.nbytes for event in trace.events if event.rank == rank and event.collective == "halo"]
        # In the forward the first sends three elements, in the backward the second their gradients.
        assert sent == [nbytes * (rank == 0), nbytes * (rank == 1)]
