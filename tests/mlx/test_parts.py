"""Models cut for several ranks give the logits of the whole, whatever family and format.

Ranks are threads that take turns (`threads_group`); in `test_parts_ring` they are processes.
"""

import pathlib
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_gguf import write_family_gguf
from gguf import GGMLQuantizationType as Kind
from hf_families import text_ids, write_hf_family
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper, layout_of
from threads_group import ThreadsGroup, run_ranks
from tiny_families import FAMILY_CONFIGS
from tiny_gguf import write_gguf
from tiny_models import random_ids, random_tensors, tiny_config, write_folder
from tiny_quantised import SPECS, quantised

from edgekv.bench.shaped_model import random_tensors as family_tensors
from edgekv.errors import UnsupportedModel
from edgekv.models.checkpoint import Quantised
from edgekv.models.linear import QuantisedLinear
from edgekv.models.open_model import open_decoder

ATOL = 1e-4
IDS = [i for i in random_ids(48) if i < 280]
CHUNKS = (7, 1, 1, 20)
Config = dict[str, Any]

# OpenELM's layers differ, and of the tiny one's some have fewer heads than four.
OPENELM = {"num_query_heads": [4, 8, 12], "num_kv_heads": [2, 1, 4]}
PLAIN: dict[str, Config] = {
    "llama": tiny_config("llama"),
    "llama, biases": tiny_config("llama", attention_bias=True, mlp_bias=True),
    "llama, tied": tiny_config("llama", tie_word_embeddings=True),
    "llama, uneven words": tiny_config("llama", vocab_size=283),
    "mistral, windows": tiny_config(
        "llama",
        model_type="mistral",
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3"),
    "gemma3": tiny_config("gemma3"),
    "openelm": tiny_config("openelm", **OPENELM),
}
THREE = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
# Widths of which each rank has whole groups of 32.
WIDE: dict[str, Config] = {
    "llama, biases": {"head_dim": 32, "intermediate_size": 128},
    "qwen3_moe": {"moe_intermediate_size": 128},
    "gpt_oss": {"head_dim": 32, "intermediate_size": 128},
    "gemma4, experts": {"intermediate_size": 128, "moe_intermediate_size": 64},
    "qwen3_5, experts": {
        "linear_value_head_dim": 32,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "glm4_moe_lite": {
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "q_lora_rank": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
    },
    "lfm2": {"block_ff_dim": 192},
}


def config_of(name: str) -> Config:
    return PLAIN.get(name) or FAMILY_CONFIGS[name]


def tensors_of(name: str, config: Config) -> dict[str, np.ndarray]:
    return random_tensors(config) if name in PLAIN else family_tensors(config)


def written(folder: pathlib.Path, name: str, **changes: Any) -> pathlib.Path:
    config = config_of(name) | changes
    return write_folder(folder, config, tensors=tensors_of(name, config), tokenizer=False)


def quantised_folder(folder: pathlib.Path, name: str, spec: str, **changes: Any) -> pathlib.Path:
    config = config_of(name) | changes
    config, stored = quantised(config, tensors_of(name, config), SPECS[spec])
    return write_folder(folder, config, tensors=stored, tokenizer=False)


def check(path: pathlib.Path, size: int, *, profile=CPU_PROFILE, ids=IDS) -> None:
    """In one go and in steps, on each rank."""
    expected = Stepper(open_decoder(path, profile)).logits(ids)
    assert expected.std() > 0.3, "logits that say something"

    def run(group: ThreadsGroup) -> list[np.ndarray]:
        stepper = Stepper(open_decoder(path, profile, group=group))
        return [stepper.logits(ids), stepper.logits(ids, chunks=CHUNKS)]

    for rank, found in enumerate(run_ranks(size, run)):
        for logits in found:
            np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL, err_msg=f"rank {rank}")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*PLAIN, *FAMILY_CONFIGS])
def test_every_family(name, size, tmp_path):
    check(written(tmp_path, name), size)


@pytest.mark.parametrize(
    "name", ["llama", "gpt_oss", "gemma4, experts", "qwen3_5", "glm4_moe_lite", "lfm2, biases"]
)
def test_with_the_fused_ops(name, tmp_path):
    check(written(tmp_path, name), 2, profile=FUSED_PROFILE)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "olmo3", "gpt_oss"])
def test_three_ranks(name, tmp_path):
    check(written(tmp_path, name, **THREE), 3)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",
        "gemma4, experts",
        "qwen3_5, experts, multimodal",
        "qwen3_next",
        "glm4_moe_lite, biases",
        "mixtral",
        "phi3",
    ],
)
def test_as_transformers_saves_them(name, tmp_path):
    """Experts in one tensor, by turns and the other way round; latent maps in one."""
    check(write_hf_family(tmp_path, name), 2, ids=text_ids())


# --- quantised ---


@pytest.mark.parametrize("profile", [CPU_PROFILE, FUSED_PROFILE], ids=["expanded", "kept"])
@pytest.mark.parametrize("spec", SPECS)
def test_quantised_modes(spec, profile, tmp_path):
    name = "llama, biases"
    check(quantised_folder(tmp_path, name, spec, **WIDE[name]), 4, profile=profile)


@pytest.mark.parametrize("profile", [CPU_PROFILE, FUSED_PROFILE], ids=["expanded", "kept"])
@pytest.mark.parametrize("name", [name for name in WIDE if name in FAMILY_CONFIGS])
def test_quantised_families(name, profile, tmp_path):
    spec = "mxfp4" if name == "gpt_oss" else "4 bits"
    check(quantised_folder(tmp_path, name, spec, **WIDE[name]), 2, profile=profile)


