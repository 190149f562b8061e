r"""Blocks -> stages and variants: the assignment of least simulated time that fits the memory, with a bound.

Comes in: per block a menu of variants (seconds, bytes), a schedule, a budget. Goes out: a stage and a variant per block.

Data: blocks :math:`b` in a chain; consecutive blocks with equal menus form a run :math:`r` of length :math:`L_r`, and only how many of
a run go where is decided. Stages :math:`s` on ranks :math:`k`; variants :math:`v`, those that another one beats in everything left out.

Variables: :math:`n_{r,s,v} \in \mathbb{N}`, blocks of run :math:`r` on stage :math:`s` in variant :math:`v`; :math:`P_{r,s}`, those on
stages up to :math:`s`; :math:`z_{r,s} \in \{0, 1\}`, some are; :math:`T` the schedule's seconds, :math:`U` those after it.

.. math:: \min\; T + U

(1) stages are runs of consecutive blocks in order, none empty:
    :math:`P_{r,s} = P_{r,s-1} + \sum_v n_{r,s,v}`, :math:`z_{r,s} \le P_{r,s} \le L_r z_{r,s}`, :math:`L_r z_{r+1,s} \le P_{r,s}`,
    :math:`\sum_{r,v} n_{r,s,v} \ge 1`
(2) every block takes one variant:  :math:`P_{r,S-1} = L_r`
(3) one rank's bytes, for every combination of micro-batches that it holds at once (:math:`h_s` from forward to backward, :math:`w_s`
    from input to weight gradient): :math:`\sum_{s \in k} \sum_{r,v} n_{r,s,v} (\mathit{static} + h_s \mathit{kept} + w_s \mathit{waiting})
    + W_k + 2 R_k \le M_k`, with :math:`W_k` no less than the workspace of any block on :math:`k`, :math:`R_k` than any message to it
(4) no path through the schedule takes longer than the schedule: :math:`T \ge \sum_s c_s\, t_s + \sum_s d_s\, e_s`, with :math:`t_s` the
    sums of the blocks' seconds and :math:`e_s` the transfers, linear in :math:`n` and :math:`z`; :math:`c, d` count how often each
    lies on the path
(5) every rank updates its parameters when the schedule is over: :math:`U \ge \sum_{s \in k} \sum_{r,v} n_{r,s,v} \mathit{once}`

A step of a fixed schedule takes as long as the longest path through it: a maximum of the linear functions (4), of which there are too
many to write down. So the model starts with each rank's own work as a path; its answer is simulated, the longest path joins the model,
and so on until the simulated time of the best answer is the model's bound: the cutting planes of Kelley (1960). First with
:math:`n` continuous, where a round is cheap and most paths are found, then with integers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from autopar.critical_paths import PHASES, Floats, Ids, Paths, find_paths
from autopar.errors import InfeasibleError, InputError, SolverError
from autopar.linear_model import LinearModel
from autopar.schedules import Schedule, held
from autopar.units import format_bytes

Bytes = npt.NDArray[np.int64]

RECEIVES_AT_ONCE = 2
"""Receive buffers that a rank has at once: of the message in use, and of the next one, posted one computing action ahead."""

# The model's numbers: a step of about this many units of time, a budget of this many units of memory. Solvers keep absolute tolerances.
TIME_UNITS = 1e4
MEMORY_UNITS = 1e4
# Rounds of the relaxed model at most, and the share of the gap asked for at which they end.
TILT = 0.03
RELAXED_ROUNDS = 40
GAP_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a block; seconds are of one micro-batch.

    Attributes:
        forward, input, weight: seconds of the forward, the input gradients (with what is recomputed for them), the weight gradients.
        once: seconds per step outside of the schedule: the optimizer's update, reductions that nothing hides.
        kept: bytes per micro-batch from the forward to the backward; `waiting`: from the input to the weight gradients.
        static: bytes of parameters, gradients, optimizer state and buffers.
        workspace: bytes needed only while the block runs.
    """

    name: str
    forward: float
    input: float
    weight: float
    once: float
    kept: int
    waiting: int
    static: int
    workspace: int


