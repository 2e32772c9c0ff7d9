"""Load in units of a capacity, and plays that time ends."""

from dataclasses import replace

import pytest
from tiny_models import tiny_config, write_folder

from edgekv.bench.sessions.conversations import (
    THINK_S,
    ConversationShape,
    Talk,
    Turn,
    draw_steady,
)
from edgekv.bench.sessions.load import (
    Capacity,
    TimeBudget,
    fit_size,
    mean_open_bytes,
    measure_capacity,
    num_busy,
)
from edgekv.bench.sessions.turns import Play
from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.kv.layout import Heads, KVLayout
from edgekv.runtime import Runtime

SHAPE = ConversationShape(num_sessions=12, turns_mean=5.0, tokens_mean=1000)
MEASURED = Capacity(rows_per_s=400.0, recall_per_s=4000.0, num_busy=3)


def test_conversations_come_at_a_part_of_the_capacity():
    cycle_ms = MEASURED.cycle_ms(SHAPE, 0.5)
    assert MEASURED.turn_ms(SHAPE) == pytest.approx(500.0)  # 200 rows
    # Of twelve, one comes back a cycle each, and for every four that do one begins: that is half
    # of the two turns that a second is good for.
    turns_per_s = SHAPE.num_sessions * 1.25 / (1e-3 * cycle_ms)
    assert turns_per_s == pytest.approx(0.5 * 2.0)
    think_ms = 1e3 * MEASURED.think_scale(SHAPE, 0.5) * THINK_S.mean()
    assert think_ms == pytest.approx(cycle_ms - 3 * 500.0)


def test_half_the_speed_is_twice_the_time():
    slow = replace(MEASURED, rows_per_s=200.0)
    for pace in (Capacity.cycle_ms, Capacity.think_scale):
        assert pace(slow, SHAPE, 0.6) == pytest.approx(2 * pace(MEASURED, SHAPE, 0.6))


def test_think_times_are_never_nothing():
    assert MEASURED.think_scale(replace(SHAPE, num_sessions=3), 1.0) > 0


def fit(speed, **kwargs):
    capacity = Capacity(rows_per_s=400.0 * speed, recall_per_s=4000.0 * speed, num_busy=3)
    options = {"row_s": 60.0, "utilisation": 0.6, "turns_mean": 5.5, "tokens_mean": 2048}
    return fit_size(capacity, **options | kwargs)


def test_sizes_fit_the_machine_and_the_time():
    assert fit(100.0) == (16, 2048)
    assert fit(0.001) == (8, 192)
    sizes = [fit(speed) for speed in (0.1, 0.3, 1.0, 3.0, 10.0)]
    assert [tokens for _, tokens in sizes] == sorted(tokens for _, tokens in sizes)
    assert fit(1.0) == fit(2.0, row_s=30.0)
    assert fit(100.0, num_open=40) == (40, 2048)
    assert fit(0.001, tokens_mean=100) == (8, 100)


def test_a_row_of_a_fitted_size_has_enough_turns():
    for speed in (0.5, 1.0, 2.0, 4.0):
        number, tokens = fit(speed)
        turn_s = tokens / 5.5 / (400.0 * speed)
        recall_s = number * tokens / (4000.0 * speed)
        assert 0.6 * (60.0 - recall_s) / turn_s >= 4 * number


def test_busy_users_are_those_whose_sessions_the_pool_holds():
    assert [num_busy(n, 0.25) for n in (64, 16, 4, 1)] == [16, 4, 2, 2]
    assert num_busy(8, 2.0) == 8


def test_open_sessions_are_counted_while_they_are_open():
    layout = KVLayout(heads=(Heads(1, 64, 64),), dtype_bytes=4, context_max=4096)
    turn = Turn(think_ms=0.0, input_tokens=900, output_tokens=100)

    def size(tokens):
        return layout.capacity_bytes(layout.capacity_for(tokens))

    def mean(conversation):
        return mean_open_bytes(layout, [conversation], cycle_ms=100.0, window_ms=400.0)

    # Two turns from the beginning: a quarter of the time after each, then it is over.
    two = Talk(start_ms=0.0, turns=(turn, turn))
    assert mean(two) == pytest.approx((size(1000) + size(2000)) / 4, rel=0.01)
    # From before the play: it is there until its turn comes.
    late = Talk(start_ms=300.0, turns=(turn,), num_past_tokens=500)
    assert mean(late) == pytest.approx((3 * size(500) + size(1500)) / 4, rel=0.01)
    assert mean(replace(late, num_past_tokens=0)) == pytest.approx(size(1000) / 4, rel=0.01)


def test_time_is_shared_among_the_rows_that_are_left():
    assert TimeBudget(None).row_s(3) is None
    assert 0 < TimeBudget(60.0).row_s(6) <= 10.0
    assert TimeBudget(0.0).row_s(1) == 0.0


# --- on a tiny model ---


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("model"), tiny_config("llama"))
    config = RuntimeConfig(pool_bytes=1 << 24, swap=SwapOptions(mode="off"))
    with Runtime.open(str(folder), config=config) as runtime:
        yield runtime


def talk(num, *, output=4, past=0, start_ms=0.0):
    turns = (Turn(think_ms=0.0, input_tokens=9, output_tokens=output),) * 3
    one = Talk(start_ms=start_ms, turns=turns, num_past_tokens=past)
    return [one] * num


@pytest.mark.slow
def test_capacity_is_measured_on_busy_users(runtime):
    shape = ConversationShape(num_sessions=6, turns_mean=3.0, tokens_mean=150, tokens_max=900)
    conversations = draw_steady(shape, cycle_ms=1.0, window_ms=10.0)
    capacity = measure_capacity(runtime, conversations, 2, 1.0)
    assert capacity.num_busy == 2
    assert capacity.rows_per_s > 1
    assert capacity.recall_per_s > 1
    assert runtime.pool_snapshot().used_bytes == 0


@pytest.mark.slow
def test_busy_users_play_one_conversation_after_the_other(runtime):
    played = Play(runtime, talk(7, start_ms=1e9)).run(num_busy=2)  # starts do not count
    assert [len(turns) for turns in played.answered.values()] == [3] * 7


@pytest.mark.slow
def test_what_was_said_before_is_in_the_prompt_and_not_computed_again(runtime):
    play = Play(runtime, talk(2, past=40))
    assert play.recall() == 80
    stats = play.run().answered["session-0"][0].reply.stats
    assert stats.num_prompt_tokens == 40 + 9
    assert stats.num_cached_tokens == 39
    assert [len(past) for past in play.played.pasts.values()] == [40, 40]
    assert play.played.num_once_tokens == 2 * (40 + 3 * (9 + 4) - 1)


@pytest.mark.slow
def test_when_time_is_up_turns_are_cut_off_and_sessions_closed(runtime):
    conversations = [*talk(3, output=900, past=5), *talk(1, past=7, start_ms=1e9)]
    play = Play(runtime, conversations)
    play.recall()
    played = play.run(for_ms=50.0)
    assert sorted(turn.who for turn in played.asked) == [f"session-{i}" for i in range(3)]
    assert not any(turn.whole for turn in played.asked)
    assert all(turn.ttft_ms > 0 for turn in played.asked)
    assert played.num_once_tokens > 0
    runtime.check_integrity()
    assert runtime.pool_snapshot().used_bytes == 0
