"""Bytes on the devices of a pipeline rank over a step, as the plan counts them.

Comes in: a plan's `Timing` and when a rank's actions run. Goes out: `Sample`s, whose largest, on the fullest rank, is the plan's total.

During a forward a rank has what is there all the time, what micro-batches hold, and what the forward needs. Before a backward the search
takes the most of what may run next on the rank, as `autopar.search.pipeline.peaks` states, and so do the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.plans import Plan, Timing
from autopar.schedules import Action, Kind
from autopar.timelines.trace import Sample


class _RankLevels:
    """What a rank holds at one moment: per stage the micro-batches in flight, those that wait, and whether a backward has run."""

    def __init__(self, plan: Plan, timing: Timing, rank: int, stages: Sequence[int]) -> None:
        self.stages = {stage: timing.stages[stage] for stage in stages}
        self.always = plan.memory.buffers + plan.memory.reserved + timing.ranks[rank].messages
        self.update = timing.ranks[rank].update + self.always
        self.in_flight = dict.fromkeys(stages, 0)
        self.waiting = dict.fromkeys(stages, 0)
        self.has_gradients = dict.fromkeys(stages, False)

    def held(self) -> int:
        """Bytes when nothing runs."""
        nbytes = self.always
        for stage, levels in self.stages.items():
            nbytes += levels.static - (0 if self.has_gradients[stage] else levels.arriving)
            nbytes += self.in_flight[stage] * levels.saved + self.waiting[stage] * levels.waiting
        return nbytes

    def at_forward(self, stage: int) -> list[int]:
        """Bytes during the forward of each block of a stage, whose micro-batch counts as in flight already."""
        others = self.held() - self.stages[stage].saved
        return [others + nbytes for nbytes in self.stages[stage].forward]

    def at_backward(self, stage: int) -> list[int]:
        """Bytes during the backward of each block of a stage, in the order in which they run."""
        others = self.held() - self.stages[stage].saved
        levels = self.stages[stage]
        return [others + nbytes for nbytes in reversed(levels.backward if self.has_gradients[stage] else levels.first_backward)]

    def before_backward(self) -> int:
        """Bytes that are counted with when a backward is about to run on the rank: the most that any of its stages may need now."""
        forward = max(max(levels.forward, default=levels.saved) - levels.saved for levels in self.stages.values())
        weights = (levels.weight for stage, levels in self.stages.items() if self.waiting[stage])
        backwards = (max(self.at_backward(stage), default=0) for stage in self.stages if self.in_flight[stage])
        return max(self.held() + max(forward, *weights, 0), *backwards, 0)

    def begin_forward(self, stage: int) -> None:
        self.in_flight[stage] += 1

    def end_backward(self, stage: int, kind: Kind) -> None:
        self.has_gradients[stage] = True
        if kind is Kind.BACKWARD_WEIGHT:
            self.waiting[stage] -= 1
            return
        self.in_flight[stage] -= 1
        self.waiting[stage] += kind is Kind.BACKWARD_INPUT


@dataclass(frozen=True, slots=True)
class Ran:
    """An action of a rank: the pass, when it ends, and when each of its parts starts, which are blocks where the plan has no schedule."""

    action: Action
    starts: tuple[float, ...]
    end: float


def sample_memory(plan: Plan, timing: Timing, rank: int, stages: Sequence[int], ran: Sequence[Ran], update: float) -> list[Sample]:
    """The memory of a pipeline rank.

    Args:
        plan: the plan.
        timing: its numbers of single blocks and moments.
        rank: the pipeline rank.
        stages: of the rank.
        ran: its computing actions, in order.
        update: when gradients begin to be summed and the optimizer to run.
    """
    levels = _RankLevels(plan, timing, rank, stages)
    resting = levels.held()
    samples = [(0.0, resting)]
    is_whole = plan.pipeline.stages == plan.pipeline.microbatches == 1
    for part in ran:
        stage, kind = part.action.stage, part.action.kind
        if kind is Kind.FORWARD:
            levels.begin_forward(stage)
        by_block = levels.at_forward(stage) if kind is Kind.FORWARD else levels.at_backward(stage)
        if is_whole:
            samples += zip(part.starts, by_block, strict=True)
        else:
            samples.append((part.starts[0], max(by_block) if kind is Kind.FORWARD else levels.before_backward()))
        if kind is not Kind.FORWARD:
            levels.end_backward(stage, kind)
        if is_whole and kind is not Kind.FORWARD:
            # The sums of gradients begin at once, whose level says what of gradients and copies is there: not all that `static` counts.
            continue
        samples.append((part.end, levels.held()))
    samples += [(update, levels.update), (plan.seconds.step, resting)]
    return [Sample(rank, time, nbytes) for time, nbytes in samples]
