"""The report shows what is in the plan: whole texts against golden files, and the corners one by one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from autopar.errors import InputError
from autopar.ir.layout import Mesh, parse_layout
from autopar.plans import Phase, Purpose
from autopar.plans.plan import BlockChoice, Pipeline, Plan, Unruled
from autopar.report import describe_pipeline, explain, summarize, to_data
from autopar.report.selection import select_blocks, select_groups
from autopar.report.summary import count_recompute, describe_choice
from autopar.schedules.families import make_schedule
from autopar.units import format_bytes, format_seconds, format_share, parse_bytes
from tests.plans import make_pipelined_plan, make_plan, make_row, set_seconds

Golden = Callable[[str, str], None]


def _render(plan: Plan, *, layer: str | None = None, width: int = 120, ops: bool = False, everything: bool = True) -> str:
    """What ``autopar explain`` prints, with ``--all`` unless a test is about less."""
    out = io.StringIO()
    explain(plan, Console(file=out, width=width, color_system=None), layer=layer, ops=ops, everything=everything)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _make_small_plan() -> Plan:
    """One rank, nothing communicated, one candidate: the empty corners."""
    plan = make_plan()
    return replace(
        plan,
        mesh=Mesh((), ()),
        batch_axes=(),
        bucket_nbytes=25_000_000,
        layouts={},
        outputs=(),
        placements={},
        costs=tuple(row for row in plan.costs if not row.is_communication),
        groups=(replace(plan.groups[0], axes={}),),
        memory=replace(plan.memory, budget=0),
        proof=replace(plan.proof, bound_ns=plan.proof.objective_ns, gap=0.0, candidates=plan.proof.candidates[:1]),
        unruled=(),
        notes=(),
        ops=(),
    )


def test_summary(golden: Golden) -> None:
    golden("summary.txt", summarize(make_plan()) + "\n")
    assert 4 <= len(summarize(make_plan()).splitlines()) <= 10


def test_a_plan_that_splits_no_work_says_so() -> None:
    plan = make_plan()
    whole = replace(plan, batch_axes=(), groups=tuple(replace(group, axes={}) for group in plan.groups))
    assert "no work is split, every rank runs the whole model" in describe_choice(whole)
    assert "no work is split" not in describe_choice(plan)
    assert "no work is split" not in describe_choice(_make_small_plan())


def test_explain(golden: Golden) -> None:
    golden("explain.txt", _render(make_plan()))


def test_explain_of_a_layer(golden: Golden) -> None:
    golden("explain_layer.txt", _render(make_plan(), layer="transformer.h.1.mlp"))


def test_explain_of_a_layer_says_what_its_states_mean() -> None:
    plan, layer = make_plan(), "transformer.h.1.mlp"

    def legend(*states: str) -> str:
        changed = dict(zip(plan.layouts, map(parse_layout, states), strict=False))
        text = _render(replace(plan, layouts={**plan.layouts, **changed}), layer=layer, width=200)
        return next(line for line in text.splitlines() if "per axis" in line).partition("): ")[2]

    assert legend() == "S<dim> split, R replicated"
    assert legend(*["S0z1,R"] * len(plan.layouts)) == "S<dim> split, R replicated, z1 ZeRO level 1"
    assert legend(*["S0/3pz2,R"] * len(plan.layouts)) == (
        "S<dim> split, R replicated, /N in each of N equal blocks, p in unequal parts, z2 ZeRO level 2"
    )


def test_explain_of_one_rank(golden: Golden) -> None:
    golden("explain_one_rank.txt", _render(_make_small_plan()))
    assert "axes    none: one rank" in summarize(_make_small_plan())


def test_data(golden: Golden) -> None:
    golden("explain.json", json.dumps(to_data(make_plan()), indent=1) + "\n")


def test_summary_of_a_pipeline(golden: Golden) -> None:
    golden("summary_pipeline.txt", summarize(make_pipelined_plan()) + "\n")
    assert 5 <= len(summarize(make_pipelined_plan()).splitlines()) <= 12


def test_explain_a_pipeline(golden: Golden) -> None:
    golden("explain_pipeline.txt", _render(make_pipelined_plan()))


def test_explain_a_layer_of_a_pipeline(golden: Golden) -> None:
    golden("explain_pipeline_layer.txt", _render(make_pipelined_plan(), layer="transformer.h.4.mlp"))


def _change_pipeline(plan: Plan, **changes: object) -> Plan:
    return replace(plan, pipeline=replace(plan.pipeline, **changes))  # type: ignore[arg-type]


def test_a_plan_without_a_pipeline_says_nothing_of_one() -> None:
    plan = make_plan()
    assert describe_pipeline(plan) == ""
    for word in ("stage", "micro", "recompute", "schedule", "pipeline", "fullest"):
        assert word not in summarize(plan)
        assert word not in _render(plan)
        assert word not in _render(plan, layer="transformer.h.3")


def test_micro_batches_alone() -> None:
    plan = _change_pipeline(make_plan(), microbatches=8)
    assert describe_pipeline(plan) == "in 8 micro-batches, one after the other"
    assert "batch   in 8 micro-batches, one after the other" in summarize(plan)
    assert "gpipe" not in summarize(plan)
    assert "gpipe" not in describe_choice(plan)
    assert "mesh dp=2 x tp=4 (8 ranks)" in summarize(plan)
    text = _render(plan)
    assert "Where the time goes (activations of one micro-batch)" in text
    assert "pipeline rank" not in text
    assert "bubble" not in text


def test_recomputation_alone() -> None:
    plan = make_plan()
    blocks = tuple(replace(block, recompute="full" if 4 <= number < 9 else "none") for number, block in enumerate(plan.pipeline.blocks))
    plan = replace(_change_pipeline(plan, blocks=blocks), costs=(*plan.costs, make_row("", Phase.BACKWARD_INPUT, Purpose.RECOMPUTE, 0.001)))
    assert count_recompute(plan) == {"none": 9, "full": 5}
    assert describe_pipeline(plan) == ""
    assert "compute 9.00 ms + recompute 1.00 ms (full in 5 of 14 blocks) + optimizer" in summarize(plan)
    text = _render(plan)
    assert "What the backward runs again" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("0 ")]
    assert rows == [
        ["0", "transformer.wte", "to", "transformer.h.2", "4", "none"],
        ["0", "transformer.h.3", "to", "transformer.h.7", "5", "full"],
        ["0", "transformer.h.8", "to", "lm_head", "5", "none"],
    ]
    assert "Proof for the mesh dp=2 x tp=4 (8 ranks)\nThe chosen plan costs 11,000,000 ns under this cost model. By" in text


def test_costs_of_a_pipeline_are_the_plans_own() -> None:
    plan = make_pipelined_plan()
    changed = set_seconds(set_seconds(plan, Phase.STEP, Purpose.BUBBLE, 0.3456), Phase.BACKWARD_INPUT, Purpose.RECOMPUTE, 0.789)
    for text in (summarize(changed), _render(changed)):
        assert "346 ms" in text
        assert "789 ms" in text
        assert f"{100 * 0.3456 / changed.seconds.step:.1f}%" in text
    assert to_data(changed)["seconds"]["bubble"] == 0.3456
    assert to_data(changed)["seconds"]["step"] == changed.seconds.step


def test_a_pipeline_without_a_bubble_says_so() -> None:
    plan = make_pipelined_plan()
    plan = set_seconds(plan, Phase.STEP, Purpose.BUBBLE, 0.0)
    assert "+ bubble 0 s (0.0%)" in summarize(plan)
    assert ["bubble", "0", "s", "0.0%"] in [line.split() for line in _render(plan).splitlines()]


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("interleaved", 3), ("zb-v", 2), ("v-half", 2)])
def test_stages_are_shown_on_the_ranks_that_run_them(schedule: str, chunks: int) -> None:
    ranks, microbatches = 3, 6
    rank_of = make_schedule(schedule, ranks, microbatches, chunks).rank_of
    blocks = tuple(BlockChoice(f"layers.{stage}", f"layers.{stage}", stage, "none") for stage in range(ranks * chunks))
    plan = replace(make_pipelined_plan(), pipeline=Pipeline(ranks, schedule, chunks, microbatches, blocks, {}))
    table = _render(plan).split("\nStages: ")[1].split("\n\n")[0]
    rows = [line.split() for line in table.splitlines()[3:]]
    expected = [[str(rank), f"{8 * rank}-{8 * rank + 7}", str(stage), f"layers.{stage}", "1", "none"] for stage, rank in enumerate(rank_of)]
    assert rows == expected
    assert [block["pipeline_rank"] for block in to_data(plan)["pipeline"]["blocks"]] == list(rank_of)


def test_pipeline_ranks_of_one_device() -> None:
    plan = replace(make_pipelined_plan(), mesh=Mesh(("dp",), (1,)), batch_axes=("dp",), layouts={}, outputs=(), placements={})
    assert describe_pipeline(plan) == "4 on 2 pipeline ranks, 2 on each; schedule interleaved, 4 micro-batches"
    # The axis of a single rank splits nothing.
    assert plan.splits == {"pp": "layers"}
    assert "mesh pp=2 (2 ranks)" in summarize(plan)
    assert any(line.split()[:4] == ["1", "1", "1", "transformer.h.3"] for line in _render(plan).splitlines())
    quiet = replace(plan, costs=tuple(row for row in plan.costs if row.axis in ("", "pp")))
    assert "Communication inside pipeline ranks: none\n\nMessages between stages, of all cuts together: 24 in a step" in _render(quiet)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("transformer.h.3", ["transformer.h.3"]),
        ("transformer.h.3.mlp.c_fc", ["transformer.h.3"]),
        ("transformer.h.*.mlp", [f"transformer.h.{number}" for number in range(12)]),
        ("transformer.h.1*", ["transformer.h.1", "transformer.h.10", "transformer.h.11"]),
        ("h.*", [f"transformer.h.{number}" for number in range(12)]),
        ("transformer.h.*", [f"transformer.h.{number}" for number in range(12)]),
        ("outside of layers", ["transformer.wte", "lm_head"]),
        ("lm_head", ["lm_head"]),
        ("*.mlp", [f"transformer.h.{number}" for number in range(12)]),
        ("transformer.wte.weight", ["transformer.wte"]),
    ],
)
def test_a_layer_has_its_blocks(layer: str, names: list[str]) -> None:
    plan = make_pipelined_plan()
    found = to_data(plan, layer=layer)["pipeline"]["blocks"]
    assert [block["name"] for block in found] == names
    known = {block.name: block for block in plan.pipeline.blocks}
    assert all((block["stage"], block["recompute"]) == (known[block["name"]].stage, known[block["name"]].recompute) for block in found)
    assert ("Stages: " in _render(plan, layer=layer)) == bool(names)


def test_blocks_that_are_no_neighbours_are_two_rows() -> None:
    plan = make_plan()
    blocks = tuple(replace(block, recompute="full") for block in plan.pipeline.blocks)
    text = _render(_change_pipeline(plan, blocks=blocks), layer="transformer.h.1*")
    rows = [line.split()[1:-2] for line in text.splitlines() if line.strip().endswith("full")]
    assert rows == [["transformer.h.1"], ["transformer.h.10", "to", "transformer.h.11"]]


def test_second_blocks_of_a_module_are_in_it() -> None:
    plan = make_pipelined_plan()
    first, *rest = plan.pipeline.blocks
    plan = _change_pipeline(plan, blocks=(first, replace(rest[0], name="transformer.h.0#2", path="transformer.h.0"), *rest[1:]))
    assert [block["name"] for block in to_data(plan, layer="transformer.h.0")["pipeline"]["blocks"]] == ["transformer.h.0#2"]


def test_a_bound_of_a_pipeline_speaks_of_its_schedule() -> None:
    plan = make_pipelined_plan()
    text = " ".join(_render(plan).split())
    assert "no stages and recomputation that fit the memory and the pins cost less than 14,700,000 ns under this schedule" in text
    assert "No pipeline plan on this mesh" not in text
    assert "were compared by what was found for each, not by bounds" in text


def test_costs_are_the_plans_own() -> None:
    plan = make_plan()
    row = make_row("", Phase.BACKWARD_INPUT, Purpose.ACTIVATIONS, 0.777 - plan.seconds.communication, "tp", "all_gather")
    changed = replace(plan, costs=(*plan.costs, row))
    assert changed.seconds.communication == pytest.approx(0.777)
    assert "777 ms" in _render(changed)
    assert "777 ms" in summarize(changed)
    assert to_data(changed)["seconds"]["step"] == changed.seconds.step
    assert to_data(plan)["memory_bytes"]["total"] == plan.memory.total


def test_text_of_the_user_is_shown_as_it_is() -> None:
    # rich would take these brackets for markup, and drop or refuse them.
    plan = replace(make_plan(), notes=("x[bold] and [/nothing]",), unruled=(Unruled("a", "aten.a", "m.py:1: y = x[red][/]"),))
    assert "x[bold] and [/nothing]" in _render(plan)
    assert "m.py:1: y = x[red][/]" in _render(plan)


def test_many_unruled_ops_are_counted() -> None:
    ops = tuple(Unruled(f"op_{i}", f"aten.op{i}.default", f"model.py:{i}: y") for i in range(5))
    last = summarize(replace(make_plan(), unruled=ops)).splitlines()[-1]
    assert last.startswith("unruled 5 ops")
    assert "aten.op2.default (model.py:2: y) and 2 more" in last
    assert "aten.op3" not in last


def test_more_than_the_budget_runs_over_the_mark() -> None:
    plan = make_plan()
    over = replace(plan, memory=replace(plan.memory, budget=10_000_000_000))
    (total,) = (line for line in _render(over).splitlines() if line.strip().startswith("total"))
    assert "196.0%" in total
    assert total.endswith("|" + "█" * 9)


def test_axes_are_named_after_what_they_split() -> None:
    plan = make_plan()
    assert plan.splits == {"dp": "batch", "tp": "heads, ffn (outside of layers also vocabulary)"}
    layers, outside = plan.groups
    alone = replace(plan, groups=(replace(layers, axes={}), outside))
    assert alone.splits == {"dp": "batch", "tp": "nothing (outside of layers vocabulary)"}
    assert replace(plan, groups=(outside,)).splits == {"dp": "batch", "tp": "vocabulary"}
    idle = replace(make_plan(), batch_axes=(), groups=())
    assert idle.splits == {"dp": "nothing", "tp": "nothing"}


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("transformer.h.3.mlp", ["transformer.h.*"]),
        ("transformer.h.*", ["transformer.h.*"]),
        ("h.*", ["transformer.h.*"]),
        ("transformer", ["transformer.h.*", "outside of layers"]),
        ("lm_head", ["outside of layers"]),
        ("wte.weight", ["outside of layers"]),
        ("*.mlp", ["transformer.h.*"]),
        ("outside", ["outside of layers"]),
        ("h.3", ["transformer.h.*"]),
        ("*", ["transformer.h.*", "outside of layers"]),
        (None, ["transformer.h.*", "outside of layers"]),
    ],
)
def test_layers_are_found(layer: str | None, names: list[str]) -> None:
    assert [group.name for group in select_groups(make_plan(), layer)] == names


def _make_mixed_plan() -> Plan:
    """The plan with its layers in two groups, whose first layers are 0 and 4; the fifth tensor is in a layer that is no module."""
    plan = make_plan()
    early, outside = plan.groups
    stored = {
        "p_a": ("transformer.h.0.mlp.c_fc.weight", parse_layout("S0,S1")),
        "p_b": ("transformer.h.4.mlp.c_fc.weight", parse_layout("R,S1")),
        "p_c": ("transformer.h.4.mlp.c_fc.bias", parse_layout("R,S0")),
        "p_d": ("transformer.wte.weight", parse_layout("R,S0")),
        "p_e": ("downs.0.weight", parse_layout("S0,R")),
    }
    groups = (
        replace(early, name="transformer.h.*[0-3]", paths=early.paths[:4], tensors={"p_a": stored["p_a"][0]}),
        replace(early, name="transformer.h.*[4-11]", paths=early.paths[4:], tensors={op: stored[op][0] for op in ("p_b", "p_c")}),
        replace(early, name="blocks.*", paths=("blocks.0", "blocks.1"), tensors={"p_e": stored["p_e"][0]}),
        replace(outside, tensors={"p_d": stored["p_d"][0]}),
    )
    return replace(plan, groups=groups, layouts={op: layout for op, (_, layout) in stored.items()})


@pytest.mark.parametrize(
    ("layer", "groups", "layouts"),
    [
        ("transformer.h.3", ["transformer.h.*[0-3]"], {"transformer.h.0.mlp.c_fc.weight": "S0,S1"}),
        ("h.11.mlp.c_fc.weight", ["transformer.h.*[4-11]"], {"transformer.h.4.mlp.c_fc.weight": "R,S1"}),
        (
            "h.*.mlp",
            ["transformer.h.*[0-3]", "transformer.h.*[4-11]"],
            {
                "transformer.h.0.mlp.c_fc.weight": "S0,S1",
                "transformer.h.4.mlp.c_fc.weight": "R,S1",
                "transformer.h.4.mlp.c_fc.bias": "R,S0",
            },
        ),
        # A name with brackets is a group's, not a pattern of digits.
        (
            "transformer.h.*[4-11]",
            ["transformer.h.*[4-11]"],
            {"transformer.h.4.mlp.c_fc.weight": "R,S1", "transformer.h.4.mlp.c_fc.bias": "R,S0"},
        ),
        # Layers that are no modules: their tensors are elsewhere, and in the group all the same.
        ("blocks.*", ["blocks.*"], {"downs.0.weight": "S0,R"}),
        ("downs.0", ["blocks.*"], {"downs.0.weight": "S0,R"}),
    ],
)
def test_layers_that_are_split_in_two_ways_are_told_apart(layer: str, groups: list[str], layouts: dict[str, str]) -> None:
    data = to_data(_make_mixed_plan(), layer=layer)
    assert [group["name"] for group in data["groups"]] == groups
    assert data["layouts"] == layouts


def test_a_layer_without_tensors_says_so() -> None:
    plan = make_plan()
    plan = replace(plan, groups=(replace(plan.groups[0], tensors={}), *plan.groups[1:]))
    assert "No stored tensor is named after" in _render(plan, layer="h.3")


@pytest.mark.parametrize("layer", ["h.99", "*.nosuch", "h.3.nosuch", "3.h", "transformer.h.3.mlp.c_fc.weight.more"])
def test_what_no_layer_has_is_refused(layer: str) -> None:
    with pytest.raises(InputError, match="no layer of this plan matches"):
        select_groups(make_plan(), layer)
    with pytest.raises(InputError, match="no layer of this plan matches"):
        select_blocks(make_pipelined_plan(), layer)


def test_a_part_of_a_name_may_have_brackets() -> None:
    plan = make_plan()
    group = replace(plan.groups[0], tensors={next(iter(plan.layouts)): "transformer.h.0.a[0].weight"})
    plan = replace(plan, groups=(group, *plan.groups[1:]))
    assert select_groups(plan, "a[0]") == (group,)


def test_an_unknown_layer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no layer of this plan matches 'decoder'; .* 'transformer\.h\.\*' \(.*\), 'outside of layers'"):
        select_groups(make_plan(), "decoder")
    with pytest.raises(InputError, match="decoder"):
        to_data(make_plan(), layer="decoder")


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        # The plan holds the first of the layers that are alike.
        ("transformer.h.0.mlp", ["transformer.h.0.mlp.c_fc.weight"]),
        ("transformer.h.1.mlp", ["transformer.h.0.mlp.c_fc.weight"]),
        ("transformer.h.*.mlp", ["transformer.h.0.mlp.c_fc.weight"]),
        ("h.3.*.c_attn", ["transformer.h.0.attn.c_attn.weight"]),
        ("transformer.h.11", ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"]),
        ("h.*", ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"]),
        ("outside of layers", ["transformer.wte.weight"]),
        ("wte", ["transformer.wte.weight"]),
    ],
)
def test_a_layer_has_its_layouts(layer: str, names: list[str]) -> None:
    assert list(to_data(make_plan(), layer=layer)["layouts"]) == names
    assert "No stored tensor" not in _render(make_plan(), layer=layer)
    assert "layouts" not in to_data(make_plan())


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999_999, "1.00 GB"),
        (80_000_000_000, "80.0 GB"),
        (123_456_789, "123 MB"),
        (5 * 10**18, "5000 PB"),
    ],
)
def test_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
    assert parse_bytes(text if nbytes else "1") == pytest.approx(nbytes or 1, rel=5e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1e-10, "0 s"),
        (7e-10, "0.70 ns"),
        (1.5e-6, "1.50 µs"),
        (0.9999, "1.00 s"),
        (0.01234, "12.3 ms"),
        (75, "75.0 s"),
        (3600, "3600 s"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_shares() -> None:
    assert (format_share(1, 4), format_share(3, 2), format_share(0, 0)) == ("25.0%", "150.0%", "-")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("80GB", 80 * 10**9),
        ("80gb", 80 * 10**9),
        ("80G", 80 * 10**9),
        ("512MiB", 512 * 2**20),
        (" 1.5 TB ", 15 * 10**11),
        ("7", 7),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "80 apples", "-1GB", "1e9", "80iB", "1.2.3GB", "eighty"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no size of memory; write a number and a unit"):
        parse_bytes(text)


def test_less_than_a_byte_is_refused() -> None:
    with pytest.raises(InputError, match="less than one byte"):
        parse_bytes("0GB")


def test_the_chosen_candidate_is_the_plans_not_the_first_of_its_cost() -> None:
    plan = make_plan()
    megatron = replace(plan, proof=replace(plan.proof, chosen=4))
    (row,) = (line for line in _render(megatron).splitlines() if "this plan" in line)
    assert row.endswith("Megatron: optimal")


def test_a_bound_of_a_baseline_speaks_of_that_baseline() -> None:
    plan = make_plan()
    baseline = replace(plan, proof=replace(plan.proof, candidates=plan.proof.candidates[-1:], chosen=0))
    assert "no Megatron plan on this mesh" in _render(baseline)
    assert "no plan on this mesh" in _render(plan)
