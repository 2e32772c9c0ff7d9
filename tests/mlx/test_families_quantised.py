"""MLX-quantised folders against mlx-lm, kept quantised and dequantised."""

import json
import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracle import load_mlx_lm, mlx_lm_logits
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_models import Config, random_ids, random_tensors, tiny_config, write_folder

from edgekv.models.checkpoint import Quantised
from edgekv.models.linear import DenseLinear, QuantisedLinear, StackedLinear
from edgekv.models.open_model import open_decoder

IDS = random_ids(40)
ATOL = 1e-4
EIGHT_BIT = {"group_size": 32, "bits": 8}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
# From a table of tiny floats mlx-lm makes bfloat16, and then computes in it.
TABLE = {"embed_tokens": EIGHT_BIT}

Spec = dict[str, Any]
# Module patterns that are quantised otherwise than the default; False: not at all.
Overrides = Mapping[str, Spec | bool]

CASES: dict[str, tuple[Config, Spec, Overrides]] = {
    "llama-4bit": (tiny_config("llama"), {"group_size": 32, "bits": 4}, {}),
    "llama-8bit": (
        tiny_config("llama", intermediate_size=128),
        {"group_size": 64, "bits": 8},
        {},
    ),
    "llama-3bit": (tiny_config("llama"), {"group_size": 32, "bits": 3}, {}),
    "llama-head-kept": (
        tiny_config("llama"),
        {"group_size": 32, "bits": 4},
        {"lm_head": False, "model.embed_tokens": False},
    ),
    "llama-unlike-parts": (
        tiny_config("llama", attention_bias=True, mlp_bias=True),
        {"group_size": 32, "bits": 4},
        {"q_proj": EIGHT_BIT, "v_proj": False, "up_proj": EIGHT_BIT, "lm_head": EIGHT_BIT},
    ),
    "qwen2-unlike-parts": (
        tiny_config("qwen2"),
        {"group_size": 32, "bits": 4},
        {"k_proj": EIGHT_BIT, "layers.1": False},
    ),
    "qwen3-8bit": (tiny_config("qwen3"), EIGHT_BIT, {}),
    "gemma3-4bit": (tiny_config("gemma3"), {"group_size": 32, "bits": 4}, {}),
    "openelm-8bit": (tiny_config("openelm"), EIGHT_BIT, {}),
    "llama-mxfp4": (tiny_config("llama"), MXFP4, TABLE),
    "llama-nvfp4": (tiny_config("llama"), NVFP4, TABLE),
    "qwen3-mxfp8": (tiny_config("qwen3"), MXFP8, TABLE),
    "llama-unlike-modes": (
        tiny_config("llama", attention_bias=True, mlp_bias=True),
        MXFP4,
        TABLE | {"q_proj": NVFP4, "v_proj": False, "up_proj": MXFP8, "lm_head": EIGHT_BIT},
    ),
}


def quantised_folder(folder, config: Config, default, overrides: Overrides):
    """Write a folder as `mlx_lm.convert -q` does: codes, scales, and specs in config.json."""
    tensors: dict[str, mx.array] = {}
    specs: dict[str, Any] = dict(default)
    for name, values in random_tensors(config).items():
        module, array = name.removesuffix(".weight"), mx.array(values)
        spec = next((s for p, s in overrides.items() if re.search(p, module)), default)
        if array.ndim == 1 or spec is False:
            tensors[name] = array
            continue
        if spec is not default:
            specs[module] = spec
        parts = zip(("weight", "scales", "biases"), mx.quantize(array, **spec), strict=False)
        tensors |= {f"{module}.{part}": stored for part, stored in parts}
    config = config | {"quantization": specs}
    return write_folder(folder, config, tensors=tensors, tokenizer=False)


def stepper_of(folder, profile) -> Stepper:
    return Stepper(open_decoder(folder, profile))


@pytest.mark.parametrize("name", CASES)
def test_kept_and_dequantised_equal_mlx_lm(name, tmp_path):
    folder = quantised_folder(tmp_path, *CASES[name])
    expected = mlx_lm_logits(folder, IDS)
    assert expected.std() > 0.5
    for profile in (CPU_PROFILE, FUSED_PROFILE):
        stepper = stepper_of(folder, profile)
        np.testing.assert_allclose(stepper.logits(IDS), expected, rtol=0, atol=ATOL)
        chunked = stepper.logits(IDS, chunks=[17, 1, 1, 8])
        np.testing.assert_allclose(chunked, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_what_mlx_lm_converts_equals_its_floats_in_mlx_lm(mode, tmp_path):
    """Embedding and head too, so mlx-lm is given the floats: of codes it would make bfloat16."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    source = write_folder(tmp_path / "source", tiny_config("llama"), tokenizer=False)
    config = json.loads((source / "config.json").read_text())
    model, config = quantize_model(load_mlx_lm(source), config, None, None, mode=mode)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")

    stored = mx.load(str(tmp_path / "model.safetensors"))
    scales = {name: stored.get(f"{name.removesuffix('.weight')}.scales") for name in stored}
    floats = {
        name: array
        if scales[name] is None
        else mx.dequantize(array, scales[name], mode=mode, dtype=mx.float32)
        for name, array in stored.items()
        if not name.endswith(".scales")
    }
    folder = write_folder(tmp_path / "floats", tiny_config("llama"), tensors=floats)
    expected = mlx_lm_logits(folder, IDS)
    for profile in (CPU_PROFILE, FUSED_PROFILE):
        stepper = stepper_of(tmp_path, profile)
        np.testing.assert_allclose(stepper.logits(IDS), expected, rtol=0, atol=ATOL)
        weights = stepper.decoder.weights
        assert isinstance(weights.embedding.weight, Quantised) == profile.keeps_quantised
        assert isinstance(weights.head, QuantisedLinear) == profile.keeps_quantised


def test_like_parts_are_fused_and_unlike_ones_stacked(tmp_path):
    fused = stepper_of(quantised_folder(tmp_path / "a", *CASES["llama-4bit"]), FUSED_PROFILE)
    layer = fused.decoder.weights.layers[0]
    assert isinstance(layer.mixer.qkv, QuantisedLinear)
    assert layer.mixer.qkv.weight.shape == (128, 64)
    assert isinstance(layer.mlp.gate_up, QuantisedLinear)
    assert isinstance(fused.decoder.weights.embedding.weight, Quantised)

    folder = quantised_folder(tmp_path / "b", *CASES["llama-unlike-parts"])
    layer = stepper_of(folder, FUSED_PROFILE).decoder.weights.layers[0]
    assert isinstance(layer.mixer.qkv, StackedLinear)
    kinds = [type(part) for part in layer.mixer.qkv.parts]
    assert kinds == [QuantisedLinear, QuantisedLinear, DenseLinear]
    assert isinstance(layer.mlp.gate_up, StackedLinear)

    layer = stepper_of(folder, CPU_PROFILE).decoder.weights.layers[0]
    assert isinstance(layer.mixer.qkv, DenseLinear), "floats all fuse"
