"""All decisions: from a graph and a cluster to the best plan over all meshes. Imports no torch and opens nothing.

Comes in: a `Graph`, a cluster, pins. Goes out: a `Plan` with its proof.

Modules, in reading order: ``linear_model``, ``options``, ``meshes``, ``attention``, ``candidates``, ``placement``, ``pipeline``,
``repeated``, ``timing``, ``attribution``, ``reads``, ``assemble``, ``trials``, ``loss_chunks``, ``planner``.
"""

from autopar.search.options import AxisKind, kind_of
from autopar.search.planner import make_plan

__all__ = ["AxisKind", "kind_of", "make_plan"]
