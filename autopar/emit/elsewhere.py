"""The nearest configuration of another system: torchtitan, Megatron-LM, or torch's own FSDP2 and tensor parallelism.

Comes in: a plan. Goes out: text that the other system reads, and a line for everything in the plan that the text can't say. Nothing is left
out in silence: what follows from a size or a name alone is translated, the rest is named. The lines are in the text's comments too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from autopar.ir import StateKind, format_layout
from autopar.plans import Plan
from autopar.texts import printable

_TORCH_SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zb-v": "ZBVZeroBubble"}
_NEAREST_TORCH_SCHEDULES = {"zb-h1": "InterleavedZeroBubble", "v-half": "ZBVZeroBubble"}


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration as text, and what it doesn't say of the plan, a line each."""

    text: str
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the plan's mesh.

    Attributes:
        name, size: of the axis.
        kind: what it splits, ``data``, ``tensor``, ``context`` or ``nothing``.
        levels: in which ZeRO levels parameters are stored along it (0 is whole).
    """

    name: str
    size: int
    kind: str
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What every system's configuration is made of.

    Attributes:
        replicate, shard: ranks that split the batch and store parameters whole, or in parts.
        level: the highest ZeRO level.
        tensor, context: ranks that split features, or the sequence.
        batch: rows of the batch.
        sequence: tokens of a row; 0 where the model has no sequence.
        remarks: what no system's configuration says.
    """

    replicate: int
    shard: int
    level: int
    tensor: int
    context: int
    batch: int
    sequence: int
    axes: tuple[Axis, ...]
    remarks: tuple[str, ...]


def configure(plan: Plan, target: str) -> Configuration:
    """The configuration for `target`, one of ``torchtitan``, ``megatron`` and ``fsdp2``."""
    facts = find_facts(plan)
    lines, more = {"torchtitan": _torchtitan, "megatron": _megatron, "fsdp2": _fsdp2}[target](plan, facts)
    remarks = tuple(map(printable, (*facts.remarks, *more)))
    head = [f"# The nearest {target} configuration to a plan for {printable(plan.model)} on {printable(plan.cluster)}, by autopar."]
    head += ["# What it can't say of the plan:", *(f"# - {remark}" for remark in remarks)] if remarks else ["# It says all of the plan."]
    return Configuration("\n".join([*head, "", *lines]) + "\n", remarks)


def find_facts(plan: Plan) -> Facts:
    """What the plan's axes are, and what of the plan is in no system's configuration."""
    axes = tuple(_find_axis(plan, position) for position in range(len(plan.mesh.names)))
    data = [axis for axis in axes if axis.kind == "data"]
    sharded = [axis for axis in data if any(axis.levels)]
    return Facts(
        replicate=math.prod(axis.size for axis in data if axis not in sharded),
        shard=math.prod(axis.size for axis in sharded),
        level=max((level for axis in sharded for level in axis.levels), default=0),
        tensor=math.prod(axis.size for axis in axes if axis.kind == "tensor"),
        context=math.prod(axis.size for axis in axes if axis.kind == "context"),
        batch=plan.work.samples,
        sequence=(plan.work.tokens or 0) // plan.work.samples,
        axes=axes,
        remarks=tuple(_common_remarks(plan, axes)),
    )


def _find_axis(plan: Plan, position: int) -> Axis:
    name, size = plan.mesh.names[position], plan.mesh.sizes[position]
    words = {word.strip() for group in plan.groups for word in group.axes.get(name, "").split(",")}
    if name in plan.batch_axes:
        kind = "data"
    elif not words - {"", "nothing", "parameter storage"}:
        kind = "nothing"
    else:
        kind = "context" if "sequence" in words and not words & {"features", "heads"} else "tensor"
    levels = {
        0 if layout[position].kind is not StateKind.SHARD else layout[position].level or 3
        for layout in map(plan.layouts.__getitem__, _parameters(plan))
    }
    return Axis(name, size, kind, tuple(sorted(levels)))


def _parameters(plan: Plan) -> dict[str, str]:
    """Op -> name of every parameter of the plan's representatives. Buffers have no update, so they aren't among the plan's ops."""
    updated = {op.op for op in plan.ops}
    return {op: name for group in plan.groups for op, name in group.tensors.items() if op in updated or not updated}


