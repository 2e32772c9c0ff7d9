"""Memory pressure: what the system says, what it means for the pool, and who is told."""

import ctypes
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manual_clock import ManualClock

from edgekv import pressure
from edgekv.errors import RuntimeClosed
from edgekv.pressure import (
    CALM_MS,
    FRACTIONS,
    PressureLevel,
    PressureMonitor,
    SoftBudget,
    parse_psi,
    read_psi,
    read_sysctl,
    system_reader,
)

NORMAL, WARNING, CRITICAL = PressureLevel


def psi(some: str = "0.00", full: str = "0.00") -> str:
    rest = "avg60=1.00 avg300=99.00 total=123456"
    return f"some avg10={some} {rest}\nfull avg10={full} {rest}\n"


# --- what the system says ---


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (psi(), NORMAL),
        (psi("9.99"), NORMAL),
        (psi("10.00"), WARNING),
        (psi("100.00", "9.99"), WARNING),
        (psi("10.00", "10.00"), CRITICAL),
        (psi("99.99", "100"), CRITICAL),
        ("some avg10=11.00 avg60=0.00 avg300=0.00 total=0\n", WARNING),  # no line `full`
        ("some future=1 avg10=11.00 total=0\n", WARNING),
        (psi("12.00") + "most avg10=99.00 total=0\n", WARNING),
        ("full avg10=50.00 avg60=0.00 avg300=0.00 total=0\n", None),
        ("", None),
        ("some avg10=", None),
        ("some avg10=nan total=0", None),
        ("some avg10=-5.00 total=0", None),
        ("some avg10=1e9 total=0", None),
        ("some avg60=50.00 total=0", None),
        ("<html>avg10=50.00</html>", None),
    ],
)
def test_psi(text, level):
    assert parse_psi(text) == level


@given(st.text(max_size=200))
def test_no_text_is_an_error(text):
    assert parse_psi(text) in {None, *PressureLevel}


def test_psi_is_read_from_its_file(tmp_path):
    path = tmp_path / "memory"
    assert read_psi(path) is None
    assert read_psi(tmp_path) is None, "it cannot be read"
    path.write_bytes(b"\xff\xfe" * 10_000)
    assert read_psi(path) is None
    path.write_text(psi("50.00"))
    assert read_psi(path) is WARNING


class FakeLibrary:
    """A C library whose `sysctlbyname` fills in what the test says."""

    def __init__(self, value, *, result=0, size=4):
        self.value, self.result, self.size = value, result, size

    def sysctlbyname(self, name, value, size, new, new_size):
        assert name == b"kern.memorystatus_vm_pressure_level"
        assert size._obj.value == ctypes.sizeof(value._obj)
        assert (new, new_size.value) == (None, 0)
        value._obj.value, size._obj.value = self.value, self.size
        return self.result


@pytest.mark.parametrize(
    ("value", "level"),
    [(1, NORMAL), (2, WARNING), (4, CRITICAL), (0, None), (3, None), (-1, None), (1 << 30, None)],
)
def test_levels_of_macos(value, level):
    assert read_sysctl(FakeLibrary(value)) == level


def test_sysctl():
    assert read_sysctl(FakeLibrary(4)) is CRITICAL
    assert read_sysctl(FakeLibrary(7)) is None
    assert read_sysctl(FakeLibrary(4, result=-1)) is None, "there is no such name"
    assert read_sysctl(FakeLibrary(4, size=8)) is None, "it is something else"
    assert read_sysctl(object()) is None, "a C library without sysctl"
    assert read_sysctl() in {None, *PressureLevel}, "this machine's own"


def test_the_first_that_answers_is_asked_from_then_on():
    silent, warns, calm = (lambda: None), (lambda: WARNING), (lambda: NORMAL)
    assert system_reader([silent, warns, calm]) is warns
    assert system_reader([silent]) is None
    assert system_reader([]) is None


# --- what it means ---


def fractions(readings, step_ms=1000.0):
    """The fraction after each reading."""
    budget, now_ms, seen = SoftBudget(), 0.0, []
    for reading in readings:
        budget = budget.after(reading, now_ms)
        seen.append(budget.fraction)
        now_ms += step_ms
    return seen


CALM = int(CALM_MS / 1000)


def test_down_at_once():
    assert fractions([NORMAL, CRITICAL, CRITICAL]) == [1.0, 0.3, 0.3]
    assert fractions([WARNING, CRITICAL]) == [0.6, 0.3]


def test_up_a_step_at_a_time_after_a_calm_while():
    seen = fractions([CRITICAL] + [NORMAL] * (2 * CALM + 2))
    assert seen == [0.3] * (CALM + 1) + [0.6] * CALM + [1.0] * 2


def test_up_no_further_than_the_system_says():
    assert fractions([CRITICAL] + [WARNING] * 10 * CALM)[-1] == 0.6


def test_pressure_in_between_begins_the_calm_anew():
    once = [CRITICAL] + [NORMAL] * CALM
    assert set(fractions(once * 3)) == {0.3}
    assert fractions([*once, NORMAL])[-1] == 0.6


def test_a_system_that_falls_silent_is_calm():
    assert fractions([CRITICAL] + [None] * (2 * CALM + 2))[-1] == 1.0


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([None, *PressureLevel]), st.integers(0, int(CALM_MS)))))
def test_never_more_than_the_system_says_and_never_stuck(steps):
    budget, now_ms = SoftBudget(), 0.0
    for reading, gap_ms in steps:
        now_ms += gap_ms
        before, budget = budget, budget.after(reading, now_ms)
        assert budget.level >= (reading or NORMAL)
        assert budget.level >= before.level - 1
        assert budget.fraction == FRACTIONS[budget.level]
    for _ in range(3):
        budget, now_ms = budget.after(NORMAL, now_ms), now_ms + CALM_MS
    assert budget.fraction == 1.0


# --- who is told ---


def test_the_owner_hears_of_changes_only():
    clock, told, readings = ManualClock(), [], [NORMAL, WARNING, WARNING, CRITICAL, None]
    monitor = PressureMonitor(told.append, lambda: readings.pop(0) if readings else NORMAL, clock)
    for _ in range(5 + 2 * CALM):
        monitor.poll()
        clock.advance(1000)
    assert told == [0.6, 0.3, 0.6, 1.0]
    monitor.close()  # it never ran


def test_the_thread_tells_until_it_is_closed(monkeypatch):
    monkeypatch.setattr(pressure, "POLL_S", 0.0001)
    monkeypatch.setattr(pressure, "system_reader", lambda: lambda: CRITICAL)
    told = threading.Event()
    monitor = PressureMonitor.start(lambda fraction: told.set())
    assert told.wait(60)
    monitor.close()
    assert not monitor._thread.is_alive()
    monitor.close()


def test_a_runtime_that_is_gone_ends_the_thread(monkeypatch):
    monkeypatch.setattr(pressure, "POLL_S", 0.0001)
    monkeypatch.setattr(pressure, "system_reader", lambda: lambda: WARNING)

    def gone(fraction):
        raise RuntimeClosed("the runtime was closed")

    monitor = PressureMonitor.start(gone)
    monitor._thread.join(60)
    assert not monitor._thread.is_alive()


def test_no_monitor_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(pressure, "system_reader", lambda: None)
    assert PressureMonitor.start(lambda fraction: None) is None
