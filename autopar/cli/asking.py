"""Questions of ``autopar explain``: options to calls of `autopar.counterfactuals`, answers to text, data and files.

Comes in: a plan and one question. Goes out: the answer on stdout, progress on stderr, and the other plan or a picture in a file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autopar.cli.requests import choose_dtype, pointing_to_example
from autopar.cli.sources import find_dtype, read_source
from autopar.cli.terminal import clean, show_progress, writing
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir import Precision, Tensor
from autopar.plans import Pins, Plan, Request, check_devices, reconcile
from autopar.texts import check_writable, write_text
from autopar.units import format_seconds, parse_bytes

if TYPE_CHECKING:
    from autopar.cli.models import LoadedModel
    from autopar.report import Answer, Frontier

CHANGES = ("batch", "seq", "dtype", "cluster", "memory", "precision")
"""What ``--what-if`` can change; the names are those of the options of ``autopar plan``."""

_FRONTIERS = ("memory",)


@dataclass(frozen=True, slots=True)
class Question:
    """One question to a plan, as the options give it; of the first three texts one is there, and may be empty."""

    why_not: str | None
    what_if: str | None
    frontier: str | None
    model: str
    output: Path | None
    as_json: bool


def add_question_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that ask something of a plan, whose values `read_question` takes."""
    for add in (
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the other plan (JSON), or a picture (.svg)."),
        click.option("--model", metavar="MODEL", help="The model, where the plan doesn't name it or its path has changed."),
        click.option("--frontier", type=click.Choice(_FRONTIERS), help="How the step grows as a device has less memory."),
        click.option("--what-if", metavar="NAME=VALUE,...", help=f"Plan again with this changed: {', '.join(CHANGES)}."),
        click.option("--why-not", metavar="PINS", help="Plan again with these pins, such as tp=4,pp=2, beside those asked for."),
    ):
        command = add(command)
    return command


def read_question(
    why_not: str | None,
    what_if: str | None,
    frontier: str | None,
    model: str | None,
    output: Path | None,
    *,
    as_json: bool,
    others: Sequence[str],
) -> Question | None:
    """The question that the options of ``autopar explain`` ask; None where they ask nothing.

    Raises InputError for several, and for a question beside `others`, options that choose what is shown of the plan.
    """
    texts = {"--why-not": why_not, "--what-if": what_if, "--frontier": frontier}
    asked = [name for name, text in texts.items() if text is not None]
    if not asked:
        if model is not None or output is not None:
            option = "--model" if model is not None else "-o"
            raise InputError(f"{option} is for a question: give --why-not, --what-if or --frontier, or leave it out")
        return None
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are {len(asked)} questions; ask one, write its plan with -o, and ask that plan the next")
    if others:
        raise InputError(f"{asked[0]} is about the whole plan; leave out {' and '.join(others)}")
    if output is not None:
        if frontier is not None and output.suffix.lower() not in (".svg", ".json"):
            raise InputError(f"{output}: name a file that ends in .svg for the picture of the frontier, in .json for its fastest plan")
        check_writable(output)
    return Question(why_not, what_if, frontier, model or "", output, as_json)


def answer_question(file: Path, plan: Plan, question: Question) -> None:
    """Answer a question to the plan of `file`: print the answer, and write what was asked for.

    Raises InputError and its like for what can't be asked, before torch is imported where that is known by then. Where nothing fits, the
    answer says what is needed, and the command ends with the exit code of that.
    """
    start = time.perf_counter()
    request = _name_model(file, plan, question.model)
    if question.why_not is not None:
        result: Answer | Frontier = _ask_why_not(plan, request, Pins.parse_texts(split_choices(question.why_not)))
    elif question.what_if is not None:
        result = _ask_what_if(plan, request, question.what_if)
    else:
        result = _draw_frontier(plan, request)
    click.echo(json.dumps(result.to_data(), indent=1) if question.as_json else clean_lines(f"{result}"))
    click.echo(f"answered in {format_seconds(time.perf_counter() - start)}", err=True)
    if question.output is not None:
        _write(question.output, result)
    if getattr(result, "other", plan) is None:
        click.get_current_context().exit(1)


def split_choices(text: str) -> list[str]:
    """The parts of ``tp=8,layers.3=pp:1,tp:o,pp=4``: what follows a comma without a name of its own belongs to the part before it.

    >>> split_choices("tp=8, layers.3=pp:1,tp:o, pp=4")
    ['tp=8', 'layers.3=pp:1,tp:o', 'pp=4']
    """
    parts: list[str] = []
    for piece in text.split(","):
        if parts and "=" not in piece:
            parts[-1] = f"{parts[-1]},{piece.strip()}"
        else:
            parts.append(piece.strip())
    return parts


def read_changes(text: str) -> dict[str, str]:
    """What ``batch=1024,cluster=8x8xH200`` changes, by name. Raises InputError for other names, and for one that is there twice."""
    changes: dict[str, str] = {}
    for part in split_choices(text):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in CHANGES and "precision" in changes:
            # A precision may be given by its fields, param_dtype=bfloat16,reduce_dtype=float32.
            changes["precision"] += f",{part}"
            continue
        if name not in CHANGES or not value:
            raise InputError(f"{part!r} changes nothing that is known; write NAME=VALUE, where NAME is one of {', '.join(CHANGES)}")
        if name in changes:
            raise InputError(f"{name} is changed twice; give it once")
        changes[name] = value
    return changes


