"""A program as planning sees it: a `Graph` of `Op`s that read and make `Tensor`s. Frozen data, nothing of torch.

Comes in: what `autopar.capture` reads off an fx graph. Goes out: to everything that plans. Each op has the name of its fx node, so that a
plan made for a `Graph` can be applied to the fx graph from which the `Graph` was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from autopar.ir.precision import MOMENTS, StorageDtypes

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
    """Shape, dtype and differentiability of a tensor that the program makes; there are no elements.

    >>> str(Tensor((8, 16), "bfloat16")), Tensor((8, 16), "bfloat16").nbytes
    ('bfloat16[8, 16]', 256)

    Attributes:
        shape: global sizes, those of the whole tensor on one device.
        dtype: torch's name of it without the ``torch.`` prefix.
        requires_grad: whether the backward computes a gradient for it.
        storage: of a parameter, the dtypes in which it is stored, summed and updated, where these aren't all `dtype`.
    """

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False
    storage: StorageDtypes | None = None

    @classmethod
    def parse(cls, text: str) -> Tensor:
        """Read what `str` has written, the sizes and the dtype.

        >>> Tensor.parse("bfloat16[8, 16]")
        Tensor(shape=(8, 16), dtype='bfloat16', requires_grad=False, storage=None)
        """
        dtype, _, sizes = text.partition("[")
        return cls(tuple(int(size) for size in sizes.rstrip("]").split(",") if size), dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def stored_dtype(self) -> str:
        """The dtype of a parameter, and of its gradient, as it is stored."""
        return self.dtype if self.storage is None else self.storage.stored

    @property
    def reduced_dtype(self) -> str:
        """The dtype in which a parameter's gradient is summed over ranks."""
        return self.dtype if self.storage is None else self.storage.reduced

    @property
    def states(self) -> tuple[str, ...]:
        """Dtypes of what an optimizer keeps per element of a parameter."""
        return (self.dtype,) * MOMENTS if self.storage is None else self.storage.states

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Operand:
    """Placeholder inside `Op.args` and `Op.kwargs` for the tensor ``Op.operands[index]``."""

    index: int


@dataclass(frozen=True, slots=True)
class Value:
    """A reference to result `index` of the op called `op`, which is how ops name the tensors that they read."""

    op: str
    index: int = 0

    def __str__(self) -> str:
        return self.op if self.index == 0 else f"{self.op}.{self.index}"


class OpKind(Enum):
    """Where an op's results come from: the caller, a parameter, a buffer or a call; OUTPUT returns values and has no results."""

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CALL = "call"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Working:
    """What a call needs of memory while it runs, and what its tensors share.

    Attributes:
        views: per result the operand whose memory it shares; -1 for memory of its own.
        saves: operands that the call itself saves for its backward.
        keeps: results that it saves for its own backward.
        passes: operands that get the gradient of a result, or a view of it, without a copy.
        forward: bytes at the peak of the forward beside operands, results, and what is saved.
        backward: bytes at the peak of the backward beside what was saved, and the gradients of results and operands.
    """

    views: tuple[int, ...] = ()
    saves: frozenset[int] = frozenset()
    keeps: frozenset[int] = frozenset()
    passes: frozenset[int] = frozenset()
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True, slots=True)
class OpMemory:
    """What autograd saves for a call, and what it needs while it runs: fields as in `Op`."""

    saved: frozenset[int] = frozenset()
    extra_saved_nbytes: int = 0
    working: Working = Working()


@dataclass(frozen=True, slots=True)
class Op:
    """An input, parameter or buffer of the program, a call of an operator, or the program's return.

    Attributes:
        name: unique; the name of the fx node.
        kind: input, parameter, buffer, call or output.
        target: for a call, the name of the operator's overload, such as ``aten.linear.default``; else the user's name of the input,
            parameter or buffer, such as ``transformer.h.0.mlp.c_fc.weight``.
        operands: the tensors read, flattened in argument order (a list of tensors gives an operand for each of them).
        results: the tensors made; several for ops such as ``aten.split``.
        args, kwargs: the call's arguments, with an `Operand` in place of each tensor. The output op's ``kwargs["updates"]`` names the
            buffers that get new values; those values are its last operands.
        layer: path of the module that the op belongs to, such as ``transformer.h.0.mlp``; empty at the root.
        source: the user's line, ``file.py:12: y = self.fc(x)``; empty when unknown.
        saved: indices of the results that autograd saves for the backward.
        extra_saved_nbytes: bytes that autograd saves for this op beyond its operands and results, such as the statistics of a norm.
        working: what it needs while it runs, of the whole tensors.
        on_cpu: the three where a CPU takes another kernel than GPUs do; None where they are the same.
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
    extra_saved_nbytes: int = 0
    working: Working = Working()
    on_cpu: OpMemory | None = None

    @property
    def values(self) -> tuple[Value, ...]:
        """References to the results, in order: how other ops name them."""
        return tuple(Value(self.name, index) for index in range(len(self.results)))

    def __str__(self) -> str:
        operands = ", ".join(map(str, self.operands))
        results = ", ".join(map(str, self.results))
        return f"{self.name} = {self.target}({operands}) -> {results}"


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole program. Every op comes after the ops whose results it reads.

    Raises ValueError on construction when two ops have one name, or when an op reads what no earlier op makes.

    Attributes:
        ops: all ops in program order, the output last.
        by_name: op name -> op.
        readers: value -> names of the ops that read it, in program order; an op that reads it through two operands is there twice.
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

    def on_device(self, kind: str) -> Graph:
        """The same program with the memory that its calls need on devices of a kind, ``cpu`` or another."""
        if kind != "cpu" or all(op.on_cpu is None for op in self.ops):
            return self

        def use(op: Op) -> Op:
            memory = op.on_cpu
            if memory is None:
                return op
            return replace(op, saved=memory.saved, extra_saved_nbytes=memory.extra_saved_nbytes, working=memory.working, on_cpu=None)

        return Graph(tuple(map(use, self.ops)))

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
        """The op that returns. Its operands are the values that the user gets, then the new values of updated buffers."""
        (output,) = self.of_kind(OpKind.OUTPUT)
        return output

    @property
    def returned(self) -> tuple[Value, ...]:
        """The values that the user gets, in the order of the flattened outputs."""
        return self.output.operands[: len(self.output.operands) - len(self._updated_buffers)]

    @property
    def updates(self) -> Mapping[str, Value]:
        """Buffers that the program updates, such as a batch norm's running mean: the user's name of the buffer -> its new value."""
        names = self._updated_buffers
        return dict(zip(names, self.output.operands[len(self.output.operands) - len(names) :], strict=True))

    @property
    def _updated_buffers(self) -> tuple[str, ...]:
        return tuple(self.output.kwargs.get("updates", ()))

    @property
    def loss(self) -> int | None:
        """Position among the output's operands of the loss: the first that has one element and requires a gradient; None without one."""
        tensors = enumerate(map(self.tensor, self.output.operands))
        return next((position for position, tensor in tensors if tensor.requires_grad and tensor.numel == 1), None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))


def freeze(value: Any) -> Any:
    """A hashable stand-in for an op's argument, for use as a key: stand-ins are equal where the arguments and their types are.

    >>> freeze([1, {"dim": -1}]) == freeze([1, {"dim": -1}]), freeze(1) == freeze(True)
    (True, False)
    """
    if isinstance(value, Operand | int | float | str | bool | type(None)):
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        return tuple(sorted((key, freeze(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return repr(value)
