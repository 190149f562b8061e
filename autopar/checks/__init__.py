"""Proof that plans and rules are right: all ranks of a mesh as threads of one process, compared with a single device.

Comes in: a model and a plan, or an op and its rule. Goes out: the largest error of outputs, gradients and buffers. The one idea: only the
axes of the mesh are other objects, so what is checked is the very program that the ranks of a cluster would run.

Modules, in reading order: ``threads``, ``shards``, ``oracle``, ``declared``, ``verification``.
"""

from autopar.checks.declared import check_rule
from autopar.checks.verification import Verification, verify_plan

__all__ = ["Verification", "check_rule", "verify_plan"]
