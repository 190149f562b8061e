"""The user's model, run by parallel programs: what `autopar.compile` returns.

Comes in: the model, and a planner that makes a program for each signature of inputs. Goes out: a module with the same calls. Names,
``state_dict``, ``train``/``eval`` and attributes stay the model's own; parameters become DTensors that are stored as the first plan says;
calls and results mean what they mean on one device. Optimizers must be made from this module's parameters, after `autopar.compile`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from autopar import texts, timelines, torch_compat
from autopar.capture import refuse_wrapped
from autopar.errors import InputError, PlanError
from autopar.ir import Layout
from autopar.ops import AUTOCAST_OFF, Autocast, comm, regather, rng
from autopar.rewrite import Program
from autopar.runtime import recording, watching
from autopar.runtime.agreement import Agreement, digest, form_agreement, name_ranks
from autopar.runtime.call_check import CallCheck
from autopar.runtime.checkpoints import teach_pickling
from autopar.runtime.dispatch import as_stored, take_plain_gradients, teach_whole_values
from autopar.runtime.dtensor import gather_whole, take_local, teach_strided_shards
from autopar.runtime.gradients import GradientReducer, refuse_sparse_gradients
from autopar.runtime.inputs import Call, InputReader
from autopar.runtime.local_steps import teach_local_steps
from autopar.runtime.methods import SAVING, gather_when_called, save_on_first_rank
from autopar.runtime.outputs import Handover, Step, name_outputs, returns_loss, watch_hooks
from autopar.runtime.parameters import Entrance, refuse_transforms
from autopar.runtime.pipeline import refuse_inside_backward
from autopar.runtime.pipeline_calls import PipelineCalls, refuse_gradients
from autopar.runtime.programs import Programs
from autopar.runtime.states import teach_optimizers
from autopar.runtime.storage import Deployment, Init, Storage, StoredParameter, copy_updated_buffers, plain_parameters, replicate
from autopar.runtime.tensor_methods import teach_methods
from autopar.runtime.world import join_world, name_device
from autopar.runtime.wrapping import Unwrapped, refuse_wrappers

Planner = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], bool], Program]
"""Makes the program of a signature, from the model with plain parameters, a call's positional and keyword arguments, and whether it trains.

