"""Many users on one thread: each is a generator that says what it waits for.

    def user():
        yield Pause(500.0)                                # thinks for half a second
        reply = yield session.submit_ids(ids, sampling)   # reads the answer to its end
        ...

A thread a user would wake up at every token and take the interpreter from the engine, which is
what is being measured. Here one thread looks every few milliseconds; when a token came is the
engine's own account.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from edgekv.bench.figures import Stopwatch
from edgekv.errors import EdgeKVError
from edgekv.runtime import Reply, ReplyStream

POLL_MS = 4.0


@dataclass(frozen=True)
class Pause:
    """Nothing happens for a while."""

    ms: float


User = Generator[Pause | ReplyStream, Reply | None, None]
Tick = Callable[[float], None]  # told the milliseconds since the start


class Driver:
    """Plays users until all are done, or time is up. Owned by the thread that runs it.

    A request that fails is raised where its user waits for it.
    """

    def __init__(self) -> None:
        self._watch = Stopwatch()
        self._order = itertools.count()
        self._pauses: list[tuple[float, int, User]] = []  # a heap: until when, whose turn
        self._streams: list[tuple[ReplyStream, User]] = []

    @property
    def now_ms(self) -> float:
        """Milliseconds since the driver was made."""
        return self._watch.ms()

    def run(
        self,
        users: Iterable[User],
        *,
        for_ms: float | None = None,
        tick: Tick | None = None,
        tick_ms: float = 250.0,
    ) -> None:
        """Play.

        Args:
            users: Their first moves are made at once.
            for_ms: Stop after this time; users are closed where they wait, so that their `finally`
                blocks run. None plays to the end.
            tick: Called about every `tick_ms`, and at the end.
            tick_ms: See `tick`.
        """
        end_ms = None if for_ms is None else self.now_ms + for_ms
        next_tick_ms = self.now_ms
        waiting = list(users)
        try:
            while waiting:
                self._move(waiting.pop(0), None)
            while self._pauses or self._streams:
                now_ms = self.now_ms
                if end_ms is not None and now_ms >= end_ms:
                    break
                if tick is not None and now_ms >= next_tick_ms:
                    tick(now_ms)
                    next_tick_ms = now_ms + tick_ms
                self._wake(now_ms)
                self._poll()
                time.sleep(1e-3 * POLL_MS)
            if tick is not None:
                tick(self.now_ms)
        finally:
            self._close(waiting)

    def _wake(self, now_ms: float) -> None:
        while self._pauses and self._pauses[0][0] <= now_ms:
            _, _, user = heapq.heappop(self._pauses)
            self._move(user, None)

    def _poll(self) -> None:
        for entry in list(self._streams):
            stream, user = entry
            error = _drain(stream)
            if stream.done:
                self._streams.remove(entry)
                self._move(user, stream.reply, error)

    def _move(self, user: User, reply: Reply | None, error: EdgeKVError | None = None) -> None:
        """Let a user move, and note what it waits for next."""
        try:
            waits_for = user.send(reply) if error is None else user.throw(error)
        except StopIteration:
            return
        match waits_for:
            case Pause(ms):
                heapq.heappush(self._pauses, (self.now_ms + ms, next(self._order), user))
            case stream:
                self._streams.append((stream, user))

    def _close(self, waiting: list[User]) -> None:
        users = [*waiting, *(u for _, _, u in self._pauses), *(u for _, u in self._streams)]
        for stream, _ in self._streams:
            stream.close()
        self._pauses.clear()
        self._streams.clear()
        for user in users:
            user.close()


def _drain(stream: ReplyStream) -> EdgeKVError | None:
    """Take what there is; return what the request failed with, if it did."""
    try:
        while stream.wait(0.0) is not None:
            pass
    except EdgeKVError as error:
        return error
    return None
