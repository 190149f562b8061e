"""Rows of costs: seconds and bytes by phase, purpose, axis and collective. A plan's step is the sum of its rows.

Comes in: what `autopar.costs.blocks` counts, one entry at a time. Goes out: `CostRow`, which the search sums, the plan stores and the
report prints. Here, below what makes rows, since a plan is read without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """When something is done: in a micro-batch's forward, in one of the two passes of its backward, or once per step."""

    FORWARD = "forward"
    BACKWARD_INPUT = "input gradient"
    BACKWARD_WEIGHT = "weight gradient"
    STEP = "step"


class Purpose(StrEnum):
    """What something is done for."""

    COMPUTE = "compute"
    RECOMPUTE = "recompute"  # what the backward runs again of the forward, its communication included
    OPTIMIZER = "optimizer"
    KERNEL = "kernel"  # exchanges inside of an op's kernel
    ACTIVATIONS = "activations"
    ACTIVATION_GRADIENTS = "activation gradients"
    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    MESSAGES = "between stages"
    BUBBLE = "bubble"  # waiting for other stages


LOCAL_COPY = "local copy"
"""The collective of rows in which a rank takes or zeroes its part of a tensor, and exchanges nothing."""

OUTSIDE = "outside of layers"
"""Name of the group of what is in no layer, whose rows have an empty layer."""


@dataclass(frozen=True, slots=True)
class CostRow:
    """What one purpose costs a rank.

    Attributes:
        layer: name of the group of like layers (`autopar.structure.layers`); empty outside of layers.
        phase, purpose: when, and what for.
        axis: the mesh axis of communication; empty for work of one rank alone.
        collective: ``all_gather``, ``reduce_scatter``, ``all_reduce``, ``all_to_all``, ``ring``, ``halo``, ``send`` or, where a rank only
            takes or zeroes its part, ``local copy``; empty for work of one rank alone.
        count: calls.
        nbytes: bytes that all calls move together: per call the larger of a rank's parts before and after it; of a ring and a halo what
            a rank sends.
        seconds: of all calls together, without those that are overlapped with other work.
        hidden: seconds of communication that are overlapped with other work, and so don't add to the step.
    """

    layer: str
    phase: str
    purpose: str
    axis: str
    collective: str
    count: float
    nbytes: float
    seconds: float
    hidden: float

    @property
    def is_communication(self) -> bool:
        """Whether it is communication of the step itself, rather than work, waiting, or a forward that is run again."""
        return bool(self.collective) and self.purpose != Purpose.RECOMPUTE


@dataclass(slots=True)
class RowSums:
    """Rows in the making: entries of one kind are added up."""

    sums: dict[tuple[str, str, str, str, str], list[float]] = field(default_factory=dict)

    def add(
        self,
        phase: str,
        purpose: str,
        seconds: float,
        *,
        layer: str = "",
        axis: str = "",
        collective: str = "",
        count: float = 1.0,
        nbytes: float = 0.0,
        hidden: float = 0.0,
    ) -> None:
        """Add `count` calls, which take `seconds` and move `nbytes` bytes together, to the row of their kind; arguments are `CostRow`'s."""
        entry = self.sums.setdefault((layer, phase, purpose, axis, collective), [0.0, 0.0, 0.0, 0.0])
        for index, number in enumerate((count, nbytes, seconds, hidden)):
            entry[index] += number

    def add_row(self, row: CostRow, times: float = 1.0, *, layer: str | None = None, axis: str | None = None) -> None:
        """Add `times` times the numbers of a row, under another layer's or axis' name if one is given."""
        self.add(
            row.phase,
            row.purpose,
            times * row.seconds,
            layer=row.layer if layer is None else layer,
            axis=row.axis if axis is None else axis,
            collective=row.collective,
            count=times * row.count,
            nbytes=times * row.nbytes,
            hidden=times * row.hidden,
        )

    def rows(self) -> tuple[CostRow, ...]:
        """The sums, in the order in which their kinds were first added."""
        return tuple(CostRow(*key, *numbers) for key, numbers in self.sums.items())


def seconds_of(rows: Iterable[CostRow], *phases: str) -> float:
    """Seconds of the rows of these phases together, without what is overlapped with other work."""
    return sum(row.seconds for row in rows if row.phase in phases)
