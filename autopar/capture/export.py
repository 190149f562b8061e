"""From a module and example inputs to one flat graph, twice: as an fx graph to rewrite, and as an `ir.Graph` to plan with.

Comes in: a user's module and an example call. Goes out: `Captured`. The module is exported with fake tensors in place of its parameters,
buffers and inputs: nothing is computed, a module on the meta device is captured like any other, and afterwards the module is as it was.
"""

from __future__ import annotations

import hashlib
import io
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from autopar import ir
from autopar.capture.attributes import ModelAttributes
from autopar.capture.autocast import state_casts, weights_cached
from autopar.capture.calls import CallSpec, ResultSpec, find_problem, read_call
from autopar.capture.decompose import decompose
from autopar.capture.errors import check_graph, explain, failures_unlogged, refuse_wrapped
from autopar.capture.functionalize import functionalize
from autopar.capture.functions import calls_remembered, place_hooks, restore_functions
from autopar.capture.graph_of import graph_of
from autopar.capture.masks import prove_masks
from autopar.capture.normalize import HANDLED, drop_assertions, drop_detach, drop_unused, inline_regions, simplify, slice_constant_indices
from autopar.capture.order import order_independent_calls
from autopar.capture.padding import merge_padding
from autopar.capture.precision import cast_leaf, fold_casts, insert_casts, read_dtypes, storage_dtypes
from autopar.capture.record import record
from autopar.capture.settings import Settings
from autopar.capture.torch_modules import readable_modules
from autopar.capture.transformers import adapted
from autopar.capture.watch import watched
from autopar.errors import AutoparError, CaptureError
from autopar.garbage import no_garbage_collection
from autopar.ops import AUTOCAST_OFF, Autocast

aten = torch.ops.aten


_ONE_AT_A_TIME = threading.RLock()
"""Held while a model is captured, since an export replaces parts of torch and of the model for all threads."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A model as one graph.

    Attributes:
        fx: the fx graph. Its placeholders are the parameters, the buffers, then the tensors of the call; its output is a flat tuple of
            the tensors that the model returns, then the new values of `mutated_buffers`. Factory calls (``aten.zeros``) name no device;
            to run them elsewhere than on the CPU, one must be added.
        graph: the same graph for planning; its ops have the names of the fx nodes.
        parameters, buffers: names in the model, in the order of placeholders; a tied tensor occurs under one name.
        aliases: other name of a tied parameter or buffer -> the name under which it occurs.
        constants: name -> value of tensors that the forward makes from numbers or reads as plain attributes; they are among `buffers`.
        mutated_buffers: names of the buffers whose new values follow the user's outputs. The running statistics of a batch norm aren't
            among them, as its operator updates them.
        notes: lines on what was dropped or changed, for the plan's report.
        settings: module and attribute -> number or name that the forward read of the model, and that is part of the graph.
        precision: with which it was captured.
        call: the structure of the call.
        results: the structure of what the model returns.
    """

    fx: fx.GraphModule
    graph: ir.Graph
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    aliases: Mapping[str, str]
    constants: Mapping[str, Tensor]
    mutated_buffers: tuple[str, ...]
    notes: tuple[str, ...]
    settings: Settings
    precision: ir.Precision
    call: CallSpec
    results: ResultSpec

    @property
    def inputs(self) -> tuple[str, ...]:
        """The user's names of the flat tensor inputs, in placeholder order."""
        return self.call.inputs

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The flat tensor inputs of a call. Raises InputError that names every argument which differs from the captured call."""
        return self.call.bind(args, kwargs)

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """What the model would return, from the flat outputs; values of `mutated_buffers` after them are ignored."""
        return self.results.unflatten(outputs)


def refuse_tensors(model: nn.Module) -> None:
    """Raises CaptureError for parameters and buffers that aren't plain tensors of known sizes."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if problem := find_problem(tensor):
            raise CaptureError(f"{name!r} of the model {problem}")


