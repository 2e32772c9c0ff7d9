"""The tiny models of `tiny_families` as GGUF files, converted as llama.cpp's converter does it.

Names of keys and tensors are the `gguf` package's. What is done to the numbers is told by the
converter's classes (`modify_tensors` in llama.cpp's `conversion` package), named at each function.
mlx-lm keeps what Hugging Face has, but for experts that are stacked, latent maps that are cut in
two, norms of Qwen 3.5 that have their 1 and convolutions that are turned.
"""

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import add_field, finish, interleaved, tokenizer_fields

Tensors = dict[str, np.ndarray]
Config = Mapping[str, Any]
Pairs = Iterator[tuple[str, np.ndarray]]

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
    "gemma2": "gemma2",
    "gemma4_text": "gemma4",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_next": "qwen3next",
    "glm4_moe_lite": "deepseek2",
    "ministral3": "mistral3",
    "mistral3": "mistral3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo3": "olmo2",
    "lfm2": "lfm2",
}
# Hugging Face's fields, and the writer's methods (`TextModel.set_gguf_parameters`).
_FIELDS = {
    "hidden_size": "add_embedding_length",
    "num_hidden_layers": "add_block_count",
    "max_position_embeddings": "add_context_length",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "vocab_size": "add_vocab_size",
    "num_local_experts": "add_expert_count",
    "num_experts": "add_expert_count",
    "n_routed_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "top_k_experts": "add_expert_used_count",
    "n_group": "add_expert_group_count",
    "topk_group": "add_expert_group_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
}


def write_family_gguf(
    path: pathlib.Path,
    config: Config,
    tensors: Tensors,
    *,
    kinds: Mapping[str, Kind] | None = None,
    metadata: Mapping[str, Any] | None = None,
    instead: Mapping[str, np.ndarray | None] | None = None,
) -> pathlib.Path:
    """Write a GGUF file of mlx-lm's tensors, tokenizer included.

    Args:
        path: The file.
        config: See `tiny_families.FAMILY_CONFIGS`.
        tensors: See `shaped_model.random_tensors`.
        kinds: How tensors are stored that have one of these in their name; the rest is F32.
        metadata: More keys, or other values for keys; None leaves a key out.
        instead: More tensors, or others of a name; None leaves one out.

    Returns:
        The path.
    """
    text = {**config, **config.get("text_config", {})}
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch)
    _add_fields(writer, arch, text)
    for key, value in (tokenizer_fields() | dict(metadata or {})).items():
        for shard in writer.kv_data:
            shard.pop(key, None)
        add_field(writer, key, value)
    for name, values in {**dict(gguf_tensors(arch, text, tensors)), **(instead or {})}.items():
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), None)
        if values is None:
            continue
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)
    return path


# --- keys ---


