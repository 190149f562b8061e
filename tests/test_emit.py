"""Emitted packages train as the original model does, in processes that can't import autopar; other systems' configurations say the plan."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.cli.models import load_model
from autopar.emit import elsewhere, write_package
from autopar.emit.prune import prune
from autopar.emit.support.command import read_batches
from autopar.emit.support.described import Input
from autopar.errors import InputError, PlanError
from autopar.plans import Plan, Request, to_json
from autopar.plans.plan import from_json
from tests.commands import refuse, run

Golden = Callable[[str, str], None]
BATCH, TOKENS, WIDTH, VOCABULARY, STEPS = 8, 6, 16, 32, 3
TARGETS = ("torchtitan", "megatron", "fsdp2")


class Layer(nn.Module):
    """Attention and two products, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Decoder(nn.Module):
    """A tied table, layers, a buffer that isn't saved and a parameter that nothing reads."""

    positions: Tensor

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.randn(TOKENS, WIDTH), persistent=False)
        self.unread = nn.Parameter(torch.randn(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.positions.to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@dataclass
class Made:
    """A model, its plan and its package, with a checkpoint and batches beside it."""

    model: nn.Module
    plan: Plan
    folder: Path
    batches: list[dict[str, Tensor]]


def draw_batch() -> dict[str, Tensor]:
    return {name: torch.randint(VOCABULARY, (BATCH, TOKENS)) for name in ("ids", "labels")}


def make(folder: Path, pins: Mapping[str, object], *, dtype: torch.dtype = torch.float64, **options: Any) -> Made:
    """A package of a decoder for four processes."""
    torch.manual_seed(0)
    model, batches = Decoder().to(dtype), [draw_batch() for _ in range(STEPS)]
    plan = autopar.plan(model, batches[0], "4xcpu", pins=pins, **options)
    write_package(model, batches[0], plan, folder)
    torch.save(model.state_dict(), folder / "original.pt")
    torch.save(batches, folder / "batches.pt")
    return Made(model, plan, folder, batches)


_WITHOUT = """
import importlib.util, os, runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("autopar", "cost_models", "transformers", "ortools"):
            raise ImportError(f"{name} isn't here")

sys.meta_path.insert(0, Blocked())
for name in ("autopar", "transformers"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is here")
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
# As in tests.processes: threads of gloo may abort a process while Python ends.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def train(made: Made, *arguments: str | Path) -> list[float]:
    """Run the package's ``main.py`` under torchrun, without autopar and transformers; returns its losses."""
    without = made.folder / "without.py"
    without.write_text(_WITHOUT, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(made.plan.world_size)]
    result = subprocess.run(
        [*launch, str(without), str(made.folder / "main.py"), *map(str, arguments)],
        env=environment,
        cwd=made.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[:8000]
    assert ("no --data: the batches are random" in result.stdout) == ("--data" not in arguments)
    return [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")]


def train_original(made: Made) -> list[float]:
    """The losses of the original model on one device, which is trained in place."""
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for batch in made.batches:
        loss = made.model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- packages that run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pins",
    [
        {"dp": 2, "tp": 2, "zero": 1, "recompute": "selective"},
        {"dp": 4, "zero": 3},
        {"pp": 2, "tp": 2, "microbatches": 2, "schedule": "1f1b", "recompute": "full"},
        {"pp": 2, "dp": 2, "zero": 2, "microbatches": 4, "schedule": "zb-h1"},
    ],
    ids=lambda pins: ",".join(f"{name}={value}" for name, value in pins.items()),
)
def test_a_package_trains_as_the_original_does(tmp_path: Path, pins: dict[str, object]) -> None:
    made = make(tmp_path, pins)
    saved = tmp_path / "trained.pt"
    losses = train(made, "--checkpoint", tmp_path / "original.pt", "--data", tmp_path / "batches.pt", "--steps", "3", "--save", saved)
    assert losses == pytest.approx(train_original(made), rel=1e-9)
    trained = torch.load(saved, weights_only=True)
    loaded = Decoder().double()
    loaded.load_state_dict(trained)  # strict: every name, and no other
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-9, atol=1e-9, msg=name)


def test_mixed_precision_trains_alike(tmp_path: Path) -> None:
    made = make(tmp_path, {"dp": 2, "tp": 2, "zero": 2}, dtype=torch.float32, precision="param_dtype=bfloat16,reduce_dtype=float32")
    losses = train(made, "--checkpoint", tmp_path / "original.pt", "--data", tmp_path / "batches.pt", "--steps", "3")
    assert losses == pytest.approx(train_original(made), rel=0.02)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "holds no batches"),
        ([torch.zeros(8, 4)], "holds no batches"),
        ([{"x": torch.zeros(8, 4)}, {"y": torch.zeros(8, 4)}], "batch 1: x is missing"),
        ({"x": torch.zeros(4, 4)}, r"batch 0: x has the sizes \(4, 4\); \(8, 4\) is needed"),
        ({"x": torch.zeros(8, 4, dtype=torch.complex64)}, "batch 0: x is complex64, of which float32 would lose something"),
    ],
)
def test_batches_that_the_model_cannot_take_are_refused(tmp_path: Path, batches: object, message: str) -> None:
    torch.save(batches, tmp_path / "batches.pt")
    (tmp_path / "text.pt").write_text("no tensors", encoding="utf-8")
    inputs = [Input("x", (8, 4), "float32", "R")]
    with pytest.raises(InputError, match=message):
        read_batches(tmp_path / "batches.pt", inputs)
    for name in ("text.pt", "absent.pt"):
        with pytest.raises(InputError, match=f"{name} can't be read"):
            read_batches(tmp_path / name, inputs)


