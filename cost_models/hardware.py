"""Devices, links, machines and clusters: what a cost is computed for, read from one TOML file per machine.

In: a machine's name or the path of its TOML file, and how many devices there are. Out: frozen data with the unit in each name.
Bytes are ints, times float seconds, rates per second; prefixes are decimal, as in datasheets. A field's metadata holds the rule
that both the constructor and the file reader check, so that the list of fields stands here once.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from autopar.errors import HardwareError, InputError
from autopar.notebooks import show_table
from autopar.texts import find_unprintable, printable, read_text, show_value
from autopar.units import format_bytes

MOST_DEVICES = 2**20
"""Devices of a cluster at most; of more, the meshes alone would take minutes to go through."""

# Bytes of a profile at most. Those that come with the package have about two thousand.
_MOST_BYTES = 1_000_000
# Offenders that a message lists at most.
_SHOWN = 20
# Digits of a count in the text of a cluster at most, which is far more than `MOST_DEVICES` has.
_DIGITS = 18


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a field may hold: `words` for the message, the type, and for numbers an interval, both ends included."""

    words: str
    kind: type
    low: float = 0
    high: float = math.inf

    def accepts(self, value: object) -> bool:
        """Whether `value` may stand in the field; a whole number may stand for a real one, a bool for no number."""
        if self.kind in (int, float):
            return not isinstance(value, bool) and isinstance(value, (int, self.kind)) and self.low <= value <= self.high
        return isinstance(value, self.kind) and not (isinstance(value, str) and (not value or find_unprintable(value)))


# The intervals are far wider than hardware is. They keep times finite and tell of numbers in another unit, such as 3350 for 3.35e12.
_TEXT = _Rule("a text of printable characters", str)
_COUNT = _Rule("a whole number from 1 of at most 64 bits", int, low=1, high=2**63 - 1)
_WHOLE = _Rule("a whole number from 0 of at most 64 bits", int, high=2**63 - 1)
_DEVICES = _Rule(f"a whole number from 1 to {MOST_DEVICES}", int, low=1, high=MOST_DEVICES)
_BYTES_PER_S = _Rule("a rate from 1e3 to 1e18 bytes per second", float, low=1e3, high=1e18)
_FLOPS_PER_S = _Rule("a rate from 1e6 to 1e21 FLOP/s", float, low=1e6, high=1e21)
_FLOPS = _Rule("a number from 0 to 1e18", float, high=1e18)
_SECONDS = _Rule("seconds from 0 to 60", float, high=60)
_SHARE = _Rule("a fraction from 0.001 to 1", float, low=0.001, high=1)
_SHARE_OR_NONE = _Rule("a fraction from 0 to 1", float, high=1)
_RATES = _Rule("a table of dtype = FLOP/s", dict)
_TEXTS = _Rule("a list of texts", list)


def _ruled(rule: _Rule, **options: Any) -> Any:
    """A dataclass field under `rule`."""
    return field(metadata={"rule": rule}, **options)


def _offence(where: str, rule: _Rule, value: object) -> Iterator[str]:
    """What is wrong with `value` at `where`, if anything is."""
    if not rule.accepts(list(value) if isinstance(value, tuple) else value):
        yield f"{where} = {show_value(value)} is not {rule.words}"
    elif rule is _RATES and isinstance(value, dict):
        if not value:
            yield f"{where} is empty; give at least float32"
        for dtype, rate in value.items():
            yield from _offence(f"{where}.{printable(dtype)}", _FLOPS_PER_S, rate)
    elif rule is _TEXTS and isinstance(value, (list, tuple)):
        for index, text in enumerate(value):
            yield from _offence(f"{where}[{index}]", _TEXT, text)


def _list(offenders: Sequence[str]) -> str:
    """Offenders for a message, of which a file may have any number."""
    more = f"; and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
    return "; ".join(offenders[:_SHOWN]) + more


