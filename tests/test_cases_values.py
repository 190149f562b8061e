"""What goes into compiled models and comes out, in loops as users write them: one device's numbers, or an error that says what to do."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import default_collate

import autopar
from autopar.errors import CaptureError, CommError, InputError
from autopar.runtime.fingerprints import hash_tensors
from autopar.runtime.outputs import UnreadOutput
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases, spawn

DP: Mapping[str, object] = {"dp": 2}
TP: Mapping[str, object] = {"tp": 2}
PP: Mapping[str, object] = {"pp": 2, "schedule": "1f1b", "microbatches": 2}
GPIPE: Mapping[str, object] = {"pp": 2, "schedule": "gpipe", "microbatches": 2}
ROWS, WIDTH, CLASSES = 8, 6, 4

CASES: list[Case] = []


def case(function: Case) -> Case:
    """Mark a function that both ranks run."""
    CASES.append(function)
    return function


class Net(nn.Module):
    """Two layers; with targets it returns its loss too."""

    def __init__(self, out: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, out)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.down(torch.tanh(self.up(x)))
        return logits if y is None else {"loss": F.cross_entropy(logits, y), "logits": logits}


def _batch(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def _compile(model: nn.Module, pins: Mapping[str, object] | None = None, *example: Tensor, **options: Any) -> autopar.CompiledModule:
    return autopar.compile(model, example or None, cluster="2xcpu", pins=pins, **options)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _agree(model: nn.Module, reference: nn.Module) -> None:
    """The gradients of both agree."""
    tree_allclose(_gradients(model), _gradients(reference), rtol=1e-9)


def _compare(pins: Mapping[str, object] | None, loop: Callable[[nn.Module], Any], make: Callable[[], nn.Module] = Net) -> None:
    """The loop gives the same numbers and gradients as on one device."""
    model, reference = _compile(make(), pins), make()
    tree_allclose(loop(model), loop(reference), rtol=1e-9)
    _agree(model, reference)


# --- what all ranks must pass alike ---


@case
def different_batches_per_rank() -> None:
    """A loader with a DistributedSampler, but inputs="global"."""
    for pins in (DP, TP):
        model = _compile(Net(), pins)
        with pytest.raises(InputError, match=r"pass different things to Net.*: x isn't the same on rank 0 and rank 1\. .*inputs=\"local\""):
            model(_batch(dist.get_rank())[0])
        model(_batch()[0])


@case
def local_data_forgotten() -> None:
    """The same without pins: a model that is small enough to be replicated."""
    model = _compile(Net())
    torch.manual_seed(100 + dist.get_rank())
    with pytest.raises(InputError, match='compile with inputs="local", or give all ranks the same seed'):
        model(torch.randn(16, WIDTH)).square().mean().backward()


@case
def a_batch_that_differs_after_many_alike() -> None:
    model = _compile(Net(), DP)
    for seed in range(4):
        model(_batch(seed, 2048)[0])
    x = _batch(9, 2048)[0]
    with pytest.raises(InputError, match="x isn't the same on rank 0 and rank 1"):
        model(x.roll(dist.get_rank(), 0))


@case
def different_sizes_per_rank() -> None:
    """Nobody waits for ranks whose batches are shorter, whether the sizes were seen before or not."""
    model = _compile(Net(), DP)
    for _ in range(2):
        with pytest.raises(InputError, match=r"x is float64\[8, 6\] on rank 0, float64\[4, 6\] on rank 1\. .*inputs=\"local\""):
            model(_batch(0, 8 if dist.get_rank() == 0 else 4)[0])
        model(_batch(0, 8)[0])
        model(_batch(0, 4)[0])


@case
def different_calls_per_rank() -> None:
    """Other arguments, values that aren't tensors, modes, frozen parameters."""

    class Scaled(Net):
        def forward(self, x: Tensor, scale: float = 1.0, *, flag: bool = False, y: Tensor | None = None) -> Any:  # type: ignore[override]
            return super().forward(x * scale)

    rank = dist.get_rank()
    model, (x, y) = _compile(Scaled(), DP), _batch()
    with pytest.raises(InputError, match="y is not given on rank 0, int64"):
        model(x, **({"y": y} if rank else {}))
    with pytest.raises(InputError, match=r"scale is 2\.0 on rank 0, 3\.0 on rank 1"):
        model(x, 2.0 + rank)
    with pytest.raises(InputError, match="the mode is training on rank 0, evaluation on rank 1"):
        model.train(rank == 0)(x)
    model.train()
    model.up.train(rank == 0)
    with pytest.raises(InputError, match="the mode is training on rank 0, training but for up on rank 1"):
        model(x)
    model.train()
    with torch.set_grad_enabled(rank == 0), pytest.raises(InputError, match="the gradient mode is gradients on rank 0, no_grad on rank 1"):
        model(x)
    model.down.bias.requires_grad_(rank == 0)
    with pytest.raises(InputError, match=r"the set of frozen parameters is empty on rank 0, down\.bias on rank 1"):
        model(x)
    model.down.bias.requires_grad_()
    with pytest.raises(InputError, match=r"x is float64.* on rank 0, float64.* that requires a gradient on rank 1"):
        model(x.clone().requires_grad_(rank == 1))
    with pytest.raises(InputError, match=r"x is float64\[8, 6\] on rank 0, float64\[4, 6\] on rank 1"):
        model.prepare(x[: 8 - 4 * rank])


