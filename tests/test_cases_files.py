"""Files and arguments that can't be used: one clear message and exit code 2, at once, no traceback, nothing that directs a terminal.

The files are in ``tests/cases``; what is wrong in each stands in its name.
"""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.cli.models import load_model
from autopar.cli.sources import find_dtype
from autopar.cli.terminal import show_lines
from autopar.errors import AutoparError, CaptureError, HardwareError, InputError, PlanError
from autopar.plans.plan import Plan, to_json
from autopar.texts import check_writable, printable, write_text
from tests.commands import refuse, run
from tests.plans import make_plan, set_field

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parent.parent
MLP = f"{ROOT / 'examples' / 'mlp.py'}:build"
TINY = f"{CASES / 'models' / 'tinymodel.py'}:build"

# Seconds that a refusal may take on a busy machine, the import of transformers included: what hangs takes longer.
QUICK = 20.0


def refuse_quickly(*arguments: str | Path) -> str:
    """The message of a command that must fail, quickly, in one line that a terminal can take."""
    start = time.perf_counter()
    message = refuse(*arguments)
    assert time.perf_counter() - start < QUICK
    assert message == printable(message)
    assert len(message) < 1000
    return message


def list_cases(kind: str) -> list[str]:
    """Names of the files of a kind, without their ends; every one of them must have a message in the table of its test."""
    return sorted(path.stem for path in (CASES / kind).iterdir() if path.suffix in (".json", ".toml", ".py"))


CONFIGS = {
    "hf_hang_vit_labels1e12": '"num_labels" is 1000000000000, more than 1048576',
    "hf_tb_attribute_map": "isn't a valid 'llama' configuration: AttributeError",
    "hf_tb_model_type_list": '"model_type" is [], a text is needed',
    "hf_tb_text_config": '"text_config" is 5, an object is needed',
    "hf_tb_vit_channels": '"num_channels" is -1, an integer from 1 is needed',
    "hf_tb_vit_image_list": '"image_size" is [28], an integer from 1, or a list of two of them, is needed',
    "hf_tb_vit_labels0": '"num_labels" is 0, an integer from 1 is needed',
    "hf_tb_vocab0": '"vocab_size" is 0, an integer from 1 is needed',
}


@pytest.mark.parametrize("name", list_cases("configs"))
def test_a_bad_configuration(name: str) -> None:
    path = CASES / "configs" / f"{name}.json"
    message = refuse_quickly("plan", f"hf:{path}", "--cluster", "8xH100")
    assert message.startswith(str(path))
    assert CONFIGS[name] in message


def test_a_configuration_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "hf_tb_deep.json"
    path.write_text("[" * 50_000 + "]" * 50_000)
    assert "isn't JSON" in refuse_quickly("plan", f"hf:{path}", "--cluster", "8xH100")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, '"num_hidden_layers" is 1000000000, more than 10000'),
        ({"hidden_size": 10**4000}, '"hidden_size" is larger than any number of 64 bits'),
        ({"hidden_size": 64.5}, "config.json"),
        ({"vocab_size": "many"}, "\"vocab_size\" is 'many', an integer from 1 is needed"),
        ({"vocab_size": True}, '"vocab_size" is True'),
        ({"max_position_embeddings": -1}, '"max_position_embeddings" is -1, an integer from 1 is needed'),
        ({"torch_dtype": "int8"}, "its dtype is torch.int8, which no parameters are trained in"),
        ({"torch_dtype": 5}, "config.json"),
        ({"architectures": [5]}, '"architectures" names 5'),
        ({"architectures": {"a": 1}}, "config.json"),
        ({"model_type": "\x1b]0;pwned\x07"}, r"knows no model_type '\x1b]0;pwned\x07'"),
        ({"model_type": "\ud800"}, r"knows no model_type '\ud800'"),
        ({"hidden_act": "no such function"}, "transformers can't build this model: KeyError"),
        ({"get_text_config": 5}, "isn't a valid 'llama' configuration: "),
    ],
)
def test_other_faults_of_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = json.loads((CASES / "configs" / "hf_tb_vocab0.json").read_text()) | {"vocab_size": 64} | changes
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert message in refuse_quickly("plan", f"hf:{tmp_path}", "--cluster", "8xH100")


