"""Rank 0 of several: what it does is told to the others, what all do has ended when all have.

    engine thread ──orders──▶ exchange ──▶ other ranks ──▶ the same to their buffers and disks
          ▲                                    │
          └── an I/O job has ended ◀─ reports ─┘      as far as the rank got that got least far

Alone there is nobody to tell, and nothing here does anything.
"""

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from edgekv.engine.prefill import Told
from edgekv.engine.restores import ReadJob
from edgekv.engine.steps import step_words
from edgekv.engine.writes import WriteJob
from edgekv.errors import EdgeKVError, EngineFailed, RecordCorrupt, StoreFull, StoreStale
from edgekv.ranks.exchange import Exchange, Report
from edgekv.ranks.group import ALONE
from edgekv.ranks.orders import (
    NO_ORDERS,
    Orders,
    Verb,
    from_int,
    from_text,
    name_hash,
    prefix_hashes,
)
from edgekv.store import Store
from edgekv.store.disk_io import IoDone, IoKind, IoThreads

STALE, FULL, IO = 1, 2, 3  # kinds of `Report.error`
POLL_S = 0.001  # between two exchanges while other ranks' disks are waited for
DISK_S = 60.0  # in which a disk with something to do must have done something
_LOOK_S = 1.0  # between two looks at what disks have done


@dataclass(eq=False, kw_only=True)
class _Shared:
    """A job that all ranks do."""

    tag: WriteJob | ReadJob
    key: int
    reports: dict[int, Report] = field(default_factory=dict)  # by rank
    done: IoDone | None = None  # here

    def has_ended(self, rank: int) -> bool:
        """Whether a rank has ended it."""
        return rank in self.reports if rank else self.done is not None


