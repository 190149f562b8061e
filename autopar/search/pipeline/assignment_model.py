r"""The mixed-integer model of an assignment of blocks to stages and options; `assignment` gives it its paths.

Data: blocks :math:`b` in a chain; consecutive blocks with equal options form a run :math:`r` of length :math:`L_r`, and only how many of
a run go where is decided. Stages :math:`s` on ranks :math:`k`; options :math:`o`, those that another one beats in everything left out.

Variables: :math:`n_{r,s,o} \in \mathbb{N}`, blocks of run :math:`r` on stage :math:`s` in option :math:`o`; :math:`P_{r,s}`, those on
stages up to :math:`s`; :math:`z_{r,s} \in \{0, 1\}`, some are; :math:`T` the schedule's seconds, :math:`U` those after it.

.. math:: \min\; T + U

(1) stages are runs of consecutive blocks in order, none empty:
    :math:`P_{r,s} = P_{r,s-1} + \sum_o n_{r,s,o}`, :math:`z_{r,s} \le P_{r,s} \le L_r z_{r,s}`, :math:`L_r z_{r+1,s} \le P_{r,s}`,
    :math:`\sum_{r,o} n_{r,s,o} \ge 1`
(2) every block takes one option:  :math:`P_{r,S-1} = L_r`
(3) one rank's bytes, for every combination of micro-batches that it holds at once (:math:`h_s` from forward to backward, :math:`w_s`
    from input to weight gradient): :math:`\sum_{s \in k} \sum_{r,o} n_{r,s,o} (\mathit{static} + h_s \mathit{saved} + w_s \mathit{waiting})
    + \sum_{s \in k} h_s\, g_s + W_k + 2 R_k \le M_k`, with :math:`g_s` what the stage holds of values that blocks before have read, and
    :math:`W_k` no less than the workspace of any block on :math:`k`, :math:`R_k` than any message to it
(4) no path through the schedule takes longer than the schedule: :math:`T \ge \sum_s c_s\, t_s + \sum_s d_s\, e_s`, with :math:`t_s` the
    sums of the blocks' seconds and :math:`e_s` the transfers, linear in :math:`n` and :math:`z`; :math:`c, d` count how often each
    lies on the path
(5) every rank updates its parameters when the schedule is over: :math:`U \ge \sum_{s \in k} \sum_{r,o} n_{r,s,o} \mathit{once}`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np

from autopar.errors import InfeasibleError
from autopar.search.linear_model import LinearModel
from autopar.search.pipeline.assignment_problem import PHASES, RECEIVES_AT_ONCE, AssignmentProblem, BlockRun, Floats, Ints

# The model's numbers: a step of about this many units of time, a budget of this many units of memory. Solvers keep absolute tolerances.
TIME_UNITS = 1e4
MEMORY_UNITS = 1e3
# A solve is given this many seconds at least.
LEAST_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Point:
    """A solution of the model, or of a relaxation of it.

    Attributes:
        bound: no solution takes less; seconds.
        columns: of the `AssignmentProblem`; `once`: the longest of a rank.
        counts: per run and stage the blocks per option; `prefixes`: the model's, in its order.
    """

    bound: float
    columns: Floats
    once: float
    counts: dict[tuple[int, int], Floats]
    prefixes: Floats


class AssignmentModel:
    """The model under construction, in units of its own.

    `is_leanest` leaves the time out and looks for the fewest bytes instead: of the rank that needs most, and above what each has.
    """

    def __init__(
        self,
        problem: AssignmentProblem,
        budgets: Sequence[int],
        paths: Sequence[Floats] = (),
        *,
        is_leanest: bool = False,
        is_guided: bool = False,
    ) -> None:
        self.problem = problem
        self.is_leanest = is_leanest
        self.is_guided = is_guided
        self.model = LinearModel()
        self.paths: list[Floats] = []
        self.known: set[bytes] = set()
        self.second = TIME_UNITS / (_rough_seconds(problem) or 1.0)
        self.tick = self.second * problem.schedule.microbatches  # of columns: all micro-batches' seconds, so that they are of a step's size
        self.byte = MEMORY_UNITS / max(1, *budgets)
        self.counts: dict[tuple[int, int], Ints] = {}  # per run and stage, per option of the run
        self.prefix: dict[tuple[int, int], int] = {}
        self.started: dict[tuple[int, int], int] = {}
        self._add_blocks()
        self._add_memory([self.byte * there for there in budgets], self._add_variable(0.0, np.inf, cost=1.0) if is_leanest else None)
        if not is_leanest:
            self.step, self.once = self._add_variable(0.0, np.inf, cost=1.0), self._add_variable(0.0, np.inf, cost=1.0)
            self.columns = self._add_columns()
            self._add_once()
            for path in paths or _computing_paths(problem):
                self.add_path(path)
        if is_guided:
            self._add_guide()

    @property
    def integers(self) -> Ints:
        """All variables that are integer in the whole model."""
        return np.flatnonzero(self.model.integers())

    @property
    def option_counts(self) -> Ints:
        """The variables that say how many blocks take which option."""
        return np.concatenate(list(self.counts.values()))

    def solve(self, seconds: float, *, free: Ints | None = None, fixed: Point | None = None, gap: float = 0.0) -> Point | None:
        """The model's solution, up to a relative `gap`; None when the time was over first.

        Variables in `free` needn't be integers. With `fixed`, blocks stay on the stages of that point, and None may say that they can't.
        Raises InfeasibleError when nothing fits.
        """
        prefixes = np.array(list(self.prefix.values()))
        held = None if fixed is None else (prefixes, np.rint(fixed.prefixes))
        answer = self.model.solve(max(LEAST_SECONDS, seconds), free=free, fixed=held, gap=gap)
        if answer.is_infeasible and fixed is None:
            raise InfeasibleError("no assignment of blocks to stages fits the memory")
        if answer.values is None:
            return None
        counts = {key: answer.values[ids] for key, ids in self.counts.items()}
        if self.is_leanest:
            return Point(0.0, np.zeros(0), 0.0, counts, np.zeros(0))
        columns = np.maximum(answer.values[self.columns], 0.0) / self.tick
        return Point(answer.bound / self.second, columns, float(answer.values[self.once]) / self.second, counts, answer.values[prefixes])

    def add_path(self, path: Floats) -> None:
        """Constraint (4) for one path: how often each column lies on it."""
        if path.tobytes() not in self.known:
            self.known.add(path.tobytes())
            self.paths.append(path)
            on = np.flatnonzero(path)
            self.model.add_row([self.step, *self.columns[on]], [1.0, *(-path[on] / self.problem.schedule.microbatches)], 0.0, np.inf)

    def _add_variable(self, lower: float, upper: float, *, cost: float = 0.0, is_integer: bool = False) -> int:
        return int(self.model.add_variables(np.array([cost]), lower=lower, upper=upper, is_integer=is_integer)[0])

    def _add_blocks(self) -> None:
        """Constraints (1) and (2)."""
        runs, stages = self.problem.runs, self.problem.schedule.stages
        blocks = runs[-1].first + runs[-1].length
        for stage in range(stages):
            # So many blocks are on the stages up to this one: one for each at least, and one is left for each of the others.
            least, most = stage + 1, blocks - (stages - 1 - stage)
            if stage == stages - 1:
                least = blocks
            filled: list[tuple[int, float]] = []
            for index, run in enumerate(runs):
                low, high = np.clip([least - run.first, most - run.first], 0, run.length).tolist()
                prefix = self.prefix[index, stage] = self._add_variable(low, high, is_integer=True)
                self.started[index, stage] = prefix if run.length == 1 else self._add_variable(low > 0, high > 0, is_integer=True)
                parts = [(prefix, 1.0)]
                if stage:
                    parts.append((self.prefix[index, stage - 1], -1.0))
                filled += parts
                if run.stage is None or run.stage == stage:
                    counts = self.model.add_variables(np.zeros(len(run.indices)), upper=run.length, is_integer=True)
                    self.counts[index, stage] = counts
                    parts += [(column, -1.0) for column in counts.tolist()]
                self._add_sum(parts, 0.0, 0.0)
                if run.length > 1:
                    self._add_sum([(prefix, 1.0), (self.started[index, stage], -1.0)], 0.0, np.inf)
                    self._add_sum([(prefix, 1.0), (self.started[index, stage], -run.length)], -np.inf, 0.0)
                if index:
                    above = runs[index - 1].length
                    self._add_sum([(self.started[index, stage], above), (self.prefix[index - 1, stage], -1.0)], -np.inf, 0.0)
            self._add_sum(filled, 1.0, np.inf)

    def _add_sum(self, parts: Sequence[tuple[int, float]], lower: float, upper: float) -> None:
        self.model.add_row([column for column, _ in parts], [factor for _, factor in parts], lower, upper)

    def _end(self, stage: int, numbers: Sequence[float]) -> tuple[float, list[tuple[int, float]]]:
        """The number, of one per run, of the run that `stage` ends in: a constant, and factors of `started`."""
        steps = [(self.started[index, stage], after - before) for index, (before, after) in enumerate(pairwise(numbers), 1)]
        return numbers[0], [(column, step) for column, step in steps if step]

    def _add_memory(self, budgets: Sequence[float], excess: int | None) -> None:
        """Constraint (3); with `excess`, a variable that every budget grows by."""
        problem, byte = self.problem, self.byte
        least = min(int(run.workspace.min()) for run in problem.runs)
        for rank, (own, holdings) in enumerate(zip(problem.stages_of, problem.holdings, strict=True)):
            above = self._add_workspace(own, least)
            message = self._add_variable(0.0, np.inf)
            for stage in problem.messages_to[rank]:
                constant, parts = self._end(stage, [byte * run.cut.nbytes for run in problem.runs])
                self._add_sum([(message, 1.0), *((column, -factor) for column, factor in parts)], constant, np.inf)
            here = [(position, run, self.counts[key]) for key, run, position in self._placed(own)]
            shared: list[tuple[int, float]] = [(above, 1.0), (message, RECEIVES_AT_ONCE)]
            if excess is not None:
                shared.append((excess, -1.0))
            for full, waiting in np.moveaxis(holdings, 2, 1) if len(holdings) else np.zeros((1, 2, len(own))):
                columns = [ids for _, _, ids in here]
                bytes_of = [run.static + full[at] * run.saved + waiting[at] * run.waiting for at, run, _ in here]
                received = [
                    self._end(stage - 1, [byte * often * run.cut.saved for run in problem.runs])
                    for often, stage in zip(full.tolist(), own, strict=True)
                    if stage
                ]
                others = [*shared, *(part for _, parts in received for part in parts)]
                self.model.add_row(
                    np.concatenate([*columns, [column for column, _ in others]]),
                    np.concatenate([byte * np.concatenate(bytes_of), [factor for _, factor in others]]),
                    -np.inf,
                    budgets[rank] - byte * least - sum(constant for constant, _ in received),
                )

    def _placed(self, stages: Sequence[int]) -> Iterator[tuple[tuple[int, int], BlockRun, int]]:
        """(key in `counts`, run, position of the stage) of the runs that may be on these stages."""
        for position, stage in enumerate(stages):
            for index, run in enumerate(self.problem.runs):
                if (index, stage) in self.counts:
                    yield (index, stage), run, position

    def _add_workspace(self, stages: Sequence[int], least: int) -> int:
        """A variable no less than the workspace above `least` of any block on these stages."""
        above = self._add_variable(0.0, np.inf)
        for key, run, _ in self._placed(stages):
            counts, extra = self.counts[key], run.workspace - least
            if run.length == 1:
                self.model.add_row([above, *counts], [1.0, *-(self.byte * extra)], 0.0, np.inf)
                continue
            steps = np.unique(np.append(extra, 0))
            parts = [(above, 1.0)]
            for below, step in pairwise(steps.tolist()):
                # Whether any block needs this much.
                needed = self._add_variable(0.0, 1.0, is_integer=True)
                self._add_sum([*((column, 1.0) for column in counts[extra >= step].tolist()), (needed, -run.length)], -np.inf, 0.0)
                parts.append((needed, -self.byte * (step - below)))
            self._add_sum(parts, 0.0, np.inf)
        return above

    def _add_columns(self) -> Ints:
        """Variables for the columns of an `AssignmentProblem`: seconds of stages and transfers."""
        runs, stages, tick = self.problem.runs, self.problem.schedule.stages, self.tick
        columns: list[int] = []
        for phase in range(PHASES):
            for stage in range(stages):
                column = self._add_variable(0.0, np.inf)
                columns.append(column)
                parts = [(column, 1.0)]
                for key, run, _ in self._placed([stage]):
                    parts += zip(self.counts[key].tolist(), (-tick * run.seconds[:, phase]).tolist(), strict=True)
                self._add_sum(parts, 0.0, 0.0)
        for way in (0, 1):
            for stage in range(stages - 1):
                constant, parts = self._end(stage, [tick * run.cut[way] for run in runs])
                column = self._add_variable(0.0, np.inf)
                columns.append(column)
                self._add_sum([(column, 1.0), *((started, -step) for started, step in parts)], constant, constant)
        return np.array(columns)

    def _add_once(self) -> None:
        """Constraint (5)."""
        for own in self.problem.stages_of:
            parts = [(self.once, 1.0)]
            for key, run, _ in self._placed(own):
                parts += zip(self.counts[key].tolist(), (-self.second * run.once).tolist(), strict=True)
            self._add_sum(parts, 0.0, np.inf)

    def _add_guide(self) -> None:
        """A step takes as long as the slowest of all ranks' first stages, and of their second, and so on: no constraint, but a guess."""
        stages = self.problem.schedule.stages
        parts = [(self.step, 1.0)]
        for group in zip_longest(*self.problem.stages_of):
            for phases in ((0,), (1, 2)):
                slowest = self._add_variable(0.0, np.inf)
                parts.append((slowest, -1.0))
                for stage in group:
                    if stage is not None:
                        work = [(int(self.columns[phase * stages + stage]), -1.0) for phase in phases]
                        self._add_sum([(slowest, 1.0), *work], 0.0, np.inf)
        self._add_sum(parts, 0.0, np.inf)


