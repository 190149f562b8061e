"""The chain of blocks that stages are cut from, on real models and on small ones that are hard to cut."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.ir.graph import Graph, OpKind, Value
from autopar.ir.space import Space
from autopar.rules.table import find_spaces
from autopar.structure.blocks import Block, Chain, find_chain
from autopar.structure.chain_cuts import MAX_BLOCKS
from autopar.structure.layers import Folded, fold
from tests import zoo


@dataclass(frozen=True)
class Case:
    """A graph, what was folded of it, and its chain."""

    graph: Graph
    folded: Folded
    spaces: dict[str, Space]
    chain: Chain

    @property
    def names(self) -> list[str]:
        return [block.name for block in self.chain.blocks]

    def block_of(self, target: str) -> Block:
        """The only block that reads the parameter, or calls the op, of this name."""
        named = {op.name for op in self.graph.ops if op.target == target}
        found = [
            block
            for block in self.chain.blocks
            if any(name in named or any(value.op in named for value in self.graph.by_name[name].operands) for name in block.ops)
        ]
        assert len(found) == 1, f"{target}: {[block.name for block in found]}"
        return found[0]


def chain_of(model: nn.Module, inputs: Any) -> Case:
    graph = capture(model, inputs).graph
    spaces, _ = find_spaces(graph)
    folded = fold(graph)
    case = Case(graph, folded, spaces, find_chain(folded, spaces))
    check(case)
    return case


def check(case: Case) -> None:
    """What holds for every chain, computed anew from the graph."""
    graph, chain = case.graph, case.chain
    calls = {op.name for op in graph.of_kind(OpKind.CALL)}
    order = [name for block in chain.blocks for name in block.ops]
    assert len(order) == len(set(order))
    assert set(order) == calls - chain.cheap
    assert all(block.ops for block in chain.blocks)
    assert len(set(case.names)) == len(case.names)
    seen: set[str] = set()
    for name in order:
        missing = [value.op for value in graph.by_name[name].operands if value.op in order and value.op not in seen]
        assert not missing, f"{name} runs before {missing}"
        seen.add(name)
    for name in chain.cheap:
        for value in graph.by_name[name].operands:
            assert value.op in chain.cheap or graph.by_name[value.op].kind in (OpKind.INPUT, OpKind.BUFFER)
        assert not case.spaces[name].is_contraction
        assert not case.spaces[name].random
    for position, block in enumerate(chain.blocks):
        before = {name for one in chain.blocks[: position + 1] for name in one.ops}
        later = [name for one in chain.blocks[position + 1 :] for name in one.ops]
        reads = {value for name in later for value in graph.by_name[name].operands if value.op in before}
        assert set(block.crossing) == reads
        assert len(block.crossing) == len(reads)
    for block in chain.blocks:
        for other in chain.blocks:
            alike = [case.folded.representative[name] for name in block.ops] == [case.folded.representative[name] for name in other.ops]
            assert (block.like == other.like) == alike


@functools.cache
def of_zoo(name: str) -> Case:
    return chain_of(*zoo.ZOO[name]())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_call_is_once_in_the_chain(name: str) -> None:
    assert len(of_zoo(name).chain.blocks) > 1


def gpt2(layers: int) -> Case:
    config = transformers.GPT2Config(
        n_embd=zoo.HIDDEN,
        n_layer=layers,
        n_head=zoo.HEADS,
        n_positions=64,
        vocab_size=zoo.VOCAB,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return chain_of(transformers.GPT2LMHeadModel(config), {"input_ids": zoo.tokens(), "labels": zoo.labels()})


def test_between_layers_of_gpt2_the_residual_stream_travels() -> None:
    case = gpt2(4)
    assert case.names == ["transformer.wte", *(f"transformer.h.{i}" for i in range(4)), "lm_head"]
    assert len({block.like for block in case.chain.blocks[1:5]}) == 1
    assert len({block.like for block in case.chain.blocks}) == 3
    for block in case.chain.blocks[:-1]:
        (value,) = block.crossing
        assert case.graph.tensor(value).shape == (zoo.BATCH, zoo.SEQ, zoo.HIDDEN)
        assert case.graph.tensor(value).nbytes == 4 * zoo.BATCH * zoo.SEQ * zoo.HIDDEN
    assert case.block_of("aten.cross_entropy_loss.default").name == "lm_head"


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_a_block_of_its_own(tied: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=zoo.VOCAB,
        hidden_size=zoo.HIDDEN,
        intermediate_size=zoo.FFN,
        num_hidden_layers=3,
        num_attention_heads=zoo.HEADS,
        tie_word_embeddings=tied,
    )
    case = chain_of(transformers.LlamaForCausalLM(config), {"input_ids": zoo.tokens(), "labels": zoo.labels()})
    assert case.names == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "lm_head"]
    assert {len(block.crossing) for block in case.chain.blocks[:-1]} == {1}
    # Rotary tables and shifted labels are made on every stage that needs them.
    targets = {case.graph.by_name[name].target for name in case.chain.cheap}
    assert {"aten.cos.default", "aten.sin.default", "aten.pad.default"} <= targets


def test_what_the_encoder_made_crosses_all_cuts_of_the_decoder() -> None:
    config = transformers.T5Config(
        vocab_size=zoo.VOCAB,
        d_model=zoo.HIDDEN,
        d_kv=8,
        d_ff=zoo.FFN,
        num_layers=3,
        num_heads=zoo.HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    inputs = {"input_ids": zoo.tokens(), "attention_mask": zoo.padding(), "labels": zoo.labels()}
    case = chain_of(transformers.T5ForConditionalGeneration(config), inputs)
    for stack in ("encoder", "decoder"):
        assert len({block.like for block in case.chain.blocks if block.name in [f"{stack}.block.{i}" for i in (1, 2)]}) == 1
    (encoded,) = {
        value
        for op in case.graph.ops
        if op.layer.endswith("EncDecAttention.k") and op.target == "aten.linear.default"
        for value in op.operands
        if case.graph.by_name[value.op].kind is OpKind.CALL
    }
    made = next(i for i, block in enumerate(case.chain.blocks) if encoded.op in block.ops)
    read = case.names.index("decoder.block.2")
    assert [encoded in block.crossing for block in case.chain.blocks] == [made <= i < read for i in range(len(case.chain.blocks))]
    assert read - made >= 3
    # The bias of the first layer's attention depends on a parameter, so it travels; padding masks don't.
    travelling = {case.graph.tensor(value).shape for block in case.chain.blocks for value in block.crossing}
    assert travelling == {(zoo.BATCH, zoo.SEQ, zoo.HIDDEN), (1, zoo.HEADS, zoo.SEQ, zoo.SEQ)}


@pytest.mark.parametrize("name", ["bert", "opt", "mistral", "gemma2"])
def test_masks_and_tables_do_not_travel(name: str) -> None:
    case = of_zoo(name)
    travelling = [case.graph.tensor(value) for block in case.chain.blocks for value in block.crossing]
    assert travelling
    assert {tensor.shape for tensor in travelling} == {(zoo.BATCH, zoo.SEQ, zoo.HIDDEN)}
    assert {tensor.dtype for tensor in travelling} <= {"float64", "float32"}


def test_logits_do_not_travel() -> None:
    for name in ("gpt2", "llama", "bert", "t5", "lstm"):
        case = of_zoo(name)
        loss = case.block_of("aten.cross_entropy_loss.default")
        assert loss is case.chain.blocks[-1]
        assert any(case.spaces[op].is_contraction and case.graph.by_name[op].target == "aten.linear.default" for op in loss.ops)
        assert all(case.graph.tensor(value).shape[-1] != zoo.VOCAB for block in case.chain.blocks for value in block.crossing)


class Unet(nn.Module):
    """Four levels of two convolutions down, four up, with a long skip at each level."""

    def __init__(self, levels: int = 4, width: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(self.double(before, after) for before, after in zip([3, *widths[:-1]], widths, strict=True))
        self.middle = self.double(widths[-1], widths[-1])
        self.up = nn.ModuleList(self.double(2 * after, before) for before, after in zip([width, *widths[:-1]], widths, strict=True))
        self.last = nn.Conv2d(width, 1, 1)

    @staticmethod
    def double(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for level in reversed(self.up):
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = level(torch.cat([x, skips.pop()], dim=1))
        return self.last(x).mean()


def test_the_skips_of_a_unet_travel() -> None:
    case = chain_of(Unet(), (torch.randn(2, 3, 32, 32),))
    assert 6 <= len(case.chain.blocks) <= 18
    # Down one value is added per level, up one is used up.
    counts = [len(block.crossing) for block in case.chain.blocks]
    deepest = counts.index(max(counts))
    assert counts[deepest] == 5
    assert counts[: deepest + 1] == sorted(counts[: deepest + 1])
    assert counts[deepest:] == sorted(counts[deepest:], reverse=True)
    joins = [op for op in case.graph.ops if op.target == "aten.cat.default"]
    assert len(joins) == 4
    for join in joins:
        skip = join.operands[1]
        made = next(i for i, block in enumerate(case.chain.blocks) if skip.op in block.ops)
        read = next(i for i, block in enumerate(case.chain.blocks) if join.name in block.ops)
        assert made < read
        assert all(skip in block.crossing for block in case.chain.blocks[made:read])


class Deep(nn.Module):
    """A stem, residual blocks that all differ, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for i in range(8):
            self.add_module(
                f"branch_{'abcdefgh'[i]}", nn.Sequential(nn.Conv2d(8, 9 + i, 3, padding=1), nn.ReLU(), nn.Conv2d(9 + i, 8, 3, padding=1))
            )
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in "abcdefgh":
            x = torch.relu(x + self.get_submodule(f"branch_{i}")(x))
        return self.head(x.mean((2, 3))).sum()


