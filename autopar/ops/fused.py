"""Parts of a program that torch's compiler fuses into few kernels (``torch.compile``).

Comes in: a submodule of an emitted program that holds plain operators only, no collectives. Goes out: a module that computes the same to
rounding, whose forward and backward are compiled when they first run. A backward either uses all results of a part or none: of those that
it leaves out, compiled code makes gradients of zeros, where autograd makes none (`autopar.rewrite.fuse` cuts the parts so).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar import torch_compiler
from autopar.errors import InputError
from autopar.ops.double_backward import refuse_double_backward

_LOG = logging.getLogger("autopar")
_REMEDY = "compile with fuse=False"


class Fused(nn.Module):
    """A part of a program, compiled when it first runs with gradients, and when it first runs without.

    All calls have tensors of the same sizes and dtypes. Where they differ in something else that torch compiles for, such as strides, it
    is compiled again, and a warning of the logger ``autopar`` says what differed.

    Args:
        module: holds plain operators only.
        where: the layer and the lines of the user's, for messages.
        required: whether it is an error if this part can't be compiled; otherwise it runs as it is, with a warning.

    Attributes:
        where: as given.
        tell: called each time before it is compiled, which takes seconds.
        compilations: why it was compiled, each time; empty text for a first time.
    """

    def __init__(self, module: fx.GraphModule, where: str, *, required: bool) -> None:
        super().__init__()
        self.module = module
        self.compilations: list[str] = []
        self.where = where
        self.tell: Callable[[], None] = _say_nothing
        self._required = required
        self._compiled: dict[tuple[bool, bool], Callable[..., Any]] = {}
        self._runs_as_it_is = False

    def forward(self, *inputs: Any) -> Any:
        """Run the part on the module's inputs; returns the module's results. Raises InputError when it can't be compiled."""
        if self._runs_as_it_is:
            return self.module(*inputs)
        # Torch compiles anew for each of these, which is no recompilation to report.
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        compiled = self._compiled.get(mode)
        if compiled is None:
            # Of a function of its own: torch counts compilations, and limits them, by function.
            function = fx.GraphModule(self.module, self.module.graph, class_name=type(self.module).__name__).forward
            compiled = torch.compile(function, backend=self._compile, dynamic=False, fullgraph=True)
            self._compiled[mode] = compiled
        try:
            return compiled(*inputs)
        except torch_compiler.compiler_errors() as error:
            reason = f"torch.compile failed at {self.where}: {torch_compiler.reason_of_failure(error)}"
            if self._required:
                raise InputError(f"{reason}. If there is no remedy for that, {_REMEDY}") from error
            _LOG.warning("%s. This part runs operator by operator", reason)
            self._runs_as_it_is = True
            self._compiled.clear()
            return self.module(*inputs)

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.tell()
        reason = torch_compiler.reason_of_recompilation()
        self.compilations.append(reason)
        if reason:
            _LOG.warning("%s is compiled again, for another kind of call: %s", self.where, reason)
        return partial(_call, torch_compiler.inductor(graph, inputs), self.where)


def _say_nothing() -> None:
    pass


def _call(function: Callable[..., Any], where: str, *inputs: Any) -> Any:
    """Call a compiled function, and see to what its backward may be asked for."""
    results = function(*inputs)
    for x in results:
        if isinstance(x, Tensor) and (node := x.grad_fn) is not None and torch_compiler.is_compiled_backward(node):
            torch_compiler.allow_several_backwards(node)
            node.register_prehook(partial(_refuse_second_derivative, where))
            break
    return results


def _refuse_second_derivative(where: str, _: Any) -> None:
    if torch.is_grad_enabled():
        refuse_double_backward(f"fused operators ({where})", _REMEDY)
