"""A rank that is not the first: carries out what rank 0 tells, on its own heads' KV and its disk.

    exchange ─▶ orders ─▶ buffers · staging · store · steps ─▶ reports of I/O ─▶ exchange ─▶ …

It decides nothing. Its pool has the same buffers, each as large; its store the same sessions, as
far as its disk has kept them, and a rank that lacks a record makes it a miss everywhere.
"""

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from edgekv.config import SwapOptions
from edgekv.engine.engine import Loaded
from edgekv.engine.follower_steps import FollowerSteps
from edgekv.engine.lead import FULL, IO, STALE
from edgekv.engine.predicted import PredictedPrefill
from edgekv.engine.restores import Reading
from edgekv.errors import EngineFailed, RecordCorrupt, StoreFull, StoreStale
from edgekv.kv.runs import copy_out, slot_runs, state_runs, token_runs, unpack_state
from edgekv.kv.session_kv import SessionKV
from edgekv.predict.state import PredictedState
from edgekv.ranks.exchange import REPORTS_MAX, Exchange, Report
from edgekv.ranks.orders import Verb, decoded, name_hash, prefix_hashes, to_int, to_text
from edgekv.store import RecordRef, Store
from edgekv.store.disk_io import IoDone, IoThreads

IO_QUEUE_MAX = 1 << 20  # rank 0 bounds what is under way
Words = Sequence[int]
Staged = tuple[memoryview, memoryview]  # a buffer of staging, and what of it was filled


@dataclass(eq=False, kw_only=True)
class _Writing:
    """Writes of one session that a thread does in order; `num_done` of them succeeded."""

    job: int
    key: int
    writes: list[tuple[int, int, Words]]  # slot, start, tokens
    num_done: int = 0

    def run(self, store: Store, staged: dict[int, Staged]) -> None:
        """Write; what the store raises ends the job."""
        for slot, start, token_ids in self.writes:
            store.write(self.key, start, token_ids, [staged[slot][1]])
            self.num_done += 1


@dataclass(eq=False, kw_only=True)
class _Reading(Reading):
    """Records that were asked for, as far as this rank has them."""

    job: int
    key: int
    number: int  # of the buffers
    num_asked: int

    def run(self, store: Store) -> None:
        """See `Reading`."""
        super().run(store)
        if len(self.parts) < self.num_asked:
            raise StoreStale("a record is not there")


