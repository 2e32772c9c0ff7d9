"""How sure the model must be of a token over predicted KV for it to be shown ahead of exact KV.

A token is shown while the margin of every token so far reaches a threshold. At the first that does
not, the answer waits for exact KV, and while that comes, from the first token on, it is *asked
again*: the less of the prompt is still predicted, the smaller a margin is enough.

Which threshold keeps the share of corrected answers below what the user allows is known from a
calibration (see `fit/calibrate.py`), and from how many answers were corrected since, of as many as
it foretold.
"""

import bisect
import math
from dataclasses import dataclass, field, replace
from typing import Self

# Parts of what was predicted that are still predicted when an answer is asked again.
ASKED_AGAIN = (0.4, 0.15)
TOKENS_MAX = 16  # of an answer that are shown ahead: as far as a calibration looks
# Answers that count as corrected and as foretold to be from the beginning, so that the first ones
# do not decide; and after how many foretold ones half of all are forgotten.
_PRIOR = 3.0
_FOREGONE = 50.0


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What is known of a predictor's answers. A value; its keeper replaces it.

    Attributes:
        num_answers: Of the calibration; 0 for a predictor that was never calibrated.
        critical: Of those that some threshold does not keep from being corrected, the largest such
            threshold, ascending.
        corrected, foretold: Answers since, and how many the calibration would have expected.
    """

    num_answers: int = 0
    critical: tuple[float, ...] = field(default=(), repr=False)
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

    def share_corrected(self, threshold: float) -> float:
        """Of all answers, those that are corrected with a threshold, as calibrated."""
        exceeding = len(self.critical) - bisect.bisect_left(self.critical, threshold)
        return (exceeding + 1) / (self.num_answers + 1)

    @property
    def factor(self) -> float:
        """How many times as many answers are corrected here as in the calibration."""
        return (_PRIOR + self.corrected) / (_PRIOR + self.foretold)

    def threshold(self, corrected_max: float) -> float:
        """The least margin that keeps the share of corrected answers; infinite if none does."""
        allowed = corrected_max / self.factor * (self.num_answers + 1) - 1
        if not self.num_answers or allowed < 0:
            return math.inf
        num_below = len(self.critical) - math.floor(allowed)
        # Just above the critical margin of the last answer that must not be corrected.
        return math.nextafter(self.critical[num_below - 1], math.inf) if num_below > 0 else 0.0

    def after(self, *, threshold: float, corrected: bool) -> "Gate":
        """Once another answer was shown ahead, or held back, with a threshold."""
        if math.isinf(threshold):
            return self
        kept = 0.5 if self.foretold > _FOREGONE else 1.0
        return replace(
            self,
            corrected=kept * self.corrected + corrected,
            foretold=kept * self.foretold + self.share_corrected(threshold),
        )


def margin_share(predicted_share: float) -> float:
    """Part of the threshold that is enough while that part of what was predicted is predicted.

    Errors of many tokens' KV add up as independent ones do (measured: see docs/prediction.md).
    """
    return math.sqrt(predicted_share)


NO_ANSWERS = Gate()  # never calibrated: nothing is shown ahead
