"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from autopar.cli.commands import main
from autopar.errors import InputError
from autopar.plans import CostRow, Request
from autopar.plans.pins import PIN_NAMES, parse_mesh
from autopar.plans.plan import (
    RECOMPUTE,
    VERSION,
    BlockChoice,
    Candidate,
    Group,
    Memory,
    Pipeline,
    Plan,
    Proof,
    Unruled,
    to_json,
)
from autopar.report import to_data
from autopar.schedules.families import SCHEDULES
from tests.commands import refuse, run
from tests.plans import make_pipelined_plan, make_plan

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    return path


@pytest.mark.parametrize("command", ["plan", "explain", "draw", "verify", "machines"])
def test_help_teaches(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    autopar {command}" in result.stdout
    if command in ("plan", "verify"):
        assert "MODEL is one of" in result.stdout
        assert "package.module:function" in result.stdout
    assert "--help" in run("--help").stdout
    assert command in run("--help").stdout
    assert "Exit codes: 0 done, 1 no plan exists or the verification failed, 2 bad" in run("--help").stdout


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "autopar,")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "autopar", "explain", "absent.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: absent.json: can't be read")
    assert done.stdout == ""


def test_explain(saved: Path) -> None:
    result = run("explain", saved)
    assert (result.exit_code, result.stderr) == (0, "")
    for words in ("GPT2LMHeadModel", "budget 80.0 GB", "model.py:12: y = x[0].foo()", "docs/concepts.md#glossary"):
        assert words in result.stdout
    assert "What each axis of the mesh splits" not in result.stdout
    assert "What each axis of the mesh splits" in run("explain", saved, "--all").stdout
    assert "Ops of transformer.h.*, its 12 layers together" in run("explain", saved, "--ops").stdout


def test_explain_for_programs(saved: Path) -> None:
    assert json.loads(run("explain", saved, "--json").stdout) == json.loads(json.dumps(to_data(make_plan())))


def test_explain_a_layer(saved: Path) -> None:
    result = run("explain", saved, "--layer", "transformer.h.1.mlp")
    assert result.exit_code == 0
    assert "transformer.h.0.mlp.c_fc.weight" in result.stdout
    assert "outside of layers" not in result.stdout
    assert list(json.loads(run("explain", saved, "--layer", "transformer.h.1.mlp", "--json").stdout)["layouts"]) == [
        "transformer.h.0.mlp.c_fc.weight"
    ]
    assert "no layer of this plan matches 'decoder'" in refuse("explain", saved, "--layer", "decoder")


def test_explain_a_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_pipelined_plan().save(path)
    result = run("explain", path, "--all")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Stages: 4 on 2 pipeline ranks of 8 devices, 2 on each; schedule interleaved, 4 micro-batches" in result.stdout
    data = json.loads(run("explain", path, "--json").stdout)
    assert data == json.loads(json.dumps(to_data(make_pipelined_plan())))
    assert (data["world_size"], data["pipeline"]["schedule"], data["pipeline"]["blocks"][-1]["pipeline_rank"]) == (16, "interleaved", 1)
    layer = json.loads(run("explain", path, "--layer", "transformer.h.11", "--json").stdout)
    assert layer["pipeline"]["blocks"] == [
        {"name": "transformer.h.11", "path": "transformer.h.11", "stage": 3, "recompute": "full", "pipeline_rank": 1}
    ]


def test_plans_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(to_json(make_plan())[:500], encoding="utf-8")
    assert "was the file cut off?" in refuse("explain", path)
    path.write_text(json.dumps({**json.loads(to_json(make_plan())), "version": VERSION + 1}), encoding="utf-8")
    assert f"plan version {VERSION + 1}, this autopar reads version {VERSION}" in refuse("explain", path)
    path.write_text("[]", encoding="utf-8")
    assert "not an autopar plan" in refuse("explain", path)
    assert "can't be read" in refuse("explain", tmp_path / "absent.json")
    assert "can't be read" in refuse("explain", tmp_path)
    assert "not an autopar plan" in refuse("verify", "m.py:f", "--plan", path)


def test_machines() -> None:
    result = run("machines")
    assert result.exit_code == 0
    assert "989 TFLOP/s bfloat16" in result.stdout
    assert "NVIDIA H100 datasheet" in result.stdout
    listed = {machine["name"]: machine for machine in json.loads(run("machines", "--json").stdout)}
    assert listed["h100"]["device"]["mem_bandwidth_bytes_per_s"] == 3.35e12
    assert all(machine["sources"] for machine in listed.values())


