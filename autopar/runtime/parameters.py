"""How parameters enter a program, and how their gradients come out.

Comes in: what stands in the places of the model's parameters at a call. Goes out: this rank's parts of them, with which the program
computes, and which autograd's graph joins to them without a copy. So whatever asks autograd for gradients of parameters gets them:
``backward`` and ``torch.autograd.grad``, of all parameters or of some, with ``create_graph`` or without.

A program makes a local gradient, which may be a summand. An ordinary backward needs the sum only when it ends, so its local gradients are
left to the `GradientReducer`, which sums in buckets and adds to ``grad``. Where the complete gradient is needed at once, `_Enter` makes it:
where it is returned to the user, where it will be differentiated, and where the user's hooks get it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from autopar import torch_compat
from autopar.errors import InputError
from autopar.ops import (
    GroupAxis,
    Message,
    StoredPart,
    begin_wholes,
    deliver_to,
    reduce_scatter_along,
    shard_along,
    stand_for_whole,
    sum_along,
    sum_gradient_along,
    take_wholes,
)
from autopar.rewrite import Program, Slot
from autopar.runtime.agreement import Agreement, digest, name_ranks
from autopar.runtime.dtensor import read_as, shard_whole
from autopar.runtime.fingerprints import Projections, hash_tensors, project
from autopar.runtime.gradients import GradientReducer, Receiver
from autopar.runtime.storage import Deployment, Storage, stands_for
from autopar.runtime.sums import TrackedParameter, is_ordinary, note_changes
from autopar.torch_compat import DTensorSpec


class Entrance:
    """How parameters enter one program without a pipeline.

    Args:
        program: the program.
        storage: where its parameters are stored.
        deployment: how they are stored.
        reducer: sums the gradients of the model's own parameters.
        agreement: of all ranks; None with one rank.
    """

    def __init__(
        self, program: Program, storage: Storage, deployment: Deployment, reducer: GradientReducer, agreement: Agreement | None
    ) -> None:
        self._program = program
        self._storage = storage
        self._deployment = deployment
        self._reducer = reducer
        self._agreement = agreement
        # Per parameter of the program, None for one of which only substitutes were seen; and the parts by name.
        self._tracked: list[TrackedParameter | None] = [None] * len(program.parameters)
        self._parts: dict[str, Tensor] = {}
        self._receives: Mapping[str, Receiver] = {}

    def enter(self) -> list[Tensor]:
        """This rank's parts of what stands in the places of the parameters, in the dtypes in which the program takes them.

        Of a parameter that the program gathers for the whole call it is what stands for it (`autopar.ops.wholes`).

        Raises InputError for a substitute that isn't the same on all ranks.
        """
        slots, storage = self._program.parameters, self._storage
        parameters = [storage.parameter(slot.name) for slot in slots]
        if self._deployment.device_mesh is None:
            # A single process computes with the parameters themselves.
            return [read_as(slot.dtype, parameter) for slot, parameter in zip(slots, parameters, strict=True)]
        if not all(map(_is_tracked, self._tracked, parameters)):
            self._track(parameters)
            self._check_alike({slot.name: x for slot, x in zip(slots, parameters, strict=True) if not isinstance(x, DTensor)})
        trains = torch.is_grad_enabled()
        if trains:
            self.note_changes()
        own = [
            entry if entry is not None and entry.parameter is parameter else None
            for entry, parameter in zip(self._tracked, parameters, strict=True)
        ]
        parts = []
        for slot, entry, parameter in zip(slots, own, parameters, strict=True):
            if entry is not None and entry.held is not None:
                parts.append(self._parts[slot.name])
                continue
            if entry is None:
                part = enter_substitute(parameter, slot, self._deployment, storage.sum_group(slot))
            else:
                part = self._parts[slot.name] if trains else entry.leaf
            parts.append(read_as(slot.dtype, part))
        return parts

    def note_changes(self) -> None:
        """Let autograd know of changes in place of parameters, before a forward and before a backward."""
        note_changes(entry for entry in self._tracked if entry is not None)

    def _track(self, parameters: list[nn.Parameter]) -> None:
        """Leave the gradients of stored parameters to the reducer, also of those that are new or got other storage."""
        is_changed = False
        # Not in inference mode, even if the call is: what is made here outlives the call.
        with torch.inference_mode(False), torch.enable_grad():
            for position, (slot, parameter) in enumerate(zip(self._program.parameters, parameters, strict=True)):
                if not _is_tracked(self._tracked[position], parameter) and self._storage.is_stored(slot.name, parameter):
                    leaf = torch_compat.local_of(parameter).requires_grad_(parameter.requires_grad)
                    self._tracked[position] = self._storage.track(slot, parameter, leaf)
                    is_changed = True
            if is_changed:
                tracked = [entry for entry in self._tracked if entry is not None]
                self._receives = self._reducer.track(tracked, self._program.bucket_nbytes)
                self._parts = enter_stored([entry for entry in tracked if entry.held is None], self._receives)
                for slot, entry in zip(self._program.parameters, self._tracked, strict=True):
                    if entry is not None and entry.held is not None:
                        enter = functools.partial(_give, entry, self._receives.get(slot.name))
                        self._parts[slot.name] = stand_for_held(entry, slot, enter)

    def _check_alike(self, substitutes: Mapping[str, Tensor]) -> None:
        """Raise InputError when a whole tensor isn't the same on all ranks, beyond rounding."""
        if self._agreement is None or not substitutes:
            return
        hashes = hash_tensors([x.contiguous() for x in substitutes.values()]).tolist()
        if len(set(self._agreement.meet(f"makes a call with other tensors for {', '.join(substitutes)}", [digest(repr(hashes))]))) == 1:
            return
        own = {name: project(x).to_bits() for name, x in substitutes.items()}
        ranks = [json.loads(text) for text in self._agreement.gather(json.dumps(own))]
        for name in substitutes:
            first, *others = (Projections.from_bits(rank[name]) for rank in ranks)
            if unlike := [rank for rank, other in enumerate(others, start=1) if not other.agrees(first)]:
                raise InputError(
                    f"the tensor that stands in the place of {name} isn't the same on rank 0 and {name_ranks(unlike)}: every rank must "
                    "give the same whole tensor, or its part of a DTensor"
                )


