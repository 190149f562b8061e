"""What a plan file says must be possible: what can't be true is refused with the field's name, whatever the file holds."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import autopar
from autopar.errors import PlanError
from autopar.plans.plan import VERSION, Plan, from_json, to_json
from autopar.report.summary import summarize
from autopar.report.tables import explain
from autopar.texts import printable
from tests.plans import make_pipelined_plan, make_plan, set_field

HUGE = 10**400


def _all(*changes: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def change(plan: dict[str, Any]) -> None:
        for each in changes:
            each(plan)

    return change


def _spoil(plan: Plan, change: Callable[[dict[str, Any]], Any]) -> str:
    """The text of a plan after `change` of its data."""
    document = json.loads(to_json(plan))
    change(document["plan"])
    return json.dumps(document)


def test_a_field_that_stands_twice_is_refused() -> None:
    for name, twice in (
        ("version", f'"version": {VERSION}, "version": {VERSION}'),
        ("parameters", '"parameters": 1000000000, "parameters": 1000000000'),
    ):
        text = to_json(make_plan()).replace(f'"{name}": {twice.rpartition(" ")[2]}', twice)
        with pytest.raises(PlanError, match=f"the field '{name}' stands twice in one object"):
            from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("cluster", to="1x0xh100"), "plan.cluster is '1x0xh100', which is no cluster"),
        (set_field("cluster", to="8xh100"), "plan.cluster is '8xh100', which is no cluster"),
        (set_field("cluster", to="-1x-8xh100"), "plan.cluster is '-1x-8xh100', which is no cluster"),
        (set_field("cluster", to="1x8x"), "plan.cluster is '1x8x', which is no cluster"),
        (set_field("cluster", to="1x4xh100"), "plan.mesh is dp=2 x tp=4, 8 ranks; plan.cluster is '1x4xh100', 4 devices"),
        (set_field("cluster", to=f"1x{10**9}xh100"), "plan.mesh is dp=2 x tp=4, 8 ranks; plan.cluster is"),
        (set_field("cluster", to=f"{10**9}x{10**9}xh100"), "plan.cluster is '1000000000x1000000000xh100'; there are clusters of up to"),
        (set_field("cluster", to=f"1x{HUGE}xh100"), "plan.cluster is '1x10000"),
        (
            set_field("mesh", "sizes", to=[2**40, 2**40]),
            "plan.mesh is dp=1099511627776 x tp=1099511627776 and plan.pipeline.ranks 1, more than",
        ),
        (set_field("mesh", "names", to=["dp", "dp"]), "plan.mesh: axes ('dp', 'dp') and sizes (2, 4) don't match"),
        (set_field("mesh", "names", to=["dp", ""]), "plan.mesh.names[1] is empty"),
        (set_field("mesh", "names", to=["dp", "micro"]), "plan.mesh has an axis 'micro', which is no axis of the mesh of a pipeline rank"),
        (set_field("mesh", "names", to=["pp", "tp"]), "plan.mesh has an axis 'pp', which is no axis of the mesh of a pipeline rank"),
        (set_field("mesh", "names", to=["dp", "t p"]), "plan.mesh has an axis 't p'; the name of an axis is a word, such as dp"),
        (set_field("batch_axes", to=["dp", "dp"]), "plan.batch_axes is dp, dp; each axis is named once, in the order of the mesh"),
        (set_field("batch_axes", to=["tp", "dp"]), "plan.batch_axes is tp, dp; each axis is named once, in the order of the mesh"),
        (set_field("layouts", "input_ids", to="S-1,R"), "plan.layouts['input_ids']: 'S-1' is no state of a layout"),
        (set_field("layouts", "input_ids", to=f"S{2**63},R"), "plan.layouts['input_ids']: the dim is larger than any number of 64 bits"),
        (set_field("layouts", "input_ids", to=f"S0/{2**63},R"), "plan.layouts['input_ids']: S0/9223372036854775808 splits inside"),
        (set_field("layouts", "input_ids", to=f"S{'9' * 5000},R"), "plan.layouts['input_ids']: Exceeds the limit"),
        (
            set_field("layouts", "input_ids", to="P,R"),
            "plan.layouts: 'input_ids' has the state P; what is stored or returned is",
        ),
        (set_field("layouts", "input_ids", to="B,R"), "plan.layouts: 'input_ids' has the state B"),
        (set_field("layouts", "", to="R,R"), "plan.layouts: a name is empty"),
        (set_field("layouts", "\x9b2J", to="R,R"), r"plan.layouts: a name holds '\x9b', which is no printable character"),
        (set_field("outputs", 0, to="R,B"), "plan.outputs: 'output 0' has the state B"),
        (set_field("outputs", 0, to="R,P"), "plan.outputs: 'output 0' has the state P"),
        (set_field("outputs", 0, to="R,S1/0"), "plan.outputs[0]: S1/0 splits inside 0 outer blocks"),
        (set_field("placements", "view", to="b/0,-"), "plan.placements['view']: b/0 splits inside 0 outer blocks"),
        (set_field("inputs", "labels", to="int64[8, -128]"), "plan.inputs: 'labels' is 'int64[8, -128]', which is no type of a tensor"),
        (set_field("inputs", "labels", to=f"int64[{'9' * 5000}]"), "plan.inputs: 'labels' is 'int64[999"),
        (
            set_field("inputs", "labels", to=f"int64[8, {2**62}]"),
            f"plan.inputs: 'labels' is 'int64[8, {2**62}]', a tensor of more elements than any number of 64 bits",
        ),
        (set_field("memory", to=dict.fromkeys(json.loads(to_json(make_plan()))["plan"]["memory"], 2**62)), "plan.memory adds up to"),
        (set_field("bucket_nbytes", to=-1), "plan.bucket_nbytes is -1, an integer from 0 is needed"),
        (set_field("costs", 6, "purpose", to="compute"), "plan.costs[6] is compute with axis 'dp'; a rank does it alone"),
        (set_field("costs", 6, "axis", to="cp"), "plan.costs[6].axis is 'cp', the mesh has dp=2 x tp=4"),
        (set_field("costs", 6, "axis", to="pp"), "plan.costs[6].axis is 'pp', the mesh has dp=2 x tp=4"),
        (set_field("costs", 6, "axis", to=""), "plan.costs[6] has axis '' and collective 'all_reduce'; both are empty, or neither"),
        (set_field("costs", 0, "collective", to="send"), "plan.costs[0] has axis '' and collective 'send'; both are empty, or neither"),
        (
            set_field("costs", 0, "phase", to="night"),
            "plan.costs[0].phase is 'night'; known are forward, input gradient, weight gradient, step",
        ),
        (set_field("costs", 0, "purpose", to="fun"), "plan.costs[0].purpose is 'fun'; known are compute, recompute, optimizer"),
        (
            set_field("costs", 0, "layer", to="encoder.*"),
            "plan.costs[0].layer is 'encoder.*', which is the name of no group in plan.groups",
        ),
        (set_field("costs", 1, "count", to=-1), "plan.costs[1].count is -1, a number from 0 is needed"),
        (set_field("costs", 1, "nbytes", to=2**63), "plan.costs[1].nbytes is larger than any number of 64 bits"),
        (set_field("costs", 1, "seconds", to=-1e-9), "plan.costs[1].seconds is -1e-09, a number from 0 is needed"),
        (set_field("costs", 1, "nbytes", to=2**63 - 1), "plan.costs[1].nbytes is larger than any number of 64 bits"),  # as a float it is
        (set_field("costs", 1, "hidden", to=1e300), "plan.costs[1].hidden is larger than any number of 64 bits"),
        (set_field("groups", 0, "axes", to={"cp": "sequence"}), "plan.groups[0].axes names 'cp', the mesh has dp=2 x tp=4"),
        (set_field("groups", 0, "paths", to=[]), "plan.groups[0].paths has 0 layers; only the group 'outside of layers' has none"),
        (set_field("groups", 1, "paths", to=["lm_head"]), "plan.groups[1].paths has 1 layers; only the group 'outside of layers' has none"),
        (set_field("groups", 0, "paths", 2, to="transformer.h.0"), "plan.groups[0].paths lists 'transformer.h.0' a second time"),
        (set_field("groups", 0, "paths", 2, to=""), "plan.groups[0].paths[2] is empty"),
        (set_field("groups", 0, "tensors", "p_lm_head", to="lm_head"), "plan.groups[0].tensors names 'p_lm_head', which has no layout"),
        (
            set_field("groups", 0, "tensors", "p_transformer_wte_weight", to="wte"),
            "plan.groups[1].tensors lists 'p_transformer_wte_weight', 'transformer.wte.weight' a second time; a tensor is in one group",
        ),
        (
            set_field("groups", 1, "tensors", "p_transformer_wte_weight", to="transformer.h.0.mlp.c_fc.weight"),
            "plan.groups[1].tensors lists 'p_transformer_wte_weight', 'transformer.h.0.mlp.c_fc.weight' a second time",
        ),
        (
            set_field("groups", 1, "name", to="transformer.h.*"),
            "plan.groups[1].name is 'transformer.h.*'; each group has a name of its own",
        ),
        (set_field("costs", 1, "hidden", to=float("-inf")), "plan.costs[1].hidden: a finite number is needed, not -inf"),
        (
            set_field("proof", "bound_ns", to=11_000_001),
            "plan.proof.bound_ns is 11000001, a lower bound above plan.proof.objective_ns, 11000000",
        ),
        (set_field("proof", "gap", to=0.5), "plan.proof.gap is 0.5, but objective_ns and bound_ns are 0.005 apart"),
        (set_field("proof", "gap", to=-3.0), "plan.proof.gap is -3.0, a number from 0 is needed"),
        (set_field("proof", "chosen", to=-1), "plan.proof.chosen is -1, an integer from 0 is needed"),
        (set_field("proof", "chosen", to=None), "plan.proof.chosen: int is needed, not NoneType"),
        (set_field("proof", "chosen", to=5), "plan.proof.chosen is 5, but there are 5 candidates, numbered from 0"),
        (set_field("proof", "candidates", to=[]), "plan.proof.chosen is 0, but there are 0 candidates"),
        (
            set_field("proof", "chosen", to=1),
            "plan.proof.chosen is 1, a candidate whose step takes 0.0123 s, but plan.proof.objective_ns is 11000000",
        ),
        (set_field("proof", "chosen", to=3), "plan.proof.chosen is 3, a candidate whose step takes None s"),
        (set_field("proof", "candidates", 0, "kind", to="magic"), "plan.proof.candidates[0].kind is 'magic'; known are data parallel"),
        (set_field("proof", "candidates", 0, "basis", to="hope"), "plan.proof.candidates[0].basis is 'hope'; known are predicted, bound"),
        (
            set_field("proof", "candidates", 0, "free_mesh", to={"names": ["x"], "sizes": [4]}),
            "plan.proof.candidates[0].free_mesh is x=4, which asks for no plan on dp=2 x tp=4",
        ),
        (
            set_field("proof", "candidates", 0, "free_mesh", to={"names": ["x y", "z"], "sizes": [2, 4]}),
            "plan.proof.candidates[0].free_mesh is x y=2 x z=4, which asks for no plan",
        ),
        (set_field("proof", "candidates", 1, "parts", "bubble", to=0.1), "plan.proof.candidates[1].parts add up to 0.1123"),
        (set_field("memory", "copies", to=2_000_000_000), "plan.memory.copies is 2000000000, more than plan.memory.parameters, 1000000000"),
        (set_field("work", "samples", to=0), "plan.work.samples is 0, an integer from 1 is needed"),
        (set_field("work", "flops", to=-1.0), "plan.work.flops is -1.0, a number from 0 is needed"),
        (set_field("ops", 1, "op", to="view"), "plan.ops[1].op is 'view'; an op is there once, and has a placement or a layout"),
        (set_field("ops", 1, "op", to="other"), "plan.ops[1].op is 'other'; an op is there once, and has a placement or a layout"),
        (set_field("ops", 0, "group", to="decoder"), "plan.ops[0].group is 'decoder', which is the name of no group in plan.groups"),
        (set_field("ops", 1, "splits", to={"cp": "sequence"}), "plan.ops[1].splits names 'cp', the mesh has dp=2 x tp=4"),
        (set_field("ops", 1, "seconds", "bubble", to=0.1), "plan.ops[1].seconds.bubble is 0.1; waiting is no op's"),
        (set_field("ops", 1, "seconds", "forward", to=0.1), "plan.ops: their seconds add up to"),
        (set_field("ops", 1, "hidden", to=0.1), "plan.ops: their hidden add up to 0.1, those of plan.costs"),
        (set_field("ops", 1, "nbytes", to=1.0), "plan.ops: their nbytes add up to"),
        (
            set_field("costs", 0, "purpose", to="recompute"),
            "plan.costs[0] is 0.0027 s of recompute, but no block in plan.pipeline.blocks is run again",
        ),
        (set_field("proof", "variables", to=-1), "plan.proof.variables is -1, an integer from 0 is needed"),
        (
            set_field("proof", "candidates", 0, "memory_bytes", to=-1),
            "plan.proof.candidates[0].memory_bytes is -1, an integer from 0 is needed",
        ),
        (set_field("proof", "candidates", 0, "step_seconds", to=-0.5), "plan.proof.candidates[0].step_seconds is -0.5, a number from 0 is"),
        (
            set_field("proof", "candidates", 0, "mesh", to="dp=8\x1b[1A"),
            r"plan.proof.candidates[0].mesh holds '\x1b', which is no printable",
        ),
        (set_field("costs", 0, "seconds", to=6e18), "plan.proof.objective_ns is 11000000, but plan.costs add up to a step of "),
        (set_field("notes", 0, to="one line\nanother"), r"plan.notes[0] holds '\n', which is no printable character"),
        (
            set_field("unruled", 0, "source", to="x = 1  # \u202e"),
            r"plan.unruled[0].source holds '\u202e', which is no printable character",
        ),
        (set_field("fingerprint", to=""), "plan.fingerprint is empty"),
        (set_field("\x1b[2J", to=1), r"plan: fields unknown: \x1b[2J"),
    ],
)
def test_contradictions_are_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        from_json(_spoil(make_plan(), change))
    assert str(caught.value).startswith(message)


def _make_many_ranks(plan: dict[str, Any]) -> None:
    """A rank per block, 2,000 of each: of as many micro-batches as ranks, a schedule has millions of actions."""
    count = 2000
    blocks = [{"name": f"layers.{stage}", "path": f"layers.{stage}", "stage": stage, "recompute": "none"} for stage in range(count)]
    plan["pipeline"].update(ranks=count, schedule="1f1b", chunks=1, blocks=blocks)
    plan.update(cluster=f"{count}x8xh100")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_field("cluster", to="1x8xh100"),
            "plan.mesh is dp=2 x tp=4 on each of 2 pipeline ranks (plan.pipeline.ranks), 16 ranks; plan.cluster is '1x8xh100'",
        ),
        (set_field("pipeline", "ranks", to=2**62), "plan.mesh is dp=2 x tp=4 and plan.pipeline.ranks 4611686018427387904, more than"),
        (
            set_field("pipeline", "microbatches", to=10**12),
            "plan.pipeline.microbatches is 1000000000000, plan.pipeline.ranks is 2: on 4 stages a step",
        ),
        (_make_many_ranks, "plan.pipeline.microbatches is 4, plan.pipeline.ranks is 2000: on 2000 stages a step has more than"),
        (set_field("pipeline", "blocks", 2, "name", to=""), "plan.pipeline.blocks[2].name is empty"),
        (
            set_field("pipeline", "blocks", 2, "name", to="transformer.h.0"),
            "plan.pipeline.blocks[2].name is 'transformer.h.0', as that of a block before it",
        ),
        (set_field("pipeline", "travel", "add_3", to="B,R"), "plan.pipeline.travel: 'add_3' has the state B"),
        (set_field("pipeline", "travel", "add_3.-1", to="R,R"), "plan.pipeline.travel names 'add_3.-1', which is no value"),
        (set_field("pipeline", "travel", "add_3." + "9" * 5000, to="R,R"), "plan.pipeline.travel names 'add_3.999"),
        (
            _all(
                set_field("cluster", to="1x8xh100"),
                lambda plan: plan["pipeline"].update(ranks=1, schedule="gpipe", chunks=1, blocks=[]),
            ),
            "plan.pipeline.travel names 'add_3', but from a single stage nothing travels",
        ),
    ],
)
def test_contradictions_of_pipelines_are_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        from_json(_spoil(make_pipelined_plan(), change))
    assert str(caught.value).startswith(message)


def test_the_machine_of_a_plan_may_be_unknown_here() -> None:
    """A profile of one's own has a name of its own, and isn't opened."""
    plan = from_json(_spoil(make_plan(), set_field("cluster", to="2x4xour machines, 2nd floor")))
    assert plan.cluster == "2x4xour machines, 2nd floor"


def test_what_rounding_makes_is_no_contradiction() -> None:
    plan = from_json(_spoil(make_plan(), _all(set_field("costs", 0, "seconds", to=0.002701), set_field("proof", "gap", to=0.0050000001))))
    assert plan.seconds.forward == pytest.approx(0.003001)


def test_whole_numbers_may_stand_for_seconds() -> None:
    plan = from_json(_spoil(make_plan(), set_field("costs", 0, "hidden", to=0)))
    assert isinstance(plan.costs[0].hidden, float)
    assert to_json(plan) == to_json(make_plan())


def test_messages_are_short_whatever_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for change in (set_field("cluster", to="x" * 10**6), set_field("x" * 10**6, to=1), set_field("layouts", "y" * 10**6, to="Q")):
        path.write_text(_spoil(make_plan(), change), encoding="utf-8")
        with pytest.raises(PlanError) as caught:
            Plan.load(path)
        assert len(str(caught.value)) < 1500
    with pytest.raises(PlanError, match=r"plan version \[\[\[\[\[\[\[\.\.\.\]\]\]\]\]\]\], this autopar reads"):
        from_json(to_json(make_plan()).replace(f'"version": {VERSION}', '"version": ' + "[" * 900 + "]" * 900))
    with pytest.raises(PlanError, match="the top level: fields unknown: more"):
        from_json(to_json(make_plan()).replace(f'"version": {VERSION}', f'"version": {VERSION}, "more": 1'))


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(PlanError, match="can't be read"):
        Plan.load("plan\0.json")


def test_printable_texts_are_those_that_a_plan_holds() -> None:
    assert printable("x = f(a,\tb)  # \x1b[2J é 你好") == r"x = f(a,\tb)  # \x1b[2J é 你好"
    plan = from_json(_spoil(make_plan(), set_field("notes", 0, to=printable("\x00\u2028\ud800"))))
    assert plan.notes == (r"\x00\u2028\ud800",)


def _list_places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, item in items for place in _list_places(item, (*path, key)))]


_DOCUMENTS = [to_json(make_plan()), to_json(make_pipelined_plan())]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, 3, 4, 8, 10**12, 2**63, 10**30, HUGE, -1]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ["", "S0,R", "S0/0,R", "R,R", "P,B", "b,-", "+,+", "dp", "pp", "tp", "1f1b", "zb-v", "v-half", "interleaved", "1x8xcpu", "16x1xa"]
    ),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("dp"), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_file_loads_to_a_plan_or_is_refused(data: st.DataObject) -> None:
    """Whatever is put in the place of anything, is left out, or is said twice: no other error, and soon."""
    document = json.loads(data.draw(st.sampled_from(_DOCUMENTS)))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(_list_places(document)[1:]))
        target = document
        for key in path:
            target = target[key]
        how = data.draw(st.sampled_from(["put", "put", "put", "delete", "add", "repeat"]))
        if how == "delete":
            del target[last]
            break
        if how == "put":
            target[last] = data.draw(_VALUES)
        elif isinstance(target, dict):
            target[data.draw(st.text(max_size=4))] = target[last] if how == "repeat" else data.draw(_VALUES)
        else:
            target.append(target[last] if how == "repeat" else data.draw(_VALUES))
    _check_text(json.dumps(document))


@given(
    st.sampled_from(_DOCUMENTS),
    st.integers(0, 10**6),
    st.integers(0, 20),
    st.text(max_size=10) | st.sampled_from(["[" * 10**5, "9" * 5000]),
)
@settings(max_examples=200, deadline=None)
def test_a_damaged_text_loads_to_a_plan_or_is_refused(text: str, start: int, length: int, instead: str) -> None:
    start %= len(text)
    _check_text(text[:start] + instead + text[start + length :])


def _check_text(text: str) -> None:
    begin = time.process_time()
    try:
        plan = from_json(text)
    except PlanError as error:
        message = str(error)
    else:
        message = summarize(plan)
        assert from_json(to_json(plan)) == plan
        explain(plan, Console(file=io.StringIO(), width=120))
    message.encode()  # can be printed
    assert time.process_time() - begin < 1


class Folded(nn.Module):
    """Attention whose samples and heads are one dim, as those of torch's own `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (y.reshape(batch, tokens, 4, 4).transpose(1, 2).reshape(batch * 4, tokens, 4) for y in self.qkv(x).chunk(3, dim=-1))
        heads = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.out(heads.reshape(batch, 4, tokens, 4).transpose(1, 2).reshape(batch, tokens, width)).square().mean()


def test_what_a_micro_batch_reads_fits_its_own_sizes(tmp_path: Path) -> None:
    """A dim that holds samples and heads is split inside of each sample, of which a micro-batch has fewer."""
    plan = autopar.plan(Folded(), {"x": torch.randn(16, 8, 16)}, "4xcpu", pins={"pp": 1, "dp": 2, "tp": 2, "microbatches": 4})
    outers = {state.outer for reads in plan.reads.values() for read in reads for state in (*read.made, *read.need)}
    assert max(outers) == 4
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