def test_an_unknown_machine_is_refused_with_what_is_close() -> None:
    message = refuse("plan", "m.py:f", "--cluster", "8xH101")
    assert "no machine is called 'H101'. Did you mean h100" in message
    assert "h200" in message


@pytest.mark.parametrize("cluster", ["", "0xH100", "9xH100", "8x./absent.toml"])
def test_what_is_no_cluster_is_refused(cluster: str) -> None:
    assert refuse("plan", "m.py:f", "--cluster", cluster)


def test_a_memory_that_is_no_size_is_refused() -> None:
    assert "'lots' is no size of memory" in refuse("plan", "m.py:f", "--cluster", "8xH100", "--memory", "lots")


def test_a_memory_below_what_the_device_takes_is_infeasible() -> None:
    message = refuse("plan", "m.py:f", "--cluster", "8xH100", "--memory", "1MB", code=1)
    assert "reserved of 1000000" in message
    assert "give the unit" not in message
    assert "give the unit, such as 80GB" in refuse("plan", "m.py:f", "--cluster", "8xH100", "--memory", "80", code=1)


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ("zp=2", f"unknown pin 'zp'; known are {', '.join(PIN_NAMES)}"),
        ("ep=2", "pin 'ep' is not supported yet; this version pins dp, tp, cp, pp, fsdp"),
        ("ep=tp:2", "pin 'ep' is not supported yet"),
        ("pp=0", "pin pp=0: an integer from 1 is needed"),
        ("pp=two", "pin pp='two': an integer from 1 is needed"),
        ("pp=true", "pin pp=True: an integer from 1 is needed"),
        ("pp=tp:2", "pin pp='tp:2': an integer from 1 is needed"),
        ("microbatches=-4", "pin microbatches='-4': an integer from 1 is needed"),
        ("chunks=0", "pin chunks=0: an integer from 1 is needed"),
        ("schedule=2f2b", f"pin schedule='2f2b' is unknown; there are {', '.join(SCHEDULES)}"),
        ("schedule", "pin 'schedule' has no value; write schedule=NAME: the pipeline's schedule: gpipe, 1f1b"),
        ("recompute", "pin 'recompute' has no value; write recompute=KIND: what of every block the backward runs again: none, selective"),
        ("recompute=half", "pin recompute='half' is unknown; there are none, selective, full"),
        ("layers.3=pp:x", "pin 'layers.3': pp='x' isn't the number of a stage"),
        ("layers.3=pp:-1", "pin 'layers.3': pp='-1' isn't the number of a stage"),
        ("layers.3=pp:", "'pp:' in pin 'layers.3=pp:' is no choice for a module; write pp:STAGE or AXIS:LOOP"),
        ("layers.3=:2", "':2' in pin 'layers.3=:2' is no choice"),
        ("layers.3=pp:2,tp", "'tp' in pin 'layers.3=pp:2,tp' is no choice"),
        ("layers.3=pp:2,pp:3", "pin 'layers.3=pp:2,pp:3' names the axis 'pp' twice"),
        ("layers.3=2", "globs of module paths, whose choices are pp:STAGE or AXIS:LOOP"),
        ("offload=true", "pin 'offload' is not supported yet"),
        ("attention=flash", "pin attention='flash' is unknown; there are ring, ulysses, gather"),
        ("tp", "pin 'tp' has no value; write tp=N: ranks that split features"),
        ("tp=", "pin 'tp=' has no value"),
        ("TP=8", "unknown pin 'TP'; did you mean tp? Known are"),
        ("tensor=8", "unknown pin 'tensor'; did you mean tp?"),
        ("data_parallel_size=8", "unknown pin 'data_parallel_size'; did you mean dp?"),
        ("microbatch=4", "unknown pin 'microbatch'; did you mean microbatches?"),
        ("tp=0", "pin tp=0: the size of an axis"),
        ("tp=-1", "pin tp='-1': the size of an axis"),
        ("tp=two", "pin tp='two': the size of an axis"),
        ("tp=²", "pin tp='²': the size of an axis"),
        ("tp=true", "pin tp=True: the size of an axis"),
        ("fsdp=2", "pin fsdp=2: true or false is needed"),
        ("fsdp", "pin 'fsdp' has no value; write fsdp=true|false"),
        ("=2", "unknown pin ''"),
    ],
)
def test_pins_that_cannot_be_used(pin: str, message: str) -> None:
    assert message in refuse("plan", "m.py:f", "--cluster", "8xH100", "--pin", pin)
    assert message in refuse("verify", "m.py:f", "--pin", pin)


