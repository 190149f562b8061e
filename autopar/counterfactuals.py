"""Questions to a plan that are answered by planning again: `why_not` other pins, `what_if` something else was asked, `memory_frontier`.

Comes in: a `Plan`, which says how it was asked for, and its model. Goes out: an `Answer` or a `Frontier`. A model is
captured once for all the plans that a question needs. Its rules are read and its layers folded again for each: some hundredths of a
search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from autopar.api import PrecisionLike, Progress, capture_for_planning, plan_captured
from autopar.capture import Captured, ExampleInputs
from autopar.cost_models import Cluster
from autopar.errors import HardwareError, InfeasibleError, InputError, PlanError
from autopar.ir import OpKind, Precision
from autopar.plans import Pins, Plan, Request, check_devices, check_fits, reconcile, record_request
from autopar.report import Answer, Frontier
from autopar.texts import printable, show_value
from autopar.units import format_bytes, parse_bytes

BUDGETS = 6
"""Budgets of memory that `memory_frontier` plans for unless told otherwise."""

# What the leanest plan needs is known only after a search for it, whose plan may need somewhat more than the search before said.
_ATTEMPTS = 3


def why_not(
    plan: Plan,
    model: nn.Module,
    example_inputs: ExampleInputs,
    pins: Mapping[str, object] | Pins,
    *,
    cluster: Cluster | str | None = None,
    progress: Progress | None = None,
) -> Answer:
    """What it would cost to pin something else: the plan is made again with these pins beside those that were asked for.

    The cluster, its memory and the precision are the plan's. The numbers of both plans compare if the same autopar made them; that the
    machine's profile is the same is checked.

    Args:
        plan: the plan in question.
        model: the model that it was made for.
        example_inputs: the batch that it was made for.
        pins: as in `autopar.plan`; they take the place of those of the same name that were asked for, and axis sizes that of a mesh.
        cluster: the plan's cluster, where its text can't be read any more.
        progress: called with a few words on what is being done.

    Raises InputError for pins that can't be used, that contradict the others or the cluster; PlanError for another model or cluster than
    the plan's. What `autopar.plan` raises beside that is raised too, but where nothing fits the memory, the answer says so.
    """
    read = Pins.parse(pins)
    if not read:
        raise InputError("no pins are given to ask for; give some, such as {'tp': 8}")
    request = plan.request.override(read)
    devices = find_cluster(plan, cluster)
    _check(request, devices)
    captured = capture_for_planning(model, example_inputs, devices, plan.precision, progress)
    check_fits(plan, captured.graph)
    return _answer(f"{read}", plan, captured, request, devices, plan.precision, type(model).__name__, progress)


def what_if(
    plan: Plan,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    cluster: Cluster | str | None = None,
    memory: int | str | None = None,
    precision: PrecisionLike = None,
    request: Request | None = None,
    question: str = "",
    progress: Progress | None = None,
) -> Answer:
    """What it would cost if something else had been asked for: the plan is made again with that changed, and the pins as they were.

    Args:
        plan: the plan in question.
        model: the model that it was made for.
        example_inputs: the batch to plan for; another batch or sequence length than the plan's is such a change.
        cluster: the devices to plan for; the plan's unless given.
        memory: of a device, in bytes or as text (``"40GB"``); unless given, what was asked for, or what the devices have.
        precision: as in `autopar.plan`; the plan's unless given.
        request: how the plan was asked for, with other sizes where they are changed; kept in the other plan.
        question: names the change in the answer; made from the arguments unless given.
        progress: called with a few words on what is being done.

    Raises PlanError for a model of another class, or another graph where neither sizes nor dtypes are changed; the errors of `autopar.plan`
    but for memory that is too small, which the answer tells.
    """
    policy = plan.precision if precision is None else Precision.parse(precision)
    names_sizes, request = request is not None, request or plan.request
    name = type(model).__name__
    if printable(name) != plan.model:
        raise PlanError(f"the plan was made for a {plan.model}, not for a {printable(name)}; plan for that with `autopar plan`")
    try:
        devices, request = _change_cluster(plan, request, cluster, memory)
    except InfeasibleError as error:
        return Answer(question or f"memory={memory}", plan, None, f"{error}")
    _check(request, devices)
    captured = capture_for_planning(model, example_inputs, devices, policy, progress)
    inputs = {printable(op.target): str(op.results[0]) for op in captured.graph.of_kind(OpKind.INPUT)}
    changed = {name: text for name, text in inputs.items() if plan.inputs.get(name) != text}
    keeps_sizes = _sizes_of(request) == _sizes_of(plan.request)
    # Where the caller names the sizes, inputs of others are those of another model.
    if policy == plan.precision and keeps_sizes and (names_sizes or not changed):
        check_fits(plan, captured.graph)
    texts = {"cluster": cluster, "memory": memory, "precision": precision and policy, **changed}
    asked = ", ".join(f"{name}={value}" for name, value in texts.items() if value is not None)
    return _answer(question or asked or "the same", plan, captured, request, devices, policy, name, progress)


def memory_frontier(
    plan: Plan,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    budgets: int = BUDGETS,
    cluster: Cluster | str | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """How the step grows as devices have less memory, from what the plan needs down to the leanest plan that is found.

    Args:
        plan: the plan in question.
        model: the model that it was made for.
        example_inputs: the batch that it was made for.
        budgets: number of budgets of memory to plan for, evenly spaced; those that a plan found before fits already are skipped.
        cluster: the plan's cluster, where its text can't be read any more.
        progress: called with a few words on what is being done.

    Raises InputError for no budgets, PlanError for another model or cluster than the plan's, and what `autopar.plan` raises.
    """
    if budgets < 1:
        raise InputError(f"budgets={budgets}: an integer from 1 is needed")
    devices = find_cluster(plan, cluster)
    captured = capture_for_planning(model, example_inputs, devices, plan.precision, progress)
    check_fits(plan, captured.graph)
    nothing = devices.machine.device.reserved_bytes + 1

    def attempt(budget: int) -> tuple[Plan | None, int]:
        """(the plan for so many bytes of a device, and what it needs); without a plan, what the leanest that was found needs."""
        within = f"within {format_bytes(budget)}" if budget > nothing else "the leanest"

        def tell(text: str) -> None:
            if progress is not None:
                progress(f"{within}: {text}")

        try:
            request = replace(plan.request, memory=budget)
            made = plan_captured(captured, request, devices.with_memory(budget), plan.precision, type(model).__name__, tell)
        except InfeasibleError as error:
            return None, error.needed
        return made, made.memory.total

    most = plan.memory.total
    # With no memory at all, the search says what the leanest plan that it knows needs.
    made, least = attempt(nothing)
    least = max(least, nothing)  # 0 where the search can't say
    planned_for: list[int] = []
    found = [plan, *([made] if made is not None else [])]
    for number in range(1, budgets + 1):
        budget = most - number * (most - least) // budgets
        last = None
        for _ in range(_ATTEMPTS):
            if budget >= most or any(each.memory.total <= budget and each.memory.budget >= budget for each in found):
                break
            last = budget
            made, needed = attempt(budget)
            if made is not None:
                found.append(made)
                break
            if needed <= budget:
                break
            budget = needed
        if last is not None:
            planned_for.append(last)
    return Frontier(plan, keep_best(found), tuple(sorted(planned_for, reverse=True)))


def keep_best(plans: list[Plan]) -> tuple[Plan, ...]:
    """Those plans than which none needs less memory and is as fast, from the one that needs most memory to the leanest."""
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.memory.total, plan.proof.objective_ns)):
        if not best or plan.proof.objective_ns < best[-1].proof.objective_ns:
            best.append(plan)
    return tuple(reversed(best))


def check_model(
    plan: Plan,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    cluster: Cluster | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Raise PlanError unless a plan was made for this model and batch; what can't be captured raises as in `autopar.plan`."""
    check_fits(plan, capture_for_planning(model, example_inputs, find_cluster(plan, cluster), plan.precision, progress).graph)


