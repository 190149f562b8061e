"""Hugging Face transformers under capture: caches off, attention as one operator, masks by what they mean.

Comes in: a model, and the keyword arguments of a call. Goes out: within `adapted`, a model that can be exported, and the arguments to
export it with; afterwards the model is as it was. transformers is imported only for models of its classes, which exist only where it is
imported already.

Models ask for the name of the attention implementation that the user set, so that name stays. What transformers calls under it is replaced:
by an attention function that is one operator, and by a mask function that builds the same tensor as the library's ``sdpa`` and attaches its
`Meaning` to it. When that tensor reaches the attention function unchanged, the meaning is used and the tensor becomes dead code. When the
model has changed it, the new tensor has no meaning attached and is used as a mask. ``eager`` attention, which is the model's own code, and
functions that the user registered are captured as they are.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopar.capture.fx_nodes import users_line
from autopar.errors import CaptureError
from autopar.ops import attention as attention  # the import defines torch.ops.autopar.attention

_MEANING = "_autopar_meaning"

_EFFECTLESS = frozenset(
    {"sliding_window", "position_ids", "cache_position", "output_attentions", "use_cache", "deterministic", "max_length_q", "max_length_k"}
)
"""Keyword arguments of attention functions that change nothing where a mask is given; windows are part of the mask."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an attention mask means, as arguments of `autopar.ops.attention.attention`."""

    causal: bool = False
    window: int | None = None
    key_padding: Tensor | None = None


