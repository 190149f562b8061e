"""Tiny models of many kinds, with a batch each: what capture, rules, plans and rewrites are tested on.

Everything is float64 without dropout. Sizes are chosen to be splittable by two and four: batch 4, sequence 16, vocabulary
64, feed-forward widths and head counts divisible by four, two or four key/value heads. Labels ignore unequal numbers of
positions per row, so that a mean over a part of the batch isn't the mean over the whole.

`DEEP` are models with enough layers for eight pipeline stages, and a batch of eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

BATCH, SEQ, VOCAB, HIDDEN, HEADS, FFN = 4, 16, 64, 32, 4, 64
ROWS = 8  # of a deep model's batch
IGNORED = (1, 3, 6, 2, 5, 1, 8, 3)

Model = tuple[nn.Module, dict[str, Tensor]]

_DECODER = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_DECODER,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tokens(seed: int = 0, rows: int = BATCH) -> Tensor:
    """Token numbers (rows, sequence), none of them a special one."""
    return torch.randint(3, VOCAB, (rows, SEQ), generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 0, rows: int = BATCH) -> Tensor:
    """Labels (rows, sequence) of which row i ignores ``IGNORED[i]`` positions at its end: 1, 3, 6, 2, ..."""
    made = tokens(seed + 1, rows)
    for row, ignored in zip(range(rows), IGNORED, strict=False):
        made[row, SEQ - ignored :] = -100
    return made


def padding(rows: int = BATCH) -> Tensor:
    """Attention mask (rows, sequence) with as many padded positions at the end of the rows as labels ignore."""
    return (labels(0, rows) != -100).long()


def _ready(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # zero and one initial values hide mistakes
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def _causal(config: transformers.PreTrainedConfig, **extra: Tensor) -> Model:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return _ready(model), {"input_ids": tokens(), "labels": labels(), **extra}


def in_float64(model: nn.Module) -> nn.Module:
    """A causal language model in float64 throughout: transformers computes losses and norms in float32 whatever the model's dtype."""
    model.loss_function = _causal_loss
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


def _causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Mean over the labels that count, each predicted from what comes before it."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return nn.functional.cross_entropy(logits.view(-1, vocab_size), shifted.reshape(-1))


def gpt2() -> Model:
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_DECODER
    )
    return _causal(config)


def gpt_neox() -> Model:
    config = transformers.GPTNeoXConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        rotary_pct=0.5,
        **_DECODER,
    )
    return _causal(config)


def gptj() -> Model:
    config = transformers.GPTJConfig(
        n_embd=HIDDEN,
        n_layer=2,
        n_head=HEADS,
        n_positions=64,
        rotary_dim=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_DECODER,
    )
    return _causal(config)


def opt() -> Model:
    config = transformers.OPTConfig(
        hidden_size=HIDDEN,
        ffn_dim=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
        dropout=0.0,
        **_DECODER,
    )
    return _causal(config, attention_mask=padding())


def bloom() -> Model:
    config = transformers.BloomConfig(hidden_size=HIDDEN, n_layer=2, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0, **_DECODER)
    return _causal(config)


def llama() -> Model:
    return _causal(transformers.LlamaConfig(**_LLAMA))


def qwen2() -> Model:
    return _causal(transformers.Qwen2Config(**_LLAMA))


def qwen3() -> Model:
    return _causal(transformers.Qwen3Config(head_dim=8, **_LLAMA))


def mistral() -> Model:
    return _causal(transformers.MistralConfig(sliding_window=5, **_LLAMA))


def gemma2() -> Model:
    config = transformers.Gemma2Config(head_dim=8, sliding_window=5, query_pre_attn_scalar=8, attn_implementation="eager", **_LLAMA)
    return _causal(config)


def phi3() -> Model:
    return _causal(transformers.Phi3Config(**_LLAMA))


def falcon() -> Model:
    config = transformers.FalconConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_kv_heads=2,
        new_decoder_architecture=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **_DECODER,
    )
    return _causal(config)


def bert() -> Model:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    batch = {"input_ids": tokens(), "attention_mask": padding(), "labels": labels()}
    return _ready(transformers.BertForMaskedLM(config)), batch


def t5() -> Model:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=FFN,
        num_layers=2,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    batch = {"input_ids": tokens(), "attention_mask": padding(), "labels": labels()}
    return _ready(transformers.T5ForConditionalGeneration(config)), batch


def vit() -> Model:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=12,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=8,
    )
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return _ready(transformers.ViTForImageClassification(config)), {
        "pixel_values": images,
        "labels": torch.tensor([1, 5, 2, 7]),
    }