@pytest.mark.parametrize(("given", "taken"), [("float32", False), ("int64", True), ("int32", True), ("bool", True)])
def test_labels_are_never_cut_to_integers(tmp_path: Path, given: str, *, taken: bool) -> None:
    torch.save({"label": torch.zeros(8, dtype=getattr(torch, given))}, tmp_path / "batches.pt")
    inputs = [Input("label", (8,), "int64", "R")]
    if taken:
        assert len(read_batches(tmp_path / "batches.pt", inputs)) == 1
        return
    with pytest.raises(InputError, match="batch 0: label is float32, of which int64 would lose something; save it as int64"):
        read_batches(tmp_path / "batches.pt", inputs)


def test_random_integers_have_the_range_of_positional_examples(tmp_path: Path) -> None:
    model = Decoder(1)
    batch = tuple(draw_batch().values())
    write_package(model, batch, autopar.plan(model, batch, "1xcpu"), tmp_path)
    table = (tmp_path / "parallel" / "layout.py").read_text(encoding="utf-8")
    for name, x in zip(("ids", "labels"), batch, strict=True):
        assert re.search(rf'Input\("{name}", .*, least={x.min()}, most={x.max()}\)', table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--save", "absent/trained.pt"), "absent/trained.pt can't be written: there is no folder"),
        (("--save", "."), "can't be written: it is a folder"),
        (("--data", "nope.pt"), "nope.pt can't be read"),
        (("--data", "tensors.pt"), "tensors.pt holds no batches"),
        (("--lr", "nan"), "argument --lr: 'nan': a finite number from 0 is needed"),
        (("--weight-decay", "-1"), "argument --weight-decay: '-1': a finite number from 0 is needed"),
        (("--steps", "-1"), "argument --steps: '-1': a whole number from 0 is needed"),
        (("--seed", "99999999999999999999"), "argument --seed: '99999999999999999999': a whole number from 0 is needed"),
    ],
)
def test_a_wrong_command_line_ends_before_the_first_step(pair: Made, arguments: tuple[str, ...], message: str) -> None:
    torch.save([torch.zeros(3)], pair.folder / "tensors.pt")
    environment = {"PATH": os.environ["PATH"]}
    command = [sys.executable, str(pair.folder / "main.py"), *arguments]
    alone = subprocess.run(command, env=environment, cwd=pair.folder, capture_output=True, text=True, timeout=60)
    assert alone.returncode == 2
    assert message in alone.stderr
    assert "Traceback" not in alone.stderr
    assert not alone.stdout


def test_a_step_of_random_data_updates_buffers(tmp_path: Path) -> None:
    model, inputs = Counting(), {"x": torch.randn(8, 4)}
    plan = autopar.plan(model, inputs, "2xcpu", pins={"dp": 2})
    write_package(model, inputs, plan, tmp_path)
    losses = train(Made(model, plan, tmp_path, []), "--steps", "3", "--save", tmp_path / "trained.pt")
    assert len(losses) == 3
    model.load_state_dict(torch.load(tmp_path / "trained.pt", weights_only=True))
    assert model.count == 3


def test_a_wrong_number_of_processes_is_refused(pair: Made) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "PATH": os.environ["PATH"]}
    command = [sys.executable, str(pair.folder / "main.py")]
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "the plan is for 4 ranks (dp=2 x tp=2), 1 is running" in alone.stderr
    without = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60)
    assert "start this with torchrun" in without.stderr


