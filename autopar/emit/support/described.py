"""What an emitted package says of its model: data, of which ``layout.py`` has the values.

Layouts are text, a state per axis of the mesh: ``S1`` for parts of dim 1, ``R`` for a whole copy on every rank; ``S0/3`` splits each of the
3 equal blocks of dim 0, ``S0p`` pads parts of unequal size. ``S0z1`` and ``S0z2`` (ZeRO) are stored in parts and computed with whole.
Dtypes are torch's names. A *pipeline rank* is the group of ranks that runs some stages; without a pipeline there is one, number 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.ir import Mesh


@dataclass(frozen=True, slots=True)
class Parameter:
    """How a parameter is stored.

    Attributes:
        name: in the original model.
        shape: of the whole parameter.
        dtype: in which it is stored and updated.
        layout: in which it is stored.
        summed: the axes over whose ranks its gradient is summed, as each has a summand.
        read: the dtype in which the program takes it, where that is another.
        reduced: the dtype in which its gradient is summed.
        trained: whether it gets a gradient.
        users: the pipeline ranks that use it; the first one stores it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    summed: tuple[str, ...] = ()
    read: str = ""
    reduced: str = ""
    trained: bool = True
    users: tuple[int, ...] = (0,)

    @property
    def program_dtype(self) -> str:
        """The dtype in which the program takes it."""
        return self.read or self.dtype


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer, or a constant of the program: every rank has all of it, and programs take their part in `layout`.

    `saved` says whether checkpoints hold it, `updated` whether a step gives it new values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    saved: bool = False
    updated: bool = False


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the model; `least` and `most` are the smallest and the largest number of the example's, where they are integers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    least: int = 0
    most: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """All that the training loop knows of the model.

    Attributes:
        mesh: the axes that programs and layouts name, of one pipeline rank.
        pipeline_ranks: number of pipeline ranks.
        parameters, buffers, inputs: in the order in which programs take them.
        aliases: other name of a tied parameter -> the name under which it stands above.
        loss: position of the loss among the results.
        mutated: names of the buffers whose new values follow the model's outputs, from position `outputs` on.
        forward: the program, of parameters and buffers by name, then inputs; None with a pipeline.
        pipeline: the stages and their schedule, a `PipelineProgram`; None without.
        regather: whether parameters that are gathered for the forward are gathered again for the backward.
        prefetch: how many blocks ahead gathers are begun.
        bucket_nbytes: bytes of gradients that are summed over ranks at once.
        masters: whether the optimizer keeps float32 copies of parameters of a lower precision.
    """

    mesh: Mesh
    pipeline_ranks: int
    parameters: Sequence[Parameter]
    buffers: Sequence[Buffer]
    inputs: Sequence[Input]
    aliases: Mapping[str, str]
    loss: int
    outputs: int
    mutated: Sequence[str]
    forward: Callable[..., Any] | None
    pipeline: Any
    regather: bool
    prefetch: int
    bucket_nbytes: int
    masters: bool
