"""Every rule against the oracle: the op in parts, joined, is the whole op, in values and gradients."""

import inspect
import itertools
import operator
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.bloom.modeling_bloom import GeLUFunction
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import SqrtBoundDerivative
from zoo import ZOO

import autopar.ops.attention  # defines autopar::attention
from autopar.capture.export import capture
from autopar.checks import threads
from autopar.checks.oracle import check_space, describe, trace, trace_function
from autopar.cost_models import collective
from autopar.errors import VerificationError
from autopar.ir.facts import Facts, Meaning, TargetMean
from autopar.ir.graph import Op, Operand, OpKind
from autopar.ir.layout import Mesh
from autopar.ir.space import Loop, LoopKind, Space, parse
from autopar.ops import DEFERRABLE, kernels, rng
from autopar.rules import chunked_loss, convolution
from autopar.rules.table import RULES, facts_of, rule
from autopar.rules.view import refine

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(1)


def real(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR).requires_grad_(grad)


def unit(*shape: int, grad: bool = True) -> torch.Tensor:
    """Between 0.1 and 0.9: in the domain of every elementwise op that is tested with it."""
    return (torch.rand(shape, dtype=torch.float64, generator=GENERATOR) * 0.8 + 0.1).requires_grad_(grad)


def whole(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR)


def flags(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=GENERATOR) < 0.6


@dataclass(frozen=True)
class Row:
    target: str
    args: tuple[Any, ...]
    expected: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)


def row(target: str, *args: Any, to: str = "", **kwargs: Any) -> Row:
    return Row(target if target.startswith("autopar") else f"aten.{target}", args, to, kwargs)


def labels(*shape: int, high: int) -> torch.Tensor:
    """Classes, of which the first in every row are ignored: rows differ in how many tokens count."""
    made = whole(high, *shape)
    made.view(-1)[::3] = -100
    made.view(-1)[0] = -100
    return made


def pairs(*shape: int) -> torch.Tensor:
    """Complex numbers."""
    return torch.complex(real(*shape, grad=False), real(*shape, grad=False)).requires_grad_()


def tensors(count: int, *shape: int) -> list[torch.Tensor]:
    return [real(*shape) for _ in range(count)]


# Arguments beyond the tensor that these need, and tensors for those that others' don't suit.
LIMITS = {"clamp": (0.2, 0.7), "clamp_min": (0.3,), "clamp_max": (0.6,), "threshold": (0.3, 0.0)}
UNARY = [
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "bitwise_not",
    "ceil",
    "cos",
    "cosh",
    "elu",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "isinf",
    "isnan",
    "leaky_relu",
    "log",
    "log10",
    "log1p",
    "log2",
    "log_sigmoid",
    "logical_not",
    "mish",
    "nan_to_num",
    "reciprocal",
    "relu",
    "relu6",
    "round",
    "rsqrt",
    "selu",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sinh",
    "softplus",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "trunc",
    "clamp",
    "clamp_min",
    "clamp_max",
    "logit",
    "sinc",
    "isfinite",
    "celu",
    "hardshrink",
    "softshrink",
    "threshold",
    "angle",
    "erfinv",
    "lgamma",
    "digamma",
    "frac",
    "sgn",
]
COMPARED = ["eq", "ne", "lt", "le", "gt", "ge"]
LOGICAL = ["logical_and", "logical_or", "logical_xor"]


def unary_operand(name: str) -> torch.Tensor:
    if name == "bitwise_not":
        return whole(9, 4, 1)
    return (unit(4, 1, grad=False) + (name == "acosh")).requires_grad_()


POINTWISE = [
    *(row(f"{name}.default", unary_operand(name), *LIMITS.get(name, ()), to="a b -> a b") for name in UNARY),
    *(row(f"{name}.Tensor", real(4, 6), real(6), to="a b, b -> a b") for name in COMPARED),
    *(row(f"{name}.Scalar", real(4, 6), 0.5, to="a b -> a b") for name in COMPARED),
    *(row(f"{name}.default", flags(4, 6), flags(4, 1), to="a b, a 1 -> a b") for name in LOGICAL),
    *(row(f"{name}.Tensor", flags(4, 6), flags(6)) for name in ("bitwise_and", "bitwise_or", "bitwise_xor")),
    *(row(f"{name}.Scalar", whole(9, 4), 5) for name in ("bitwise_and", "bitwise_or")),
    *(row(f"{name}.Tensor", flags(4, 1, 6), flags(1, 4, 1)) for name in ("__and__", "__or__", "__xor__")),
    *(row(f"{name}.default", real(4, 6), real(4, 6)) for name in ("minimum", "maximum", "atan2", "logaddexp")),
    *(row(f"{name}.other", real(4, 6), real(6)) for name in ("min", "max")),
    row("pow.Tensor_Tensor", unit(4, 6), real(6)),
    row("pow.Tensor_Scalar", real(4, 6), 3),
    row("pow.Scalar", 2.0, real(4, 6), to="a b -> a b"),
    *(row(f"{name}.Tensor", unit(4, 6), unit(4, 6, grad=False)) for name in ("remainder", "fmod")),
    *(row(f"{name}.Scalar", unit(4, 6), 0.3) for name in ("remainder", "fmod")),
    row("floor_divide.default", whole(9, 4), whole(5, 4, low=1)),
    row("div.Tensor_mode", whole(9, 4), whole(5, 4, low=1), rounding_mode="floor"),
    row("div.Scalar_mode", whole(9, 4), 2, rounding_mode="trunc"),
    *(row(f"{name}.default", real(4, 6), real(4, 1), unit(6), value=0.5) for name in ("addcmul", "addcdiv")),
    row("lerp.Tensor", real(4, 6), real(4, 6), unit(6)),
    row("lerp.Scalar", real(4, 6), real(6), 0.3),
    row("xlogy.Tensor", unit(4, 6), unit(6)),
    row("clamp.Tensor", real(4, 6), None, unit(6)),
    *(row(f"clamp_{name}.Tensor", real(4, 6), unit(6)) for name in ("min", "max")),
    row("rsub.Scalar", real(4, 6), 1),
    row("masked_fill.Tensor", real(4, 6), flags(4, 1), real(), to="a b, a 1,  -> a b"),
    row("fill.Tensor", real(4, 6), real(), to="a b,  -> a b"),
    row("fill.Scalar", real(4, 6), 2.0),
    row("add.Tensor", real(4, 6, 2), real(6, 1), alpha=2, to="a b c, b 1 -> a b c"),
    row("add.Tensor", real(), real(), to=",  -> "),
    row("add.Tensor", real(4, 6), 1.0),
    row("add.Scalar", real(5), 1.0),
    row("sub.Tensor", real(4, 6), real(4, 6)),
    row("sub.Scalar", whole(4, 6), 1),
    row("rsub.Tensor", real(4, 6), real(6)),
    row("mul.Tensor", real(4, 6), real(4, 6)),
    row("mul.Tensor", real(6), real(4, 6), to="b, a b -> a b"),
    row("mul.Tensor", flags(4, 6), real(4, 6)),
    row("mul.Scalar", real(4, 6), 3.0),
    row("div.Tensor", real(4, 6), unit(4, 1)),
    row("div.Scalar", real(4, 6), 3.0),
    row("neg.default", real(4, 6)),
    row("to.dtype", real(4, 6), torch.float32, to="a b -> a b"),
    row("to.dtype", flags(4, 6), torch.float64),
    row("to.device", real(4, 6), torch.device("cpu"), torch.float64),
    row("to.dtype_layout", whole(5, 4), dtype=torch.float64),
    row("to.other", real(4, 6), whole(5, 4, 6), to="a b, other0! other1! -> a b"),
    row("_to_copy.default", real(4, 6), dtype=torch.int64),
    row("type_as.default", real(4, 6), real(3), to="a b, other0! -> a b"),
    *(row(f"{name}.default", real(4, 6)) for name in ("clone", "contiguous", "lift_fresh_copy", "alias", "detach")),
    row("where.self", flags(4, 1), real(4, 6), real(6), to="a 1, a b, b -> a b"),
    row("where.ScalarOther", flags(4, 6), real(4, 6), 0.0),
    row("where.ScalarOther", flags(4, 6), real(4, 6), -1e9),
    row("where.ScalarSelf", flags(4, 6), 1.0, real(4, 6)),
    row("where.Scalar", flags(4, 6), 1.0, 0.0),
    row("masked_fill.Scalar", real(4, 6), flags(4, 1), 0.0),
    row("masked_fill.Scalar", real(4, 6), flags(6), -1.0),
    *(row(f"{name}.default", real(4, 6)) for name in ("zeros_like", "ones_like")),
    row("full_like.default", real(4, 6), 2.0),
    *(row(f"{name}.default", real(3, 4, 6), to="a b! c! -> a b! c!") for name in ("tril", "triu")),
    row("multiply.Tensor", real(4, 6), real(6)),
    row("multiply.Scalar", real(4, 6), 3.0),
    row("polar.default", unit(4, 6), real(4, 6), to="a b, a b -> a b"),
    row("complex.default", real(4, 6), real(4, 6)),
    *(row(f"{name}.default", pairs(4, 6), to="a b -> a b") for name in ("real", "imag", "conj", "_conj", "resolve_conj")),
    row("resolve_neg.default", real(4, 6)),
    row("mul.Tensor", pairs(4, 6), pairs(6), to="a b, b -> a b"),
    row("prelu.default", real(4, 6, 2), real(6), to="a b c, b -> a b c"),
    row("prelu.default", real(4, 6), real(1), to="a b, 1 -> a b"),
    row("rrelu.default", real(4, 6)),
]

