"""Private parts of torch's autograd, process groups and DTensors, and parts whose names differ between its versions 2.11 to 2.13.

Each function wraps one such part under a name that says what autopar uses it for. Fake tensors, pytrees, the schemas of operators and the
dicts of `nn.Module` are private to torch too, and are used directly where they are needed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._state_dict_utils as state_dict_utils
import torch.distributed.tensor._api as dtensor_api
import torch.distributed.tensor._dispatch as dtensor_dispatch
import torch.distributed.tensor._redistribute as dtensor_redistribute
import torch.fx.experimental.proxy_tensor as proxy_tensor
import torch.utils.checkpoint as checkpointing
from torch import Tensor, fx, nn
from torch._C._distributed_c10d import Store
from torch._compile import _disable_dynamo
from torch.autograd.graph import Node
from torch.distributed._composable.contract import STATE_KEY
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding
from torch.distributed.tensor._ops._math_ops import _NormPartial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.multiprocessing.reductions import StorageWeakRef

from autopar.replaced import on_this_thread, replaced

__all__ = [
    "AUTOCAST_DEVICES",
    "COMPOSABLE_STATES",
    "CheckpointFunction",
    "DTensorSpec",
    "GradientUse",
    "OpSchema",
    "OutputSharding",
    "StorageRef",
    "Store",
    "StridedShard",
    "add_op_handler",
    "address_of",
    "after_backward",
    "all_gather_single",
    "all_to_all_single",
    "assert_on_device",
    "backward_id",
    "backwards_go_to",
    "close_group",
    "copy_hooks",
    "count_plain_as_replicated",
    "count_plain_as_replicated_in_backwards",
    "default_generator_replaced",
    "default_store",
    "exchange_part",
    "function_calls_go_to",
    "global_backward_hooks",
    "group_over",
    "has_aliases",
    "has_hooks",
    "is_made",
    "is_transformed",
    "keeps_graph",
    "local_of",
    "local_sizes",
    "make_dtensor",
    "make_like",
    "make_wrapper",
    "part_of",
    "partial_norm",
    "read_in_backward",
    "redistribute_part",
    "reduce_scatter_single",
    "relink_hooks",
    "replace_dispatch",
    "replace_propagation",
    "replace_redistribution",
    "run_early_in_backward",
    "set_timeout",
    "spec_of",
    "state_dict_utils",
    "storage_users",
    "timeout_of",
    "traced_constant",
    "traced_node",
    "tracing_paused",
    "uncompiled",
    "use_count_of_a_gradient",
    "use_of_gradient",
    "with_placements",
    "with_spec",
    "without_torch_function",
]

# torch 2.13 renames the flat collectives and warns about the old names, which are all that 2.11 has.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_to_all_single: Callable[..., Any] = dist.all_to_all_single

AUTOCAST_DEVICES: tuple[str, ...] = tuple(torch._C._autocast_supported_devices())


class StorageRef:
    """A weak reference to the storage of a tensor. `key` identifies the storage, and no other gets that key while this object lives."""

    def __init__(self, x: Tensor) -> None:
        self._ref = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        self.key = self.key_of(x)

    @staticmethod
    def key_of(x: Tensor) -> int:
        """A number that is the same for all tensors on one storage."""
        return int(x.untyped_storage()._cdata)

    def expired(self) -> bool:
        """Whether no tensor uses the storage any more."""
        return bool(self._ref.expired())  # type: ignore[no-untyped-call]


def after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward that runs now has ended; only to be called from within a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Queue the check that `condition`, a bool scalar on a GPU, is true; when it isn't, the device fails and prints `message`."""
    torch._assert_async(condition, message)


def backward_id() -> int:
    """A number that identifies the backward that runs now; only to be called from within a backward."""
    return int(torch._C._current_graph_task_id())


COMPOSABLE_STATES: str = STATE_KEY
"""The entry of a module's ``__dict__`` in which torch notes which of its composable functions, such as ``fully_shard``, were applied."""


def keeps_graph() -> bool:
    """Whether the backward that runs now was asked to keep its graph for another one (``retain_graph``)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


GradientUse = Literal["added", "returned", "none"]
"""What a backward does with the gradient of a leaf: adds it to ``grad``, returns it (``torch.autograd.grad``), or doesn't ask for it."""


def use_of_gradient(leaf: Node) -> GradientUse:
    """What the backward that runs now does with the gradient of a leaf, given the leaf's place in its graph."""
    try:
        return "added" if torch._C._will_engine_execute_node(leaf) else "none"
    except RuntimeError:
        return "returned"  # torch says that it doesn't support this


