"""What autograd saves for the backward: which results of which calls, and which copies that resharding makes for a reader.

Comes in: a folded graph, whose ops say what `autopar.capture` saw autograd save (`Op.saved`, `Op.extra_saved_nbytes`). Goes out: counts per
representative (`SavedTensors`). No mesh is known here; bytes of one rank's parts are computed by ``costs.memory`` per block and by
``search.placement`` per decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.ir import Layout, OpKind, Space, StateKind, Value
from autopar.structure.layers import Folded


@dataclass(frozen=True)
class SavedTensors:
    """What autograd saves of the calls of a model, summed over the calls that each representative stands for.

    Of four layers folded into one, three may save a result and the last not, because nothing after it needs the result: `times` is 3 then.

    Attributes:
        times: result of a representative -> how many of the calls that it stands for have theirs saved.
        extra_nbytes: representative -> bytes that autograd saves beside operands and results, such as a norm's statistics, of all calls
            together and of whole tensors.
        saved_or_view: results that autograd saves for at least one call, and results that are views of these.
    """

    times: Mapping[Value, int]
    extra_nbytes: Mapping[str, int]
    saved_or_view: frozenset[Value]

    def saves_copy(self, kind: OpKind, value: Value, start: Layout, need: Layout) -> bool:
        """Whether autograd saves a copy of a value that was resharded for a reader that saves the operand.

        Which readers do is asked of `AnalyzedGraph.saves_operand`.

        Args:
            kind: of the op that makes the value.
            value: a result of a representative.
            start: the layout in which it is made, over the axes of ranks only.
            need: the layout in which it is read, over the same axes.
        """
        # Inputs, parameters and buffers are alive anyway, so capture doesn't note whether the backward needs them.
        if kind is OpKind.CALL and value not in self.saved_or_view:
            return False
        if kind is OpKind.PARAMETER and any(s.kind is StateKind.SHARD and s != n for s, n in zip(start, need, strict=True)):
            return False  # gathered again in the backward
        return any(
            s != n and (s.kind, n.kind) != (StateKind.REPLICATE, StateKind.REPLICATE_PARTIAL_GRAD) for s, n in zip(start, need, strict=True)
        )


def count_saved(folded: Folded, spaces: Mapping[str, Space]) -> SavedTensors:
    """Count what autograd saves of the calls of a folded graph, by representative; `spaces` are those of the calls that have a rule."""
    times: Counter[Value] = Counter()
    extra_nbytes: Counter[str] = Counter()
    for op in folded.graph.of_kind(OpKind.CALL):
        name = folded.representative[op.name]
        times.update(Value(name, index) for index in op.saved)
        extra_nbytes[name] += op.extra_saved_nbytes
    saved_or_view = set(times)
    for op in folded.ops:
        space = spaces.get(op.name)
        if space is not None and space.view and folded.representative_of(op.operands[0]) in saved_or_view:
            saved_or_view.update(Value(op.name, index) for index in range(len(op.results)))
    return SavedTensors(times, extra_nbytes, frozenset(saved_or_view))
