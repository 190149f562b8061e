"""A linear head and its cross entropy in chunks: where a graph has them, that nothing changes but the memory, and how much that is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import autopar
from autopar.capture import capture
from autopar.checks.oracle import check_space, describe, trace_function
from autopar.checks.verification import prepare_reference, verify_against
from autopar.cost_models import Cluster, peak_flops
from autopar.errors import InfeasibleError, InputError, PlanError
from autopar.ops.chunked_loss import linear_cross_entropy
from autopar.plans import Pins
from autopar.plans.plan import from_json, to_json
from autopar.report import summarize
from autopar.rewrite import rewrite
from autopar.rules.chunked_loss import TARGET, chunk_losses, find_chunked_losses
from autopar.rules.table import rule
from autopar.runtime.dispatch import gather
from autopar.search import make_plan
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases

VOCABULARY = 48
CAST, SOFTCAP = (("to", torch.float64),), (("div", 3.0), ("tanh", None), ("mul", 3.0))


class LossOnly(nn.Module):
    """A model of transformers that returns its loss and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return loss


def gpt2() -> nn.Module:  # its head is tied with the embedding
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": VOCABULARY}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))


WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {**WIDTHS, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    # Between head and loss it caps the logits.
    "gemma": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)),
}


def tokens(rows: int = 8) -> dict[str, Tensor]:
    """Rows with unequal numbers of labels that don't count; one has none that does."""
    ids = torch.randint(0, VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[: rows // 3, :9] = labels[-2] = -100
    return {"input_ids": ids, "labels": labels}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LossOnly(MODELS[name]()).double()


class Sliced(nn.Module):
    """Drops the last of each sequence's logits instead of moving the labels; in float64 throughout."""

    def __init__(
        self, *, bias: bool = True, smoothing: float = 0.0, reduction: str = "mean", width: int = 16, size: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(size, width), nn.Linear(width, width), nn.Linear(width, size, bias=bias)
        self.smoothing, self.reduction = smoothing, reduction

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.layer(self.embedding(input_ids)).tanh())
        rows = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
        return F.cross_entropy(rows, labels[..., 1:].reshape(-1), label_smoothing=self.smoothing, reduction=self.reduction)


# --- the operator and its rule ----------------------------------------------------------------------------------------------------


def operands(*, bias: bool = True, rows: int = 12) -> list[Any]:
    """Hidden states, weight, bias, targets."""
    torch.manual_seed(0)
    hidden, weight, added = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((rows, 6), (8, 6), (8,)))
    target = torch.randint(0, 8, (rows,))
    target[::5] = -100
    return [hidden, weight, added if bias else None, target]


def whole_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, smoothing: float, steps: Any) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if steps == SOFTCAP:
        logits = (logits / 3.0).tanh() * 3.0
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)


SETTINGS = list(itertools.product((True, False), (1, 2), (0.0, 0.1), ((), CAST, SOFTCAP)))


