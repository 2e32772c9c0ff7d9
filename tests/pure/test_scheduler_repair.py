"""Repair of predicted KV: in what time is left, or before others, and never without bound."""

from dataclasses import replace

from sched_sim import MACHINE

from edgekv.ids import RequestId, SessionId
from edgekv.sched.compose import (
    REPAIR_ROWS_MIN,
    REPAIR_SHARE,
    StepDraft,
    compose,
    prefill_share,
    tbt_target,
)
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.plan import RepairState, RequestState

TARGET_MS = 100.0


def repair(end=1000, *, eager=False):
    return RepairState(session_id=SessionId(1), app="a", start=100, end=end, share=0.5, eager=eager)


def request(*, decoding, cheap=(0, 0)):
    return RequestState(
        request_id=RequestId(1),
        priority="interactive",
        arrival_ms=0.0,
        admitted=True,
        held_capacity=4096,
        num_tokens=401 if decoding else 400,
        num_computed=400 if decoding else 0,
        num_prompt=400,
        reserve_tokens=1,
        cheap=cheap,
        cheap_share=0.5,
    )


def plan(front, repairs, cost=MACHINE, rows_max=256):
    return compose(
        front,
        [],
        cost,
        tbt_target_ms=TARGET_MS,
        rows_max=rows_max,
        arrivals_expected=False,
        repairs=repairs,
    )


def predicted_ms(plan, cost=MACHINE):
    shape = EMPTY_STEP
    for part in (*plan.segments, *plan.repairs):
        shape = part.added_to(shape)
    return cost.step_ms(shape)


def test_an_auxiliary_that_lags_behind_catches_up_in_bounded_steps():
    waiting = replace(request(decoding=False, cheap=(4, 368)), num_extra=1000)
    assert waiting.num_rows_left == 1400
    (segment,) = plan([waiting], []).segments
    assert (segment.num_extra, segment.num_rows, segment.num_cheap) == (256, 0, 0)
    assert not segment.samples
    other = replace(request(decoding=True), request_id=RequestId(2))
    beside = plan([waiting, other], [])
    assert 0 < max(s.num_extra for s in beside.segments) < 1000
    assert predicted_ms(beside) <= TARGET_MS
    (last,) = plan([replace(waiting, num_extra=10)], []).segments
    assert (last.num_extra, last.start, last.end, last.cheap) == (10, 0, 246, (4, 246))


def test_idle_repair_fills_what_the_target_leaves():
    found = plan([request(decoding=True)], [repair()])
    (repaired,) = found.repairs
    assert (repaired.start, repaired.num_rows > 0) == (100, True)
    assert predicted_ms(found) <= TARGET_MS


def test_idle_repair_waits_for_prefill_and_eager_repair_does_not():
    assert plan([request(decoding=False)], [repair()]).repairs == ()
    found = plan([request(decoding=False)], [repair(eager=True)])
    assert found.repairs[0].num_rows == 256  # nobody decodes: the step is its own


def test_alone_it_takes_all_rows_there_are():
    assert plan([], [repair(end=150)]).repairs[0].end == 150
    assert plan([], [repair()]).repairs[0].num_rows == 256


def test_alone_it_never_stands_still():
    """However little the estimate thinks of it: nothing else would move it on."""
    dear = CostModel(weights=(500.0, 100.0, 10.0))
    draft = StepDraft(dear, 256)
    draft.repair([repair()], 100.0, rows_min=1)
    assert draft.repairs[0].num_rows == 1
    waiting = compose(
        [],
        [],
        dear,
        tbt_target_ms=TARGET_MS,
        rows_max=256,
        arrivals_expected=True,
        repairs=[repair()],
    )
    assert waiting.repairs[0].num_rows >= 1


def test_where_decoding_alone_misses_the_target_it_ends_all_the_same():
    slow = MACHINE.observe(EMPTY_STEP.plus(1, 400), 300.0)
    alone_ms = predicted_ms(plan([request(decoding=True)], [], slow), slow)
    assert alone_ms > TARGET_MS
    found = plan([request(decoding=True)], [repair()], slow)
    assert predicted_ms(found, slow) <= (1 + REPAIR_SHARE) * alone_ms + 1e-6
    eager = plan([request(decoding=True)], [repair(eager=True)], slow)
    assert eager.repairs[0].num_rows >= REPAIR_ROWS_MIN


def test_a_segment_knows_which_of_its_rows_are_predicted():
    state = request(decoding=False, cheap=(4, 368))
    whole, first = state.segment(400), state.segment(100)
    assert (whole.cheap, whole.num_cheap, whole.samples) == ((4, 368), 364, True)
    assert (first.cheap, first.samples) == ((4, 100), False)
    exact = request(decoding=False).segment(400)
    assert exact.num_cheap == 0
    assert whole.added_to(EMPTY_STEP).num_rows < exact.added_to(EMPTY_STEP).num_rows


def test_prefill_has_what_decoding_leaves():
    decode = request(decoding=True)
    assert prefill_share([], MACHINE, TARGET_MS) == 1.0
    one, four = (prefill_share([decode] * n, MACHINE, TARGET_MS) for n in (1, 4))
    assert 0.1 < four < one < 1.0
    used_ms = predicted_ms(plan([decode], []))
    assert abs(one - (1 - MACHINE.spread * used_ms / TARGET_MS)) < 1e-9
    slow = CostModel(weights=(1000.0, 1.0, 0.1))
    assert prefill_share([decode], slow, TARGET_MS) == 0.1


def test_predicted_rows_are_planned_more_at_a_time():
    decode = request(decoding=True)
    others = [request(decoding=False), request(decoding=False, cheap=(4, 368))]
    slow = CostModel(weights=(10.0, 1.0, 0.1))
    exact, predicted = (plan([decode, other], [], slow).segments[-1] for other in others)
    assert predicted.num_rows > exact.num_rows


def test_the_default_target_is_what_the_device_can_do():
    row = request(decoding=True)
    quick = CostModel(weights=(20.0, 1.0, 0.0))
    slow = CostModel(weights=(80.0, 1.0, 0.0))
    assert tbt_target([row], quick, None) == tbt_target([], quick, None) == 100.0
    assert tbt_target([row], slow, None) == 162.0
    assert tbt_target([row, row, row], slow, None) == 166.0
    assert tbt_target([row], slow, 30.0) == 30.0  # what the user gives is absolute


def test_rows_beside_who_decodes_are_planned_for_the_default_target():
    slow = CostModel(weights=(80.0, 1.0, 0.0))
    long = replace(request(decoding=False), request_id=RequestId(2))
    (_, prefill) = compose(
        [request(decoding=True), long],
        [],
        slow,
        tbt_target_ms=None,
        rows_max=256,
        arrivals_expected=False,
    ).segments
    assert 81 + prefill.num_rows <= 162
    assert prefill.num_rows > 30  # with a target of 100 there would be room for 19


def test_an_evaluation_is_bounded_in_rows_and_pays_for_its_logits():
    long = replace(request(decoding=False), rows_max=40, row_share=1.5)
    (segment,) = plan([long], []).segments
    assert segment.num_rows == 40
    assert segment.added_to(EMPTY_STEP).num_rows == 60