MACHINES = {
    "toml_tb_bandwidth_1e-320": "device.mem_bandwidth_bytes_per_s = 1e-320 is not a rate from 1e3 to 1e18 bytes per second",
    "toml_tb_bigint": "is no TOML: Exceeds the limit",
    "toml_tb_deep": "is no TOML: maximum recursion depth exceeded",
    "toml_tb_launch_1e308": "device.launch_seconds = 1e+308 is not seconds from 0 to 60",
    "toml_tb_no_float32": "has no peak_flops for float32, only for bfloat16, float16",
}


@pytest.mark.parametrize("name", list_cases("machines"))
def test_a_bad_machine(name: str) -> None:
    assert MACHINES[name] in refuse_quickly("plan", MLP, "--cluster", f"8x{CASES / 'machines' / name}.toml")


def test_other_faults_of_machines(tmp_path: Path) -> None:
    text = (ROOT / "cost_models" / "machines" / "h100.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    for old, new, message in [
        ("devices_per_node = 8", f"devices_per_node = 1{'0' * 4000}", "devices_per_node = 1000"),
        ("mem_bandwidth_bytes_per_s = 3.35e12", "mem_bandwidth_bytes_per_s = 3350", ""),
        ("matmul_efficiency = 0.801", "matmul_efficiency = 1e-300", "device.matmul_efficiency = 1e-300 is not a fraction from 0.001 to 1"),
        ('name = "h100"', 'name = "\\u001b[2J"', r"name = '\x1b[2J' is not a text of printable characters"),
        ('name = "h100"', 'name = ""', "name = '' is not a text"),
        ("[device]", '[device]\n"\\u001b[2J" = 1', r"device.\x1b[2J is unknown"),
        ("float32 = 67e12", "float32 = 67", "device.peak_flops.float32 = 67 is not a rate from 1e6 to 1e21 FLOP/s"),
    ]:
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        if message:
            assert message in refuse_quickly("plan", MLP, "--cluster", f"8x{path}")
        else:
            autopar.Cluster.parse(f"8x{path}")
    path.write_text("#" * 1_100_000)
    assert "has more than 1,000,000 bytes" in refuse_quickly("plan", MLP, "--cluster", f"8x{path}")


MODELS = {
    "py_baseexc": "failed at",
    "py_complex": "has no peak_flops for complex64",
    "py_fwd_item": "the line reads a value out of a tensor",
    "py_genexit": "GeneratorExit",
    "py_int8": "has no peak_flops for int8",
    "py_lazy": "'weight' of the model has no sizes yet, because its module is lazy",
    "py_modfwd_exit": "SystemExit: 0. Check that model(**example_inputs) runs",
    "py_nested": "the example input 'input' is nested: give a dense tensor",
    "py_quant": "the example input 'input' is quantized: give a dense tensor",
    "py_unprintable": "E: (its text can't be made)",
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|quantization|quantized)")
@pytest.mark.parametrize("name", [name for name in list_cases("models") if name != "tinymodel"])
def test_a_bad_model(name: str) -> None:
    assert MODELS[name] in refuse_quickly("plan", f"{CASES / 'models' / name}.py:build", "--cluster", "2xcpu")


def test_tinymodel() -> None:
    """The free plan is as fast as one with a pin: a single micro-batch on two pipeline ranks, where an op's launch is all that it takes."""
    loaded = load_model(TINY)
    free = autopar.plan(loaded.model, loaded.example_inputs, "8xH100")
    pinned = autopar.plan(loaded.model, loaded.example_inputs, "8xH100", pins={"pp": 2, "microbatches": 1})
    assert free.proof.objective_ns <= pinned.proof.objective_ns


