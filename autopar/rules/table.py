"""The table of rules: from an op's name to its loops. A rule mentions neither meshes nor costs.

Rules of torch's own operators are rows of `RULES`; those that users declare for theirs are added by `register_rule`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from autopar.errors import InputError
from autopar.ir import Facts, Graph, Op, OpKind, Space, Tensor, freeze
from autopar.rules import chunked_loss, contract, convolution, index, pointwise, view
from autopar.rules.declared import DeclaredRule, read_rule
from autopar.rules.notation import Rule

RULES: dict[str, Rule] = {**pointwise.RULES, **contract.RULES, **convolution.RULES, **view.RULES, **index.RULES, **chunked_loss.RULES}


def rule(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """The loops of `op`, which reads the tensors `operands`; None when there is no rule for it, or none for this call of it."""
    if (declared := _DECLARED.get(op.target)) is not None:
        return declared.space_of(op, operands)
    function = RULES.get(op.target)
    return None if function is None else function(op, operands)


def has_rule(target: str) -> bool:
    """Whether there is a rule for an operator, ``aten.linear.default``; a rule may leave out some calls."""
    return target in RULES or target in _DECLARED


_DECLARED: dict[str, DeclaredRule] = {}


def register_rule(
    name: str,
    text: str | Sequence[str],
    *,
    flops: float = 1.0,
    family: str = "pointwise",
    sizes: Mapping[str, int] | None = None,
    linear: Sequence[int] = (),
    added: Sequence[int] = (),
    shape_arg: int | None = None,
    random: bool = False,
    replace: bool = False,
) -> None:
    """Tell how an operator of yours splits, so that plans can split it; without a rule it runs whole on every rank.

    Call it before planning, on every rank. Only what the text says is checked here; `autopar.check_rule` runs the operator and compares its
    parts with the whole, which every rule needs once, in a test of yours::

        autopar.register_rule("mylib::scaled_rows", "b s i, i -> b s i")

    Args:
        name: ``library::operator``, or ``library::operator.overload``.
        text: a token per dim of every tensor, operands first (``docs/adding-a-rule.md``). A loop that no result has is summed; ``x!`` stays
            whole. Several texts where calls differ in the number of tensors or dims: the first that fits a call is its rule.
        flops: floating-point operations of the forward per point of all loops, for costs.
        family: ``pointwise``, ``matmul``, ``attention`` or ``lookup``, for costs.
        sizes: of loops that occur only inside of merged dims, ``(h d)``, where these don't tell them.
        linear: operands in which the operator is jointly linear.
        added: operands that are added once to a sum, such as a bias.
        shape_arg: position of an argument that holds the result's sizes.
        random: whether the operator draws random numbers; parts then draw different ones, and replicas the same.
        replace: whether the name may have a registered rule already, as when a notebook's cell runs again.

    Raises InputError for a name or text that can't be a rule, and for an operator that has one.
    """
    texts = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, Sequence) else (repr(text),)
    rule = read_rule(
        name,
        texts,
        flops=flops,
        family=family,
        sizes=sizes or {},
        linear=linear,
        added=added,
        shape_arg=shape_arg,
        random=random,
    )
    if rule.target in RULES:
        raise InputError(f"{name} has a rule of autopar's own, which can't be replaced")
    if not replace and _DECLARED.get(rule.target, rule) != rule:
        raise InputError(
            f"{name} has a registered rule already, {' | '.join(_DECLARED[rule.target].texts)}; give replace=True to exchange it"
        )
    _DECLARED[rule.target] = rule


def describe_declared(graph: Graph) -> tuple[str, ...]:
    """The registered rules that calls of `graph` use, as text: what a plan depends on beside the graph."""
    targets = dict.fromkeys(op.target for op in graph.of_kind(OpKind.CALL) if op.target in _DECLARED)
    return tuple(str(_DECLARED[target]) for target in sorted(targets))


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
    function = convolution.FACTS.get(op.target)
    return Facts() if function is None else function(op)


_RANDOM = re.compile(r"rand|normal(?!i[sz])|dropout|bernoulli|multinomial|poisson|exponential|uniform|cauchy|geometric")


def is_random(op: Op, space: Space | None) -> bool:
    """Whether a call may draw random numbers; a call without loops is judged by its name."""
    return _RANDOM.search(op.target) is not None if space is None else space.random
