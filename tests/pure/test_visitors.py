"""Who may look at the page."""

import pytest
from manual_clock import ManualClock

from edgekv.server.visitors import (
    INVITED_MS,
    NUM_INVITED_MAX,
    NUM_PASSES_MAX,
    PASS_MS,
    Visitors,
)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def visitors(clock):
    return Visitors(clock)


def test_an_address_lets_in_once(visitors):
    token = visitors.invite()
    admitted = visitors.admit(token)
    assert visitors.knows(admitted.place, admitted.cookie)
    assert visitors.admit(token) is None
    assert visitors.knows(admitted.place, admitted.cookie), "who tried again puts nobody out"


@pytest.mark.parametrize("token", ["", "x", "é\ud800", "a" * 10_000])
def test_nothing_else_does(visitors, token):
    visitors.invite()
    assert visitors.admit(token) is None


def test_place_and_cookie_belong_together(visitors):
    one, other = (visitors.admit(visitors.invite()) for _ in range(2))
    assert not visitors.knows(one.place, other.cookie)
    assert not visitors.knows(one.place, "")
    assert not visitors.knows("", one.cookie)
    assert len({one.place, one.cookie, other.place, other.cookie}) == 4


def test_an_address_ends_soon(visitors, clock):
    early, late = visitors.invite(), visitors.invite()
    clock.advance(INVITED_MS - 1)
    assert visitors.admit(early)
    clock.advance(1)
    assert visitors.admit(late) is None


def test_a_pass_ends(visitors, clock):
    admitted = visitors.admit(visitors.invite())
    clock.advance(PASS_MS - 1)
    assert visitors.knows(admitted.place, admitted.cookie)
    clock.advance(1)
    assert not visitors.knows(admitted.place, admitted.cookie)


def test_of_too_many_the_oldest_end(visitors):
    first, *rest = (visitors.invite() for _ in range(NUM_INVITED_MAX + 1))
    assert visitors.admit(first) is None
    assert all(visitors.admit(token) for token in rest)
    passes = [visitors.admit(visitors.invite()) for _ in range(NUM_PASSES_MAX + 1)]
    known = [visitors.knows(one.place, one.cookie) for one in passes]
    assert known == [False] + NUM_PASSES_MAX * [True]
