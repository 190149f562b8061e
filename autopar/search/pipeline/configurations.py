r"""Pipeline configurations: which ones the search looks at, and estimates of each one's step, from cheap and rough to dear and close.

Comes in: a model as a chain of blocks, a cluster, pins. Goes out: configurations, schedules for each, and estimates.

A *pipeline configuration* :math:`(P, \mathit{mesh}, m)` has :math:`P` pipeline ranks, each a group of devices that runs the mesh under
the constraints of its `Trial`, and :math:`m` micro-batches. A schedule for it is a family with :math:`v` stages on every pipeline rank. Its
step takes :math:`T + U` seconds: :math:`T` for the schedule, :math:`U` for the updates of the pipeline rank where these take longest.

Let :math:`W_k` be the seconds that pipeline rank :math:`k` computes and exchanges for one micro-batch, :math:`w = \frac 1P \sum_k W_k`. The
search computes the numbers below; each takes longer to compute than those before. A *lower bound* is proven: no placements, stages, options
and schedule of the configuration take less under the cost model. An *estimate* is a guess: it only decides what is looked at next, and
what isn't.

(1) Work of the products (`SolutionCache.work_lower_bound_s`), a **lower bound** of :math:`w`:
    :math:`w_1 = \frac 1P \sum_i (f_i + b_i)`, with :math:`f_i, b_i` the forward and backward seconds of matrix product or attention
    :math:`i` when every axis splits it that can split it alone. No placement splits it further, fewer flops never take longer, and
    other ops and all exchanges are left out. Some pipeline rank works as long as the mean, so :math:`m w_1 \le T` is proven as well.
(2) Schedule of a given work (`estimate_schedule_s`), an **estimate** of :math:`T`:
    :math:`E(w) = \max(m w + \beta (P-1) \frac wv,\; \gamma (P w + (m-1) \frac wv))`. The first term is a busy rank and its bubble,
    the second is one micro-batch through all stages and the others behind it. :math:`\beta = \gamma = 1`, or where weight gradients
    fill bubbles :math:`\beta = \frac 14, \gamma = \frac 23`. Of equal stages that exchange nothing, whose forwards are a quarter of
    the work or more and whose weight gradients a third or less, no schedule of `FAMILIES` takes less. It is no lower bound, because
    stages needn't be equal: for :math:`P = m = 2` under 1F1B :math:`E(1) = 3`, but stages of 1.2 and 0.8 seconds, a third of each a
    forward, take 2.8.
(3) Step by its products, an **estimate**: the least :math:`E(w_1)` of all schedules.
(4) Step by its fastest placements (`SolutionCache.estimate_work`), an **estimate**: the least :math:`E(w_2) + u_2`, or (3) where that is
    more. The placement problem without a limit of memory bounds the sum :math:`P (m w + u)` from below, with :math:`u` the mean seconds
    once per step; what of that is :math:`w_2` and what :math:`u_2` is read off one solution, which may be of another configuration with
    the same key (`SolutionCache`), with other links and other shares of the parameters.
(5) Step of a greedy assignment under one schedule (`GreedyPipeline.estimate_s`), whose stages and options fit the memory. Up to
    `SIMULATED_ROUNDS` micro-batches per pipeline rank its time is simulated, so that the configuration can be had in that time. Of more
    micro-batches it is extrapolated from two shorter schedules: an **estimate**.
(6) Step under other schedules (`GreedyPipeline.optimistic_estimate_s`), an **estimate**: the least :math:`E(w) + U` with the work of (5).
(7) Step in finer stages (`GreedyPipeline.ranking_estimate_s`), an **estimate** that puts configurations in order: both terms of (2)
    with whole backwards, with the longest :math:`W_k` of (5) for each :math:`w` but that of :math:`P w`, and with the largest
    :math:`v` of all schedules (`estimate_finest_s`).
(8) Assignment by cutting planes (`assignment`). Its ``simulated`` seconds are of all micro-batches: the step's own. Its ``bound`` is
    a **lower bound** of all assignments that fit, of the block options that it was given and under its schedule (the solver's tolerance,
    which `assignment` states, aside).

What is proven is (8), and the plan's proof claims no more: with the configuration, the schedule and the solutions of the placement problem
that blocks may mix fixed, no stages and options within memory and pins take less than ``bound_ns`` in the simulation. Nothing is proven
about configurations that (3) or (4) left out, about schedules that weren't tried because of (5) to (7), about placements beside those
solutions, or about the set of them that greedy assignments found slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir import format_mesh, with_pipeline
from autopar.plans import RECOMPUTE, Pins
from autopar.schedules import SCHEDULES, Schedule, check_schedule, forwards_first, make_schedule, splits_backward
from autopar.search.candidates import word_kind_of_trial
from autopar.search.meshes import Trial
from autopar.search.options import AxisKind, is_inside
from autopar.structure import AnalyzedGraph, Chain, batch_size

# Rows of a micro-batch on one device that are tried unless microbatches are pinned: more use the device better, fewer make bubbles smaller.
ROWS = (1, 2, 4, 8, 16)
# Schedules that are tried: all but GPipe, which takes as long as 1F1B and more memory. Configurations are ranked by the first, or where its
# memory doesn't suffice by the lean one.
FAMILIES = tuple(family for family in SCHEDULES if family != "gpipe")
LEAN_FAMILY = "v-half"
# Stages per pipeline rank that an interleaved schedule is tried with.
INTERLEAVED = (2, 3, 4, 6, 8)


@dataclass(frozen=True, eq=False)
class PipelineProblem:
    """What pipelines are searched for.

    Attributes:
        model: the folded model.
        chain: its blocks, which stages are made of.
        cluster: all devices.
        pins: what the user fixed.
        returns_loss: whether the model computes its loss; otherwise all forwards of a schedule run before its first backward.
        recompute: kinds of recomputation that blocks may use.
        stages: the stage that a block is pinned to, by name of the block.
    """

    model: AnalyzedGraph
    chain: Chain
    cluster: Cluster
    pins: Pins
    returns_loss: bool
    recompute: tuple[str, ...]
    stages: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Configuration:
    """A number of pipeline ranks, the mesh and constraints of each (`trial`), and a number of micro-batches; equal only to itself."""

    ranks: int
    trial: Trial
    microbatches: int

    @property
    def kind(self) -> str:
        """Its name among the plan's candidates."""
        return "pipeline" if self.ranks > 1 else "micro-batches" if self.microbatches > 1 else "recomputation"

    @property
    def splits(self) -> str:
        """What it splits, of `autopar.plans.KINDS`."""
        return "pipeline" if self.ranks > 1 else word_kind_of_trial(self.trial)

    def __str__(self) -> str:
        mesh = format_mesh(with_pipeline(self.trial.mesh, self.ranks))
        return f"{mesh}, {self.microbatches} micro-batch{'' if self.microbatches == 1 else 'es'}"