@case
def different_models_per_rank() -> None:
    with pytest.raises(InputError, match=r"the ranks build different models: rank 1 has down.weight of .*, where the first rank has down"):
        _compile(Net(CLASSES + dist.get_rank()))


@case
def a_program_that_one_rank_cannot_make() -> None:
    """A graph that differs between the ranks, as when forward walks over a set: nobody waits for the rank whose plan doesn't fit."""

    class Walks(Net):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            return super().forward(x) + (0 if dist.get_rank() else x.sum(-1, keepdim=True))

    with pytest.raises(
        CaptureError, match=r"the ranks capture different graphs: rank 1 has .*, where the first rank has aten.sum.dim_IntList"
    ):
        _compile(Walks(), DP)(_batch()[0])


@case
def two_models_called_in_another_order() -> None:
    first, second = _compile(Net(), DP), _compile(Net(), DP)
    x = _batch()[0]
    first(x), second(x)
    with pytest.raises(
        CommError, match=r"rank 0 makes call 2 of Net.*; rank 1 makes call 2 of Net.*\. Every rank must make the same calls"
    ):
        (second if dist.get_rank() else first)(x)


@case
def inputs_that_differ_by_rounding() -> None:
    """As those that a network of the user's makes on every rank by another algorithm: they are taken, with a warning."""
    model, rank = _compile(Net(), DP), dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            x = _batch(seed)[0]
            model(x * (1 + 1e-7 * rank))
    found = [str(one.message) for one in caught if "by rounding only" in str(one.message)]
    assert len(found) == (rank == 0)
    with pytest.raises(InputError, match="x isn't the same"):
        model(_batch(rank)[0])


@case
def inputs_of_any_kind_are_compared() -> None:
    class Takes(Net):
        def forward(self, x: Tensor, other: Any) -> Any:  # type: ignore[override]
            return super().forward(x)

    model, rank, x = _compile(Takes(), DP), dist.get_rank(), _batch()[0]
    others: list[Tensor] = [
        torch.tensor(float(rank)),
        torch.tensor([rank == 0]),
        torch.arange(6).view(2, 3).to(torch.int16) + rank,
        torch.full((3,), 1 + rank, dtype=torch.bfloat16),
        torch.full((2,), 1j * (rank + 1), dtype=torch.complex64),
        torch.tensor(rank).expand(4, 5),
        (torch.arange(12.0).view(3, 4) + rank).t(),
        torch.stack([torch.zeros(3), torch.full((3,), float(rank))])[:, 1:],
    ]
    for other in others:
        with pytest.raises(InputError, match=r"other\.a isn't the same on rank 0 and rank 1"):
            model(x, {"a": other})
    for other in (torch.zeros(0), torch.zeros(3, 0), torch.ones(2, 3).t(), torch.tensor(float("nan")), torch.zeros(2).to_sparse()):
        if other.layout is torch.strided:
            model(x, {"a": other})