STATISTICS = (real(6, grad=False), unit(6, grad=False))
REDUCED = [
    row("sum.default", real(4, 6), to="a b -> "),
    row("sum.dim_IntList", real(4, 6, 5), [0, -1], to="a b c -> b"),
    row("sum.dim_IntList", flags(4, 6), [1], True, to="a b -> a 1"),
    row("mean.default", real(4, 6), to="a b -> "),
    row("mean.dim", real(4, 6, 5), [-2], True, to="a b c -> a 1 c"),
    row("mean.dim", real(4, 6), [0, 1]),
    *(row(f"{name}.default", real(4, 6), [1], to="a b! -> a") for name in ("amax", "amin", "logsumexp")),
    *(row(f"{name}.default", real(4, 6), to="a! b! -> ") for name in ("max", "min", "prod")),
    *(row(f"{name}.dim", real(4, 6), 1, True, to="a b! -> a 1, a 1") for name in ("max", "min")),
    *(row(f"{name}.default", real(4, 6), 0, to="a! b -> b") for name in ("argmax", "argmin")),
    row("prod.dim_int", real(4, 6), 1, to="a b! -> a"),
    *(row(f"{name}.default", flags(4, 6), to="a! b! -> ") for name in ("any", "all")),
    *(row(f"{name}.dim", flags(4, 6), 1, to="a b! -> a") for name in ("any", "all")),
    *(row(f"{name}.default", real(4, 6), False, to="a! b! -> ") for name in ("var", "std")),
    *(row(f"{name}.dim", real(4, 6), [1], False, to="a b! -> a") for name in ("var", "std")),
    *(row(f"{name}.correction", real(4, 6), [-1], correction=0, keepdim=True, to="a b! -> a 1") for name in ("var", "std")),
    row("nansum.default", real(4, 6), [1], to="a b -> a"),
    row("norm.ScalarOpt_dim", real(4, 6), 2, [1], to="a b! -> a"),
    row("norm.Scalar", real(4, 6), 2, to="a! b! -> "),
    row("cosine_similarity.default", real(4, 6), real(1, 6), 1, to="a b!, 1 b! -> a"),
    row("cosine_similarity.default", real(3, 4, 6), real(6), -1, to="a b c!, c! -> a b"),
    row("cosine_similarity.default", real(3, 4, 6), real(3, 4, 6), to="a b! c, a b! c -> a c"),
    row("linalg_vector_norm.default", real(4, 6), 2, [1], to="a b! -> a"),
    *(row(f"{name}.int", real(4, 6, 3), 1, to="a b! c -> a b! c") for name in ("softmax", "log_softmax")),
    *(row(f"{name}.default", real(4, 6), -1, False, to="a b! -> a b!") for name in ("_softmax", "_log_softmax")),
    row("softmax.int", real(), 0),
    *(row(f"{name}.default", real(4, 6), 0, to="a! b -> a! b") for name in ("cumsum", "cumprod")),
    row("layer_norm.default", real(4, 3, 6), [6], real(6), real(6), to="a b c!, c!, c! -> a b c!"),
    row("layer_norm.default", real(4, 6), [6], None, real(6)),
    row("rms_norm.default", real(4, 6), [6], real(6), to="a b!, b! -> a b!"),
    row("group_norm.default", real(4, 6, 2), 3, real(6), real(6), to="n c! x0!, c!, c! -> n c! x0!"),
    row(
        "batch_norm.default",
        real(4, 6, 4, 2),
        real(6),
        real(6),
        real(6, grad=False),
        unit(6, grad=False),
        True,
        0.1,
        1e-5,
        False,
        to="n* c x0* x1*, c, c, r!, r! -> n* c x0* x1*",
    ),
    row("batch_norm.default", real(4, 6), None, None, None, None, True, 0.1, 1e-5, False, to="n* c -> n* c"),
    row("batch_norm.default", real(4, 6), real(6), None, real(6, grad=False), unit(6, grad=False), False, 0.1, 1e-5, False),
    row("dropout.default", real(4, 6), 0.0, True, to="a b -> a b"),
    *(row(f"{name}_mean.correction", real(4, 6), [1], correction=1, to="a b! -> a, a") for name in ("var", "std")),
    *(row(f"{name}.default", real(4, 6), 1, to="a b! -> a b!") for name in ("logcumsumexp",)),
    *(row(f"{name}.default", real(4, 6), 1, to="a b! -> a b!, a b!") for name in ("cummax", "cummin")),
    row("_fft_r2c.default", real(4, 6), [1], 0, True, to="a b! -> a b_out!"),
    row("_fft_c2c.default", pairs(4, 6, 2), [1, 2], 0, True, to="a b! c! -> a b_out! c_out!"),
    row("_fft_c2r.default", pairs(4, 4), [1], 0, 6, to="a b! -> a b_out!"),
    row("stft.default", real(4, 12), 4, 2, 4, unit(4, grad=False), False, True, True, to="a t!, w! -> a spectrum0! spectrum1!"),
    row("stft.center", real(12), 4, 2, return_complex=True, to="t! -> spectrum0! spectrum1!"),
    row("_weight_norm.default", real(4, 6, 3), real(4, 1, 1), to="a b! c!, a 1 1 -> a b! c!"),
    row("_weight_norm.default", real(4, 6, 3), real(1, 1, 3), 2, to="a! b! c, 1 1 c -> a! b! c"),
    row("_weight_norm.default", real(4, 6), real(1, 1), -1, to="a! b!, 1 1 -> a! b!"),
    row("instance_norm.default", real(4, 6, 5), real(6), real(6), None, None, True, 0.1, 1e-5, False, to="n c x0!, c, c -> n c x0!"),
    row("instance_norm.default", real(4, 6, 4), None, None, *STATISTICS, False, 0.1, 1e-5, False, to="n c x0, c, c -> n c x0"),
    row("instance_norm.default", real(4, 6, 4), None, None, *STATISTICS, True, 0.1, 1e-5, False, to="n! c! x0!, c!, c! -> n! c! x0!"),
]

