"""GGUF files give the logits of the Hugging Face folder with the same weights."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from family_gguf import write_family_gguf
from gguf import GGMLQuantizationType as Kind
from oracle import mlx_lm_logits
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_families import FAMILY_CONFIGS
from tiny_gguf import write_gguf
from tiny_models import LLAMA3_ROPE, random_ids, random_tensors, tiny_config, write_folder

from edgekv.bench.shaped_model import random_tensors as family_tensors
from edgekv.models.linear import DenseLinear, QuantisedLinear
from edgekv.models.open_model import open_checkpoint, open_decoder

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "attention_factor": 1.25,
}
CONFIGS = {
    "llama": tiny_config("llama"),
    "llama-tied": tiny_config("llama", tie_word_embeddings=True),
    "llama-llama3-rope": tiny_config("llama", rope_scaling=LLAMA3_ROPE),
    "llama-linear-rope": tiny_config("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama-yarn": tiny_config("llama", rope_scaling=YARN),
    "llama-longrope": tiny_config("llama", rope_scaling=LONGROPE),
    "llama-left-over-window": tiny_config("llama", sliding_window=8),
    "qwen2": tiny_config("qwen2"),
    "qwen2-yarn": tiny_config(
        "qwen2", rope_scaling=YARN | {"attention_factor": 1.4, "beta_fast": 20.0}
    ),
    "qwen3": tiny_config("qwen3"),
    # GGUF files have no scalar of their own and take the size of a head.
    "gemma3": tiny_config(
        "gemma3", num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=32
    ),
    "openelm": tiny_config("openelm"),
}
IDS = random_ids(40)
QUANTISED = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.MXFP4]
# Each family plain and quantised; each kind once.
CASES = [(name, kind) for name in CONFIGS for kind in (Kind.F32, Kind.Q8_0)]
CASES += [("llama", kind) for kind in (Kind.F16, Kind.Q5_0, *QUANTISED[1:])]
CASES += [("gemma3", Kind.Q4_0), ("openelm", Kind.Q4_1)]


def stepper_of(path, *, profile=CPU_PROFILE) -> Stepper:
    return Stepper(open_decoder(path, profile))


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda case: getattr(case, "name", case))
def test_logits_equal_those_of_the_folder(name, kind, tmp_path):
    config = CONFIGS[name]
    stored = write_gguf(tmp_path / "model.gguf", config, kind=kind)
    folder = write_folder(tmp_path / "folder", config, tensors=stored, tokenizer=False)
    expected = stepper_of(folder).logits(IDS)
    assert expected.std() > 0.5
    # The same f32 numbers, in the same order of operations.
    actual = stepper_of(tmp_path / "model.gguf").logits(IDS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    if kind in QUANTISED:
        kept = stepper_of(tmp_path / "model.gguf", profile=FUSED_PROFILE)
        assert isinstance(kept.decoder.weights.layers[0].mlp.down, QuantisedLinear)
        np.testing.assert_allclose(kept.logits(IDS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("context", [None, 40, 16])
def test_longrope_is_chosen_by_the_context_it_is_opened_for(context, tmp_path):
    config = CONFIGS["llama-longrope"]
    tensors = random_tensors(config)
    write_gguf(tmp_path / "model.gguf", config, tensors=tensors)
    folder = write_folder(tmp_path / "longrope", config, tensors=tensors, tokenizer=False)
    used = "short_factor" if context == 16 else "long_factor"
    factors = dict.fromkeys(("short_factor", "long_factor"), LONGROPE[used])
    alike = config | {"rope_scaling": LONGROPE | factors}
    expected = write_folder(tmp_path / "alike", alike, tensors=tensors, tokenizer=False)
    ids = IDS[:16]
    for path in (tmp_path / "model.gguf", folder):
        decoder = open_decoder(path, CPU_PROFILE, context)
        assert decoder.config.context_max == (context or 1024)
        assert decoder.config.layers[0].rope.for_short == (context == 16)
        np.testing.assert_allclose(
            Stepper(decoder).logits(ids), stepper_of(expected).logits(ids), rtol=0, atol=1e-5
        )


def test_dense_kinds_stay_dense(tmp_path):
    write_gguf(tmp_path / "model.gguf", CONFIGS["llama"], kind=Kind.F16)
    decoder = stepper_of(tmp_path / "model.gguf", profile=FUSED_PROFILE).decoder
    assert isinstance(decoder.weights.layers[0].mixer.qkv, DenseLinear)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_tensor_names_are_those_of_the_gguf_package(name, tmp_path):
    """Guards the helper: its names are llama.cpp's, not just what our loader looks for."""
    config = CONFIGS[name]
    stored = write_gguf(tmp_path / "model.gguf", config)
    arch = gguf.MODEL_ARCH[name.upper()]
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    expected = {table.get_name(tensor, try_suffixes=(".weight", ".bias")) for tensor in stored}
    assert open_checkpoint(tmp_path / "model.gguf", CPU_PROFILE).names == expected


