"""KV between a caller's buffers and record files.

    write   begin ─▶ room ─▶ file ─▶ the session's, if that is as it was ─▶ commit
    read    the record's file, if it is not forgotten ─▶ header and checksum verified

No lock is held around a payload. A file that was begun is its writer's until the catalog has it.
"""

import threading
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from edgekv.errors import RecordCorrupt, StoreFull, StoreStale
from edgekv.store.catalog import Catalog, CatalogSession, common_prefix
from edgekv.store.disk import Disk
from edgekv.store.disk_io import NO_SPACE, Buffer, total_bytes
from edgekv.store.record import Record, hash_tokens, read_record, write_record
from edgekv.store.values import RecordRef


class _Write(NamedTuple):
    """A write under way: what it will be, and what its session was when it began."""

    session: CatalogSession
    record: Record
    num_cuts: int
    num_known: int  # tokens of it that the session had already


class Payloads:
    """Writes and reads records. Any thread may call; `state` guards catalog and figures."""

    def __init__(self, disk: Disk, catalog: Catalog, state: threading.Lock) -> None:
        self._disk = disk
        self._catalog = catalog
        self._state = state
        self._form = disk.spec.form
        self._files = disk.spec.files
        self._figures = disk.figures

    def write(
        self, key: int, start: int, token_ids: "array[int]", payload: Sequence[Buffer]
    ) -> RecordRef:
        """See `Store.write`; the ids stay here."""
        write = self._begin(key, start, token_ids, total_bytes(payload))
        session, record = write.session, write.record
        try:
            self._write_file(write, payload)
            self._disk.commit()
        except BaseException as error:
            is_full = isinstance(error, StoreFull) or getattr(error, "errno", None) in NO_SPACE
            with self._state:
                self._figures.num_full += is_full
                if any(link.record_id == record.record_id for link in session.links):
                    self._catalog.cut(session, start)
            if isinstance(error, OSError) and is_full:
                raise StoreFull(f"no KV can be written: {error.strerror}") from error
            raise
        finally:
            with self._state:
                session.num_writes -= 1
        return record.ref(record.end)

    def _begin(self, key: int, start: int, token_ids: "array[int]", payload_bytes: int) -> _Write:
        form = self._form
        has_state = payload_bytes > len(token_ids) * form.token_bytes
        state_bytes = form.stored_state_bytes if has_state else 0
        with self._state:
            session = self._catalog.sessions.get(key)
            if session is None or session.end < start:
                self._figures.num_stale += 1
                what = "is gone" if session is None else f"has {session.end} tokens"
                raise StoreStale(f"session {key} {what}: KV from {start} on cannot follow")
            num_known = common_prefix(session.token_ids[start:], token_ids)
            self._catalog.cut(session, start)
            session.num_writes += 1
            prefix = session.token_ids + token_ids
            num_cuts, record_id = session.num_cuts, next(self._catalog.record_ids)
        record = Record(
            record_id=record_id,
            start=start,
            end=len(prefix),
            payload_bytes=len(token_ids) * form.token_bytes + state_bytes,
            token_ids=token_ids,
            tokens_xxh3=hash_tokens(prefix),
            state_bytes=state_bytes,
        )
        return _Write(session, record, num_cuts, num_known)

    def _write_file(self, write: _Write, payload: Sequence[Buffer]) -> None:
        disk, record = self._disk, write.record
        path = disk.begin_file(record)
        try:
            num_calls = write_record(self._files, path, self._form, record, payload)
            with self._state:
                self._append(write, num_calls)
                disk.keep_file(record)
        except BaseException:
            disk.drop_file(record)
            raise

    def _append(self, write: _Write, num_calls: int) -> None:
        """The payload stands: make it the session's, if that is still as it was."""
        session, record, num_cuts, num_known = write
        file_bytes = self._form.file_bytes(record)
        new_bytes = record.payload_bytes - num_known * self._form.token_bytes
        figures = self._figures
        figures.num_writes += 1
        figures.num_write_calls += num_calls
        figures.written_bytes += file_bytes
        figures.total_written_bytes += file_bytes
        figures.kv_written_bytes += new_bytes
        figures.total_kv_written_bytes += new_bytes
        alive = self._catalog.sessions.get(session.key) is session
        if not alive or (session.end, session.num_cuts) != (record.start, num_cuts):
            figures.num_stale += 1
            raise StoreStale(f"session {session.key} was cut while its KV was written")
        self._catalog.link(session, record, record.end)
        if not session.persistent:  # of those that are, the runtime says when they are used
            self._catalog.touch(session, self._disk.spec.wall_clock_s())

    def read(self, ref: RecordRef, into: Sequence[Buffer]) -> None:
        """See `Store.read`."""
        record = self._known(ref)
        path = self._disk.path(record)
        try:
            num_calls = read_record(self._files, path, self._form, record, into)
        except FileNotFoundError as error:
            self._known(ref)  # or it was forgotten before it could be opened
            raise RecordCorrupt(path, "its file, which is gone") from error
        with self._state:
            self._figures.num_reads += 1
            self._figures.num_read_calls += num_calls
            self._figures.read_bytes += self._form.header_bytes + total_bytes(into)

    def _known(self, ref: RecordRef) -> Record:
        with self._state:
            record = self._catalog.records.get(ref.record_id)
            if record is None:
                self._figures.num_stale += 1
                raise StoreStale(f"the record of tokens [{ref.start}, {ref.end}) was forgotten")
            return record