@dataclass(frozen=True, slots=True)
class BlockMenu:
    """A block of the chain, and the ways to run it.

    Attributes:
        cut: if a stage ends after this block: seconds to move what crosses, forward and backward, and bytes of one receive buffer.
        stage: the stage that the user pinned it to.
    """

    name: str
    variants: tuple[Variant, ...]
    cut: tuple[float, float, int]
    stage: int | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stage and a variant per block, and what is known about them.

    Attributes:
        objective: seconds by the model's paths; `simulated`: by the whole schedule, and the longest `once` of a rank.
        bound: no assignment within the budget takes less; status: ``optimal`` when `simulated` is within the gap asked for of it,
            else ``feasible``.
        iterations: models solved; `peak`: bytes per rank.
    """

    stages: tuple[int, ...]
    variants: tuple[int, ...]
    objective: float
    simulated: float
    bound: float
    status: str
    iterations: int
    peak: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive blocks with equal menus.

    Attributes:
        options: positions in the menu of the variants that are worth taking.
        seconds: forward, input, weight of each, shape (options, 3); `once` of each, shape (options,).
        kept, waiting, static, workspace: bytes of each, shape (options,).
        cut: seconds forward, backward, and bytes.
    """

    first: int
    length: int
    options: tuple[int, ...]
    seconds: Floats
    once: Floats
    kept: Bytes
    waiting: Bytes
    static: Bytes
    workspace: Bytes
    cut: tuple[float, float, int]
    stage: int | None


@dataclass(frozen=True)
class _Problem:
    """What the model is made of.

    Attributes:
        stages_of: per rank its stages; `holdings`: per rank, per combination and stage of it, the micro-batches held from forward to
            backward and from input to weight gradient, shape (combinations, stages of the rank, 2).
    """

    menus: Sequence[BlockMenu]
    runs: tuple[_Run, ...]
    schedule: Schedule
    paths: Paths
    budgets: tuple[int, ...]
    stages_of: tuple[tuple[int, ...], ...]
    holdings: tuple[Bytes, ...]

    def receives(self, rank: int) -> list[int]:
        """The stages at whose end there is a cut that a message to this rank crosses."""
        of, last = self.schedule.rank_of, self.schedule.stages - 1
        found = [stage - 1 for stage in self.stages_of[rank] if stage and of[stage - 1] != rank]
        if self.schedule.has_backward:
            found += [stage for stage in self.stages_of[rank] if stage < last and of[stage + 1] != rank]
        return sorted(set(found))


@dataclass(frozen=True, slots=True)
class _Measure:
    """An assignment in numbers: the columns of ``critical_paths``, the longest `once` of a rank, bytes per rank."""

    times: Floats
    once: float
    peak: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Point:
    """An answer of the model: a lower bound in seconds, the columns of ``critical_paths``, `once`, and the blocks per run and stage."""

    bound: float
    times: Floats
    once: float
    counts: dict[tuple[int, int], Floats]


def assign(
    menus: Sequence[BlockMenu], schedule: Schedule, budget: int | Sequence[int], *, time_limit: float = 10.0, gap: float = 1e-3
) -> Assignment:
    """The assignment of blocks to stages and variants that takes the least simulated time and fits the budget.

    Args:
        menus: of the blocks, in the order of the chain.
        schedule: of computing actions; its stages stand in a chain.
        budget: bytes of every rank, or of each.
        time_limit: seconds; when they are over, the best assignment found is returned with the bound that was reached.
        gap: relative distance of `simulated` from `bound` at which the search ends.

    Raises InfeasibleError when nothing fits, with the bytes that the leanest assignment needs in its ``needed`` attribute, or when there
    are fewer blocks than stages, or pins that can't be met; InputError for a pin or budgets that aren't of this schedule; SolverError
    when the time is over before any assignment was found.
    """
    deadline = time.perf_counter() + time_limit
    problem = _prepare(menus, schedule, budget)
    master = _Master(problem, problem.budgets)
    rounds = _relax(master, deadline, gap)
    best: Assignment | None = None
    bound, slack = 0.0, 0
    while best is None or (best.simulated > bound * (1 + gap) and time.perf_counter() < deadline):
        point = master.solve(deadline, gap=GAP_SHARE * gap)
        rounds += 1
        if point is None:
            break
        bound = max(bound, point.bound)
        stages, variants = _spell(problem, point.counts)
        measure = _measure(problem, stages, variants)
        excess = max(used - there for used, there in zip(measure.peak, problem.budgets, strict=True))
        if excess > 0:
            # The solver keeps a row only as far as its tolerances go.
            slack += excess
            master = _Master(problem, tuple(there - slack for there in problem.budgets), master.cuts)
            continue
        objective = master.longest_known(measure.times) + measure.once
        simulated = master.simulate(measure.times) + measure.once
        if best is None or simulated < best.simulated:
            best = Assignment(stages, variants, objective, simulated, bound, "feasible", rounds, measure.peak)
    if best is None:
        raise SolverError(
            f"no assignment of {len(menus)} blocks to {schedule.stages} stages was found in {time_limit} s; give it more time"
        )
    status = "optimal" if best.simulated <= bound * (1 + gap) else "feasible"
    return replace(best, bound=min(bound, best.simulated), status=status, iterations=rounds)


