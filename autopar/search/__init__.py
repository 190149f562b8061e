"""All decisions: from a graph and a cluster to the best plan over all meshes. Imports no torch and opens nothing.

Comes in: a `Graph`, a cluster, pins. Goes out: a `Plan` with its proof.

Modules, in reading order: ``linear_model``, ``options``, ``pins``, ``meshes``, ``placement``, ``pipeline``, ``assemble``, ``planner``.
"""

from autopar.search.meshes import LATER_PINS, PIN_NAMES, check_pins
from autopar.search.pins import read_pins, read_pipeline
from autopar.search.planner import make_plan

__all__ = ["LATER_PINS", "PIN_NAMES", "check_pins", "make_plan", "read_pins", "read_pipeline"]
