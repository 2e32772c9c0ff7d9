"""Eight sessions that join, leave and cancel at random say what each says alone."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, sampling

from edgekv.config import RuntimeConfig
from edgekv.runtime import Runtime

NUM_SESSIONS = 8
NUM_TOKENS_MAX = 24
# 128 tokens fit before buffers grow: some prompts end just below that, and 256.
PROMPT_LENGTHS = (1, 16, 70, 110, 125, 180, 245)

# A session is asked if it is idle and read if it is not; or it is cancelled, or closed for good.
actions = st.lists(
    st.tuples(
        st.integers(0, NUM_SESSIONS - 1),
        st.sampled_from(["go_on", "go_on", "go_on", "read_all", "cancel", "close"]),
    ),
    min_size=20,
    max_size=50,
)


class Play:
    """Carries actions out and checks every token against the same request's answer alone."""

    def __init__(self, runtime, lengths, greedy):
        self.runtime = runtime
        self.prompts = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
        # Two apps, so that some sessions share prefixes and some must not.
        self.apps = [runtime.app("one"), runtime.app("two")]
        self.sessions, self.streams = {}, {}
        self.greedy = greedy

    def params(self, index):
        if index in self.greedy:
            return sampling(NUM_TOKENS_MAX)
        return sampling(NUM_TOKENS_MAX, temperature=1.0, seed=index)

    def go_on(self, index):
        if index in self.streams:
            self.read(index)
            return
        if index not in self.sessions:
            self.sessions[index] = self.apps[index % 2].session()
        stream = self.sessions[index].submit_ids(self.prompts[index], self.params(index))
        self.streams[index] = stream

    def read(self, index):
        stream = self.streams[index]
        stream.wait()
        if stream.done:
            self.end(index)

    def read_all(self, index):
        while index in self.streams:
            self.read(index)

    def cancel(self, index):
        if (stream := self.streams.get(index)) is not None:
            stream.close()
            self.end(index)

    def close(self, index):
        if (session := self.sessions.pop(index, None)) is not None:
            session.close()
            self.cancel(index)

    def end(self, index):
        reply = self.streams.pop(index).reply
        self.check(index, reply.token_ids)

    def check(self, index, tokens):
        expected = alone(self.runtime, self.prompts[index], self.params(index))
        assert len(tokens) <= len(expected)
        if index in self.greedy:
            assert_same(self.runtime, self.prompts[index], tokens, expected[: len(tokens)])
        else:
            assert tuple(tokens) == expected[: len(tokens)]

    def end_all(self):
        for index in list(self.streams):
            self.read_all(index)


_alone = {}


def alone(runtime, prompt, params):
    """The answer in an app that has nothing cached; remembered, for plays repeat prompts."""
    key = (tuple(prompt), params)
    if key not in _alone:
        with runtime.app(f"alone-{len(_alone)}").session() as session:
            _alone[key] = answer(session, prompt, params).token_ids
    return _alone[key]


@pytest.fixture(scope="module")
def roomy(tiny_folder: Path):
    with Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def tight(tiny_folder: Path):
    """Room for a few, and none reserved for answers: others wait, are pushed out, preempted."""
    config = RuntimeConfig(pool_bytes=7 * 128 * 768, tbt_target_ms=5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 1)
        with Runtime.open(str(tiny_folder), config=config) as runtime:
            yield runtime


def play(runtime, steps, lengths, greedy):
    played = Play(runtime, lengths, greedy)
    for index, action in steps:
        getattr(played, action)(index)
    runtime.check_integrity()
    played.end_all()
    for index in list(played.sessions):
        played.close(index)
    runtime.check_integrity()
    snapshot = runtime.pool_snapshot()
    assert snapshot.used_bytes == 0
    assert snapshot.peak_bytes <= snapshot.budget_bytes


plays = given(
    steps=actions,
    lengths=st.lists(st.sampled_from(PROMPT_LENGTHS), min_size=NUM_SESSIONS, max_size=NUM_SESSIONS),
    greedy=st.sets(st.integers(0, NUM_SESSIONS - 1)),
)
steady = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@plays
@steady
def test_eight_sessions_at_random_say_what_each_says_alone(roomy, steps, lengths, greedy):
    play(roomy, steps, lengths, greedy)


@pytest.mark.slow
@plays
@steady
def test_eight_sessions_in_too_small_a_pool_say_what_each_says_alone(tight, steps, lengths, greedy):
    play(tight, steps, lengths, greedy)
