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