def test_every_pin_is_in_the_help() -> None:
    for command in ("plan", "verify"):
        text = run(command, "--help").stdout
        assert all(f"{name}=" in text for name in PIN_NAMES)
        assert all(name in text for name in (*SCHEDULES, *RECOMPUTE))


@pytest.mark.parametrize("model", ["m.py:f", "hf:absent"])
def test_a_type_that_contradicts_the_precision_is_refused_before_the_model_is_read(model: str) -> None:
    message = "--precision mixed stores parameters as float32, --dtype says bfloat16: leave out --dtype, or --dtype float32"
    assert refuse("plan", model, "--cluster", "8xH100", "--precision", "mixed", "--dtype", "bf16") == message
    assert refuse("verify", model, "--precision", "mixed", "--dtype", "bfloat16") == message
    assert "doesn't exist" in refuse("plan", model, "--cluster", "8xH100", "--precision", "mixed", "--dtype", "fp32")


def test_a_function_gets_no_type_that_the_user_did_not_give() -> None:
    assert run("plan", f"{EXAMPLES / 'mlp.py'}:build", "--cluster", "2xA100", "--precision", "mixed").exit_code == 0


def test_meshes_are_read() -> None:
    assert list(parse_mesh("dp=4, tp=2").items()) == [("dp", 4), ("tp", 2)]
    for text, message in [
        ("dp", "'dp' in mesh 'dp' is no axis"),
        ("", "is no axis"),
        ("4x2", "'4x2' in mesh '4x2' is no axis; write axes as name=size, such as dp=4,tp=2"),
        ("dp=4,", "'' in mesh 'dp=4,' is no axis"),
        ("dp=4,dp=2", "names the axis 'dp' twice"),
        ("dp=none", "mesh 'dp=none': dp=none is no size of an axis"),
        (f"dp={'9' * 5000}", "is no size of an axis"),
    ]:
        with pytest.raises(InputError) as caught:
            parse_mesh(text)
        assert message in str(caught.value)
    assert "is no axis" in refuse("plan", "m.py:f", "--cluster", "8xH100", "--mesh", "8")


def test_an_output_that_cannot_be_written_is_refused_before_the_search(tmp_path: Path) -> None:
    message = refuse("plan", "m.py:f", "--cluster", "8xH100", "-o", tmp_path / "absent" / "plan.json")
    assert "can't be written: there is no folder" in message
    message = refuse("plan", "m.py:f", "--cluster", "8xH100", "-o", tmp_path)
    assert "can't be written: it is a folder" in message


def test_what_contradicts_a_plan_is_refused(saved: Path) -> None:
    assert "is a plan for 8 ranks (dp=2 x tp=4), --ranks says 4" in refuse("verify", "m.py:f", "--plan", saved, "--ranks", "4")
    make_pipelined_plan().save(saved)
    message = refuse("verify", "m.py:f", "--plan", saved, "--ranks", "8")
    assert "is a plan for 16 ranks (pp=2 x dp=2 x tp=4), --ranks says 8" in message
    assert "leave out --pin or --plan" in refuse("verify", "m.py:f", "--plan", saved, "--pin", "tp=2")


@pytest.mark.parametrize("arguments", [["plan", "m.py:f"], ["nothing"], ["explain"], ["verify", "m.py:f", "--ranks", "0"]])
def test_usage_errors_have_the_code_of_bad_input(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


def _read_page(name: str) -> str:
    return (Path(__file__).parent.parent / "docs" / name).read_text(encoding="utf-8")


def test_every_option_is_on_the_page() -> None:
    page = _read_page("cli.md")
    for name, command in main.commands.items():
        assert f"autopar {name}" in page
        for option in command.params:
            if isinstance(option, click.Option):
                assert any(word in page for word in option.opts), f"{name} {option.opts}"


def test_every_field_of_a_plan_is_on_the_page() -> None:
    page = _read_page("plan-format.md")
    for kind in (Plan, Pipeline, BlockChoice, CostRow, Memory, Group, Proof, Candidate, Unruled, Request):
        for part in fields(kind):
            assert f"`{part.name}`" in page, f"{kind.__name__}.{part.name}"
