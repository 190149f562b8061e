"""What a picture of a plan shows: stages, boxes of like layers on them, and what moves along the edges. No picture is made here.

Comes in: a `Plan`. Goes out: an `Outline`, plain data that every kind of picture is made from (DOT here, pages elsewhere).

All numbers are the plan's own, or sums of them:

- rows of a box are the rows of its blocks (`Plan.pipeline.timing`) for all micro-batches of a step, on one rank of the box' stage. The rows
  of all boxes, divided by the number of pipeline ranks, add up to those rows of `Plan.costs` that are neither messages nor the bubble;
- rows of messages are those of one cut between two stages. All of them add up to the rows of messages in `Plan.costs`;
- bytes of a box are those of its group in `Plan.groups`, times the box' share of the group's layers, which are all alike. What is outside
  of layers has bytes in the plan for all such blocks together, so only a block that is the only one there has any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby

from autopar.ir import PIPELINE, StateKind
from autopar.plans import OUTSIDE, RECOMPUTE, STORAGE, BlockChoice, CostRow, Group, Phase, Plan, Purpose, RowSums
from autopar.report import describe_header, find_pipeline_ranks


class Kind(StrEnum):
    """What the mesh splits of a box' work: the key of its colour. Storage that is split (ZeRO) is no work and has no part in it."""

    NOTHING = "nothing"
    BATCH = "batch"
    FEATURES = "features"
    SEQUENCE = "sequence"
    BATCH_FEATURES = "batch and features"
    BATCH_SEQUENCE = "batch and sequence"
    FEATURES_SEQUENCE = "features and sequence"
    ALL = "batch, features and sequence"


class EdgeKind(StrEnum):
    """What an edge stands for: the order of boxes on a stage, exchanges of the ranks of one box, a message between stages."""

    NEXT = "next"
    EXCHANGE = "exchange"
    MESSAGE = "message"


@dataclass(frozen=True, slots=True)
class Box:
    """A run of like layers on one stage, or a block that is in no layer.

    Attributes:
        number: position among the boxes of the outline, in the order of the forward.
        stage: number of the stage.
        group: name of the group of layers in `Plan.groups`; `OUTSIDE` for what is in no layer.
        name: what to show, such as ``model.layers.0-7`` or ``lm_head``.
        blocks: names of the blocks in `Plan.pipeline`, first to last.
        axes: per mesh axis what it splits: ``{"dp": "batch, optimizer storage", "tp": "features, heads"}``. Of layers as their group says,
            of other blocks by the calls and parameters of the block's own module.
        kind: the key of the colour.
        recompute: what the backward runs again: ``none``, ``selective`` or ``full``.
        parameter_bytes: of the parameters on one rank; None where the plan doesn't say them of this box.
        activation_bytes: what autograd saves of one micro-batch on one rank if nothing is run again; None as before.
        rows: costs of the box in one step, on one rank of its stage, sums by layer, phase, purpose, axis and collective. Empty for a plan
            without timing.
    """

    number: int
    stage: int
    group: str
    name: str
    blocks: tuple[str, ...]
    axes: Mapping[str, str]
    kind: Kind
    recompute: str
    parameter_bytes: int | None
    activation_bytes: int | None
    rows: tuple[CostRow, ...]

    @property
    def count(self) -> int:
        """Number of blocks in the box."""
        return len(self.blocks)

    @property
    def compute_seconds(self) -> float:
        """Seconds of computing in a step, with recomputation, without the optimizer and exchanges."""
        return sum(row.seconds for row in self.rows if row.purpose in (Purpose.COMPUTE, Purpose.RECOMPUTE) and not row.axis)

    @property
    def exchange_seconds(self) -> float:
        """Exposed seconds of exchanges in a step, with those of recomputation."""
        return sum(row.seconds for row in self.rows if row.axis)

    @property
    def optimizer_seconds(self) -> float:
        """Seconds of the optimizer in a step."""
        return sum(row.seconds for row in self.rows if row.purpose == Purpose.OPTIMIZER and not row.axis)

    @property
    def seconds(self) -> float:
        """All exposed seconds in a step: computing, exchanges that aren't hidden, and the optimizer."""
        return sum(row.seconds for row in self.rows)


