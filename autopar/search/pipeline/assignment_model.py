r"""The mixed-integer model of an assignment of blocks to stages and options, with some of the schedule's paths.

Comes in: an `AssignmentProblem`, budgets, paths (`assignment` finds more and adds them). Goes out: a `Point`, a solution of the model or of
a relaxation, with a bound.

Data: blocks :math:`b` in a chain; consecutive blocks with equal options form a run :math:`r` of length :math:`L_r`, and only how many
blocks of a run are where is decided. Stages :math:`s` on pipeline ranks :math:`k`; options :math:`o` of a run, without dominated ones.

Variables: :math:`n_{r,s,o} \in \mathbb{N}`, the number of blocks of run :math:`r` on stage :math:`s` in option :math:`o` (`counts`);
:math:`P_{r,s}`, the number of its blocks on the stages up to :math:`s` (`prefix`); :math:`z_{r,s} \in \{0, 1\}`, whether there are any
(`started`); :math:`T`, the schedule's seconds (`step`); :math:`U`, those after it (`per_step`).

.. math:: \min\; T + U

(1) stages are runs of consecutive blocks in order, none empty:
    :math:`P_{r,s} = P_{r,s-1} + \sum_o n_{r,s,o}`, :math:`z_{r,s} \le P_{r,s} \le L_r z_{r,s}`, :math:`L_r z_{r+1,s} \le P_{r,s}`,
    :math:`\sum_{r,o} n_{r,s,o} \ge 1`
(2) every block takes one option:  :math:`P_{r,S-1} = L_r`
(3) bytes of one pipeline rank, for every combination of micro-batches that it holds at once (:math:`h_s` from forward to backward,
    :math:`w_s` from input to weight gradient): :math:`\sum_{s \in k} \sum_{r,o} n_{r,s,o} (\mathit{static} + h_s \mathit{saved} +
    w_s \mathit{waiting}) + \sum_{s \in k} h_s\, g_s + W_k + 2 R_k \le M_k`, with :math:`g_s` the bytes that the stage holds of values
    which blocks on earlier stages read too, :math:`W_k` no less than the workspace of any block on :math:`k`, and :math:`R_k` no less
    than any message to it
(4) no path through the schedule takes longer than the schedule: :math:`T \ge \sum_s c_s\, t_s + \sum_s d_s\, e_s`, with :math:`t_s` the
    sums of the blocks' seconds and :math:`e_s` the transfers, linear in :math:`n` and :math:`z`; :math:`c, d` count how often each
    lies on the path
(5) every rank updates its parameters when the schedule is over: :math:`U \ge \sum_{s \in k} \sum_{r,o} n_{r,s,o} \mathit{per_step}`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np

from autopar.errors import InfeasibleError
from autopar.search.linear_model import LinearModel
from autopar.search.pipeline.assignment_problem import PHASES, RECEIVES_AT_ONCE, AssignmentProblem, BlockRun, Floats, Ints
from autopar.search.pipeline.peaks import has_first_backward

# The model's units: a step takes about this many units of time, a budget is this many units of memory. Solvers' tolerances are absolute.
TIME_UNITS = 1e4
MEMORY_UNITS = 1e3
# The least time limit of a solve, in seconds.
LEAST_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Point:
    """A solution of the model, or of a relaxation of it.

    Attributes:
        bound: a lower bound on the seconds of any solution.
        columns: seconds of stages and transfers, in the order that `AssignmentProblem` states.
        per_step: seconds U.
        counts: per run and stage the number of blocks in each option of the run.
        prefixes: the values of all P, in the model's order.
    """

    bound: float
    columns: Floats
    per_step: float
    counts: dict[tuple[int, int], Floats]
    prefixes: Floats


class AssignmentModel:
    """The model, which paths can be added to; its variables are in units of its own.

    Attributes:
        paths: the paths that constraint (4) is stated for.
        second, tick, byte: units of the model per second of a step, per second of a column, per byte.
        counts, prefix, started: ids of the variables n, P and z, by (run, stage); n per option of the run.
        step, per_step, columns: ids of the variables T, U and those of the seconds of stages and transfers.
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
        """State the model.

        Args:
            problem: what is assigned.
            budgets: bytes of each pipeline rank.
            paths: paths of the schedule for (4); by default each rank's computing actions, one after another.
            is_leanest: instead of seconds, minimise the most bytes above its budget that any pipeline rank needs.
            is_guided: add a guess of what the schedule takes (`_add_guide`): solutions are good with few paths, but bounds don't hold.
        """
        self.problem = problem
        self.is_leanest = is_leanest
        self.is_guided = is_guided
        self.model = LinearModel()
        self.paths: list[Floats] = []
        self._known_paths: set[bytes] = set()
        self.second = TIME_UNITS / (_rough_seconds(problem) or 1.0)
        self.tick = self.second * problem.schedule.microbatches  # so that the columns of all micro-batches are of a step's size
        self.byte = MEMORY_UNITS / max(1, *budgets)
        self.counts: dict[tuple[int, int], Ints] = {}
        self.prefix: dict[tuple[int, int], int] = {}
        self.started: dict[tuple[int, int], int] = {}
        self._add_blocks()
        self._add_memory([self.byte * budget for budget in budgets], self._add_variable(0.0, np.inf, cost=1.0) if is_leanest else None)
        if not is_leanest:
            self.step, self.per_step = self._add_variable(0.0, np.inf, cost=1.0), self._add_variable(0.0, np.inf, cost=1.0)
            self.columns = self._add_columns()
            self._add_per_step()
            for path in paths or _computing_paths(problem):
                self.add_path(path)
        if is_guided:
            self._add_guide()

    @property
    def integers(self) -> Ints:
        """Ids of all variables that are integers in the model."""
        return np.flatnonzero(self.model.integers())

    @property
    def option_counts(self) -> Ints:
        """Ids of all variables n."""
        return np.concatenate(list(self.counts.values()))

    def solve(self, seconds: float, *, free: Ints | None = None, fixed: Point | None = None, gap: float = 0.0) -> Point | None:
        """The best solution of the model that is found; None when none is.

        Args:
            seconds: the time limit.
            free: ids of variables that needn't be integers in this solve.
            fixed: a point whose blocks per stage are kept, so that only options are chosen; None is returned if that can't be.
            gap: relative distance from the bound at which to stop.

        Raises InfeasibleError when it is proven that nothing fits, unless a point is `fixed`.
        """
        prefixes = np.array(list(self.prefix.values()))
        fixed_prefixes = None if fixed is None else (prefixes, np.rint(fixed.prefixes))
        result = self.model.solve(max(LEAST_SECONDS, seconds), free=free, fixed=fixed_prefixes, gap=gap)
        if result.is_infeasible and fixed is None:
            raise InfeasibleError("no assignment of blocks to stages fits the memory")
        if result.values is None:
            return None
        counts = {key: result.values[ids] for key, ids in self.counts.items()}
        if self.is_leanest:
            return Point(0.0, np.zeros(0), 0.0, counts, np.zeros(0))
        columns = np.maximum(result.values[self.columns], 0.0) / self.tick
        return Point(
            result.bound / self.second, columns, float(result.values[self.per_step]) / self.second, counts, result.values[prefixes]
        )

    def add_path(self, path: Floats) -> None:
        """Add constraint (4) for a path, given by how often each column lies on it, shape (columns,), unless the model has it."""
        if path.tobytes() not in self._known_paths:
            self._known_paths.add(path.tobytes())
            self.paths.append(path)
            on_path = np.flatnonzero(path)
            self.model.add_row(
                [self.step, *self.columns[on_path]], [1.0, *(-path[on_path] / self.problem.schedule.microbatches)], 0.0, np.inf
            )

    def _add_variable(self, lower: float, upper: float, *, cost: float = 0.0, is_integer: bool = False) -> int:
        return int(self.model.add_variables(np.array([cost]), lower=lower, upper=upper, is_integer=is_integer)[0])

    def _add_blocks(self) -> None:
        """Variables P, z and n, with constraints (1) and (2)."""
        runs, stages = self.problem.runs, self.problem.schedule.stages
        blocks = runs[-1].first + runs[-1].length
        for stage in range(stages):
            # Bounds of the number of blocks on the stages up to this one: each of these has a block, and so has each stage after it.
            least, most = stage + 1, blocks - (stages - 1 - stage)
            if stage == stages - 1:
                least = blocks
            blocks_of_stage: list[tuple[int, float]] = []
            for index, run in enumerate(runs):
                low, high = np.clip([least - run.first, most - run.first], 0, run.length).tolist()
                prefix = self.prefix[index, stage] = self._add_variable(low, high, is_integer=True)
                self.started[index, stage] = prefix if run.length == 1 else self._add_variable(low > 0, high > 0, is_integer=True)
                terms = [(prefix, 1.0)]
                if stage:
                    terms.append((self.prefix[index, stage - 1], -1.0))
                blocks_of_stage += terms
                if run.stage is None or run.stage == stage:
                    counts = self.model.add_variables(np.zeros(len(run.indices)), upper=run.length, is_integer=True)
                    self.counts[index, stage] = counts
                    terms += [(column, -1.0) for column in counts.tolist()]
                self._add_sum(terms, 0.0, 0.0)
                if run.length > 1:
                    self._add_sum([(prefix, 1.0), (self.started[index, stage], -1.0)], 0.0, np.inf)
                    self._add_sum([(prefix, 1.0), (self.started[index, stage], -run.length)], -np.inf, 0.0)
                if index:
                    previous_length = runs[index - 1].length
                    self._add_sum([(self.started[index, stage], previous_length), (self.prefix[index - 1, stage], -1.0)], -np.inf, 0.0)
            self._add_sum(blocks_of_stage, 1.0, np.inf)

    def _add_sum(self, terms: Sequence[tuple[int, float]], lower: float, upper: float) -> None:
        """Add a row, given as (variable, factor)."""
        self.model.add_row([column for column, _ in terms], [factor for _, factor in terms], lower, upper)

    def _number_at_end(self, stage: int, numbers: Sequence[float]) -> tuple[float, list[tuple[int, float]]]:
        """Of numbers per run, that of the run in which `stage` ends, as a linear expression: a constant, and terms (variable, factor).

        Since runs start in order, it is the first number plus, for every later run that has started, the difference to the run before it.
        """
        steps = [(self.started[index, stage], after - before) for index, (before, after) in enumerate(pairwise(numbers), 1)]
        return numbers[0], [(column, step) for column, step in steps if step]

    def _add_memory(self, budgets: Sequence[float], excess: int | None) -> None:
        """Constraint (3), in units of the model; `excess` is the id of a variable that every budget grows by."""
        problem, byte = self.problem, self.byte
        for rank, (stages, holdings) in enumerate(zip(problem.stages_of, problem.holdings, strict=True)):
            workspaces = [run.first_workspace if has_first_backward(holdings) else run.workspace for run in problem.runs]
            least = min(int(nbytes.min()) for nbytes in workspaces)
            workspace_above_least = self._add_workspace(stages, workspaces, least)
            message = self._add_variable(0.0, np.inf)
            for stage in problem.messages_to[rank]:
                constant, terms = self._number_at_end(stage, [byte * run.cut.nbytes for run in problem.runs])
                self._add_sum([(message, 1.0), *((column, -factor) for column, factor in terms)], constant, np.inf)
            possible = [(position, key[0], self.counts[key]) for key, _, position in self._possible_runs(stages)]
            always: list[tuple[int, float]] = [(workspace_above_least, 1.0), (message, RECEIVES_AT_ONCE)]
            if excess is not None:
                always.append((excess, -1.0))
            moments = holdings if len(holdings) else np.zeros((1, len(stages), 3), dtype=np.int64)
            tables = [problem.held(index, moments[:, position]) for position, index, _ in possible]
            columns = [ids for _, _, ids in possible]
            for number in range(len(tables[0])):
                in_flight = moments[min(number, len(moments) - 1), :, 0]
                bytes_of = [table[number] for table in tables]
                read_before = [
                    self._number_at_end(stage - 1, [byte * count * run.cut.saved for run in problem.runs])
                    for count, stage in zip(in_flight.tolist(), stages, strict=True)
                    if stage
                ]
                other_terms = [*always, *(term for _, terms in read_before for term in terms)]
                self.model.add_row(
                    np.concatenate([*columns, [column for column, _ in other_terms]]),
                    np.concatenate([byte * np.concatenate(bytes_of), [factor for _, factor in other_terms]]),
                    -np.inf,
                    budgets[rank] - byte * least - sum(constant for constant, _ in read_before),
                )

    def _possible_runs(self, stages: Sequence[int]) -> Iterator[tuple[tuple[int, int], BlockRun, int]]:
        """(key in `counts`, run, position of the stage among these) of the runs that pins let be on these stages."""
        for position, stage in enumerate(stages):
            for index, run in enumerate(self.problem.runs):
                if (index, stage) in self.counts:
                    yield (index, stage), run, position

    def _add_workspace(self, stages: Sequence[int], workspaces: Sequence[Ints], least: int) -> int:
        """A variable no less than what any block on these stages needs of workspace above `least` bytes."""
        above = self._add_variable(0.0, np.inf)
        for key, run, _ in self._possible_runs(stages):
            counts, extra = self.counts[key], workspaces[key[0]] - least
            if run.length == 1:
                self.model.add_row([above, *counts], [1.0, *-(self.byte * extra)], 0.0, np.inf)
                continue
            steps = np.unique(np.append(extra, 0))
            terms = [(above, 1.0)]
            for below, step in pairwise(steps.tolist()):
                # Whether any block of the run needs this much.
                needed = self._add_variable(0.0, 1.0, is_integer=True)
                self._add_sum([*((column, 1.0) for column in counts[extra >= step].tolist()), (needed, -run.length)], -np.inf, 0.0)
                terms.append((needed, -self.byte * (step - below)))
            self._add_sum(terms, 0.0, np.inf)
        return above

    def _add_columns(self) -> Ints:
        """Variables for the columns of an `AssignmentProblem`: seconds of stages and transfers."""
        runs, stages, tick = self.problem.runs, self.problem.schedule.stages, self.tick
        columns: list[int] = []
        for phase in range(PHASES):
            for stage in range(stages):
                column = self._add_variable(0.0, np.inf)
                columns.append(column)
                terms = [(column, 1.0)]
                for key, run, _ in self._possible_runs([stage]):
                    terms += zip(self.counts[key].tolist(), (-tick * run.seconds[:, phase]).tolist(), strict=True)
                self._add_sum(terms, 0.0, 0.0)
        for direction in (0, 1):  # of `CutCost.seconds`: forward, backward
            for stage in range(stages - 1):
                constant, terms = self._number_at_end(stage, [tick * run.cut.seconds[direction] for run in runs])
                column = self._add_variable(0.0, np.inf)
                columns.append(column)
                self._add_sum([(column, 1.0), *((started, -step) for started, step in terms)], constant, constant)
        return np.array(columns)

    def _add_per_step(self) -> None:
        """Constraint (5)."""
        for stages in self.problem.stages_of:
            terms = [(self.per_step, 1.0)]
            for key, run, _ in self._possible_runs(stages):
                terms += zip(self.counts[key].tolist(), (-self.second * run.per_step).tolist(), strict=True)
            self._add_sum(terms, 0.0, np.inf)

    def _add_guide(self) -> None:
        """A guess that needn't hold: a step takes as long as the slowest first stage of any rank, plus the slowest second stage, and so on.

        Forwards and backwards count apart: T >= sum over j of (max over k of f[k, j] + max over k of b[k, j]), with the seconds of all
        micro-batches of the j-th stage of pipeline rank k.
        """
        stages = self.problem.schedule.stages
        terms = [(self.step, 1.0)]
        for stages_of_round in zip_longest(*self.problem.stages_of):
            for phases in ((0,), (1, 2)):
                slowest = self._add_variable(0.0, np.inf)
                terms.append((slowest, -1.0))
                for stage in stages_of_round:
                    if stage is not None:
                        seconds = [(int(self.columns[phase * stages + stage]), -1.0) for phase in phases]
                        self._add_sum([(slowest, 1.0), *seconds], 0.0, np.inf)
        self._add_sum(terms, 0.0, np.inf)


