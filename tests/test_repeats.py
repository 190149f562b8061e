"""Layers found by structure: models whose modules have no numbers, or no modules at all, fold as well as numbered ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from autopar import plan, verify
from autopar.capture.export import capture
from autopar.ir.graph import OpKind
from autopar.rules.table import find_spaces
from autopar.structure.blocks import find_chain
from autopar.structure.layers import Folded, fold
from tests import zoo


def folded(model: nn.Module, inputs: Any) -> Folded:
    """The folded graph, after a check of what always holds."""
    graph = capture(model, inputs).graph
    found = fold(graph)
    assert sum(found.count.values()) == len(graph.ops)
    assert sum(edge.count for edge in found.edges) == sum(len(op.operands) for op in graph.ops)
    names = [name for layer in found.layer_groups for one in layer.instances for name in one]
    assert len(names) == len(set(names))
    paths = [path for layer in found.layer_groups for path in layer.paths]
    assert len(paths) == len(set(paths))
    assert len({layer.name for layer in found.layer_groups}) == len(found.layer_groups)
    readers: dict[str, set[str]] = {}
    for op in graph.ops:
        for value in op.operands:
            readers.setdefault(value.op, set()).add(op.name)
    for layer in found.layer_groups:
        assert len(layer.instances) == len(layer.paths) > 1
        for one in layer.instances:
            for name in one:
                if graph.by_name[name].kind is not OpKind.CALL:
                    assert readers[name] <= set(one), f"{name} is read outside of its layer"
    return found


def shapes(found: Folded) -> list[tuple[int, int]]:
    """Per group how many instances of how many ops."""
    return sorted((len(layer.instances), len(layer.instances[0])) for layer in found.layer_groups)


class Named(nn.Module):
    """A list of modules that calls them a, b, c, ..."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        for letter, module in zip("abcdefghijkl", modules, strict=False):
            self.add_module(letter, module)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children())

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, key: Any) -> Any:
        return list(self.children())[key]


def without_numbers(model: nn.Module) -> nn.Module:
    """The same model with every list of modules replaced by one with names."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList | nn.Sequential):
                setattr(module, name, Named(list(child)))
    return model


SMALL = {"vocab_size": zoo.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADED = {**SMALL, "hidden_size": zoo.HIDDEN, "intermediate_size": zoo.FFN, "num_attention_heads": zoo.HEADS}
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_embd=zoo.HIDDEN, n_layer=3, n_head=zoo.HEADS, n_positions=64, **SMALL),
    # Layers with and without a sliding window take turns.
    "gemma2": transformers.Gemma2Config(
        head_dim=8, sliding_window=5, attn_implementation="flex_attention", num_key_value_heads=2, num_hidden_layers=4, **HEADED
    ),
    "bert": transformers.BertConfig(num_hidden_layers=3, **HEADED),
    # In both stacks the first layer is unlike the others.
    "t5": transformers.T5Config(
        d_model=zoo.HIDDEN, d_kv=8, d_ff=zoo.FFN, num_layers=3, num_heads=zoo.HEADS, decoder_start_token_id=0, **SMALL
    ),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    kind = {"bert": transformers.BertForMaskedLM, "t5": transformers.T5ForConditionalGeneration}.get(
        name, transformers.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = kind(config) if name in ("bert", "t5") else kind.from_config(config)  # type: ignore[attr-defined]
    return model.eval(), {"input_ids": zoo.tokens(), "labels": zoo.labels()}


@pytest.mark.parametrize(("name", "layers"), [("gpt2", [3]), ("gemma2", [2, 2]), ("bert", [3]), ("t5", [2, 2])])
def test_names_of_modules_play_no_role(name: str, layers: list[int]) -> None:
    model, inputs = build(name)
    numbered = folded(model, inputs)
    assert [len(layer.instances) for layer in numbered.layer_groups] == layers
    renamed = folded(without_numbers(model), inputs)
    assert shapes(renamed) == shapes(numbered)
    assert len(renamed.ops) == len(numbered.ops)
    # They are called after the modules that they are.
    assert all(path.rpartition(".")[2] in tuple("abcd") for layer in renamed.layer_groups for path in layer.paths)
    of_numbered, of_renamed = (
        [(block.like, len(block.ops), [case.graph.tensor(value) for value in block.crossing]) for block in find_chain(case, spaces).blocks]
        for case, spaces in ((case, find_spaces(case.graph)[0]) for case in (numbered, renamed))
    )
    assert of_numbered == of_renamed


class Functional(nn.Module):
    """Attention layers without modules; with `shared` all use the first one's weights."""

    def __init__(self, layers: int = 5, width: int = 8, *, shared: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(zoo.VOCAB, width))
        self.other = nn.Parameter(torch.randn(zoo.VOCAB, width))
        self.weights = nn.ParameterList(torch.randn(width, width) / width for _ in range(4 * layers))
        self.layers, self.shared = layers, shared

    def forward(self, ids: Tensor) -> Tensor:
        # This sum looks like those that end a layer.
        x = nn.functional.embedding(ids, self.table) + nn.functional.embedding(ids, self.other)
        for layer in range(self.layers):
            start = 0 if self.shared else 4 * layer
            query, key, value, out = (self.weights[start + i] for i in range(4))
            heads = [linear(x, weight).unflatten(-1, (2, -1)).transpose(1, 2) for weight in (query, key, value)]
            x = x + linear(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), out)
        return (linear(x, self.table) ** 2).mean()