def _rough_seconds(problem: AssignmentProblem) -> float:
    """About what a step takes: the fastest options, evenly over the ranks."""
    work = sum(run.length * float((run.seconds.sum(axis=1)).min()) for run in problem.runs)
    return work * problem.schedule.microbatches / problem.schedule.ranks


def _computing_paths(problem: AssignmentProblem) -> list[Floats]:
    """Each rank's computing, one action after the other: a path."""
    cuts = []
    for own in problem.stages_of:
        cut = np.zeros(PHASES * problem.schedule.stages + 2 * (problem.schedule.stages - 1))
        for stage in own:
            cut[stage] = problem.schedule.microbatches
            if problem.has_backward:
                cut[problem.schedule.stages + stage] = cut[2 * problem.schedule.stages + stage] = problem.schedule.microbatches
        cuts.append(cut)
    return cuts


def expand_counts(problem: AssignmentProblem, counts: dict[tuple[int, int], Floats]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stage, option) of every block, from the number of blocks per run, stage and option."""
    stages: list[int] = []
    options: list[int] = []
    for index, run in enumerate(problem.runs):
        for stage in range(problem.schedule.stages):
            for option, count in zip(run.indices, np.rint(counts.get((index, stage), np.zeros(0))).astype(int).tolist(), strict=False):
                stages += [stage] * count
                options += [option] * count
        assert len(stages) == run.first + run.length, "the model lost a block"
    return tuple(stages), tuple(options)