def _rope(config: Config) -> dict[str, Any]:
    """`TextModel.rope_parameters`: of the layers that see everything."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta")} | rope.get("full_attention", rope)
    return rope | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}


def _add_fields(writer: gguf.GGUFWriter, arch: str, config: Config) -> None:
    for name, method in _FIELDS.items():
        if config.get(name) is not None:
            getattr(writer, method)(config[name])
    if "head_dim" in config and arch != "granite":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if (more := _MORE_FIELDS.get(arch)) is not None:
        more(writer, config)


def _gpt_oss_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _gemma2_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma4_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    num_shared = config["num_kv_shared_layers"]
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_shared_kv_layers(num_shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window_pattern(slides)
    for part in ("key", "value"):
        getattr(writer, f"add_{part}_length")(config["global_head_dim"])
        getattr(writer, f"add_{part}_length_swa")(config["head_dim"])
    if config["use_double_wide_mlp"]:
        width, first = config["intermediate_size"], len(slides) - num_shared
        widths = [width if i < first else 2 * width for i in range(len(slides))]
        writer.add_feed_forward_length(widths)
    if (heads := config.get("num_global_key_value_heads")) is not None:
        local = config["num_key_value_heads"]
        writer.add_head_count_kv([local if slide else heads for slide in slides])
    writer.add_rope_dimension_count(config["global_head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])


def _delta_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    """`Qwen3NextModel`, and `_Qwen35MRopeMixin` for Qwen 3.5."""
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    if config["model_type"] != "qwen3_next":
        writer.add_rope_dimension_sections([*rope.get("mrope_section", (11, 11, 10)), 0])


def _latent_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    """`DeepseekV2Model`: as if all heads had one key, the latent."""
    writer.add_head_count_kv(1)
    writer.add_leading_dense_block_count(1)
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rotated)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotated)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_rope_dimension_count(rotated)
    if (all_dim := _rope(config).get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * all_dim)


def _mistral3_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    if config["model_type"] == "ministral3":
        rope = config["rope_parameters"]
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _phi3_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(head_dim * config["partial_rotary_factor"]))
    writer.add_sliding_window(config.get("sliding_window") or 0)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        writer.add_rope_scaling_orig_ctx_len(original)
        stretched = math.log(config["max_position_embeddings"] / original)
        factor = math.sqrt(1 + stretched / math.log(original))
        writer.add_rope_scaling_attn_factors(factor)


def _granite_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _lfm2_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    """`LFM2Model`: layers that do not attend have no keys and values."""
    attends = [kind == "full_attention" for kind in config["layer_types"]]
    writer.add_head_count_kv([config["num_key_value_heads"] * one for one in attends])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    width = int(config["block_ffn_dim_multiplier"] * int(2 * config["block_ff_dim"] / 3))
    multiple = config["block_multiple_of"]
    writer.add_feed_forward_length(multiple * -(-width // multiple))


def _olmo2_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    writer.add_sliding_window_pattern(slides)


_MORE_FIELDS: dict[str, Callable[[gguf.GGUFWriter, Config], None]] = {
    "gpt-oss": _gpt_oss_fields,
    "gemma2": _gemma2_fields,
    "gemma4": _gemma4_fields,
    "qwen35": _delta_fields,
    "qwen35moe": _delta_fields,
    "qwen3next": _delta_fields,
    "deepseek2": _latent_fields,
    "mistral3": _mistral3_fields,
    "phi3": _phi3_fields,
    "granite": _granite_fields,
    "olmo2": _olmo2_fields,
    "lfm2": _lfm2_fields,
}


# --- tensors ---

# mlx-lm's names that are not Hugging Face's, as the converter calls them before it maps names.
_RENAMED = (
    ("language_model.", ""),
    ("mlp.switch_mlp.", "mlp.experts."),
    ("block_sparse_moe.switch_mlp.gate_proj", "feed_forward.experts.w1"),
    ("block_sparse_moe.switch_mlp.down_proj", "feed_forward.experts.w2"),
    ("block_sparse_moe.switch_mlp.up_proj", "feed_forward.experts.w3"),
    ("experts.switch_glu.", "experts."),
    ("self_attn.embed_q", "self_attn.k_b_proj"),
    ("self_attn.unembed_out", "self_attn.v_b_proj"),
    ("e_score_correction_bias", "e_score_correction.bias"),
    (".sinks", ".sinks.weight"),
    (".layer_scalar", ".layer_scalar.weight"),
    (".dt_bias", ".dt_proj.bias"),
)


def gguf_tensors(arch: str, config: Config, tensors: Tensors) -> Pairs:
    """The file's tensors."""
    of_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(of_name[arch], config["num_hidden_layers"])
    for name, values in _with_fused_experts(tensors).items():
        for ours, theirs in _RENAMED:
            name = name.replace(ours, theirs)
        if "feed_forward.experts" in name:
            name = name.removeprefix("model.")
        for changed, numbers in _CHANGES.get(arch, _as_it_is)(name, values, config):
            suffix = next((s for s in (".scale",) if changed.endswith(s)), "")
            mapped = table.get_name(changed.removesuffix(suffix), try_suffixes=(".weight", ".bias"))
            assert mapped is not None, changed
            yield mapped + suffix, numbers
    yield from _extra_tensors(arch, config)


def _with_fused_experts(tensors: Tensors) -> Tensors:
    """Gemma 4's gate and up of experts are one tensor, which mlx-lm cuts in two."""
    fused: Tensors = {}
    for name, values in tensors.items():
        if "switch_glu.gate_proj" in name:
            up = tensors[name.replace("gate_proj", "up_proj")]
            fused[name.replace("gate_proj", "gate_up_proj")] = np.concatenate([values, up], 1)
        elif "switch_glu.up_proj" not in name:
            fused[name] = values
    return fused


