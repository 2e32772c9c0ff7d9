"""What one app may have of what all share, and what a flood costs those beside it."""

import threading

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, eventually, sampling

from edgekv.engine.request import Request
from edgekv.errors import ConfigError, QueueFull, TooManySessions
from edgekv.sched.demand import HEADS_MAX


def fill(app, num_requests, *, num_tokens=20, max_tokens=200):
    """Requests in sessions of their own; their streams."""
    return [
        app.session().submit_ids(random_ids(num_tokens, seed), sampling(max_tokens))
        for seed in range(num_requests)
    ]


def test_one_app_cannot_fill_the_queue_for_others(open_runtime):
    runtime = open_runtime(num_waiting_max=20, pool_bytes=1 << 20)
    flood = runtime.app("flood")
    streams = fill(flood, 11)
    with pytest.raises(
        QueueFull, match="app 'flood': 11 requests are waiting or running"
    ) as caught:
        flood.session().respond("Hi")
    assert "app('flood', num_waiting_max=" in caught.value.hint
    assert len(answer(runtime.app("other").session(), random_ids(9), sampling(3)).token_ids) == 3
    runtime.app("flood", num_waiting_max=15)
    streams += fill(flood, 4)
    with pytest.raises(QueueFull, match="as many as its num_waiting_max allows"):
        flood.session().respond("Hi")
    for stream in streams:
        stream.close()
    eventually(lambda: not runtime._engine.inbox.num_unfinished)
    assert runtime._engine.inbox._shares._total == 0


def test_one_app_cannot_open_all_sessions(open_runtime):
    runtime = open_runtime(num_sessions_max=20)
    flood = runtime.app("flood")
    opened = [flood.session() for _ in range(11)]
    with pytest.raises(TooManySessions, match="app 'flood': 11 sessions are open") as caught:
        flood.session()
    assert "app('flood', num_sessions_max=" in caught.value.hint
    with runtime.app("other").session("kept"):
        pass
    runtime.app("flood", num_sessions_max=20)
    opened += [flood.session(f"named {number}") for number in range(9)]
    with pytest.raises(TooManySessions, match="20 sessions are open"):
        runtime.app("other").session()
    with pytest.raises(ConfigError):
        runtime.app("other").session("")
    for session in opened:
        session.close()
    assert (runtime._talks._shares._total, dict(runtime._talks._shares._by_app)) == (0, {})


def test_sessions_that_were_dropped_make_room(open_runtime):
    runtime = open_runtime(num_sessions_max=20)
    app = runtime.app("forgetful")
    held = app.session("held")
    for number in range(50):
        app.session(f"named {number % 12}" if number % 2 else None)
    for _ in held.stream("Hi", sampling=sampling(900)):
        break
    assert held.messages
    assert not held.closed


@pytest.mark.parametrize("limit", ["num_waiting_max", "num_sessions_max"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "many", (1 << 20) + 1])
def test_a_limit_is_a_count(runtime, limit, value):
    with pytest.raises(ConfigError, match=limit):
        runtime.app("limited", **{limit: value})


@pytest.mark.slow
def test_a_flood_whose_limits_were_lifted_costs_a_stream_no_step(open_runtime, monkeypatch):
    """A thousand requests, ten thousand names, and a thread that looks them up."""
    runtime = open_runtime(pool_bytes=1 << 22, tbt_target_ms=5.0)
    calm = runtime.app("calm", pinned_bytes=1 << 20)
    expected = list(answer(calm.session(), random_ids(30), sampling(60)).token_ids)
    for number in range(10_000):
        runtime.app(f"name {number}")
    flood = runtime.app("flood", num_waiting_max=1000, num_sessions_max=1000)
    over = threading.Event()

    def look_up():
        number = 0
        while not over.wait(1e-4):
            runtime.app(f"name {number % 20_000}")
            number += 1

    thread = threading.Thread(target=look_up)
    thread.start()
    streams = fill(flood, 1000, num_tokens=30, max_tokens=100)
    counts, state = [0], Request.state

    def spy(request):
        counts[0] += 1
        return state(request)

    try:
        with calm.session().submit_ids(random_ids(30), sampling(60)) as stream:
            stream.wait()  # it decodes from here on
            monkeypatch.setattr(Request, "state", spy)
            before = runtime.counters()
            for _ in stream:
                pass
            after = runtime.counters()
            monkeypatch.undo()
        num_waiting = sum(not stream.done for stream in streams)
    finally:
        over.set()
        thread.join()
    assert stream.reply is not None
    assert_same(runtime, random_ids(30), stream.reply.token_ids, expected)
    # It is in every step that runs.
    assert after.num_steps - before.num_steps <= 60 + 2
    assert num_waiting > 800
    num_plans = after.num_plans - before.num_plans
    assert counts[0] <= 2 * HEADS_MAX * max(1, num_plans)
    assert {*runtime._engine.loop.ledger.accounts.apps} <= {"\0evaluation", "calm", "flood"}
    for stream in streams:
        stream.close()
