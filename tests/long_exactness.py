"""Every way in which attention can run on a split sequence, on every mask and number of heads, against one device.

`CASES` is the whole product; the benchmark `tests.benchmarks.long_exactness` runs all of it and prints the table of
``docs/long-sequences.md``, the tests run a part in which every value occurs.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

import autopar
from autopar.capture.export import capture
from autopar.checks.verification import ZERO_SCALE, Reference, prepare_reference, verify_against
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir.facts import Family
from autopar.ir.graph import Graph, Op
from autopar.ir.space import Space
from autopar.plans.plan import Plan
from autopar.rules.table import find_spaces
from tests.long_models import MODELS, build
from tests.planning import make_plan
from tests.zoo import Model

TOLERANCE = 1e-9

HEADS = frozenset({"h", "g", "r"})
RING, ZIGZAG, ROWS = frozenset({"ring"}), frozenset({"ring~"}), frozenset({"s"})


class Way(NamedTuple):
    """A way to run attention: what is pinned, and what of an attention each axis must split then.

    Attributes:
        kind: the column of the table.
        pins: without those of modules.
        expected: axis -> the loops of an attention of which it must split one.
        inner: ranks of a second axis of the sequence, ``cp2``, that splits heads while ``cp`` runs the ring; 1 is none.
    """

    kind: str
    pins: Mapping[str, Any]
    expected: Mapping[str, frozenset[str]]
    inner: int = 1

    @property
    def ranks(self) -> int:
        """How many ranks run it."""
        return math.prod(self.pins.get(axis, 1) for axis in ("pp", "dp", "cp", "tp")) * self.inner

    @property
    def collectives(self) -> Set[str]:
        """What the plan must exchange over ``cp`` for the attention, one of these: a ring under a causal window is a halo."""
        return {ROWS: {"all_gather"}, HEADS: {"all_to_all"}}.get(self.expected["cp"], {"ring", "halo"})

    @property
    def name(self) -> str:
        """The mesh and what is pinned beside, for messages and names of tests."""
        axes = " ".join(f"{axis}={self.pins[axis]}" for axis in ("pp", "dp", "cp", "tp") if axis in self.pins)
        how = self.pins.get("attention", "ring")
        return f"{axes}{f' cp2={self.inner}' if self.inner > 1 else ''} {'zigzag' if self.pins.get('zigzag') else how}"


def _ways() -> Iterator[Way]:
    stages = {"pp": 2, "microbatches": 2, "schedule": "1f1b"}
    kinds = {
        "ring": ({"attention": "ring", "zigzag": False}, RING),
        "zigzag ring": ({"attention": "ring", "zigzag": True}, ZIGZAG),
        "Ulysses": ({"attention": "ulysses"}, HEADS),
        "gather": ({"attention": "gather"}, ROWS),
    }
    for kind, (pins, loops) in kinds.items():
        for axes in ({"cp": 2}, {"cp": 4}, {"cp": 2, **stages}, {"cp": 2, "dp": 2}):
            yield Way(kind, {**axes, **pins}, {"cp": loops})
        yield Way("2-D", {"cp": 2, "tp": 2, **pins}, {"cp": loops, "tp": HEADS})
    for zigzag, loops in ((False, RING), (True, ZIGZAG)):
        yield Way("2-D", {"cp": 2, "zigzag": zigzag}, {"cp": loops, "cp2": HEADS}, inner=2)


WAYS: Sequence[Way] = tuple(_ways())
KINDS = tuple(dict.fromkeys(way.kind for way in WAYS))


class Case(NamedTuple):
    """A way to run the attention of a model."""

    model: str
    mask: str
    heads: str
    way: Way

    def __str__(self) -> str:
        return f"{self.model}, {self.mask}, {self.heads}, {self.way.name}"


CASES: Sequence[Case] = tuple(
    Case(model, mask, number, way)
    for model, (_, masks) in MODELS.items()
    for mask, heads in masks.items()
    for number, way in itertools.product(heads, WAYS)
)

REFUSED: Mapping[str, str] = {
    "splits heads over cp=4": "`attention=ulysses` over `cp=4` with two heads of keys and values for four of queries: 4 divides neither",
    "splits loop ring": "a ring beside split heads in T5, pinned by module: the scores of its own tokens have a trained bias",
}
"""What the message of a refused case says -> the combination, and why it can't be had."""


class Found(NamedTuple):
    """What a case came to: the largest relative error, or the refusal; and the attentions that ran otherwise, as the plan's notes say."""

    error: float | None
    refusal: str
    otherwise: tuple[str, ...]


class Subject(NamedTuple):
    """A captured model, what it computes on one device, and its attentions."""

    reference: Reference
    spaces: Mapping[str, Space]
    attentions: Sequence[Op]

    @property
    def graph(self) -> Graph:
        """The captured graph."""
        return self.reference.captured.graph


def make(model: str, mask: str, heads: str) -> Model:
    """The model and its batch, as it is captured: with capped scores by `flex_attention`, whose graph any device can run."""
    module, batch = build(model, mask, heads)
    if model == "gemma2":
        module.set_attn_implementation("flex_attention")  # type: ignore[operator]
    return module, batch


