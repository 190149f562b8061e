"""The examples: their data is the same everywhere, and the demo's verdict can be a refusal."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.cli.models import load_model
from tests.commands import refuse, run

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "train_gpt2.py"))


def test_every_process_draws_the_same_batches(demo: dict[str, Any]) -> None:
    tokens = demo["read_text"]()
    assert len(tokens) == demo["TEXT_BYTES"]
    torch.manual_seed(1)
    first = list(demo["draw_batches"](tokens, 3))
    torch.manual_seed(2)
    second = list(demo["draw_batches"](tokens, 3))
    assert [batch["input_ids"].shape for batch in first] == [(demo["BATCH"], demo["SEQ"])] * 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])


def test_the_demo_model_is_the_same_in_every_process(demo: dict[str, Any]) -> None:
    one, two = demo["build_model"](), demo["build_model"]()
    assert 3e6 < sum(parameter.numel() for parameter in one.parameters()) < 3.5e6
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("losses", "loss_difference", "norm_difference", "code"),
    [
        ([5.0, 4.0, 3.0], 1e-7, 5e-6, 0),
        ([5.0, 4.0, 3.0], 1e-4, 5e-6, 1),
        ([5.0, 4.0, 3.0], 1e-7, 1e-3, 1),
        ([5.0, 4.0, 4.9], 1e-7, 5e-6, 1),
        ([5.0, 4.0, 3.0], math.nan, 5e-6, 1),
        ([5.0, 4.0, 3.0], 1e-7, math.nan, 1),
    ],
)
def test_the_demo_refuses_a_wrong_run(
    losses: list[float], loss_difference: float, norm_difference: float, code: int, demo: dict[str, Any]
) -> None:
    assert demo["judge"](losses, [0.0, loss_difference, 0.0], [0.0, norm_difference, 0.0]) == code


def test_the_smallest_example_is_a_model_of_the_command_line() -> None:
    loaded = load_model(f"{EXAMPLES / 'mlp.py'}:build", batch=32)
    assert isinstance(loaded.example_inputs, dict)
    loss = loaded.model(**loaded.example_inputs)
    assert loss.shape == ()
    assert 1.5 < loss.item() < 3.5  # near log(10), the loss of a guess


def test_the_example_of_an_operator_of_ones_own_checks_its_rule_and_is_planned_in_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "custom_operator.py"))
    example["check"]()
    assert capsys.readouterr().out == "rule checked: 14 ways to split\n"
    model, batch = example["build"](batch=8)
    autopar.verify(model, batch, cluster="2xcpu", pins={"pp": 2, "microbatches": 2}).check()


def test_the_example_of_a_loss_alone_can_be_computed_in_chunks() -> None:
    sizes = ["--cluster", "2xH100", "--batch", "2", "--seq", "64", "--pin", "loss_chunks=8", "--pin", "dp=2"]
    done = run("plan", f"{EXAMPLES / 'loss_only.py'}:build", *sizes)
    assert (done.exit_code, "its logits are computed in 8 chunks" in done.stdout) == (0, True), done.output
    message = refuse("plan", f"hf:{EXAMPLES / 'configs' / 'gpt2'}", *sizes)
    assert "return the loss alone" in message
    assert message.endswith("; `build` of examples/loss_only.py makes such a model of a configuration")


def test_the_model_of_a_loss_alone_is_stored_as_the_precision_needs() -> None:
    loaded = load_model(f"{EXAMPLES / 'loss_only.py'}:build", batch=2, seq=64, stored_dtype="float32")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    given = load_model(f"{EXAMPLES / 'loss_only.py'}:build", dtype="float16", stored_dtype="float32")
    assert {parameter.dtype for parameter in given.model.parameters()} == {torch.float16}
