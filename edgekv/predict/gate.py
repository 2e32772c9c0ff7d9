"""How sure the model must be of a token over predicted KV for it to be shown ahead of exact KV.

A token is shown while every token so far is sure enough. At the first that is not, the answer is
asked again, if there is hope: first with the KV of those tokens computed to which the prompt's last
one looks most, then on the way to exact KV, and in the end over that. (Without that hope, and with
the second look before the first asking, an answer was late by half as much again; see
docs/prediction.md.)

How sure a token is, is the margin of its logit above the next one's, by how much its row looks at
tokens whose KV is predicted: the less, the smaller a margin is enough. Which threshold keeps the
share of corrected answers below what the user allows is known from a calibration (see
`fit/calibrate.py`), and from how many answers were corrected since, of as many as it foretold.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from edgekv.kv.provenance import ProvenanceMap, Span, common

# Parts of what was predicted that are still predicted when an answer is asked again on the way.
ASKED_AGAIN = (0.5, 0.1)
# By number of an asking (at once, after looking twice, then those on the way): how many times as
# sure a token must be. What comes later gains less time, and must not use up what may be corrected.
STRICTNESS = (1.0, 1.3, 2.0, 3.0)
# It is asked again if with the same margin it would be as sure as this part of what is enough.
HOPE = 0.8
NUM_GATES = 1 + len(ASKED_AGAIN)  # by how many places there are
TOKENS_MAX = 16  # of an answer that are shown ahead: as far as a calibration looks
# Answers that count as corrected and as foretold to be from the beginning, so that the first ones
# do not decide; and after how many foretold ones half of all are forgotten.
_PRIOR = 3.0
_FOREGONE = 50.0
# Added to the part of a row's attention that goes to predicted KV: what is computed over that is
# not exact either. Chosen by measurement, as all constants here; those of them on which what is
# critical depends (and `look.MORE`) may not change without a calibration anew.
_RELIED_MIN = 0.03


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What is known of a predictor's answers. A value; its keeper replaces it.

    Attributes:
        num_answers: Of the calibration; 0 for a predictor that was never calibrated.
        critical: Of each answer that would be corrected at some threshold, the largest such
            threshold, ascending; first for answers that are not asked on the way, then for those
            that are asked at the first place there, and so on.
        corrected, foretold: Answers since, and how many the calibration would have expected.
    """

    num_answers: int = 0
    critical: tuple[tuple[float, ...], ...] = field(default=((),) * NUM_GATES, repr=False)
    corrected: float = 0.0
    foretold: float = 0.0

    def with_experience(self, noted: object) -> Self:
        """The same with what `experience` noted; as it is, where that makes no sense."""
        match noted:
            case [int() | float() as corrected, int() | float() as foretold]:
                if 0 <= corrected < math.inf and 0 <= foretold < math.inf:
                    return replace(self, corrected=corrected, foretold=foretold)
        return self

    @property
    def experience(self) -> list[float]:
        """What was learned since the calibration, for JSON."""
        return [self.corrected, self.foretold]

    def share_corrected(self, threshold: float, num_places: int) -> float:
        """Of answers that are asked at so many places, those that are corrected, as calibrated."""
        critical = self.critical[num_places]
        exceeding = len(critical) - bisect.bisect_left(critical, threshold)
        return (exceeding + 1) / (self.num_answers + 1)

    @property
    def factor(self) -> float:
        """How many times as many answers are corrected here as in the calibration."""
        return (_PRIOR + self.corrected) / (_PRIOR + self.foretold)

    def threshold(self, corrected_max: float, num_places: int) -> float:
        """How sure is sure enough for the share of corrected answers; infinite if nothing is."""
        allowed = corrected_max / self.factor * (self.num_answers + 1) - 1
        if not self.num_answers or allowed < 0:
            return math.inf
        critical = self.critical[num_places]
        num_below = len(critical) - math.floor(allowed)
        # Just above what is critical for the last answer that must not be corrected.
        return math.nextafter(critical[num_below - 1], math.inf) if num_below > 0 else 0.0

    def after(self, *, threshold: float, num_places: int, corrected: bool) -> "Gate":
        """Once another answer was shown ahead, or held back, with a threshold."""
        if math.isinf(threshold):
            return self
        kept = 0.5 if self.foretold > _FOREGONE else 1.0
        return replace(
            self,
            corrected=kept * self.corrected + corrected,
            foretold=kept * self.foretold + self.share_corrected(threshold, num_places),
        )


def certainty(
    margin: float,
    weights: np.ndarray,
    provenance: ProvenanceMap,
    place: int = 0,
    computed: Sequence[Span] = (),
) -> float:
    """How sure a token is: its margin in nats, by how much its row looks at predicted KV.

    Of what else was tried nothing told more: entropy, position, the share of the prompt that is
    predicted (measured: see docs/prediction.md).

    Args:
        margin: Of its logit above the next one's.
        weights: `(T,)`, of `look.Glance`.
        provenance: Of what it looks at.
        place: As if so many tokens were exact,
        computed: and these were computed.
    """
    predicted = provenance.spans("predicted", place)
    relied = _sum(weights, predicted) - _sum(weights, common(predicted, computed))
    return margin / (relied + _RELIED_MIN)


def level(certain: float, number: int) -> float:
    """The highest threshold that a token passes at an asking."""
    return certain / STRICTNESS[number]


def hope_level(certain: float, number: int) -> float:
    """The highest threshold with which there is hope for a token at a later asking.

    `certain` is how sure it would be there with the same margin.
    """
    return certain / (HOPE * STRICTNESS[number])


def _sum(weights: np.ndarray, spans: Sequence[Span]) -> float:
    return sum(float(weights[start:end].sum()) for start, end in spans)


NO_ANSWERS = Gate()  # never calibrated: nothing is shown ahead
