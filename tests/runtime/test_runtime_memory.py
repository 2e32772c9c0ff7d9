"""The pool's budget is never exceeded, and what it takes away changes no answer."""

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, greedy_by_hand, sampling

from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.engine.ledger import Ledger
from edgekv.engine.runner import Runner
from edgekv.errors import PoolTooSmall, PromptTooLong
from edgekv.kv.pool import KVPool
from edgekv.runtime import Runtime

TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # K and V, layers, kv heads, head_dim, f32
GRANULE = 128  # tokens: 16 KiB / (2 kv heads * 16 * 4 bytes)


@pytest.fixture
def memory_plans(monkeypatch):
    """Every memory plan that is carried out from here on."""
    plans, apply = [], Ledger.apply

    def spy(self, plan, now_ms):
        plans.append(plan)
        apply(self, plan, now_ms)

    monkeypatch.setattr(Ledger, "apply", spy)
    return plans


def pool_bytes(num_granules):
    return num_granules * GRANULE * TOKEN_BYTES


def test_a_pool_that_holds_no_session_is_refused(tiny_folder):
    config = RuntimeConfig(pool_bytes=pool_bytes(1) - 1)
    with pytest.raises(PoolTooSmall, match="holds no session") as caught:
        Runtime.open(str(tiny_folder), config=config)
    assert str(pool_bytes(1)) in caught.value.hint


def test_the_smallest_pool_answers(open_runtime):
    runtime = open_runtime(pool_bytes=pool_bytes(1))
    assert runtime.context_max == GRANULE
    prompt = random_ids(100)
    reply = answer(runtime.app().session(), prompt, sampling(28))
    assert runtime.pool_snapshot().used_bytes == pool_bytes(1)
    assert len(reply.token_ids) == 28
    # Evaluation takes the room of who rests, like anybody.
    assert runtime.logits(prompt).shape[0] == 100
    assert runtime.pool_snapshot().used_bytes == 0


def test_a_prompt_that_the_pool_can_never_hold_is_refused(open_runtime):
    runtime = open_runtime(pool_bytes=pool_bytes(2), swap=SwapOptions(mode="off"))
    with pytest.raises(PromptTooLong, match="256") as caught:
        answer(runtime.app().session(), random_ids(300), sampling(1))
    assert "larger pool" in caught.value.hint


def test_pool_gib_overrides_the_configuration(tiny_folder):
    with Runtime.open(
        str(tiny_folder), pool_gib=0.25, config=RuntimeConfig(pool_bytes=pool_bytes(1))
    ) as runtime:
        assert runtime.pool_snapshot().budget_bytes == 1 << 28


def test_a_long_answer_grows_and_stays_exact(open_runtime, memory_plans):
    runtime = open_runtime()
    prompt = random_ids(20)
    reply = answer(runtime.app().session(), prompt, sampling(500))
    assert [plan for plan in memory_plans if plan.grow]
    whole = [*prompt, *reply.token_ids]
    logits = runtime.logits(whole)
    expected = logits.argmax(axis=-1)[len(prompt) - 1 : -1]
    different = [i for i, t in enumerate(reply.token_ids) if t != expected[i]]
    for i in different:  # teacher-forced, so every difference must be a tie by itself
        row = logits[len(prompt) - 1 + i]
        assert abs(row[reply.token_ids[i]] - row[expected[i]]) <= 1e-4


def test_idle_sessions_make_room_for_others_least_recently_used_first(open_runtime, memory_plans):
    runtime = open_runtime(pool_bytes=pool_bytes(3))
    app = runtime.app()
    sessions = [app.session() for _ in range(4)]
    prompts = [random_ids(30, seed=i) for i in range(4)]
    expected = [answer(s, p, sampling(6)) for s, p in zip(sessions, prompts, strict=True)]
    again = [answer(s, p, sampling(6)) for s, p in zip(sessions, prompts, strict=True)]
    assert [plan for plan in memory_plans if plan.drop]
    assert [r.token_ids for r in again] == [r.token_ids for r in expected]
    snapshot = runtime.pool_snapshot()
    assert snapshot.peak_bytes <= snapshot.budget_bytes


