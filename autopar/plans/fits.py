"""Whether a plan was made for a graph: a fingerprint of the graph, and of the rules registered for its operators, kept in the plan."""

from __future__ import annotations

import hashlib

from autopar.errors import PlanError
from autopar.ir import Graph, OpKind, freeze
from autopar.plans.plan import Plan
from autopar.rules import describe_declared, has_rule
from autopar.texts import printable


def fingerprint(graph: Graph) -> str:
    """Identifies a graph: equal for the same ops, arguments, shapes and wiring, whatever the machine.

    Where users registered rules for operators of the graph, a second part, after a plus, identifies these.
    """
    digest = hashlib.sha256("".join(f"{line}\n" for line in describe_ops(graph)).encode()).hexdigest()[:16]
    rules = "\n".join(describe_declared(graph))
    return digest + (f"+{hashlib.sha256(rules.encode()).hexdigest()[:8]}" if rules else "")


def describe_ops(graph: Graph) -> list[str]:
    """A line per op with all that a plan for the graph depends on."""
    lines = []
    for op in graph.ops:
        kind = op.target if op.kind in (OpKind.CALL, OpKind.PARAMETER, OpKind.BUFFER) else op.kind.value
        results = ";".join(f"{tensor.dtype}{tensor.shape}{tensor.storage or ''}" for tensor in op.results)
        # Arguments count: a softmax over another dim has the same shapes, but may be split elsewhere.
        args = repr((freeze(op.args), freeze(op.kwargs)))
        lines.append(f"{op.name}|{kind}|{','.join(map(str, op.operands))}|{results}|{args}")
    return lines


def check_fits(plan: Plan, graph: Graph) -> None:
    """Raise PlanError when `plan` was made for another graph than this."""
    actual = fingerprint(graph)
    if actual == plan.fingerprint:
        return
    if actual.partition("+")[0] == plan.fingerprint.partition("+")[0]:
        raise PlanError(_describe_rules(plan, graph))
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


def _describe_rules(plan: Plan, graph: Graph) -> str:
    """Why a plan of this graph doesn't fit: operators had other registered rules when it was made."""
    here = describe_declared(graph)
    calls = graph.of_kind(OpKind.CALL)
    without = sorted({op.target for op in calls if not has_rule(op.target)})
    if "+" not in plan.fingerprint:
        now = f"none of them was registered when it was made: {'; '.join(here)}"
    elif here:
        now = f"they differ from those registered now, {'; '.join(here)}"
        now += f", or one is missing (no rule: {', '.join(without)})" if without else ""
    else:
        now = f"none is registered now; ops without a rule are {', '.join(without)}"
    return (
        f"the plan of {plan.model} depends on rules of autopar.register_rule, and {now}. "
        "Register the same rules before the plan is used, on every rank, or plan again"
    )
