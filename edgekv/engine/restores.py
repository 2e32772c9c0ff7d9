"""Sessions on their way into memory.

    admit ─▶ buffers get memory, layer by layer ─▶ KV is read back, or copied, or none is ─▶ compute

New memory costs time on the engine thread, so it is spread over the gaps between steps while
others decode. Reading costs none of it: reader threads fill the buffers, straight from disk.

Nobody else touches the buffers of an arriving session: they are evaluated, no step knows them, and
they are not given up before the last read has ended. A record that is refused ends what is
restored in front of it; the rest is computed again.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from edgekv.clock import Clock
from edgekv.engine.request import EngineSession, Request
from edgekv.errors import RecordCorrupt
from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.residency import Residency
from edgekv.kv.runs import Run, slot_runs
from edgekv.kv.session_kv import common_prefix
from edgekv.store import RecordRef, Store
from edgekv.store.disk_io import Io, IoDone
from edgekv.store.values import resume_point

JOB_BYTES = 4 << 20  # a job reads records until it has this much; several jobs read at once


@dataclass(eq=False, kw_only=True)
class Restore:
    """One session's way back."""

    session: EngineSession
    key: int
    good_end: int  # tokens that will be valid, as far as is known
    started_ms: float
    refs: list[RecordRef] = field(default_factory=list)  # what it reads
    jobs_left: int = 0
    read_ms: float = 0.0
    state: bytearray | None = None  # what was behind so many tokens, where layers have a state
    state_end: int = 0
    state_job: int = -1  # which job has read it; for other ranks


@dataclass(eq=False, kw_only=True)
class Reading:
    """Records that one thread reads, in order; `num_good` of them were read and are right.

    With the last one `state_bytes` are read, of the state behind it.
    """

    parts: list[tuple[RecordRef, list[Run]]] = field(default_factory=list)
    num_bytes: int = 0
    num_good: int = 0
    state_bytes: int = 0
    state: bytearray | None = None

    def run(self, store: Store) -> None:
        """Read; what the store raises ends the job."""
        for ref, runs in self.parts:
            into = whole_payload(ref, runs)
            if self.state_bytes and self.num_good == len(self.parts) - 1:
                self.state = bytearray(self.state_bytes)  # pages cost time, which is the thread's
                into = [*into, memoryview(self.state)]
            store.read(ref, into)
            self.num_good += 1


@dataclass(eq=False, kw_only=True)
class ReadJob(Reading):
    """Some of what a restore reads."""

    restore: Restore
    number: int = -1  # for other ranks


class Arrivals:
    """Requests on their way into memory, in order. Owned by the engine thread."""

    def __init__(
        self, pool: KVPool, swap_in: Callable[[EngineSession], None], clock: Clock
    ) -> None:
        self._pool = pool
        self._swap_in = swap_in
        self._clock = clock
        self._unready: deque[Request] = deque()

    @property
    def pending(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._unready)

    def add(self, request: Request) -> None:
        """A request that was just given buffers."""
        assert request.arriving
        self._unready.append(request)

    def advance(self, until_ms: float) -> list[Request]:
        """Go on until `until_ms`, by a layer at least; return who is ready without reading."""
        complete = []
        while self._unready:
            request = self._unready[0]
            kv = request.session.kv
            if request.finish_reason is None and request.arriving:
                assert kv.buffers is not None
                if not kv.buffers.ready:
                    kv.buffers.make_ready()
                    if self._clock.now_ms() >= until_ms:
                        break
                    continue
                if kv.residency is Residency.SWAPPED:
                    self._swap_in(request.session)
                else:
                    complete.append(request)
            self._unready.popleft()
        return complete

    def remove(self, request: Request) -> None:
        """A request has left; buffers without memory or KV go back, reads run to their end."""
        if request in self._unready:
            self._unready.remove(request)
            kv = request.session.kv
            if kv.residency is Residency.SWAPPED:
                kv.release(self._pool)
            elif kv.buffers is not None and not kv.buffers.ready:
                kv.drop(self._pool)


