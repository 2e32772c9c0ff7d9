"""The system is short of memory: idle sessions go to disk, and what they had goes back to it."""

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, eventually, sampling

from edgekv import pressure
from edgekv.pressure import PressureLevel
from edgekv.runtime import Runtime


@pytest.fixture
def system(monkeypatch):
    """What the system says; runtimes that are opened after this ask it every millisecond."""
    levels = [PressureLevel.NORMAL]
    monkeypatch.setattr(pressure, "POLL_S", 0.001)
    monkeypatch.setattr(pressure, "CALM_MS", 1.0)
    monkeypatch.setattr(pressure, "system_reader", lambda: lambda: levels[0])
    return levels


POOL_BYTES = 1 << 23


def allocated(runtime):
    return runtime.pool_snapshot().allocated_bytes


def test_idle_sessions_leave_and_come_back(system, open_runtime):
    runtime = open_runtime(pool_bytes=POOL_BYTES)
    sessions = [runtime.app().session() for _ in range(12)]
    prompts = [random_ids(400, seed=i) for i in range(12)]
    first = [answer(s, p, sampling(8)) for s, p in zip(sessions, prompts, strict=True)]
    assert allocated(runtime) > 0.6 * POOL_BYTES
    system[0] = PressureLevel.CRITICAL
    eventually(lambda: allocated(runtime) < 0.45 * POOL_BYTES)
    runtime.check_integrity()
    assert runtime.counters().swap.num_swap_outs > 0

    for session, prompt, before in zip(sessions, prompts, first, strict=True):
        again = answer(session, prompt, sampling(8))
        assert again.token_ids == before.token_ids
        assert again.stats.num_cached_tokens == len(prompt) - 1, "nothing was lost"
    assert sum(s.last_reply.stats.num_restored_tokens for s in sessions) > 0
    eventually(lambda: allocated(runtime) < 0.45 * POOL_BYTES)

    system[0] = PressureLevel.NORMAL
    eventually(lambda: runtime._monitor._budget.level is PressureLevel.NORMAL)
    for session, prompt in zip(sessions, prompts, strict=True):
        answer(session, prompt, sampling(8))
    assert allocated(runtime) > 0.6 * POOL_BYTES


def test_who_answers_is_not_disturbed(system, open_runtime):
    runtime = open_runtime(pool_bytes=POOL_BYTES)
    prompt = random_ids(900)
    expected = answer(runtime.app().session(), prompt, sampling(60)).token_ids
    system[0] = PressureLevel.CRITICAL
    eventually(lambda: runtime._monitor._budget.level is PressureLevel.CRITICAL)
    assert answer(runtime.app().session(), prompt, sampling(60)).token_ids == expected


def test_a_runtime_that_is_closed_is_not_told(system, tiny_folder):
    with Runtime.open(str(tiny_folder)) as runtime:
        assert runtime._monitor._thread.is_alive()
    assert not runtime._monitor._thread.is_alive()
