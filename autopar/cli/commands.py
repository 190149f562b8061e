"""The command line: arguments -> `autopar.api` or a saved plan -> text. Only this module prints and exits.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 no plan exists or a verification failed, 2 bad input.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autopar.cli.asking import add_question_options, answer_question, read_question
from autopar.cli.comparing import diff
from autopar.cli.drawing import draw
from autopar.cli.emitting import emit
from autopar.cli.requests import check_dtype, choose_dtype, keep_request, parse_cluster, pointing_to_example
from autopar.cli.sources import DTYPES, read_source
from autopar.cli.terminal import clean, make_console, show_progress
from autopar.cli.timing import timeline
from autopar.cost_models import Cluster, find_machine, known_machines
from autopar.errors import AutoparError, CommError, InfeasibleError, InputError, PlanError, SolverError, VerificationError
from autopar.ir import AS_MODEL, PRECISION_HELP, Precision, with_pipeline
from autopar.plans import Pins, Plan, check_devices, describe_pins, parse_mesh, reconcile, to_json
from autopar.texts import check_writable
from autopar.units import format_bytes, format_seconds

# torch takes seconds to import: commands import what needs it when they run, so that help and mistakes are answered at once.
if TYPE_CHECKING:
    from autopar.checks import Verification
    from autopar.cost_models import Machine

# Columns of help below its headings: click writes 80 at most.
_HELP_WIDTH = 74
_VERIFY_RANKS = 4
_VERIFY_TOLERANCE = 1e-9

_TRAINED_DTYPES = ("bfloat16", "float16", "float32")

_MODEL_HELP = """
    \b
    MODEL is one of
      hf:CONFIG                a transformers config.json or its folder; no weights needed
      package.module:function  a function that returns (model, example_inputs)
      file.py:function         the same, in a file
"""
_EXIT_HELP = "Exit codes: 0 done, 1 no plan exists or the verification failed, 2 bad input."


def _list_choices(title: str, choices: Sequence[tuple[str, str]]) -> str:
    """Choices with their meanings, a column of each, for the text of a command's help."""
    width = max(len(form) for form, _ in choices) + 2
    lines: list[str] = []
    for form, meaning in choices:
        first, *rest = textwrap.wrap(meaning, _HELP_WIDTH - width, break_on_hyphens=False)
        lines += [f"      {form:{width}}{first}", *(f"      {'':{width}}{line}" for line in rest)]
    return "\n".join(["", "    \b", f"    {title}:", *lines, ""])


_PIN_HELP = _list_choices("Pins fix a choice and leave the rest to the search", describe_pins())
_PRECISION_HELP = _list_choices("Precisions say in which dtypes a model is stored, computed and updated", PRECISION_HELP)


class _Commands(click.Group):
    """Turns every error that autopar raises on purpose into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AutoparError as error:
            failed = (InfeasibleError, SolverError, VerificationError, CommError)
            click.echo(f"error: {clean(error)}", err=True)
            ctx.exit(1 if isinstance(error, failed) else 2)


@click.group(
    cls=_Commands,
    epilog=_EXIT_HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Plan, explain and check how a PyTorch model is split over many devices.

    Planning runs anywhere: it needs no accelerator, no weights and no process group.

    \b
    Example:
      autopar plan hf:examples/configs/llama-3-8b --cluster 8xH100 -o plan.json
      autopar explain plan.json
    """,
)
@click.version_option(package_name="autopar", prog_name="autopar")
def main() -> None:
    """Run ``autopar``; the commands below do the work."""


for _command in (diff, draw, timeline, emit):
    main.add_command(_command)


