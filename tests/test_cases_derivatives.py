"""Training scripts with gradient penalties, ignored labels and indices out of range, on two processes and on one device, in float64.

All loops run in one pair of processes; each is a test of its own, which reads what its loop raised there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import InputError
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases

PLANS: Mapping[str, Mapping[str, object]] = {
    "dp": {"dp": 2},
    "fsdp": {"dp": 2, "fsdp": True},
    "tp": {"tp": 2},
    "recompute": {"dp": 2, "fsdp": True, "recompute": "full"},
}
PIPELINE: Mapping[str, object] = {"pp": 2, "schedule": "gpipe", "microbatches": 4}


class Critic(nn.Module):
    """Scores rows, or sums their scores."""

    def __init__(self, *, sums: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))
        self.sums = sums

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores.sum() if self.sums else scores


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.table(words)).flatten(0, 1), labels.flatten())


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _rows(seed: int) -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))


def _compare(make: Callable[[], nn.Module], pins: Mapping[str, object], loop: Callable[[nn.Module], object]) -> None:
    """The loop returns the same, and leaves the same gradients, as on one device."""
    reference, model = make(), autopar.compile(make(), cluster="2xcpu", pins=pins)
    returned = [loop(each) for each in (model, reference)]
    gradients = [{name: _whole(p.grad) for name, p in each.named_parameters() if p.grad is not None} for each in (model, reference)]
    tree_allclose([returned[0], gradients[0]], [returned[1], gradients[1]], rtol=1e-9)


# --- gradient penalties ---


def a_gradient_penalty_and_a_score() -> None:
    """WGAN-GP: the penalty's own gradient is added to the score's (`gradient_penalty.py`)."""

    def loop(model: nn.Module) -> Tensor:
        x = _rows(0).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x), x, create_graph=True)
        penalty = (gradient.norm(dim=1) - 1).square().mean()
        (model(x.detach()) + 100 * penalty).backward()
        return penalty

    for pins in PLANS.values():
        _compare(lambda: Critic(sums=True), pins, loop)


def a_gradient_penalty_of_the_same_forward() -> None:
    """The score and its penalty come from one forward (`gradient_penalty_is_dropped.py`)."""

    def loop(model: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 128).view(16, 8).requires_grad_()
        score = model(x)
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        assert gradient.requires_grad
        (score / 8 + 10 * (gradient.norm(dim=1) - 1).square().mean()).backward()
        return gradient

    for pins in (PLANS["dp"], PLANS["recompute"]):
        _compare(lambda: Critic(sums=True), pins, loop)


def a_penalty_on_the_scores_of_rows() -> None:
    """The usual form: scores of interpolated rows, which a plan may leave split over the ranks."""

    def loop(model: nn.Module) -> None:
        real, fake = _rows(0), _rows(1)
        x = (0.3 * real + 0.7 * fake).requires_grad_()
        scores = model(x)
        (gradient,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
        penalty = (gradient.norm(dim=1) - 1).square().mean()
        (_whole(model(fake)).mean() - _whole(model(real)).mean() + 10 * penalty).backward()

    for pins in (PLANS["dp"], PLANS["tp"]):
        _compare(lambda: Critic(sums=False), pins, loop)


def forces_over_several_steps() -> None:
    """Forces are a gradient of the energy, and the loss compares both."""

    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for seed in range(3):
            optimizer.zero_grad()
            x = _rows(seed).requires_grad_()
            energy = model(x)
            (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
            ((-gradient - _rows(9)).square().mean() + energy.square()).backward()
            optimizer.step()

    _compare(lambda: Critic(sums=True), PLANS["recompute"], loop)


def a_hessian_of_the_inputs_times_a_vector() -> None:
    def loop(model: nn.Module) -> Tensor:
        x = _rows(0).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x), x, create_graph=True)
        return torch.autograd.grad((gradient * _rows(1)).sum(), x)[0]

    _compare(lambda: Critic(sums=True), PLANS["tp"], loop)


def a_pipeline_says_that_it_has_no_second_derivative() -> None:
    model = autopar.compile(Critic(sums=True), cluster="2xcpu", pins=PIPELINE)
    with pytest.raises(InputError, match=r"create_graph=True asks for .* those of a pipelined model can't: pin pp=1, microbatches=1"):
        model(_rows(0)).backward(create_graph=True)
    scores = autopar.compile(Critic(sums=False), cluster="2xcpu", pins=PIPELINE)
    with pytest.raises(InputError, match=r"those of a pipelined model can't: pin pp=1"):
        _whole(scores(_rows(0))).sum().backward(create_graph=True)


# --- labels and indices ---


def a_batch_whose_labels_are_all_ignored() -> None:
    """The loss is nan, and every gradient zero, so that training goes on (`all_labels_ignored.py`)."""
    words, labels = torch.arange(16).view(4, 4), torch.full((4, 4), -100)
    for pins in (PLANS["dp"], PLANS["tp"], {"tp": 2, "vocabulary": True}):
        model = autopar.compile(LanguageModel(), cluster="2xcpu", pins=pins)
        loss = model(words, labels)
        loss.backward()
        assert loss.isnan()
        assert [float(_whole(p.grad).abs().max()) for p in model.parameters() if p.grad is not None] == [0.0] * 3


def indices_beyond_a_table() -> None:
    """An IndexError, also where the table is split (`out_of_range_ids.py`)."""
    words = torch.arange(16).view(4, 4)
    for pins in (PLANS["dp"], PLANS["tp"], {"tp": 2, "vocabulary": True}):
        model = autopar.compile(LanguageModel(), cluster="2xcpu", pins=pins)
        for beyond in (16, -1):
            with pytest.raises(IndexError, match="index out of range in self"):
                model(torch.full_like(words, beyond), words)
            with pytest.raises(IndexError, match=f"Target {beyond} is out of bounds"):
                model(words, torch.full_like(words, beyond))
        assert model(words, words).isfinite()


LOOPS: tuple[Case, ...] = (
    a_gradient_penalty_and_a_score,
    a_gradient_penalty_of_the_same_forward,
    a_penalty_on_the_scores_of_rows,
    forces_over_several_steps,
    a_hessian_of_the_inputs_times_a_vector,
    a_pipeline_says_that_it_has_no_second_derivative,
    a_batch_whose_labels_are_all_ignored,
    indices_beyond_a_table,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), LOOPS)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in LOOPS])
def test_on_two_ranks(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