@case
def a_script_without_a_seed_draws_alike() -> None:
    """Noise that every rank draws for itself is the same, as it must be; where ranks were seeded, nothing is changed."""
    nets = Net(), Net(), Net()
    torch.seed()
    model = _compile(nets[0], DP)
    for _ in range(2):
        model(torch.randn(ROWS, WIDTH))
    drawn = torch.initial_seed()
    _compile(nets[1], DP)
    assert torch.initial_seed() == drawn
    torch.manual_seed(5 + dist.get_rank())
    _compile(nets[2], DP)
    assert torch.initial_seed() == 5 + dist.get_rank()


# --- outputs of the whole batch ---


@case
def eval_output_sum() -> None:
    """An evaluation loop sums what the model returns, and counts what is right."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.AdaptiveAvgPool2d(1),
        ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10))

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 3, 16, 16, generator=generator), torch.randint(10, (16,), generator=generator)

    def loop(model: nn.Module) -> list[Any]:
        F.cross_entropy(model(x), y).backward()
        model.eval()
        with torch.no_grad():
            out = model(x)
            assert type(out) is Tensor
            return [out.sum().item(), out.mean().item(), (model(x).argmax(1) == y).sum().item(), out.numpy().max().item()]

    for pins in (None, DP, TP):
        _compare(pins, loop, build)


@case
def loss_item_outside() -> None:
    def loop(model: nn.Module) -> float:
        loss = model(_batch()[0]).pow(2).mean()
        loss.backward()
        return loss.item()

    for pins in (DP, TP, GPIPE):
        _compare(pins, loop)


@case
def loss_outside() -> None:
    """criterion(model(x), y), accuracy and a metric by class."""

    def loop(model: nn.Module) -> list[Any]:
        x, y = _batch()
        out = model(x)
        loss = F.cross_entropy(out, y)
        loss.backward()
        return [loss, (out.argmax(-1) == y).double().mean(), torch.bincount(out.argmax(-1), minlength=CLASSES), out[3], out.tolist()[5]]

    for pins in (None, DP, TP, GPIPE):
        _compare(pins, loop)


@case
def split_output_in_the_loop() -> None:
    """A second compiled model takes what the first returns; both are trained."""

    def loop(models: list[nn.Module]) -> list[Tensor]:
        generator, critic = models
        x, y = _batch()
        score = critic(generator(x)).square().mean()
        score.backward()
        fake = generator(x).detach()
        loss = F.cross_entropy(critic(fake), y)
        loss.backward()
        return [score, loss]

    for pins, other in ((DP, DP), (DP, TP), (None, DP)):
        references = [Net(WIDTH), Net()]
        models = [_compile(Net(WIDTH), pins), _compile(Net(), other)]
        tree_allclose(loop(models), loop(references), rtol=1e-9)
        for model, reference in zip(models, references, strict=True):
            _agree(model, reference)


@case
def unet_free() -> None:
    """The plain diffusion loop, without pins: noise, a prediction of it, a loss outside."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)]
        return nn.Sequential(*layers)

    def loop(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        losses = []
        for _ in range(3):
            x = torch.rand(8, 3, 16, 16)
            noise = torch.randn_like(x)
            loss = F.mse_loss(model(x + noise), noise)
            loss.backward()
            losses.append(loss.detach())
        return losses

    for pins in (None, DP):
        _compare(pins, loop, build)


@case
def outputs_are_changed_in_place() -> None:
    def loop(model: nn.Module) -> list[Tensor]:
        x, y = _batch()
        out = model(x)
        out *= 2
        F.cross_entropy(F.relu_(out), y).backward()
        result = model(x, y)
        loss = result["loss"]
        loss /= 4
        loss.backward()
        result["logits"].detach().mul_(3)
        return [out, loss, result["logits"]]

    for pins in (None, DP, TP):
        _compare(pins, loop)


@case
def unlike_targets_per_rank() -> None:
    """The loss outside is of labels that differ between the ranks: the backward says so, whatever the plan."""
    for pins in (None, DP, TP):
        model = _compile(Net(), pins)
        x, y = _batch()
        with pytest.raises(
            InputError, match=r"send different gradients back into the output of call 1 of Net.* targets of the whole batch"
        ):
            F.cross_entropy(model(x), y.roll(dist.get_rank(), 0)).backward()
        loss = model(x, y)["loss"] / (1 + dist.get_rank())
        with pytest.raises(InputError, match="different gradients back into the output"):
            loss.backward()


@dataclasses.dataclass
class Result:
    loss: Tensor
    rest: Any


torch.export.register_dataclass(Result, serialized_type_name="tests.test_cases_values.Result")


@case
def outputs_of_any_kind() -> None:
    """Integers, flags, half precision, complex and empty ones, None, numbers, buffers, parameters, inputs, twice the same, views."""

    class Many(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([2.0, 3.0]))

        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            h = torch.tanh(self.up(x))
            first = {
                "ids": h.argmax(-1),
                "flags": h > 0,
                "half": h.bfloat16(),
                "complex": torch.complex(h, h),
                "short": (h > 0).to(torch.complex64),
                "none": None,
                "number": 3,
            }
            second = [
                h,
                h,
                h.view(-1),
                h.sum(-1),
                h.mean(),
                h[:0],
                self.scale,
                self.up.weight,
                x,
                h.t(),
                torch.arange(4),
                h.to(torch.int16),
            ]
            return Result(h.square().mean(), (first, tuple(second)))

    class ManyAtOnce(Many):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).rest

    def loop(model: nn.Module) -> Any:
        x = _batch()[0].requires_grad_()
        result = model(x)
        parts = result.rest if isinstance(result, Result) else result
        flat = [one for one in torch.utils._pytree.tree_leaves(parts) if isinstance(one, Tensor)]
        plain = [one.to(torch.float64) if not one.is_complex() else torch.view_as_real(one) for one in flat]
        sum((number + 1) * one.sin().sum() for number, one in enumerate(plain) if one.requires_grad).backward()
        assert x.grad is not None
        with torch.inference_mode():
            again = model(_batch(1)[0])
        again = again.rest if isinstance(again, Result) else again
        return (
            [one.detach() for one in plain],
            x.grad,
            [one.double() for one in again[1] if one.numel()],
            parts[0]["none"],
            parts[0]["number"],
        )

    for pins in (None, DP, TP):
        for make in (Many, ManyAtOnce):
            _compare(pins, loop, make)


