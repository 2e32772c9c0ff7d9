"""Payloads on their way: into an extent that is nobody's yet, or out of one that is held.

    write:  room (may evict, may grow) ─▶ payload into its extent ─▶ catalog and one commit
    read:   catalog ─▶ payload from its extent ─▶ header and checksum verified

The state lock is held around the catalog, never around a payload.
"""

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edgekv.errors import StoreFull, StoreStale
from edgekv.store.catalog import Catalog
from edgekv.store.committer import Committer
from edgekv.store.counters import Counters
from edgekv.store.extents import Extent
from edgekv.store.files import BUFFERS_MAX, Buffer
from edgekv.store.record import HEADER_BYTES, RecordKey, hash_tokens, pack, verify
from edgekv.store.sessions import Record, Session, common_prefix, record_ref
from edgekv.store.space import NO_SPACE, Space
from edgekv.store.tenants import EvictableSessions
from edgekv.store.values import RecordRef


@dataclass(frozen=True, kw_only=True)
class Write:
    """A write under way: what it will be, and what its session was when it began."""

    session: Session
    token_ids: "array[int]"
    record_key: RecordKey
    num_cuts: int
    num_known: int  # tokens of it that the session had already


class Transfers:
    """Writes and reads records. Any thread may call; one session's writes come in order."""

    def __init__(
        self,
        *,
        fingerprint: str,
        token_bytes: int,
        lock: threading.RLock,
        catalog: Catalog,
        counters: Counters,
        space: Space,
        tenants: EvictableSessions,
        committer: Committer,
        now_s: Callable[[], float],
    ) -> None:
        """Work on a store's parts; `lock` guards `catalog`, `counters` and `now_s`."""
        self._now_s = now_s
        self._read: list[Record] = []  # being read, once for each reader
        self._fingerprint = fingerprint
        self._token_bytes = token_bytes
        self._lock = lock
        self._catalog = catalog
        self._counters = counters
        self._space = space
        self._tenants = tenants
        self._committer = committer

    def write(
        self,
        key: int,
        start: int,
        token_ids: "array[int]",
        payload: Sequence[Buffer],
        *,
        vectored: bool,
    ) -> RecordRef:
        """See `Store.write`."""
        payload_bytes = sum(memoryview(buffer).nbytes for buffer in payload)
        assert payload_bytes == len(token_ids) * self._token_bytes > 0
        write = self._begin(key, start, token_ids, payload_bytes)
        try:
            with self._counting_full():
                extent = self._space.take(HEADER_BYTES + payload_bytes, self._tenants)
                try:
                    header = pack(write.record_key, payload)
                    self._space.segments.write(extent.offset, [header, *payload], vectored=vectored)
                    record = self._append(write, extent, _num_calls(payload, vectored))
                except BaseException:
                    self._space.give(extent)
                    raise
                self._commit(write.session, record)
            return record_ref(record, record.end)
        finally:
            with self._lock:
                write.session.num_pins -= 1

    def _begin(self, key: int, start: int, token_ids: "array[int]", payload_bytes: int) -> Write:
        with self._lock:
            session = self._catalog.sessions.get(key)
            if session is None or session.end < start:
                self._counters.num_stale += 1
                what = "is gone" if session is None else f"has {session.end} tokens"
                raise StoreStale(f"session {key} {what}: KV from {start} on cannot follow")
            num_known = common_prefix(session.token_ids[start:], token_ids)
            self._catalog.cut(session, start)
            session.num_pins += 1
            prefix = session.token_ids + token_ids
            num_cuts = session.num_cuts
        return Write(
            session=session,
            token_ids=token_ids,
            record_key=RecordKey(
                fingerprint=self._fingerprint,
                start=start,
                end=len(prefix),
                payload_bytes=payload_bytes,
                tokens_xxh3=hash_tokens(prefix),
            ),
            num_cuts=num_cuts,
            num_known=num_known,
        )

    @contextlib.contextmanager
    def _counting_full(self) -> Iterator[None]:
        """Count writes that find no room, also where the system notices it."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            with self._lock:
                self._counters.num_full += 1
            raise StoreFull(f"no KV can be written: {error.strerror}") from error
        except StoreFull:
            with self._lock:
                self._counters.num_full += 1
            raise

    def _append(self, write: Write, extent: Extent, num_calls: int) -> Record:
        """The payload stands: make it the session's, if that is still as it was."""
        session, written = write.session, write.record_key
        with self._lock:
            self._counters.wrote(
                written_bytes=HEADER_BYTES + written.payload_bytes,
                kv_bytes=(len(write.token_ids) - write.num_known) * self._token_bytes,
                num_calls=num_calls,
            )
            alive = self._catalog.sessions.get(session.key) is session
            if not alive or (session.end, session.num_cuts) != (written.start, write.num_cuts):
                self._counters.num_stale += 1
                raise StoreStale(f"session {session.key} was cut while its KV was written")
            record = self._catalog.new_record(
                start=written.start,
                token_ids=write.token_ids,
                extent=extent,
                payload_bytes=written.payload_bytes,
                tokens_xxh3=written.tokens_xxh3,
            )
            self._catalog.append(session, record)
            self._space.own(extent)
            if not session.persistent:  # of the others the runtime says when they are used:
                self._catalog.touch(session, self._now_s())  # the last one is asked for as such
        return record

    def _commit(self, session: Session, record: Record) -> None:
        """Have the index know the record, or the session forget it."""
        try:
            self._committer.commit()
        except BaseException:
            with self._lock:
                if any(linked is record for linked, _ in session.links):
                    self._catalog.cut(session, record.start)
            raise

    def read(self, ref: RecordRef, into: Sequence[Buffer], *, vectored: bool) -> None:
        """See `Store.read`."""
        with self._reading(ref, _num_calls(into, vectored)) as record:
            header = bytearray(HEADER_BYTES)
            offset = record.extent.offset
            self._space.segments.read(offset, [header, *into], vectored=vectored)
            expected = RecordKey(
                fingerprint=self._fingerprint,
                start=record.start,
                end=record.end,
                payload_bytes=record.payload_bytes,
                tokens_xxh3=record.tokens_xxh3,
            )
            path, file_offset = self._space.segments.path(offset)
            verify(header, into, expected, path=path, offset=file_offset)

    @contextlib.contextmanager
    def _reading(self, ref: RecordRef, num_calls: int) -> Iterator[Record]:
        """Keep a record's extent until its read has ended, even if all forget the record."""
        with self._lock:
            record = self._catalog.records.get(ref.record_id)
            if record is None:
                self._counters.num_stale += 1
                raise StoreStale(f"the record of tokens [{ref.start}, {ref.end}) was forgotten")
            self._counters.did_read(
                read_bytes=HEADER_BYTES + record.payload_bytes, num_calls=num_calls
            )
            record.num_readers += 1
            self._read.append(record)
        try:
            yield record
        finally:
            with self._lock:
                record.num_readers -= 1
                self._read.remove(record)
                if record.num_links == 0 and record.num_readers == 0:
                    self._space.give(record.extent)

    @property
    def extents_held(self) -> set[Extent]:
        """Those that are still read, though no session has them. For who has the state lock."""
        return {record.extent for record in self._read if record.num_links == 0}


def _num_calls(payload: Sequence[Buffer], vectored: bool) -> int:
    """System calls that a record takes, header included."""
    num_buffers = len(payload) + 1
    return -(-num_buffers // BUFFERS_MAX) if vectored else num_buffers