def _check(instance: Any) -> None:
    """Check the ruled fields of a dataclass instance. Raises HardwareError naming all that are wrong."""
    offenders = [
        line
        for part in dataclasses.fields(instance)
        if "rule" in part.metadata
        for line in _offence(part.name, part.metadata["rule"], getattr(instance, part.name))
    ]
    if offenders:
        raise HardwareError(f"{type(instance).__name__}: {_list(offenders)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator or CPU process: what it holds and how fast it computes.

    Args:
        name: shown to people.
        kind: torch's device type, ``cuda`` or ``cpu``.
        memory_bytes: all of the device's memory; `usable_bytes` is what a plan may fill.
        reserved_bytes: held by the context, the communication library and the allocator's slack.
        mem_bandwidth_bytes_per_s: datasheet (or measured) rate of the device's memory.
        mem_efficiency: fraction of it that pointwise kernels reach.
        peak_flops: dtype (torch's word, ``bfloat16``) -> dense FLOP/s of a matmul.
        matmul_efficiency: fraction of the peak that very large matmuls reach.
        attention_efficiency: the same for fused attention kernels.
        matmul_half_flops: FLOPs of a local op at which half of that fraction is reached: ``eff = max * f / (f + half)``.
        launch_seconds: fixed cost of an op.
        overlap: fraction (0 to 1) of the sums of gradients, and of gathers begun ahead, that can be overlapped with compute.
    """

    name: str = _ruled(_TEXT)
    kind: str = _ruled(_TEXT)
    memory_bytes: int = _ruled(_COUNT)
    reserved_bytes: int = _ruled(_WHOLE)
    mem_bandwidth_bytes_per_s: float = _ruled(_BYTES_PER_S)
    mem_efficiency: float = _ruled(_SHARE)
    # A dict can't be hashed; the name and the other numbers tell two devices apart well enough for a hash.
    peak_flops: Mapping[str, float] = _ruled(_RATES, hash=False)
    matmul_efficiency: float = _ruled(_SHARE)
    attention_efficiency: float = _ruled(_SHARE)
    matmul_half_flops: float = _ruled(_FLOPS)
    launch_seconds: float = _ruled(_SECONDS)
    overlap: float = _ruled(_SHARE_OR_NONE)

    def __post_init__(self) -> None:
        _check(self)
        if self.reserved_bytes >= self.memory_bytes:
            raise HardwareError(
                f"Device {self.name}: {self.reserved_bytes} bytes are reserved of {self.memory_bytes}; nothing is left. "
                "Give it more memory, or a profile with a smaller reserved_bytes"
            )

    @property
    def usable_bytes(self) -> int:
        """Bytes that a plan may fill."""
        return self.memory_bytes - self.reserved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What carries a group's messages.

    Args:
        name: shown to people.
        latency_seconds: time of one step of a collective with no bytes.
        bandwidth_bytes_per_s: datasheet rate of one rank, in one direction.
        efficiency: fraction of that rate that large messages reach.
        local_ranks: ranks of the group that share a node, when the group reaches over several; 1 otherwise.
        ring_ports: how many such links the group's rings use side by side (one network card per local rank); 1 otherwise.
    """

    name: str = _ruled(_TEXT)
    latency_seconds: float = _ruled(_SECONDS)
    bandwidth_bytes_per_s: float = _ruled(_BYTES_PER_S)
    efficiency: float = _ruled(_SHARE, default=1.0)
    local_ranks: int = _ruled(_DEVICES, default=1)
    ring_ports: float = _ruled(_Rule("a number from 1 to 1e6", float, low=1, high=1e6), default=1.0)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def rank_bytes_per_s(self) -> float:
        """Rate that one rank's messages reach."""
        return self.bandwidth_bytes_per_s * self.efficiency

    @property
    def ring_bytes_per_s(self) -> float:
        """Rate that the group's rings reach together."""
        return self.rank_bytes_per_s * self.ring_ports


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node type: its device, how many it holds at most, links inside and between nodes, and where the numbers are from."""

    name: str = _ruled(_TEXT)
    device: Device
    devices_per_node: int = _ruled(_DEVICES)
    intra: Link
    inter: Link
    sources: tuple[str, ...] = _ruled(_TEXTS)
    aliases: tuple[str, ...] = _ruled(_TEXTS, default=())

    def __post_init__(self) -> None:
        _check(self)

    @property
    def digest(self) -> str:
        """Identifies the numbers that costs are computed from: 12 hexadecimal digits. The memory of a device isn't among them."""
        numbers = dataclasses.asdict(self)
        del numbers["sources"], numbers["aliases"], numbers["device"]["memory_bytes"]
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`nodes` machines with `devices_per_node` devices each; consecutive ranks share a node."""

    nodes: int = _ruled(_DEVICES)
    devices_per_node: int = _ruled(_DEVICES)
    machine: Machine

    def __post_init__(self) -> None:
        _check(self)
        most = self.machine.devices_per_node
        if self.devices_per_node > most:
            needed = math.ceil(self.devices_per_node / most)
            raise HardwareError(
                f"{self.devices_per_node} devices per node asked for, but a node of {self.machine.name} holds {most}; "
                f"write nodes x devices, such as {self.nodes * needed}x{most}x{self.machine.name}"
            )
        if self.world_size > MOST_DEVICES:
            raise HardwareError(f"{self} has {self.world_size} devices; there are plans for {MOST_DEVICES} at most")

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read ``4x8xH100`` (nodes x devices), ``8xH100`` (one node), ``H100`` (one device) or ``4x8x./my.toml``.

        Raises HardwareError for an unknown machine, counts that are 0 or more devices than a node holds.
        """
        if not isinstance(text, str):
            raise HardwareError(f"{show_value(text)} is no cluster; a text is needed, such as '4x8xH100'")
        match = _CLUSTER.fullmatch(text.strip())
        if match is None:
            raise HardwareError(f"{show_value(text)} is no cluster; write nodes x devices x machine, such as 4x8xH100, 8xH100 or H100")
        nodes, devices, name = match.groups()
        for digits in (nodes, devices):
            if digits is not None and len(digits) > _DIGITS:
                raise HardwareError(f"{show_value(digits)} are more devices than there are; a cluster has {MOST_DEVICES} at most")
        return cls(nodes=int(nodes or 1), devices_per_node=int(devices or 1), machine=find_machine(name, text.strip()))

    @property
    def world_size(self) -> int:
        """Number of devices, one rank each."""
        return self.nodes * self.devices_per_node

    def _repr_html_(self) -> str:
        """What a notebook shows: devices, their memory and speed, and the links between them."""
        device = self.machine.device
        fastest = max(device.peak_flops, key=lambda dtype: device.peak_flops[dtype])
        rows = [
            ("nodes", f"{self.nodes}"),
            ("devices per node", f"{self.devices_per_node}"),
            ("device", device.name),
            ("memory per device", format_bytes(device.memory_bytes)),
            ("flops per second, at most", f"{device.peak_flops[fastest]:.3g} ({fastest})"),
            ("memory bandwidth", f"{format_bytes(round(device.mem_bandwidth_bytes_per_s))} per second"),
        ]
        links = [("link in a node", self.machine.intra)] if self.devices_per_node > 1 else []
        links += [("link between nodes", self.machine.inter)] if self.nodes > 1 else []
        rows += [(name, f"{link.name}, {format_bytes(round(link.bandwidth_bytes_per_s))} per second") for name, link in links]
        return show_table(f"{self}", rows)

    def part(self, parts: int) -> Cluster:
        """One of `parts` equal groups of consecutive ranks. Raises HardwareError when the ranks don't divide so."""
        size, rest = divmod(self.world_size, parts)
        if rest:
            raise HardwareError(f"{self.world_size} devices don't make {parts} equal groups")
        if size % self.devices_per_node == 0:
            return dataclasses.replace(self, nodes=size // self.devices_per_node)
        if self.devices_per_node % size == 0:
            return dataclasses.replace(self, nodes=1, devices_per_node=size)
        # Groups that begin in the middle of a node: as many devices as surely share one.
        local = math.gcd(size, self.devices_per_node)
        return dataclasses.replace(self, nodes=size // local, devices_per_node=local)

    def with_memory(self, nbytes: int) -> Cluster:
        """The same cluster with `nbytes` of memory per device (the reserved part included)."""
        device = dataclasses.replace(self.machine.device, memory_bytes=nbytes)
        return dataclasses.replace(self, machine=dataclasses.replace(self.machine, device=device))

    def link_of(self, size: int, stride: int = 1) -> Link:
        """The link that groups of `size` ranks, `stride` apart, see when they tile the cluster from rank 0.

        A group within one node talks over `intra`. One that reaches over nodes is bound by the network: every device has its
        own network card there, and a communication library lays one ring per card, so that g ranks per node cross the border
        over g cards (`ring_ports`; never faster than `intra`). The cards of the node's other ranks belong to other groups of
        the same axis, which talk at the same time. The ring's latency is the mean of its hops: one between nodes per g - 1
        inside. Where groups lie differently, the slowest counts.
        """
        local = self._local_ranks(size, stride)
        intra, inter = self.machine.intra, self.machine.inter
        if local == size:
            return intra
        return dataclasses.replace(
            inter,
            latency_seconds=(inter.latency_seconds + (local - 1) * intra.latency_seconds) / local,
            local_ranks=local,
            ring_ports=max(1.0, min(float(local), intra.rank_bytes_per_s / inter.rank_bytes_per_s)),
        )

    def _local_ranks(self, size: int, stride: int) -> int:
        """Ranks that a group has on the node where it has fewest: `size` if every group lies within one node."""
        span, per_node = size * stride, self.devices_per_node
        if size < 1 or stride < 1 or span > self.world_size:
            raise HardwareError(f"groups of {size} ranks, {stride} apart, don't fit {self.world_size} devices")
        if size == 1 or per_node % span == 0:
            return size
        if stride % per_node == 0:
            return 1
        if per_node % stride == 0 and span % per_node == 0:
            return per_node // stride
        # Groups and nodes aren't aligned: count, over one period of the pattern.
        blocks = min(self.world_size // span, math.lcm(span, per_node) // span)
        bases = (block * span + inner for block in range(blocks) for inner in range(stride))
        return min(min(Counter((base + k * stride) // per_node for k in range(size)).values()) for base in bases)

    def __str__(self) -> str:
        return f"{self.nodes}x{self.devices_per_node}x{self.machine.name}"


def axis_link(cluster: Cluster, sizes: tuple[int, ...], axis: int) -> Link:
    """The link that one axis of a mesh sees (`Cluster.link_of`).

    Args:
        cluster: where the mesh lies, from rank 0.
        sizes: the mesh's axis sizes, outermost first; ranks are row-major.
        axis: index into `sizes`.

    Raises HardwareError if the mesh is larger than the cluster.
    """
    if math.prod(sizes) > cluster.world_size:
        shape = "x".join(map(str, sizes))
        raise HardwareError(f"a mesh of {shape} = {math.prod(sizes)} ranks is larger than {cluster}")
    return cluster.link_of(sizes[axis], math.prod(sizes[axis + 1 :]))


_CLUSTER = re.compile(r"(?:([0-9]+)\s*x\s*)??(?:([0-9]+)\s*x\s*)?(?![0-9]+\s*x)(.+)", re.IGNORECASE)


def known_machines() -> tuple[str, ...]:
    """Names of the machines that come with the package, sorted."""
    folder = resources.files(__package__) / "machines"
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


def find_machine(name: str, cluster: str = "") -> Machine:
    """The machine called `name`, in any case, by its name, an alias or the path of a TOML file.

    Raises HardwareError naming what was asked for, the known machines and the closest matches, or what `cluster`, the text that the name
    stands in, may have meant.
    """
    if name.endswith(".toml") or "/" in name:
        return load_machine(name)
    folder = resources.files(__package__) / "machines"
    wanted = name.strip().lower()
    known = known_machines()
    if wanted in known:
        return _read_text((folder / f"{wanted}.toml").read_text(encoding="utf-8"), f"{wanted}.toml")
    machines = [_read_text((folder / f"{each}.toml").read_text(encoding="utf-8"), f"{each}.toml") for each in known]
    for machine in machines:
        if wanted in machine.aliases:
            return machine
    words = [*known, *(alias for machine in machines for alias in machine.aliases)]
    close = [guess] if (guess := _guess_cluster(cluster, words)) else difflib.get_close_matches(wanted[:100], words, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise HardwareError(
        f"no machine is called {show_value(name)}.{hint} Known: {', '.join(known)}. "
        "For another one, give the path of a profile, such as 4x8x./my.toml"
    )


def _guess_cluster(text: str, machines: Iterable[str]) -> str:
    """What a text may mean that lacks an x or has its parts in another order; empty if nothing is guessed.

    >>> _guess_cluster("8H100", ["h100"]), _guess_cluster("4x8 H100", ["h100"]), _guess_cluster("H100*8", ["h100"])
    ('8xH100', '4x8xH100', '8xH100')
    """
    names = "|".join(sorted(map(re.escape, machines), key=len, reverse=True))
    counts = r"[0-9]{1,7}(?:[\sx*×,]+[0-9]{1,7})?"
    for pattern in (rf"(?P<counts>{counts})[\sx*×,]*(?P<name>{names})", rf"(?P<name>{names})[\sx*×,]+(?P<counts>{counts})"):
        if match := re.fullmatch(pattern, text, re.IGNORECASE):
            return "x".join([*re.findall("[0-9]+", match["counts"]), match["name"]])
    return ""


def load_machine(path: str | Path) -> Machine:
    """Read a machine's TOML file.

    Raises HardwareError if it can't be read, and one that lists every missing, unknown or illegal field.
    """
    try:
        text = read_text(path, _MOST_BYTES)
    except InputError as error:
        raise HardwareError(f"machine file {path} {error}") from error
    return _read_text(text, str(path))


def _read_text(text: str, where: str) -> Machine:
    """Parse and validate the text of a machine file; `where` names it in errors."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and values nested too deeply
        raise HardwareError(f"machine file {where} is no TOML: {error}") from error
    return read_machine(data, where)


def read_machine(data: Mapping[str, Any], where: str) -> Machine:
    """Build a machine from nested mappings, such as a parsed TOML file or `dataclasses.asdict` of a machine.

    Raises HardwareError that lists every missing, unknown or illegal field of `where`.
    """
    parts: dict[str, type] = {"device": Device, "intra": Link, "inter": Link}
    offenders = list(_offences(Machine, data, ""))
    for key, kind in parts.items():
        table = data.get(key)
        if isinstance(table, Mapping):
            offenders += _offences(kind, table, f"{key}.")
        elif key in data:
            offenders.append(f"{key} = {show_value(table)} is not a table")
    if offenders:
        raise HardwareError(f"machine file {where}: {_list(offenders)}")
    fields = dict(data) | {key: kind(**data[key]) for key, kind in parts.items()}
    fields["sources"] = tuple(data["sources"])
    fields["aliases"] = tuple(data.get("aliases", ()))
    return Machine(**fields)


def _offences(kind: type, table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Everything wrong with `table` as the fields of dataclass `kind`."""
    fields = {part.name: part for part in dataclasses.fields(kind)}
    for name, part in fields.items():
        if name not in table:
            if part.default is dataclasses.MISSING:
                yield f"{prefix}{name} is missing"
        elif "rule" in part.metadata:
            yield from _offence(prefix + name, part.metadata["rule"], table[name])
    for name in sorted(table.keys() - fields.keys()):
        close = difflib.get_close_matches(name[:100], fields, n=1)
        yield f"{prefix}{printable(name[:100])} is unknown" + (f" (did you mean {close[0]}?)" if close else "")
