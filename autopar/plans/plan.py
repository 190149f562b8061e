"""A plan: every decision and its predicted cost, as plain data; JSON both ways, checked on loading, nothing in it is run.

What comes in: the answer of ``search``. What goes out: to ``rewrite``, which carries it out, and to ``report``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from autopar.costs import CostRow, Phase, Purpose
from autopar.errors import InputError, PlanError
from autopar.ir import Layout, Mesh, Placement, format_layout, format_placement, parse_layout, parse_placement
from autopar.schedules import check_schedule

FORMAT = "autopar-plan"
VERSION = 3


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device, by kind, at the peak."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    workspace: int
    reserved: int
    budget: int

    @property
    def total(self) -> int:
        """Bytes used at the peak."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers + self.workspace + self.reserved


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted seconds of one training step on one rank, the mean one of a pipeline: sums of a plan's cost rows.

    `recompute` is what the backward runs again, `communication` what isn't hidden behind compute, `bubble` the time that the mean rank
    waits for others.
    """

    forward: float
    backward: float
    recompute: float
    optimizer: float
    communication: float
    bubble: float

    @property
    def step(self) -> float:
        """The whole step."""
        return self.forward + self.backward + self.recompute + self.optimizer + self.communication + self.bubble


RECOMPUTE = ("none", "selective", "full")
"""What of a layer's forward the backward runs again: nothing, the attention core (Korthikanti et al. 2022, section 5), all."""


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """What was decided for one block of the chain (`autopar.structure.blocks`), such as a transformer layer."""

    name: str
    stage: int
    recompute: str


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How the work is spread over time and over groups of ranks; one rank and one micro-batch are no pipeline.

    Attributes:
        ranks: groups of ranks along the pipeline; each runs the plan's mesh. Rank ``r`` of the world is in group
            ``r // mesh.world_size``.
        schedule: name of the schedule's family (`autopar.schedules.SCHEDULES`).
        chunks: stages per group of ranks.
        microbatches: parts of the batch that run one after the other.
        blocks: every block of the chain, in order.
        travel: layout in which a value crosses from one stage to another, by value.
    """

    ranks: int
    schedule: str
    chunks: int
    microbatches: int
    blocks: tuple[BlockChoice, ...]
    travel: Mapping[str, Layout]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.ranks * self.chunks

    @property
    def is_trivial(self) -> bool:
        """Whether every rank runs the whole model on the whole batch at once."""
        return self.ranks == 1 and self.microbatches == 1

    @property
    def keeps_all(self) -> bool:
        """Whether the backward runs nothing again."""
        return all(block.recompute == "none" for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Communication of one kind on one axis in one step: sums of a plan's cost rows.

    `seconds` are exposed, `hidden` go on behind other work; `nbytes` are what a rank's parts amount to.
    """

    axis: str
    collective: str
    purpose: str
    count: int
    nbytes: int
    seconds: float
    hidden: float


OUTSIDE = "outside of layers"
"""Name of the group of what is in no layer."""


@dataclass(frozen=True, slots=True)
class Group:
    """One line of the report: like layers, or what is outside of all layers.

    `axes` says per mesh axis what it does to the group's contractions, such as ``{"tp": "heads, ffn"}``. Its cost rows are those whose
    layer has its name (`Plan.rows_of`).
    """

    name: str
    count: int
    axes: Mapping[str, str]
    parameter_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mesh, a baseline or a pipeline that the search looked at.

    `step_seconds` are predicted, or what it takes at least or at best where `outcome` says so, None when nothing fits; `memory_bytes` are
    those that it needs, or at the leanest when nothing fits, without what the device reserves; None when it wasn't solved.
    """

    name: str
    mesh: str
    step_seconds: float | None
    memory_bytes: int | None
    outcome: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What the search can say for its answer.

    `objective_ns` is the chosen plan's cost, `bound_ns` a lower bound over everything on the chosen mesh, `gap` their relative
    distance; `status` and `method` say how the solver ended (``LP, integral`` or ``MIP``).
    """

    objective_ns: int
    bound_ns: int
    gap: float
    status: str
    method: str
    variables: int
    constraints: int
    seconds: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Unruled:
    """An op that no rule covers; it runs replicated, at its full cost."""

    op: str
    target: str
    source: str