def evaluate(
    menus: Sequence[BlockMenu], schedule: Schedule, stages: Sequence[int], variants: Sequence[int]
) -> tuple[float, tuple[int, ...]]:
    """(seconds of a step, bytes of each rank at its peak) of an assignment, from the menus alone."""
    problem = _prepare(menus, schedule, 0)
    measure = _measure(problem, stages, variants)
    return float(problem.paths.longest(measure.times[None])[0][0]) + measure.once, measure.peak


def _prepare(menus: Sequence[BlockMenu], schedule: Schedule, budget: int | Sequence[int]) -> _Problem:
    budgets = (budget,) * schedule.ranks if isinstance(budget, int) else tuple(budget)
    if len(budgets) != schedule.ranks:
        raise InputError(f"{len(budgets)} budgets of memory for {schedule.ranks} pipeline ranks; give one number, or one for each")
    _check_pins(menus, schedule)
    runs: list[_Run] = []
    for block, menu in enumerate(menus):
        if block and menu == replace(menus[block - 1], name=menu.name):
            runs[-1] = replace(runs[-1], length=runs[-1].length + 1)
        else:
            runs.append(_make_run(block, menu, schedule))
    stages_of = tuple(tuple(stage for stage, of in enumerate(schedule.rank_of) if of == rank) for rank in range(schedule.ranks))
    holdings = tuple(np.array(combinations, dtype=np.int64).reshape(len(combinations), -1, 2) for combinations in held(schedule))
    return _Problem(menus, tuple(runs), schedule, find_paths(schedule), budgets, stages_of, holdings)


def _check_pins(menus: Sequence[BlockMenu], schedule: Schedule) -> None:
    stages = schedule.stages
    if len(menus) < stages:
        raise InfeasibleError(
            f"{len(menus)} blocks can't fill the {stages} stages of schedule {schedule.name!r}: each stage needs one; take fewer stages"
        )
    pins = [(block, menu.stage) for block, menu in enumerate(menus) if menu.stage is not None]
    for block, stage in pins:
        if not 0 <= stage < stages:
            raise InputError(f"block {menus[block].name!r} is pinned to stage {stage}; the stages are 0 to {stages - 1}")
    # From a block to the next the stage stays or goes on by one: none is empty. The first block is on the first, the last on the last.
    for (block, stage), (later, last) in pairwise([(-1, -1), *pins, (len(menus), stages)]):
        if not 0 <= last - stage <= later - block:
            start = "the chain's start" if block < 0 else f"block {menus[block].name!r} pinned to stage {stage}"
            end = "the chain's end" if later == len(menus) else f"block {menus[later].name!r} pinned to stage {last}"
            raise InfeasibleError(
                f"between {start} and {end} are {later - block - 1} blocks for {last - stage - 1} stages, and stages are in order, with a"
                " block at least; move a pin"
            )


