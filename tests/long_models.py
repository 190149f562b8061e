"""Tiny models for every mask and number of key/value heads, with a batch each: what sequence splits are checked on.

Everything is float64 throughout, without dropout. Labels ignore unequal numbers of tokens on every quarter of a row, all of one quarter in
one row. Positions are learned or rotary, so that a rank that counted from zero would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask

from tests.zoo import Model

BATCH, SEQ, VOCAB, WIDTH, FFN, Q_HEADS, HEAD = 2, 16, 64, 32, 64, 4, 8
WINDOW = 5
HEADS: Mapping[str, int] = {"MHA": 4, "GQA": 2, "MQA": 1}
"""Numbers of key/value heads that serve the four of queries."""

MASKS = ("causal", "bidirectional", "window", "padded", "packed")

MODELS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "llama": ("Llama", dict.fromkeys(("causal", "padded", "packed"), tuple(HEADS))),
    "mistral": ("Mistral", dict.fromkeys(("window", "padded", "packed"), tuple(HEADS))),
    "gemma2": ("Gemma 2", {"window": tuple(HEADS), "padded": ("GQA",), "packed": ("GQA",)}),
    "gpt2": ("GPT-2", dict.fromkeys(("causal", "padded", "packed"), ("MHA",))),
    "bert": ("BERT", dict.fromkeys(("bidirectional", "padded", "packed"), ("MHA",))),
    "modernbert": ("ModernBERT", dict.fromkeys(("window", "padded"), ("MHA",))),
    "t5": ("T5", dict.fromkeys(("bidirectional", "padded"), ("MHA",))),
    "plain": ("torch module", dict.fromkeys(MASKS, tuple(HEADS))),
}
"""Model -> its name, and which masks and numbers of heads it is made with.

The windows of Mistral are causal, also where it is padded or packed; those of Gemma 2 are on every other layer, and its scores are capped;
those of ModernBERT and of the module look both ways. The module is bidirectional where its mask isn't causal.
"""


def tokens(seed: int = 0, rows: int = BATCH) -> Tensor:
    """Token numbers (rows, sequence), none of them a special one."""
    return torch.randint(3, VOCAB, (rows, SEQ), generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 1, rows: int = BATCH) -> Tensor:
    """Labels (rows, sequence), -100 at unequal numbers of places of each quarter, and in all of the second quarter of the first row."""
    made = tokens(seed, rows)
    made[0, SEQ // 4 : SEQ // 2] = -100
    for row in range(rows):
        made[row, :: row + 3] = -100
    return made


def padding(rows: int = BATCH, side: str = "right") -> Tensor:
    """Attention mask (rows, sequence): row i has 3 + 6 i padded tokens at that end, up to all but one."""
    padded = torch.tensor([[min(3 + 6 * row, SEQ - 1)] for row in range(rows)])
    places = torch.arange(SEQ).expand(rows, -1)
    return (places < SEQ - padded if side == "right" else places >= padded).long()


def documents(rows: int = BATCH) -> Tensor:
    """Which document each token belongs to, (rows, sequence); row i begins one every 6 + i tokens."""
    return torch.stack([torch.arange(SEQ) // (6 + row) for row in range(rows)])


def positions(rows: int = BATCH) -> Tensor:
    """Position of each token in its own document, (rows, sequence)."""
    return torch.stack([torch.arange(SEQ) % (6 + row) for row in range(rows)])


def packing(rows: int = BATCH) -> Tensor:
    """Which keys, bool (rows, 1, sequence, sequence), are of the document of which token."""
    document = documents(rows)
    return (document[:, :, None] == document[:, None, :])[:, None]


def build(name: str, mask: str, heads: str) -> Model:
    """The model with this mask and kind of heads, in training mode, and keyword arguments for it."""
    torch.manual_seed(0)
    model, batch = _BUILDERS[name](mask, HEADS[heads])
    generator = torch.Generator().manual_seed(7)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # zero and one initial values hide mistakes
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model, batch


_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    **_COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": Q_HEADS,
    "max_position_embeddings": 64,
}


def _batch(mask: str, *, is_causal: bool = True) -> dict[str, Tensor]:
    batch = {"input_ids": tokens(), "labels": labels()}
    if mask == "padded":
        return {**batch, "attention_mask": padding()}
    if mask == "packed":
        return {**batch, **({"position_ids": positions()} if is_causal else {"attention_mask": packing()})}
    return batch


def _decoder(config: Any, mask: str) -> Model:
    config.use_cache = False  # only without one, positions tell packed sequences apart
    return _in_float64(transformers.AutoModelForCausalLM.from_config(config), shift=1), _batch(mask)


def _llama(mask: str, kv_heads: int) -> Model:
    return _decoder(transformers.LlamaConfig(**_SIZES, num_key_value_heads=kv_heads), mask)


def _mistral(mask: str, kv_heads: int) -> Model:
    return _decoder(transformers.MistralConfig(**_SIZES, num_key_value_heads=kv_heads, sliding_window=WINDOW), mask)


def _attend_capped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, softcap: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention with capped scores in float64, as an attention function of transformers; rows without keys give zeros."""
    ratio = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(ratio, 1).transpose(2, 3) * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~attention_mask, -torch.inf)
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    return (weights @ value.repeat_interleave(ratio, 1)).transpose(1, 2).contiguous(), None