class Restores:
    """All sessions on their way back. Owned by the engine thread."""

    def __init__(self, store: Store, io: Io, layout: KVLayout) -> None:
        self._store = store
        self._io = io
        self._layout = layout
        self._waiting: deque[ReadJob] = deque()  # the threads had no room yet
        self.num_active = 0

    def start(self, session: EngineSession, now_ms: float) -> Restore | None:
        """Begin to read all of a session's tokens that the store has; None if it has none."""
        assert session.kv.buffers is not None
        assert session.key is not None
        self._store.touch(session.key)  # others are evicted first
        refs, num_tokens = stored_records(self._store, session)
        if not refs:
            return None
        restore = Restore(
            session=session, key=session.key, good_end=num_tokens, started_ms=now_ms, refs=refs
        )
        session.kv.buffers.begin_at(self._layout.first_slot(num_tokens))
        self.num_active += 1
        self._begin(restore, refs)
        return restore

    def _add(self, job: ReadJob, ref: RecordRef) -> None:
        """Have a job read a record too."""
        buffers = job.restore.session.kv.buffers
        assert buffers is not None
        job.parts.append((ref, slot_runs(self._layout, buffers, ref.start, ref.use_end)))
        job.num_bytes += ref.payload_bytes

    def _begin(self, restore: Restore, refs: list[RecordRef]) -> None:
        """Have records read, and the state behind the last, where layers have one."""
        jobs = [ReadJob(restore=restore)]
        for ref in refs:
            if jobs[-1].num_bytes >= JOB_BYTES:
                jobs.append(ReadJob(restore=restore))
            self._add(jobs[-1], ref)
        jobs[-1].state_bytes = self._layout.state_bytes
        restore.jobs_left += len(jobs)
        self._waiting += jobs
        self.pump()

    def pump(self) -> None:
        """Submit what the threads have room for."""
        while self._waiting:
            job = self._waiting[0]
            if not self._io.submit("restore", partial(job.run, self._store), job):
                return
            self._waiting.popleft()

    def done(self, job: ReadJob, io: IoDone) -> Restore | None:
        """Take in that a job has ended; return the restore if it was its last one."""
        restore = job.restore
        restore.jobs_left -= 1
        restore.read_ms += io.ran_ms
        if io.error is not None:
            bad = job.parts[job.num_good][0]
            restore.good_end = min(restore.good_end, bad.start)
            if isinstance(io.error, RecordCorrupt):
                self._store.quarantine(restore.key, bad.start)
        elif job.state is not None:
            restore.state, restore.state_end = job.state, job.parts[-1][0].use_end
            restore.state_job = job.number
        job.parts.clear()  # the memory is the session's again
        self.pump()
        if restore.jobs_left or self._reads_again(restore):
            return None
        self.num_active -= 1
        return restore

    def _reads_again(self, restore: Restore) -> bool:
        """Read what it can go on from, if it was to go on from elsewhere.

        That is so where a record was refused, or its last tokens were forgotten meanwhile.
        """
        kv, layout = restore.session.kv, self._layout
        assert kv.buffers is not None
        restore.good_end = num_tokens = min(restore.good_end, kv.num_tokens)
        if layout.window:
            if not num_tokens or kv.in_reach(num_tokens):
                return False
            base = layout.first_slot(num_tokens)
            kv.buffers.begin_at(base)
            used = [ref.clipped(num_tokens) for ref in restore.refs if ref.start < num_tokens]
            self._begin(restore, [ref for ref in used if ref.use_end > base])
            return True
        if layout.state_bytes:
            restore.good_end = resume_point(restore.refs, num_tokens)
            if restore.good_end not in {0, restore.state_end}:
                behind = [ref for ref in restore.refs if ref.use_end == restore.good_end]
                self._begin(restore, behind)
                return True
        return False


def stored_records(store: Store, session: EngineSession) -> tuple[list[RecordRef], int]:
    """Records of a prefix of the session's tokens with which it can go on; how many these are."""
    stored = None if session.key is None else store.lookup(session.key)
    if stored is None:
        return [], 0
    common = common_prefix(session.kv.tokens, list(stored.token_ids))
    num_tokens = stored.resume_point(common)
    refs = [ref.clipped(num_tokens) for ref in stored.records if ref.start < num_tokens]
    return refs, num_tokens


def whole_payload(ref: RecordRef, runs: list[Run]) -> list[memoryview]:
    """Where a record's payload goes: what is used of it to `runs`, the rest to scratch memory.

    Made by the thread that reads, so that there is one scratch a thread, not one a record.
    """
    unused = ref.end - ref.use_end  # tokens
    rest_bytes = [(run.skipped_bytes, unused * run.row_bytes) for run in runs]
    scratch = memoryview(bytearray(sum(map(sum, rest_bytes))))
    into: list[memoryview] = []
    for run, (before, behind) in zip(runs, rest_bytes, strict=True):
        into += (scratch[:before], run.memory, scratch[before : before + behind])
        scratch = scratch[before + behind :]
    return [memory for memory in into if memory.nbytes]