class Lead:
    """What rank 0 has under way on other ranks. Owned by the engine thread."""

    def __init__(
        self,
        exchange: Exchange,
        orders: Orders,
        give_up: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """`give_up` is told why the ranks cannot go on."""
        self.group = exchange.group
        self.orders = orders
        self.closed = False
        self.give_up = give_up
        self._exchange = exchange
        self._jobs: dict[int, _Shared] = {}
        self._looked_s = time.monotonic()  # when it was looked what disks have done,
        self._have_moved: set[int] = set()  # whose ended something since,
        self._still_s = [0.0] * self.group.size  # and for how long each has ended nothing
        self._keys: set[int] = set()  # of sessions in the store that the others know

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.group.size == 1

    @property
    def waits(self) -> bool:
        """Whether something is to be told, or to be heard."""
        return not self.alone and bool(self._jobs or self.orders.words)

    def exchange(self) -> None:
        """Tell what was done, and hear what has ended; no step runs.

        Raises:
            EngineFailed: A rank's disk hangs, or ranks do not do the same.
            RuntimeError: A rank is gone.
        """
        if self.alone:
            return
        heard = self._exchange(self.orders.take())
        for rank, reports in enumerate(heard.reports):
            for report in reports:
                self._jobs[report.job].reports[rank] = report
                self._have_moved.add(rank)
        self._look_at_disks()

    def _look_at_disks(self) -> None:
        """Give up a rank whose disk does nothing: everybody would wait for it without an end."""
        passed_s = time.monotonic() - self._looked_s
        if passed_s < _LOOK_S:
            return
        self._looked_s += passed_s
        for rank in range(self.group.size):
            if rank in self._have_moved or all(j.has_ended(rank) for j in self._jobs.values()):
                self._still_s[rank] = 0.0
                continue
            # While this process was stopped it could not hear: that is nobody's silence.
            self._still_s[rank] += min(passed_s, 2 * _LOOK_S)
            if self._still_s[rank] > DISK_S:
                raise EngineFailed(
                    f"the disk of rank {rank} has not answered for {DISK_S:g} s",
                    hint="look after that disk, and start all ranks again",
                )
        self._have_moved.clear()

    def rests(self) -> None:
        """There is nothing to do until somebody asks something."""
        self._exchange.rests()

    def poll(self) -> None:
        """Ask once more what has ended, a moment later."""
        time.sleep(POLL_S)
        self.exchange()

    def submit(self, told: Told, asked: list[list[int]], *, cuts_rows: bool) -> None:
        """Tell of a step that is being submitted."""
        if not self.alone:
            words = step_words(told.kind, told.parts, asked, cuts_rows=cuts_rows)
            self.orders.add(Verb.STEP, *words)
            self.exchange()

    def close(self) -> None:
        """The runtime has ended; the others wait for the next."""
        was_closed, self.closed = self.closed, True
        if not self.alone and not was_closed:
            self.orders.add(Verb.END)
            self.exchange()
            self.rests()

    # --- the store's sessions ---

    def know(self, store: Store, key: int) -> None:
        """Have the others know a session of the store before something is said of it."""
        if self.alone or key in self._keys:
            return
        session = store.lookup(key)
        if session is not None:
            self._keys.add(key)
            names = [*from_text(session.app), *from_text(session.name)]
            self.orders.add(Verb.SESSION, key, int(session.persistent), *names)

    def cut(self, store: Store, key: int, num_tokens: int) -> None:
        """Forget what the store has of a session from `num_tokens` on, everywhere."""
        self.know(store, key)
        store.truncate(key, num_tokens)
        self.orders.add(Verb.STORE_CUT, key, num_tokens)

    def adopt(self, store: Store, key: int, donor: int, num_tokens: int) -> None:
        """Let a session have a donor's first tokens, everywhere."""
        self.know(store, key)
        self.know(store, donor)
        store.adopt(key, donor, num_tokens)
        self.orders.add(Verb.STORE_ADOPT, key, donor, num_tokens)

    def forgotten(self, app: str, name: str) -> None:
        """A session is gone from the store."""
        self._keys.clear()  # whoever is asked for again is told of again
        self.orders.add(Verb.STORE_FORGET, *from_text(app), *from_text(name))

    def keep_only(self, store: Store) -> None:
        """Have the others forget kept sessions that are not here: removed while this was alone."""
        if not self.alone:
            kept = [name_hash(s.app, s.name) for s in store.sessions() if s.persistent]
            words = [word for one in kept for word in from_int(one)]
            self.orders.add(Verb.STORE_KEEP, *words)

    # --- I/O that all do ---

    def began(self, store: Store, tag: WriteJob | ReadJob) -> None:
        """A job was submitted here: the others do it too."""
        tag.number = self.orders.number()
        if isinstance(tag, WriteJob):
            key = tag.key
            words = [len(tag.writes)]
            for write in tag.writes:
                words += (write.slot, write.start, len(write.token_ids), *write.token_ids)
            verb = Verb.WRITE
        else:
            key, buffers = tag.restore.key, tag.restore.session.kv.buffers
            assert buffers is not None
            stored = store.lookup(key)
            ends = [ref.use_end for ref, _ in tag.parts]
            hashes = prefix_hashes(stored.token_ids if stored else (), ends)
            words = [buffers.number, tag.state_bytes, len(tag.parts)]
            for (ref, _), hashed in zip(tag.parts, hashes, strict=True):
                words += (ref.start, ref.end, ref.use_end, *from_int(hashed))
            verb = Verb.READ
        self.know(store, key)
        self._jobs[tag.number] = _Shared(tag=tag, key=key)
        self.orders.add(verb, tag.number, key, *words)

    def ended(self, io: IoDone) -> None:
        """A job has ended here."""
        assert isinstance(io.tag, WriteJob | ReadJob)
        self._jobs[io.tag.number].done = io
        self._have_moved.add(0)

    def settled(self, store: Store) -> IoDone | None:
        """A job that has ended on all ranks, as far as it got on all; None if none has."""
        for number, job in self._jobs.items():
            if job.done is not None and len(job.reports) == self.group.size - 1:
                del self._jobs[number]
                return self._merged(store, job, job.done)
        return None

    def _merged(self, store: Store, job: _Shared, io: IoDone) -> IoDone:
        """What one rank could not do none has done; what their stores have is the same again."""
        failed = {rank: report for rank, report in job.reports.items() if report.error}
        if io.error is None and not failed:
            return io
        tag, least = job.tag, min((r.num_done for r in failed.values()), default=1 << 30)
        if isinstance(tag, WriteJob):
            tag.num_done = min(tag.num_done, least)
            start = tag.writes[tag.num_done].start
        else:
            if isinstance(io.error, RecordCorrupt):  # before the cut, which lets go of it
                store.quarantine(job.key, tag.parts[tag.num_good][0].start)
            tag.num_good = min(tag.num_good, least)
            start = tag.parts[tag.num_good][0].start
        if failed or isinstance(io.error, EdgeKVError):
            self.cut(store, job.key, min([start, *(r.stored_end for r in failed.values())]))
        if io.error is not None:
            return io
        rank = min(failed)
        return replace(io, error=_error_of(rank, failed[rank].error))


ALONE_LEAD = Lead(Exchange(ALONE, lambda _count, _phase: None), NO_ORDERS)


def _error_of(rank: int, kind: int) -> EdgeKVError | OSError:
    if kind == STALE:
        return StoreStale(f"rank {rank} does not have what is before")
    if kind == FULL:
        return StoreFull(f"the disk of rank {rank} has no room")
    return OSError(f"the disk of rank {rank} refuses")


class Ended(Protocol):
    """Where it is said which jobs have ended."""

    def get_nowait(self) -> IoDone:
        """One that has; raises `queue.Empty`."""

    def get(self) -> IoDone:
        """The same, after waiting for it."""


class SharedIo:
    """I/O threads of which a job has ended once all ranks have ended theirs.

    In place of the threads, and of the queue of what has ended.
    """

    def __init__(self, io: IoThreads, store: Store, lead: Lead) -> None:
        self._io, self._store, self._lead = io, store, lead
        self._ended: queue.SimpleQueue[IoDone] = queue.SimpleQueue()

    def submit(self, kind: IoKind, run: Callable[[], object], tag: object) -> bool:
        """See `IoThreads.submit`."""
        if not self._io.submit(kind, run, tag):
            return False
        if isinstance(tag, WriteJob | ReadJob):
            self._lead.began(self._store, tag)
        return True

    def put(self, io: IoDone) -> None:
        """A job has ended here; any thread."""
        self._ended.put(io)

    def get_nowait(self) -> IoDone:
        """What has ended everywhere; raises `queue.Empty`."""
        while True:
            settled = self._lead.settled(self._store)
            if settled is not None:
                return settled
            io = self._ended.get_nowait()
            if not isinstance(io.tag, WriteJob | ReadJob):
                return io
            self._lead.ended(io)

    def get(self) -> IoDone:
        """The same, after waiting for it."""
        while True:
            try:
                return self.get_nowait()
            except queue.Empty:
                self._lead.poll()
