"""Tiny random models as Hugging Face folders, one for each family and in many variants.

    folder = write_folder(tmp_path / "llama", tiny_config("llama"))

makes a folder that edgekv and mlx-lm both open: config.json, model.safetensors (f32) and, unless
told otherwise, a tokenizer with a chat template. The same arguments write the same bytes.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 288
BOS_ID, EOS_ID, TURN_START_ID, TURN_END_ID = 0, 1, 2, 3
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>")

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]

_LLAMA_LIKE: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": TURN_END_ID,
}

_CONFIGS: dict[str, Config] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE},
    "qwen2": {"model_type": "qwen2", **_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLAMA_LIKE, "head_dim": 32},
    "gemma3": {
        "model_type": "gemma3_text",
        **_LLAMA_LIKE,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
    },
    "openelm": {
        "model_type": "openelm",
        "model_dim": 64,
        "head_dim": 16,
        "num_transformer_layers": 3,
        "num_query_heads": [4, 2, 6],
        "num_kv_heads": [2, 1, 2],
        "ffn_multipliers": [0.5, 1.3, 2.25],
        "ffn_dim_divisor": 32,
        "vocab_size": VOCAB_SIZE,
        "max_context_length": 1024,
        "rms_norm_eps": 1e-5,
        "rope_freq_constant": 10_000.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": TURN_END_ID,
    },
}

FAMILIES = tuple(_CONFIGS)

LLAMA3_ROPE: Config = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,  # so that all three regimes occur
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TRAINING_TEXT = (
    "the quick brown fox jumps over the lazy dog; the model answers what the user asks. "
)


def tiny_config(family: str, **changes: Any) -> Config:
    """The `config.json` of a family's tiny model, with fields changed; None removes one."""
    config = _CONFIGS[family] | changes
    return {name: value for name, value in config.items() if value is not None}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the folder of a configuration."""
    if config["model_type"] == "openelm":
        return _openelm_shapes(config)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    gemma = config["model_type"].startswith("gemma3")
    attention_bias = config.get("attention_bias", False)
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    biased = {name for name in linears if config.get("mlp_bias", False) and "mlp" in name}
    if attention_bias:
        biased |= {name for name in linears if "self_attn" in name}
    if config["model_type"] == "qwen2":
        biased |= {f"self_attn.{part}_proj" for part in "qkv"}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if gemma:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if gemma or config["model_type"] == "qwen3":
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{at}{name}.bias": linears[name][:1] for name in sorted(biased)}
        shapes |= {f"{at}{name}.weight": (size,) for name, size in norms.items()}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _openelm_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, head_dim = config["model_dim"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.token_embeddings.weight": (config["vocab_size"], dim),
        "transformer.norm.weight": (dim,),
    }
    for layer, ffn in enumerate(openelm_ffn_sizes(config)):
        heads, kv_heads = config["num_query_heads"][layer], config["num_kv_heads"][layer]
        at = f"transformer.layers.{layer}."
        shapes |= {
            f"{at}attn.qkv_proj.weight": ((heads + 2 * kv_heads) * head_dim, dim),
            f"{at}attn.out_proj.weight": (dim, heads * head_dim),
            f"{at}ffn.proj_1.weight": (2 * ffn, dim),
            f"{at}ffn.proj_2.weight": (dim, ffn),
            f"{at}attn_norm.weight": (dim,),
            f"{at}ffn_norm.weight": (dim,),
        }
        if config.get("normalize_qk_projections", True):
            shapes |= {f"{at}attn.{part}_norm.weight": (head_dim,) for part in "qk"}
    if not config.get("share_input_output_layers", True):
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    return shapes


def openelm_ffn_sizes(config: Mapping[str, Any]) -> list[int]:
    """MLP widths of an OpenELM configuration, by layer."""
    divisor = config["ffn_dim_divisor"]
    widths = [multiplier * config["model_dim"] for multiplier in config["ffn_multipliers"]]
    sizes = [max(divisor, int(width + divisor / 2) // divisor * divisor) for width in widths]
    return [s if s >= 0.9 * w else s + divisor for s, w in zip(sizes, widths, strict=True)]


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Weights by name, f32: logits of a few units that depend on all of the context."""
    generator = np.random.default_rng(seed)
    norm_mean = 0.0 if config["model_type"].startswith("gemma3") else 1.0
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = generator.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = norm_mean + 0.2 * values
        elif name.endswith(".bias"):
            values = 0.3 * values
        elif "embed" in name:
            values = 0.15 * values
        else:
            values = values / np.sqrt(shape[-1])
        tensors[name] = values.astype(np.float32)
    return tensors


def write_folder(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    *,
    tensors: Mapping[str, np.ndarray | mx.array] | None = None,
    seed: int = 0,
    tokenizer: bool = True,
) -> pathlib.Path:
    """Write a model folder and return it.

    Args:
        folder: Made if it does not exist.
        config: See `tiny_config`.
        tensors: Weights; None draws them from `seed`.
        seed: Of the weights.
        tokenizer: Write tokenizer.json and tokenizer_config.json too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1))
    tensors = random_tensors(config, seed) if tensors is None else tensors
    arrays = {name: mx.array(values) for name, values in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_plain_speaker(folder: pathlib.Path) -> pathlib.Path:
    """Write a model that mostly speaks plain text: tokens of parts of characters are unlikely."""
    config = tiny_config("llama")
    tensors = random_tensors(config)
    tokenizer = tokenizers.Tokenizer.from_str(tiny_tokenizer_json())
    parts = [i for i in range(VOCAB_SIZE) if "�" in tokenizer.decode([i])]
    tensors["lm_head.weight"][parts] = 0.0
    return write_folder(folder, config, tensors=tensors)


@functools.cache
def tiny_tokenizer_json() -> str:
    """A byte-level BPE of `VOCAB_SIZE` tokens that encodes any text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT] * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()


def write_tokenizer(folder: pathlib.Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, a chat template among it."""
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json())
    settings = {
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[TURN_END_ID],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_ids(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids that are not special."""
    generator = np.random.default_rng(seed)
    return [int(i) for i in generator.integers(len(SPECIAL_TOKENS), VOCAB_SIZE, num_tokens)]
