"""Layers that keep a state of fixed size in place of keys and values.

A state is what a layer remembers of all tokens so far; it cannot be cut back to fewer. Each
segment's recurrence runs over its own rows: in chunks where it has many, in one step for all
segments of one row together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch, Taps
from edgekv.models.config import DecoderConfig
from edgekv.models.linear import Linear

State = tuple[mx.array, ...]
# Of several segments of equally many rows: `(B, rows, …)` arrays and states → outputs and states.
_Recurrence = Callable[[mx.array, State], tuple[mx.array, State]]


def _run_segments(
    index: int, rows: mx.array, batch: PackedBatch, empty: State, run: _Recurrence
) -> mx.array:
    """Each segment's rows of `(N, width)` through its recurrence → `(N, …)`.

    Segments of one row run together.
    """
    outputs: dict[int, mx.array] = {}  # by number of the segment
    starts = [0]
    for segment in batch.segments:
        starts.append(starts[-1] + segment.num_rows)
    singles = [i for i, segment in enumerate(batch.segments) if segment.num_rows == 1]
    if singles:
        views = [batch.segments[i].view for i in singles]
        states = [view.state(index) or empty for view in views]
        stacked = tuple(mx.stack(list(arrays)) for arrays in zip(*states, strict=True))
        taken = (
            rows if len(singles) == rows.shape[0] else rows[mx.array([starts[i] for i in singles])]
        )
        out, after = run(taken[:, None], stacked)
        for at, (i, view) in enumerate(zip(singles, views, strict=True)):
            outputs[i] = out[at]
            view.set_state(index, 1, _own(after, at))
    for i, segment in enumerate(batch.segments):
        if segment.num_rows > 1:
            outputs[i] = _run_alone(index, rows[starts[i] : starts[i + 1]], segment, empty, run)
    return mx.concatenate([outputs[i] for i in range(len(batch.segments))])


def _run_alone(
    index: int, rows: mx.array, segment: Segment, empty: State, run: _Recurrence
) -> mx.array:
    """A segment's rows; where a snapshot is kept, a piece of them ends."""
    state = tuple(array[None] for array in segment.view.state(index) or empty)
    outputs, start = [], 0
    for end in segment.view.stops(segment.num_rows):
        out, state = run(rows[None, start:end], state)
        segment.view.set_state(index, end, _own(state, 0))
        outputs.append(out[0])
        start = end
    return mx.concatenate(outputs)


def _own(states: State, at: int) -> State:
    """One sequence's state of several: in memory of its own, for it outlives the others'."""
    return tuple(mx.contiguous(array[at]) for array in states)