def _make_run(block: int, menu: BlockMenu, schedule: Schedule) -> _Run:
    """A run of one block, without the variants that another one beats in all that counts under this schedule."""
    seconds = np.array([(one.forward, one.input, one.weight) for one in menu.variants])
    once = np.array([one.once for one in menu.variants])
    kept, waiting, static, workspace = np.array(
        [(one.kept, one.waiting, one.static, one.workspace) for one in menu.variants], dtype=np.int64
    ).T
    merits = [seconds[:, 0], once, static, workspace]
    if schedule.has_backward:
        merits.append(kept)
    if schedule.splits_backward:
        merits += [seconds[:, 1], seconds[:, 2], waiting]
    elif schedule.has_backward:
        merits.append(seconds[:, 1] + seconds[:, 2])
    merit = np.stack(merits, axis=1)
    no_worse = (merit[:, None] <= merit[None]).all(axis=2)
    # Of equal ones the first is left.
    beaten = no_worse & (~no_worse.T | (np.arange(len(merit))[:, None] < np.arange(len(merit))[None]))
    np.fill_diagonal(beaten, False)
    left = np.flatnonzero(~beaten.any(axis=0))
    return _Run(
        first=block,
        length=1,
        options=tuple(left.tolist()),
        seconds=seconds[left],
        once=once[left],
        kept=kept[left],
        waiting=waiting[left],
        static=static[left],
        workspace=workspace[left],
        cut=menu.cut,
        stage=menu.stage,
    )