class _CountUses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.full((1,), float(grads[0]._use_count()))  # type: ignore[attr-defined]


@functools.cache
def use_count_of_a_gradient() -> int:
    """How many users torch counts of a gradient that nobody has but the backward function which is called with it."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        return int(torch.autograd.grad(_CountUses.apply(x) * 2, x)[0])  # type: ignore[no-untyped-call]


def run_early_in_backward(x: Tensor) -> None:
    """Let the backward of the function that made `x` run as soon as its gradient is known, as leaves do, before all that waits to run."""
    assert x.grad_fn is not None
    x.grad_fn._set_sequence_nr(2**64 - 1)  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Whether a function transform of ``torch.func`` (grad, vjp, jvp, vmap) runs on this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


T = TypeVar("T")


def read_in_backward(variable: ContextVar[T]) -> T | None:
    """The value of a context variable where the backward that runs now was called, which may have been on another thread."""
    if torch._C._is_key_in_tls("context"):
        value: T | None = torch._C._get_obj_in_tls("context").get(variable)
        return value
    return variable.get(None)


def storage_users(x: Tensor) -> int:
    """How many tensors use the storage of `x`, itself included."""
    storage = x.untyped_storage()
    # The storage object made here is one more user.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


# Makes `torch.compile` run a function as it is, in a break of its graph. The public `torch.compiler.disable` imports the compiler,
# which takes seconds, where the function is defined; this imports it at the first call, when capture has already.
uncompiled: Callable[..., Any] = _disable_dynamo


CheckpointFunction: type[torch.autograd.Function] = checkpointing.CheckpointFunction
"""The function by which ``torch.utils.checkpoint`` runs a region with ``use_reentrant=True``."""

tracing_paused: Callable[[], AbstractContextManager[Any]] = proxy_tensor.disable_proxy_modes_tracing
"""A context inside which nothing is added to the graph that an export traces."""


def traced_node(x: Tensor) -> fx.Node | None:
    """The node that makes `x` in the graph that an export traces now; None for a tensor that isn't in it."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    found = proxy_tensor.get_proxy_slot(x, mode.tracer, None, lambda slot: slot)
    return None if found is None else found.proxy.node


def traced_constant(node: fx.Node) -> object:
    """The value of a node of kind get_attr in the graph that an export traces now."""
    mode = proxy_tensor.get_proxy_mode()
    return None if mode is None else getattr(getattr(mode.tracer, "root", None), str(node.target), None)


