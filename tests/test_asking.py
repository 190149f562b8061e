"""Questions on the command line: what is printed and written, and which messages end a question that can't be asked."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import autopar
from autopar.cli.asking import CHANGES, _name_model, read_changes, split_choices
from autopar.errors import InputError
from autopar.plans import Plan, Request
from tests.commands import NET, refuse, run
from tests.plans import make_plan

MODEL = (
    NET
    + """


def build(batch=64):
    return Net(WIDTH), (torch.randn(batch, WIDTH),)
"""
)


def write_model(folder: Path, width: int = 32) -> None:
    (folder / "tiny.py").write_text(MODEL.replace("WIDTH", str(width)), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of ``tiny.py:build``, a path relative to the folder that commands are run in."""
    write_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("plan", "tiny.py:build", "--cluster", "4xcpu", "--batch", "64", "-o", "plan.json").exit_code == 0
    return Path("plan.json")


def test_an_empty_text_is_answered_as_the_question_it_is(saved: Path) -> None:
    assert refuse("explain", saved, "--why-not", "").startswith("unknown pin ''")
    assert refuse("explain", saved, "--what-if", "").startswith("'' changes nothing that is known")


def test_a_plan_holds_what_the_command_line_was_given(saved: Path) -> None:
    options = ["--batch", "128", "--memory", "1GB", "--precision", "mixed", "--pin", "tp=2", "--pin", "up=tp:o", "--strict"]
    assert run("plan", "tiny.py:build", "--cluster", " 4xcpu", *options, "-o", "other.json").exit_code == 0
    request = Plan.load("other.json").request
    assert (request.model, request.batch, request.seq, request.dtype, request.cluster) == ("tiny.py:build", 128, None, None, "4xcpu")
    assert (request.memory, request.pins.texts, request.mesh, request.strict) == (10**9, {"tp": "2", "up": "tp:o"}, None, True)
    assert run("plan", "tiny.py:build", "--cluster", "4xcpu", "--mesh", "pp=2,dp=2", "-o", "other.json").exit_code == 0
    assert Plan.load("other.json").request.mesh_sizes == {"pp": 2, "dp": 2}


def test_why_not_prints_and_writes_the_other_plan(saved: Path) -> None:
    result = run("explain", saved, "--why-not", "tp=2,pp=2", "-o", "other.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("tp=2, pp=2 would take ")
    took, written = result.stderr.splitlines()
    assert took.startswith("answered in ")
    assert written == "written to other.json"
    # The answer says how to make the plan, and that makes the same one.
    command = shlex.split(next(line for line in result.stdout.splitlines() if "autopar plan" in line).partition("autopar ")[2])
    assert run(*command, "-o", "fresh.json").exit_code == 0
    assert Path("fresh.json").read_text(encoding="utf-8") == Path("other.json").read_text(encoding="utf-8")
    data = json.loads(run("explain", saved, "--why-not", "tp=2,pp=2", "--json").stdout)
    other = Plan.load("other.json")
    assert data["other"]["seconds"]["step"] == other.seconds.step
    assert data["other"]["memory_bytes"]["total"] == other.memory.total
    assert (data["feasible"], data["other"]["mesh"]["pp"]) == (True, 2)
    # The written plan can be asked in its turn.
    assert run("explain", "other.json", "--why-not", "pp=1,dp=2").stdout.startswith("dp=2, pp=1 would take ")


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("batch=128", ["--cluster", "4xcpu", "--batch", "128"]),
        ("cluster=8xH200,precision=mixed", ["--cluster", "8xH200", "--batch", "64", "--precision", "mixed"]),
        ("memory=1GB", ["--cluster", "4xcpu", "--batch", "64", "--memory", "1GB"]),
    ],
)
def test_what_if_equals_a_fresh_plan(saved: Path, change: str, options: list[str]) -> None:
    result = run("explain", saved, "--what-if", change, "-o", "other.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{change.replace(',', ', ')} would take ")
    assert run("plan", "tiny.py:build", *options, "-o", "fresh.json").exit_code == 0
    assert Plan.load("other.json") == Plan.load("fresh.json")


def test_the_frontier_is_printed_and_drawn(saved: Path) -> None:
    result = run("explain", saved, "--frontier", "memory", "-o", "frontier.svg")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Step time over memory per device: Net on 1x4xcpu\n")
    assert Path("frontier.svg").read_text(encoding="utf-8").startswith("<svg ")
    assert result.stderr.splitlines()[-1] == "written to frontier.svg"
    result = run("explain", saved, "--frontier", "memory", "--json", "-o", "fastest.json")
    fastest = Plan.load("fastest.json")
    assert json.loads(result.stdout)["points"][0]["seconds"]["step"] == fastest.seconds.step
    assert fastest.proof.objective_ns <= Plan.load(saved).proof.objective_ns


