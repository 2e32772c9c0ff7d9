"""I/O threads, inbox and clock for an engine that is driven by hand, on one thread.

Jobs run when the driver lets them: between turns, when the engine would wait, and in the middle of
a turn, whenever it asks for the time. Which job runs next, and which completion is told next, is
drawn from a seed; what threads guarantee holds: kinds in order of urgency, jobs of a kind begun in
the order in which they were submitted, as many under way as there are threads.
"""

import queue
import random
from collections import deque
from collections.abc import Callable, Iterator

from edgekv.engine.inbox import Inbox, IoReady, Message
from edgekv.errors import EdgeKVError
from edgekv.store.disk_io import IoDone


class Idle(Exception):
    """The engine waits for a message, and there will be none."""


class SimIo:
    """`IoThreads` without threads."""

    def __init__(
        self,
        draw: random.Random,
        done: Callable[[IoDone], None],
        *,
        num_readers: int = 3,
        num_writers: int = 2,
        queue_max: int = 1024,
    ) -> None:
        self._draw = draw
        self._done = done
        self._num_readers = num_readers
        self._num_writers = num_writers
        self._queue_max = queue_max
        self._queues: dict[str, deque] = {"restore": deque(), "write": deque()}
        self._told_later: list[IoDone] = []
        self.held: set[str] = set()  # kinds that make no progress for now
        self.num_refused = 0
        self._running = False

    @property
    def num_pending(self) -> int:
        return sum(map(len, self._queues.values())) + len(self._told_later)

    def submit(self, kind: str, run: Callable[[], object], tag: object) -> bool:
        if len(self._queues[kind]) >= self._queue_max:
            self.num_refused += 1
            return False
        self._queues[kind].append((run, tag))
        return True

    def step(self) -> bool:
        """Run a job, or tell of one that has run; False if there is neither."""
        if self._running:  # asked for the time by a job
            return False
        told = [io for io in self._told_later if io.kind not in self.held]
        busy_readers = sum(io.kind == "restore" for io in self._told_later)
        busy_writers = len(self._told_later) - busy_readers
        kinds = []
        waiting = [kind for kind, jobs in self._queues.items() if jobs and kind not in self.held]
        if busy_readers < self._num_readers and "restore" in waiting:
            kinds.append("restore")
        if busy_writers < self._num_writers:
            kinds += [kind for kind in waiting if kind == "write"]
        if told and (not kinds or self._draw.random() < 0.5):
            io = self._draw.choice(told)
            self._told_later.remove(io)
            self._done(io)
            return True
        if not kinds:
            return False
        self._run(self._draw.choice(kinds))
        return True

    def _run(self, kind: str) -> None:
        run, tag = self._queues[kind].popleft()
        error: EdgeKVError | OSError | None = None
        self._running = True
        try:
            run()
        except (EdgeKVError, OSError) as expected:
            error = expected.with_traceback(None)
        finally:
            self._running = False
        self._told_later.append(IoDone(kind=kind, tag=tag, error=error, ran_ms=1.0))

    def drain(self) -> None:
        while self.step():
            pass


class SimEnded:
    """The queue of completions; who waits for one lets I/O go on."""

    def __init__(self, inbox: Inbox) -> None:
        self.io: SimIo | None = None
        self._inbox = inbox
        self._queue: deque[IoDone] = deque()

    def put(self, io: IoDone) -> None:
        self._queue.append(io)
        self._inbox.post(IoReady())

    def get(self) -> IoDone:
        assert self.io is not None
        while not self._queue:
            assert self.io.step(), "waits for I/O that will never end"
        return self._queue.popleft()

    def get_nowait(self) -> IoDone:
        if not self._queue:
            raise queue.Empty
        return self._queue.popleft()


class SimInbox(Inbox):
    """An inbox that lets I/O go on when it is empty, and says so when nothing will come."""

    def __init__(self) -> None:
        super().__init__(4096)
        self.io: SimIo | None = None

    def take(self, *, block: bool) -> Iterator[Message]:
        while block and self._messages.empty():
            if self.io is None or not self.io.step():
                raise Idle
        return super().take(block=block)


class SimClock:
    """Each look at it takes a little time, and now and then a job of I/O happens meanwhile."""

    def __init__(self, draw: random.Random, *, io_share: float) -> None:
        self._draw = draw
        self._io_share = io_share
        self._now_ms = 0.0
        self.io: SimIo | None = None

    def now_ms(self) -> float:
        self._now_ms += self._draw.random()
        if self.io is not None and self._draw.random() < self._io_share:
            self.io.step()
        return self._now_ms
