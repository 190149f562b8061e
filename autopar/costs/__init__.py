"""Seconds and bytes of decisions on one mesh, from machine profiles: one table of costs that the search, the plan and the report share.

Comes in: an `AnalyzedGraph`, a mesh, a cluster, and for whole blocks a solution of the placement problem. Goes out: prices of single
decisions (`CostTables`), and per block of the chain its rows of seconds and its bytes (`BlockCost`).

Modules, in reading order: ``tables``, ``solved``, ``liveness``, ``memory``, ``halves``, ``blocks``, ``ahead``, ``cuts``.
"""

from autopar.costs.ahead import Surroundings, find_surroundings, find_work, overlap
from autopar.costs.blocks import BlockCost, block_kind, cost_block, itemize_block
from autopar.costs.cuts import CutCost, cost_cut, cut_kind, travel_layout
from autopar.costs.memory import BlockMemory, given_nbytes
from autopar.costs.solved import Sharding, SolvedChain
from autopar.costs.tables import (
    BUCKET_NBYTES,
    CostTables,
    call_seconds,
    count_uses,
    kept_nbytes,
    layout_numbers,
    local_nbytes,
    operand_layout_of,
    result_layout_of,
)

__all__ = [
    "BUCKET_NBYTES",
    "BlockCost",
    "BlockMemory",
    "CostTables",
    "CutCost",
    "Sharding",
    "SolvedChain",
    "Surroundings",
    "block_kind",
    "call_seconds",
    "cost_block",
    "cost_cut",
    "count_uses",
    "cut_kind",
    "find_surroundings",
    "find_work",
    "given_nbytes",
    "itemize_block",
    "kept_nbytes",
    "layout_numbers",
    "local_nbytes",
    "operand_layout_of",
    "overlap",
    "result_layout_of",
    "travel_layout",
]
