"""A plan and a model as a Python package that trains with torch alone.

Comes in: the model, a plan that was made for it, and a folder. Goes out: the files of `write_package`::

    main.py               what torchrun starts
    README.md             how to run it, what is where
    plan.json             the plan
    buffers.pt            values of the model's buffers
    parallel/model.py     the program of every rank, or of every stage
    parallel/layout.py    how each parameter is stored; the schedule
    parallel/support/     collectives, kernels, the training loop

The program is that of `autopar.rewrite`, printed; the support modules are copies of this library's own (`autopar.emit.prune`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.capture import Captured, capture, split_call
from autopar.emit.guide import print_readme
from autopar.emit.printing import OPERATORS, Printer, in_docstring
from autopar.emit.prune import Definition, prune
from autopar.emit.support import assembled, command, staged, whole
from autopar.emit.tables import find_buffers, find_inputs, find_parameters, print_stages, print_tables
from autopar.errors import InputError
from autopar.plans import Plan, to_json
from autopar.rewrite import Program, rewrite

_DEVICE = torch.device("cpu")
"""Where programs make new tensors; printed as ``DEVICE``."""


def write_package(model: nn.Module, example_inputs: Any, plan: Plan, folder: Path) -> list[Path]:
    """Write the package into `folder`, which may exist; returns the files.

    Args:
        model: the model of the plan, on any device.
        example_inputs: the call that the plan was made for.
        plan: the plan.
        folder: where the package goes; made if it isn't there.

    Raises:
        PlanError: the plan is of another model, or of other inputs.
        InputError: the plan or the model has what such a package can't do yet, which the message names.
        CaptureError: the model can't be one graph.
    """
    captured = capture(model, example_inputs, precision=plan.precision)
    program = rewrite(captured, plan, _DEVICE)
    _check(program, captured, plan)
    texts = make_texts(model, example_inputs, plan, program, captured)
    tensors = _find_values(program, captured, model)
    written = []
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    torch.save(tensors, folder / "buffers.pt")
    return [*written, folder / "buffers.pt"]


def make_texts(model: nn.Module, example_inputs: Any, plan: Plan, program: Program, captured: Captured) -> dict[str, str]:
    """Path below the folder -> text, of all files but the one of tensors."""
    parameters, buffers = find_parameters(program, captured), find_buffers(program, model)
    examples = dict(zip(captured.inputs, captured.bind(*split_call(example_inputs)), strict=True))
    inputs = find_inputs(program, examples)
    printer = Printer({op.name: op.layer for op in captured.graph.ops})
    source = _print_model(program, printer)
    step = whole.WholeStep if program.pipeline is None else staged.StagedStep
    roots: set[Definition] = {(step.__module__, step.__name__), (command.__name__, "train"), ("autopar.emit.support.described", "Buffer")}
    if program.pipeline is not None:
        roots |= {(assembled.__name__, "StageMaker"), (assembled.__name__, "make_pipeline")}
    texts = {f"parallel/support/{name}": text for name, text in prune(roots | printer.definitions).items()}
    texts["parallel/support/__init__.py"] = (
        '"""What the program calls, and the training loop: copies of modules of autopar, of what is used here."""\n'
    )
    texts["parallel/model.py"] = source
    texts["parallel/layout.py"] = print_tables(program, plan, parameters, buffers, inputs, captured.aliases)
    texts["parallel/__init__.py"] = _print_init(program, plan, captured)
    texts["main.py"] = _print_main(step)
    texts["plan.json"] = to_json(plan)
    texts["README.md"] = print_readme(plan, parameters, texts)
    return dict(sorted(texts.items()))


def _check(program: Program, captured: Captured, plan: Plan) -> None:
    """Raise InputError for what an emitted package can't do, naming it."""
    pipeline = program.pipeline
    refused = []
    if captured.graph.loss is None:
        refused.append(
            "the model returns no loss (a single number that has a gradient): let forward take the labels too, compute the loss and"
            " return it, then plan again"
        )
    if pipeline is not None and (program.mutated_buffers or pipeline.written):
        names = ", ".join(sorted({*program.mutated_buffers, *pipeline.written})[:3])
        refused.append(
            f"buffers that a step changes ({names}) under a pipeline or micro-batches: plan with --pin pp=1 --pin microbatches=1"
        )
    float16 = any(tensor.dtype == "float16" for op in captured.graph.ops for tensor in op.results)
    if float16:
        refused.append("float16 (its gradients need a scaler): plan with --precision mixed, which computes in bfloat16")
    if refused:
        raise InputError("this can't be written as a package: " + "; ".join(refused))


def _find_values(program: Program, captured: Captured, model: nn.Module) -> dict[str, Tensor]:
    """The values of buffers and constants. Raises InputError for one without values."""
    own = dict(model.named_buffers(remove_duplicate=False))
    found = {}
    for slot in program.buffers:
        x = captured.constants.get(slot.name, own.get(slot.name))
        if x is None or x.is_meta:
            raise InputError(f"{slot.name} is a buffer on the meta device, without values: build the model on the CPU")
        found[slot.name] = x.detach().cpu().clone()
    return found