Only shapes, dtypes and devices of the parameters may be read, not their values; and every rank must make the same program.
"""


class ParallelModule(Unwrapped, nn.Module):
    """Runs a model by parallel programs, one for each signature of inputs (shapes, dtypes, training, what requires gradients, autocast).

    Args:
        model: the user's model, on its device or on the meta device; its parameters are changed in place.
        planner: makes the programs.
        inputs: with ``global`` every rank passes the same whole batch. With ``local`` every rank passes the samples that `data_shard`
            says, in dim 0 of every input that has the batch there, and gets the outputs of these; a plan must exist before the first call
            (see `prepare`).
        outputs: ``plain`` tensors, or ``sharded`` for DTensors of the whole batch where a rank has a part only.
        init: makes the values of what is on the meta device; without it, that holds NaN until a state is loaded.
        device: where what is on the meta device is stored.

    When a rank dies, the others fail after the timeout of the default process group (`autopar.runtime.world`).
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        *,
        inputs: Literal["global", "local"] = "global",
        outputs: Literal["plain", "sharded"] = "plain",
        init: Init | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, ParallelModule):
            raise InputError("the model is compiled already: compile the model that was given then, or use this one")
        refuse_wrapped(model)
        for name in _SHARED:
            self.__dict__[name] = model.__dict__[name]
        # Not registered as a submodule: its children are this module's children already.
        self.__dict__["_original"] = model
        self.training = model.training
        self._planner = planner
        self._is_local = inputs == "local"
        self._is_sharded = outputs == "sharded"
        self._reader = InputReader(model, self._is_local)
        self._device = torch.device(device) if device is not None else _find_device(model)
        join_world(self._device.type)
        self._agreement = form_agreement()
        self._name = type(model).__name__
        self._check: CallCheck | None = None
        if self._agreement is not None:
            self._name = self._agreement.name_model(self._name)
            here = name_device(self._device)
            facts = self._agreement.meet(f"compiles {self._name}", [torch.initial_seed() & _POSITIVE, digest(here) if here else 0])
            _refuse_shared_devices([device for _, device, *_ in facts], self._device, dist.get_backend_config())
            _check_alike(model, self._agreement, self._name)
            if not self._is_local:
                _seed_alike([seed for seed, *_ in facts])
            self._check = CallCheck(self._agreement, self._reader, model, self._name, self._is_local)
        if dist.is_available() and dist.is_initialized():
            teach_strided_shards()
            teach_whole_values()
            torch_compat.count_plain_as_replicated()
            if self._device.type != "cpu":
                torch_compat.count_plain_as_replicated_in_backwards(self._device)
            teach_methods()
            teach_pickling()
            teach_optimizers()
            teach_local_steps()
            replicate(model, self._device)
            gather_when_called(model, is_local=self._is_local)
            for module in (self, *model.modules()):
                refuse_wrappers(module)
        self._storage = Storage(model, init, self._device)
        self._pipelines: PipelineCalls | None = None
        self._programs = Programs(model)
        self._output_names: dict[int, tuple[str, ...]] = {}
        self._call_count = 0
        self._entrances: dict[int, Entrance] = {}
        self._last: Program | None = None
        self._all_modules = tuple(model.modules())
        self._reducer = GradientReducer()

    def __getattr__(self, name: str) -> Any:
        """An attribute of the user's model, such as ``config``, where this module has none of that name.

        Methods that save the model run on the first rank, with whole parameters.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__["_original"]
            value = getattr(original, name)
            if name in SAVING and dist.is_available() and dist.is_initialized():
                return functools.partial(save_on_first_rank, original, value)
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the user's model, whose forward may read it, but for those that this module has itself."""
        original = self.__dict__["_original"] if "_reducer" in self.__dict__ else None  # the last that the constructor sets
        is_theirs = original is not None and name not in self.__dict__ and not hasattr(type(self), name)
        setattr(original, name, value) if is_theirs else super().__setattr__(name, value)

    def train(self, mode: bool = True) -> ParallelModule:
        """Set training or evaluation mode of the model; each mode has its own programs."""
        super().train(mode)
        self._original.training = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also those accumulated under `no_sync`."""
        super().zero_grad(set_to_none)
        self._reducer.zero()

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate on this rank only; the next one outside sums over the ranks, as in DDP."""
        return self._reducer.no_sync()

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Record when each rank does what inside, and write it to `path`, a file that https://ui.perfetto.dev opens.

        All ranks enter and leave together: they meet at the start, to compare their clocks, and the first rank writes the file.
        Nothing is written when an error leaves the context. ``autopar timeline plan.json --beside FILE`` shows it beside what the plan
        predicts.

        Raises InputError on all ranks when the file isn't called .json or can't be written, or the model was never called.
        """
        with self._all_or_none("writes a trace"):
            if not isinstance(path, str | Path):
                raise InputError(f"path={texts.show_value(path)}: the name of a file is needed, such as 'real.json'")
            if Path(path).suffix.lower() != ".json":
                raise InputError(
                    f"{path}: a trace is written as JSON; name a file that ends in .json (`autopar timeline --beside` draws it)"
                )
            if self._agreement is None or self._agreement.is_first:
                texts.check_writable(path)
        agreement = self._agreement
        recorder = recording.Recorder(
            self._device, lambda: None if agreement is None else agreement.meet(f"begins a trace of {self._name}")
        )
        with recorder.running():
            yield
        deployment = self._storage.deployment
        if deployment is None:
            raise InputError("nothing was recorded: the model wasn't called, now or before")
        rank = 0 if self._agreement is None else dist.get_rank()
        record = recorder.record(rank, deployment.pipeline_rank, deployment.mesh.world_size, deployment.axes)
        records = [timelines.to_text(record)]
        if self._agreement is not None:
            self._agreement.meet(f"ends a trace of {self._name}")
            records = self._agreement.gather(records[0])
        with self._all_or_none("writes a trace"):
            if rank == 0:
                # Of a CPU it holds torch and the program too, which no plan counts.
                memory = "" if self._device.type == "cuda" else " (memory: resident, of the whole process)"
                title = f"{self._name} on {len(records)} ranks, recorded{memory}"
                merged = timelines.merge(title, list(map(timelines.from_text, records)))
                texts.write_text(path, timelines.to_chrome([merged]))

    @property
    def device_type(self) -> str:
        """The kind of device that the model computes on, such as ``cuda``."""
        return self._device.type

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Name of a parameter -> the layout in which it is stored, which later programs must use; empty before the first plan."""
        return {} if self._storage.deployment is None else self._storage.deployment.layouts

    @property
    def stored_elsewhere(self) -> Mapping[str, StoredParameter]:
        """Before the first plan, the parameters that another compiled model stores already, by name, which the plan must obey."""
        return self._storage.stored_elsewhere()

    @property
    def owners(self) -> Mapping[str, int | None]:
        """Name of a parameter -> the pipeline rank that stores it, None where every one does; empty before the first plan."""
        return {} if self._storage.deployment is None else self._storage.deployment.owners

    @property
    def data_shard(self) -> tuple[int, int]:
        """(index, count): this rank computes part `index` of `count` parts of the batch. Raises PlanError before the first plan."""
        deployment = self._storage.deployment
        if deployment is None:
            raise PlanError("there is no plan yet that says how the batch is split: compile with example inputs, or call once")
        with comm.active(deployment.axes):
            return comm.index(deployment.batch_axes), comm.count(deployment.batch_axes)

    def prepare(self, *args: Any, **kwargs: Any) -> Program:
        """Plan for a call with these arguments, of the global sizes, and store the parameters so, without running anything."""
        call = self._reader.read(args, kwargs)
        key = self._key(call)
        number, program = self._programs.find(key)
        if self._check is not None:
            self._check.check(key, call, f"plans for {self._name}", 0, number, runs=False)
        return self._use_program(key, call, program)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of a model that returns its loss, and return the loss, detached. Autocast is for the forward."""
        output = self(*args, **kwargs)
        loss = output if isinstance(output, Tensor) else _find_loss(output)
        with AUTOCAST_OFF.active():
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises InputError: a compiled model can't be pickled or copied, since process groups belong to this process."""
        raise InputError(
            "a compiled model can't be pickled or copied, it holds process groups: save its state_dict(), and copy the model "
            "(for an average of the weights, say) before compiling it"
        )

    @torch_compat.uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program of this call's signature, which is planned first where there is none; returns what the model would.

        Raises InputError for arguments that a program can't take, PipelineError when a pipeline has failed, and what the planner raises.
        """
        if self._storage.deployment is not None:
            self._storage.deployment.alarm.check()
        refuse_transforms()
        if self._pipelines is not None:
            refuse_inside_backward()  # before the ranks meet: not all may be in a backward
        if dist.is_available() and dist.is_initialized():
            torch_compat.count_plain_as_replicated()
        self._reducer.recover()
        index, count = self.data_shard if self._is_local else (0, 1)
        call = self._reader.read(args, kwargs, count)
        key = self._key(call)
        self._call_count += 1
        step = Step(f"call {self._call_count} of {self._name}", self._agreement)
        number, known = self._programs.find(key)
        if self._check is not None:
            hooked = self._storage.hooked() if torch.is_grad_enabled() else []
            step.checks = self._check.check(key, call, f"makes {step.name}", index, number, hooked=hooked)
        program = self._use_program(key, call, known)
        deployment = self._storage.deployment
        assert deployment is not None
        names = self._output_names[id(program)]
        handover = Handover(step, deployment, self._is_local, self._is_sharded, names, returns_loss(program))
        tensors = program.captured.bind(call.args, call.kwargs)
        if program.pipeline is not None:
            refuse_gradients(list(map(call.passed, tensors)))
            if self._pipelines is None:
                self._pipelines = PipelineCalls(self._storage, deployment, self._reducer)
            with torch.inference_mode(False):
                runner = self._pipelines.find_runner(program)
            with deployment.alarm.guard(runner.where), AUTOCAST_OFF.active():
                inputs = [call.whole(x, deployment) for x in tensors]
                outputs = self._pipelines.run(program, runner, inputs, handover)
                take_plain_gradients(outputs)
                watch_hooks(program, [None] * len(outputs), outputs, names, step.name)
                return program.captured.unflatten(outputs)
        parts = [call.part(x, slot.layout, deployment, step) for slot, x in zip(program.inputs, tensors, strict=True)]
        buffers = self._storage.buffers_of(program)
        entrance = self._find_entrance(program, deployment)
        parameters = entrance.enter()
        read_buffers = copy_updated_buffers(program, buffers) if torch.is_grad_enabled() else buffers
        buffer_parts = [take_local(read_buffers[slot.name], slot.layout, deployment.mesh, deployment.place) for slot in program.buffers]
        shared_seed = rng.agreed(step.share) if deployment.device_mesh is not None else nullcontext()
        regathering = regather(program.prefetch) if program.regather else nullcontext()
        watcher = watching.current()
        watched = nullcontext() if watcher is None else watcher.forward()
        with AUTOCAST_OFF.active(), comm.active(deployment.axes), shared_seed, regathering, watched:
            results = program.module(*parameters, *buffer_parts, *parts)
        results = tuple(results) if isinstance(results, tuple | list) else (results,)
        if watcher is not None:
            watcher.watch_backward(results)
        if torch.is_grad_enabled() and deployment.device_mesh is not None:
            results = _tell_before_backward(entrance.note_changes, results, (*parameters, *parts))
        with torch.no_grad():
            layouts = {slot.name: slot.layout for slot in program.buffers}
            for name, value in zip(program.mutated_buffers, results[len(program.outputs) :], strict=True):
                buffers[name].copy_(gather_whole(value, layouts[name], deployment.mesh, deployment.axes))
        outputs = [handover.give(position, slot, x) for position, (slot, x) in enumerate(zip(program.outputs, results, strict=False))]
        take_plain_gradients(outputs)
        watch_hooks(program, results, outputs, names, step.name)
        return program.captured.unflatten(outputs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors or DTensors of any layout; every rank stores its part."""
        own = dict(self.named_parameters(remove_duplicate=False))
        stored = OrderedDict((name, as_stored(value, own.get(name))) for name, value in state_dict.items())
        if hasattr(state_dict, "_metadata"):
            stored._metadata = state_dict._metadata  # type: ignore[attr-defined]
        return super().load_state_dict(stored, strict, assign)

    # --- programs ---

    def _key(self, call: Call) -> Hashable:
        """What a program is made for."""
        return call.signature, tuple(module.training for module in self._all_modules), self._storage.kinds(), Autocast.now()

    def _use_program(self, key: Hashable, call: Call, program: Program | None) -> Program:
        """The program to run, which is made where there is none."""
        if program is None:
            if self._agreement is not None and torch.is_grad_enabled():
                refuse_sparse_gradients(self._original)
            # Not in inference mode, even if the call is: programs and stored parameters outlive the call. And what capture saves for
            # backwards is nothing to what surrounds the call, such as a checkpoint, which counts what is saved.
            with (
                torch.inference_mode(False),
                plain_parameters(self._original),
                saved_tensors_hooks(_identity, _identity),
                self._all_or_none(f"has planned for {self._name}"),
            ):
                program = self._planner(self._original, call.args, call.kwargs, self.training)
            assert program is not None
            with torch.inference_mode(False), torch.no_grad():
                is_first = self._storage.deployment is None
                program = self._storage.place_parameters(program)
                if is_first and self._agreement is not None and self._storage.deployment is not None:
                    self._agreement.join(self._storage.deployment.alarm)
            self._programs.add(key, program)
            self._output_names[id(program)] = name_outputs(program)
            self._reader.learn(program)
        self._last = program
        return program

    def _all_or_none(self, event: str) -> AbstractContextManager[None]:
        """Inside, an error on one rank becomes one of all ranks."""
        return nullcontext() if self._agreement is None else self._agreement.share_errors(event)

    def _find_entrance(self, program: Program, deployment: Deployment) -> Entrance:
        entrance = self._entrances.get(id(program))
        if entrance is None:
            entrance = self._entrances[id(program)] = Entrance(program, self._storage, deployment, self._reducer, self._agreement)
        return entrance


