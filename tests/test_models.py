"""The MODEL argument: what loads, and that every unusable one is told apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.cli.models import load_model
from autopar.errors import InputError

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 8},
    "bert": {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 32,
    },
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "num_layers": 1,
        "d_model": 16,
        "num_heads": 2,
        "d_kv": 8,
        "d_ff": 32,
        "vocab_size": 32,
        "decoder_start_token_id": 0,
    },
    "vit": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    },
}

BUILD = """
import torch
from torch import nn

def build(batch=4):
    return nn.Linear(3, 2), (torch.ones(batch, 3),)

def keywords():
    return nn.Linear(3, 2), {"input": torch.ones(4, 3)}

def needs(width):
    return nn.Linear(width, 2), (torch.ones(4, width),)

def bare_tensor():
    return nn.Linear(3, 2), torch.ones(4, 3)

def no_inputs():
    return nn.Linear(3, 2)

def no_model():
    return "linear", (torch.ones(4, 3),)

def fails():
    return nn.Linear(3, 2) / 0, ()

def exits():
    raise SystemExit(3)

size = 5
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "types.py"  # named like a module of the standard library, which must stay in place
    path.write_text(BUILD)
    return path


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_published_configurations_have_their_published_size(name: str, parameters: int) -> None:
    loaded = load_model(f"hf:{CONFIGS / name}", batch=2, seq=16)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == parameters
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}
    assert loaded.name == name
    assert loaded.model.training
    assert isinstance(loaded.example_inputs, dict)
    assert {key: (tuple(t.shape), t.dtype) for key, t in loaded.example_inputs.items()} == {
        "input_ids": ((2, 16), torch.int64),
        "labels": ((2, 16), torch.int64),
    }


def test_the_configuration_decides_the_dtype_unless_one_is_given() -> None:
    path = f"hf:{CONFIGS / 'llama-3-8b' / 'config.json'}"
    assert next(load_model(path, batch=1, seq=1).model.parameters()).dtype == torch.bfloat16
    assert next(load_model(path, batch=1, seq=1, dtype="float64").model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("kind", TINY)
def test_each_family_trains_on_its_example_inputs(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY[kind]))
    loaded = load_model(f"hf:{tmp_path}", batch=2, device="cpu", dtype="float32")
    assert isinstance(loaded.example_inputs, dict)
    assert all(t.shape[0] == 2 for t in loaded.example_inputs.values())
    loss = loaded.model(**loaded.example_inputs).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "doesn't exist"),
        ("{", "isn't JSON"),
        ("[1]", "not an object"),
        ("{}", 'no "model_type"'),
        ('{"model_type": "no-such-model"}', "knows no model_type 'no-such-model'"),
        ('{"model_type": "gpt2", "n_layer": "many"}', "config.json"),
        ('{"model_type": "gpt2", "n_embd": 10, "n_head": 3}', "can't build this model"),
        ('{"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}', "GPT2ForSequenceClassification"),
    ],
)
def test_bad_configurations_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_model(f"hf:{tmp_path / 'config.json'}")


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for kind in ("gpt2", "vit"):
        (tmp_path / f"{kind}.json").write_text(json.dumps(TINY[kind]))
    with pytest.raises(InputError, match=r"seq=9: .* has 8 learned positions"):
        load_model(f"hf:{tmp_path / 'gpt2.json'}", seq=9)
    with pytest.raises(InputError, match=r"seq=9: .* no sequence length"):
        load_model(f"hf:{tmp_path / 'vit.json'}", seq=9)
    with pytest.raises(InputError, match="batch=0"):
        load_model(f"hf:{tmp_path / 'gpt2.json'}", batch=0)
    with pytest.raises(InputError, match="'int8' isn't known: use one of bfloat16"):
        load_model(f"hf:{tmp_path / 'gpt2.json'}", dtype="int8")


def test_functions_of_files_and_modules_load(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard = sys.modules["types"]
    loaded = load_model(f"{model_file}:build", batch=7)
    assert isinstance(loaded.example_inputs, tuple)
    assert loaded.model(*loaded.example_inputs).shape == (7, 2)
    assert isinstance(load_model(f"{model_file}:keywords").example_inputs, dict)
    assert sys.modules["types"] is standard
    (model_file.parent / "my_models.py").write_text("from my_parts import build\n")
    (model_file.parent / "my_parts.py").write_text(BUILD)
    monkeypatch.chdir(model_file.parent)
    before = list(sys.path)
    inputs = load_model("my_models:build").example_inputs
    assert isinstance(inputs, tuple)
    assert inputs[0].shape == (4, 3)
    assert sys.path == before


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", "no function 'absent': it has bare_tensor, build, exits"),
        ("size", "no function 'size'"),
        ("needs", "needs a value for width"),
        ("bare_tensor", r"Tensor as example inputs: give a dict .* such as \(x,\)"),
        ("no_inputs", "returned Linear: it must return"),
        ("no_model", "returned str as the model"),
        ("fails", r"types\.py:\d+: TypeError"),
        ("exits", "SystemExit: 3"),
    ],
)
def test_bad_functions_are_refused(function: str, message: str, model_file: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_model(f"{model_file}:{function}")


def test_an_option_is_never_dropped_in_silence(model_file: Path) -> None:
    with pytest.raises(InputError, match="takes no argument seq, dtype"):
        load_model(f"{model_file}:build", batch=2, seq=5, dtype="float32")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt2", "isn't understood: write hf:PATH"),
        (":build", "isn't understood"),
        ("no_such_package.models:build", "no module 'no_such_package'"),
        ("json.no_such_part:build", r"no module 'json\.no_such_part'"),
        ("no_such_file.py:build", "doesn't exist"),
        (str(CONFIGS), "did you mean hf:"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_dependency", r"broken\.py:1: ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("x = 1\ny = x / 0", r"broken\.py:2: ZeroDivisionError"),
        ("x = 1\ndef build(:", r"broken\.py:2: SyntaxError: invalid syntax"),
        ("raise SystemExit('usage')", "SystemExit: usage"),
    ],
)
def test_a_file_that_fails_on_import_is_refused(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(InputError, match=message):
        load_model(f"{tmp_path / 'broken.py'}:build")
