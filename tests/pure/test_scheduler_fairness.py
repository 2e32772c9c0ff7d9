"""Virtual time: who is charged what, and what those who come are lifted to."""

import pytest

from edgekv.ids import RequestId
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.demand import Demand
from edgekv.sched.fairness import (
    PATIENCE_MS,
    QUANTUM_MS,
    SETTLED_MAX,
    Accounts,
    aged,
    split_service,
)
from edgekv.sched.plan import SegmentPlan


def asking(**apps: str) -> Demand:
    """Apps with a request each, which waits or decodes."""
    demand = Demand()
    for number, (app, what) in enumerate(apps.items()):
        demand.came(RequestId(number), app, "interactive")
        if what == "decodes":
            demand.decodes(RequestId(number))
    return demand


NOBODY = Demand()


def accounts(**apps) -> Accounts:
    made = Accounts()
    for name, terms in apps.items():
        made.register(name, **terms)
    return made


class TestCharge:
    def test_service_by_weight(self):
        made = accounts(a={"weight": 1.0}, b={"weight": 4.0})
        made.charge({"a": 100.0, "b": 100.0}, asking(a="waits", b="waits"), 0.0)
        assert made.app("a").virtual_ms == 100.0
        assert made.app("b").virtual_ms == 25.0

    def test_restores_count(self):
        made = accounts(a={"weight": 2.0})
        made.charge_restore("a", 50.0)
        assert made.app("a").virtual_ms == 25.0

    def test_terms_can_change_and_leave_the_account_alone(self):
        made = accounts(a={})
        made.charge({"a": 100.0}, NOBODY, 0.0)
        made.register("a", weight=3.0, priority="background", pinned_bytes=7)
        app = made.app("a")
        assert (app.weight, app.priority, made.pins) == (3.0, "background", {"a": 7})
        assert app.virtual_ms == 100.0
        made.register("a", weight=3.0, priority="background")
        assert made.pins == {}

    def test_in_another_class_it_owes_what_it_owed(self):
        """Each class has a virtual time of its own, and one may be far ahead of the other."""
        made = accounts(a={}, b={"priority": "background"}, c={})
        made.charge(
            {"a": 100.0, "b": 9000.0, "c": 70.0}, asking(a="waits", b="waits", c="waits"), 0.0
        )
        assert made.app("a").virtual_ms == 100.0
        made.register("a", priority="background")
        assert made.app("a").virtual_ms == 9030.0
        made.register("a")
        assert made.app("a").virtual_ms == 100.0

    def test_who_is_opened_is_expected_to_ask(self):
        made = accounts(a={})
        assert made.attended_ms == float("-inf")
        made.register("a", now_ms=50.0)
        assert made.attended_ms == 50.0
        made.register("a", now_ms=20.0)
        made.register("b", priority="background", now_ms=60.0)
        made.arrive("b", NOBODY, 70.0)
        assert made.attended_ms == 50.0
        made.arrive("a", NOBODY, 80.0)
        assert made.attended_ms == 80.0
        made.charge({"a": 1.0, "b": 1.0}, NOBODY, 90.0)
        assert made.attended_ms == 90.0


class TestLift:
    def test_idling_stores_no_credit_but_a_quantum(self):
        busy = asking(a="waits", b="waits")
        made = accounts(a={}, b={}, c={})
        made.charge({"a": 9000.0, "b": 7000.0}, busy, 0.0)
        made.arrive("c", busy, 10.0)
        assert made.app("c").virtual_ms == 7000.0 - QUANTUM_MS

    def test_by_weight(self):
        busy = asking(a="waits")
        made = accounts(a={}, c={"weight": 5.0})
        made.charge({"a": 9000.0}, busy, 0.0)
        made.arrive("c", busy, 10.0)
        assert made.app("c").virtual_ms == 9000.0 - QUANTUM_MS / 5.0

    def test_who_waits_already_keeps_what_it_is_owed(self):
        busy = asking(a="waits", c="waits")
        made = accounts(a={}, c={})
        made.charge({"a": 9000.0, "c": 100.0}, busy, 0.0)
        made.arrive("c", busy, 10.0)
        assert made.app("c").virtual_ms == 100.0

    def test_who_only_decodes_has_asked_for_nothing_more(self):
        busy = asking(a="waits", c="decodes")
        made = accounts(a={}, c={})
        made.charge({"a": 9000.0, "c": 100.0}, busy, 0.0)
        made.arrive("c", busy, 10.0)
        assert made.app("c").virtual_ms == 9000.0 - QUANTUM_MS

    def test_nobody_is_lowered(self):
        busy = asking(a="waits")
        made = accounts(a={}, c={})
        made.charge({"a": 100.0, "c": 9000.0}, busy, 0.0)
        made.arrive("c", busy, 10.0)
        assert made.app("c").virtual_ms == 9000.0

    def test_when_nobody_waits_to_the_last_that_was_served(self):
        made = accounts(a={}, c={})
        made.charge({"a": 5000.0}, asking(a="decodes"), 0.0)
        made.charge({}, NOBODY, 1.0)
        made.arrive("c", NOBODY, 10.0)
        assert made.app("c").virtual_ms == 5000.0 - QUANTUM_MS

    def test_classes_do_not_compare(self):
        busy = asking(a="waits")
        made = accounts(a={}, c={"priority": "background"})
        made.charge({"a": 9000.0}, busy, 0.0)
        made.arrive("c", busy, 10.0)
        assert made.app("c").virtual_ms == 0.0


class TestAccountsThatEnd:
    def test_a_name_that_is_looked_up_has_none(self):
        made = accounts(a={}, b={"weight": 1.0, "priority": "interactive", "pinned_bytes": 0})
        assert dict(made.apps) == {}

    def test_one_that_rests_and_owes_nothing_is_dropped(self):
        made, busy = accounts(), asking(b="waits")
        made.arrive("a", NOBODY, 0.0)
        made.charge({"a": 100.0}, asking(a="waits"), 0.0)
        made.rest("a")
        made.charge({"b": 100.0 + QUANTUM_MS - 1}, busy, 1.0)
        assert "a" in made.apps, "a new one would be lifted to less"
        made.charge({"b": 1.0}, busy, 2.0)
        assert "a" not in made.apps
        made.arrive("a", busy, 3.0)
        assert made.app("a").virtual_ms == 100.0, "as if it had been kept"

    def test_who_owes_cannot_shed_it_by_leaving(self):
        made, busy = accounts(a={"weight": 2.0}), asking(b="waits")
        made.charge({"a": 4000.0, "b": 500.0}, busy, 0.0)
        made.register("a")  # closed
        for _ in range(3):
            made.charge({"b": 500.0}, busy, 1.0)
        made.charge({"b": QUANTUM_MS - 1}, busy, 1.0)
        assert made.app("a").virtual_ms == 2000.0
        made.charge({"b": 1.0}, busy, 1.0)
        assert "a" not in made.apps

    def test_not_while_it_asks_or_has_terms_of_its_own(self):
        made, busy = accounts(c={"pinned_bytes": 1}), asking(a="decodes", b="waits")
        for name in ("a", "b", "c"):
            made.arrive(name, NOBODY, 0.0)
            made.rest(name)
        made.charge({"b": 9000.0}, busy, 1.0)
        assert {*made.apps} == {"a", "b", "c"}
        busy.left(RequestId(0), "a")
        made.rest("a")
        made.charge({"b": 1.0}, busy, 2.0)
        assert {*made.apps} == {"b", "c"}
        made.register("c")
        made.charge({"b": 1.0}, busy, 3.0)
        assert {*made.apps} == {"b"}

    def test_service_at_rest_counts_as_if_it_had_been_kept(self):
        """Repair of predicted KV goes on when nobody asks."""
        made, busy = accounts(), asking(b="waits")
        made.charge({"b": 9000.0}, busy, 1.0)
        made.charge({"a": 400.0}, busy, 2.0)
        assert made.app("a").virtual_ms == 9000.0 - QUANTUM_MS + 400.0
        made.charge({"b": 400.0}, busy, 3.0)
        assert {*made.apps} == {"b"}

    def test_a_crowd_goes_bit_by_bit(self):
        made, busy = accounts(), asking(b="waits")
        for number in range(1000):
            made.arrive(f"name {number}", NOBODY, 0.0)
            made.rest(f"name {number}")
        made.charge({"b": 9000.0}, busy, 1.0)
        assert 1000 - SETTLED_MAX <= len(made.apps) < 1000 + 1
        for _ in range(1000 // SETTLED_MAX + 1):
            made.charge({"b": 1.0}, busy, 2.0)
        assert {*made.apps} == {"b"}

    def test_resting_again_and_again_is_noted_once(self):
        made = accounts()
        for number in range(100):
            made.arrive("a", NOBODY, float(number))
            made.charge({"a": 5.0}, asking(a="waits"), float(number))
            made.rest("a")
        assert len(made._resting) <= 1


def is_aged(made: Accounts, name: str, now_ms: float) -> bool:
    return aged(made.app(name), now_ms, made.aged_turn_ms)


class TestAgeing:
    def test_who_is_never_served_ages_and_a_quantum_makes_young(self):
        made = accounts(a={"priority": "background"})
        made.arrive("a", NOBODY, 1000.0)
        assert not is_aged(made, "a", 1000.0 + PATIENCE_MS - 1)
        now_ms = 1000.0 + PATIENCE_MS
        assert is_aged(made, "a", now_ms)
        made.charge({"a": QUANTUM_MS - 1}, asking(a="waits"), now_ms)
        assert is_aged(made, "a", now_ms), "not yet a quantum"
        made.charge({"a": 1.0}, asking(a="waits"), now_ms)
        assert not is_aged(made, "a", now_ms)
        assert is_aged(made, "a", now_ms + PATIENCE_MS)

    def test_it_is_one_quantum_for_all_that_were_kept_waiting(self):
        names = [f"batch {number}" for number in range(30)]
        made = accounts(**{name: {"priority": "background"} for name in names})
        for name in names:
            made.arrive(name, NOBODY, 0.0)
        now_ms = PATIENCE_MS
        made.charge({names[0]: QUANTUM_MS / 2}, NOBODY, now_ms)
        assert all(is_aged(made, name, now_ms) for name in names)
        made.charge({names[1]: QUANTUM_MS / 2}, NOBODY, now_ms)
        assert not any(is_aged(made, name, now_ms) for name in names)
        later_ms = now_ms + PATIENCE_MS
        assert [is_aged(made, name, later_ms) for name in names[:3]] == [True, True, True]

    def test_any_service_keeps_from_ageing(self):
        made = accounts(a={})
        made.arrive("a", NOBODY, 0.0)
        made.charge({"a": 0.1}, asking(a="waits"), PATIENCE_MS - 1)
        assert not is_aged(made, "a", PATIENCE_MS + 1)

    def test_a_restore_alone_does_not(self):
        made = accounts(a={})
        made.arrive("a", NOBODY, 0.0)
        made.charge_restore("a", 1000.0)
        assert is_aged(made, "a", PATIENCE_MS)

    def test_idling_is_not_waiting(self):
        made = accounts(a={})
        made.arrive("a", NOBODY, 0.0)
        made.charge({"a": 5.0}, NOBODY, 10.0)
        made.arrive("a", NOBODY, 10 * PATIENCE_MS)
        assert not is_aged(made, "a", 10 * PATIENCE_MS + 1)

    def test_an_app_that_never_asked_is_not_aged(self):
        assert not is_aged(accounts(a={}), "a", 1e12)

    def test_interactive_service_is_no_quantum_of_theirs(self):
        made = accounts(b={"priority": "background"})
        made.arrive("a", NOBODY, 0.0)
        made.arrive("b", NOBODY, 0.0)
        made.charge({"a": 10 * QUANTUM_MS}, NOBODY, 2 * PATIENCE_MS)
        assert is_aged(made, "b", 2 * PATIENCE_MS)


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
