"""Refuses the backward of a backward (``create_graph=True``) where there is none.

Where a backward computes on tensors that autograd doesn't follow, torch would take its gradients for constants, without a word.
"""

from __future__ import annotations

import torch

from autopar.errors import InputError


def refuse_double_backward(what: str, remedy: str = "pin pp=1, microbatches=1") -> None:
    """Called in the backward of something that can't be differentiated twice: raise InputError if that is asked for.

    Args:
        what: what the gradients are those of, such as "a pipelined model".
        remedy: what to do instead, in words.
    """
    if torch.is_grad_enabled():
        raise InputError(f"create_graph=True asks for gradients that can be differentiated again, and those of {what} can't: {remedy}")