@contextmanager
def adapted(model: nn.Module, inputs: Mapping[str, Any], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Prepare the transformers modules inside `model` for an export; yields the keyword arguments to export with.

    Args:
        model: any module; one without models of transformers is left alone.
        inputs: the keyword arguments of the call.
        notes: gets a line per change, for the plan's report.
    """
    models = _transformers_models(model)
    if not models:
        yield dict(inputs)
        return
    kwargs = dict(inputs)
    with ExitStack() as undo:
        configs = _configs(model)
        recomputing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        cached = [config for config in configs if getattr(config, "use_cache", False)]
        for config in cached:
            undo.enter_context(_changed(config, "use_cache", False))
        for module in recomputing:
            undo.enter_context(_changed(module, "gradient_checkpointing", False))
        # As the model would decide: an argument over the configuration, and no cache where layers are recomputed.
        asks_for_cache = bool(cached) if kwargs.get("use_cache") is None else bool(kwargs["use_cache"])
        caching = asks_for_cache and not (recomputing and model.training)
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        if caching:
            notes.append("use_cache switched off: past_key_values isn't returned")
        if recomputing:
            notes.append("gradient checkpointing switched off: the plan chooses what is recomputed")
        # transformers tells packed sequences apart by their positions, but only when no cache is in use.
        packed = kwargs.get("position_ids") is not None and not caching
        undo.enter_context(_replaced({config._attn_implementation for config in configs}, frozenset(kwargs), packed, notes))
        yield kwargs


def collects_outputs(hook: object) -> bool:
    """Whether a hook is transformers' own, by which a model collects hidden states and attentions for the calls that ask for them.

    It is put on the modules in the first such call, and changes nothing in others.
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def _transformers_models(model: nn.Module) -> list[Any]:
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return []
    return [module for module in model.modules() if isinstance(module, library.PreTrainedModel)]


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object in the model once, also nested ones."""
    base = sys.modules["transformers.configuration_utils"].PreTrainedConfig
    configs: dict[int, Any] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if isinstance(config, base) and id(config) not in configs:
            configs[id(config)] = config
            pending.extend(getattr(config, name, None) for name in config.sub_configs)
    return list(configs.values())


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _replaced(names: Collection[str], given: frozenset[str], packed: bool, notes: list[str]) -> Iterator[None]:
    """Inside, the library's attention and mask functions of these names are ours, and its other mask functions ignore packed sequences.

    Args:
        names: the attention implementations that the model's configurations name.
        given: names of the keyword arguments of the model's call; models hand those that they don't know on to attention functions.
        packed: whether the model tells packed sequences apart.
        notes: gets a line for each mask that is kept as a tensor.
    """
    attentions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    # The library loads its parts when a model needs them, and some models make their masks themselves.
    library = importlib.import_module("transformers.masking_utils")
    masks = library.ALL_MASK_ATTENTION_FUNCTIONS

    def build(*args: Any, **kwargs: Any) -> Any:
        return _build_mask(library.sdpa_mask, packed, notes, *args, **kwargs)

    def unpacked(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, mask_function: Callable[..., Any] = library.causal_mask_function, **kwargs: Any) -> Any:
            function = mask_function if packed else _without_packing(mask_function, library)
            return original(*args, mask_function=function, **kwargs)

        return call

    def attend(name: str) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            _refuse_unknown(name, kwargs, given, has_mask=(args[3] if len(args) > 3 else kwargs.get("attention_mask")) is not None)
            return attention_forward(module, *args, notes=notes, **kwargs)

        return call

    # Functions that the user registered stay, and so does "eager", which is the model's own and not registered.
    replaced = [name for name in names if name in attentions and attentions[name].__module__.startswith("transformers.")]
    before = [(attentions, {name: attentions[name] for name in replaced})]
    before.append((masks, {name: masks[name] for name in {"sdpa", "eager", *replaced} if name in masks}))
    try:
        for name in before[1][1]:
            masks.register(name, build if name in replaced else unpacked(masks[name]))
        for name in replaced:
            attentions.register(name, attend(name))
        yield
    finally:
        for functions, originals in before:
            for name, original in originals.items():
                functions.register(name, original)


def _refuse_unknown(name: str, kwargs: Mapping[str, Any], given: frozenset[str], *, has_mask: bool) -> None:
    """Raise CaptureError for what a model passes to an attention function and one operator can't do.

    The library's ``sdpa`` function, too, ignores plain arguments that it doesn't know, and all that the user gave in the call of the model.
    """
    known = {"dropout", "scaling", "is_causal", "position_bias", "attention_mask", *_EFFECTLESS}
    if name != "sdpa":
        known |= {"softcap", "s_aux"}
    unknown = [
        key
        for key, value in kwargs.items()
        if value is not None
        and key not in known
        and not (name == "sdpa" and (key in given or not isinstance(value, (Tensor, float))))
        and not (key in given and not key.startswith("cu_seq"))
    ]
    windowed = name != "sdpa" and kwargs.get("sliding_window") is not None and not has_mask
    if unknown or windowed:
        what = ", ".join(unknown) or "a sliding window without a mask"
        raise CaptureError(
            f"the model passes {what} to {name} attention at `{users_line()}`, which one attention operator can't do."
            ' Set attn_implementation="eager", which is captured as the model computes it'
        )


def _build_mask(sdpa_mask: Callable[..., Tensor | None], packed: bool, notes: list[str], *args: Any, **kwargs: Any) -> Tensor | None:
    library = sys.modules["transformers.masking_utils"]
    call = inspect.signature(sdpa_mask).bind(*args, **kwargs)
    call.apply_defaults()
    given: dict[str, Any] = dict(call.arguments)
    extra = given.pop("kwargs", {})
    function = given["mask_function"]
    if not packed:
        function = _without_packing(function, library)
    # Masks must not be left out here: what a missing mask means differs between models, a tensor's meaning doesn't.
    given |= {"mask_function": function, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = sdpa_mask(**given, **extra)
    meaning = None
    if isinstance(given["q_offset"], int) and given["q_offset"] == 0 and given["kv_offset"] == 0:
        meaning = _read_meaning(function, given, notes)
    if dense is not None and meaning is not None:
        setattr(dense, _MEANING, meaning)
    return dense


def _read_meaning(function: Callable[..., Any], given: Mapping[str, Any], notes: list[str]) -> Meaning | None:
    """The meaning of a mask function, or None when a part of it isn't known (and is named in `notes`)."""
    library = sys.modules["transformers.masking_utils"]
    causal = False
    windows: list[tuple[str, int]] = []
    for part in _parts(function):
        name = part.__qualname__.split(".")[0]
        if part is library.causal_mask_function:
            causal = True
        elif name in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
            windows.append((name, int(_closure(part)["sliding_window"])))
        elif part is not library.bidirectional_mask_function:
            notes.append(f"attention mask kept as a tensor: {name!r} isn't a mask that is known by its meaning")
            return None
    expected = "sliding_window_overlay" if causal else "sliding_window_bidirectional_overlay"
    if any(name != expected for name, _ in windows):
        notes.append("attention mask kept as a tensor: a one-sided window without causality, or the reverse")
        return None
    window = min((size for _, size in windows), default=None)
    longest = max(given["q_length"], given["kv_length"])
    if window is not None and window >= longest:
        window = None
    padding = given["attention_mask"]
    if padding is not None and (padding.ndim != 2 or padding.shape[1] != given["kv_length"]):
        notes.append(f"attention mask kept as a tensor: a padding mask of shape {tuple(padding.shape)}")
        return None
    return Meaning(causal, window, padding)


def _parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The mask functions of which `function` is the conjunction."""
    if not function.__qualname__.startswith("and_masks."):
        return [function]
    return [part for inner in _closure(function)["mask_functions"] for part in _parts(inner)]


def _without_packing(function: Callable[..., Any], library: Any) -> Callable[..., Any]:
    """The mask function without what separates packed sequences, which transformers adds because an export can't exclude packing."""
    functions = []
    for part in _parts(function):
        name = part.__qualname__.split(".")[0]
        if name == "remap_positions_for_packed_sequence":
            functions.append(_without_packing(_closure(part)["mask_function"], library))
        elif name != "packed_sequence_mask_function":
            functions.append(part)
    return functions[0] if len(functions) == 1 else library.and_masks(*functions)


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    notes: list[str],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' interface that calls one operator, without repeating keys and values.

    Shapes: query (batch, heads, queries, head size), key and value (batch, key/value heads, keys, head size). Returns the result, (batch,
    queries, heads, head size), and None for attention weights.
    """
    if attention_mask is not None and attention_mask.ndim != 4:
        raise CaptureError(
            f"the model passes a mask of shape {list(attention_mask.shape)} to its attention at `{users_line()}`, where one of queries and"
            ' keys is needed. Set attn_implementation="sdpa" or "eager"'
        )
    if s_aux is not None:
        return _eager(module, query, key, value, attention_mask, dropout, scaling, s_aux, kwargs), None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    meaning: Meaning | None = getattr(attention_mask, _MEANING, None)
    bias = attention_mask
    if attention_mask is None:
        # The rule of transformers' sdpa attention: a missing mask means what the module says.
        module_is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        meaning = Meaning(causal=bool(module_is_causal) and query.shape[2] > 1)
    if meaning is not None:
        bias = None
    else:
        meaning = Meaning()
        notes.append("an attention mask that the model made or changed itself is kept as a tensor")
    if position_bias is not None:
        if meaning.key_padding is not None:
            bias, meaning = attention_mask, Meaning()
        bias = _add_bias(position_bias, bias)
    if bias is None and softcap is None and meaning.window is None and meaning.key_padding is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=meaning.causal,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    else:
        cap = None if softcap is None else float(softcap)
        query, key, value = map(_as_autocast, (query, key, value))
        bias = None if bias is None else _as_autocast(bias)
        out = torch.ops.autopar.attention(
            query, key, value, meaning.key_padding, bias, meaning.causal, meaning.window, scale, cap, float(dropout)
        )
    return out.transpose(1, 2).contiguous(), None


def _as_autocast(x: Tensor) -> Tensor:
    """What autocast, which doesn't know our operator, makes of an operand of ``scaled_dot_product_attention``."""
    if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _add_bias(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Added scores with `mask` in them; masked scores get the lowest number, as in transformers, not infinity."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    s_aux: Tensor,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The model's own eager attention, for attention sinks, which change the normalisation and have no fused operator here."""
    function = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype, device=mask.device), lowest)
    out, _ = function(module, query, key, value, mask, dropout=dropout, scaling=scaling, s_aux=s_aux, **kwargs)
    assert isinstance(out, Tensor)
    return out