def _print_model(program: Program, printer: Printer) -> str:
    """The text of ``model.py``."""
    module, pipeline = program.module, program.pipeline
    if pipeline is None:
        assert isinstance(module, fx.GraphModule)
        tables = _tables(module, [x.name for x in program.parameters], [x.name for x in program.buffers])
        printer.print_program(
            module, "forward", tables, "What every rank computes; returns the model's outputs, then new values of buffers."
        )
    for number, stage in sorted(pipeline.stages.items()) if pipeline is not None else ():
        parameters = [program.parameters[position].name for position in stage.parameters]
        buffers = [program.buffers[position].name for position in stage.buffers]
        if stage.prologue is not None:
            assert isinstance(stage.prologue, fx.GraphModule)
            text = f"What stage {number} computes once per step of the whole batch."
            printer.print_program(stage.prologue, f"prologue_{number}", _tables(stage.prologue, [], buffers), text)
        assert isinstance(stage.module, fx.GraphModule)
        text = f"What the ranks of stage {number} compute for every micro-batch; returns what they send, then outputs of the model."
        printer.print_program(stage.module, f"stage_{number}", _tables(stage.module, parameters, buffers), text)
    functions = "\n\n".join(printer.functions.values())
    standard = [f"import {name}" for name in ("math", "operator") if f"{name}." in functions]
    lines = [
        '"""The program: the same for all ranks, on their parts of all tensors. Collectives name axes of the mesh.',
        "",
        "Parameters are `p`, buffers `b`, by the original model's names. Above calls stands the line of the original that they are from.",
        "Names are deleted after their last use, so that their memory is free.",
        '"""',
        "",
        "# ruff: noqa: E702",
        *([*standard, ""] if standard else []),
        "import torch",
        "",
    ]
    if printer.modules:
        lines.append(f"from .support import {', '.join(printer.modules)}")
    for name, defined in OPERATORS.items():
        if defined in printer.definitions:
            short = defined[0].rpartition(".")[2]
            lines.append(f"from .support import {short} as _{short}  # defines torch.ops.autopar.{name}")
    lines += ["", "aten = torch.ops.aten"]
    if "DEVICE" in functions:
        lines.append('DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")')
    return "\n".join([*lines, "", "", functions])


def _tables(module: fx.GraphModule, parameters: list[str], buffers: list[str]) -> dict[str, str]:
    """Placeholder -> how the program reads it, of parameters and then buffers; the others stay arguments."""
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    texts = [*(f"p[{json.dumps(name)}]" for name in parameters), *(f"b[{json.dumps(name)}]" for name in buffers)]
    return dict(zip(names, texts, strict=False))


def _print_init(program: Program, plan: Plan, captured: Captured) -> str:
    """The text of the package's ``__init__.py``, which puts the tables and the program together."""
    pipeline = program.pipeline
    lines = [f'"""{in_docstring(plan.model)} over {plan.world_size} ranks."""', "", "from . import layout, model"]
    if pipeline is not None:
        lines.append("from .support.assembled import StageMaker, make_pipeline")
    lines += ["from .support.described import Model", ""]
    if pipeline is not None:
        lines += ["make_stage = StageMaker(layout.PARAMETERS, layout.BUFFERS)", "STAGES = {", *print_stages(pipeline), "}"]
        lines += [
            "PIPELINE = make_pipeline(",
            f"    STAGES, layout.SCHEDULE, layout.RANK_OF_STAGE, layout.MICROBATCHES, {captured.graph.loss}, random={pipeline.random}",
            ")",
            "",
        ]
    lines += [
        "MODEL = Model(",
        "    mesh=layout.MESH,",
        "    pipeline_ranks=layout.PIPELINE_RANKS,",
        "    parameters=layout.PARAMETERS,",
        "    buffers=layout.BUFFERS,",
        "    inputs=layout.INPUTS,",
        "    aliases=layout.ALIASES,",
        f"    loss={captured.graph.loss},",
        f"    outputs={len(program.outputs)},",
        f"    mutated={program.mutated_buffers!r},",
        f"    forward={'model.forward' if pipeline is None else 'None'},",
        f"    pipeline={'None' if pipeline is None else 'PIPELINE'},",
        f"    regather={program.regather},",
        f"    prefetch={program.prefetch},",
        f"    bucket_nbytes={program.bucket_nbytes},",
        f"    masters={plan.precision.masters},",
        ")",
    ]
    return "\n".join(lines) + "\n"


def _print_main(step: type) -> str:
    """The text of ``main.py``."""
    module = step.__module__.rpartition(".")[2]
    return f'''"""Train the model on many devices: start it with torchrun, as README.md says; ``--help`` lists the options."""

from pathlib import Path

from parallel import MODEL
from parallel.support.command import train
from parallel.support.{module} import {step.__name__}

if __name__ == "__main__":
    train(MODEL, {step.__name__}, Path(__file__).parent / "buffers.pt")
'''