class Residual(nn.Module):
    """Two convolutions with batch norms around a shortcut, as in ResNet-18; in place where torchvision is."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        same = x if self.shortcut is None else self.shortcut(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += same
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, three residual blocks, pooling, classifier, cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(16, 8)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = torch.flatten(self.pool(self.blocks(self.stem(images))), 1)
        return nn.functional.cross_entropy(self.classifier(features), labels)


def resnet() -> Model:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return _ready(ResNet()), {"images": images, "labels": torch.tensor([1, 5, 2, 7])}


class LstmLm(nn.Module):
    """Embedding, two LSTM layers, linear, cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, num_layers=2, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(input_ids))
        return nn.functional.cross_entropy(self.head(hidden).view(-1, VOCAB), labels.view(-1), ignore_index=-100)


def lstm() -> Model:
    torch.manual_seed(0)
    return _ready(LstmLm()), {"input_ids": tokens(), "labels": labels()}


class Dlrm(nn.Module):
    """Embedding bags and a dense tower, pairwise dot products, a top tower, binary cross entropy."""

    def __init__(self, tables: int = 4, width: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(VOCAB, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor, labels: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        features = torch.stack([bottom, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        dots = torch.bmm(features, features.transpose(1, 2))
        row, column = torch.tril_indices(features.shape[1], features.shape[1], offset=-1, device=dots.device)
        logits = self.top(torch.cat([bottom, dots[:, row, column]], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def dlrm() -> Model:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    batch = {
        "dense": torch.randn(BATCH, 16, generator=generator, dtype=torch.float64),
        "sparse": torch.randint(0, VOCAB, (BATCH, 4, 3), generator=generator),
        "labels": torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64),
    }
    return _ready(Dlrm()), batch


ZOO: dict[str, Callable[[], Model]] = {
    builder.__name__: builder
    for builder in (
        gpt2,
        gpt_neox,
        gptj,
        opt,
        bloom,
        llama,
        qwen2,
        qwen3,
        mistral,
        gemma2,
        phi3,
        falcon,
        bert,
        t5,
        vit,
        resnet,
        lstm,
        dlrm,
    )
}
"""Builders of (model in train mode, keyword arguments of its forward) by name."""


def gpt2_deep(dropout: float = 0.0) -> Model:
    config = transformers.GPT2Config(
        n_embd=HIDDEN,
        n_layer=6,
        n_head=HEADS,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        **_DECODER,
    )
    return _deep(config)


def llama_deep() -> Model:
    return _deep(transformers.LlamaConfig(**{**_LLAMA, "num_hidden_layers": 7}))


def llama_tied() -> Model:
    return _deep(transformers.LlamaConfig(**{**_LLAMA, "num_hidden_layers": 6}, tie_word_embeddings=True))


def _deep(config: transformers.PreTrainedConfig) -> Model:
    model, _ = _causal(config)
    return model, {"input_ids": tokens(0, ROWS), "labels": labels(0, ROWS)}


def bert_deep() -> Model:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    batch = {"input_ids": tokens(0, ROWS), "attention_mask": padding(ROWS), "labels": labels(0, ROWS)}
    return _ready(transformers.BertForMaskedLM(config)), batch


def t5_deep() -> Model:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=FFN,
        num_layers=3,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    batch = {"input_ids": tokens(0, ROWS), "attention_mask": padding(ROWS), "labels": labels(0, ROWS)}
    return _ready(transformers.T5ForConditionalGeneration(config)), batch


class Convolutions(nn.Module):
    """Two convolutions with group norms, which see every sample for itself."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, 1, 1)
        self.norm1 = nn.GroupNorm(4, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.norm2 = nn.GroupNorm(4, out)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm1(self.conv1(x)))
        return nn.functional.silu(self.norm2(self.conv2(x)))


class PixelAttention(nn.Module):
    """Attention between all pixels, around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part(pixels).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class UNet(nn.Module):
    """Three levels down, three up, each of which reads what its counterpart on the way down made; a class per pixel."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 16)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.down = nn.ModuleList(Convolutions(a, b) for a, b in zip((widths[0], *widths[:-1]), widths, strict=True))
        self.middle = nn.Sequential(Convolutions(widths[-1], widths[-1]), PixelAttention(widths[-1]), Convolutions(widths[-1], widths[-1]))
        self.up = nn.ModuleList(Convolutions(2 * b, a) for a, b in zip((widths[0], *widths[:-1]), widths, strict=True))
        self.head = nn.Conv2d(widths[0], 8, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in reversed(self.up):
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], dim=1))
        return nn.functional.cross_entropy(self.head(x), labels)


def unet() -> Model:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(ROWS, 3, 16, 16, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 8, (ROWS, 16, 16), generator=generator)
    for row, ignored in enumerate(IGNORED):
        classes[row, :ignored] = -100
    return _ready(UNet()), {"images": images, "labels": classes}


DEEP: dict[str, Callable[[], Model]] = {
    builder.__name__: builder for builder in (gpt2_deep, llama_deep, llama_tied, bert_deep, t5_deep, unet)
}
"""The same, of models that pipelines of eight stages are made of."""
