"""The figures of ``docs/search.md``, drawn from searches that this program runs: ``python -m tests.benchmarks.figures docs/images``.

Needs Graphviz, and matplotlib, which nothing else here needs (``pip install matplotlib``). It takes a minute and a half.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydot
import torch
from torch import nn

from autopar.capture.export import capture
from autopar.cli.models import load_model
from autopar.cost_models import Cluster
from autopar.ir.graph import Graph
from autopar.ir.layout import Mesh, format_layout
from autopar.plans.plan import Plan
from autopar.replaced import replaced
from autopar.rules.table import find_spaces
from autopar.search.options import AxisKind, Constraints
from autopar.search.pipeline import assignment
from autopar.search.placement.problem import DecisionKind, Node, Option, build_problem
from autopar.search.placement.solve import PlacementSolver
from autopar.structure.layers import fold
from autopar.structure.model import AnalyzedGraph, find_constants
from autopar.structure.roles import find_roles
from tests.benchmarks.planning import CONFIGS
from tests.planning import make_plan

# Llama-3-8B on eight devices that have less memory than is convenient.
CONFIG, CLUSTER, MEMORY, BATCH, SEQ = "llama-3-8b", "8xH100", 40 * 10**9, 32, 2048
CHOSEN, OTHER, BOUND = "#1565c0", "#9e9e9e", "#c62828"
WIDTH, HEIGHT = 7.2, 3.8
# How far a candidate came, by the words of its outcome, with a colour; the first that is found counts.
STAGES = {
    "not tried": ("estimated only", "#bdbdbd"),
    "greedy assignment, not searched": ("greedy assignment, simulated", "#64b5f6"),
    "": ("searched by cutting planes", "#1565c0"),
}


class Mlp(nn.Module):
    """Two linear layers and a loss: few enough decisions to be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4096, 16384, bias=False), nn.Linear(16384, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of the output; x has shape (rows, 4096)."""
        return self.down(self.up(x).relu()).square().mean()


def analyze(graph: Graph) -> AnalyzedGraph:
    """A captured graph as the placement problem needs it."""
    spaces, _ = find_spaces(graph)
    return AnalyzedGraph(fold(graph), spaces, find_roles(graph, spaces), find_constants(graph))


def draw_problem(path: Path) -> None:
    """The decisions about `Mlp` on four ranks: each option with its microseconds, and what arcs between the chosen ones cost."""
    with torch.device("meta"):
        graph = capture(Mlp(), (torch.empty(512, 4096),)).graph.on_device("cuda")
    problem = build_problem(analyze(graph), Mesh(("x",), (4,)), Cluster.parse("4xH100"), Constraints((AxisKind.FREE,)))
    choice = PlacementSolver(problem).fit(10**12)
    assert choice is not None
    chosen = [choice.choice[node.decision] for node in problem.nodes]
    picture = pydot.Dot("placements", rankdir="LR", fontname="Helvetica", nodesep="0.15", ranksep="0.45", bgcolor="white")
    for index, node in enumerate(problem.nodes):
        picture.add_node(
            pydot.Node(f"n{index}", shape="plain", fontname="Helvetica", fontsize="11", label=_list_options(node, chosen[index]))
        )
    for arc in problem.arcs:
        cost = int(arc.cost[chosen[arc.a], chosen[arc.b]])
        label = f"{cost / 1e3:.0f} µs" if cost else "0"
        picture.add_edge(pydot.Edge(f"n{arc.a}", f"n{arc.b}", label=label, fontname="Helvetica", fontsize="10", color=CHOSEN, dir="none"))
    path.write_bytes(picture.create(format="svg"))


def _list_options(node: Node, chosen: int) -> str:
    """A table of a decision's options in Graphviz's HTML; the chosen one stands out."""
    title = f"{node.decision.op or 'output'}<BR/><I>{node.decision.kind}</I>"
    rows = [f'<TR><TD COLSPAN="2" BGCOLOR="#eeeeee">{title}</TD></TR>']
    for index, (option, cost) in enumerate(zip(node.options, node.cost.tolist(), strict=True)):
        colour = ' BGCOLOR="#bbdefb"' if index == chosen else ""
        rows.append(f'<TR><TD ALIGN="LEFT"{colour}>{_word_option(node, option)}</TD><TD ALIGN="RIGHT"{colour}>{cost / 1e3:.0f}</TD></TR>')
    return f'<<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="0" CELLPADDING="3">{"".join(rows)}</TABLE>>'


def _word_option(node: Node, option: Option) -> str:
    """An option in words: the loop that is split, or a layout."""
    if node.decision.kind is DecisionKind.CALL:
        return ", ".join("whole" if split is None else f"split {split}" for split in option)
    return format_layout(option)


def draw_prices(path: Path, graph: Graph) -> None:
    """Choices for a Llama on 8 H100, each the best at some price of memory, and what is proven of all that fit a budget."""
    cluster = Cluster.parse("8xH100")
    problem = build_problem(analyze(graph), Mesh(("dp", "tp"), (4, 2)), cluster, Constraints((AxisKind.DP, AxisKind.TP)))
    solver = PlacementSolver(problem)
    fastest = solver.solution_at(0.0)
    corners = solver.frontier(1000 * fastest.cost_ns / fastest.nbytes, 24)
    budget = round(0.6 * corners[0].nbytes + 0.4 * corners[-1].nbytes)
    tried = PlacementSolver(problem)
    found = tried.fit(budget)
    assert found is not None
    figure, axes = _start()
    axes.plot(
        [c.nbytes / 1e9 for c in corners], [c.cost_ns / 1e6 for c in corners], "o-", color=OTHER, label="best at some price of memory"
    )
    axes.axvline(budget / 1e9, color="black", linestyle="--", label="memory M", linewidth=1)
    axes.axhline(tried.bound_in_memory_ns / 1e6, color=BOUND, label="bound: nothing that fits M costs less")
    axes.plot([found.nbytes / 1e9], [found.cost_ns / 1e6], "o", color=CHOSEN, markersize=9, label="found")
    axes.set(xlabel="GB of a device", ylabel="step, ms", title=f"Prices of memory: {len(tried.optima)} prices tried")
    _save(figure, axes, path)


@dataclass
class Rounds:
    """What one search of an assignment knows before each of its models and at its end: seconds of the best assignment, the bound."""

    best: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    problem: Any = None


@contextmanager
def recorded_searches() -> Iterator[list[Rounds]]:
    """The searches of assignments that run inside, in their order."""
    recorded: list[Rounds] = []
    solve, assign = assignment._AssignmentSearch.solve, assignment.assign

    def recording_solve(search: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        rounds = recorded[-1]
        rounds.problem = rounds.problem or search.problem
        if search.best is not None:
            rounds.best.append(search.best.simulated)
            # Step 3 has a search of its own, among few options, whose bound is none of the whole problem.
            rounds.bound.append(search.bound if search.problem is rounds.problem else rounds.bound[-1])
        return solve(search, model, *arguments, **options)

    def recording_assign(*arguments: Any, **options: Any) -> assignment.Assignment:
        recorded.append(Rounds())
        found = assign(*arguments, **options)
        recorded[-1].best.append(found.simulated)
        recorded[-1].bound.append(found.bound)
        return found

    with replaced(assignment._AssignmentSearch, "solve", recording_solve), replaced(assignment, "assign", recording_assign):
        yield recorded


def draw_planes(path: Path, graph: Graph, cluster: Cluster) -> None:
    """Bound and best assignment, model by model, of the search for stages that solved the most models, eight pipeline ranks under 1F1B."""
    with recorded_searches() as searches:
        make_plan(graph, cluster, pins={"pp": 8, "schedule": "1f1b"})
    rounds = max(searches, key=lambda search: len(search.best))
    figure, axes = _start()
    for line, label, colour in ((rounds.best, "best assignment, simulated", CHOSEN), (rounds.bound, "bound: nothing takes less", BOUND)):
        axes.step(range(len(line)), [1e3 * seconds or float("nan") for seconds in line], "o-", where="post", color=colour, label=label)
    axes.set(xlabel="models solved", ylabel="step, ms", title="Paths join the model until bound and simulation meet")
    _save(figure, axes, path)


def draw_candidates(path: Path, plan: Plan) -> None:
    """Every candidate of a search at its step, by how far it came."""
    seconds = sorted(
        (candidate.step_seconds, candidate.outcome) for candidate in plan.proof.candidates if candidate.step_seconds is not None
    )
    figure, axes = _start()
    for words, (label, colour) in STAGES.items():
        mine = [(place, 1e3 * step) for place, (step, outcome) in enumerate(seconds) if _stage_of(outcome) == words]
        axes.plot(*zip(*mine, strict=True), "o", color=colour, markersize=5, label=f"{label}: {len(mine)}")
    axes.axhline(plan.proof.objective_ns / 1e6, color="black", linestyle="--", linewidth=1, label="the plan")
    axes.set(
        xlabel="candidates, ordered by the length of their step",
        ylabel="step, ms",
        yscale="log",
        title="How closely candidates are looked at",
    )
    axes.set_yticks([800, 1000, 1500, 2000, 3000], labels=["800", "1000", "1500", "2000", "3000"])
    axes.minorticks_off()
    _save(figure, axes, path)


def _stage_of(outcome: str) -> str:
    return next(words for words in STAGES if words in outcome)


def _start() -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures"})
    return plt.subplots(figsize=(WIDTH, HEIGHT))


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="white", framealpha=1)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Draw all figures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    cluster = Cluster.parse(CLUSTER).with_memory(MEMORY)
    loaded = load_model(f"hf:{CONFIGS / CONFIG}", batch=BATCH, seq=SEQ)
    graph = capture(loaded.model, loaded.example_inputs).graph.on_device(cluster.machine.device.kind)
    draw_problem(folder / "search-placement.svg")
    draw_prices(folder / "search-prices.svg", graph)
    draw_candidates(folder / "search-candidates.svg", make_plan(graph, cluster))
    draw_planes(folder / "search-planes.svg", graph, cluster)


if __name__ == "__main__":
    main()