def _add_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the MODEL argument and what sizes it."""
    for add in (
        click.option("--dtype", metavar="TYPE", help=f"Type of the parameters: {', '.join(DTYPES)}; bf16, fp32 and such too."),
        click.option("--seq", type=int, metavar="N", help="Tokens in a sequence."),
        click.option("--batch", type=int, metavar="N", help="Samples in the global batch."),
        click.argument("model"),
    ):
        command = add(command)
    return command


def _add_precision_option(command: Callable[..., None]) -> Callable[..., None]:
    names = ", ".join(name for name, _ in PRECISION_HELP)
    text = f"In which dtypes to train: {names}, or fields such as param_dtype=bfloat16,reduce_dtype=float32. Listed above."
    return click.option("--precision", metavar="NAME", help=text)(command)


def _add_pin_option(command: Callable[..., None]) -> Callable[..., None]:
    text = "Fix a choice, such as tp=2, of those listed above. Repeatable."
    return click.option("--pin", "pins", multiple=True, metavar="NAME=VALUE", help=text)(command)


@main.command(
    help=f"""Search for the fastest way to split MODEL over a cluster.
{_MODEL_HELP}{_PIN_HELP}{_PRECISION_HELP}
    \b
    Example:
      autopar plan hf:examples/configs/llama-3-8b --cluster 8xH100 --batch 8 --seq 2048 --pin tp=2 -o plan.json
      autopar plan hf:examples/configs/llama-3-8b --cluster 8xH100 --batch 8 --seq 2048 --precision mixed
      autopar plan hf:examples/configs/llama-3-70b --cluster 4x8xH100 --batch 64 --seq 4096 --pin pp=4 --pin schedule=1f1b
    """
)
@_add_model_options
@click.option("--cluster", required=True, metavar="TEXT", help="The devices: 8xH100, 4x8xH100 (nodes x devices), 8x./my.toml.")
@click.option("--memory", metavar="SIZE", help="Memory of a device instead of the machine's own, such as 80GB or 512MiB.")
@_add_precision_option
@_add_pin_option
@click.option("--mesh", metavar="AXES", help="Solve this mesh only, such as dp=4,tp=2 or pp=2,tp=4.")
@click.option("--strict", is_flag=True, help="Make an op without a rule an error instead of running it replicated.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan to this file (JSON).")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON instead of a summary.")
def plan(
    model: str,
    batch: int | None,
    seq: int | None,
    dtype: str | None,
    cluster: str,
    memory: str | None,
    precision: str | None,
    pins: Sequence[str],
    mesh: str | None,
    strict: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run ``autopar plan``."""
    parsed_pins = Pins.parse_texts(pins)
    parsed_mesh = None if mesh is None else parse_mesh(mesh)
    policy = Precision.parse(precision)
    devices = parse_cluster(cluster, memory)
    # Told before torch is imported and anything is searched.
    check_devices(*reconcile(parsed_pins, parsed_mesh), devices)
    if output is not None:
        check_writable(output)
    stored = choose_dtype(model, dtype, policy)
    check_dtype(read_source(model, batch=batch, seq=seq, dtype=stored), policy, devices)
    start = time.perf_counter()
    with show_progress() as progress, pointing_to_example(model):
        progress("loading the model")
        from autopar import api
        from autopar.cli.models import load_model
        from autopar.report import summarize

        loaded = load_model(model, batch=batch, seq=seq, dtype=stored, stored_dtype=policy.stored_dtype)
        result = api.plan(
            loaded.model,
            loaded.example_inputs,
            devices,
            precision=policy,
            pins=parsed_pins,
            mesh=parsed_mesh,
            strict=strict,
            progress=progress,
        )
    result = keep_request(result, model, batch=batch, seq=seq, dtype=dtype, cluster=cluster, memory=memory)
    notes = "" if as_json else "".join(f"\nnote    {note}" for note in result.notes)
    click.echo(to_json(result) if as_json else summarize(result) + notes)
    # Not in the plan or on stdout, which are the same for every run.
    click.echo(f"planned in {format_seconds(time.perf_counter() - start)}", err=True)
    if output is not None:
        try:
            result.save(output)
        except OSError as error:  # its place was fine before the search
            if not as_json:
                click.echo(to_json(result))
            raise InputError(f"{output} can't be written: {error.strerror}; the plan's text is printed instead") from error
        click.echo(clean(f"written to {output}; `autopar explain {output}` shows all of it"), err=True)


