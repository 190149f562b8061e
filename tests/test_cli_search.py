"""The command line from a model to a plan and its proof of exactness; every bad input ends in one message."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autopar.plans.plan import Plan, from_json
from autopar.report import summarize
from tests.commands import NET, refuse, run

MODELS = (
    NET
    + """


class Branching(Net):
    def forward(self, x):
        if x.sum() > 0:
            return self.up(x).mean()
        return self.down(self.up(x)).mean()


def build(batch=8, dtype="float64"):
    return Net(16).to(getattr(torch, dtype)), (torch.randn(batch, 16, dtype=getattr(torch, dtype)),)


def build_wider():
    return Net(32).double(), (torch.randn(8, 32, dtype=torch.float64),)


class Deep(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(Net(width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer.down(torch.relu(layer.up(x)))
        return x.square().mean()


def build_deep():
    return Deep(16, 4).double(), (torch.randn(8, 16, dtype=torch.float64),)


def build_branching():
    return Branching(16), (torch.randn(8, 16),)
"""
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(MODELS, encoding="utf-8")
    return path


@pytest.fixture
def saved(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    result = run("plan", f"{models}:build", "--cluster", "4xcpu", "--pin", "tp=2", "-o", path)
    assert result.exit_code == 0, result.output
    return path


def test_plan_prints_a_summary(models: Path, tmp_path: Path) -> None:
    result = run("plan", f"{models}:build", "--cluster", "4xcpu", "--batch", "16", "-o", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    plan = Plan.load(tmp_path / "plan.json")
    assert result.stdout == summarize(plan) + "\n"
    assert plan.mesh.world_size == 4
    assert any("[16, 16]" in kind for kind in plan.inputs.values())
    # Not a terminal: how long it took, where the file is, and nothing of the progress of a search of less than ten seconds.
    took, written = result.stderr.splitlines()
    assert re.fullmatch(r"planned in [0-9.]+ m?s", took)
    assert written == f"written to {tmp_path / 'plan.json'}; `autopar explain {tmp_path / 'plan.json'}` shows all of it"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_plan_that_cannot_be_written_is_printed(models: Path) -> None:
    result = run("plan", f"{models}:build", "--cluster", "1xcpu", "-o", "/dev/full")
    assert result.exit_code == 2
    summary, _, text = result.stdout.partition("{")
    assert "proof " in summary
    assert from_json("{" + text).world_size == 1
    assert result.stderr.endswith("\nerror: /dev/full can't be written: No space left on device; the plan's text is printed instead\n")


def test_plan_for_programs(models: Path) -> None:
    result = run("plan", f"{models}:build", "--cluster", "4xcpu", "--mesh", "dp=2,tp=2", "--json")
    assert result.exit_code == 0, result.output
    plan = from_json(result.stdout)
    assert (plan.mesh.names, plan.mesh.sizes) == (("dp", "tp"), (2, 2))


def test_a_pinned_size_is_in_the_plan(saved: Path) -> None:
    plan = Plan.load(saved)
    assert dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True))["tp"] == 2


def test_explain_shows_the_plans_costs(saved: Path) -> None:
    result = run("explain", saved, "--all")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{Plan.load(saved).proof.objective_ns:,} ns" in result.stdout
    data = json.loads(run("explain", saved, "--json").stdout)
    assert data["seconds"]["step"] == Plan.load(saved).seconds.step


def test_verify_searches_and_checks(models: Path) -> None:
    result = run("verify", f"{models}:build", "--ranks", "4", "--pin", "tp=2", "--pin", "dp=2")
    assert result.exit_code == 0, result.output
    # The loss and the gradients of two weights and two biases.
    assert result.stdout.startswith("ok: 5 outputs and gradients compared, 4 ranks")
    assert "splits: " in result.stdout
    assert result.stderr == ""


def test_verify_checks_a_saved_plan(models: Path, saved: Path) -> None:
    result = run("verify", f"{models}:build", "--plan", saved, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert len(data["errors"]) == 5
    assert all(error <= data["tolerance"] for error in data["errors"].values())
    assert data["mesh"]["tp"] == 2


def test_verify_fails_over_the_tolerance(models: Path, saved: Path) -> None:
    # Sums in another order differ in the last digits, so that nothing but zero error passes this.
    result = run("verify", f"{models}:build", "--plan", saved, "--tolerance", "1e-300")
    assert result.exit_code == 1
    assert result.stdout.startswith("FAILED: 5 outputs and gradients compared")
    assert re.search(r"^error: plan on .* disagrees with the model \(tolerance 1e-300\):\n  .*: relative error", result.stderr)


def test_a_plan_of_another_model_is_refused(models: Path, saved: Path) -> None:
    message = refuse("verify", f"{models}:build_wider", "--plan", saved)
    assert "model" in message


def test_a_batch_that_no_axis_divides_is_refused(models: Path) -> None:
    message = refuse("plan", f"{models}:build", "--cluster", "4xcpu", "--batch", "7", "--pin", "dp=4")
    assert "7" in message
    assert "dp=4" in message


def test_pins_that_do_not_fit_the_cluster_are_refused(models: Path) -> None:
    assert "tp=3" in refuse("plan", f"{models}:build", "--cluster", "4xcpu", "--pin", "tp=3")


def test_a_mesh_of_another_size_is_refused(models: Path) -> None:
    message = refuse("plan", f"{models}:build", "--cluster", "4xcpu", "--mesh", "dp=8")
    assert "8 ranks" in message
    assert "has 4" in message


def test_a_model_that_cannot_be_captured_names_the_line(models: Path) -> None:
    line = MODELS.splitlines().index("        if x.sum() > 0:") + 1
    message = refuse("plan", f"{models}:build_branching", "--cluster", "4xcpu")
    assert f"tiny.py:{line}" in message


def test_a_model_that_cannot_be_loaded_is_refused(models: Path) -> None:
    message = refuse("plan", f"{models}:bild", "--cluster", "4xcpu")
    assert "has no function 'bild': it has build, build_branching, build_deep, build_wider" in message
    assert "takes no argument seq" in refuse("plan", f"{models}:build", "--cluster", "4xcpu", "--seq", "8")
    assert "doesn't exist" in refuse("verify", f"hf:{models.parent / 'absent'}")


def test_too_little_memory_is_infeasible(models: Path) -> None:
    message = refuse("plan", f"{models}:build", "--cluster", "4xcpu", "--memory", "10kB", code=1)
    assert "no plan fits: the leanest found needs" in message
    assert "10.0 kB are there" in message
    assert "reserved of 1000000;" in refuse("plan", f"{models}:build", "--cluster", "4xH100", "--memory", "1MB", code=1)


PIPELINE = ("--pin", "pp=2", "--pin", "schedule=1f1b", "--pin", "microbatches=4", "--pin", "recompute=full")


def test_a_pinned_pipeline_is_planned_explained_and_verified(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.json"
    result = run("plan", f"{models}:build_deep", "--cluster", "4xcpu", *PIPELINE, "--pin", "layers.1=pp:1", "-o", path)
    assert result.exit_code == 0, result.output
    plan = Plan.load(path)
    pipeline = plan.pipeline
    assert (pipeline.ranks, pipeline.schedule, pipeline.chunks, pipeline.microbatches) == (2, "1f1b", 1, 4)
    assert [(block.name, block.stage) for block in pipeline.blocks] == [
        ("layers.0", 0),
        *((f"layers.{number}", 1) for number in (1, 2, 3)),
        ("mean", 1),
    ]
    assert {block.recompute for block in pipeline.blocks} == {"full"}
    assert (plan.world_size, plan.mesh.world_size) == (4, 2)
    assert "stages  2 on 2 pipeline ranks of 2 devices; schedule 1f1b, 4 micro-batches" in result.stdout
    assert "(full in 5 of 5 blocks)" in result.stdout

    shown = run("explain", path, "--all")
    assert (shown.exit_code, shown.stderr) == (0, "")
    rows = [line.split() for line in shown.stdout.splitlines() if line.strip().endswith("full")]
    assert rows == [["0", "0-1", "0", "layers.0", "1", "full"], ["1", "2-3", "1", "layers.1", "to", "mean", "4", "full"]]

    checked = run("verify", f"{models}:build_deep", "--plan", path, "--ranks", "4")
    assert checked.exit_code == 0, checked.output
    # The loss and the gradients of four times two weights and two biases.
    assert checked.stdout.startswith("ok: 17 outputs and gradients compared, 4 ranks (pp=2 x ")
    assert "stages: 2 on 2 pipeline ranks of 2 devices; schedule 1f1b, 4 micro-batches" in checked.stdout
    assert "--ranks says 2" in refuse("verify", f"{models}:build_deep", "--plan", path, "--ranks", "2")


def test_verify_searches_for_a_pipeline(models: Path) -> None:
    result = run("verify", f"{models}:build_deep", "--ranks", "2", "--pin", "pp=2", "--pin", "schedule=zb-v", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert (data["world_size"], data["pipeline"]["ranks"], data["pipeline"]["schedule"], data["pipeline"]["chunks"]) == (2, 2, "zb-v", 2)
    text = run("verify", f"{models}:build_deep", "--ranks", "2", "--pin", "pp=2", "--pin", "microbatches=2").stdout
    assert "splits: none, every pipeline rank runs its stages whole" in text


def test_a_mesh_may_have_a_pipeline(models: Path) -> None:
    result = run("plan", f"{models}:build_deep", "--cluster", "4xcpu", "--mesh", "pp=2,tp=2", "--json")
    assert result.exit_code == 0, result.output
    plan = from_json(result.stdout)
    assert (plan.pipeline.ranks, plan.mesh.names, plan.mesh.sizes) == (2, ("tp",), (2,))


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (["pp=3"], "pin pp=3 needs a multiple of 3 ranks, the cluster 1x4xcpu has 4"),
        (["pp=4", "chunks=2"], "pins pp=4, chunks=2 make 8 stages, but the model can be cut into 5 blocks at most (layers.0, layers.1"),
        (["microbatches=3"], "the pins microbatches=3 can't be had"),
        (["pp=2", "encoder.3=pp:1"], "pin 'encoder.3' puts no block on stage 1; the blocks are layers.0, layers.1"),
        (["pp=2", "layers.1=pp:5"], "block 'layers.1' is pinned to stage 5; the stages are 0 to 1"),
    ],
)
def test_pipelines_that_cannot_be_had_are_refused(models: Path, pins: list[str], message: str) -> None:
    given = [word for pin in pins for word in ("--pin", pin)]
    assert message in refuse("plan", f"{models}:build_deep", "--cluster", "4xcpu", *given)


def test_stages_that_no_order_of_blocks_has_are_infeasible(models: Path) -> None:
    pins = ("--pin", "pp=2", "--pin", "layers.1=pp:1", "--pin", "layers.2=pp:0")
    message = refuse("plan", f"{models}:build_deep", "--cluster", "4xcpu", *pins, code=1)
    assert "block 'layers.2' is pinned to stage 0, block 'layers.1' before it to stage 1; stages are in order" in message


def test_a_pipeline_without_the_memory_is_infeasible(models: Path) -> None:
    message = refuse("plan", f"{models}:build_deep", "--cluster", "4xcpu", "--memory", "10kB", "--pin", "pp=2", code=1)
    assert "no plan fits: the leanest found needs" in message