def _rough_seconds(problem: AssignmentProblem) -> float:
    """About what a step takes: the work of the fastest options, spread evenly over the pipeline ranks, without bubbles."""
    work = sum(run.length * float((run.seconds.sum(axis=1)).min()) for run in problem.runs)
    return work * problem.schedule.microbatches / problem.schedule.ranks


def _computing_paths(problem: AssignmentProblem) -> list[Floats]:
    """A path for each pipeline rank: all of its computing actions, one after another."""
    paths = []
    for stages in problem.stages_of:
        path = np.zeros(PHASES * problem.schedule.stages + 2 * (problem.schedule.stages - 1))
        for stage in stages:
            path[stage] = problem.schedule.microbatches
            if problem.has_backward:
                path[problem.schedule.stages + stage] = path[2 * problem.schedule.stages + stage] = problem.schedule.microbatches
        paths.append(path)
    return paths


def expand_counts(problem: AssignmentProblem, counts: dict[tuple[int, int], Floats]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stages of all blocks, options of all blocks), from the number of blocks per run, stage and option (whole `Point.counts`)."""
    stages: list[int] = []
    options: list[int] = []
    for index, run in enumerate(problem.runs):
        for stage in range(problem.schedule.stages):
            for option, count in zip(run.indices, np.rint(counts.get((index, stage), np.zeros(0))).astype(int).tolist(), strict=False):
                stages += [stage] * count
                options += [option] * count
        assert len(stages) == run.first + run.length, "the model lost a block"
    return tuple(stages), tuple(options)