# --- what is in a package ---------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two products; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).square().mean()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("pair")
    model, x = Pair(), torch.randn(8, 4)
    plan = autopar.plan(model, {"x": x}, "4xcpu", pins={"dp": 2, "tp": 2})
    write_package(model, {"x": x}, plan, folder)
    return Made(model, plan, folder, [{"x": x}])


def test_the_program_is_readable(pair: Made, golden: Golden) -> None:
    text = (pair.folder / "parallel" / "model.py").read_text(encoding="utf-8")
    golden("emitted_model.txt", re.sub(r"(?<=test_emit\.py:)\d+", "N", text))  # the line of the model above


def test_the_tables_are_readable(pair: Made, golden: Golden) -> None:
    golden("emitted_layout.txt", (pair.folder / "parallel" / "layout.py").read_text(encoding="utf-8"))


def test_names_in_a_plan_never_become_code(pair: Made, tmp_path: Path) -> None:
    """A plan's file may come from anywhere, so its names are text in the package, whatever stands in them."""
    model, axis = 'x"""; raise SystemExit #', "a', print('ran'), '"

    def rename(part: Any) -> Any:
        if isinstance(part, dict):
            return {rename(name): rename(value) for name, value in part.items()}
        return [rename(each) for each in part] if isinstance(part, list) else axis if part == "dp" else part

    data = json.loads(to_json(replace(pair.plan, model=model, request=Request())))
    with pytest.raises(PlanError, match="the name of an axis is a word"):
        from_json(json.dumps({**data, "plan": {**rename(data["plan"]), "request": data["plan"]["request"]}}))
    write_package(pair.model, pair.batches[0], from_json(json.dumps(data)), tmp_path)
    for name in ("__init__.py", "layout.py", "model.py"):
        text = (tmp_path / "parallel" / name).read_text(encoding="utf-8")
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert not names & {"print", "SystemExit"}, text


def test_a_package_imports_torch_only(pair: Made) -> None:
    found = set()
    for path in pair.folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.partition(".")[0] for name in names}
    assert found - set(sys.stdlib_module_names) == {"torch", "parallel", "safetensors"}


def test_the_readme_says_the_plan(pair: Made) -> None:
    text = (pair.folder / "README.md").read_text(encoding="utf-8")
    assert f"--nproc-per-node {pair.plan.world_size} main.py" in text
    assert "dp=2 x tp=2" in text
    for path in pair.folder.rglob("*.py"):
        assert path.name in text or path.name == "__init__.py", path


def test_copies_hold_what_is_used_and_no_more() -> None:
    texts = prune([("autopar.ops.collectives", "all_reduce")])
    assert "class GroupAxis" not in texts["comm.py"]
    assert "def all_gather(" not in texts["collectives.py"]
    assert "def all_reduce(" in texts["collectives.py"]
    assert "class AllReduce" in texts["steps.py"]
    with pytest.raises(ValueError, match="has no nothing"):
        prune([("autopar.ops.collectives", "nothing")])
    # A package runs schedules, and has nothing to record them with.
    assert not {"recording.py", "recorded.py", "trace.py"} & set(prune([("autopar.runtime.executor", "Executor")]))


def test_names_of_a_plan_are_never_code(tmp_path: Path) -> None:
    model, inputs = Counting(), {"x": torch.randn(8, 4)}
    plan = autopar.plan(model, inputs, "2xcpu", pins={"dp": 2})
    folders = {"Net": tmp_path / "usual", '"""; print("\\': tmp_path / "hostile"}
    usual, hostile = (write_package(model, inputs, replace(plan, model=name), folder) for name, folder in folders.items())
    for paths in zip(usual, hostile, strict=True):
        if paths[0].suffix == ".py":
            bodies = [ast.parse(path.read_text(encoding="utf-8")).body[1:] for path in paths]
            assert len({ast.dump(ast.Module(body, [])) for body in bodies}) == 1