@dataclass(frozen=True)
class Plan:
    """Every decision about one model on one cluster.

    Attributes:
        model: class name of the model; `fingerprint` identifies the captured graph that the plan was made for.
        cluster: text of the cluster.
        mesh: the chosen axes; under a pipeline, those of one group of ranks.
        pipeline: stages, schedule, micro-batches and recomputation.
        inputs: name -> text of its type, as captured.
        layouts: layout in which every parameter, buffer and input is stored, by op name.
        outputs: layout of every output, by position; those of new values of buffers follow those that the user gets.
        placements: placement of every call, by op name.
        batch_axes: axes that split the batch, outermost first.
        bucket_nbytes: bytes of gradients that are summed over ranks together.
        costs: what a step costs the mean rank, by layer, phase, purpose, axis and collective. Seconds of the step, communication and the
            bubble are sums of these rows. Messages between stages are those of all stages together.
        notes: what capture dropped or changed, for the user to know.
    """

    model: str
    fingerprint: str
    cluster: str
    mesh: Mesh
    pipeline: Pipeline
    inputs: Mapping[str, str]
    layouts: Mapping[str, Layout]
    outputs: tuple[Layout, ...]
    placements: Mapping[str, Placement]
    batch_axes: tuple[str, ...]
    bucket_nbytes: int
    costs: tuple[CostRow, ...]
    memory: Memory
    groups: tuple[Group, ...]
    proof: Proof
    unruled: tuple[Unruled, ...]
    notes: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline.ranks * self.mesh.world_size

    @cached_property
    def seconds(self) -> Seconds:
        """What the step's seconds are made of."""
        return Seconds(
            forward=self._sum(Purpose.COMPUTE, Phase.FORWARD),
            backward=self._sum(Purpose.COMPUTE, Phase.INPUT) + self._sum(Purpose.COMPUTE, Phase.WEIGHT),
            recompute=self._sum(Purpose.RECOMPUTE),
            optimizer=self._sum(Purpose.OPTIMIZER),
            communication=sum((row.seconds for row in self.costs if row.is_communication), 0.0),
            bubble=self._sum(Purpose.BUBBLE),
        )

    def _sum(self, purpose: str, phase: str | None = None) -> float:
        return sum((row.seconds for row in self.costs if row.purpose == purpose and phase in (None, row.phase)), 0.0)

    @cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """The communication of a step, by axis, collective and purpose."""
        sums: dict[tuple[str, str, str], list[float]] = {}
        for row in self.costs:
            if row.is_communication:
                entry = sums.setdefault((row.axis, row.collective, row.purpose), [0.0, 0.0, 0.0, 0.0])
                for index, number in enumerate((row.count, row.nbytes, row.seconds, row.hidden)):
                    entry[index] += number
        return tuple(
            Traffic(*key, round(count), round(nbytes), seconds, hidden) for key, (count, nbytes, seconds, hidden) in sorted(sums.items())
        )

    def rows_of(self, group: Group) -> tuple[CostRow, ...]:
        """The cost rows of a group of layers, or of what is outside of all layers; waiting and messages between stages are no group's."""
        layer = "" if group.name == OUTSIDE else group.name
        return tuple(row for row in self.costs if row.layer == layer and row.purpose not in (Purpose.BUBBLE, Purpose.MESSAGES))

    def group_seconds(self, group: Group) -> tuple[float, float]:
        """(compute, exposed communication) seconds of a group."""
        rows = self.rows_of(group)
        compute = sum((row.seconds for row in rows if row.purpose == Purpose.COMPUTE), 0.0)
        return compute, sum((row.seconds for row in rows if row.is_communication), 0.0)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a file that is there is replaced only by a whole one."""
        path, text = Path(path).resolve(), to_json(self) + "\n"
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a device or a pipe can't be replaced
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan. Raises PlanError when the file isn't a whole plan of this version."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: can't be read as text ({error})") from error
        try:
            return from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def to_json(plan: Plan) -> str:
    """The plan's JSON text."""
    data = asdict(plan)
    data["mesh"] = {"names": list(plan.mesh.names), "sizes": list(plan.mesh.sizes)}
    data["pipeline"]["travel"] = {name: format_layout(layout) for name, layout in plan.pipeline.travel.items()}
    data["layouts"] = {name: format_layout(layout) for name, layout in plan.layouts.items()}
    data["outputs"] = [format_layout(layout) for layout in plan.outputs]
    data["placements"] = {name: format_placement(placement) for name, placement in plan.placements.items()}
    return json.dumps({"format": FORMAT, "version": VERSION, "plan": data}, indent=1)


