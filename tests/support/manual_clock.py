"""Time that tests move by hand."""


class ManualClock:
    """A `Clock` that stands still until it is moved."""

    def __init__(self, now_ms: float = 0.0) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> float:
        """The time that was last set."""
        return self._now_ms

    def advance(self, ms: float) -> None:
        """Move time forward by `ms` milliseconds."""
        assert ms >= 0
        self._now_ms += ms
