"""Pins: the choices that a user fixes before the search, which makes all others.

`TABLE` lists what can be pinned by name. The parser, its messages, the command line's help and the list in ``docs/cli.md`` come from it.
Pins are read and checked once, at the edge, and are `Pins` from there on:

    >>> pins = Pins.parse({"tp": 8, "layers.*.mlp": {"tp": "o"}})
    >>> pins == Pins.parse_texts(["tp=8", "layers.*.mlp=tp:o"])
    True
    >>> print(pins)
    tp=8, layers.*.mlp=tp:o

To add a pin, add a row to `TABLE` and a field of its name to `Pins`, and obey it in `autopar.search`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir import HALVES, MICROBATCH, PIPELINE, Mesh
from autopar.schedules import SCHEDULES, check_schedule

RECOMPUTE = ("none", "selective", "full")
"""What of a layer's forward the backward runs again: nothing, the attention core (Korthikanti et al. 2022, section 5), all."""

ATTENTION = ("ring", "ulysses", "gather")
"""How attention may run where the sequence is split: keys and values travel; heads are split instead; all keys and values are gathered."""


def _integer_from(least: int, needed: str) -> Callable[[str, object], int]:
    """What reads an integer of at least `least`, or raises an InputError that says in the words `needed` what is."""

    def read(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"pin {name}={value!r}: {needed}")
        return value

    return read


_read_axis_size = _integer_from(1, "the size of an axis is needed, an integer from 1")
_read_group = _integer_from(2, "a number of ranks is needed, an integer from 2")
_read_count = _integer_from(1, "an integer from 1 is needed")
_read_ahead = _integer_from(0, "an integer from 0 is needed")


def _read_level(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 3:
        raise InputError(f"pin {name}={value!r}: an integer from 0 to 3 is needed, such as {name}=2")
    return value


def _read_switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"pin {name}={value!r}: true or false is needed")
    return value


def _read_attention(name: str, value: object) -> str:
    if not (isinstance(value, str) and value in ATTENTION):
        raise InputError(f"pin {name}={value!r} is unknown; there are {', '.join(ATTENTION)}")
    return value


def _read_schedule(name: str, value: object) -> str:
    if not (isinstance(value, str) and value in SCHEDULES):
        raise InputError(f"pin {name}={value!r} is unknown; there are {', '.join(SCHEDULES)}")
    return value