class ScheduleChoice(NamedTuple):
    """A family of schedules and the number of stages on each pipeline rank (`chunks`)."""

    family: str
    chunks: int

    def __str__(self) -> str:
        return f"{self.family} x{self.chunks}" if self.chunks > 1 else self.family


def make_pipeline_problem(model: AnalyzedGraph, chain: Chain, cluster: Cluster, pins: Pins, *, returns_loss: bool) -> PipelineProblem:
    """The pipelines to search for. Raises InputError where a pinned stage is of a module that no block has."""
    recompute = RECOMPUTE if pins.recompute is None else (pins.recompute,)
    return PipelineProblem(model, chain, cluster, pins, returns_loss, tuple(recompute), _find_pinned_stages(model, chain, pins))


def _find_pinned_stages(model: AnalyzedGraph, chain: Chain, pins: Pins) -> dict[str, int]:
    """The pinned stage of each block that has one, by the block's name; pins name modules. Raises InputError for one without a block."""
    by_name = model.folded.graph.by_name
    pinned: dict[str, int] = {}
    for pattern, stage in pins.stages.items():
        inside = [
            block.name
            for block in chain.blocks
            if is_inside(block.name, pattern) or any(is_inside(by_name[name].layer, pattern) for name in block.ops)
        ]
        if not inside:
            known = ", ".join(block.name for block in chain.blocks[:12])
            raise InputError(f"pin {pattern!r} puts no block on stage {stage}; the blocks are {known}")
        pinned.update(dict.fromkeys(inside, stage))
    return pinned


# --- configurations and schedules to look at ---


def find_configurations(problem: PipelineProblem, find_trials: Callable[[int], Sequence[Trial]], *, alone: bool) -> list[Configuration]:
    """Every configuration to look at, within the pins.

    Args:
        problem: the model, the cluster and the pins.
        find_trials: meshes and constraints of one pipeline rank, given the number of pipeline ranks.
        alone: also look at configurations of one pipeline rank, whose micro-batches and recomputation only save memory.

    Raises InputError on pins that can't be had.
    """
    pins, blocks = problem.pins, problem.chain.blocks
    if not blocks:
        raise InputError("the model computes nothing: its forward calls no operator, so there is nothing to plan")
    least_ranks, least_chunks = pins.pp or 1, pins.chunks or 1
    if least_ranks * least_chunks > len(blocks):
        raise InputError(
            f"pins pp={least_ranks}, chunks={least_chunks} make {least_ranks * least_chunks} stages, but the model can be cut into "
            f"{len(blocks)} blocks at most ({', '.join(block.name for block in blocks[:8])}, ...); pin fewer"
        )
    world = problem.cluster.world_size
    sizes = [size for size in range(1 if alone else 2, min(len(blocks), world) + 1) if world % size == 0]
    return [
        Configuration(ranks, trial, count)
        for ranks in (sizes if pins.pp is None else [pins.pp])
        for trial in find_trials(ranks)
        for count in _find_microbatches(problem, ranks, trial)
    ]


