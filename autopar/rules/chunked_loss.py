"""Heads and cross entropies that can be one op, which computes its logits in chunks; that op's rule.

Comes in: a `Graph`. Goes out: where in it a linear head is followed by a cross entropy and nothing else needs the logits
(`find_chunked_losses`), and the graph in which each such pair is one op (`chunk_losses`)::

    linear = linear(h, weight)                          h: [4, 16, 32]
    to = to(linear, float32)                            view = reshape(h, [64, 32])
    view = reshape(to, [64, 96])              ->        loss = linear_cross_entropy(view, weight, None, labels, ..., steps=(to float32,))
    loss = cross_entropy(view, labels)

What only moves tokens (a slice that drops the last of each sequence, a merge of dims) commutes with the head, which works on each token by
itself, and is done to the hidden states instead; what works on each logit by itself becomes a step of the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.ir import (
    ITEMSIZE,
    Exchange,
    Facts,
    Family,
    Graph,
    Meaning,
    Op,
    Operand,
    OpKind,
    Space,
    TargetMean,
    Tensor,
    Value,
    Working,
    Workspace,
)
from autopar.rules.notation import Rule, argument, is_float, normal, operand, space

TARGET = "autopar.linear_cross_entropy.default"
"""The op's name; `autopar.ops.chunked_loss` is what it runs."""

_HEAD, _LOSS = "aten.linear.default", "aten.cross_entropy_loss.default"
_STEPS = {"aten.to.dtype": "to", "aten.div.Tensor": "div", "aten.mul.Tensor": "mul", "aten.tanh.default": "tanh"}
_DROPPED = ("aten.contiguous.default", "aten.clone.default", "aten.alias.default")
_SLICE, _RESHAPE = "aten.slice.Tensor", "aten.reshape.default"
_MEAN, _SUM = 1, 2


RETURNED = "the model returns the logits, or what they are made into: return the loss alone"
"""Why most losses can't be computed in chunks."""


@dataclass(frozen=True, slots=True)
class ChunkedLoss:
    """A linear head and the cross entropy of its logits.

    Attributes:
        head, loss: names of the two calls.
        between: names of the calls between them, in order: those that are dropped, too.
        moves: those of them that move tokens.
        steps: those of them that work on each logit.
    """

    head: str
    loss: str
    between: tuple[str, ...]
    moves: tuple[str, ...]
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChunkedLosses:
    """The cross entropies of a graph whose logits a linear head makes.

    Attributes:
        found: those that can be computed in chunks.
        reasons: why the others can't, each with the user's line.
        logits_nbytes: bytes of the largest tensor of scores that any of them reads, if it were in float32.
    """

    found: tuple[ChunkedLoss, ...]
    reasons: tuple[str, ...]
    logits_nbytes: int


def find_chunked_losses(graph: Graph) -> ChunkedLosses:
    """The cross entropies of a graph that can be computed in chunks of their logits, and why others can't."""
    found: list[ChunkedLoss] = []
    reasons: list[str] = []
    elements = [0]
    for op in graph.of_kind(OpKind.CALL):
        if op.target == _LOSS:
            elements.append(graph.tensor(op.operands[0]).numel)
            loss = _match(graph, op)
            if isinstance(loss, ChunkedLoss):
                found.append(loss)
            else:
                reasons.append(f"{loss} ({op.source or op.name})")
    return ChunkedLosses(tuple(found), tuple(reasons), max(elements) * ITEMSIZE["float32"])


def _match(graph: Graph, loss: Op) -> ChunkedLoss | str:
    """The head whose logits a cross entropy reads, and what is between; or why there is none, in words."""
    logits, target = graph.operand_tensors(loss)[:2]
    if len(logits.shape) != 2 or len(target.shape) != 1 or is_float(target):
        return f"its logits are {logits} and its targets {target}; [tokens, vocabulary] and one class per token are needed"
    if operand(loss, 2, "weight") is not None:
        return "it has weights of classes"
    if argument(loss, 3, "reduction", _MEAN) not in (_MEAN, _SUM):
        return 'its reduction is "none"'
    between: list[Op] = []
    value = loss.operands[0]
    while True:
        if value in graph.output.operands:
            return RETURNED
        op = graph.by_name[value.op]
        if len(graph.readers[value]) > 1:
            others = (graph.by_name[name] for name in graph.readers[value] if name not in (loss.name, *(call.name for call in between)))
            reader = next(others, op)
            return f"{reader.target} reads the logits too ({reader.source or reader.name})"
        if op.target == _HEAD:
            break
        if not (op.target in _DROPPED or _is_step(op) or _is_move(graph, op)):
            return f"{op.target or op.kind} makes what it reads, not a linear head ({op.source or op.name})"
        between.insert(0, op)
        value = op.operands[0]
    return ChunkedLoss(
        head=op.name,
        loss=loss.name,
        between=tuple(call.name for call in between),
        moves=tuple(call.name for call in between if call.target in (_SLICE, _RESHAPE)),
        steps=tuple(call.name for call in between if call.target in _STEPS),
    )


def _is_step(op: Op) -> bool:
    """Whether a call computes each element from the same element of its one operand, in a way that `ops.chunked_loss.STEPS` knows."""
    if op.target not in _STEPS or len(op.operands) != 1 or op.kwargs or not is_float(op.results[0]):
        return False
    return len(op.args) == (1 if _STEPS[op.target] == "tanh" else 2) and op.args[0] == Operand(0)