# Of a two-layer LSTM from 5 to 3 features.
WEIGHTS = [*tensors(1, 12, 5), *tensors(1, 12, 3), *tensors(2, 12), *tensors(2, 12, 3), *tensors(2, 12)]

# Of a two-layer recurrent layer without gates.
RNN_WEIGHTS = [real(3, 5), real(3, 3), *tensors(2, 3), *tensors(2, 3, 3), *tensors(2, 3)]

CONTRACTED = [
    row("linear.default", real(2, 4, 6), real(8, 6), real(8), to="b s i, o i, o -> b s o"),
    row("linear.default", real(1, 5, 6), real(8, 6), to="b s i, o i -> b s o"),
    row("linear.default", real(4, 6), real(1, 6), real(1), to="n i, o i, o -> n o"),
    row("linear.default", real(6), real(8, 6), real(8)),
    row("linear.default", real(2, 2, 3, 4), real(4, 4)),
    row("addmm.default", real(8), real(4, 6), real(6, 8), to="n, m k, k n -> m n"),
    row("addmm.default", real(4, 1), real(4, 6), real(6, 8), beta=0.5, to="m 1, m k, k n -> m n"),
    row("baddbmm.default", real(2, 1, 4), real(2, 6, 4), real(2, 4, 4), alpha=0.5, to="b 1 n, b m k, b k n -> b m n"),
    row("matmul.default", real(2, 1, 4, 6), real(3, 6, 4), to="b0 1 m k, b1 k n -> b0 b1 m n"),
    row("matmul.default", real(2, 4, 6), real(6)),
    row("matmul.default", real(6), real(6, 4)),
    row("mm.default", real(4, 6), real(6, 8), to="m k, k n -> m n"),
    row("bmm.default", real(2, 4, 6), real(2, 6, 8), to="b m k, b k n -> b m n"),
    row("mv.default", real(4, 6), real(6), to="m k, k -> m"),
    row("dot.default", real(6), real(6), to="k, k -> "),
    row("einsum.default", "bshd,bthd->bhst", tensors(2, 2, 4, 2, 4), to="b s h d, b t h d -> b h s t"),
    row("einsum.default", "ij->j", [real(4, 6)], to="i j -> j"),
    row("einsum.default", "...i, ...i -> ...", [real(2, 4, 6), real(4, 6)], to="a b i, b i -> a b"),
    row("einsum.default", "b...i,oi->b...o", [real(2, 3, 4, 6), real(4, 6)], to="b a c i, o i -> b a c o"),
    row(
        "scaled_dot_product_attention.default",
        real(2, 4, 4, 3),
        real(2, 4, 6, 3),
        real(2, 4, 6, 2),
        to="b h s d!, b h t! d!, b h t! e! -> b h s e!",
    ),
    row(
        "scaled_dot_product_attention.default",
        *tensors(3, 2, 4, 8, 4),
        None,
        0.0,
        True,
        scale=0.3,
        to="b h s d!, b h t! d!, b h t! e! -> b h s e!",
    ),
    row(
        "scaled_dot_product_attention.default",
        real(2, 4, 8, 4),
        *tensors(2, 2, 2, 8, 4),
        None,
        0.0,
        True,
        enable_gqa=True,
        to="b (g r) s d!, b g t! d!, b g t! e! -> b (g r) s e!",
    ),
    row(
        "scaled_dot_product_attention.default",
        real(2, 4, 8, 4),
        *tensors(2, 2, 1, 8, 4),
        flags(2, 4, 8, 8) | torch.eye(8).bool(),
        enable_gqa=True,
        to="b r s d!, b 1 t! d!, b 1 t! e!, b r s u! -> b r s e!",
    ),
    row("scaled_dot_product_attention.default", *tensors(3, 2, 4, 8, 4), real(8, 8), to="b h s d!, b h t! d!, b h t! e!, s u! -> b h s e!"),
    row("scaled_dot_product_attention.default", *tensors(3, 2, 8, 4), None, 0.0, True),
    row(
        "autopar.attention.default",
        real(2, 4, 8, 4),
        *tensors(2, 2, 2, 8, 4),
        torch.arange(8).expand(2, 8) < 7,
        None,
        True,
        None,
        0.5,
        5.0,
        0.0,
        to="b (g r) s d!, b g t! d!, b g t! e!, b u! -> b (g r) s e!",
    ),
    row(
        "autopar.attention.default",
        real(2, 4, 8, 4),
        *tensors(2, 2, 2, 8, 4),
        None,
        real(1, 4, 8, 8),
        True,
        3,
        0.5,
        None,
        0.0,
        to="b (g r) s d!, b g t! d!, b g t! e!, 1 (g r) s u! -> b (g r) s e!",
    ),
    row("autopar.attention.default", *tensors(3, 2, 4, 8, 4), None, flags(2, 1, 1, 8) | torch.ones(8).bool(), False, 2, 0.5, None, 0.0),
    row(
        "autopar.attention.default",
        *tensors(3, 2, 4, 8, 4),
        None,
        None,
        False,
        None,
        0.5,
        None,
        0.0,
        to="b h s d!, b h t! d!, b h t! e! -> b h s e!",
    ),
    row("conv1d.default", real(4, 6, 8), real(4, 6, 3), real(4), [1], [1], to="n i p0*, o i k0!, o -> n o p0*"),
    row("conv1d.default", real(4, 6, 12), real(4, 6, 9), real(4), [1], [4], to="n i p0*, o i k0!, o -> n o p0*"),  # halos longer than parts
    row("conv1d.default", real(4, 6, 12), real(4, 6, 3), None, [1], [4], [4]),
    row("conv1d.default", real(4, 6, 12), real(4, 6, 3), None, [2], [1], to="n i (p0* step0!), o i k0! -> n o p0*"),
    row("conv1d.default", real(4, 6, 12), real(4, 6, 4), None, [4], to="n i (p0 step0!), o i k0! -> n o p0"),
    row("conv1d.default", real(4, 6, 12), real(4, 6, 1), None, [2], to="n i (p0 step0!), o i k0! -> n o p0"),
    row("conv1d.default", real(4, 6, 12), real(4, 6, 3), None, [1], [2], to="n i x0!, o i k0! -> n o y0!"),
    row("autopar.padded_conv1d.default", real(4, 6, 12), real(6, 1, 4), real(6), 1, 3, 0, 1, 6, to="n g p0*, g 1 k0!, g -> n g p0*"),
    row("conv2d.default", real(4, 4, 5, 5), real(6, 4, 2, 2), None, [2, 2], to="n i x0! x1!, o i k0! k1! -> n o y0! y1!"),
    row(
        "conv2d.default",
        real(2, 8, 4, 4),
        real(8, 2, 3, 3),
        real(8),
        [1, 1],
        [1, 1],
        [1, 1],
        4,
        to="n (g i) p0* p1*, (g o) i k0! k1!, (g o) -> n (g o) p0* p1*",
    ),
    row(
        "conv2d.default", real(2, 4, 4, 4), real(4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4, to="n g p0* p1*, g 1 k0! k1! -> n g p0* p1*"
    ),
    row("conv3d.default", real(2, 2, 3, 3, 3), real(2, 2, 2, 2, 2)),
    row(
        "lstm.input",
        real(4, 3, 5),
        tensors(2, 2, 4, 3),
        WEIGHTS,
        True,
        2,
        0.0,
        True,
        False,
        True,
        to="b t! i!, l! b h0!, l! b h1!, w0_0! w0_1!, w1_0! w1_1!, w2_0!, w3_0!, w4_0! w4_1!, w5_0! w5_1!, w6_0!, w7_0!"
        " -> b t! o!, l! b h0!, l! b h1!",
    ),
    row(
        "gru.input",
        real(3, 4, 5),
        real(1, 4, 3),
        [*tensors(1, 9, 5), *tensors(1, 9, 3), *tensors(2, 9)],
        True,
        1,
        0.0,
        True,
        False,
        False,
        to="t! b i!, l! b h!, w0_0! w0_1!, w1_0! w1_1!, w2_0!, w3_0! -> t! b o!, l! b h!",
    ),
    *(
        row(f"rnn_{name}.input", real(4, 3, 5), real(1, 4, 3), [real(3, 5), real(3, 3), real(3), real(3)], True, 1, 0.0, True, False, True)
        for name in ("tanh", "relu")
    ),
    row(
        "lstm_cell.default",
        real(4, 5),
        tensors(2, 4, 3),
        *(real(12, 5), real(12, 3), real(12), real(12)),
        to="n i!, n h0!, n h1!, w0_0! w0_1!, w1_0! w1_1!, w2_0!, w3_0! -> n o0!, n o1!",
    ),
    row("gru_cell.default", real(4, 5), real(4, 3), real(9, 5), real(9, 3), to="n i!, n h0!, w0_0! w0_1!, w1_0! w1_1! -> n o0!"),
    *(row(f"rnn_{name}_cell.default", real(4, 5), real(4, 3), real(3, 5), real(3, 3), real(3), real(3)) for name in ("tanh", "relu")),
    row("conv1d.padding", real(4, 4, 5), real(4, 2, 4), real(4), [1], "same", [1], 2, to="n (g i) p0*, (g o) i k0!, (g o) -> n (g o) p0*"),
    row("conv2d.padding", real(4, 4, 5, 5), real(6, 4, 3, 2), None, [1, 1], "same"),
    row("conv3d.padding", real(2, 2, 3, 3, 3), real(2, 2, 2, 2, 2), None, [1, 1, 1], "valid"),
    row("conv_transpose1d.default", real(4, 6, 5), real(6, 4, 3), real(4), [2], to="n i x0!, i o k0!, o -> n o y0!"),
    row(
        "conv_transpose2d.input",
        real(4, 8, 3, 3),
        real(8, 2, 2, 2),
        real(4),
        *([2, 2], [0, 0], [1, 1], 2),
        to="n (g i) x0! x1!, (g i) o k0! k1!, (g o) -> n (g o) y0! y1!",
    ),
    row("conv_transpose3d.input", real(2, 2, 2, 2, 2), real(2, 2, 2, 2, 2)),
    row("bilinear.default", real(4, 6), real(4, 2), real(8, 6, 2), real(8), to="a left, a right, out left right, out -> a out"),
    row("bilinear.default", real(2, 4, 6), real(2, 4, 2), real(8, 6, 2)),
    row("cdist.default", real(2, 8, 3), real(6, 3), to="a points m!, references m! -> a points references"),
    row("cdist.default", real(2, 32, 3), real(2, 6, 3), 2.0, None),
    row("cdist.default", real(8, 3), real(6, 3), 1.0, to="points m!, references m! -> points references"),
]

MOVED = [
    row("view.default", real(4, 6, 2), [24, 2], to="a b c -> (a b) c"),
    row("view.default", real(2, 4, 12), [2, 4, 3, 4], to="a b (c d) -> a b c d"),
    row("view.default", real(4, 6), [6, 4], to="a! b! -> c! d!"),
    row("reshape.default", real(2, 4, 1, 6), [8, 2, 3], to="a b 1 (c d) -> (a b) c d"),
    row("reshape.default", real(6, 4), [2, 12], to="(a b) c -> a (b c)"),
    row("reshape.default", real(1, 1), [], to="1 1 -> "),
    row("_unsafe_view.default", real(4, 6), [24]),
    row("flatten.using_ints", real(4, 2, 6), 1, to="a b c -> a (b c)"),
    row("view_as.default", real(8), real(4, 2), to="(a b), a b -> a b"),
    row("reshape_as.default", real(4, 2), real(8)),
    row("ravel.default", real(4, 2)),
    row("unflatten.int", real(4, 12), 1, [3, -1], to="a (b! c) -> a b! c"),
    row("permute.default", real(2, 4, 3), [0, -1, 1], to="a b c -> a c b"),
    row("transpose.int", real(2, 4, 3), 1, 2, to="a b c -> a c b"),
    row("swapaxes.default", real(2, 4), 0, 1),
    row("swapdims.default", real(2, 4), 0, 1),
    row("t.default", real(2, 4), to="a b -> b a"),
    row("numpy_T.default", real(2, 4), to="a b -> b a"),
    row("mT.default", real(3, 2, 4), to="a b c -> a c b"),
    row("movedim.int", real(2, 4, 3), 0, -1, to="a b c -> b c a"),
    row("movedim.intlist", real(2, 4, 3), [0, 1], [2, 0], to="a b c -> b c a"),
    row("unsqueeze.default", real(2, 4), -1, to="a b -> a b 1"),
    row("squeeze.default", real(4, 1, 2), to="d0 1 d2 -> d0 d2"),
    row("squeeze.dim", real(4, 1, 2), 1),
    row("squeeze.dim", real(4, 1, 2), 0, to="d0 1 d2 -> d0 1 d2"),
    row("squeeze.dims", real(4, 1, 2), [0, 1]),
    row("expand.default", real(4, 1), [3, 4, 6], to="b 1 -> a b c"),
    row("broadcast_to.default", real(4, 1), [4, 6]),
    row("expand_as.default", real(1, 6), real(4, 6), to="1 b, a b -> a b"),
    row("select.int", real(4, 3, 2), 1, -1, to="a b! c -> a c"),
    row("unbind.int", real(4, 3), 1, to="a b! -> a, a, a"),
    row("slice.Tensor", real(4, 12), 1, 4, 12, to="a (part! o) -> a (part0! o)"),
    row("slice.Tensor", real(4, 12), -1, -6, to="a (part! o) -> a o"),
    row("slice.Tensor", real(4, 12), 1, 0, 9223372036854775807, to="a b -> a b"),
    row("slice.Tensor", real(4, 12), 1, 1, 12, 2, to="a part! -> a part0!"),
    row("slice.Tensor", real(4, 12), 1, 0, 5, to="a part! -> a part0!"),
    row("narrow.default", real(12, 2), 0, 4, 8, to="(part! o) b -> (part0! o) b"),
    row("narrow.default", real(12), 0, -4, 4),
    row("split.Tensor", real(4, 12), 4, 1, to="a (part! o) -> a o, a o, a o"),
    row("split.sizes", real(4, 16), [8, 4, 4], 1, to="a (part! o) -> a (part0! o), a o, a o"),
    row("split_with_sizes.default", real(4, 7), [3, 4], -1, to="a part! -> a part0!, a part1!"),
    row("unsafe_split.Tensor", real(4, 12), 4, 1, to="a (part! o) -> a o, a o, a o"),
    row("chunk.default", real(4, 12), 3, -1, to="a (part! o) -> a o, a o, a o"),
    row("chunk.default", real(4, 7), 2, -1, to="a part! -> a part0!, a part1!"),
    row("cat.default", [real(4, 4), real(4, 8)], -1, to="a o, a (part1! o) -> a (part! o)"),
    row("cat.default", [real(4, 4), real(3, 4)], to="part0! b, part1! b -> part! b"),
    row("concat.default", [real(4), real(4)]),
    row("cat.default", [real(4, 4), real(4, 0)], -1, to="a o, a part1! -> a o"),
    row("slice.Tensor", real(4, 6), 1, 6, 6, to="a part! -> a part0!"),
    row("select_scatter.default", real(4, 6), real(4), 1, 0, to="a b!, a -> a b!"),
    row("slice_scatter.default", real(4, 6), real(4, 5), 1, 1, 9223372036854775807, to="a b!, a placed! -> a b!"),
    row("stack.default", tensors(3, 4, 2), 1, to="a b, a b, a b -> a part! b"),
    row("pad.default", real(4, 6), [1, 2], "constant", 0.5, to="a b! -> a b_padded!"),
    row("pad.default", real(4, 6), [1, -1], "constant", None),
    row("constant_pad_nd.default", real(4, 6), [0, 1], to="a b! -> a b_padded!"),
    row("flip.default", real(4, 6), [-1], to="a b! -> a b!"),
    row("roll.default", real(4, 6), [2], [0], to="a! b -> a! b"),
    row("roll.default", real(4, 6), [2], to="a! b! -> a! b!"),
    row("repeat.default", real(4, 6), [3, 1, 2], to="a b -> times0! a (times2! b)"),
    row("tile.default", real(4, 6), [2], to="a b -> a (times1! b)"),
    row("repeat_interleave.self_int", real(2, 4, 3), 2, 1, to="a b c -> a (b times!) c"),
    row("concatenate.default", [real(4, 4), real(4, 8)], 1, to="a o, a (part1! o) -> a (part! o)"),
    row("view_as_complex.default", real(4, 6, 2), to="a b part! -> a b"),
    row("view_as_real.default", pairs(4, 6), to="a b -> a b part!"),
    row("glu.default", real(4, 12), to="a (half! b) -> a b"),
    row("glu.default", real(4, 2, 6), 1, to="a half! c -> a 1 c"),
    row("pixel_shuffle.default", real(2, 16, 4, 3), 2, to="a (channels q! r!) y x -> a channels (y q!) (x r!)"),
    row("pixel_unshuffle.default", real(2, 4, 8, 6), 2, to="a channels (y q!) (x r!) -> a (channels q! r!) y x"),
    row("pixel_shuffle.default", real(4, 4, 3), 2, to="(q! r!) y x -> 1 (y q!) (x r!)"),
    row("channel_shuffle.default", real(2, 12, 3), 3, to="n (g! channels) x0 -> n (channels g!) x0"),
    row("im2col.default", real(4, 6, 5, 4), [3, 2], [1, 1], [1, 0], [1, 2], to="n channels y! x! -> n (channels k!) l!"),
    row("im2col.default", real(6, 5, 4), [3, 2], [1, 1], [0, 0], [1, 1], to="channels y! x! -> (channels k!) l!"),
    row("col2im.default", real(4, 24, 12), [5, 4], [2, 2], [1, 1], [0, 0], [1, 1], to="n (channels k!) l! -> n channels y! x!"),
    row("unfold.default", real(4, 7), 1, 3, 2, to="a b! -> a windows! elements!"),
    row("diagonal.default", real(4, 6, 5), 1, -2, -1, to="a b! c! -> a diagonal!"),
]

TABLE = whole(8, 4, 6)
BAGS = (whole(8, 12), torch.tensor([0, 2, 2, 7]))
LOOKED_UP = [
    row("embedding.default", real(8, 6), whole(8, 2, 4), to="v h, b s -> b s h"),
    row("embedding.default", real(8, 6), whole(8, 4), 3, to="v h, i0 -> i0 h"),
    row("embedding.default", real(8, 6), whole(8, 4), -1, True, to="v! h, i0! -> i0! h"),
    row("embedding_bag.padding_idx", real(8, 6), *BAGS, False, 0, False, None, False, None),
    row("embedding_bag.padding_idx", real(8, 6), *BAGS, False, 0, False, real(12), False, 2),
    row("embedding_bag.default", real(8, 6), *BAGS, False, 0),
    row("gather.default", real(4, 6), 1, whole(6, 4, 4), to="a b_all!, a b -> a b"),
    row("gather.default", real(4, 6), 1, whole(6, 2, 4), to="a_all! b_all!, a! b -> a! b"),
    row("index_select.default", real(4, 6, 2), 1, whole(6, 4), to="a v! c, k -> a k c"),
    row("index.Tensor", real(4, 6, 2), [None, whole(6, 4, 3)], to="a b! c, i0 i1 -> a i0 i1 c"),
    row("index.Tensor", real(4, 6), [whole(4, 4, 1), whole(6, 1, 2)], to="a! b!, i0 1, 1 i1 -> i0 i1"),
    row("index.Tensor", real(4, 6, 2), [whole(4, 4), None, whole(2, 4)], to="a! b c!, i0, i0 -> i0 b"),
    row("scatter.src", real(4, 6), 1, torch.arange(3).expand(4, 3), real(4, 3), to="a b!, a b1!, a b2! -> a b!"),
    row("scatter.value", real(4, 6), 1, whole(6, 4, 3), 0.5, to="a b!, a b1! -> a b!"),
    row("scatter_add.default", real(4, 6), 1, whole(6, 4, 3), real(4, 3), to="a b!, a b1!, a b2! -> a b!"),
    row("scatter_reduce.two", real(4, 6), 1, whole(6, 4, 3), real(4, 3), "amax", to="a b!, a b1!, a b2! -> a b!"),
    row("scatter_reduce.two", real(4, 6), 0, whole(4, 3, 6), real(3, 6), "mean", include_self=False, to="a! b, a1! b, a2! b -> a! b"),
    row("scatter.reduce", real(4, 6, grad=False), 1, whole(6, 4, 3), real(4, 3, grad=False), reduce="multiply"),
    row("index_add.default", real(4, 6, 2), 1, whole(6, 3), real(4, 3, 2), alpha=2, to="a b! c, k!, a k! c -> a b! c"),
    row("index_copy.default", real(4, 6), 0, torch.tensor([2, 0]), real(2, 6), to="a! b, k!, k! b -> a! b"),
    row("index_fill.int_Scalar", real(4, 6), 1, whole(6, 3), 2.0, to="a b!, k! -> a b!"),
    row("masked_scatter.default", real(4, 6, 2), flags(4, 6, 1), real(50), to="a b c, m0! m1! m2!, s0! -> a b c"),
    row("masked_scatter.default", real(12), flags(12), real(3, 4), to="a, m0!, s0! s1! -> a"),
    row("one_hot.default", whole(5, 4, 2), 5, to="a b -> a b class!"),
    row("sort.default", real(4, 6), 0, to="a! b -> a! b, a! b"),
    row("sort.stable", real(4, 6), stable=True, dim=0, to="a! b -> a! b, a! b"),
    row("argsort.default", real(4, 6), to="a b! -> a b!"),
    row("topk.default", real(4, 6), 2, to="a b! -> a k!, a k!"),
    row("diff.default", whole(9, 4, 6), 1, -1, whole(9, 4, 1), to="a b0!, a b1! -> a b2!"),
    row("cross_entropy_loss.default", real(12, 8), labels(12, high=8), to="n v*, n -> "),
    row("cross_entropy_loss.default", real(12, 8), labels(12, high=8), None, 2),
    row("cross_entropy_loss.default", real(12, 8), labels(12, high=8), None, 0, -100, 0.1, to="n v*, n -> n"),
    row("cross_entropy_loss.default", real(4, 8, 6), labels(4, 6, high=8), None, 1, -100, 0.1, to="n v* x0, n x0 -> "),
    row("cross_entropy_loss.default", real(12, 8), labels(12, high=8), unit(8, grad=False), to="n v!, n, v! -> "),
    row("cross_entropy_loss.default", real(12, 8), unit(12, 8), to="n v!, n v! -> "),
    row("cross_entropy_loss.default", real(8), torch.tensor(3), to="v!,  -> "),
    row("nll_loss.default", real(12, 8), labels(12, high=8), unit(8, grad=False), to="n v!, n, v! -> "),
    row("nll_loss_nd.default", real(4, 8, 2), whole(8, 4, 2), None, 2, to="n v! x0, n x0 -> "),
    *(row(f"{name}_loss.default", real(4, 6), real(4, 6), to="a b, a b -> ") for name in ("mse", "l1", "smooth_l1", "huber")),
    row("mse_loss.default", real(4, 6), real(4, 6), 2),
    row("mse_loss.default", real(4, 6), real(4, 6), 0, to="a b, a b -> a b"),
    row("kl_div.default", real(4, 6), unit(4, 6), to="a b, a b -> "),
    row("kl_div.default", real(4, 6), real(4, 6), 0, log_target=True, to="a b, a b -> a b"),
    row("soft_margin_loss.default", real(4, 6), real(4, 6, grad=False).sign()),
    row("multi_margin_loss.default", real(4, 6), whole(6, 4), 1, 1, unit(6, grad=False), to="n v!, n, v! -> "),
    row("multi_margin_loss.default", real(4, 6), whole(6, 4), 1, 1, None, 2, to="n v!, n -> "),
    row("multilabel_margin_loss.default", real(4, 6), whole(6, 4, 6, low=-1), to="n v!, n v! -> "),
    row("grid_sampler.default", real(4, 2, 5, 5), unit(4, 6, 2, 2), 0, 0, False, to="n c x0! x1!, n y0 y1 xy! -> n c y0 y1"),
    row("grid_sampler.default", real(2, 2, 3, 3, 3), unit(2, 2, 2, 4, 3), 0, 1, True),
    row("binary_cross_entropy.default", unit(4, 6), unit(4, 6, grad=False), unit(6, grad=False), to="a b, a b, b -> "),
    row("binary_cross_entropy_with_logits.default", real(4), unit(4, grad=False), to="a, a -> "),
    row("max_pool1d.default", real(4, 2, 6), [2], to="a b x0! -> a b y0!"),
    row("max_pool2d.default", real(4, 2, 6, 6), [3, 3], [2, 2], [1, 1], to="a b x0! x1! -> a b y0! y1!"),
    row("avg_pool1d.default", real(4, 2, 6), [2]),
    row("avg_pool2d.default", real(2, 6, 6), [2, 2], to="a x0! x1! -> a y0! y1!"),
    row("adaptive_avg_pool1d.default", real(4, 2, 6), [2]),
    row("adaptive_avg_pool2d.default", real(4, 2, 6, 6), [1, 1]),
    *(row(f"{name}_pool3d.default", real(4, 2, 4, 4, 4), [2, 2, 2], to="a b x0! x1! x2! -> a b y0! y1! y2!") for name in ("max", "avg")),
    *(row(f"fractional_max_pool{n}d.default", real(4, 2, *[4] * n), [2] * n, [2] * n, unit(4, 2, n, grad=False)) for n in (2, 3)),
    row("adaptive_avg_pool3d.default", real(2, 2, 4, 4, 4), [1, 1, 1]),
    *(row(f"max_pool{n}d_with_indices.default", real(4, 2, *[4] * n), [2] * n) for n in (1, 2, 3)),
    *(row(f"adaptive_max_pool{n}d.default", real(4, 2, *[4] * n), [2] * n) for n in (1, 2, 3)),
    row("upsample_nearest1d.vec", real(4, 2, 3), None, [2.0]),
    row("upsample_nearest2d.vec", real(4, 2, 3, 3), None, [2.0, 2.0], to="n c x0! x1! -> n c y0! y1!"),
    row("upsample_nearest3d.vec", real(4, 2, 2, 2, 2), [4, 4, 4], None),
    row("upsample_linear1d.vec", real(4, 2, 3), [6], False, None),
    row("upsample_bilinear2d.vec", real(4, 2, 3, 3), [5, 4], True, None, to="n c x0! x1! -> n c y0! y1!"),
    row("upsample_bicubic2d.vec", real(4, 2, 3, 3), None, False, [2.0, 2.0]),
    row("upsample_trilinear3d.vec", real(4, 2, 2, 2, 2), None, False, [2.0, 2.0, 2.0]),
    row("zeros.default", [4, 6], to=" -> a b"),
    row("ones.default", [4]),
    row("full.default", [4, 6], 2.0),
    row("full.default", [], 2.0, to=" -> "),
    row("new_zeros.default", real(3, 2), [4, 6], to="other0! other1! -> a b"),
    row("new_ones.default", real(3), [4, 6]),
    row("new_full.default", real(3), [4, 6], 2.0),
    row("arange.default", 6, to=" -> a!"),
    row("arange.start", 1, 6),
    row("arange.start_step", 1, 6, 2),
    row("linspace.default", 0.0, 1.0, 5),
    row("eye.default", 4, to=" -> a! b!"),
    row("tril_indices.default", 4, 4),
    row("triu_indices.default", 4, 4, 1),
    row("scalar_tensor.default", 2.0, to=" -> "),
]

ROWS = [*POINTWISE, *REDUCED, *CONTRACTED, *MOVED, *LOOKED_UP]

# Ops that draw random numbers, or return what memory holds: no two runs are alike, so only their space is compared.
DRAWN = [
    row("dropout.default", real(4, 6), 0.5, True, to="a b -> a b"),
    row("bernoulli.default", unit(4, 6, grad=False), to="a b -> a b"),
    row("bernoulli.p", real(4, 6, grad=False), 0.3, to="a b -> a b"),
    row("rand_like.default", real(4, 6), to="a b -> a b"),
    row("randn_like.default", real(4, 6), to="a b -> a b"),
    row("rand.default", [4, 6], to=" -> a b"),
    row("randn.default", [4, 6], to=" -> a b"),
    row("empty_like.default", real(4, 6), to="a b -> a b"),
    row("empty.memory_format", [4, 6], to=" -> a b"),
    row("new_empty.default", real(3, 2), [4, 6], to="other0! other1! -> a b"),
    *(row(f"{name}.default", real(4, 6), to="a b -> a b") for name in ("exponential", "uniform", "normal_functional")),
    *(row(f"{name}.default", unit(4, 6)) for name in ("log_normal", "cauchy", "random", "poisson")),
    row("geometric.default", real(4, 6), 0.5),
    row("random.from", real(4, 6), 2, 9),
    row("random.to", real(4, 6), 9),
    row("randint_like.default", real(4, 6), 9),
    row("randint_like.low_dtype", real(4, 6), 2, 9),
    row("randint.default", 9, [4, 6], to=" -> a b"),
    row("randint.low", 2, 9, [4, 6], to=" -> a b"),
    row("randperm.default", 6, to=" -> a!"),
    row("multinomial.default", unit(4, 6, grad=False), 3, to="a v! -> a k!"),
    row("rrelu.default", real(4, 6), 0.1, 0.3, True, to="a b -> a b"),
]


def space_of(case: Row) -> tuple[Op, Space, list[torch.Tensor]]:
    op, operands = trace(case.target, *case.args, **case.kwargs)
    found = rule(op, describe(operands))
    assert found is not None
    return op, found, operands


@pytest.mark.parametrize("case", [*ROWS, *DRAWN], ids=lambda case: case.target)
def test_space(case: Row) -> None:
    if case.expected:
        assert str(space_of(case)[1]) == case.expected


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.target)
def test_oracle(case: Row) -> None:
    op, found, operands = space_of(case)
    compared = check_space(op, found, operands, unused=(1, 2, 3) if "embedding_bag" in case.target else ())
    assert compared or all(loop.size % 2 and loop.size % 3 for loop in found.splittable)


