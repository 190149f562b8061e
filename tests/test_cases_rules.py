"""Operators that ran whole on every rank, or kept a pipeline from being planned: each between layers, in a pipeline and over data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import autopar
from autopar.capture import capture
from autopar.rewrite import rewrite

torch.set_num_threads(1)

WIDTH = 12
Between = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """A linear layer, and what is done with its result, from (batch, 12) to (batch, 12)."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.linear, self.between = nn.Linear(WIDTH, WIDTH), between

    def forward(self, x: Tensor) -> Tensor:
        return x + self.between(self.linear(x))


def build(make: Callable[[], Between]) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(make()) for _ in range(2))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return F.cross_entropy(x, labels)

    return Model(), {"x": torch.randn(8, WIDTH), "labels": torch.randint(0, WIDTH, (8,))}


class Cell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        states = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        made = self.cell(x, states)
        return made[0] if isinstance(made, tuple) else made


class OnImages(nn.Module):
    """A layer of images, on (batch, 3, 2, 2)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.view(-1, 3, 2, 2))
        return made.flatten(1)[:, :WIDTH]


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x, x.tanh())
        return made


def filled(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape)
    made[:, :4] = x[:, :4].sin()
    made[:, 4:] = x[:, 4:]
    return made


def rotated(x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2.0))
    return torch.view_as_real(torch.view_as_complex(x.view(-1, WIDTH // 2, 2)) * turns).flatten(1)


def scattered(x: Tensor) -> Tensor:
    mask = torch.arange(WIDTH).expand(8, WIDTH) % 3 == 0
    return x.masked_scatter(mask, torch.linspace(0, 1, 40))


def reduced(x: Tensor) -> Tensor:
    places = (torch.arange(WIDTH) % 5).expand(x.shape)
    return torch.zeros_like(x).scatter_reduce(1, places, x, "amax")


def distances(x: Tensor) -> Tensor:
    points = x.view(-1, 4, 3)
    return torch.cdist(points, points.flip(1).tanh()).flatten(1)[:, :WIDTH]


def image_layer(make: Callable[[], nn.Module]) -> Callable[[], Between]:
    return lambda: OnImages(make())


LISTED: dict[str, Callable[[], Between]] = {
    "new_empty": lambda: filled,
    "polar, view_as_complex, view_as_real": lambda: rotated,
    "multiply": lambda: lambda x: torch.multiply(x, x),
    "concatenate": lambda: lambda x: torch.concatenate([x[:, 4:], x[:, :4].cos()], 1),
    "_weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "conv2d.padding": image_layer(lambda: nn.Conv2d(3, 3, 3, padding="same")),
    "conv2d.padding, unequal": image_layer(lambda: nn.Conv2d(3, 3, 2, padding="same")),
    "glu": lambda: lambda x: F.glu(torch.cat([x, x.cos()], 1)),
    "masked_scatter": lambda: scattered,
    "im2col": lambda: lambda x: F.unfold(x.view(-1, 3, 2, 2), 2).flatten(1),
    "pixel_shuffle": lambda: lambda x: F.pixel_shuffle(x.view(-1, WIDTH, 1, 1), 2).flatten(1),
    "conv_transpose2d": image_layer(lambda: nn.ConvTranspose2d(3, 3, 2)),
    "scatter_reduce": lambda: reduced,
    "cdist": lambda: distances,
    "bilinear": Bilinear,
    "lstm_cell": lambda: Cell(nn.LSTMCell(WIDTH, WIDTH)),
    "gru_cell": lambda: Cell(nn.GRUCell(WIDTH, WIDTH)),
    "rnn_tanh_cell": lambda: Cell(nn.RNNCell(WIDTH, WIDTH)),
}


@pytest.mark.parametrize("name", LISTED)
def test_in_a_pipeline_and_over_data(name: str) -> None:
    """The operator has a rule, and gradients of two micro-batches on two stages, and of two parts of the batch, are those of one device."""
    model, call = build(LISTED[name])
    for pins in ({"pp": 2, "microbatches": 2}, {"dp": 2}):
        plan = autopar.plan(model, call, "2xcpu", pins=pins, strict=True)
        autopar.verify(model, call, plan).check()


@pytest.mark.parametrize("draw", ["exponential_", "uniform_", "normal_", "bernoulli_"])
def test_random_in_place_operators(draw: str) -> None:
    """``torch.empty_like(x).exponential_()`` in a pipeline, and over data, where each part draws from its own stream."""
    model, call = build(lambda: lambda x: x * getattr(torch.empty_like(x), draw)())
    autopar.plan(model, call, "2xcpu", pins={"pp": 2, "microbatches": 2}, strict=True)
    plan = autopar.plan(model, call, "2xcpu", pins={"dp": 2}, strict=True)
    code = rewrite(capture(model, call), plan).module.print_readable(print_output=False)
    assert "'dp'" in code.partition("bernoulli" if draw == "bernoulli_" else "draws_draw(")[2].partition("\n")[0]


def latent(version: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A DeepSeek of dense layers: latent attention, in version 2 with rotations of complex numbers."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "max_position_embeddings": 64,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"Deepseek{version}Config")(**sizes))
    tokens = torch.randint(3, 64, (4, 16))
    return model, {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_latent_attention_in_a_pipeline(version: str) -> None:
    model, call = latent(version)
    plan = autopar.plan(model, call, "4xcpu", pins={"pp": 2, "tp": 2, "microbatches": 2}, strict=True)
    assert plan.pipeline.ranks == 2
    autopar.verify(model, call, plan).check()


def test_speech_with_weight_norm_in_a_pipeline() -> None:
    """A wav2vec 2.0, whose positions are a convolution with normalised weights."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        apply_spec_augment=False,
    )
    call = {"input_values": torch.randn(4, 400)}
    model = transformers.Wav2Vec2Model(config)
    plan = autopar.plan(model, call, "2xcpu", pins={"pp": 2, "microbatches": 2}, strict=True)
    autopar.verify(model, call, plan).check()