def _read_recompute(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "full" if value else "none"
    if not (isinstance(value, str) and value in RECOMPUTE):
        raise InputError(f"pin {name}={value!r} is unknown; there are {', '.join(RECOMPUTE)}, true (full) and false (none)")
    return value


@dataclass(frozen=True, slots=True)
class Pin:
    """Something that can be pinned by name.

    Attributes:
        name: of the pin, and of the field of `Pins` that holds its value.
        values: the values that it takes, as help writes them.
        read: (name, value) to the field's value; raises InputError when the value can't be used. A pin that is given as text is
            turned into an integer, a bool or else left a string before.
        help: its meaning, in a line.
        of_pipeline: whether only the search over pipelines obeys it; micro-batches and recomputation are a pipeline of one stage.
    """

    name: str
    values: str
    read: Callable[[str, object], Any]
    help: str
    of_pipeline: bool = False


TABLE = (
    Pin("dp", "N", _read_axis_size, "ranks that split the batch; 1 is none"),
    Pin("tp", "N", _read_axis_size, "ranks that split features; 1 is none"),
    Pin("cp", "N", _read_axis_size, "ranks that split the sequence; 1 is none"),
    Pin("pp", "N", _read_count, "number of pipeline ranks; 1 is no pipeline", of_pipeline=True),
    Pin("fsdp", "true|false", _read_switch, "whether parameters are stored split over dp and cp; true needs one on every pipeline rank"),
    Pin(
        "zero",
        "0|1|2|3",
        _read_level,
        "ZeRO level, what is stored split over dp and cp: 0 nothing, 1 the optimizer's states, 2 gradients too, 3 parameters too; true and "
        "false of fsdp are 3 and 0",
    ),
    Pin(
        "zero_group",
        "N",
        _read_group,
        "ranks over which a ZeRO level stores in parts, neighbours along dp; each group of N stores the same (hybrid sharding)",
    ),
    Pin(
        "attention",
        "ring|ulysses|gather",
        _read_attention,
        "how attention runs where cp splits the sequence: keys and values travel, heads are split instead, or keys and values are gathered",
    ),
    Pin(
        "zigzag",
        "true|false",
        _read_switch,
        "whether ranks that pass keys and values around have two pieces of the sequence each, the i-th from the front and from the end",
    ),
    Pin("vocabulary", "true|false", _read_switch, "whether lookups and losses are split by the vocabulary"),
    Pin("loss_chunks", "N", _read_count, "parts in which a linear head and its cross entropy compute the logits; 1 is all at once"),
    Pin("prefetch", "N", _read_ahead, "how many blocks ahead split parameters are gathered; unless pinned 1, 0 where memory is short"),
    Pin(
        "half_batches",
        "true|false",
        _read_switch,
        "whether two halves of the batch take turns, one computing while the ranks exchange for the other; without a pipeline",
    ),
    Pin("schedule", "NAME", _read_schedule, f"the pipeline's schedule: {', '.join(SCHEDULES)}", of_pipeline=True),
    Pin("microbatches", "N", _read_count, "parts of the batch that run one after the other; a divisor of the batch", of_pipeline=True),
    Pin("chunks", "N", _read_count, "stages on each pipeline rank", of_pipeline=True),
    Pin(
        "recompute",
        "KIND",
        _read_recompute,
        "what of every block the backward runs again: none, selective (the attention core), full; true and false are full and none",
        of_pipeline=True,
    ),
)
"""Every pin that has a name; what is pinned of modules is given by their paths (`describe_pins` lists both)."""

PIN_NAMES = tuple(pin.name for pin in TABLE)

PREFETCH = 1
"""Blocks ahead of which gathers of parameters are begun, unless pinned."""

_ONE_STAGE = {"pp": 1, "schedule": None, "microbatches": 1, "chunks": None, "recompute": "none"}
"""What pins of pipelines say where there is neither a pipeline nor recomputation."""

LATER_PINS = ("ep", "offload")
"""Names that are refused today and will be pins of later versions."""


_NAMED_ELSEWHERE = {
    **dict.fromkeys(("data", "ddp", "replicate"), "dp"),
    **dict.fromkeys(("tensor", "model", "mp"), "tp"),
    **dict.fromkeys(("context", "sequence", "sp"), "cp"),
    **dict.fromkeys(("pipeline", "pipe", "stages", "num_stages"), "pp"),
    **dict.fromkeys(("num_microbatches", "micro_batches", "gradient_accumulation", "accumulation_steps"), "microbatches"),
    **dict.fromkeys(("checkpoint", "checkpointing", "activation_checkpointing", "ac", "remat"), "recompute"),
}
"""What other systems call something that can be pinned -> the pin's name."""


def describe_pins() -> tuple[tuple[str, str], ...]:
    """(how a pin is written, what it means) of everything that can be pinned, for help and documentation."""
    return (
        *((f"{pin.name}={pin.values}", pin.help) for pin in TABLE),
        ("MODULE=pp:N", "the stage that a module is on, from 0; * in the module's path stands for any name"),
        (
            "MODULE=AXIS:LOOP",
            "the loop that an axis splits in a module's ops, with * for the numbers of layers that are alike; loops and"
            " stage are joined by commas",
        ),
    )


@dataclass(frozen=True, slots=True)
class Pins:
    """What the user fixes; None and absent modules are left to the search.

    `TABLE` tells the meaning of the fields, but for the last two. Every way to make `Pins` checks them: InputError for values that can't be
    used or that contradict each other.

    Attributes:
        placements: glob of module paths -> axis of the mesh -> loop of the modules' ops that the axis splits.
        stages: glob of module paths, or name of a block -> the stage that it is on, from 0. Where globs overlap, the last one counts.
    """

    dp: int | None = None
    tp: int | None = None
    cp: int | None = None
    pp: int | None = None
    fsdp: bool | None = None
    zero: int | None = None
    zero_group: int | None = None
    attention: str | None = None
    zigzag: bool | None = None
    vocabulary: bool | None = None
    loss_chunks: int | None = None
    prefetch: int | None = None
    half_batches: bool | None = None
    schedule: str | None = None
    microbatches: int | None = None
    chunks: int | None = None
    recompute: str | None = None
    placements: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pin in TABLE:
            value = getattr(self, pin.name)
            if value is not None:
                object.__setattr__(self, pin.name, pin.read(pin.name, value))
        for pattern, loops in self.placements.items():
            for axis, loop in loops.items():
                if not isinstance(loop, str):
                    raise InputError(f"pin {pattern!r}: {axis}={loop!r} is no loop; write the name of a loop of its ops, such as 'o'")
        for pattern, stage in self.stages.items():
            if isinstance(stage, bool) or not isinstance(stage, int) or stage < 0:
                raise InputError(f"pin {pattern!r}: pp={stage!r} isn't the number of a stage, which is an integer from 0")
        # Copies, so that what happens to the caller's dicts changes nothing here.
        object.__setattr__(self, "placements", {pattern: dict(loops) for pattern, loops in self.placements.items() if loops})
        object.__setattr__(self, "stages", dict(self.stages))
        _check_together(self)

    @classmethod
    def parse(cls, pins: Mapping[str, object] | Pins | None) -> Pins:
        """Read pins as Python code gives them: ``{"tp": 8, "fsdp": True, "layers.*.mlp": {"tp": "o"}, "layers.3": {"pp": 1}}``.

        Keys are names, or globs of module paths, whose choices may also be text as on the command line, ``"tp:o,pp:1"``. None pins nothing,
        and leaves a name to the search.

        Raises InputError for what isn't known, of the wrong type, or contradicts itself.
        """
        if pins is None or isinstance(pins, Pins):
            return pins or NO_PINS
        if not isinstance(pins, Mapping):
            raise InputError(f"pins={pins!r}: a dict is needed, such as {{'dp': 4}}")
        named: dict[str, Any] = {}
        placements: dict[str, Mapping[str, str]] = {}
        stages: dict[str, int] = {}
        for name, value in pins.items():
            if name in PIN_NAMES:
                named[name] = value
                continue
            if name in LATER_PINS:
                raise InputError(f"pin {name!r} is not supported yet; this version pins {', '.join(PIN_NAMES)} and modules")
            if isinstance(name, str) and isinstance(value, str) and ":" in value:
                value = _parse_module(f"{name}={value}", value)
            if not (isinstance(name, str) and isinstance(value, Mapping)):
                raise InputError(
                    f"unknown pin {name!r}{_guess_name(name)} are {', '.join(PIN_NAMES)} and globs of module paths, "
                    "whose choices are pp:STAGE or AXIS:LOOP"
                )
            if loops := {axis: loop for axis, loop in value.items() if axis != PIPELINE}:
                placements[name] = loops
            if PIPELINE in value:
                stages[name] = value[PIPELINE]
        return cls(**named, placements=placements, stages=stages)

    @classmethod
    def parse_texts(cls, texts: Sequence[str]) -> Pins:
        """Read pins as the command line gives them: ``tp=8``, ``fsdp=true``, ``layers.3=pp:1``, ``layers.*.mlp=tp:o,pp:0``.

        Raises InputError as `parse` does, and for a pin that is given twice.
        """
        pins: dict[str, object] = {}
        for text in texts:
            name, _, value = (part.strip() for part in text.partition("="))
            if not value and name in PIN_NAMES:
                pin = next(pin for pin in TABLE if pin.name == name)
                raise InputError(f"pin {text!r} has no value; write {name}={pin.values}: {pin.help}")
            if name in pins:
                raise InputError(f"pin {name!r} is given twice")
            if len(parts := text.split(",")) > 1 and all(part.partition("=")[0].strip() in PIN_NAMES for part in parts):
                raise InputError(
                    f"pin {text!r} is {len(parts)} pins; give each of its own, as in {' '.join(f'--pin {part.strip()}' for part in parts)}"
                )
            pins[name] = _parse_value(value)
        return cls.parse(pins)

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Pins:
        """The pins whose `texts` these are. Raises InputError as `parse` does."""
        return cls.parse({name: _parse_value(text) for name, text in texts.items()})

    @property
    def texts(self) -> dict[str, str]:
        """Each pin's name, or path of modules, and its value as the command line takes it: ``{"tp": "8", "layers.3": "pp:1"}``."""
        values = ((name, getattr(self, name)) for name in PIN_NAMES)
        texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values if value is not None}
        # Stages come first, since it is their order that counts.
        for pattern in dict.fromkeys((*self.stages, *self.placements)):
            choices = [f"{axis}:{loop}" for axis, loop in self.placements.get(pattern, {}).items()]
            choices += [f"{PIPELINE}:{self.stages[pattern]}"] if pattern in self.stages else []
            texts[pattern] = ",".join(choices)
        return texts

    def override(self, pins: Pins) -> Pins:
        """These pins with others in place of those of the same name; a ZeRO level takes the place of `fsdp` too, and the other way round.

        Raises InputError where the new pins contradict those that are left.
        """
        replaced = {*pins.texts, *(("fsdp", "zero") if pins.zero_level is not None else ())}
        return Pins.from_texts({**{name: text for name, text in self.texts.items() if name not in replaced}, **pins.texts})

    def __str__(self) -> str:
        """The pins as the command line takes them, separated by a comma and a blank; ``""`` when there are none."""
        return ", ".join(f"{name}={text}" for name, text in self.texts.items())

    def __bool__(self) -> bool:
        """Whether anything is pinned."""
        return self != NO_PINS

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The pinned sizes of axes of a pipeline rank's mesh, by kind, outermost first."""
        sizes = {"dp": self.dp, "cp": self.cp, "tp": self.tp}
        return {kind: size for kind, size in sizes.items() if size is not None}

    @property
    def ahead(self) -> int:
        """How many blocks ahead gathers of parameters are begun."""
        return PREFETCH if self.prefetch is None else self.prefetch

    @property
    def zero_level(self) -> int | None:
        """The pinned ZeRO level; None where neither `zero` nor `fsdp` is pinned."""
        return self.zero if self.zero is not None or self.fsdp is None else 3 if self.fsdp else 0

    def word_zero(self) -> str:
        """What the pinned ZeRO level asks for, in the user's words, to begin a message with."""
        return f"pin {f'fsdp={self.fsdp}' if self.zero is None else f'zero={self.zero}'} stores parameters split"

    @property
    def asks_for_pipeline(self) -> bool:
        """Whether anything is pinned that only the search over pipelines obeys."""
        return bool(self.stages) or any(getattr(self, pin.name) is not None for pin in TABLE if pin.of_pipeline)