# Dicts of `nn.Module` that are shared with the original, so that names, states and their hooks are the original's.
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


CHOSEN_SEEDS = 1 << 32
"""Seeds from here on weren't chosen by the user: torch draws one of 64 bits when a process has set none."""
_POSITIVE = (1 << 63) - 1


def _seed_alike(seeds: Sequence[int]) -> None:
    """Where a script sets no seed, let all ranks draw the same numbers from now on: they must draw the same batches and the same noise."""
    if min(seeds) >= CHOSEN_SEEDS and len(set(seeds)) > 1:
        torch.manual_seed(CHOSEN_SEEDS | (digest(f"seed {seeds[0]}") & _POSITIVE))


def _refuse_shared_devices(devices: Sequence[int], device: torch.device, backends: str) -> None:
    """Raise InputError where ranks have the same GPU, given a number for each rank's, 0 for a CPU: NCCL would fail later, and name none."""
    for number in set(devices) - {0}:
        ranks = [rank for rank, other in enumerate(devices) if other == number]
        if len(ranks) > 1 and "nccl" in backends:
            raise InputError(
                f"{name_ranks(ranks)} have their models on one GPU ({device} here): call torch.cuda.set_device(int(os.environ"
                '["LOCAL_RANK"])) at the start of the script, and move the model to "cuda"'
            )


