"""From the engine thread to whoever asked: deltas, progress and the end of one request."""

import asyncio
import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

from edgekv.errors import EdgeKVError
from edgekv.metrics import Stats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one output position, of the model's own distribution.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its natural log-probability, before temperature and filters.
        top: The likeliest (token, log-probability) pairs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A change of the text: the end of what was shown is taken back, then something is added.

    Attributes:
        text: What is added.
        token_ids: Tokens of the answer that are certain by now, and were not told yet.
        logprobs: Of these, where they were asked for.
        provisional: The text may be taken back by a later delta.
        retract: Characters of what was shown before that do not hold; all were provisional.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    provisional: bool = False
    retract: int = 0


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of a request that ran."""

    finish_reason: FinishReason
    stats: Stats
    gaps_ms: tuple[float, ...] = ()  # between its tokens, as the engine knew them
    stop: str | None = None  # the stop string that ended the text


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The end of a request that could not run."""

    error: EdgeKVError


Event = Delta | Finished | Failed


class Outbox:
    """Events of one request. The engine thread puts, readers get, from threads or a loop.

    The last event (Finished or Failed) is never taken out: whoever asks then gets it, so that a
    reader and somebody who closes the stream cannot wait for each other.

    Its length is bounded by the request's `max_tokens`, for each token makes at most two events.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        # Tokens whose KV is there to stay, and all of the prompt; read by anyone.
        self.prefill_progress = (0, 0)

    def put(self, event: Event) -> None:
        """Add an event; never blocks."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            # A loop may be closed at any moment, by whoever no longer wants the answer.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake.set)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether there is an event, at once or before `timeout_s` have passed."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._events), timeout_s)

    async def await_event(self) -> None:
        """`wait` without end, without blocking the running loop. One loop at a time."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._events:
                    return
                if self._loop is not loop or self._wake is None:
                    self._loop, self._wake = loop, asyncio.Event()
                wake = self._wake
                wake.clear()
            await wake.wait()

    @property
    def has_delta(self) -> bool:
        """Whether the next event is a delta."""
        with self._changed:
            return bool(self._events) and isinstance(self._events[0], Delta)

    def take(self) -> Event | None:
        """The next event; None if there is none yet."""
        with self._changed:
            if self.has_delta:
                return self._events.popleft()
            return self._events[0] if self._events else None

    def get(self, timeout_s: float | None) -> Event | None:
        """`wait` and `take`, for who reads alone; None when `timeout_s` passed without an event."""
        return self.take() if self.wait(timeout_s) else None
