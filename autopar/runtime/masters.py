"""Training in a low precision alone, with float32 copies of the parameters in the optimizer.

Comes in: an optimizer's class, and parameters in bfloat16 or float16, of a compiled model or of a plain one. Goes out: an optimizer that
keeps a *master* of each, a float32 copy, makes its steps on the masters, and rounds these to the parameters (Micikevicius et al., Mixed
Precision Training, 2018). An update that is too small to change a bfloat16 weight, of which the smallest relative change is 2^-8, adds up
in the master instead of being lost.

A master is one more state of its parameter: ``optimizer.state[p]["master"]`` beside ``"exp_avg"``. So it is stored as the parameter is,
moves with it to the first plan's mesh (`autopar.runtime.states`), and is in every kind of checkpoint.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autopar import torch_compat, torch_optim_compat
from autopar.errors import InputError
from autopar.ir import Precision
from autopar.runtime.dispatch import as_stored

MASTER = "master"
"""The name of the state of a parameter that is its float32 copy."""

SHARE_BYTES = 2**28
"""About how many bytes of float32 gradients there are at a time, so that they need no memory of note beside masters and moments."""

_LOW = {torch.bfloat16, torch.float16}

_ROUNDED = "_autopar_rounded"
"""The attribute of a master that says which version of its parameter it was rounded to."""

Group = dict[str, Any]
Share = Sequence[tuple[Group, list[Tensor]]]
"""Parameters that are stepped together, by their group."""


class MasterWeights(Optimizer):
    """An optimizer over float32 masters of low-precision parameters.

    Example::

        model = autopar.compile(build().bfloat16())
        optimizer = autopar.MasterWeights(torch.optim.AdamW, model.parameters(), lr=1e-4)

    It is used as the optimizer itself would be: schedules, hooks, groups added later, ``GradScaler``, checkpoints. In a step, gradients
    are cast to float32, the optimizer steps the masters, and these are rounded to the parameters. Float32 gradients live no longer than
    that, some at a time (`SHARE_BYTES`), unless the optimizer isn't one of ``torch.optim``: it may look at all parameters at once. What is
    scaled by a ``GradScaler`` is divided by the scale in float32.

    A parameter gets its master in the first step that it has a gradient in. Parameters of other dtypes are stepped as they are. Whatever
    changes a parameter between steps, such as ``load_state_dict`` of the model, changes its master in the next step; of a plain tensor,
    writes through ``.data`` can't be seen.

    Args:
        make: the class of the optimizer, such as ``torch.optim.AdamW``, or what makes one from parameters and options; not an optimizer
            that is made already, whose states would be in the parameters' dtype.
        params: parameters or groups of them, as for that optimizer.
        options: the options of that optimizer.

    Raises InputError for an optimizer in the place of its class, for one that calls its closure several times a step, and for
    ``differentiable=True``.
    """

    def __init__(self, make: Callable[..., Optimizer], params: Iterable[Any] = (), **options: Any) -> None:
        if isinstance(make, Optimizer):
            raise InputError(
                "MasterWeights makes the optimizer itself: pass its class, "
                f"autopar.MasterWeights({_name_class(make)}, model.parameters(), lr=1e-4)"
            )
        inner = make(params, **options)
        if isinstance(inner, LBFGS):
            raise InputError("LBFGS calls its closure within a step, where only the masters have moved: use it on float32 parameters")
        if inner.defaults.get("differentiable"):
            raise InputError("rounding masters to parameters has no derivative: leave out differentiable=True")
        self._make, self._options, self._inner = make, options, inner
        # What an optimizer knows beside its parameters' states and the options of its groups, it may know of all parameters together.
        self._is_by_parameter = f"{type(inner).__module__}.".startswith("torch.optim.")
        super().__init__(inner.param_groups, inner.defaults)
        self._begins_with_states = bool(inner.state)
        self.state.update({p: state for p, state in inner.state.items() if not _is_low(p)})
        self._empty_inner()
        # Tells a GradScaler to leave gradients as they are, and to pass `grad_scale` and `found_inf`.
        self._step_supports_amp_scaling = True

    def __getstate__(self) -> dict[str, Any]:
        names = ("_make", "_options", "_inner", "_is_by_parameter", "_begins_with_states", "_step_supports_amp_scaling")
        return super().__getstate__() | {name: vars(self)[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The optimizer completes groups and states from files of older versions, in place.
        self._inner.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._empty_inner()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states, those of low-precision parameters in float32.

        Without masters among them, as from a file of the optimizer alone, these are made anew from the parameters.
        """
        with torch_optim_compat.states_loaded_as(lambda p: torch.float32 if _is_low(p) else p.dtype):
            super().load_state_dict(state_dict)
        for state in self.state.values():
            if isinstance(master := state.get(MASTER), Tensor):
                master.__dict__.pop(_ROUNDED, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; returns what `closure` does. Nothing changes when a ``GradScaler`` found an infinite gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf):
            return loss
        factor = None if scale is None else scale.double().reciprocal().float()
        for share in self._shares():
            self._step_share(share, factor)
        return loss

    # --- one share ----------------------------------------------------------------------------------------------------------------

    def _shares(self) -> Iterator[Share]:
        """All parameters with gradients, in shares that are stepped one after the other."""
        if not self._is_by_parameter:
            yield [(group, list(group["params"])) for group in self.param_groups]
            return
        for group in self.param_groups:
            share: list[Tensor] = []
            size = 0
            for p in [p for p in group["params"] if p.grad is not None]:
                if share and size >= SHARE_BYTES:
                    yield [(group, share)]
                    share, size = [], 0
                share.append(p)
                size += 4 * _part_of(p).numel()
            if share:
                yield [(group, share)]

    def _step_share(self, share: Share, factor: Tensor | None) -> None:
        present = [(group, p) for group, parameters in share for p in parameters if p.grad is not None]
        masters = {p: self._find_master(p, group) for group, p in present if _is_low(p)}
        gradients = _widen([p for _, p in present if p in masters or factor is not None], masters, factor)
        before: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in gradients]
        lists = [group["params"] for group, _ in share]
        try:
            for p, gradient in gradients.items():
                masters.get(p, p).grad = gradient
            for group, parameters in share:
                group["params"] = [masters.get(p, p) for p in parameters]
            self._step_inner([group for group, _ in share], [p for _, p in present], masters)
        finally:
            for (group, _), parameters in zip(share, lists, strict=True):
                group["params"] = parameters
            for p, own in before:
                masters.get(p, p).grad = None if p in masters else own
        _round(masters)

    def _step_inner(self, groups: list[Group], parameters: Iterable[Tensor], masters: Mapping[Tensor, Tensor]) -> None:
        """Step the optimizer, whose groups have the masters now, with the states of these parameters as the masters'."""
        inner = self._inner
        parameter_of = {master: p for p, master in masters.items()}
        inner.param_groups = groups
        for key in parameters if self._is_by_parameter else list(self.state):
            if key in self.state:
                state = self.state[key]
                if key in masters:
                    # To an optimizer, a parameter without states is one that it hasn't stepped yet.
                    del state[MASTER]
                inner.state[masters.get(key, key)] = state
        try:
            inner.step()
        finally:
            for key, state in inner.state.items():
                if state or key in self.state:
                    self.state[parameter_of.get(key, key)] = state
            for p, master in masters.items():
                self.state[p][MASTER] = master
            self._empty_inner()

    def _empty_inner(self) -> None:
        self._inner.state, self._inner.param_groups = defaultdict(dict), []

    def _find_master(self, p: Tensor, group: Group) -> Tensor:
        state = self.state[p]
        master: Tensor | None = state.get(MASTER)
        if master is not None:
            master = _as_stored(master, p)
            if master.__dict__.get(_ROUNDED) != _version_of(p):
                _follow(master, p)
        else:
            master = _copy_wide(p)
            if self._begins_with_states and not state:
                options = {name: value for name, value in group.items() if name != "param_names"}
                state.update(self._make([options | {"params": [master]}], **self._options).state[master])
        state[MASTER] = master
        return master


