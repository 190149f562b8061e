"""The plan, every decision and its predicted cost, and the pins that it is made under: data that can be saved, checked and compared.

Comes in: what the user pinned; what the search decided. Goes out: pins to the search, and plans to the rewrite and the runtime, which carry
them out, and to the report.

Modules, in reading order: ``rows``, ``pins``, ``timing``, ``files``, ``request``, ``work``, ``reads``, ``consistency``, ``notebook``,
``plan``, ``fits``.
"""

from autopar.plans.fits import check_fits, describe_ops, fingerprint
from autopar.plans.pins import NO_PINS, RECOMPUTE, Pins, check_devices, describe_pins, parse_mesh, reconcile
from autopar.plans.plan import (
    KINDS,
    STORAGE,
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
from autopar.plans.reads import Read
from autopar.plans.request import Request, record_request
from autopar.plans.rows import LOCAL_COPY, OUTSIDE, CostRow, Phase, Purpose, RowSums, seconds_of
from autopar.plans.timing import BlockRows, Message, RankBytes, StageBytes, Timing
from autopar.plans.work import OpCost, Seconds, Work, add_parts, sum_parts

__all__ = [
    "KINDS",
    "LOCAL_COPY",
    "NO_PINS",
    "OUTSIDE",
    "RECOMPUTE",
    "STORAGE",
    "BlockChoice",
    "BlockRows",
    "Candidate",
    "CostRow",
    "Group",
    "Memory",
    "Message",
    "OpCost",
    "Phase",
    "Pins",
    "Pipeline",
    "Plan",
    "Proof",
    "Purpose",
    "RankBytes",
    "Read",
    "RepeatedWork",
    "Request",
    "RowSums",
    "Seconds",
    "StageBytes",
    "Timing",
    "Unruled",
    "Work",
    "add_parts",
    "check_devices",
    "check_fits",
    "describe_ops",
    "describe_pins",
    "fingerprint",
    "from_json",
    "parse_mesh",
    "reconcile",
    "record_request",
    "seconds_of",
    "sum_parts",
    "to_json",
]