def test_groups_are_not_cut(tmp_path):
    """Where codes are kept it is refused; where they are expanded, what contains it is read."""
    path = quantised_folder(tmp_path, "llama", "4 bits", intermediate_size=128)
    check(path, 4)
    with pytest.raises(UnsupportedModel) as raised:
        run_ranks(4, lambda group: open_decoder(path, FUSED_PROFILE, group=group))
    assert str(raised.value) == (
        f"{path / 'model.safetensors'}: 16 of 64 columns of tensor "
        "'model.layers.0.self_attn.o_proj.weight' are not whole groups of 32"
    )


def test_ranks_may_have_a_group_more_or_less(tmp_path):
    """Three groups of an MLP's channels for two ranks."""
    path = quantised_folder(tmp_path, "llama", "4 bits")
    check(path, 2, profile=FUSED_PROFILE)
    parts = run_ranks(2, lambda group: open_decoder(path, FUSED_PROFILE, group=group).config)
    assert [part.layers[0].ffn_size for part in parts] == [32, 64]


# --- GGUF ---

# Of what the files say otherwise than the tiny configurations, what their readers insist on.
GGUF_CHANGES: dict[str, Config] = {
    "gpt_oss": {"rope_scaling": None},
    "ministral3": {
        "rope_parameters": FAMILY_CONFIGS["ministral3"]["rope_parameters"]
        | {"mscale": 1.0, "mscale_all_dim": 1.0}
    },
    "glm4_moe_lite, plain queries": {"n_shared_experts": 1, "routed_scaling_factor": 1.8},
}
GGUF_FAMILIES = [name for name in FAMILY_CONFIGS if name != "qwen3_moe, some dense"]


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_every_family_as_gguf(name, tmp_path):
    config = FAMILY_CONFIGS[name] | GGUF_CHANGES.get(name, {})
    check(write_family_gguf(tmp_path / "model.gguf", config, family_tensors(config)), 2)


@pytest.mark.parametrize("profile", [CPU_PROFILE, FUSED_PROFILE], ids=["expanded", "kept"])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.MXFP4, Kind.Q5_0])
def test_quantised_gguf(kind, profile, tmp_path):
    config = tiny_config("llama", head_dim=32, intermediate_size=128)
    write_gguf(tmp_path / "model.gguf", config, kind=kind)
    check(tmp_path / "model.gguf", 4, profile=profile)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0])
def test_blocks_that_a_part_ends_in_are_read_and_cut(kind, tmp_path):
    """As Qwen2.5's MLP of 4,864 channels, 19 blocks of 256, for two ranks."""
    write_gguf(tmp_path / "model.gguf", tiny_config("qwen3"), kind=kind)
    check(tmp_path / "model.gguf", 4)


@pytest.mark.parametrize("width", [32, 64])
def test_value_heads_that_stand_in_turn_in_quantised_columns(width, tmp_path):
    config = FAMILY_CONFIGS["qwen3_5"] | {"linear_value_head_dim": width}
    kinds = dict.fromkeys(("ssm_out", "attn_gate", "attn_qkv"), Kind.Q8_0)
    path = write_family_gguf(tmp_path / "model.gguf", config, family_tensors(config), kinds=kinds)
    check(path, 2, profile=FUSED_PROFILE)
    check(path, 4)


# --- what a rank has, and what it tells the others ---


def test_a_rank_has_its_part_of_weights_and_kv(tmp_path):
    path = quantised_folder(tmp_path, "llama", "4 bits", head_dim=32, intermediate_size=128)
    whole = open_decoder(path, FUSED_PROFILE)

    def shapes(group: ThreadsGroup) -> list[tuple[int, ...]]:
        decoder = open_decoder(path, FUSED_PROFILE, group=group)
        layer, table = decoder.weights.layers[0], decoder.weights.embedding.weight
        linears = [layer.mixer.qkv, layer.mixer.out, layer.mlp.gate_up, layer.mlp.down]
        assert all(isinstance(linear, QuantisedLinear) for linear in linears)
        assert isinstance(table, Quantised)
        assert 2 * layout_of(decoder).token_bytes == layout_of(whole).token_bytes
        return [table.shape, *(linear.weight.shape for linear in linears)]

    assert run_ranks(2, shapes) == [[(144, 64), (128, 64), (64, 64), (128, 64), (64, 64)]] * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", 2 + 3 * 2),
        ("mixtral", 2 + 4 * 2),
        ("olmo3", 2 + 6 * 3),  # norms of all heads together
        ("gemma4, experts", 2 + 6 * 3),  # norms between the MLP and the experts
        ("gemma4, shared", 3 + 6 * 2),  # what layers are told of tokens begins with the embedding
    ],
)
def test_a_block_adds_up_twice(name, expected, tmp_path):
    path = written(tmp_path, name)

    def count(group: ThreadsGroup) -> int:
        Stepper(open_decoder(path, CPU_PROFILE, group=group)).logits(IDS)
        return group.num_collectives

    assert run_ranks(2, count) == [expected] * 2


def test_narrow_types(tmp_path):
    """Sums over ranks are of the type that is computed in."""
    path = written(tmp_path, "llama")
    profile = replace(FUSED_PROFILE, compute_dtype="bfloat16")
    expected = Stepper(open_decoder(path, profile), dtype=mx.bfloat16).logits(IDS)

    def run(group: ThreadsGroup) -> np.ndarray:
        decoder = open_decoder(path, profile, group=group)
        assert decoder.embed(mx.array(IDS)).dtype == mx.bfloat16
        return Stepper(decoder, dtype=mx.bfloat16).logits(IDS)

    for logits in run_ranks(2, run):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=0.15)
