"""Random decoders in memory, small enough for any machine: a self-test needs no download."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from edgekv.bench.synthetic_model import linear_shapes
from edgekv.device import DeviceProfile
from edgekv.models.checkpoint import Checkpoint, Dense, Quantised, Tensor
from edgekv.models.decoder import Decoder
from edgekv.models.weights import load_decoder

VOCAB_SIZE = 256
HEAD_DIM = GROUP_SIZE = 64  # for which MLX has fused kernels
# Grouped queries, norms of queries and keys, and every other layer with a sliding window.
TINY = {
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "intermediate_size": 192,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
}
_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def tiny_decoder(
    device: DeviceProfile,
    config: Mapping[str, object] = TINY,
    *,
    bits: int | None = None,
    dequantised: bool = False,
) -> Decoder:
    """A decoder as a device runs it, with random weights; the same for the same config and bits.

    `bits` quantise the matrices; `dequantised` keeps what that made of the weights, but dense.
    """
    checkpoint = _RandomCheckpoint(config, device, bits, dequantised)
    return load_decoder(checkpoint, replace(device, measures_few_rows=False))


class _RandomCheckpoint(Checkpoint):
    """Random tensors, drawn in a fixed order."""

    kind = "folder"

    def __init__(
        self,
        config: Mapping[str, object],
        device: DeviceProfile,
        bits: int | None,
        dequantised: bool,
    ) -> None:
        shapes = {f"model.{name}.weight": shape for name, shape in _shapes(config).items()}
        path = Path("random")
        super().__init__(path, dict(config), dict.fromkeys(shapes, path), device)
        self._bits = bits
        self._dequantised = dequantised
        self._key = mx.random.key(0)
        self._tensors = {
            name: self._matrix(*shape) if len(shape) > 1 else self._norm(*shape)
            for name, shape in shapes.items()
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def _load(self, name: str) -> Tensor:
        return self._tensors[name]

    def _normal(self, *shape: int) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return mx.random.normal(shape, key=key)

    def _norm(self, size: int) -> Tensor:
        return Dense((0.1 * self._normal(size)).astype(self._compute_dtype))

    def _matrix(self, rows: int, columns: int) -> Tensor:
        """Rows of unit length on average, so that logits are of a few units."""
        # Rounded to bfloat16 first, so that decoders of different dtypes have equal weights.
        weight = (self._normal(rows, columns) * columns**-0.5).astype(mx.bfloat16)
        if self._bits is None:
            return Dense(weight.astype(self._compute_dtype))
        codes, scales, biases = mx.quantize(weight, group_size=GROUP_SIZE, bits=self._bits)
        scales, biases = scales.astype(self._compute_dtype), biases.astype(self._compute_dtype)
        triple = Quantised(codes, scales, biases, GROUP_SIZE, self._bits)
        return triple.dequantised() if self._dequantised else triple


def _shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    size = {name: int(str(value)) for name, value in config.items() if name != "model_type"}
    hidden, ffn = size["hidden_size"], size["intermediate_size"]
    queries = size["num_attention_heads"] * HEAD_DIM
    keys = size["num_key_value_heads"] * HEAD_DIM
    block: dict[str, tuple[int, ...]] = {
        **linear_shapes(hidden, ffn, queries, keys),
        "self_attn.q_norm": (HEAD_DIM,),
        "self_attn.k_norm": (HEAD_DIM,),
        **{f"{norm}_layernorm": (hidden,) for norm in _NORMS},
    }
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"embed_tokens": (size["vocab_size"], hidden), "norm": (hidden,)}
    for layer in range(size["num_hidden_layers"]):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes
