"""Logits → tokens, on the device, one row a request.

A row's randomness is one uniform number from a counter-based generator keyed by the request's seed
and the token's position, so the same seed gives the same tokens whatever else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.config import SamplingParams

_UNIFORM_MAX = 1.0 - 2.0**-20  # so that u * total < total in f32, and never a token of weight 0


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox 4x64)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return min(float(generator.random()), _UNIFORM_MAX)


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """How one row is sampled.

    Attributes:
        params: The request's parameters.
        seed: Its seed.
        position: Index of this token in the answer.
        seen: `(vocab,)` bool, tokens to penalise, or None.
    """

    params: SamplingParams
    seed: int
    position: int
    seen: mx.array | None = None


@dataclass(frozen=True)
class RowLogprobs:
    """One row's log-probabilities, still on the device."""

    chosen: mx.array  # ()
    top_ids: mx.array  # (k,)
    top: mx.array  # (k,)


def sample(
    logits: mx.array, rows: Sequence[RowSampling]
) -> tuple[mx.array, dict[int, RowLogprobs]]:
    """Choose a token for every row.

    Args:
        logits: `(R, vocab)`.
        rows: How each row is sampled.

    Returns:
        Tokens `(R,)` uint32, and log-probabilities by row for the rows that asked for them.
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


def _sample_row(logits: mx.array, row: RowSampling) -> mx.array:
    params = row.params
    if row.seen is not None:
        factor = params.repetition_penalty
        penalised = mx.where(logits > 0, logits / factor, logits * factor)
        logits = mx.where(row.seen, penalised, logits)
    if params.greedy:
        return mx.argmax(logits)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.size:
        logits = _drop_below(logits, mx.min(mx.topk(logits, params.top_k)))
    u = uniform(row.seed, row.position)
    if params.top_p < 1.0:
        return _sample_nucleus(logits, params, u)
    return _inverse_cdf(_min_p_weights(logits, params.min_p), u)


def _sample_nucleus(logits: mx.array, params: SamplingParams, u: float) -> mx.array:
    """Inverse CDF over the smallest set of likeliest tokens whose probability reaches top_p."""
    order = mx.argsort(-logits)
    weights = mx.softmax(logits[order])
    before = mx.cumsum(weights) - weights
    in_nucleus = before < params.top_p
    floor = params.min_p * weights[0]
    kept = mx.where(in_nucleus & (weights >= floor), weights, 0.0)
    return order[_inverse_cdf(kept, u)]


def _min_p_weights(logits: mx.array, min_p: float) -> mx.array:
    weights = mx.softmax(logits)
    if min_p == 0.0:
        return weights
    return mx.where(weights >= min_p * mx.max(weights), weights, 0.0)


def _drop_below(logits: mx.array, threshold: mx.array) -> mx.array:
    return mx.where(logits < threshold, -mx.inf, logits)


def _inverse_cdf(weights: mx.array, u: float) -> mx.array:
    """The first index whose cumulated weight exceeds `u` of the total."""
    cumulated = mx.cumsum(weights)
    index = mx.sum(cumulated <= u * cumulated[-1]).astype(mx.uint32)
    return mx.minimum(index, mx.array(weights.size - 1, dtype=mx.uint32))


def _row_logprobs(logits: mx.array, token: mx.array, count: int) -> RowLogprobs:
    logprobs = logits - mx.logsumexp(logits)
    if count == 0:
        nothing = mx.array([], dtype=mx.uint32)
        return RowLogprobs(logprobs[token], nothing, nothing.astype(mx.float32))
    count = min(count, logits.size)
    top_ids = mx.argsort(-logprobs)[:count]
    return RowLogprobs(logprobs[token], top_ids, logprobs[top_ids])
