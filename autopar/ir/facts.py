"""What is known of an op beside its loops: weights, writes, exchanges, and what its loops mean.

A rule gives these facts together with the loops (`Space.facts`), so that no other module needs to know an op by its name.
Loops are named as in the rule's text, operands are numbered as in `Op.operands`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from autopar.ir.windows import HaloSize


class Family(StrEnum):
    """What an op is to the hardware; the values are the words that `cost_models.op.op_seconds` takes."""

    POINTWISE = "pointwise"
    MATMUL = "matmul"
    ATTENTION = "attention"
    LOOKUP = "lookup"

    def backward_work(self, gradients: int) -> float:
        """Operations and bytes of an op's backward as a multiple of its forward's, where `gradients` operands need a gradient.

        A product makes one product per operand that needs a gradient, two at most. A fused attention makes five products for the
        forward's two, because it computes the scores again (Dao 2023, section 3.1). Other ops make all gradients in one pass
        over half as many bytes again.
        """
        if self is Family.MATMUL:
            return float(min(gradients, 2))
        return 2.5 if self is Family.ATTENTION else 1.5


class Meaning(StrEnum):
    """What a loop of a product, attention, lookup or loss runs over; reports name the split of a loop so."""

    FEATURES = "features"
    HEADS = "heads"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A collective that an op's kernel runs along every mesh axis that splits one of `split`.

    Attributes:
        split: the loops whose split makes the exchange necessary.
        collective: its kind, a word of `cost_models.collective.collective_seconds`.
        loops: the loops that a rank's part of the exchanged tensor runs over: what an all-reduce sums, what an all-gather reads, what
            a reduce-scatter returns. Loops that are split count with their local sizes.
        forward, backward: how often it runs in each direction.
        itemsize: bytes of an element.
        is_hidden: whether it runs beside the op's own computing, part by part.
        halo: what of a rank's part others need, if they don't need all of it. A ring of parts that are split zigzag counts as one of whole
            parts, of which it sends less.

    A batch norm sums two float32 statistics per channel over the ranks that split its batch, in the forward and in the backward:

    >>> Exchange(frozenset("n"), "all_reduce", ("c",), forward=2, backward=2)
    Exchange(split=frozenset({'n'}), collective='all_reduce', loops=('c',), forward=2, backward=2, itemsize=4, is_hidden=False, halo=None)
    """

    split: frozenset[str]
    collective: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "ring", "halo"]
    loops: tuple[str, ...]
    forward: int
    backward: int
    itemsize: int = 4
    is_hidden: bool = False
    halo: HaloSize | None = None

    @property
    def is_between_neighbours(self) -> bool:
        """Whether ranks send to certain others, which they know along one axis of the mesh only."""
        return self.collective in ("ring", "halo")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory that an op needs while it runs, in the forward and in the backward, beside its operands and results.

    Attributes:
        loops: the loops that it runs over; those that are split count with their local sizes.
        chunks: number of parts in which the op works them off, one after the other.
        itemsize: bytes per point of the loops.
        passes: how often, in either direction, these bytes are read or written, for costs.
    """

    loops: tuple[str, ...]
    chunks: int
    itemsize: int
    passes: int


@dataclass(frozen=True, slots=True)
class KernelMemory:
    """Memory of the kernel that replaces an op where a loop is split, instead of what the op itself was seen to save and to need.

    Attributes:
        split: the loops whose split makes the kernel necessary.
        saves: operands that it saves as they are.
        loops: the loops that `forward` and `backward` run over; those that are split count with their local sizes.
        forward, backward: bytes per point that are needed while it runs, beside operands, results and their gradients.
        saved: bytes that are saved per point of the loops that aren't in `split`.
    """

    split: frozenset[str]
    saves: frozenset[int]
    loops: tuple[str, ...]
    forward: int
    backward: int
    saved: int


@dataclass(frozen=True, slots=True)
class TargetMean:
    """A mean over the targets that count: over parts of the tokens, the op must be told the number of targets in the whole batch.

    Attributes:
        target: the operand of classes.
        weight: the operand of class weights, whose sum over the targets the mean divides by; None without weights.
        ignore_index: the class of targets that don't count.
    """

    target: int
    weight: int | None
    ignore_index: int


@dataclass(frozen=True, slots=True)
class MicrobatchRefusal:
    """Why an op needs the whole batch at once, and what to use instead: words of the message that refuses micro-batches."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of one call of an op; the defaults hold for most ops.

    Attributes:
        weights: the operands that are the op's weight and bias, the weight first, if `autopar.ops.deferrable` can compute
            their gradients in a pass of its own; empty for ops that it has no function for.
        writes: operands that the op changes in place.
        exchanges: the collectives inside the op's kernel that cost models count; every KERNEL loop is in the `split` of one.
        coupled: loops that aren't KERNEL loops, but whose parts the kernel must gather something from, too little to be counted.
            Micro-batches, which can't exchange anything, split neither these nor KERNEL loops.
        meanings: loops that run over something else than features.
        workspace: memory that the op needs beside its operands and results; None for little.
        kernel_memory: what the kernel of a split loop saves and needs; None where that is no more than what the op itself does.
        recomputes: the backward computes the forward's work again before its own.
        triangular: loops along which an op does nothing for the first iteration and most for the last, as under a causal mask: of n equal
            parts the last does ``2 - 1/n`` times as much as the mean.
        ring_refusal: why an attention's rows and keys can't be split together, for messages; empty where they can, and for other ops.
        softmax: the op turns scores into weights that add up to one; the attention core is found around it.
        target_mean: the op is a mean over the targets that count.
        microbatch_refusal: why the op needs the whole batch at once, for the message that refuses micro-batches. That it does follows from
            `writes` and from the loops that only a kernel with exchanges may split.
    """

    weights: tuple[int, ...] = ()
    writes: frozenset[int] = frozenset()
    exchanges: tuple[Exchange, ...] = ()
    coupled: frozenset[str] = frozenset()
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    workspace: Workspace | None = None
    kernel_memory: KernelMemory | None = None
    recomputes: bool = False
    triangular: frozenset[str] = frozenset()
    ring_refusal: str = ""
    softmax: bool = False
    target_mean: TargetMean | None = None
    microbatch_refusal: MicrobatchRefusal | None = None

    def meaning_of(self, loop: str) -> Meaning:
        """What a loop runs over."""
        return self.meanings.get(loop, Meaning.FEATURES)

    def loops_of(self, meaning: Meaning) -> frozenset[str]:
        """The loops that run over `meaning` and are named in `meanings`."""
        return frozenset(loop for loop, named in self.meanings.items() if named is meaning)
