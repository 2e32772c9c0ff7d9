"""Answers that begin ahead of exact KV: which tokens are shown, and when they are asked for again.

    first asking ─▶ sure? ─▶ shown ─▶ next token …
         ▲            └ not ─▶ is there hope? ─▶ something is computed, some of that exactly ─┐
         └────────────────────────────┼──────────────────◀─── the last rows again ────────────┘
                                      └ none ─▶ exact KV, which looks at all that was shown

How sure is sure enough says `predict/gate.py`.
"""

import math
from collections.abc import Callable

import numpy as np

from edgekv.config import PredictionOptions
from edgekv.engine.prefill import Unsure
from edgekv.engine.request import Request
from edgekv.kv.provenance import Span, common
from edgekv.predict.gate import ASKED_AGAIN, TOKENS_MAX, Gate, certainty, hope_level, level
from edgekv.predict.look import ROWS_AGAIN, chosen, hopeful_share
from edgekv.sched.cost import EMPTY_STEP, CostModel

# An answer is asked again on the way where what is not exact then takes so many times as long to
# compute as a pass of those rows that ask, as estimated: else there is nothing to gain.
WORTH_ASKING = 2.5


class Ahead:
    """Decides for requests whose prompt is predicted. Owned by the engine thread."""

    def __init__(
        self,
        gate: Gate,
        options: PredictionOptions,
        warm_share: float,
        keep: Callable[[Gate], None],
    ) -> None:
        """`warm_share` is what a row costs whose KV becomes exact.

        `keep` remembers, when the engine ends, what was learned of how sure is sure enough.
        """
        self.gate = self._calibrated = gate
        self._options = options
        self._warm_share = warm_share
        self._keep = keep

    def pays(self, request: Request, span: Span, cost: CostModel) -> bool:
        """Whether enough could be shown ahead if such a span were predicted.

        Answers to shorter prompts than can be asked at all places begin early too seldom: at 512
        tokens and below most of them came later than over exact KV (see README).
        """
        places = self._places(span, len(request.prompt_ids), cost)
        threshold = self.gate.threshold(self._options.corrected_max, len(places))
        is_long = len(places) == len(ASKED_AGAIN)
        return request.shows_ahead and is_long and not math.isinf(threshold)

    def begin(self, request: Request, cost: CostModel) -> None:
        """How sure it must be, and when it may be asked, of a request with a prompt to predict."""
        if not request.confirms or not request.shows_ahead:
            return
        places = self._places(request.predict, len(request.prompt_ids), cost)
        request.certain_min = self.gate.threshold(self._options.corrected_max, len(places))
        if not math.isinf(request.certain_min):
            request.askings = (0, 0, *places)

    def _places(self, span: Span, num_prompt: int, cost: CostModel) -> tuple[int, ...]:
        """How many tokens have to be exact for each time that it is asked on the way to all."""
        start, end = span

        def ms(first: int) -> float:
            return cost.step_ms(EMPTY_STEP.plus(num_prompt - first, first, self._warm_share))

        asking_ms = ms(max(end, num_prompt - ROWS_AGAIN))
        places = [end - int(share * (end - start)) for share in ASKED_AGAIN]
        return tuple(place for place in places if ms(place) >= WORTH_ASKING * asking_ms)

    def goes_ahead(self, request: Request, unsure: Unsure) -> bool:
        """Whether a token may be shown that was sampled over predicted KV."""
        margin, weights = unsure
        if weights is None or request.num_generated >= TOKENS_MAX:
            return False
        if not request.looked_at and self._options.look:
            share = hopeful_share(self._options.look)
            request.looked_at = tuple(chosen(weights, request.predict, share))
        sure = certainty(margin, weights, request.session.kv.provenance)
        return level(sure, request.asking) >= request.certain_min

    def recede(self, request: Request, unsure: Unsure | None) -> int:
        """Its answer waits; return from which token on it is to be computed.

        While there is hope it is asked again before all is exact: part of what is predicted is
        computed as what is looked at is, and the last tokens over it. (All of a layer's KV is
        written before any is read, so one step does both.) Of kind "self" the hidden states are
        kept from which it goes on.
        """
        provenance = request.session.kv.provenance
        exact = provenance.exact_prefix
        number = self._hopeful(request, unsure)
        if not number:
            request.prefill, request.predict, request.look = "exact", (0, 0), ()
            return exact
        place = max(exact, request.askings[number])
        looked_at = common(provenance.spans("predicted", place), request.looked_at)
        request.asking = number
        request.look = (*([(exact, place)] if place > exact else []), *looked_at)
        return self._again_from(request)

    def _hopeful(self, request: Request, unsure: Unsure | None) -> int:
        """Number of the next asking at which it may be sure enough; 0 for none."""
        margin, weights = unsure or (0.0, None)
        if weights is None or request.num_generated >= TOKENS_MAX:
            return 0
        provenance = request.session.kv.provenance
        for number in range(request.asking + 1, len(request.askings)):
            place = request.askings[number]
            hope = certainty(margin, weights, provenance, place, request.looked_at)
            is_nearer = place > provenance.exact_prefix or (number == 1 and request.looked_at)
            if is_nearer and hope_level(hope, number) >= request.certain_min:
                return number
        return 0

    def look(self, request: Request, weights: np.ndarray) -> int:
        """Choose what is computed of what is predicted; return where the window begins."""
        request.looks = False
        request.look = tuple(chosen(weights, request.predict, self._options.look))
        return self._again_from(request)

    @staticmethod
    def _again_from(request: Request) -> int:
        """Of the last tokens, which were computed over what is predicted, a few run again."""
        return max(request.predict[1], len(request.prompt_ids) - ROWS_AGAIN)

    def left(self, request: Request) -> None:
        """Learn from an answer that exact KV has looked at."""
        if request.num_predicted and 0 < request.num_confirmed == request.num_generated:
            corrected = request.num_retracted > 0
            num_places = max(0, len(request.askings) - 2)
            self.gate = self.gate.after(
                threshold=request.certain_min, num_places=num_places, corrected=corrected
            )

    def close(self) -> None:
        """Keep what was learned."""
        if self.gate != self._calibrated:
            self._keep(self.gate)