def _check_together(pins: Pins) -> None:
    """Raise InputError for pins that contradict each other, whatever the model and the cluster are."""
    if pins.fsdp is not None and pins.zero not in (None, 3 if pins.fsdp else 0):
        raise InputError(f"the pins fsdp={pins.fsdp} and zero={pins.zero} contradict each other: fsdp is short for zero=3; leave out one")
    if pins.zigzag and pins.attention in ("ulysses", "gather"):
        raise InputError(f"the pins zigzag=True and attention={pins.attention} contradict each other: only a ring is zigzag; leave out one")
    if pins.zero_level and pins.dp == 1 and pins.cp in (None, 1):
        raise InputError(f"{pins.word_zero()} over a dp or cp axis, but dp is pinned to 1; pin more, or leave it out")
    if pins.zero_group and not pins.zero_level:
        raise InputError(f"pin zero_group={pins.zero_group} says over how many ranks a ZeRO level stores in parts: pin zero=1, 2 or 3 too")
    if pins.zero_group and pins.dp is not None and pins.dp % pins.zero_group:
        raise InputError(f"pin zero_group={pins.zero_group} can't form equal groups of dp={pins.dp} ranks; pin a divisor of dp")
    if pins.half_batches and (pins.stages or any(getattr(pins, name) not in (None, value) for name, value in _ONE_STAGE.items())):
        raise InputError(
            "pin half_batches=True is for programs without stages, micro-batches and recomputation: leave out pp, schedule, microbatches,"
            " chunks, recompute and stages of modules, or half_batches"
        )
    chunks = pins.chunks
    if pins.schedule is not None:
        try:
            check_schedule(pins.schedule, pins.pp or 1, pins.microbatches or 1, chunks)
        except InputError as error:
            raise InputError(f"the pins schedule={pins.schedule}, chunks={chunks} can't be had: {error}") from error
        chunks = chunks or SCHEDULES[pins.schedule].chunks
    if pins.pp is None or chunks is None:
        return
    for pattern, stage in pins.stages.items():
        if stage >= pins.pp * chunks:
            raise InputError(
                f"pin {pattern!r}: pp={stage} isn't the number of a stage; pins pp={pins.pp} and chunks={chunks} make stages 0 to "
                f"{pins.pp * chunks - 1}"
            )


