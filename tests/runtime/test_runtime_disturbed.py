"""What callers do beside a stream costs it no step, whatever they do and however often."""

import itertools
import threading

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, eventually, sampling

from edgekv.config import SwapOptions
from edgekv.engine.loop import Loop
from edgekv.engine.runner import Runner, Step
from edgekv.errors import EdgeKVError
from edgekv.runtime import Runtime
from edgekv.sched.cost import CostModel

LENGTH = 100


@pytest.fixture
def thrown(monkeypatch):
    """Of each step that was prepared: whether it was thrown away, in order."""
    outcomes, compute = [], Loop._compute

    def spy(self, plan):
        before = self.ledger.counted.num_steps_thrown
        compute(self, plan)
        outcomes.append(self.ledger.counted.num_steps_thrown > before)

    monkeypatch.setattr(Loop, "_compute", spy)
    return outcomes


def beside(runtime: Runtime, disturb) -> int:
    """Decode `LENGTH` tokens while a thread disturbs; return how often it did."""
    expected = answer(runtime.app("alone").session(), random_ids(20), sampling(LENGTH))
    done, rounds, errors = threading.Event(), [], []

    def loop():
        try:
            while not done.is_set() or not rounds:
                disturb()
                rounds.append(1)
        except (EdgeKVError, AssertionError) as error:  # told below
            errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        reply = answer(runtime.app("stream").session(), random_ids(20), sampling(LENGTH))
    finally:
        done.set()
        thread.join()
    assert errors == []
    assert reply.token_ids == expected.token_ids
    return len(rounds)


def test_looking_up_apps_and_changing_their_terms_costs_no_step(open_runtime, thrown):
    runtime = open_runtime()
    weights = iter(range(1, 1 << 30))
    beside(runtime, lambda: runtime.app("x", weight=1.0 + next(weights) % 7))
    # The two answers came and went; nobody else is asked for anything.
    assert sum(thrown) <= 2


def test_figures_cost_no_step(open_runtime, thrown):
    runtime = open_runtime()
    beside(
        runtime, lambda: (runtime.counters(), runtime.pool_snapshot(), runtime.check_integrity())
    )
    assert sum(thrown) <= 2


def test_sessions_that_open_and_close_cost_no_step(open_runtime, thrown):
    runtime = open_runtime()
    app = runtime.app("x")
    beside(runtime, lambda: app.session().close())
    assert sum(thrown) <= 2


def test_a_session_that_is_suspended_costs_no_step_of_others(open_runtime, thrown):
    runtime = open_runtime(swap=SwapOptions(group_bytes=1 << 14))
    resting = runtime.app("x").session("resting")
    answer(resting, random_ids(200), sampling(1))
    thrown.clear()

    def disturb():
        resting.suspend()
        answer(resting, random_ids(200), sampling(1))

    rounds = beside(runtime, disturb)
    assert sum(thrown) <= 2 * rounds + 2  # each answer comes, and goes


@pytest.fixture
def rows_beside(monkeypatch):
    """Of each step in which somebody decodes beside an evaluation: the evaluation's rows."""
    num_rows, compute = [], Loop._compute

    def spy(self, plan):
        work = [(self.ledger.requests[s.request_id], s) for s in plan.segments]
        if any(r.logits is None and s.start >= len(r.prompt_ids) for r, s in work):
            num_rows.extend(s.num_rows for r, s in work if r.logits is not None)
        compute(self, plan)

    monkeypatch.setattr(Loop, "_compute", spy)
    return num_rows


def test_an_evaluation_goes_in_chunks_beside_who_decodes(
    open_runtime, monkeypatch, thrown, rows_beside
):
    step_ms = CostModel.step_ms  # more than the target on any machine, of one row already
    monkeypatch.setattr(CostModel, "step_ms", lambda cost, shape: 1.0 + step_ms(cost, shape))
    runtime = open_runtime(tbt_target_ms=1.0)
    ids = random_ids(250)
    expected = runtime.logits(ids)
    rounds = beside(runtime, lambda: runtime.logits(ids))
    assert sum(thrown) <= 2 * rounds + 2
    # A target that is never met still lets an evaluation go on, row by row; all of it is accounted.
    assert len(rows_beside) > 1
    assert max(rows_beside) == 1
    assert runtime.counters().service_ms["\0evaluation"] > 0
    assert abs(runtime.logits(ids) - expected).max() < 1e-4


def test_a_crowd_that_comes_all_the_time_cannot_keep_a_step_from_running(open_runtime, thrown):
    runtime = open_runtime()
    app = runtime.app("x")
    sessions = [app.session() for _ in range(8)]

    def disturb():
        streams = [s.submit_ids(random_ids(9, i), sampling(1)) for i, s in enumerate(sessions)]
        for stream in streams:
            with stream:
                pass  # taken back at once

    beside(runtime, disturb)
    # For somebody's sake a step is thrown away once; the next goes first, unless who is in it left.
    runs = "".join("x" if was else "." for was in thrown)
    assert "." in runs
    assert runs.count(".") >= LENGTH


def test_a_step_that_is_owed_is_not_thrown_away_for_who_comes(open_runtime, monkeypatch, thrown):
    """Requests arrive behind prepared steps, also behind those that are owed, which run anyhow."""
    held, holds = [], Step.holds.fget  # asked once of each step that was prepared

    def spy(self):
        held.append(holds(self))
        return held[-1]

    monkeypatch.setattr(Step, "holds", property(spy))
    runtime = open_runtime()
    app = runtime.app("x")
    sessions = [app.session() for _ in range(64)]
    eventually(lambda: len(runtime._talks._open) >= 64)
    streams, prepared, prepare = [], itertools.count(), Runner.prepare

    def another_comes(self, *args):
        step = prepare(self, *args)
        # Who comes is given memory, and then a step is owed: after two of them one step is left
        # alone, so that the next comes behind one that is not owed, and that one is thrown away.
        if next(prepared) % 3 < 2 and len(streams) < len(sessions):
            session = sessions[len(streams)]
            streams.append(session.submit_ids(random_ids(5), sampling(1)))
        return step

    monkeypatch.setattr(Runner, "prepare", another_comes)
    reply = answer(runtime.app("stream").session(), random_ids(20), sampling(100))
    assert len(reply.token_ids) == 100
    assert len(streams) == 64
    for stream in streams:
        for _ in stream:
            pass
    assert len(held) >= LENGTH
    assert 8 <= sum(thrown) <= 66
    again = [held[i] for i in range(1, len(thrown)) if thrown[i - 1] and thrown[i]]
    assert not any(again)  # only if it does not hold any more
