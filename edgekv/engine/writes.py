"""KV on its way to disk: gathered into staging, one job of a session at a time.

    buffers ──copy──▶ staging ──lane of the session──▶ writer thread ──▶ store
                              [w1 w2 w3] ▸ w4 ▸ w5      a job is what has queued up meanwhile

The store takes a session's tokens in order, so the next job of a lane is submitted when the last
has ended. Whatever fails is computed again one day: the lane is emptied and the session goes on
from what the store has.
"""

import mmap
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from edgekv.engine.request import EngineSession
from edgekv.errors import StoreStale
from edgekv.kv.layout import KVLayout
from edgekv.kv.runs import copy_out, state_runs, token_runs
from edgekv.kv.session_kv import common_prefix
from edgekv.ranks.orders import Orders, Verb
from edgekv.store import Store
from edgekv.store.disk_io import Io, IoDone

PAGE_BYTES = mmap.PAGESIZE
RETRY_MS = 5_000.0  # after a failure nothing is written behind the decode for this long
JOB_WRITES_MAX = 4  # staging comes back job by job


class Staging:
    """Buffers of one size. Owned by the engine thread.

    Their bytes are taken from the pool's budget as a whole, and from the system when first used;
    from then on they are recycled, because new pages cost more than the copy into them.
    """

    def __init__(self, *, num_buffers: int, buffer_bytes: int) -> None:
        self.num_buffers = num_buffers
        self.buffer_bytes = self.rounded(buffer_bytes)
        self._free: list[memoryview] = []
        self._num_made = 0

    @staticmethod
    def rounded(num_bytes: int) -> int:
        """What a buffer for `num_bytes` takes: whole pages."""
        return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def total_bytes(self) -> int:
        """What all buffers take once they were used."""
        return self.num_buffers * self.buffer_bytes

    @property
    def num_free(self) -> int:
        """Buffers that `take` can give."""
        return len(self._free) + self.num_buffers - self._num_made

    def take(self) -> memoryview:
        """A buffer, with what it held before; the caller has asked `num_free`."""
        assert self.num_free > 0
        if self._free:
            return self._free.pop()
        self._num_made += 1
        # Anonymous and page-aligned, so that the disk can take it as it is.
        return memoryview(mmap.mmap(-1, self.buffer_bytes))

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back; nobody reads it any more."""
        assert buffer.nbytes == self.buffer_bytes
        assert len(self._free) < self._num_made
        self._free.append(buffer)


NO_STAGING = Staging(num_buffers=0, buffer_bytes=PAGE_BYTES)


@dataclass(eq=False, kw_only=True)
class Write:
    """Tokens [start, end) of a session, gathered; the session still has those up to `valid_end`."""

    session: EngineSession
    start: int
    end: int
    valid_end: int
    token_ids: list[int]
    staged: memoryview  # a buffer of staging
    payload: memoryview  # what of it was filled
    slot: int = 0  # its number, for other ranks


@dataclass(eq=False, kw_only=True)
class WriteJob:
    """Writes of one lane that a thread does in order; `num_done` of them succeeded."""

    key: int
    writes: list[Write]
    num_done: int = 0
    number: int = 0  # for other ranks

    def run(self, store: Store) -> None:
        """Write; what the store raises ends the job."""
        for write in self.writes:
            store.write(self.key, write.start, write.token_ids, [write.payload])
            self.num_done += 1


@dataclass(kw_only=True)
class Lane:
    """Writes of one session in order, and the job under way."""

    queue: deque[Write] = field(default_factory=deque)
    job: WriteJob | None = None

    def writes(self) -> list[Write]:
        """All that has not ended."""
        return [*(self.job.writes if self.job else ()), *self.queue]


class WriteLanes:
    """All sessions' lanes. Owned by the engine thread."""

    def __init__(
        self, store: Store, io: Io, staging: Staging, layout: KVLayout, orders: Orders
    ) -> None:
        self._store = store
        self._io = io
        self._orders = orders
        self._staging = staging
        self._layout = layout
        # That a buffer holds, beside a state.
        self.group_tokens_max = (staging.buffer_bytes - layout.state_bytes) // layout.token_bytes
        # By store key, which a session that is reopened has too: those with something on its way.
        self.lanes: dict[int | None, Lane] = {}
        self._refused: deque[int] = deque()  # keys of lanes that the threads had no room for

    def hand(self, session: EngineSession, key: int, *, rests: bool) -> None:
        """Gather what the writer does not have yet, as much as one buffer holds, and queue it.

        Where layers have a state it ends where one is kept, if that is near enough, and has it. So
        it does behind the last token of a session that rests: of one that goes on it would be of
        use for a moment, and can be larger than all of the KV.
        """
        kv = session.kv
        assert kv.buffers is not None
        start = kv.next_to_hand
        end = min(kv.provenance.exact_prefix, start + self.group_tokens_max)
        assert start < end
        points = {*kv.states.lasting, *([kv.num_tokens] if rests else [])}
        if kv.states.recurrent:
            end = min((point for point in points if start < point <= end), default=end)
        states = kv.states.at(end, kv.num_tokens) if end in points else None
        runs = token_runs(self._layout, kv.buffers, start, end) + state_runs(states or {})
        staged = self._staging.take()
        payload = copy_out(runs, staged)
        slot = self._orders.number()
        has_state = int(states is not None)
        self._orders.add(Verb.GATHER, slot, kv.buffers.number, start, end, has_state)
        kv.handed, kv.stored = end, min(kv.stored, start)
        if states:
            kv.states.note_written({*kv.states.written, end})
        write = Write(
            session=session,
            start=start,
            end=end,
            valid_end=end,
            token_ids=kv.tokens[start:end],
            staged=staged,
            payload=payload,
            slot=slot,
        )
        self.lanes.setdefault(key, Lane()).queue.append(write)
        self._pump(key)

    def cut(self, session: EngineSession) -> None:
        """A session forgot its last tokens: so do the writes that are on their way."""
        lane = self.lanes.get(session.key)
        for write in lane.writes() if lane else ():
            if write.session is session:
                write.valid_end = min(write.valid_end, session.kv.num_tokens)

    def _pump(self, key: int) -> None:
        """Submit a lane's next job; an empty lane goes."""
        lane = self.lanes[key]
        if lane.job is not None:
            return
        writes: list[Write] = []
        while lane.queue and len(writes) < JOB_WRITES_MAX:
            write = lane.queue.popleft()
            if write.start < write.valid_end:
                writes.append(write)
            else:
                self._drop(write)
        if not writes:
            del self.lanes[key]
            return
        lane.job = WriteJob(key=key, writes=writes)
        if not self._io.submit("write", partial(lane.job.run, self._store), lane.job):
            lane.queue.extendleft(reversed(writes))
            lane.job = None
            self._refused.append(key)

    def done(self, job: WriteJob, io: IoDone, now_ms: float) -> None:
        """Take in that a job has ended."""
        lane = self.lanes[job.key]
        assert lane.job is job
        lane.job = None
        for i, write in enumerate(job.writes):
            self._staging.give(write.staged)
            if i < job.num_done and write.start < write.valid_end:
                write.session.kv.stored = write.valid_end
        if job.num_done < len(job.writes):
            self._failed(lane, job.writes[job.num_done].session, io, now_ms)
        self._pump(job.key)

    def pump_refused(self) -> None:
        """Some I/O has ended: try lanes again that the threads had no room for."""
        for _ in range(len(self._refused)):
            key = self._refused.popleft()
            if key in self.lanes:
                self._pump(key)

    def _failed(self, lane: Lane, session: EngineSession, io: IoDone, now_ms: float) -> None:
        """What follows a write that failed has nothing to follow: the session hands it in again."""
        kv = session.kv
        if isinstance(io.error, StoreStale):  # evicted meanwhile: go on from what is left
            kv.stored = min(kv.stored, stored_prefix(self._store, session, kv.tokens))
        else:
            session.write_again_ms = now_ms + RETRY_MS
        kv.note_stored(kv.stored)
        session.num_write_failures += 1
        for write in lane.queue:
            if write.session is session:
                self._drop(write)
        lane.queue = deque(write for write in lane.queue if write.session is not session)

    def _drop(self, write: Write) -> None:
        """Let go of what will not be written."""
        self._staging.give(write.staged)
        self._orders.add(Verb.UNGATHER, write.slot)

    def on_the_way(self, session: EngineSession) -> int:
        """How many of a session's tokens, from 0, another one of its app is having written."""
        others = {write.session for lane in self.lanes.values() for write in lane.writes()}
        tokens = session.kv.tokens
        return max(
            (
                common_prefix(other.kv.tokens[: other.kv.handed], tokens)
                for other in others
                if other is not session and other.app == session.app
            ),
            default=0,
        )

    def check_integrity(self) -> None:
        """Assert that staging and lanes agree."""
        queued = sum(len(lane.writes()) for lane in self.lanes.values())
        assert queued == self._staging.num_buffers - self._staging.num_free
        assert all(lane.writes() for lane in self.lanes.values())


def stored_prefix(store: Store, session: EngineSession, token_ids: list[int]) -> int:
    """How many of these tokens, from 0, can be had from the store right now, of a session."""
    stored = None if session.key is None else store.lookup(session.key)
    if stored is None:
        return 0
    return stored.resume_point(common_prefix(token_ids, list(stored.token_ids)))