# --- the other families, against mlx-lm ---

RESCALED = FAMILY_CONFIGS["glm4_moe_lite, plain queries"]["rope_scaling"]
# What files say otherwise than the tiny configurations do, or not at all: a file with YaRN takes
# `mscale` to be `mscale_all_dim`, or 1 (Ministral 3); Gemma's scalar to be the size of a head.
CHANGES = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gpt_oss": {"rope_scaling": None},
    "glm4_moe_lite, plain queries": {
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.8,
        "rope_scaling": RESCALED | {"mscale": 0.7},
    },
    "ministral3": {
        "rope_parameters": FAMILY_CONFIGS["ministral3"]["rope_parameters"]
        | {"mscale": 1.0, "mscale_all_dim": 1.0}
    },
}
FAMILIES = [name for name in FAMILY_CONFIGS if name != "qwen3_moe, some dense"]


def written(path, name, tensors=None, **how):
    """The GGUF file of a family's tiny model."""
    config = FAMILY_CONFIGS[name] | CHANGES.get(name, {})
    return write_family_gguf(path, config, tensors or family_tensors(config), **how)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_mlx_lm_s(name, tmp_path):
    config = FAMILY_CONFIGS[name] | CHANGES.get(name, {})
    tensors = family_tensors(config)
    path = written(tmp_path / "model.gguf", name, tensors)
    folder = write_folder(tmp_path / "folder", config, tensors=tensors, tokenizer=False)
    expected = mlx_lm_logits(folder, IDS)
    assert expected.std() > 0.5
    np.testing.assert_allclose(stepper_of(path).logits(IDS), expected, rtol=0, atol=1e-4)


def test_gpt_oss_as_it_is_published(tmp_path):
    """Experts in MXFP4, and YaRN between pairs that are not rounded, which mlx-lm does not know."""
    config = FAMILY_CONFIGS["gpt_oss"]
    tensors = family_tensors(config)
    kinds = {"exps.weight": Kind.MXFP4}
    path = write_family_gguf(tmp_path / "model.gguf", config, tensors, kinds=kinds)
    for name, values in tensors.items():
        if "experts" in name and name.endswith("weight"):
            stored = gguf.quants.quantize(values, Kind.MXFP4)
            tensors[name] = gguf.quants.dequantize(stored, Kind.MXFP4)
    rope = config["rope_scaling"] | {"truncate": False}
    folder = write_folder(
        tmp_path / "folder", config | {"rope_scaling": rope}, tensors=tensors, tokenizer=False
    )
    expected = stepper_of(folder).logits(IDS)
    np.testing.assert_allclose(stepper_of(path).logits(IDS), expected, rtol=0, atol=1e-5)
    kept = stepper_of(path, profile=FUSED_PROFILE).logits(IDS)
    np.testing.assert_allclose(kept, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [24, 32])
