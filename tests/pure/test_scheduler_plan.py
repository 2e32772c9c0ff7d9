"""What one plan holds: who decodes, who prefills how much, in which order."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_sim import MACHINE, Simulation

from edgekv.ids import RequestId
from edgekv.kv.layout import Heads, KVLayout, PoolSnapshot
from edgekv.sched.compose import (
    ARRIVAL_STEPS,
    ATTENTION_MS,
    BACKGROUND_SHARE,
    TAIL_SHARE,
    StepDraft,
)
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.fairness import PATIENCE_MS
from edgekv.sched.plan import AppState, RequestState, Snapshot
from edgekv.sched.policy import FcfsPolicy
from edgekv.sched.scheduler import SchedulerConfig, plan_step

LAYOUT = KVLayout(heads=(Heads(2, 64, 64), Heads(2, 64, 64)), dtype_bytes=4, context_max=1 << 16)
CONFIG = SchedulerConfig(tbt_target_ms=60.0, prefill_rows_max=256)
NO_POOL = PoolSnapshot(budget_bytes=1 << 40, used_bytes=0, free_bytes=0, peak_bytes=0)


def request(number: int, num_prompt: int, **changes) -> RequestState:
    """An admitted request that has computed nothing, unless told otherwise."""
    fields = {
        "request_id": RequestId(number),
        "priority": "interactive",
        "arrival_ms": 0.0,
        "admitted": True,
        "held_capacity": 1 << 16,
        "num_tokens": num_prompt,
        "num_computed": 0,
        "num_prompt": num_prompt,
        "reserve_tokens": 0,
    }
    return RequestState(**(fields | changes))


def decoding(number: int, num_tokens: int = 100, **changes) -> RequestState:
    fields = {"num_tokens": num_tokens, "num_computed": num_tokens - 1, "num_prompt": 50}
    return request(number, **(fields | changes))


def segments(
    *requests: RequestState,
    now_ms=0.0,
    config=CONFIG,
    cost: CostModel = MACHINE,
    apps=None,
    attended_ms=float("-inf"),
):
    snapshot = Snapshot(
        requests=requests,
        idle=(),
        pool=NO_POOL,
        layout=LAYOUT,
        apps=apps or {},
        attended_ms=attended_ms,
    )
    plan = plan_step(now_ms, snapshot, cost, config)
    assert not plan.memory
    return [(s.request_id, s.start, s.end, s.samples) for s in plan.segments]


class TestDecode:
    def test_all_take_part_in_the_order_of_their_ids(self):
        """Rows that keep their places can take their tokens from the step before as they are."""
        plan = segments(decoding(3, arrival_ms=1.0), decoding(1, 80), decoding(2, 90))
        assert plan == [(1, 79, 80, True), (2, 89, 90, True), (3, 99, 100, True)]

    def test_hundreds_still_all_take_part(self):
        config = SchedulerConfig(tbt_target_ms=1.0, prefill_rows_max=8)
        plan = segments(*(decoding(i) for i in range(300)), config=config)
        assert [s[0] for s in plan] == list(range(300))

    def test_a_request_that_waits_for_its_token_has_nothing_to_do(self):
        assert segments(decoding(1, 80, num_computed=80), decoding(2)) == [(2, 99, 100, True)]

    def test_the_last_row_of_a_prompt_is_prefill(self):
        """One row is left, but no token was sampled: it is not owed a place in every step."""
        assert not request(1, 50, num_computed=49).decoding
        assert decoding(1).decoding

    def test_a_preempted_request_does_not_decode(self):
        assert not decoding(1, admitted=False).decoding
        assert decoding(1, 100, num_computed=95, num_forced=4).decoding
        assert not decoding(1, 100, num_computed=94, num_forced=4).decoding


class TestPrefill:
    def test_alone_it_fills_the_step(self):
        assert segments(request(1, 1000)) == [(1, 0, 256, False)]
        assert segments(request(1, 1000, num_computed=800)) == [(1, 800, 1000, True)]

    def test_a_few_last_rows_are_no_step_of_their_own(self):
        assert segments(request(1, 288)) == [(1, 0, 288, True)]
        assert segments(request(1, 289)) == [(1, 0, 256, False)]
        assert segments(request(1, 280), request(2, 10)) == [(2, 0, 10, True), (1, 0, 246, False)]
        assert segments(request(1, 256), request(2, 10)) == [(2, 0, 10, True), (1, 0, 256, True)]
        plan = segments(request(1, 250), request(2, 20), request(3, 280))
        assert plan == [(2, 0, 20, True), (1, 0, 250, True)]

    def test_several_prompts_share_a_step(self):
        plan = segments(request(1, 100), request(2, 50), request(3, 400))
        assert plan == [(2, 0, 50, True), (1, 0, 100, True), (3, 0, 106, False)]

    def test_tokens_that_were_forced_are_rows_of_one_step(self):
        forced = decoding(1, 100, num_computed=95, num_forced=4)
        assert segments(forced, decoding(2, 50))[:2] == [(1, 95, 100, True), (2, 49, 50, True)]

    def test_tokens_forced_of_many_are_no_longer_step_than_is_promised(self):
        """All of one, and at least a row of everybody; what is left is there in the next steps."""
        forced = [decoding(i, 100, num_computed=83, num_forced=16) for i in range(2, 40)]
        plan = segments(decoding(1, 500), *forced)
        rows = {number: end - start for number, start, end, _ in plan}
        assert list(rows) == list(range(1, 40))
        assert max(rows.values()) == 17
        assert min(rows.values()) == 1
        assert all(samples == (end == 100) for _, _, end, samples in plan[1:])
        shape = EMPTY_STEP
        for _, start, end, _ in plan:
            shape = shape.plus(end - start, start)
        assert 0.8 * CONFIG.tbt_target_ms < MACHINE.step_ms(shape) <= CONFIG.tbt_target_ms
        slow = SchedulerConfig(tbt_target_ms=1.0, prefill_rows_max=256)
        rows = [end - start for _, start, end, _ in segments(decoding(1), *forced, config=slow)]
        assert rows == [1, 17, *[1] * 37]

    def test_beside_decoding_the_step_meets_the_target(self):
        plan = segments(decoding(1, 500), request(2, 5000))
        shape = EMPTY_STEP.plus(1, 499).plus(plan[1][2], 0)
        assert 0.6 * CONFIG.tbt_target_ms < MACHINE.step_ms(shape) <= CONFIG.tbt_target_ms

    def test_a_higher_target_never_means_a_smaller_chunk(self):
        rows = []
        for target_ms in range(5, 200, 5):
            config = SchedulerConfig(tbt_target_ms=target_ms, prefill_rows_max=256)
            plan = segments(decoding(1, 500), request(2, 5000), config=config)
            rows.append(plan[1][2] - plan[1][1])
        assert rows == sorted(rows)
        assert rows[0] >= 1
        assert rows[-1] == 256

    def test_more_decoding_sessions_never_mean_a_larger_chunk(self):
        rows = []
        for num_decoding in range(1, 200, 20):
            others = [decoding(i, 2000) for i in range(num_decoding)]
            plan = segments(*others, request(1000, 5000))
            rows.append(plan[-1][2])
        assert rows == sorted(rows, reverse=True)
        assert rows[-1] >= 1

    def test_some_progress_even_where_decoding_alone_misses_the_target(self):
        slow = CostModel(weights=(500.0, 1.0, 0.0))
        plan = segments(decoding(1), request(2, 500), request(3, 700), cost=slow)
        assert [s[0] for s in plan] == [1, 2]
        assert plan[1][2] >= 1

    def test_few_rows_where_decoding_alone_is_near_the_target(self):
        near = CostModel(weights=(40.0, 1.0, 0.0))
        limit_ms = CONFIG.tbt_target_ms / near.spread
        rows = segments(decoding(1), request(2, 500), cost=near)[1][2]
        assert rows > 1
        assert 40 + 1 + rows <= limit_ms < 40 + 1 + rows + 1


class TestOrder:
    def test_prefill_goes_in_the_order_of_the_policy(self):
        early = request(1, 4000, num_computed=256)
        late = request(2, 20, arrival_ms=100.0)
        assert segments(early, late)[0] == (2, 0, 20, True)
        fcfs = SchedulerConfig(tbt_target_ms=60.0, prefill_rows_max=256, policy=FcfsPolicy())
        assert segments(early, late, config=fcfs) == [(1, 256, 512, False)]

    def test_equal_requests_go_by_arrival(self):
        plan = segments(request(2, 200), request(1, 200, arrival_ms=5.0), now_ms=5.0)
        assert [s[0] for s in plan] == [2, 1]


class TestOnTheMove:
    def test_who_is_arriving_does_not_compute(self):
        assert segments(request(1, 50, arriving=True), decoding(2)) == [(2, 99, 100, True)]

    def test_a_plan_can_be_to_wait(self):
        assert segments(request(1, 50, arriving=True)) == []
        assert segments(request(1, 50, admitted=False, leaving=True, held_capacity=0)) == []


class TestClasses:
    """What background rows get beside others."""

    TARGET_MS = CONFIG.tbt_target_ms

    def background(self, number: int, num_prompt: int, **changes) -> RequestState:
        return request(number, num_prompt, priority="background", app="batch", **changes)

    def background_decoding(self, number: int, **changes) -> RequestState:
        return decoding(number, priority="background", app="batch", **changes)

    def predicted_ms(self, plan, cost: CostModel = MACHINE) -> float:
        shape = EMPTY_STEP
        for _, start, end, _ in plan:
            shape = shape.plus(end - start, start)
        return cost.step_ms(shape)

    def test_forced_rows_that_do_not_fit_leave_a_place_for_the_first(self):
        config = replace(CONFIG, tbt_target_ms=1.0)
        forced = [
            self.background_decoding(i, num_computed=83, num_forced=16) for i in range(2, 300)
        ]
        rows = [end - start for _, start, end, _ in segments(decoding(1), *forced, config=CONFIG)]
        assert rows[0] == 1
        assert {1, 17} <= set(rows)
        plain = [self.background_decoding(i) for i in range(2, 300)]
        for limits in (CONFIG, config):
            has_row = [bool(segments(decoding(1), *b, config=limits)[1:]) for b in (plain, forced)]
            assert has_row[0] == has_row[1]

    def test_a_background_prefill_waits_while_an_interactive_one_is_there(self):
        """Its rows would make the first token later, for a little throughput."""
        assert segments(request(1, 20), self.background(2, 20)) == [(1, 0, 20, True)]

    def test_it_fills_up_steps_in_which_interactive_sessions_decode(self):
        plan = segments(decoding(1), self.background(2, 5000))
        assert plan[1][2] > 100
        assert self.predicted_ms(plan) <= self.TARGET_MS

    def test_background_sessions_decode_along_within_the_target(self):
        others = [self.background_decoding(i, served_ms=float(-i)) for i in range(2, 300)]
        plan = segments(decoding(1), *others)
        assert 0.5 * self.TARGET_MS < self.predicted_ms(plan) <= self.TARGET_MS
        assert plan[0][0] == 1
        longest_unserved = {r.request_id for r in others[-(len(plan) - 1) :]}
        assert {s[0] for s in plan[1:]} == longest_unserved

    def test_they_add_little_to_an_interactive_prefill(self):
        others = [self.background_decoding(i) for i in range(2, 2000)]
        config = SchedulerConfig(tbt_target_ms=10.0, prefill_rows_max=256)
        alone_ms = self.predicted_ms(segments(request(1, 256), config=config))
        plan = segments(request(1, 256), *others, config=config)
        assert alone_ms < self.predicted_ms(plan) <= (1 + BACKGROUND_SHARE) * alone_ms

    def test_alone_a_background_step_is_bounded_while_interactive_work_may_come(self):
        """However many decode in it, and though an interactive app is silent at the moment."""
        limit_ms = ARRIVAL_STEPS * MACHINE.step_ms(EMPTY_STEP.plus(1, 0))
        others = [self.background_decoding(i) for i in range(3, 300)]
        for requests in ([self.background(2, 5000)], others, [self.background(2, 5000), *others]):
            soon_ms = 1000.0 + ATTENTION_MS - 1
            plan = segments(*requests, now_ms=soon_ms, attended_ms=1000.0)
            assert 0.5 * limit_ms < self.predicted_ms(plan) <= 1.1 * limit_ms
            later_ms = 1000.0 + ATTENTION_MS
            plan = segments(*requests, now_ms=later_ms, attended_ms=1000.0)
            assert self.predicted_ms(plan) > 1.1 * limit_ms

    def test_an_interactive_request_that_waits_for_memory_counts_as_expected(self):
        waiting = request(1, 50, admitted=False, leaving=True, held_capacity=0)
        alone = segments(self.background(2, 5000))
        beside = segments(waiting, self.background(2, 5000))
        assert beside[0][2] < alone[0][2]

    def test_somebody_always_computes(self):
        slow = CostModel(weights=(500.0, 100.0, 0.0))
        for state in (self.background_decoding(1), self.background(1, 100)):
            assert len(segments(state, cost=slow, attended_ms=0.0)) == 1
        both = self.background_decoding(1), self.background(2, 100)
        assert len(segments(*both, cost=slow, attended_ms=0.0)) == 2

    def test_who_was_kept_waiting_too_long_computes_like_the_interactive(self):
        batch = AppState(priority="background", unserved_since_ms=0.0)
        requests = request(1, 300), self.background(2, 100)
        plan = segments(*requests, now_ms=PATIENCE_MS, apps={"batch": batch})
        assert plan == [(2, 0, 100, True), (1, 0, 156, False)]

    def test_without_classes_all_are_alike(self):
        fcfs = SchedulerConfig(tbt_target_ms=60.0, prefill_rows_max=256, policy=FcfsPolicy())
        requests = self.background_decoding(1), request(2, 5000)
        as_one = [replace(r, priority="interactive") for r in requests]
        assert segments(*requests, config=fcfs) == segments(*as_one, config=fcfs)


@pytest.mark.slow
@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 40), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    target_ms=st.floats(1, 500),
    rows_max=st.integers(1, 512),
    now_ms=st.floats(0, 1e5),
)
def test_any_plan_is_well_formed(requests, target_ms, rows_max, now_ms):
    states = []
    for number, (num_prompt, part, num_generated, background) in enumerate(requests):
        num_tokens = num_prompt + num_generated
        num_computed = num_tokens - 1 if num_generated else int(part * (num_prompt - 1))
        priority = "background" if background else "interactive"
        changes = {"num_tokens": num_tokens, "num_computed": num_computed, "priority": priority}
        states.append(request(number, num_prompt, **changes))
    config = SchedulerConfig(tbt_target_ms=target_ms, prefill_rows_max=rows_max)
    plan = segments(*states, now_ms=now_ms, config=config)
    by_id = {state.request_id: state for state in states}
    owed = {s.request_id for s in states if s.decoding and s.priority == "interactive"}
    assert owed <= {number for number, *_ in plan}
    assert len({number for number, *_ in plan}) == len(plan) > 0
    for number, start, end, samples in plan:
        assert by_id[number].num_computed == start < end <= by_id[number].num_tokens
        assert samples == (end == by_id[number].num_tokens)
    prefilled = sum(end - start for number, start, end, _ in plan if not by_id[number].decoding)
    assert prefilled <= (1 + TAIL_SHARE) * rows_max


class TestCheapRows:
    """A step has room for more of them, where they take less."""

    STATE = replace(request(1, 2000), cheap=(4, 1968), cheap_room=0.25, num_extra=8)

    def rows(self, **changes):
        step = StepDraft(MACHINE, 256)
        step.fill([replace(self.STATE, **changes)], None)
        return [(s.num_extra, s.start, s.end) for s in step.prefill]

    def test_the_first_step_begins_with_extra_ones(self):
        assert self.rows() == [(8, 0, 4 + 4 * (256 - 2 - 4))]

    def test_the_last_step_ends_with_those_that_run_through_all_layers(self):
        assert self.rows(num_extra=0, num_computed=1000) == [(0, 1000, 2000)]

    def test_a_step_between_has_cheap_ones_alone(self):
        assert self.rows(num_extra=0, num_computed=500) == [(0, 500, 500 + 4 * 256)]

    @given(st.integers(0, 1999), st.integers(0, 40), st.floats(0.01, 2.0), st.floats(1, 600))
    def test_no_more_fit_and_these_do(self, num_computed, num_extra, each, room):
        changes = {"num_computed": num_computed, "num_extra": num_extra, "cheap_room": each}
        state = replace(self.STATE, **changes)
        num_rows = state.rows_in(room)
        assert state.room(num_rows) <= room + 1e-6
        if num_rows < state.num_rows_left:
            assert state.room(num_rows + 1) > room - 1e-6

    @given(st.integers(0, 1999), st.integers(1, 600))
    def test_others_are_counted(self, num_computed, num_rows):
        state = replace(self.STATE, num_computed=num_computed, cheap_room=1.0)
        num_rows = min(num_rows, state.num_rows_left)
        assert (state.room(num_rows), state.rows_in(num_rows)) == (num_rows, num_rows)


class TestOverTime:
    def test_gaps_stay_near_the_target_while_a_long_prompt_prefills(self):
        simulation = Simulation(LAYOUT, 1 << 40, CONFIG, learns=True)
        chat = simulation.request(simulation.session(), 50, 400, 0.0)
        long = simulation.request(simulation.session(), 2000, 5, 500.0)
        simulation.run(steps_max=2000)
        assert long.first_token_ms is not None
        assert max(chat.gaps_ms) <= 2 * CONFIG.tbt_target_ms
        alone_ms = MACHINE.step_ms(EMPTY_STEP.plus(2000, 0))
        assert long.first_token_ms - 500.0 < 6 * alone_ms
