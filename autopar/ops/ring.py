"""Ring attention: every rank has a part of the sequence's queries, keys and values, and keys and values travel from rank to rank.

Comes in: this rank's parts. Goes out: its part of the result. While a rank computes with the keys and values of one part, the next ones
are on their way (Liu et al. 2023, "Ring Attention with Blockwise Transformers"); results of parts are merged by their log-sum-exp. In the
backward keys and values travel again, and their gradients, which add up on the way, come home at last. Four ranks, the part that each
computes with::

    rank 0    0   3   2   1       without a mask
    rank 1    1   0   3   2
    rank 2    2   1   0   3
    rank 3    3   2   1   0

A part that no row of a rank attends to, because of a causal mask or a window, isn't sent to it. Under a window a rank is sent only some
keys of a part: from the first to the last that it, or a rank to which it sends them on, needs. A causal mask leaves the ranks unequal work
if each has one piece of the sequence, and equal work if each has two, the i-th from the front and the i-th from the end (zigzag)::

    contiguous, 2 ranks   0 0 0 0 1 1 1 1          zigzag   0 0 1 1 1 1 0 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autopar.ops import comm
from autopar.ops.attention_blocks import BlockMask, Scores, attend, attend_backward, attend_by_products, find_shift, may_need_shift, merge
from autopar.ops.collectives import gather_read_along
from autopar.ops.positions import Block, Positions, Span, find_blocks, spans_of


class Stop(NamedTuple):
    """A part of keys and values as this rank meets it.

    Attributes:
        owner: the rank whose part it is.
        blocks: what this rank computes with it.
        here: the keys of the part that come here; all of them at their owner.
        sent: those of them that go on.
        summed: the keys whose gradients come here and go on; all of them at their owner.
        source, target: the ranks it comes from and goes to; None at its owner, and at the last that needs it.
    """

    owner: int
    blocks: tuple[Block, ...]
    here: slice
    sent: slice
    summed: slice
    source: int | None
    target: int | None


@dataclass(frozen=True, slots=True)
class Itinerary:
    """The stops of one rank, its own part first, and what comes home at last.

    Of every part the ranks that need it are visited in the order of the ring, beginning behind its owner. It is a rotation if every rank
    needs the whole of all parts: all ranks then pass theirs to the next one at the same time.

    Attributes:
        stops: in order.
        last: the rank from which the gradients of this rank's own part come home; None where no other needs it.
        lent: the keys of the own part that others need.
        is_rotation: whether it is one.
    """

    stops: tuple[Stop, ...]
    last: int | None
    lent: slice
    is_rotation: bool


def plan_ring(rank: int, ranks: int, length: int, positions: Positions, *, zigzag: bool, rotates: bool = False) -> Itinerary:
    """The itinerary of a rank, whose part of the sequence has `length` tokens; with `rotates` every part visits every rank."""
    spans = [spans_of(number, ranks, length, zigzag=zigzag) for number in range(ranks)]

    def visited(owner: int) -> list[tuple[int, tuple[Block, ...]]]:
        """The ranks that need a part, its owner first, each with its blocks."""
        found = [(number % ranks, find_blocks(spans[number % ranks], spans[owner], positions)) for number in range(owner, owner + ranks)]
        return [(number, blocks) for number, blocks in found if number == owner or blocks or rotates]

    def needed(route: Sequence[tuple[int, tuple[Block, ...]]]) -> slice:
        """The keys of a part from the first that one of these ranks needs to the last."""
        if rotates or positions.most == float("inf"):  # the rank that sends most sends as much if others leave some out
            return slice(0, length)
        slices = [block.key_slice for _, blocks in route for block in blocks]
        return slice(min((keys.start for keys in slices), default=0), max((keys.stop for keys in slices), default=0))

    stops = []
    for hop in range(ranks):
        owner = (rank - hop) % ranks
        route = visited(owner)
        place = next((place for place, (number, _) in enumerate(route) if number == rank), None)
        if place is not None:
            stops.append(
                Stop(
                    owner,
                    route[place][1],
                    needed(route[place:]) if place else slice(0, length),
                    needed(route[place + 1 :]),
                    needed(route[1:]) if place else slice(0, length),
                    route[place - 1][0] if place else None,
                    route[place + 1][0] if place + 1 < len(route) else None,
                )
            )
    own = visited(rank)
    is_whole = rotates or positions.most == float("inf")
    is_rotation = ranks > 1 and is_whole and all(len(visited(owner)) == ranks for owner in range(ranks))
    return Itinerary(tuple(stops), own[-1][0] if len(own) > 1 else None, needed(own[1:]), is_rotation)


def _inside(keys: slice, held: slice) -> slice:
    """Keys of a part, counted from the first of those that are held of it."""
    return slice(keys.start - held.start, keys.stop - held.start)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    positions: Positions,
    scores: Scores,
    axis: comm.Axis,
    *,
    zigzag: bool = False,
    rotates: bool = False,
) -> Tensor:
    """Attention of this rank's rows to all keys, of which every rank has a part; a row that attends to no key gets zeros.

    Args:
        q: (batch, heads, rows, head size), this rank's rows.
        k: (batch, key/value heads, rows, head size), the keys of the same tokens, not repeated.
        v: (batch, key/value heads, rows, width).
        key_padding: bool (batch, keys of the whole sequence), True where a key may be attended to.
        bias: mask (bool, True attends) or added scores of this rank's rows, broadcastable to (batch, heads, rows, keys of the whole
            sequence); it gets no gradient.
        positions: which keys a row attends to by their positions.
        scores: how scores are made.
        axis: the ranks between which the sequence is split.
        zigzag: whether each rank has two pieces of it, the i-th from the front and the i-th from the end.
        rotates: whether whole parts visit ranks that need nothing of them, too. It must be so over NCCL: where only some ranks send, each
            sends before it receives, and a send that waits for its receive would wait for ever.
    """
    itinerary = plan_ring(axis.index, axis.size, q.shape[2], positions, zigzag=zigzag, rotates=rotates)
    rows = spans_of(axis.index, axis.size, q.shape[2], zigzag=zigzag)
    ring = _Ring(itinerary, positions, scores, rows, axis, zigzag, key_padding, bias).with_shift(axis.size * q.shape[2], q.device)
    result: Tensor = _RingAttention.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
    return result


def attention_of_rows(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, bias: Tensor | None, positions: Positions, scores: Scores, first: int
) -> Tensor:
    """Attention of consecutive rows to the keys of the whole sequence, which are all here; a row that attends to no key gets zeros.

    It is a ring of one rank: what no row attends to isn't computed, and no mask of these rows and all keys is made, unless scores are added
    (`find_shift` needs it). Arguments are those of `ring_attention`, but for

    Args:
        q: (batch, heads, rows, head size).
        k: (batch, key/value heads, keys of the whole sequence, head size).
        v: (batch, key/value heads, keys of the whole sequence, width).
        key_padding: as there.
        bias: as there.
        positions: as there.
        scores: as there.
        first: the position of the first row.
    """
    rows, last, length = Span(first, q.shape[2]), first + q.shape[2], k.shape[2]
    keys = [span for span in (Span(0, first), rows, Span(last, length - last)) if span.length]
    whole, nothing = slice(0, length), slice(0, 0)
    stop = Stop(0, find_blocks((rows,), keys, positions), whole, nothing, whole, None, None)
    ring = _Ring(
        Itinerary((stop,), None, nothing, is_rotation=False), positions, scores, (rows,), comm.alone("s"), False, key_padding, bias
    )
    ring = ring.with_shift(length, q.device)
    result: Tensor = _RingAttention.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
    return result


_Pair = tuple[Tensor, Tensor]
"""Keys and values, or the gradients of both: (batch, heads, keys, width)."""


@dataclass(frozen=True, slots=True)
class _Ring:
    """What the forward and the backward of one call share, beside the tensors that have gradients.

    Attributes:
        itinerary: the stops of this rank.
        positions: which keys a row attends to by their positions.
        scores: how scores are made.
        rows: the pieces of the sequence that this rank's rows are.
        axis: the ranks between which keys and values are split.
        zigzag: whether each has two pieces.
        key_padding, bias: as `ring_attention` has them.
        shift: of the scores of these rows, as `BlockMask` has it.
    """

    itinerary: Itinerary
    positions: Positions
    scores: Scores
    rows: tuple[Span, ...]
    axis: comm.Axis
    zigzag: bool
    key_padding: Tensor | None
    bias: Tensor | None
    shift: Tensor | None = None

    def with_shift(self, keys: int, device: torch.device) -> _Ring:
        """The same, with the shift that these rows need of so many keys of the whole sequence."""
        if self.bias is None or self.bias.dtype is torch.bool or not may_need_shift(self.bias):
            return self
        allowed = self.positions.allow(self.rows, [Span(0, keys)], device)
        if self.key_padding is not None:
            allowed = allowed & self.key_padding[:, None, None, :]
        return replace(self, shift=find_shift(self.bias, allowed))

    def mask_of(self, block: Block, device: torch.device) -> BlockMask:
        """The mask of a block."""
        if block.is_causal and self.key_padding is None and self.bias is None:
            return BlockMask(is_causal=True)
        allowed: Tensor | None = None
        added: Tensor | None = None
        shift = self.shift
        if shift is not None and shift.shape[-2] > 1:
            shift = shift[..., block.row_slice, :]
        if block.is_causal or block.is_partial:
            allowed = self.positions.allow(block.rows, block.keys, device)
        if self.key_padding is not None:
            padding = _columns(self.key_padding, block.keys)[:, None, None, :]
            allowed = padding if allowed is None else allowed & padding
        if self.bias is not None:
            bias = _columns(self.bias, block.keys)
            bias = bias[..., block.row_slice, :] if bias.dim() > 1 and bias.shape[-2] > 1 else bias
            if bias.dtype is torch.bool:
                allowed = bias if allowed is None else allowed & bias
            else:
                added = bias
        return BlockMask(allowed=allowed, bias=added, shift=shift)

    def attend_to_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The result of this rank's rows, in operators that can be differentiated any number of times."""
        k, v = (gather_read_along(x, self.axis, 2, zigzag=self.zigzag) for x in (k, v))
        block = Block(self.rows, (Span(0, k.shape[2]),), 0, 0, is_partial=True)
        return attend_by_products(q, k, v, self.mask_of(block, q.device), self.scores)

    def travel(self, k: Tensor, v: Tensor, added_dtype: torch.dtype | None = None) -> Iterator[tuple[Stop, _Pair, comm.Message | None]]:
        """Every stop of this rank with the keys and values there, which are received while the stop before is computed with.

        With `added_dtype` also with a message of that dtype: what ranks before this one add to the gradients of these keys and values, one
        after the other as `_pack` puts them. It comes of every stop but a part's own and the first after that; in a rotation it comes of
        what the caller rotates. Messages of two ranks keep their order: at a stop the keys and values are sent on before their gradients.
        """
        stops = self.itinerary.stops
        here = k, v
        packed: Tensor | None = None
        sent: list[comm.Message] = []
        for number, stop in enumerate(stops):
            added: comm.Message | None = None
            awaited: comm.Message | None = None
            if self.itinerary.is_rotation:
                if stop.target is not None:
                    packed = _pack(here) if packed is None else packed
                    awaited = self.axis.begin_rotate(packed)
            else:
                if stop.target is not None:
                    keys, values = (x[:, :, _inside(stop.sent, stop.here)] for x in here)
                    sent.append(self.axis.send(_pack((keys, values)), stop.target))
                if added_dtype is not None and stop.source is not None and stop.source != stop.owner:
                    added = self.axis.receive(stop.source, _size(k, v, stop.summed), added_dtype, k.device)
                for following in stops[number + 1 : number + 2]:
                    assert following.source is not None, "a rank begins with its own part"
                    awaited = self.axis.receive(following.source, _size(k, v, following.here), k.dtype, k.device)
            yield stop, here, added
            if awaited is not None:
                packed = awaited.wait()
                here = _unpack(packed, k, v)
        for message in sent:
            message.wait()