def test_value_heads_are_put_back_in_quantised_columns(width, tmp_path):
    """Heads that are whole groups stay quantised."""
    config = FAMILY_CONFIGS["qwen3_5"] | {"linear_value_head_dim": width}
    kinds = dict.fromkeys(("ssm_out", "attn_gate", "attn_qkv"), Kind.Q8_0)
    path = write_family_gguf(tmp_path / "model.gguf", config, family_tensors(config), kinds=kinds)
    kept = stepper_of(path, profile=FUSED_PROFILE)
    out = kept.decoder.weights.layers[0].mixer.out
    assert isinstance(out, QuantisedLinear if width == 32 else DenseLinear)
    expected = stepper_of(path).logits(IDS)
    np.testing.assert_allclose(kept.logits(IDS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_5", "glm4_moe_lite"])
def test_blocks_that_guess_ahead_are_not_run(name, tmp_path):
    plain = stepper_of(written(tmp_path / "plain.gguf", name)).logits(IDS)
    arch = {"qwen3_5": "qwen35", "glm4_moe_lite": "deepseek2"}[name]
    path = written(
        tmp_path / "mtp.gguf",
        name,
        metadata={f"{arch}.block_count": 5, f"{arch}.nextn_predict_layers": 1},
        instead={"blk.4.nextn.eh_proj.weight": np.zeros((64, 128), np.float32)},
    )
    np.testing.assert_array_equal(stepper_of(path).logits(IDS), plain)


def test_ggml_drops_a_leading_size_of_one(tmp_path):
    tensors = family_tensors(FAMILY_CONFIGS["qwen3_next"])
    plain = stepper_of(written(tmp_path / "plain.gguf", "qwen3_next", tensors)).logits(IDS)
    gates = {
        f"blk.{layer}.ffn_gate_inp_shexp.weight": tensors[
            f"model.layers.{layer}.mlp.shared_expert_gate.weight"
        ][0]
        for layer in range(4)
    }
    path = written(tmp_path / "vectors.gguf", "qwen3_next", tensors, instead=gates)
    np.testing.assert_array_equal(stepper_of(path).logits(IDS), plain)


def test_experts_one_by_one_as_in_older_files(tmp_path):
    tensors = family_tensors(FAMILY_CONFIGS["mixtral"])
    plain = stepper_of(written(tmp_path / "plain.gguf", "mixtral", tensors)).logits(IDS)
    instead: dict[str, np.ndarray | None] = {}
    for layer in range(4):
        for part in ("gate", "up", "down"):
            stacked = f"model.layers.{layer}.block_sparse_moe.switch_mlp.{part}_proj.weight"
            instead[f"blk.{layer}.ffn_{part}_exps.weight"] = None
            for expert, values in enumerate(tensors[stacked]):
                instead[f"blk.{layer}.ffn_{part}.{expert}.weight"] = values
    path = written(tmp_path / "older.gguf", "mixtral", tensors, instead=instead)
    np.testing.assert_array_equal(stepper_of(path).logits(IDS), plain)


def test_latent_maps_in_one_as_in_older_files(tmp_path):
    tensors = family_tensors(FAMILY_CONFIGS["glm4_moe_lite"])
    plain = stepper_of(written(tmp_path / "plain.gguf", "glm4_moe_lite", tensors)).logits(IDS)
    instead: dict[str, np.ndarray | None] = {}
    for layer in range(4):
        at = f"model.layers.{layer}.self_attn"
        keys, values = tensors[f"{at}.embed_q.weight"], tensors[f"{at}.unembed_out.weight"]
        both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
        instead[f"blk.{layer}.attn_kv_b.weight"] = both.reshape(-1, both.shape[-1])
        instead |= {f"blk.{layer}.attn_{part}_b.weight": None for part in "kv"}
    sizes = {"key_length": 24, "value_length": 20, "key_length_mla": None, "value_length_mla": None}
    metadata = {f"deepseek2.attention.{key}": value for key, value in sizes.items()}
    path = written(
        tmp_path / "older.gguf", "glm4_moe_lite", tensors, instead=instead, metadata=metadata
    )
    np.testing.assert_allclose(stepper_of(path).logits(IDS), plain, rtol=0, atol=1e-5)


def test_rope_factors_are_not_rounded_to_the_compute_dtype(tmp_path):
    path = written(tmp_path / "model.gguf", "phi3, longrope")
    narrow = replace(CPU_PROFILE, compute_dtype="bfloat16")
    rope = open_decoder(path, narrow).config.layers[0].rope
    assert rope.wavelength_factors == pytest.approx([1.0, 1.1, 1.5, 2.0, 3.0, 4.0], rel=1e-6)
