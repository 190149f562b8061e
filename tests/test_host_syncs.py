"""Which values a training step reads on the host: on a GPU each such read would wait for all that is queued."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import autopar
from autopar.errors import PipelineError
from tests.processes import Outcomes, run_cases

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__getitem__")
"""Methods by which the values of a tensor get to the host; an index that is a list or a tensor goes the other way, and waits too."""
ALLOWED = {
    "agreement.meet": "numbers that hosts exchange over gloo: they are on the CPU",
    "call_check._hash": "on a GPU the next call reads it, from pinned memory",
    "bounds.check_bounds": "on a GPU the check is queued",
    "rng._draw": "of torch's generator on the CPU",
    "rng.begin": "likewise",
    "pipeline_calls.run": "likewise",
    "local_steps._run_on_parts": "torch's optimizers count steps on the CPU, or on the device where they don't read it",
}
"""Functions of autopar that may read values in every step -> why nothing waits for a device there."""


@contextmanager
def _reads() -> Iterator[set[str]]:
    """Inside, the functions of autopar that read values of tensors, or make tensors of values, are added to the set that this yields."""
    found: set[str] = set()

    def note() -> None:
        for frame in reversed(traceback.extract_stack()[:-2]):
            if "autopar" in Path(frame.filename).parts and "tests" not in Path(frame.filename).parts[-2:]:
                found.add(f"{Path(frame.filename).stem}.{frame.name}")
                return

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            indices = args[1] if name == "__getitem__" else ()
            indices = indices if isinstance(indices, tuple) else (indices,)
            if name != "__getitem__" or any(isinstance(index, list | Tensor) for index in indices):
                note()
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
        for name in ("equal", "tensor", "allclose"):
            patch.setattr(torch, name, watched(name, getattr(torch, name)))
        yield found


def _compile(pins: dict[str, Any], dropout: float = 0.0) -> Any:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    plain: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, use_cache=False, **shape, **rates))
    plain.loss_type = "ForCausalLM"
    return autopar.compile(plain, pins=pins)


def _step_reads_only_what_is_allowed(pins: dict[str, Any], *, dropout: float = 0.0) -> None:
    model, ids = _compile(pins, dropout), torch.randint(64, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # the first calls compare all that the ranks pass
        step()
    with _reads() as found:
        step()
        step()
    assert "agreement.meet" in found, "nothing was watched"
    assert found <= set(ALLOWED), f"values of tensors are read in every step by {sorted(found - set(ALLOWED))}"


def data_parallel() -> None:
    _step_reads_only_what_is_allowed({"dp": 2})


def zero_3() -> None:
    _step_reads_only_what_is_allowed({"dp": 2, "zero": 3})


def tensor_parallel_with_dropout() -> None:
    _step_reads_only_what_is_allowed({"tp": 2}, dropout=0.1)


def pipeline_with_a_shared_table_and_dropout() -> None:
    _step_reads_only_what_is_allowed({"pp": 2, "microbatches": 2}, dropout=0.1)


def changes_of_a_shared_table_are_noticed_without_comparing_values() -> None:
    """The last stage gets the table before every call; a backward that saved it goes on unless the table was changed in between."""
    model, ids = _compile({"pp": 2, "schedule": "gpipe", "microbatches": 2}), torch.randint(64, (4, 16))
    first, second = (model(input_ids=ids).logits for _ in range(2))
    first.sum().backward()
    second.sum().backward()
    third = model(input_ids=ids).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model(input_ids=ids)
    with pytest.raises(PipelineError, match="modified by an inplace operation"):
        third.sum().backward()


CASES = (
    data_parallel,
    zero_3,
    tensor_parallel_with_dropout,
    pipeline_with_a_shared_table_and_dropout,
    changes_of_a_shared_table_are_noticed_without_comparing_values,  # the last, as it ends its process groups
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("syncs"), CASES)


@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_no_step_waits_for_a_device(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
