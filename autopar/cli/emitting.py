"""``autopar emit``: a plan as a package that needs torch only, or as the nearest configuration of another system."""

from __future__ import annotations

from pathlib import Path

import click

from autopar.cli.requests import choose_dtype
from autopar.cli.sources import DTYPES, read_source
from autopar.cli.terminal import clean, show_progress, writing
from autopar.errors import InputError
from autopar.plans import Plan
from autopar.texts import check_writable, write_text

TARGETS = ("torchtitan", "megatron", "fsdp2")


@click.command(
    short_help="Write a package that trains with torch alone, or a configuration of another system.",
    help="""Write a plan as a Python package that trains with torch alone, in an environment without autopar.

    PLAN is a plan's file, MODEL the model that it was made for, as `autopar plan` took it. Where the plan names its model, MODEL
    can be left out, and unless given --batch, --seq and --dtype are those that it was asked for with. The package loads a
    checkpoint of the original model, trains under torchrun, and saves one. Its README says how.

    With --to, the nearest configuration of another system is printed, or written to the file after -o. It says line by line what
    that system can't express. MODEL isn't needed for that.

    \b
    Example:
      autopar emit plan.json examples/mlp.py:build -o out/
      autopar emit plan.json --to torchtitan -o run.toml
    """,
)
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Samples in the global batch.")
@click.option("--seq", type=click.IntRange(min=1), metavar="N", help="Tokens in a sequence.")
@click.option("--dtype", metavar="TYPE", help=f"Type of the parameters: {', '.join(DTYPES)}; bf16, fp32 and such too.")
@click.option("--to", "target", type=click.Choice(TARGETS), help="Another system, whose configuration is written instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The package's folder, which must be empty or new; with --to a file.")
def emit(
    plan_file: Path, model: str | None, batch: int | None, seq: int | None, dtype: str | None, target: str | None, output: Path | None
) -> None:
    """Run ``autopar emit``."""
    plan = Plan.load(plan_file)
    if target is not None:
        if needless := [name for name, value in (("MODEL", model), ("--batch", batch), ("--seq", seq), ("--dtype", dtype)) if value]:
            raise InputError(f"{needless[0]} has no say with --to, which translates the plan alone; leave it out")
        _write_configuration(plan, target, output)
        return
    request = plan.request
    if model in (None, request.model):
        model, batch, seq, dtype = request.model, batch or request.batch, seq or request.seq, dtype or request.dtype
    if not model or output is None:
        missing = "MODEL, which the plan was made for" if not model else "-o FOLDER, where the package goes"
        raise InputError(f"a package needs {missing}; or give --to {'|'.join(TARGETS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists already and isn't an empty folder: give another, or remove it")
    dtype = choose_dtype(model, dtype, plan.precision)
    source = read_source(model, batch=batch, seq=seq, dtype=dtype)
    with show_progress() as progress:
        progress("loading the model")
        import torch

        from autopar.cli.models import load_model
        from autopar.emit import write_package

        torch.manual_seed(0)  # the package says how large example inputs are: the same plan gives the same package

        is_config = source.file is not None
        options = {"batch": batch, "seq": seq, "dtype": dtype, "stored_dtype": plan.precision.stored_dtype}
        loaded = load_model(model, **options, device="cpu", weights=False) if is_config else load_model(model, **options)  # type: ignore[arg-type]
        progress("writing the package")
        try:
            files = write_package(loaded.model, loaded.example_inputs, plan, output)
        except OSError as error:
            raise InputError(f"{error.filename or output} can't be written: {error.strerror}") from error
    lines = sum(file.read_text(encoding="utf-8").count("\n") for file in files if file.suffix == ".py")
    click.echo(clean(f"{len(files)} files with {lines} lines of Python are in {output}; {output / 'README.md'} says how to run them:"))
    click.echo(clean(f"  torchrun --standalone --nproc-per-node {plan.world_size} {output / 'main.py'} --checkpoint original.pt"))


def _write_configuration(plan: Plan, target: str, output: Path | None) -> None:
    """Print the configuration, or write it to a file and print what it can't say."""
    from autopar.emit import elsewhere

    configuration = elsewhere.configure(plan, target)
    if output is None:
        click.echo(configuration.text, nl=False)
        return
    check_writable(output)
    for remark in configuration.remarks:
        click.echo(clean(f"not expressed: {remark}"))
    with writing(output):
        write_text(output, configuration.text)
