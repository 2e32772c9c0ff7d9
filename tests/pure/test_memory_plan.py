"""Who gets KV buffers, who loses them, and that nobody blocks anybody for ever."""

from collections.abc import Collection, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_sim import Simulation

from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import Heads, KVLayout, PoolSnapshot
from edgekv.sched.draft import granted
from edgekv.sched.memory import plan_memory
from edgekv.sched.plan import IdleSession, MemoryPlan, ParkedRequest, RequestState, Snapshot
from edgekv.sched.scheduler import SchedulerConfig

LAYOUT = KVLayout(heads=(Heads(2, 64, 64),) * 4, dtype_bytes=4, context_max=1 << 14)
G = LAYOUT.granule_tokens  # capacities below are in granules, the classes 1, 2, 3, 4, 6, 8, 12, 16
CONFIG = SchedulerConfig(tbt_target_ms=50.0, prefill_rows_max=256)


def running(number: int, held: int, num_tokens: int | None = None, **changes) -> RequestState:
    """An admitted request with `held` granules; without `num_tokens` it has room left."""
    tokens = held * G - 1 if num_tokens is None else num_tokens
    return _request(number, held, tokens, admitted=True, **changes)


def outgrown(number: int, held: int, **changes) -> RequestState:
    return running(number, held, held * G + 1, **changes)


def waiting(
    number: int, num_tokens: int, held: int = 0, reserve: int = 0, **changes
) -> RequestState:
    return _request(number, held, num_tokens, admitted=False, reserve=reserve, **changes)


def _request(number, held, num_tokens, *, admitted, reserve=0, **changes) -> RequestState:
    return RequestState(
        request_id=RequestId(number),
        priority="interactive",
        arrival_ms=0.0,
        admitted=admitted,
        held_capacity=held * G,
        num_tokens=num_tokens,
        num_computed=0,
        num_prompt=num_tokens,
        reserve_tokens=reserve,
        **changes,
    )


def idle(number: int, held: int, last_used_ms: float, app: str = "") -> IdleSession:
    return IdleSession(
        session_id=SessionId(number), capacity=held * G, last_used_ms=last_used_ms, app=app
    )


def plan(
    budget: float,
    *order: RequestState,
    sessions: tuple[IdleSession, ...] = (),
    yields: Collection[int] = (),
    pins: Mapping[str, int] | None = None,
    soft: int | None = None,
    parked: tuple[ParkedRequest, ...] = (),
) -> MemoryPlan:
    """The plan for requests given most urgent first, in a pool of `budget` granules.

    Args:
        budget: Granules.
        order: Requests.
        sessions: Idle ones.
        yields: Running requests that the policy lets waiting ones preempt.
        pins: Granules pinned for apps.
        soft: Granules of the soft budget.
        parked: Requests further back.
    """
    used = sum(r.held_capacity for r in order) + sum(s.capacity for s in (*sessions, *parked))
    pool = PoolSnapshot(
        budget_bytes=int(LAYOUT.capacity_bytes(G) * budget),
        used_bytes=LAYOUT.capacity_bytes(used),
        free_bytes=0,
        peak_bytes=0,
    )
    assert pool.used_bytes <= pool.budget_bytes
    granule_bytes = LAYOUT.capacity_bytes(G)
    snapshot = Snapshot(
        requests=order,
        idle=sessions,
        parked=parked,
        pool=pool,
        layout=LAYOUT,
        pins={app: n * granule_bytes for app, n in (pins or {}).items()},
        soft_budget_bytes=None if soft is None else soft * granule_bytes,
    )
    return plan_memory(snapshot, order, lambda _, running: running.request_id in yields)


