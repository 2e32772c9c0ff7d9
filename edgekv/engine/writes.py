"""KV on its way to disk: gathered into staging, one write of a session at a time.

    buffers ──copy──▶ staging ──lane of the session──▶ writer thread ──▶ store
                                 w1 ▸ w2 ▸ w3           only the first is under way

The store takes a session's tokens in order, so the second write of a lane is submitted when the
first has ended. Whatever fails is computed again one day: the lane is emptied and the session goes
on from what the store has.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from edgekv.engine.request import EngineSession
from edgekv.engine.staging import Staging
from edgekv.errors import StoreStale
from edgekv.kv.layout import KVLayout
from edgekv.kv.runs import copy_out, token_runs
from edgekv.kv.session_kv import common_prefix
from edgekv.store import Store
from edgekv.store.io_threads import IoDone, IoThreads

RETRY_MS = 5_000.0  # after a failure nothing is written behind the decode for this long


@dataclass(eq=False, kw_only=True)
class Write:
    """Tokens [start, end) of a session, gathered."""

    session: EngineSession
    key: int
    start: int
    end: int
    epoch: int
    token_ids: list[int]
    staged: memoryview
    num_bytes: int

    def run(self, store: Store) -> None:
        """Write; what the store raises is reported with the completion."""
        store.write(self.key, self.start, self.token_ids, [self.staged[: self.num_bytes]])


@dataclass(kw_only=True)
class Lane:
    """Writes of one session in order; the first is under way if `busy`."""

    queue: deque[Write] = field(default_factory=deque)
    busy: bool = False


class WriteLanes:
    """All sessions' lanes. Owned by the engine thread."""

    def __init__(self, store: Store, io: IoThreads, staging: Staging, layout: KVLayout) -> None:
        self._store = store
        self._io = io
        self._staging = staging
        self._layout = layout
        self._lanes: dict[int, Lane] = {}  # by store key: a session that is reopened has the same
        self._refused: deque[int] = deque()  # keys whose first write the threads had no room for
        self.num_failed = 0

    @property
    def group_tokens_max(self) -> int:
        """Tokens that one staging buffer holds."""
        return self._staging.buffer_bytes // self._layout.token_bytes

    def writing(self, key: int) -> bool:
        """Whether anything of this session is on its way."""
        return key in self._lanes

    @property
    def num_lanes(self) -> int:
        """Sessions with something on its way."""
        return len(self._lanes)

    def can_hand(self) -> bool:
        """Whether staging has room."""
        return self._staging.num_free > 0

    def hand(self, session: EngineSession, key: int) -> None:
        """Gather what the writer does not have yet, as much as one buffer holds, and queue it."""
        kv = session.kv
        assert kv.buffers is not None
        start = kv.handed
        end = min(kv.provenance.exact_prefix, start + self.group_tokens_max)
        assert start < end
        staged = self._staging.take()
        filled = copy_out(token_runs(self._layout, kv.buffers, start, end), staged)
        kv.handed = end
        write = Write(
            session=session,
            key=key,
            start=start,
            end=end,
            epoch=kv.epoch,
            token_ids=kv.tokens[start:end],
            staged=staged,
            num_bytes=filled.nbytes,
        )
        self._lanes.setdefault(key, Lane()).queue.append(write)
        self._pump(key)

    def _pump(self, key: int) -> None:
        """Submit a lane's first write that still says something; an empty lane goes."""
        lane = self._lanes[key]
        while lane.queue and not lane.busy:
            write = lane.queue[0]
            if write.epoch != write.session.kv.epoch:
                self._staging.give(lane.queue.popleft().staged)
                continue
            if not self._io.submit("write", partial(write.run, self._store), write):
                self._refused.append(key)
                return
            lane.busy = True
        if not lane.queue:
            del self._lanes[key]

    def done(self, write: Write, io: IoDone, now_ms: float) -> None:
        """Take in that the first write of a lane has ended."""
        lane = self._lanes[write.key]
        assert lane.queue[0] is write
        lane.queue.popleft()
        lane.busy = False
        self._staging.give(write.staged)
        kv = write.session.kv
        if write.epoch == kv.epoch:
            if io.error is None:
                kv.stored = write.end
            else:
                self._failed(write, io, now_ms)
        self._pump(write.key)
        self.pump_refused()

    def _failed(self, write: Write, io: IoDone, now_ms: float) -> None:
        kv = write.session.kv
        if isinstance(io.error, StoreStale):  # evicted meanwhile: go on from what is left
            kv.stored = min(kv.stored, self.stored_prefix(write.session))
        else:
            self.num_failed += 1
            write.session.write_again_ms = now_ms + RETRY_MS
        kv.handed = kv.stored
        kv.epoch += 1

    def pump_refused(self) -> None:
        """Try lanes again that the threads had no room for."""
        for _ in range(len(self._refused)):
            key = self._refused.popleft()
            if key in self._lanes:
                self._pump(key)

    def stored_prefix(self, session: EngineSession) -> int:
        """How many of the session's tokens, from 0, the store has right now."""
        stored = self._store.find(session.app, session.store_name)
        return 0 if stored is None else common_prefix(session.kv.tokens, list(stored.token_ids))

    def check_integrity(self) -> None:
        """Assert that staging and lanes agree."""
        queued = sum(len(lane.queue) for lane in self._lanes.values())
        assert queued == self._staging.num_buffers - self._staging.num_free
        for lane in self._lanes.values():
            assert lane.queue