def _common_remarks(plan: Plan, axes: Sequence[Axis]) -> Iterator[str]:
    """What none of the systems can be told."""
    for kind in ("data", "tensor", "context"):
        alike = [axis for axis in axes if axis.kind == kind]
        if len(alike) > 1 and kind != "data":
            yield f"axes {', '.join(axis.name for axis in alike)} are one axis of {math.prod(axis.size for axis in alike)} ranks there"
    for axis in axes:
        if axis.kind == "data" and len(axis.levels) > 1:
            position = plan.mesh.names.index(axis.name)
            whole = [name for op, name in _parameters(plan).items() if plan.layouts[op][position].kind is not StateKind.SHARD]
            yield f"{len(whole)} kinds of parameters are stored whole along {axis.name} ({_few(whole)}), the others in parts"
        if axis.kind == "nothing" and axis.size > 1:
            yield f"the {axis.size} ranks of {axis.name} all do the same work: no degree says that, and the degrees leave them out"
    for group in plan.groups:
        for axis in axes:
            if group.axes.get(axis.name) == "nothing" and axis.size > 1 and axis.kind != "nothing":
                yield f"{group.name}: {axis.name} splits nothing there"
    if plan.half_batches:
        yield "two halves of the batch take turns, one computing while the other communicates"
    if plan.loss_chunks > 1:
        yield f"logits are computed in {plan.loss_chunks} parts together with the loss"
    if plan.prefetch != 1:
        yield f"parameters are gathered {plan.prefetch} blocks ahead"
    padded = [name for op, name in _parameters(plan).items() if any(state.padded for state in plan.layouts[op])]
    if padded:
        yield f"parts of unequal size are padded: {_few(padded)}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _recomputed(plan: Plan) -> tuple[str, list[str]]:
    """The kind of recomputation of most blocks that have some, and a remark where others differ."""
    kinds = [block.recompute for block in plan.pipeline.blocks if block.path]
    used = sorted({kind for kind in kinds if kind != "none"}, key=kinds.count)
    if not used:
        return "none", []
    kind = used[-1]
    others = [block.name for block in plan.pipeline.blocks if block.recompute != kind]
    return kind, [
        f"not every block is run again in the backward: {_few(others)} {'is' if len(others) == 1 else 'are'} otherwise"
    ] if others else []


def _stage_starts(plan: Plan) -> list[str]:
    """The path of the first block of every stage but the first."""
    return [after.path for before, after in pairwise(plan.pipeline.blocks) if after.stage != before.stage]


# --- torchtitan -------------------------------------------------------------------------------------------------------------


