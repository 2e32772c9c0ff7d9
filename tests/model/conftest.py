"""The default model as a Hugging Face folder, for those that read no GGUF files."""

import contextlib
import ctypes
import json
import os
import pathlib

import gguf
import mlx.core as mx
import numpy as np
import pytest

from edgekv.models.default_model import DEFAULT_MODEL
from edgekv.models.hub import resolve

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


@pytest.fixture(scope="session", autouse=True)
def _its_share_of_cores() -> None:
    """Real matrices are worth all threads, as far as no other worker's threads spin for them."""
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0").openblas_set_num_threads(num_threads)


@pytest.fixture(scope="session")
def smollm2_path() -> pathlib.Path:
    """The GGUF file, as edgekv gets it."""
    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_path, tmp_path_factory) -> pathlib.Path:
    """The same weights, dequantised to f32 by the gguf package: config.json and safetensors."""
    reader = gguf.GGUFReader(smollm2_path)

    def number(name: str) -> float:
        return reader.get_field(f"llama.{name}").contents()

    config = {
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_theta": number("rope.freq_base"),
        "vocab_size": number("vocab_size"),
        "tie_word_embeddings": True,
    }
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *block, slot, suffix = tensor.name.split(".")
        if slot in ("attn_q", "attn_k"):
            heads = config[f"num_{'attention' if slot == 'attn_q' else 'key_value'}_heads"]
            pairs = values.reshape(heads, -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_NAMES[slot]}.{suffix}"] = mx.array(values)
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder
