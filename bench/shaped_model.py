"""Random models of the shapes that people run, scaled down, for what only a shape decides.

    python -m edgekv.bench.shaped_model experts FOLDER
    edgekv bench decode -m FOLDER --sessions 8 --peer mlx-lm

mlx-lm's own network of a configuration is asked for its parameters, which are drawn from a seed and
saved under its names, as its converter would save them; so it needs edgekv[bench]. What such a
model says is nonsense, but depends on all of the context.
"""

import importlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from edgekv.bench.synthetic_model import BOS_ID, EOS_ID, VOCAB_SIZE, tokenizer_files

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
SHAPES: dict[str, dict[str, Any]] = {
    # 0.3 billion parameters in eight experts, of which each row gets two.
    "experts": {
        **_BASE,
        "model_type": "qwen3_moe",
        "hidden_size": 768,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1536,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    # Gemma 4 E2B's 35 layers, 20 of which share KV, at a quarter of its width.
    "shared-kv": {
        **_BASE,
        "model_type": "gemma4_text",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
        "tie_word_embeddings": True,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    },
    # Qwen 3.5's pattern: three of four layers are Gated DeltaNet.
    "recurrent": {
        **_BASE,
        "model_type": "qwen3_5",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "full_attention_interval": 4,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
    },
}


def network(config: Mapping[str, Any]) -> Any:
    """mlx-lm's network of a configuration, with numbers of its own choice."""
    from mlx_lm.utils import MODEL_REMAPPING

    kind = MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    return module.Model(module.ModelArgs.from_dict(dict(config)))


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by mlx-lm's names, f32: logits of a few units that depend on all of the context."""
    from mlx.utils import tree_flatten

    generator = np.random.default_rng(seed)
    norm_mean = 0.0 if config["model_type"] == "gemma2" else 1.0
    parameters: Any = tree_flatten(network(config).parameters())
    shapes = {name: array.shape for name, array in parameters}
    return {
        name: _drawn(name, shape, generator, norm_mean).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def _drawn(
    name: str, shape: tuple[int, ...], generator: np.random.Generator, norm_mean: float
) -> np.ndarray:
    values = generator.standard_normal(shape)
    module, _, end = name.rpartition(".")
    if end == "A_log":
        return np.asarray(np.log(1 + 8 * np.abs(values)))
    if "norm" in module.rpartition(".")[2] or end in {"scale", "layer_scalar", "per_expert_scale"}:
        return norm_mean + 0.2 * values
    if end == "e_score_correction_bias":
        # Of scores below zero mlx-lm thinks less than of those in groups that it has left out.
        return 0.3 * np.abs(values)
    if end in {"bias", "dt_bias", "sinks"}:
        return 0.3 * values
    if "embed_tokens" in name:
        return 0.3 * values
    is_conv = module.rpartition(".")[2] in {"conv", "conv1d"}
    return 0.5 * values if is_conv else values / np.sqrt(shape[-1])


def write_shaped_model(folder: pathlib.Path, shape: str) -> pathlib.Path:
    """Write a model of one of `SHAPES` into a folder, which is made if need be, and return it."""
    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    arrays = {name: mx.array(values) for name, values in random_tensors(config).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: python -m edgekv.bench.shaped_model {'|'.join(SHAPES)} FOLDER")
    write_shaped_model(pathlib.Path(sys.argv[2]), sys.argv[1])
