"""The memory that a pipeline's plan predicts against what its ranks hold: every storage that lives while a schedule runs is counted."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from autopar.checks.verification import verify_against
from autopar.cost_models import Cluster
from autopar.ir import Graph
from autopar.ir.precision import MOMENTS
from autopar.ops import comm
from autopar.runtime.executor import Executor
from autopar.runtime.mailbox import Delivery, Mailbox
from tests.emitted import subject
from tests.planning import make_plan


class _Living(TorchDispatchMode):
    """Counts the bytes of storages that were made, or came as messages, on this thread since it began, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = func(*args, **(kwargs or {}))
        self.add([x for x in tree_leaves(results) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given])
        return results

    def add(self, tensors: list[Tensor]) -> None:
        self._sizes |= {StorageWeakRef(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}
        self._sizes = {ref: nbytes for ref, nbytes in self._sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._sizes.values()))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Filled when schedules run: group -> bytes at the peak, with its parameters and what an optimizer keeps of them."""
    found: dict[int, int] = {}
    here = threading.local()
    run, wait_for, send = Executor.run, Mailbox.wait_for, comm.ThreadAxis.send

    def counted_run(self: Executor, actions: object = None) -> None:
        with _Living() as here.living:
            run(self, actions)  # type: ignore[arg-type]
        stored = {x.untyped_storage()._cdata: x.nbytes for one in self.tensors.values() for x in one.parameters if x.requires_grad}
        found[self.pipeline_rank] = here.living.peak + (1 + MOMENTS) * sum(stored.values())

    def counted_wait_for(self: Mailbox, delivery: Delivery) -> list[Tensor]:
        values = wait_for(self, delivery)
        here.living.add(values)
        return values

    def uncounted_send(self: comm.ThreadAxis, x: Tensor, to: int) -> comm.Message:
        with _disable_current_modes():
            return send(self, x, to)

    monkeypatch.setattr(Executor, "run", counted_run)
    monkeypatch.setattr(Mailbox, "wait_for", counted_wait_for)
    monkeypatch.setattr(comm.ThreadAxis, "send", uncounted_send)
    return found


def in_float64(graph: Graph) -> Graph:
    """The graph as a verification runs it: what the model casts to float32 is float64 there too."""
    raised = {"float32": "float64"}
    ops = (replace(op, results=tuple(replace(x, dtype=raised.get(x.dtype, x.dtype)) for x in op.results)) for op in graph.ops)
    return Graph(tuple(ops))


@pytest.mark.parametrize(
    ("pp", "schedule", "recompute"),
    [
        (2, "gpipe", "none"),
        (4, "gpipe", "full"),
        (4, "gpipe", "selective"),
        (4, "1f1b", "none"),
        (4, "zb-h1", "none"),
        (2, "zb-v", "none"),
        (2, "v-half", "full"),
        (2, "interleaved", "none"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2_deep", "llama_tied", "t5_deep", "unet"])
def test_ranks_hold_what_the_plan_says(name: str, pp: int, schedule: str, recompute: str, held: dict[int, int]) -> None:
    reference = subject(name).reference
    pins = {"pp": pp, "schedule": schedule, "recompute": recompute, "microbatches": 8}
    plan = make_plan(reference.captured.graph, Cluster.parse(f"{pp}xcpu"), pins=pins)
    assert verify_against(reference, plan).ok
    assert len(held) == pp
    # Inputs and outputs of the step are there before and after it.
    memory = make_plan(in_float64(reference.captured.graph), Cluster.parse(f"{pp}xcpu"), pins=pins).memory
    predicted = memory.total - memory.reserved - memory.buffers
    assert 0.98 < predicted / max(held.values()) < 1.2
