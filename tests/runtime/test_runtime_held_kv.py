"""Sessions that come back with KV of their own to a pool that is nearly full of it."""

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, greedy_by_hand, sampling

from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.kv.layout import Heads, KVLayout
from edgekv.runtime import Runtime

LAYOUT = KVLayout(heads=(Heads(2, 16, 16),) * 3, dtype_bytes=4, context_max=1024)


@pytest.fixture
def runtime(tiny_folder):
    """Six granules: a session can have them all, but old and new buffers not side by side."""
    pool_bytes = LAYOUT.capacity_bytes(6 * LAYOUT.granule_tokens)
    config = RuntimeConfig(pool_bytes=pool_bytes, swap=SwapOptions(mode="off"))
    with Runtime.open(str(tiny_folder), config=config) as runtime:
        yield runtime
        runtime.check_integrity()


def test_a_turn_that_needs_all_of_the_pool_gives_up_what_the_session_held(runtime):
    session = runtime.app("app").session()
    answer(session, random_ids(20), sampling(5))
    prompt = random_ids(20) + random_ids(600, seed=1)
    reply = answer(session, prompt, sampling(5))
    assert reply.finish_reason == "length"
    session.close()  # the slow twin needs the pool
    assert list(reply.token_ids) == greedy_by_hand(runtime, prompt, 5)


def test_two_sessions_that_wait_do_not_hold_each_other_up(runtime):
    app = runtime.app("app")
    first, second = app.session(), app.session()
    answer(first, random_ids(300, seed=1), sampling(3))
    answer(second, random_ids(200, seed=2), sampling(3))
    streams = [
        first.submit_ids(random_ids(500, seed=1), sampling(5)),
        second.submit_ids(random_ids(600, seed=2), sampling(5)),
    ]
    for stream in streams:
        with stream:
            for _ in stream:
                pass
        assert stream.reply.finish_reason == "length"
