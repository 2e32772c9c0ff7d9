"""`--model synthetic`: a random decoder whose KV is as large as a 1B model's.

What switching costs depends on the bytes of a session's KV; what everything else costs depends on
the weights. This model has the KV of Llama 3.2 1B in 16 bits, 32 KiB a token, and next to no
weights, so that thousands of turns fit in minutes on two CPU cores. Seven of eight layers see the
last 128 tokens only: a CPU would else spend most of a step on reading KV, at about the speed at
which it comes from disk, where a GPU reads it fifty times faster. A step with eight sessions then
takes some 20 ms here, as that of a 1B model does on a laptop's GPU. The text is nonsense, but
depends on all of the context: KV that is wrong or missing soon changes what follows.

The folder is an ordinary Hugging Face one, so that `Runtime.open` and everything below it run as
they do for a real model.
"""

import json
import pathlib
import string
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgekv.device import profile

SYNTHETIC = "synthetic"
KV_TOKEN_BYTES = 32 << 10
CONTEXT_MAX = 8192

_HIDDEN_SIZE = 128
_FFN_SIZE = 256
# One wide head of queries and keys: in f32 that makes 16 layers with 16 KiB for a block's keys, as
# Llama 3.2 1B has in 16 bits, and the fewest scores, which are what costs on a CPU.
_NUM_HEADS = 1
_HEAD_DIM = 256
_WINDOW = 128
_GLOBAL_EVERY = 8  # layers; the first of these sees all of the context
_SPECIAL = ("<|begin|>", "<|end|>")
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 512
# Heads that look at few tokens, far ones among them, instead of an average of all, in which no
# single one matters. A larger gain also magnifies rounding, and makes more ties between tokens.
_QUERY_GAIN = 2.0


def write_synthetic_model(folder: pathlib.Path) -> pathlib.Path:
    """Write the model into a folder, which is made if it does not exist, and return it.

    The same bytes on every machine of the same compute dtype, which decides the number of layers: a
    token's KV is 32 KiB in f32 and in 16 bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype: mx.Dtype = getattr(mx, profile().compute_dtype)
    num_layers = KV_TOKEN_BYTES // (2 * _NUM_HEADS * _HEAD_DIM * dtype.size)
    (folder / "config.json").write_text(json.dumps(_config(num_layers), indent=1))
    tensors = {name: array.astype(dtype) for name, array in _tensors(num_layers).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def tokenizer_files() -> dict[str, str]:
    """What a folder holds of its tokenizer, by name."""
    settings = {"bos_token": _SPECIAL[BOS_ID], "eos_token": _SPECIAL[EOS_ID]}
    return {"tokenizer.json": _tokenizer(), "tokenizer_config.json": json.dumps(settings)}


def _config(num_layers: int) -> dict[str, Any]:
    kinds = ["sliding_attention"] * num_layers
    kinds[::_GLOBAL_EVERY] = ["full_attention"] * len(kinds[::_GLOBAL_EVERY])
    return {
        "model_type": "mistral",
        "sliding_window": _WINDOW,
        "layer_types": kinds,
        "hidden_size": _HIDDEN_SIZE,
        "intermediate_size": _FFN_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _NUM_HEADS,
        "num_key_value_heads": _NUM_HEADS,
        "head_dim": _HEAD_DIM,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT_MAX,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }


def linear_shapes(hidden: int, ffn: int, queries: int, keys: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the matrices of a block, by their names in a Hugging Face folder."""
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def _tensors(num_layers: int) -> dict[str, mx.array]:
    width = _NUM_HEADS * _HEAD_DIM
    linears = linear_shapes(_HIDDEN_SIZE, _FFN_SIZE, width, width)
    key = mx.random.key(0)

    def matrix(rows: int, columns: int) -> mx.array:
        nonlocal key
        key, drawn = mx.random.split(key)
        return mx.random.normal((rows, columns), scale=float(columns**-0.5), key=drawn)

    ones = mx.ones((_HIDDEN_SIZE,))
    tensors = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, _HIDDEN_SIZE)}
    for layer in range(num_layers):
        at = f"model.layers.{layer}."
        for name, (rows, columns) in linears.items():
            gain = _QUERY_GAIN if name.endswith("q_proj") else 1.0
            tensors[f"{at}{name}.weight"] = gain * matrix(rows, columns)
        tensors[f"{at}input_layernorm.weight"] = ones
        tensors[f"{at}post_attention_layernorm.weight"] = ones
    tensors["model.norm.weight"] = ones
    head = matrix(VOCAB_SIZE, _HIDDEN_SIZE)
    # A special token has no text, and would make the first visible token a later one.
    head[: len(_SPECIAL)] = 0.0
    tensors["lm_head.weight"] = head
    return tensors


def _tokenizer() -> str:
    """Every token is visible by itself: printable ASCII characters, and pairs of letters."""
    singles = [*string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ"]
    pairs = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    texts = [*_SPECIAL, *singles, *pairs][:VOCAB_SIZE]
    made = Tokenizer(models.BPE({text: index for index, text in enumerate(texts)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(_SPECIAL))
    return str(made.to_str())
