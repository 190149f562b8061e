"""Attention on split sequences against one device: a part of `tests.long_exactness.CASES` in which every value occurs, and odd calls."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import autopar
from autopar.capture.export import capture
from autopar.checks.verification import prepare_reference, verify_against
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.plans.plan import Plan
from autopar.search.planner import make_plan as search_plan
from tests.long_exactness import CASES, KINDS, TOLERANCE, WAYS, Case, amiss, check, plan_case
from tests.long_exactness import subject as captured
from tests.long_models import HEADS as NUMBERS
from tests.long_models import MASKS, MODELS, SEQ, build, labels, packing, padding, tokens
from tests.planning import make_plan
from tests.processes import spawn
from tests.zoo import ZOO, Model

SUBJECTS: Sequence[tuple[str, str, str]] = (
    ("llama", "causal", "GQA"),
    ("plain", "bidirectional", "MQA"),
    ("mistral", "window", "GQA"),
    ("bert", "padded", "MHA"),
    ("gpt2", "packed", "MHA"),
    ("gemma2", "padded", "GQA"),
    ("modernbert", "window", "MHA"),
    ("t5", "bidirectional", "MHA"),
    ("mistral", "packed", "MQA"),
    ("plain", "causal", "MQA"),
)
"""Model, mask and heads of the sample; each is run in every fourth way."""

SAMPLE = {subject: [Case(*subject, way) for way in WAYS[number % 4 :: 4]] for number, subject in enumerate(SUBJECTS)}


@pytest.mark.parametrize("subject", SUBJECTS, ids=" ".join)
def test_attention_on_split_sequences_is_exact(subject: tuple[str, str, str]) -> None:
    for case in SAMPLE[subject]:
        check(case)


def test_the_sample_has_every_value() -> None:
    cases = [case for sample in SAMPLE.values() for case in sample]
    assert all(case in CASES for case in cases)
    assert {case.model for case in cases} == set(MODELS)
    assert {case.mask for case in cases} == set(MASKS)
    assert {case.heads for case in cases} == set(NUMBERS)
    assert {case.way.name for case in cases} == {way.name for way in WAYS}
    assert {case.way.kind for case in cases} == set(KINDS)


def test_the_product_is_whole() -> None:
    """Every kind, mask and number of heads together; four ranks can't split the heads of Ulysses on GQA."""
    assert {(case.way.kind, case.mask, case.heads) for case in CASES} == {(k, m, h) for k in KINDS for m in MASKS for h in NUMBERS}
    assert {case.way.ranks for case in CASES} == {2, 4}


def splits_of(plan: Plan) -> set[str]:
    """What each attention splits, over all axes."""
    return {"/".join(map(str, placement)) for name, placement in plan.placements.items() if "attention" in name}


class Odd:
    """A model and a batch that aren't in the product: captured, run on one device, planned and verified."""

    def __init__(self, model: Model) -> None:
        module, batch = model
        self.captured = capture(module, batch)
        self.reference = prepare_reference(module, batch, self.captured)

    def plan(self, **pins: Any) -> Plan:
        ranks = math.prod(pins.get(axis, 1) for axis in ("pp", "dp", "cp", "tp"))
        return make_plan(self.captured.graph, Cluster.parse(f"{ranks}xcpu"), pins=pins)

    def splits(self, plan: Plan) -> set[str]:
        return splits_of(plan)

    def verify(self, plan: Plan) -> None:
        assert self.reference.capture_error < TOLERANCE
        assert verify_against(self.reference, plan).worst < TOLERANCE


def _shorter(model: Model, length: int) -> Model:
    module, batch = model
    return module, {name: x[:, :length].contiguous() for name, x in batch.items()}


def test_rows_that_no_axis_can_cut_are_refused_or_noted() -> None:
    """Such attention would run whole, or split by heads, whatever is pinned."""
    odd = Odd(_shorter(build("llama", "padded", "GQA"), 15))
    for attention in ("ring", "ulysses", "gather"):
        with pytest.raises(InputError, match=r"its 15 rows can't be cut into 2 equal pieces\); pad the sequence to a multiple of 2"):
            odd.plan(cp=2, attention=attention)
    (note,) = [note for note in odd.plan(cp=2).notes if "runs otherwise" in note]
    assert "modeling_llama.py" in note
    assert note.endswith("runs otherwise than pinned (cp=2), since its 15 rows can't be cut into 2 equal pieces")
    even = Odd(_shorter(build("llama", "padded", "GQA"), 14))
    with pytest.raises(InputError, match=r"its 14 rows can't be cut into 4 equal pieces, two for each rank\); pad .* multiple of 4"):
        even.plan(cp=2, zigzag=True)
    plan = even.plan(cp=2, attention="ring")
    assert even.splits(plan) == {"ring"}
    assert not [note for note in plan.notes if "runs otherwise" in note]
    even.verify(plan)


class Extra(nn.Module):
    """Causal attention on tokens, and a further input whose dim 0 is the sequence; or on features that have the sequence first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.tokens, self.positions = nn.Embedding(64, 32), nn.Embedding(64, 32)
        self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, tokens: Tensor, extra: Tensor) -> Tensor:
        x = tokens.transpose(0, 1) if self.kind == "first" else self.tokens(tokens)
        if self.kind in ("positions", "table"):
            x = x + (self.positions(extra) if self.kind == "positions" else extra)
        q, k, v = self.qkv(x).unflatten(2, (12, 8)).transpose(1, 2).chunk(3, 1)
        mask = extra if self.kind == "mask" else None
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        logits: Tensor = self.head(mixed.transpose(1, 2).flatten(2))
        return (logits.square().sum(2) * extra[:SEQ, 0] if self.kind == "first" else logits.square()).mean()


def _extra(kind: str) -> Model:
    torch.manual_seed(0)
    extra = {
        "positions": torch.arange(SEQ).flip(0),
        "table": torch.randn(SEQ, 32, dtype=torch.float64),
        "mask": torch.rand(SEQ, SEQ) < 0.5,
        "first": torch.randn(SEQ, 1, dtype=torch.float64),
    }[kind]
    first = torch.randn(SEQ, 2, 32, dtype=torch.float64) if kind == "first" else tokens()
    return Extra(kind).double(), {"tokens": first, "extra": extra}


@pytest.mark.parametrize("kind", ["positions", "table", "mask"])
def test_an_input_of_one_row_per_position_is_no_batch(kind: str) -> None:
    """The sequence would count as the batch, and cp would split nothing."""
    module, batch = _extra(kind)
    odd = Odd((module, {**batch, "tokens": tokens()}))
    for pins, expected in (({"cp": 2, "attention": "ring"}, "ring"), ({"cp": 2, "attention": "gather"}, "s"), ({"dp": 2}, "b")):
        plan = odd.plan(**pins)
        assert {splits.rstrip("~") for splits in odd.splits(plan)} == {expected}
        odd.verify(plan)


class Tables(nn.Module):
    """Causal attention on tokens that tables of one row per position turn, of which there are more than inputs of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.qkv = nn.Embedding(64, 32), nn.Linear(32, 96)

    def forward(self, cos: Tensor, sin: Tensor, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        q, k, v = self.qkv(x * cos + x.roll(1, 2) * sin).unflatten(2, (12, 8)).transpose(1, 2).chunk(3, 1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()


def test_tables_may_come_before_tokens_and_outnumber_them() -> None:
    torch.manual_seed(0)
    cos, sin = torch.randn(2, SEQ, 32, dtype=torch.float64)
    odd = Odd((Tables().double(), {"cos": cos, "sin": sin, "tokens": tokens()}))
    for pins, expected in (({"cp": 2, "attention": "ring"}, "ring"), ({"dp": 2}, "b")):
        plan = odd.plan(**pins)
        assert {splits.rstrip("~") for splits in odd.splits(plan)} == {expected}
        odd.verify(plan)


def test_a_sequence_that_comes_first_is_noted() -> None:
    odd = Odd(_extra("first"))
    (note,) = odd.plan(cp=2).notes
    assert note.endswith("runs otherwise than pinned (cp=2), since its rows are taken for the batch, as they come from dim 0 of an input")
    with pytest.raises(InputError, match=r"taken for the batch.*; pass inputs whose dim 0 is the batch"):
        odd.plan(cp=2, attention="ring")
    plan = odd.plan(cp=2, attention="ulysses")
    assert odd.splits(plan) == {"h"}
    odd.verify(plan)


def _embedded(model: Model) -> Model:
    module, batch = model
    embeddings = module.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    return module, {"inputs_embeds": embeddings.detach().requires_grad_(), **{k: x for k, x in batch.items() if k != "input_ids"}}


def test_embeddings_in_the_place_of_tokens_are_a_sequence() -> None:
    """No integer says so where labels are shifted by slices: it is known from the attention."""
    odd = Odd(_embedded(build("llama", "causal", "GQA")))
    for attention, expected in (("ring", {"ring~"}), ("gather", {"s"}), ("ulysses", {"g"})):
        plan = odd.plan(cp=2, attention=attention)
        assert odd.splits(plan) == expected
        odd.verify(plan)


def test_heads_of_a_mask_with_four_dims_are_no_sequence() -> None:
    module, batch = build("llama", "causal", "GQA")
    mask = packing() & torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    odd = Odd((module, {**batch, "attention_mask": mask.expand(-1, 4, -1, -1).contiguous()}))
    for pins, expected in (
        ({"cp": 2, "attention": "ulysses"}, {"g"}),
        ({"cp": 2, "attention": "gather"}, {"s"}),
        ({"cp": 2, "tp": 2, "attention": "ring"}, {"ring/g"}),
    ):
        plan = odd.plan(**pins)
        assert odd.splits(plan) == expected
        odd.verify(plan)


def test_tp_and_ulysses_split_groups_and_queries_of_a_group() -> None:
    """Two groups of two heads on four ranks, of which one axis splits the groups, the other the queries of each."""
    odd = Odd(build("llama", "causal", "GQA"))
    plan = odd.plan(cp=2, tp=2, attention="ulysses")
    assert odd.splits(plan) <= {"r/g", "g/r"}
    odd.verify(plan)
    with pytest.raises(InputError, match=r"splits heads over cp=4 beside tp=2, but .* has heads g=2 and r=2"):
        odd.plan(cp=4, tp=2, attention="ulysses")


def test_heads_of_a_fused_projection_split_where_one_head_has_the_keys() -> None:
    """Falcon cuts its heads out of one product, so that no weight says that they are features."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True, new_decoder_architecture=False
    )
    model = transformers.FalconModel(config).double().eval()
    odd = Odd((model, {"input_ids": tokens()}))
    plan = odd.plan(cp=2, attention="ulysses")
    assert odd.splits(plan) == {"r"}
    odd.verify(plan)


def test_heads_of_transposed_weights_split() -> None:
    """Falcon's products read ``weight.T``, whose dims are features like those of the weight; keys and values are repeated for all heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2}
    config = transformers.FalconConfig(vocab_size=64, new_decoder_architecture=True, **sizes)
    odd = Odd((transformers.FalconModel(config).double().eval(), {"input_ids": tokens()}))
    for pins in ({"cp": 4, "attention": "ulysses"}, {"tp": 2}):
        plan = odd.plan(**pins)
        assert odd.splits(plan) == {"h"}
        odd.verify(plan)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_nothing_but_padding(side: str) -> None:
    module, batch = build("mistral", "padded", "GQA")
    mask = padding(side=side)
    mask[1] = 0
    odd = Odd((module, {**batch, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}))
    for pins in ({"cp": 4, "attention": "ring", "zigzag": True}, {"cp": 2, "attention": "ulysses"}, {"cp": 2, "attention": "gather"}):
        odd.verify(odd.plan(**pins))


def test_zigzag_alone_pins_a_ring() -> None:
    """Gathered keys and values may be cheaper, but aren't what is pinned."""
    odd = Odd(build("llama", "causal", "GQA"))
    for axes in ({"cp": 2}, {"cp": 2, "dp": 2, "recompute": "full"}):
        assert {splits.rpartition("/")[2] for splits in odd.splits(odd.plan(**axes, zigzag=True))} == {"ring~"}
    for attention in ("gather", "ulysses"):
        with pytest.raises(InputError, match=f"zigzag=True and attention={attention} contradict each other"):
            odd.plan(cp=2, zigzag=True, attention=attention)


def test_pins_of_attention_without_an_axis_of_the_sequence_are_refused_or_noted() -> None:
    odd = Odd(build("llama", "causal", "GQA"))
    for pins in ({"tp": 2, "attention": "ring"}, {"dp": 2, "zigzag": True}, {"cp": 1, "tp": 2, "attention": "gather"}):
        with pytest.raises(InputError, match=r"no axis splits the sequence \(.*\); pin cp=N beside it, or leave it out"):
            odd.plan(**pins)
    graph = odd.captured.graph
    (note,) = [note for note in make_plan(graph, Cluster.parse("2xcpu"), pins={"attention": "ulysses"}).notes if note.startswith("pin")]
    assert note == "pin attention=ulysses has no effect, as no axis splits the sequence; cp=N splits it over N ranks"
    scans = capture(*ZOO["lstm"]())
    with pytest.raises(InputError, match=r"no attention of this model can be split so \(there is none that is one operator"):
        make_plan(scans.graph, Cluster.parse("2xcpu"), pins={"cp": 2, "attention": "ulysses"})


def test_dropped_weights_are_not_passed_around() -> None:
    torch.manual_seed(0)
    module, batch = build("llama", "causal", "GQA")
    for layer in module.model.layers:  # type: ignore[union-attr, operator]
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(InputError, match="it drops weights at random"):
        make_plan(capture(module, batch).graph, Cluster.parse("2xcpu"), pins={"cp": 2, "attention": "ring"})
    evaluated = Odd((module.eval(), batch))
    plan = evaluated.plan(cp=2, attention="ring", zigzag=True)
    assert evaluated.splits(plan) == {"ring~"}
    evaluated.verify(plan)


def test_a_plan_that_is_made_again_has_its_notes_once() -> None:
    """Where gathers begun ahead don't fit, the search starts again without them; all attention of T5 with a bias is on one line."""
    graph, cluster = captured("t5", "bidirectional", "MHA").graph, Cluster.parse("2xcpu")
    pins = {"cp": 2, "attention": "ring", "zero": 3}
    memory = make_plan(graph, cluster, pins=pins).memory
    plans = (
        make_plan(graph, cluster.with_memory(memory.reserved + (memory.total - memory.reserved) * percent // 100), pins=pins)
        for percent in range(95, 80, -2)
    )
    again = next(plan for plan in plans if any("prefetch=0" in note for note in plan.notes))
    assert len([note for note in again.notes if "runs otherwise" in note]) == 1


def _call_otherwise(rank: int) -> None:
    """Embeddings that want a gradient, then calls of another length, fewer rows and another mask, of one compiled model.

    Later calls are split as pinned where their length can be: 12 tokens can, 13 can't.
    """
    reference, batch = _embedded(build("llama", "padded", "GQA"))
    model = autopar.compile(copy.deepcopy(reference), cluster="2xcpu", pins={"cp": 2, "attention": "ring", "zigzag": True})
    passed = {"input_ids": tokens(rows=1), "labels": labels(rows=1), "attention_mask": padding(rows=1, side="left")}
    calls = [batch, *({name: x[:, :length].contiguous() for name, x in passed.items()} for length in (13, 12))]
    plans: list[Plan] = []

    def plan(*arguments: Any, **options: Any) -> Plan:
        plans.append(search_plan(*arguments, **options))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autopar.api.make_plan", plan)
        for call in calls:
            results = [_step(module, call) for module in (model, reference)]
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    if rank == 0:
        assert [splits_of(plan) == {"ring~"} for plan in plans] == [True, False, True]
        told = ["planned without the pins cp=2, attention=ring, zigzag=true" in " ".join(plan.notes) for plan in plans]
        assert told == [False, True, False]


def _step(module: torch.nn.Module, call: Mapping[str, Tensor]) -> list[Tensor]:
    """Loss, logits, and the gradients of inputs and of the head."""
    own = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in call.items()}
    outputs = module(**own)
    outputs.loss.backward()
    head = module.get_parameter("lm_head.weight")
    gradient = head.grad.full_tensor() if hasattr(head.grad, "full_tensor") else head.grad  # type: ignore[union-attr, operator]
    module.zero_grad()
    return [outputs.loss.detach(), outputs.logits.detach(), gradient, *(x.grad for x in own.values() if x.grad is not None)]


def test_real_processes_make_the_same_step(tmp_path: Path) -> None:
    spawn(2, tmp_path, _call_otherwise)


def test_a_wrong_kind_is_seen() -> None:
    """The check of which kind runs can fail: what one way makes is amiss for another."""
    ways = {way.name: way for way in WAYS}
    ring, gather, zigzag = (Case("plain", "causal", "GQA", ways[name]) for name in ("cp=2 ring", "cp=2 gather", "cp=2 zigzag"))
    assert not amiss(ring, plan_case(ring))
    assert amiss(ring, plan_case(gather))
    assert amiss(zigzag, plan_case(ring))
    assert amiss(gather, plan_case(zigzag))
