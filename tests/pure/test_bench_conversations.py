from dataclasses import replace
from statistics import mean

import pytest

from edgekv.bench.sessions.conversations import (
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    THINK_S,
    ConversationShape,
    Quantiles,
    draw_conversations,
    draw_steady,
)
from edgekv.errors import ConfigError

MANY = ConversationShape(num_sessions=600, tokens_mean=2000, tokens_max=1 << 20)


def quantile(values, q):
    return sorted(values)[int(q * len(values))]


def test_published_points_are_met():
    assert INPUT_TOKENS.at(0.5) == pytest.approx(1020)
    assert OUTPUT_TOKENS.at(0.95) == pytest.approx(451)
    assert THINK_S.at(0.05) == pytest.approx(30)


def test_between_and_beyond_points_the_logarithm_is_linear():
    quantiles = Quantiles(((0.25, 10.0), (0.75, 1000.0)))
    assert quantiles.at(0.5) == pytest.approx(100.0)
    assert quantiles.at(0.0) == pytest.approx(1.0)
    assert quantiles.at(1.0) == pytest.approx(10_000.0)
    assert Quantiles(((0.1, 7.0), (0.2, 7.0))).mean() == pytest.approx(7.0)


def test_quantiles_rise():
    for quantiles in (INPUT_TOKENS, OUTPUT_TOKENS, THINK_S):
        values = [quantiles.at(i / 100) for i in range(101)]
        assert values == sorted(values)
        assert 0 < values[0] < quantiles.mean() < values[-1]


def test_conversations_have_the_means_that_were_asked_for():
    conversations = draw_conversations(MANY)
    assert mean(len(c.turns) for c in conversations) == pytest.approx(5.5, rel=0.15)
    assert mean(c.num_tokens for c in conversations) == pytest.approx(2000, rel=0.15)
    gaps = conversations[-1].start_ms / len(conversations)
    assert gaps == pytest.approx(1e3 / MANY.arrivals_per_s, rel=0.15)


def test_lengths_keep_the_shape_of_the_trace():
    turns = [turn for c in draw_conversations(MANY) for turn in c.turns]
    inputs = [turn.input_tokens for turn in turns]
    expected = INPUT_TOKENS.at(0.95) / INPUT_TOKENS.at(0.25)
    assert quantile(inputs, 0.95) / quantile(inputs, 0.25) == pytest.approx(expected, rel=0.15)
    thinks = [turn.think_ms for c in draw_conversations(MANY) for turn in c.turns[1:]]
    assert quantile(thinks, 0.5) == pytest.approx(MANY.think_scale * 123e3, rel=0.15)


def test_the_same_seed_draws_the_same():
    assert draw_conversations(MANY) == draw_conversations(MANY)
    assert draw_conversations(MANY) != draw_conversations(replace(MANY, seed=1))
    fewer = draw_conversations(replace(MANY, num_sessions=5))
    assert fewer == draw_conversations(MANY)[:5]


def submissions(conversations):
    """When turns are submitted if answers take no time."""
    for conversation in conversations:
        at_ms = conversation.start_ms
        for turn in conversation.turns:
            at_ms += turn.think_ms
            yield at_ms


def test_a_steady_state_is_one_from_its_beginning():
    cycle_ms = 1e3 * MANY.think_scale * THINK_S.mean()
    window_ms = 3 * cycle_ms
    conversations = draw_steady(MANY, cycle_ms=cycle_ms, window_ms=window_ms)
    at_ms = [ms for ms in submissions(conversations) if ms < window_ms]
    per_cycle = MANY.num_sessions * MANY.turns_mean / (MANY.turns_mean - 1)  # firsts among them
    assert len(at_ms) == pytest.approx(3 * per_cycle, rel=0.1)
    for third in range(3):
        count = sum(third * cycle_ms <= ms < (third + 1) * cycle_ms for ms in at_ms)
        assert count == pytest.approx(per_cycle, rel=0.15)
    open_ones = conversations[: MANY.num_sessions]
    assert mean(c.num_past_tokens for c in open_ones) == pytest.approx(
        MANY.tokens_mean * 4.5 / 5.5, rel=0.15
    )
    assert {c.num_past_tokens for c in conversations[MANY.num_sessions :]} == {0}
    assert max(c.start_ms for c in conversations[MANY.num_sessions :]) < window_ms


def test_a_machine_half_as_fast_is_asked_the_same_half_as_fast():
    def drawn(factor):
        shape = replace(MANY, think_scale=0.01 * factor)
        return draw_steady(shape, cycle_ms=500.0 * factor, window_ms=2000.0 * factor)

    for fast, slow in zip(drawn(1), drawn(2), strict=True):
        assert slow.start_ms == pytest.approx(2 * fast.start_ms)
        assert slow.num_past_tokens == fast.num_past_tokens
        for a, b in zip(fast.turns, slow.turns, strict=True):
            assert (a.input_tokens, a.output_tokens) == (b.input_tokens, b.output_tokens)
            assert b.think_ms == pytest.approx(2 * a.think_ms)


def test_the_past_leaves_room_for_a_turn():
    shape = ConversationShape(num_sessions=200, tokens_mean=300, tokens_max=310)
    for conversation in draw_steady(shape, cycle_ms=1.0, window_ms=10.0):
        assert conversation.num_tokens <= 310
        assert conversation.turns


def test_no_conversation_exceeds_the_context():
    shape = ConversationShape(num_sessions=200, tokens_mean=300, tokens_max=310)
    for conversation in draw_conversations(shape):
        assert len(conversation.turns) >= 1
        assert conversation.num_tokens <= 310
        assert all(t.input_tokens >= 1 and t.output_tokens >= 2 for t in conversation.turns)
        assert conversation.turns[0].think_ms == 0


def test_one_turn_and_no_thinking():
    shape = replace(MANY, turns_mean=1.0, think_scale=0.0)
    assert {len(c.turns) for c in draw_conversations(shape)} == {1}
    shape = replace(MANY, think_scale=0.0)
    assert {t.think_ms for c in draw_conversations(shape) for t in c.turns} == {0.0}


@pytest.mark.parametrize(
    "change",
    [
        {"num_sessions": 0},
        {"turns_mean": 0.5},
        {"tokens_mean": 4},
        {"tokens_max": 1999},
        {"arrivals_per_s": 0.0},
        {"think_scale": -1.0},
        {"seed": -1},
    ],
)
def test_absurd_shapes_are_refused(change):
    with pytest.raises(ConfigError):
        replace(MANY, **change)