def _as_it_is(name: str, values: np.ndarray, _config: Config) -> Pairs:
    yield name, values


def _side_by_side(name: str, values: np.ndarray, config: Config) -> Pairs:
    """`LlamaModel`: rotary pairs side by side, in queries and keys."""
    for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        if f"self_attn.{part}_proj" in name:
            values = interleaved(values, config[heads])
    yield name, values


def _with_one(name: str, values: np.ndarray, _config: Config) -> Pairs:
    """`Gemma2Model`."""
    yield name, values + 1 if name.endswith("norm.weight") else values


def _gemma4(name: str, values: np.ndarray, _config: Config) -> Pairs:
    """`Gemma4Model`: factors of the router and the experts beside their matrices."""
    at = name.partition(".router.")[0]
    if name.endswith("router.scale"):
        yield f"{at}.router.proj.scale", values
    elif name.endswith("router.per_expert_scale"):
        yield f"{at}.experts.down_proj.scale", values
    else:
        yield name, values


def _lfm2(name: str, values: np.ndarray, _config: Config) -> Pairs:
    """`LFM2Model`."""
    yield name, values.reshape(len(values), -1) if "conv.conv.weight" in name else values


def _delta(name: str, values: np.ndarray, config: Config) -> Pairs:
    """`Qwen3NextModel`: the decay as minus its rate; what was by key head by kind instead."""
    if name.endswith(".A_log"):
        yield name, -np.exp(values)
    elif "conv1d" in name:
        yield name, values.squeeze()
    elif "in_proj_qkvz" in name:
        keys = config["linear_num_key_heads"]
        each = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
        sizes = [config["linear_key_head_dim"]] * 2 + [each, each]
        by_head = values.reshape(keys, sum(sizes), -1)
        parts = np.split(by_head, np.cumsum(sizes)[:-1], axis=1)
        flat = [part.reshape(-1, values.shape[-1]) for part in parts]
        yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate(flat[:3])
        yield name.replace("in_proj_qkvz", "in_proj_z"), flat[3]
    else:
        yield name, values


def _tiled_delta(name: str, values: np.ndarray, config: Config) -> Pairs:
    """`_LinearAttentionVReorderBase`: value heads in turn, one of each key head, and so on."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    width = config["linear_value_head_dim"]

    def tiled(array: np.ndarray, size: int) -> np.ndarray:
        grouped = array.reshape(keys, heads // keys, size, *array.shape[1:])
        return grouped.swapaxes(0, 1).reshape(array.shape)

    before = 2 * keys * config["linear_key_head_dim"]
    ((name, values),) = _delta(name, values, config)
    if "in_proj_qkv." in name or "conv1d" in name:
        values = np.concatenate([values[:before], tiled(values[before:], width)])
    elif "in_proj_z." in name:
        values = tiled(values, width)
    elif any(part in name for part in ("in_proj_a.", "in_proj_b.", "A_log", "dt_proj")):
        values = tiled(values, 1)
    elif "linear_attn.out_proj" in name:
        values = tiled(values.T, width).T
    yield name, values


_CHANGES: dict[str, Callable[[str, np.ndarray, Config], Pairs]] = {
    "llama": _side_by_side,
    "mistral3": _side_by_side,
    "smollm3": _side_by_side,
    "granite": _side_by_side,
    "gemma2": _with_one,
    "gemma4": _gemma4,
    "lfm2": _lfm2,
    "qwen3next": _delta,
    "qwen35": _tiled_delta,
    "qwen35moe": _tiled_delta,
}


def _extra_tensors(arch: str, config: Config) -> Pairs:
    """`generate_extra_tensors`."""
    if arch == "gemma4":
        part = config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
        half = config["global_head_dim"] // 2
        turning = int(config["global_head_dim"] * part / 2)
        yield "rope_freqs.weight", np.array([1.0] * turning + [1e30] * (half - turning), np.float32)
    scaling = config.get("rope_scaling") or {}
    if "long_factor" in scaling:
        for length in ("long", "short"):
            factors = np.array(scaling[f"{length}_factor"], np.float32)
            yield f"rope_factors_{length}.weight", factors
