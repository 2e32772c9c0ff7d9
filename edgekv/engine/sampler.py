"""Logits → tokens, on the device, one row a request.

A row's randomness is keyed by the request's seed and the token's position, so the same seed gives
the same tokens whatever else is in the batch. The shape of a step moves logits by some 1e-6, and
that must not matter either: hence the Gumbel-max trick (the likeliest token once Gumbel noise is
added), which changes its mind only where two tokens are that close. An inverse CDF does so at the
boundary of every token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx

from edgekv.config import Sampling

T = TypeVar("T")

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
    counts: mx.array | None = None  # `(vocab,)` float32, how often the answer holds them, or None
    margin: bool = False  # how much the best its token is, is wanted too

    @property
    def plain(self) -> bool:
        """Whether it is the likeliest token, and nothing else is wanted."""
        return (
            self.params.greedy
            and self.seen is None
            and self.counts is None
            and self.params.logprobs is None
            and not self.margin
        )


@dataclass(frozen=True)
class RowLogprobs:
    """One row's log-probabilities, still on the device."""

    chosen: mx.array  # ()
    top_ids: mx.array  # (k,)
    top: mx.array  # (k,)


@dataclass(kw_only=True)
class Sampled:
    """What was chosen for the rows of a step, still on the device."""

    tokens: mx.array  # `(R,)` uint32
    chosen: mx.array  # `(R,)` float32, their logits
    logprobs: dict[int, RowLogprobs] = field(default_factory=dict)  # by row, where wanted
    margins: dict[int, mx.array] = field(default_factory=dict)  # likewise, () each

    @property
    def arrays(self) -> list[mx.array]:
        """All of it."""
        arrays = [self.tokens, self.chosen, *self.margins.values()]
        for row in self.logprobs.values():
            arrays += (row.chosen, row.top_ids, row.top)
        return arrays

    def joined(self, other: "Sampled", places: list[int]) -> "Sampled":
        """Its rows and another's behind them, each at its place."""
        num_own = self.tokens.size

        def placed(own: dict[int, T], others: dict[int, T]) -> dict[int, T]:
            rows = own | {num_own + row: value for row, value in others.items()}
            return {places[row]: value for row, value in rows.items()}

        order = mx.array(sorted(range(len(places)), key=places.__getitem__))
        return Sampled(
            tokens=mx.concatenate([self.tokens, other.tokens])[order],
            chosen=mx.concatenate([self.chosen, other.chosen])[order],
            logprobs=placed(self.logprobs, other.logprobs),
            margins=placed(self.margins, other.margins),
        )


def sample(
    logits: mx.array, rows: Sequence[RowSampling], allowed: mx.array | None = None
) -> Sampled:
    """Choose a token for every row of logits `(R, vocab)`, of those `allowed` `(R, vocab)` bool.

    Log-probabilities are those of all tokens. A margin is by how much a token's score, which
    decides, was above the next one's: in units of logits, at any temperature.
    """
    assert logits.shape[0] == len(rows)
    eligible = logits if allowed is None else mx.where(allowed, logits, -mx.inf)
    if all(row.plain for row in rows):
        tokens = mx.argmax(eligible, axis=-1)
        return Sampled(tokens=tokens, chosen=_chosen_logits(eligible, tokens))
    chosen, logprobs, margins = [], {}, {}
    for i, row in enumerate(rows):
        token, scores = _sample_row(eligible[i].astype(mx.float32), row)
        chosen.append(token)
        if row.params.logprobs is not None:
            raw = logits[i].astype(mx.float32)
            logprobs[i] = _row_logprobs(raw, token, row.params.logprobs)
        if row.margin:
            others = mx.where(mx.arange(scores.size) == token, -mx.inf, scores)
            margins[i] = (scores[token] - mx.max(others)) * _divisor(row.params)
    tokens = mx.stack(chosen)
    return Sampled(
        tokens=tokens, chosen=_chosen_logits(eligible, tokens), logprobs=logprobs, margins=margins
    )


def _chosen_logits(logits: mx.array, tokens: mx.array) -> mx.array:
    """`(R,)` float32, the logit of each row's token; no number where its row is not sound.

    On CPU `argmax` takes a NaN wherever it stands, so the token's own logit tells. Metal's, as its
    source reads, passes over one among numbers, which nobody is told of there. A look at each row
    would read R * vocab again: `mx.sum` takes 0.07% (R = 1) to 0.2% (R = 8) of the default
    model's step on CPU.
    """
    return mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0].astype(mx.float32)


def _divisor(params: Sampling) -> float:
    return 1.0 if params.greedy else max(params.temperature, _TEMPERATURE_MIN)


def _sample_row(logits: mx.array, row: RowSampling) -> tuple[mx.array, mx.array]:
    """A token, and the scores `(vocab,)` of all, as they are before any is ruled out."""
    params = row.params
    if row.seen is not None:
        factor = params.repetition_penalty
        penalised = mx.where(logits > 0, logits / factor, logits * factor)
        logits = mx.where(row.seen, penalised, logits)
    if row.counts is not None:
        logits = logits - params.presence_penalty * (row.counts > 0)
        logits = logits - params.frequency_penalty * row.counts
    if params.greedy:
        return mx.argmax(logits), logits
    logits = logits / _divisor(params)
    noise = gumbel_noise(params.seed, row.position, logits.size)
    scores = logits + noise
    if 0 < params.top_k < logits.size:
        logits = _drop_below(logits, mx.min(mx.topk(logits, params.top_k)))
    if params.top_p < 1.0:
        logits = _drop_below(logits, _nucleus_floor(logits, params.top_p))
    if params.min_p > 0.0:
        logits = _drop_below(logits, mx.max(logits) + math.log(params.min_p))
    return mx.argmax(logits + noise), scores


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
