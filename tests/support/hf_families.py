"""Tiny random models of many families as transformers saves them, for its logits as an oracle.

    folder = write_hf_family(tmp_path / "gpt_oss", "gpt_oss")

Names and shapes of a model's tensors come from transformers itself, which saved one: they are in
`tests/oracle/families.npz` beside its logits, and the numbers are drawn here. So a test needs
neither transformers nor torch; the script beside that file says how it was made.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tiny_families import FAMILY_CONFIGS
from tiny_models import Config, Tensors, write_folder

NUM_TOKENS = 56
SEEN = (0, 1, 14, 15, 16, 17, 31, 32, 40, 55)  # positions whose logits are kept
VOCAB_SIZE = 96
ORACLE_FILE = pathlib.Path(__file__).parents[1] / "oracle" / "families.npz"
Shapes = dict[str, tuple[int, ...]]

_LONGROPE: Config = {
    "type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.2],
    "long_factor": [1.0, 1.5, 4.0, 9.0],
}
_QWEN_VISION: Config = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 4,
}
_PIXTRAL: Config = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
}


def _text(name: str, **changes: Any) -> Config:
    """A configuration of `tiny_families`, with a small vocabulary; None removes a field."""
    config = FAMILY_CONFIGS[name] | {"vocab_size": VOCAB_SIZE, "pad_token_id": 0} | changes
    sizes = {"vocab_size_per_layer_input": VOCAB_SIZE}
    config |= {key: value for key, value in sizes.items() if key in config}
    return {key: value for key, value in config.items() if key not in changes or value is not None}


def _multimodal(model_type: str, text: Config, **more: Any) -> Config:
    return {"model_type": model_type, "text_config": text, **more}


CASES: dict[str, Config] = {
    "qwen3_moe": _text("qwen3_moe"),
    "qwen3_moe, some dense": _text("qwen3_moe, some dense"),
    "qwen3_moe, biases": _text("qwen3_moe", attention_bias=True, head_dim=None),
    "mixtral": _text("mixtral"),
    "mixtral, windows": _text("mixtral", sliding_window=16),
    "gpt_oss": _text("gpt_oss"),
    "gpt_oss, not truncated": _text(
        "gpt_oss", rope_scaling=FAMILY_CONFIGS["gpt_oss"]["rope_scaling"] | {"truncate": False}
    ),
    "gemma2": _text("gemma2", sliding_window=16),
    "gemma4, shared": _text("gemma4, shared"),
    "gemma4, experts": _text("gemma4, experts"),
    "gemma4, multimodal": _multimodal(
        "gemma4", _text("gemma4, shared"), vision_config=None, audio_config=None
    ),
    "qwen3_5": _text("qwen3_5", model_type="qwen3_5_text"),
    "qwen3_5, multimodal": _multimodal(
        "qwen3_5", _text("qwen3_5", model_type="qwen3_5_text"), vision_config=_QWEN_VISION
    ),
    "qwen3_5, experts, multimodal": _multimodal(
        "qwen3_5_moe",
        _text("qwen3_5, experts", model_type="qwen3_5_moe_text"),
        vision_config=_QWEN_VISION,
        tie_word_embeddings=False,
    ),
    "qwen3_next": _text("qwen3_next"),
    "qwen3_next, some dense": _text("qwen3_next", mlp_only_layers=[1], attention_bias=True),
    "glm4_moe_lite": _text("glm4_moe_lite"),
    "glm4_moe_lite, biases": _text(
        # With this epsilon, which transformers has in latents' norms whatever the file says.
        "glm4_moe_lite",
        attention_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    ),
    "glm4_moe_lite, plain queries": _text("glm4_moe_lite, plain queries"),
    "ministral3": _text("ministral3"),
    "ministral3, windows": _text("ministral3", sliding_window=16, tie_word_embeddings=True),
    "mistral3": _multimodal("mistral3", _text("ministral3"), vision_config=_PIXTRAL),
    "mistral3 of a mistral, untied": _multimodal(
        "mistral3",
        _text("ministral3", model_type="mistral", rope_parameters=None, sliding_window=16),
        vision_config=_PIXTRAL,
        tie_word_embeddings=False,
    ),
    "phi3": _text("phi3"),
    "phi3, windows": _text("phi3", sliding_window=16, tie_word_embeddings=True),
    "phi3, longrope for short": _text(
        "phi3", rope_scaling=_LONGROPE, original_max_position_embeddings=1024
    ),
    "phi3, longrope for long": _text(
        "phi3", rope_scaling=_LONGROPE, original_max_position_embeddings=32
    ),
    "smollm3": _text("smollm3"),
    "smollm3, windows": _text("smollm3", use_sliding_window=True, sliding_window=16),
    "granite": _text("granite"),
    "olmo3": _text("olmo3"),
    "lfm2": _text("lfm2"),
    "lfm2, biases, untied": _text("lfm2, biases", tie_word_embeddings=False),
}


def oracle_shapes(name: str) -> Shapes:
    """Names and shapes of a model's tensors, as transformers saved it."""
    return {key: tuple(shape) for key, shape in _oracle()[0][name].items()}


def oracle_logits(name: str) -> np.ndarray:
    """What transformers computes at `SEEN`, `(positions, vocab)`."""
    return _oracle()[1][name]


@functools.cache
def _oracle() -> tuple[dict[str, dict[str, list[int]]], dict[str, np.ndarray]]:
    with np.load(ORACLE_FILE) as file:
        shapes = json.loads(str(file["shapes"]))
        return shapes, {name: file[name] for name in CASES}


_LESS_ONE = ("gemma2", "qwen3_5", "qwen3_next")  # these store the weights of norms less one


def draw(name: str, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Weights by name, f32: logits of a few units that depend on all of the context."""
    generator = np.random.default_rng(seed)
    norm_mean = 0.0 if name.startswith(_LESS_ONE) else 1.0
    return {
        key: _drawn(key, shapes[key], generator, norm_mean).astype(np.float32)
        for key in sorted(shapes)
    }


def _drawn(
    name: str, shape: tuple[int, ...], generator: np.random.Generator, norm_mean: float
) -> np.ndarray:
    values = generator.standard_normal(shape)
    end = name.removesuffix(".weight").rpartition(".")[2]
    if end == "A_log":
        return np.log(1 + 8 * np.abs(values))
    if end in {"scale", "per_expert_scale", "layer_scalar"}:
        return 1 + 0.2 * values
    if "norm" in end:
        return (1.0 if "linear_attn" in name else norm_mean) + 0.2 * values
    if end == "e_score_correction_bias":
        return 0.3 * values - 0.8  # so that scores are below zero
    if end.endswith("bias") or end == "sinks" or end.startswith("embed_tokens"):
        return 0.3 * values
    if "conv" in end:
        return 0.5 * values
    return values / np.sqrt(shape[-1])


def write_hf_family(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The model folder of a case."""
    tensors = draw(name, oracle_shapes(name))
    return write_folder(folder, CASES[name], tensors=tensors, tokenizer=False)


def text_ids() -> list[int]:
    """The tokens that every model is asked about."""
    return [int(i) for i in np.random.default_rng(11).integers(4, VOCAB_SIZE, NUM_TOKENS)]
