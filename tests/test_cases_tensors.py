"""What a compiled model hands out behaves as whole tensors: parameters, gradients, states, files. Each case is one test on two ranks."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autopar
from autopar.errors import InputError
from autopar.runtime.dispatch import gather
from tests import optimizers
from tests.helpers import tree_allclose
from tests.processes import Case, Outcomes, run_cases

TP: Mapping[str, object] = {"tp": 2}
DP: Mapping[str, object] = {"dp": 2}
FSDP: Mapping[str, object] = {"dp": 2, "fsdp": True}
PP: Mapping[str, object] = {"pp": 2, "microbatches": 2}
PLANS = (TP, DP, FSDP, PP)


class Net(nn.Module):
    """Four layers; with a target it returns the loss."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.encode(x)
        return self.head(x) if y is None else (self.head(x) - y).square().mean()

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


@dataclass(frozen=True)
class Point:
    x: Any
    y: list[Any]


class Pair(NamedTuple):
    first: Any
    second: int


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 8, generator=generator), torch.randn(8, 2, generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    optimizer.zero_grad()
    loss = model(*batch(seed))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather(p.detach()).clone() for name, p in model.named_parameters()}


def check_equal(model: nn.Module, reference: nn.Module) -> None:
    tree_allclose(whole(model), whole(reference), rtol=1e-9)


CASES: list[Case] = []


def case(function: Case) -> Case:
    """Mark a function that both ranks run."""
    CASES.append(function)
    return function


# --- optimizers and parameters ----------------------------------------------------------------------------------------------------


@case
def opt_before_compile() -> None:
    """An optimizer that was made a line above `autopar.compile` trains, and so do lists of the parameters from before."""
    for pins in PLANS:
        expected = Net()
        optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2)
        model = Net()
        listed = list(model.parameters())
        ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
        early = copy.deepcopy(optimizer.state_dict())
        compiled = autopar.compile(model, pins=pins)
        late = torch.optim.SGD(listed, lr=1e-3)
        last = torch.optim.SGD(expected.parameters(), lr=1e-3)
        assert ours.param_groups[0]["params"] == list(compiled.parameters())
        for seed in range(3):
            for trained, one, other, parameters in (
                (expected, optimizer, last, list(expected.parameters())),
                (compiled, ours, late, listed),
            ):
                one.zero_grad()
                other.zero_grad()
                trained(*batch(seed)).backward()
                clip_grad_norm_(parameters, 0.1)
                one.step()
                other.step()
        check_equal(compiled, expected)
        assert early.keys() == ours.state_dict().keys()


@case
def an_optimizer_that_was_not_made() -> None:
    """One whose constructor failed, and which a notebook's traceback may hold, has no parameters to follow."""
    model = Net()
    with pytest.raises(ValueError, match="betas") as failed:
        torch.optim.Adam(model.parameters(), betas=(0, 0.9))
    compiled = autopar.compile(model, pins=DP)
    compiled(*batch()).backward()
    assert failed.traceback


@case
def an_optimizer_with_states_before_compile() -> None:
    """An optimizer that has trained on one device goes on after `autopar.compile`."""
    expected, model = Net(), Net()
    optimizer, ours = (torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (expected, model))
    step(expected, optimizer), step(model, ours)
    compiled = autopar.compile(model, pins=FSDP)
    step(expected, optimizer, 1), step(compiled, ours, 1)
    check_equal(compiled, expected)


@case
def data_assign() -> None:
    """``p.data = value`` takes effect: of DTensors, of whole plain tensors, and back to what was kept aside."""
    for pins in PLANS:
        expected, compiled = Net(), autopar.compile(Net(), batch(), pins=pins)
        for seed in range(3):
            for model in (expected, compiled):
                model(*batch(seed)).backward()
                for p in model.parameters():
                    p.data = p.data - 0.5 * p.grad
                    p.grad = None
        check_equal(compiled, expected)
        kept = {name: p.data for name, p in compiled.named_parameters()}
        for p in compiled.parameters():
            p.data = torch.zeros(p.shape)
        assert float(sum(p.abs().sum() for p in compiled.parameters())) == 0
        assert float(compiled(batch()[0]).abs().sum()) == 0
        for name, p in compiled.named_parameters():
            p.data = kept[name]
        check_equal(compiled, expected)
        with pytest.raises(InputError, match="keeps its sizes"):
            next(compiled.parameters()).data = torch.zeros(3)


