"""Random decoders in memory, small enough for any machine, so that a self-test needs no download.

Head size and group sizes are those for which MLX has fused kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV, StagedView
from edgekv.models.attention import Segment
from edgekv.models.checkpoint import Dense, Quantised, Tensor
from edgekv.models.config import DecoderConfig, LayerConfig, RopeConfig
from edgekv.models.decoder import Decoder, DecoderWeights, LayerWeights, PackedBatch
from edgekv.models.linear import Embedding, make_linear

HEAD_DIM = 64
GROUP_SIZE = 64
_ROPE = RopeConfig(base=10_000.0)


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """What a tiny decoder looks like."""

    hidden_size: int = 128
    ffn_size: int = 192
    vocab_size: int = 256
    context_max: int = 4096
    num_heads: int = 4
    num_kv_heads: int = 2
    windows: tuple[int | None, ...] = (None, 24, None)  # sliding window of each layer


def tiny_config(shape: TinyShape) -> DecoderConfig:
    """Grouped queries, query and key norms, and a sliding window where the shape says so."""
    layer = LayerConfig(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=HEAD_DIM,
        ffn_size=shape.ffn_size,
        rope=_ROPE,
    )
    return DecoderConfig(
        family="tiny",
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        context_max=shape.context_max,
        layers=tuple(replace(layer, sliding_window=window) for window in shape.windows),
        norm_eps=1e-5,
        attention_scale=HEAD_DIM**-0.5,
        qk_norm=True,
    )


def tiny_decoder(
    shape: TinyShape,
    device: DeviceProfile,
    *,
    dtype: mx.Dtype,
    bits: int | None,
    dequantised: bool = False,
) -> Decoder:
    """A decoder with random weights, the same for the same shape and bits.

    Args:
        shape: What it looks like.
        device: Which ops are fused.
        dtype: Of everything that is not quantised.
        bits: Quantise the matrices; None keeps them dense.
        dequantised: Keep what quantisation made of the weights, but as dense matrices.
    """
    config = tiny_config(shape)
    source = _Source(dtype, bits, dequantised)
    hidden = shape.hidden_size
    queries = shape.num_heads * HEAD_DIM
    qkv = queries + 2 * shape.num_kv_heads * HEAD_DIM
    table = source.matrix(shape.vocab_size, hidden)
    layers = tuple(
        LayerWeights(
            attn_norm=source.norm(hidden),
            qkv=make_linear([source.matrix(qkv, hidden)], None),
            q_norm=source.norm(HEAD_DIM),
            k_norm=source.norm(HEAD_DIM),
            out=make_linear([source.matrix(hidden, queries)], None),
            attn_post_norm=None,
            ffn_norm=source.norm(hidden),
            gate_up=make_linear([source.matrix(2 * shape.ffn_size, hidden)], None),
            down=make_linear([source.matrix(hidden, shape.ffn_size)], None),
            ffn_post_norm=None,
        )
        for _ in config.layers
    )
    weights = DecoderWeights(
        embedding=Embedding(table),
        layers=layers,
        final_norm=source.norm(hidden),
        head=make_linear([table], None),
    )
    return Decoder(config, weights, device)


class _Source:
    """Random tensors in a fixed order."""

    def __init__(self, dtype: mx.Dtype, bits: int | None, dequantised: bool) -> None:
        self._dtype = dtype
        self._bits = bits
        self._dequantised = dequantised
        self._key = mx.random.key(0)

    def _normal(self, *shape: int) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return mx.random.normal(shape, key=key)

    def norm(self, size: int) -> mx.array:
        return (1.0 + 0.1 * self._normal(size)).astype(self._dtype)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """`(rows, columns)`; rows of unit length on average, so that logits are of a few units."""
        # Rounded to bfloat16 first, so that decoders of different dtypes have equal weights.
        weight = (self._normal(rows, columns) * columns**-0.5).astype(mx.bfloat16)
        if self._bits is None:
            return Dense(weight.astype(self._dtype))
        codes, scales, biases = mx.quantize(weight, group_size=GROUP_SIZE, bits=self._bits)
        triple = Quantised(
            codes, scales.astype(self._dtype), biases.astype(self._dtype), GROUP_SIZE, self._bits
        )
        return triple.dequantised() if self._dequantised else triple


def layout_of(decoder: Decoder, dtype: mx.Dtype) -> KVLayout:
    """The layout of this decoder's KV."""
    return KVLayout(
        heads=tuple((layer.num_kv_heads, layer.head_dim) for layer in decoder.config.layers),
        dtype_bytes=dtype.size,
        context_max=decoder.config.context_max,
    )


class Stepper:
    """A decoder and the KV of a few sessions. Owned by the calling thread.

    Args:
        decoder: The model.
        dtype: Of the KV.
        lengths: Most tokens of each session.
    """

    def __init__(self, decoder: Decoder, dtype: mx.Dtype, lengths: Sequence[int]) -> None:
        self.decoder = decoder
        layout = layout_of(decoder, dtype)
        capacities = [layout.capacity_for(length) for length in lengths]
        self._pool = KVPool(layout, dtype, sum(map(layout.capacity_bytes, capacities)))
        self._sessions = [SessionKV() for _ in lengths]
        for session, capacity in zip(self._sessions, capacities, strict=True):
            session.buffers = self._pool.allocate(capacity)

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[mx.array]:
        """One packed step.

        Args:
            work: (session index, its next tokens), in the order of the packed rows.

        Returns:
            Logits `(rows, vocab)` f32 of each entry of `work`.
        """
        sessions = [self._sessions[index] for index, _ in work]
        views = [StagedView(kv, kv.num_tokens) for kv in sessions]
        segments = [Segment(v, len(ids)) for v, (_, ids) in zip(views, work, strict=True)]
        packed = mx.array([token for _, ids in work for token in ids], dtype=mx.uint32)
        hidden = self.decoder.run_layers(self.decoder.embed(packed), PackedBatch(segments))
        logits = self.decoder.logits(hidden).astype(mx.float32)
        mx.eval(logits, *[array for view in views for array in view.commit()])
        outputs, row = [], 0
        for kv, (_, ids) in zip(sessions, work, strict=True):
            kv.append(ids)
            outputs.append(logits[row : row + len(ids)])
            row += len(ids)
        return outputs