@pytest.mark.parametrize("chunks", [1, 3, 5, 50])
def test_the_operator_agrees_with_head_and_loss(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.ops.chunked_loss._ALIGNED", 1)  # so that these few classes make several chunks
    for bias, reduction, smoothing, steps in SETTINGS:
        ours, theirs = operands(bias=bias), operands(bias=bias)
        loss = linear_cross_entropy(*ours, reduction, -100, smoothing, chunks, steps)
        expected = whole_loss(*theirs, ("none", "mean", "sum")[reduction], smoothing, steps)
        (3.0 * loss).backward()
        (3.0 * expected).backward()
        tree_allclose(
            [loss, *(x.grad for x in ours[:3] if x is not None)], [expected, *(x.grad for x in theirs[:3] if x is not None)], rtol=1e-12
        )


def test_the_rule_agrees_with_the_operator() -> None:
    texts = set()
    for bias, reduction, smoothing, steps in SETTINGS:
        args = (*operands(bias=bias), reduction, -100, smoothing, 3, steps)
        op, tensors = trace_function(linear_cross_entropy, TARGET, args, {})
        space = rule(op, describe(tensors))
        assert space is not None
        texts.add(str(space))
        compared = check_space(op, space, tensors, linear_cross_entropy)
        assert {"v over x=2", "n over x=4", "n,v over x=2 x y=2", "v,v over x=2 x y=2"} <= set(compared)
    assert texts == {"n i!, v* i!, v*, n -> ", "n i!, v* i!, n -> "}


def test_half_precision_is_as_exact_as_with_whole_logits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(512, 32)
    target = torch.randint(0, 512, (64,))
    steps = (("to", torch.float32),)

    def gradients(dtype: torch.dtype, chunks: int | None, scale: float) -> list[Tensor]:
        parts = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = (
            F.cross_entropy(F.linear(*parts).float() if dtype != torch.float64 else F.linear(*parts), target)
            if chunks is None
            else linear_cross_entropy(*parts, None, target, 1, -100, 0.0, chunks, steps)
        )
        (scale * loss).backward()
        return [x.grad.double() / scale for x in parts if x.grad is not None]

    exact = gradients(torch.float64, None, 1.0)
    for dtype, scale in ((torch.bfloat16, 1.0), (torch.float16, 65536.0)):
        whole, chunked = gradients(dtype, None, scale), gradients(dtype, 4, scale)
        for truth, a, b in zip(exact, whole, chunked, strict=True):
            assert (b - truth).norm() <= 1.25 * (a - truth).norm()


def test_without_gradients_none_is_computed_and_frozen_weights_get_none() -> None:
    hidden, weight, bias, target = operands()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, bias, target, chunks=2).requires_grad
    linear_cross_entropy(hidden, weight.detach(), None, target, chunks=2).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    linear_cross_entropy(hidden.detach(), weight, bias, target, chunks=2).backward()
    expected = whole_loss(hidden, weight, bias, target, "mean", 0.0, ())
    assert torch.allclose(weight.grad, torch.autograd.grad(expected, weight)[0])


def test_what_it_cannot_do_is_refused() -> None:
    hidden, weight, bias, target = operands()
    loss = linear_cross_entropy(hidden, weight, bias, target, chunks=2)
    with pytest.raises(InputError, match="those of a loss that is computed in chunks can't: pin loss_chunks=1"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    target[0] = 8
    with pytest.raises(IndexError, match="Target 8 is out of bounds"):
        linear_cross_entropy(hidden, weight, bias, target, chunks=2)


def test_a_batch_without_a_label_is_what_it_is_to_torch() -> None:
    hidden, weight, bias, target = operands()
    loss = linear_cross_entropy(hidden, weight, bias, torch.full_like(target, -100), chunks=2)
    loss.backward()
    assert loss.isnan()
    assert (hidden.grad == 0).all()


def test_classes_that_are_masked_out_and_large_logits_are_what_they_are_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.ops.chunked_loss._ALIGNED", 1)
    for dtype, scale in ((torch.float64, 1.0), (torch.float32, 1e4)):
        ours, theirs = ([x.detach().to(dtype).requires_grad_() for x in operands()[:3]] for _ in range(2))
        target = operands()[3] % 4 + 4
        target[::5] = -100
        for hidden, _, bias in (ours, theirs):
            with torch.no_grad():
                bias[:4] = -torch.inf  # all classes of the first chunks
                hidden *= scale
        loss = linear_cross_entropy(*ours, target, chunks=4)
        expected = F.cross_entropy(F.linear(*theirs), target)
        for value in (loss, expected):
            value.backward()
        # The gradient of a class without a chance is zero.
        tree_allclose([loss, *(x.grad for x in ours)], [expected, *(x.grad for x in theirs)], rtol=1e-12 if scale == 1.0 else 1e-5)


# --- where a graph has them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "moves", "steps"),
    [
        ("gpt2", ["aten.reshape.default"], (("to", "float32"),)),
        ("llama", ["aten.reshape.default"], (("to", "float32"),)),
        ("gemma", ["aten.reshape.default"], (("div", 5.0), ("tanh", None), ("mul", 5.0), ("to", "float32"))),
        ("sliced", ["aten.slice.Tensor", "aten.reshape.default"], ()),
    ],
)
def test_models_that_return_their_loss_alone_have_one(name: str, moves: list[str], steps: tuple[tuple[str, Any], ...]) -> None:
    model = Sliced().double() if name == "sliced" else build(name)
    graph = capture(model, tokens()).graph
    losses = find_chunked_losses(graph)
    (loss,) = losses.found
    assert not losses.reasons
    assert [graph.by_name[move].target for move in loss.moves] == moves
    chunked = chunk_losses(graph, losses.found, 4)
    (op,) = (op for op in chunked.ops if op.target == TARGET)
    assert op.args[-2:] == (4, steps)
    assert op.layer.endswith("head")
    # No tensor of the vocabulary's size is left but parameters.
    assert not any(op.operands and VOCABULARY in tensor.shape for op in chunked.ops for tensor in op.results)