class Scaled(Net):
    """Scales by an attribute."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.down(self.up(x)) * self.scale  # type: ignore[no-any-return]


@case
def attributes_that_are_set_on_one_rank() -> None:
    """Whether the value was had before or not, every rank says so, and nobody waits for the rank that captures again."""
    for pins in (DP, PP):
        model, (x, _) = _compile(Scaled(), pins), _batch()
        model(x)
        model.scale = 1.0 + dist.get_rank()
        if dist.get_rank() == 0:
            del model._original.scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(InputError, match=r"what forward reads of Python .* is as in capture 1 on rank 0, new on rank 1"):
                model(x)
            model.scale = 2.0
            model(x)
        model.scale = 1.0 + dist.get_rank()
        if dist.get_rank() == 0:
            del model._original.scale
        with pytest.raises(InputError, match=r"is as in capture 1 on rank 0, as in capture 2 on rank 1"):
            model(x)


@case
def hooks_of_parameters_on_one_rank_only() -> None:
    """Gradients with hooks are summed one by one, the others in buckets: ranks that differ in it would wait for each other."""
    for pins in (DP, TP, PP):
        model = _compile(Net(), pins)
        model(*_batch())["loss"].backward()
        if dist.get_rank() == 0:
            handle = next(iter(model.parameters())).register_hook(lambda gradient: gradient)
        with pytest.raises(InputError, match=r"the set of parameters with hooks is \S+ on rank 0, empty on rank 1"):
            model(*_batch())
        with torch.no_grad():
            model(*_batch())
        if dist.get_rank() == 0:
            handle.remove()
        model(*_batch())["loss"].backward()


@case
def a_model_that_evaluates_in_inference_mode() -> None:
    def loop(model: nn.Module) -> list[Tensor]:
        model.eval()
        with torch.inference_mode():
            result = model(*_batch())
            values = [result["loss"], result["logits"].clone(), model(_batch()[0])]
        model.train()
        model(*_batch())["loss"].backward()
        return [*values, result["logits"] * 1]

    for pins in (DP, TP, PP):
        _compare(pins, loop)


# --- outputs that are read later ---


@case
def logits_beside_a_loss_cost_nothing_until_they_are_read() -> None:
    reads = []
    for pins in (DP, PP):
        model, reference = _compile(Net(), pins), Net()
        x, y = _batch()
        logits = model(x, y)["logits"]
        assert isinstance(logits, UnreadOutput)
        assert (logits.shape, logits.dtype, logits.device.type, logits.ndim) == ((ROWS, CLASSES), torch.float64, "cpu", 2)
        assert (len(logits), logits.size(0), logits.numel(), logits.requires_grad, logits.is_leaf) == (ROWS, ROWS, 32, True, False)
        assert logits._made is None, "sizes are known without the others"
        expected = reference(x, y)["logits"].detach()
        uses: dict[str, Callable[[Tensor], Any]] = {
            "item": lambda z: z[3, 1].item(),
            "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
            "tolist": lambda z: z.tolist(),
            "cat": lambda z: torch.cat([z, z]),
            "stack": lambda z: default_collate([z.detach(), z.detach()]),
            "text": lambda z: repr(z.detach()),
            "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
            "deepcopy": lambda z: copy.deepcopy(z.detach()),
            "dict": lambda z: copy.deepcopy({"z": z.detach()})["z"],
            "loop": lambda z: [row.sum() for row in z],
            "plus": lambda z: 1 + z,
            "function": lambda z: _Square.apply(z),
            "checkpoint": lambda z: torch.utils.checkpoint.checkpoint(torch.sin, z, use_reentrant=True),
            "foreach": lambda z: torch._foreach_mul([z], 2.0)[0],
            "max": lambda z: z.max(-1).indices,
            "grad": lambda z: torch.autograd.grad(z.square().sum(), z, retain_graph=True)[0],
            "save": _save_and_load,
        }
        for name, use in uses.items():
            z = model(x, y)["logits"]
            got, wanted = use(z), use(expected.clone().requires_grad_())
            assert type(got) is type(wanted), name
            if isinstance(got, str):
                assert got == wanted, name
            else:
                tree_allclose(got, wanted, rtol=1e-9)
        reads.append(type(logits * 1))
    assert reads == [Tensor, Tensor]


def _save_and_load(z: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"z": z.detach()}, file)
    file.seek(0)
    return torch.load(file)["z"]  # type: ignore[no-any-return]


class _Square(torch.autograd.Function):
    """A function that sees tensors past ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


