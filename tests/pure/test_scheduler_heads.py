"""A plan looks at the heads of lines alone, and decides what one that looks at everybody does."""

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_sim import Simulation
from sched_sim_parts import SimSwap

from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import Heads, KVLayout, PoolSnapshot
from edgekv.sched import memory
from edgekv.sched.cost import CostModel
from edgekv.sched.demand import HEADS_MAX, HEADS_PER_LINE, Demand
from edgekv.sched.plan import AppState, IdleSession, ParkedRequest, RequestState, Snapshot, StepPlan
from edgekv.sched.policy import FairPolicy, FcfsPolicy, Policy, policy_of
from edgekv.sched.scheduler import SchedulerConfig, plan_step

LAYOUT = KVLayout(heads=(Heads(2, 64, 64),) * 4, dtype_bytes=4, context_max=1 << 14)
G = LAYOUT.granule_tokens
GRANULE_BYTES = LAYOUT.capacity_bytes(G)
COST = CostModel(weights=(5.0, 0.2, 0.002))
FAIR = FairPolicy()

apps = st.sampled_from(["chat", "mail", "batch"])
milliseconds = st.sampled_from([0.0, 10.0, 300.0, 4000.0, 6000.0])
requests = st.fixed_dictionaries(
    {
        "what": st.sampled_from(["waiting", "waiting", "prefilling", "decoding", "leaving"]),
        "held": st.sampled_from([0, 1, 2, 3, 4, 6]),
        "arriving": st.booleans(),
        "num_prompt": st.integers(1, 7 * G),
        "num_generated": st.integers(0, 40),
        "part": st.floats(0, 1),
        "priority": st.sampled_from(["interactive", "interactive", "background"]),
        "app": apps,
        "arrival_ms": milliseconds,
        "resident_ms": milliseconds,
        "num_stored": st.sampled_from([0, 0, 40, 400]),
    }
)
accounts = st.fixed_dictionaries(
    {
        "weight": st.sampled_from([0.5, 1.0, 4.0]),
        "virtual_ms": milliseconds,
        "unserved_since_ms": st.sampled_from([0.0, 9000.0]),
    }
)


def state_of(number: int, drawn: dict) -> RequestState:
    admitted = drawn["what"] in {"prefilling", "decoding"} and drawn["held"] > 0
    decoding = drawn["what"] == "decoding"
    num_generated = drawn["num_generated"] + decoding
    num_tokens = drawn["num_prompt"] + num_generated
    num_computed = num_tokens - 1 if decoding else int(drawn["part"] * (num_tokens - 1))
    held = drawn["held"] * G
    if not admitted:
        num_computed = min(num_computed, held)
    return RequestState(
        request_id=RequestId(number),
        priority=drawn["priority"],
        arrival_ms=drawn["arrival_ms"],
        admitted=admitted,
        held_capacity=0 if drawn["what"] == "leaving" else held,
        num_tokens=num_tokens,
        num_computed=min(num_computed, held),
        num_prompt=drawn["num_prompt"],
        reserve_tokens=64,
        app=drawn["app"],
        num_stored=drawn["num_stored"],
        arriving=admitted and drawn["arriving"],
        leaving=drawn["what"] == "leaving",
        resident_ms=drawn["resident_ms"],
        service_ms=2 * drawn["resident_ms"],
    )


def snapshot_of(states, idle=(), spare=0.0, **changes) -> Snapshot:
    used = sum(r.held_capacity for r in states) + sum(s.capacity for s in idle)
    used_bytes = LAYOUT.capacity_bytes(used)
    pool = PoolSnapshot(
        # Whoever asks would fit alone, or be refused at the door.
        budget_bytes=max(LAYOUT.capacity_bytes(9 * G), used_bytes + int(spare * GRANULE_BYTES)),
        used_bytes=used_bytes,
        free_bytes=0,
        peak_bytes=0,
    )
    return Snapshot(requests=tuple(states), idle=tuple(idle), pool=pool, layout=LAYOUT, **changes)


def line_up(states, policy: Policy = FAIR, restore_ms_per_token: float = 0.0) -> Demand:
    """All of them in line that do not decode, as the engine has them."""
    demand = Demand()
    for state in states:
        demand.came(state.request_id, state.app, state.priority)
        if state.decoding:
            demand.decodes(state.request_id)
    by_id = {state.request_id: state for state in states}
    for request_id in demand.unplaced:
        state = by_id[request_id]
        urgency = policy.urgency(state, 0.0, restore_ms_per_token, COST)
        demand.place(request_id, urgency, state.arrival_ms)
    return demand