# --- optimizers without masters ---------------------------------------------------------------------------------------------------

_FINEST = {torch.bfloat16: 8, torch.float16: 11}
"""The dtype's smallest relative change is 2 to the power of minus this."""


_watched: WeakKeyDictionary[nn.Module, Precision] = WeakKeyDictionary()
_seen: WeakSet[Optimizer] = WeakSet()


def expect_masters(model: nn.Module, precision: Precision) -> None:
    """Warn once, on the first rank, when an optimizer without masters steps low-precision parameters of a model.

    Each optimizer is looked at in its first step only.
    """
    _watched[model] = precision
    _seen.clear()
    _watch_steps()


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_look_at)


def _look_at(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    if isinstance(optimizer, MasterWeights) or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
        return
    for model, precision in list(_watched.items()):
        own = set(map(id, model.parameters()))
        stepped = (p for group in optimizer.param_groups for p in group["params"] if id(p) in own and _is_low(p))
        if (p := next(stepped, None)) is not None:
            del _watched[model]
            warnings.warn(
                f"precision={str(precision)!r} plans for float32 masters, but this {type(optimizer).__name__} updates"
                f" {str(p.dtype).removeprefix('torch.')} parameters directly and loses updates below 2^-{_FINEST[p.dtype]} of a weight: use"
                f" autopar.MasterWeights({_name_class(optimizer)}, model.parameters(), ...), or precision='model'",
                stacklevel=3,
            )


def _name_class(optimizer: Optimizer) -> str:
    """The name of an optimizer's class, as code writes it."""
    kind = type(optimizer)
    return f"torch.optim.{kind.__name__}" if f"{kind.__module__}.".startswith("torch.optim.") else kind.__name__


# --- masters and parameters -------------------------------------------------------------------------------------------------------


def _is_low(p: Any) -> bool:
    return isinstance(p, Tensor) and p.dtype in _LOW


def _part_of(x: Tensor) -> Tensor:
    """What this rank stores of a tensor."""
    return torch_compat.part_of(x) if isinstance(x, DTensor) else x


def _as_stored(x: Tensor, p: Tensor) -> Tensor:
    """A gradient or master as its parameter is stored, which it nearly always is."""
    if type(x) is DTensor and type(p) is DTensor:
        own, spec = torch_compat.spec_of(x), torch_compat.spec_of(p)
        if own is spec or (own.mesh is spec.mesh and own.placements == spec.placements):
            return x
    stored: Tensor = as_stored(x, p)
    return stored


def _version_of(p: Tensor) -> tuple[int, int]:
    """Another one after any change in place, of the tensor or by way of this rank's part of it."""
    return p._version, _part_of(p)._version


def _copy_wide(p: Tensor) -> Tensor:
    """A float32 copy, stored as the parameter is."""
    wide = torch_compat.local_of(p).to(torch.float32)
    return torch_compat.make_dtensor(wide, p.device_mesh, p.placements, p.shape, p.stride()) if isinstance(p, DTensor) else wide


def _follow(master: Tensor, p: Tensor) -> None:
    """Take over what was written to the parameter since the master was rounded to it; elsewhere the master keeps its precision."""
    part, wide = _part_of(p), _part_of(master)
    wide.copy_(torch.where(wide.to(part.dtype) == part, wide, part.to(torch.float32)))


def _round(masters: Mapping[Tensor, Tensor]) -> None:
    """Round masters to their parameters."""
    torch_optim_compat.copy_each([_part_of(p) for p in masters], [_part_of(x) for x in masters.values()])
    # Of a DTensor, torch doesn't count changes of its part; autograd must know of them.
    torch.autograd.graph.increment_version([p for p in masters if isinstance(p, DTensor)])
    for p, master in masters.items():
        master.__dict__[_ROUNDED] = _version_of(p)


def _widen(parameters: Sequence[Tensor], masters: Mapping[Tensor, Tensor], factor: Tensor | None) -> dict[Tensor, Tensor]:
    """By parameter, its gradient times `factor`, in float32 where it has a master."""
    given: list[Tensor] = []
    for p in parameters:
        assert p.grad is not None
        gradient = _as_stored(p.grad, p)
        if gradient.layout is not torch.strided:
            raise InputError(f"the gradient of a parameter {tuple(p.shape)} is sparse, which masters can't take: use sparse=False")
        given.append(_part_of(gradient))
    dtypes = (torch.float32 if p in masters else p.dtype for p in parameters)
    wide = [torch.empty_like(gradient, dtype=dtype) for gradient, dtype in zip(given, dtypes, strict=True)]
    torch_optim_compat.copy_each(wide, given)
    if factor is not None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in wide:
            by_device.setdefault(gradient.device, []).append(gradient)
        for device, gradients in by_device.items():
            torch_optim_compat.scale_each(gradients, torch_compat.local_of(factor).to(device))
    targets = (masters.get(p, p) for p in parameters)
    made = (torch_compat.make_like(x, like) if isinstance(like, DTensor) else x for x, like in zip(wide, targets, strict=True))
    return dict(zip(parameters, made, strict=True))
