"""Programs whose operators torch's compiler fuses against those that run operator by operator and against one device. In float64."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar import torch_compiler
from autopar.errors import InputError
from autopar.ops import Fused
from tests.helpers import tree_allclose
from tests.processes import Outcomes, run_cases

# Warnings that torch's compiler causes itself, by imports and by asking for the gradient of tensors that aren't leaves.
pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{text}") for text in ("The .grad attribute of a Tensor", ".*torch.jit.*is deprecated")),
    pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch's compiler needs a C++ compiler"),
]

WIDTH, HEADS, VOCABULARY = 8, 2, 12


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        core = F.scaled_dot_product_attention(q.tanh(), k.tanh(), v, is_causal=True)
        x = x + self.dropout(self.o(core.transpose(1, 2).flatten(2)))
        return x + self.down(F.silu(self.gate(x)) * self.up(x).tanh())


class Decoder(nn.Module):
    """Layers, and a second head that the loss may leave out."""

    def __init__(self, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        x = x.sigmoid() * x
        main, other = (x * self.scale).tanh(), (x + self.shift).tanh()
        return F.cross_entropy(self.head(main).flatten(0, 1), labels.flatten()), other


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


def draw_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (4, 6), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 0)}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own messages: torch's compiler writes thousands of its own."""
    return [record.getMessage() for record in caplog.records if record.name == "autopar"]


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def run(model: nn.Module, uses: Callable[[Any], Tensor] | None = None, around: AbstractContextManager[Any] | None = None) -> dict[str, Any]:
    """Loss, second output and all gradients of one step, None where there is none; drawing from seed 5."""
    model.zero_grad()
    torch.manual_seed(5)
    with around or nullcontext():
        results = model(**draw_batch())
    (uses or (lambda given: given[0]))(results).backward()
    values = {str(number): whole(x).detach() for number, x in enumerate(results)}
    return values | {name: whole(p.grad) for name, p in model.named_parameters()}


def parts_of(model: autopar.CompiledModule) -> list[Fused]:
    assert model._last is not None
    return list({id(part): part for part in model._last.module.modules() if isinstance(part, Fused)}.values())


@contextmanager
def compiling_fast() -> Iterator[None]:
    """Code without vector instructions, which takes a third of the time to compile."""
    from torch._inductor import config

    with config.patch({"cpp.simdlen": 1}):
        yield


def compare(model: nn.Module, *, with_one_device: bool = True, **options: Any) -> autopar.CompiledModule:
    """Two steps of the model, fused and not, must agree; the fused model is returned."""
    fused = autopar.compile(copy.deepcopy(model), draw_batch(), fuse=True, **options)
    plain = autopar.compile(copy.deepcopy(model), draw_batch(), **options)
    assert not parts_of(plain)
    for _ in range(2):
        got = run(fused)
        tree_allclose(got, run(plain))
        if with_one_device:
            tree_allclose(got, run(model))
    compiled = [part for part in parts_of(fused) if part.compilations]
    assert compiled
    assert all(part.compilations == [""] for part in compiled)
    return fused


# --- one rank ---


@pytest.fixture(autouse=True)
def _set_up() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with compiling_fast():
        yield
    torch.set_default_dtype(before)


def test_one_rank_in_all_modes() -> None:
    """In training, without gradients, in inference mode, with ``retain_graph``; nothing of that counts as a recompilation."""
    model = Decoder()
    fused = compare(model)
    expected = model(**draw_batch())
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            tree_allclose(fused(**draw_batch()), expected)
    loss, _ = fused(**draw_batch())
    fused.zero_grad()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in fused.named_parameters() if p.grad is not None}
    loss.backward()
    tree_allclose({name: p.grad for name, p in fused.named_parameters() if name in once}, {name: 2 * x for name, x in once.items()})
    assert all(set(part.compilations) == {""} for part in parts_of(fused))
    # A part whose output the backward doesn't use gets no gradient, as with torch's operators; a compiled backward makes zeros.
    for uses in (lambda given: given[0], lambda given: given[1].sum(), lambda given: given[0] + given[1].sum()):
        got = run(fused, uses)
        tree_allclose(got, run(model, uses))
    assert run(fused)["shift"] is None
    assert run(fused, lambda given: given[1].sum())["scale"] is None