def seen_of(snapshot: Snapshot, policy: Policy, now_ms: float) -> Snapshot:
    """What the engine shows of it: all that are admitted, and who is at the head of a line."""
    demand = line_up(snapshot.requests, policy, snapshot.restore_ms_per_token)
    admitted = replace(snapshot, requests=tuple(r for r in snapshot.requests if r.admitted))
    heads = demand.heads(policy.places(now_ms, admitted), snapshot.pins)
    seen = tuple(r for r in snapshot.requests if r.admitted or r.request_id in heads)
    shown = {r.request_id for r in seen}
    parked = tuple(
        ParkedRequest(request_id=r.request_id, capacity=r.held_capacity, app=r.app)
        for r in reversed(snapshot.requests)
        if r.held_capacity and r.request_id not in shown
    )
    return replace(snapshot, requests=seen, parked=parked)


def plan_for_all(now_ms: float, whole: Snapshot, config: SchedulerConfig) -> StepPlan:
    """The slow twin: everybody is looked at, and memory is planned whether it can change or not."""
    with mock.patch.object(memory, "_may_change", return_value=True):
        return plan_step(now_ms, whole, COST, config)


@pytest.mark.slow
@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    drawn=st.lists(requests, max_size=12),
    idle=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.floats(0, 9), apps), max_size=4),
    spare=st.floats(0, 8),
    pins=st.dictionaries(apps, st.integers(1, 8)),
    soft=st.none() | st.floats(0, 1),
    leaving=st.sampled_from([0.0, 0.0, 0.2]),
    known=st.dictionaries(apps, accounts),
    policy=st.sampled_from(["fair", "fair", "fair", "fcfs"]),
    now_ms=st.sampled_from([6000.0, 20_000.0]),
    restore=st.sampled_from([0.0, 0.05]),
)
def test_where_nobody_floods_a_plan_is_that_for_all(
    drawn, idle, spare, pins, soft, leaving, known, policy, now_ms, restore
):
    states = [state_of(number, each) for number, each in enumerate(drawn)]
    sessions = [
        IdleSession(session_id=SessionId(i), capacity=held * G, last_used_ms=used, app=app)
        for i, (held, used, app) in enumerate(idle)
    ]
    whole = snapshot_of(
        states,
        sessions,
        spare,
        pins={app: granules * GRANULE_BYTES for app, granules in pins.items()},
        apps={
            app: AppState(priority="background" if app == "batch" else "interactive", **account)
            for app, account in known.items()
        },
        restore_ms_per_token=restore,
    )
    whole = replace(
        whole,
        soft_budget_bytes=None if soft is None else int(soft * whole.pool.budget_bytes),
        leaving_bytes=int(leaving * whole.pool.used_bytes),
    )
    config = SchedulerConfig(tbt_target_ms=50.0, prefill_rows_max=256, policy=policy_of(policy))
    seen = seen_of(whole, config.policy, now_ms)
    assert {*seen.requests} == {*whole.requests}
    assert plan_step(now_ms, seen, COST, config) == plan_for_all(now_ms, whole, config)


@pytest.mark.slow
@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6 * G), min_size=HEADS_PER_LINE + 1, max_size=80),
    held=st.sets(st.integers(0, 79), max_size=6),
    spare=st.floats(0, 30),
    policy=st.sampled_from([FairPolicy(), FcfsPolicy()]),
)
def test_of_one_line_the_first_are_let_in_that_would_be_if_all_were_looked_at(
    lengths, held, spare, policy
):
    states = [
        RequestState(
            request_id=RequestId(number),
            priority="interactive",
            arrival_ms=7.0 * number,
            admitted=False,
            held_capacity=G if number in held else 0,
            num_tokens=num_tokens,
            num_computed=0,
            num_prompt=num_tokens,
            reserve_tokens=0,
        )
        for number, num_tokens in enumerate(lengths)
    ]
    whole = snapshot_of(states, spare=spare)
    config = SchedulerConfig(tbt_target_ms=50.0, prefill_rows_max=256, policy=policy)
    plan = plan_step(900.0, seen_of(whole, policy, 900.0), COST, config).memory
    whole_plan = plan_for_all(900.0, whole, config).memory
    assert plan.admit == whole_plan.admit[: len(plan.admit)]
    if len(whole_plan.admit) <= HEADS_PER_LINE and not whole_plan.preempt and not plan.preempt:
        assert plan.admit == whole_plan.admit


