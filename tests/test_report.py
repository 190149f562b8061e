"""The report shows what is in the plan: whole texts against golden files, and the corners one by one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from autopar.errors import InputError
from autopar.layout import Mesh
from autopar.plans import Plan, Unruled
from autopar.report import describe_axes, explain, select_groups, summarize, to_data
from autopar.units import format_bytes, format_seconds, format_share, parse_bytes
from tests.plans import make_plan

Golden = Callable[[str, str], None]


def _render(plan: Plan, *, layer: str | None = None, width: int = 120) -> str:
    out = io.StringIO()
    explain(plan, Console(file=out, width=width, color_system=None), layer=layer)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _make_small_plan() -> Plan:
    """One rank, nothing communicated, no candidates: the empty corners."""
    plan = make_plan()
    return replace(
        plan,
        mesh=Mesh((), ()),
        batch_axes=(),
        layouts={},
        placements={},
        traffic=(),
        groups=(replace(plan.groups[0], axes={}),),
        memory=replace(plan.memory, budget=0),
        proof=replace(plan.proof, bound_ns=plan.proof.objective_ns, gap=0.0, candidates=()),
        unruled=(),
        notes=(),
    )


def test_summary(golden: Golden) -> None:
    golden("summary.txt", summarize(make_plan()) + "\n")
    assert make_plan().summary() == summarize(make_plan())
    assert 4 <= len(summarize(make_plan()).splitlines()) <= 8


def test_explain(golden: Golden) -> None:
    golden("explain.txt", _render(make_plan()))


def test_explain_of_a_layer(golden: Golden) -> None:
    golden("explain_layer.txt", _render(make_plan(), layer="transformer.h.1.mlp"))


def test_explain_of_one_rank(golden: Golden) -> None:
    golden("explain_one_rank.txt", _render(_make_small_plan()))
    assert "axes    none: one rank" in summarize(_make_small_plan())


def test_data(golden: Golden) -> None:
    golden("explain.json", json.dumps(to_data(make_plan()), indent=1) + "\n")


def test_costs_are_the_plans_own() -> None:
    plan = make_plan()
    seconds = replace(plan.seconds, communication=0.777)
    assert "777 ms" in _render(replace(plan, seconds=seconds))
    assert "777 ms" in summarize(replace(plan, seconds=seconds))
    assert to_data(replace(plan, seconds=seconds))["seconds"]["step"] == seconds.step
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
    assert total.endswith("|██████████")


def test_axes_are_named_after_what_they_split() -> None:
    assert describe_axes(make_plan()) == {"dp": "batch", "tp": "heads, ffn, vocabulary"}
    idle = replace(make_plan(), batch_axes=(), groups=())
    assert describe_axes(idle) == {"dp": "nothing", "tp": "nothing"}


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("transformer.h.3.mlp", ["transformer.h.*"]),
        ("transformer.h.*", ["transformer.h.*"]),
        ("h.*", ["transformer.h.*"]),
        ("outside", ["outside of layers"]),
        ("*", ["transformer.h.*", "outside of layers"]),
        (None, ["transformer.h.*", "outside of layers"]),
    ],
)
def test_layers_are_found(layer: str | None, names: list[str]) -> None:
    assert [group.name for group in select_groups(make_plan(), layer)] == names


def test_an_unknown_layer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no layer of this plan matches 'decoder'; .* 'transformer\.h\.\*', 'outside of layers'"):
        select_groups(make_plan(), "decoder")
    with pytest.raises(InputError, match="decoder"):
        to_data(make_plan(), layer="decoder")


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        # The plan holds the first of the layers that are alike.
        ("transformer.h.0.mlp", ["p_transformer_h_0_mlp_c_fc_weight"]),
        ("transformer.h.1.mlp", ["p_transformer_h_0_mlp_c_fc_weight"]),
        ("transformer.h.*.mlp", ["p_transformer_h_0_mlp_c_fc_weight"]),
        ("transformer.h.11", ["p_transformer_h_0_mlp_c_fc_weight", "p_transformer_h_0_attn_c_attn_weight"]),
        ("h.*", ["p_transformer_h_0_mlp_c_fc_weight", "p_transformer_h_0_attn_c_attn_weight"]),
        ("transformer.h.1.absent", []),
    ],
)
def test_a_layer_has_its_layouts(layer: str, names: list[str]) -> None:
    assert list(to_data(make_plan(), layer=layer)["layouts"]) == names
    assert ("No stored tensor" in _render(make_plan(), layer=layer)) == (not names)
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


def test_a_bound_of_a_baseline_speaks_of_that_baseline() -> None:
    plan = make_plan()
    baseline = replace(plan, proof=replace(plan.proof, candidates=plan.proof.candidates[-1:]))
    assert "No Megatron plan on this mesh" in _render(baseline)
    assert "No plan on this mesh" in _render(plan)
