"""The processes of a job: joining them, and the process groups of a mesh's axes.

Comes in: torchrun's environment or an existing process group, and a plan's mesh. Goes out: a device mesh, the axes that programs name, and
one plan for all ranks. A rank that dies leaves the others waiting in a collective. They give up after the process group's timeout, ten
minutes unless the user's own ``init_process_group`` said otherwise; torchrun, which watches the processes, ends them sooner. All groups
made here have the default group's timeout. The ranks of a pipeline report failures to each other (`autopar.runtime.failures`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar import torch_compat
from autopar.errors import ERROR_TYPES, AutoparError, PlanError
from autopar.ir import PIPELINE, Mesh, with_pipeline
from autopar.ops import comm
from autopar.plans import Plan, from_json, to_json
from autopar.runtime.failures import Alarm

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: longer than any step or checkpoint, short enough to free the machines of a dead job."""


def join_world(device_type: str, timeout: timedelta = TIMEOUT) -> int:
    """Form the default process group when torchrun started this process, and return the number of ranks; 1 without it.

    A process group that exists already is used as it is.
    """
    if not dist.is_available():
        return 1
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return 1
        if device_type == "cuda":
            number = int(os.environ.get("LOCAL_RANK", "0"))
            # Some launchers show every process its own GPU only.
            torch.cuda.set_device(0 if torch.cuda.device_count() == 1 else number)
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    return dist.get_world_size()


def is_alone() -> bool:
    """Whether this process is in no process group, as torchrun didn't start it; `join_world` must have been called."""
    return not (dist.is_available() and dist.is_initialized())


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def name_device(device: torch.device) -> str:
    """A name of this process's device that no other one has, of any machine; empty for a CPU, which processes may share."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def form_mesh(mesh: Mesh, device_type: str) -> DeviceMesh | None:
    """The device mesh of a plan's mesh over all ranks; None for one process without a process group.

    Raises PlanError when the plan was made for another number of ranks.
    """
    _check_size(mesh, mesh.world_size)
    if not (dist.is_available() and dist.is_initialized()):
        return None
    device_mesh = init_device_mesh(device_type, mesh.sizes, mesh_dim_names=mesh.names)
    if len(mesh.names) > 1:
        # With a group over all axes DTensor reduces once (a gradient norm) instead of axis by axis, about which it would warn.
        torch_compat.group_over(device_mesh, mesh.names)
    for name in mesh.names:
        _limit_waits(device_mesh.get_group(name))
    return device_mesh


def check_width(plan: Plan) -> None:
    """Raise PlanError when a plan was made for another number of ranks than this job has."""
    counts = re.match(r"([0-9]+)x([0-9]+)x", plan.cluster)
    nodes, devices = (int(counts[1]), int(counts[2])) if counts else (1, plan.world_size)
    _check_size(with_pipeline(plan.mesh, plan.pipeline.ranks), devices, nodes)


def _check_size(mesh: Mesh, devices_per_node: int, nodes: int = 1) -> None:
    """Raise PlanError when the mesh of all ranks isn't as large as this job, with the command that starts a job of that size."""
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if mesh.world_size != world_size:
        on_nodes = f"--nnodes {nodes} " if nodes > 1 else ""
        raise PlanError(
            f"the plan is for {mesh.world_size} ranks ({mesh}), {world_size} {'is' if world_size == 1 else 'are'} running: "
            f"start with `torchrun {on_nodes}--nproc-per-node {devices_per_node} SCRIPT`, or plan for {world_size}"
        )


def group_over(device_mesh: DeviceMesh, names: tuple[str, ...]) -> dist.ProcessGroup:
    """The process group of the ranks that differ along these axes only. All ranks must ask for the same ones in one order."""
    group = torch_compat.group_over(device_mesh, names)
    _limit_waits(group)
    return group


def _limit_waits(group: dist.ProcessGroup) -> None:
    """Give a group of a device mesh the default group's timeout; torch gives it half an hour."""
    if group is not dist.group.WORLD:
        torch_compat.set_timeout(group, default_timeout())


def default_timeout() -> timedelta:
    """The timeout of the default process group."""
    assert dist.group.WORLD is not None
    return torch_compat.timeout_of(dist.group.WORLD)


def axes_of(mesh: Mesh, device_mesh: DeviceMesh | None) -> dict[str, comm.Axis]:
    """Name of an axis of the mesh -> the axis as this rank sees it."""
    if device_mesh is None:
        return {name: comm.alone(name) for name in mesh.names}
    return {name: comm.GroupAxis(name, device_mesh.get_group(name)) for name in mesh.names}


def pipeline_axis(device_mesh: DeviceMesh) -> comm.GroupAxis:
    """The axis of the pipeline ranks, on which this rank sends and receives; a collective, so every rank must call it.

    It has process groups of its own: they can be closed when a stage fails, and the user's messages can't mix with the pipeline's.
    """
    # Forming a group is a collective: every rank forms the groups of all, in the same order.
    lines = device_mesh.mesh.flatten(1).T.tolist()
    place = next(i for i, line in enumerate(lines) if dist.get_rank() in line)
    with connected_later():
        directions = [
            [dist.new_group(line, timeout=default_timeout()) for line in lines] for _ in range(1 if device_mesh.device_type == "cpu" else 2)
        ]
    return comm.GroupAxis(PIPELINE, directions[0][place], (directions[0][place], directions[-1][place]))


@contextmanager
def connected_later() -> Iterator[None]:
    """Inside, groups are formed that connect two ranks when these first exchange a message, also where the default group has a device.

    With ``init_process_group(device_id=...)`` NCCL connects all ranks of a group at once, and all messages of the group, between any two
    ranks, then run one after the other on each rank: a receive that waits for one rank would hold up the send to another.
    """
    world = dist.group.WORLD
    assert world is not None
    before, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = before


def form_alarm(device_mesh: DeviceMesh, axis: comm.GroupAxis | None) -> Alarm:
    """The alarm that stops the ranks of a pipeline when one fails; every rank must call it."""
    alarm = Alarm(torch_compat.default_store(), dist.get_rank(), dist.get_world_size())
    alarm.watch(axis.directions if axis is not None else ())
    alarm.watch(map(device_mesh.get_group, device_mesh.mesh_dim_names or ()))
    return alarm


def agree(make: Callable[[], Plan], device: torch.device | None = None) -> Plan:
    """The plan that the first rank makes, on every rank; without a process group just the plan.

    Solvers stop at time limits, so ranks that each made their own could get different plans. When the first rank can't make a plan,
    every rank raises its error, whatever it is: as AutoparError where its type isn't one of `autopar.errors`.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return make()
    plan: Plan | None = None
    failure: Exception | None = None
    text = ""
    if dist.get_rank() == 0:
        try:
            plan = make()
            text = to_json(plan)
        except Exception as error:  # whatever it is, the other ranks wait for an answer
            failure = error
            text = f"{type(error).__name__}:{error}"
    text = _broadcast_text(text, device)
    if failure is not None:
        raise failure
    if plan is None:
        if not text.startswith("{"):  # an error, not a plan's JSON
            name, _, message = text.partition(":")
            raise ERROR_TYPES.get(name, AutoparError)(f"on the first rank: {message if name in ERROR_TYPES else text}")
        plan = from_json(text)
    return plan


def _broadcast_text(text: str, device: torch.device | None) -> str:
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, 0)
    if dist.get_rank():
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()
