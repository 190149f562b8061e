"""The tables of a pipeline, its stages' functions and its schedule as what the executor runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.emit.support.described import Buffer, Parameter
from autopar.ir import parse_layout
from autopar.rewrite import CrossingTensor, PipelineProgram, StageProgram
from autopar.rewrite import program as programs
from autopar.schedules import Schedule, actions

Crossing = tuple[str, tuple[int, ...], str, bool]
"""A tensor that a stage sends to another: its name, the sizes of a rank's part, its dtype, and whether its gradient is sent back."""


class StageMaker:
    """Makes stages, whose functions take parameters and buffers by name, as the executor calls them: with these in order."""

    def __init__(self, parameters: Sequence[Parameter], buffers: Sequence[Buffer]) -> None:
        self._parameters, self._buffers = parameters, buffers

    def __call__(
        self,
        function: Callable[..., Any],
        prologue: Callable[..., Any] | None,
        *,
        parameters: Sequence[int],
        buffers: Sequence[int],
        receives: Mapping[int, Sequence[Crossing]],
        sends: Mapping[int, Sequence[tuple[int, Crossing]]],
        outputs: Sequence[tuple[int, int, str]],
    ) -> StageProgram:
        """A stage.

        Args:
            function: of parameters and buffers by name, then inputs, what `prologue` gave, and what comes from other stages.
            prologue: of buffers by name, then inputs; what is computed once per step of the whole batch. None for nothing.
            parameters: positions in the table of those that it uses.
            buffers: likewise.
            receives: number of an earlier stage -> what comes from it.
            sends: number of a later stage -> what goes to it, each with its position among the results.
            outputs: position among the model's outputs, position among the results, and what a micro-batch has of it.
        """
        names = [self._parameters[position].name for position in parameters]
        buffer_names = [self._buffers[position].name for position in buffers]

        def run(*tensors: Tensor) -> Any:
            rest = tensors[len(names) :]
            return function(
                dict(zip(names, tensors, strict=False)), dict(zip(buffer_names, rest, strict=False)), *rest[len(buffer_names) :]
            )

        def begin(*tensors: Tensor) -> Any:
            assert prologue is not None
            return prologue({}, dict(zip(buffer_names, tensors, strict=False)), *tensors[len(buffer_names) :])

        return StageProgram(
            module=run,  # type: ignore[arg-type]
            prologue=None if prologue is None else begin,  # type: ignore[arg-type]
            parameters=tuple(parameters),
            buffers=tuple(buffers),
            receives={peer: tuple(map(_read_crossing, crossing)) for peer, crossing in receives.items()},
            sends={peer: tuple((position, _read_crossing(x)) for position, x in sent) for peer, sent in sends.items()},
            outputs=tuple(programs.StageOutput(position, result, parse_layout(state)[0]) for position, result, state in outputs),
        )


def _read_crossing(crossing: Crossing) -> CrossingTensor:
    name, shape, dtype, requires_grad = crossing
    return CrossingTensor(name, shape, getattr(torch, dtype), requires_grad)


def make_pipeline(
    stages: Mapping[int, StageProgram],
    schedule: Sequence[str],
    rank_of_stage: Sequence[int],
    microbatches: int,
    loss: int,
    *,
    random: bool,
) -> PipelineProgram:
    """The pipeline of these stages, under a schedule that is given as text: per pipeline rank its actions."""
    lists = tuple(tuple(actions.parse_action(text) for text in texts.split()) for texts in schedule)
    parsed = Schedule("emitted", microbatches, tuple(rank_of_stage), lists)
    makers = {out.position: rank_of_stage[number] for number, stage in stages.items() for out in stage.outputs}
    return PipelineProgram(
        stages=stages,
        schedule=parsed,
        inference=parsed,  # emitted packages train
        loss=loss,
        trained=frozenset(),
        reached={},
        written=frozenset(),
        makers=makers,
        random=random,
    )