@pytest.mark.parametrize("name", list_cases("plans"))
def test_a_bad_plan_of_an_old_version(name: str) -> None:
    path = CASES / "plans" / f"{name}.json"
    assert refuse_quickly("explain", path).startswith(f"{path}: {'the field' if 'duplicate' in name else 'plan version 2'}")


HUGE = 10**400
Change = Callable[[dict[str, Any]], Any]

# The same faults, each in a plan that is valid but for it: what is changed, and the message.
FAULTS: dict[str, tuple[Change, str]] = {
    "plan_ok_cluster_garbage": (set_field("cluster", to="nonsense"), "plan.cluster is 'nonsense', which is no cluster"),
    "plan_ok_escape": (set_field("model", to="\x1b]0;pwned\x07\x1b[2JM"), r"plan.model holds '\x1b', which is no printable character"),
    "plan_ok_layout_outer0": (
        set_field("layouts", "input_ids", to="S0/0,R"),
        "plan.layouts['input_ids']: S0/0 splits inside 0 outer blocks",
    ),
    "plan_ok_mesh_not_cluster": (set_field("mesh", "sizes", to=[10**30, 1]), "plan.mesh.sizes[0] is larger than any number of 64 bits"),
    "plan_ok_minimal": (
        lambda plan: plan.update(memory=dict.fromkeys(plan["memory"], 0)),
        "plan.memory.budget is 0, an integer from 1 is needed",
    ),
    "plan_ok_negative_memory": (
        set_field("memory", "parameters", to=-(10**12)),
        "plan.memory.parameters is -1000000000000, an integer from 0 is needed",
    ),
    "plan_ok_negative_seconds": (set_field("costs", 0, "seconds", to=-5.0), "plan.costs[0].seconds is -5.0, a number from 0 is needed"),
    "plan_ok_objective_contradicts_step": (
        set_field("proof", "objective_ns", to=5),
        "plan.proof.objective_ns is 5, but plan.costs add up to a step of 11000000 ns",
    ),
    "plan_ok_over_budget": (
        set_field("memory", "budget", to=1),
        "plan.memory adds up to 19595678901 bytes, more than plan.memory.budget, 1",
    ),
    "plan_tb_memory_1e30": (set_field("memory", "optimizer", to=10**30), "plan.memory.optimizer is larger than any number of 64 bits"),
    "plan_tb_memory_bigint": (set_field("memory", "workspace", to=HUGE), "plan.memory.workspace is larger than any number of 64 bits"),
    "plan_tb_mesh_huge": (set_field("mesh", "sizes", to=[10**3000, 10**3000]), "plan.mesh.sizes[0] is larger than any number of 64 bits"),
    "plan_tb_seconds_bigint": (set_field("costs", 0, "seconds", to=HUGE), "plan.costs[0].seconds is larger than any number of 64 bits"),
    "plan_tb_surrogate": (set_field("model", to="\ud800"), r"plan.model holds '\ud800', which is no printable character"),
}


def spoil(name: str) -> str:
    """The text of a valid plan into which the fault of a file was put."""
    text = to_json(make_plan())
    document = json.loads(text)
    if name == "plan_ok_duplicate_key":
        return text.replace('"version":', f'"version": {document["version"]}, "version":', 1)
    if name == "plan_ok_version_float":
        return json.dumps(document | {"version": float(document["version"])})
    FAULTS[name][0](document["plan"])
    return json.dumps(document)


@pytest.mark.parametrize("name", list_cases("plans"))
def test_a_plan_with_the_fault_alone(name: str, tmp_path: Path) -> None:
    messages = {
        "plan_ok_duplicate_key": "the field 'version' stands twice in one object",
        "plan_ok_version_float": f"plan version {float(json.loads(to_json(make_plan()))['version'])}, this autopar reads version",
    } | {name: message for name, (_, message) in FAULTS.items()}
    path = tmp_path / "plan.json"
    path.write_text(spoil(name), encoding="utf-8")
    assert refuse_quickly("explain", path).startswith(f"{path}: {messages[name]}")
    with pytest.raises(PlanError):
        Plan.load(path)


# --- before torch, and before the model is captured ---


