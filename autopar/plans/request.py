"""How a plan was asked for, kept in the plan, so that it can be asked for again with something changed.

Comes in: the arguments of `autopar.plan` or of the command line. Goes out: a `Request`, a part of the plan. What the plan says itself isn't
repeated: its precision, and the memory of a device where that is the machine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from autopar.cost_models import Cluster, find_machine
from autopar.errors import HardwareError
from autopar.ir import FLOATS, Mesh
from autopar.plans.files import Among, Count
from autopar.plans.pins import NO_PINS, Pins
from autopar.texts import printable


@dataclass(frozen=True, slots=True)
class Request:
    """How a plan was asked for.

    Attributes:
        model: the command line's MODEL (``hf:...``, ``package.module:function``, ``file.py:function``), whose paths are relative to the
            folder that the command was run in; empty where the model was a module in Python.
        batch, seq, dtype: sizes of the example inputs and the parameters' type, where the command line was given them.
        cluster: the devices as they were named, ``8xH100`` or ``8x./my.toml``; empty where that isn't known.
        machine: the digest of the numbers of their machine (`Machine.digest`); empty where that isn't known.
        memory: bytes of a device, where they aren't the machine's own.
        pins: what was fixed.
        mesh: the only mesh that was to be solved, `pp` among its axes if it was; None left it to the search.
        strict: whether an op without a rule is an error.
    """

    model: str = ""
    batch: Count | None = None
    seq: Count | None = None
    dtype: Annotated[str, Among(FLOATS)] | None = None
    cluster: str = ""
    machine: str = ""
    memory: Count | None = None
    pins: Pins = NO_PINS
    mesh: Mesh | None = None
    strict: bool = False

    @property
    def mesh_sizes(self) -> dict[str, int] | None:
        """The mesh as `autopar.plan` takes it: axis sizes by name, outermost first."""
        return None if self.mesh is None else dict(zip(self.mesh.names, self.mesh.sizes, strict=True))

    def override(self, pins: Pins) -> Request:
        """The same request with these pins in place of those of the same name.

        A pinned size of an axis takes the place of the whole mesh, which fixed all of them. Raises InputError where the new pins contradict
        those that are left.
        """
        fixes_axes = bool(pins.axis_sizes) or pins.pp is not None
        return replace(self, pins=self.pins.override(pins), mesh=None if fixes_axes else self.mesh)

    def in_print(self) -> Request:
        """The same request with characters that aren't to be printed written as Python writes them, as all texts of a plan."""
        return replace(
            self,
            model=printable(self.model),
            cluster=printable(self.cluster),
            pins=replace(
                self.pins,
                placements={printable(pattern): loops for pattern, loops in self.pins.placements.items()},
                stages={printable(pattern): stage for pattern, stage in self.pins.stages.items()},
            ),
        )


UNKNOWN_REQUEST = Request()
"""That of a plan of which nobody said how it was asked for."""


def record_request(cluster: Cluster | str, pins: Pins, mesh: Mapping[str, int] | None, *, strict: bool) -> Request:
    """The request of a call that passes these arguments and a module. The arguments have been checked (`reconcile`)."""
    return Request(
        cluster=str(cluster).strip(),
        memory=None if isinstance(cluster, str) else _find_own_memory(cluster),
        pins=pins,
        mesh=None if mesh is None else Mesh(tuple(mesh), tuple(mesh.values())),
        strict=strict,
    )


def _find_own_memory(cluster: Cluster) -> int | None:
    """Bytes of a device of the cluster; None where the machine of that name has as many."""
    nbytes = cluster.machine.device.memory_bytes
    try:
        return None if find_machine(cluster.machine.name).device.memory_bytes == nbytes else nbytes
    except HardwareError:  # a profile of the caller's
        return nbytes