def _convolve(x: mx.array, before: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    """A causal convolution of each channel: `(B, rows, channels)` → the same, and its new state.

    `before` `(B, size - 1, channels)` are the inputs of the tokens before; `weight` is
    `(size, channels)`, the token itself last.
    """
    size, num_rows = weight.shape[0], x.shape[1]
    seen = mx.concatenate([before, x], axis=1)
    out = seen[:, :num_rows] * weight[0]
    for tap in range(1, size):
        out = out + seen[:, tap : tap + num_rows] * weight[tap]
    return out, seen[:, num_rows:]


# --- LFM2's gated short convolution ---


@dataclass(frozen=True, kw_only=True)
class ConvWeights:
    """Tensors of one layer's short convolution."""

    into: Linear  # (N, hidden) → input gate, output gate and input side by side
    conv: mx.array  # (size, channels)
    conv_bias: mx.array | None
    out: Linear


class ShortConv:
    """One layer's gated short convolution; its state are its last inputs."""

    def __init__(self, config: DecoderConfig, index: int, weights: ConvWeights) -> None:
        self._index, self._weights = index, weights
        (shape,) = config.layers[index].state_shapes
        self._shape = shape

    def __call__(self, x: mx.array, batch: PackedBatch, taps: Taps | None) -> mx.array:
        """`(N, hidden)` → `(N, hidden)`; the segments' states move on."""
        assert taps is None
        w = self._weights
        before, after, value = mx.split(w.into(x), 3, axis=-1)

        def run(rows: mx.array, state: State) -> tuple[mx.array, State]:
            out, last = _convolve(rows, state[0], w.conv)
            return out if w.conv_bias is None else out + w.conv_bias, (last,)

        empty = (mx.zeros(self._shape, dtype=x.dtype),)
        return w.out(after * _run_segments(self._index, before * value, batch, empty, run))


# --- Gated DeltaNet ---


@dataclass(frozen=True, kw_only=True)
class DeltaWeights:
    """Tensors of one layer's Gated DeltaNet."""

    # (N, hidden) → queries, keys, values, the output's gate, and a head's write strength and decay.
    into: Linear
    conv: mx.array  # (conv_size, channels)
    decay: mx.array  # (num_value_heads,) f32: logarithm of the rate
    decay_bias: mx.array  # (num_value_heads,)
    norm: mx.array  # (value_dim,)
    out: Linear


class GatedDelta:
    """One layer's Gated DeltaNet (arXiv 2412.06464).

    Of each value head it keeps a matrix S `(value_dim, key_dim)`, in f32: decayed by a token, then
    corrected so that it gives more of the token's value for its key. Beside that the convolution's
    last inputs.
    """

    def __init__(self, config: DecoderConfig, index: int, weights: DeltaWeights) -> None:
        delta = config.layers[index].delta
        assert delta is not None
        self._index, self._weights, self._delta, self._eps = index, weights, delta, config.norm_eps
        self._shapes = config.layers[index].state_shapes

    def __call__(self, x: mx.array, batch: PackedBatch, taps: Taps | None) -> mx.array:
        """`(N, hidden)` → `(N, hidden)`; the segments' states move on."""
        assert taps is None
        d, w = self._delta, self._weights
        width, heads = d.num_value_heads * d.value_dim, d.num_value_heads
        projected = w.into(x)
        gate = projected[:, d.conv_dim : d.conv_dim + width]
        strengths = projected[:, d.conv_dim + width :]
        taken = mx.concatenate([projected[:, : d.conv_dim], strengths], axis=-1)
        empty = (
            mx.zeros(self._shapes[0], dtype=x.dtype),
            mx.zeros(self._shapes[1], dtype=mx.float32),
        )
        mixed = _run_segments(self._index, taken, batch, empty, self._run)
        mixed = mx.fast.rms_norm(mixed.astype(x.dtype), w.norm, self._eps).astype(mx.float32)
        gate = gate.reshape(x.shape[0], heads, d.value_dim).astype(mx.float32)
        gated = (mixed * (gate * mx.sigmoid(gate))).astype(x.dtype)
        return w.out(gated.reshape(x.shape[0], width))

    def _run(self, rows: mx.array, state: State) -> tuple[mx.array, State]:
        """`(B, rows, channels and 2 heads)` → `(B, rows, heads, value_dim)` f32."""
        d, w = self._delta, self._weights
        conv, last = _convolve(rows[..., : d.conv_dim], state[0], w.conv)
        conv = conv * mx.sigmoid(conv)
        keys_width = d.num_key_heads * d.key_dim
        queries, keys, values = mx.split(conv, [keys_width, 2 * keys_width], axis=-1)
        by_key = (*rows.shape[:2], d.num_key_heads, d.key_dim)
        queries = _unit(queries.reshape(by_key)) * d.key_dim**-0.5
        keys = _unit(keys.reshape(by_key))
        repeats = d.num_value_heads // d.num_key_heads
        if repeats > 1:
            queries, keys = (mx.repeat(a, repeats, axis=2) for a in (queries, keys))
        values = values.reshape(*rows.shape[:2], d.num_value_heads, d.value_dim)
        strengths = rows[..., d.conv_dim :].astype(mx.float32)
        write = mx.sigmoid(strengths[..., : d.num_value_heads])
        rate = _softplus(strengths[..., d.num_value_heads :] + w.decay_bias.astype(mx.float32))
        decay = -mx.exp(w.decay) * rate
        parts = [a.astype(mx.float32).swapaxes(1, 2) for a in (queries, keys, values, write, decay)]
        parts.append(state[1])
        step: Callable[..., State] = _delta_step if rows.shape[1] == 1 else _delta_chunks
        out, matrix = step(*parts)
        return out.swapaxes(1, 2), (last, matrix)


def _unit(x: mx.array) -> mx.array:
    """Vectors of length one, in f32."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.array(0.0))


@mx.compile
def _delta_step(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    write: mx.array,
    decay: mx.array,
    matrix: mx.array,
) -> tuple[mx.array, mx.array]:
    """One token; see `_delta_chunks` for what is what."""
    matrix = matrix * mx.exp(decay)[..., None]
    told = mx.sum(matrix * keys, axis=-1)  # (B, heads, value_dim)
    missing = (values[:, :, 0] - told) * write
    matrix = matrix + missing[..., None] * keys
    return mx.sum(matrix * queries, axis=-1)[:, :, None], matrix


_CHUNK, _BLOCK = 64, 16


def _delta_chunks(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    write: mx.array,
    decay: mx.array,
    matrix: mx.array,
) -> tuple[mx.array, mx.array]:
    """Many tokens, chunk by chunk: what each writes depends linearly on those before it.

    Within a chunk that is a triangular system, solved for all chunks at once (the WY form of
    arXiv 2406.06484, with the decay of 2412.06464). `(B, heads, T, dim)` each, write and decay
    (logarithms) `(B, heads, T)`, matrix `(B, heads, value_dim, key_dim)`; all in f32.
    """
    num_tokens = queries.shape[2]
    chunk = _BLOCK
    while chunk < min(_CHUNK, num_tokens):
        chunk *= 2
    short = -num_tokens % chunk
    arrays = [queries, keys, values, write[..., None], decay[..., None]]
    padded = [mx.pad(a, [(0, 0), (0, 0), (0, short), (0, 0)]) if short else a for a in arrays]
    q, k, v, beta, log_decay = (a.reshape(*a.shape[:2], -1, chunk, a.shape[-1]) for a in padded)
    total = mx.cumsum(log_decay, axis=3)  # (B, heads, chunks, chunk, 1)
    lower = mx.tril(mx.ones((chunk, chunk)))
    strictly = lower - mx.eye(chunk)
    # From column to row. Sums of what lies between: differences of `total` would lose digits.
    since = mx.exp(mx.cumsum(log_decay * strictly, axis=3)) * lower
    system = beta * (k @ k.swapaxes(3, 4)) * since * strictly
    inverse = _inverse_of_unit_lower(system)
    wanted = inverse @ (beta * v)
    told = inverse @ (beta * mx.exp(total) * k)
    scores = (q @ k.swapaxes(3, 4)) * since
    reading = q * mx.exp(total)
    left = k * since[..., -1:, :].swapaxes(3, 4)
    over = mx.exp(total[..., -1:, :])  # what a whole chunk leaves of what was before
    outputs = []
    for i in range(q.shape[2]):
        writes = wanted[:, :, i] - told[:, :, i] @ matrix.swapaxes(2, 3)
        outputs.append(reading[:, :, i] @ matrix.swapaxes(2, 3) + scores[:, :, i] @ writes)
        matrix = matrix * over[:, :, i] + writes.swapaxes(2, 3) @ left[:, :, i]
    return mx.concatenate(outputs, axis=2)[:, :, :num_tokens], matrix


def _inverse_of_unit_lower(strict: mx.array) -> mx.array:
    """Inverse of I + strict, `(…, n, n)`, strictly lower triangular; n is 16 times a power of two.

    By rows within blocks of 16, all blocks at once, and then block by block: exact as forward
    substitution is, in a number of products that does not grow with the tokens.
    """
    n = strict.shape[-1]
    num_blocks = n // _BLOCK
    tiles = strict.reshape(*strict.shape[:-2], num_blocks, _BLOCK, num_blocks, _BLOCK)
    blocks = mx.stack([tiles[..., i, :, i, :] for i in range(num_blocks)], axis=-3)
    rows = [mx.broadcast_to(mx.eye(_BLOCK)[:1], (*blocks.shape[:-2], 1, _BLOCK))]
    for i in range(1, _BLOCK):
        before = mx.concatenate(rows, axis=-2)
        rows.append(mx.eye(_BLOCK)[i : i + 1] - blocks[..., i : i + 1, :i] @ before)
    inverse = mx.concatenate(rows, axis=-2)
    return _joined(inverse, strict, _BLOCK)


def _joined(inverse: mx.array, strict: mx.array, size: int) -> mx.array:
    """The whole `(…, n, n)` of blocks `(…, n / size, size, size)` on its diagonal."""
    n = strict.shape[-1]
    while size < n:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        tiles = strict.reshape(*strict.shape[:-2], n // size, size, n // size, size)
        pairs = range(0, n // size, 2)
        between = mx.stack([tiles[..., i + 1, :, i, :] for i in pairs], axis=-3)
        corner = -(second @ between @ first)
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        inverse = mx.concatenate([top, mx.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]
