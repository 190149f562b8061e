"""What is done otherwise on a GPU, as far as it can be seen without one: on fake tensors, and before any device is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from autopar.errors import InputError
from autopar.ops import attention
from autopar.ops.attention_blocks import BlockMask, Scores, attend, attend_backward
from autopar.ops.comm import Rendezvous, ThreadAxis
from autopar.runtime.mailbox import connect
from autopar.runtime.module import _refuse_shared_devices
from autopar.runtime.world import connected_later
from tests.processes import Outcomes, run_cases


class _Calls(TorchFunctionMode):
    """Notes the arguments of torch's attention, and runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((args, kwargs))
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_is_called_so_that_a_kernel_can_take_it(device: str, is_masked: bool) -> None:
    # Flash kernels take no mask; on a GPU the memory-efficient one, which does, takes no grouped heads.
    with FakeTensorMode(), _Calls() as seen:
        q = torch.empty(2, 8, 16, 64, device=device)
        k = torch.empty(2, 2, 16, 64, device=device)
        bias = torch.empty(1, 1, 16, 16, device=device, dtype=torch.bool) if is_masked else None
        attention.attention(q, k, k, None, bias, not is_masked, None, 1.0, None, 0.0)
    (((_, keys, values), options),) = seen.calls
    is_repeated = is_masked and device == "cuda"
    assert keys.shape == values.shape == (2, 8 if is_repeated else 2, 16, 64)
    assert options["enable_gqa"] is not is_repeated
    assert (options["attn_mask"] is not None, options["is_causal"]) == (is_masked, not is_masked)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_a_ring_are_taken_by_kernels_of_a_gpu(dtype: torch.dtype, is_causal: bool) -> None:
    # Flash kernels are for half precision; in others all scores are made.
    with FakeTensorMode():
        q = torch.empty(2, 8, 16, 64, device="cuda", dtype=dtype)
        k = torch.empty(2, 2, 16, 64, device="cuda", dtype=dtype)
        mask, scores = BlockMask(is_causal=is_causal), Scores(0.125)
        result, lse = attend(q, k, k, mask, scores)
        gradients = attend_backward(q, q, k, k, result.to(dtype), lse, mask, scores)
    assert (result.shape, lse.shape, result.dtype, lse.dtype) == (q.shape, q.shape[:3], torch.float32, torch.float32)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]
    assert {x.dtype for x in gradients} == {dtype}


def test_repeated_heads_are_grouped_heads() -> None:
    # As `attention` repeats them on a GPU.
    q, k, v = (torch.randn(2, heads, 6, 4, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril(2)
    run = torch.nn.functional.scaled_dot_product_attention
    expected = run(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(run(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask), expected)


@pytest.mark.parametrize("keys", [6, 9, 4])
def test_a_causal_mask_by_name_is_that_of_its_elements(keys: int) -> None:
    q = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, keys, 8, dtype=torch.float64) for _ in range(2))
    by_name = torch.ops.autopar.attention(q, k, v, None, None, True, None, 0.3, None, 0.0)
    everything = torch.ones(2, keys, dtype=torch.bool)
    torch.testing.assert_close(by_name, torch.ops.autopar.attention(q, k, v, everything, None, True, None, 0.3, None, 0.0))


def test_connecting_goes_through_pairs_in_one_order() -> None:
    pairs, rendezvous, done = {(0, 2), (1, 2), (0, 1)}, Rendezvous(4), []

    def work(index: int) -> None:
        connect(ThreadAxis("pp", index, rendezvous), pairs, torch.device("cpu"))
        done.append(index)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(done) == [0, 1, 2, 3]
    assert {pair: rendezvous.expect(*pair) for pair in [(0, 1), (2, 0), (0, 3), (1, 2)]} == {(0, 1): 1, (2, 0): 1, (0, 3): 0, (1, 2): 1}


def groups_of_messages_are_connected_later() -> None:
    world = dist.group.WORLD
    assert world is not None
    device = torch.device("cuda", dist.get_rank())
    world.bound_device_id = device
    try:
        with connected_later():
            assert dist.new_group([0, 1]).bound_device_id is None
        assert world.bound_device_id == device
    finally:
        world.bound_device_id = None


def test_ranks_on_one_gpu_are_refused() -> None:
    cuda = torch.device("cuda", 0)
    _refuse_shared_devices([5, 5], cuda, "cpu:gloo,cuda:gloo")  # gloo doesn't mind
    _refuse_shared_devices([5, 6], cuda, "cuda:nccl")
    _refuse_shared_devices([0, 0], torch.device("cpu"), "cpu:gloo,cuda:nccl")
    with pytest.raises(InputError, match=r"ranks 1-2 have their models on one GPU.*set_device"):
        _refuse_shared_devices([7, 5, 5], cuda, "cuda:nccl")


CASES = (groups_of_messages_are_connected_later,)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cuda"), CASES)


@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_in_two_processes(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