def _is_tracked(entry: TrackedParameter | None, parameter: nn.Parameter) -> bool:
    """Whether the entry is of this parameter, with the storage that it has now."""
    return entry is not None and entry.parameter is parameter and stands_for(entry.leaf, parameter)


def refuse_transforms() -> None:
    """Raise InputError inside of ``torch.func.grad``, ``vjp``, ``jvp``, ``vmap`` and what is built on them."""
    if torch_compat.is_transformed():
        raise InputError(
            "a compiled model can't be called inside of torch.func.grad, vjp, jvp, vmap or hessian, whose tensors its collectives can't "
            "take: use torch.autograd.grad, with create_graph=True for higher derivatives; torch.func.functional_call by itself works"
        )


# --- stored parameters ------------------------------------------------------------------------------------------------------


def enter_stored(tracked: Sequence[TrackedParameter], receives: Mapping[str, Receiver]) -> dict[str, Tensor]:
    """This rank's parts of stored parameters, by name; one part serves all calls, since its backward needs nothing of a forward."""
    parts = {}
    for entry in tracked:
        if entry.leaf.requires_grad:
            parts[entry.name] = _Enter.apply(entry.parameter, receives[entry.name])  # type: ignore[no-untyped-call]
            # As of a leaf: otherwise it would come last, after the backwards of all that a program computes.
            torch_compat.run_early_in_backward(parts[entry.name])
            deliver_to(parts[entry.name], _Sink(receives[entry.name], parts[entry.name].grad_fn))
        else:
            parts[entry.name] = entry.leaf
    return parts


@dataclass(frozen=True, slots=True)
class _Sink:
    """Takes gradients of a part past autograd, in backwards in which they would come to the reducer anyway; `node` is `_Enter`'s."""

    receiver: Receiver
    node: Any

    def takes(self) -> bool:
        return _is_left(self.receiver, self.node)

    def reach(self, block: int, ahead: int) -> None:
        self.receiver.reducer.arrivals.reach(block, ahead)

    def receive(self, begin: Callable[[], Message], dtype: torch.dtype, block: int, ahead: int) -> None:
        self.receiver.receive_later(begin, dtype, block, ahead)


class _Enter(torch.autograd.Function):
    """From a stored parameter to this rank's part, on the same storage."""

    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, receiver: Receiver) -> Tensor:
        ctx.receiver = receiver
        ctx.set_materialize_grads(False)
        return torch_compat.local_of(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        return _leave_or_return(ctx, grads[0]), None


class _Give(torch.autograd.Function):
    """From a stored parameter to what was gathered of it for a call."""

    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, whole: Tensor, receiver: Receiver) -> Tensor:
        ctx.receiver = receiver
        ctx.set_materialize_grads(False)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        return _leave_or_return(ctx, grads[0]), None, None


def _is_left(receiver: Receiver, node: Any) -> bool:
    """Whether the backward that runs now leaves local gradients to the reducer; `node` is `_Enter`'s or `_Give`'s."""
    return not torch.is_grad_enabled() and is_ordinary(receiver.entry.parameter) and receiver.reducer.adds(node)


