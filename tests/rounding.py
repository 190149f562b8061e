"""How far roundings can move a result: Monte Carlo arithmetic (Parker 1997).

Two programs that compute the same in low precision, but add up in another order or round at other places, differ by roundings. How far that
moves a gradient depends on the model's depth and condition, so no fixed number is right for all. Here it is measured on the single device:
the step runs again with every low-precision result moved by one unit in the last place, up or down at random, which is what rounding at
another place does to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

LOW = (torch.bfloat16, torch.float16)

Step = Callable[[], Mapping[str, Tensor]]
"""Runs a step; returns its loss and gradients by name."""


class Moved(TorchDispatchMode):
    """Moves every element of a low-precision result that an op computes by one unit in the last place, up or down, or not at all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        # Views and writes in place compute nothing; what they give was moved before.
        if any(r.alias_info is not None for r in func._schema.returns):
            return result
        return tree_map(self._move, result)

    def _move(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in LOW:
            return x
        # Elements of these dtypes are ordered as their bits are, by sign and magnitude; zeros stay, as they are exact (masks, padding).
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self._seed)
        step = torch.randint(-1, 2, x.shape, generator=self._generators[x.device], dtype=torch.int16, device=x.device)
        bits = x.contiguous().view(torch.int16) + torch.where(x == 0, 0, step)
        return torch.where(bits.view(x.dtype).isfinite(), bits.view(x.dtype), x)


def rounding_of(step: Step, samples: int = 4) -> dict[str, float]:
    """Name -> by how much roundings move the elements of a tensor of a step, absolutely: the largest of some samples."""
    exact = step()
    largest = dict.fromkeys(exact, 0.0)
    for seed in range(samples):
        with Moved(seed):
            moved = step()
        for name, x in exact.items():
            largest[name] = max(largest[name], distance(moved[name], x))
    return largest


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors' elements."""
    return float((a.detach().double() - b.detach().double()).abs().max())


def share_of_rounding(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bounds: Mapping[str, float]) -> dict[str, float]:
    """Name -> how far a step's tensor is from the expected one, as a share of what is accepted.

    Roundings of the step itself and of what it is compared with are accepted, so twice the bound of `rounding_of`.
    """
    assert actual.keys() == expected.keys()
    return {name: distance(actual[name], x) / max(2 * bounds[name], 1e-30) for name, x in expected.items()}


def check_within_rounding(actual: Mapping[str, Tensor], step: Step, samples: int = 4) -> None:
    """Fail unless a step's tensors are those of `step` but for roundings."""
    expected, bounds = step(), rounding_of(step, samples)
    shares = share_of_rounding(actual, expected, bounds)
    beyond = {name: (share, bounds[name], float(expected[name].abs().max())) for name, share in shares.items() if share > 1}
    assert not beyond, f"beyond rounding (share of the bound, what roundings do, largest element): {beyond}"
