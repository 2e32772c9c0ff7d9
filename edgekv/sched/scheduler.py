"""The plan of the next step: who decodes, who prefills how many rows, who gets memory. Pure.

Decoding sessions all take part in every step: a row more costs little once the weights are read.
Prefill fills the step up to the time between tokens that the decoding sessions are promised
(chunked prefill, Sarathi-Serve, arXiv 2403.02310). Among prompts the one that is soonest done goes
first, less the time it has waited: short prompts overtake long ones, but none waits longer behind
later ones than its own prefill takes. The interactive class goes before the background class, which
ages into it.
"""

from dataclasses import dataclass

from edgekv.sched.cost import EMPTY_STEP, CostModel, StepShape
from edgekv.sched.memory import plan_memory
from edgekv.sched.plan import MemoryPlan, RequestState, SegmentPlan, Snapshot, StepPlan

TARGET_MARGIN = 0.85  # of the target: an estimate is an estimate
PROGRESS_MARGIN = 1.0  # of the target: allowed where that leaves room for few rows only
PROGRESS_ROWS = 16  # few rows
BACKGROUND_PATIENCE_MS = 30_000.0  # after which background work counts as interactive


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step.

    Attributes:
        tbt_target_ms: Time that a step with decoding sessions should take at most.
        prefill_rows_max: Prefill rows of one step.
    """

    tbt_target_ms: float
    prefill_rows_max: int


def plan_step(
    now_ms: float, snapshot: Snapshot, cost: CostModel, config: SchedulerConfig
) -> StepPlan:
    """Decide the next step.

    Where memory must change first, the plan holds only that: the caller carries it out and asks
    again, so that segments are always planned for buffers that exist.
    """
    order = sorted(snapshot.requests, key=lambda r: _urgency(now_ms, r, cost))
    memory = plan_memory(snapshot, order)
    if memory:
        return StepPlan(memory=memory)
    ready = [r for r in order if r.admitted and r.num_remaining > 0]
    decode, shape = _decode_segments([r for r in ready if r.decoding])
    waiting = [r for r in ready if not r.decoding]
    return StepPlan(
        memory=MemoryPlan(),
        segments=decode + _prefill_segments(waiting, shape, cost, config),
    )


def _urgency(now_ms: float, request: RequestState, cost: CostModel) -> tuple[int, float, float]:
    """Sort key: class, then milliseconds of prefill left minus milliseconds waited."""
    left = EMPTY_STEP.plus(max(0, request.num_remaining), request.num_computed)
    waited_ms = now_ms - request.arrival_ms
    urgent = request.priority == "interactive" or waited_ms >= BACKGROUND_PATIENCE_MS
    return (0 if urgent else 1, cost.predict_ms(left) - waited_ms, request.arrival_ms)


def _decode_segments(
    decoding: list[RequestState],
) -> tuple[tuple[SegmentPlan, ...], StepShape]:
    shape = EMPTY_STEP
    segments = []
    # By id, not by urgency: a batch whose rows keep their places reuses the step before's tokens.
    for request in sorted(decoding, key=lambda r: r.request_id):
        shape = shape.plus(1, request.num_computed)
        segments.append(_segment(request, 1))
    return tuple(segments), shape


def _prefill_segments(
    waiting: list[RequestState], shape: StepShape, cost: CostModel, config: SchedulerConfig
) -> tuple[SegmentPlan, ...]:
    someone_decodes = shape.num_rows > 0
    rows_left = config.prefill_rows_max
    segments: list[SegmentPlan] = []
    for request in waiting:
        num_rows = min(rows_left, request.num_remaining)
        if someone_decodes and num_rows:
            num_rows = _rows_beside(
                shape, request, num_rows, cost, config.tbt_target_ms, first=not segments
            )
        if num_rows == 0:
            break
        shape = shape.plus(num_rows, request.num_computed)
        rows_left -= num_rows
        segments.append(_segment(request, num_rows))
    return tuple(segments)


def _rows_beside(
    shape: StepShape,
    request: RequestState,
    rows_max: int,
    cost: CostModel,
    target_ms: float,
    *,
    first: bool,
) -> int:
    """Prefill rows beside decoding sessions: what the target allows, and some progress always."""

    def within(budget_ms: float, limit: int) -> int:
        return cost.rows_within(budget_ms, shape, offset=request.num_computed, rows_max=limit)

    num_rows = within(TARGET_MARGIN * target_ms, rows_max)
    if num_rows >= PROGRESS_ROWS or not first:
        return num_rows
    few = within(PROGRESS_MARGIN * target_ms, min(rows_max, PROGRESS_ROWS))
    return max(num_rows, few, 1)


def _segment(request: RequestState, num_rows: int) -> SegmentPlan:
    end = request.num_computed + num_rows
    return SegmentPlan(
        request_id=request.request_id,
        start=request.num_computed,
        end=end,
        samples=end == request.num_tokens,
    )
