"""Which rows a step computes, and how many, so that it ends in time. Pure.

In front are all requests but those that the policy puts into the background; under a policy
without classes, all.

* All in front that decode take part: a row more costs little once the weights are read. Tokens
  that a grammar forced behind the last may be many rows: all of one of them, and of others what
  still fits the time between tokens that they are promised.
* Prefill in front fills the step up to the time between tokens that they are promised (chunked
  prefill, Sarathi-Serve, arXiv 2403.02310), or without bound if none decodes.
* Background rows take what is left of that time. They never make a prefill in front wait for
  theirs: then only those that decode join, within a small share of the step.
* Repair (making KV exact) takes what is left of that time when nobody prefills; or, if it is eager,
  goes before prefill.
* A step of background rows alone is bounded while interactive work may come at any time, because
  who comes must wait for its end.
"""

from collections.abc import Sequence
from functools import partial

from edgekv.sched.cost import EMPTY_STEP, CostModel, StepShape
from edgekv.sched.plan import RepairPlan, RepairState, RequestState, SegmentPlan, Snapshot, StepPlan

PREFILL_SHARE_MIN = 0.1
# Of the most rows of a step, so many more join it if they are a prompt's last: alone they would
# read all weights for little (13 rows of 135M parameters took a quarter of what 256 took).
TAIL_SHARE = 1 / 8
# The target where the user gave none: 100 ms, which nobody sees as a pause, or as much as so many
# steps of the rows that decode, whichever is more. Where one row alone takes 80 ms, a target of 100
# left prefill beside it 5 ms, and background work 0.61 of its throughput. Steps as they usually
# are: work that slows down those of this moment must not raise the target that bounds it.
TARGET_MIN_MS = 100.0
TARGET_STEPS = 2.0
REPAIR_ROWS_MIN = 16  # of a session whose first token waits for them
# Of a step with prefill in front, for background rows that decode: a long prompt's steps have room
# for some, a short one's have none, and it is answered sooner by a tenth.
BACKGROUND_SHARE = 0.05
# Of a step that decodes, for repair where the target leaves it nothing: it ends some time.
REPAIR_SHARE = 0.2
# So long after its last interactive request the next one is expected: most people come back within
# a minute. With 10 s, one request in twelve of somebody who reads for 4 s on average met a step of
# 900 ms.
ATTENTION_MS = 60_000.0
# Then a step of background rows alone takes as long as so many steps of one row: three quarters of
# it are of use, and who comes waits for it about as long as its own first step takes. With 4 the
# background's throughput falls below 0.9 of what it is without bounds (simulated, slow machine).
ARRIVAL_STEPS = 4.25


class StepDraft:
    """Segments of a step as they are chosen. Owned by the planner that fills it."""

    def __init__(self, cost: CostModel, rows_max: int) -> None:
        self._cost = cost
        self._room = float(rows_max)
        self._tail = int(TAIL_SHARE * rows_max)
        self.decode: list[SegmentPlan] = []
        self.prefill: list[SegmentPlan] = []
        self.repairs: list[RepairPlan] = []
        self._shape = EMPTY_STEP

    @property
    def step_ms(self) -> float:
        """What the step will take."""
        return self._cost.step_ms(self._shape)

    def segments(self) -> tuple[SegmentPlan, ...]:
        """Of those that decode first.

        By id, not by urgency: a batch whose rows keep their places reuses the step before's tokens.
        """
        return (*sorted(self.decode, key=lambda s: s.request_id), *self.prefill)

    def join(self, decoding: Sequence[RequestState], limit_ms: float | None) -> None:
        """Let those take part that decode, while the step stays within the limit.

        Of one with forced tokens all rows or, where these do not fit, the first.
        """
        for request in decoding:
            for num_rows in dict.fromkeys((request.num_remaining, 1)):
                segment = request.segment(num_rows)
                shape = segment.added_to(self._shape)
                if limit_ms is None or self._cost.step_ms(shape) <= limit_ms:
                    self.decode.append(segment)
                    self._shape = shape
                    break

    def join_all(self, decoding: Sequence[RequestState], target_ms: float) -> None:
        """Let all take part that decode; of forced tokens the first's, and what fits the target."""
        self.join([r for r in decoding if r.num_remaining == 1], None)
        forced = [r for r in decoding if r.num_remaining > 1]
        self.join(forced[:1], None)
        within_ms = self._cost.may_take_ms(target_ms)
        for i, request in enumerate(forced[1:], 2):
            shape_of = partial(self._beside, request, len(forced) - i)
            num_rows = self._cost.rows_within(within_ms, shape_of, request.num_remaining)
            segment = request.segment(max(1, num_rows))
            self.decode.append(segment)
            self._shape = segment.added_to(self._shape)

    def _beside(self, request: RequestState, num_others: int, num_rows: int) -> StepShape:
        """The step with so many rows of a request, and one of each of others that follow."""
        return request.segment(num_rows).added_to(self._shape).plus(num_others, request.num_tokens)

    def fill(self, prefilling: Sequence[RequestState], limit_ms: float | None) -> None:
        """Add prefill rows in order while the step stays near the limit; some progress always."""
        for request in prefilling:
            if self._room < 1:
                return
            num_rows = left = min(request.num_rows_left, request.rows_max)
            if request.room(left) > self._room + self._tail:
                num_rows = min(left, max(1, request.rows_in(self._room)))
            if limit_ms is not None:
                num_rows = self._rows_within(limit_ms, request, num_rows)
            if num_rows == 0:
                return
            segment = request.segment(num_rows)
            self._shape = segment.added_to(self._shape)
            self._room -= request.room(num_rows)
            self.prefill.append(segment)

    def repair(
        self, sessions: Sequence[RepairState], limit_ms: float | None, *, rows_min: int = 0
    ) -> None:
        """Add repairs while the step stays within the limit; `rows_min` of the first anyhow."""
        for session in sessions:
            wanted = min(max(0, int(self._room)), session.end - session.start)
            num_rows = wanted
            if limit_ms is not None:
                within = self._cost.rows_within(limit_ms, partial(self._repaired, session), wanted)
                num_rows = max(within, 0 if self.repairs else min(rows_min, wanted))
            if num_rows == 0:
                return
            self._shape = self._repaired(session, num_rows)
            self._room -= num_rows
            self.repairs.append(session.plan(num_rows))

    def _repaired(self, session: RepairState, num_rows: int) -> StepShape:
        return session.plan(num_rows).added_to(self._shape)

    def _rows_within(self, limit_ms: float, request: RequestState, rows_max: int) -> int:
        within_ms = self._cost.may_take_ms(limit_ms)
        num_rows = self._cost.rows_within(
            within_ms, lambda n: request.segment(n).added_to(self._shape), rows_max
        )
        return num_rows if self.prefill else max(1, num_rows)


