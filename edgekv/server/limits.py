"""What clients may take of the daemon: bytes, connections, time, and requests a minute. Pure."""

import math
from dataclasses import dataclass

from edgekv.clock import Clock
from edgekv.config import MIB


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the daemon, beside those of the runtime.

    Attributes:
        body_bytes_max: Of one request.
        bodies_bytes_max: Of all that have come and are not being answered yet.
        head_bytes_max: Of a request's line and headers.
        num_headers_max: Of one request.
        num_connections_max: At once. Of those beyond requests are refused; twice as many get no
            answer either.
        head_s: To send a request's head, and to read the rest of one that was refused.
        body_s: To send a body, whole.
        unread_s: How long a client may take nothing of what is sent to it.
        keep_alive_s: How long a connection without a request is kept: longer than clients keep
            theirs (5 s mostly), who would else send into a connection that is being closed.
    """

    body_bytes_max: int = 32 * MIB
    bodies_bytes_max: int = 256 * MIB
    head_bytes_max: int = 64 << 10
    num_headers_max: int = 128
    num_connections_max: int = 512
    head_s: float = 30.0
    body_s: float = 30.0
    unread_s: float = 120.0
    keep_alive_s: int = 60


class Rates:
    """Requests a minute, by app: so many at once, and as many again each minute.

    Owned by the daemon's event loop. An agent begins with several requests at once and goes on
    with few, so it is a token bucket; of each is known when it will be full again.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._full_ms: dict[str, float] = {}

    def take(self, app: str, rate_per_min: int) -> int:
        """Take one request; 0, or in how many seconds there will be one."""
        now_ms, each_ms = self._clock.now_ms(), 60_000 / rate_per_min
        full_ms = max(now_ms, self._full_ms.get(app, now_ms))
        wait_ms = full_ms + each_ms - 60_000 - now_ms
        if wait_ms >= 1:  # less is the rounding of such sums
            return math.ceil(wait_ms / 1e3 - 1e-3)
        self._full_ms[app] = full_ms + each_ms
        return 0
