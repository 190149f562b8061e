"""The command line's MODEL argument and its sizes, checked as far as that needs no torch, which takes seconds to import.

Comes in: ``hf:CONFIG``, ``package.module:function`` or ``file.py:function``, with a batch, a sequence length and a dtype. Goes out: a
`Source`, from which `autopar.cli.models` makes a model. What can't be used ends in an InputError that says what was found and what to write
instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.texts import read_text, show_value

DTYPES: Mapping[str, tuple[str, ...]] = {
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float32": ("fp32", "float"),
    "float64": ("fp64", "double"),
}
"""torch's name of a type that parameters may have -> short names of it."""

FORMS = "write hf:PATH (a transformers config.json or its folder), package.module:function or file.py:function"

# How a class name in a configuration's `architectures` ends -> the transformers class that builds it, and its inputs.
CAUSAL, MASKED, SEQ2SEQ, IMAGE = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
)
_BUILDERS: Mapping[str, str] = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForMaskedLM": MASKED,
    "ForConditionalGeneration": SEQ2SEQ,
    "ForImageClassification": IMAGE,
}

# Bytes of a configuration at most. Long ones name tens of thousands of classes.
_MOST_BYTES = 2**24
# Digits of a number at most: more than one of 64 bits has. The rest is cut off, so that any number is read quickly.
_DIGITS = 21
_LARGEST = 2**63 - 1
# transformers makes a list or a module of each of these, which for a number that is far too large takes hours.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "depths")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts")
_COUNTED = {"num_labels": 2**20} | dict.fromkeys((*_LAYERS, *_EXPERTS), 10_000)
# Sizes of example inputs.
_INPUT_SIZES = ("vocab_size", "num_labels", "num_channels", "image_size")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, and what the user asks of it.

    Attributes:
        file, config, builder: of a transformers configuration; None and empty otherwise.
        target, function: module or file, and the function in it; empty for a configuration.
        batch, seq: sizes of the example inputs, where given.
        dtype: torch's name of the parameters' type, where the user gives one.
        stated_dtype: the same of the configuration, where it states one that is known.
    """

    file: Path | None
    config: Mapping[str, Any]
    builder: str
    target: str
    function: str
    batch: int | None
    seq: int | None
    dtype: str | None
    stated_dtype: str | None


def read_source(spec: str, *, batch: int | None = None, seq: int | None = None, dtype: str | None = None) -> Source:
    """Check a MODEL argument and its sizes. Raises InputError for what names nothing usable."""
    for word, size in (("batch", batch), ("seq", seq)):
        if size is not None and not 1 <= size <= _LARGEST:
            raise InputError(f"{word}={show_value(size)}: a whole number from 1 of at most 64 bits is needed")
    chosen = None if dtype is None else find_dtype(dtype)
    if spec.startswith("hf:"):
        path = Path(spec[3:])
        file = path / "config.json" if os.path.isdir(path) else path
        config = _read_config(file)
        builder = _choose_builder(file, config.get("architectures"))
        if builder == IMAGE and seq is not None:
            raise InputError(f"seq={seq}: {file} is an image classifier, which has no sequence length; leave it out")
        stated = config.get("dtype", config.get("torch_dtype"))
        named = stated if isinstance(stated, str) and stated in DTYPES else None
        return Source(file, config, builder, "", "", batch, seq, chosen, named)
    target, colon, function = spec.rpartition(":")
    if not (colon and target and function):
        hint = f"; did you mean hf:{spec}?" if os.path.exists(spec) and not spec.endswith(".py") else ""
        raise InputError(f"model {spec!r} isn't understood: {FORMS}{hint}")
    if target.endswith(".py") and not os.path.isfile(target):
        raise InputError(f"{target} doesn't exist: {FORMS}")
    return Source(None, {}, "", target, function, batch, seq, chosen, None)


def find_dtype(name: str) -> str:
    """Torch's name of a type, from that or a short one. Raises InputError for any other."""
    for dtype, short_names in DTYPES.items():
        if name.removeprefix("torch.") in (dtype, *short_names):
            return dtype
    known = ", ".join(f"{dtype} ({', '.join(short_names)})" for dtype, short_names in DTYPES.items())
    raise InputError(f"dtype {name!r} isn't known: use one of {known}")


def _read_config(file: Path) -> dict[str, Any]:
    """Read a configuration file, whose sizes are such that transformers makes a model or says why not, in finite time."""
    try:
        text = read_text(file, _MOST_BYTES)
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise InputError(
                f"{file} doesn't exist: hf: takes a config.json on this computer or a folder that holds one; nothing is downloaded"
            ) from error
        raise InputError(f"{file} {error}") from error
    try:
        data = json.loads(text, parse_int=lambda digits: int(digits[:_DIGITS]))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} isn't JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{file} holds a JSON {type(data).__name__}, not an object: it isn't a transformers configuration")
    kind = data.get("model_type")
    if kind is None:
        raise InputError(f'{file} has no "model_type": it isn\'t a transformers configuration of a model')
    if not isinstance(kind, str):
        raise InputError(f'{file}: "model_type" is {show_value(kind)}, a text is needed, such as "llama"')
    if not isinstance(data.get("text_config", {}), dict):
        raise InputError(f'{file}: "text_config" is {show_value(data["text_config"])}, an object is needed')
    for name, number in _list_integers(data):
        if abs(number) > _LARGEST:
            raise InputError(f'{file}: "{name}" is larger than any number of 64 bits')
        if number > _COUNTED.get(name, number):
            raise InputError(f'{file}: "{name}" is {number}, more than {_COUNTED[name]}, the most that are planned for')
    for name in _INPUT_SIZES:
        if name in data:
            check_size(file, name, data[name], pair=name == "image_size")
    return data


def _list_integers(data: Any) -> Iterator[tuple[str, int]]:
    """(name of the field it stands in, integer) for every integer in JSON data, however deep."""
    pending: list[tuple[str, Any]] = [("", data)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += ((name, item) for item in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def check_size(file: Path, name: str, value: object, *, pair: bool = False) -> None:
    """Raise InputError unless a configuration's field is a size, an integer from 1; with `pair` a list of two is one too."""
    sizes = value if pair and isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
        needed = "an integer from 1, or a list of two of them," if pair else "an integer from 1"
        raise InputError(f'{file}: "{name}" is {show_value(value)}, {needed} is needed')


def _choose_builder(file: Path, architectures: object) -> str:
    """Name the transformers class for the first of a configuration's `architectures`; none at all means a causal model."""
    if not architectures:
        return CAUSAL
    name = architectures[0] if isinstance(architectures, list) else architectures
    for ending, builder in _BUILDERS.items():
        if isinstance(name, str) and name.endswith(ending):
            return builder
    raise InputError(
        f'{file}: "architectures" names {show_value(name)}; known are names that end in {", ".join(_BUILDERS)}. '
        "Load the model in a function of your own and give file.py:function"
    )
