"""Small helpers over fx graphs: emit a node like another, read a node's tensor, name the user's line and layer.

Comes in: nodes of an fx graph. Goes out: what every module that reads or writes an fx graph asks of them.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import operator
import os
import re
import sysconfig
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

# The metadata of the export that is copied to new nodes: the value, the modules around the call, the user's lines.
_COPIED = ("val", "nn_module_stack", "stack_trace")


def emit(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], like: fx.Node) -> fx.Node:
    """Append a call to a graph; its name, value and source are those of the node `like`."""
    node = graph.create_node("call_function", target, args, dict(kwargs), name=like.name)
    node.meta = {key: like.meta[key] for key in _COPIED if key in like.meta}
    return node


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that a node makes; the node must make a single tensor."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node.name} makes {type(value).__name__}, not a tensor"
    return value


def is_getitem(node: fx.Node) -> bool:
    """Whether a node selects one of the results of a call that has several."""
    return node.op == "call_function" and node.target is operator.getitem


def list_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, in order, one that is given twice twice."""
    operands: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), operands.append)
    return operands


def takes(target: Any, name: str) -> bool:
    """Whether a call target is an operator with an argument called `name`."""
    return isinstance(target, torch._ops.OpOverload) and any(argument.name == name for argument in target._schema.arguments)


def on_device(node: fx.Node, device: torch.device) -> dict[str, Any]:
    """Keyword arguments to call a node's target with on `device`: a call that reads no tensor gets the device of its result."""
    kwargs = dict(node.kwargs)
    if not node.all_input_nodes and "device" not in kwargs and takes(node.target, "device"):
        kwargs["device"] = device
    return kwargs


_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n +([^\n]+))?')


def is_users(filename: str) -> bool:
    """Whether a file is the user's, neither torch's nor autopar's."""
    return not filename.startswith((_TORCH, _OURS, "<"))


def is_installed(filename: str) -> bool:
    """Whether a file belongs to an installed package, which the user doesn't edit."""
    return "site-packages" in filename or filename.startswith(_PYTHON) or not is_users(filename)


def users_line() -> str:
    """``file.py:12: code`` of the innermost call on the stack that is the user's or a library's, not torch's; empty when there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        filename = frame.f_code.co_filename
        if is_users(filename) and not (filename.startswith(_PYTHON) and "site-packages" not in filename):
            return f"{short_path(filename)}:{frame.f_lineno}: {linecache.getline(filename, frame.f_lineno).strip()}"
        frame = frame.f_back
    return ""


def short_path(filename: str) -> str:
    """A file's path below site-packages or the working directory, else its name alone."""
    _, packages, below = filename.rpartition("site-packages" + os.sep)
    if packages:
        return below
    here = os.getcwd() + os.sep
    return filename[len(here) :] if filename.startswith(here) else os.path.basename(filename)


@functools.lru_cache(maxsize=4096)
def innermost_line(stack_trace: str) -> str:
    """``file.py:12: code`` of the innermost frame of a stack trace that is the user's; empty when there is none."""
    frames = [frame for frame in _FRAME.findall(stack_trace) if is_users(frame[0])]
    if not frames:
        return ""
    filename, line, code = frames[-1]
    return f"{short_path(filename)}:{line}: {code.strip()}"


def source_of(node: fx.Node) -> str:
    """The user's line that made a node, ``file.py:12: code``; empty when unknown."""
    return innermost_line(node.meta.get("stack_trace") or "")


def layer_of(node: fx.Node) -> str:
    """Path of the module that a node was called in, ``model.layers.0.mlp``; empty at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return re.sub(r"^L\['self'\]\.?|^L__self__\.?", "", path)
