"""Mixtures of experts in MLX's modes, and gpt-oss as published, against mlx-lm."""

import pathlib
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracle import mlx_lm_logits
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_families import FAMILY_CONFIGS
from tiny_models import random_ids, write_folder

from edgekv.bench.shaped_model import random_tensors
from edgekv.models.checkpoint import Quantised
from edgekv.models.open_model import open_decoder

IDS = random_ids(40)
SPECS: dict[str, dict[str, Any]] = {
    mode: {"group_size": group_size, "bits": bits, "mode": mode}
    for mode, group_size, bits in (
        ("affine", 32, 4),
        ("mxfp4", 32, 4),
        ("nvfp4", 16, 4),
        ("mxfp8", 32, 8),
    )
}
EIGHT_BIT = {"group_size": 32, "bits": 8}
EXPERTS = ("switch_mlp", "mlp.experts")
Tensors = dict[str, mx.array]


def sized(family: str) -> dict[str, Any]:
    """A family's tiny configuration, of widths that are whole groups."""
    return FAMILY_CONFIGS[family] | {"moe_intermediate_size": 64}


def quantised(config: dict[str, Any], mode: str) -> tuple[Tensors, dict[str, Any]]:
    """Experts in a mode, other matrices in eight bits, and what the configuration says of it."""
    tensors: Tensors = {}
    specs = dict(SPECS[mode])
    for name, values in random_tensors(config).items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or values.ndim < 2:
            tensors[name] = mx.array(values)
            continue
        spec = SPECS[mode] if any(part in name for part in EXPERTS) else EIGHT_BIT
        if spec is EIGHT_BIT:
            specs[module] = spec
        arrays = mx.quantize(mx.array(values), **spec)
        tensors |= {
            f"{module}.{part}": array
            for part, array in zip(("weight", "scales", "biases"), arrays, strict=False)
        }
    return tensors, specs


def check(folder: pathlib.Path, expected: np.ndarray) -> None:
    """Kept and expanded, in one go and in steps."""
    assert expected.std() > 0.3
    for profile in (CPU_PROFILE, FUSED_PROFILE):
        decoder = open_decoder(folder, profile)
        experts = decoder.weights.layers[0].experts.gate_up.weight
        assert isinstance(experts, Quantised) == profile.keeps_quantised
        found = Stepper(decoder).logits(IDS, chunks=[17, 1, 1, 8])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", SPECS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stacked_experts_equal_mlx_lm(tmp_path, family, mode):
    config = sized(family)
    tensors, specs = quantised(config, mode)
    folder = write_folder(tmp_path, config | {"quantization": specs}, tensors=tensors)
    check(folder, mlx_lm_logits(folder, IDS))


@pytest.mark.parametrize("mode", SPECS)
def test_experts_of_their_own_are_stacked(tmp_path, mode):
    """Each of transformers' modules quantised by itself; mlx-lm is given them stacked."""
    config = sized("qwen3_moe")
    stacked, specs = quantised(config, mode)
    folder = write_folder(tmp_path / "a", config | {"quantization": specs}, tensors=stacked)
    expected = mlx_lm_logits(folder, IDS)
    apart: Tensors = {}
    for name, array in stacked.items():
        if "switch_mlp" not in name:
            apart[name] = array
            continue
        for i in range(config["num_experts"]):
            apart[name.replace("switch_mlp", f"experts.{i}")] = array[i]
    check(write_folder(tmp_path / "b", config | {"quantization": specs}, tensors=apart), expected)


def test_gpt_oss_as_published_equals_mlx_lm(tmp_path):
    """Experts in blocks of bytes, gate and up rows by turns; all else in bfloat16."""
    config = sized("gpt_oss")
    converted, _ = quantised(config, "mxfp4")
    floats = {name: mx.array(values) for name, values in random_tensors(config).items()}
    tensors: Tensors = {n: a for n, a in floats.items() if "mlp.experts" not in n}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts"
        for kind in ("weight", "scales", "bias"):
            gate, up, down = (converted[f"{at}.{p}_proj.{kind}"] for p in ("gate", "up", "down"))
            both = mx.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])
            for name, array in (("gate_up_proj", both), ("down_proj", down)):
                if kind == "weight":
                    blocks = array.view(mx.uint8).reshape(*array.shape[:2], -1, 16)
                    tensors[f"{at}.{name}_blocks"] = blocks
                else:
                    tensors[f"{at}.{name}_{kind}"] = array
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    folder = write_folder(tmp_path, config | {"quantization_config": said}, tensors=tensors)
    check(folder, mlx_lm_logits(folder, IDS))
