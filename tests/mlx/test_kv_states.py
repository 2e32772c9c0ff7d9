"""Positions from which a session with states can go on; arrays are of no interest here."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kv.layout import SNAPSHOTS_MAX
from edgekv.kv.states import SessionStates


def states_of(position):
    return {0: (f"state behind {position}",)}


def session(num_tokens, *kept):
    states = SessionStates()
    for position in kept:
        states.keep(position, states_of(position))
    states.move_on(states_of(num_tokens))
    return states


def test_without_states_any_position_will_do():
    states = SessionStates()
    assert [states.resume_point(n, 10, resident=True) for n in (0, 3, 10, 99)] == [0, 3, 10, 10]


def test_it_goes_on_from_the_last_snapshot_before():
    states = session(100, 32, 64)
    points = [states.resume_point(n, 100, resident=True) for n in (10, 32, 63, 64, 99, 100, 200)]
    assert points == [0, 32, 32, 64, 64, 100, 100]
    states.truncate(64, 100)
    assert states.now == states_of(64)
    states.truncate(32, 64)
    assert (states.now, [*states.kept]) == (states_of(32), [32])
    states.truncate(0, 32)
    assert (states.now, states.kept) == ({}, {})


def test_what_is_on_disk_is_of_use_to_who_is_not_in_memory():
    states = session(100, 64)
    states.note_written([32, 96])
    assert states.resume_point(99, 100, resident=True) == 64
    assert states.resume_point(99, 100, resident=False) == 96
    states.forget_arrays()
    assert states.resume_point(95, 100, resident=False) == 32
    states.unwrite(31)
    assert states.resume_point(95, 100, resident=False) == 0, "and not anywhere"


def test_the_newest_are_kept_and_the_pinned_one():
    states = SessionStates()
    states.keep(7, states_of(7), pinned=True)
    for position in range(10, 100, 10):
        states.keep(position, states_of(position))
    assert [*states.kept] == [7, 80, 90]
    assert len(states.kept) == SNAPSHOTS_MAX
    states.keep(95, states_of(95), pinned=True)
    assert [*states.kept] == [80, 90, 95]


def test_rows_that_may_run_again_have_one_snapshot_at_a_time():
    states = session(50, 32, 48)
    for position in range(50, 60):
        states.keep_again(position)
        states.move_on(states_of(position + 1))
        assert states.resume_point(position, position + 1, resident=True) == position
        assert [*states.kept] == [32, 48, position]
    states.truncate(59, 60)
    assert states.now == states_of(59)


def test_a_group_s_snapshot_is_not_taken_for_one_of_those():
    states = session(64, 64)
    states.keep_again(64)
    states.move_on(states_of(65))
    states.keep_again(65)
    assert [*states.kept] == [64, 65]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("run"), st.integers(1, 40)),
            st.tuples(st.just("cut"), st.integers(0, 200)),
            st.tuples(st.just("again"), st.just(1)),
        ),
        max_size=30,
    )
)
def test_the_state_is_always_that_of_the_tokens(steps):
    states, num_tokens = SessionStates(), 0
    for what, count in steps:
        if what == "cut":
            point = states.resume_point(count, num_tokens, resident=True)
            assert point <= min(count, num_tokens)
            states.truncate(point, num_tokens)
            num_tokens = point
        else:
            if what == "again":
                states.keep_again(num_tokens)
            end = num_tokens + count
            states.move_on(states_of(end))
            for position in range(num_tokens - num_tokens % 16 + 16, end + 1, 16):
                states.keep(position, states_of(position), pinned=position == 48)
            num_tokens = end
        assert states.now == (states_of(num_tokens) if num_tokens else {})
        assert len(states.kept) <= SNAPSHOTS_MAX
        for position, kept in states.kept.items():
            assert kept == states_of(position)
            assert 0 <= position <= num_tokens


def test_a_prefix_is_taken_over_with_the_snapshots_in_it():
    donor, states = session(100, 32, 64, 96), session(10, 5)
    states.truncate(0, 10)
    states.take(donor, 64, 100)
    assert states.now == states_of(64)
    assert [*states.kept] == [32, 64]
    assert donor.now == states_of(100)


@pytest.mark.parametrize("position", [0, 50])
def test_nothing_can_be_taken_from_where_there_is_none(position):
    states = SessionStates()
    states.take(session(100, 64), position, 100)
    assert states.now == {}
