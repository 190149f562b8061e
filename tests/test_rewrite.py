"""The emitted program as text: layers once, collectives by name and axis; a foreign plan is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from autopar.api import plan as find_plan
from autopar.capture.export import capture
from autopar.errors import PlanError
from autopar.ir.graph import OpKind
from autopar.ir.layout import Mesh, Split, parse_layout, shard
from autopar.plans.plan import Plan
from autopar.rewrite.emit import rewrite


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Tagger(nn.Module):
    """Embedding, two like blocks and a classifier over the vocabulary, with the loss inside."""

    def __init__(self, width: int = 16, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 32, (4, 8)), torch.randint(0, 32, (4, 8))


def program_text(module: fx.GraphModule) -> str:
    parts = [module.code.strip()]
    parts += [f"# {name}\n{child.code.strip()}" for name, child in module.named_children() if isinstance(child, fx.GraphModule)]
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize(
    ("name", "pins"),
    [
        ("megatron", {"dp": 2, "tp": 2, "zero": 0}),
        ("zero", {"dp": 4, "fsdp": True}),
        ("zero_2", {"dp": 2, "tp": 2, "zero": 2}),
    ],
)
def test_the_program_reads(name: str, pins: dict[str, object], golden: Callable[[str, str], None]) -> None:
    model = Tagger()
    plan = find_plan(model, inputs(), "4xcpu", pins=pins)
    program = rewrite(capture(model, inputs()), plan)
    assert isinstance(program.module, fx.GraphModule)
    assert sum(node.op == "call_module" for node in program.module.graph.nodes) == 2
    golden(f"program_{name}.txt", program_text(program.module))


def test_stages_read(golden: Callable[[str, str], None]) -> None:
    """What the second stage receives, takes of its micro-batch and is given of the whole batch; weight gradients wait (ZB-H1)."""
    model = Tagger()
    plan = find_plan(model, inputs(), "2xcpu", pins={"pp": 2, "microbatches": 4, "schedule": "zb-h1", "blocks.1": {"pp": 1}})
    program = rewrite(capture(model, inputs()), plan)
    assert program.pipeline is not None
    parts = []
    for number, stage in program.pipeline.stages.items():
        for name, module in (("stage", stage.module), ("prologue of stage", stage.prologue)):
            if isinstance(module, fx.GraphModule):
                parts.append(f"# {name} {number}\n{program_text(module)}")
    golden("program_stages.txt", "\n".join(parts))


def test_only_the_stages_of_a_pipeline_rank_are_made() -> None:
    model = Tagger()
    captured = capture(model, inputs())
    plan = find_plan(model, inputs(), "2xcpu", pins={"pp": 2, "microbatches": 4, "schedule": "1f1b"})
    everything, second = (rewrite(captured, plan, pipeline_rank=pipeline_rank) for pipeline_rank in (None, 1))
    assert everything.pipeline is not None
    assert second.pipeline is not None
    assert list(everything.pipeline.stages) == [0, 1]
    assert list(second.pipeline.stages) == [1]
    assert (second.parameters, second.outputs) == (everything.parameters, everything.outputs)


def test_a_micro_batch_must_be_as_large_as_its_parts() -> None:
    model = Tagger()
    rows = len(inputs()[0])
    plan = find_plan(model, inputs(), "2xcpu", pins={"dp": 2, "microbatches": rows // 2})
    rewrite(capture(model, inputs()), plan)
    with pytest.raises(
        PlanError, match=rf"plan\.pipeline\.microbatches is {rows}: a micro-batch of .* at .* can't be split as plan\.placements"
    ):
        rewrite(capture(model, inputs()), replace(plan, pipeline=replace(plan.pipeline, microbatches=rows)))


class Counter(nn.Module):
    """Writes a mean over the batch to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(x)
        self.mean.mul_(0.9).add_(y.detach().mean(0))
        return y.square().mean()


@pytest.mark.parametrize(
    ("position", "layout", "message"),
    [
        (0, "P", r"plan\.outputs\[0\] has the state P"),
        (1, "S0", r"plan\.outputs\[1\], the new value of the buffer 'mean', must have the layout in which it is stored"),
    ],
)
def test_outputs_are_whole_or_split_and_buffers_as_they_are_stored(position: int, layout: str, message: str) -> None:
    model, batch = Counter(), (torch.randn(8, 8),)
    plan = find_plan(model, batch, "2xcpu", pins={"dp": 2})
    outputs = [*plan.outputs[:position], parse_layout(layout), *plan.outputs[position + 1 :]]
    with pytest.raises(PlanError, match=message):
        rewrite(capture(model, batch), replace(plan, outputs=tuple(outputs)))


