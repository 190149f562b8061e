"""Plans for people and programs: text, tables and data. Reads plans only.

Comes in: a `Plan`. Goes out: text, tables on a console that the caller gives, JSON-ready data.

Modules, in reading order: ``selection``, ``summary``, ``data``, ``tables``.
"""

from autopar.report.data import to_data
from autopar.report.summary import describe_choice, describe_pipeline, summarize
from autopar.report.tables import explain

__all__ = ["describe_choice", "describe_pipeline", "explain", "summarize", "to_data"]