def _size(k: Tensor, v: Tensor, tokens: slice) -> tuple[int]:
    """The size of the message that `_pack` makes of some tokens of a part of keys and values."""
    return (k.shape[0] * k.shape[1] * (tokens.stop - tokens.start) * (k.shape[3] + v.shape[3]),)


def _pack(pair: _Pair) -> Tensor:
    """Keys and values, or gradients of them, as one message; both as (batch, keys, heads, width), as projections and kernels make them."""
    return torch.cat([x.transpose(1, 2).reshape(-1) for x in pair])


def _unpack(packed: Tensor, k: Tensor, v: Tensor) -> _Pair:
    """What `_pack` was given, of any number of tokens, with the other sizes of k and v; it isn't copied."""
    tokens = packed.numel() // (k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]))
    shapes = [(x.shape[0], tokens, x.shape[1], x.shape[3]) for x in (k, v)]
    first = torch.Size(shapes[0]).numel()
    return packed[:first].view(shapes[0]).transpose(1, 2), packed[first:].view(shapes[1]).transpose(1, 2)


def _columns(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The last dim at these positions; a dim of one stands for all."""
    if x.shape[-1] == 1:
        return x
    pieces = [x.narrow(-1, span.start, span.length) for span in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _of_no_keys(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result of rows that have attended to nothing yet, and its log-sum-exp."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros((*q.shape[:3], v.shape[3]), dtype=wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)


def _add(total: Tensor | None, part: Tensor, place: slice, tokens: int, dtype: torch.dtype) -> Tensor:
    """The gradient of so many tokens, with a further part of it at this place among them."""
    if total is None:
        if part.shape[2] == tokens:
            return part.to(dtype)
        total = part.new_zeros((*part.shape[:2], tokens, part.shape[3]), dtype=dtype)
    total[:, :, place] += part
    return total


class _RingAttention(torch.autograd.Function):
    """The attention itself. Gradients that are to be differentiated again are made of all keys and values, gathered on every rank."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        whole: tuple[Tensor, Tensor] | None = None
        for stop, (keys, values), _ in ring.travel(k.detach(), v.detach()):
            for block in stop.blocks:
                mask = ring.mask_of(block, q.device)
                rows, columns = block.row_slice, _inside(block.key_slice, stop.here)
                part = attend(q[:, :, rows], keys[:, :, columns], values[:, :, columns], mask, ring.scores)
                if whole is None and part[1].shape == q.shape[:3]:
                    whole = part
                else:
                    whole = whole or _of_no_keys(q, v)
                    merge(whole[0][:, :, rows], whole[1][:, :, rows], *part)
        assert whole is not None, "a rank's rows attend to its own keys"
        result, lse = whole[0].to(q.dtype), whole[1]
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.ring = ring
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        q, k, v, result, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        if torch.is_grad_enabled():
            return (*torch.autograd.grad(ring.attend_to_all(q, k, v), (q, k, v), gradient, create_graph=True), None)
        wide = lse.dtype
        of_q: Tensor | None = None
        of_own: _Pair = (k, v)
        sent: list[comm.Message] = []
        rotated: comm.Message | None = None
        for stop, (keys, values), added in ring.travel(k.detach(), v.detach(), wide):
            of_keys: Tensor | None = None
            tokens = stop.summed.stop - stop.summed.start
            of_values: Tensor | None = None
            parts: tuple[Tensor, ...] = ()
            for block in stop.blocks:
                mask = ring.mask_of(block, q.device)
                rows, columns, summed = block.row_slice, _inside(block.key_slice, stop.here), _inside(block.key_slice, stop.summed)
                parts = attend_backward(
                    gradient[:, :, rows],
                    q[:, :, rows],
                    keys[:, :, columns],
                    values[:, :, columns],
                    result[:, :, rows],
                    lse[:, :, rows],
                    mask,
                    ring.scores,
                )
                of_q = _add(of_q, parts[0], rows, q.shape[2], wide)
                of_keys = _add(of_keys, parts[1], summed, tokens, wide)
                of_values = _add(of_values, parts[2], summed, tokens, wide)
            if of_keys is None or of_values is None:  # of a rotation, where it computes nothing
                of_keys, of_values = (x.new_zeros(x.shape, dtype=wide) for x in (keys, values))
            if stop.source is None:
                of_own = of_keys, of_values
                continue
            packed = _pack((of_keys, of_values))
            parts = ()
            del of_keys, of_values  # while the message is on its way nobody needs them
            before = added if rotated is None else rotated
            if before is not None:
                packed += before.wait()
            if ring.itinerary.is_rotation:
                rotated = ring.axis.begin_rotate(packed)
            else:
                sent.append(ring.axis.send(packed, stop.owner if stop.target is None else stop.target))
        if ring.itinerary.last is not None:
            if rotated is None:
                rotated = ring.axis.receive(ring.itinerary.last, _size(k, v, ring.itinerary.lent), wide, k.device)
            packed = rotated.wait()
            for total, others in zip(of_own, _unpack(packed, k, v), strict=True):
                total[:, :, ring.itinerary.lent] += others
        for message in sent:
            message.wait()
        assert of_q is not None
        return of_q.to(q.dtype), of_own[0].to(k.dtype), of_own[1].to(v.dtype), None