def _check_alike(model: nn.Module, agreement: Agreement, name: str) -> None:
    """Raise InputError on all ranks when one has other parameters or buffers than the first, or its parameters in another order.

    The order counts, as optimizers and norms go over parameters in order and communicate for each.
    """
    named = [*model.named_parameters(remove_duplicate=False), *sorted(model.named_buffers(), key=lambda item: item[0])]
    lines = [f"{name} of {tensor.dtype} and shape {tuple(tensor.shape)}" for name, tensor in named]
    difference = agreement.find_difference(f"compares the parameters of {name}", lines)
    if difference is not None:
        raise InputError(
            f"the ranks build different models: rank {difference.rank} has {difference.other}, where the first rank has {difference.first}."
            " Build the same model on every rank, with its parameters in one order: walk over a list or sorted(...), not over a set"
        )


def _identity(x: Tensor) -> Tensor:
    return x


def _tell_before_backward(tell: Callable[[], None], results: Sequence[Tensor], operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a program, whose backwards call `tell` first.

    An operand that is a result too, such as a weight, becomes a tensor of its own: it lives on, and would collect the hooks of all calls.
    """
    lasting = {id(x) for x in operands}
    results = tuple(x.view_as(x) if id(x) in lasting and x.requires_grad else x for x in results)
    for x in results:
        if isinstance(x, Tensor) and x.grad_fn is not None:
            x.register_hook(lambda _: tell())  # type: ignore[no-untyped-call]
    return results


def _find_loss(output: Any) -> Tensor:
    loss: Any = None
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, Sequence) and output:
        loss = output[0]
    loss = getattr(output, "loss", loss)
    if not isinstance(loss, Tensor):
        raise InputError(f"train_step needs a model that returns its loss; it returned a {type(output).__name__} without one")
    return loss


def _find_device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
