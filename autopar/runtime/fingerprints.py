"""Numbers that stand for the contents of tensors, by which ranks find out whether they have the same ones.

Comes in: tensors of one rank. Goes out: a hash of their bits, of all or of a sample; and of floating-point tensors a few projections, by
which tensors that differ by rounding are told from others.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

SAMPLE = 4096
"""Elements of a tensor that a sample has at most."""
ROUNDING = 0.02
"""Distance of two projections, as a share of the tensor's norm, up to which two tensors differ by rounding: bfloat16 rounds by 0.4 %."""
# Odd multipliers of 64 bits (splitmix64), as signed integers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_CHUNK = 1 << 20
"""Elements that are hashed at once, since that takes 8 bytes for each."""
_PROJECTIONS = 4
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_tensors(tensors: Sequence[Tensor], offset: int | None = None) -> Tensor:
    """A hash of each tensor's bits and their positions: int64 ``(len(tensors),)`` on the tensors' device.

    Args:
        tensors: of any dtype, on one device. What isn't strided (sparse, nested) counts as empty.
        offset: with a number, only a sample of every tensor is read, which moves with the number.

    Equal tensors with strides in another order may have unequal hashes.
    """
    bits = [_read_bits(x, offset) for x in tensors]
    if sum(x.numel() for x in bits) > _CHUNK:
        return torch.stack(
            [
                sum((_mix(x[at : at + _CHUNK], at).sum() for at in range(0, x.numel(), _CHUNK)), x.new_zeros((), dtype=torch.int64))
                for x in bits
            ]
        )
    # All together, as most of the time goes into starting operators: the sums of runs are differences of running sums.
    running = _mix(torch.cat([torch.zeros(1, dtype=torch.int64, device=bits[0].device), *bits]), 0).cumsum(0)
    ends = list(accumulate(x.numel() for x in bits))
    # One by one: a list of indices would be copied to the device, and that copy waited for.
    return torch.stack([running[end] for end in (0, *ends)]).diff()


def _read_bits(x: Tensor, offset: int | None) -> Tensor:
    """The elements of a tensor as integers, flat, in the order of memory."""
    if x.layout is not torch.strided:
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    x = x.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    # Where a tensor was expanded, the elements in memory are enough.
    for dim, stride in enumerate(x.stride()):
        x = x.narrow(dim, 0, 1) if stride == 0 and x.shape[dim] > 1 else x
    x = x if x.is_contiguous() else x.permute(_find_memory_order(x.stride()))
    flat = x.reshape(-1)
    if offset is not None and flat.numel() > SAMPLE:
        step = _find_prime(flat.numel() // SAMPLE + 1)
        flat = flat[offset % step :: step]
    return flat.view(_WIDTHS[flat.element_size()])


def _find_memory_order(strides: tuple[int, ...]) -> list[int]:
    """Dims in the order of memory, the one with the largest stride first."""
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


@functools.cache
def _find_prime(least: int) -> int:
    """The smallest prime from `least`: samples by a divisor of the rows' length would read one column only, such as the first tokens."""
    number = max(least, 2)
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


def _mix(bits: Tensor, start: int) -> Tensor:
    """A number of 64 bits for every integer and its position, which begin at `start`; as splitmix64 makes them."""
    mixed = torch.arange(start, start + bits.numel(), device=bits.device).mul_(_STEP).add_(bits)
    for multiplier in (_FIRST, _SECOND):
        mixed = (mixed ^ (mixed >> 29)).mul_(multiplier)
    return mixed ^ (mixed >> 32)


@dataclass(frozen=True, slots=True)
class Projections:
    """What tells tensors that differ by rounding from others.

    Attributes:
        values: sums of the elements, each with a sign that depends on its position only.
        norm: the square root of the sum of squares.
    """

    values: tuple[float, ...]
    norm: float

    def agrees(self, other: Projections, tolerance: float = ROUNDING) -> bool:
        """Whether the distance to another tensor is within rounding, as far as projections show it."""
        limit = tolerance * max(self.norm, other.norm)
        return all(abs(a - b) <= limit for a, b in zip(self.values, other.values, strict=True))

    def to_bits(self) -> list[int]:
        """The same as integers of 64 bits."""
        numbers = (*self.values, self.norm)
        return list(struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers)))

    @staticmethod
    def from_bits(bits: Sequence[int]) -> Projections:
        """The reverse of `to_bits`; integers after them are ignored."""
        *values, norm = struct.unpack(f"{_PROJECTIONS + 1}d", struct.pack(f"{_PROJECTIONS + 1}q", *bits[: _PROJECTIONS + 1]))
        return Projections(tuple(values), norm)


def project(x: Tensor, limit: int | None = None) -> Projections:
    """The projections of a tensor, in float64, or of about `limit` of its elements; infinities and NaNs count as numbers of their own."""
    x = x.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    if limit is not None and x.numel() > limit:
        step = _find_prime(x.numel() // limit + 1)
        x = x[torch.unravel_index(torch.arange(0, x.numel(), step, device=x.device), x.shape)]
    flat = x.reshape(-1).to(torch.float64).nan_to_num(nan=1e3, posinf=2e3, neginf=-2e3)
    positions = torch.arange(1, flat.numel() + 1, device=x.device).mul_(_FIRST)
    positions ^= positions >> 31
    positions.mul_(_SECOND)
    sums = [((positions >> (40 + number)) & 1).mul_(2).sub_(1).to(torch.float64).dot(flat) for number in range(_PROJECTIONS)]
    *values, norm = torch.stack([*sums, torch.linalg.vector_norm(flat)]).tolist()
    return Projections(tuple(values), norm)
