"""Sliding windows that mlx-lm does not apply, against a decoder written out in numpy, f64."""

import numpy as np
import pytest
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_models import Config, Tensors, random_ids, random_tensors, tiny_config, write_folder

from edgekv.models.open_model import open_decoder

IDS = random_ids(50)
WINDOW = 12

# Configuration, and the window that each layer must have.
CASES: dict[str, tuple[Config, tuple[int | None, ...]]] = {
    "mistral": (
        tiny_config("llama", model_type="mistral", sliding_window=WINDOW),
        (WINDOW, WINDOW, WINDOW),
    ),
    "mistral-without": (tiny_config("llama", model_type="mistral"), (None, None, None)),
    "mistral-layer-types": (
        tiny_config(
            "llama",
            model_type="mistral",
            sliding_window=WINDOW,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        (None, WINDOW, None),
    ),
    "qwen2-off": (tiny_config("qwen2", sliding_window=WINDOW), (None, None, None)),
    "qwen2-upper-layers": (
        tiny_config("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        (None, WINDOW, WINDOW),
    ),
    "qwen2-all-layers": (
        tiny_config("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0),
        (WINDOW, WINDOW, WINDOW),
    ),
}


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotated(x: np.ndarray, base: float) -> np.ndarray:
    """`(T, heads, head_dim)` at positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[0])[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def slow_logits(config: Config, tensors: Tensors, windows: tuple[int | None, ...]) -> np.ndarray:
    """Logits `(T, vocab)` of `IDS`, the whole text at once and each position by the book."""
    t = {name: values.astype(np.float64) for name, values in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    length, eps, base = len(IDS), config["rms_norm_eps"], config["rope_theta"]
    position = np.arange(length)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    x = t["model.embed_tokens.weight"][IDS]
    for layer, window in enumerate(windows):
        at = f"model.layers.{layer}."
        h = rms_norm(x, t[f"{at}input_layernorm.weight"], eps)
        q = rotated(linear(f"{at}self_attn.q_proj", h).reshape(length, heads, head_dim), base)
        k = rotated(linear(f"{at}self_attn.k_proj", h).reshape(length, kv_heads, head_dim), base)
        v = linear(f"{at}self_attn.v_proj", h).reshape(length, kv_heads, head_dim)
        k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
        age = position[:, None] - position[None]
        visible = (age >= 0) & (age < (window or length))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
        weights = np.exp(np.where(visible, scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
        x = x + linear(f"{at}self_attn.o_proj", attended)
        h = rms_norm(x, t[f"{at}post_attention_layernorm.weight"], eps)
        gate = linear(f"{at}mlp.gate_proj", h)
        gated = gate / (1 + np.exp(-gate)) * linear(f"{at}mlp.up_proj", h)
        x = x + linear(f"{at}mlp.down_proj", gated)
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return rms_norm(x, t["model.norm.weight"], eps) @ head.T


@pytest.mark.parametrize("name", CASES)
def test_windows_are_applied(name, tmp_path):
    config, windows = CASES[name]
    tensors = random_tensors(config)
    expected = slow_logits(config, tensors, windows)
    folder = write_folder(tmp_path, config, tensors=tensors, tokenizer=False)
    for profile in (CPU_PROFILE, FUSED_PROFILE):
        stepper = Stepper(open_decoder(folder, profile))
        for chunks in ([], [20, 7, 1, 1, 13], [WINDOW - 1, 1, 1, 1]):
            logits = stepper.logits(IDS, chunks=chunks)
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_window_matters():
    """Guards the cases above: with and without, these weights give other logits."""
    config, windows = CASES["mistral"]
    tensors = random_tensors(config)
    with_window = slow_logits(config, tensors, windows)
    without = slow_logits(config, tensors, (None, None, None))
    np.testing.assert_allclose(with_window[:WINDOW], without[:WINDOW], rtol=0, atol=1e-12)
    assert np.abs(with_window[WINDOW:] - without[WINDOW:]).max(axis=-1).min() > 1e-3
