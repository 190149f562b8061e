"""The command line's MODEL argument -> a model and example inputs.

Comes in: ``hf:CONFIG`` (a transformers ``config.json`` or a folder that holds one; weights are never needed),
``package.module:function`` or ``file.py:function``. Goes out: a `LoadedModel` for ``capture``. Every spec that can't be
used ends in an `InputError` that says what was found and what to write instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autopar.cli.sources import FORMS, IMAGE, Source, check_size, read_source
from autopar.errors import InputError
from autopar.replaced import replaced
from autopar.texts import word_exception

# Batch and sequence of ``hf:`` models when the user names none: enough to plan with, and within every context window.
DEFAULT_BATCH = 8
DEFAULT_SEQ = 2048
# For vision configurations without an image size, which accept any: ImageNet's.
DEFAULT_IMAGE_SIZE = 224

# Characters of somebody else's message at most.
_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and what to call it with; a dict of inputs is keyword arguments, a tuple positional ones."""

    name: str
    model: nn.Module
    example_inputs: tuple[Any, ...] | dict[str, Any]


def load_model(
    spec: str,
    *,
    batch: int | None = None,
    seq: int | None = None,
    dtype: str | None = None,
    stored_dtype: str | None = None,
    device: str = "meta",
    weights: bool = True,
) -> LoadedModel:
    """Resolve `spec` to a model and example inputs.

    Args:
        spec: ``hf:PATH``, ``package.module:function`` or ``file.py:function``. The function returns
            ``(model, example_inputs)``; it is given `batch`, `seq` and `dtype` by keyword where the caller set them.
        batch: samples in the global batch; `DEFAULT_BATCH` for ``hf:`` where not given.
        seq: tokens in a sequence; for ``hf:`` the context window, at most `DEFAULT_SEQ`, where not given.
        dtype: torch's name of the parameters' type; for ``hf:`` the configuration's where not given.
        stored_dtype: the type that the precision needs: a function that has a parameter ``dtype`` gets it where `dtype` isn't given.
        device: where an ``hf:`` model and its inputs are made: ``"meta"`` takes no memory, ``"cpu"`` draws random weights
            and tokens from torch's generator. A function decides for itself.
        weights: of an ``hf:`` model, whether its parameters are made there; otherwise they are on the meta device, and only its buffers and
            inputs have values.

    Returns:
        The model in training mode. Language models get ``input_ids`` and ``labels`` ``(batch, seq)`` int64, image
        classifiers ``pixel_values`` ``(batch, channels, height, width)`` and ``labels`` ``(batch,)``.

    Raises:
        InputError: `spec` names nothing usable, or a size or type can't be applied to it.
    """
    source = read_source(spec, batch=batch, seq=seq, dtype=dtype)
    return _load_config(source, device, weights) if source.file is not None else _call_function(source, stored_dtype)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module gets is replaced by one without memory."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is there already is another module's too: tied parameters stay one.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with replaced(nn.Module, "register_parameter", register_on_meta):
        yield


def _load_config(source: Source, device: str, weights: bool) -> LoadedModel:
    """Build the model of a transformers configuration, and its example inputs."""
    file, data = source.file, source.config
    assert file is not None
    try:
        import transformers
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise InputError(f"hf:{file} needs the transformers package: pip install 'autopar[transformers]'") from error
    kind = data["model_type"]
    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"{file}: transformers {transformers.__version__} knows no model_type {kind!r}; upgrade transformers, or load the "
            "model in a function of your own and give file.py:function"
        )
    # Whatever a configuration says comes to light somewhere in transformers, as any exception.
    try:
        config = CONFIG_MAPPING[kind].from_dict({**data, "use_cache": False} if "use_cache" in data else dict(data))
        dtype = getattr(torch, source.dtype) if source.dtype is not None else getattr(config, "dtype", None) or torch.float32
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"{file}: its dtype is {dtype!r}, which no parameters are trained in; give --dtype bfloat16 or another")
        batch = source.batch or DEFAULT_BATCH
        inputs = (
            _make_images(file, config, batch, dtype, device) if source.builder == IMAGE else _make_tokens(source, config, batch, device)
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file} isn't a valid {kind!r} configuration: {_brief(error)}") from error
    try:
        with torch.device(device), nullcontext() if weights else _parameters_on_meta():
            model = getattr(transformers, source.builder).from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{file}: transformers can't build this model: {_brief(error)}") from error
    name = file.parent.resolve().name if file.name == "config.json" else file.stem
    return LoadedModel(name, model.train(), inputs)


