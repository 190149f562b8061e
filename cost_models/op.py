"""Work of one local op on a device -> seconds: a roofline with a fitted efficiency curve for matmuls."""

from __future__ import annotations

from autopar.errors import HardwareError

from .hardware import Device


def op_seconds(device: Device, *, flops: float, nbytes: float, dtype: str, family: str) -> float:
    """Seconds of one op: the larger of its compute and its memory time, plus the launch.

    Families: ``view`` costs nothing. ``matmul`` (convolutions too) computes at ``eff = max * f / (f + half)`` of the peak, so
    its time is ``(f + half) / (max * peak)``: small ones pay a fixed price, and fewer flops are never dearer. ``attention`` is
    the same with the fused kernels' own maximum. Any other family is bound by memory.

    Args:
        device: where it runs.
        flops: floating point operations, a multiply-add counted as two.
        nbytes: bytes read and written.
        dtype: torch's name of the operands' type, ``bfloat16``; its peak matters to matmul and attention only.
        family: ``matmul``, ``attention``, ``view``, or a word for what only moves memory (``pointwise``, ``reduction``, ...).

    Raises HardwareError if flops or bytes are negative, or if the profile has no peak for the dtype of a matmul.
    """
    if flops < 0 or nbytes < 0:
        raise HardwareError(f"an op of family {family} has {flops} flops and {nbytes} bytes; neither can be negative")
    if family == "view":
        return 0.0
    memory = nbytes / (device.mem_bandwidth_bytes_per_s * device.mem_efficiency)
    compute = 0.0
    if family in ("matmul", "attention") and flops > 0:
        reached = device.matmul_efficiency if family == "matmul" else device.attention_efficiency
        compute = (flops + device.matmul_half_flops) / (reached * peak_flops(device, dtype))
    return max(compute, memory) + device.launch_seconds


def peak_flops(device: Device, dtype: str) -> float:
    """Dense FLOP/s of `device` for `dtype` (``torch.`` in front is allowed). Raises HardwareError if the profile has none."""
    name = dtype.removeprefix("torch.")
    if name not in device.peak_flops:
        raise HardwareError(
            f"the profile of {device.name} has no peak_flops for {name}, only for {', '.join(device.peak_flops)}; "
            "use one of these or add the number to the profile"
        )
    return device.peak_flops[name]
