"""The plan: every decision and its predicted cost, as data that can be saved, checked and compared.

Comes in: what the search decided. Goes out: to the rewrite and the runtime, which carry it out, and to the report.

Modules, in reading order: ``plan``, ``fits``.
"""

from autopar.plans.fits import check_fits, fingerprint
from autopar.plans.plan import (
    RECOMPUTE,
    BlockChoice,
    Candidate,
    Group,
    Memory,
    Pipeline,
    Plan,
    Proof,
    Seconds,
    Traffic,
    Unruled,
    from_json,
    to_json,
)

__all__ = [
    "RECOMPUTE",
    "BlockChoice",
    "Candidate",
    "Group",
    "Memory",
    "Pipeline",
    "Plan",
    "Proof",
    "Seconds",
    "Traffic",
    "Unruled",
    "check_fits",
    "fingerprint",
    "from_json",
    "to_json",
]