NO_PINS = Pins()
"""Nothing is pinned."""


def reconcile(pins: Pins, mesh: Mapping[str, int] | None) -> tuple[Pins, Mesh | None]:
    """Bring together pins and the mesh that a user gives next to them, axis name -> size, outermost first.

    Of ``{"pp": 2, "tp": 4}``, the mesh of all ranks, come the pin ``pp=2`` and the mesh ``tp=4`` of one pipeline rank. A mesh without pp
    is that of a single pipeline rank, unless pp is pinned. Without a mesh the pins stay as they are.

    Raises InputError for what is no mesh, and for a mesh that the pins contradict.
    """
    if mesh is None:
        return pins, None
    if not isinstance(mesh, Mapping):
        raise InputError(f"mesh={mesh!r}: a dict is needed, such as {{'dp': 4}}")
    if wrong := {name: size for name, size in mesh.items() if type(size) is not int or size < 1}:
        raise InputError(f"mesh axes {wrong}: sizes are integers from 1")
    if wrong_names := [name for name in mesh if not (isinstance(name, str) and name.isidentifier())]:
        raise InputError(f"mesh axis {wrong_names[0]!r}: the name of an axis is a word, such as dp")
    if taken := [name for name in (MICROBATCH, *HALVES) if name in mesh]:
        raise InputError(f"mesh axis {taken[0]!r}: the name is taken, by micro-batches; call the axis something else")
    pipeline_ranks = mesh.get(PIPELINE, pins.pp)
    if pins.pp not in (None, pipeline_ranks):
        raise InputError(f"the mesh has pp={pipeline_ranks} and pin pp={pins.pp} asks for another number; leave out one of them")
    if others := [f"{kind}={size}" for kind, size in pins.axis_sizes.items() if size != mesh.get(kind, 1)]:
        raise InputError(f"the mesh {dict(mesh)} and the pins {', '.join(others)} contradict each other; leave out one of them")
    if pipeline_ranks is None and pins.asks_for_pipeline:
        pipeline_ranks = 1
    inner = {name: size for name, size in mesh.items() if name != PIPELINE} or {"free": 1}
    return replace(pins, pp=pipeline_ranks), Mesh(tuple(inner), tuple(inner.values()))


