"""Seconds and bytes of decisions on one mesh, from machine profiles.

Comes in: a `Model`, a mesh, a cluster. Goes out: numbers that the search, the plan and the report share.

Modules, in reading order: ``saved``, ``tables``.
"""

from autopar.costs.saved import Kept, count_kept, keeps_operand
from autopar.costs.tables import (
    BUCKET_NBYTES,
    COLLECTIVE_KIND,
    OPTIMIZER_COPIES,
    CostTables,
    call_seconds,
    count_uses,
    layout_numbers,
    local_nbytes,
    operand_layout_of,
    result_layout_of,
)

__all__ = [
    "BUCKET_NBYTES",
    "COLLECTIVE_KIND",
    "OPTIMIZER_COPIES",
    "CostTables",
    "Kept",
    "call_seconds",
    "count_kept",
    "count_uses",
    "keeps_operand",
    "layout_numbers",
    "local_nbytes",
    "operand_layout_of",
    "result_layout_of",
]
