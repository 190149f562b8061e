"""Proof that plans and rules are right: all ranks of a mesh as threads of one process, compared with a single device.

Comes in: a model, a plan, a rule. Goes out: the largest error of outputs, gradients and buffers.

Modules, in reading order: ``threads``, ``shards``, ``oracle``, ``verification``.
"""

from autopar.checks.verification import Verification, verify_plan

__all__ = ["Verification", "verify_plan"]
