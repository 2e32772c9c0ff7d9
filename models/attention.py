"""Attention of one packed step: each segment's rows over that session's own keys and values.

No padding, no joint masks: a single row sees everything before it, so it needs no mask at all;
several rows need the lower-right aligned causal one. Sliding windows cut the keys instead of
masking them wherever one cut is right for all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.models.config import LayerConfig
from edgekv.models.exponential import softmax_parts

_MANY_SCORES = 4096  # from here on our exponential pays for its extra ops
_TILE_ROWS_MAX = 256  # where scores are computed one and all: what they take is bounded


class KVView(Protocol):
    """One session's KV as a layer sees it during one step."""

    @property
    def offset(self) -> int:
        """Tokens in the view before this step."""
        ...

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Put `(num_kv_heads, rows, head_dim)` at `[offset, offset + rows)`."""
        ...

    def read(self, layer: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """The first `num_tokens` tokens' keys and values, what this step wrote included."""
        ...

    def state(self, layer: int) -> tuple[mx.array, ...] | None:
        """A recurrent layer's state behind `offset` tokens; None: behind none."""
        ...

    def stops(self, num_rows: int) -> Sequence[int]:
        """Rows, of so many, behind which it is told the state; ascending, the last is the last."""
        ...

    def set_state(self, layer: int, num_rows: int, state: tuple[mx.array, ...]) -> None:
        """Put the state behind the first so many rows of this step."""
        ...

    def at(self, offset: int) -> "KVView":
        """Another place in the same session; what either writes both read."""
        ...


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a packed step that belong to one session."""

    view: KVView
    num_rows: int


class _Terms(NamedTuple):
    """How scores become weights, beside the scale."""

    window: int | None  # tokens, itself included, that a row sees
    sinks: mx.array | None  # (num_heads,): a logit that takes weight and gives no value
    softcap: float | None  # scores are bent by tanh to stay below it


def attend(
    queries: mx.array,
    kv: list[tuple[mx.array, mx.array]],
    segments: list[Segment],
    layer: LayerConfig,
    scale: float,
    device: DeviceProfile,
    *,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Attend every row to its own session.

    Rotated queries `(N, num_heads, key_dim)` → `(N, num_heads * value_dim)`. `kv` has for each
    segment, in the order of their rows, the keys `(num_kv_heads, T, key_dim)` and values `(…,
    value_dim)` with this step's rows appended; `scale` multiplies query-key products. `sinks`
    `(num_heads,)` are logits of no token; `softcap` c makes c * tanh(score / c) of scores.
    """
    terms = _Terms(layer.sliding_window, sinks, softcap)
    fused = device.fused_attention and softcap is None
    if not fused:
        queries = queries * scale
    outputs: list[mx.array] = []
    row = 0
    for segment, (keys, values) in zip(segments, kv, strict=True):
        rows = queries[row : row + segment.num_rows]
        if fused:
            outputs.append(_attend_fused(rows, keys, values, terms, scale))
        elif segment.num_rows == 1:
            outputs.append(_attend_row(rows, *_last(keys, values, terms.window), terms))
        else:
            outputs += _attend_tiles(rows, keys, values, terms, device.attention_tile_rows)
        row += segment.num_rows
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _attend_tiles(
    queries: mx.array, keys: mx.array, values: mx.array, terms: _Terms, tile_rows: int
) -> list[mx.array]:
    """Rows of a chunk in tiles, so that a tile's keys end where its last row's do."""
    num_rows, num_keys = queries.shape[0], keys.shape[1]
    tile_rows = min(tile_rows, _TILE_ROWS_MAX)
    outputs = []
    for start in range(0, num_rows, tile_rows):
        end = min(start + tile_rows, num_rows)
        visible = num_keys - num_rows + end
        reach = None if terms.window is None else terms.window + end - start - 1
        tile = _last(keys[:, :visible], values[:, :visible], reach)
        outputs.append(_attend_rows(queries[start:end], *tile, terms))
    return outputs