def test_every_rule_is_in_the_table() -> None:
    chunked = {chunked_loss.TARGET}  # no operator of torch; tests/test_chunked_loss.py checks it
    assert {case.target for case in [*ROWS, *DRAWN]} | set(FUNCTIONS) | chunked == set(RULES)


# Autograd functions of transformers, which aren't operators of torch.
FUNCTIONS = {
    "autograd_function.transformers_models_bloom_modeling_bloom_GeLUFunction.T": GeLUFunction,
    "autograd_function.transformers_models_recurrent_gemma_modeling_recurrent_gemma_SqrtBoundDerivative.T": SqrtBoundDerivative,
}


@pytest.mark.parametrize("target", FUNCTIONS)
def test_oracle_of_autograd_functions(target: str) -> None:
    function = FUNCTIONS[target].apply
    op, operands = trace_function(function, target, [unit(4, 6)], {})
    found = rule(op, describe(operands))
    assert found is not None
    assert check_space(op, found, operands, function)


def wrong(target: str, args: tuple[Any, ...], text: str, **options: Any) -> Any:
    return pytest.param(target, args, text, options, id=f"{target}: {text}")


@pytest.mark.parametrize(
    ("target", "args", "text", "options"),
    [
        wrong("aten.softmax.int", (real(4, 6), 1), "a b -> a b"),
        wrong("aten.layer_norm.default", (real(4, 6), [6]), "a b -> a b"),
        wrong("aten.linear.default", (real(4, 6), real(8, 6), real(8)), "n i, o i, o -> n o"),
        wrong("aten.mean.default", (real(4, 6),), "a b -> "),
        wrong("aten.amax.default", (real(4, 6), [1]), "a b -> a"),
        wrong("aten.add.Tensor", (real(4, 6), 1.0), "a b -> a b", linear=[0]),
        wrong("aten.gelu.default", (real(4, 6),), "a b -> a b", linear=[0]),
        wrong("aten.cumsum.default", (real(4, 6), 1), "a b -> a b"),
        wrong("aten.reshape.default", (real(4, 6), [6, 4]), "a b -> b a", shape_arg=1),
        wrong("aten.cat.default", ([real(4), real(8)],), "a, (a q!) -> (a p!)", sizes={"a": 4, "q": 2, "p": 3}),
        wrong("aten.cross_entropy_loss.default", (real(12, 8), labels(12, high=8)), "n v!, n -> "),
        wrong("aten.embedding.default", (real(8, 6), whole(8, 4)), "v h, n -> n h"),
        wrong("aten.batch_norm.default", (real(4, 6), None, None, None, None, True, 0.1, 1e-5, False), "n c -> n c"),
        wrong("aten.scaled_dot_product_attention.default", (*tensors(3, 2, 8, 4), None, 0.0, True), "b s d!, b t! d!, b t! e! -> b s e!"),
    ],
)
def test_the_oracle_refuses_wrong_rules(target: str, args: tuple[Any, ...], text: str, options: dict[str, Any]) -> None:
    op, operands = trace(target, *args)
    found = parse(text, [tuple(x.shape) for x in operands], [result.shape for result in op.results], **options)
    with pytest.raises(VerificationError, match=target):
        check_space(op, found, operands)