def test_no_cut_inside_a_residual_branch() -> None:
    case = chain_of(Deep(), (torch.randn(2, 3, 8, 8),))
    # Stem and head hold too little to be blocks.
    assert case.names == [f"branch_{i}" for i in "abcdefgh"]
    assert all(len(block.crossing) == 1 for block in case.chain.blocks[:-1])


def test_a_long_chain_of_unlike_calls_is_not_cut_too_finely() -> None:
    widths = [16 + (7 * i) % 23 for i in range(101)]
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    case = chain_of(nn.Sequential(*layers), (torch.randn(2, widths[0]),))
    assert len(case.chain.blocks) <= MAX_BLOCKS
    assert len(case.chain.blocks) >= MAX_BLOCKS // 3


def test_new_values_of_buffers_are_made_where_the_layer_is() -> None:
    case = of_zoo("resnet")
    (output,) = case.graph.of_kind(OpKind.OUTPUT)
    for value in output.operands[len(output.operands) - len(output.kwargs["updates"]) :]:
        layer = case.graph.by_name[value.op].layer
        (home,) = (block for block in case.chain.blocks if value.op in block.ops)
        assert any(case.graph.by_name[name].layer == layer and case.graph.by_name[name].target != "aten.add.Tensor" for name in home.ops)


class Early(nn.Module):
    """Layers whose keys are all computed before the first of them runs, a table that only the end reads, and a scale for all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))
        self.key = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.softmax(self.table, dim=1)
        keys = [key(x * 2.0) for key in self.key]
        for layer, key in zip(self.layers, keys, strict=True):
            x = x + layer(x) * key
        return (x @ table.t()).mean()


def test_a_call_moves_to_its_reader_when_that_lessens_what_travels() -> None:
    case = chain_of(Early(), (torch.randn(4, 8),))
    # The table reads a parameter only: made next to its reader, nothing of it travels.
    assert case.block_of("aten.softmax.int") is case.chain.blocks[-1]
    # Each key reads what is there everywhere, so it is made next to the layer that reads it.
    assert case.names == ["key.0", *(f"layers.{i}" for i in range(4)), "matmul"]
    for i in range(1, 4):
        assert case.block_of(f"key.{i}.weight").name == f"layers.{i}"
    assert {len(block.crossing) for block in case.chain.blocks[:-1]} == {1}
    assert "aten.mul.Tensor" in {case.graph.by_name[name].target for name in case.chain.cheap}


class Towers(nn.Module):
    """Two stacks whose layers run in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3))
        self.right = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = self.left[0][0](x)
        y = self.right[0](y)
        x = self.left[1](self.left[0][2](self.left[0][1](inner)))
        inner = self.left[2][0](x)
        inner = self.left[2][1](inner)
        y = self.right[1](y)
        return (self.left[2][2](inner) @ y.t()).mean()


