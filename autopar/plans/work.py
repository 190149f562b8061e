"""What a step works: of the whole model, and op by op, in flops, seconds and bytes.

Comes in: what `autopar.search` sums up of the chosen plan. Goes out: parts of a `Plan`, from which the report makes rates (tokens per
second, model-flops utilisation) and tables of ops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from autopar.plans.files import Count, Name
from autopar.plans.rows import CostRow, Phase, Purpose


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted seconds of one training step on one rank, the mean one of a pipeline.

    `recompute` is what the backward runs again, `communication` what isn't overlapped with compute, `bubble` the time that the mean rank
    waits for others.
    """

    forward: float
    backward: float
    recompute: float
    optimizer: float
    communication: float
    bubble: float

    @property
    def computing(self) -> float:
        """What the rank computes: all of the step but exposed communication and waiting."""
        return self.forward + self.backward + self.recompute + self.optimizer

    @property
    def step(self) -> float:
        """The whole step."""
        return self.computing + self.communication + self.bubble

    def times(self, factor: float) -> Seconds:
        """Each part so many times."""
        return Seconds(**{field.name: factor * getattr(self, field.name) for field in fields(Seconds)})


def part_of(row: CostRow) -> str:
    """The part of `Seconds` in which a row counts; another word for a row that counts in none, which no search makes."""
    if row.is_communication:
        return "communication"
    if row.purpose == Purpose.COMPUTE:
        return "forward" if row.phase == Phase.FORWARD else "backward"
    return str(row.purpose)  # recompute, optimizer and bubble are called alike in both


def sum_parts(rows: Iterable[CostRow]) -> Seconds:
    """What the seconds of rows are made of."""
    sums = dict.fromkeys((field.name for field in fields(Seconds)), 0.0)
    for row in rows:
        part = part_of(row)
        if part in sums:
            sums[part] += row.seconds
    return Seconds(**sums)


def add_parts(several: Iterable[Seconds]) -> Seconds:
    """The sum of each part."""
    listed = list(several)
    return Seconds(**{field.name: sum((getattr(each, field.name) for each in listed), 0.0) for field in fields(Seconds)})


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes, whatever the plan, and what one device could compute: model-flops utilisation is made of these.

    Attributes:
        flops: of products, convolutions and attention in one forward and backward of the whole batch, without what is run again
            (Chowdhery et al. 2022, appendix B). Causal attention counts in full.
        samples: rows of the batch.
        tokens: elements of the batch times the sequence, of the longest input that has these as its first dims; None without one.
        dtype: in which most of the flops are computed.
        peak_flops: flops per second of one device in this dtype, of its datasheet.
    """

    flops: float
    samples: Count
    tokens: int | None
    dtype: Name
    peak_flops: float


@dataclass(frozen=True, slots=True)
class OpCost:
    """What a call, or a parameter's update, costs in a step: all like ops together, on the mean rank.

    A parameter's entry holds its update and the sums of its gradient over ranks; that it is gathered counts with the calls that read it.
    Sums over all entries are those of `Plan.costs` without messages between stages and the bubble.

    Attributes:
        op: its name, of like ops the representative's: a call's in `Plan.placements`, or a parameter's in `Plan.layouts`.
        group: name of its group of layers.
        target: the operator, or the user's name of the parameter.
        path: of the module.
        source: the user's line; empty where it isn't known, and for parameters.
        space: its loops as its rule states them; empty without a rule, and for parameters.
        loops: size of every loop; 0 of an empty tensor.
        splits: per axis of the mesh that splits it, in words what it splits; parts of sums that pass through are none.
        count: number of like ops.
        flops: of their forward in the whole batch, on all ranks together; what several ranks repeat counts once.
        seconds: parts of the step on the mean rank; `communication` is what is exposed. There is no bubble.
        hidden: seconds of communication that are overlapped with other work. What is hidden of one kind of communication of a block is
            spread over its ops by their share of it.
        nbytes: bytes that its communication moves on a rank.
    """

    op: Name
    group: Name
    target: str
    path: str
    source: str
    space: str
    loops: Mapping[str, int]
    splits: Mapping[str, str]
    count: Count
    flops: float
    seconds: Seconds
    hidden: float
    nbytes: float