@main.command(
    help="""Show what a plan decided, what it costs, and the proof.

    \b
    Example:
      autopar explain plan.json
      autopar explain plan.json --layer "model.layers.0.mlp"
      autopar explain plan.json --ops
      autopar explain plan.json --why-not "tp=4,pp=2"
      autopar explain plan.json --what-if "batch=1024"
      autopar explain plan.json --frontier memory -o frontier.svg
    """
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--layer", metavar="PATH", help="Only these layers, with their ops and tensors: a module path or pattern.")
@click.option("--ops", is_flag=True, help="What every op costs, in tables that add up to the step.")
@click.option("--all", "everything", is_flag=True, help="Every table but those of ops, and every candidate.")
@add_question_options
@click.option("--json", "as_json", is_flag=True, help="Print data for programs: seconds and bytes, no units.")
def explain(file: Path, layer: str | None, ops: bool, everything: bool, as_json: bool, **asked: Any) -> None:
    """Run ``autopar explain``."""
    from autopar import report

    shown = {"--layer": layer is not None, "--ops": ops, "--all": everything}
    question = read_question(**asked, as_json=as_json, others=[name for name, is_given in shown.items() if is_given])
    saved = Plan.load(file)
    if question is not None:
        answer_question(file, saved, question)
    elif as_json:
        click.echo(json.dumps(report.to_data(saved, layer=layer), indent=1))
    else:
        report.explain(saved, make_console(sys.stdout), layer=layer, ops=ops, everything=everything)


@main.command(
    short_help="Check a split run against the original, every gradient too.",
    help=f"""Run MODEL split, all ranks in one process, against the original: the outputs and every gradient.

    The plan comes from --plan, or is searched for --ranks devices. Weights are random and arithmetic is float64, so choose
    sizes that this computer can run.
{_MODEL_HELP}{_PIN_HELP}
    \b
    Example:
      autopar verify examples/mlp.py:build --ranks 4 --pin tp=2
      autopar verify examples/mlp.py:build --ranks 4 --pin pp=2 --pin microbatches=4
    """,
)
@_add_model_options
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help=f"Number of ranks; {_VERIFY_RANKS} without a plan.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Check this plan instead of searching for one.")
@_add_precision_option
@_add_pin_option
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=_VERIFY_TOLERANCE,
    show_default=True,
    help="Largest relative error that passes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print data for programs.")
def verify(
    model: str,
    batch: int | None,
    seq: int | None,
    dtype: str | None,
    ranks: int | None,
    plan_file: Path | None,
    precision: str | None,
    pins: Sequence[str],
    tolerance: float,
    as_json: bool,
) -> None:
    """Run ``autopar verify``."""
    parsed_pins = Pins.parse_texts(pins)
    policy = None if precision is None else Precision.parse(precision)
    saved = None if plan_file is None else _load_checked_plan(plan_file, ranks, parsed_pins)
    if saved is not None and policy is not None and policy != saved.precision:
        raise InputError(f"the plan of {plan_file} is for --precision {saved.precision}, not {policy}: leave one of the two out")
    if saved is None:
        check_devices(parsed_pins, None, Cluster.parse(f"{ranks or _VERIFY_RANKS}xcpu"))
    trained = policy or (saved.precision if saved is not None else AS_MODEL)
    dtype = choose_dtype(model, dtype, trained)
    read_source(model, batch=batch, seq=seq, dtype=dtype)
    with show_progress() as progress, pointing_to_example(model):
        progress("loading the model")
        from autopar import api
        from autopar.cli.models import load_model

        loaded = load_model(model, batch=batch, seq=seq, dtype=dtype, stored_dtype=trained.stored_dtype, device="cpu")
        progress("running all ranks")
        verification = api.verify(
            loaded.model,
            loaded.example_inputs,
            saved,
            precision=policy if saved is None else None,
            pins=parsed_pins,
            ranks=None if saved is not None else ranks or _VERIFY_RANKS,
            tolerance=tolerance,
        )
    click.echo(json.dumps(_data_of_verification(verification), indent=1) if as_json else _word_verification(verification))
    verification.check()


