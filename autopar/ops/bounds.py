"""Indices into a dim that is split over ranks, checked as one device checks those into a whole one.

No rank has the row that an index out of range means, so without a check every rank would take it for another rank's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from autopar import torch_compat


def check_bounds(
    indices: Tensor, size: int, message: str, ignored: Tensor | None = None, error: Callable[[str], Exception] = IndexError
) -> None:
    """Raise IndexError, or another error, for an index that isn't in 0 to ``size - 1``.

    On a GPU the check is queued as torch's own is, so nothing waits for it: an index out of range ends the process' use of the device.

    Args:
        indices: indices into the whole dim, of any shape.
        size: the size of the whole dim.
        message: the error's text, with ``{index}`` for the first index out of range.
        ignored: True where an index isn't used, in the shape of `indices`.
        error: the kind of the error.
    """
    if indices.device.type not in ("cpu", "cuda"):
        return
    is_valid = (indices >= 0) & (indices < size)
    if ignored is not None:
        is_valid |= ignored
    if indices.device.type == "cuda":
        torch_compat.assert_on_device(is_valid.all(), message.format(index="an index"))
    elif not is_valid.all():
        raise error(message.format(index=int(indices[~is_valid][0])))
