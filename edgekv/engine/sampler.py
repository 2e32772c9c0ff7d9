"""Logits → tokens, on the device, one row a request.

A row's randomness is keyed by the request's seed and the token's position, so the same seed gives
the same tokens whatever else is in the batch. The shape of a step moves logits by some 1e-6, and
that must not matter either: hence the Gumbel-max trick (the likeliest token once Gumbel noise is
added), which changes its mind only where two tokens are that close. An inverse CDF does so at the
boundary of every token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from edgekv.config import Sampling

_MASK = (1 << 64) - 1
# Below it no noise moves any token, and logits / 1e-38 would all be infinite.
_TEMPERATURE_MIN = 1e-30


def gumbel_noise(seed: int, position: int, size: int) -> mx.array:
    """`(size,)` standard Gumbel numbers that depend on nothing but the arguments."""
    return mx.random.gumbel((size,), key=mx.random.key(_mixed(_mixed(seed) ^ position)))


def _mixed(x: int) -> int:
    """A bijection of 64-bit numbers that scatters neighbours (the finaliser of SplitMix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """How one row is sampled."""

    params: Sampling  # as its request is
    position: int  # index of this token in the answer
    seen: mx.array | None = None  # `(vocab,)` bool, tokens to penalise, or None


@dataclass(frozen=True)
class RowLogprobs:
    """One row's log-probabilities, still on the device."""

    chosen: mx.array  # ()
    top_ids: mx.array  # (k,)
    top: mx.array  # (k,)


def sample(
    logits: mx.array, rows: Sequence[RowSampling]
) -> tuple[mx.array, dict[int, RowLogprobs]]:
    """Choose a token for every row of logits `(R, vocab)`.

    Returns tokens `(R,)` uint32, and log-probabilities by row for the rows that asked for them.
    """
    assert logits.shape[0] == len(rows)
    if all(r.params.greedy and r.seen is None and r.params.logprobs is None for r in rows):
        return mx.argmax(logits, axis=-1), {}
    tokens, logprobs = [], {}
    for i, row in enumerate(rows):
        raw = logits[i].astype(mx.float32)
        token = _sample_row(raw, row)
        tokens.append(token)
        if row.params.logprobs is not None:
            logprobs[i] = _row_logprobs(raw, token, row.params.logprobs)
    return mx.stack(tokens), logprobs


def chosen_logits(logits: mx.array, tokens: mx.array) -> mx.array:
    """`(R,)` float32, the logit of each row's token; no number where none of its row is one.

    All comparisons with NaN fail, so the token of a row of them is some token, and its own logit
    tells. It costs a gather of R numbers, where a look at each row would read R * vocab again.
    """
    return mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0].astype(mx.float32)


def _sample_row(logits: mx.array, row: RowSampling) -> mx.array:
    params = row.params
    if row.seen is not None:
        factor = params.repetition_penalty
        penalised = mx.where(logits > 0, logits / factor, logits * factor)
        logits = mx.where(row.seen, penalised, logits)
    if params.greedy:
        return mx.argmax(logits)
    logits = logits / max(params.temperature, _TEMPERATURE_MIN)
    if 0 < params.top_k < logits.size:
        logits = _drop_below(logits, mx.min(mx.topk(logits, params.top_k)))
    if params.top_p < 1.0:
        logits = _drop_below(logits, _nucleus_floor(logits, params.top_p))
    if params.min_p > 0.0:
        logits = _drop_below(logits, mx.max(logits) + math.log(params.min_p))
    return mx.argmax(logits + gumbel_noise(params.seed, row.position, logits.size))


def _nucleus_floor(logits: mx.array, top_p: float) -> mx.array:
    """The least logit of the smallest set of likeliest tokens whose probability reaches top_p."""
    falling = -mx.sort(-logits)
    weights = mx.softmax(falling)
    before = mx.cumsum(weights) - weights
    return falling[mx.maximum(mx.sum(before < top_p), 1) - 1]


def _drop_below(logits: mx.array, threshold: mx.array) -> mx.array:
    return mx.where(logits < threshold, -mx.inf, logits)


def _row_logprobs(logits: mx.array, token: mx.array, count: int) -> RowLogprobs:
    logprobs = logits - mx.logsumexp(logits)
    if count == 0:
        nothing = mx.array([], dtype=mx.uint32)
        return RowLogprobs(logprobs[token], nothing, nothing.astype(mx.float32))
    count = min(count, logits.size)
    top_ids = mx.argsort(-logprobs)[:count]
    return RowLogprobs(logprobs[token], top_ids, logprobs[top_ids])
