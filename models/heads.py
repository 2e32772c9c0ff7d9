"""Attention by heads, in all the ways that families have it: as data, at their defaults plain."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.models.attention import attend
from edgekv.models.batch import PackedBatch, Taps
from edgekv.models.config import DecoderConfig
from edgekv.models.linear import Linear
from edgekv.models.rope import Rope
from edgekv.ranks.group import Group


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """Tensors of one layer's attention; None is what the family lacks."""

    # Queries, keys, values and the output's gate side by side, in this order; no keys and values
    # where the layer reads another's, no values where they are keys.
    qkv: Linear
    out: Linear
    q_norm: mx.array | None = None
    k_norm: mx.array | None = None
    sinks: mx.array | None = None  # (num_heads,)


class HeadAttention:
    """One layer's attention over its own keys and values, or those of a layer before it."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        weights: HeadWeights,
        rope: Rope | None,
        device: DeviceProfile,
        group: Group,
    ) -> None:
        self._config, self._index, self.weights = config, index, weights
        self._layer = layer = config.layers[index]
        self._rope, self._device, self._group = rope, device, group
        whole = layer.rope is not None and layer.rope.rotated is None
        magnitude = layer.rope.magnitude if layer.rope is not None and whole else 1.0
        self.scale = config.attention_scale * magnitude**2  # of query-key products

    def __call__(self, x: mx.array, batch: PackedBatch, taps: Taps | None) -> mx.array:
        """`(N, hidden)` → `(N, hidden)`; keys and values are appended to the segments' views."""
        layer, w = self._layer, self.weights
        projected = w.qkv(x)
        gate = None
        if self._config.output_gate:
            width = layer.num_heads * layer.head_dim
            projected, gate = projected[:, :-width], projected[:, -width:]
        heads = projected.reshape(x.shape[0], -1, layer.head_dim)
        if layer.makes_kv:
            queries, keys, values = self._finished(heads, batch, taps)
            batch.write(self._index, keys, values)
        else:
            queries = self.finish_queries(heads, batch)
        source = self._index if layer.kv_from is None else layer.kv_from
        attended = self._attend(queries, batch.read(source), batch, w.sinks)
        return w.out(attended if gate is None else attended * mx.sigmoid(gate))

    def attend_some(self, queries: mx.array, heads: Sequence[int], batch: PackedBatch) -> mx.array:
        """What some heads make of rows whose keys and values are in their views already.

        Queries `(N, len(heads), head_dim)` as `Taps` see them → `(N, len(heads) * head_dim)`.
        """
        layer, sinks = self._layer, self.weights.sinks
        kv = batch.read(self._index)
        if len(heads) < layer.num_heads:
            share = layer.num_heads // layer.num_kv_heads
            of = mx.array([head // share for head in heads], dtype=mx.int32)
            kv = [(keys[of], values[of]) for keys, values in kv]
            sinks = None if sinks is None else sinks[mx.array(list(heads), dtype=mx.int32)]
        return self._attend(self.finish_queries(queries, batch), kv, batch, sinks)

    def _attend(
        self,
        queries: mx.array,
        kv: list[tuple[mx.array, mx.array]],
        batch: PackedBatch,
        sinks: mx.array | None,
    ) -> mx.array:
        """`(N, heads, head_dim)` → `(N, heads * head_dim)`."""
        return attend(
            self._grown(queries, batch),
            kv,
            batch.segments,
            self._layer,
            self.scale,
            self._device,
            sinks=sinks,
            softcap=self._config.attention_softcap,
        )

    def _finished(
        self, heads: mx.array, batch: PackedBatch, taps: Taps | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """`(N, heads, head_dim)` each: queries and keys normed, if the family does, and rotated."""
        layer, w = self._layer, self.weights
        num_qk = layer.num_heads + layer.num_kv_heads
        qk = heads[:, :num_qk]  # side by side as they are
        queries, keys = qk[:, : layer.num_heads], qk[:, layer.num_heads :]
        values = keys if layer.values_are_keys else heads[:, num_qk:]
        if taps is not None:
            taps.see_qkv(self._index, queries, keys, values)
        if self._config.value_norm:
            values = mx.fast.rms_norm(values, None, self._config.norm_eps)
        if w.q_norm is not None or w.k_norm is not None:
            qk = mx.concatenate(self._norm((queries, w.q_norm), (keys, w.k_norm)), axis=1)
        if self._rope is not None:
            qk = batch.rotate(self._rope, qk)
        return qk[:, : layer.num_heads], qk[:, layer.num_heads :], values

    def finish_keys(self, keys: mx.array, batch: PackedBatch) -> mx.array:
        """Keys as `Taps` see them → as they are cached: k-norm, if the family has it, and RoPE.

        `(N, num_kv_heads, head_dim)` both, for the rows of `batch`.
        """
        (normed,) = self._norm((keys, self.weights.k_norm))
        return self._rotated(normed, batch)

    def finish_queries(self, queries: mx.array, batch: PackedBatch) -> mx.array:
        """The same for queries, `(N, num_heads, head_dim)` both."""
        (normed,) = self._norm((queries, self.weights.q_norm))
        return self._rotated(normed, batch)

    def _rotated(self, heads: mx.array, batch: PackedBatch) -> mx.array:
        return heads if self._rope is None else batch.rotate(self._rope, heads)

    def _norm(self, *parts: tuple[mx.array, mx.array | None]) -> list[mx.array]:
        """Heads, each kind by its weight, if the family does."""
        if self._config.qk_norm == "whole":
            return self._norm_whole(parts)
        eps = self._config.norm_eps
        return [x if weight is None else mx.fast.rms_norm(x, weight, eps) for x, weight in parts]

    def _norm_whole(self, parts: Sequence[tuple[mx.array, mx.array | None]]) -> list[mx.array]:
        """The same over all heads of a kind, those of other ranks included."""
        eps, num_ranks = self._config.norm_eps, self._group.size
        flat = [x.reshape(x.shape[0], -1) for x, _ in parts]
        if num_ranks == 1:
            normed = [mx.fast.rms_norm(x, w, eps) for x, (_, w) in zip(flat, parts, strict=True)]
        else:
            own = [mx.mean(x.astype(mx.float32) ** 2, axis=-1, keepdims=True) for x in flat]
            means = self._group.all_sum(mx.concatenate(own, axis=-1)) / num_ranks
            scales = mx.split(mx.rsqrt(means + eps), len(parts), axis=-1)
            normed = [
                (x * scale).astype(x.dtype) * weight
                for x, scale, (_, weight) in zip(flat, scales, parts, strict=True)
                if weight is not None
            ]
        return [x.reshape(heads.shape) for x, (heads, _) in zip(normed, parts, strict=True)]

    def _grown(self, queries: mx.array, batch: PackedBatch) -> mx.array:
        if self._config.query_growth is None:
            return queries
        tokens, growth = self._config.query_growth
        times = mx.floor(batch.positions.astype(mx.float32) / tokens)
        factors = 1 + growth * mx.log(1 + times)
        return queries * factors[:, None, None].astype(queries.dtype)