class TestHeads:
    def demand(self, *lines: tuple[str, str, int]) -> Demand:
        """Lines of so many requests, with numbers as urgencies that grow over all of them."""
        demand, number = Demand(), 0
        for app, priority, count in lines:
            for _ in range(count):
                demand.came(RequestId(number), app, priority)
                demand.place(RequestId(number), float(number), 0.0)
                number += 1
        return demand

    @staticmethod
    def nowhere(app: str, priority: str) -> tuple[float, ...]:
        return ()

    def test_of_a_line_the_first(self):
        demand = self.demand(("a", "interactive", 1000), ("b", "interactive", 3))
        heads = demand.heads(self.nowhere)
        assert {*heads} == {*range(HEADS_PER_LINE), 1000, 1001, 1002}

    def test_of_all_the_first_by_their_apps_place_and_then_their_own(self):
        demand = self.demand(*((str(i), "interactive", 10) for i in range(100)))
        heads = demand.heads(lambda app, _: (app != "99",))
        assert len(heads) == HEADS_MAX
        assert {*heads} == {*range(990, 1000), *range(HEADS_MAX - 10)}

    def test_classes_of_an_app_have_lines_of_their_own(self):
        demand = self.demand(("a", "interactive", 100), ("a", "background", 100))
        heads = demand.heads(self.nowhere)
        assert {*heads} == {*range(HEADS_PER_LINE), *range(100, 100 + HEADS_PER_LINE)}

    def test_whose_memory_waits_for_it_is_seen_behind_any_crowd(self):
        crowd = [(str(i), "interactive", 10) for i in range(100)]
        demand = self.demand(*crowd, ("mail", "background", 40))
        assert 1000 not in demand.heads(self.nowhere)
        heads = demand.heads(self.nowhere, {"mail": 1})
        assert {*range(1000, 1000 + HEADS_PER_LINE)} <= {*heads}
        assert len(heads) == HEADS_MAX + HEADS_PER_LINE

    def test_who_decodes_leaves_its_place_and_who_gives_way_gets_another(self):
        demand = self.demand(("a", "interactive", 3))
        demand.decodes(RequestId(1))
        demand.decodes(RequestId(1))
        assert demand.heads(self.nowhere) == [0, 2]
        assert (RequestId(1) in demand, RequestId(2) in demand) == (False, True)
        demand.waits(RequestId(0), "a", "interactive")
        assert demand.unplaced == (0,)
        demand.place(RequestId(0), 9.0, 0.0)
        assert demand.heads(self.nowhere) == [2, 0]
        assert demand.waiting == {"a": 2}
        assert demand.unfinished == {"a": 3}
        for number in range(3):
            demand.left(RequestId(number), "a")
        assert demand.heads(self.nowhere) == []
        assert (dict(demand.waiting), dict(demand.unfinished)) == ({}, {})


class TestCounted:
    """Operations of a plan, however many wait; a thousand took 80 ms when all were looked at."""

    def looked_at(self, monkeypatch, num_waiting: int, num_apps: int) -> int:
        """Requests compared in the plan that looked at most."""
        simulation = Simulation(
            LAYOUT,
            LAYOUT.capacity_bytes(12 * G),
            SchedulerConfig(tbt_target_ms=50.0, prefill_rows_max=256),
            swap=SimSwap(),
        )
        simulation.request(simulation.session("victim"), 30, 400, 0.0)
        for number in range(num_waiting):
            app = f"flood {number % num_apps}"
            simulation.request(simulation.session(app), 20 + number % 100, 3, 1.0)
        for number in range(2000):
            simulation.app(f"name {number}")
        counts, urgency = [0], FairPolicy.urgency

        def spy(self, *args):
            counts[-1] += 1
            return urgency(self, *args)

        while simulation.num_steps < 40:
            simulation.turn()
            if not simulation.demand.unplaced and simulation.num_steps == 5:
                monkeypatch.setattr(FairPolicy, "urgency", spy)
            counts.append(0)
        monkeypatch.undo()
        assert len(simulation.accounts.apps) <= 1 + num_apps
        return max(counts)

    @pytest.mark.parametrize("num_apps", [1, 100])
    def test_a_plan_compares_no_more_when_more_wait(self, monkeypatch, num_apps):
        few = self.looked_at(monkeypatch, 150, num_apps)
        many = self.looked_at(monkeypatch, 1000, num_apps)
        assert 0 < many <= 2 * HEADS_MAX
        assert many <= few + 2
