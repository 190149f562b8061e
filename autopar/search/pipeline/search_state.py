"""The state of a search over pipeline configurations: what waits to be looked at, and what came of what was.

Comes in: from ``best_first``, which searches. Goes out: to it, configurations in their order and the candidates of the plan. Numbers in
parentheses are those of `configurations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from autopar.costs import BlockCost
from autopar.errors import AutoparError
from autopar.ir import Mesh
from autopar.plans import Candidate
from autopar.search.candidates import find_parts
from autopar.search.pipeline.configurations import Configuration, PipelineProblem, ScheduleChoice
from autopar.search.pipeline.solutions import SolutionCache, WorkEstimate


@dataclass(frozen=True, eq=False)
class GreedyPipeline:
    """The fastest greedy assignment found for a configuration under one schedule.

    Attributes:
        estimate_s: seconds of its step, number (5).
        optimistic_estimate_s: number (6), what another schedule may take; at most `estimate_s`.
        ranking_estimate_s: number (7), by which the queue is ordered; at most `estimate_s`.
        nbytes: bytes of its fullest device.
        costs: of every block in its option.
    """

    configuration: Configuration
    schedule: ScheduleChoice
    estimate_s: float
    optimistic_estimate_s: float
    ranking_estimate_s: float
    nbytes: int
    costs: tuple[BlockCost | None, ...] = ()


class Level(IntEnum):
    """What the estimate of a configuration in the queue was made from."""

    PRODUCTS = 0
    PLACEMENTS = 1
    GREEDY = 2


@dataclass(frozen=True, order=True)
class QueuedConfiguration:
    """A configuration in the queue, which is ordered by `estimate_s`, then by `number`; `greedy` is there at level GREEDY."""

    estimate_s: float
    number: int
    configuration: Configuration = field(compare=False)
    level: Level = field(compare=False)
    greedy: GreedyPipeline | None = field(default=None, compare=False)


@dataclass
class SearchState:
    """The state of one search.

    Attributes:
        tell: told what is being tried.
        best_s: the seconds to beat: of the best greedy assignment so far, or those given.
        explored: number of configurations that got greedy assignments under all schedules.
        greedy: all greedy assignments so far.
        leanest_bytes: for configurations that no greedy assignment fits: bytes that stages of equally many blocks in their leanest options
            need on the fullest device.
        candidates: outcomes of configurations, for the plan.
        refusals: errors that say why some schedules, stages and numbers of micro-batches can't be had.
        schedules: schedules to try, of the configurations looked at so far.
        works: for pipeline ranks and a mesh of each: their work under the fastest placements, by number of micro-batches.
        solutions: placements of a micro-batch, shared by configurations.
    """

    problem: PipelineProblem
    tell: Callable[[str], None]
    best_s: float
    explored: int = 0
    greedy: list[GreedyPipeline] = field(default_factory=list)
    leanest_bytes: dict[Configuration, int] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    refusals: list[AutoparError] = field(default_factory=list)
    schedules: dict[Configuration, list[ScheduleChoice]] = field(default_factory=dict)
    works: dict[tuple[int, Mesh], dict[int, WorkEstimate]] = field(default_factory=dict)
    solutions: SolutionCache = field(init=False)

    def __post_init__(self) -> None:
        self.solutions = SolutionCache(self.problem, self.refusals)


def note(
    state: SearchState,
    configuration: Configuration,
    seconds: float | None,
    nbytes: int | None,
    outcome: str,
    *,
    costs: Sequence[BlockCost | None] = (),
    basis: str = "predicted",
) -> None:
    """Add the outcome of a configuration to the plan's candidates; `costs` are those of the blocks of what was found."""
    parts = find_parts(costs, configuration.microbatches, configuration.ranks, seconds) if costs and seconds is not None else None
    kind, splits = configuration.kind, configuration.splits
    state.candidates.append(
        Candidate(kind, str(configuration), seconds, nbytes, outcome, splits, parts, basis, configuration.trial.free_mesh)
    )
