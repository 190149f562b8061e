"""How far a step in a precision is from the same step on one device, in real processes, for every kind of plan.

Prints a row per plan: for each model, in mixed precision, the worst share of the bound that `tests.rounding` measures (1 is the bound); of
all models, in float32 and float64, the largest error of an element by the largest element of its tensor.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from autopar.ir.precision import PRECISIONS
from tests.precision_steps import MODELS, largest_error, step_in_parallel, step_of_one_device
from tests.rounding import rounding_of, share_of_rounding

Pins = Mapping[str, object]

PLANS: Mapping[int, tuple[Pins, ...]] = {
    2: (
        *({"dp": 2, "zero": level} for level in range(4)),
        {"tp": 2},
        {"pp": 2, "microbatches": 2, "schedule": "1f1b"},
        {"pp": 2, "microbatches": 4, "schedule": "zb-h1"},
    ),
    4: (
        *({"dp": 2, "tp": 2, "zero": level} for level in range(4)),
        {"dp": 4, "zero": 3, "zero_group": 2},
        {"pp": 2, "dp": 2, "zero": 1, "microbatches": 2, "schedule": "1f1b"},
        {"pp": 2, "dp": 2, "zero": 3, "microbatches": 2, "schedule": "1f1b"},
        {"pp": 2, "tp": 2, "microbatches": 4, "schedule": "zb-h1"},
    ),
}


def _measure(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    found: dict[str, list[tuple[float, float, float]]] = {}  # by pins, one after the other those of the models
    for name in MODELS:

        def mixed(name: str = name) -> Mapping[str, Tensor]:
            return step_of_one_device(name, PRECISIONS["mixed"])

        expected, bounds = mixed(), rounding_of(mixed)
        exact = {dtype: step_of_one_device(name, PRECISIONS["model"], dtype) for dtype in (torch.float32, torch.float64)}
        for pins in PLANS[ranks]:
            _, actual = step_in_parallel(name, pins, "mixed")
            share = max(share_of_rounding(actual, expected, bounds).values())
            errors = [largest_error(step_in_parallel(name, pins, "model", dtype)[1], step) for dtype, step in exact.items()]
            text = ", ".join(f"{pin}={value}" for pin, value in pins.items())
            found.setdefault(text, []).append((share, *errors))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure all plans on two and on four processes, and print the table."""
    print(f"| processes | pins | {' | '.join(MODELS)} | float32 | float64 |")
    print(f"| ---: | --- | {'---: | ' * len(MODELS)}---: | ---: |")
    for ranks in PLANS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_measure, (ranks, folder), nprocs=ranks)
            for pins, of_models in json.loads(Path(folder, "found.json").read_text()).items():
                shares, single, double = zip(*of_models, strict=True)
                print(f"| {ranks} | {pins} | {' | '.join(f'{x:.2f}' for x in shares)} | {max(single):.1e} | {max(double):.1e} |")


if __name__ == "__main__":
    main()
