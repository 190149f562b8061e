"""The table of rules: from an op's name to its loops. A rule mentions neither meshes nor costs."""

from __future__ import annotations

import re
from typing import Any

from autopar.ir import Facts, Graph, Op, OpKind, Space, Tensor, freeze
from autopar.rules import contract, index, pointwise, view
from autopar.rules.notation import Rule

RULES: dict[str, Rule] = {**pointwise.RULES, **contract.RULES, **view.RULES, **index.RULES}


def rule(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """The loops of `op`, which reads the tensors `operands`; None when there is no rule for it, or none for this call of it."""
    function = RULES.get(op.target)
    return None if function is None else function(op, operands)


def find_spaces(graph: Graph) -> tuple[dict[str, Space], tuple[Op, ...]]:
    """The space of every call of `graph` that has a rule, by op name, and the calls that have none. Like calls share one space."""
    spaces: dict[str, Space] = {}
    unruled: list[Op] = []
    known: dict[Any, Space | None] = {}
    for op in graph.of_kind(OpKind.CALL):
        operands = graph.operand_tensors(op)
        key = (op.target, operands, op.results, freeze(op.args), freeze(op.kwargs))
        if key not in known:
            known[key] = rule(op, operands)
        space = known[key]
        if space is None:
            unruled.append(op)
        else:
            spaces[op.name] = space
    return spaces, tuple(unruled)


def facts_of(op: Op, space: Space | None) -> Facts:
    """What is known of a call beside its loops; some is known of calls without loops (`space` is None) too."""
    if space is not None:
        return space.facts
    function = contract.FACTS.get(op.target)
    return Facts() if function is None else function(op)


_RANDOM = re.compile(r"rand|normal|dropout|bernoulli|multinomial|poisson|exponential|uniform|cauchy|geometric")


def is_random(op: Op, space: Space | None) -> bool:
    """Whether a call may draw random numbers; a call without loops is judged by its name."""
    return _RANDOM.search(op.target) is not None if space is None else space.random