class Other(nn.Module):
    """Heads and losses that can't be computed in chunks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head, self.weight, self.kind = nn.Linear(8, 8), nn.Parameter(torch.rand(8)), kind

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.head(x)
        if self.kind == "classes":
            return F.cross_entropy(logits, y, self.weight.detach())
        if self.kind == "none":
            return F.cross_entropy(logits, y, reduction="none").mean()
        if self.kind == "read":
            return F.cross_entropy(logits, y) + logits.logsumexp(-1).mean()
        if self.kind == "between":
            return F.cross_entropy(logits.relu(), y)
        if self.kind == "images":
            return F.cross_entropy(logits[None].transpose(1, 2), y[None])
        if self.kind == "probabilities":
            return F.cross_entropy(logits, logits.detach().softmax(-1))
        return F.cross_entropy(logits, y), logits


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("classes", "it has weights of classes"),
        ("none", 'its reduction is "none"'),
        ("read", "aten.logsumexp.default reads the logits too"),
        ("between", "aten.relu.default makes what it reads, not a linear head"),
        ("images", "one class per token are needed"),
        ("probabilities", "one class per token are needed"),
        ("returned", "the model returns the logits, or what they are made into: return the loss alone"),
    ],
)
def test_others_are_left_whole_and_a_pin_says_why(kind: str, reason: str) -> None:
    batch = (torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))
    assert not find_chunked_losses(capture(Other(kind), batch).graph).found
    with pytest.raises(InputError, match="pin loss_chunks=2: no loss of the model can be computed in chunks: ") as caught:
        autopar.plan(Other(kind), batch, "1xcpu", pins={"loss_chunks": 2})
    assert reason in str(caught.value)
    assert "test_chunked_loss.py:" in str(caught.value)  # the user's line
    assert autopar.plan(Other(kind), batch, "1xcpu").loss_chunks == 1


# --- plans --------------------------------------------------------------------------------------------------------------------------

PINS: list[tuple[str, Mapping[str, object], str]] = [
    ("1xcpu", {}, "-"),
    ("2xcpu", {"dp": 2}, "n"),
    ("2xcpu", {"tp": 2, "vocabulary": True}, "v"),
    ("2xcpu", {"dp": 2, "fsdp": True}, "n"),
    ("2xcpu", {"cp": 2}, "n/8"),
    ("4xcpu", {"dp": 2, "tp": 2, "vocabulary": True, "microbatches": 2, "recompute": "full"}, "n,v"),
    ("2xcpu", {"pp": 2, "microbatches": 4, "schedule": "zb-h1"}, "-"),
]


@pytest.mark.parametrize("name", MODELS)
def test_plans_in_chunks_are_exact(name: str) -> None:
    model, batch = build(name), tokens()
    captured = capture(model, batch)
    reference = prepare_reference(model, batch, captured)
    for cluster, pins, placement in PINS:
        plan = make_plan(captured.graph, Cluster.parse(cluster), pins=Pins.parse({**pins, "loss_chunks": 3}))
        assert plan.loss_chunks == 3
        (parts,) = (parts for op, parts in plan.placements.items() if op.startswith("cross_entropy"))
        assert ",".join("-" if part is None else str(part) for part in parts) == placement, pins
        assert from_json(to_json(plan)) == plan
        assert "in 3 chunks" in summarize(plan)
        verify_against(reference, plan).check()


@pytest.mark.parametrize("options", [{}, {"bias": False, "smoothing": 0.1}, {"reduction": "sum"}])
def test_slices_biases_and_sums_are_exact(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, batch = Sliced(**options).double(), tokens()
    for cluster, pins in (("4xcpu", {"dp": 2, "tp": 2, "vocabulary": True}), ("2xcpu", {"pp": 2, "microbatches": 4, "schedule": "gpipe"})):
        plan = autopar.plan(model, batch, cluster, pins={**pins, "loss_chunks": 5})
        autopar.verify(model, batch, plan).check()


def test_the_program_can_be_read() -> None:
    model, batch = build("gpt2"), tokens()
    plan = autopar.plan(model, batch, "2xcpu", pins={"tp": 2, "vocabulary": True, "loss_chunks": 3})
    code = rewrite(capture(model, batch), plan).module.code
    (line,) = (line for line in code.splitlines() if "linear_cross_entropy(" in line)
    assert "None, view_25, 1, -100, 0.0, 3, (('to', torch.float32),), splits = {'v': ('tp',)})" in line


def test_chunks_in_a_plan_of_a_model_without_such_a_loss_are_refused() -> None:
    batch = (torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))
    plan = replace(autopar.plan(Other("returned"), batch, "1xcpu"), loss_chunks=2)
    with pytest.raises(PlanError, match=r"plan\.loss_chunks is 2, but no loss of the model can be computed in chunks: the model returns"):
        rewrite(capture(Other("returned"), batch), plan)


def test_costs_count_the_product_again_and_the_chunk() -> None:
    torch.manual_seed(0)
    model, batch = Sliced(size=2**16, width=64).bfloat16(), tokens(64)
    whole, *chunked = (autopar.plan(model, batch, "1xH100", pins={"loss_chunks": n, "recompute": "none"}) for n in (1, 8, 16))
    tokens_left, points = 64 * 15, 64 * 15 * 2**16
    # Logits in bfloat16, and in float32 for the loss.
    assert chunked[0].memory.workspace - chunked[1].memory.workspace == 6 * (points // 8 - points // 16)
    assert whole.memory.total - chunked[0].memory.total > 2 * 2 * points
    # Instead of the logarithms of all probabilities one number per token is saved, and the hidden states that the slice left.
    saved = whole.memory.activations - 2 * points + 4 * tokens_left + 2 * 64 * tokens_left
    assert abs(chunked[0].memory.activations - saved) < 16
    # The backward makes three products of the head's size for the forward's one, and passes over the logits as often.
    with torch.device("meta"):
        wide = Sliced(size=2**17, width=2048).bfloat16()
    seconds = autopar.plan(wide, batch, "1xH100", pins={"loss_chunks": 8, "recompute": "none"}).seconds
    device = Cluster.parse("1xH100").machine.device
    product = 2 * tokens_left * 2**17 * 2048 / (device.matmul_efficiency * peak_flops(device, "bfloat16"))
    assert seconds.backward - seconds.forward == pytest.approx(2 * product, rel=0.1)


def test_the_search_chunks_where_memory_is_short_and_says_where_it_cannot() -> None:
    torch.manual_seed(0)
    model, batch = Sliced(size=2**15, width=16).double(), tokens(32)
    cluster = Cluster.parse("1xcpu")
    assert autopar.plan(model, batch, cluster).loss_chunks == 1
    whole = autopar.plan(model, batch, cluster, pins={"microbatches": 1, "loss_chunks": 1})
    lean = autopar.plan(model, batch, cluster, pins={"microbatches": 1, "loss_chunks": 8})
    short = cluster.with_memory((whole.memory.total + lean.memory.total) // 2)
    # Nothing fits without chunks.
    plan = autopar.plan(model, batch, short, pins={"microbatches": 1})
    assert plan.loss_chunks == 8
    assert plan.memory.total < short.machine.device.memory_bytes < whole.memory.total
    # Micro-batches would do as well, but for a higher price; what isn't taken is among the candidates.
    plan = autopar.plan(model, batch, short)
    other = plan.proof.candidates[-1]
    assert other.name.startswith("logits")
    assert other.step_seconds is not None
    assert other.step_seconds >= plan.seconds.step
    with pytest.raises(InfeasibleError, match="no plan fits"):
        autopar.plan(model, batch, short, pins={"microbatches": 1, "loss_chunks": 1})


class Both(Sliced):
    """Returns its logits beside the loss."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.layer(self.embedding(input_ids)).tanh())
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1)), logits


