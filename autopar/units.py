"""Bytes and seconds as text and back.

Comes in: a number of bytes or seconds, or the text of a size. Goes out: text with three digits and a unit, or the number.
Everything inside autopar computes with plain numbers; only what users read and write has units. Prefixes are decimal, as on datasheets (80
GB is 80e9 bytes); the binary ``KiB``, ``MiB`` and so on are understood on input.
"""

from __future__ import annotations

import math
import re

from autopar.errors import InputError
from autopar.texts import show_value

_MOST_BYTES = 2**63
_PREFIXES = "kMGTP"
_SIZE = re.compile(rf"^(\d+(?:\.\d*)?|\.\d+)\s*([{_PREFIXES}]?)(i?)B?$", re.IGNORECASE)


def format_bytes(nbytes: float) -> str:
    """Text of a number of bytes, with three digits; a mean or a share of bytes is rounded to whole ones.

    >>> format_bytes(1_230_000_000), format_bytes(17), format_bytes(16.7)
    ('1.23 GB', '17 B', '17 B')
    """
    nbytes = round(nbytes)
    if abs(nbytes) < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for prefix in _PREFIXES:
        value /= 1000
        # Chosen after rounding: 999,999,999 bytes are 1.00 GB, not 1000 MB.
        if abs(value) < 999.5 or prefix == _PREFIXES[-1]:
            break
    return f"{_three_digits(value)} {prefix}B"


def format_seconds(seconds: float) -> str:
    """Text of a time in seconds, with three digits, in s, ms, µs or ns.

    >>> format_seconds(0.01234), format_seconds(75.0)
    ('12.3 ms', '75.0 s')
    """
    if abs(seconds) < 0.5e-9:  # costs are whole nanoseconds; anything below is rounding
        return "0 s"
    value = seconds * 1e9
    for unit in ("ns", "µs", "ms"):
        if abs(value) < 999.5:
            return f"{_three_digits(value)} {unit}"
        value /= 1000
    return f"{_three_digits(seconds)} s"


def format_share(part: float, whole: float) -> str:
    """Text of `part` as a percentage of `whole`; a dash when the whole is nothing.

    >>> format_share(1, 8), format_share(1, 0)
    ('12.5%', '-')
    """
    return f"{100 * part / whole:.1f}%" if whole > 0 else "-"


def find_tick_step(largest: float, most: int) -> float:
    """The distance of an axis' ticks, 1, 2 or 5 times a power of ten, so that `most` of them reach `largest`, a number above 0.

    >>> find_tick_step(43.0, 6), find_tick_step(0.7, 8)
    (10.0, 0.1)
    """
    power = 10.0 ** math.floor(math.log10(largest / most))
    # A distance that is right but for rounding is right.
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= largest * (1 - 1e-9))


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``80GB``, ``512MiB``, ``1.5 GB`` or ``1000``. Raises InputError for other text, and for less than a byte.

    >>> parse_bytes("80GB"), parse_bytes("512MiB")
    (80000000000, 536870912)
    """
    match = _SIZE.match(text.strip())
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{show_value(text)} is no size of memory; write a number and a unit, such as 80GB or 512MiB")
    number, prefix, binary = match.groups()
    power = _PREFIXES.lower().index(prefix.lower()) + 1 if prefix else 0
    unit: int = (1024 if binary else 1000) ** power
    size = float(number) * unit
    if size >= _MOST_BYTES:
        raise InputError(f"{show_value(text)} is more memory than 64 bits count; write a size such as 80GB")
    nbytes = round(size)
    if nbytes < 1:
        raise InputError(f"{text!r} is less than one byte of memory; write a size such as 80GB")
    return nbytes


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