def check_devices(pins: Pins, mesh: Mesh | None, cluster: Cluster, pipeline_ranks: int | None = None) -> None:
    """Raise InputError when a cluster's devices can't be arranged as pins and mesh say, whatever the model is.

    Args:
        pins: what the user fixed.
        mesh: the mesh of one pipeline rank, if one is given (`reconcile`).
        cluster: all devices.
        pipeline_ranks: over how many they are spread; as many as are pinned, or one, unless given.
    """
    ranks, devices = pipeline_ranks or pins.pp or 1, cluster.world_size
    if devices % ranks:
        raise InputError(f"pin pp={ranks} needs a multiple of {ranks} ranks, the cluster {cluster} has {devices}")
    if pins.zero_level and ranks == devices > 1:
        raise InputError(
            f"{pins.word_zero()} over the ranks of a mesh, but pp={ranks} leaves each pipeline rank a mesh of"
            " one rank; pin a smaller pp, or leave it out"
        )
    who = f"the cluster {cluster}" if ranks == 1 else f"each of the {ranks} pipeline ranks of {cluster}"
    if mesh is not None and mesh.world_size != devices // ranks:
        raise InputError(f"mesh {mesh} has {mesh.world_size} ranks, {who} has {devices // ranks}")
    pinned_ranks = math.prod(pins.axis_sizes.values())
    if mesh is None and devices // ranks % pinned_ranks:
        requested = " x ".join(f"{name}={size}" for name, size in pins.axis_sizes.items())
        raise InputError(f"pins {requested} need a multiple of {pinned_ranks} ranks, {who} has {devices // ranks}")


