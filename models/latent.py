"""Multi-head latent attention (MLA) of DeepSeek-V2, arXiv 2405.04434.

A token's keys and values of all heads are linear maps of one latent, beside a small key that is
rotated and the same for all heads. Latent and rotated key are all that is cached. The maps are
taken into the queries and the output, so a step attends over the latents themselves: to attention
it is one key-value head whose values are the first part of its keys.
"""

from dataclasses import dataclass

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.models.attention import attend
from edgekv.models.batch import PackedBatch, Taps
from edgekv.models.config import DecoderConfig
from edgekv.models.linear import Linear
from edgekv.models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class LatentWeights:
    """Tensors of one layer's latent attention."""

    # The queries' latent, or the queries themselves, then the latent of keys and values, then the
    # key that is rotated, side by side.
    down: Linear
    q_norm: mx.array | None  # of the queries' latent
    q_up: Linear | None  # from it to the queries
    latent_norm: mx.array
    keys: mx.array  # (num_heads, plain_dim, rank): from a query's plain part into the latent
    values: mx.array  # (num_heads, rank, value_dim): from the latent to a head's value
    out: Linear


class LatentAttention:
    """One layer's latent attention."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        weights: LatentWeights,
        rope: Rope | None,
        device: DeviceProfile,
    ) -> None:
        latent = config.layers[index].latent
        assert latent is not None
        self._config, self._index, self._weights, self._latent = config, index, weights, latent
        self._rope, self._device = rope, device
        rope_config = config.layers[index].rope
        # Only a part of the score is rotated, so the magnitude is not a matter of its scale.
        self._magnitude = 1.0 if rope_config is None else rope_config.magnitude

    def __call__(self, x: mx.array, batch: PackedBatch, taps: Taps | None) -> mx.array:
        """`(N, hidden)` → `(N, hidden)`; latents are appended to the segments' views."""
        assert taps is None, "what is latent has no keys of heads to be seen"
        w, latent = self._weights, self._latent
        layer = self._config.layers[self._index]
        queries, compressed = self._queries(x)
        plain, turned = queries[..., : latent.plain_dim], queries[..., latent.plain_dim :]
        absorbed = (plain.swapaxes(0, 1) @ w.keys).swapaxes(0, 1)
        queries = mx.concatenate([absorbed, self._rotated(turned, batch)], axis=-1)
        rotated = self._rotated(compressed[:, None, latent.rank :], batch)[:, 0]
        normed = mx.fast.rms_norm(
            compressed[:, : latent.rank], w.latent_norm, self._config.norm_eps
        )
        latents = mx.concatenate([normed, rotated], axis=-1)[:, None]
        batch.write(self._index, latents, latents[..., :0])
        kv = [(keys, keys[..., : latent.rank]) for keys, _ in batch.read(self._index)]
        scale = self._config.attention_scale
        mixed = attend(queries, kv, batch.segments, layer, scale, self._device)
        by_head = mixed.reshape(-1, layer.num_heads, latent.rank).swapaxes(0, 1) @ w.values
        return w.out(by_head.swapaxes(0, 1).reshape(x.shape[0], -1))

    def _queries(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Queries `(N, num_heads, plain_dim + rope_dim)`; latent and key `(N, rank + rope_dim)`."""
        w, latent = self._weights, self._latent
        down = w.down(x)
        width = latent.rank + latent.rope_dim
        queries, compressed = down[:, :-width], down[:, -width:]
        if w.q_up is not None:
            assert w.q_norm is not None
            queries = w.q_up(mx.fast.rms_norm(queries, w.q_norm, self._config.norm_eps))
        return queries.reshape(x.shape[0], -1, latent.plain_dim + latent.rope_dim), compressed

    def _rotated(self, heads: mx.array, batch: PackedBatch) -> mx.array:
        if self._rope is None:
            return heads
        rotated = batch.rotate(self._rope, heads)
        return rotated if self._magnitude == 1.0 else rotated * self._magnitude