@lru_cache(maxsize=2)
def subject(model: str, mask: str, heads: str) -> Subject:
    """The model, captured and run on one device; of Gemma 2 what it computes with its own code."""
    module, batch = make(model, mask, heads)
    captured = capture(module, batch)
    if model == "gemma2":
        module.set_attn_implementation("capped")  # type: ignore[operator]
    reference = prepare_reference(module, batch, captured)
    spaces, _ = find_spaces(captured.graph)
    attentions = [op for op in captured.graph.ops if op.name in spaces and spaces[op.name].family is Family.ATTENTION]
    return Subject(reference, spaces, attentions)


def plan_case(case: Case) -> Plan:
    """The plan of a case."""
    way, cluster = case.way, Cluster.parse(f"{case.way.ranks}xcpu")
    found = subject(case.model, case.mask, case.heads)
    if way.inner == 1:
        return make_plan(found.graph, cluster, pins=way.pins)
    return make_plan(found.graph, cluster, pins={**way.pins, **_module_pins(found)}, mesh={"cp": way.pins["cp"], "cp2": way.inner})


def _module_pins(found: Subject) -> dict[str, Mapping[str, str]]:
    """The pins of modules with attention that pass keys and values along ``cp``, and split heads over ``cp2``."""
    pins = {}
    for op in found.attentions:
        heads = sorted(HEADS & set(found.spaces[op.name].loops))[0]
        pins[re.sub(r"\d+", "*", op.layer)] = {"cp": "ring", "cp2": heads}
    return pins


def amiss(case: Case, made: Plan) -> list[str]:
    """The attentions of a plan that run neither as pinned nor have a note with the reason and the line; collectives that are missing."""
    found = subject(case.model, case.mask, case.heads)
    wrong = []
    for op in found.attentions:
        if op.name not in made.placements:
            continue  # like one that is planned
        splits = dict(zip(made.mesh.names, map(str, made.placements[op.name]), strict=True))
        if all(splits[axis] in loops for axis, loops in case.way.expected.items()):
            continue
        refusal = found.spaces[op.name].facts.ring_refusal
        if not refusal or not any(op.source in note and refusal in note for note in made.notes):
            wrong.append(f"{op.name} splits {splits}")
    sent = {row.collective for row in made.traffic}
    return wrong + ([] if case.way.collectives & sent else [f"none of {sorted(case.way.collectives)} is among {sorted(sent)}"])


def check(case: Case) -> Found:
    """Plan a case, run it on all ranks and compare it with one device; AssertionError where something isn't as it must be."""
    found = subject(case.model, case.mask, case.heads)
    assert found.reference.capture_error < TOLERANCE, (case, found.reference.capture_error)
    try:
        made = plan_case(case)
    except InputError as error:
        refusal = next((text for text in REFUSED if text in str(error)), "")
        if not refusal:
            raise
        return Found(None, refusal, ())
    assert not amiss(case, made), (str(case), amiss(case, made))
    verified = verify_against(found.reference, made)
    assert verified.worst < TOLERANCE, (str(case), verified.worst)
    gradients = {f"gradient of {name}" for name in found.reference.run.gradients}
    assert gradients <= set(verified.errors), case
    return Found(verified.worst, "", tuple(note for note in made.notes if "runs otherwise" in note))


def step_in_processes(rank: int, cases: Sequence[Case]) -> None:
    """On each of as many real processes as the cases have ranks: a step of each, compared with the model's own on one device."""
    del rank
    for case in cases:
        error = _step(case)
        assert error < TOLERANCE, (str(case), error)


def _step(case: Case) -> float:
    """The largest relative error of loss and gradients of a step of the process group; AssertionError where attention runs otherwise."""
    way = case.way
    reference, batch = make(case.model, case.mask, case.heads)
    found = subject(case.model, case.mask, case.heads) if way.inner > 1 else None
    mesh = None if found is None else {"cp": way.pins["cp"], "cp2": way.inner}
    pins = way.pins if found is None else {**way.pins, **_module_pins(found)}
    model = autopar.compile(copy.deepcopy(reference), cluster=f"{way.ranks}xcpu", pins=pins, mesh=mesh)
    if case.model == "gemma2":
        reference.set_attn_implementation("capped")  # type: ignore[operator]
    losses = [outputs if isinstance(outputs, Tensor) else outputs.loss for outputs in (model(**batch), reference(**batch))]
    for loss in losses:
        loss.backward()
    made = model.plan
    attentions = [placement for name, placement in made.placements.items() if "attention" in name]
    assert attentions, case
    for placement in attentions:
        splits = dict(zip(made.mesh.names, map(str, placement), strict=True))
        assert all(splits[axis] in loops for axis, loops in way.expected.items()), (str(case), splits)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = [float((losses[0] - losses[1]).detach().abs() / losses[1].detach().abs())]
    for name, parameter in model.named_parameters():
        if name in expected:
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            scale = max(float(expected[name].abs().max()), ZERO_SCALE * largest)
            errors.append(float((gradient - expected[name]).abs().max()) / scale)
    return max(errors)
