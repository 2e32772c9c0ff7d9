"""How it is measured: one run's figures, two sides in turn, medians over pairs. Pure.

A run has two phases. **Cold**: all prompts are submitted at once and every session generates
`new_tokens` tokens; this gives the times to first token, the largest gap that a session sees while
others prefill, and the end-to-end rate. **Decode**: all contexts are in KV, and all sessions
together generate `new_tokens` more; this gives the decode rate

    tokens after each session's first of this phase / (last token of all - first token of all)

so that neither prefill nor queueing is in it. Both sides are held to these same definitions.
"""

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from edgekv.bench.workload import Workload
from edgekv.errors import EdgeKVError
from edgekv.metrics import percentile

WARM_UPS = 1
_WARM_UP_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When one session's tokens of one phase came, in milliseconds from a common zero."""

    first_ms: float
    last_ms: float
    num_tokens: int
    tbt_p50_ms: float
    tbt_max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> "Timeline":
        """The timeline of tokens that came at these times."""
        gaps = [b - a for a, b in itertools.pairwise(times_ms)]
        return cls(
            first_ms=times_ms[0],
            last_ms=times_ms[-1],
            num_tokens=len(times_ms),
            tbt_p50_ms=percentile(gaps, 50),
            tbt_max_ms=max(gaps, default=0.0),
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one side.

    Attributes:
        num_prompt_tokens: Of all sessions together.
        ttft_ms: Submit to first token, by session.
        warm_ttft_ms: The same for a prompt whose KV is in memory but for the last token, by
            session; empty where a side has no such request.
        cold: Timelines of the cold phase from its submission, by session.
        decode: Timelines of the decode phase, by session.
        peak_memory_bytes: MLX memory at its peak, the other side's weights not counted.
        tokens: What each session generated in both phases.
        num_predicted: Prompt tokens of the cold phase whose KV was predicted.
    """

    num_prompt_tokens: int
    ttft_ms: tuple[float, ...]
    warm_ttft_ms: tuple[float, ...]
    cold: tuple[Timeline, ...]
    decode: tuple[Timeline, ...]
    peak_memory_bytes: int
    tokens: tuple[tuple[int, ...], ...]
    num_predicted: int = 0

    def figures(self) -> dict[str, float | None]:
        """This run's figures by the names they have in a report."""
        warm = median(self.warm_ttft_ms) if self.warm_ttft_ms else None
        return {
            "ttft_ms_min": min(self.ttft_ms),
            "ttft_ms_p50": median(self.ttft_ms),
            "ttft_ms_max": max(self.ttft_ms),
            "ttft_warm_ms_p50": warm,
            "prefill_tokens_per_s": 1e3 * self.num_prompt_tokens / max(self.ttft_ms),
            "e2e_tokens_per_s": 1e3
            * sum(t.num_tokens for t in self.cold)
            / max(t.last_ms for t in self.cold),
            "cold_tbt_max_ms": max(t.tbt_max_ms for t in self.cold),
            "decode_tokens_per_s": decode_rate(self.decode),
            "tbt_p50_ms": median(t.tbt_p50_ms for t in self.decode),
            "tbt_max_ms": max(t.tbt_max_ms for t in self.decode),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def decode_rate(timelines: Sequence[Timeline]) -> float:
    """Tokens per second of sessions that decode together, see the module's text."""
    span_ms = max(t.last_ms for t in timelines) - min(t.first_ms for t in timelines)
    return 1e3 * sum(t.num_tokens - 1 for t in timelines) / span_ms


class Side(Protocol):
    """One runtime under measurement."""

    @property
    def name(self) -> str:
        """What it is called in a report."""
        ...

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Sample:
        """Both phases, with nothing cached from runs before.

        Raises:
            EdgeKVError: The run failed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One turn of each side."""

    ours: Sample
    theirs: Sample | None

    def agreement(self) -> float | None:
        """Fraction of generated tokens before a session's first difference, all together.

        The guard that like is compared with like. Greedy text of the same weights differs only
        where two tokens tie within rounding; from there on the sessions part.
        """
        if self.theirs is None:
            return None
        sessions = list(zip(self.ours.tokens, self.theirs.tokens, strict=True))
        same = sum(_common_prefix(a, b) for a, b in sessions)
        return same / sum(len(a) for a, _ in sessions)

    def to_dict(self) -> dict[str, Any]:
        """Raw figures of both turns, for JSON."""
        return {
            "ours": _raw(self.ours),
            "theirs": None if self.theirs is None else _raw(self.theirs),
        }


def _raw(sample: Sample) -> dict[str, Any]:
    return {**sample.figures(), "ttft_ms": list(sample.ttft_ms)}


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))


@dataclass(kw_only=True)
class Outcome:
    """All turns of one workload. A pair that failed is counted, and its error kept."""

    pairs: list[Pair] = field(default_factory=list)
    failed: int = 0
    errors: list[str] = field(default_factory=list)

    def ours(self, figure: str) -> float | None:
        """Median over our runs of one figure."""
        return _median([pair.ours.figures()[figure] for pair in self.pairs])

    def theirs(self, figure: str) -> float | None:
        """Median over the peer's runs of one figure."""
        return _median([p.theirs.figures()[figure] for p in self.pairs if p.theirs is not None])

    def ratio(self, figure: str, *, lower_is_better: bool) -> float | None:
        """Median over pairs of ours to theirs, turned so that more is better for us."""
        ratios = []
        for pair in self.pairs:
            if pair.theirs is None:
                continue
            ours, theirs = pair.ours.figures()[figure], pair.theirs.figures()[figure]
            if ours and theirs:
                ratios.append(theirs / ours if lower_is_better else ours / theirs)
        return _median(ratios)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    middle = median(known)
    return int(middle) if all(isinstance(value, int) for value in known) else middle


def take_turns(
    ours: Side,
    theirs: Side | None,
    prompts: Sequence[Sequence[int]],
    workload: Workload,
    turn_done: Callable[[], None],
) -> Outcome:
    """Run both sides in turn (A B A B ...): a machine that slows down slows both.

    The first `WARM_UPS` pairs, with few new tokens, are not in the outcome.

    Args:
        ours: Us.
        theirs: The peer, or None.
        prompts: Token ids of each session.
        workload: Whose prompts these are.
        turn_done: Called after every run of a side.
    """
    outcome = Outcome()
    for turn in range(WARM_UPS + workload.reps):
        warming_up = turn < WARM_UPS
        new_tokens = workload.new_tokens
        if warming_up:
            new_tokens = min(new_tokens, _WARM_UP_NEW_TOKENS)
        try:
            pair = _take_turn(ours, theirs, prompts, new_tokens, turn_done)
        except EdgeKVError as error:
            if not warming_up:
                outcome.failed += 1
            outcome.errors.append(f"{type(error).__name__}: {error}")
        else:
            if not warming_up:
                outcome.pairs.append(pair)
    return outcome


def _take_turn(
    ours: Side,
    theirs: Side | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    turn_done: Callable[[], None],
) -> Pair:
    gc.collect()
    mine = ours.run(prompts, new_tokens)
    turn_done()
    if theirs is None:
        return Pair(ours=mine, theirs=None)
    gc.collect()
    other = theirs.run(prompts, new_tokens)
    turn_done()
    return Pair(ours=mine, theirs=other)
