"""What the plan says of single blocks, messages and moments: the numbers that the search added up, before they are added up.

Comes in: the chain with the option of each block, its stages, and the cuts between them. Goes out: a `Timing`.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.costs import CutCost
from autopar.plans import BlockRows, CostRow, Message, RankBytes, StageBytes, Timing
from autopar.search.pipeline import BlockOption, RankMemory, StageProfile, find_levels, find_update


def make_timing(
    rows: Sequence[tuple[CostRow, ...]],
    options: Sequence[BlockOption],
    cuts: Sequence[CutCost],
    stages: Sequence[int],
    rank_of: Sequence[int],
    memory: Sequence[RankMemory],
    *,
    is_whole: bool,
    forwards_first: bool,
) -> Timing:
    """The seconds and bytes that a plan's step and peak are computed from.

    Args:
        rows: per block its rows of one micro-batch, under the plan's names of layers and axes.
        options: per block how it runs.
        cuts: per block what it takes to end a stage after it.
        stages: per block its stage.
        rank_of: per stage its pipeline rank.
        memory: per pipeline rank its bytes at the peak.
        is_whole: whether there is one stage and one micro-batch.
        forwards_first: whether all forwards run before the first backward.
    """
    numbers: dict[tuple[CostRow, ...], int] = {}
    kind_of = tuple(numbers.setdefault(block_rows, len(numbers)) for block_rows in rows)
    levels: list[StageBytes] = []
    profiles: list[StageProfile] = []
    before = 0
    for stage in range(len(rank_of)):
        own = [number for number, of_block in enumerate(stages) if of_block == stage]
        profiles.append(StageProfile.of([options[number] for number in own], before))
        levels.append(find_levels(profiles[-1], sum(options[number].static for number in own), is_whole=is_whole))
        before = cuts[own[-1]].saved if own else 0
    ranks = []
    for rank, rank_memory in enumerate(memory):
        on_rank = [profile for profile, owner in zip(profiles, rank_of, strict=True) if owner == rank]
        ranks.append(RankBytes(rank_memory.messages, find_update(on_rank, rank_memory.static, is_whole=is_whole)))
    ends = {stage: number for number, stage in enumerate(stages)}
    messages = tuple(_make_message(cuts[ends[stage]], rank_of[stage] != rank_of[stage + 1]) for stage in range(len(rank_of) - 1))
    return Timing(forwards_first, tuple(map(BlockRows, numbers)), kind_of, messages, tuple(levels), tuple(ranks))


def _make_message(cut: CutCost, is_sent: bool) -> Message:
    return Message(cut.forward, cut.backward, cut.nbytes, cut.backward_nbytes) if is_sent else Message(0.0, 0.0, 0, 0)