@case
def a_loss_of_logits_beside_a_loss() -> None:
    """Read before and after the backward, under no_grad first, by functions of the user's own."""

    def loop(model: nn.Module) -> list[Tensor]:
        x, y = _batch()
        result = model(x, y)
        with torch.no_grad():
            right = (result["logits"].argmax(-1) == y).sum()
        (result["loss"] + 0.1 * result["logits"].square().mean() + _Square.apply(result["logits"]).mean()).backward()
        other = model(x, y)
        other["loss"].backward()
        return [right, result["loss"], other["logits"]]

    for pins in (DP, TP):
        _compare(pins, loop)


@case
def a_compiled_loss_of_logits_beside_a_loss() -> None:
    """The user's loss runs under torch.compile."""
    criterion = torch.compile(lambda z, y: F.cross_entropy(2 * z, y), backend="eager")

    def loop(model: nn.Module) -> Tensor:
        x, y = _batch()
        loss = criterion(model(x, y)["logits"], y)
        loss.backward()
        return loss  # type: ignore[no-any-return]

    _compare(DP, loop)


@case
def an_output_read_on_one_rank_only() -> None:
    """``if rank == 0: print(logits)``, while the other goes on to the backward, or to the next step."""
    for pins in (DP, PP):
        model = _compile(Net(), pins)
        result = model(*_batch())
        told = (
            r"rank 0 reads the output\['logits'\] of call 1 of Net.*; rank 1 runs the backward .*read it on every rank.*outputs=\"sharded\""
        )
        with pytest.raises(CommError, match=told):
            print(result["logits"]) if dist.get_rank() == 0 else result["loss"].backward()
        told = r"rank 0 reads the output\['logits'\] of call 1 of Net.*; rank 1 makes call 2 of Net"
        with pytest.raises(CommError, match=told):
            result["logits"].sum() if dist.get_rank() == 0 else model(*_batch())