def test_layers_without_modules() -> None:
    found = folded(Functional(), (zoo.tokens(),))
    (layer,) = found.layer_groups
    assert layer.paths == tuple(f"blocks.{i}" for i in range(5))
    assert layer.name == "blocks.*"
    targets = [found.graph.by_name[name].target for name in layer.instances[1] if found.graph.by_name[name].kind is OpKind.PARAMETER]
    assert targets == [f"weights.{i}" for i in (4, 5, 6, 7)]
    # All that crosses from layer to layer is the residual stream.
    chain = find_chain(found, find_spaces(found.graph)[0])
    blocks = [block for block in chain.blocks if block.name.startswith("blocks")]
    assert [block.name for block in blocks] == list(layer.paths)
    assert {len(block.crossing) for block in blocks} == {1}
    assert found.graph.by_name[layer.instances[0][-1]].target == "aten.add.Tensor"


def test_a_parameter_of_several_layers_belongs_to_none() -> None:
    found = folded(Functional(shared=True), (zoo.tokens(),))
    (layer,) = found.layer_groups
    assert len(layer.instances) == 5
    kinds = {found.graph.by_name[name].kind for one in layer.instances for name in one}
    assert kinds == {OpKind.CALL}
    weight = next(op for op in found.graph.ops if op.target == "weights.0")
    assert found.count[weight.name] == 1
    assert [edge.count for edge in found.edges if edge.value.op == weight.name] == [5]


class Outside(nn.Module):
    """Numbered layers whose sums are outside of them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.mean()


@pytest.mark.parametrize("layers", [2, 5])
def test_what_is_done_after_each_layer_belongs_to_it(layers: int) -> None:
    found = folded(Outside(layers), (torch.randn(4, 8),))
    (layer,) = found.layer_groups
    assert layer.paths == tuple(f"layers.{i}" for i in range(layers))
    assert layer.name == "layers.*"
    assert [found.graph.by_name[name].target for name in layer.instances[-1][-2:]] == ["aten.tanh.default", "aten.add.Tensor"]


class Wired(nn.Module):
    """Layers of the same ops on the same shapes; in the one numbered `odd` the second product reads what the first made, not its tanh."""

    def __init__(self, odd: int | None) -> None:
        super().__init__()
        self.ups = nn.ParameterList(torch.randn(8, 8) for _ in range(12))
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        for i in range(6):
            hidden = torch.relu(linear(x, self.ups[2 * i]))
            bent = torch.tanh(hidden)
            x = x + bent * linear(hidden if i == self.odd else bent, self.ups[2 * i + 1])
        return x.mean()


def test_layers_that_are_wired_otherwise_are_told_apart() -> None:
    even, odd = (folded(Wired(number), (torch.randn(4, 8),)) for number in (None, 3))
    assert [len(layer.instances) for layer in even.layer_groups] == [6]
    assert [len(layer.instances) for layer in odd.layer_groups] == [5]
    relus = [op.name for op in odd.graph.ops if op.target == "aten.relu.default"]
    inside = {name for layer in odd.layer_groups for one in layer.instances for name in one}
    assert [name in inside for name in relus] == [True, True, True, False, True, True]


class Few(nn.Module):
    """Parts that are alike and are no layers: two linear layers, heads beside each other, sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads = nn.ParameterList(torch.randn(8, 8) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = torch.cat([linear(torch.relu(linear(x, self.heads[2 * i])), self.heads[2 * i + 1]) for i in range(6)], dim=-1)
        for _ in range(6):
            x = torch.tanh(x) + 1.0
        return x.mean()


def test_what_is_no_layer_is_left_alone() -> None:
    assert folded(Few(), (torch.randn(4, 8),)).layer_groups == ()


def test_single_linear_layers_repeat_in_pairs() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.order = Named([nn.Linear(8, 8) for _ in range(8)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = torch.relu(layer(x))
            return x.mean()

    found = folded(Square(), (torch.randn(4, 8),))
    assert shapes(found) == [(4, 8)]


def test_plans_of_folded_layers_compute_the_same() -> None:
    torch.manual_seed(0)
    model = Functional(layers=3).double()
    for pins in ({"tp": 2}, {"dp": 2, "tp": 2, "fsdp": True}):
        found = verify(model, (zoo.tokens(),), ranks=2 if len(pins) == 1 else 4, pins=pins)
        found.check()
        assert len(found.errors) > 12
    made = plan(model, (zoo.tokens(),), cluster="2xcpu", pins={"tp": 2})
    assert [(group.name, group.count) for group in made.groups if group.count > 1] == [("blocks.*", 3)]
