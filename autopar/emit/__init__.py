"""A plan and a model as a package that trains with torch alone, or as the nearest configuration of another system.

Modules, in reading order: ``support``, ``prune``, ``printing``, ``tables``, ``guide``, ``package``, ``elsewhere``.
"""

from autopar.emit.package import write_package

__all__ = ["write_package"]