def test_the_oracle_refuses_a_sum_that_is_called_free() -> None:
    op, found, operands = space_of(row("linear.default", real(4, 6), real(8, 6)))
    loops = {**found.loops, "i": Loop("i", 6)}
    with pytest.raises(VerificationError, match="split i over x=2"):
        check_space(op, replace(found, loops=loops), operands)


def test_refine_keeps_the_loops_that_both_shapes_share() -> None:
    for before, after in itertools.permutations([(4, 6), (24,), (2, 12), (2, 2, 6), (8, 3), (1, 4, 1, 6)], 2):
        left, right, sizes = refine(before, after)
        made = parse(f"{' '.join(left)} -> {' '.join(right)}", [before], [after], sizes=sizes)
        assert made.points() == 24 or made.splittable == ()


def test_a_mask_as_index_has_no_rule() -> None:
    op, operands = trace("aten.index.Tensor", real(4, 6), [torch.tensor([True, False, True, True])])
    assert rule(op, describe(operands)) is None
    assert rule(Op("x", op.kind, "aten.unknown.default", (), ()), ()) is None


def test_every_kernel_of_a_rule_exists() -> None:
    named = {found.kernel for case in [*ROWS, *DRAWN] if (found := space_of(case)[1]).kernel is not None}
    assert named
    assert all(callable(getattr(kernels, name)) for name in named)


