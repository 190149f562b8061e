"""Plans for captured graphs, under pins and on meshes as users write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopar.cost_models import Cluster
from autopar.ir.graph import Graph
from autopar.plans.pins import Pins, reconcile
from autopar.plans.plan import Plan
from autopar.search import planner


def make_plan(
    graph: Graph,
    cluster: Cluster,
    *,
    pins: Mapping[str, object] | Pins | None = None,
    mesh: Mapping[str, int] | None = None,
    **options: Any,
) -> Plan:
    """`planner.make_plan`, of pins and a mesh that are read as `autopar.plan` reads them."""
    read, group_mesh = reconcile(Pins.parse(pins), mesh)
    return planner.make_plan(graph, cluster, pins=read, mesh=group_mesh, **options)
