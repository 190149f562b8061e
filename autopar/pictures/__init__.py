"""Pictures of plans. Reads plans only.

Comes in: a `Plan`. Goes out: an `Outline`, which says what a picture shows; bytes of picture files.

Modules, in reading order: ``outline``, ``palette``, ``labels``, ``words``, ``layers``, ``ops``, ``rendering``, ``writers``.
"""

from autopar.pictures.writers import View, find_writer

__all__ = ["View", "find_writer"]