def test_a_value_that_crosses_needs_a_layout() -> None:
    model = Tagger()
    plan = find_plan(model, inputs(), "2xcpu", pins={"pp": 2, "microbatches": 4, "schedule": "1f1b"})
    with pytest.raises(PlanError, match=r"plan\.pipeline\.travel has no layout for '\w+', which crosses"):
        rewrite(capture(model, inputs()), replace(plan, pipeline=replace(plan.pipeline, travel={})))


def test_blocks_of_another_chain_are_refused() -> None:
    model = Tagger()
    plan = find_plan(model, inputs(), "2xcpu", pins={"pp": 2, "microbatches": 4, "schedule": "1f1b"})
    with pytest.raises(PlanError, match=r"the plan's blocks are .*; the model has "):
        rewrite(capture(model, inputs()), replace(plan, pipeline=replace(plan.pipeline, blocks=plan.pipeline.blocks[1:])))


def test_zero_keeps_no_gathered_weight_and_defers_what_is_whole() -> None:
    model = Tagger()
    plan = find_plan(model, inputs(), "4xcpu", pins={"dp": 4, "fsdp": False})
    program = rewrite(capture(model, inputs()), plan)
    assert not program.regather
    assert all(slot.partial_axes == ("dp",) for slot in program.parameters)
    plan = find_plan(model, inputs(), "4xcpu", pins={"dp": 4, "fsdp": True})
    program = rewrite(capture(model, inputs()), plan)
    assert program.regather
    assert all(slot.partial_axes == () for slot in program.parameters)


def test_the_captured_graph_is_left_alone() -> None:
    model = Tagger()
    captured = capture(model, inputs())
    before = captured.fx.code
    rewrite(captured, find_plan(model, inputs(), "4xcpu", pins={"tp": 4}))
    assert captured.fx.code == before


def test_a_plan_for_another_model_is_refused() -> None:
    plan = find_plan(Tagger(), inputs(), "4xcpu", pins={"tp": 4})
    with pytest.raises(PlanError, match="made for another model"):
        rewrite(capture(Tagger(width=32), inputs()), plan)
    other = (torch.randint(0, 32, (8, 8)), torch.randint(0, 32, (8, 8)))
    with pytest.raises(PlanError, match=r"input tokens is int64\[4, 8\] in the plan, int64\[8, 8\] here"):
        rewrite(capture(Tagger(), other), plan)


def _without(plan: Plan, part: str, name: str) -> Plan:
    return replace(plan, **{part: {key: value for key, value in getattr(plan, part).items() if key != name}})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda plan, call, _: _without(plan, "placements", call), "plan.placements has nothing for"),
        (lambda plan, call, _: replace(plan, placements={**plan.placements, call: (Split("nowhere"),)}), "is no way to split"),
        (lambda plan, call, _: replace(plan, placements={**plan.placements, call: (None, None)}), "is no way to split"),
        (lambda plan, _, tensor: _without(plan, "layouts", tensor), "plan.layouts has nothing for"),
        (lambda plan, _, tensor: replace(plan, layouts={**plan.layouts, tensor: (shard(9),)}), "doesn't fit"),
        (lambda plan, *_: replace(plan, mesh=Mesh(("micro",), plan.mesh.sizes)), "no axis of the mesh of a pipeline rank"),
        (lambda plan, *_: replace(plan, pipeline=replace(plan.pipeline, travel={"nobody": (shard(0),)})), "names nothing of the model"),
    ],
)
def test_an_edited_plan_that_can_not_be_carried_out_is_refused(edit: Callable[..., Plan], says: str) -> None:
    model = Tagger()
    captured = capture(model, inputs())
    plan = find_plan(model, inputs(), "2xcpu", mesh={"tp": 2})
    call = next(op.name for op in captured.graph.of_kind(OpKind.CALL) if op.target == "aten.linear.default")
    tensor = captured.graph.of_kind(OpKind.PARAMETER)[0].name
    rewrite(captured, plan)
    with pytest.raises(PlanError, match=says):
        rewrite(captured, edit(plan, call, tensor))
