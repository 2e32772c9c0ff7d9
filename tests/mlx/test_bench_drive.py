"""Users on one thread, over made-up streams."""

import pytest

from edgekv.bench.sessions.drive import Driver, Pause
from edgekv.errors import EngineFailed


class FakeStream:
    """Ends after it was asked `polls` times for what it has."""

    def __init__(self, reply="reply", *, polls=2, error=None):
        self._polls = polls
        self._made = reply
        self._error = error
        self.done = False
        self.reply = None
        self.closed = False

    def wait(self, timeout_s):
        assert timeout_s == 0.0, "the driver never blocks"
        self._polls -= 1
        if self._polls > 0:
            return
        self.done = True
        if self._error is not None:
            raise self._error
        self.reply = self._made
        return

    def close(self):
        self.closed = self.done = True


def test_users_are_played_to_the_end_and_get_their_replies():
    seen = []

    def user(name, polls):
        seen.append((name, (yield FakeStream(f"{name}1", polls=polls))))
        yield Pause(1.0)
        seen.append((name, (yield FakeStream(f"{name}2"))))

    Driver().run([user("a", 9), user("b", 1)])
    assert seen[0] == ("b", "b1")
    assert sorted(seen) == [("a", "a1"), ("a", "a2"), ("b", "b1"), ("b", "b2")]


def test_pauses_end_in_order():
    seen = []

    def user(ms):
        yield Pause(ms)
        seen.append(ms)

    Driver().run([user(30.0), user(1.0), user(15.0)])
    assert seen == [1.0, 15.0, 30.0]


def test_a_failed_request_is_raised_where_its_user_waits():
    seen = []

    def user():
        try:
            yield FakeStream(error=EngineFailed("out of luck"))
        except EngineFailed as error:
            seen.append(str(error))
        seen.append((yield FakeStream("next")))

    Driver().run([user()])
    assert seen == ["out of luck", "next"]


def test_a_failure_that_nobody_handles_ends_all():
    other, closed = FakeStream(polls=1 << 30), []

    def fails():
        yield FakeStream(error=EngineFailed("out of luck"))

    def waits():
        try:
            yield other
        finally:
            closed.append(True)

    with pytest.raises(EngineFailed):
        Driver().run([waits(), fails()])
    assert other.closed
    assert closed == [True]


def test_when_time_is_up_users_are_closed_where_they_wait():
    streams, ended = [], []

    def endless(moves):
        try:
            while True:
                yield next(moves)
        finally:
            ended.append(moves)

    def stream_moves():
        streams.append(FakeStream(polls=1 << 30))
        yield streams[0]

    def pause_moves():
        while True:
            yield Pause(1.0)

    Driver().run([endless(stream_moves()), endless(pause_moves())], for_ms=20.0)
    assert len(ended) == 2
    assert streams[0].closed


def test_ticks_come_at_the_start_now_and_then_and_at_the_end():
    times = []

    def user():
        yield Pause(50.0)

    Driver().run([user()], tick=times.append, tick_ms=10.0)
    assert len(times) >= 3
    assert times == sorted(times)


def test_a_user_who_leaves_at_once_is_no_trouble():
    def user():
        return
        yield

    Driver().run([user()])
