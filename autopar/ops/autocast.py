"""The state of ``torch.autocast``: read where a user has it on, set while something runs.

Comes in: this thread's state, or that of a region of a model. Goes out: an `Autocast`, plain data that can be compared, inside of whose
`active` torch has that state. Programs state every cast, so they run while autocast is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from autopar.torch_compat import AUTOCAST_DEVICES


@dataclass(frozen=True, slots=True)
class Autocast:
    """What ``torch.autocast`` is set to.

    Attributes:
        dtypes: (device type, dtype) of each device type for which it is on.
        caches: whether the cast of a weight is made once and used again; True where it is off everywhere.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    caches: bool = True

    @staticmethod
    def now() -> Autocast:
        """The state of this thread."""
        dtypes = tuple((device, torch.get_autocast_dtype(device)) for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device))
        return Autocast(dtypes, torch.is_autocast_cache_enabled()) if dtypes else OFF

    @property
    def is_on(self) -> bool:
        """Whether it is on for any device."""
        return bool(self.dtypes)

    def inside(self, device: str, dtype: torch.dtype, enabled: bool, caches: bool) -> Autocast:
        """The state inside of ``torch.autocast(device, dtype, enabled, caches)``, where this one is outside."""
        dtypes = {key: value for key, value in self.dtypes if key != device} | ({device: dtype} if enabled else {})
        return Autocast(tuple(sorted(dtypes.items(), key=lambda item: item[0])), caches) if dtypes else OFF

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this is the state of this thread; casts that torch has cached stay cached."""
        if Autocast.now() == self:
            yield
            return
        before = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in AUTOCAST_DEVICES]
        did_cache = torch.is_autocast_cache_enabled()
        dtypes = dict(self.dtypes)
        torch.autocast_increment_nesting()
        try:
            for device in AUTOCAST_DEVICES:
                torch.set_autocast_enabled(device, device in dtypes)
            for device, dtype in self.dtypes:
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(self.caches)
            yield
        finally:
            for device, enabled, dtype in before:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(did_cache)
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    def __str__(self) -> str:
        """Such as ``bfloat16 on cpu``; ``off`` where it is off."""
        texts = [f"{str(dtype).removeprefix('torch.')} on {device}" for device, dtype in self.dtypes]
        return (" and ".join(texts) + ("" if self.caches else " without a cache")) if texts else "off"


OFF = Autocast()
"""Autocast that is off everywhere."""