@main.command(
    short_help="List the known machines and the sources of their numbers.",
    help="""List the known machines, their main numbers, and where those are from.

    \b
    Example:
      autopar machines
      autopar machines --json
    """,
)
@click.option("--json", "as_json", is_flag=True, help="Print data for programs: every number of every machine.")
def machines(as_json: bool) -> None:
    """Run ``autopar machines``."""
    from dataclasses import asdict

    known = [find_machine(name) for name in known_machines()]
    if as_json:
        click.echo(json.dumps([asdict(machine) for machine in known], indent=1))
    else:
        _print_machines(known, make_console(sys.stdout))


def _load_checked_plan(file: Path, ranks: int | None, pins: Pins) -> Plan:
    """Load a plan; what would contradict it is refused, not ignored."""
    if pins:
        raise InputError("--pin has no say over a plan that is made already; leave out --pin or --plan")
    saved = Plan.load(file)
    if ranks not in (None, saved.world_size):
        mesh = with_pipeline(saved.mesh, saved.pipeline.ranks)
        raise PlanError(f"{file} is a plan for {saved.world_size} ranks ({mesh}), --ranks says {ranks}; leave it out")
    return saved


def _word_verification(verification: Verification) -> str:
    """Say what was compared, how far it was off, and what the plan splits."""
    from autopar.report import describe_pipeline

    plan = verification.plan
    mesh = with_pipeline(plan.mesh, plan.pipeline.ranks)
    splits = ", ".join(f"{name} x{count}" for name, count in verification.splits.items())
    nothing = "none, every pipeline rank runs its stages whole" if plan.pipeline.ranks > 1 else "none, everything is replicated"
    stages = describe_pipeline(plan)
    return "\n".join(
        [
            f"{'ok' if verification.ok else 'FAILED'}: {len(verification.errors)} outputs and gradients compared,"
            f" {plan.world_size} ranks ({mesh})",
            f"largest relative error {max(verification.errors.values(), default=math.nan):.2e}, tolerance {verification.tolerance:g}",
            f"captured graph against the model: relative error {verification.capture_error:.2e}, {verification.rounding:.2g} accepted",
            f"splits: {splits or nothing}",
            *([f"{'stages' if plan.pipeline.stages > 1 else 'batch'}: {stages}"] if stages else []),
            *(f"note: {remark}" for remark in verification.remarks),
        ]
    )


def _data_of_verification(verification: Verification) -> dict[str, Any]:
    plan = verification.plan
    return {
        "ok": verification.ok,
        "tolerance": verification.tolerance,
        # JSON has no word for NaN and infinity.
        "errors": {name: error if math.isfinite(error) else None for name, error in verification.errors.items()},
        "capture_error": verification.capture_error,
        "rounding": verification.rounding,
        "splits": dict(verification.splits),
        "remarks": list(verification.remarks),
        "world_size": plan.world_size,
        "mesh": dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)),
        "pipeline": {name: getattr(plan.pipeline, name) for name in ("ranks", "schedule", "chunks", "microbatches")},
    }


def _print_machines(machines: Sequence[Machine], console: Console) -> None:
    """Print the machines as a table, then the sources of each."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("machine", "devices per node", "memory", "matmul peak", "memory rate", "link inside a node", "between nodes"):
        table.add_column(name, justify="left" if name == "machine" else "right")
    for machine in machines:
        device = machine.device
        # Not float8, though faster: plans are made for these.
        dtype = max((dtype for dtype in _TRAINED_DTYPES if dtype in device.peak_flops), key=lambda dtype: device.peak_flops[dtype])
        table.add_row(
            Text(machine.name),
            str(machine.devices_per_node),
            format_bytes(device.memory_bytes),
            f"{device.peak_flops[dtype] / 1e12:.3g} TFLOP/s {dtype}",
            f"{format_bytes(device.mem_bandwidth_bytes_per_s)}/s",
            *(
                f"{format_bytes(link.bandwidth_bytes_per_s)}/s, {format_seconds(link.latency_seconds)}"
                for link in (machine.intra, machine.inter)
            ),
        )
    console.print(table)
    for machine in machines:
        console.print(Text("\n".join(["", machine.name, *(f"  {source}" for source in machine.sources)])), soft_wrap=True)
