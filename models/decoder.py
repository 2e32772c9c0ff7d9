"""One decoder for every family: a packed forward over segments, any range of layers.

Rows of all sessions run through norms, projections and the MLP together, so a step reads the
weights once; attention runs per segment on that session's own keys and values.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.models.attention import Segment, attend
from edgekv.models.config import Activation, DecoderConfig, LayerConfig
from edgekv.models.exponential import silu
from edgekv.models.linear import Embedding, Linear
from edgekv.models.rope import Rope, RopeTables


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Tensors of one block; norms that the family lacks are None."""

    attn_norm: mx.array
    qkv: Linear
    q_norm: mx.array | None
    k_norm: mx.array | None
    out: Linear
    attn_post_norm: mx.array | None
    ffn_norm: mx.array
    gate_up: Linear
    down: Linear
    ffn_post_norm: mx.array | None


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """All tensors of a decoder."""

    embedding: Embedding
    layers: tuple[LayerWeights, ...]
    final_norm: mx.array
    head: Linear


@dataclass
class PackedBatch:
    """The segments of one step and the tables their rows share."""

    segments: list[Segment]  # in row order; N is the sum of their rows
    positions: mx.array = field(init=False)  # (N,) int32
    tables: dict[int, RopeTables] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        positions: list[int] = []
        for segment in self.segments:
            positions.extend(range(segment.view.offset, segment.view.offset + segment.num_rows))
        self.positions = mx.array(positions, dtype=mx.int32)

    @property
    def num_rows(self) -> int:
        """Rows of all segments."""
        return sum(segment.num_rows for segment in self.segments)


class Taps(Protocol):
    """Sees what the layers compute on their way; for KV Prediction."""

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        """`(N, hidden)`: what the first `depth` layers make of the rows."""
        ...

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        """`(N, heads, head_dim)` each; queries and keys before their norms and RoPE."""
        ...


@mx.compile
def _silu_gate(gate_up: mx.array) -> mx.array:
    gate, up = mx.split(gate_up, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


@mx.compile
def _gelu_gate(gate_up: mx.array) -> mx.array:
    gate, up = mx.split(gate_up, 2, axis=-1)
    inner = 0.7978845608028654 * (gate + 0.044715 * (gate * gate * gate))
    return 0.5 * gate * (1.0 + mx.tanh(inner)) * up


_MANY_ROWS = 8  # fewer gain nothing from our own exponential

_GATES = {"silu": _silu_gate, "gelu_tanh": _gelu_gate}


def gate(activation: Activation, gate_up: mx.array, *, composed: bool = False) -> mx.array:
    """`(N, 2F)`, gate and up side by side → `(N, F)`: activation(gate) * up.

    `composed` takes the exponential of `edgekv.models.exponential` where there are rows enough.
    """
    if composed and activation == "silu" and gate_up.shape[0] >= _MANY_ROWS:
        left, up = mx.split(gate_up, 2, axis=-1)
        return silu(left) * up
    gated: mx.array = _GATES[activation](gate_up)
    return gated


class Decoder:
    """A decoder's forward pass. Holds weights only; all state is in the KV views."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, device: DeviceProfile
    ) -> None:
        self.config = config
        self.weights = weights
        self.device = device
        ropes: dict[tuple[object, int], int] = {}
        self._ropes: list[Rope] = []
        self._rope_of: list[int] = []
        for layer in config.layers:
            key = (layer.rope, layer.head_dim)
            if key not in ropes:
                ropes[key] = len(self._ropes)
                self._ropes.append(Rope(layer.rope, layer.head_dim, fused=device.fused_rope))
            self._rope_of.append(ropes[key])
        # What multiplies query-key products, by layer.
        self._scales = [config.attention_scale * x.rope.magnitude**2 for x in config.layers]

    def without_head(self) -> "Decoder":
        """The same for passes whose logits nobody asks for: a head can be a third of a model."""

        def no_head(_rows: mx.array) -> mx.array:
            raise AssertionError("it was left out")

        return Decoder(self.config, replace(self.weights, head=no_head), self.device)

    def embed(self, tokens: mx.array) -> mx.array:
        """`tokens (N,)` → hidden states `(N, hidden)` before the first layer."""
        hidden = self.weights.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * self.config.embedding_scale
        return hidden

    def run_layers(
        self,
        hidden: mx.array,
        batch: PackedBatch,
        *,
        first_layer: int = 0,
        last_layer: int | None = None,
        taps: Taps | None = None,
    ) -> mx.array:
        """Run layers `[first_layer, last_layer)`, by default all, and append their KV to the views.

        `(N, hidden)`, the output of layer `first_layer - 1` (or of `embed`) → `(N, hidden)`, before
        the final norm. `taps` are shown what these layers get and compute.
        """
        last = self.config.num_layers if last_layer is None else last_layer
        assert 0 <= first_layer <= last <= self.config.num_layers
        assert hidden.shape[0] == batch.num_rows
        for index in range(first_layer, last):
            if taps is not None:
                taps.see_hidden(index, hidden)
            hidden = self._layer(index, hidden, batch, taps)
        if taps is not None:
            taps.see_hidden(last, hidden)
        return hidden

    def finish_keys(self, layer: int, keys: mx.array, batch: PackedBatch) -> mx.array:
        """Keys as `Taps` see them → as they are cached: k-norm, if the family has it, and RoPE.

        `(N, num_kv_heads, head_dim)` both, for the rows of `batch`.
        """
        k_norm = self.weights.layers[layer].k_norm
        if k_norm is not None:
            keys = self._norm(keys, k_norm)
        return self._rope(layer, keys, batch)

    def finish_queries(self, layer: int, queries: mx.array, batch: PackedBatch) -> mx.array:
        """The same for queries, `(N, num_heads, head_dim)` both."""
        q_norm = self.weights.layers[layer].q_norm
        if q_norm is not None:
            queries = self._norm(queries, q_norm)
        return self._rope(layer, queries, batch)

    def scale(self, layer: int) -> float:
        """What multiplies a layer's query-key products."""
        return self._scales[layer]

    def _rope(self, layer: int, heads: mx.array, batch: PackedBatch) -> mx.array:
        index = self._rope_of[layer]
        if index not in batch.tables:
            batch.tables[index] = self._ropes[index].tables(batch.positions)
        return self._ropes[index].apply(heads, batch.tables[index])

    def logits(self, hidden: mx.array) -> mx.array:
        """Final norm and head: `(R, hidden)` → `(R, vocab)`."""
        return self.weights.head(self._norm(hidden, self.weights.final_norm))

    def _norm(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, self.config.norm_eps)

    def _layer(self, index: int, x: mx.array, batch: PackedBatch, taps: Taps | None) -> mx.array:
        w = self.weights.layers[index]
        attended = w.out(self._attention(index, self._norm(x, w.attn_norm), batch, taps))
        if w.attn_post_norm is not None:
            attended = self._norm(attended, w.attn_post_norm)
        x = x + attended
        gated = gate(
            self.config.activation,
            w.gate_up(self._norm(x, w.ffn_norm)),
            composed=not self.device.fused_attention,
        )
        out = w.down(gated)
        if w.ffn_post_norm is not None:
            out = self._norm(out, w.ffn_post_norm)
        return x + out

    def _attention(
        self, index: int, x: mx.array, batch: PackedBatch, taps: Taps | None
    ) -> mx.array:
        layer = self.config.layers[index]
        queries, keys, values = self._rotated_qkv(index, layer, x, batch, taps)
        # All writes before the first read: segments may share a session, and a reader of the
        # arrays in between would make the next write copy them.
        row = 0
        for segment in batch.segments:
            end = row + segment.num_rows
            segment.view.write(index, keys[row:end].swapaxes(0, 1), values[row:end].swapaxes(0, 1))
            row = end
        kv = [s.view.read(index, s.view.offset + s.num_rows) for s in batch.segments]
        return attend(queries, kv, batch.segments, layer, self._scales[index], self.device)

    def _rotated_qkv(
        self,
        index: int,
        layer: LayerConfig,
        x: mx.array,
        batch: PackedBatch,
        taps: Taps | None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """`(N, heads, head_dim)` each; queries and keys normed (if the family does) and rotated."""
        w = self.weights.layers[index]
        num_heads, num_qk = layer.num_heads, layer.num_heads + layer.num_kv_heads
        qkv = w.qkv(x).reshape(x.shape[0], num_qk + layer.num_kv_heads, layer.head_dim)
        qk = qkv[:, :num_qk]
        if taps is not None:
            taps.see_qkv(index, qk[:, :num_heads], qk[:, num_heads:], qkv[:, num_qk:])
        if w.q_norm is not None and w.k_norm is not None:
            normed = [
                self._norm(qk[:, :num_heads], w.q_norm),
                self._norm(qk[:, num_heads:], w.k_norm),
            ]
            qk = mx.concatenate(normed, axis=1)
        qk = self._rope(index, qk, batch)
        return qk[:, :num_heads], qk[:, num_heads:], qkv[:, num_qk:]