def test_logits_that_are_returned_are_noted_where_they_matter() -> None:
    batch = tokens(32)
    model = Both(size=2**15).double()
    small, large = (Cluster.parse("1xcpu").with_memory(nbytes) for nbytes in (3 * 10**9, 10**12))
    note = autopar.plan(model, batch, small).notes[-1]
    assert note.startswith("the logits stay in memory whole, up to 67.1 MB over all ranks: the model returns the logits, or what they are")
    assert "test_chunked_loss.py:" in note
    assert not autopar.plan(model, batch, large).notes
    with pytest.raises(
        InfeasibleError, match=r"The logits take up to 67.1 MB .* can't be computed in chunks: the model returns the logits"
    ):
        autopar.plan(model, batch, small.with_memory(10**8), pins={"microbatches": 1})


# --- memory that a step needs -----------------------------------------------------------------------------------------------------


def peak_nbytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Bytes allocated at the peak of a step, beyond those before it; counted by torch's allocator."""
    model(**batch).backward()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**batch).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_step_is_what_was_predicted(dtype: torch.dtype) -> None:
    size, batch = 2**16, tokens(16)
    logits_nbytes = 16 * 15 * size * dtype.itemsize
    peaks = {}
    for chunks in (1, 8):
        torch.manual_seed(0)
        model = autopar.compile(Sliced(size=size, width=16).to(dtype), batch, cluster="1xcpu", pins={"loss_chunks": chunks})
        memory = model.plan.memory
        predicted = memory.total - memory.parameters - memory.optimizer - memory.buffers
        peaks[chunks] = peak_nbytes(model, batch)
        if chunks > 1:
            assert 0.6 * predicted < peaks[chunks] < 1.4 * predicted
    # The logits, what the loss saves of them, and their gradient.
    assert peaks[1] > 3 * logits_nbytes
    assert peaks[8] < 0.7 * logits_nbytes + memory.gradients