@no_garbage_collection()
def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    training: bool | None = None,
    precision: ir.Precision = ir.AS_MODEL,
) -> Captured:
    """Capture a module for the sizes of an example call, and for the state of ``torch.autocast`` in which this is called.

    Args:
        model: a model on any device, also the meta device; it isn't changed.
        example_inputs: a call of the model: a mapping of keyword arguments, a tuple of positional ones, or a pair of both. Of tensors only
            shapes and dtypes are read.
        training: whether to capture the training or the evaluation behaviour; by default the model's current mode.
        precision: in which dtypes the program reads parameters and inputs; by default in those that they have.

    Raises:
        CaptureError: for a model that can't be one graph, with the line at fault.
        InputError: for arguments that the model's forward doesn't take, and for parameters that aren't stored as `precision` says.
    """
    spec, leaves = read_call(model.forward, example_inputs)
    refuse_tensors(model)
    device = _device(model, leaves)
    refuse_wrapped(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = [_fake(leaf, mode, device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    fakes = [_fake(cast_leaf(leaf, precision), mode, device) if isinstance(leaf, Tensor) else leaf for leaf in given]
    args, kwargs = pytree.tree_unflatten(fakes, spec.in_spec)
    dtypes = read_dtypes(model, precision)
    notes: list[str] = []
    with _ONE_AT_A_TIME, calls_remembered():
        originals = _Originals.of(model)
        attributes = ModelAttributes.of(model)
        try:
            with (
                _set_training(model, training),
                _faked(model, mode, device, dtypes),
                adapted(model, kwargs, notes) as kwargs,
                watched(model, attributes, notes),
                readable_modules(),
            ):
                program = _export(model, args, kwargs)
                _check_constants(program)
                if changed := attributes.find_changed():
                    attributes.refuse_changes(_run_again(model, args, kwargs, mode, attributes, changed))
        finally:
            attributes.restore()
        attributes.raise_problems()
        notes += attributes.notes
        autocast = Autocast.now()
        with AUTOCAST_OFF.active():
            return _assemble(program, originals, spec, given, precision, mode, device, notes, attributes.find_settings(), autocast)


def _run_again(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mode: FakeTensorMode,
    attributes: ModelAttributes,
    changed: frozenset[str],
) -> frozenset[str]:
    """Those of the `changed` attributes that another run of the forward changes again; all of them if it can't run without an export."""
    attributes.continue_run()
    try:
        with warnings.catch_warnings(), mode, torch.enable_grad():
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
    except Exception:
        return changed
    return changed & attributes.find_changed()


def _device(model: nn.Module, leaves: Sequence[Any]) -> torch.device:
    """The model's device; a model on the meta device is captured as if it were on the CPU, under autocast where its inputs are.

    Raises CaptureError under autocast for a device where neither parameters nor inputs are, as each kind of device casts other operators.
    """
    first = next(iter((*model.parameters(), *model.buffers())), None)
    if first is not None and not first.is_meta:
        return first.device
    kinds = [kind for kind, _ in Autocast.now().dtypes]
    devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type in kinds]
    if kinds and not devices and "cpu" not in kinds:
        raise CaptureError(
            f"autocast is on for {kinds[0]}, and neither the model's parameters nor the example inputs are there, so which operators it"
            f" casts isn't known: give example inputs on {kinds[0]}"
        )
    return devices[0] if devices else torch.device("cpu")


def _fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)
    return made.requires_grad_(tensor.requires_grad)


@contextmanager
def _set_training(model: nn.Module, training: bool | None) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        if training is not None:
            model.train(training)
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def _faked(model: nn.Module, mode: FakeTensorMode, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside, the model has fake tensors in place of parameters and buffers, of these `dtypes` by name; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    before: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for path, module in list(model.named_modules()):
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = _fake(tensor.detach(), mode, device, dtypes.get(f"{path}.{name}".lstrip(".")))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                before.append((module, name, tensor))
                # By setattr, not through the dict: recurrent modules have a second list of their weights, which this updates.
                setattr(module, name, made[id(tensor)])
        yield
    finally:
        for module, name, tensor in before:
            setattr(module, name, tensor)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Export the model; what torch prints and logs about a failure is dropped, since `explain` raises it."""
    try:
        with failures_unlogged(), warnings.catch_warnings(), redirect_stderr(io.StringIO()) as said, torch.enable_grad(), weights_cached():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False)
        if said.getvalue():
            sys.stderr.write(said.getvalue())
        return program
    except (AutoparError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a forward may exit, or raise what is no Exception
        raise explain(error) from error


@dataclass(frozen=True, slots=True)
class _Originals:
    """The model's own tensors by name; and other names of tied tensors -> the name that each has in the graph.

    `attributes` are the names of tensors that are neither parameters nor buffers.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    attributes: frozenset[str]

    @staticmethod
    def of(model: nn.Module) -> _Originals:
        first_names: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            if first_names.setdefault(id(tensor), name) != name:
                aliases[name] = first_names[id(tensor)]
        attributes = frozenset(
            f"{path}.{name}" if path else name
            for path, module in model.named_modules(remove_duplicate=False)
            for name, value in module.__dict__.items()
            if isinstance(value, Tensor)
        )
        return _Originals(dict(model.named_parameters()), dict(model.named_buffers()), aliases, attributes)


@dataclass(slots=True)
class _Placeholders:
    """The placeholders of an exported program by kind: placeholder -> the user's name, in the order of the captured graph."""

    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)  # placeholder -> value; they are among the buffers
    scalars: dict[str, Tensor] = field(default_factory=dict)  # placeholder -> value of constants that become calls
    plain: dict[str, str] = field(default_factory=dict)  # placeholder of a constant, also of a scalar -> its name
    merged: dict[str, str] = field(default_factory=dict)  # placeholder of a tied tensor -> the one that stands for it


def _read_placeholders(graph: fx.Graph, program: ExportedProgram, originals: _Originals, spec: CallSpec) -> _Placeholders:
    """Sort the placeholders of `graph`, which are those of the program in order."""
    placeholders = _Placeholders()
    names = iter(spec.inputs)
    placeholder_of: dict[str, str] = {}
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    for node, given in zip(nodes, program.graph_signature.input_specs, strict=True):
        target = str(given.target)
        if given.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = originals.aliases.get(target, target)
            if name in placeholder_of:
                placeholders.merged[node.name] = placeholder_of[name]
                continue
            placeholder_of[name] = node.name
            (placeholders.parameters if given.kind is InputKind.PARAMETER else placeholders.buffers)[node.name] = name
        elif given.kind is InputKind.CONSTANT_TENSOR:
            value = program.constants[target]
            # A number in the code never changes; a tensor that is the model's attribute may be given other values between calls.
            if value.ndim == 0 and not value.is_meta and target not in originals.attributes:
                placeholders.plain[node.name] = target
                placeholders.scalars[node.name] = value
                continue
            if not value.is_meta and target not in originals.attributes:
                target = _name_constant(value)
                if target in placeholder_of:
                    placeholders.merged[node.name] = placeholder_of[target]
                    continue
                node.name = placeholder_of[target] = f"c_{target}"
            placeholders.plain[node.name] = placeholders.buffers[node.name] = target
            placeholders.constants[node.name] = value
        elif given.kind is InputKind.USER_INPUT and not isinstance(given.arg, ConstantArgument):
            placeholders.inputs[node.name] = next(names)
        elif given.kind is not InputKind.USER_INPUT:
            kind = given.kind.name.lower().replace("_", " ")
            raise CaptureError(
                f"the forward uses {given.target!r}, a {kind}, which can't be part of a graph. If it is a torch.Generator,"
                " draw from torch's default one"
            )
    # Modules may register their buffers in an order that differs from process to process (see `autopar.capture.order`).
    place = {module: number for number, module in enumerate(dict.fromkeys(name.rpartition(".")[0] for name in originals.buffers))}
    placeholders.buffers = dict(sorted(placeholders.buffers.items(), key=lambda item: _place_of_buffer(item[1], place)))
    return placeholders


def _place_of_buffer(name: str, module_numbers: Mapping[str, int]) -> tuple[int, str]:
    """Key to sort buffers by: their modules in the model's order, then the constants; within a module by name."""
    return module_numbers.get(name.rpartition(".")[0], len(module_numbers)), name


def _name_constant(value: Tensor) -> str:
    """A name for a tensor that the forward makes of numbers, by its contents, since torch numbers them in the order of the calls."""
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"constant_{hashlib.sha256(f'{value.dtype}{tuple(value.shape)}'.encode() + content).hexdigest()[:16]}"


def _unwritable(placeholders: _Placeholders) -> dict[str, str]:
    """Name of a node that the forward mustn't write to -> what it is, and what to do instead."""
    remedy = "; make it a buffer, or do the update outside the forward"
    return {
        **{name: f"the parameter {target}{remedy}" for name, target in placeholders.parameters.items()},
        **{name: f"the plain tensor {target}{remedy}" for name, target in placeholders.plain.items()},
    }


def _check_constants(program: ExportedProgram) -> None:
    """Raise CaptureError where what the export takes for a constant depends on the call or is to be trained."""
    for given in program.graph_signature.input_specs:
        if given.kind is not InputKind.CONSTANT_TENSOR:
            continue
        name = str(given.target)
        value = program.constants[name]
        if isinstance(value, FakeTensor):
            raise CaptureError(
                f"the forward makes a tensor ({name}) that depends on the call in a way that the export can't follow, such as x.data or"
                " torch.autograd.grad: use x.detach(), or compute it outside the forward"
            )
        if value.requires_grad:
            raise CaptureError(f"the model's tensor {name!r} requires a gradient and is no parameter: make it an nn.Parameter")


def _order_placeholders(graph: fx.Graph, placeholders: _Placeholders) -> fx.Graph:
    """The graph with parameters first, then buffers, then inputs; tied tensors once, and constant scalars as calls."""
    new = fx.Graph()
    old = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    env: dict[fx.Node, fx.Node] = {}
    for name in (*placeholders.parameters, *placeholders.buffers, *placeholders.inputs):
        env[old[name]] = new.node_copy(old[name])
    for name, target in placeholders.merged.items():
        env[old[name]] = env[old[target]]
    for name, value in placeholders.scalars.items():
        made = new.create_node("call_function", aten.full.default, ([], value.item()), {"dtype": value.dtype}, name=name)
        made.meta["val"] = old[name].meta["val"]
        env[old[name]] = made
    for node in graph.nodes:
        if node.op != "placeholder":
            env[node] = new.node_copy(node, env.__getitem__)
    return new


def _read_results(graph: fx.Graph, program: ExportedProgram) -> tuple[list[fx.Node], ResultSpec]:
    """The output nodes that are tensors, and the structure of tensors and constants that the model returns."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    tensors: list[fx.Node] = []
    constants: list[tuple[bool, Any]] = []
    for value in output.args[0]:
        is_tensor = isinstance(value, fx.Node)
        constants.append((not is_tensor, None if is_tensor else value))
        if is_tensor:
            tensors.append(value)
    spec = program.call_spec.out_spec
    assert spec is not None, "a program that torch exported knows its output"
    return tensors, ResultSpec(spec, tuple(constants))


def _assemble(
    program: ExportedProgram,
    originals: _Originals,
    spec: CallSpec,
    leaves: Sequence[Any],
    precision: ir.Precision,
    mode: FakeTensorMode,
    device: torch.device,
    notes: list[str],
    settings: Settings,
    autocast: Autocast,
) -> Captured:
    """Run the passes over an exported program, in order, and put the results together."""
    graph = inline_regions(program.graph_module, autocast)
    drop_assertions(graph, notes)
    check_graph(graph)
    graph = restore_functions(graph)
    placeholders = _read_placeholders(graph, program, originals, spec)
    graph = _order_placeholders(graph, placeholders)
    parameters = {name: originals.parameters[target] for name, target in placeholders.parameters.items()}
    tensor_leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    differentiable = {name for name, tensor in parameters.items() if tensor.requires_grad}
    differentiable |= {name for name, leaf in zip(placeholders.inputs, tensor_leaves, strict=True) if leaf.requires_grad}
    graph = state_casts(graph, mode, differentiable, notes)
    graph, written = functionalize(graph, _unwritable(placeholders), differentiable)
    tensors, results = _read_results(graph, program)
    mutated = [name for name in placeholders.buffers if name in written]
    notes.extend(
        f"the forward writes to the input {placeholders.inputs[name]}: the caller's tensor stays as it was"
        for name in placeholders.inputs
        if name in written
    )
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    output.args = ((*tensors, *(written[name] for name in mutated)),)
    place_hooks(graph)
    order_independent_calls(graph)
    graph = simplify(decompose(graph, mode, HANDLED), device)
    fixed = {name: value for name, value in placeholders.constants.items() if placeholders.buffers[name] not in originals.attributes}
    graph = slice_constant_indices(graph, fixed)
    graph = merge_padding(graph)
    graph = prove_masks(graph, _known_values(placeholders, originals, written), notes)
    insert_casts(graph, precision, dict(zip(placeholders.inputs, tensor_leaves, strict=True)), len(tensors))
    graph = drop_unused(graph, placeholders.constants)
    fold_casts(graph, list(placeholders.parameters))
    remaining = {node.name for node in graph.nodes if node.op == "placeholder"}
    buffers = {name: target for name, target in placeholders.buffers.items() if name in remaining}
    recorded = record(graph, mode, device, frozenset(differentiable))
    graph = drop_detach(graph, recorded)
    kinds = {
        **dict.fromkeys(placeholders.parameters, ir.OpKind.PARAMETER),
        **dict.fromkeys(buffers, ir.OpKind.BUFFER),
        **dict.fromkeys(placeholders.inputs, ir.OpKind.INPUT),
    }
    names = {**placeholders.parameters, **buffers, **placeholders.inputs}
    updates = tuple(placeholders.buffers[name] for name in mutated)
    module = fx.GraphModule(nn.Module(), graph)
    return Captured(
        fx=module,
        graph=graph_of(module.graph, recorded, kinds, names, updates, storage_dtypes(graph, parameters, precision)),
        parameters=tuple(placeholders.parameters.values()),
        buffers=tuple(buffers.values()),
        aliases=originals.aliases,
        constants={buffers[name]: value for name, value in placeholders.constants.items() if name in buffers},
        mutated_buffers=updates,
        notes=tuple(dict.fromkeys(notes)),
        settings=settings,
        precision=precision,
        call=spec,
        results=results,
    )


def _known_values(placeholders: _Placeholders, originals: _Originals, written: Mapping[str, fx.Node]) -> dict[str, Tensor]:
    """Placeholder -> value, of those that can't change: constants, and buffers that the forward doesn't write to."""
    known = dict(placeholders.constants)
    for name, target in placeholders.buffers.items():
        if name not in written and target in originals.buffers:
            known[name] = originals.buffers[target]
    return {name: value.detach().cpu() for name, value in known.items() if not value.is_meta}
