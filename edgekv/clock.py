"""Time as a value: deciding code gets `now_ms`, and only this module asks the machine."""

import time
from typing import Protocol


class Clock(Protocol):
    """Anything that tells the time."""

    def now_ms(self) -> float:
        """Milliseconds since an arbitrary point; never goes back."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_ms(self) -> float:
        """Milliseconds since an arbitrary point; never goes back."""
        return time.perf_counter() * 1e3


class ManualClock:
    """A clock that tests move by hand."""

    def __init__(self, now_ms: float = 0.0) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> float:
        """The time that was last set."""
        return self._now_ms

    def advance(self, ms: float) -> None:
        """Move time forward by `ms` milliseconds."""
        assert ms >= 0
        self._now_ms += ms