def test_what_does_not_fit_is_an_answer_with_the_code_of_no_plan(saved: Path) -> None:
    result = run("explain", saved, "--what-if", "memory=1kB", "-o", "other.json")
    assert result.exit_code == 1
    assert result.stdout.startswith("memory=1kB can't be had: no plan fits: the leanest found needs ")
    assert result.stderr.splitlines()[-1] == "nothing is written to other.json: there is no plan"
    assert not Path("other.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--why-not", "tp=3"], "pins tp=3 need a multiple of 3 ranks, the cluster 1x4xcpu has 4"),
        (["--why-not", "tq=3"], "unknown pin 'tq'"),
        (["--why-not", "tp"], "pin 'tp' has no value; write tp=N"),
        (["--why-not", "tp=2,tp=4"], "pin 'tp' is given twice"),
        (["--why-not", "dp=1,zero=3"], "but dp is pinned to 1"),
        (["--what-if", "betch=3"], "'betch=3' changes nothing that is known; write NAME=VALUE, where NAME is one of batch, seq"),
        (["--what-if", "batch=0"], "batch=0: a whole number from 1 is needed"),
        (["--what-if", "batch=1,batch=2"], "batch is changed twice"),
        (["--what-if", "seq=4"], "takes no argument seq"),
        (["--what-if", "cluster=8xH101"], "no machine is called 'H101'"),
        (["--what-if", "memory=lots"], "'lots' is no size of memory"),
        (["--what-if", "precision=fp7"], "precision='fp7' is unknown"),
        (["--what-if", "dtype=int8"], "dtype 'int8' isn't known"),
        (["--why-not", "tp=2", "--what-if", "batch=2"], "--why-not and --what-if are 2 questions"),
        (["--why-not", "tp=2", "--layer", "up"], "leave out --layer"),
        (["--what-if", "batch=2", "--ops", "--all"], "--what-if is about the whole plan; leave out --ops and --all"),
        (["--model", "tiny.py:build"], "--model is for a question"),
        (["-o", "x.json"], "-o is for a question"),
        (["--frontier", "memory", "-o", "x.png"], "name a file that ends in .svg"),
        (["--why-not", "tp=2", "-o", "absent/x.json"], "can't be written: there is no folder"),
        (["--why-not", "tp=2", "--model", "absent.py:build"], "absent.py doesn't exist"),
    ],
)
def test_questions_that_cannot_be_asked(saved: Path, options: list[str], message: str) -> None:
    assert message in refuse("explain", saved, *options)


def test_a_model_that_has_changed_is_refused(saved: Path) -> None:
    write_model(Path(), width=48)
    for options in (["--why-not", "tp=2"], ["--what-if", "batch=128"], ["--what-if", "memory=1GB"], ["--frontier", "memory"]):
        assert "the plan was made for another model: Net with fingerprint" in refuse("explain", saved, *options)
    Path("tiny.py").rename("moved.py")
    assert "tiny.py doesn't exist" in refuse("explain", saved, "--why-not", "tp=2")
    write_model(Path())
    Path("tiny.py").rename("moved.py")
    assert run("explain", saved, "--why-not", "tp=2", "--model", "moved.py:build").exit_code == 0


def test_a_plan_from_python_needs_the_model(saved: Path) -> None:
    from autopar.cli.models import load_model

    loaded = load_model("tiny.py:build")
    autopar.plan(loaded.model, loaded.example_inputs, "4xcpu", pins={"prefetch": 0}).save("python.json")
    message = refuse("explain", "python.json", "--why-not", "tp=2")
    assert message.startswith("python.json doesn't name its model, since it was planned in Python: give --model hf:CONFIG")
    result = run("explain", "python.json", "--why-not", "tp=2", "--model", "tiny.py:build", "-o", "other.json")
    assert result.exit_code == 0, result.output
    assert Plan.load("other.json").request.pins.texts == {"tp": "2", "prefetch": "0"}


def test_sizes_of_a_plan_from_python_are_those_of_its_inputs(saved: Path) -> None:
    """So that an ``hf:`` model is made for the batch that the plan was made for."""
    plan = make_plan()
    unnamed = replace(plan, request=Request())
    assert _name_model(saved, unnamed, "hf:gpt2") == Request(model="hf:gpt2", batch=8, seq=128)
    assert _name_model(saved, unnamed, "m.py:f") == Request(model="m.py:f")
    images = replace(unnamed, inputs={"pixel_values": "float32[4, 3, 224, 224]", "labels": "int64[4]"})
    assert _name_model(saved, images, "hf:vit") == Request(model="hf:vit", batch=4)
    assert _name_model(saved, plan, "hf:other").batch == plan.request.batch


def test_texts_of_questions_are_read() -> None:
    assert split_choices("tp=8, layers.3=pp:1,tp:o ,pp=4") == ["tp=8", "layers.3=pp:1,tp:o", "pp=4"]
    assert read_changes("batch=8, precision=param_dtype=bfloat16,reduce_dtype=float32") == {
        "batch": "8",
        "precision": "param_dtype=bfloat16,reduce_dtype=float32",
    }
    assert set(CHANGES) == {"batch", "seq", "dtype", "cluster", "memory", "precision"}
    for text in ("", "batch", "batch=", "=3"):
        with pytest.raises(InputError, match="changes nothing that is known"):
            read_changes(text)
