"""Plans made by hand, for tests of what reads plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autopar.ir.layout import Mesh, Split, parse_layout
from autopar.ir.precision import Precision
from autopar.plans import (
    OUTSIDE,
    BlockRows,
    CostRow,
    Message,
    OpCost,
    Phase,
    Pins,
    Purpose,
    RankBytes,
    Request,
    RowSums,
    Seconds,
    StageBytes,
    Timing,
    Work,
)
from autopar.plans.plan import BlockChoice, Candidate, Group, Memory, Pipeline, Plan, Proof, RepeatedWork, Unruled

_STEP = Seconds(0.003, 0.006, 0.0, 0.0005, 0.0015, 0.0)


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
            copies=400_000_000,
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
                Candidate("search", "dp=2 x tp=4", 0.011, 19_595_678_901, "optimal", "tensor parallel", _STEP),
                Candidate(
                    "search", "dp=8", 0.0123, 24_000_000_000, "optimal", "data parallel", Seconds(0.0031, 0.006, 0.0, 0.0004, 0.0028, 0.0)
                ),
                Candidate("search", "x=8", 0.0125, None, "pruned: costs at least this for the search", "not solved", None, "bound"),
                Candidate("DDP", "dp=8", None, 96_000_000_000, "out of memory", "data parallel"),
                Candidate("Megatron", "dp=2 x tp=4", 0.011, 19_595_678_901, "optimal", "tensor parallel", _STEP),
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
        work=Work(flops=3.3e13, samples=8, tokens=1024, dtype="bfloat16", peak_flops=989e12),
        ops=_make_ops(),
        request=Request(
            model="hf:gpt2",
            batch=8,
            seq=128,
            cluster="8xH100",
            memory=80_000_000_000,
            pins=Pins.parse({"tp": 4, "transformer.h.*.mlp": "tp:o,pp:0"}),
        ),
    )


def make_pipelined_plan() -> Plan:
    """The same on two pipeline ranks, with recomputation in the later blocks of each stage."""
    plan = make_plan()
    stages = [0] * 4 + [1] * 3 + [2] * 3 + [3] * 4
    blocks = _make_blocks(stages, "none", "selective", "full")
    ops = tuple(replace(op, seconds=replace(op.seconds, recompute=0.00125)) if op.op == "addmm" else op for op in plan.ops)
    return replace(
        plan,
        ops=ops,
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
                Candidate("pipeline", "pp=2 x dp=2 x tp=4, 4 micro-batches", 0.0163, 21_000_000_000, "1f1b: optimal", "pipeline"),
                Candidate("pipeline", "pp=2 x dp=2 x tp=4, 4 micro-batches", 0.015, 19_595_678_901, "interleaved x2: feasible", "pipeline"),
                Candidate("pipeline", "pp=2 x dp=8, 8 micro-batches", None, 96_000_000_000, "out of memory", "pipeline"),
                Candidate(
                    "micro-batches",
                    "tp=16, 8 micro-batches",
                    0.021,
                    None,
                    "not tried: estimated to take this at best",
                    "tensor parallel",
                    None,
                    "estimate",
                ),
            ),
            chosen=1,
        ),
    )


def make_timed_plan() -> Plan:
    """Two blocks on two stages, two micro-batches, with the numbers that its step of 17 ms and its peak are computed from.

    A forward takes 2 ms on stage 0 and 1 + 1 ms on stage 1, a backward 3 ms and 2 ms, a message 1 ms; an update 1 ms and 2 ms.
    """
    first = (
        make_row("", Phase.FORWARD, Purpose.COMPUTE, 0.002),
        make_row("", Phase.BACKWARD_INPUT, Purpose.COMPUTE, 0.001),
        make_row("", Phase.BACKWARD_INPUT, Purpose.RECOMPUTE, 0.001),
        make_row("", Phase.BACKWARD_WEIGHT, Purpose.COMPUTE, 0.001),
        make_row("", Phase.STEP, Purpose.OPTIMIZER, 0.001),
    )
    second = (
        make_row("", Phase.FORWARD, Purpose.COMPUTE, 0.001),
        make_row("", Phase.FORWARD, Purpose.ACTIVATIONS, 0.001, "tp", "all_reduce", 2, 1000, hidden=0.0005),
        make_row("", Phase.BACKWARD_INPUT, Purpose.COMPUTE, 0.001),
        make_row("", Phase.BACKWARD_WEIGHT, Purpose.COMPUTE, 0.001),
        make_row("", Phase.STEP, Purpose.OPTIMIZER, 0.001),
        make_row("", Phase.STEP, Purpose.GRADIENTS, 0.001, "tp", "all_reduce", 1, 500),
    )
    sums = RowSums()
    for row in (*first, *second):
        sums.add_row(row, 0.5 if row.phase == Phase.STEP else 1.0)
    # On stage 0: F0 to 2 ms, F1 to 4, B0 from 8 to 11, B1 from 12 to 15; on stage 1: F0 from 3 to 5, B0 to 7, F1 to 9, B1 to 11.
    sums.add(Phase.STEP, Purpose.BUBBLE, 0.0065)
    plan = make_plan()
    seconds = replace(plan, costs=sums.rows()).seconds.step
    timing = Timing(
        forwards_first=False,
        kinds=(BlockRows(first), BlockRows(second)),
        kind_of=(0, 1),
        messages=(Message(0.001, 0.001, 100, 200),),
        stages=(
            StageBytes(1000, 400, 50, 0, 5, (60,), (300,), (70,)),
            StageBytes(2000, 800, 30, 0, 5, (40,), (500,), (60,)),
        ),
        ranks=(RankBytes(10, 1100), RankBytes(20, 2200)),
    )
    blocks = (BlockChoice("up", "up", 0, "full"), BlockChoice("down", "down", 1, "none"))
    memory = Memory(600, 600, 800, 80, 100, 140, 1000, 4000)
    candidate = Candidate("pipeline", "pp=2", seconds, memory.total, "1f1b: optimal")
    objective = round(1e9 * seconds)
    return replace(
        plan,
        cluster="2x8xh100",
        pipeline=Pipeline(2, "1f1b", 1, 2, blocks, {}, timing),
        costs=sums.rows(),
        memory=memory,
        groups=(),
        ops=(),
        request=Request(),
        proof=replace(plan.proof, objective_ns=objective, bound_ns=objective, gap=0.0, candidates=(candidate,), chosen=0),
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


def _make_ops() -> tuple[OpCost, ...]:
    """Ops whose sums are those of the rows."""
    layers = "transformer.h.*"

    def make(op: str, group: str, target: str, path: str, seconds: Seconds, hidden: float, nbytes: float, **more: Any) -> OpCost:
        fields = {"source": "", "space": "", "loops": {}, "splits": {}, "count": 12 if group == layers else 1, "flops": 0.0}
        return OpCost(op=op, group=group, target=target, path=path, seconds=seconds, hidden=hidden, nbytes=nbytes, **(fields | more))

    return (
        make("view", OUTSIDE, "aten.view.default", "", Seconds(0.0003, 0.0007, 0.0, 0.0, 0.0001, 0.0), 0.0, 396e6),
        make(
            "addmm",
            layers,
            "aten.addmm.default",
            "transformer.h.0.mlp.c_fc",
            Seconds(0.0027, 0.0053, 0.0, 0.0, 0.001, 0.0),
            0.0,
            3.7e9,
            source="models/gpt2.py:20: x = self.c_fc(x)",
            space="b i, i o, o -> b o",
            loops={"b": 1024, "i": 768, "o": 3072},
            splits={"dp": "batch", "tp": "ffn"},
            flops=1.1e13,
        ),
        make(
            "p_transformer_h_0_mlp_c_fc_weight",
            layers,
            "transformer.h.0.mlp.c_fc.weight",
            "transformer.h.0.mlp.c_fc",
            Seconds(0.0, 0.0, 0.0, 0.0, 0.0004, 0.0),
            0.0,
            512e6,
        ),
        make(
            "p_transformer_wte_weight",
            OUTSIDE,
            "transformer.wte.weight",
            "transformer.wte",
            Seconds(0.0, 0.0, 0.0, 0.0005, 0.0, 0.0),
            0.0,
            0.0,
        ),
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
