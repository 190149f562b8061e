"""What planning sees of a program: tensors, ops and a graph of them. Nothing of torch, plain frozen data.

Comes in from ``capture``; goes out to ``rules``, ``problem`` and ``report``. An op keeps the name of its fx node, so that
a plan made for a `Graph` can be applied to the fx graph that it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

# Bytes of one element. Sub-byte and quantised types don't occur in training graphs.
ITEMSIZE: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape, dtype and differentiability of a value; `dtype` is torch's name without the ``torch.`` prefix."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands for operand `index` of the op inside `Op.args` and `Op.kwargs`."""

    index: int


@dataclass(frozen=True, slots=True)
class Value:
    """Result `index` of the op called `op`."""

    op: str
    index: int = 0

    def __str__(self) -> str:
        return self.op if self.index == 0 else f"{self.op}.{self.index}"


class OpKind(Enum):
    """What an op is to the program."""

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CALL = "call"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Op:
    """One step of the program.

    Attributes:
        name: unique; the name of the fx node.
        kind: input, parameter, buffer, call or output.
        target: for a call, the overload's name such as ``aten.linear.default``; else the user's name of the input,
            parameter or buffer (``transformer.h.0.mlp.c_fc.weight``).
        operands: the tensors read, flattened in argument order (a list of tensors gives one operand each).
        results: the tensors made; several for ops such as ``aten.split``.
        args, kwargs: the call's arguments, each tensor replaced by `Operand`. The output's ``updates`` names the buffers whose
            new values its last operands are.
        layer: path of the module that the op belongs to, such as ``transformer.h.0.mlp``; empty at the root.
        source: the user's line, ``file.py:12: y = self.fc(x)``; empty when unknown.
        saved: results that autograd keeps for the backward (by index).
        saved_nbytes: bytes that autograd keeps for this op beyond its operands and results (such as statistics).
    """

    name: str
    kind: OpKind
    target: str
    operands: tuple[Value, ...]
    results: tuple[Tensor, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""
    source: str = ""
    saved: frozenset[int] = frozenset()
    saved_nbytes: int = 0

    def __str__(self) -> str:
        operands = ", ".join(map(str, self.operands))
        results = ", ".join(map(str, self.results))
        return f"{self.name} = {self.target}({operands}) -> {results}"


@dataclass(frozen=True, slots=True)
class Graph:
    """Ops in an order in which every op comes after the ops whose results it reads; checked on construction.

    Attributes:
        ops: all of them, the output last.
        by_name: op name -> op.
        readers: value -> the names of the ops that read it, in program order, one for each operand that does.
    """

    ops: tuple[Op, ...]
    by_name: Mapping[str, Op] = field(init=False, repr=False, compare=False)
    readers: Mapping[Value, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        seen: dict[str, Op] = {}
        readers: dict[Value, list[str]] = {}
        for op in self.ops:
            if op.name in seen:
                raise ValueError(f"two ops are called {op.name!r}")
            for value in op.operands:
                if value.op not in seen:
                    raise ValueError(f"{op.name!r} reads {value}, which no earlier op makes")
                if value.index >= len(seen[value.op].results):
                    raise ValueError(f"{op.name!r} reads result {value.index} of {value.op!r}, which has {len(seen[value.op].results)}")
                readers.setdefault(value, []).append(op.name)
            seen[op.name] = op
        object.__setattr__(self, "by_name", seen)
        object.__setattr__(self, "readers", {value: tuple(names) for value, names in readers.items()})

    def tensor(self, value: Value) -> Tensor:
        """The tensor that `value` stands for."""
        return self.by_name[value.op].results[value.index]

    def operand_tensors(self, op: Op) -> tuple[Tensor, ...]:
        """The tensors that `op` reads, in operand order."""
        return tuple(self.tensor(value) for value in op.operands)

    def of_kind(self, kind: OpKind) -> tuple[Op, ...]:
        """The ops of one kind, in order."""
        return tuple(op for op in self.ops if op.kind is kind)

    @property
    def output(self) -> Op:
        """The op that returns: it reads what the user gets, then the new values of buffers."""
        (output,) = self.of_kind(OpKind.OUTPUT)
        return output

    @property
    def returned(self) -> tuple[Value, ...]:
        """The values that the user gets, in the order of the flattened outputs."""
        return self.output.operands[: len(self.output.operands) - len(self._updated_buffers)]

    @property
    def updates(self) -> Mapping[str, Value]:
        """The user's name of each buffer that the program gives a new value -> that value."""
        names = self._updated_buffers
        return dict(zip(names, self.output.operands[len(self.output.operands) - len(names) :], strict=True))

    @property
    def _updated_buffers(self) -> tuple[str, ...]:
        return tuple(self.output.kwargs.get("updates", ()))

    @property
    def loss(self) -> int | None:
        """Position of the output that is the loss: the first of one element that needs a gradient; None when there is none."""
        tensors = enumerate(map(self.tensor, self.output.operands))
        return next((position for position, tensor in tensors if tensor.requires_grad and tensor.numel == 1), None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))


def freeze(value: Any) -> Any:
    """A hashable stand-in for an op's argument; equal arguments give equal stand-ins."""
    if isinstance(value, Operand | int | float | str | bool | type(None)):
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        return tuple(sorted((key, freeze(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return repr(value)
