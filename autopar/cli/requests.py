"""What options ask for: a cluster with its memory, the parameters' type, and how both are kept in a plan.

Comes in: texts of options. Goes out: what `autopar.plan` takes, or an error that names the option and what to write. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from autopar.cli.sources import Source, find_dtype
from autopar.cost_models import Cluster, peak_flops
from autopar.errors import AutoparError, HardwareError, InfeasibleError, InputError
from autopar.ir import Precision
from autopar.plans import Plan
from autopar.rules import RETURNED
from autopar.units import parse_bytes


def parse_cluster(text: str, memory: str | None) -> Cluster:
    """Read the cluster. Raises InputError when it isn't one, InfeasibleError when `memory` is less than the device itself takes."""
    cluster = Cluster.parse(text)
    if memory is None:
        return cluster
    nbytes = parse_bytes(memory)
    try:
        return cluster.with_memory(nbytes)
    except HardwareError as error:
        hint = f"; --memory {memory} is {nbytes} bytes: give the unit, such as {memory.strip()}GB" if memory.strip().isdigit() else ""
        raise InfeasibleError(f"{error}{hint}") from error


@contextmanager
def pointing_to_example(model: str) -> Iterator[None]:
    """Let errors that ask for a model that returns its loss alone say how to give one, where the user wrote no model."""
    try:
        yield
    except AutoparError as error:
        if model.startswith("hf:") and RETURNED in str(error):
            error.args = (f"{error}; `build` of examples/loss_only.py makes such a model of a configuration",)
        raise


def choose_dtype(model: str, dtype: str | None, precision: Precision) -> str | None:
    """The type of the parameters: what the user gives, else of ``hf:`` models what the precision stores; None leaves it to the model.

    Raises InputError when the two contradict each other.
    """
    stored = precision.stored_dtype
    if dtype is None:
        return stored if model.startswith("hf:") else None
    if stored is not None and find_dtype(dtype) != stored:
        raise InputError(
            f"--precision {precision} stores parameters as {stored}, --dtype says {find_dtype(dtype)}:"
            f" leave out --dtype, or --dtype {stored}"
        )
    return dtype


def check_dtype(source: Source, precision: Precision, cluster: Cluster) -> None:
    """Raise HardwareError when the machine can't compute in the dtype in which parameters will be read, where that is known."""
    if dtype := source.dtype or source.stated_dtype:
        peak_flops(cluster.machine.device, precision.computed_dtype(dtype))


def keep_request(
    plan: Plan, model: str, *, batch: int | None, seq: int | None, dtype: str | None, cluster: str, memory: str | None
) -> Plan:
    """The plan with the texts of the options that it was made by, beside the pins and the mesh that it has already."""
    request = replace(
        plan.request,
        model=model,
        batch=batch,
        seq=seq,
        dtype=None if dtype is None else find_dtype(dtype),
        cluster=cluster.strip(),
        memory=None if memory is None else plan.memory.budget,
    )
    return replace(plan, request=request.in_print())
