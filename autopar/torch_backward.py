"""The order in which autograd runs backwards, a private part of torch; beside `autopar.torch_compat`."""

from __future__ import annotations

from torch import Tensor

__all__ = ["backward_place", "run_in_place"]


def backward_place(x: Tensor) -> int | None:
    """The place of the function that made `x` in the order of backwards: of those that can run, the one of the highest place runs first."""
    return None if x.grad_fn is None else int(x.grad_fn._sequence_nr())


def run_in_place(x: Tensor, place: int) -> None:
    """Give the backward of the function that made `x` another place in that order; nothing where there is no backward."""
    if x.grad_fn is not None:
        x.grad_fn._set_sequence_nr(place)  # type: ignore[attr-defined]