def test_what_needs_no_torch_is_refused_without_it(tmp_path: Path) -> None:
    """In one process in which torch can't be imported; these answers take a tenth of the seconds that torch does."""
    script = tmp_path / "blocked.py"
    commands = [
        ["plan", MLP, "--cluster", "8H100"],
        ["plan", MLP, "--cluster", "8xcpu", "--pin", "tp=3"],
        ["plan", MLP, "--cluster", "8xcpu", "--mesh", "dp=3"],
        ["plan", MLP, "--cluster", "8xV100", "--dtype", "bf16"],
        ["plan", MLP, "--cluster", "8xcpu", "--dtype", "int3"],
        ["plan", MLP, "--cluster", "8xcpu", "--batch", "0"],
        ["plan", MLP, "--cluster", "8xcpu", "-o", str(tmp_path)],
        ["plan", "absent.py:build", "--cluster", "8xcpu"],
        ["plan", f"hf:{ROOT / 'examples' / 'configs' / 'llama-3-8b'}", "--cluster", "8xV100"],
        ["verify", MLP, "--ranks", "4", "--pin", "tp=3"],
        *(["plan", f"hf:{CASES / 'configs' / name}.json", "--cluster", "8xcpu"] for name in CONFIGS if name != "hf_tb_attribute_map"),
        *(["plan", MLP, "--cluster", f"8x{CASES / 'machines' / name}.toml"] for name in MACHINES if name != "toml_tb_no_float32"),
        *(["explain", str(CASES / "plans" / f"{name}.json")] for name in list_cases("plans")),
    ]
    script.write_text(
        "import sys\n"
        "for name in ('torch', 'transformers', 'ortools'):\n    sys.modules[name] = None\n"
        "from tests.commands import refuse\n"
        f"for command in {commands!r}:\n    refuse(*command)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < QUICK


class Uncapturable(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("this forward must not be reached")


def test_sizes_that_only_the_cluster_contradicts_are_refused_before_capture() -> None:
    model, inputs = Uncapturable(8, 8), (torch.zeros(4, 8),)
    for pins, mesh, message in [
        ({"tp": 3}, None, "pins tp=3 need a multiple of 3 ranks, the cluster 1x4xcpu has 4"),
        ({"pp": 3}, None, "pin pp=3 needs a multiple of 3 ranks"),
        ({"pp": 2, "dp": 4}, None, "pins dp=4 need a multiple of 4 ranks, each of the 2 pipeline ranks"),
        ({"pp": 4, "fsdp": True}, None, "pin fsdp=True"),
        (None, {"dp": 8}, "mesh dp=8 has 8 ranks, the cluster 1x4xcpu has 4"),
    ]:
        with pytest.raises(InputError) as caught:
            autopar.plan(model, inputs, "4xcpu", pins=pins, mesh=mesh)
        assert str(caught.value).startswith(message)


def test_a_dtype_that_the_machine_cannot_compute_is_refused_before_capture() -> None:
    with pytest.raises(HardwareError, match=r"V100 .* has no peak_flops for bfloat16, only for float16"):
        autopar.plan(Uncapturable(8, 8, dtype=torch.bfloat16), (torch.zeros(4, 8),), "8xV100")


def test_one_process_is_said_to_be_alone() -> None:
    said: list[str] = []
    autopar.compile(nn.Linear(8, 8), (torch.zeros(4, 8),), progress=said.append)
    assert (
        "Linear on 1x1xcpu: mesh of one rank (started without torchrun), precision as the model's (computes in float32), step " in said[-1]
    )


def test_compile_refuses_what_does_not_fit_the_ranks_at_once() -> None:
    """Without a process group there is one rank; nothing is captured, since no example is given."""
    plan = autopar.plan(nn.Linear(8, 8), (torch.zeros(4, 8),), "2xcpu", pins={"tp": 2})
    with pytest.raises(PlanError, match=r"the plan is for 2 ranks \(tp=2\), 1 is running: start with `torchrun --nproc-per-node 2 SCRIPT`"):
        autopar.compile(nn.Linear(8, 8), plan=plan)
    wide = make_plan()
    with pytest.raises(PlanError, match=r"the plan is for 8 ranks .*`torchrun --nproc-per-node 8 SCRIPT`"):
        autopar.compile(nn.Linear(8, 8), plan=wide)
    started = "; one process is running: start the script with torchrun --nproc-per-node"
    with pytest.raises(InputError, match=f"pins tp=2 need a multiple of 2 ranks, the cluster 1x1xcpu has 1{started} 2$"):
        autopar.compile(nn.Linear(8, 8), pins={"tp": 2})
    with pytest.raises(InputError, match=f"pin pp=2 needs a multiple of 2 ranks, .*{started} 8$"):
        autopar.compile(nn.Linear(8, 8), pins={"pp": 2, "tp": 4})
    with pytest.raises(InputError, match=f"mesh dp=2 x tp=4 has 8 ranks, .*{started} 8$"):
        autopar.compile(nn.Linear(8, 8), mesh={"dp": 2, "tp": 4})
    with pytest.raises(InputError, match="the cluster 1x8xh100 has 8 devices, but this job has 1 rank"):
        autopar.compile(nn.Linear(8, 8), cluster="8xH100")
    with pytest.raises(CaptureError, match="its module is lazy"):
        autopar.compile(nn.LazyLinear(8))


# --- clusters, devices and paths ---


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("8H100", "8xH100"),
        ("4x8H100", "4x8xH100"),
        ("8 h100", "8xh100"),
        ("H100x8", "8xH100"),
        ("H100 * 8", "8xH100"),
        ("4*8*v100", "4x8xv100"),
    ],
)
def test_a_cluster_without_its_x(text: str, guess: str) -> None:
    with pytest.raises(HardwareError, match=rf"Did you mean {guess}\?"):
        autopar.Cluster.parse(text)