@case
def norm_item() -> None:
    """``item``, ``float``, ``bool``, ``tolist``, ``numpy`` and formats of weights and gradients are those of the whole."""
    readers: dict[str, Callable[[Tensor], Any]] = {
        "norm": lambda x: x.norm().item(),
        "mean": lambda x: x.mean().item(),
        "sum": lambda x: float(x.sum()),
        "max": lambda x: x.abs().max().item(),
        "std": lambda x: x.std().item(),
        "any": lambda x: bool((x > 0.3).any()),
        "nan": lambda x: bool(x.isnan().any()),
        "list": lambda x: torch.tensor(x.tolist()).flatten().tolist(),
        "numpy": lambda x: x.detach().numpy().ravel().tolist(),
        "text": lambda x: float(f"{x.norm():.3f}"),
        "element": lambda x: x[-1].sum().item(),
        "argmax": lambda x: int(x.argmax()),
        "median": lambda x: x.median().item(),
    }
    for pins in PLANS:
        expected, compiled = Net(), autopar.compile(Net(), pins=pins)
        for model in (expected, compiled):
            model(*batch()).backward()
        for layer in ("layers.0", "layers.3", "head"):
            p, q = expected.get_submodule(layer).weight, compiled.get_submodule(layer).weight
            for name, read in readers.items():
                for x, y in ((p, q), (p.grad, q.grad)):
                    assert read(y) == pytest.approx(read(x), rel=1e-9), (name, pins)


@case
def weights_and_plain_tensors() -> None:
    """Edits of weights by plain tensors and indices, and a loss over weights, do what they do on one device."""
    for pins in PLANS:
        expected, compiled = Net(), autopar.compile(Net(), batch(), pins=pins)
        for model in (expected, compiled):
            weight = model.layers[1].weight
            with torch.no_grad():
                model.layers[0].weight.copy_(torch.ones(8, 8))
                weight[:, :3] = 0.5
                weight[5:].mul_(torch.arange(8.0))
                weight.view(-1)[3:30].add_(1)
                weight.t()[2].zero_()
                weight[weight > 1] = 1
                weight.index_add_(0, torch.tensor([1, 6]), torch.ones(2, 8))
                nn.init.orthogonal_(model.layers[2].weight, generator=torch.Generator().manual_seed(1))
                torch.manual_seed(2)
                nn.init.normal_(model.layers[3].weight, std=0.1)
            mask = torch.arange(64.0).view(8, 8).cos()
            decay = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
            loss = model(*batch()) + 1e-2 * decay + (weight[2:7] * mask[2:7]).sum() ** 2
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        check_equal(compiled, expected)
        tree_allclose([gather(p.grad) for p in compiled.parameters()], [p.grad for p in expected.parameters()], rtol=1e-9)


@case
def a_plain_head_gets_plain_gradients() -> None:
    """A plain parameter outside of the model that meets weights of the model keeps plain gradients."""
    x, _ = batch()
    results = []
    for model in (Net(), autopar.compile(Net(), pins=TP)):
        torch.manual_seed(1)
        head = nn.Linear(2, 1)
        scale = nn.Parameter(torch.ones(8, 8))
        (head(model(x)).square().mean() + (scale * model.layers[0].weight).square().sum() * 1e-2).backward()
        torch.optim.SGD([*head.parameters(), scale], lr=0.1).step()
        assert not any(isinstance(p.grad, DTensor) for p in (*head.parameters(), scale))
        results.append([gather(p.grad) for p in (*model.parameters(), *head.parameters(), scale)])
    tree_allclose(results[1], results[0], rtol=1e-9)


@case
def random_values_are_one_devices() -> None:
    """Random values of a parameter are the same on every rank, even where ranks were seeded otherwise."""
    for pins in (DP, TP, PP):
        compiled = autopar.compile(Net(), batch(), pins=pins)
        torch.manual_seed(dist.get_rank())
        with torch.no_grad():
            compiled.head.weight.normal_()
            compiled.head.weight.add_(torch.randn_like(compiled.head.weight))
        torch.manual_seed(0)
        expected = torch.empty(2, 8).normal_() + torch.randn(2, 8)
        assert torch.equal(gather(compiled.head.weight.detach()), expected)


