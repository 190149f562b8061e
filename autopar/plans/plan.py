"""A plan: every decision and its predicted cost, as plain data; JSON both ways, checked on loading, nothing in it is run.

Comes in: what the search decided. Goes out: to ``rewrite``, which carries it out, to ``runtime`` and to ``report``.

A field that is added to one of these classes is written and read by its type (`autopar.plans.files`); `VERSION` counts such changes. What
must hold between fields is checked in `autopar.plans.consistency`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from autopar import texts
from autopar.errors import InputError, PlanError
from autopar.ir import PIPELINE, Layout, Mesh, Placement, Precision
from autopar.plans import files
from autopar.plans.consistency import check_consistency
from autopar.plans.files import Among, Count, Name
from autopar.plans.notebook import show_plan
from autopar.plans.pins import RECOMPUTE
from autopar.plans.reads import Read
from autopar.plans.request import UNKNOWN_REQUEST, Request
from autopar.plans.rows import OUTSIDE, CostRow, Purpose
from autopar.plans.timing import Timing
from autopar.plans.work import OpCost, Seconds, Work, sum_parts

FORMAT = "autopar-plan"
VERSION = 7

# What older versions lack, and why they can't be read.
_LACKS = {
    1: " (a plan of version 1 has no fields pipeline, outputs, bucket_nbytes and costs)",
    2: " (a plan of version 2 has no fields outputs, bucket_nbytes and costs)",
    3: " (a plan of version 3 has no field repeated, and one for the seconds of its search)",
    4: " (a plan of version 4 has no fields precision, loss_chunks and prefetch)",
    5: " (a plan of version 5 has no fields work, ops, reads, request and pipeline.timing)",
    6: " (the candidates of a plan of version 6 have no field free_mesh)",
}

# Characters of a message at most: a file may name anything.
_MESSAGE = 1000

# Bytes of a plan file at most. The largest plans of published models have some hundred thousand.
_MOST_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device: the most of each kind (``docs/costs.md`` says what each holds); `budget` is what the device has.

    `apart` are bytes of these that aren't there at the same time, such as gradients while all activations are still saved. `copies` are
    bytes of `parameters` that are copies: in the dtype in which the program reads them, or whole of what is stored in parts.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    workspace: int
    reserved: int
    budget: Count
    apart: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        """Bytes used at the peak."""
        kinds = self.parameters + self.gradients + self.optimizer + self.activations + self.buffers + self.workspace + self.reserved
        return kinds - self.apart


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """What was decided for one block of the chain (`autopar.structure.blocks`), such as a transformer layer.

    Attributes:
        name: the block's path, with a number where a block before it has the same (``layers.1#2``); unique.
        path: module path of the layer, or of the module that does most of the block's work.
        stage: the stage that runs the block.
        recompute: what of the block's forward the backward runs again.
    """

    name: Name
    path: Name
    stage: int
    recompute: Annotated[str, Among(RECOMPUTE)]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How the work is spread over pipeline ranks and over time; one pipeline rank and one micro-batch are no pipeline.

    Attributes:
        ranks: number of pipeline ranks. Each consists of as many devices as the plan's mesh has ranks: rank ``r`` of the world is in
            pipeline rank ``r // mesh.world_size``.
        schedule: name of the schedule's family (`autopar.schedules.SCHEDULES`).
        chunks: stages per pipeline rank.
        microbatches: parts of the batch that run one after the other.
        blocks: every block of the chain, in order.
        travel: layout in which a value crosses from one stage to another, by value.
        timing: the seconds and bytes of single blocks, messages and moments that the step and the peak are computed from; None in plans
            that weren't made by a search.
    """

    ranks: Count
    schedule: str
    chunks: Count
    microbatches: Count
    blocks: tuple[BlockChoice, ...]
    travel: Mapping[str, Layout]
    timing: Timing | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.ranks * self.chunks

    @property
    def is_trivial(self) -> bool:
        """Whether there is one pipeline rank, which runs the whole batch at once."""
        return self.ranks == 1 and self.microbatches == 1

    @property
    def keeps_all(self) -> bool:
        """Whether the backward runs nothing again."""
        return all(block.recompute == "none" for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Communication of one kind on one axis in one step: sums of a plan's cost rows.

    The numbers are those of `CostRow`: `count` calls, which move `nbytes` bytes together; `seconds` are exposed, `hidden` ones are
    overlapped with other work.
    """

    axis: str
    collective: str
    purpose: str
    count: int
    nbytes: int
    seconds: float
    hidden: float


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that are alike and split alike, or what is outside of all layers (`OUTSIDE`).

    The group's cost rows are those whose `layer` is its name (`Plan.rows_of`).

    Attributes:
        name: what the layers' paths have in common, ``transformer.h.*``, and what tells the group from others of these paths.
        paths: module path of every layer, in the model's order; none for what is outside of layers. Where layers are no modules of their
            own, they are numbered under the module that all are in, ``transformer.blocks.0``.
        tensors: the user's name of every parameter and buffer of the first layer, by its op name in `Plan.layouts`. Those of the
            other layers are stored alike.
        axes: per mesh axis what it splits of the group's contractions, such as ``{"tp": "heads, ffn"}``.
        parameter_bytes, activation_bytes: of all layers together, on one rank.
    """

    name: str
    paths: tuple[Name, ...]
    tensors: Mapping[str, Name]
    axes: Mapping[str, str]
    parameter_bytes: int
    activation_bytes: int

    @property
    def count(self) -> int:
        """Number of layers; what is outside of layers counts as one."""
        return len(self.paths) or 1


STORAGE = ("parameter storage", "optimizer storage", "optimizer and gradient storage")
"""What an axis splits by which a parameter is stored split, by its ZeRO level; 0 is level 3, where the parameter itself is gathered."""

KINDS = ("data parallel", "sequence parallel", "tensor parallel", "pipeline", "nothing split", "not solved")
"""What a candidate is, by what it splits: over several pipeline ranks a pipeline, else features or vocabulary over some axis, else the
sequence, else the batch, else nothing. What free axes split isn't known before they are solved."""

BASES = ("predicted", "bound", "estimate")
"""What seconds of a candidate are: predicted for a plan that was found, a lower bound by the search's costs, or an estimate."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mesh, a baseline or a pipeline configuration that the search looked at.

    Attributes:
        name: ``search`` for a mesh whose placements are free within the pins, the name of a baseline (``Megatron``), or what a pipeline
            configuration has: ``pipeline``, ``micro-batches`` or, of a single pipeline rank and micro-batch, ``recomputation``.
        mesh: the mesh of all ranks and the number of micro-batches, as text.
        step_seconds: predicted; a bound or an estimate where `outcome` says so; None when nothing fits.
        memory_bytes: bytes that a device needs, or at the leanest when nothing fits, without what the device reserves; None when it
            wasn't solved.
        outcome: what came of it, in words.
        kind: what it splits.
        parts: what its step is made of, where the search has found a whole plan of it; else None.
        basis: what `step_seconds` are: predicted for a plan that was found, a lower bound of the search's costs, or an estimate.
        free_mesh: the mesh of a pipeline rank as a user would ask for it, where some of its axes were free: in `mesh` these may be called
            by what they do, which asks for less. None where none was free.
    """

    name: str
    mesh: str
    step_seconds: float | None
    memory_bytes: int | None
    outcome: str
    kind: Annotated[str, Among(KINDS)] = "not solved"
    parts: Seconds | None = None
    basis: Annotated[str, Among(BASES)] = "predicted"
    free_mesh: Mesh | None = None

    @property
    def is_spread(self) -> bool:
        """Whether its bound is that of the assignment of blocks to stages, under given placements and a given schedule."""
        return self.name in ("pipeline", "micro-batches", "recomputation")


@dataclass(frozen=True, slots=True)
class Proof:
    """What the search can say for its solution.

    Attributes:
        objective_ns: predicted nanoseconds of a step of the plan.
        bound_ns: a lower bound of these: over all plans on the chosen mesh or, for a pipeline, over all assignments of blocks to stages
            under the chosen schedule and placements (``docs/search.md``).
        gap: distance of the two as a share of the objective.
        status, method: how the solver ended (``optimal``), and by what (``LP, integral`` or ``MIP``).
        variables, constraints: of the largest model that was solved for the placements.
        candidates: everything that the search looked at.
        chosen: position among the candidates of the one that is the plan.
    """

    objective_ns: int
    bound_ns: int
    gap: float
    status: str
    method: str
    variables: int
    constraints: int
    candidates: tuple[Candidate, ...]
    chosen: int


@dataclass(frozen=True, slots=True)
class Unruled:
    """An op that no rule covers; it runs replicated, at its full cost."""

    op: str
    target: str
    source: str


@dataclass(frozen=True, slots=True)
class RepeatedWork:
    """A contraction that several ranks run alike, because some axes split nothing of it.

    Attributes:
        op: its name, of like ops the representative's.
        target: the operator.
        path: of the module.
        source: the user's line.
        loops: its loops with their sizes, as text: what an axis would have to divide.
        count: number of like ops.
        ranks: number of ranks that run the same.
        share: of the flops that all ranks run together in contractions, the part that is repeated here, from 0 to 1.
        could_split: whether an axis that splits nothing of it divides one of its loops, so that a split would only be dearer, or isn't what
            the axis is for.
    """

    op: str
    target: str
    path: str
    source: str
    loops: str
    count: Count
    ranks: Count
    share: float
    could_split: bool = False


@dataclass(frozen=True)
class Plan:
    """Every decision about one model on one cluster.

    Attributes:
        model: class name of the model; `fingerprint` identifies the captured graph that the plan was made for.
        cluster: text of the cluster.
        precision: in which dtypes parameters are read, summed and updated.
        mesh: the chosen axes; under a pipeline, those of one pipeline rank.
        pipeline: stages, schedule, micro-batches and recomputation.
        inputs: name -> text of its type, as captured.
        layouts: layout in which every parameter, buffer and input is stored, by op name.
        outputs: layout of every output, by position; those of new values of buffers follow those that the user gets.
        placements: placement of every call, by op name.
        batch_axes: axes that split the batch, outermost first.
        bucket_nbytes: bytes of gradients that are summed over ranks together.
        prefetch: how many blocks ahead gathers of parameters are begun; 0 where they wait on the spot.
        costs: what a step costs the mean rank, by layer, phase, purpose, axis and collective. Seconds of the step, communication and the
            bubble are sums of these rows. Messages between stages are those of all stages together.
        memory: bytes of one device, under a pipeline of the fullest pipeline rank's.
        groups: layers that are alike and split alike, then what is outside of layers.
        proof: the bound, and everything that the search looked at.
        repeated: contractions that several ranks run alike, those that waste most first; less than a thousandth isn't listed.
        unruled: ops without a rule.
        notes: what capture dropped or changed, for the user to know.
        loss_chunks: in how many parts the logits of a head are computed together with their cross entropy; 1 is all at once.
        half_batches: whether the program computes the two halves of the batch in turns, each while the ranks exchange for the other one.
        work: what a step of the model computes, and what a device could.
        ops: what every call and every parameter costs, of representatives in the order of the program. None in plans made by hand.
        reads: what every call reads and in which layout, by op name, of representatives. Empty in plans made by hand.
        request: how the plan was asked for, so that it can be asked for again with something changed.
    """

    model: Name
    fingerprint: Name
    cluster: str
    precision: Precision
    mesh: Mesh
    pipeline: Pipeline
    inputs: Mapping[str, str]
    layouts: Mapping[str, Layout]
    outputs: tuple[Layout, ...]
    placements: Mapping[str, Placement]
    batch_axes: tuple[str, ...]
    bucket_nbytes: int
    prefetch: int
    costs: tuple[CostRow, ...]
    memory: Memory
    groups: tuple[Group, ...]
    proof: Proof
    repeated: tuple[RepeatedWork, ...]
    unruled: tuple[Unruled, ...]
    notes: tuple[str, ...]
    work: Work
    loss_chunks: Count = 1
    half_batches: bool = False
    ops: tuple[OpCost, ...] = ()
    reads: Mapping[str, tuple[Read, ...]] = field(default_factory=dict)
    request: Request = UNKNOWN_REQUEST

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline.ranks * self.mesh.world_size

    @cached_property
    def seconds(self) -> Seconds:
        """What the step's seconds are made of."""
        return sum_parts(self.costs)

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
        """(compute, exposed communication) seconds of a group on the mean pipeline rank."""
        rows = self.rows_of(group)
        compute = sum((row.seconds for row in rows if row.purpose == Purpose.COMPUTE), 0.0)
        return compute, sum((row.seconds for row in rows if row.is_communication), 0.0)

    @cached_property
    def splits(self) -> dict[str, str]:
        """Per axis of the mesh, what it splits: the batch, and what the contractions of the groups of layers name, the dearest group first.

        What is split outside of layers alone stands apart: ``batch (outside of layers also vocabulary)``. The pipeline is an axis like the
        others, which splits the layers; axes of one rank are left out.
        """
        roles = {PIPELINE: "layers"} if self.pipeline.ranks > 1 else {}
        groups = sorted(self.groups, key=lambda group: -self.group_seconds(group)[0])
        has_layers = any(group.paths for group in groups)
        for axis, size in zip(self.mesh.names, self.mesh.sizes, strict=True):
            if size == 1:
                continue
            inside, outside = (["batch"] if axis in self.batch_axes else []), list[str]()
            for group in groups:
                parts = inside if group.paths or not has_layers else outside
                parts += [part.strip() for part in group.axes.get(axis, "").split(",")]
            inside, outside = ([part for part in dict.fromkeys(parts) if part not in ("", "nothing")] for parts in (inside, outside))
            more = ", ".join(part for part in outside if part not in inside)
            roles[axis] = ", ".join(inside) or "nothing"
            if more:
                roles[axis] += f" (outside of layers {'also ' if inside else ''}{more})"
        return roles

    def _repr_html_(self) -> str:
        return show_plan(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a file that is there is replaced only by a whole one, and keeps its permissions.

        Raises PlanError as `to_json` does, and OSError when the file can't be written.
        """
        texts.write_text(path, to_json(self) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan.

        Raises PlanError, naming the file and the field, when the file isn't a whole plan of this version, or says what can't be true
        (``docs/plan-format.md`` lists what is checked).
        """
        try:
            return from_json(texts.read_text(path, _MOST_BYTES))
        except (InputError, PlanError) as error:
            raise PlanError(f"{path}: {error}") from error


def to_json(plan: Plan) -> str:
    """The plan's JSON text. Raises PlanError, naming the field, for a plan that `from_json` would refuse."""
    text = json.dumps({"format": FORMAT, "version": VERSION, "plan": files.write(plan)}, indent=1)
    from_json(text)
    return text


def from_json(text: str) -> Plan:
    """The plan that `text` holds. Raises PlanError naming what is wrong, as `Plan.load` does."""
    try:
        plan = files.read(Plan, _open(files.parse_json(text)), "plan")
        check_consistency(plan)
    except PlanError as error:
        raise PlanError(_shorten(str(error))) from error
    return plan


def _open(document: Any) -> Any:
    """What a file's top level holds as its plan. Raises PlanError when it is another format or version."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError(f"not an autopar plan: the top level must be an object with format {FORMAT!r}")
    version = document.get("version")
    if type(version) is not int or version != VERSION:  # neither 3.0 nor true is a version
        lacks = _LACKS.get(version, "") if type(version) is int else ""
        raise PlanError(
            f"plan version {reprlib.repr(version)}, this autopar reads version {VERSION}{lacks}; make the plan again with `autopar plan`"
        )
    if wrong := files.wrong_fields(document, ("format", "version", "plan")):
        raise PlanError(f"the top level: {wrong}")
    return document["plan"]


def _shorten(message: str) -> str:
    """A message of bearable length, whatever a file's texts are."""
    return message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]} ..."