def _torchtitan(plan: Plan, facts: Facts) -> tuple[list[str], list[str]]:
    """A TOML file of torchtitan's `JobConfig`, as far as a plan says it."""
    pipeline, remarks = plan.pipeline, []
    if facts.level in (1, 2) and facts.shard > 1:
        remarks.append(f"ZeRO level {facts.level}: fully_shard keeps parameters from forward to backward instead, and stores them in parts")
    schedule, more = _torch_schedule(pipeline.schedule, pipeline.ranks)
    recompute, others = _recomputed(plan)
    remarks += [*more, *others]
    if recompute == "selective":
        remarks.append("selective recomputation of attention cores: the nearest is its own choice of operators")
    local = facts.batch // max(1, facts.replicate * facts.shard)
    micro = max(1, local // pipeline.microbatches)
    if pipeline.microbatches > 1 and pipeline.ranks == 1:
        remarks.append(f"{pipeline.microbatches} micro-batches without a pipeline are gradient accumulation: local_batch_size says so")
        local = micro
    sequence_split = _sequence_parallel(plan, facts)
    if facts.tensor > 1 and not sequence_split:
        remarks.append("between layers, activations are whole on all tensor-parallel ranks; its sequence parallelism is always on")
    remarks.append("the model's name and sizes (flavor), data and optimizer are yours to fill in: a plan doesn't know them")
    remarks += _tensor_remarks(plan, facts)
    lines = [
        "[training]",
        f"local_batch_size = {local}",
        f"global_batch_size = {facts.batch}",
        *([f"seq_len = {facts.sequence}"] if facts.sequence else []),
        *_torchtitan_precision(plan, remarks),
        "",
        "[parallelism]",
        f"data_parallel_replicate_degree = {facts.replicate}",
        f"data_parallel_shard_degree = {facts.shard}",
        f'fsdp_reshard_after_forward = "{"never" if facts.level in (1, 2) else "always" if facts.level == 3 else "default"}"',
        f"tensor_parallel_degree = {facts.tensor}",
        f"context_parallel_degree = {facts.context}",
        f"pipeline_parallel_degree = {pipeline.ranks}",
    ]
    if pipeline.ranks > 1:
        lines += [f'pipeline_parallel_schedule = "{schedule}"', f"pipeline_parallel_microbatch_size = {micro}"]
        remarks.append(
            f"stages begin at {_few(_stage_starts(plan))}: torchtitan's names of modules are others, so set its split points by hand"
        )
    lines += ["", "[activation_checkpoint]", f'mode = "{recompute}"']
    if recompute == "selective":
        lines.append('selective_ac_option = "op"')
    return lines, remarks


def _torchtitan_precision(plan: Plan, remarks: list[str]) -> list[str]:
    """Lines of ``[training]`` for the plan's precision."""
    precision = plan.precision
    if precision.masters:
        remarks.append(
            "parameters of a lower precision with float32 copies in the optimizer: the nearest is float32 parameters, read as bfloat16"
        )
        return ['mixed_precision_param = "bfloat16"', 'mixed_precision_reduce = "float32"']
    if precision.param_dtype is None:
        remarks.append("everything is in the dtypes of the model: the nearest reads parameters as float32")
        return ['mixed_precision_param = "float32"', 'mixed_precision_reduce = "float32"']
    if precision.param_dtype == "float16":
        remarks.append("float16, for which there is no gradient scaler")
    return [
        f'mixed_precision_param = "{precision.param_dtype}"',
        f'mixed_precision_reduce = "{precision.reduce_dtype or precision.param_dtype}"',
    ]


def _torch_schedule(name: str, ranks: int) -> tuple[str, list[str]]:
    """Torch's name of a schedule, and a remark where it is the nearest only."""
    if ranks == 1 or name in _TORCH_SCHEDULES:
        return _TORCH_SCHEDULES.get(name, "1F1B"), []
    nearest = _NEAREST_TORCH_SCHEDULES[name]
    return nearest, [f"schedule {name}: the nearest is {nearest}, whose order of actions and memory are others"]


def _sequence_parallel(plan: Plan, facts: Facts) -> bool:
    """Whether activations are gathered and scattered over the axes that split features, as sequence parallelism does."""
    names = {axis.name for axis in facts.axes if axis.kind == "tensor"}
    return any(row.axis in names and row.purpose == "activations" and row.collective == "reduce_scatter" for row in plan.traffic)


def _tensor_remarks(plan: Plan, facts: Facts) -> Iterator[str]:
    """Splits by features that aren't the usual pair of a column-wise and a row-wise product."""
    for axis in facts.axes:
        if axis.kind != "tensor" or axis.size == 1:
            continue
        position = plan.mesh.names.index(axis.name)
        tensors = _parameters(plan)
        strided = [name for op, name in tensors.items() if plan.layouts[op][position].outer > 1]
        if strided:
            yield f"fused weights are split inside each of their blocks along {axis.name}: {_few(strided)}"
        odd = sorted({row.collective for row in plan.traffic if row.axis == axis.name and row.collective == "all_to_all"})
        if odd:
            yield f"some activations change over {axis.name} from one split to another by all-to-all"


# --- Megatron-LM ------------------------------------------------------------------------------------------------------------


def _megatron(plan: Plan, facts: Facts) -> tuple[list[str], list[str]]:
    """Arguments of Megatron-LM's training scripts, one a line."""
    pipeline, remarks = plan.pipeline, []
    micro = max(1, facts.batch // max(1, facts.replicate * facts.shard) // pipeline.microbatches)
    arguments = [
        f"--tensor-model-parallel-size {facts.tensor}",
        f"--pipeline-model-parallel-size {pipeline.ranks}",
        f"--context-parallel-size {facts.context}",
        f"--micro-batch-size {micro}",
        f"--global-batch-size {facts.batch}",
        *([f"--seq-length {facts.sequence}"] if facts.sequence else []),
    ]
    if pipeline.ranks > 1:
        if pipeline.chunks > 1:
            arguments.append(f"--num-virtual-stages-per-pipeline-rank {pipeline.chunks}")
        usual = "interleaved" if pipeline.chunks > 1 else "1f1b"
        if pipeline.schedule != usual:
            remarks.append(f"schedule {pipeline.schedule}: it runs {usual}")
        counts = [sum(block.stage == stage for block in pipeline.blocks) for stage in range(pipeline.stages)]
        remarks.append(
            f"stages have {', '.join(map(str, counts))} blocks; there, layers are spread evenly unless the pipeline's layout is given"
        )
    if facts.tensor > 1 and _sequence_parallel(plan, facts):
        arguments.append("--sequence-parallel")
    if facts.shard > 1 and facts.level in (1, 2):
        arguments.append("--use-distributed-optimizer")
        if facts.level == 2:
            remarks.append("ZeRO level 2: the distributed optimizer stores the optimizer's states in parts, and gradients whole (level 1)")
    if facts.shard > 1 and facts.level == 3:
        arguments += ["--use-megatron-fsdp", "--data-parallel-sharding-strategy optim_grads_params", "--use-distributed-optimizer"]
    if facts.shard > 1 and facts.replicate > 1:
        arguments.append(f"--num-distributed-optimizer-instances {facts.replicate}")
    kind, others = _recomputed(plan)
    remarks += others
    if kind == "full":
        arguments += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    elif kind == "selective":
        arguments.append("--recompute-granularity selective")
    precision = plan.precision
    computed = "bfloat16" if precision.masters else precision.param_dtype
    if computed in ("bfloat16", "float16"):
        arguments.append("--bf16" if computed == "bfloat16" else "--fp16")
        if computed == precision.param_dtype and (precision.reduce_dtype or computed) == "float32":
            arguments.append("--accumulate-allreduce-grads-in-fp32")
        if not precision.masters:
            remarks.append(
                f"parameters are stored in float32 and read as {computed}; there they are stored as {computed} with float32 copies"
            )
    else:
        remarks.append(f"precision {precision}: without --bf16 or --fp16 it computes in float32")
    remarks.append("sizes of the model (--num-layers and such), data and optimizer are yours to fill in: a plan doesn't know them")
    remarks += _tensor_remarks(plan, facts)
    return [f"{argument} \\" if number + 1 < len(arguments) else argument for number, argument in enumerate(arguments)], remarks


# --- FSDP2 and torch's tensor parallelism -----------------------------------------------------------------------------------


def _fsdp2(plan: Plan, facts: Facts) -> tuple[list[str], list[str]]:
    """A Python function that applies torch's own ``parallelize_module`` and ``fully_shard`` to the original model."""
    remarks: list[str] = []
    if plan.pipeline.ranks > 1 or plan.pipeline.microbatches > 1:
        remarks.append(
            f"{plan.pipeline.ranks} pipeline ranks, {plan.pipeline.microbatches} micro-batches, {plan.pipeline.schedule}: cut the model at"
            f" {_few(_stage_starts(plan)) or 'nothing'} with torch.distributed.pipelining, and apply this to each stage"
        )
    if facts.context > 1:
        remarks.append(f"the sequence is split over {facts.context} ranks: wrap the step in torch's context_parallel")
    if facts.level in (1, 2):
        remarks.append(f"ZeRO level {facts.level}: reshard_after_forward=False keeps gathered parameters, but stores them in parts")
    if facts.level == 0 and facts.shard * facts.replicate > 1:
        remarks.append("parameters are whole on every rank that splits the batch: replicate (DDP) does that, not fully_shard")
    if plan.precision.masters:
        remarks.append("float32 copies of parameters in the optimizer: the nearest stores parameters in float32")
    kind, others = _recomputed(plan)
    remarks += others
    if kind == "selective":
        remarks.append("only attention cores are run again: choose operators with torch.utils.checkpoint's selective contexts")
    styles, unsaid = _tensor_styles(plan, facts)
    remarks += [*unsaid, *_tensor_remarks(plan, facts)]
    lines = ["import torch", "from torch import nn"]
    axes = {name: size for name, size in (("replicate", facts.replicate), ("shard", facts.shard), ("tp", facts.tensor)) if size > 1}
    lines += ["from torch.distributed.device_mesh import init_device_mesh"] if axes else []
    lines += ["from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard"] if facts.shard > 1 else []
    lines += ["from torch.distributed._composable.replicate import replicate"] if facts.shard == 1 and facts.replicate > 1 else []
    if facts.tensor > 1:
        lines.append("from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module")
    lines += ["", "", "def parallelize(model: nn.Module) -> nn.Module:"]
    if axes:
        lines.append(f'    mesh = init_device_mesh("cuda", {tuple(axes.values())}, mesh_dim_names={_quoted(tuple(axes))})')
    layers = [path for group in plan.groups for path in group.paths]
    if facts.tensor > 1:
        lines += ["    styles = {", *(f"        {_quoted(name)}: {style}()," for name, style in styles.items()), "    }"]
        lines.append('    parallelize_module(model, mesh["tp"], styles)')
    if facts.shard > 1:
        data = '("replicate", "shard")' if facts.replicate > 1 else '"shard"'
        options = f"mesh=mesh[{data}], mp_policy=policy, reshard_after_forward={facts.level == 3}"
        lines += [
            f"    policy = MixedPrecisionPolicy({_policy(plan)})",
            *_loop(layers),
            f"        fully_shard(model.get_submodule(path), {options})",
        ]
        lines.append(f"    fully_shard(model, {options})")
    elif facts.replicate > 1:
        lines.append('    replicate(model, device_mesh=mesh["replicate"])')
    if kind == "full":
        remarks.append(
            "layers are run again in the backward: call them through torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    return [*lines, "    return model"], remarks


def _quoted(value: object) -> str:
    """Text, or a tuple of texts, as Python writes it, in double quotes."""
    return f"({', '.join(map(json.dumps, value))}{',' if len(value) == 1 else ''})" if isinstance(value, tuple) else json.dumps(value)


def _loop(paths: Sequence[str]) -> list[str]:
    """The head of a loop over these module paths."""
    return ["    for path in (", *(f"        {_quoted(path)}," for path in paths), "    ):"]


def _policy(plan: Plan) -> str:
    precision = plan.precision
    read = "bfloat16" if precision.masters else precision.param_dtype
    given = {"param_dtype": read, "reduce_dtype": precision.reduce_dtype, "output_dtype": precision.output_dtype}
    return ", ".join(f"{name}=torch.{dtype}" for name, dtype in given.items() if dtype is not None)


def _tensor_styles(plan: Plan, facts: Facts) -> tuple[dict[str, str], list[str]]:
    """Module -> torch's style of tensor parallelism, by how its weight is stored; and the modules for which there is none."""
    styles: dict[str, str] = {}
    unsaid: list[str] = []
    positions = [plan.mesh.names.index(axis.name) for axis in facts.axes if axis.kind == "tensor" and axis.size > 1]
    tables = _find_tables(plan)
    for group in plan.groups:
        for op, name in group.tensors.items():
            states = {plan.layouts[op][position] for position in positions}
            split = [state for state in states if state.kind is StateKind.SHARD]
            if not split or not name.endswith(".weight"):
                continue
            path = name.removesuffix(".weight")
            paths = [path]
            if group.paths and path.startswith(f"{group.paths[0]}."):
                # The name of a group of some layers, layers.*[0-3], would be another pattern there.
                layers = group.paths if "[" in group.name else (group.name,)
                paths = [layer + path.removeprefix(group.paths[0]) for layer in layers]
            if op in tables:
                unsaid.append(f"{_few(paths)}: a table that is looked up, {format_layout(plan.layouts[op])}; choose its style by hand")
                continue
            if len(split) > 1 or split[0].outer > 1 or split[0].dim > 1:
                unsaid.append(f"{_few(paths)}: stored {format_layout(plan.layouts[op])}, for which there is no style")
                continue
            styles |= dict.fromkeys(paths, "ColwiseParallel" if split[0].dim == 0 else "RowwiseParallel")
    if styles:
        unsaid.append(
            "styles follow from how weights are stored as nn.Linear has them; modules that store weights transposed need the other one"
        )
    return styles, unsaid


def _find_tables(plan: Plan) -> set[str]:
    """The parameters, by op, that a call looks up: it reads them beside integers. A head that shares its weight with one counts as well."""
    integers = ("int64", "int32", "int16", "int8", "uint8")
    lookups = [reads for reads in plan.reads.values() if any(read.dtype in integers for read in reads)]
    return {read.value for reads in lookups for read in reads if read.value in plan.layouts and read.dtype not in integers}
