"""Mixed precision: in which dtypes parameters are stored, used, summed and updated.

A `Precision` is what a user asks for; `StorageDtypes` is what follows from it for one parameter. The fields of a `Precision` have the names
and the meaning of torch's ``torch.distributed.fsdp.MixedPrecisionPolicy``. Dtypes are torch's names without the ``torch.`` prefix.

With ``Precision.parse("mixed")`` (Micikevicius et al. 2018, section 3; Kalamkar et al. 2019 for bfloat16)::

    stored (float32) --cast--> read by the program (bfloat16): gathers, products, activations
    gradient of a rank (bfloat16) --cast--> summed over ranks (float32) --> grad, moments, update (float32)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from autopar.errors import InputError

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Dtypes in which parameters can be stored, read and summed."""

MOMENTS = 2
"""Numbers per element of a parameter that AdamW keeps (torch.optim.AdamW)."""


@dataclass(frozen=True, slots=True)
class StorageDtypes:
    """How a parameter is kept when that isn't all in the dtype in which the program reads it.

    Attributes:
        stored: dtype of the stored parameter and of its gradient.
        reduced: dtype in which its gradient is summed over ranks.
        states: dtypes of what an optimizer keeps per element: two moments, and a copy of the parameter where it holds one.
    """

    stored: str
    reduced: str
    states: tuple[str, ...]

    def __str__(self) -> str:
        return f"stored {self.stored}, reduced {self.reduced}, states {' '.join(self.states)}"


@dataclass(frozen=True, slots=True)
class Precision:
    """In which dtypes a model trains. Every field that is None leaves a dtype as the model has it.

    >>> mixed = Precision.parse("mixed")
    >>> mixed.param_dtype, mixed.reduce_dtype, mixed.stored_dtype
    ('bfloat16', 'float32', 'float32')
    >>> print(Precision.parse("param_dtype=bfloat16, output_dtype=float32"))
    param_dtype=bfloat16, output_dtype=float32

    Attributes:
        param_dtype: in which the program reads floating-point parameters, and gathers them from their parts. The parameter itself keeps its
            dtype.
        reduce_dtype: in which gradients are summed over ranks; where it is None, that is `param_dtype`, and without one the parameter's.
        output_dtype: to which floating-point outputs are cast.
        cast_forward_inputs: whether floating-point inputs are cast to `param_dtype`.
        stored_dtype: the dtype that the model's floating-point parameters must have; None accepts any.
        masters: whether the optimizer keeps a float32 copy of every parameter of a lower precision, and its moments in float32
            (`autopar.MasterWeights`). It changes no number of the program, but the memory and the seconds of the update.
    """

    param_dtype: str | None = None
    reduce_dtype: str | None = None
    output_dtype: str | None = None
    cast_forward_inputs: bool = True
    stored_dtype: str | None = None
    masters: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("cast_forward_inputs", "masters"):
                if not isinstance(value, bool):
                    raise InputError(f"precision: {field.name}={value!r}, True or False is needed")
            elif value is not None:
                name = str(value).removeprefix("torch.")
                if name not in FLOATS:
                    raise InputError(f"precision: {field.name}={value!r} is unknown; there are {', '.join(FLOATS)}")
                object.__setattr__(self, field.name, name)

    @staticmethod
    def parse(value: Any) -> Precision:
        """A `Precision` of what a user gives: one of `PRECISIONS`, a `Precision`, an object with the fields of FSDP2's policy, or None.

        Raises InputError for anything else.
        """
        if value is None:
            return AS_MODEL
        if isinstance(value, Precision):
            return value
        if isinstance(value, str) and value in PRECISIONS:
            return PRECISIONS[value]
        if isinstance(value, str) and "=" in value:
            return Precision(**dict(map(_read_field, value.split(","))))
        if hasattr(value, "param_dtype") and hasattr(value, "reduce_dtype"):
            return Precision(
                param_dtype=value.param_dtype,
                reduce_dtype=value.reduce_dtype,
                output_dtype=getattr(value, "output_dtype", None),
                cast_forward_inputs=getattr(value, "cast_forward_inputs", True),
            )
        names = _NAMED_ALIKE.get(str(value).removeprefix("torch."), ())
        meant = " or ".join(f"{name!r} ({_IN_SHORT[name]})" for name in names)
        raise InputError(
            f"precision={value!r} is unknown: {f'did you mean {meant}? There are' if meant else 'use one of'} {', '.join(PRECISIONS)},"
            " or fields as in param_dtype=bfloat16,reduce_dtype=float32"
        )

    def __str__(self) -> str:
        """The text that `parse` reads: a name, or the fields that aren't as in ``model``."""
        names = [name for name, precision in PRECISIONS.items() if self == precision]
        texts = (f"{field.name}={value}" for field in fields(self) if (value := getattr(self, field.name)) != field.default)
        return names[0] if names else ", ".join(texts)

    def computed_dtype(self, stored: str) -> str:
        """The dtype in which the program reads a floating-point parameter that is stored as `stored`."""
        return self.param_dtype or stored

    def storage_dtypes(self, stored: str, computed: str | None = None) -> StorageDtypes | None:
        """How a floating-point parameter that is stored as `stored` is kept; None where all is in the dtype in which the program reads it.

        Args:
            stored: the parameter's dtype.
            computed: the dtype in which the program reads it, where that doesn't follow from this policy, as under autocast.
        """
        read = computed or self.computed_dtype(stored)
        has_masters = self.masters and stored in ("float16", "bfloat16")
        states = ("float32",) * (MOMENTS + 1) if has_masters else (stored,) * MOMENTS
        reduced = self.reduce_dtype or self.param_dtype or stored
        kept = StorageDtypes(stored, reduced, states)
        return None if kept == StorageDtypes(read, read, (read,) * MOMENTS) else kept


