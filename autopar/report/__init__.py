"""Plans for people and programs: text, tables and data. Reads plans only.

Comes in: a `Plan`. Goes out: text, tables on a console that the caller gives, JSON-ready data.

Modules, in reading order: ``selection``, ``reasons``, ``summary``, ``comparison``, ``charts``, ``answers``, ``op_rows``, ``data``,
``text_tables``, ``op_tables``, ``tables``, ``difference``.
"""

from autopar.report.answers import Answer, Frontier
from autopar.report.data import to_data
from autopar.report.difference import diff, diff_data
from autopar.report.selection import find_pipeline_ranks, select_groups
from autopar.report.summary import (
    MEMORY_KINDS,
    describe_choice,
    describe_copies,
    describe_decisions,
    describe_header,
    describe_mesh,
    describe_pipeline,
    describe_precision,
    describe_proof,
    describe_states,
    find_rates,
    format_gap,
    list_step_parts,
    summarize,
)
from autopar.report.tables import explain

__all__ = [
    "MEMORY_KINDS",
    "Answer",
    "Frontier",
    "describe_choice",
    "describe_copies",
    "describe_decisions",
    "describe_header",
    "describe_mesh",
    "describe_pipeline",
    "describe_precision",
    "describe_proof",
    "describe_states",
    "diff",
    "diff_data",
    "explain",
    "find_pipeline_ranks",
    "find_rates",
    "format_gap",
    "list_step_parts",
    "select_groups",
    "summarize",
    "to_data",
]