# --- two processes ----------------------------------------------------------------------------------------------------------------

CASES: list[Case] = []


def case(function: Case) -> Case:
    """Mark a function that both ranks run."""
    CASES.append(function)
    return function


@case
def trains_as_one_device() -> None:
    """Steps of an optimizer over every split of the loss end with the parameters of one device, also after a call without gradients."""
    for pins in (
        {"dp": 2},
        {"tp": 2, "vocabulary": True},
        {"dp": 2, "fsdp": True},
        {"pp": 2, "microbatches": 4},
        {"dp": 2, "microbatches": 2},
    ):
        torch.manual_seed(0)
        expected = Sliced(smoothing=0.1)
        model = Sliced(smoothing=0.1)
        model.load_state_dict(expected.state_dict())
        compiled = autopar.compile(model, tokens(), pins={**pins, "loss_chunks": 3})
        assert compiled.plan.loss_chunks == 3
        ours, theirs = (torch.optim.AdamW(trained.parameters(), lr=1e-2) for trained in (compiled, expected))
        for _ in range(3):
            for trained, optimizer in ((compiled, ours), (expected, theirs)):
                optimizer.zero_grad()
                (2.0 * trained(**tokens())).backward()
                optimizer.step()
        with torch.no_grad():
            tree_allclose(compiled(**tokens(4)), expected(**tokens(4)), rtol=1e-9)
        found = {name: gather(parameter.detach()) for name, parameter in compiled.named_parameters()}
        tree_allclose(found, {name: parameter.detach() for name, parameter in expected.named_parameters()}, rtol=1e-9)


@case
def later_programs_without_a_loss_run() -> None:
    """A call that returns logits has whole ones, whatever the first program did."""

    class Either(Sliced):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.head(self.embedding(input_ids)) if labels is None else super().forward(input_ids, labels)

    expected = Either()
    model = Either()
    model.load_state_dict(expected.state_dict())
    compiled = autopar.compile(model, tokens(), pins={"tp": 2, "vocabulary": True, "loss_chunks": 4})
    tree_allclose(compiled(tokens()["input_ids"]), expected(tokens()["input_ids"]), rtol=1e-9)
    tree_allclose(compiled(**tokens()), expected(**tokens()), rtol=1e-9)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), CASES)


@pytest.mark.processes
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_two_processes(function: Case, outcomes: Outcomes) -> None:
    outcomes.check(function.__name__)
