"""Tiny models of many transformers architectures, and the table of how exact plans for them are.

`build` makes a model and a batch in float64 without dropout, as `tests.zoo` does by hand, from a configuration whose fields are set by
their names. Sizes are splittable by two and four: batch 8, sequence 16, width 32, four heads, two layers of each kind. What an
architecture needs beside that is in `SPECIAL`.

``python -m tests.architectures RESULTS`` checks all architectures under every pin of `PINS`, writes a line per architecture to the file
RESULTS, and prints the table. It goes on where it was stopped. ``python -m tests.architectures causal llama`` checks one.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from autopar.capture import capture
from autopar.checks.verification import prepare_reference, verify_against
from autopar.cost_models import Cluster
from autopar.errors import AutoparError
from tests.planning import make_plan
from tests.zoo import Model, labels, padding, tokens

ROWS = 8
IMAGE = 32
CLASSES = 8

_WIDTH, _INNER, _LAYERS, _HEADS, _KV_HEADS, _HEAD = 32, 64, 2, 4, 2, 8

# A value, and what configurations of transformers call the fields that get it.
_NAMES: Sequence[tuple[Any, str]] = (
    (64, "vocab_size n_words max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"),
    (
        _WIDTH,
        """hidden_size d_model n_embd dim embed_dim emb_dim embedding_size word_embed_proj_dim conv_dim_model decoder_hidden_size""",
    ),
    (
        _INNER,
        """intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size hidden_dim moe_intermediate_size
        shared_expert_intermediate_size decoder_intermediate_size dff feed_forward_size""",
    ),
    (
        _LAYERS,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers
        encoder_num_hidden_layers""",
    ),
    (
        _HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads""",
    ),
    (_KV_HEADS, "num_key_value_heads num_kv_heads"),
    (_HEAD, "head_dim d_kv kv_channels attention_head_dim"),
    (4, "num_local_experts num_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_k eos_token_id"),
    (1, "n_group topk_group bos_token_id"),
    (0, "pad_token_id decoder_start_token_id"),
    (5, "sliding_window"),
    (IMAGE, "image_size"),
    (False, "use_cache"),
)
_FIELDS = {field: value for value, fields in _NAMES for field in fields.split()}

AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "mixture": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "image": transformers.AutoModelForImageClassification,
    "audio": transformers.AutoModelForAudioClassification,
}

ARCHITECTURES: Mapping[str, str] = {
    "causal": """apertus arcee beam biogpt bitnet bloom codegen cohere cohere2 ctrl cwm deepseek_v2 diffllama doge emu3
        ernie4_5 exaone4 falcon falcon_mamba flint gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo
        gpt_neox gpt_neox_japanese gptj granite granite_swa helium hrm_text hyperclovax internlm3 iquestcoder jais2 lfm2 lfm3 llama
        llama4_text mamba mamba2 minicpm3 ministral3 mistral modernbert-decoder mpt nanochat olmo olmo2 olmo3 olmo_hybrid
        openai-gpt opt persimmon phi phi3 qwen2 qwen3 qwen3_5_text recurrent_gemma rwkv seed_oss smollm3 stablelm starcoder2 vaultgemma
        xlnet""",
    "mixture": """ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe jetmoe mixtral olmoe phimoe qwen2_moe qwen3_moe""",
    "masked": """albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie eurobert flaubert
        fnet funnel gte ibert jina_embeddings_v3 layoutlm longformer megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer
        rembert roberta roberta-prelayernorm roformer squeezebert tapas ultrabert xlm xlm-roberta xlm-roberta-xl yoso""",
    "image": """beit clip convnext data2vec-vision dinov2 dinov2_with_registers ijepa mobilenet_v2 poolformer pvt_v2 regnet resnet
        segformer siglip swin swinv2 vit vit_msn""",
    "audio": "data2vec-audio hubert unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm",
    "seq2seq": """bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 mbart mt5 mvp pegasus pegasus_x
        plbart prophetnet t5 umt5""",
}

_SMALL_WAVES = {
    "conv_dim": [_WIDTH, _WIDTH],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "classifier_proj_size": _WIDTH,
}

# What an architecture needs beside `_FIELDS`.
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "state_size": 16, "chunk_size": 8},
    "deepseek_v2": {
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
    },
    "minicpm3": {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": 16},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "segformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "sr_ratios": [2, 2, 1, 1]},
    "pvt_v2": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    **dict.fromkeys(["hubert", "wav2vec2", "unispeech", "unispeech-sat", "wavlm", "wav2vec2-conformer", "data2vec-audio"], _SMALL_WAVES),
}


def build(name: str, task: str) -> Model:
    """The model of an architecture, ``llama``, for a task, ``causal``, in training mode, and keyword arguments for it."""
    config = transformers.AutoConfig.for_model(name)
    shrink(config)
    if task == "seq2seq":
        config.decoder_start_token_id = 0
    for field, value in SPECIAL.get(name, {}).items():
        setattr(config, field, value)
    torch.manual_seed(0)
    # Of the forms in which transformers computes experts, this one is a graph, and known to float64.
    options = {"experts_implementation": "batched_mm"} if task == "mixture" else {}
    model = AUTO[task].from_config(config, **options)
    return _ready(model), batch(task)


def batch(task: str) -> dict[str, Tensor]:
    """Inputs and labels of a task; rows ignore unequal numbers of labels."""
    generator = torch.Generator().manual_seed(3)
    if task == "image":
        images = torch.randn(ROWS, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64)
        return {"pixel_values": images, "labels": torch.randint(0, CLASSES, (ROWS,), generator=generator)}
    if task == "audio":
        waves = torch.randn(ROWS, 1600, generator=generator, dtype=torch.float64)
        return {"input_values": waves, "labels": torch.randint(0, CLASSES, (ROWS,), generator=generator)}
    made = {"input_ids": tokens(0, ROWS), "labels": labels(0, ROWS)}
    return made if task in ("causal", "mixture") else {**made, "attention_mask": padding(ROWS)}


def shrink(config: Any) -> None:
    """Set the fields of a configuration, and of those inside it, that `_FIELDS` names; no dropout."""
    for field, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif field in _FIELDS and (value is not None or field in ("pad_token_id",)) and not isinstance(value, (list, tuple)):
            setattr(config, field, _FIELDS[field])
        elif ("drop" in field or field.endswith("pdrop")) and isinstance(value, float):
            setattr(config, field, 0.0)
    if vars(config).get("layer_types"):
        config.layer_types = list(config.layer_types[:_LAYERS])
    config.num_labels = CLASSES


def _ready(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # zero and one initial values hide mistakes
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


PINS: Mapping[str, tuple[int, Mapping[str, object]]] = {
    "tp=2": (2, {"tp": 2}),
    "pp=2": (2, {"pp": 2}),
    "dp=2, fsdp": (2, {"dp": 2, "fsdp": True}),
    "dp=2 x tp=2": (4, {"dp": 2, "tp": 2}),
}
"""Columns of the table: ranks, and what is pinned."""

SECONDS = 600
"""How long an architecture may take."""

Cell = str | float
"""The worst relative error of a plan, or the first line of what was raised."""


def check(name: str, task: str) -> dict[str, Cell]:
    """Per pin what a plan for an architecture gives on all ranks, compared with one device."""
    try:
        model, inputs = build(name, task)
        captured = capture(model, inputs)
        reference = prepare_reference(model, inputs, captured)
    except Exception as error:
        return dict.fromkeys(PINS, _word(error))
    cells: dict[str, Cell] = {}
    for pin, (ranks, pins) in PINS.items():
        try:
            found = verify_against(reference, make_plan(captured.graph, Cluster.parse(f"{ranks}xcpu"), pins=pins))
            found.check()
            cells[pin] = found.worst
        except Exception as error:
            cells[pin] = _word(error)
    return cells


def _word(error: Exception) -> str:
    """The first line of an error of ours; another error is a crash, and is told with the place where it was raised."""
    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if isinstance(error, AutoparError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{CRASH} {text} ({Path(frame.filename).name}:{frame.lineno})"


CRASH = "CRASH"


def run_all(results: Path) -> None:
    """Check every architecture that the file `results` has no line for, each in a process of its own, and append a line of JSON."""
    done = {(task, name) for task, name, _ in _read(results)}
    context = multiprocessing.get_context("fork")
    for task, name in ((task, name) for task, names in ARCHITECTURES.items() for name in names.split()):
        if (task, name) in done:
            continue
        start = time.perf_counter()
        process = context.Process(target=_check_and_append, args=(results, task, name))
        process.start()
        process.join(SECONDS)
        if process.exitcode != 0:
            process.kill()
            process.join()
            _append(results, task, name, dict.fromkeys(PINS, f"{CRASH} exit code {process.exitcode}"))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def _check_and_append(results: Path, task: str, name: str) -> None:
    _append(results, task, name, check(name, task))


def _append(results: Path, task: str, name: str, cells: Mapping[str, Cell]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps([task, name, cells]) + "\n")


def _read(results: Path) -> list[tuple[str, str, dict[str, Cell]]]:
    return [tuple(json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def write_table(results: Path) -> str:
    """The table of all architectures in `results`, and below it what refusals say."""
    rows, reasons = [], dict[str, int]()
    for task, name, cells in sorted(_read(results)):
        texts = []
        for pin in PINS:
            cell = cells[pin]
            if isinstance(cell, str):
                reasons.setdefault(_shorten(cell), len(reasons) + 1)
            texts.append(f"refused ({reasons[_shorten(cell)]})" if isinstance(cell, str) else power_of_ten(cell))
        rows.append(f"| {name} | {task} | {' | '.join(texts)} |")
    header = f"| architecture | task | {' | '.join(PINS)} |\n| --- | --- |{' --- |' * len(PINS)}"
    return "\n".join([header, *rows, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def _shorten(reason: str) -> str:
    """The beginning of a message, without what would be markup."""
    return textwrap.shorten(reason.replace("`", "").replace("|", "/").replace("*", ""), 230)


def power_of_ten(error: float) -> str:
    """An upper bound: the digits are those of this machine's order of sums. 0 where nothing differs, as with a single micro-batch."""
    if error == 0:
        return "0"
    return f"1e{int(f'{error:.0e}'.partition('e')[2]) + 1}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if len(sys.argv) == 3:
        print(json.dumps(check(sys.argv[2], sys.argv[1]), indent=1))
    else:
        run_all(Path(sys.argv[1]))
        print(write_table(Path(sys.argv[1])))