def _make_tokens(source: Source, config: Any, batch: int, device: str) -> dict[str, Tensor]:
    """Make ``input_ids`` and ``labels`` ``(batch, seq)`` of random tokens."""
    file, seq = source.file, source.seq
    assert file is not None
    window = getattr(config, "max_position_embeddings", None)
    if window is not None:
        check_size(file, "max_position_embeddings", window)
    seq = seq or min(window or DEFAULT_SEQ, DEFAULT_SEQ)
    # Rotary positions go on past the window; a learned table has no row for them, which meta tensors wouldn't notice.
    if window and seq > window and not getattr(config, "rope_parameters", None):
        raise InputError(f"seq={seq}: {file} has {window} learned positions; use a shorter sequence")
    vocabulary = config.get_text_config().vocab_size
    check_size(file, "vocab_size", vocabulary)
    ids, labels = (torch.randint(vocabulary, (batch, seq), device=device) for _ in range(2))
    return {"input_ids": ids, "labels": labels}


def _make_images(file: Path, config: Any, batch: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Make random ``pixel_values`` ``(batch, channels, height, width)`` and class ``labels`` ``(batch,)``."""
    size, channels = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE, getattr(config, "num_channels", 3)
    check_size(file, "image_size", size, pair=True)
    check_size(file, "num_channels", channels)
    check_size(file, "num_labels", config.num_labels)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(batch, channels, height, width, dtype=dtype, device=device)
    return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (batch,), device=device)}


def _call_function(source: Source, stored_dtype: str | None) -> LoadedModel:
    """Import the source's module, call its function with the options that are set, and check what it returns."""
    target, function = source.target, source.function
    spec = f"{target}:{function}"
    options = {"batch": source.batch, "seq": source.seq, "dtype": source.dtype}
    folder = Path(os.path.realpath(target)).parent if target.endswith(".py") else Path.cwd()
    with _importable(folder):
        with _failing_as(f"importing {target} failed at", target, folder):
            module = _import_file(Path(target)) if target.endswith(".py") else importlib.import_module(target)
            build = getattr(module, function, None)
        if not callable(build):
            known = sorted(name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_")
            has = f"it has {', '.join(known)}" if known else "it has no functions"
            raise InputError(f"{target} has no function {function!r}: {has}")
        given = _select_options(spec, build, {word: value for word, value in options.items() if value is not None}, stored_dtype)
        with _failing_as(f"{spec} failed at"):
            result = build(**given)
    return _check_result(spec, result)


@contextmanager
def _failing_as(what: str, target: str = "", folder: Path | None = None) -> Iterator[None]:
    """Turn whatever the user's code raises into an InputError: it may exit, or raise what is no Exception."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{target}.".startswith(f"{error.name}."):
            raise InputError(f"there is no module {error.name!r} in {folder} or on Python's path: {FORMS}") from error
        raise InputError(f"{what} {_describe(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let imports find `folder`'s modules, as ``python file.py`` would."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the imported code may have taken it out itself
            sys.path.remove(str(folder))


def _import_file(path: Path) -> ModuleType:
    # Not the bare stem: a file called types.py must not take the place of the standard library's module.
    name = f"autopar_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} isn't a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _select_options(spec: str, build: Callable[..., object], given: dict[str, int | str], stored_dtype: str | None) -> dict[str, int | str]:
    """Return `given` if `build` takes every option and needs no other; an option is never dropped in silence.

    A function that has a parameter of that name gets `stored_dtype` where no type is given.
    """
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError) as error:  # of a function that isn't Python's
        raise InputError(f"{spec} is no function whose parameters are known: give a function that is written in Python") from error
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if stored_dtype is not None and "dtype" in named:
        given = {"dtype": stored_dtype, **given}
    unused = [word for word in given if not takes_any and word not in named]
    if unused:
        raise InputError(
            f"{spec} takes no argument {', '.join(unused)}: leave the option out, or give the function a parameter of that name"
        )
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic and p.name not in given]
    if missing:
        raise InputError(f"{spec} needs a value for {', '.join(missing)}: give its parameters defaults, or the option's value")
    return given


def _check_result(spec: str, result: object) -> LoadedModel:
    """Check that a function returned ``(model, example_inputs)``."""
    if not (isinstance(result, tuple) and len(result) == 2):
        kind = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise InputError(f"{spec} returned {kind}: it must return (model, example_inputs)")
    model, inputs = result
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned {type(model).__name__} as the model: it must be a torch.nn.Module")
    if not isinstance(inputs, tuple | dict) or (isinstance(inputs, dict) and not all(isinstance(key, str) for key in inputs)):
        raise InputError(
            f"{spec} returned {type(inputs).__name__} as example inputs: give a dict of keyword arguments or a tuple of "
            "positional ones, such as (x,)"
        )
    return LoadedModel(spec, model, inputs)


def _describe(error: BaseException) -> str:
    """Describe an exception of the user's code with the last line of theirs that ran."""
    if isinstance(error, SyntaxError):  # raised before any line ran
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    not_theirs = ("site-packages", "importlib", __file__)
    theirs = [frame for frame in frames if not any(part in frame.filename for part in not_theirs)]
    frame = (theirs or frames)[-1]
    return f"{frame.filename}:{frame.lineno}: {_brief(error)}"


def _brief(error: BaseException) -> str:
    """An exception in one line of bearable length."""
    text = " ".join(word_exception(error).split())
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]} ..."