@pytest.mark.parametrize(
    "text", ["8xnope", "9" * 5000 + "xH100", "4x" + "9" * 5000 + "xH100", "999999x8xH100", "8x\x1b[2J", "8x" + "n" * 5000]
)
def test_what_is_no_cluster_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(AutoparError) as caught:
        autopar.plan(nn.Linear(2, 2), (torch.zeros(2, 2),), text)
    assert len(str(caught.value)) < 500


def test_numbers_of_thousands_of_digits() -> None:
    many = "9" * 5000
    for arguments in (["--cluster", f"{many}xH100"], ["--memory", f"{many}GB"], ["--pin", f"pp={many}"], ["--mesh", f"dp={many}"]):
        options = ["--cluster", "8xH100", *arguments] if arguments[0] != "--cluster" else arguments
        assert len(refuse("plan", MLP, *options)) < 2100
    result = run("plan", MLP, "--cluster", "8xH100", "--batch", many)
    assert (result.exit_code, result.stdout) == (2, "")


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        for arguments in (["plan", MLP, "--cluster", f"8x{path}"], ["explain", path], ["plan", f"hf:{path}", "--cluster", "8xcpu"]):
            assert "no regular file, but a device or a pipe" in refuse_quickly(*arguments)


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    loop = tmp_path / "loop.py"
    loop.symlink_to(loop)
    assert refuse_quickly("explain", "\x1b[2J").startswith(r"\x1b[2J: can't be read")
    for path, reason in ((str(loop), "Too many levels of symbolic links"), (str(tmp_path / ("n" * 300)), "File name too long")):
        assert reason in refuse_quickly("plan", MLP, "--cluster", f"8x{path}")
        assert reason in refuse_quickly("plan", MLP, "--cluster", "8xcpu", "-o", path)
        assert reason in refuse_quickly("plan", f"hf:{path}", "--cluster", "8xcpu")
        assert reason in refuse_quickly("explain", path)
        assert "doesn't exist" in refuse_quickly("plan", f"{path.removesuffix('.py')}.py:build", "--cluster", "8xcpu")


# --- what is written ---