class TestAdmit:
    def test_in_order_while_there_is_room(self):
        made = plan(6, waiting(1, 2 * G), waiting(2, 3 * G), waiting(3, 2 * G), waiting(4, 1))
        assert made == MemoryPlan(admit=((1, 2 * G), (2, 3 * G)))

    def test_the_small_do_not_overtake_for_ever(self):
        """4 would fit, but 3 is first, and would wait for ever if the small always went by."""
        made = plan(4, running(1, 2), waiting(3, 3 * G), waiting(4, 1))
        assert not made

    def test_with_a_reserve_for_the_answer(self):
        assert plan(20, waiting(1, G, reserve=G)).admit == ((1, 2 * G),)

    def test_the_reserve_never_asks_for_more_than_the_pool_has(self):
        assert plan(3.5, waiting(1, 2 * G, reserve=100 * G)).admit == ((1, 3 * G),)

    def test_what_is_held_already_costs_nothing(self):
        made = plan(4, running(1, 2), waiting(2, G, held=2, reserve=5 * G))
        assert made == MemoryPlan(admit=((2, 2 * G),))

    def test_held_buffers_grow(self):
        assert plan(10, waiting(1, 3 * G, held=2)) == MemoryPlan(admit=((1, 3 * G),))

    def test_idle_sessions_make_room_the_longest_unused_first(self):
        sessions = (idle(7, 2, 30.0), idle(8, 2, 10.0), idle(9, 2, 20.0))
        made = plan(6, waiting(1, 3 * G), sessions=sessions)
        assert made == MemoryPlan(drop=(8, 9), admit=((1, 3 * G),))

    def test_no_idle_session_is_dropped_in_vain(self):
        assert not plan(6, running(1, 4), waiting(2, 3 * G), sessions=(idle(8, 2, 0.0),))


class TestNobodyBlocks:
    def test_a_session_whose_own_kv_is_in_the_way_gives_it_up(self):
        """4 + 2 granules fit, 4 old and 6 new side by side in one layer do not."""
        made = plan(6, waiting(1, 5 * G, held=4))
        assert made == MemoryPlan(preempt=(1,))
        assert plan(6, waiting(1, 5 * G)).admit == ((1, 6 * G),)

    def test_waiting_sessions_do_not_hold_each_other_up(self):
        made = plan(6, waiting(1, 4 * G, held=3), waiting(2, 4 * G, held=3))
        assert made.preempt == (2,)
        assert made.admit == ((1, 4 * G),)

    def test_idle_sessions_go_before_waiting_ones(self):
        requests = waiting(1, 3 * G), waiting(2, 4 * G, held=3)
        made = plan(6, *requests, sessions=(idle(9, 3, 0.0),))
        assert made == MemoryPlan(drop=(9,), admit=((1, 3 * G),))

    def test_waiting_kv_gives_way_to_growth(self):
        made = plan(6, outgrown(1, 2), waiting(2, 5 * G, held=3))
        assert made.preempt == (2,)
        assert made.grow == ((1, 3 * G),)
        assert made.admit == ()

    def test_kv_is_not_taken_in_vain(self):
        assert not plan(8, running(1, 4), waiting(2, 6 * G), waiting(3, 5 * G, held=3))


class TestFurtherBack:
    """Requests that no plan looks at yet keep nobody from the memory that their sessions hold."""

    def parked(self, number: int, held: int, app: str = "") -> ParkedRequest:
        return ParkedRequest(request_id=RequestId(number), capacity=held * G, app=app)

    def test_their_kv_goes_before_that_of_those_in_front_and_after_the_idle(self):
        order = waiting(1, 3 * G), waiting(2, 4 * G, held=2)
        back = self.parked(4, 2), self.parked(3, 2)
        made = plan(7, *order, sessions=(idle(9, 1, 0.0),), parked=back)
        assert made == MemoryPlan(drop=(9,), preempt=(4,), admit=((1, 3 * G),))

    def test_not_what_is_pinned_for_their_app(self):
        back = self.parked(4, 2, "mail"), self.parked(3, 2)
        made = plan(4, waiting(1, 2 * G, app="chat"), parked=back, pins={"mail": 2})
        assert made.preempt == (3,)

    def test_it_is_shed_when_the_system_is_short_of_memory(self):
        back = self.parked(4, 2), self.parked(3, 2)
        made = plan(12, running(1, 2), waiting(2, 4 * G, held=2), parked=back, soft=4)
        assert made.preempt == (4, 3)