# Facts: what a rule states beside the loops, as far as running the op, or the tables of kernels, can tell.

EVERY = [*ROWS, *DRAWN]


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.target)
def test_ops_write_to_what_their_rules_say(case: Row) -> None:
    op, found, operands = space_of(case)
    function: Any = operator.attrgetter(case.target)(torch.ops)
    given = [x.detach().clone() for x in operands]
    arguments, named = (
        torch.utils._pytree.tree_map(lambda x: given[x.index] if isinstance(x, Operand) else x, y) for y in (op.args, op.kwargs)
    )
    function(*arguments, **named)
    changed = {index for index, (x, before) in enumerate(zip(given, operands, strict=True)) if not torch.equal(x, before)}
    assert changed == found.facts.writes
    # The operator's own schema says so of most that write; of a batch norm it says nothing.
    for position, argument in enumerate(function._schema.arguments):
        value = op.args[position] if position < len(op.args) else op.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Operand):
            assert value.index in found.facts.writes


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.target)
def test_facts_name_operands_and_loops_that_there_are(case: Row) -> None:
    _, found, operands = space_of(case)
    facts = found.facts
    assert all(operands[index].is_floating_point() for index in facts.weights)
    assert len(set(facts.weights)) == len(facts.weights) < max(2, len(operands))
    kernel_loops = {loop.name for loop in found.loops.values() if loop.kind is LoopKind.KERNEL or loop.joins}
    assert kernel_loops == {name for exchange in facts.exchanges for name in exchange.split}
    assert facts.coupled <= found.kernel_loops - kernel_loops
    for exchange in facts.exchanges:
        assert exchange.collective in collective.KINDS
        assert exchange.forward + exchange.backward > 0
        assert exchange.itemsize > 0
        # What stays whole is on every rank; nothing of it need be sent, but to neighbours that have other parts of another dim.
        assert exchange.is_between_neighbours or all(
            found.loops[name].kind is not LoopKind.WHOLE for name in (*exchange.split, *exchange.loops)
        )
        # Of a halo it is known how long it is; a ring may send whole parts.
        assert exchange.collective == "ring" or (exchange.halo is not None) == (exchange.collective == "halo")
    if (mean := facts.target_mean) is not None:
        assert not operands[mean.target].is_floating_point()
        assert mean.weight is None or operands[mean.weight].shape == (found.loops["v"].size,)
        assert found.kernel is not None
        assert "counted" in inspect.signature(getattr(kernels, found.kernel)).parameters


