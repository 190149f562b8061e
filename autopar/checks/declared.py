"""The check of a registered rule: the user's operator, run whole and in parts.

Comes in: an operator's name and the arguments of an example call. Goes out: what was compared. A wrong rule raises VerificationError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autopar.checks.oracle import check_space, describe, find_function, placements, trace_function
from autopar.errors import InputError
from autopar.ir import Split
from autopar.rules import read_target, rule


def check_rule(name: str, *args: Any, function: Callable[..., Any] | None = None, **kwargs: Any) -> tuple[str, ...]:
    """Run an operator on an example, whole and split in every way that its rule allows, and compare results and gradients.

    Every loop is split in 2, 3 and 4 parts, also inside of 2 and 3 outer blocks, and pairs of loops over a 2 x 2 mesh, wherever sizes allow
    it. Give tensors of float64 where the operator takes them, and ``requires_grad=True`` where it is differentiated::

        autopar.check_rule("mylib::scaled_rows", torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True), scale)

    Args:
        name: as for `autopar.register_rule`; the module that defines the operator must have been imported.
        *args: positional arguments of the call.
        function: what to run where the name is of no operator of torch: ``Round.apply`` of an autograd function.
        **kwargs: its keyword arguments.

    Returns the placements that were compared, as text.

    Raises:
        VerificationError: the rule is wrong; the message names the split, and what differs by how much.
        InputError: there is no such operator, or no rule for it; it draws random numbers, so that no two runs agree; or the example has
            sizes by which some loop can't be split.
    """
    target = read_target(name)
    function = function or find_function(target)
    if function is None:
        raise InputError(f"torch has no operator {name}; import the module that defines it first, or give function=")
    op, tensors = trace_function(function, target, args, kwargs)
    space = rule(op, describe(tensors))
    if space is None:
        raise InputError(f"{name} has no rule for this call; state it with autopar.register_rule first")
    if space.random:
        raise InputError(f"{name} draws random numbers, so that its parts can't be compared with the whole")
    split = {part.loop for _, placement in placements(space) for part in placement if isinstance(part, Split)}
    if missing := [f"{loop.name} of size {loop.size}" for loop in space.splittable if loop.name not in split]:
        raise InputError(
            f"{name}: in this example nothing can be split by {', '.join(missing)}; give one in which 2, 3 or 4 divides the sizes"
        )
    return check_space(op, space, tensors, function)