def _read_field(text: str) -> tuple[str, Any]:
    """A field and its value, of text like ``param_dtype=bfloat16``. Raises InputError for another."""
    name, _, value = (part.strip() for part in text.partition("="))
    if name not in {field.name for field in fields(Precision)}:
        raise InputError(
            f"precision: {text.strip()!r} isn't understood; its fields are {', '.join(field.name for field in fields(Precision))}"
        )
    return name, {"True": True, "true": True, "False": False, "false": False, "None": None}.get(value, value)


AS_MODEL = Precision()
"""Everything in the dtypes that the model has."""

PRECISIONS = {
    "model": AS_MODEL,
    "float32": Precision(stored_dtype="float32"),
    "mixed": Precision(param_dtype="bfloat16", reduce_dtype="float32", stored_dtype="float32"),
    "mixed-float16": Precision(param_dtype="float16", reduce_dtype="float32", stored_dtype="float32"),
    "bfloat16": Precision(stored_dtype="bfloat16", masters=True),
}
"""Named policies, by what a user writes."""

_IN_SHORT = {
    "float32": "everything float32",
    "mixed": "parameters float32, the program bfloat16",
    "mixed-float16": "parameters float32, the program float16",
    "bfloat16": "everything bfloat16, with float32 masters",
}
_BFLOAT16, _FLOAT16, _FLOAT32 = ("bfloat16", "mixed"), ("mixed-float16",), ("float32",)
_NAMED_ALIKE = {
    **dict.fromkeys(("bfloat16", "bf16", "bf16-mixed"), _BFLOAT16),
    **dict.fromkeys(("float16", "fp16", "half", "16-mixed"), _FLOAT16),
    **dict.fromkeys(("float32", "fp32", "float"), _FLOAT32),
}
"""What dtypes and other libraries' names of precisions may mean here, for the message that refuses them."""

HELP = (
    ("model", "everything in the dtypes that the model has"),
    ("float32", "everything in float32"),
    ("mixed", "parameters, gradients and moments float32; the program and its gathers bfloat16; gradients summed in float32"),
    ("mixed-float16", "the same with float16, which needs a gradient scaler (torch.amp.GradScaler)"),
    ("bfloat16", "everything bfloat16, but for a float32 copy of the parameters and the moments, which the optimizer holds"),
)
"""What each of `PRECISIONS` means, for help and documentation."""
