"""Machine profiles (``machines/*.toml``) and pure functions from numbers to seconds; tensors and graphs are unknown here."""

from .collective import KINDS, collective_seconds
from .hardware import (
    Cluster,
    Device,
    Link,
    Machine,
    axis_link,
    find_machine,
    known_machines,
    load_machine,
    read_machine,
)
from .op import op_seconds, peak_flops

__all__ = [
    "KINDS",
    "Cluster",
    "Device",
    "Link",
    "Machine",
    "axis_link",
    "collective_seconds",
    "find_machine",
    "known_machines",
    "load_machine",
    "op_seconds",
    "peak_flops",
    "read_machine",
]
