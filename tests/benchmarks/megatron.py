"""Predict the steps of Megatron-LM's table of models from 1.7 to 1008 billion parameters, pinned to its layouts and left free.

The table is Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", Table 1: A100 80GB, sequences of
2048, full recomputation; the micro-batch sizes and layers per stage are those of the scripts that the authors published. Measured seconds
follow from the table's TFLOP/s and equation (3). ``make megatron-bench`` runs it; the table is printed as it stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of the table; `tflops` are per GPU, `rows` those of a micro-batch, `chunks` stages per rank."""

    billions: float
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline_ranks: int
    gpus: int
    batch: int
    tflops: int
    rows: int
    chunks: int = 1

    @property
    def measured_seconds(self) -> float:
        """Equation (3) over the measured rate: 96 B s l h^2 (1 + s / 6h + V / 16lh) flops, recomputation included."""
        s, v, h, layers = SEQUENCE, VOCABULARY, self.hidden, self.layers
        flops = 96 * self.batch * s * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))
        return flops / (self.gpus * self.tflops * 1e12)


SEQUENCE, VOCABULARY = 2048, 51200
ROWS = (
    Row(1.7, 24, 2304, 24, 1, 1, 32, 512, 137, 16),
    Row(3.6, 32, 3072, 30, 2, 1, 64, 512, 138, 16),
    Row(7.5, 32, 4096, 36, 4, 1, 128, 512, 142, 16),
    Row(18.4, 48, 6144, 40, 8, 1, 256, 1024, 135, 8),
    Row(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138, 4),
    Row(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140, 2, 3),
    Row(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148, 2, 2),
    Row(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155, 1, 2),
    Row(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163, 1, 3),
    Row(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163, 1),
)


def capture_row(row: Row) -> Any:
    """The captured graph of a row's model on its batch, without weights."""
    import torch
    import transformers

    from autopar.capture.export import capture

    config = transformers.GPT2Config(
        n_embd=row.hidden,
        n_layer=row.layers,
        n_head=row.heads,
        n_positions=SEQUENCE,
        vocab_size=VOCABULARY,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    tokens = torch.empty(row.batch, SEQUENCE, dtype=torch.int64, device="meta")
    return capture(model, {"input_ids": tokens, "labels": tokens, "use_cache": False})


def measure(row: Row, free: bool) -> dict[str, object]:
    """Plan one row in this process and return the predicted step and what planning took."""
    import torch

    from autopar.cost_models import Cluster
    from autopar.errors import AutoparError
    from autopar.plans import Pins
    from autopar.search.planner import make_plan

    torch.set_num_threads(1)
    start = time.perf_counter()
    captured = capture_row(row)
    captured_at = time.perf_counter()
    data = row.gpus // (row.tensor * row.pipeline_ranks)
    pins: dict[str, object] = {}
    if not free:
        pins = {
            "pp": row.pipeline_ranks,
            "microbatches": row.batch // (data * row.rows),
            "schedule": "interleaved" if row.chunks > 1 else "1f1b",
            "chunks": row.chunks,
            "recompute": "full",
            "fsdp": False,
            **({"dp": data} if data > 1 else {}),
            **({"tp": row.tensor} if row.tensor > 1 else {}),
        }
    result: dict[str, object] = {"capture_s": captured_at - start, "ops": len(captured.graph.ops)}
    try:
        plan = make_plan(captured.graph, Cluster.parse(f"{row.gpus // 8}x8xa100-80gb"), pins=Pins.parse(pins))
    except AutoparError as error:
        return result | {"outcome": f"{type(error).__name__}: {error}", "plan_s": time.perf_counter() - captured_at}
    kinds = {block.recompute for block in plan.pipeline.blocks}
    return result | {
        "step_s": plan.seconds.step,
        "memory_gb": plan.memory.total / 1e9,
        "plan_s": time.perf_counter() - captured_at,
        "gap": plan.proof.gap,
        "outcome": f"pp={plan.pipeline.ranks} x {plan.mesh}, {plan.pipeline.schedule}"
        + (f" x{plan.pipeline.chunks}" if plan.pipeline.chunks > 1 else "")
        + f", {plan.pipeline.microbatches} micro-batches, recompute {'/'.join(sorted(kinds))}",
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> int:
    """Run all rows, pinned and free, or the one named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--free", action="store_true", help="leave everything to the planner")
    given = parser.parse_args()
    if given.row is not None:
        print(json.dumps(measure(ROWS[given.row], given.free)))
        return 0
    heads = (
        "parameters | GPUs | measured s | pinned: predicted s | memory GB | plan s | free: predicted s | plan s | what the planner prefers"
    )
    print(f"| {heads} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = 0
    for number, row in enumerate(ROWS):
        answers = []
        for option in ([], ["--free"]):
            run = subprocess.run([sys.executable, __file__, "--row", str(number), *option], capture_output=True, text=True, check=False)
            if run.returncode:
                print(run.stderr, file=sys.stderr)
                failed = 1
            answers.append(json.loads(run.stdout.splitlines()[-1]) if not run.returncode else {})
        pinned, free = answers

        def number_of(answer: dict[str, Any], key: str, digits: int) -> str:
            return f"{answer[key]:.{digits}f}" if key in answer else "-"

        print(
            f"| {row.billions}B | {row.gpus} | {row.measured_seconds:.2f} | {number_of(pinned, 'step_s', 2)}"
            f" | {number_of(pinned, 'memory_gb', 1)}"
            f" | {number_of(pinned, 'plan_s', 1)} | {number_of(free, 'step_s', 2)} | {number_of(free, 'plan_s', 1)}"
            f" | {free.get('outcome', '-')} |",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