def _leave_or_return(ctx: Any, gradient: Tensor | None) -> Tensor | None:
    """In an ordinary backward, leave a local gradient to the reducer; otherwise the complete gradient as autograd takes it, a DTensor."""
    if gradient is None:
        return None
    receiver: Receiver = ctx.receiver
    if _is_left(receiver, ctx):
        receiver(gradient)
        return None
    entry = receiver.entry
    held, group = entry.held, entry.group
    gradient = gradient.to(entry.reduce_dtype)
    if held is not None:
        take = reduce_scatter_along if held.is_summed else shard_along
        gradient = held.kept(take(held.pad(gradient), held.axis, held.dim, 1))
    if group is not None:
        gradient = sum_along(gradient, GroupAxis("gradient", group))
    elif held is None and not torch.is_grad_enabled():
        # Autograd may have handed the same tensor to others, and sees only the DTensor that is made of it.
        gradient = gradient.clone()
    parameter: Any = entry.parameter
    return from_part(gradient.to(entry.leaf.dtype), torch_compat.spec_of(parameter))


def _give(entry: TrackedParameter, receiver: Receiver | None, whole: Tensor) -> Tensor:
    """What a program computes with of a parameter that was gathered for the call."""
    if receiver is None or not torch.is_grad_enabled():
        return whole
    whole = _Give.apply(entry.parameter, whole, receiver)  # type: ignore[no-untyped-call]
    torch_compat.run_early_in_backward(whole)
    return whole


def stand_for_held(entry: TrackedParameter, slot: Slot, enter: Callable[[Tensor], Tensor]) -> Tensor:
    """What stands for a parameter that is stored in parts and that a program is given whole."""
    assert entry.held is not None
    held, leaf = entry.held, entry.leaf
    stored = StoredPart(
        held.axis, entry.sent_shape, getattr(torch, slot.dtype), lambda: held.sent(leaf.detach()), lambda stack: enter(held.join(stack))
    )
    return stand_for_whole(entry.leaf.detach(), stored)


def gather_held(held: Sequence[tuple[TrackedParameter, Slot]]) -> dict[str, Tensor]:
    """What the stages of a pipeline are given of parameters that are stored in parts and held whole during a call, by name."""
    begun = begin_wholes([stand_for_held(entry, slot, lambda whole: whole) for entry, slot in held])
    return {entry.name: whole for (entry, _), whole in zip(held, take_wholes(begun), strict=True)}


# --- substitutes ------------------------------------------------------------------------------------------------------------


def enter_substitute(x: Tensor, slot: Slot, deployment: Deployment, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of a tensor that stands in the place of a parameter, differentiable: of ``torch.func.functional_call``, or replaced.

    Args:
        x: the whole tensor, or a DTensor in any layout.
        slot: the parameter, and the layout in which the program takes it.
        deployment: the mesh.
        group: the ranks over which the part's gradient must be summed; None when it is complete.
    """
    device_mesh = deployment.device_mesh
    if isinstance(x, DTensor) and x.device_mesh == device_mesh and x.placements == tuple(deployment.placements_of(slot.layout, None)):
        part = to_part(x)
    else:
        part = shard_whole(_gather(x), slot.layout, deployment.mesh, deployment.axes)
    return part if group is None else sum_gradient_along(part, GroupAxis("gradient", group))


def _gather(x: Tensor) -> Tensor:
    """The whole tensor, differentiable any number of times."""
    return to_part(x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)) if isinstance(x, DTensor) else x


# --- between DTensors and parts, differentiable any number of times -----------------------------------------------------------


def to_part(x: DTensor) -> Tensor:
    """This rank's part of a DTensor, on the same storage. Its gradient is taken for complete."""
    part: Tensor = _ToPart.apply(x)  # type: ignore[no-untyped-call]
    return part


def from_part(part: Tensor, spec: DTensorSpec) -> DTensor:
    """The DTensor of which `part` is this rank's part, on the same storage."""
    whole: DTensor = _FromPart.apply(part, spec)  # type: ignore[no-untyped-call]
    return whole


class _ToPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: DTensor) -> Tensor:
        ctx.spec = torch_compat.spec_of(x)
        ctx.set_materialize_grads(False)
        return torch_compat.local_of(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> DTensor | None:
        return None if grads[0] is None else from_part(grads[0], ctx.spec)


class _FromPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, spec: DTensorSpec) -> DTensor:
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return torch_compat.with_spec(part, spec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        return None if grads[0] is None else to_part(grads[0].redistribute(placements=ctx.spec.placements)), None
