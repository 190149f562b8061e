"""Private parts of torch's compiler, which are loaded only when something is compiled."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.autograd.graph import Node

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
"""What makes a function of the graph that torch traced, given the tensors that it was traced with."""


def inductor(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph by torch's own backend, so that its backward may be run several times, see `allow_several_backwards`."""
    import torch._functorch.config as functorch_config
    from torch._dynamo.backends.registry import lookup_backend

    # Else the compiled backward reuses the memory of what the forward saved, and it is made when it first runs, where nobody can be told
    # that it can't be.
    with functorch_config.patch(donated_buffer=False, force_non_lazy_backward_lowering=True):
        return lookup_backend("inductor")(graph, inputs)


def reason_of_recompilation() -> str:
    """Inside a backend: the guard that failed, if the function was compiled before; else empty."""
    from torch._dynamo.utils import get_metrics_context

    return str(get_metrics_context()._metrics.get("recompile_reason") or "")


def compiler_errors() -> tuple[type[Exception], ...]:
    """The errors of torch's compiler while it compiles."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def reason_of_failure(error: Exception) -> str:
    """The kind and the first line of what an error of `compiler_errors` is about."""
    error = getattr(error, "inner_exception", error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def is_compiled_backward(node: Node) -> bool:
    """Whether a node of autograd's graph is the backward of a compiled function."""
    return type(node).__name__ == "CompiledFunctionBackward"


def allow_several_backwards(node: Node) -> None:
    """Let a compiled backward of `inductor` run under ``retain_graph``.

    Torch refuses that unless it knows that no memory is reused, and takes what it didn't look into for memory that is.
    """
    node._forward_cls.metadata.bw_donated_idxs = []  # type: ignore[attr-defined]


@functools.cache
def missing_compiler(device_type: str) -> str:
    """What torch's compiler lacks on this machine to make code for a device, and what to do; empty if it lacks nothing."""
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "there is no C++ compiler: install g++ or clang++, or name one by the environment variable CXX"
        return ""
    from torch.utils._triton import has_triton

    if not has_triton():
        return f"Triton can't make code for {device_type}: install the package triton of torch's version"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        return "there is no C compiler, which Triton needs: install gcc, or name one by the environment variable CC"
    return ""