def test_a_second_derivative_is_refused_in_words() -> None:
    fused = autopar.compile(Decoder(1), draw_batch(), fuse=True)
    loss, _ = fused(**draw_batch())
    with pytest.raises(InputError, match=r"create_graph=True .* fused operators \(.*fuse=False"):
        torch.autograd.grad(loss, list(fused.parameters()), create_graph=True, allow_unused=True)


def test_backwards_are_compiled_with_forwards() -> None:
    """So that it is the forward that fails where one can't be; here the compiler is gone before the first backward."""
    from torch._inductor import config

    model = Decoder(1)
    fused = autopar.compile(copy.deepcopy(model), draw_batch(), fuse=True)
    loss, _ = fused(**draw_batch())
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        loss.backward()
    tree_allclose({name: p.grad for name, p in fused.named_parameters()}, {k: x for k, x in run(model).items() if not k.isdigit()})


def test_layers_are_compiled_once_however_many_there_are(caplog: pytest.LogCaptureFixture) -> None:
    counts = []
    for layers in (2, 5):
        fused = autopar.compile(Decoder(layers), draw_batch(), fuse=True)
        with caplog.at_level(logging.WARNING, "autopar"):
            run(fused)
        counts.append([len(part.compilations) for part in parts_of(fused)])
    assert counts[0] == counts[1]
    assert set(counts[0]) == {1}
    assert not said(caplog)


def test_what_is_compiled_is_told() -> None:
    """By the line on the plan first, then before each part, which takes seconds; and nothing where nothing is compiled."""
    told: list[str] = []
    model = autopar.compile(Decoder(), fuse=True, progress=told.append)
    model(**draw_batch())[0].backward()
    parts = [x for x in told if x.startswith("compiling ")]
    assert [x.partition(":")[0] for x in parts] == [f"compiling part {number} of {len(parts)}" for number in range(1, len(parts) + 1)]
    assert len(parts) == len({part for part in model._last.module.modules() if isinstance(part, Fused)}) > 1
    assert parts[0].startswith(f"compiling part 1 of {len(parts)}: layers.0 and 1 like it, fused_0 (tests/test_fuse.py:")
    assert told.index(parts[0]) > told.index(next(x for x in told if "predicted" in x))
    model(**draw_batch())[0].backward()
    assert [x for x in told if x.startswith("compiling ")] == parts


