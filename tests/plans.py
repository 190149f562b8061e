"""Plans made by hand, for tests of what reads plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autopar.ir.layout import Mesh, Split, parse_layout
from autopar.ir.precision import Precision
from autopar.plans import OUTSIDE, CostRow, Phase, Purpose
from autopar.plans.plan import BlockChoice, Candidate, Group, Memory, Pipeline, Plan, Proof, RepeatedWork, Unruled


def make_plan() -> Plan:
    """A plan of twelve layers on two axes that uses every field but those of pipelines."""
    return Plan(
        model="GPT2LMHeadModel",
        fingerprint="0123abcd",
        cluster="1x8xh100",
        precision=Precision.parse("mixed"),
        mesh=Mesh(("dp", "tp"), (2, 4)),
        pipeline=Pipeline(ranks=1, schedule="gpipe", chunks=1, microbatches=1, blocks=_make_blocks([0] * 14, "none"), travel={}),
        inputs={"input_ids": "int64[8, 128]", "labels": "int64[8, 128]"},
        layouts={
            "p_transformer_h_0_mlp_c_fc_weight": parse_layout("S0,S1"),
            "p_transformer_h_0_attn_c_attn_weight": parse_layout("R,S1/3"),
            "p_transformer_wte_weight": parse_layout("R,S0"),
            "input_ids": parse_layout("S0,R"),
        },
        outputs=(parse_layout("R,R"), parse_layout("S0,R")),
        placements={"addmm": (Split("b"), Split("o", 3)), "view": (None, Split("o"))},
        batch_axes=("dp",),
        bucket_nbytes=25_000_000,
        prefetch=1,
        costs=_make_rows(),
        memory=Memory(
            parameters=1_000_000_000,
            gradients=1_000_000_000,
            optimizer=4_000_000_000,
            activations=12_345_678_901,
            buffers=0,
            workspace=250_000_000,
            reserved=1_000_000_000,
            budget=80_000_000_000,
        ),
        groups=(
            Group(
                "transformer.h.*",
                tuple(f"transformer.h.{number}" for number in range(12)),
                {
                    "p_transformer_h_0_mlp_c_fc_weight": "transformer.h.0.mlp.c_fc.weight",
                    "p_transformer_h_0_attn_c_attn_weight": "transformer.h.0.attn.c_attn.weight",
                },
                {"dp": "batch", "tp": "heads, ffn"},
                900_000_000,
                12_000_000_000,
            ),
            Group(
                OUTSIDE,
                (),
                {"p_transformer_wte_weight": "transformer.wte.weight"},
                {"dp": "nothing", "tp": "vocabulary"},
                100_000_000,
                345_678_901,
            ),
        ),
        proof=Proof(
            objective_ns=11_000_000,
            bound_ns=10_945_000,
            gap=0.005,
            status="optimal",
            method="MIP",
            variables=12_345,
            constraints=6_789,
            candidates=(
                Candidate("search", "dp=2 x tp=4", 0.011, 19_595_678_901, "optimal"),
                Candidate("search", "dp=8", 0.0123, 24_000_000_000, "optimal"),
                Candidate("search", "tp=8", None, None, "pruned: its compute alone takes longer"),
                Candidate("DDP", "dp=8", None, 96_000_000_000, "out of memory"),
                Candidate("Megatron", "dp=2 x tp=4", 0.011, 19_595_678_901, "optimal"),
            ),
            chosen=0,
        ),
        repeated=(
            RepeatedWork(
                "linear_3", "aten.linear.default", "transformer.h.0.attn", "model.py:40: q = self.q(x)", "b 8, i 12, o 12", 12, 2, 0.03
            ),
        ),
        unruled=(
            Unruled("foo", "aten.foo.default", "model.py:12: y = x[0].foo()"),
            Unruled("foo_1", "aten.foo.default", "model.py:12: y = x[0].foo()"),
            Unruled("bar", "aten.bar.default", ""),
        ),
        notes=("dropped an assertion on float32[8, 128]",),
    )


def make_pipelined_plan() -> Plan:
    """The same on two pipeline ranks, with recomputation in the later blocks of each stage."""
    plan = make_plan()
    stages = [0] * 4 + [1] * 3 + [2] * 3 + [3] * 4
    blocks = _make_blocks(stages, "none", "selective", "full")
    return replace(
        plan,
        cluster="2x8xh100",
        pipeline=Pipeline(2, "interleaved", 2, 4, blocks, {"add_3": parse_layout("S0,R"), "add_7": parse_layout("S0,S2")}),
        costs=(
            *plan.costs,
            make_row("transformer.h.*", Phase.BACKWARD_INPUT, Purpose.RECOMPUTE, 0.00125),
            make_row("", Phase.FORWARD, Purpose.MESSAGES, 0.0, "pp", "send", 12, 48_000_000, hidden=0.0021),
            make_row("", Phase.BACKWARD_INPUT, Purpose.MESSAGES, 0.0, "pp", "send", 12, 48_000_000),
            make_row("", Phase.STEP, Purpose.BUBBLE, 0.00275),
        ),
        proof=replace(
            plan.proof,
            objective_ns=15_000_000,
            bound_ns=14_700_000,
            gap=0.02,
            status="feasible",
            method="LP, integral; cutting planes, 12 rounds",
            candidates=(
                Candidate("pipeline", "pp=2 x dp=2 x tp=4, 4 micro-batches", 0.0163, 21_000_000_000, "1f1b: optimal"),
                Candidate("pipeline", "pp=2 x dp=2 x tp=4, 4 micro-batches", 0.015, 19_595_678_901, "interleaved x2: feasible"),
                Candidate("pipeline", "pp=2 x dp=8, 8 micro-batches", None, 96_000_000_000, "out of memory"),
            ),
            chosen=1,
        ),
    )


def make_row(
    layer: str,
    phase: str,
    purpose: str,
    seconds: float,
    axis: str = "",
    collective: str = "",
    count: float = 1,
    nbytes: float = 0,
    hidden: float = 0.0,
) -> CostRow:
    return CostRow(layer, phase, purpose, axis, collective, float(count), float(nbytes), seconds, hidden)


def set_seconds(plan: Plan, phase: str, purpose: str, seconds: float) -> Plan:
    """The plan with so many seconds of one purpose and phase, outside of layers, in place of those that it has."""
    rest = tuple(row for row in plan.costs if (row.phase, row.purpose) != (phase, purpose))
    return replace(plan, costs=(*rest, make_row("", phase, purpose, seconds)))


def _make_rows() -> tuple[CostRow, ...]:
    layers = "transformer.h.*"
    return (
        make_row(layers, Phase.FORWARD, Purpose.COMPUTE, 0.0027),
        make_row("", Phase.FORWARD, Purpose.COMPUTE, 0.0003),
        make_row(layers, Phase.BACKWARD_INPUT, Purpose.COMPUTE, 0.0028),
        make_row(layers, Phase.BACKWARD_WEIGHT, Purpose.COMPUTE, 0.0025),
        make_row("", Phase.BACKWARD_INPUT, Purpose.COMPUTE, 0.0007),
        make_row("", Phase.STEP, Purpose.OPTIMIZER, 0.0005),
        make_row(layers, Phase.STEP, Purpose.GRADIENTS, 0.0004, "dp", "all_reduce", 26, 512_000_000),
        make_row(layers, Phase.FORWARD, Purpose.ACTIVATIONS, 0.001, "tp", "all_reduce", 44, 3_700_000_000),
        make_row("", Phase.FORWARD, Purpose.ACTIVATIONS, 0.0001, "tp", "all_reduce", 4, 396_000_000),
    )


def _make_blocks(stages: list[int], *recompute: str) -> tuple[BlockChoice, ...]:
    """An embedding, twelve layers and a head on these stages; the blocks of a stage take the kinds of `recompute` one after the other."""
    names = ["transformer.wte", *(f"transformer.h.{number}" for number in range(12)), "lm_head"]
    kinds = [recompute[min(stages[:place].count(stage), len(recompute) - 1)] for place, stage in enumerate(stages)]
    return tuple(map(BlockChoice, names, names, stages, kinds))


def set_field(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a plan's JSON data: the field at `path`, keys and positions from the top, becomes `to`."""

    def change(plan: dict[str, Any]) -> None:
        target: Any = plan
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return change
