"""What a program, a mesh and a layout are: frozen data, and arithmetic on it. Nothing of torch.

Comes in: a captured program (`autopar.capture` builds the `Graph`) and the text of rules. Goes out: the types that every other package
uses. The one idea: an op is a nest of named loops, splitting a loop over a mesh axis says what every tensor of the op must look like on
that axis, and where two ops disagree about a tensor a table says which collective goes between them.

Modules, in reading order: ``precision``, ``graph``, ``facts``, ``space``, ``layout``, ``reshard``.
"""

from autopar.ir.facts import Exchange, Facts, Family, Meaning, MicrobatchRefusal, TargetMean, Workspace
from autopar.ir.graph import ITEMSIZE, Graph, Op, Operand, OpKind, Tensor, Value, freeze
from autopar.ir.layout import (
    MICROBATCH,
    PARTIAL,
    PASS_PARTIAL,
    PIPELINE,
    REPLICATE,
    REPLICATE_PARTIAL_GRAD,
    AxisPlacement,
    Layout,
    Mesh,
    Placement,
    Split,
    State,
    StateKind,
    fits,
    format_layout,
    format_placement,
    is_legal,
    local_outer,
    local_shape,
    operand_layout,
    outer_when_cut,
    parse_layout,
    parse_placement,
    program_layout,
    result_layout,
    shard,
    with_pipeline,
)
from autopar.ir.precision import AS_MODEL, Precision, StorageDtypes
from autopar.ir.precision import HELP as PRECISION_HELP
from autopar.ir.reshard import Collective, ReshardStep, Route, RouteStep, journey, route
from autopar.ir.space import Dims, LoopKind, Space, parse

__all__ = [
    "AS_MODEL",
    "ITEMSIZE",
    "MICROBATCH",
    "PARTIAL",
    "PASS_PARTIAL",
    "PIPELINE",
    "PRECISION_HELP",
    "REPLICATE",
    "REPLICATE_PARTIAL_GRAD",
    "AxisPlacement",
    "Collective",
    "Dims",
    "Exchange",
    "Facts",
    "Family",
    "Graph",
    "Layout",
    "LoopKind",
    "Meaning",
    "Mesh",
    "MicrobatchRefusal",
    "Op",
    "OpKind",
    "Operand",
    "Placement",
    "Precision",
    "ReshardStep",
    "Route",
    "RouteStep",
    "Space",
    "Split",
    "State",
    "StateKind",
    "StorageDtypes",
    "TargetMean",
    "Tensor",
    "Value",
    "Workspace",
    "fits",
    "format_layout",
    "format_placement",
    "freeze",
    "is_legal",
    "journey",
    "local_outer",
    "local_shape",
    "operand_layout",
    "outer_when_cut",
    "parse",
    "parse_layout",
    "parse_placement",
    "program_layout",
    "result_layout",
    "route",
    "shard",
    "with_pipeline",
]