def _find_microbatches(problem: PipelineProblem, ranks: int, trial: Trial) -> list[int]:
    """Numbers of micro-batches to try, ascending."""
    if problem.pins.microbatches is not None:
        return [problem.pins.microbatches]
    batch = batch_size(problem.model.folded.graph, problem.model.roles)
    kinds = zip(trial.mesh.sizes, trial.constraints.kinds, strict=True)
    parts = math.prod(size for size, kind in kinds if kind in (AxisKind.DP, AxisKind.FREE))
    rows = batch if batch % parts else batch // parts  # where devices can't split the batch, each sees all of it
    counts = {rows // size for size in ROWS if rows % size == 0}
    # Fewer micro-batches than pipeline ranks leave these idle most of the time, which is still fastest where an op takes as long for few
    # rows as for many.
    counts |= {count for count in range(1, min(ranks, rows) + 1) if rows % count == 0}
    return sorted(counts)


def find_schedules(problem: PipelineProblem, configuration: Configuration) -> tuple[list[ScheduleChoice], list[InputError]]:
    """The schedules to try, the one that configurations are ranked by first; and why a pinned one can't be had."""
    pins = problem.pins
    if pins.schedule is not None:
        return _find_chunks(problem, configuration, pins.schedule)
    if not problem.returns_loss:
        return [ScheduleChoice("gpipe", 1)], []
    if configuration.ranks == 1 and pins.chunks in (None, 1):
        return [ScheduleChoice("1f1b", 1)], []
    return [choice for family in FAMILIES for choice in _find_chunks(problem, configuration, family)[0]], []


def _find_chunks(problem: PipelineProblem, configuration: Configuration, family: str) -> tuple[list[ScheduleChoice], list[InputError]]:
    """The schedules of a family that a configuration can have, and why it can't have others."""
    blocks, ranks = len(problem.chain.blocks), configuration.ranks
    requested: Sequence[int | None] = (problem.pins.chunks,)
    if family == "interleaved" and problem.pins.chunks is None:
        requested = [chunks for chunks in INTERLEAVED if chunks * ranks <= blocks] or INTERLEAVED[:1]
    choices: list[ScheduleChoice] = []
    refusals: list[InputError] = []
    for requested_chunks in requested:
        try:
            chunks = check_schedule(family, ranks, configuration.microbatches, requested_chunks)
            if chunks * ranks > blocks:
                raise InputError(
                    f"schedule {family} on {ranks} pipeline ranks has {chunks * ranks} stages, but the model can be cut into "
                    f"{blocks} blocks at most; pin a smaller pp, or another schedule"
                )
        except InputError as error:
            refusals.append(error)
        else:
            choices.append(ScheduleChoice(family, chunks))
    return choices, refusals


def build_schedule(problem: PipelineProblem, choice: ScheduleChoice, ranks: int, microbatches: int) -> Schedule:
    """The schedule's actions; all forwards come first where the loss is computed outside of the model."""
    schedule = make_schedule(choice.family, ranks, microbatches, choice.chunks)
    return schedule if problem.returns_loss else forwards_first(schedule)


# --- estimates ---


def estimate_schedule_s(configuration: Configuration, choice: ScheduleChoice, work_s: float) -> float:
    """Estimate (2): seconds of the schedule when every pipeline rank works `work_s` seconds on each micro-batch, in equal stages."""
    ranks, count = configuration.ranks, configuration.microbatches
    # Where weight gradients, a third of the work at most, may wait, they fill all bubbles but those before a rank's first forward. That is
    # a quarter of the work or more, also where forwards are run again.
    idle, through = (1 / 4, 2 / 3) if splits_backward(choice.family) else (1.0, 1.0)
    busiest = count * work_s + idle * (ranks - 1) * work_s / choice.chunks
    return max(busiest, through * (ranks * work_s + (count - 1) * work_s / choice.chunks))


def estimate_fastest_s(configuration: Configuration, choices: Sequence[ScheduleChoice], work_s: float) -> float:
    """The least estimate (2) of all schedules, in seconds; infinite where there are none."""
    return min((estimate_schedule_s(configuration, choice, work_s) for choice in choices), default=math.inf)


def estimate_finest_s(configuration: Configuration, choices: Sequence[ScheduleChoice], work_s: Sequence[float]) -> float:
    """Estimate (7) without updates: seconds of the schedule of most stages when rank k works ``work_s[k]`` seconds on each micro-batch."""
    chunks = max((choice.chunks for choice in choices), default=1)
    slowest, count = max(work_s), configuration.microbatches
    return max(count * slowest + (configuration.ranks - 1) * slowest / chunks, sum(work_s) + (count - 1) * slowest / chunks)