def compose(
    front: Sequence[RequestState],
    back: Sequence[RequestState],
    cost: CostModel,
    *,
    tbt_target_ms: float | None,
    rows_max: int,
    arrivals_expected: bool,
    repairs: Sequence[RepairState] = (),
) -> StepPlan:
    """The segments of a step, and the repairs that go with them.

    `front` may compute, most urgent first, as `repairs`; `back` gets what the others leave. A step
    has room for `rows_max` rows of prefill, but for a tail; `tbt_target_ms` is what `tbt_target` is
    configured with.
    """
    step = StepDraft(cost, rows_max)
    foremost = [r for r in front if r.decoding]
    promised_ms = tbt_target(foremost, cost, tbt_target_ms)
    step.join_all(foremost, promised_ms)
    target_ms = promised_ms if step.decode else None
    step.repair([r for r in repairs if r.eager], target_ms, rows_min=REPAIR_ROWS_MIN)
    step.fill([r for r in front if not r.decoding], target_ms)
    # Who had no row for longest first, for not all may fit.
    decoding = sorted((r for r in back if r.decoding), key=_last_served)
    prefilling = [r for r in back if not r.decoding]
    if step.prefill:
        share_ms = (1.0 + BACKGROUND_SHARE) * step.step_ms
        step.join(decoding, max(share_ms, cost.may_take_ms(promised_ms)))
    elif step.decode:
        step.join(decoding, cost.may_take_ms(promised_ms))
        step.fill(prefilling, promised_ms)
    else:
        one_row_ms = cost.step_ms(EMPTY_STEP.plus(1, 0))
        limit_ms = ARRIVAL_STEPS * one_row_ms if arrivals_expected else None
        step.join(decoding[:1], None)
        step.join(decoding[1:], limit_ms)
        step.fill(prefilling, limit_ms)
        target_ms = limit_ms
    if not step.prefill:
        if target_ms is not None:
            target_ms = max(cost.may_take_ms(target_ms), (1.0 + REPAIR_SHARE) * step.step_ms)
        alone = not step.decode and not step.repairs
        step.repair([r for r in repairs if not r.eager], target_ms, rows_min=int(alone))
    return StepPlan(segments=step.segments(), repairs=tuple(step.repairs))


def tbt_target(
    decoding: Sequence[RequestState], cost: CostModel, configured_ms: float | None
) -> float:
    """Milliseconds between tokens that those who decode in front, or would, are promised.

    `configured_ms` is what the user gave, which is absolute; None is what the device can do.
    """
    if configured_ms is not None:
        return configured_ms
    return max(TARGET_MIN_MS, TARGET_STEPS * cost.undisturbed_ms(_decode_shape(decoding)))


def _decode_shape(decoding: Sequence[RequestState]) -> StepShape:
    shape = EMPTY_STEP
    for request in decoding:
        shape = request.segment(1).added_to(shape)
    return shape if decoding else EMPTY_STEP.plus(1, 0)


def prefill_share(decoding: Sequence[RequestState], cost: CostModel, target_ms: float) -> float:
    """Part of the time, at least a tenth, that steps have for prefill beside who decodes."""
    if not decoding:
        return 1.0
    used_ms = cost.between_ms + cost.spread * cost.step_ms(_decode_shape(decoding))
    return max(PREFILL_SHARE_MIN, 1.0 - used_ms / target_ms)


def arrivals_expected(snapshot: Snapshot, now_ms: float) -> bool:
    """Whether interactive work is there, or was a short while ago."""
    if now_ms - snapshot.attended_ms < ATTENTION_MS:
        return True
    return any(r.priority == "interactive" for r in snapshot.requests)


def _last_served(request: RequestState) -> float:
    return float("-inf") if request.served_ms is None else request.served_ms