def _is_move(graph: Graph, op: Op) -> bool:
    """Whether a call moves or drops tokens and leaves the last dim of a tensor as it is."""
    if op.target not in (_SLICE, _RESHAPE) or op.kwargs:
        return False
    (before,), after = graph.operand_tensors(op), op.results[0]
    is_of_last = op.target == _SLICE and normal(argument(op, 1, "dim", 0), len(before.shape)) == len(before.shape) - 1
    return bool(before.shape and after.shape) and before.shape[-1] == after.shape[-1] and not is_of_last


def chunk_losses(graph: Graph, losses: Sequence[ChunkedLoss], chunks: int) -> Graph:
    """The graph in which each of these losses and its head are one op, which works in `chunks` parts. Other ops keep their names."""
    dropped = {name for loss in losses for name in (loss.head, *loss.between)}
    made = {op.name: op for loss in losses for op in _make_ops(graph, loss, chunks)}
    for loss in losses:
        # A head that isn't trained doesn't save what it reads; one that computes its logits again does.
        value = graph.by_name[loss.head].operands[0]
        maker = graph.by_name[value.op]
        if maker.kind is OpKind.CALL and maker.name not in made:
            made[maker.name] = replace(maker, saved=maker.saved | {value.index})
    return Graph(tuple(made.get(op.name, op) for op in graph.ops if op.name in made or op.name not in dropped))


def _make_ops(graph: Graph, loss: ChunkedLoss, chunks: int) -> list[Op]:
    """The calls that replace a head, a loss and what is between; each has the name of one of them."""
    head, call = graph.by_name[loss.head], graph.by_name[loss.loss]
    hidden, weight, *bias = head.operands
    tensor = graph.tensor(hidden)
    ops: list[Op] = []
    is_cut = False
    for name in loss.moves:
        move = graph.by_name[name]
        tensor = Tensor((*move.results[0].shape[:-1], tensor.shape[-1]), tensor.dtype, tensor.requires_grad)
        args = (Operand(0), tensor.shape) if move.target == _RESHAPE else move.args
        # What a slice left is copied when its dims are merged, and the copy is saved.
        saved = frozenset({0} if is_cut and move.target == _RESHAPE else ())
        is_cut = move.target == _SLICE
        move = replace(move, operands=(hidden,), results=(tensor,), args=args, layer=head.layer, saved=saved, extra_saved_nbytes=0)
        # A slice leaves gaps, and so does its gradient.
        move = replace(move, working=Working() if saved else replace(move.working, forward=0, backward=0))
        hidden = Value(move.name)
        ops.append(move)
    places = [Operand(0), Operand(1), Operand(2) if bias else None, Operand(3 if bias else 2)]
    settings = (
        argument(call, 3, "reduction", _MEAN),
        argument(call, 4, "ignore_index", -100),
        argument(call, 5, "label_smoothing", 0.0),
        chunks,
        tuple(_read_step(graph.by_name[name]) for name in loss.steps),
    )
    fused = replace(
        call,
        target=TARGET,
        operands=(hidden, weight, *bias, call.operands[1]),
        args=(*places, *settings),
        kwargs={},
        layer=head.layer,
        saved=frozenset(),
        # The logarithm of each token's sum.
        extra_saved_nbytes=tensor.shape[0] * _widest(tensor),
        working=Working(saves=frozenset({0})),
    )
    return [*ops, fused]


def _read_step(op: Op) -> tuple[str, Any]:
    return _STEPS[op.target], op.args[1] if len(op.args) > 1 else None


def _widest(tensor: Tensor) -> int:
    """Bytes of a number in which sums over elements of a tensor are accumulated."""
    return max(ITEMSIZE["float32"], ITEMSIZE[tensor.dtype])


def linear_cross_entropy(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n i!, v* i!, v*, n ->``: as a cross entropy, with the product that makes its logits."""
    reduction, ignore_index, _, chunks, steps = op.args[4:]
    has_bias = op.args[2] is not None
    left = [["n", "i!"], ["v*", "i!"], *([["v*"]] if has_bias else []), ["n"]]
    mean = reduction == _MEAN
    itemsize, wide = ITEMSIZE[operands[0].dtype], _widest(operands[0])
    only_casts = all(name == "to" for name, _ in steps)
    return space(
        op,
        operands,
        left,
        [[]],
        flops=2.0,
        family=Family.MATMUL,
        kernel="linear_cross_entropy",
        kernel_loops=["v", *(["n"] if mean else [])],
        positional=["v"],
        facts=Facts(
            # The maximum of each token's logits and three sums; the backward has their logarithm.
            exchanges=(Exchange(frozenset("v"), "all_reduce", ("n",), forward=4, backward=0, itemsize=wide),),
            meanings={"v": Meaning.VOCABULARY},
            target_mean=TargetMean(target=len(operands) - 1, weight=None, ignore_index=int(ignore_index)) if mean else None,
            # The logits, in the head's dtype while they are cast; with other steps what these save, and their gradients.
            workspace=Workspace(
                ("n", "v"), chunks, (itemsize if itemsize < wide else 0) + wide + (0 if only_casts else 5 * itemsize), passes=6
            ),
            recomputes=True,
        ),
    )


RULES: dict[str, Rule] = {TARGET: linear_cross_entropy}