def test_layers_that_are_alike_share_a_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Decoder(layers=4), draw_batch()
    plan = autopar.plan(model, batch, "2xcpu", pins={"pp": 2, "microbatches": 2, "schedule": "1f1b"})
    write_package(model, batch, plan, tmp_path)
    tree = ast.parse((tmp_path / "parallel" / "model.py").read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [name for name in functions if name.startswith("layers")] == ["layers"]
    assert {"stage_0", "stage_1"} <= set(functions)


def test_buffers_of_a_configuration_get_values_without_weights(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32,'
        ' "vocab_size": 64, "max_position_embeddings": 32}',
        encoding="utf-8",
    )
    loaded = load_model(f"hf:{config}", batch=2, seq=8, device="cpu", weights=False)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    whole = load_model(f"hf:{config}", batch=2, seq=8, device="cpu")
    for name, buffer in whole.model.named_buffers():
        torch.testing.assert_close(loaded.model.get_buffer(name), buffer)
    run("plan", f"hf:{config}", "--batch", "2", "--seq", "8", "--cluster", "2xcpu", "-o", tmp_path / "plan.json")
    result = run("emit", tmp_path / "plan.json", f"hf:{config}", "--batch", "2", "--seq", "8", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    values = torch.load(tmp_path / "out" / "buffers.pt", weights_only=True)
    assert {x.shape for x in values.values()} >= {buffer.shape for _, buffer in whole.model.named_buffers()}


# --- what is refused --------------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """Returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Counting(Outputs):
    """Has a buffer that a step changes."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(x).square().mean() * self.count


class Doubled(torch.autograd.Function):
    """An autograd function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class WithFunction(Outputs):
    """Calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.layer(x)).square().mean()  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Refusal:
    """A model and pins, and what the message must say."""

    model: Callable[[], nn.Module]
    message: str
    pins: Mapping[str, object] = field(default_factory=dict)


@pytest.mark.parametrize(
    "case",
    [
        Refusal(Outputs, "the model returns no loss"),
        Refusal(Counting, "buffers that a step changes \\(count\\)", {"microbatches": 2}),
        Refusal(WithFunction, "autograd functions and gradient hooks"),
    ],
    ids=lambda case: case.model.__name__,
)
def test_what_a_package_cannot_do_is_refused_by_name(tmp_path: Path, case: Refusal) -> None:
    model, inputs = case.model(), {"x": torch.randn(8, 4)}
    plan = autopar.plan(model, inputs, "2xcpu", pins=case.pins)
    with pytest.raises(InputError, match=case.message):
        write_package(model, inputs, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_what_is_missing(pair: Made, tmp_path: Path) -> None:
    plan = pair.folder / "plan.json"
    assert "MODEL, which the plan was made for" in refuse("emit", plan, "-o", tmp_path / "out")
    assert "-o FOLDER" in refuse("emit", plan, "examples/mlp.py:build")
    assert "isn't an empty folder" in refuse("emit", plan, "examples/mlp.py:build", "-o", pair.folder)
    assert "fingerprint" in (message := refuse("emit", plan, "examples/mlp.py:build", "-o", tmp_path / "out")) or "plan" in message


def test_a_plan_that_names_its_model_needs_no_other_word(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    sizes = ["--batch", "8", "--seq", "16"]
    assert run("plan", "hf:examples/configs/gpt2", *sizes, "--cluster", "2xcpu", "--pin", "tp=2", "-o", plan).exit_code == 0
    asked = "hf:examples/configs/gpt2"
    assert "Invalid value for '--batch'" in run("emit", plan, "--batch", "0", "-o", tmp_path / "none").stderr
    assert refuse("emit", plan, asked, "--to", "torchtitan").startswith("MODEL has no say with --to")
    assert refuse("emit", plan, "--seq", "8", "--to", "fsdp2").startswith("--seq has no say with --to")
    for folder, model in (("named", ()), ("again", (asked,)), ("given", (asked, *sizes))):
        done = run("emit", plan, *model, "-o", tmp_path / folder)
        assert done.exit_code == 0, done.output
    named, again, given = (
        sorted(path.read_bytes() for path in (tmp_path / folder).rglob("*.py")) for folder in ("named", "again", "given")
    )
    assert named == again == given


# --- configurations of other systems ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelined() -> Plan:
    torch.manual_seed(0)
    pins = {"pp": 2, "dp": 2, "tp": 2, "zero": 2, "microbatches": 2, "schedule": "zb-h1", "recompute": "selective"}
    return autopar.plan(Decoder(layers=4), draw_batch(), "8xcpu", pins=pins, precision="param_dtype=bfloat16,reduce_dtype=float32")


def test_torchtitan_says_the_plans_numbers(pipelined: Plan) -> None:
    configuration = elsewhere.configure(pipelined, "torchtitan")
    data = tomllib.loads(configuration.text)
    assert data["parallelism"] == {
        "data_parallel_replicate_degree": 1,
        "data_parallel_shard_degree": 2,
        "fsdp_reshard_after_forward": "never",
        "tensor_parallel_degree": 2,
        "context_parallel_degree": 1,
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_schedule": "InterleavedZeroBubble",
        "pipeline_parallel_microbatch_size": 2,
    }
    assert (data["training"]["global_batch_size"], data["training"]["seq_len"]) == (BATCH, TOKENS)
    assert data["training"]["mixed_precision_param"] == "bfloat16"
    assert data["activation_checkpoint"]["mode"] == "selective"
    assert any("schedule zb-h1" in remark for remark in configuration.remarks)
    assert any("ZeRO level 2" in remark for remark in configuration.remarks)


def test_megatron_says_the_plans_numbers(pipelined: Plan) -> None:
    configuration = elsewhere.configure(pipelined, "megatron")
    lines = [line.rstrip(" \\") for line in configuration.text.splitlines() if line.startswith("--")]
    assert {"--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--micro-batch-size 2", "--global-batch-size 8"} <= set(
        lines
    )
    assert {"--use-distributed-optimizer", "--recompute-granularity selective", "--bf16"} <= set(lines)
    assert any("it runs 1f1b" in remark for remark in configuration.remarks)


def test_fsdp2_is_python(pipelined: Plan) -> None:
    configuration = elsewhere.configure(pipelined, "fsdp2")
    names: dict[str, Any] = {}
    exec(configuration.text, names)  # what it imports is there
    assert callable(names["parallelize"])
    assert 'init_device_mesh("cuda", (2, 2), mesh_dim_names=("shard", "tp"))' in configuration.text
    assert any("cut the model at layers." in remark for remark in configuration.remarks)


def test_other_systems_are_told_what_the_model_has() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    plan = autopar.plan(model, (torch.randn(BATCH, WIDTH),), "2xcpu", pins={"pp": 2})
    assert "seq" not in "".join(elsewhere.configure(plan, target).text.partition("\n\n")[2] for target in ("torchtitan", "megatron"))
    assert f"global_batch_size = {BATCH}" in elsewhere.configure(plan, "torchtitan").text
    names: dict[str, Any] = {}
    exec(elsewhere.configure(plan, "fsdp2").text, names)
    assert names["parallelize"](model) is model  # of axes that split nothing there is no mesh


def test_styles_of_some_layers_name_these_layers(pipelined: Plan) -> None:
    *_, layers = sorted(pipelined.groups, key=lambda group: group.count)
    some = replace(layers, name="layers.*[0-1]", paths=layers.paths[:2])
    groups = tuple(some if group is layers else group for group in pipelined.groups)
    assert '"layers.*.up": RowwiseParallel()' in elsewhere.configure(pipelined, "fsdp2").text
    text = elsewhere.configure(replace(pipelined, groups=groups), "fsdp2").text
    assert '"layers.*' not in text  # a pattern [0-1] would be one of characters there
    assert '"layers.0.up": RowwiseParallel()' in text
    assert '"layers.1.up": RowwiseParallel()' in text


def test_an_axis_that_splits_nothing_is_no_tensor_parallelism() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    plan = autopar.plan(model, (torch.randn(BATCH, WIDTH),), "7xH100")
    assert plan.batch_axes == ()
    configuration = elsewhere.configure(plan, "torchtitan")
    assert tomllib.loads(configuration.text)["parallelism"]["tensor_parallel_degree"] == 1
    assert "the 7 ranks of dp all do the same work" in configuration.text


def test_tables_have_no_style_of_a_product() -> None:
    plan = autopar.plan(Decoder(), draw_batch(), "4xcpu", pins={"dp": 2, "tp": 2, "zero": 3, "vocabulary": True})
    assert any(state.kind.value == "S" for state in plan.layouts["p_embedding_weight"])
    configuration = elsewhere.configure(plan, "fsdp2")
    assert '"embedding":' not in configuration.text
    assert any(remark.startswith("embedding: a table that is looked up") for remark in configuration.remarks)
    # The buffer positions is no parameter.
    assert "positions" not in configuration.text


@pytest.mark.parametrize("target", TARGETS)
def test_what_cannot_be_said_is_said_line_by_line(pipelined: Plan, tmp_path: Path, target: str) -> None:
    pipelined.save(tmp_path / "plan.json")
    shown = run("emit", tmp_path / "plan.json", "--to", target)
    written = run("emit", tmp_path / "plan.json", "--to", target, "-o", tmp_path / "file")
    assert shown.exit_code == written.exit_code == 0
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert shown.stdout == text
    remarks = elsewhere.configure(pipelined, target).remarks
    assert remarks
    for remark in remarks:
        assert f"# - {remark}\n" in text
        assert f"not expressed: {remark}\n" in written.stdout