def parse_mesh(text: str) -> dict[str, int]:
    """Read ``dp=4,tp=2``, a mesh as the command line gives it, as axis sizes by name, outermost first.

    Raises InputError when it isn't that.
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name.isidentifier() and equals):
            raise InputError(f"{part!r} in mesh {text!r} is no axis; write axes as name=size, such as dp=4,tp=2")
        if name in mesh:
            raise InputError(f"mesh {text!r} names the axis {name!r} twice")
        if not (_is_number(value) and int(value) >= 1):
            raise InputError(f"mesh {text!r}: {name}={value} is no size of an axis; a whole number of ranks from 1 is needed")
        mesh[name] = int(value)
    return mesh


def _guess_name(name: object) -> str:
    """Which pin an unknown name may mean, if any is guessed: to stand in a message between the name and those that are known.

    >>> _guess_name("TP"), _guess_name("microbatch"), _guess_name("zp")
    ('; did you mean tp? Known', '; did you mean microbatches? Known', '; known')
    """
    wanted = str(name)[:100].lower().replace("-", "_").removesuffix("_size").removesuffix("_parallel")
    close = [_NAMED_ELSEWHERE[wanted]] if wanted in _NAMED_ELSEWHERE else difflib.get_close_matches(wanted, PIN_NAMES, n=2)
    return f"; did you mean {' or '.join(close)}? Known" if close else "; known"


def _is_number(text: str) -> bool:
    """Whether a text is a whole number, of a length that Python reads; nothing here has more than 18 digits."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def _parse_value(text: str) -> int | bool | str:
    return int(text) if _is_number(text) else {"true": True, "false": False}.get(text.lower(), text)


def _parse_module(text: str, value: str) -> dict[str, object]:
    """Read what a pin's `text` says of a module, such as ``pp:2,tp:o``: its stage, and loops of its ops by axis."""
    choices: dict[str, object] = {}
    for part in value.split(","):
        axis, colon, choice = (piece.strip() for piece in part.partition(":"))
        if not (axis and colon and choice):
            raise InputError(f"{part!r} in pin {text!r} is no choice for a module; write pp:STAGE or AXIS:LOOP, joined by commas")
        if axis in choices:
            raise InputError(f"pin {text!r} names the axis {axis!r} twice")
        choices[axis] = _parse_value(choice) if axis == PIPELINE else choice
    return choices