def test_layers_whose_calls_are_mixed_with_others_stay_whole() -> None:
    case = chain_of(Towers(), (torch.randn(4, 8), torch.randn(4, 8)))
    assert {f"left.{i}" for i in range(3)} | {f"right.{i}" for i in range(2)} <= set(case.names)
    order = [op.layer.split(".")[:2] for op in case.graph.of_kind(OpKind.CALL)]
    assert order.index(["right", "0"]) < len(order) - 1 - order[::-1].index(["left", "0"])  # the graph does mix them


class Beside(nn.Module):
    """Experts beside each other in two layers that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(4))
        self.second = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for experts in (self.first, self.second):
            x = torch.stack([expert(x) for expert in experts]).sum(0)
        return x.mean()


def test_experts_are_not_blocks() -> None:
    case = chain_of(Beside(), (torch.randn(4, 8),))
    assert [layer.name for layer in case.folded.layer_groups] == ["first.*", "second.*"]
    assert {f"second.{i}" for i in range(4)}.isdisjoint(case.names)
    (stacked, _) = (op.name for op in case.graph.ops if op.target == "aten.stack.default")
    first = next(block for block in case.chain.blocks if stacked in block.ops)
    assert len(first.crossing) == 1


class Around(nn.Module):
    """Something outside of each layer, and unlike from layer to layer, reads a part of it and gives back to the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)) for _ in range(3))
        self.gate = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, (torch.sigmoid, torch.tanh, torch.relu), strict=True):
            up = layer[0](x)
            x = x + layer[1](up * act(self.gate(up)))
        return x.mean()


