"""Who goes first, and who gives way to whom."""

import itertools

from edgekv.ids import RequestId
from edgekv.kv.layout import Heads, KVLayout, PoolSnapshot
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.fairness import PATIENCE_MS, QUANTUM_MS
from edgekv.sched.plan import AppState, RequestState, Snapshot
from edgekv.sched.policy import (
    RESIDENCY_PER_RESTORE,
    TURN_MAX_MS,
    FairPolicy,
    FcfsPolicy,
    Policy,
    min_residency_ms,
    policy_of,
)

LAYOUT = KVLayout(heads=(Heads(2, 64, 64),), dtype_bytes=4, context_max=1 << 16)
POOL = PoolSnapshot(budget_bytes=1 << 40, used_bytes=0, free_bytes=0, peak_bytes=0)
COST = CostModel(weights=(5.0, 0.2, 0.002))
FAIR = FairPolicy()


def request(number: int, rows: int = 100, **changes) -> RequestState:
    """A waiting request with so many rows to compute."""
    fields = {
        "request_id": RequestId(number),
        "priority": "interactive",
        "arrival_ms": 0.0,
        "admitted": False,
        "held_capacity": 0,
        "num_tokens": rows,
        "num_computed": 0,
        "num_prompt": rows,
        "reserve_tokens": 0,
        "app": "app",
    }
    return RequestState(**(fields | changes))


def running(number: int, resident_ms: float, num_tokens: int = 100, **changes) -> RequestState:
    """A decoding request that got so much service since it was admitted."""
    fields = {
        "admitted": True,
        "held_capacity": 1 << 16,
        "num_computed": num_tokens - 1,
        "num_prompt": num_tokens - 5,
        "resident_ms": resident_ms,
        "service_ms": resident_ms,
    }
    return request(number, num_tokens, **(fields | changes))


def snapshot(*requests: RequestState, apps=None, restore_ms_per_token=0.0) -> Snapshot:
    return Snapshot(
        requests=requests,
        idle=(),
        pool=POOL,
        layout=LAYOUT,
        apps=apps or {},
        restore_ms_per_token=restore_ms_per_token,
    )


def order(*requests: RequestState, policy: Policy = FAIR, now_ms: float = 0.0, apps=None):
    return [r.request_id for r in policy.order(now_ms, snapshot(*requests, apps=apps), COST)]


def may(waiting, victim, *others, now_ms=0.0, apps=None, restore_ms_per_token=0.0) -> bool:
    seen = snapshot(waiting, victim, *others, apps=apps, restore_ms_per_token=restore_ms_per_token)
    return FAIR.may_preempt(waiting, victim, now_ms, seen)


class TestFcfs:
    def test_by_arrival_whatever_they_are(self):
        late = request(1, 1, arrival_ms=9.0)
        early = request(2, 9000, arrival_ms=3.0, priority="background")
        assert order(late, early, policy=FcfsPolicy(), now_ms=10.0) == [2, 1]

    def test_nobody_is_preempted_and_nobody_is_in_the_background(self):
        seen = snapshot(request(1), running(2, 1e9, priority="background"))
        waiting, victim = seen.requests
        assert not FcfsPolicy().may_preempt(waiting, victim, 1e9, seen)
        assert not FcfsPolicy().in_background(victim, 1e9, seen)


def test_policies_by_their_names():
    assert isinstance(policy_of("fair"), FairPolicy)
    assert isinstance(policy_of("fcfs"), FcfsPolicy)


class TestOrderOfClasses:
    def test_interactive_before_background(self):
        assert order(request(1, 10, priority="background"), request(2, 4000)) == [2, 1]

    def test_a_background_app_without_service_goes_first_at_last(self):
        background = request(1, 10, priority="background", app="batch")
        apps = {"batch": AppState(priority="background", unserved_since_ms=100.0)}
        requests = (background, request(2, 10))
        assert order(*requests, apps=apps, now_ms=99.0 + PATIENCE_MS) == [2, 1]
        assert order(*requests, apps=apps, now_ms=100.0 + PATIENCE_MS) == [1, 2]
        seen = snapshot(*requests, apps=apps)
        assert FAIR.in_background(background, 99.0 + PATIENCE_MS, seen)
        assert not FAIR.in_background(background, 100.0 + PATIENCE_MS, seen)


class TestOrderOfApps:
    def test_the_least_virtual_time_first(self):
        apps = {"a": AppState(virtual_ms=5000.0), "b": AppState(virtual_ms=1000.0)}
        assert order(request(1, 10, app="a"), request(2, 4000, app="b"), apps=apps) == [2, 1]

    def test_within_a_quantum_the_requests_decide(self):
        apps = {"a": AppState(virtual_ms=QUANTUM_MS - 1), "b": AppState()}
        assert order(request(1, 10, app="a"), request(2, 4000, app="b"), apps=apps) == [1, 2]

    def test_a_quantum_is_service_of_the_heaviest_app(self):
        """Large weights make virtual time slow, not turns long."""
        apps = {
            "a": AppState(weight=1000.0, virtual_ms=QUANTUM_MS / 1000.0),
            "b": AppState(weight=1000.0),
        }
        assert order(request(1, 10, app="a"), request(2, 4000, app="b"), apps=apps) == [2, 1]


class TestOrderOfRequests:
    def test_a_short_prompt_overtakes_a_long_one(self):
        assert order(request(1, 4000), request(2, 20, arrival_ms=100.0), now_ms=100.0) == [2, 1]

    def test_but_not_one_that_has_waited_longer_than_its_own_prefill(self):
        long_ms = COST.step_ms(EMPTY_STEP.plus(4000, 0))
        late = request(2, 20, arrival_ms=2 * long_ms)
        assert order(request(1, 4000), late, now_ms=2 * long_ms) == [1, 2]

    def test_what_is_stored_need_not_be_computed(self):
        assert order(request(1, 100), request(2, 4000, num_stored=3990)) == [2, 1]

    def test_who_was_preempted_waits_from_then_on(self):
        now_ms = 10_000.0
        preempted = request(1, 100, queued_ms=now_ms - 1)
        waiting = request(2, 100, queued_ms=now_ms - 1000)
        assert order(preempted, waiting, now_ms=now_ms) == [2, 1]

    def test_of_those_that_decode_the_one_that_got_most_is_the_first_to_give_way(self):
        assert order(running(1, 900.0), running(2, 100.0)) == [2, 1]


class TestMayPreempt:
    def test_interactive_takes_from_background_at_once(self):
        victim = running(2, 0.0, priority="background", app="batch")
        assert may(request(1), victim)

    def test_background_takes_nothing_from_interactive(self):
        waiting = request(1, priority="background", app="batch")
        assert not may(waiting, running(2, 1e9))

    def test_unless_it_was_kept_waiting_too_long_and_the_other_had_its_turn(self):
        waiting = request(1, priority="background", app="batch")
        apps = {"batch": AppState(priority="background", unserved_since_ms=0.0)}
        assert not may(waiting, running(2, QUANTUM_MS - 1), apps=apps, now_ms=PATIENCE_MS)
        assert may(waiting, running(2, QUANTUM_MS), apps=apps, now_ms=PATIENCE_MS)

    def test_nobody_takes_from_who_was_kept_waiting_too_long(self):
        victim = running(2, 1e9, priority="background", app="batch")
        apps = {"batch": AppState(priority="background", unserved_since_ms=0.0)}
        assert not may(request(1), victim, apps=apps, now_ms=PATIENCE_MS)

    def test_sessions_of_an_app_take_turns(self):
        assert not may(request(1), running(2, QUANTUM_MS - 1))
        assert may(request(1), running(2, QUANTUM_MS))

    def test_of_two_apps_only_the_one_behind_takes(self):
        victim = running(2, 1e4, app="b")
        behind = {"app": AppState(), "b": AppState(virtual_ms=QUANTUM_MS)}
        assert may(request(1), victim, apps=behind)
        equal = {"app": AppState(), "b": AppState(virtual_ms=QUANTUM_MS - 1)}
        assert not may(request(1), victim, apps=equal)

    def test_two_never_take_from_each_other_at_once(self):
        """Whoever has just taken a place keeps it for a turn."""
        for ours, theirs in itertools.product(("interactive", "background"), repeat=2):
            apps = {"a": AppState(virtual_ms=0.0), "b": AppState(virtual_ms=1e5)}
            first = request(1, app="a", priority=ours)
            second = running(2, 1e5, app="b", priority=theirs)
            if may(first, second, apps=apps):
                admitted = running(1, 0.0, app="a", priority=ours)
                swapped = request(2, app="b", priority=theirs, num_stored=99)
                assert not may(swapped, admitted, apps=apps)

    def test_one_restore_at_a_time(self):
        other = running(3, 0.0, arriving=True)
        assert not may(request(1, num_stored=50), running(2, 1e4), other)
        assert may(request(1, num_stored=50), running(2, 1e4))
        assert may(request(1), running(2, 1e4), other), "a new prompt computes meanwhile"


class TestMinimumResidency:
    def residency_ms(self, request: RequestState, restore_ms_per_token=0.0) -> float:
        seen = snapshot(request, restore_ms_per_token=restore_ms_per_token)
        return min_residency_ms(request, seen)

    def test_is_worth_its_restore(self):
        state = running(1, 0.0, num_tokens=1001)
        assert self.residency_ms(state, 0.5) == RESIDENCY_PER_RESTORE * 500.0

    def test_is_a_quantum_at_least(self):
        assert self.residency_ms(running(1, 0.0), 0.0001) == QUANTUM_MS

    def test_doubles_with_each_turn_up_to_a_limit(self):
        """So a long answer is preempted a few times, not each quantum."""
        assert self.residency_ms(running(1, 100.0, service_ms=1100.0)) == 1000.0
        assert self.residency_ms(running(1, 100.0, service_ms=1e6)) == TURN_MAX_MS