def _make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask of elements also where it is causal, which ``sdpa`` leaves out."""
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask


transformers.AttentionInterface.register("capped", _attend_capped)
transformers.AttentionMaskInterface.register("capped", _make_mask)


def _gemma2(mask: str, kv_heads: int) -> Model:
    """With attention of its own, `_attend_capped`: with capped scores, transformers refuses sdpa, and its others aren't exact or trainable.

    Those are ``eager``, whose weights are float32, and ``flex_attention``, which has no backward on a CPU.
    """
    config = transformers.Gemma2Config(
        **_SIZES,
        num_key_value_heads=kv_heads,
        head_dim=HEAD,
        sliding_window=WINDOW,
        query_pre_attn_scalar=HEAD,
        attn_logit_softcapping=2.0,
        attn_implementation="capped",
    )
    return _decoder(config, mask)


def _gpt2(mask: str, _: int) -> Model:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": Q_HEADS, "n_positions": 64}
    return _decoder(transformers.GPT2Config(**_COMMON, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), mask)


def _bert(mask: str, _: int) -> Model:
    config = transformers.BertConfig(**_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, is_decoder=False)
    return transformers.BertForMaskedLM(config), _batch(mask, is_causal=False)


def _modernbert(mask: str, _: int) -> Model:
    config = transformers.ModernBertConfig(
        **_SIZES, cls_token_id=1, sep_token_id=2, local_attention=2 * WINDOW, global_attn_every_n_layers=2, decoder_bias=True
    )
    return _in_float64(transformers.ModernBertForMaskedLM(config), shift=0), _batch(mask, is_causal=False)


def _t5(mask: str, _: int) -> Model:
    sizes = {"d_model": WIDTH, "d_kv": HEAD, "d_ff": FFN, "num_layers": 2, "num_heads": Q_HEADS}
    config = transformers.T5Config(vocab_size=VOCAB, **sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    return _in_float64(transformers.T5ForConditionalGeneration(config)), _batch(mask)


def _in_float64(model: nn.Module, shift: int | None = None) -> nn.Module:
    """The model in float64 throughout: transformers computes losses and norms in float32 whatever the model's dtype.

    With `shift` the loss of a token's logits is that of the label so many tokens on; without, the model's own loss stays.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm") or type(child).__name__ == "T5LayerNorm":
                epsilon = getattr(child, "variance_epsilon", None) or getattr(child, "eps", 1e-6)
                setattr(module, name, _Norm(child.weight, epsilon, from_one=hasattr(child, "_norm")))
    if shift is not None:

        def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
            shifted = nn.functional.pad(labels, (0, shift), value=-100)[..., shift:]
            return nn.functional.cross_entropy(logits.view(-1, vocab_size), shifted.reshape(-1))

        model.loss_function = loss
    return model


class _Norm(nn.Module):
    """Root-mean-square norm in the dtype of its input; its scale is the weight, or with `from_one` one more, as in Gemma."""

    def __init__(self, weight: nn.Parameter, epsilon: float, *, from_one: bool) -> None:
        super().__init__()
        self.weight, self.epsilon, self.from_one = weight, epsilon, from_one

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight if self.from_one else self.weight
        return nn.functional.rms_norm(x, weight.shape, weight, self.epsilon)


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and around a shortcut."""

    def __init__(self, mask: str, kv_heads: int) -> None:
        super().__init__()
        self.mask, self.kv_heads = mask, kv_heads
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, heads * HEAD, bias=False) for heads in (Q_HEADS, kv_heads, kv_heads, Q_HEADS))
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        normed = self.norms[0](x)
        q, k, v = (part(normed).unflatten(2, (-1, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=self.mask == "causal", enable_gqa=self.kv_heads != Q_HEADS
        )
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Plain(nn.Module):
    """Two blocks on embeddings of tokens and positions, and the cross entropy of each token's own label."""

    def __init__(self, mask: str, kv_heads: int) -> None:
        super().__init__()
        self.mask = mask
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(mask, kv_heads) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(place)
        allowed = None
        if self.mask == "window":
            allowed = (place[:, None] - place).abs() < WINDOW
        elif attention_mask is not None:
            allowed = attention_mask if attention_mask.dim() == 4 else attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, allowed)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _plain(mask: str, kv_heads: int) -> Model:
    return Plain(mask, kv_heads), _batch(mask, is_causal=False)


_BUILDERS = {
    "llama": _llama,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "bert": _bert,
    "modernbert": _modernbert,
    "t5": _t5,
    "plain": _plain,
}