def find_cluster(plan: Plan, cluster: Cluster | str | None = None) -> Cluster:
    """The plan's cluster with the memory that it was planned for, from its text unless it is given.

    Raises HardwareError for a text that names no known machine, PlanError for another cluster than the plan's, and for a machine whose
    profile has changed since.
    """
    try:
        devices = cluster if isinstance(cluster, Cluster) else Cluster.parse(cluster or plan.request.cluster or plan.cluster)
    except HardwareError as error:
        raise HardwareError(f"the plan's cluster can't be read any more: {error}") from error
    if str(devices) != plan.cluster:
        raise PlanError(f"the plan is for {plan.cluster}, not for {devices}; ask what if the cluster were another, or plan for it")
    if plan.request.machine not in ("", devices.machine.digest):
        raise PlanError(
            f"the profile of the machine {devices.machine.name} has other numbers than when the plan was made, so a plan made now doesn't"
            " compare with it; make the plan again, and ask that one"
        )
    return devices.with_memory(plan.memory.budget)


def _change_cluster(plan: Plan, request: Request, cluster: Cluster | str | None, memory: int | str | None) -> tuple[Cluster, Request]:
    """The devices that a changed question is about, and the request that names them.

    Raises InputError for what is no memory, InfeasibleError for less than a device itself takes.
    """
    asked = parse_bytes(memory) if isinstance(memory, str) else memory
    if asked is not None and (type(asked) is not int or asked < 1):
        raise InputError(f"memory={show_value(memory)}: bytes of a device are needed, from 1, or a text such as '40GB'")
    if cluster is None:
        devices = find_cluster(plan)
    else:
        devices = cluster if isinstance(cluster, Cluster) else Cluster.parse(cluster)
        named = record_request(cluster, request.pins, request.mesh_sizes, strict=request.strict)
        request = replace(request, cluster=named.cluster, memory=request.memory if named.memory is None else named.memory)
        asked = asked if asked is not None else request.memory
    if asked is None:
        return devices, request
    try:
        return devices.with_memory(asked), replace(request, memory=asked)
    except HardwareError as error:
        raise InfeasibleError(f"{error}") from error


def _sizes_of(request: Request) -> tuple[object, ...]:
    """What of a request changes the captured graph, beside the precision."""
    return request.batch, request.seq, request.dtype


def _check(request: Request, cluster: Cluster) -> None:
    """Refuse what contradicts itself or the cluster before the model is captured. Raises InputError."""
    check_devices(*reconcile(request.pins, request.mesh_sizes), cluster)


def _answer(
    question: str,
    plan: Plan,
    captured: Captured,
    request: Request,
    cluster: Cluster,
    precision: Precision,
    model_name: str,
    progress: Progress | None,
) -> Answer:
    """Plan again, and put what comes of it beside the plan."""
    try:
        return Answer(question, plan, plan_captured(captured, request, cluster, precision, model_name, progress))
    except InfeasibleError as error:
        return Answer(question, plan, None, f"{error}", error.needed)
