import pytest

from edgekv.bench.sessions.trace import KEEP, RankTrace
from edgekv.errors import ConfigError

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