@case
def outputs_read_in_another_order() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            h = self.up(x)
            return h.square().mean(), h, h + 1

    model = _compile(Two(), DP)
    _, *outputs = model(_batch()[0])
    with pytest.raises(CommError, match=r"rank 0 reads the output\[1\].*; rank 1 reads the output\[2\]"):
        outputs[dist.get_rank()].sum()


@case
def outputs_that_stay_sharded() -> None:
    for pins in (DP, PP):
        model, reference = _compile(Net(), pins, outputs="sharded"), Net()
        result = model(*_batch())
        assert isinstance(result["logits"], DTensor)
        tree_allclose(result["logits"].full_tensor(), reference(*_batch())["logits"], rtol=1e-9)
        tree_allclose(_whole(model(_batch()[0])), reference(_batch()[0]), rtol=1e-9)
    first, second = _compile(Net(WIDTH), DP, outputs="sharded"), _compile(Net(), TP)
    references = [Net(WIDTH), Net()]
    second(first(_batch()[0])).square().mean().backward()
    references[1](references[0](_batch()[0])).square().mean().backward()
    _agree(first, references[0])
    _agree(second, references[1])


# --- every rank its own samples ---


def _own(x: Tensor) -> Tensor:
    return x.chunk(2)[dist.get_rank()]


@case
def local_loss_outside() -> None:
    """criterion(model(x), y) of a rank's own rows: outputs are theirs, and gradients those of the mean of the ranks' losses, as DDP's."""
    x, y = _batch()
    for pins in (DP, None):
        model, reference = _compile(Net(), pins, x, inputs="local"), Net()
        if model.data_shard[1] == 1:
            continue
        for _ in range(2):
            out = model(_own(x))
            assert type(out) is Tensor
            tree_allclose(out, _own(reference(x)), rtol=1e-9)
            F.cross_entropy(out, _own(y)).backward()
            F.cross_entropy(reference(x), y).backward()
        _agree(model, reference)
        model.eval()
        with torch.no_grad():
            right = (model(_own(x)).argmax(-1) == _own(y)).sum()
            dist.all_reduce(right)
            assert right == (reference(x).argmax(-1) == y).sum()


