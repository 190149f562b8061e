"""Composite operators without a rule, taken apart where what they are made of has rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.capture import capture
from autopar.ir.graph import OpKind
from autopar.rules import find_spaces
from autopar.rules.table import RULES

torch.set_num_threads(1)


class Compare(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(self.linear(x), y)


def example() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.randn(8, 6)


def targets(model: nn.Module) -> list[str]:
    graph = capture(model, example()).graph
    return [op.target for op in graph.of_kind(OpKind.CALL)]


COMPOSITE = {
    "outer": lambda x, y: torch.outer(x[:, 0], y[0]).sum(),
    "tensordot": lambda x, y: torch.tensordot(x, y, [[1], [1]]).square().sum(),
    "cosine_embedding_loss": lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(8)),
    "margin_ranking_loss": lambda x, y: F.margin_ranking_loss(x, y, torch.ones(8, 6)),
    "triplet_margin_loss": lambda x, y: F.triplet_margin_loss(x, y, x * y),
    "hstack": lambda x, y: torch.hstack([x, y]).square().sum(),
    "tensor_split": lambda x, y: torch.tensor_split(x, 3, 1)[1].square().sum(),
    "aliases": lambda x, y: (x.absolute().arctan() + x.true_divide(y)).moveaxis(0, 1).square().sum(),
    "rfft": lambda x, y: torch.fft.rfft(x).abs().sum(),
    "nanmean": lambda x, y: x.nanmean(),
    "pairwise_distance": lambda x, y: F.pairwise_distance(x, y).sum(),
}


@pytest.mark.parametrize("name", COMPOSITE)
def test_composite_operators_are_planned_by_the_rules_of_their_parts(name: str) -> None:
    model = Compare(COMPOSITE[name])
    graph = capture(model, example()).graph
    assert find_spaces(graph)[1] == ()
    autopar.verify(model, example(), cluster="2xcpu", pins={"dp": 2}).check()


def test_parts_have_the_line_of_the_whole() -> None:
    graph = capture(Compare(COMPOSITE["cosine_embedding_loss"]), example()).graph
    assert all("self.function(self.linear(x), y)" in op.source for op in graph.of_kind(OpKind.CALL))


@pytest.mark.parametrize("drop", [F.alpha_dropout, F.feature_alpha_dropout])
def test_composite_dropouts_draw_by_operators_with_rules(drop: Callable[..., Tensor]) -> None:
    assert "aten.bernoulli.p" in targets(Compare(lambda x, y: drop(x, 0.5, True).sum()))
    assert targets(Compare(lambda x, y: drop(x, 0.5, False).sum())) == ["aten.linear.default", "aten.sum.default"]


def test_what_has_another_backward_than_its_parts_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's cosine similarity clamps norms without a gradient, which its parts alone don't show."""
    monkeypatch.delitem(RULES, "aten.cosine_similarity.default")
    assert "aten.cosine_similarity.default" in targets(Compare(lambda x, y: F.cosine_similarity(x, y).sum()))


def test_what_isnt_composite_or_has_parts_without_rules_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "aten.block_diag.default" in targets(Compare(lambda x, y: torch.block_diag(x, y).sum()))
    monkeypatch.delitem(RULES, "aten.norm.ScalarOpt_dim")
    assert "aten.pairwise_distance.default" in targets(Compare(COMPOSITE["pairwise_distance"]))


def test_like_calls_are_taken_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    import autopar.capture.decompose as decompose

    trace = decompose._trace
    monkeypatch.setattr(decompose, "_trace", lambda node, *rest: traced.append(node.name) or trace(node, *rest))
    targets(Compare(lambda x, y: sum(torch.outer(x[:, 0], y[0]) for _ in range(4)).sum()))  # type: ignore[union-attr]
    assert len(traced) == 1


class AsksForTypes(Compare):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.function(self.linear(x), y)
        return z.to(torch.promote_types(x.dtype, torch.float64)).to(torch.result_type(x, 2.0)) if torch.can_cast(x.dtype, y.dtype) else z


def test_questions_about_types_are_no_calls() -> None:
    found = targets(AsksForTypes(lambda x, y: x))
    assert found == ["aten.linear.default", "aten.to.dtype", "aten.to.dtype"]
