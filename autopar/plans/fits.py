"""Whether a plan was made for a graph: a fingerprint of the graph, kept in the plan."""

from __future__ import annotations

import hashlib

from autopar.errors import PlanError
from autopar.ir import Graph, OpKind, freeze
from autopar.plans.plan import Plan
from autopar.texts import printable


def fingerprint(graph: Graph) -> str:
    """Identifies a graph: equal for the same ops, arguments, shapes and wiring, whatever the machine."""
    digest = hashlib.sha256()
    for op in graph.ops:
        kind = op.target if op.kind in (OpKind.CALL, OpKind.PARAMETER, OpKind.BUFFER) else op.kind.value
        results = ";".join(f"{tensor.dtype}{tensor.shape}" for tensor in op.results)
        # Arguments count: a softmax over another dim has the same shapes, but may be split elsewhere.
        args = repr((freeze(op.args), freeze(op.kwargs)))
        digest.update(f"{op.name}|{kind}|{','.join(map(str, op.operands))}|{results}|{args}\n".encode())
    return digest.hexdigest()[:16]


def check_fits(plan: Plan, graph: Graph) -> None:
    """Raise PlanError when `plan` was made for another graph than this."""
    actual = fingerprint(graph)
    if actual == plan.fingerprint:
        return
    inputs = {printable(op.target): str(op.results[0]) for op in graph.of_kind(OpKind.INPUT)}
    types = ((name, plan.inputs.get(name, "absent"), actual_type) for name, actual_type in inputs.items())
    differing = [
        f"input {name} is {planned} in the plan, {actual_type} here" for name, planned, actual_type in types if planned != actual_type
    ]
    reason = "; ".join(differing) or "its ops or parameters differ"
    raise PlanError(
        f"the plan was made for another model: {plan.model} with fingerprint {plan.fingerprint}, this one has {actual} ({reason}). "
        "Make a plan for this model and these inputs with `autopar plan`"
    )