def test_a_plan_keeps_the_mode_of_the_file_that_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    path.chmod(0o640)
    make_plan().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link.json"
    link.symlink_to(path)
    make_plan().save(link)
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]
    long = tmp_path / f"{'n' * 250}.json"  # as long as a name can be
    make_plan().save(long)
    assert Plan.load(long) == make_plan()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_half_a_file_is_never_left(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])


def test_where_a_file_can_be_written_is_known_before(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    check_writable(path)
    assert not path.exists()
    path.write_text("before")
    check_writable(path)
    assert path.read_text() == "before"
    with pytest.raises(InputError, match="there is no folder"):
        check_writable(path / "inside.json")
    if Path("/proc/version").exists():
        with pytest.raises(InputError, match=r"/proc/plan\.json can't be written: "):
            check_writable("/proc/plan.json")


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for pins in ([], ["--pin", "pp=2"]):
        texts = []
        for number in range(2):
            path = tmp_path / f"{number}.json"
            result = run("plan", TINY, "--cluster", "8xH100", "-o", path, *pins)
            assert result.exit_code == 0, result.output
            texts.append((path.read_bytes(), result.stdout))
        assert texts[0] == texts[1]


# --- the command line ---


def test_short_names_of_dtypes() -> None:
    names = ("bf16", "fp16", "half", "fp32", "torch.float64")
    assert [find_dtype(name) for name in names] == ["bfloat16", "float16", "float16", "float32", "float64"]
    assert load_model(TINY, dtype="bf16").example_inputs[0].dtype == torch.bfloat16  # type: ignore[index]


def test_a_layer_that_there_is_not(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan.json")
    message = refuse("explain", tmp_path / "plan.json", "--layer", "h.99")
    assert message == (
        "no layer of this plan matches 'h.99'; its groups of layers are 'transformer.h.*' (transformer.h.0 to transformer.h.11), "
        "'outside of layers'"
    )


def test_verify_says_what_it_did_not_check() -> None:
    whole = run("verify", MLP, "--ranks", "2", "--pin", "dp=1", "--pin", "tp=1", "--batch", "7")
    assert "note: the plan splits nothing, every rank runs all of the model" in whole.stdout
    assert "note: the plan is for one rank" in run("verify", MLP, "--ranks", "1").stdout
    assert "note: the plan was not checked: with a tolerance of 5" in run("verify", MLP, "--ranks", "2", "--tolerance", "5").stdout
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    verification = autopar.verify(model, (torch.randn(4, 8, dtype=torch.bfloat16),), ranks=2, pins={"tp": 2})
    assert [remark.partition(":")[0] for remark in verification.remarks] == ["the captured graph was not checked against the model"]
    assert not autopar.verify(nn.Linear(8, 8), (torch.randn(4, 8),), ranks=2, pins={"tp": 2}).remarks


def test_progress_where_there_is_no_terminal() -> None:
    class Stream(io.StringIO):
        lines = threading.Semaphore(0)

        def write(self, text: str) -> int:
            self.lines.release()
            return super().write(text)

    stream = Stream()
    with show_lines(stream, 0.01) as tell:
        tell("costs of \x1b[2J")
        assert all(stream.lines.acquire(timeout=QUICK) for _ in range(3))
    assert stream.getvalue().splitlines()[2].endswith(r"s: costs of \x1b[2J")


PRINTING = r"""
import ctypes, torch
from torch import nn

class Net(nn.Linear):
    def forward(self, x):
        print("from Python")
        ctypes.CDLL(None).puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        ctypes.CDLL(None).puts(b"from C")
        return super().forward(x)

def build():
    return Net(8, 8), (torch.zeros(4, 8),)
"""


def test_what_others_print_is_not_on_stdout(tmp_path: Path) -> None:
    (tmp_path / "printing.py").write_text(PRINTING)
    command = [sys.executable, "-m", "autopar", "plan", f"{tmp_path / 'printing.py'}:build", "--cluster", "2xcpu", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "autopar-plan"
    assert {"from Python", "from C"} <= set(done.stderr.splitlines())
    assert "Highs" not in done.stderr
