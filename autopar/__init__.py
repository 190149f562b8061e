"""autopar: an automatic parallelization compiler for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import CompiledModule as CompiledModule
    from autopar.api import compile as compile
    from autopar.api import detect_cluster as detect_cluster
    from autopar.api import plan as plan
    from autopar.api import verify as verify
    from autopar.checks import check_rule as check_rule
    from autopar.cost_models import Cluster as Cluster
    from autopar.counterfactuals import memory_frontier as memory_frontier
    from autopar.counterfactuals import what_if as what_if
    from autopar.counterfactuals import why_not as why_not
    from autopar.ir import Precision as Precision
    from autopar.plans import Pins as Pins
    from autopar.plans import Plan as Plan
    from autopar.report import summarize as summarize
    from autopar.rules import register_rule as register_rule
    from autopar.runtime import MasterWeights as MasterWeights
    from autopar.runtime import full_state_dict as full_state_dict

_HOMES = {
    "CompiledModule": "autopar.api",
    "compile": "autopar.api",
    "detect_cluster": "autopar.api",
    "plan": "autopar.api",
    "verify": "autopar.api",
    "check_rule": "autopar.checks",
    "Cluster": "autopar.cost_models",
    "memory_frontier": "autopar.counterfactuals",
    "what_if": "autopar.counterfactuals",
    "why_not": "autopar.counterfactuals",
    "Precision": "autopar.ir",
    "Pins": "autopar.plans",
    "Plan": "autopar.plans",
    "MasterWeights": "autopar.runtime",
    "full_state_dict": "autopar.runtime",
    "summarize": "autopar.report",
    "register_rule": "autopar.rules",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what users call when they ask for it: torch takes seconds, and ``autopar --help`` needs none of it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'autopar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