def _name_model(file: Path, plan: Plan, model: str) -> Request:
    """The plan's request with the model that is to be loaded. Raises InputError when nobody names one."""
    request = plan.request
    if model:
        sizes = _read_sizes(plan) if model.startswith("hf:") and not request.model else {}
        return replace(request, model=model, **sizes)
    if not request.model:
        raise InputError(
            f"{file} doesn't name its model, since it was planned in Python:"
            " give --model hf:CONFIG, package.module:function or file.py:function"
        )
    return request


def _read_sizes(plan: Plan) -> dict[str, Any]:
    """Batch and sequence length of a plan that was made in Python, where its inputs are those that an ``hf:`` model gets."""
    for name, words in (("input_ids", ("batch", "seq")), ("pixel_values", ("batch",))):
        if name in plan.inputs:
            return dict(zip(words, Tensor.parse(plan.inputs[name]).shape, strict=False))
    return {}


def _check_devices(plan: Plan, request: Request) -> None:
    """Refuse pins that contradict the mesh or the cluster. Raises InputError."""
    check_devices(*reconcile(request.pins, request.mesh_sizes), Cluster.parse(request.cluster or plan.cluster))


def _load(request: Request, precision: Precision) -> LoadedModel:
    """The model and the batch that a request names."""
    from autopar.cli.models import load_model

    dtype = choose_dtype(request.model, request.dtype, precision)
    return load_model(request.model, batch=request.batch, seq=request.seq, dtype=dtype, stored_dtype=precision.stored_dtype)


def _check_source(request: Request, precision: Precision) -> None:
    """Refuse a model that can't be found, or sizes that it can't have, before torch is imported. Raises InputError."""
    read_source(request.model, batch=request.batch, seq=request.seq, dtype=choose_dtype(request.model, request.dtype, precision))


def _ask_why_not(plan: Plan, request: Request, pins: Pins) -> Answer:
    # What contradicts the pins asked for, the cluster or the model is told at once.
    _check_devices(plan, request.override(pins))
    _check_source(request, plan.precision)
    with show_progress() as progress, pointing_to_example(request.model):
        progress("loading the model")
        from autopar import counterfactuals

        loaded = _load(request, plan.precision)
        asked = replace(plan, request=request)
        return counterfactuals.why_not(asked, loaded.model, loaded.example_inputs, pins, progress=progress)


def _ask_what_if(plan: Plan, request: Request, text: str) -> Answer:
    changes = read_changes(text)
    changed, precision = _change(request, changes), plan.precision
    if "precision" in changes:
        precision = Precision.parse(changes["precision"])
    if "cluster" in changes:
        changed = replace(changed, cluster=changes["cluster"])
    _check_devices(plan, changed)
    memory = parse_bytes(changes["memory"]) if "memory" in changes else None
    _check_source(changed, precision)
    with show_progress() as progress, pointing_to_example(request.model):
        progress("loading the model")
        from autopar import counterfactuals

        if changes.keys() - {"cluster", "memory"}:
            # That it is still the plan's model shows only in what the plan was made for.
            original = _load(request, plan.precision)
            counterfactuals.check_model(plan, original.model, original.example_inputs, progress=progress)
        loaded = _load(changed, precision)
        return counterfactuals.what_if(
            replace(plan, request=request),
            loaded.model,
            loaded.example_inputs,
            cluster=changes.get("cluster"),
            memory=memory,
            precision=precision,
            request=changed,
            question=", ".join(f"{name}={value}" for name, value in changes.items()),
            progress=progress,
        )


def _change(request: Request, changes: Mapping[str, str]) -> Request:
    """The request with other sizes of the batch and another type of the parameters. Raises InputError for what is none."""
    sizes: dict[str, Any] = {}
    for name in ("batch", "seq"):
        if name in changes:
            if not (changes[name].isascii() and changes[name].isdigit() and 0 < len(changes[name]) <= 18 and int(changes[name])):
                raise InputError(f"{name}={changes[name]}: a whole number from 1 is needed")
            sizes[name] = int(changes[name])
    if "dtype" in changes:
        sizes["dtype"] = find_dtype(changes["dtype"])
    return replace(request, **sizes)


def _draw_frontier(plan: Plan, request: Request) -> Frontier:
    _check_source(request, plan.precision)
    with show_progress() as progress, pointing_to_example(request.model):
        progress("loading the model")
        from autopar import counterfactuals

        loaded = _load(request, plan.precision)
        asked = replace(plan, request=request)
        return counterfactuals.memory_frontier(asked, loaded.model, loaded.example_inputs, progress=progress)


def clean_lines(text: str) -> str:
    """Text of any length, whose lines hold no characters that direct a terminal."""
    return "\n".join(map(clean, text.split("\n")))


def _write(path: Path, result: Answer | Frontier) -> None:
    """Write the picture of a frontier or the other plan of an answer; say on stderr what was written, or why nothing was."""
    from autopar.report import Answer, Frontier

    if isinstance(result, Answer) and result.other is None:
        click.echo(clean(f"nothing is written to {path}: there is no plan"), err=True)
        return
    with writing(path):
        if isinstance(result, Frontier):
            if path.suffix.lower() == ".svg":
                write_text(path, result.to_svg())
            else:
                result.fastest.save(path)
        elif result.other is not None:
            result.other.save(path)
