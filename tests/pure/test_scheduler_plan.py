"""What one plan holds: who decodes, who prefills how much, in which order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_sim import MACHINE, Simulation

from edgekv.ids import RequestId
from edgekv.kv.layout import KVLayout, PoolSnapshot
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.plan import RequestState, Snapshot
from edgekv.sched.compose import PROGRESS_MARGIN, PROGRESS_ROWS
from edgekv.sched.fairness import PATIENCE_MS as BACKGROUND_PATIENCE_MS
from edgekv.sched.scheduler import SchedulerConfig, plan_step

LAYOUT = KVLayout(heads=((2, 64), (2, 64)), dtype_bytes=4, context_max=1 << 16)
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


def segments(*requests: RequestState, now_ms=0.0, config=CONFIG, cost: CostModel = MACHINE):
    snapshot = Snapshot(requests=requests, idle=(), pool=NO_POOL, layout=LAYOUT)
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


class TestPrefill:
    def test_alone_it_fills_the_step(self):
        assert segments(request(1, 1000)) == [(1, 0, 256, False)]
        assert segments(request(1, 1000, num_computed=800)) == [(1, 800, 1000, True)]

    def test_several_prompts_share_a_step(self):
        plan = segments(request(1, 100), request(2, 50), request(3, 400))
        assert plan == [(2, 0, 50, True), (1, 0, 100, True), (3, 0, 106, False)]

    def test_beside_decoding_the_step_meets_the_target(self):
        plan = segments(decoding(1, 500), request(2, 5000))
        shape = EMPTY_STEP.plus(1, 499).plus(plan[1][2], 0)
        assert 0.6 * CONFIG.tbt_target_ms < MACHINE.predict_ms(shape) <= CONFIG.tbt_target_ms

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

    def test_few_rows_may_pass_the_target_a_little(self):
        """A chunk of one row a step would take for ever; the gap stays below twice the target."""
        near = CostModel(weights=(50.0, 1.0, 0.0))
        plan = segments(decoding(1), request(2, 500), cost=near)
        rows = plan[1][2]
        assert 1 < rows <= PROGRESS_ROWS
        assert 50 + 1 + rows <= PROGRESS_MARGIN * CONFIG.tbt_target_ms


class TestOrder:
    def test_a_short_prompt_overtakes_a_long_one(self):
        plan = segments(request(1, 4000, num_computed=256), request(2, 20, arrival_ms=100.0))
        assert plan[0] == (2, 0, 20, True)

    def test_but_not_one_that_has_waited_longer_than_its_own_prefill(self):
        long_ms = MACHINE.predict_ms(EMPTY_STEP.plus(4000, 0))
        late = request(2, 20, arrival_ms=2 * long_ms)
        assert segments(request(1, 4000), late, now_ms=2 * long_ms)[0][0] == 1

    def test_interactive_goes_first_however_long_background_waits_in_patience(self):
        background = request(1, 10, priority="background")
        late = request(2, 4000, arrival_ms=BACKGROUND_PATIENCE_MS - 1)
        assert segments(background, late, now_ms=BACKGROUND_PATIENCE_MS - 1)[0][0] == 2

    def test_background_ages_into_the_interactive_class(self):
        background = request(1, 10, priority="background")
        late = request(2, 4000, arrival_ms=BACKGROUND_PATIENCE_MS)
        assert segments(background, late, now_ms=BACKGROUND_PATIENCE_MS)[0][0] == 1

    def test_equal_requests_go_by_arrival(self):
        plan = segments(request(2, 200), request(1, 200, arrival_ms=5.0), now_ms=5.0)
        assert [s[0] for s in plan] == [2, 1]


@pytest.mark.slow
@settings(max_examples=200, derandomize=True, deadline=None)
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
        if num_generated:
            num_tokens = num_prompt + num_generated
            state = request(number, num_prompt, num_tokens=num_tokens, num_computed=num_tokens - 1)
        else:
            computed = int(part * (num_prompt - 1))
            priority = "background" if background else "interactive"
            state = request(number, num_prompt, num_computed=computed, priority=priority)
        states.append(state)
    config = SchedulerConfig(tbt_target_ms=target_ms, prefill_rows_max=rows_max)
    plan = segments(*states, now_ms=now_ms, config=config)
    by_id = {state.request_id: state for state in states}
    assert {s.request_id for s in states if s.decoding} <= {number for number, *_ in plan}
    assert len({number for number, *_ in plan}) == len(plan) > 0
    for number, start, end, samples in plan:
        assert by_id[number].num_computed == start < end <= by_id[number].num_tokens
        assert samples == (end == by_id[number].num_tokens)
    prefilled = sum(end - start for number, start, end, _ in plan if not by_id[number].decoding)
    assert prefilled <= rows_max


class TestOverTime:
    def test_gaps_stay_near_the_target_while_a_long_prompt_prefills(self):
        simulation = Simulation(LAYOUT, 1 << 40, CONFIG, learns=True)
        chat = simulation.request(simulation.session(), 50, 400, 0.0)
        long = simulation.request(simulation.session(), 2000, 5, 500.0)
        simulation.run(steps_max=2000)
        assert long.first_token_ms is not None
        assert max(chat.gaps_ms) <= 2 * CONFIG.tbt_target_ms
        alone_ms = MACHINE.predict_ms(EMPTY_STEP.plus(2000, 0))
        assert long.first_token_ms - 500.0 < 6 * alone_ms

    def test_background_is_served_although_interactive_work_never_ends(self):
        """More interactive prompts arrive than the machine can ever compute."""
        config = SchedulerConfig(tbt_target_ms=60.0, prefill_rows_max=2048)
        simulation = Simulation(LAYOUT, 1 << 40, config)
        background = simulation.request(simulation.session(), 500, 5, 0.0, priority="background")
        prefill_ms = MACHINE.predict_ms(EMPTY_STEP.plus(2048, 0))
        for i in range(200):
            simulation.request(simulation.session(), 2048, 1, i * 0.8 * prefill_ms)
        simulation.run(steps_max=2000)
        assert background.finished_ms is not None
        assert background.finished_ms < BACKGROUND_PATIENCE_MS + 20 * prefill_ms
        last = max(r.arrival_ms for r in simulation.finished)
        assert background.finished_ms < last, "while others still came"