def test_weights_are_named_where_their_gradients_can_wait() -> None:
    named = {case.target for case in EVERY if space_of(case)[1].facts.weights}
    assert named | set(convolution.FACTS) == set(DEFERRABLE)
    op, operands = trace("aten.conv1d.default", real(4, 7), real(6, 4, 3), real(6))
    assert rule(op, describe(operands)) is None
    assert facts_of(op, None).weights == (1, 2)


def test_a_loss_that_counts_its_targets_says_so() -> None:
    def mean_of(*args: Any) -> TargetMean | None:
        return space_of(row("cross_entropy_loss.default", *args))[1].facts.target_mean

    logits, target, weight = real(12, 8), whole(8, 12), unit(8, grad=False)
    assert mean_of(logits, target) == TargetMean(1, None, -100)
    assert mean_of(logits, target, weight, 1, 3) == TargetMean(1, 2, 3)
    assert mean_of(logits, target, None, 2) is None  # a sum
    assert mean_of(logits, unit(12, 8)) is None  # probabilities of classes: every token counts


def test_softmaxes_add_up_to_one() -> None:
    marked = [case for case in EVERY if space_of(case)[1].facts.softmax]
    assert {case.target.split(".")[1].strip("_") for case in marked} == {"softmax", "log_softmax"}
    for case in marked:
        _, found, _ = space_of(case)
        result = operator.attrgetter(case.target)(torch.ops)(*case.args)
        along = [dim for dim, (name,) in enumerate(found.results[0]) if found.loops[name].kind is LoopKind.WHOLE]
        total = (result.exp() if "log" in case.target else result).sum(along)
        assert torch.allclose(total, torch.ones_like(total))


