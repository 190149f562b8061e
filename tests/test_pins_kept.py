"""Pins are kept or refused: no rank repeats what others do without a word, and heads are split where key/value heads alone don't divide."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import autopar
from autopar.ir import Split, StateKind
from autopar.report import summarize


def grouped(heads: int, groups: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).double()


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("heads", "groups", "pins", "mesh", "loops"),
    [
        (8, 2, {"tp": 8}, "tp=2 x tp2=4", {"g", "r"}),
        (8, 2, {"dp": 2, "tp": 4}, "dp=2 x tp=2 x tp2=2", {"b", "g", "r"}),
        (8, 2, {"pp": 2, "tp": 4, "microbatches": 2}, "tp=2 x tp2=2", {"g", "r"}),
        (12, 3, {"tp": 4}, "tp=4", {"r"}),  # no common divisor: every rank has all key/value heads
        (8, 1, {"tp": 8}, "tp=8", {"r"}),
        (8, 4, {"tp": 4}, "tp=4", {"g"}),
    ],
)
def test_attention_is_split_over_more_ranks_than_there_are_key_value_heads(
    heads: int, groups: int, pins: dict[str, object], mesh: str, loops: set[str]
) -> None:
    model, inputs = grouped(heads, groups), tokens()
    plan = autopar.plan(model, inputs, f"{math.prod(v for k, v in pins.items() if k in ('dp', 'tp', 'pp'))}xcpu", pins=pins)  # type: ignore[misc]
    assert str(plan.mesh) == mesh
    (attention,) = (placement for name, placement in plan.placements.items() if "attention" in name)
    assert {part.loop for part in attention if isinstance(part, Split)} == loops
    assert not any("attention" in work.target for work in plan.repeated)
    assert "repeats" not in summarize(plan)
    autopar.verify(model, inputs, plan).check()


class Wide(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def test_work_that_every_rank_repeats_is_said_in_the_first_lines() -> None:
    plan = autopar.plan(Wide(64, 64, 64), (torch.zeros(8, 64),), "7xH100")
    assert sum(work.share for work in plan.repeated) == pytest.approx(6 / 7)
    assert {work.ranks for work in plan.repeated} == {7}
    lines = summarize(plan).splitlines()
    assert lines[2] == "batch   8 samples, which 7 ranks can't share equally, so no plan splits the batch over all of them"
    assert lines[3] == "repeats 85.7% of the work of all ranks repeats what other ranks do, since nothing of it could be split:"
    assert lines[4].startswith("        layers.0: aten.linear.default and 1 like it on 7 ranks, loops n 8, i 64, o 64 at ")


def test_work_that_could_be_split_is_told_apart() -> None:
    plan = autopar.plan(Wide(8, 8, 8), (torch.zeros(3, 8),), "2xcpu")
    assert plan.repeated
    assert all(work.could_split for work in plan.repeated)
    assert "repeats what other ranks do, since the search found no faster split of it:" in summarize(plan)
    plan = autopar.plan(Wide(64, 64, 63, 64, 64), (torch.zeros(8, 64),), "3xcpu", pins={"tp": 3, "dp": 1})
    assert not any(work.could_split for work in plan.repeated)
    some = replace(plan, repeated=(plan.repeated[0], replace(plan.repeated[0], could_split=True)))
    assert "since nothing of it could be split, or no split that the search found is faster:" in summarize(some)


def test_a_share_that_is_repeated_is_of_all_ranks_work() -> None:
    """Two products of equal work, of which tp=3 divides one: the other is run by three ranks, 2/3 of three quarters of all that is run."""
    plan = autopar.plan(Wide(64, 63, 64), (torch.zeros(8, 64),), "3xcpu", pins={"tp": 3, "dp": 1})
    assert plan.repeated == ()
    plan = autopar.plan(Wide(64, 64, 63, 64, 64), (torch.zeros(8, 64),), "3xcpu", pins={"tp": 3, "dp": 1})
    flops = {"split": 2 * 64 * 63, "whole": 2 * 64 * 64}
    assert sum(work.share for work in plan.repeated) == pytest.approx(2 * flops["whole"] / (flops["split"] + 3 * flops["whole"]))


def test_an_empty_batch_has_no_work_to_share() -> None:
    assert autopar.plan(Wide(64, 64), (torch.zeros(0, 64),), "2xcpu", pins={"dp": 2}).repeated == ()


def test_fsdp_stores_what_no_dim_divides_in_unequal_parts() -> None:
    plan = autopar.plan(Wide(64, 64, 65), (torch.zeros(10, 64),), "5xcpu", pins={"fsdp": True, "dp": 5})
    assert {name: str(layout[0]) for name, layout in plan.layouts.items() if name.startswith("p_")} == {
        "p_layers_0_weight": "S0p",
        "p_layers_0_bias": "S0p",
        "p_layers_1_weight": "S0",
        "p_layers_1_bias": "S0",
    }


def test_fsdp_takes_a_mesh_that_splits_something() -> None:
    plan = autopar.plan(Wide(8, 8), (torch.zeros(12, 8),), "12xcpu", pins={"fsdp": True})
    assert any(state.kind is StateKind.SHARD for state in plan.layouts["p_layers_0_weight"])


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x).sum()


class LooksUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x).sum()


def test_models_without_parameters_or_without_products() -> None:
    assert autopar.plan(Doubled(), (torch.zeros(4, 8),), "2xcpu", pins={"fsdp": True, "dp": 2}).notes == ()
    assert autopar.plan(LooksUp(), (torch.zeros(3, 5, dtype=torch.int64),), "2xcpu").repeated == ()