@case
def local_outputs_of_any_layout() -> None:
    """Samples in another dim than the first, in blocks, gathered by the plan; and what has no batch, or isn't of the batch's size."""

    class Various(Net):
        def forward(self, x: Tensor, table: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
            h = torch.tanh(self.up(x)) * scale
            return (
                h.t(),
                torch.cat([h, 2 * h]),
                h.flatten(),
                h @ h.t(),
                h.mean(0),
                h.flip(0).cumsum(0),
                h[:4],
                self.up.weight * 2,
                table * 3,
                h.mean(),
            )

    x = _batch()[0]
    generator = torch.Generator().manual_seed(4)
    table, scale = torch.randn(5, generator=generator), torch.tensor(1.5)
    model, reference = _compile(Various(), DP, x, table, scale, inputs="local"), Various()
    rank = dist.get_rank()
    weights = [torch.randn(one.shape, generator=generator) for one in reference(x, table, scale)]

    def own(values: Any) -> list[Tensor]:
        t, pair, flat, square, *rest = values
        return [
            t.chunk(2, 1)[rank],
            torch.cat([one.chunk(2)[rank] for one in pair.chunk(2)]),
            _own(flat),
            _own(square),
            rest[0],
            _own(rest[1]),
            *rest[2:],
        ]

    expected = reference(x, table, scale)
    outputs = model(_own(x), table, scale)
    tree_allclose(list(outputs), own(expected), rtol=1e-9)
    # The mean over ranks of the sums of a rank's own values, and of what each has whole, of which it makes its own loss too.
    in_parts = (True, True, True, True, False, True, False, False, False, False)
    kinds = list(zip(outputs, own(weights), expected, weights, in_parts, strict=True))
    sum((own_one * weight).sum() * (1 if in_part else rank) for own_one, weight, _, _, in_part in kinds).backward()
    sum((one * weight).sum() / 2 for _, _, one, weight, _ in kinds).backward()
    _agree(model, reference)


@case
def local_models_in_a_chain() -> None:
    """A second model of a rank's own samples takes what the first returns: its loss outside, or its own."""
    x, y = _batch()
    features = torch.zeros(ROWS, WIDTH)
    for has_own_loss in (False, True):
        example = (features, y) if has_own_loss else (features,)
        models = [_compile(Net(WIDTH), DP, x, inputs="local"), _compile(Net(), DP, *example, inputs="local")]
        references = [Net(WIDTH), Net()]
        leaf, own = x.clone().requires_grad_(), _own(x).clone().requires_grad_()
        if has_own_loss:
            models[1](models[0](own), _own(y))["loss"].backward()
        else:
            F.cross_entropy(models[1](models[0](own)), _own(y)).backward()
        F.cross_entropy(references[1](references[0](leaf)), y).backward()
        for model, reference in zip(models, references, strict=True):
            _agree(model, reference)
        assert own.grad is not None
        assert leaf.grad is not None
        # Of the loss whose backward was called: the mean of the rank's own rows, of which the whole mean has half.
        tree_allclose(own.grad, 2 * _own(leaf.grad), rtol=1e-9)


@case
def local_logits_beside_a_loss() -> None:
    x, y = _batch()
    for pins in (DP, {"dp": 2, "microbatches": 2}):
        model, reference = _compile(Net(), pins, x, y, inputs="local"), Net()
        result, expected = model(_own(x), _own(y)), reference(x, y)
        if dist.get_rank() == 0 and pins is DP:
            assert result["logits"].sum() != 0, "no other rank is needed for a rank's own rows"
        tree_allclose(result["loss"], expected["loss"], rtol=1e-9)
        tree_allclose(result["logits"], _own(expected["logits"]), rtol=1e-9)
        losses = [result["loss"], expected["loss"]]
        if pins is DP:  # in a pipeline the backward has run already
            losses = [loss + values["logits"].square().mean() for loss, values in zip(losses, (result, expected), strict=True)]
        for loss in losses:
            loss.backward()
        _agree(model, reference)


@case
def local_batches_of_unequal_sizes() -> None:
    x = _batch()[0]
    model = _compile(Net(), DP, x, inputs="local")
    with pytest.raises(
        InputError, match=r"x is float64\[4, 6\] on rank 0, float64\[3, 6\] on rank 1\. .*as many samples as the others.*drop_last"
    ):
        model(x[: 4 - dist.get_rank()])


@case
def local_batches_that_are_all_the_same() -> None:
    """Every rank loads the same batch, as without a sampler: a warning, once."""
    x = _batch()[0]
    model = _compile(Net(), DP, x, inputs="local")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            model(_batch(seed)[0])
    found = [str(one.message) for one in caught if "all ranks pass the same samples" in str(one.message)]
    assert len(found) == (dist.get_rank() == 0)


@case
def a_table_that_differs_beside_local_samples() -> None:
    class Weighted(Net):
        def forward(self, x: Tensor, weight: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x) * weight

    x = _batch()[0]
    model = _compile(Weighted(), DP, x, torch.ones(CLASSES), inputs="local")
    model(_own(x), torch.ones(CLASSES))
    with pytest.raises(
        InputError, match=r"weight isn't the same on rank 0 and rank 1\. What has no batch in dim 0 must be the same on every rank"
    ):
        model(_own(x), torch.ones(CLASSES) + dist.get_rank())


@case
def ranks_that_share_samples_pass_the_same() -> None:
    x = _batch()[0]
    model = _compile(Net(), TP, x, inputs="local")
    model(x)
    with pytest.raises(InputError, match="x isn't the same on rank 0 and rank 1"):
        model(_batch(dist.get_rank())[0])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), CASES)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_loop_on_two_ranks(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)