def from_json(text: str) -> Plan:
    """The plan that `text` holds. Raises PlanError naming what is wrong."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not whole JSON: {error}; was the file cut off? Make the plan again with `autopar plan`") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError(f"not an autopar plan: the top level must be an object with format {FORMAT!r}")
    if document.get("version") != VERSION:
        raise PlanError(
            f"plan version {document.get('version')!r}, this autopar reads version {VERSION}; make the plan again with `autopar plan`"
        )
    data = document.get("plan")
    try:
        plan = _read(Plan, data, "plan")
    except ValueError as error:
        raise PlanError(str(error)) from error
    assert isinstance(plan, Plan)
    if unknown := [axis for axis in plan.batch_axes if axis not in plan.mesh.names]:
        raise PlanError(f"plan.batch_axes names {', '.join(map(repr, unknown))}, the mesh has {plan.mesh}")
    outputs = ((f"output {position}", layout) for position, layout in enumerate(plan.outputs))
    for name, layout in (*plan.layouts.items(), *outputs, *plan.pipeline.travel.items()):
        _check_axes(name, len(layout), plan.mesh)
    for name, placement in plan.placements.items():
        _check_axes(name, len(placement), plan.mesh)
    _check_pipeline(plan.pipeline)
    return plan


def _check_pipeline(pipeline: Pipeline) -> None:
    for name in ("ranks", "chunks", "microbatches"):
        if getattr(pipeline, name) < 1:
            raise PlanError(f"plan.pipeline.{name} is {getattr(pipeline, name)}, an integer from 1 is needed")
    try:
        check_schedule(pipeline.schedule, pipeline.ranks, pipeline.microbatches, pipeline.chunks)
    except InputError as error:
        raise PlanError(f"plan.pipeline: {error}") from error
    stages = [block.stage for block in pipeline.blocks]
    ends = (stages[0], stages[-1]) if stages else (0, 0)  # a model without calls has no block
    # Counted, not compared with a list of all stages: a file may name any number of them.
    is_whole = len(set(stages) or {0}) == pipeline.stages and ends == (0, pipeline.stages - 1)
    if not is_whole or stages != sorted(stages):
        raise PlanError(
            f"plan.pipeline.blocks must be on stages 0 to {pipeline.stages - 1}, ascending and none left out; they are on {stages}"
        )
    for block in pipeline.blocks:
        if block.recompute not in RECOMPUTE:
            raise PlanError(f"plan.pipeline.blocks: {block.name!r} has recompute {block.recompute!r}; known are {', '.join(RECOMPUTE)}")


def _check_axes(name: str, found: int, mesh: Mesh) -> None:
    if found != len(mesh.names):
        raise PlanError(f"{name!r} has {found} axes, the mesh has {len(mesh.names)} ({mesh})")


_READERS: Mapping[str, Any] = {
    "Mapping[str, Layout]": (dict, parse_layout),
    "Mapping[str, Placement]": (dict, parse_placement),
    "Mapping[str, str]": (dict, None),
}
_NESTED: Mapping[str, type] = {
    "Pipeline": Pipeline,
    "BlockChoice": BlockChoice,
    "CostRow": CostRow,
    "Memory": Memory,
    "Proof": Proof,
    "Group": Group,
    "Candidate": Candidate,
    "Unruled": Unruled,
}
_PLAIN: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "int | None": (int, type(None)),
}


def _read(cls: type, data: Any, where: str) -> Any:
    """Build dataclass `cls` from JSON data by the text of its field types; ValueError names the offending field."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: an object is needed, not {type(data).__name__}")
    known = {field.name: str(field.type) for field in fields(cls)}
    wrong = sorted(set(known) ^ set(data))
    if wrong:
        raise ValueError(f"{where}: fields missing or unknown: {', '.join(wrong)}")
    return cls(**{name: _read_field(kind, data[name], f"{where}.{name}") for name, kind in known.items()})


def _read_field(kind: str, value: Any, where: str) -> Any:
    if kind in _PLAIN:
        # bool is an int in Python, but no field of a plan is a truth value.
        if isinstance(value, bool) or not isinstance(value, _PLAIN[kind]):
            raise ValueError(f"{where}: {kind} is needed, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: a finite number is needed, not {value}")
        return value
    if kind == "Mesh":
        return _read_mesh(value, where)
    if kind == "Layout":
        if not isinstance(value, str):
            raise ValueError(f"{where}: the text of a layout is needed, not {type(value).__name__}")
        try:
            return parse_layout(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if kind in _NESTED:
        return _read(_NESTED[kind], value, where)
    if kind.startswith("tuple["):
        if not isinstance(value, list):
            raise ValueError(f"{where}: a list is needed, not {type(value).__name__}")
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_read_field(inner, item, f"{where}[{index}]") for index, item in enumerate(value))
    _, reader = _READERS[kind]
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"{where}: an object of texts is needed")
    try:
        return {key: reader(item) if reader else item for key, item in value.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_mesh(value: Any, where: str) -> Mesh:
    if (
        not isinstance(value, dict)
        or set(value) != {"names", "sizes"}
        or not all(isinstance(item, list) for item in value.values())
        or not all(isinstance(name, str) for name in value["names"])
        or not all(type(size) is int and size >= 1 for size in value["sizes"])
    ):
        raise ValueError(f"{where}: an object with lists names (texts) and sizes (integers from 1) is needed")
    return Mesh(tuple(value["names"]), tuple(value["sizes"]))