def _spell(problem: _Problem, counts: dict[tuple[int, int], Floats]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stage, variant) of every block, from the number of blocks per run, stage and option."""
    stages: list[int] = []
    variants: list[int] = []
    for index, run in enumerate(problem.runs):
        for stage in range(problem.schedule.stages):
            for option, count in zip(run.options, np.rint(counts.get((index, stage), np.zeros(0))).astype(int).tolist(), strict=False):
                stages += [stage] * count
                variants += [option] * count
        assert len(stages) == run.first + run.length, "the model lost a block"
    return tuple(stages), tuple(variants)


def _measure(problem: _Problem, stages: Sequence[int], variants: Sequence[int]) -> _Measure:
    schedule = problem.schedule
    count = schedule.stages
    seconds = np.zeros((3, count))
    cuts = np.zeros((2, count))
    once = np.zeros(count)
    kept, waiting, static, workspace, message = np.zeros((5, count), dtype=np.int64)
    for menu, stage, variant in zip(problem.menus, stages, variants, strict=True):
        one = menu.variants[variant]
        seconds[:, stage] += (one.forward, one.input, one.weight)
        once[stage] += one.once
        kept[stage] += one.kept
        waiting[stage] += one.waiting
        static[stage] += one.static
        workspace[stage] = max(workspace[stage], one.workspace)
        cuts[:, stage], message[stage] = menu.cut[:2], menu.cut[2]
    peak, longest = [], 0.0
    for rank, (own, holdings) in enumerate(zip(problem.stages_of, problem.holdings, strict=True)):
        at = list(own)
        lived = holdings[:, :, 0] @ kept[at] + holdings[:, :, 1] @ waiting[at]
        buffers = RECEIVES_AT_ONCE * max((int(message[stage]) for stage in problem.receives(rank)), default=0)
        peak.append(int(lived.max(initial=0)) + int(static[at].sum()) + int(workspace[at].max()) + buffers)
        longest = max(longest, float(once[at].sum()))
    return _Measure(np.concatenate([seconds.ravel(), cuts[:, : count - 1].ravel()]), longest, tuple(peak))


def _relax(master: _Master, deadline: float, gap: float) -> int:
    """Give the model the paths that matter while its counts are continuous; returns the rounds that took."""
    bound = 0.0
    for done in range(RELAXED_ROUNDS):
        point = master.solve(deadline, is_relaxed=True)
        if point is None:
            return done
        simulated = master.simulate(point.times) + point.once
        if simulated <= point.bound * (1 + GAP_SHARE * gap) or (done and point.bound <= bound * (1 + GAP_SHARE * gap)):
            return done + 1
        bound = point.bound
    return RELAXED_ROUNDS


class _Master:
    """The model under construction, in units of its own.

    `is_leanest` leaves the time out and looks for the fewest bytes instead: of the rank that needs most, and above what each has.
    """

    def __init__(self, problem: _Problem, budgets: Sequence[int], cuts: Sequence[Floats] = (), *, is_leanest: bool = False) -> None:
        self.problem = problem
        self.model = LinearModel()
        self.cuts: list[Floats] = []
        self.second = TIME_UNITS / (_rough_seconds(problem) or 1.0)
        self.byte = MEMORY_UNITS / max(1, *budgets)
        self.counts: dict[tuple[int, int], Ids] = {}  # per run and stage, per option of the run
        self.prefix: dict[tuple[int, int], int] = {}
        self.started: dict[tuple[int, int], int] = {}
        self._add_blocks()
        self._add_memory([self.byte * there for there in budgets], self._add_one(0.0, np.inf, cost=1.0) if is_leanest else None)
        if not is_leanest:
            self.step, self.once = self._add_one(0.0, np.inf, cost=1.0), self._add_one(0.0, np.inf, cost=1.0)
            self.columns = self._add_columns()
            self._add_once()
            for cut in cuts or _own_work(problem):
                self.add_path(cut)

    def solve(self, deadline: float, *, is_relaxed: bool = False, gap: float = 0.0) -> _Point | None:
        """The model's answer; None when time was over first. Raises InfeasibleError when nothing fits."""
        answer = self.model.solve(max(0.05, deadline - time.perf_counter()), is_relaxed=is_relaxed, gap=gap)
        if answer.is_infeasible:
            raise _infeasible(self.problem, deadline)
        if answer.values is None:
            return None
        counts = {key: answer.values[ids] for key, ids in self.counts.items()}
        times = np.maximum(answer.values[self.columns], 0.0) / self.second
        return _Point(answer.bound / self.second, times, float(answer.values[self.once]) / self.second, counts)

    def simulate(self, times: Floats) -> float:
        """Seconds of the schedule with these columns; its longest path joins the model."""
        stages = self.problem.schedule.stages
        tilted = [times]
        for own in self.problem.stages_of:
            tilted.append(times.copy())
            for phase in range(PHASES):
                tilted[-1][[phase * stages + stage for stage in own]] *= 1 + TILT
        seconds, paths = self.problem.paths.longest(np.stack(tilted))
        for path in np.unique(paths, axis=0):
            if not any(np.array_equal(path, cut) for cut in self.cuts):
                self.add_path(path)
        return float(seconds[0])

    def longest_known(self, times: Floats) -> float:
        """Seconds of the longest of the paths that the model has."""
        return max(float(cut @ times) for cut in self.cuts)

    def add_path(self, cut: Floats) -> None:
        """Constraint (4) for one path."""
        self.cuts.append(cut)
        on = np.flatnonzero(cut)
        self.model.add_row([self.step, *self.columns[on]], [1.0, *-cut[on]], 0.0, np.inf)

    def _add_one(self, lower: float, upper: float, *, cost: float = 0.0, is_integer: bool = False) -> int:
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
                prefix = self.prefix[index, stage] = self._add_one(low, high, is_integer=True)
                self.started[index, stage] = prefix if run.length == 1 else self._add_one(low > 0, high > 0, is_integer=True)
                parts = [(prefix, 1.0)]
                if stage:
                    parts.append((self.prefix[index, stage - 1], -1.0))
                filled += parts
                if run.stage is None or run.stage == stage:
                    counts = self.model.add_variables(np.zeros(len(run.options)), upper=run.length, is_integer=True)
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
            message = self._add_one(0.0, np.inf)
            for stage in problem.receives(rank):
                constant, parts = self._end(stage, [byte * run.cut[2] for run in problem.runs])
                self._add_sum([(message, 1.0), *((column, -factor) for column, factor in parts)], constant, np.inf)
            here = [(position, run, self.counts[key]) for key, run, position in self._placed(own)]
            shared: list[tuple[int, float]] = [(above, 1.0), (message, RECEIVES_AT_ONCE)]
            if excess is not None:
                shared.append((excess, -1.0))
            for full, waiting in np.moveaxis(holdings, 2, 1) if len(holdings) else np.zeros((1, 2, len(own))):
                columns = [ids for _, _, ids in here]
                bytes_of = [run.static + full[at] * run.kept + waiting[at] * run.waiting for at, run, _ in here]
                self.model.add_row(
                    np.concatenate([*columns, [column for column, _ in shared]]),
                    np.concatenate([byte * np.concatenate(bytes_of), [factor for _, factor in shared]]),
                    -np.inf,
                    budgets[rank] - byte * least,
                )

    def _placed(self, stages: Sequence[int]) -> Iterator[tuple[tuple[int, int], _Run, int]]:
        """(key in `counts`, run, position of the stage) of the runs that may be on these stages."""
        for position, stage in enumerate(stages):
            for index, run in enumerate(self.problem.runs):
                if (index, stage) in self.counts:
                    yield (index, stage), run, position

    def _add_workspace(self, stages: Sequence[int], least: int) -> int:
        """A variable no less than the workspace above `least` of any block on these stages."""
        above = self._add_one(0.0, np.inf)
        for key, run, _ in self._placed(stages):
            counts, extra = self.counts[key], run.workspace - least
            if run.length == 1:
                self.model.add_row([above, *counts], [1.0, *-(self.byte * extra)], 0.0, np.inf)
                continue
            steps = np.unique(np.append(extra, 0))
            parts = [(above, 1.0)]
            for below, step in pairwise(steps.tolist()):
                # Whether any block needs this much.
                needed = self._add_one(0.0, 1.0, is_integer=True)
                self._add_sum([*((column, 1.0) for column in counts[extra >= step].tolist()), (needed, -run.length)], -np.inf, 0.0)
                parts.append((needed, -self.byte * (step - below)))
            self._add_sum(parts, 0.0, np.inf)
        return above

    def _add_columns(self) -> Ids:
        """Variables for the columns of ``critical_paths``: seconds of stages and transfers."""
        runs, stages, second = self.problem.runs, self.problem.schedule.stages, self.second
        columns: list[int] = []
        for phase in range(PHASES):
            for stage in range(stages):
                column = self._add_one(0.0, np.inf)
                columns.append(column)
                parts = [(column, 1.0)]
                for key, run, _ in self._placed([stage]):
                    parts += zip(self.counts[key].tolist(), (-second * run.seconds[:, phase]).tolist(), strict=True)
                self._add_sum(parts, 0.0, 0.0)
        for way in (0, 1):
            for stage in range(stages - 1):
                constant, parts = self._end(stage, [second * run.cut[way] for run in runs])
                column = self._add_one(0.0, np.inf)
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


