"""The README of an emitted package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from autopar.emit.support.described import Parameter
from autopar.ir import with_pipeline
from autopar.plans import Plan
from autopar.texts import printable

_PURPOSES = {
    "main.py": "what torchrun starts",
    "plan.json": "the plan, for `autopar explain`",
    "buffers.pt": "values of buffers, which a checkpoint may lack",
    "parallel/model.py": "the program, a function per layer or stage",
    "parallel/layout.py": "how each parameter, buffer and input is split; the schedule of a pipeline",
    "parallel/__init__.py": "puts both together",
    "parallel/support/described.py": "the types of the tables, and what the text of a layout means",
    "parallel/support/command.py": "the command line and the loop over steps",
    "parallel/support/ranks.py": "processes and process groups",
    "parallel/support/stored.py": "parts of parameters; checkpoints in and out",
    "parallel/support/whole.py": "a training step",
    "parallel/support/staged.py": "a training step of a pipeline",
    "parallel/support/updates.py": "the optimizer",
    "parallel/support/collectives.py": "collectives with gradients, which the program calls",
    "parallel/support/comm.py": "collectives without gradients, over process groups",
    "parallel/support/sums.py": "gradients summed in buckets, ZeRO",
    "parallel/support/executor.py": "runs a rank's list of the schedule",
}
"""What the files are that a reader begins with."""


def print_readme(plan: Plan, parameters: Sequence[Parameter], files: Collection[str]) -> str:
    """The text: how to run the package, what each file is, how parameters are stored."""
    mesh = with_pipeline(plan.mesh, plan.pipeline.ranks)
    lines = [
        f"# {printable(plan.model)} over {plan.world_size} ranks",
        "",
        f"Written by `autopar emit` from a plan for {printable(plan.cluster)}. It needs Python 3.11 and torch, nothing else.",
        "",
        "```sh",
        f"torchrun --standalone --nproc-per-node {plan.world_size} main.py --checkpoint original.pt --steps 100 --save trained.pt",
        "```",
        "",
        "- `--checkpoint`: `torch.save(model.state_dict(), ...)` of the original model, or a `.safetensors` file where that library is"
        " there. Without it, parameters are random (normal, 0.02), which isn't the original's initialisation.",
        "- `--data`: `torch.save` of a list of batches, each a dict of the model's inputs, of the whole batch. Without it, random ones.",
        "- `--save`: the trained parameters as a `state_dict` of the original. `--lr`, `--weight-decay`, `--seed`: see `--help`.",
        "",
        "Every process reads the same files, so put them where all machines see them. On several machines, give torchrun `--nnodes` and"
        " `--rdzv-endpoint` as usual; GPUs are used where there are any.",
        "",
        "## The plan",
        "",
        f"- ranks: {plan.world_size}, as {mesh}",
        f"- batch split over: {', '.join(plan.batch_axes) or 'nothing'}",
        f"- precision: {plan.precision}",
    ]
    pipeline = plan.pipeline
    if not pipeline.is_trivial:
        lines.append(
            f"- pipeline: {pipeline.ranks} ranks, {pipeline.stages} stages, {pipeline.microbatches} micro-batches, {pipeline.schedule}"
        )
    kinds = Counter(block.recompute for block in pipeline.blocks if block.recompute != "none")
    lines += [f"- run again in the backward: {count} blocks, {kind}" for kind, count in sorted(kinds.items())]
    if plan.loss_chunks > 1:
        lines.append(f"- logits computed in {plan.loss_chunks} parts")
    lines += ["", "## Files", "", "| file | what it is |", "| --- | --- |"]
    known = {*files, "buffers.pt"}
    lines += [f"| `{name}` | {text} |" for name, text in _PURPOSES.items() if name in known]
    rest = [name.rpartition("/")[2] for name in sorted(files) if name.startswith("parallel/support/") and name not in _PURPOSES]
    lines += [f"| `parallel/support/` | also {', '.join(f'`{name}`' for name in rest if name != '__init__.py')} |"]
    lines += [
        "",
        "The optimizer works elementwise on parts of parameters, so AdamW and its like give what one device would; one that needs whole"
        " matrices or norms over all parameters doesn't without more. Dropout draws other masks than one device.",
        "",
        "## Layout of the parameters",
        "",
        f"A state per axis of the mesh ({', '.join(plan.mesh.names)}), as `parallel/support/described.py` explains. Like names"
        " share a row.",
        "",
        "| parameter | shape | stored | gradient summed over | pipeline ranks |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *_layout_rows(parameters)]) + "\n"


def _layout_rows(parameters: Sequence[Parameter]) -> list[str]:
    """A row per kind of parameter: those whose names differ in numbers only, and that are stored alike."""
    groups: dict[tuple[str, ...], list[Parameter]] = {}
    for x in parameters:
        pattern = ".".join("*" if part.isdigit() else part for part in x.name.split("."))
        groups.setdefault((pattern, str(x.shape), x.dtype, x.layout, str(x.summed)), []).append(x)
    rows = []
    for (pattern, *_), members in groups.items():
        first = members[0]
        name = first.name if len(members) == 1 else f"{pattern} ({len(members)})"
        users = sorted({user for x in members for user in x.users})
        cells = [
            f"`{printable(name)}`",
            f"{' x '.join(map(str, first.shape))} {first.dtype}",
            f"`{first.layout}`",
            ", ".join(first.summed) or "-",
            ", ".join(map(str, users)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows
