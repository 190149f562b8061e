"""Whether programs go through torch's compiler, decided alike on all ranks."""

from __future__ import annotations

import logging
from contextlib import nullcontext

from autopar import torch_compiler
from autopar.errors import InputError
from autopar.runtime.agreement import form_agreement


def decide_fusion(fuse: bool | None, device_type: str) -> bool:
    """Whether the operators of programs are fused. All ranks must ask, and get the same answer: replicas must round alike.

    Args:
        fuse: what the user asked for; None for fusing on a GPU if each rank's machine can, with a warning where one can't.
        device_type: the kind of device.

    Raises InputError when `fuse` is true and some rank's machine lacks what torch's compiler needs.
    """
    if fuse is False or (fuse is None and device_type == "cpu"):
        return False
    agreement = form_agreement()
    lack = torch_compiler.missing_compiler(device_type)
    if fuse:
        with nullcontext() if agreement is None else agreement.share_errors("looks for a compiler"):
            if lack:
                raise InputError(f"fuse=True: torch.compile can't work here, {lack}; or compile with fuse=False")
        return True
    lacks = [lack] if agreement is None else agreement.gather(lack)
    if any(lacks):
        rank, lack = next((rank, lack) for rank, lack in enumerate(lacks) if lack)
        logging.getLogger("autopar").warning("operators aren't fused: on rank %d, %s", rank, lack)
    return not any(lacks)
