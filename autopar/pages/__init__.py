"""A plan as one HTML page: summary, graph, timeline, memory over time, tables.

Comes in: a `Plan`. Goes out: the text of a page that needs no network and no other file.

Modules, in reading order: ``tables``, ``graph``, ``timeline``, ``content``, ``page``.
"""

from autopar.pages.page import write_page

__all__ = ["write_page"]
