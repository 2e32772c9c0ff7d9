"""Virtual time: who is charged what, and what those who come are lifted to."""

import pytest

from edgekv.ids import RequestId
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.fairness import (
    PATIENCE_MS,
    QUANTUM_MS,
    Accounts,
    aged,
    apps_waiting,
    split_service,
)
from edgekv.sched.plan import RequestState, SegmentPlan


def request(app: str, *, decoding: bool = False) -> RequestState:
    num_computed = 10 if decoding else 0
    return RequestState(
        request_id=RequestId(0),
        priority="interactive",
        arrival_ms=0.0,
        admitted=True,
        held_capacity=64,
        num_tokens=11,
        num_computed=num_computed,
        num_prompt=10,
        reserve_tokens=0,
        app=app,
    )


def accounts(**apps) -> Accounts:
    made = Accounts()
    for name, terms in apps.items():
        made = made.register(name, **({"weight": 1.0, "priority": "interactive"} | terms))
    return made


class TestCharge:
    def test_service_by_weight(self):
        made = accounts(a={"weight": 1.0}, b={"weight": 4.0})
        made = made.charge({"a": 100.0, "b": 100.0}, [request("a"), request("b")], 0.0)
        assert made.apps["a"].virtual_ms == 100.0
        assert made.apps["b"].virtual_ms == 25.0

    def test_restores_count(self):
        made = accounts(a={"weight": 2.0}).charge_restore("a", 50.0)
        assert made.apps["a"].virtual_ms == 25.0

    def test_accounts_are_values(self):
        before = accounts(a={})
        before.charge({"a": 100.0}, [request("a")], 0.0)
        assert before.apps["a"].virtual_ms == 0.0

    def test_terms_can_change_and_leave_the_account_alone(self):
        made = accounts(a={}).charge({"a": 100.0}, [], 0.0)
        made = made.register("a", weight=3.0, priority="background", pinned_bytes=7)
        app = made.apps["a"]
        assert (app.weight, app.priority, app.pinned_bytes) == (3.0, "background", 7)
        assert app.virtual_ms == 100.0

    def test_who_is_opened_is_expected_to_ask(self):
        made = accounts(a={})
        assert made.apps["a"].last_active_ms == float("-inf")
        made = made.register("a", weight=1.0, priority="interactive", now_ms=50.0)
        assert made.apps["a"].last_active_ms == 50.0
        made = made.register("a", weight=1.0, priority="interactive", now_ms=20.0)
        assert made.apps["a"].last_active_ms == 50.0


class TestLift:
    def test_idling_stores_no_credit_but_a_quantum(self):
        busy = [request("a"), request("b")]
        made = accounts(a={}, b={}, c={}).charge({"a": 9000.0, "b": 7000.0}, busy, 0.0)
        made = made.arrive("c", busy, 10.0)
        assert made.apps["c"].virtual_ms == 7000.0 - QUANTUM_MS

    def test_by_weight(self):
        busy = [request("a")]
        made = accounts(a={}, c={"weight": 5.0}).charge({"a": 9000.0}, busy, 0.0)
        made = made.arrive("c", busy, 10.0)
        assert made.apps["c"].virtual_ms == 9000.0 - QUANTUM_MS / 5.0

    def test_who_waits_already_keeps_what_it_is_owed(self):
        busy = [request("a"), request("c")]
        made = accounts(a={}, c={}).charge({"a": 9000.0, "c": 100.0}, busy, 0.0)
        assert made.arrive("c", busy, 10.0).apps["c"].virtual_ms == 100.0

    def test_who_only_decodes_has_asked_for_nothing_more(self):
        busy = [request("a"), request("c", decoding=True)]
        made = accounts(a={}, c={}).charge({"a": 9000.0, "c": 100.0}, busy, 0.0)
        assert made.arrive("c", busy, 10.0).apps["c"].virtual_ms == 9000.0 - QUANTUM_MS

    def test_nobody_is_lowered(self):
        busy = [request("a")]
        made = accounts(a={}, c={}).charge({"a": 100.0, "c": 9000.0}, busy, 0.0)
        assert made.arrive("c", busy, 10.0).apps["c"].virtual_ms == 9000.0

    def test_when_nobody_waits_to_the_last_that_was_served(self):
        made = accounts(a={}, c={}).charge({"a": 5000.0}, [request("a", decoding=True)], 0.0)
        made = made.charge({}, [], 1.0)
        assert made.arrive("c", [], 10.0).apps["c"].virtual_ms == 5000.0 - QUANTUM_MS

    def test_classes_do_not_compare(self):
        busy = [request("a")]
        made = accounts(a={}, c={"priority": "background"}).charge({"a": 9000.0}, busy, 0.0)
        assert made.arrive("c", busy, 10.0).apps["c"].virtual_ms == 0.0


class TestAgeing:
    def test_who_is_never_served_ages_and_a_quantum_makes_young(self):
        made = accounts(a={"priority": "background"}).arrive("a", [], 1000.0)
        assert not aged(made.apps["a"], 1000.0 + PATIENCE_MS - 1)
        now_ms = 1000.0 + PATIENCE_MS
        assert aged(made.apps["a"], now_ms)
        made = made.charge({"a": QUANTUM_MS - 1}, [request("a")], now_ms)
        assert aged(made.apps["a"], now_ms), "not yet a quantum"
        made = made.charge({"a": 1.0}, [request("a")], now_ms)
        assert not aged(made.apps["a"], now_ms)

    def test_any_service_keeps_from_ageing(self):
        made = accounts(a={}).arrive("a", [], 0.0)
        made = made.charge({"a": 0.1}, [request("a")], PATIENCE_MS - 1)
        assert not aged(made.apps["a"], PATIENCE_MS + 1)

    def test_a_restore_alone_does_not(self):
        made = accounts(a={}).arrive("a", [], 0.0).charge_restore("a", 1000.0)
        assert aged(made.apps["a"], PATIENCE_MS)

    def test_idling_is_not_waiting(self):
        made = accounts(a={}).arrive("a", [], 0.0).charge({"a": 5.0}, [], 10.0)
        made = made.arrive("a", [], 10 * PATIENCE_MS)
        assert not aged(made.apps["a"], 10 * PATIENCE_MS + 1)

    def test_an_app_that_never_asked_is_not_aged(self):
        assert not aged(accounts(a={}).apps["a"], 1e12)


def test_apps_wait_while_one_of_their_requests_does_not_decode():
    states = [request("a", decoding=True), request("a"), request("b", decoding=True)]
    assert apps_waiting(states) == {"a"}


class TestSplitService:
    COST = CostModel(weights=(10.0, 1.0, 2.0))

    def split(self, *segments: tuple[int, int, int], elapsed_ms: float, cost=COST):
        plans = [
            SegmentPlan(request_id=RequestId(i), start=start, end=end, samples=True)
            for i, start, end in segments
        ]
        parts = split_service(plans, elapsed_ms, cost)
        return {plan.request_id: ms for plan, ms in parts.items()}

    def test_the_fixed_part_equally_the_rest_by_cost(self):
        shape = EMPTY_STEP.plus(1, 999).plus(1, 0)
        elapsed_ms = self.COST.step_ms(shape)
        parts = self.split((1, 999, 1000), (2, 0, 1), elapsed_ms=elapsed_ms)
        assert parts[1] == pytest.approx(5.0 + 1.0 + 2.0)
        assert parts[2] == pytest.approx(5.0 + 1.0 + 0.002)

    def test_all_that_was_measured_and_no_more(self):
        parts = self.split((1, 0, 100), (2, 50, 51), (3, 7, 9), elapsed_ms=1234.5)
        assert sum(parts.values()) == pytest.approx(1234.5)
        assert parts[1] > parts[3] > parts[2]

    def test_equally_where_the_model_knows_nothing(self):
        nothing = CostModel(weights=(0.0, 0.0, 0.0))
        assert self.split((1, 0, 9), (2, 0, 1), elapsed_ms=8.0, cost=nothing) == {1: 4.0, 2: 4.0}

    def test_nobody(self):
        assert self.split(elapsed_ms=8.0) == {}
