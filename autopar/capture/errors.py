"""The error of a failed export in the user's words: their line, the reason, what to change.

Comes in: an exception of `torch.export`, or a model or a graph of it that can't be used. Goes out: a CaptureError.
"""

from __future__ import annotations

import linecache
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from autopar.capture.fx_nodes import is_getitem, is_users, short_path, source_of
from autopar.errors import CaptureError
from autopar.texts import word_exception

# Characters of an exception's first line at most.
_SUMMARY = 500

_READS_DATA = frozenset(
    {"DataDependentOutputException", "GuardOnDataDependentSymNode", "UnsupportedDynamicShape", "DynamicOutputShapeException"}
)
_READS_VALUES = (
    "the line reads a value out of a tensor, and tensors have none while a graph is made",
    "Express the choice with torch.where or masking, pass the value as an argument that isn't a tensor, or do it outside the forward",
)


_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")


@contextmanager
def failures_unlogged() -> Iterator[None]:
    """Inside, torch doesn't log failures of exports and of runs on fake tensors, which are told otherwise or tried on purpose."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def explain(error: BaseException, source: str = "") -> CaptureError:
    """The CaptureError to raise for an exception of the export or of a run of its graph; `source` is the line of the user's, if known."""
    return _refuse(source or _users_line(error), *_reason(error))


_WRAPPERS = frozenset(
    {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule", "ScriptModule"}
)
"""Classes of torch around or under a model that runs otherwise than its forward says. By name, as few of them are loaded in a process."""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise CaptureError for a model in which a module is parallelized or compiled by torch already."""
    for path, module in model.named_modules():
        wrappers = [base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.") and base.__name__ in _WRAPPERS]
        if wrappers:
            name = repr(path) if path else "the model"
            raise CaptureError(
                f"{name} is wrapped by {wrappers[0]}: give autopar the model inside, before torch.compile, DistributedDataParallel,"
                " fully_shard and the like"
            )


def check_graph(graph: fx.Graph) -> None:
    """Raise CaptureError where a graph has something else than operators on dense tensors of known sizes.

    That is a call which isn't an operator (`torch.cond`), and a number or a size that depends on the values of tensors.
    """
    for node in graph.nodes:
        if node.op == "call_function" and not (isinstance(node.target, torch._ops.OpOverload) or is_getitem(node)):
            name = getattr(node.target, "__name__", str(node.target))
            raise _refuse(source_of(node), f"{name} isn't an operator on tensors", "Write the line without torch.cond and the like")
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _refuse(source_of(node), *_READS_VALUES)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and tensor.layout is not torch.strided:
                raise _refuse(source_of(node), f"{node.target} makes a sparse tensor", "Use dense tensors")
            if isinstance(tensor, Tensor) and not all(isinstance(size, int) for size in tensor.shape):
                raise _refuse(
                    source_of(node),
                    f"{node.target} makes a tensor whose size depends on the values of another, as the choice of rows by a mask does",
                    "Work on all rows, and choose with torch.where(mask, x, y) or by a product with the mask",
                )


def _refuse(source: str, reason: str, remedy: str) -> CaptureError:
    where = f"at `{source}`: " if source else ""
    return CaptureError(f"the model can't be captured as one graph; {where}{reason}. {remedy}")


def _reason(error: BaseException) -> tuple[str, str]:
    """Why the export failed, and what the user can change."""
    names = {type(link).__name__ for link in _chain(error)}
    text = word_exception(error)
    if names & _READS_DATA or "data-dependent" in text.lower() or ".numpy()" in text or "FakeTensor.__format__" in text:
        return _READS_VALUES
    if "pytree" in text or ("Unsupported" in text and "output" in text):
        return (
            "the model returns an object whose contents torch doesn't know",
            "Return tensors in tuples, lists or dicts, or register the class: torch.export.register_dataclass for a dataclass",
        )
    summary = next(line.strip() for line in text.splitlines() if line.strip())
    remedy = "Check that model(**example_inputs) runs with these inputs; if it does, write the line another way"
    return summary.rstrip(".")[:_SUMMARY], remedy


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, its cause, the cause's cause, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _users_line(error: BaseException) -> str:
    """``file.py:12: code`` of the innermost frame that is the user's."""
    for link in _chain(error):
        frames = [frame for frame in traceback.extract_tb(link.__traceback__) if is_users(frame.filename)]
        if frames:
            frame = frames[-1]
            code = frame.line or linecache.getline(frame.filename, frame.lineno or 0)
            return f"{short_path(frame.filename)}:{frame.lineno}: {code.strip()}"
    return ""
