"""Pins: read from Python and from text, written as text, refused with a reason, and listed once for help and documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autopar
from autopar.errors import InputError
from autopar.ir.layout import Mesh
from autopar.plans.pins import LATER_PINS, NO_PINS, PIN_NAMES, TABLE, Pins, describe_pins, reconcile
from autopar.plans.plan import RECOMPUTE
from autopar.schedules.families import SCHEDULES

ROOT = Path(__file__).parent.parent


def test_pins_are_read_from_python() -> None:
    pins = Pins.parse({"tp": 2, "fsdp": True, "schedule": "zb-v", "layers.*.mlp": {"tp": "o", "pp": 0}, "layers.3": {"pp": 1}})
    assert pins == Pins(
        tp=2, fsdp=True, schedule="zb-v", placements={"layers.*.mlp": {"tp": "o"}}, stages={"layers.*.mlp": 0, "layers.3": 1}
    )
    assert Pins.parse(pins) is pins
    assert Pins.parse(None) == Pins.parse({}) == Pins.parse({"tp": None, "layers.3": {}}) == Pins()
    assert Pins.parse({"recompute": True}).recompute == "full"
    assert Pins.parse({"recompute": False}).recompute == "none"
    assert Pins.parse({"tp": 2, "layers.*.mlp": "tp:o, pp:0", "layers.3": "pp:1"}) == Pins.parse_texts(
        ["tp=2", "layers.*.mlp=tp:o,pp:0", "layers.3=pp:1"]
    )
    assert autopar.Pins is Pins


def test_pins_are_read_from_text() -> None:
    assert Pins.parse_texts(["tp=2", " dp = 4", "fsdp=true", "vocabulary=False"]) == Pins(tp=2, dp=4, fsdp=True, vocabulary=False)
    assert Pins.parse_texts([]) == Pins()
    assert Pins.parse_texts(["pp=4", "schedule=zb-v", "microbatches=16", "chunks=2", "recompute=full"]) == Pins(
        pp=4, schedule="zb-v", microbatches=16, chunks=2, recompute="full"
    )
    assert Pins.parse_texts(["recompute=true"]) == Pins(recompute="full")
    assert Pins.parse_texts(["model.layers.3 = pp:2", "layers.*.mlp=tp:o, pp: 0"]) == Pins(
        placements={"layers.*.mlp": {"tp": "o"}}, stages={"model.layers.3": 2, "layers.*.mlp": 0}
    )
    with pytest.raises(InputError, match="pin 'tp' is given twice"):
        Pins.parse_texts(["tp=2", "tp=4"])
    with pytest.raises(InputError, match="an integer from 1"):
        Pins.parse_texts([f"tp={'9' * 5000}"])


def test_several_pins_in_one_text_are_told_apart() -> None:
    with pytest.raises(InputError, match="pin 'dp=4,tp=2' is 2 pins; give each of its own, as in --pin dp=4 --pin tp=2"):
        Pins.parse_texts(["dp=4,tp=2"])


VALUES: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("dp", "tp", "cp", "pp", "microbatches"), st.integers(1, 64)),
    **dict.fromkeys(("fsdp", "vocabulary"), st.booleans()),
    "schedule": st.sampled_from(list(SCHEDULES)),
    "chunks": st.just(2),
    "recompute": st.sampled_from(RECOMPUTE),
}
LOOPS = st.dictionaries(st.sampled_from(("tp", "dp")), st.sampled_from("bsio"), min_size=1)


@given(
    named=st.fixed_dictionaries({}, optional=VALUES),
    placements=st.dictionaries(st.sampled_from(("layers.*", "*.mlp", "head")), LOOPS),
    stages=st.dictionaries(st.sampled_from(("layers.1", "*.mlp", "layers.2")), st.integers(0, 1)),
)
def test_the_text_of_pins_reads_back(named: dict[str, Any], placements: dict[str, Any], stages: dict[str, int]) -> None:
    try:
        pins = Pins(**named, placements=placements, stages=stages)
    except InputError:  # they contradict each other, which is another test's
        return
    again = Pins.parse_texts(str(pins).split(", ") if pins else [])
    assert again == pins
    assert list(again.stages) == list(stages)  # of globs that overlap the last one counts


def test_pins_write_themselves() -> None:
    pins = Pins.parse({"layers.0": {"tp": "o"}, "layers.3": {"pp": 1}, "fsdp": False, "tp": 8, "layers.*.mlp": {"tp": "i", "pp": 0}})
    assert str(pins) == "tp=8, fsdp=false, layers.3=pp:1, layers.*.mlp=tp:i,pp:0, layers.0=tp:o"
    assert (str(Pins()), bool(Pins()), bool(pins)) == ("", False, True)
    with pytest.raises(FrozenInstanceError):
        pins.tp = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (["dp=4"], r"pins=\['dp=4'\]: a dict is needed, such as \{'dp': 4\}"),
        ({"tp": 0}, "pin tp=0: the size of an axis is needed, an integer from 1"),
        ({"tp": 2.0}, "pin tp=2.0: the size of an axis"),
        ({"pp": True}, "pin pp=True: an integer from 1 is needed"),
        ({"fsdp": 1}, "pin fsdp=1: true or false is needed"),
        ({"schedule": ["1f1b"]}, "is unknown; there are gpipe, 1f1b"),
        ({"recompute": "half"}, r"there are none, selective, full, true \(full\) and false \(none\)"),
        (
            {"zp": 2},
            "unknown pin 'zp'; known are dp, tp, cp, pp, fsdp, zero, zero_group, attention, .* and globs of module paths",
        ),
        ({3: {"pp": 1}}, "unknown pin 3"),
        ({"tp": {"pp": 1}}, "pin tp={'pp': 1}: the size of an axis"),
        ({"layers.*": {"tp": 3}}, "pin 'layers.*': tp=3 is no loop; write the name of a loop"),
        ({"layers.*": {"pp": -1}}, "pin 'layers.*': pp=-1 isn't the number of a stage, which is an integer from 0"),
        ({"layers.*": {"pp": "1"}}, "pp='1' isn't the number of a stage"),
        ({"dp": 1, "fsdp": True}, "fsdp=True stores parameters split over a dp or cp axis, but dp is pinned to 1"),
        ({"schedule": "1f1b", "chunks": 2}, "the pins schedule=1f1b, chunks=2 can't be had: schedule '1f1b' has 1 stages per rank, not 2"),
        ({"schedule": "interleaved", "chunks": 1}, "needs 2 or more stages per rank"),
        ({"pp": 2, "chunks": 2, "layers.3": {"pp": 4}}, "pp=4 isn't the number of a stage; pins pp=2 and chunks=2 make stages 0 to 3"),
        ({"pp": 2, "schedule": "1f1b", "layers.3": {"pp": 2}}, "pins pp=2 and chunks=1 make stages 0 to 1"),
    ],
)
def test_pins_that_can_not_be_used_say_why(pins: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pins.parse(pins)
    with pytest.raises(InputError, match=message):
        autopar.compile(nn.Linear(2, 2), pins=pins)


@pytest.mark.parametrize("name", LATER_PINS)
def test_pins_of_later_versions_are_refused_by_name(name: str) -> None:
    for value in (2, "ring", {"tp": "o"}):
        with pytest.raises(InputError, match=f"pin '{name}' is not supported yet; this version pins dp, tp, .*, recompute and modules"):
            Pins.parse({name: value})


def test_stages_are_open_while_their_number_is() -> None:
    assert Pins.parse({"pp": 2, "layers.3": {"pp": 7}}).stages == {"layers.3": 7}
    assert Pins.parse({"pp": 2, "schedule": "interleaved", "layers.3": {"pp": 7}}).stages == {"layers.3": 7}


@pytest.mark.parametrize(
    ("pins", "mesh", "wanted"),
    [
        ({"pp": 2, "tp": 2}, None, (Pins(pp=2, tp=2), None)),
        ({}, {"dp": 2, "tp": 4}, (Pins(), Mesh(("dp", "tp"), (2, 4)))),
        ({}, {"pp": 2, "tp": 4}, (Pins(pp=2), Mesh(("tp",), (4,)))),
        ({}, {"tp": 4, "pp": 2}, (Pins(pp=2), Mesh(("tp",), (4,)))),
        ({"pp": 2}, {"pp": 2, "tp": 4}, (Pins(pp=2), Mesh(("tp",), (4,)))),
        ({"pp": 2}, {"tp": 4}, (Pins(pp=2), Mesh(("tp",), (4,)))),
        ({}, {"pp": 8}, (Pins(pp=8), Mesh(("free",), (1,)))),
        ({"tp": 4, "dp": 1}, {"tp": 4, "x": 2}, (Pins(tp=4, dp=1), Mesh(("tp", "x"), (4, 2)))),
        # Micro-batches alone need the search over pipelines; on a mesh of all ranks there is one group.
        ({"microbatches": 4}, {"dp": 2}, (Pins(pp=1, microbatches=4), Mesh(("dp",), (2,)))),
    ],
)
def test_a_mesh_and_pins_are_brought_together(pins: Any, mesh: Any, wanted: tuple[Pins, Mesh | None]) -> None:
    assert reconcile(Pins.parse(pins), mesh) == wanted


@pytest.mark.parametrize(
    ("pins", "mesh", "message"),
    [
        ({}, ["dp"], r"mesh=\['dp'\]: a dict is needed"),
        ({}, {"dp": 0}, r"mesh axes \{'dp': 0\}: sizes are integers from 1"),
        ({}, {"pp": True, "dp": 2}, r"mesh axes \{'pp': True\}: sizes are integers from 1"),
        ({}, {"t p": 4}, "mesh axis 't p': the name of an axis is a word, such as dp"),
        ({}, {"micro": 4}, "mesh axis 'micro': the name is taken"),
        ({}, {"half_1": 4}, "mesh axis 'half_1': the name is taken"),
        ({"pp": 4}, {"pp": 2, "dp": 2}, "the mesh has pp=2 and pin pp=4 asks for another number"),
        ({"tp": 2}, {"dp": 4}, r"the mesh \{'dp': 4\} and the pins tp=2 contradict each other"),
        ({"schedule": "1f1b", "layers.3": {"pp": 3}}, {"pp": 2, "tp": 2}, "make stages 0 to 1"),
    ],
)
def test_a_mesh_that_contradicts_the_pins_is_refused(pins: Any, mesh: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reconcile(Pins.parse(pins), mesh)


def test_what_asks_for_a_pipeline() -> None:
    for pins in (Pins(pp=1), Pins(schedule="1f1b"), Pins(microbatches=1), Pins(chunks=2), Pins(recompute="none"), Pins(stages={"a": 0})):
        assert pins.asks_for_pipeline
    assert not Pins(dp=2, tp=2, cp=2, fsdp=True, vocabulary=True, placements={"a": {"tp": "o"}}).asks_for_pipeline
    assert not NO_PINS.asks_for_pipeline


def test_every_field_that_takes_one_value_is_in_the_table() -> None:
    assert [field.name for field in fields(Pins)] == [*PIN_NAMES, "placements", "stages"]
    assert len(set(PIN_NAMES)) == len(TABLE)


def test_the_page_lists_every_pin() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| pin \| meaning \|\n\| --- \| --- \|\n((?:\|.*\|\n)+)", page, flags=re.MULTILINE)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    plain = [tuple(cell.strip().replace("`", "").replace("\\|", "|") for cell in row) for row in rows]
    assert plain == list(describe_pins())


def test_the_command_line_knows_pins_without_what_is_slow_to_import() -> None:
    script = "import sys, autopar.cli; print(*({'torch', 'numpy', 'ortools', 'autopar.search'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