# --- states before the first call ---------------------------------------------------------------------------------------------------


@case
def ema_before_first_step() -> None:
    """An average made from ``state_dict()`` before the first call follows training, whatever mesh the plan has."""
    for pins in PLANS:
        averages = []
        for model in (Net(), autopar.compile(Net(), pins=pins)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            average = {name: value.detach().clone() for name, value in model.state_dict().items()}
            plain = {name: gather(value).clone() for name, value in average.items()}
            for seed in range(2):
                step(model, optimizer, seed)
                with torch.no_grad():
                    for name, value in model.state_dict().items():
                        average[name].mul_(0.9).add_(value, alpha=0.1)
                        plain[name].lerp_(value, 0.1)
                    torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 0.5)
            assert all(type(value) is Tensor for value in plain.values())
            for name, p in model.named_parameters():
                assert not isinstance(p, DTensor) or (average[name].device_mesh, average[name].placements) == (p.device_mesh, p.placements)
            averages.append(({name: gather(value) for name, value in average.items()}, plain))
        tree_allclose(averages[1], averages[0], rtol=1e-9)


@case
def an_average_written_through_aliases() -> None:
    """Averages made before the first call, as tensors or as a copy of the model, are written where their aliases are written."""
    for pins in PLANS:
        results = []
        for is_compiled in (False, True):
            original = Net()
            model = autopar.compile(original, pins=pins) if is_compiled else original
            averaged = AveragedModel(original, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            average = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for seed in range(3):
                step(model, optimizer, seed)
                averaged.update_parameters(model)
                for name, p in model.named_parameters():
                    average[name].data.lerp_(p.detach(), 0.1)
            results.append([*map(gather, average.values()), *whole(averaged).values(), averaged(batch()[0])])
        tree_allclose(results[1], results[0], rtol=1e-9)


@case
def state_made_before_first_call() -> None:
    """Adagrad makes its state in its constructor; an alias of a parameter from before the first call goes on being one."""
    for pins in PLANS:
        expected, compiled = Net(), autopar.compile(Net(), pins=pins)
        alias = compiled.state_dict()["head.weight"]
        for model in (expected, compiled):
            optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
            for seed in range(2):
                step(model, optimizer, seed)
        check_equal(compiled, expected)
        assert torch.equal(gather(alias), gather(compiled.head.weight.detach()))


@case
def dcp_resume_fresh() -> None:
    """A distributed checkpoint is resumed in the usual order, with and without example inputs, also under another plan."""
    model = autopar.compile(Net(), batch(), pins=TP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer)
    state, states = get_state_dict(model, optimizer)
    dcp.save({"m": state, "o": states}, checkpoint_id=Path("dcp_fresh"))
    step(model, optimizer, 1)
    for pins in PLANS:
        for example in (batch(), None):
            other = autopar.compile(Net(seed=5), example, pins=pins)
            theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
            state, states = get_state_dict(other, theirs)
            loaded = {"m": state, "o": states}
            dcp.load(loaded, checkpoint_id=Path("dcp_fresh"))
            set_state_dict(other, theirs, model_state_dict=loaded["m"], optim_state_dict=loaded["o"])
            step(other, theirs, 1)
            check_equal(other, model)


@case
def resume_before_first_call() -> None:
    """The states that a resumed optimizer got before the first call are stored as its parameters are after the first step."""
    model = autopar.compile(Net(), pins=FSDP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    get_state_dict(model, optimizer)
    step(model, optimizer)
    for p in model.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[p][name]
            assert (value.device_mesh, value.placements) == (p.device_mesh, p.placements)


# --- files ----------------------------------------------------------------------------------------------------------------------------


@case
def load_plain_optimizer() -> None:
    """An ordinary file of one device, of a model and its optimizer, loads before and after the first step and goes on."""
    expected = Net()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2)
    step(expected, optimizer)
    saved = io.BytesIO()
    torch.save({"model": expected.state_dict(), "opt": optimizer.state_dict()}, saved)
    step(expected, optimizer, 1)
    for pins in PLANS:
        for steps in (0, 1):
            model = autopar.compile(Net(seed=3), pins=pins)
            ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for _ in range(steps):
                step(model, ours)
            saved.seek(0)
            file = torch.load(saved)
            model.load_state_dict(file["model"])
            ours.load_state_dict(file["opt"])
            step(model, ours, 1)
            check_equal(model, expected)
            assert all(ours.state[p]["exp_avg"].placements == p.placements for p in model.parameters())


@case
def full_state_dict_loads_into_one_device() -> None:
    """One call gives what one device would save, of the model and of the optimizer, on the first rank, before and after steps."""
    for pins in PLANS:
        expected, model = Net(), autopar.compile(Net(), pins=pins)
        optimizer, ours = (torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (expected, model))
        for seed in range(3):
            state, states = autopar.full_state_dict(model), autopar.full_state_dict(ours)
            if dist.get_rank() == 0:
                assert all(type(value) is Tensor for value in state.values())
                tree_allclose(state, dict(expected.state_dict()), rtol=1e-9)
                fresh = Net(seed=4)
                fresh.load_state_dict(state)
                again = torch.optim.AdamW(fresh.parameters())
                again.load_state_dict(states)
                if seed:
                    tree_allclose(again.state_dict()["state"], optimizer.state_dict()["state"], rtol=1e-9)
            else:
                assert state == states == {}
            nested = autopar.full_state_dict({"point": Point(model.head.bias, [model.head.weight]), "pair": Pair(model.head.bias, 2)})
            if dist.get_rank() == 0:
                assert all(type(x) is Tensor for x in (nested["point"].x, nested["point"].y[0], nested["pair"].first))
                tree_allclose(nested["pair"].first, expected.head.bias.detach(), rtol=1e-9)
            step(expected, optimizer, seed), step(model, ours, seed)
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            tree_allclose(gathered, dict(expected.state_dict()), rtol=1e-9)


@case
def rank0_torch_save() -> None:
    """Rank 0's part, saved by ``torch.save``, is refused elsewhere with the remedy; what every rank has whole is an ordinary file."""
    for pins, is_split in ((TP, True), (FSDP, True), (PP, True), (DP, False)):
        model = autopar.compile(Net(), batch(), pins=pins)
        saved = [b""]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dist.get_rank() == 0:
                buffer = io.BytesIO()
                torch.save(model.state_dict(), buffer)
                saved = [buffer.getvalue()]
        dist.broadcast_object_list(saved, 0)
        other = autopar.compile(Net(seed=5), batch(), pins=pins)
        if is_split and dist.get_rank() == 1:
            for weights_only in (True, False):
                with pytest.raises(InputError, match=r"the file holds the part of .*rank 1.*full_state_dict"):
                    torch.load(io.BytesIO(saved[0]), weights_only=weights_only)
        else:
            loaded = torch.load(io.BytesIO(saved[0]))
            assert not is_split or any(isinstance(value, DTensor) for value in loaded.values())
        if not is_split:
            Net().load_state_dict(loaded)
            other.load_state_dict(loaded)
            check_equal(other, model)


@case
def files_of_every_rank_load_where_they_were_saved() -> None:
    """Each rank's own ``torch.save`` loads on the same rank of the same mesh."""
    for pins in PLANS:
        model = autopar.compile(Net(), batch(), pins=pins)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = autopar.compile(Net(seed=5), pins=pins)
        other.load_state_dict(torch.load(buffer))
        check_equal(other, model)


# --- methods beside forward -----------------------------------------------------------------------------------------------------------


@case
def submodules_and_methods() -> None:
    """Submodules, other methods and the original module can be called; gradients flow back to the parameters."""
    x, y = batch()
    for pins in PLANS:
        original, expected = Net(), Net()
        compiled = autopar.compile(original, pins=pins)
        for before in (True, False):
            for model in (expected, compiled):
                if not before:
                    model(x, y)
                model.zero_grad()
                loss = model.encode(x).square().mean() + model.layers[0](x).sum() + (x @ model.head.weight.t()).sum() * 0.1
                loss.backward()
            for p, q in zip(expected.parameters(), compiled.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or torch.allclose(gather(q.grad), p.grad, atol=1e-12)
            assert type(original(x)) is type(compiled.encode(x)) is Tensor
            tree_allclose(original(x), expected(x), rtol=1e-9)
            assert all(isinstance(p, DTensor) for p in original.parameters())
        with pytest.raises(RuntimeError):
            original(x[:, :3])
        assert all(isinstance(p, DTensor) for p in original.parameters())


@case
def generate_tp() -> None:
    """``generate`` and ``save_pretrained`` before and after training, and in evaluation; ``from_pretrained`` reads what was saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)).double()

    ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(1))
    prompt = ids[:2, :4]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    for number, pins in enumerate((TP, FSDP, PP)):
        expected, compiled = build(), autopar.compile(build(), pins=pins)
        for stage in ("before", "after", "eval"):
            for model in (expected, compiled):
                if stage == "after":
                    model(input_ids=ids, labels=ids).loss.backward()
                    torch.optim.SGD(model.parameters(), lr=0.1).step()
                if stage == "eval":
                    model.eval()
            assert torch.equal(compiled.generate(prompt, **options), expected.generate(prompt, **options)), (stage, pins)
        compiled.save_pretrained(Path(f"saved{number}"))
        again = LlamaForCausalLM.from_pretrained(Path(f"saved{number}"), dtype=torch.float64)
        tree_allclose(again(ids).logits, expected(ids).logits, rtol=1e-6)
        check_equal(again, compiled)


@case
def huggingface_methods() -> None:
    """Saving runs on the first rank; its failure is raised on every rank. Tied weights stay tied in the file."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16))
    model = autopar.compile(original, {"input_ids": torch.zeros(2, 4, dtype=torch.long)}, pins=TP)
    model.save_pretrained(Path("tied"))
    again = GPT2LMHeadModel.from_pretrained(Path("tied"))
    assert again.lm_head.weight is again.transformer.wte.weight
    check_equal(again, model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    Path("file").touch()
    with pytest.raises((InputError, AssertionError, OSError, ValueError)):
        model.save_pretrained(Path("file/below"), variant=3, max_shard_size="no size")
    assert all(isinstance(p, DTensor) for p in model.parameters())


# --- optimizers -----------------------------------------------------------------------------------------------------------------------


def check_optimizers(names: tuple[str, ...], plans: tuple[str, ...]) -> None:
    optimizers.compare(dist.get_rank(), Path(), names, plans)
    for name, by_plan in json.loads(Path(f"{dist.get_rank()}.json").read_text()).items():
        for plan, error in by_plan.items():
            assert isinstance(error, float), f"{name} on {plan}: {error}"
            assert error < 1e-9, f"{name} on {plan}: {error}"


@case
def adafactor() -> None:
    """Both Adafactors, whose factors are sums over rows and columns, step as on one device."""
    check_optimizers(("Adafactor", "Adafactor, transformers"), ("tp", "fsdp"))


@case
def matrix_optimizers_under_pipeline() -> None:
    """Optimizers that see matrices whole step as on one device where a parameter lives on one group of ranks, and where it is split."""
    check_optimizers(("Muon", "Shampoo"), ("pp", "tp"))


@case
def elementwise_optimizers() -> None:
    """Optimizers that index, compare, and write through views."""
    check_optimizers(("Rprop", "Sophia", "SAM"), ("pp", "fsdp"))


@case
def a_scaler_sees_what_any_rank_has() -> None:
    """An infinite gradient in one rank's part stops the step on every rank."""
    for pins in (TP, FSDP, PP):
        model = autopar.compile(Net(), batch(), pins=pins)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for spoilt in (False, True):
            before = whole(model)
            optimizer.zero_grad()
            scaler.scale(model(*batch())).backward()
            if spoilt:
                model.head.weight.grad[1, 7] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            changed = any(not torch.equal(value, before[name]) for name, value in whole(model).items())
            assert changed is not spoilt
            assert scaler.get_scale() == (4.0 if spoilt else 8.0)


# --- wrappers -------------------------------------------------------------------------------------------------------------------------


@case
def wrapping_again_is_refused() -> None:
    """Wrapping a compiled model or a module of it is refused in our words, before anything is changed."""
    for example in (batch(), None):
        model = autopar.compile(Net(), example, pins=DP)
        for wrap in (
            lambda model=model: DistributedDataParallel(model),
            lambda model=model: fully_shard(model),
            lambda model=model: fully_shard(model.layers[0]),
        ):
            with pytest.raises(InputError, match="a compiled model is parallel already"):
                wrap()
        with pytest.raises(InputError, match="don't reduce gradients by hand"):
            dist.all_reduce(next(model.parameters()).detach())


# --- the tests ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("cases"), CASES)


@pytest.mark.processes
@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_case(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