@contextmanager
def function_calls_go_to(
    apply: Callable[[type[torch.autograd.Function], Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any],
) -> Iterator[None]:
    """Inside, on this thread, ``function.apply(*args)`` is ``apply(function, original, args, kwargs)``, also where it was looked up before.

    `original` is what ``function.apply`` would call.
    """
    base: Any = torch.autograd.function._SingleLevelFunction
    thread = threading.get_ident()

    def replacement(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        original = torch._C._FunctionBase.__dict__["apply"].__get__(None, cls)
        return apply(cls, original, args, kwargs) if threading.get_ident() == thread else original(*args, **kwargs)

    # The public `apply` calls its base class's, which otherwise only that one's base class has.
    with replaced(base, "apply", classmethod(replacement)):
        yield


@contextmanager
def backwards_go_to(run: Callable[..., Any]) -> Iterator[None]:
    """Inside, `run` is called for every backward that this thread starts: ``backward()``, `torch.autograd.grad`, what builds on them."""
    package: Any = torch.autograd
    with replaced(package, "_engine_run_backward", on_this_thread(run, package._engine_run_backward)):
        yield


@contextmanager
def default_generator_replaced(generator: object) -> Iterator[None]:
    """Inside, `torch.manual_seed` and its like use `generator` in the place of torch's default CPU generator."""
    with replaced(torch.random, "default_generator", generator):
        yield


def global_backward_hooks() -> bool:
    """Whether there are backward hooks on all modules (``register_module_full_backward_hook`` and its like)."""
    return bool(nn.modules.module._global_backward_hooks or nn.modules.module._global_backward_pre_hooks)


def has_hooks(parameter: Tensor) -> bool:
    """Whether a leaf has hooks on its gradient, before or after it is added to ``grad``."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def relink_hooks(parameter: Tensor) -> None:
    """Make autograd call the user's hooks of a leaf again, after ``swap_tensors`` gave it another tensor, to which none belong."""
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if hooks := getattr(parameter, name, None):
            setattr(parameter, name, hooks)


def copy_hooks(source: Tensor, target: Tensor) -> None:
    """Register the user's hooks on the gradient of the leaf `source`, before and after it is added to ``grad``, on `target` too."""
    for hook in (source._backward_hooks or {}).values():
        target.register_hook(hook)  # type: ignore[no-untyped-call]
    for hook in (getattr(source, "_post_accumulate_grad_hooks", None) or {}).values():
        target.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def local_of(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, or a plain tensor itself, detached and on the same storage."""
    return x._local_tensor.detach() if isinstance(x, DTensor) else x.detach()


def part_of(x: DTensor) -> Tensor:
    """This rank's part of a DTensor itself, where `local_of` makes a tensor on its storage."""
    return x._local_tensor


def address_of(x: Tensor) -> int:
    """The address of this rank's part of a tensor."""
    return int((x._local_tensor if isinstance(x, DTensor) else x).data_ptr())


def group_over(mesh: DeviceMesh, names: tuple[str, ...]) -> dist.ProcessGroup:
    """The process group of the ranks that differ along these axes only. All ranks must ask for the same groups in the same order."""
    if len(names) == 1:
        return mesh.get_group(names[0])
    return mesh[names]._flatten("_".join(names)).get_group()


def default_store() -> Store:
    """The key-value store of the default process group, which all of its ranks can read and write."""
    return dist.distributed_c10d._get_default_store()


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the collectives of a process group wait before they fail."""
    waits: list[timedelta] = [backend.options._timeout for backend in _backends_of(group)]
    return max(waits)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long the collectives of a group wait. Messages over gloo keep the timeout with which the group was made."""
    for backend in _backends_of(group):
        backend._set_default_timeout(timeout)


def close_group(group: dist.ProcessGroup) -> None:
    """Close this rank's connections of a group for good: ranks that wait for this rank, now or later, fail."""
    for backend in _backends_of(group):
        with suppress(Exception):
            if backend.name() != "gloo":
                backend.abort()
            elif group.size() > 1:
                # Gloo has no call for it, but a wait that times out closes all connections. This waits for a message that is never sent.
                backend.recv([torch.empty(1)], (group.rank() + 1) % group.size(), _NEVER_SENT).wait(timedelta(milliseconds=1))


_NEVER_SENT = 2**31 - 1
"""A message tag that no send uses."""


def _backends_of(group: dist.ProcessGroup) -> list[Any]:
    """The backends of a group, each once even if it serves several kinds of devices."""
    return list({id(backend): backend for backend in map(group._get_backend, group._device_types)}.values())


def make_dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]) -> DTensor:
    """The DTensor with this part and these global sizes, also of a scalar, for which ``DTensor.from_local`` ignores the given sizes."""
    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    new: Callable[..., DTensor] = DTensor
    return new(local.detach(), DTensorSpec(mesh, tuple(placements), meta), requires_grad=False)


def make_wrapper(kind: type[Tensor], shape: Sequence[int], like: Tensor) -> Any:
    """A tensor of the subclass `kind` without memory, contiguous, with the dtype and device of `like`."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    make: Callable[..., Tensor] = Tensor._make_wrapper_subclass
    return make(kind, tuple(shape), strides=strides, dtype=like.dtype, device=like.device)


# Inside, functions of torch don't ask ``__torch_function__`` of the tensors that they are given.
without_torch_function: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass


def make_like(local: Tensor, x: DTensor) -> DTensor:
    """The DTensor whose part on this rank is `local`, with the sizes, mesh and placements of `x`; not differentiable."""
    return with_spec(local, x._spec)


def spec_of(x: DTensor) -> DTensorSpec:
    """The sizes, mesh and placements of a DTensor."""
    return x._spec


def with_spec(local: Tensor, spec: DTensorSpec) -> DTensor:
    """The DTensor whose part on this rank is `local`; not differentiable."""
    new: Callable[..., DTensor] = DTensor
    return new(local.detach(), spec, requires_grad=False)


def with_placements(spec: DTensorSpec, placements: Sequence[Placement]) -> DTensorSpec:
    """The spec of a DTensor with other placements."""
    options: dict[str, Any] = {}
    if any(isinstance(placement, StridedShard) for placement in placements) and hasattr(spec, "use_strided_shard_as_shard_order"):
        options = {"use_strided_shard_as_shard_order": spec.use_strided_shard_as_shard_order}
    return DTensorSpec(spec.mesh, tuple(placements), spec.tensor_meta, **options)


def local_sizes(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, ...]:
    """Sizes of this rank's part of a tensor of global sizes `shape`."""
    return compute_local_shape_and_global_offset(tuple(shape), mesh, placements)[0]


def partial_norm(norm_type: float) -> Partial:
    """The placement of a tensor of which each rank has the norm of its part, and the whole is the norm of all."""
    if norm_type == 0:
        return Partial("sum")
    if norm_type in (float("inf"), -float("inf")):
        return Partial("max" if norm_type > 0 else "min")
    return _NormPartial(norm_type)


redistribute_part: Callable[..., Tensor] = dtensor_redistribute.redistribute_local_tensor


def replace_redistribution(function: Callable[..., Tensor]) -> None:
    """Make every DTensor redistribute by `function`, which has the parameters of `redistribute_part`."""
    for module in (dtensor_redistribute, dtensor_dispatch, dtensor_api):
        module.redistribute_local_tensor = function  # type: ignore[attr-defined]


def replace_propagation(wrap: Callable[[Callable[[OpSchema], OutputSharding]], Callable[[OpSchema], OutputSharding]]) -> None:
    """Wrap the function by which DTensor finds the placements of an op's results; its results are cached as before."""
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    function = wrap(propagator.propagate_op_sharding_non_cached)
    propagator.propagate_op_sharding_non_cached = function
    propagator.propagate_op_sharding = type(propagator.propagate_op_sharding)(function)


def replace_dispatch(wrap: Callable[[Callable[..., object]], Callable[..., object]]) -> None:
    """Wrap the function that torch asks how to run an op on DTensors whenever it has no answer stored for these placements.

    It has the parameters (op, args, kwargs, op_info, try_cache), where `args` and `kwargs` are the op's own. What it returns is either an
    `OutputSharding`, by which torch runs the op and which it stores, or the result of the op, which torch hands out as it is. Also lets
    in-place ops write to plain tensors.
    """
    dispatcher: Any = DTensor._op_dispatcher
    dispatcher._propagate_op_sharding_dispatch_slow_path = wrap(dispatcher._propagate_op_sharding_dispatch_slow_path)
    finish = dispatcher._dispatch_fast_path_python_tail

    def finish_also_plain(*call: Any) -> object:
        written, is_inplace = call[1][0], call[7]
        # Torch's function requires that an in-place op writes to a DTensor. A plain one has been written by now.
        return written if is_inplace and isinstance(written, Tensor) and not isinstance(written, DTensor) else finish(*call)

    dispatcher._dispatch_fast_path_python_tail = finish_also_plain
    torch._C._clear_DTensor_sharding_propagator_cache()


def add_op_handler(op: Any, handler: Callable[..., object]) -> Callable[..., object] | None:
    """Make every call of `op` with a DTensor call ``handler(op, args, kwargs)`` instead; returns torch's own handler, if it has one."""
    handlers: dict[Any, Callable[..., object]] = DTensor._op_dispatcher._custom_op_handlers
    before = handlers.get(op)
    handlers[op] = handler
    return before


class _CountPlainAsReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        DTensor._op_dispatcher._allow_implicit_replication = True
        return gradient


def count_plain_as_replicated() -> None:
    """Let ops of this thread take plain tensors beside DTensors, as replicated ones."""
    DTensor._op_dispatcher._allow_implicit_replication = True


def count_plain_as_replicated_in_backwards(device: torch.device) -> None:
    """`count_plain_as_replicated` for the thread that runs backwards on a device, which is not the caller's unless that is the CPU."""
    with torch.enable_grad(), torch.inference_mode(False):
        x = torch.zeros((), device=device, requires_grad=True)
        _CountPlainAsReplicated.apply(x).backward()  # type: ignore[no-untyped-call]


def is_made(x: DTensor) -> bool:
    """Whether a DTensor has its part yet; a garbage collector's list may have one that is just being made."""
    return hasattr(x, "_local_tensor") and hasattr(x, "_spec")


def has_aliases(x: DTensor) -> bool:
    """Whether this rank's part of a DTensor shares its storage with another tensor."""
    return storage_users(x._local_tensor) > 1


def exchange_part(x: DTensor, local: Tensor, spec: DTensorSpec) -> None:
    """Give a DTensor another part and other placements, or another mesh, in place. The global sizes must stay."""
    x._local_tensor = local.detach()
    x._spec = spec