def test_requests_wait_for_room_and_all_are_answered(open_runtime):
    runtime = open_runtime(pool_bytes=pool_bytes(3), context_max=256)
    sessions = [runtime.app(f"app-{i}").session() for i in range(6)]
    prompts = [random_ids(40 + 10 * i, seed=i) for i in range(6)]
    streams = [s.submit_ids(p, sampling(12)) for s, p in zip(sessions, prompts, strict=True)]
    tokens = [[t for d in stream for t in d.token_ids] for stream in streams]
    for session in sessions:
        session.close()
    for prompt, ids in zip(prompts, tokens, strict=True):
        assert_same(runtime, prompt, ids, greedy_by_hand(runtime, prompt, 12))
    snapshot = runtime.pool_snapshot()
    assert snapshot.peak_bytes <= snapshot.budget_bytes


@pytest.fixture
def no_reserve(monkeypatch):
    """Requests are admitted without room for their answers: they grow early, and collide."""
    monkeypatch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 1)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}]
)
def test_who_is_preempted_says_the_same_as_alone(
    open_runtime, shared_runtime, memory_plans, no_reserve, options
):
    prompts = [random_ids(100, seed=i) for i in range(3)]
    params = sampling(60, **options)
    expected = []
    for i, prompt in enumerate(prompts):
        with shared_runtime.app(f"alone-{i}").session() as session:
            expected.append(answer(session, prompt, params).token_ids)
    memory_plans.clear()
    # All three fit until they grow; then two do.
    runtime = open_runtime(pool_bytes=pool_bytes(5))
    sessions = [runtime.app(f"app-{i}").session() for i in range(3)]
    streams = [s.submit_ids(p, params) for s, p in zip(sessions, prompts, strict=True)]
    tokens = [[t for d in stream for t in d.token_ids] for stream in streams]
    assert sum(len(plan.preempt) for plan in memory_plans) >= 1
    for prompt, ids, wanted in zip(prompts, tokens, expected, strict=True):
        if not options:  # greedy
            assert_same(shared_runtime, prompt, ids, wanted)
        else:
            assert tuple(ids) == wanted
    snapshot = runtime.pool_snapshot()
    assert snapshot.peak_bytes <= snapshot.budget_bytes


def test_the_budget_is_asked_before_every_allocation(open_runtime, monkeypatch):
    runtime = open_runtime(pool_bytes=pool_bytes(5))
    allocate, seen = KVPool.allocate, []

    def spy(self, capacity):
        buffers = allocate(self, capacity)
        seen.append(self.snapshot().allocated_bytes)
        return buffers

    monkeypatch.setattr(KVPool, "allocate", spy)
    for i in range(6):
        answer(runtime.app().session(), random_ids(60 * (i + 1), seed=i), sampling(4))
    assert len(seen) >= 6
    assert max(seen) <= pool_bytes(5)


def test_who_waits_for_memory_is_in_the_first_step_behind_who_left_it(open_runtime, monkeypatch):
    runtime = open_runtime(pool_bytes=pool_bytes(2), policy="fcfs", swap=SwapOptions(mode="off"))
    long, short, waiting = (runtime.app(name).session() for name in ("long", "short", "waiting"))
    steps, submit = [], Runner.submit

    def spy(self, step, now_ms):
        steps.append({request.session.app for request, _ in step.work})
        submit(self, step, now_ms)

    monkeypatch.setattr(Runner, "submit", spy)
    asked = [(long, 20, 90), (short, 20, 40), (waiting, 20, 2)]
    streams = [s.submit_ids(random_ids(n), sampling(tokens)) for s, n, tokens in asked]
    for stream in streams:
        for _ in stream:
            pass
    last = max(i for i, apps in enumerate(steps) if "short" in apps)
    assert steps[last] == {"long", "short"}
    assert steps[last + 1] == {"long", "waiting"}