def test_a_call_that_a_layer_needs_and_that_needs_it_belongs_to_it() -> None:
    case = chain_of(Around(), (torch.randn(4, 8),))
    assert [layer.name for layer in case.folded.layer_groups] == ["layers.*"]
    layers = [block for block in case.chain.blocks if block.name.startswith("layers")]
    assert len(layers) == 3
    for block, act in zip(layers, ("sigmoid", "tanh", "relu"), strict=True):
        targets = [case.graph.by_name[name].target for name in block.ops]
        assert targets.count("aten.linear.default") == 3
        assert f"aten.{act}.default" in targets


def test_random_and_heavy_calls_are_never_made_twice() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            dropped = nn.functional.dropout(x, 0.5, training=True)
            gram = x @ x.t()
            for layer in self.layers:
                x = gram @ layer(x + dropped)
            return x.mean()

    case = chain_of(Noisy().train(), (torch.randn(8, 8),))
    made = {case.graph.by_name[name].target for block in case.chain.blocks for name in block.ops}
    assert "aten.dropout.default" in made
    assert sum(case.graph.by_name[name].target == "aten.matmul.default" for block in case.chain.blocks for name in block.ops) == 13
    crossing = {value for block in case.chain.blocks for value in block.crossing}
    (dropped,) = (op.name for op in case.graph.ops if op.target == "aten.dropout.default")
    assert Value(dropped) in crossing


def test_the_first_layer_keeps_what_the_others_have() -> None:
    class Bare(nn.Module):
        """Layers that begin with a norm without parameters, on an input that needs a gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(nn.functional.layer_norm(x, (8,)))
            return x.mean()

    case = chain_of(Bare(), (torch.randn(16, 8, requires_grad=True),))
    assert not case.chain.cheap
    assert [block.like for block in case.chain.blocks if block.name.startswith("layers")] == [0, 0, 0, 0]
