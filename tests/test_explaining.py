"""Why a plan was chosen, what every op costs, what differs between two plans: every number is the plan's own, and sums add up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.ir.graph import Graph
from autopar.ir.layout import Mesh
from autopar.plans import Pins, Purpose, Request, Seconds, add_parts
from autopar.plans.plan import Plan
from autopar.report import diff, diff_data, explain, summarize, to_data
from autopar.report.difference import find_changes, find_warnings
from autopar.report.op_rows import list_group_rows, list_op_rows
from autopar.report.reasons import find_runner_up, find_untried, format_step, group_candidates, split_terms, word_reasons
from autopar.report.summary import describe_proof, find_rates
from autopar.units import format_bytes, format_seconds
from tests.commands import refuse, run
from tests.planning import make_plan as search_plan
from tests.plans import make_pipelined_plan, make_plan
from tests.zoo import DEEP, ZOO

Golden = Callable[[str, str], None]


def _text_of(show: Callable[[Console], None]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=120, color_system=None))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _render(plan: Plan, **options: Any) -> str:
    return _text_of(lambda console: explain(plan, console, **options))


def _render_diff(before: Plan, after: Plan) -> str:
    return _text_of(lambda console: diff(before, after, console, ("a.json", "b.json")))


@cache
def _graph_of(name: str) -> Graph:
    return capture(*(DEEP | ZOO)[name]()).graph


@cache
def _plan_for(name: str, *pins: tuple[str, object], cluster: str = "4xcpu") -> Plan:
    return search_plan(_graph_of(name), Cluster.parse(cluster), pins=dict(pins))


PLANS: dict[str, tuple[tuple[str, object], ...]] = {
    "free": (),
    "fsdp": (("dp", 2), ("tp", 2), ("fsdp", True)),
    "zero 1": (("dp", 4), ("zero", 1)),
    "micro-batches": (("pp", 1), ("microbatches", 2), ("dp", 2), ("tp", 2), ("recompute", "full")),
    "pipeline": (("pp", 2), ("tp", 2), ("schedule", "zb-h1"), ("microbatches", 4), ("recompute", "selective")),
}


def test_the_first_screen(golden: Golden) -> None:
    text = _render(make_plan())
    golden("explain_first_screen.txt", text)
    golden("explain_first_screen_pipeline.txt", _render(make_pipelined_plan()))
    assert len(_render(replace(make_plan(), unruled=(), notes=())).splitlines()) <= 40


def test_tables_of_ops(golden: Golden) -> None:
    golden("explain_ops.txt", _render(make_plan(), ops=True))
    golden("explain_ops_pipeline.txt", _render(make_pipelined_plan(), ops=True))
    assert _render(replace(make_plan(), ops=()), ops=True).endswith("\nThis plan has no table of ops.\n")


def test_a_module_shows_its_own_ops_and_the_rest_in_one_row() -> None:
    plan = _plan_for("llama_tied", *PLANS["fsdp"])
    for group in plan.groups:
        whole = list_op_rows(plan, group)
        layers = ["layers.1.mlp", "layers.1", "mlp.*", group.name] if group.paths else ["embed_tokens", "norm", group.name]
        for layer in layers:
            rows = list_op_rows(plan, group, layer)
            for name in ("seconds", "exposed", "hidden", "nbytes", "flops"):
                total = sum(getattr(row, name) for row in whole)
                assert sum(getattr(row, name) for row in rows) == pytest.approx(total, rel=1e-9), (layer, name)
            has_rest = rows[-1].module in ("rest of the layer", "the others outside")
            assert has_rest == (layer not in ("layers.1", group.name)), layer
            if layer == "layers.1.mlp":
                assert {row.module.partition(".")[0] for row in rows[:-2]} == {"mlp"}
                assert rows[-2].module == f"{3 * group.count} parameters"


def test_a_file_of_several_lines_is_named_once() -> None:
    plan = make_plan()
    source = "a/folder/modeling_of_a_long_name.py"
    lines = {"view": f"{source}:7: y = x.view(-1)", "addmm": f"{source}:20: x = self.c_fc(x)", "other": "b/activations.py:9: return x"}
    ops = [replace(op, group=plan.groups[0].name) for op in plan.ops if op.op in lines]
    ops.append(replace(ops[0], op="other"))
    ops = [replace(op, source=lines[op.op]) for op in ops]
    plan = replace(plan, ops=tuple(ops), placements={**plan.placements, "other": (None, None)})
    text = _render(plan, ops=True)
    assert text.count("modeling_of_a_long_name.py") == 1
    assert "lines without a file are those of modeling_of_a_long_name.py" in " ".join(text.split())
    assert [line.split()[-1] for line in text.splitlines() if " view " in line or " addmm " in line] == ["7", "20", "activations.py:9"]
    narrow = io.StringIO()
    explain(plan, Console(file=narrow, width=80, color_system=None), ops=True)
    assert "activations.py:9" in narrow.getvalue()


def test_piped_output_is_as_wide_as_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan().save(tmp_path / "plan.json")
    widths = {}
    for columns in ("", "80", "0", "many", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        widths[columns] = max(len(line.rstrip()) for line in run("explain", tmp_path / "plan.json").stdout.splitlines())
    assert widths["80"] <= 80 < widths[""] <= 120 < widths["200"] <= 200
    assert widths[""] == widths["0"] == widths["many"]


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5_deep"])
def test_ops_add_up_to_the_plan(name: str, kind: str) -> None:
    plan = _plan_for(name, *PLANS[kind])
    step = plan.seconds.step
    sums = add_parts(op.seconds for op in plan.ops)
    for field in fields(Seconds):
        expected = 0.0 if field.name == "bubble" else getattr(plan.seconds, field.name)
        assert getattr(sums, field.name) == pytest.approx(expected, rel=1e-9, abs=1e-12 * step), field.name
    # Of each group, and of the tables.
    for group in plan.groups:
        rows = list_op_rows(plan, group)
        costs = plan.rows_of(group)
        assert sum(row.seconds for row in rows) == pytest.approx(sum(row.seconds for row in costs), rel=1e-9, abs=1e-12 * step)
        assert sum(row.hidden for row in rows) == pytest.approx(sum(row.hidden for row in costs), rel=1e-9, abs=1e-12 * step)
    groups = list_group_rows(plan)
    assert sum(row.seconds for row in groups) == pytest.approx(step, rel=1e-9)
    assert sum(row.exposed for row in groups) == pytest.approx(plan.seconds.communication, rel=1e-9)
    assert sum(row.waiting for row in groups) == plan.seconds.bubble
    assert sum(row.nbytes for row in groups) == pytest.approx(sum(traffic.nbytes for traffic in plan.traffic), rel=1e-6)
    assert {op.op for op in plan.ops if op.op in plan.placements} == set(plan.placements)


def test_ops_in_halves_and_on_gpus_add_up() -> None:
    """Where gathers are begun ahead and halves take turns, hidden seconds are spread over ops."""
    for pins in ((("dp", 8), ("fsdp", True)), (("tp", 4), ("half_batches", True))):
        plan = _plan_for("llama_tied", *pins, cluster="8xH100" if pins[0][0] == "dp" else "4xH100")
        hidden = sum(row.hidden for row in plan.costs)
        assert hidden > 0
        assert sum(op.hidden for op in plan.ops) == pytest.approx(hidden, rel=1e-9)
        assert sum(op.seconds.communication for op in plan.ops) == pytest.approx(plan.seconds.communication, rel=1e-9)


@pytest.mark.parametrize("kind", PLANS)
def test_parts_of_candidates_add_up(kind: str) -> None:
    proof = _plan_for("llama_tied", *PLANS[kind]).proof
    known = [candidate for candidate in proof.candidates if candidate.parts is not None]
    assert proof.candidates[proof.chosen] in known
    for candidate in known:
        assert candidate.parts is not None
        assert candidate.parts.step == pytest.approx(candidate.step_seconds, rel=1e-9)
        assert candidate.basis != "bound"


@pytest.mark.parametrize("kind", PLANS)
def test_the_chosen_candidate_says_what_the_plan_says(kind: str) -> None:
    plan = _plan_for("llama_tied", *PLANS[kind])
    chosen = plan.proof.candidates[plan.proof.chosen]
    assert chosen.parts is not None
    for part, seconds in split_terms(chosen.parts).items():
        assert seconds == pytest.approx(split_terms(plan.seconds)[part], rel=1e-6, abs=1e-12), part
    assert chosen.memory_bytes == plan.memory.total - plan.memory.reserved
    assert (chosen.kind == "pipeline") == (plan.pipeline.ranks > 1)
    for name, size in zip(plan.mesh.names, plan.mesh.sizes, strict=True):
        assert size == 1 or f"{name}={size}" in chosen.mesh


def test_flops_of_a_model_are_those_of_its_products() -> None:
    done = run("plan", "examples/mlp.py:build", "--cluster", "4xcpu", "--json")
    work = json.loads(done.stdout)["plan"]["work"]
    # The first product's operand is an input, which gets no gradient.
    assert work["flops"] == 2 * 256 * (2 * 64 * 256 + 3 * 256 * 256 + 3 * 256 * 10)
    assert (work["samples"], work["tokens"], work["dtype"]) == (256, None, "float32")


def test_flops_of_a_language_model_are_near_the_papers() -> None:
    plan = _plan_for("llama_tied")
    work = plan.work
    assert work.tokens is not None
    assert work.tokens > work.samples
    matrices = [op for op in plan.ops if op.target == "aten.linear.default"]
    assert work.flops >= 3 * sum(op.flops for op in matrices)


def test_rates_are_of_the_plans_numbers() -> None:
    plan = make_plan()
    rates = find_rates(plan)
    assert rates is not None
    assert rates.tokens == 1024 / plan.seconds.step
    assert rates.samples == 8 / plan.seconds.step
    assert rates.utilisation == 3.3e13 / (8 * 989e12 * plan.seconds.step)
    data = to_data(plan)
    assert data["rates"] == {"samples": rates.samples, "tokens": rates.tokens, "utilisation": rates.utilisation}
    assert find_rates(replace(plan, costs=())) is None
    assert "tokens/s" not in summarize(replace(plan, work=replace(plan.work, tokens=None)))


def test_the_runner_up_is_of_another_kind_and_its_difference_is_the_plans() -> None:
    plan = make_plan()
    runner_up = find_runner_up(plan)
    assert runner_up is not None
    assert (runner_up.candidate.kind, runner_up.candidate.mesh) == ("data parallel", "dp=8")
    assert runner_up.more == pytest.approx(0.0123 - plan.seconds.step)
    assert sum(seconds for _, seconds in runner_up.terms) == pytest.approx(runner_up.more)
    assert runner_up.terms[0] == ("communication", pytest.approx(0.0013))
    (text,) = word_reasons(plan)
    assert "+11.8%: 1.30 ms more exposed communication" in text


def _with_candidates(plan: Plan, *candidates: Any) -> Plan:
    chosen = plan.proof.candidates[plan.proof.chosen]
    return replace(plan, proof=replace(plan.proof, candidates=(chosen, *candidates), chosen=0))


def test_bounds_and_estimates_are_marked() -> None:
    plan = make_plan()
    found = plan.proof.candidates[1]
    assert format_step(found) == format_seconds(0.0123)
    bound, estimate = (replace(found, basis=basis, parts=None) for basis in ("bound", "estimate"))
    assert (format_step(bound), format_step(estimate)) == ("≥ 12.3 ms", "~12.3 ms")
    assert format_step(replace(found, step_seconds=None)) == "-"
    assert (
        "data parallelism alone (dp=8), at least 12.3 ms (+11.8%) by the search's costs, and not"
        in word_reasons(_with_candidates(plan, bound))[0]
    )
    (text,) = word_reasons(_with_candidates(plan, estimate))
    assert text == (
        "Closest of another kind: data parallelism alone (dp=8), an estimated 12.3 ms (+11.8%) and not searched further;"
        ' --why-not "dp=8" plans it.'
    )


def test_what_is_closer_than_all_that_was_found_comes_first() -> None:
    plan = make_plan()
    found = replace(plan.proof.candidates[1], step_seconds=0.02, kind="pipeline", mesh="pp=4 x dp=2, 4 micro-batches")
    found = replace(found, name="pipeline", outcome="1f1b: greedy assignment, not searched")
    hoped = replace(found, step_seconds=0.0115, parts=None, basis="estimate", mesh="pp=8, 8 micro-batches", outcome="not tried")
    data = replace(hoped, kind="data parallel", name="search", basis="bound", step_seconds=0.0112, mesh="dp=8")
    free = replace(data, kind="not solved", step_seconds=0.0111, mesh="x=4 x y=2")
    plan = _with_candidates(plan, free, hoped, found, data)
    runner_up = find_runner_up(plan)
    assert runner_up is not None
    assert (runner_up.candidate, find_untried(plan)) == (found, data)
    first, second = word_reasons(plan)
    assert first.startswith(
        "Closest of another kind: data parallelism alone (dp=8), at least 11.2 ms (+1.8%) by the search's costs, and not"
    )
    assert second.startswith(
        "The best found: a pipeline (pp=4 x dp=2, 4 micro-batches, 1f1b, a greedy assignment) would take 20.0 ms, +81.8%"
    )
    assert "weren't tried" not in first + second
    # Of the kind that was found, too.
    assert (
        'an estimated 11.5 ms (+4.5%) and not searched further; --why-not "pp=8,microbatches=8"'
        in (word_reasons(_with_candidates(plan, hoped, found))[0])
    )
    # What was found and is faster needs no word on the others; what wasn't solved may be of any kind.
    faster = replace(found, step_seconds=0.0112)
    assert find_untried(_with_candidates(plan, hoped, faster)) is None
    (text, _) = word_reasons(_with_candidates(plan, free, found))
    assert "Closest of what wasn't solved: a mesh of free axes (x=4 x y=2), at least 11.1 ms" in text
    assert "`autopar plan` with --mesh x=4,y=2 plans it" in text
    assert to_data(plan)["why"]["untried"]["mesh"] == "dp=8"


def test_baselines_are_said_to_be_baselines() -> None:
    plan = make_plan()
    chosen = replace(plan.proof.candidates[1], kind="data parallel")
    megatron = replace(plan.proof.candidates[4], name="Megatron", mesh="tp=8", step_seconds=0.02, basis="bound", parts=None)
    plan = replace(plan, proof=replace(plan.proof, candidates=(chosen, megatron), chosen=0))
    (text,) = word_reasons(plan)
    assert "tensor parallelism (as the baseline Megatron, tp=8), at least 20.0 ms" in text
    assert '--why-not "tp=8" plans its mesh' in text
    screen = _render(plan)
    assert "baseline Megatron" in screen
    assert "a baseline's bound isn't its kind's" in screen
    assert "baseline" not in _render(make_plan())


def test_kinds_that_do_not_fit_are_named() -> None:
    plan = make_plan()
    texts = word_reasons(_with_candidates(plan, plan.proof.candidates[3]))
    assert texts == ["Data parallelism alone doesn't fit: 96.0 GB at the least, 79.0 GB are there."]
    assert word_reasons(_with_candidates(plan)) == ["No candidate of another kind was solved or estimated."]


def test_candidates_stand_by_kind_with_the_plan_first() -> None:
    groups = group_candidates(make_plan())
    assert list(groups) == ["tensor parallel", "data parallel", "not solved"]
    assert [candidate.name for candidate in groups["tensor parallel"]] == ["search", "Megatron"]
    other = make_plan()
    other = replace(other, proof=replace(other.proof, chosen=4))
    assert [candidate.name for candidate in group_candidates(other)["tensor parallel"]] == ["Megatron", "search"]
    short, long = _render(make_plan()), _render(make_plan(), everything=True)
    assert "best of each kind, 5 looked at" in short
    assert "Megatron" not in short
    assert "Megatron" in long


def test_a_gap_is_said_to_be_to_a_bound() -> None:
    plan = make_plan()
    assert "takes less than 10.9 ms; the step is within 0.5% of that bound" in describe_proof(plan)
    equal = replace(plan, proof=replace(plan.proof, bound_ns=plan.proof.objective_ns, gap=0.0))
    limits = "on this mesh, on which tp splits features, within the pins given, takes less. The solver"
    assert f"no choice of placements {limits}" in describe_proof(equal)


def test_the_proof_says_of_which_plans_it_is() -> None:
    plan = make_plan()

    def scope(**request: Any) -> str:
        return describe_proof(replace(plan, request=replace(Request(cluster="8xH100"), **request))).partition(" takes less")[0]

    free = "by the search's costs, no choice of placements on this mesh"
    assert scope() == scope(pins=Pins(pp=1)).removesuffix(", within the pins given,") == free
    assert scope(mesh=Mesh(("dp", "tp"), (2, 4))) == f"{free}, on which dp splits the batch and tp splits features,"
    assert scope(pins=Pins(tp=4)) == f"{free}, on which tp splits features,"
    assert scope(pins=Pins(fsdp=True)) == f"{free}, within the pins given,"
    halves = replace(
        plan, proof=replace(plan.proof, status="feasible without half batches", method="LP, integral; cutting planes, 1 round")
    )
    assert describe_proof(halves).partition("The solver")[2] == (
        " ended as feasible, its bound is that of plans without half batches (a linear program with an integral solution; cutting planes,"
        " 1 round); candidates looked at: 5"
    )


def test_free_axes_can_be_asked_for(tmp_path: Path) -> None:
    model = ["plan", "examples/mlp.py:build", "--cluster", "4xcpu", "-o"]
    run(*model, tmp_path / "free.json")
    text = run("explain", tmp_path / "free.json").stdout
    mesh = " ".join(text.split()).partition("free axes, named by what they do: --mesh ")[2].partition(" asks for them")[0]
    run(*model, tmp_path / "asked.json", "--mesh", mesh)
    free, asked = (Plan.load(tmp_path / name) for name in ("free.json", "asked.json"))
    assert mesh
    assert (asked.mesh.sizes, asked.placements, asked.seconds) == (free.mesh.sizes, free.placements, free.seconds)
    assert "named by what they do" not in run("explain", tmp_path / "asked.json").stdout
    assert "named by what they do" not in summarize(make_plan())
    pinned = replace(free, request=replace(free.request, pins=Pins(dp=4)))
    assert "named by what they do" not in summarize(pinned)


def test_communication_inside_ops_is_said_in_words() -> None:
    plan = make_plan()
    kernel = tuple(replace(row, purpose=Purpose.KERNEL) if row.purpose == Purpose.ACTIVATIONS else row for row in plan.costs)
    inside = replace(plan, costs=kernel)
    text = " ".join(_render(inside, everything=True).split())
    assert "inside attention, convolutions, losses and norms" in text
    assert "kernel" not in text
    difference = _render_diff(plan, inside)
    assert "tp all_reduce, inside attention, convolutions, losses and norms" in difference
    assert "kernel" not in difference
    assert {traffic["purpose"] for traffic in to_data(inside)["traffic"]} == {"gradients", "kernel"}


def test_a_batch_that_ranks_cannot_share_is_said_to_be() -> None:
    plan = make_plan()
    odd = replace(plan, work=replace(plan.work, samples=6))
    assert "batch   6 samples, which 8 ranks can't share equally" in summarize(odd)
    assert "share equally" not in summarize(plan)


def test_copies_of_parameters_are_shown() -> None:
    plan = make_plan()
    text = f"{format_bytes(plan.memory.copies)} are copies in bfloat16, which the program reads"
    assert text in summarize(plan)
    assert text in _render(plan)
    assert "copies" not in summarize(replace(plan, memory=replace(plan.memory, copies=0)))
    apart = summarize(replace(plan, memory=replace(plan.memory, apart=5_000_000)))
    assert "; minus 5.00 MB that are never held at the same time as others" in apart


def test_diff(golden: Golden) -> None:
    golden("diff.txt", _render_diff(make_plan(), make_pipelined_plan()))


def test_equal_plans_are_said_to_be_equal() -> None:
    assert _render_diff(make_plan(), make_plan()) == "The plans are equal.\n"
    assert diff_data(make_plan(), make_plan()) == {"equal": True, "warnings": [], "changes": []}


def test_changes_are_the_plans_numbers() -> None:
    before, after = make_plan(), make_pipelined_plan()
    changes = {(change.about, change.name): (change.before, change.after) for change in find_changes(before, after)}
    assert changes["step", "bubble"] == (before.seconds.bubble, after.seconds.bubble)
    assert changes["step", "step"] == (before.seconds.step, after.seconds.step)
    assert changes["decisions", "schedule"] == ("none", "interleaved")
    assert changes["exposed communication", "pp send, between stages"] == (None, 0.0)
    assert changes["bytes moved", "pp send, between stages"] == (None, 96_000_000)
    assert ("decisions", "precision") not in changes
    assert not [key for key in changes if key[0] == "layouts"]


def test_the_kinds_of_memory_add_up_in_a_difference() -> None:
    before = make_plan()
    after = replace(before, memory=replace(before.memory, workspace=10**8, apart=50_000_000))
    before = replace(before, memory=replace(before.memory, apart=3_000_000_000))
    changes: dict[str, Any] = {change.name: change for change in find_changes(before, after) if change.about == "memory"}
    assert (changes["not at once"].before, changes["not at once"].after) == (-3_000_000_000, -50_000_000)
    more = {name: change.after - change.before for name, change in changes.items()}
    assert more.pop("total") == sum(more.values())


def test_what_a_plan_lacks_has_no_share_in_a_difference() -> None:
    text = _render_diff(make_plan(), make_pipelined_plan())
    assert "-100.0%" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("best pipeline"))
    assert row.split() == ["best", "pipeline", "-", "15.0", "ms", "-"]
    hardly = replace(make_plan(), memory=replace(make_plan().memory, workspace=1000))
    assert "%" not in next(line for line in _render_diff(hardly, make_plan()).splitlines() if line.startswith("workspace"))


def test_a_change_of_any_field_is_a_difference() -> None:
    plan = make_plan()
    smaller = replace(plan, memory=replace(plan.memory, workspace=1))
    assert [(change.about, change.name) for change in find_changes(plan, smaller)] == [("memory", "workspace"), ("memory", "total")]
    (change,) = find_changes(plan, replace(plan, notes=(), outputs=()))
    assert (change.name, change.after) == ("other fields", "notes, outputs")
    assert [change.name for change in find_changes(plan, replace(plan, cluster="2x4xh100"))] == ["cluster"]


def test_splits_that_have_one_name_are_told_apart() -> None:
    plan = _plan_for("llama_tied", *PLANS["free"])
    op = next(op for op in plan.ops if op.splits and len(op.loops) > 2)
    axis = plan.mesh.names.index(next(iter(op.splits)))
    own = plan.placements[op.op][axis]
    assert own is not None
    other = next(loop for loop in op.loops if loop != own.loop)
    placement = tuple(replace(own, loop=other) if index == axis else part for index, part in enumerate(plan.placements[op.op]))
    changes = find_changes(plan, replace(plan, placements={**plan.placements, op.op: placement}))
    assert [(change.about, change.name) for change in changes] == [("placements", f"{op.path or op.group}: {op.op}")]


def test_plans_of_different_things_are_compared_with_a_warning() -> None:
    plan = make_plan()
    assert find_warnings(plan, plan) == []
    assert "different graphs (GPT2LMHeadModel and Other)" in find_warnings(plan, replace(plan, model="Other"))[0]
    assert "captured differently" in find_warnings(plan, replace(plan, fingerprint="1"))[0]
    assert "different clusters: 1x8xh100 and 2x4xh100" in find_warnings(plan, replace(plan, cluster="2x4xh100"))[0]
    assert "compare tokens/s" in find_warnings(plan, replace(plan, inputs={}))[0]


def test_diff_on_the_command_line(tmp_path: Path) -> None:
    for name, plan in (("a.json", make_plan()), ("b.json", make_pipelined_plan())):
        plan.save(tmp_path / name)
    shown = run("diff", tmp_path / "a.json", tmp_path / "b.json")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "warning: the plans are for different clusters" in shown.stdout
    data = run("diff", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert json.loads(data.stdout) == json.loads(json.dumps(diff_data(make_plan(), make_pipelined_plan())))
    assert run("diff", tmp_path / "a.json", tmp_path / "a.json").stdout == "The plans are equal.\n"
    assert "can't be read" in refuse("diff", tmp_path / "a.json", tmp_path / "absent.json")
