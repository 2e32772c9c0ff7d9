"""No app takes all of what is limited, and a refusal says whose limit it was."""

import random

import pytest

from edgekv.engine.shares import Shares
from edgekv.errors import QueueFull


def shares(num_max: int) -> Shares:
    return Shares(
        num_max,
        error=QueueFull,
        what="requests are waiting",
        limit="num_waiting_max",
        remedy="wait",
    )


def take_all(made: Shares, app: str, own_max: int | None = None) -> int:
    for count in range(10_000):
        try:
            made.take(app, own_max)
        except QueueFull:
            return count
    raise AssertionError


def test_alone_an_app_has_half_and_whoever_comes_next_finds_room():
    made = shares(1024)
    counts = [take_all(made, f"app {number}") for number in range(8)]
    assert counts == [513, 256, 128, 64, 32, 16, 8, 4]
    for _ in range(300):
        made.give_back("app 0")
    assert take_all(made, "app 9") > 100


@pytest.mark.parametrize("num_max", [1, 2])
def test_a_limit_of_one_or_two_is_anybodys(num_max):
    assert take_all(shares(num_max), "app") == num_max


def test_a_limit_of_its_own_counts_instead():
    made = shares(100)
    assert take_all(made, "few", 5) == 5
    assert take_all(made, "many", 90) == 90
    assert take_all(made, "late", 90) == 5


def test_a_refusal_names_the_app_the_limit_and_who_can_change_it():
    made = shares(10)
    take_all(made, "mine", 3)
    with pytest.raises(QueueFull) as caught:
        made.take("mine", 3)
    assert str(caught.value) == (
        "app 'mine': 3 requests are waiting, as many as its num_waiting_max allows"
    )
    assert caught.value.hint == "wait, or give the app more: app('mine', num_waiting_max=...)"
    take_all(made, "other")
    with pytest.raises(QueueFull) as caught:
        made.take("other")
    assert str(caught.value) == (
        "app 'other': 4 requests are waiting, and 3 are left for all apps, of 10"
    )
    take_all(made, "all", 10)
    with pytest.raises(QueueFull) as caught:
        made.take("late")
    assert str(caught.value) == "10 requests are waiting"
    assert caught.value.hint == "wait, or raise num_waiting_max"


def test_what_is_no_users_app_gets_no_advice_that_cannot_be_followed():
    made = shares(10)
    take_all(made, "\0evaluation")
    with pytest.raises(QueueFull) as caught:
        made.take("\0evaluation")
    assert str(caught.value).startswith("app 'evaluation': 6 requests")
    assert caught.value.hint == "wait"


def test_counts_come_back_to_nothing():
    made, draw, had = shares(50), random.Random(5), []
    for _ in range(2000):
        if had and draw.random() < 0.5:
            made.give_back(had.pop(draw.randrange(len(had))))
            continue
        app = draw.choice("abc")
        try:
            made.take(app, draw.choice([None, 20]))
        except QueueFull:
            assert len(had) >= 20
        else:
            had.append(app)
        assert made._total == len(had) <= 50
    for app in had:
        made.give_back(app)
    assert (made._total, dict(made._by_app)) == (0, {})