class TestGrow:
    def test_half_as_much_again(self):
        assert plan(40, outgrown(1, 4)).grow == ((1, 6 * G),)
        assert plan(40, outgrown(1, 8)).grow == ((1, 12 * G),)

    def test_only_what_has_outgrown_its_buffers(self):
        assert not plan(40, running(1, 4), running(2, 2))

    def test_idle_sessions_make_room(self):
        made = plan(8, outgrown(1, 4), sessions=(idle(9, 2, 0.0), idle(8, 2, 5.0)))
        assert made.drop == (9, 8)
        assert made.grow == ((1, 6 * G),)

    def test_the_least_urgent_gives_way_and_only_as_many_as_needed(self):
        made = plan(12, outgrown(1, 4), running(2, 4), running(3, 4))
        assert made == MemoryPlan(preempt=(3,), grow=((1, 6 * G),))

    def test_the_least_urgent_does_not_take_from_the_others(self):
        made = plan(12, running(1, 4), running(2, 4), outgrown(3, 4))
        assert made == MemoryPlan(preempt=(3,))

    def test_growth_that_can_never_fit_preempts_nobody_else(self):
        """Old and new of one layer exceed the pool, whoever leaves; starting anew does not."""
        made = plan(6, outgrown(1, 4), running(2, 1), running(3, 1))
        assert made == MemoryPlan(preempt=(1,))

    def test_what_is_given_up_is_not_taken_back_in_the_same_plan(self):
        made = plan(12, outgrown(1, 4), running(2, 4), waiting(4, G), running(3, 4))
        assert made.preempt == (3,)
        assert made.admit == ()


class TestPreemptToAdmit:
    def test_only_whom_the_policy_lets_go(self):
        order = waiting(1, 3 * G), running(2, 3), running(3, 3)
        assert not plan(6, *order)
        assert plan(6, *order, yields=[2]) == MemoryPlan(preempt=(2,), admit=((1, 3 * G),))

    def test_the_least_urgent_first(self):
        made = plan(6, waiting(1, 3 * G), running(2, 3), running(3, 3), yields=[2, 3])
        assert made == MemoryPlan(preempt=(3,), admit=((1, 3 * G),))

    def test_nobody_who_goes_before(self):
        assert not plan(6, running(2, 3), running(3, 3), waiting(1, 3 * G), yields=[2, 3])

    def test_no_more_than_needed(self):
        """The small one would not do; once the large one goes, it may stay."""
        made = plan(8, waiting(1, 6 * G), running(2, 6), running(3, 2), yields=[2, 3])
        assert made.preempt == (2,)

    def test_nobody_in_vain(self):
        assert not plan(8, waiting(1, 8 * G), running(2, 4), running(3, 4), yields=[3])

    def test_what_nobody_computes_with_goes_first(self):
        order = waiting(1, 3 * G), running(2, 3)
        made = plan(6, *order, sessions=(idle(9, 3, 0.0),), yields=[2])
        assert made == MemoryPlan(drop=(9,), admit=((1, 3 * G),))

    def test_a_cached_session_stays_where_a_victim_makes_room_enough(self):
        order = waiting(1, 4 * G), running(2, 4)
        made = plan(5, *order, sessions=(idle(9, 1, 0.0),), yields=[2])
        assert made == MemoryPlan(preempt=(2,), admit=((1, 4 * G),))

    def test_one_exchange_in_a_plan(self):
        order = waiting(1, 3 * G), waiting(4, 3 * G), running(2, 3), running(3, 3)
        made = plan(6, *order, yields=[2, 3])
        assert made == MemoryPlan(preempt=(3,), admit=((1, 3 * G),))

    def test_who_has_just_grown_stays(self):
        made = plan(9, waiting(1, 2 * G), outgrown(2, 4), yields=[2])
        assert made == MemoryPlan(grow=((2, 6 * G),), admit=((1, 2 * G),))
        assert plan(8, waiting(1, 4 * G), outgrown(2, 4), yields=[2]).preempt == ()

    def test_kv_that_cannot_grow_even_so_is_given_up(self):
        """Old and new of one layer exceed the pool; what was held comes back into new buffers."""
        order = waiting(1, 5 * G, held=4), running(2, 2)
        assert plan(6, *order, yields=[2]) == MemoryPlan(preempt=(1,))


class TestOnTheMove:
    def test_who_is_leaving_cannot_be_admitted_and_holds_nobody_up(self):
        made = plan(6, waiting(1, 2 * G, leaving=True), waiting(2, 3 * G))
        assert made == MemoryPlan(admit=((2, 3 * G),))

    def test_who_is_arriving_is_nobodys_victim(self):
        order = waiting(1, 3 * G), running(2, 3), running(3, 3, arriving=True)
        assert plan(6, *order, yields=[2, 3]).preempt == (2,)
        grown = plan(12, outgrown(1, 4), running(2, 4), running(3, 4, arriving=True))
        assert grown == MemoryPlan(preempt=(2,), grow=((1, 6 * G),))


