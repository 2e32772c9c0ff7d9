"""Who may look at the page: somebody with an address that was made at the socket. Pure.

A browser shows no key. So who is at the socket asks for an address, which lets in once and soon;
the browser gets a pass for it: a place of its own, and a cookie that is sent there alone.

    invite() ──▶ /?token=… ──admit──▶ /live/PLACE, and the cookie of this path ──knows──▶ the page

Browsers send cookies to every port of a host, and other apps serve pages on loopback, too. What
keeps this one from them is its path: nobody who does not know the place can have a browser send it.
"""

import hmac
import secrets
from dataclasses import dataclass
from typing import TypeVar

from edgekv.clock import Clock

INVITED_MS = 120_000.0
PASS_MS = 12 * 3600_000.0
NUM_INVITED_MAX = 16
NUM_PASSES_MAX = 64
_NUM_BYTES = 32

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What lets a browser in for half a day: both the place in its addresses and the cookie."""

    place: str
    cookie: str


class Visitors:
    """Addresses that were given out, and passes. In memory alone. Owned by the server's loop.

    Of too many the oldest end first. Whatever is shown is compared with each of them, in constant
    time each.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._invited: dict[str, float] = {}  # tokens, and when they end; the oldest first
        self._passes: dict[Pass, float] = {}

    def invite(self) -> str:
        """A token that lets in once, within two minutes."""
        token = secrets.token_urlsafe(_NUM_BYTES)
        _keep(self._invited, token, self._clock.now_ms() + INVITED_MS, NUM_INVITED_MAX)
        return token

    def admit(self, token: str) -> Pass | None:
        """The pass for a token, which is used up; None if it lets nobody in."""
        self._forget()
        known = [one for one in self._invited if _same(one, token)]
        if not known:
            return None
        del self._invited[known[0]]
        one = Pass(place=secrets.token_hex(16), cookie=secrets.token_urlsafe(_NUM_BYTES))
        _keep(self._passes, one, self._clock.now_ms() + PASS_MS, NUM_PASSES_MAX)
        return one

    def knows(self, place: str, cookie: str) -> bool:
        """Whether these two are of one pass that has not ended."""
        self._forget()
        same = [_same(p.place, place) & _same(p.cookie, cookie) for p in self._passes]
        return any(same)

    def _forget(self) -> None:
        now_ms = self._clock.now_ms()
        self._invited = {token: end for token, end in self._invited.items() if end > now_ms}
        self._passes = {one: end for one, end in self._passes.items() if end > now_ms}


def _keep(known: dict[T, float], one: T, end_ms: float, num_max: int) -> None:
    known[one] = end_ms
    for oldest in list(known)[:-num_max]:
        del known[oldest]


def _same(known: str, shown: str) -> bool:
    return hmac.compare_digest(known.encode(), shown.encode("utf-8", "surrogatepass"))
