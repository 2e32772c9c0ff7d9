"""Tensors that are missing, misshapen or too many, of every kind of layer: said by name."""

import re

import numpy as np
import pytest
from hf_families import CASES, draw, oracle_shapes
from stepping import CPU_PROFILE
from tiny_models import write_folder

from edgekv.errors import CheckpointCorrupt
from edgekv.models.open_model import open_decoder

KINDS = (
    *("qwen3_moe", "mixtral", "gpt_oss", "gemma4, shared", "gemma4, experts"),
    *("qwen3_5, experts, multimodal", "qwen3_next", "glm4_moe_lite", "phi3", "olmo3", "lfm2"),
)


def load(folder, name, tensors, **changes) -> None:
    write_folder(folder, CASES[name] | changes, tensors=tensors, tokenizer=False)
    open_decoder(folder, CPU_PROFILE)


def one_of_each_kind(names) -> list[str]:
    """The last tensor of each name but for its numbers."""
    return sorted({re.sub(r"\d+", "N", name): name for name in names}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_any_missing_tensor_is_named(tmp_path, name):
    tensors = draw(name, oracle_shapes(name))
    for lost in one_of_each_kind(tensors):
        rest = {key: values for key, values in tensors.items() if key != lost}
        with pytest.raises(CheckpointCorrupt, match=r"tensor '.*' is missing") as e:
            load(tmp_path, name, rest)
        # Of experts in one tensor, whose place a tensor of each may take, it is that one.
        alone = re.sub(r"gate_up_proj$", "0.gate_proj.weight", lost)
        assert any(f"tensor {known!r}" in str(e.value) for known in (lost, alone))
        assert str(tmp_path) in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_any_misshapen_tensor_is_named_with_both_shapes(tmp_path, name):
    tensors = draw(name, oracle_shapes(name))
    for longer in one_of_each_kind(tensors):
        values = tensors[longer]
        grown = np.concatenate([values, values[:1]])
        with pytest.raises(CheckpointCorrupt) as e:
            load(tmp_path, name, tensors | {longer: grown})
        assert f"tensor {longer!r} has shape {grown.shape}, expected {values.shape}" in str(e.value)


@pytest.mark.parametrize("name", ["qwen3_5, experts, multimodal", "qwen3_next"])
def test_a_convolution_that_is_one_number_is_named(tmp_path, name):
    """Its shape says whether a converter has changed the norms; this one says nothing."""
    tensors = draw(name, oracle_shapes(name))
    conv = next(key for key in tensors if key.endswith("linear_attn.conv1d.weight"))
    with pytest.raises(CheckpointCorrupt, match=r"conv1d.weight' has shape \(\)"):
        load(tmp_path, name, tensors | {conv: np.zeros((), np.float32)})


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("qwen3_moe", "num_experts", r"mlp.experts.5.gate_proj.weight' is of an expert too many"),
        ("mixtral", "num_local_experts", r"experts.3.w1.weight' is of an expert too many"),
        ("gpt_oss", "num_local_experts", r"mlp.experts.gate_up_proj' has shape \(5, 64, 192\)"),
        ("gemma4, experts", "num_experts", r"experts.gate_up_proj' has shape \(5, 48, 64\)"),
    ],
)
def test_more_experts_than_the_configuration_says(tmp_path, name, count, message):
    with pytest.raises(CheckpointCorrupt, match=message):
        load(
            tmp_path,
            name,
            draw(name, oracle_shapes(name)),
            **{count: CASES[name][count] - 1, "num_experts_per_tok": 2},
        )


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe_lite"])
def test_an_expert_that_the_router_does_not_know(tmp_path, name):
    tensors = draw(name, oracle_shapes(name))
    last = max(
        (key for key in tensors if re.search(r"layers\.1\..*experts\.\d+\.", key)),
        key=lambda key: int(re.findall(r"\d+", key)[1]),
    )
    number = int(re.findall(r"\d+", last)[1])
    more = {
        key.replace(f"experts.{number}.", f"experts.{number + 1}."): values
        for key, values in tensors.items()
        if f"experts.{number}." in key
    }
    with pytest.raises(CheckpointCorrupt, match=rf"experts\.{number + 1}\..* an expert too many"):
        load(tmp_path, name, tensors | more)


def test_a_shared_layer_may_have_keys_and_values_that_nobody_reads(tmp_path):
    """Checkpoints on the Hub have them for all of Gemma 4's layers, transformers saves none."""
    name = "gemma4, shared"
    shapes = oracle_shapes(name)
    assert "model.layers.5.self_attn.k_proj.weight" not in shapes
    more = {
        key.replace("layers.2.", "layers.5."): shape
        for key, shape in shapes.items()
        if re.search(r"layers\.2\.self_attn\.(k|v)_", key)
    }
    assert len(more) == 3
    load(tmp_path, name, draw(name, shapes) | draw(name, more))