class TestPins:
    def test_others_cannot_evict_what_is_pinned(self):
        sessions = (idle(8, 2, 0.0, "mail"), idle(9, 2, 5.0, "notes"))
        made = plan(4, waiting(1, 2 * G, app="chat"), sessions=sessions, pins={"mail": 2})
        assert made == MemoryPlan(drop=(9,), admit=((1, 2 * G),))

    def test_but_what_goes_beyond_it(self):
        sessions = (idle(8, 2, 0.0, "mail"), idle(9, 2, 5.0, "mail"))
        made = plan(4, waiting(1, 2 * G, app="chat"), sessions=sessions, pins={"mail": 2})
        assert made.drop == (8,)

    def test_a_session_larger_than_the_pin_is_beyond_it(self):
        sessions = (idle(8, 4, 0.0, "mail"),)
        made = plan(4, waiting(1, 2 * G, app="chat"), sessions=sessions, pins={"mail": 2})
        assert made.drop == (8,)

    def test_the_app_itself_can(self):
        sessions = (idle(8, 2, 0.0, "mail"),)
        assert plan(2, waiting(1, 2 * G, app="mail"), sessions=sessions, pins={"mail": 2}).drop

    def test_no_running_request_of_it_is_preempted_by_others(self):
        order = waiting(1, 2 * G, app="chat"), running(2, 2, app="mail"), running(3, 2, app="notes")
        made = plan(4, *order, yields=[2, 3], pins={"mail": 2})
        assert made.preempt == (3,)
        grown = outgrown(1, 2, app="chat"), running(2, 2, app="mail")
        assert plan(5, *grown, pins={"mail": 2}).preempt == (1,)

    def test_what_others_borrowed_comes_back_at_once(self):
        """Whatever the policy says, and though the owner of the pin is the least urgent."""
        order = running(2, 3, app="chat"), running(3, 3, app="chat"), waiting(1, 2 * G, app="mail")
        made = plan(6, *order, pins={"mail": 2})
        assert made == MemoryPlan(preempt=(3,), admit=((1, 2 * G),))
        assert not plan(6, *order, pins={"mail": 1})

    def test_who_waits_for_more_room_does_not_hold_up_the_owner(self):
        order = waiting(1, 6 * G, app="chat"), running(2, 4), waiting(3, 2 * G, app="mail")
        assert plan(6, *order, pins={"mail": 2}) == MemoryPlan(admit=((3, 2 * G),))
        assert not plan(6, *order)

    def test_nothing_is_claimed_from_a_request_that_could_never_run_beside_the_pins(self):
        """Else the two would take it from each other without end."""
        order = running(2, 6, app="chat"), waiting(1, 2 * G, app="mail")
        assert not plan(6, *order, pins={"mail": 2})
        assert plan(8, *order, running(3, 2, app="chat"), pins={"mail": 2}).preempt == (3,)

    def test_they_yield_where_a_request_could_never_run_beside_them(self):
        sessions = (idle(8, 4, 0.0, "mail"),)
        made = plan(6, waiting(1, 4 * G, app="chat"), sessions=sessions, pins={"mail": 4})
        assert made == MemoryPlan(drop=(8,), admit=((1, 4 * G),))

    def test_one_apps_greed_does_not_void_anothers(self):
        sessions = (idle(8, 2, 0.0, "mail"), idle(9, 2, 5.0, "notes"))
        for pins in ({"mail": 2, "greedy": 100}, {"greedy": 100, "mail": 2}):
            made = plan(4, waiting(1, 2 * G, app="chat"), sessions=sessions, pins=pins)
            assert made.drop == (9,)

    def test_of_more_than_there_is_what_was_given_first_holds(self):
        assert granted({"a": 5, "b": 6, "c": 4, "d": 2}, 10) == {"a": 5, "c": 4}
        assert granted({"a": 5, "b": 5}, 10) == {"a": 5, "b": 5}