def _rough_seconds(problem: _Problem) -> float:
    """About what a step takes: the fastest variants, evenly over the ranks."""
    work = sum(run.length * float((run.seconds.sum(axis=1)).min()) for run in problem.runs)
    return work * problem.schedule.microbatches / problem.schedule.ranks


def _own_work(problem: _Problem) -> list[Floats]:
    """Each rank's computing, one action after the other: a path."""
    cuts = []
    for own in problem.stages_of:
        cut = np.zeros(problem.paths.columns)
        for stage in own:
            cut[stage] = problem.schedule.microbatches
            if problem.schedule.has_backward:
                cut[problem.schedule.stages + stage] = cut[2 * problem.schedule.stages + stage] = problem.schedule.microbatches
        cuts.append(cut)
    return cuts


def _infeasible(problem: _Problem, deadline: float) -> InfeasibleError:
    """What the leanest assignment needs, in words and in ``needed``."""
    master = _Master(problem, problem.budgets, is_leanest=True)
    answer = master.model.solve(max(1.0, deadline - time.perf_counter()), gap=1e-6)
    if answer.values is None:
        return InfeasibleError("no assignment of blocks to stages fits the memory")
    measure = _measure(problem, *_spell(problem, {key: answer.values[ids] for key, ids in master.counts.items()}))
    rank = int(np.argmax([used - there for used, there in zip(measure.peak, problem.budgets, strict=True)]))
    error = InfeasibleError(
        f"the leanest assignment of {len(problem.menus)} blocks to {problem.schedule.stages} stages needs"
        f" {format_bytes(measure.peak[rank])} on pipeline rank {rank} under schedule {problem.schedule.name!r},"
        f" {format_bytes(problem.budgets[rank])} are there"
    )
    error.needed = measure.peak[rank]
    return error
