"""The plan, every decision and its predicted cost, and the pins that it is made under: data that can be saved, checked and compared.

Comes in: what the user pinned; what the search decided. Goes out: pins to the search, and plans to the rewrite and the runtime, which carry
them out, and to the report.

Modules, in reading order: ``rows``, ``files``, ``consistency``, ``plan``, ``fits``, ``pins``.
"""

from autopar.plans.fits import check_fits, describe_ops, fingerprint
from autopar.plans.pins import NO_PINS, Pins, check_devices, describe_pins, parse_mesh, reconcile
from autopar.plans.plan import (
    RECOMPUTE,
    BlockChoice,
    Candidate,
    Group,
    Memory,
    Pipeline,
    Plan,
    Proof,
    RepeatedWork,
    Unruled,
    from_json,
    to_json,
)
from autopar.plans.rows import OUTSIDE, CostRow, Phase, Purpose, RowSums, seconds_of

__all__ = [
    "NO_PINS",
    "OUTSIDE",
    "RECOMPUTE",
    "BlockChoice",
    "Candidate",
    "CostRow",
    "Group",
    "Memory",
    "Phase",
    "Pins",
    "Pipeline",
    "Plan",
    "Proof",
    "Purpose",
    "RepeatedWork",
    "RowSums",
    "Unruled",
    "check_devices",
    "check_fits",
    "describe_ops",
    "describe_pins",
    "fingerprint",
    "from_json",
    "parse_mesh",
    "reconcile",
    "seconds_of",
    "to_json",
]
