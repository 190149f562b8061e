"""Plans for people: text and tables. Reads plans only.

Comes in: a `Plan`. Goes out: text.

Modules, in reading order: ``text``.
"""

from autopar.report.text import describe_pipeline, summarize

__all__ = ["describe_pipeline", "summarize"]