# --- numbers that stand for tensors ---


def test_hashes_see_every_bit_of_every_type() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 7, generator=generator, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.int16, torch.bool, torch.complex64):
        x = (9 * values).to(dtype)
        hashes = hash_tensors([x, x[:0], x[0, 0]])
        changed = x.clone()
        changed.view(torch.uint8)[17, 3] ^= 1
        assert (hash_tensors([changed, x[:0], x[0, 0]]) != hashes).tolist() == [True, False, False], dtype
    large = torch.zeros(3, 1 << 20, dtype=torch.int32)
    before = hash_tensors([large])
    large[2, 77] = 1
    assert hash_tensors([large]) != before
    assert hash_tensors([large[:1].expand(1 << 20, -1, -1)]) != 0, "what is expanded takes no memory"


def test_samples_see_every_column_and_in_time_every_row() -> None:
    """Rows that begin alike, as with a token that begins every text; and one element, within as many calls as the sample skips."""
    x, y = torch.zeros(8192, 64, dtype=torch.int64), torch.ones(8192, 64, dtype=torch.int64)
    y[:, 0] = 0
    assert all(hash_tensors([x], offset) != hash_tensors([y], offset) for offset in range(10))
    y = x.clone()
    y[4001, 13] = 1
    assert any(hash_tensors([x], offset) != hash_tensors([y], offset) for offset in range(150))


# --- four ranks ---------------------------------------------------------------------------------------------------------------


def _on_four_ranks(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    x, y = _batch()
    for pins in ({"dp": 2, "tp": 2}, {"pp": 2, "dp": 2, "microbatches": 2, "schedule": "gpipe"}):
        reference = Net()
        model = autopar.compile(Net(), cluster="4xcpu", pins=pins)
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(reference(x), y).backward()
        _agree(model, reference)
        with torch.no_grad():
            tree_allclose(model(x, y)["logits"], reference(x, y)["logits"], rtol=1e-9)
        with pytest.raises(InputError, match=r"x isn't the same on rank 0 and ranks 2-3\. "):
            model(x.roll(rank // 2, 0))
        _check_local_samples(rank, pins)
    _check_a_rank_that_stays_away(rank)


def _check_local_samples(rank: int, pins: Mapping[str, object]) -> None:
    """Ranks that share samples pass the same; the others pass theirs, and each gets its own."""
    x, y = _batch()
    reference, model = Net(), autopar.compile(Net(), (x,), cluster="4xcpu", pins=pins, inputs="local")
    index, count = model.data_shard
    assert count == 2
    own, expected = model(x.chunk(2)[index]), reference(x)
    tree_allclose(own, expected.chunk(2)[index], rtol=1e-9)
    F.cross_entropy(own, y.chunk(2)[index]).backward()
    F.cross_entropy(expected, y).backward()
    _agree(model, reference)
    with pytest.raises(InputError, match=r"x isn't the same on rank \d and rank \d.*rank and num_replicas of a DistributedSampler"):
        model(x.roll(rank, 0)[:4])


def _check_a_rank_that_stays_away(rank: int) -> None:
    """``if rank == 0: evaluate()``: the ranks that wait say for whom."""
    model = autopar.compile(Net(), cluster="4xcpu", pins={"dp": 4})
    model(_batch()[0])
    model._agreement._axis.group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=1))
    store = dist.distributed_c10d._get_default_store()
    if rank < 2:
        with pytest.raises(
            CommError, match=r"rank \d makes call 2 of Net.* waited \d\.\d s for ranks 2-3\. Every rank must make the same calls"
        ):
            model(_batch()[0])
        store.set(f"done {rank}", "")
    else:
        store.wait(["done 0", "done 1"])


@pytest.mark.processes
def test_loops_on_four_ranks(tmp_path: Path) -> None:
    spawn(4, tmp_path, _on_four_ranks)
