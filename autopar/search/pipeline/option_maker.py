"""A chain of blocks under one solution of the placement problem -> the options of every block, and what each cut between blocks takes.

Comes in: a `SolvedChain`, the link that stages send over, kinds of recomputation. Goes out: `BlockOptions` per block, which an assignment
chooses from. Their seconds and bytes are sums of the rows and bytes of `autopar.costs.BlockCost`: a forward is the sum of its rows of
`Phase.FORWARD`, and so on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from autopar.cost_models import Link
from autopar.costs import (
    BlockCost,
    CutCost,
    SolvedChain,
    Surroundings,
    block_kind,
    cost_block,
    cost_cut,
    cut_kind,
    find_surroundings,
    find_work,
    overlap,
    travel_layout,
)
from autopar.ir import Layout
from autopar.plans import RECOMPUTE, Phase
from autopar.search.pipeline.block_options import BlockOption, BlockOptions


class BlockOptionMaker:
    """Makes the options of every block of a chain under one solution; equal blocks are costed once, and each kind of recomputation once."""

    def __init__(self, solved: SolvedChain, link: Link | None, solution: int = 0) -> None:
        """Remember what to make options for.

        Args:
            solved: the chain of blocks under the solution.
            link: what messages between stages are sent over; None without a pipeline.
            solution: the solution's number among those that blocks may mix, which its options have as `BlockOption.solution`.
        """
        self.solved = solved
        self.link = link
        self.solution = solution
        # Per block the number of its kind, equal for blocks of equal costs, and its cut; found when first needed.
        self._kinds: list[tuple[int, CutCost]] = []
        # Kind and kind of recomputation -> name and cost, as if every collective waited on the spot.
        self._costs: dict[tuple[int, str], tuple[str, BlockCost]] = {}
        self._surroundings: list[Surroundings | None] = []
        self._options: dict[tuple[object, str], BlockOption] = {}

    def make(self, recompute: Collection[str], splits_backward: bool, pins: Mapping[str, int]) -> tuple[BlockOptions, ...]:
        """Every block's options, in chain order.

        Args:
            recompute: kinds of recomputation (of `RECOMPUTE`) to make an option with, where they differ for a block.
            splits_backward: whether the schedule runs weight gradients as a pass of their own; otherwise they are part of the backward.
            pins: stages that the user pinned, by block name.
        """
        blocks = self.solved.chain.blocks
        if not self._kinds:
            self._kinds = self._find_kinds()
        for number, (kind, _) in enumerate(self._kinds):
            if missing := [name for name in {"none": None, **dict.fromkeys(recompute)} if (kind, name) not in self._costs]:
                costs = cost_block(self.solved, number, missing)
                self._costs |= {(kind, name): cost for name, cost in zip(missing, costs, strict=True)}
        if not self._surroundings:
            self._surroundings = self._find_surroundings()
        kinds = [(kind, around) for (kind, _), around in zip(self._kinds, self._surroundings, strict=True)]
        options: dict[object, tuple[BlockOption, ...]] = {}
        for key in dict.fromkeys(kinds):
            for name in recompute:
                if (key, name) not in self._options:
                    kind, around = key
                    chosen, cost = self._costs[kind, name]
                    if around is not None:
                        cost = overlap(cost, around, self.solved.tables.gather_overlap)
                    self._options[key, name] = self._make_option(chosen, cost)
            # Selective recomputation of a block without an attention core is none.
            distinct = dict.fromkeys(self._options[key, name] for name in RECOMPUTE if name in recompute)
            options[key] = tuple(distinct if splits_backward else map(_join_backward, distinct))
        return tuple(
            BlockOptions(block.name, options[key], cut, pins.get(block.name))
            for block, key, (_, cut) in zip(blocks, kinds, self._kinds, strict=True)
        )

    def _find_kinds(self) -> list[tuple[int, CutCost]]:
        """Per block a number that is equal for blocks of equal costs, and the cut after it."""
        cuts: dict[object, CutCost] = {}
        numbers: dict[object, int] = {}
        kinds: list[tuple[int, CutCost]] = []
        for number in range(len(self.solved.chain.blocks)):
            key = cut_kind(self.solved, number)
            if key not in cuts:
                cuts[key] = cost_cut(self.solved, number, self.link)
            kinds.append((numbers.setdefault(block_kind(self.solved, number), len(numbers)), cuts[key]))
        return kinds

    def _find_surroundings(self) -> list[Surroundings | None]:
        """Per block what the others mean for its gathers that are begun ahead; None where there are none."""
        tables = self.solved.tables
        works = [find_work(self._costs[kind, "none"][1]) for kind, _ in self._kinds]
        if not tables.ahead or not any(work.gathered for work in works):
            return [None] * len(works)
        options = {"is_one_stage": self.solved.is_one_stage, "sums_run": self.solved.runs_ahead}
        found = [find_surroundings(works, number, tables.ahead, tables.gather_overlap, **options) for number in range(len(works))]
        return [around if work.gathered or work.unsummed else None for around, work in zip(found, works, strict=True)]

    def _make_option(self, name: str, cost: BlockCost) -> BlockOption:
        """The option of a block that has this cost; `name` says what its backward runs again."""
        seconds, memory = cost.seconds, cost.memory
        return BlockOption(
            name=name,
            forward=seconds[Phase.FORWARD],
            backward_input=seconds[Phase.BACKWARD_INPUT],
            backward_weight=seconds[Phase.BACKWARD_WEIGHT],
            per_step=seconds[Phase.STEP],
            saved=memory.saved,
            waiting=memory.waiting,
            static=memory.static,
            workspace=memory.workspace,
            first_workspace=memory.first_workspace,
            arriving=memory.arriving,
            solution=self.solution,
            cost=cost,
        )

    def find_travel_layouts(self) -> dict[str, Layout]:
        """By the text of a value: the layout in which each value that may cross a cut is sent."""
        values = dict.fromkeys(value for block in self.solved.chain.blocks for value in block.crossing)
        return {str(value): travel_layout(self.solved, value, self.link) for value in values}


def _join_backward(option: BlockOption) -> BlockOption:
    """The option with input and weight gradients in one pass, counted as input gradients."""
    return replace(option, backward_input=option.backward_input + option.backward_weight, backward_weight=0.0, waiting=0)