def _attend_fused(
    queries: mx.array, keys: mx.array, values: mx.array, terms: _Terms, scale: float
) -> mx.array:
    """Rows `(n, heads, key_dim)`, the last of which sees the last key."""
    n, window = queries.shape[0], terms.window
    mask: mx.array | str | None = "causal" if n > 1 else None
    if window is not None and keys.shape[1] > window:
        keys, values = _last(keys, values, window + n - 1)
        if n > 1:
            mask = _window_mask(n, keys.shape[1], window)
    out = mx.fast.scaled_dot_product_attention(
        queries.swapaxes(0, 1)[None],
        keys[None],
        values[None],
        scale=scale,
        mask=mask,
        sinks=None if terms.sinks is None else terms.sinks.astype(queries.dtype),
    )
    return out[0].swapaxes(0, 1).reshape(n, -1)


def _last(keys: mx.array, values: mx.array, count: int | None) -> tuple[mx.array, mx.array]:
    if count is None or keys.shape[1] <= count:
        return keys, values
    start = keys.shape[1] - count
    return keys[:, start:], values[:, start:]


def _window_mask(num_rows: int, num_keys: int, window: int) -> mx.array:
    """True where row i (at key num_keys - num_rows + i) may see key j: i - window < j <= i."""
    at = mx.arange(num_keys - num_rows, num_keys)[:, None]
    keys = mx.arange(num_keys)[None]
    return (keys <= at) & (keys > at - window)


# --- composed of matrix products, for devices without a fused kernel ---


def _attend_row(query: mx.array, keys: mx.array, values: mx.array, terms: _Terms) -> mx.array:
    """One scaled query row `(1, num_heads, key_dim)` over all keys → `(1, heads * value_dim)`."""
    grouped = query.reshape(keys.shape[0], -1, keys.shape[2])
    plain = terms.sinks is None and terms.softcap is None
    if plain and query.shape[1] * keys.shape[1] < _MANY_SCORES:
        scores = grouped @ keys.swapaxes(-1, -2)
        return (mx.softmax(scores, axis=-1) @ values).reshape(1, -1)
    # Keys on the left: BLAS packs the right side, and the keys are much the larger.
    scores = (keys @ grouped.swapaxes(-1, -2)).swapaxes(-1, -2)
    weights, total = _weights(scores[:, :, None], terms)
    return ((weights[:, :, 0] @ values) / total[:, :, 0]).reshape(1, -1)


def _attend_rows(queries: mx.array, keys: mx.array, values: mx.array, terms: _Terms) -> mx.array:
    """Scaled query rows `(n, num_heads, key_dim)`, the last of which sees the last key."""
    n, (num_kv_heads, num_keys, key_dim) = queries.shape[0], keys.shape
    # Query heads of one key-value head side by side: one product for each key-value head.
    by_head = queries.swapaxes(0, 1).reshape(num_kv_heads, -1, key_dim)
    scores = (by_head @ keys.swapaxes(-1, -2)).reshape(num_kv_heads, -1, n, num_keys)
    weights, total = _weights(scores, terms)
    mixed = weights.reshape(num_kv_heads, -1, num_keys) @ values
    out = mixed.reshape(num_kv_heads, -1, n, values.shape[-1]) / total
    return out.reshape(-1, n, values.shape[-1]).swapaxes(0, 1).reshape(n, -1)


def _weights(scores: mx.array, terms: _Terms) -> tuple[mx.array, mx.array]:
    """Numerators and denominators `(…, n, 1)` of `(kv_heads, heads of each, n, num_keys)`."""
    if terms.softcap is not None:
        scores = terms.softcap * mx.tanh(scores / terms.softcap)
    if scores.shape[2] > 1:
        scores = _mask_scores(scores, terms.window)
    if terms.sinks is None:
        return softmax_parts(scores)
    # One key more, of no token: its numerator counts in the denominator alone.
    sinks = terms.sinks.reshape(*scores.shape[:2], 1, 1).astype(scores.dtype)
    scores = mx.concatenate([scores, mx.broadcast_to(sinks, (*scores.shape[:3], 1))], axis=-1)
    weights, total = softmax_parts(scores)
    return weights[..., :-1], total


def _mask_scores(scores: mx.array, window: int | None) -> mx.array:
    """Row i, at key num_keys - n + i, sees keys up to its own and not before its window."""
    n, num_keys = scores.shape[-2:]
    if window is None or num_keys <= window:
        # All rows see all keys before the first row's own, so only a square of n x n is masked.
        hidden = mx.triu(mx.full((n, n), -mx.inf), k=1)
        first = num_keys - n
        scores[..., first:] = scores[..., first:] + hidden
        return scores
    return mx.where(_window_mask(n, num_keys, window), scores, -mx.inf)
