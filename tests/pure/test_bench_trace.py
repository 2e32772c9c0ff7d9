import pytest

from edgekv.bench.sessions.trace import KEEP, RankTrace, TracePolicy
from edgekv.errors import ConfigError
from edgekv.ids import RequestId
from edgekv.kv.layout import Heads, KVLayout, PoolSnapshot
from edgekv.sched.cost import CostModel
from edgekv.sched.plan import RequestState, Snapshot

STEPS_PER_UPDATE = 25  # at a frequency of 0.04


def ranks(trace, num_steps, num_sessions=40):
    return [trace.rank(session, num_steps) for session in range(num_sessions)]


def test_ranks_hold_between_updates():
    trace = RankTrace("random", 40, 0.04, seed=0)
    first = ranks(trace, 0)
    assert ranks(trace, STEPS_PER_UPDATE - 1) == first
    assert ranks(trace, STEPS_PER_UPDATE) != first
    assert all(0 <= rank < 1 for rank in first)
    assert len(set(first)) == 40


def test_a_random_trace_changes_every_rank():
    trace = RankTrace("random", 40, 0.04, seed=0)
    before, after = ranks(trace, 0), ranks(trace, STEPS_PER_UPDATE)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_a_markov_trace_keeps_most_ranks():
    trace = RankTrace("markov", 2000, 0.04, seed=0)
    before = ranks(trace, 0, 2000)
    after = ranks(trace, STEPS_PER_UPDATE, 2000)
    kept = sum(a == b for a, b in zip(before, after, strict=True)) / 2000
    assert kept == pytest.approx(KEEP, abs=0.03)


@pytest.mark.parametrize("kind", ["random", "markov"])
def test_a_trace_is_the_same_whoever_asks_and_in_which_order(kind):
    forward = RankTrace(kind, 40, 0.04, seed=3)
    expected = [ranks(forward, steps) for steps in (0, 100, 1000)]
    other = RankTrace(kind, 40, 0.04, seed=3)
    assert [ranks(other, steps) for steps in (1000, 100, 0)] == expected[::-1]
    assert ranks(RankTrace(kind, 40, 0.04, seed=4), 0) != expected[0]


@pytest.mark.parametrize(
    ("kind", "sessions", "frequency"),
    [("best", 4, 0.04), ("random", 0, 0.04), ("random", 4, 0.0), ("random", 4, 1.5)],
)
def test_absurd_traces_are_refused(kind, sessions, frequency):
    with pytest.raises(ConfigError):
        RankTrace(kind, sessions, frequency, seed=0)


# --- scheduling by it ---

LAYOUT = KVLayout(heads=(Heads(1, 8, 8),), dtype_bytes=4, context_max=1024)
POOL = PoolSnapshot(budget_bytes=1 << 20, used_bytes=0, free_bytes=0, peak_bytes=0)
NAMES = {f"app {i}": i for i in range(8)}


def request(number, app):
    return RequestState(
        request_id=RequestId(number),
        priority="interactive",
        arrival_ms=float(number),
        admitted=False,
        held_capacity=0,
        num_tokens=10,
        num_computed=0,
        num_prompt=10,
        reserve_tokens=0,
        app=app,
    )


REQUESTS = tuple(request(i, f"app {i}") for i in range(8))


def snapshot(num_steps, requests=REQUESTS):
    return Snapshot(requests=requests, idle=(), pool=POOL, layout=LAYOUT, num_steps=num_steps)


def order(policy, num_steps, requests=REQUESTS):
    return [r.app for r in policy.order(0.0, snapshot(num_steps, requests), CostModel())]


def make_policy():
    return TracePolicy(RankTrace("random", 8, 0.04, seed=1), NAMES)


def test_the_order_is_that_of_the_trace():
    trace = RankTrace("random", 8, 0.04, seed=1)
    for num_steps in (0, 24, 25, 500):
        by_rank = sorted(NAMES, key=lambda name: trace.rank(NAMES[name], num_steps))
        assert order(make_policy(), num_steps) == by_rank


def test_who_ranks_lower_may_take_the_memory_of_who_ranks_higher():
    policy, now = make_policy(), snapshot(25)
    ranked = policy.order(0.0, now, CostModel())
    for i, waiting in enumerate(ranked):
        for j, running in enumerate(ranked):
            assert policy.may_preempt(waiting, running, 0.0, now) == (i < j)


def test_who_is_not_in_the_trace_goes_last():
    requests = (request(9, "warm-up"), *REQUESTS)
    assert order(make_policy(), 0, requests)[-1] == "warm-up"


def test_nobody_is_in_the_background():
    assert not make_policy().in_background(REQUESTS[0], 0.0, snapshot(0))