def test_a_recompilation_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Of an input whose memory is in another order, torch compiles a function of its own."""

    class Pointwise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.sin() * x.tanh()).exp()

    model, x = Pointwise(), torch.randn(4, 6)
    fused = autopar.compile(model, (x,), fuse=True)
    with caplog.at_level(logging.WARNING, "autopar"):
        tree_allclose(fused(x), model(x))
        assert not said(caplog)
        tree_allclose(fused(x.t().contiguous().t()), model(x))
    (message,) = said(caplog)
    assert "outside of layers, fused_0 (tests/test_fuse.py:" in message
    assert "stride" in message
    (part,) = parts_of(fused)
    assert len(part.compilations) == 2


def test_what_is_looked_up_out_of_range_is_the_same_error() -> None:
    fused = autopar.compile(Decoder(1), draw_batch(), fuse=True)
    batch = draw_batch()
    batch["ids"][0, 0] = -1
    with pytest.raises(IndexError, match="index out of range in self"):
        fused(**batch)
    batch = draw_batch()
    batch["labels"][0, 0] = VOCABULARY
    with pytest.raises(IndexError, match="out of bounds"):
        fused(**batch)


def test_random_masks_statistics_and_functions_of_the_user_stay_as_they_are() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm, self.out = nn.Embedding(VOCABULARY, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(self.embedding(ids[:, 0]).tanh().square())
            x = F.dropout(x.sigmoid() * x, 0.5)
            x = Round.apply(x.tanh() * 4).exp() + 1
            return (self.out(x).square() * labels[:, :1]).mean(), x

    model = Net()
    fused = compare(model, with_one_device=False)
    assert model.norm.running_mean is not None
    plain = autopar.compile(copy.deepcopy(model), draw_batch())
    run(plain), run(plain)
    tree_allclose(dict(fused.named_buffers()), dict(plain.named_buffers()))


def test_hooks_of_parameters_and_frozen_parameters() -> None:
    model = Decoder(1)
    model.layers[0].up.weight.requires_grad_(False)
    seen: dict[str, list[Tensor]] = {"fused": [], "plain": []}
    for name in seen:
        compiled = autopar.compile(copy.deepcopy(model), draw_batch(), fuse=name == "fused")
        compiled.layers[0].q.weight.register_hook(seen[name].append)
        compiled.layers[0].k.weight.register_hook(lambda gradient: gradient * 2)
        seen[name].extend(x for x in run(compiled).values() if x is not None)
    tree_allclose(seen["fused"], seen["plain"])


def test_without_a_compiler_the_error_names_the_remedy() -> None:
    from torch._inductor import config

    torch_compiler.missing_compiler.cache_clear()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(InputError, match=r"no C\+\+ compiler: install .*fuse=False"):
        autopar.compile(Decoder(1), draw_batch(), fuse=True)
    torch_compiler.missing_compiler.cache_clear()


def test_a_part_that_cannot_be_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """The compiler is there when it is looked for, and isn't when it is called: an error, or operators, as was asked for."""
    from torch._inductor import config

    model = Decoder(1)
    for required in (True, False):
        fused = autopar.compile(copy.deepcopy(model), draw_batch(), fuse=True)
        for part in parts_of(fused):
            part._required = required
        with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}), caplog.at_level(logging.WARNING, "autopar"):
            if required:
                with pytest.raises(InputError, match=r"torch.compile failed at outside of layers, fused_\d .*compile with fuse=False"):
                    fused(**draw_batch())
                assert not said(caplog)
            else:
                tree_allclose(run(fused), run(model))
                assert len(said(caplog)) == len(parts_of(fused))
                assert all("runs operator by operator" in message for message in said(caplog))


# --- two ranks ---


@compiling_fast()
def case_data_parallel() -> None:
    compare(Decoder(), mesh={"dp": 2}, pins={"fsdp": False})


@compiling_fast()
def case_tensor_parallel() -> None:
    compare(Decoder(), pins={"tp": 2})


@compiling_fast()
def case_fsdp() -> None:
    compare(Decoder(), mesh={"dp": 2}, pins={"fsdp": True})


@compiling_fast()
def case_dropout() -> None:
    """Masks are drawn by the same numbers in the same order."""
    compare(Decoder(dropout=0.3), with_one_device=False, pins={"tp": 2})


@compiling_fast()
def case_recompute() -> None:
    compare(Decoder(dropout=0.3), with_one_device=False, mesh={"dp": 2}, pins={"fsdp": True, "recompute": "full"})


@compiling_fast()
def case_pipeline() -> None:
    compare(Decoder(), pins={"pp": 2, "schedule": "1f1b", "microbatches": 2, "recompute": "selective"})


@compiling_fast()
def case_zero_bubble() -> None:
    compare(Decoder(), pins={"pp": 2, "schedule": "zb-h1", "microbatches": 2})


CASES = (case_data_parallel, case_tensor_parallel, case_fsdp, case_dropout, case_recompute, case_pipeline, case_zero_bubble)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("fuse"), CASES)


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
def test_two_ranks(outcomes: Outcomes, case: Callable[[], None]) -> None:
    outcomes.check(case.__name__)