class Follower:
    """What a rank has while a runtime of rank 0 is open. Owned by its engine thread."""

    def __init__(self, loaded: Loaded, options: SwapOptions) -> None:
        self._pools = [loaded.pool]
        self._layout = loaded.pool.layout
        self._prefill = loaded.prefill
        if isinstance(loaded.prefill, PredictedPrefill):
            self._pools.append(loaded.prefill.pool)
        self._staging, self._store = loaded.staging, loaded.store
        self._kvs: dict[int, SessionKV] = {}  # by the number of their buffers
        self._pool_of: dict[int, int] = {}
        self._beside: dict[int, PredictedState] = {}  # what is kept beside KV; likewise
        self._staged: dict[int, Staged] = {}  # by slot
        self._keys: dict[int, int] = {}  # of sessions in the store, by those that rank 0 has
        # States that were read, and by which job; by the number of the session's buffers.
        self._read: dict[int, tuple[int, bytearray]] = {}
        self._ended: queue.SimpleQueue[IoDone] = queue.SimpleQueue()
        self._steps = FollowerSteps(loaded.decoder, loaded.prefill, self._kvs, self._beside)
        self._io = IoThreads(
            num_readers=options.num_readers,
            num_writers=options.num_writers,
            queue_max=IO_QUEUE_MAX,
            done=self._ended.put,
        )
        self._verbs: dict[Verb, Callable[[Words], None]] = {
            Verb.ALLOCATE: self._allocate,
            Verb.READY: self._ready,
            Verb.GROW: self._grow,
            Verb.RELEASE: self._release,
            Verb.TRIM: self._trim,
            Verb.CUT: self._cut,
            Verb.ROLL: self._roll,
            Verb.BASE: self._base,
            Verb.TAKE: self._take,
            Verb.TRAIL: self._trail,
            Verb.SESSION: self._session,
            Verb.GATHER: self._gather,
            Verb.UNGATHER: self._ungather,
            Verb.WRITE: self._write,
            Verb.READ: self._begin_reading,
            Verb.ARRIVED: self._arrived,
            Verb.STORE_CUT: self._store_cut,
            Verb.STORE_ADOPT: self._store_adopt,
            Verb.STORE_FORGET: self._store_forget,
            Verb.STORE_KEEP: self._store_keep,
            Verb.STEP: self._steps.run,
        }

    def serve(self, exchange: Exchange) -> None:
        """Carry out what rank 0 tells until its runtime ends."""
        while True:
            heard = exchange(reports=self._reports())
            for verb, words in decoded(heard.orders):
                if verb is Verb.END:
                    return
                if verb is Verb.REST:
                    exchange.rest()
                    break
                self._verbs[verb](words)

    def close(self) -> None:
        """End the I/O threads; the store is its owner's."""
        self._io.close()

    # --- memory ---

    def _allocate(self, words: Words) -> None:
        pool, number, capacity = words
        kv = SessionKV()
        kv.buffers = self._pools[pool].allocate(capacity)
        self._kvs[number], self._pool_of[number] = kv, pool
        if pool:
            assert isinstance(self._prefill, PredictedPrefill)
            self._beside[number] = self._prefill.state_of(kv)

    def _ready(self, words: Words) -> None:
        buffers = self._kvs[words[0]].buffers
        assert buffers is not None
        buffers.make_ready()

    def _grow(self, words: Words) -> None:
        number, capacity, num_tokens = words
        buffers = self._kvs[number].buffers
        assert buffers is not None
        self._pools[self._pool_of[number]].grow(buffers, capacity, num_tokens)

    def _release(self, words: Words) -> None:
        number = words[0]
        self._beside.pop(number, None)
        self._read.pop(number, None)
        self._kvs.pop(number).release(self._pools[self._pool_of.pop(number)])

    def _trim(self, words: Words) -> None:
        pool, high, low = words
        self._pools[pool].trim(to_int(high, low))

    def _cut(self, words: Words) -> None:
        number, num_tokens = words
        kv = self._kvs[number]
        if num_tokens < kv.num_tokens or not num_tokens:  # else it has yet to arrive
            kv.truncate(num_tokens)

    def _roll(self, words: Words) -> None:
        self._kvs[words[0]].roll(self._layout)

    def _base(self, words: Words) -> None:
        buffers = self._kvs[words[0]].buffers
        assert buffers is not None
        buffers.base = words[1]

    def _take(self, words: Words) -> None:
        number, other, num_tokens = words
        self._kvs[number].take_rows(self._kvs[other], num_tokens)

    def _trail(self, words: Words) -> None:
        assert isinstance(self._prefill, PredictedPrefill)
        self._beside[words[0]].trail = self._prefill.prediction.predictor.trail()

    # --- disk ---

    def _the_store(self) -> Store:
        assert self._store is not None
        return self._store

    def _session(self, words: Words) -> None:
        key, persistent = words[:2]
        app, at = to_text(words, 2)
        name, _ = to_text(words, at)
        session = self._the_store().session(app, name, persistent=bool(persistent))
        self._keys[key] = session.key

    def _gather(self, words: Words) -> None:
        slot, number, start, end, has_state = words
        kv = self._kvs[number]
        assert kv.buffers is not None
        states = kv.states.at(end, kv.num_tokens) if has_state else None
        runs = token_runs(self._layout, kv.buffers, start, end) + state_runs(states or {})
        staged = self._staging.take()
        self._staged[slot] = staged, copy_out(runs, staged)

    def _ungather(self, words: Words) -> None:
        self._staging.give(self._staged.pop(words[0])[0])

    def _write(self, words: Words) -> None:
        job, key, count = words[:3]
        writes, at = [], 3
        for _ in range(count):
            slot, start, num_tokens = words[at : at + 3]
            writes.append((slot, start, words[at + 3 : at + 3 + num_tokens]))
            at += 3 + num_tokens
        writing = _Writing(job=job, key=self._keys[key], writes=writes)
        run = partial(writing.run, self._the_store(), self._staged)
        assert self._io.submit("write", run, writing)

    def _begin_reading(self, words: Words) -> None:
        job, key, number, state_bytes, count = words[:5]
        asked = [words[5 + 5 * i : 10 + 5 * i] for i in range(count)]
        buffers = self._kvs[number].buffers
        assert buffers is not None
        stored = self._the_store().lookup(self._keys[key])
        refs = {ref.start: ref for ref in (stored.records if stored else ())}
        # Where this disk was away for a while it may have other tokens, as many, of that name.
        ends = [use_end for _, _, use_end, *_ in asked]
        hashes = prefix_hashes(stored.token_ids if stored else (), ends)
        reading = _Reading(
            job=job,
            key=self._keys[key],
            number=number,
            num_asked=count,
            state_bytes=state_bytes,
        )
        for (start, end, use_end, *hashed), mine in zip(asked, hashes, strict=True):
            ref: RecordRef | None = refs.get(start)
            if ref is None or ref.end != end or to_int(*hashed) != mine:
                break
            runs = slot_runs(self._layout, buffers, start, use_end)
            reading.parts.append((replace(ref, use_end=use_end), runs))
        if len(reading.parts) < count:
            reading.state_bytes = 0
        assert self._io.submit("restore", partial(reading.run, self._the_store()), reading)

    def _arrived(self, words: Words) -> None:
        number, num_tokens, job = words
        kv = self._kvs[number]
        kv.append([0] * num_tokens)
        read_by, state = self._read.pop(number, (-1, None))
        if state is not None and read_by == job:
            kv.states.move_on(unpack_state(self._layout, state))

    def _store_cut(self, words: Words) -> None:
        key, num_tokens = words
        if key in self._keys:
            self._the_store().truncate(self._keys[key], num_tokens)

    def _store_adopt(self, words: Words) -> None:
        key, donor, num_tokens = words
        if key in self._keys and donor in self._keys:
            self._the_store().adopt(self._keys[key], self._keys[donor], num_tokens)

    def _store_forget(self, words: Words) -> None:
        app, at = to_text(words)
        name, _ = to_text(words, at)
        store = self._the_store()
        self._keys.clear()  # as rank 0, which tells of whom it needs again
        session = store.find(app, name)
        if session is not None:
            store.forget(session.key)
            assert self._io.submit("write", store.flush, None)

    def _store_keep(self, words: Words) -> None:
        """Forget kept sessions that rank 0 does not have: they were removed while it was alone."""
        store = self._the_store()
        kept = {to_int(*words[i : i + 2]) for i in range(0, len(words), 2)}
        gone = [s for s in store.sessions() if name_hash(s.app, s.name) not in kept]
        for session in gone:
            store.forget(session.key)
        if gone:
            store.flush()

    def _reports(self) -> list[Report]:
        """What has ended since; no more than fit."""
        reports: list[Report] = []
        while len(reports) < REPORTS_MAX:
            try:
                io = self._ended.get_nowait()
            except queue.Empty:
                break
            if isinstance(io.error, EngineFailed):  # a bug, not a disk that refuses
                raise io.error
            if io.tag is not None:
                reports.append(self._report(io))
        return reports

    def _report(self, io: IoDone) -> Report:
        job = io.tag
        assert isinstance(job, _Writing | _Reading)
        if isinstance(job, _Writing):
            num_done = job.num_done
            for slot, _, _ in job.writes:
                self._staging.give(self._staged.pop(slot)[0])
        else:
            num_done = job.num_good
            if isinstance(io.error, RecordCorrupt):
                self._the_store().quarantine(job.key, job.parts[num_done][0].start)
            if job.state is not None:
                self._read[job.number] = job.job, job.state
            job.parts.clear()  # the memory is the session's again
        kind = 0 if io.error is None else _kind(io.error)
        return Report(job.job, num_done, kind, self._the_store().stored_end(job.key))


def _kind(error: Exception) -> int:
    if isinstance(error, StoreFull):
        return FULL
    return STALE if isinstance(error, StoreStale) else IO
