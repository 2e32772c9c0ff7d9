"""Sessions that are asked, read, cancelled and closed at random, and what they must say."""

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, eventually, sampling

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

    def __init__(self, runtime, lengths, greedy, prefill=lambda _index: "exact"):
        self.runtime, self.prefill = runtime, prefill
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
        self.streams[index] = self.sessions[index].submit_ids(
            self.prompts[index], self.params(index), prefill=self.prefill(index)
        )

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

    def close_all(self):
        """Close all sessions; their memory comes back, and was never more than the budget."""
        for index in list(self.sessions):
            self.close(index)
        self.runtime.check_integrity()
        eventually(lambda: self.runtime.pool_snapshot().used_bytes == 0)
        snapshot = self.runtime.pool_snapshot()
        assert snapshot.peak_bytes <= snapshot.budget_bytes


_alone = {}


def alone(runtime, prompt, params):
    """The answer in an app that has nothing cached; remembered, for plays repeat prompts."""
    key = (runtime.path, tuple(prompt), params)
    if key not in _alone:
        with runtime.app(f"alone-{len(_alone)}").session() as session:
            _alone[key] = answer(session, prompt, params).token_ids
    return _alone[key]


plays = given(
    steps=actions,
    lengths=st.lists(st.sampled_from(PROMPT_LENGTHS), min_size=NUM_SESSIONS, max_size=NUM_SESSIONS),
    greedy=st.sets(st.integers(0, NUM_SESSIONS - 1)),
)
steady = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # no shrinking: plays take seconds
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