@dataclass(frozen=True, slots=True)
class Edge:
    """An arrow between two boxes, or from a box to itself.

    Attributes:
        start, end: numbers of boxes; the same for exchanges.
        kind: ``next``: box `end` follows on the same stage, and `rows` is empty. ``exchange``: what the ranks of a box exchange with each
            other. ``message``: box `end` is the first of the next stage.
        rows: communication of one step on one rank, with its axis, collective, count, bytes, exposed and hidden seconds. Those of exchanges
            are the rows of the box that have an axis, what is run again and local copies included. Those of messages have the axis ``pp``
            and the collective ``send``, and the phase tells their direction: ``forward`` are values from `start` to `end`, ``input
            gradient`` gradients back. Two stages on one pipeline rank send nothing.
    """

    start: int
    end: int
    kind: EdgeKind
    rows: tuple[CostRow, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the pipeline, or the whole model where there is none.

    Attributes:
        number: from 0, in the order of the forward.
        pipeline_rank: the pipeline rank that runs it.
        ranks: first and last rank of the world that run it.
        boxes: numbers of its boxes.
        seconds: exposed seconds of its boxes in a step on one rank, without waiting for other stages.
        static_bytes: bytes on one rank of parameters, gradients and optimizer states; None for a plan without timing.
        saved_bytes: bytes on one rank that one micro-batch holds from its forward to its backward; None as before.
    """

    number: int
    pipeline_rank: int
    ranks: tuple[int, int]
    boxes: tuple[int, ...]
    seconds: float
    static_bytes: int | None
    saved_bytes: int | None


@dataclass(frozen=True, slots=True)
class Outline:
    """What a picture of a plan shows.

    Attributes:
        title: the model, its cluster, the mesh and the precision, as ``explain`` words them.
        axes: size of every mesh axis by its name, the pipeline's first where there is one.
        inputs: name -> type of the model's inputs, ``int64[8, 128]``.
        step_seconds: predicted seconds of one step.
        bubble_seconds: of these what the mean pipeline rank waits for others.
        memory_bytes, budget_bytes: bytes at the peak of the fullest device, and what a device has.
        schedule, microbatches: of the pipeline; ``gpipe`` and 1 where there is none.
        stages: in the order of the forward.
        boxes: in the order of the forward.
        edges: in the order of the boxes that they lead to.
        kinds: the kinds that occur, for the legend.
        recompute: what is run again of some box, for the legend.
        has_costs: whether the boxes have rows.
    """

    title: str
    axes: Mapping[str, int]
    inputs: Mapping[str, str]
    step_seconds: float
    bubble_seconds: float
    memory_bytes: int
    budget_bytes: int
    schedule: str
    microbatches: int
    stages: tuple[Stage, ...]
    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    kinds: tuple[Kind, ...]
    recompute: tuple[str, ...]
    has_costs: bool


def make_outline(plan: Plan) -> Outline:
    """What a picture of `plan` shows; runs of like layers on a stage, which are also run again alike, are one box."""
    places = _find_places(plan)
    boxes: list[Box] = []
    numbered = enumerate(plan.pipeline.blocks)
    for _, run in groupby(numbered, lambda item: (item[1].stage, item[1].recompute, *places[item[0]].fold)):
        boxes.append(_make_box(plan, len(boxes), list(run), places))
    stages = _make_stages(plan, boxes)
    ranks = {PIPELINE: plan.pipeline.ranks} if plan.pipeline.ranks > 1 else {}
    used = {box.kind for box in boxes}
    again = {box.recompute for box in boxes}
    return Outline(
        title=describe_header(plan),
        axes=ranks | dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)),
        inputs=plan.inputs,
        step_seconds=plan.seconds.step,
        bubble_seconds=plan.seconds.bubble,
        memory_bytes=plan.memory.total,
        budget_bytes=plan.memory.budget,
        schedule=plan.pipeline.schedule,
        microbatches=plan.pipeline.microbatches,
        stages=stages,
        boxes=tuple(boxes),
        edges=tuple(_make_edges(plan, boxes)),
        kinds=tuple(kind for kind in Kind if kind in used),
        recompute=tuple(kind for kind in RECOMPUTE[1:] if kind in again),
        has_costs=plan.pipeline.timing is not None,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block stands: its group, and whether it is the whole of one layer, so that the layer's share of the group's bytes is its."""

    group: Group | None
    is_layer: bool
    path: str
    module: str
    """Of its calls in the plan, which are those of the first of like layers; empty where the block has its whole group's."""

    @property
    def fold(self) -> tuple[str, str]:
        """Equal for neighbours that are drawn as one: whole layers of a group."""
        name = "" if self.group is None else self.group.name
        return (name, "") if self.is_layer else (name, self.path)


def _find_places(plan: Plan) -> list[_Place]:
    """Per block the group of the innermost layer that it is in, else that of what is outside of layers."""
    groups = {path: group for group in plan.groups for path in group.paths}
    outside = next((group for group in plan.groups if group.name == OUTSIDE), None)
    layers = [next((path for path in _list_parents(block.path) if path in groups), "") for block in plan.pipeline.blocks]
    counts = Counter(layers)
    return [
        _Place(
            groups.get(layer, outside),
            layer != "" and block.path == layer and counts[layer] == 1,
            block.name,
            "" if block.path == layer else f"{groups[layer].paths[0]}{block.path.removeprefix(layer)}" if layer else block.path,
        )
        for layer, block in zip(layers, plan.pipeline.blocks, strict=True)
    ]


def _list_parents(path: str) -> Iterator[str]:
    """A module path and those of the modules around it, the innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _make_box(plan: Plan, number: int, run: list[tuple[int, BlockChoice]], places: list[_Place]) -> Box:
    first, place = run[0][1], places[run[0][0]]
    axes = _find_axes(plan, place)
    parameters, activations = _find_bytes(place, len(run), places)
    return Box(
        number=number,
        stage=first.stage,
        group=OUTSIDE if place.group is None else place.group.name,
        name=_name_run([block.name for _, block in run]),
        blocks=tuple(block.name for _, block in run),
        axes=axes,
        kind=find_kind(axes),
        recompute=first.recompute,
        parameter_bytes=parameters,
        activation_bytes=activations,
        rows=_sum_rows(plan, [position for position, _ in run]),
    )


def _find_axes(plan: Plan, place: _Place) -> Mapping[str, str]:
    """Per axis what it splits of a block: of its module's own calls and parameters, or of the group where the plan has none of these."""
    group = place.group
    if group is None:
        return {}
    inside = f"{place.module}."
    calls = [op for op in plan.ops if op.group == group.name and place.module and f"{op.path}.".startswith(inside)]
    if not calls:
        return group.axes
    words: dict[str, list[str]] = {axis: [] for axis in group.axes}
    for name in (op for op, tensor in group.tensors.items() if tensor.startswith(inside)):
        for axis, state in zip(plan.mesh.names, plan.layouts[name], strict=True):
            if state.level or (state.kind is StateKind.SHARD and _is_gathered(plan, name, axis)):
                words[axis].append(STORAGE[state.level])
    for op in calls:
        for axis, text in op.splits.items():
            words[axis].append(text)
    return {axis: ", ".join(dict.fromkeys(texts)) or "nothing" for axis, texts in words.items()}


def _is_gathered(plan: Plan, parameter: str, axis: str) -> bool:
    """Whether a call reads a parameter whole along an axis, which splits its storage."""
    position = plan.mesh.names.index(axis)
    reads = (read for each in plan.reads.values() for read in each if read.value == parameter)
    return any(read.need[position].kind is not StateKind.SHARD for read in reads)


def _find_bytes(place: _Place, count: int, places: list[_Place]) -> tuple[int | None, int | None]:
    """Bytes of parameters and of saved tensors of so many layers of a group, where they can be told from those of other blocks."""
    group = place.group
    if group is None:
        return None, None
    is_alone = sum(other.group == group for other in places) == 1
    if not place.is_layer and not (is_alone and group.name == OUTSIDE):
        return None, None
    return group.parameter_bytes * count // group.count, group.activation_bytes * count // group.count


def _sum_rows(plan: Plan, positions: list[int]) -> tuple[CostRow, ...]:
    """What blocks cost in one step on one rank of their stage."""
    timing = plan.pipeline.timing
    if timing is None:
        return ()
    sums = RowSums()
    for position in positions:
        for row in timing.rows(position):
            sums.add_row(row, 1 if row.phase == Phase.STEP else plan.pipeline.microbatches)
    return sums.rows()


def find_kind(axes: Mapping[str, str]) -> Kind:
    """The kind of work that is split, from what each axis splits in words."""
    words = {word.strip() for text in axes.values() for word in text.split(",")} - {"", "nothing"}
    work = {word for word in words if not word.endswith("storage")}
    batch, sequence = "batch" in work, "sequence" in work
    features = bool(work - {"batch", "sequence"})
    return {
        (False, False, False): Kind.NOTHING,
        (True, False, False): Kind.BATCH,
        (False, True, False): Kind.FEATURES,
        (False, False, True): Kind.SEQUENCE,
        (True, True, False): Kind.BATCH_FEATURES,
        (True, False, True): Kind.BATCH_SEQUENCE,
        (False, True, True): Kind.FEATURES_SEQUENCE,
        (True, True, True): Kind.ALL,
    }[batch, features, sequence]


def _name_run(names: list[str]) -> str:
    """``h.0-7`` for the blocks h.0 to h.7; ``a to b`` where names have no numbers."""
    first, last = names[0], names[-1]
    if len(names) == 1:
        return first
    stem, dot, number = first.rpartition(".")
    last_stem, _, last_number = last.rpartition(".")
    if stem == last_stem and number.isdecimal() and last_number.isdecimal() and int(last_number) - int(number) == len(names) - 1:
        return f"{stem}{dot}{number}-{last_number}"
    return f"{first} to {last}"


def _make_stages(plan: Plan, boxes: list[Box]) -> tuple[Stage, ...]:
    rank_of, width = find_pipeline_ranks(plan), plan.mesh.world_size
    timing = plan.pipeline.timing
    stages = []
    for number in range(plan.pipeline.stages):
        own = [box for box in boxes if box.stage == number]
        levels = None if timing is None else timing.stages[number]
        stages.append(
            Stage(
                number=number,
                pipeline_rank=rank_of[number],
                ranks=(rank_of[number] * width, (rank_of[number] + 1) * width - 1),
                boxes=tuple(box.number for box in own),
                seconds=sum(box.seconds for box in own),
                static_bytes=None if levels is None else levels.static,
                saved_bytes=None if levels is None else levels.saved,
            )
        )
    return tuple(stages)


def _make_edges(plan: Plan, boxes: list[Box]) -> Iterator[Edge]:
    for box in boxes:
        if box.number:
            before = boxes[box.number - 1]
            if before.stage == box.stage:
                yield Edge(before.number, box.number, EdgeKind.NEXT, ())
            else:
                yield Edge(before.number, box.number, EdgeKind.MESSAGE, _make_messages(plan, before.stage))
        exchanged = tuple(row for row in box.rows if row.axis)
        if exchanged:
            yield Edge(box.number, box.number, EdgeKind.EXCHANGE, exchanged)


def _make_messages(plan: Plan, stage: int) -> tuple[CostRow, ...]:
    """What a stage and the next one send each other in one step."""
    timing = plan.pipeline.timing
    if timing is None:
        return ()
    message, count = timing.messages[stage], plan.pipeline.microbatches
    forward = CostRow("", Phase.FORWARD, Purpose.MESSAGES, PIPELINE, "send", 1.0, message.forward_nbytes, 0.0, message.forward)
    backward = replace(forward, phase=Phase.BACKWARD_INPUT, nbytes=message.backward_nbytes, hidden=message.backward)
    sums = RowSums()
    for row in (forward, backward):
        if row.nbytes:
            sums.add_row(row, count)
    return sums.rows()
