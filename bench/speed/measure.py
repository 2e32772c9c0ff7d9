"""How it is measured: one run's figures, sides in turn, medians over pairs. Pure.

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
from typing import Any

from edgekv.bench.figures import ratio
from edgekv.bench.workload import Workload
from edgekv.errors import EdgeKVError
from edgekv.metrics import percentile

WARM_UPS = 1
_WARM_UP_NEW_TOKENS = 8

Times = tuple[float, ...]  # milliseconds at which one session's tokens of a phase came


@dataclass(frozen=True, kw_only=True)
class SideRun:
    """One run of one side."""

    num_prompt_tokens: int  # of all sessions together
    ttft_ms: Times  # submit to first token, by session
    # The same for a prompt whose KV is in memory but for the last token, by session; empty where a
    # side has no such request.
    warm_ttft_ms: Times
    # When tokens of the cold phase came, from its submission, by session.
    cold_ms: tuple[Times, ...]
    # When those of the decode phase came, by session, from a common zero.
    decode_ms: tuple[Times, ...]
    peak_memory_bytes: int  # MLX memory at its peak, the other side's weights not counted
    tokens: tuple[tuple[int, ...], ...]  # what each session generated in both phases
    num_predicted: int = 0  # prompt tokens of the cold phase whose KV was predicted

    def figures(self) -> dict[str, float | None]:
        """This run's figures by the names they have in a report."""
        cold_tokens = sum(map(len, self.cold_ms))
        gaps = [_gaps(times) for times in self.decode_ms]
        return {
            "ttft_ms_min": min(self.ttft_ms),
            "ttft_ms_p50": median(self.ttft_ms),
            "ttft_ms_max": max(self.ttft_ms),
            "ttft_warm_ms_p50": median(self.warm_ttft_ms) if self.warm_ttft_ms else None,
            "prefill_tokens_per_s": 1e3 * self.num_prompt_tokens / max(self.ttft_ms),
            "e2e_tokens_per_s": 1e3 * cold_tokens / max(times[-1] for times in self.cold_ms),
            "cold_tbt_max_ms": max(max(_gaps(times), default=0.0) for times in self.cold_ms),
            "decode_tokens_per_s": decode_rate(self.decode_ms),
            "tbt_p50_ms": median(percentile(each, 50) for each in gaps),
            "tbt_max_ms": max(max(each, default=0.0) for each in gaps),
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Raw figures, for JSON."""
        return {**self.figures(), "ttft_ms": list(self.ttft_ms)}


def _gaps(times_ms: Times) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times_ms)]


def decode_rate(times_ms: Sequence[Times]) -> float:
    """Tokens per second of sessions that decode together, see the module's text."""
    span_ms = max(times[-1] for times in times_ms) - min(times[0] for times in times_ms)
    return 1e3 * sum(len(times) - 1 for times in times_ms) / span_ms


# Both phases of one side for prompts and a number of new tokens, with nothing cached from before;
# raises EdgeKVError where the run failed.
Side = Callable[[Sequence[Sequence[int]], int], SideRun]


@dataclass(kw_only=True)
class Outcome:
    """All turns of one workload. A turn that failed is counted, and its error kept."""

    # One run of us, and one of the peer where there is one.
    turns: list[list[SideRun]] = field(default_factory=list)
    failed: int = 0  # turns that are missing
    errors: list[str] = field(default_factory=list)  # of those, and of warm-ups

    def ours(self, figure: str) -> float | None:
        """Median over our runs of one figure."""
        return _median([turn[0].figures()[figure] for turn in self.turns])

    def theirs(self, figure: str) -> float | None:
        """Median over the peer's runs of one figure."""
        return _median([theirs.figures()[figure] for _, theirs in self._pairs()])

    def ratio(self, figure: str, *, lower_is_better: bool = False) -> float | None:
        """Median over pairs of ours to theirs, turned so that more is better for us."""
        found = []
        for pair in self._pairs():
            ours, theirs = (run.figures()[figure] for run in pair)
            if ours and theirs:
                found.append(ratio(theirs, ours) if lower_is_better else ratio(ours, theirs))
        return _median(found)

    def agreement(self) -> float | None:
        """The least that a pair agrees: tokens before a session's first difference, to all.

        The guard that like is compared with like. Greedy text of the same weights differs only
        where two tokens tie within rounding; from there on the sessions part.
        """
        return min((_agreement(*pair) for pair in self._pairs()), default=None)

    def samples(self) -> list[dict[str, Any]]:
        """Raw figures of all turns, for JSON."""
        return [
            {"ours": turn[0].to_dict(), "theirs": turn[1].to_dict() if turn[1:] else None}
            for turn in self.turns
        ]

    def _pairs(self) -> list[tuple[SideRun, SideRun]]:
        return [(turn[0], turn[1]) for turn in self.turns if len(turn) > 1]


def _agreement(ours: SideRun, theirs: SideRun) -> float:
    same = 0
    for mine, other in zip(ours.tokens, theirs.tokens, strict=True):
        pairs = zip(mine, other, strict=False)
        same += len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return same / sum(map(len, ours.tokens))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    middle = median(known)
    return int(middle) if all(isinstance(value, int) for value in known) else middle


def take_turns(
    sides: Sequence[Side],
    prompts: Sequence[Sequence[int]],
    workload: Workload,
    turn_done: Callable[[], None],
) -> Outcome:
    """Run all sides in turn (A B A B ...): a machine that slows down slows both.

    The first `WARM_UPS` turns, with few new tokens, are not in the outcome.
    """
    outcome = Outcome()
    for number in range(WARM_UPS + workload.reps):
        warming_up = number < WARM_UPS
        new_tokens = workload.new_tokens
        if warming_up:
            new_tokens = min(new_tokens, _WARM_UP_NEW_TOKENS)
        turn = []
        try:
            for side in sides:
                gc.collect()
                turn.append(side(prompts, new_tokens))
                turn_done()
        except EdgeKVError as error:
            outcome.failed += not warming_up
            outcome.errors.append(f"{type(error).__name__}: {error}")
            continue
        if not warming_up:
            outcome.turns.append(turn)
    return outcome
