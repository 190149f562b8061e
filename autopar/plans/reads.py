"""What the calls of a plan read, and in which layout: the edges of the graph of its ops.

Comes in: what `autopar.search` decided. Goes out: a part of the plan, from which pictures of ops are drawn without the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir import Layout, Tensor
from autopar.plans.files import Name


@dataclass(frozen=True, slots=True)
class Read:
    """An operand of a call.

    Attributes:
        value: the tensor that is read, by the op that makes it: ``add_3``, or ``split.1`` for the second result of an op. Calls of like
            layers are stood for by the first, but this is the op itself: the first layer of a later group may read ``add_438``.
        tensor: its type, of one micro-batch on all ranks together, ``bfloat16[8, 128]``.
        made: the layout in which it is made, or in which the program is given it.
        need: the layout in which the call reads it. Where the two differ, ranks exchange (`autopar.ir.journey` says what).
        gradient: the dtype in which its gradient is summed over ranks; empty where it has no gradient.
    """

    value: Name
    tensor: str
    made: Layout
    need: Layout
    gradient: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""
        return Tensor.parse(self.tensor).shape

    @property
    def dtype(self) -> str:
        """Type of the elements."""
        return Tensor.parse(self.tensor).dtype
