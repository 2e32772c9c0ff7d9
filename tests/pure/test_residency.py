"""The transition table of residency: what may happen to KV, and that nothing else can."""

import itertools

import pytest

from edgekv.kv.residency import TRANSITIONS, Residency, advance

EVENTS = sorted({event for _, event in TRANSITIONS})


def test_out_and_in_again():
    state = Residency.RESIDENT
    for event in ("swap_out", "swapped_out", "swap_in", "swapped_in"):
        state = advance(state, event)
    assert state is Residency.RESIDENT


@pytest.mark.parametrize(("state", "event"), [*itertools.product(Residency, EVENTS)])
def test_every_pair_is_in_the_table_or_a_bug(state, event):
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(AssertionError, match=f"{event} in state {state.value}"):
            advance(state, event)


def test_every_state_can_be_reached_and_left():
    assert {state for state, _ in TRANSITIONS} == set(Residency)
    assert set(TRANSITIONS.values()) == set(Residency)


def test_only_settled_kv_is_moved():
    """While bytes are under way nobody may start another move."""
    for state, event in TRANSITIONS:
        if event in ("swap_out", "swap_in"):
            assert state in (Residency.RESIDENT, Residency.SWAPPED)
