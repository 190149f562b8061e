"""The tables of an emitted package: parameters, buffers, inputs, stages and the schedule as Python literals.

Comes in: a `Program` and what was captured. Goes out: the text of ``layout.py``, whose types are those of `autopar.emit.support.described`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from autopar.capture import Captured
from autopar.emit.support.described import Buffer, Input, Parameter
from autopar.errors import InputError
from autopar.ir import OpKind, format_layout
from autopar.plans import Plan
from autopar.rewrite import PipelineProgram, Program
from autopar.schedules import Schedule

_WIDTH = 120


def find_parameters(program: Program, captured: Captured) -> tuple[Parameter, ...]:
    """How every parameter is stored."""
    rows = []
    for slot, op in zip(program.parameters, captured.graph.of_kind(OpKind.PARAMETER), strict=True):
        (tensor,) = op.results
        stored = tensor.stored_dtype
        rows.append(
            Parameter(
                slot.name,
                slot.shape,
                stored,
                format_layout(slot.stored_layout),
                slot.partial_axes,
                "" if slot.dtype == stored else slot.dtype,
                slot.reduced_dtype or "",
                slot.requires_grad,
                slot.users,
            )
        )
    return tuple(rows)


def find_buffers(program: Program, model: nn.Module) -> tuple[Buffer, ...]:
    """The buffers and constants that programs read."""
    saved = set(model.state_dict(keep_vars=True))
    updated = {*program.mutated_buffers, *(program.pipeline.written if program.pipeline is not None else ())}
    return tuple(
        Buffer(
            slot.name,
            slot.shape,
            slot.dtype,
            format_layout(slot.layout),
            slot.name in saved and slot.name not in program.constants,
            slot.name in updated,
        )
        for slot in program.buffers
    )


def find_inputs(program: Program, examples: Mapping[str, Tensor]) -> tuple[Input, ...]:
    """The inputs, with the range of the example's integers; one that has no values (on the meta device) counts as 0 to 1."""
    rows = []
    for slot in program.inputs:
        x = examples.get(slot.name)
        least, most = 0, 1
        if x is not None and not x.is_meta and x.numel() and not x.is_floating_point() and not x.is_complex():
            least, most = int(x.min()), int(x.max())
        if getattr(torch, slot.dtype).is_complex:
            raise InputError(f"input {slot.name} is {slot.dtype}: emitted packages take real numbers only")
        rows.append(Input(slot.name, slot.shape, slot.dtype, format_layout(slot.layout), least, most))
    return tuple(rows)


def print_tables(
    program: Program,
    plan: Plan,
    parameters: Sequence[Parameter],
    buffers: Sequence[Buffer],
    inputs: Sequence[Input],
    aliases: Mapping[str, str],
) -> str:
    """The text of ``layout.py``."""
    mesh = program.mesh
    kinds = ["Parameter", *(["Buffer"] if buffers else []), *(["Input"] if inputs else [])]
    lines = [
        '"""Where every tensor of the model is: written from plan.json, read by the training loop.',
        "",
        "The types, and the text of layouts, are explained in support/described.py.",
        '"""',
        "",
        f"from .support.described import {', '.join(sorted(kinds))}",
        "from .support.layout import Mesh",
    ]
    lines += ["", f"MESH = Mesh({_text(mesh.names)}, {_text(mesh.sizes)})", f"PIPELINE_RANKS = {plan.pipeline.ranks}", ""]
    lines += _rows("PARAMETERS", map(_parameter, parameters))
    lines += _rows("BUFFERS", (_call("Buffer", x, ("saved", "updated")) for x in buffers))
    lines += _rows("INPUTS", (_call("Input", x, ("least", "most")) for x in inputs))
    lines += ["# Other name of a tied parameter -> the one above.", f"ALIASES = {json.dumps(dict(aliases), indent=4)}", ""]
    if program.pipeline is not None:
        lines += _schedule(program.pipeline.schedule)
    return "\n".join(lines).rstrip() + "\n"


def _rows(name: str, rows: Iterable[str]) -> list[str]:
    return [f"{name} = (", *(f"    {row}," for row in rows), ")", ""]


def _parameter(x: Parameter) -> str:
    defaults = {"summed": (), "read": "", "reduced": "", "trained": True, "users": (0,)}
    more = "".join(f", {name}={_text(getattr(x, name))}" for name, value in defaults.items() if getattr(x, name) != value)
    return f"Parameter({_text(x.name)}, {x.shape!r}, {_text(x.dtype)}, {_text(x.layout)}{more})"


def _call(kind: str, x: Buffer | Input, options: Sequence[str]) -> str:
    more = "".join(f", {name}={_text(getattr(x, name))}" for name in options)
    return f"{kind}({_text(x.name)}, {x.shape!r}, {_text(x.dtype)}, {_text(x.layout)}{more})"


def _text(x: object) -> str:
    if isinstance(x, str):
        return json.dumps(x)
    if isinstance(x, tuple):
        return f"({', '.join(map(_text, x))}{',' if len(x) == 1 else ''})"
    return repr(x)


def _schedule(schedule: Schedule) -> list[str]:
    """The schedule as text: a list of actions per pipeline rank."""
    lines = ["# What every pipeline rank does in a step, in order: stage, action, micro-batch, and the other end of a message."]
    lines += ["# F forward, B backward, I and W its two halves, SF RF SB RB send and receive values and gradients, G sums gradients."]
    lines += [f"MICROBATCHES = {schedule.microbatches}", f"RANK_OF_STAGE = {schedule.rank_of!r}", "SCHEDULE = ("]
    for actions in schedule.actions:
        lines.append("    (")
        row = ""
        for action in map(str, actions):
            if len(row) + len(action) > _WIDTH - 20:
                lines.append(f'        "{row}"')
                row = ""
            row += f"{action} "
        lines += [f'        "{row.rstrip()}"', "    ),"]
    return [*lines, ")", ""]


def print_stages(pipeline: PipelineProgram) -> list[str]:
    """The stages as calls of ``make_stage``, which ``__init__.py`` makes of the functions and the tables."""
    lines = []
    for number, stage in sorted(pipeline.stages.items()):
        receives = {peer: tuple(map(_crossing, crossing)) for peer, crossing in sorted(stage.receives.items())}
        sends = {peer: tuple((index, _crossing(x)) for index, x in sent) for peer, sent in sorted(stage.sends.items())}
        outputs = tuple((out.position, out.result, str(out.state)) for out in stage.outputs)
        prologue = f"model.prologue_{number}" if stage.prologue is not None else "None"
        lines += [
            f"    {number}: make_stage(",
            f"        model.stage_{number},",
            f"        {prologue},",
            f"        parameters={_numbers(stage.parameters)},",
            f"        buffers={_numbers(stage.buffers)},",
            f"        receives={receives!r},",
            f"        sends={sends!r},",
            f"        outputs={outputs!r},",
            "    ),",
        ]
    return lines


def _numbers(positions: Sequence[int]) -> str:
    """Positions as text, a run of them as a range."""
    if positions and list(positions) == list(range(positions[0], positions[0] + len(positions))) and len(positions) > 2:
        return f"range({positions[0]}, {positions[-1] + 1})"
    return repr(tuple(positions))


def _crossing(x: object) -> tuple[str, tuple[int, ...], str, bool]:
    name, shape, dtype, gradient = (getattr(x, field) for field in ("name", "shape", "dtype", "requires_grad"))
    return name, shape, str(dtype).removeprefix("torch."), gradient