class TestShortOfMemory:
    def test_sheds_what_is_idle_then_what_waits_then_the_least_urgent(self):
        order = running(1, 2), running(2, 2), waiting(3, 4 * G, held=2)
        sessions = (idle(8, 2, 5.0), idle(9, 2, 0.0))
        assert plan(12, *order, sessions=sessions, soft=8).drop == (9,)
        made = plan(12, *order, sessions=sessions, soft=4)
        assert made == MemoryPlan(drop=(9, 8), preempt=(3,))
        assert plan(12, *order, sessions=sessions, soft=2).preempt == (3, 2)

    def test_somebody_runs_however_little_there_should_be(self):
        made = plan(12, running(1, 4), running(2, 4), soft=0)
        assert made == MemoryPlan(preempt=(2,))
        assert plan(12, waiting(1, 4 * G), waiting(2, G), soft=1).admit == ((1, 4 * G),)
        assert plan(12, outgrown(1, 4), soft=1).grow == ((1, 6 * G),)

    def test_nobody_is_admitted_beyond_it(self):
        assert not plan(12, running(1, 4), waiting(2, 2 * G), soft=5)
        assert plan(12, running(1, 4), waiting(2, 2 * G), soft=6).admit == ((2, 2 * G),)


apps = st.sampled_from(["chat", "mail"])
requests = st.tuples(
    st.sampled_from(["waiting", "running", "leaving", "arriving"]),
    st.sampled_from([0, 1, 2, 3, 4, 6]),
    st.integers(1, 8 * G),
    st.integers(0, 300),
    apps,
)


@pytest.mark.slow
@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    states=st.lists(requests, max_size=8),
    sessions=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.floats(0, 9), apps), max_size=4),
    spare=st.floats(0, 6),
    yields=st.sets(st.integers(0, 7)),
    pinned=st.integers(0, 12),
    soft=st.none() | st.integers(0, 20),
)
def test_any_plan_can_be_carried_out_within_the_budget(
    states, sessions, spare, yields, pinned, soft
):
    order = []
    for number, (what, held, num_tokens, reserve, app) in enumerate(states):
        admitted = what in ("running", "arriving") and held > 0
        changes = {"app": app, "arriving": admitted and what == "arriving"}
        if what == "leaving":
            held, changes["leaving"] = 0, True
        if admitted:
            room = held * G if what == "arriving" else held * G + 1
            num_tokens = min(num_tokens, room)
        made = _request(number, held, num_tokens, admitted=admitted, reserve=reserve, **changes)
        order.append(made)
    idles = tuple(idle(100 + i, held, at, app) for i, (held, at, app) in enumerate(sessions))
    held = sum(r.held_capacity for r in order) + sum(s.capacity for s in idles)
    budget = held / G + 8 + spare
    made = plan(budget, *order, sessions=idles, yields=yields, pins={"mail": pinned}, soft=soft)
    touched = [*made.preempt, *(i for i, _ in made.grow), *(i for i, _ in made.admit)]
    assert len(set(touched)) == len(touched), "one request, one fate"
    assert len(set(made.drop)) == len(made.drop)
    _carry_out(made, order, idles, LAYOUT.capacity_bytes(G) * budget)


def _carry_out(made, order, idles, budget_bytes) -> None:
    held = {r.request_id: r.held_capacity for r in order}
    states = {r.request_id: r for r in order}
    idle_held = {s.session_id: s.capacity for s in idles}
    for session_id in made.drop:
        del idle_held[session_id]
    for request_id in made.preempt:
        assert held[request_id] > 0
        assert not states[request_id].arriving
        held[request_id] = 0
    for request_id, capacity in [*made.grow, *made.admit]:
        state = states[request_id]
        before = held[request_id]
        assert capacity >= max(before, state.num_tokens)
        used = LAYOUT.capacity_bytes(sum(held.values()) + sum(idle_held.values()))
        extra = LAYOUT.capacity_bytes(capacity - before)
        if before and capacity > before:
            extra += before * max(map(LAYOUT.layer_token_bytes, range(LAYOUT.num_layers)))
        assert used + extra <= budget_bytes
        held[request_id] = capacity
    assert all(states[i].admitted for i, _ in made.grow)
    assert not any(states[i].admitted or states[i].leaving for i, _ in made.admit)


def test_a_pool_too_small_for_all_serves_all_by_preempting():
    """Guards the simulations: preemption really happens in them."""
    simulation = Simulation(LAYOUT, LAYOUT.capacity_bytes(9 * G), CONFIG)
    for i in range(4):
        simulation.request(simulation.session(), G, 3 * G, float(i), reserve_tokens=0)
    simulation.run(steps_max=100_000)
    assert simulation.num_preemptions > 0
    assert len(simulation.finished) == 4