def test_heads_and_vocabularies_are_named() -> None:
    named: dict[str, set[str]] = {}
    for case in EVERY:
        for loop, meaning in space_of(case)[1].facts.meanings.items():
            named.setdefault(f"{case.target.split('.')[1]} {meaning.value}", set()).add(loop)
    assert named == {
        "scaled_dot_product_attention heads": {"h", "g", "r"},
        "attention heads": {"h", "g", "r"},
        "embedding vocabulary": {"v"},
        "cross_entropy_loss vocabulary": {"v"},
        "nll_loss vocabulary": {"v"},
        "nll_loss_nd vocabulary": {"v"},
    }


def test_packages_after_the_rules_know_no_op_by_name() -> None:
    """What is decided by an op's name, or by its kernel's, is decided in its rule."""
    root = Path(autopar.__file__).parent
    for package in ("structure", "costs", "plans", "search", "report", "rewrite"):
        for path in (root / package).rglob("*.py"):
            named = re.findall(r".*\baten\b.*|.*\bkernel (?:==|!=|in|not in) .*", path.read_text(encoding="utf-8"))
            assert not named, path


def test_facts_about_loops_that_an_op_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="facts name loops h, which the op doesn't have"):
        parse("b s -> b s", [(2, 3)], [(2, 3)], facts=Facts(meanings={"h": Meaning.HEADS}))


def drop_on(mesh: Mesh, splits: dict[str, tuple[str, ...]]) -> list[torch.Tensor]:
    def run(rank: int) -> torch.Tensor:
        with rng.isolated(3):
            return kernels.dropout(torch.ones(4000), 0.25, True, splits=splits)

    return threads.run(mesh, run)


def test_dropout_differs_between_shards_and_agrees_between_replicas() -> None:
    mesh = Mesh(("x", "y"), (2, 2))
    first, second, third, fourth = drop_on(mesh, {"a": ("x",)})
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)
    kept = torch.cat([first, third]) != 0
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    # Independent masks agree on 0.75**2 + 0.25**2 of the elements.
    assert abs(((first != 0) == (third != 0)).double().mean().item() - 0.625) < 0.04
    assert len({tuple(mask.tolist()) for mask in drop_on(mesh, {"a": ("x",), "b": ("y",)})}) == 4
    assert len({tuple(mask.tolist()) for mask in drop_on(mesh, {})}) == 1


def test_random_numbers_repeat_with_the_default_generator_and_leave_it_usable() -> None:
    def draw() -> torch.Tensor:
        return kernels.rand([5], splits={})

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


DROPPING = [
    row("lstm.input", real(4, 3, 5), tensors(2, 2, 4, 3), WEIGHTS, True, 2, 0.5, True, False, True),
    row("rnn_tanh.input", real(4, 3, 5), real(2, 4, 3), RNN_WEIGHTS, True, 2, 0.5, True, False, True),
    row("scaled_dot_product_attention.default", *tensors(3, 2, 4, 8, 4), None, 0.5, True),
    row("autopar.attention.default", *tensors(3, 2, 4, 8, 4), None, None, True, None, 0.5, None, 0.5),
]


@pytest.mark.parametrize("dropped", DROPPING, ids=lambda case: case.target)
def test_ops_that_drop_inside_draw_from_streams(dropped: Row) -> None:
    op, found, _ = space_of(dropped)
    assert found.random
    assert set(found.kernel_loops) == {loop.name for loop in found.splittable}
    function = operator.attrgetter(dropped.target)(torch.ops)
    kernel = partial(kernels.draw, function) if found.kernel is None else getattr(kernels, found.kernel)

    def run(rank: int) -> torch.Tensor:
        with rng.isolated(3):
            result = kernel(*dropped.args, splits={"b": ("x",)})
        return (result if isinstance(result, torch.Tensor) else result[0]).detach()

    first, second, third, _ = threads.run(Mesh(("x", "y"), (2, 2)), run)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert op.results[0].shape == tuple(first.shape)


def test_distances_of_parts_are_computed_as_those_of_the_whole() -> None:
    """Of more than 25 points torch takes a product of matrices, whose rounding shows where points coincide; parts have fewer."""
    points = real(32, 3, grad=False)
    parts = threads.run(Mesh(("x",), (2,)), lambda rank: kernels.cdist(points.chunk(2)[rank], points[:8], splits={"points": ("x",)}))
    by_product, directly = (torch.ops.aten.cdist.default(points[:16], points[:8], 2.0, mode) for mode in (1, 2))
    assert torch.equal(parts[0], by_product)
    assert not torch.equal(parts[0], directly)


def test_half_precision_cross_entropy_adds_in_single_precision() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(16, 64).to(torch.bfloat16), torch.randint(64, (16,))
    expected = torch.nn.functional.cross_entropy(logits.float(), target)

    def run(rank: int) -> torch.Tensor:
        return kernels.cross_entropy(logits.chunk(4, 1)[rank], target, splits={"v": ("x",)})

    for found in threads.run(Mesh(("x",), (4,)), run):
        assert abs(found.float() - expected) < 0.02


def test_flops_are_those_of_the_textbook() -> None:
    def flops(target: str, *args: Any, **kwargs: Any) -> float:
        found = space_of(row(target, *args, **kwargs))[1]
        return found.flops * found.points()

    assert flops("linear.default", real(2, 4, 6), real(8, 6)) == 2 * 2 * 4 * 6 * 8
    attended = flops("scaled_dot_product_attention.default", real(2, 4, 8, 3), real(2, 2, 6, 3), real(2, 2, 6, 5), enable_gqa=True)
    assert attended == pytest.approx(2 * 2 * 4 * 8 * 6 * (3 + 5))
    convolved = flops("conv2d.default", real(2, 8, 4, 4), real(8, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], 4)
    assert convolved == pytest.approx(2 * 2 * 8 * 4 * 4 * 2 * 3 * 3)


@pytest.mark.parametrize("name", ZOO)
def test_every_op_of_real_models_has_a_rule(name: str) -> None:
    graph = capture(*ZOO[name]()).graph
    calls = graph.of_kind(OpKind.CALL)
    assert calls
    assert [op.target for op in calls if rule(op, graph.operand_tensors(op)) is None] == []
