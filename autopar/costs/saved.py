"""What autograd keeps of a graph's calls for the backward, and of the copies that journeys between layouts make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.ir import Layout, OpKind, StateKind, Value
from autopar.structure import Model


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of the ops that a representative stands for; like layers needn't keep alike.

    Attributes:
        times: how often a result is kept.
        beside: bytes kept beside operands and results.
        seen_into: results that are kept themselves, or that look into a tensor that is kept.
    """

    times: Mapping[Value, int]
    beside: Mapping[str, int]
    seen_into: frozenset[Value]

    def is_copied(self, kind: OpKind, value: Value, start: Layout, need: Layout) -> bool:
        """Whether a consumer that keeps its operand `value`, of an op of this kind, keeps a copy that was made for it on the way.

        `value` is a representative's; the layouts are over ranks only.
        """
        # What the program is given is kept anyway, and so nobody noted whether the backward needs it.
        if kind is OpKind.CALL and value not in self.seen_into:
            return False
        if kind is OpKind.PARAMETER and any(s.kind is StateKind.SHARD and s != n for s, n in zip(start, need, strict=True)):
            return False  # gathered again in the backward
        return any(s != n and (s.kind, n.kind) != (StateKind.REPLICATE, StateKind.BROADCAST) for s, n in zip(start, need, strict=True))


def count_kept(model: Model) -> Kept:
    """What autograd keeps of the model's calls, by representative."""
    times: Counter[Value] = Counter()
    beside: Counter[str] = Counter()
    for op in model.folded.graph.of_kind(OpKind.CALL):
        name = model.folded.representative[op.name]
        times.update(Value(name, index) for index in op.saved)
        beside[name] += op.saved_nbytes
    seen_into = set(times)
    for op in model.folded.ops:
        space = model.spaces.get(op.name)
        if space is not None and space.view and model.folded.representative_of(op.operands[0]) in seen_into:
            seen_into.update(Value(op.name, index) for index in range(len(op.results)))
    return Kept(times, beside, frozenset(seen_into))


def keeps_operand(model: Model, consumer: str, operand: int) -> bool:
    """Whether an op may keep an operand for its backward; one that is linear in it needn't, but a view hands it on."""
    space = model.spaces.get(consumer)
    if not any(tensor.requires_grad for tensor in model.folded.graph.by_name[consumer].results):
        return False
    return space is None or space.view or operand not in space.linear
