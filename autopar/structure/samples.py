"""Where the samples of the batch are in the inputs and outputs of a graph.

Comes in: a graph, the spaces of its calls and the roles of dims. Goes out: per input and output the state that splits it into samples, as a
rank has them that is passed its own part of the batch, or None.
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.ir import Graph, OpKind, Space, State, Value, shard
from autopar.structure.microbatches import batch_size
from autopar.structure.roles import GraphRoles, Role


def find_samples(graph: Graph, spaces: Mapping[str, Space], roles: GraphRoles) -> dict[Value, State | None]:
    """The state that splits each input and each returned value into samples; None where the batch isn't in it.

    An input has the batch as dim 0, if that has the size that most inputs have there. In an output, the batch is in the first dim whose
    role is BATCH and whose blocks are as large as the batch, or several times as large: rows of ``(b s)``, dim 1 of what was transposed,
    the halves of two batches joined (``S0/2``). What an op without a rule made, or is made from that, has the batch as dim 0 if it has its
    size.
    """
    batch = batch_size(graph, roles)
    found: dict[Value, State | None] = {}
    for op in graph.of_kind(OpKind.INPUT):
        shape = op.results[0].shape
        found[Value(op.name)] = shard(0) if shape[:1] == (batch,) else None
    unruled: set[str] = set()  # calls without a rule, and what is made from their results
    for op in graph.of_kind(OpKind.CALL):
        if op.name not in spaces or any(value.op in unruled for value in op.operands):
            unruled.add(op.name)
    for value in graph.returned:
        shape = graph.tensor(value).shape
        states = (
            shard(dim, outer)
            for dim, size in enumerate(shape)
            for outer, role in sorted(roles.of_dims[value][dim].items())
            if role is Role.BATCH and size % (outer * batch) == 0
        )
        fallback = shard(0) if value.op in unruled and shape[:1] == (batch,) else None
        found.setdefault(value, next(states, fallback) if batch > 1 else None)
    return found
