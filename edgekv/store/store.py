"""One model's KV on SSD: the façade over catalog, index, extents and segment files.

    Store ─┬─ Catalog      sessions, records and links, in memory         state lock
           ├─ Committer    what the index lacks, in one commit            one at a time
           ├─ Space        extents, segment files, budget                 room lock, state lock
           └─ Transfers    payloads in and out                            no lock around bytes

Locks are taken in the order room, commit, state. None is held around a payload: who asks what is
stored does not wait for who writes. A record being written is nobody's yet, and one being read
keeps its extent, whatever happens to its session meanwhile.
"""

import contextlib
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edgekv.errors import ConfigError, StoreStale, StoreUnusable
from edgekv.store.budget import STEP_BYTES, Limits
from edgekv.store.catalog import Catalog
from edgekv.store.committer import Committer
from edgekv.store.counters import TOTAL_KV, TOTAL_PAYLOAD, Counters
from edgekv.store.extents import Extent
from edgekv.store.files import OS_FILES, Buffer, Files
from edgekv.store.folder import FolderLock, make_folder, store_folder
from edgekv.store.opening import OpenedIndex, open_index
from edgekv.store.readonly import StoreView, read_stores
from edgekv.store.record import HEADER_BYTES
from edgekv.store.rows import RecordRow
from edgekv.store.segment_file import SEGMENT_BYTES
from edgekv.store.sessions import Record
from edgekv.store.space import Space
from edgekv.store.tenants import EvictableSessions
from edgekv.store.transfers import Transfers
from edgekv.store.values import RecordRef, StoredSession, StoreSnapshot

NAME_CHARS_MAX = 1024


class Store:
    """KV of one model's sessions; owns its folder by a lock. Any thread may call.

    Calls that touch no disk, and so suit the engine thread: `match`, `adopt`, `truncate`, `touch`,
    `pin`, `unpin`, `stored_end`, `lookup`, `snapshot`; `session` and `find` read a conversation.
    What these change is on disk with the next commit: of `write`, `set_conversation`, `flush`,
    `close`, or `remove` of a persistent session.

    One session's writes come one after the other: the next begins when the last has ended.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        fingerprint: str,
        token_bytes: int,
        limits: Limits,
        files: Files,
        segment_bytes: int,
        step_bytes: int,
        now_s: Callable[[], float],
    ) -> None:
        """See `open`."""
        assert token_bytes > 0
        self.folder = folder
        self.model = model
        self.fingerprint = fingerprint
        self.token_bytes = token_bytes
        self._limits = limits
        self._wall_clock = now_s
        self._last_s = 0.0
        self._closed = False
        self._lock = threading.RLock()  # the state lock: catalog, extents, counters
        self._counters = Counters()
        self._catalog = Catalog(self._on_unlinked)
        make_folder(folder)
        with contextlib.ExitStack() as undo:
            self._folder_lock = FolderLock(folder)
            undo.callback(self._folder_lock.release)
            opened = open_index(
                folder,
                {"fingerprint": fingerprint, "token_bytes": token_bytes},
                model=model,
                segment_bytes=segment_bytes,
                limits=limits,
            )
            self._index = opened.index
            undo.callback(self._index.close)
            with _unusable(folder):
                self._space = Space(
                    folder,
                    limits=limits,
                    lock=self._lock,
                    files=files,
                    segment_bytes=int(self._index.meta()["segment_bytes"]),
                    step_bytes=step_bytes,
                )
                undo.callback(self._space.close)
                self._restore(opened)
            undo.pop_all()

    def _restore(self, opened: OpenedIndex) -> None:
        """Make the parts agree with what the index knew."""
        self._counters.load_totals(self._index.meta())
        self._counters.num_index_lost = int(opened.lost)
        self._counters.num_records_lost = self._catalog.restore(
            opened.sessions, opened.records, self._accept, now_s=self._wall_clock()
        )
        self._committer = Committer(self._index, self._catalog, self._counters, self._lock)
        self._tenants = EvictableSessions(self._catalog, self._lock, self._committer.commit)
        self._transfers = Transfers(
            fingerprint=self.fingerprint,
            token_bytes=self.token_bytes,
            lock=self._lock,
            catalog=self._catalog,
            counters=self._counters,
            space=self._space,
            tenants=self._tenants,
            committer=self._committer,
            now_s=self._now_s,
        )
        self._space.fit(self._tenants)
        self._committer.commit()

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        model: str,
        fingerprint: str,
        token_bytes: int,
        disk_bytes: int,
        free_reserve_bytes: int,
        files: Files = OS_FILES,
        segment_bytes: int = SEGMENT_BYTES,
        step_bytes: int = STEP_BYTES,
        now_s: Callable[[], float] = time.time,
    ) -> "Store":
        """Open or create `<root>/<fingerprint[:32]>/`.

        Args:
            root: Folder of all stores; the budget is theirs together.
            model: Its name, for people.
            fingerprint: 32 to 64 letters and digits that change with whatever changes its KV.
            token_bytes: KV of one token, all layers.
            disk_bytes: Hard budget of all stores under the root.
            free_reserve_bytes: Always left free on the volume.
            files: System calls on segment files.
            segment_bytes: Length of a new store's full segment files, a power of two; a record
                fits in one.
            step_bytes: Preallocate this much at a time where the budget allows it.
            now_s: Unix time.

        Raises:
            StoreBusy: Another process, or this one, has it open.
            StoreUnusable: Not writable, of a newer version, of another model.
            StoreFull: The volume is so full that not even an empty index fits.
        """
        return cls(
            store_folder(root, fingerprint),
            model=model,
            fingerprint=fingerprint,
            token_bytes=token_bytes,
            limits=Limits(disk_bytes=disk_bytes, free_reserve_bytes=free_reserve_bytes),
            files=files,
            segment_bytes=segment_bytes,
            step_bytes=step_bytes,
            now_s=now_s,
        )

    @classmethod
    def reopen(cls, view: StoreView) -> "Store":
        """Open a store that `open_readonly` found, to remove sessions; nothing is evicted.

        Raises:
            StoreBusy: A process has it open.
            StoreUnusable: Not writable, or no longer what the view says.
        """
        if view.damage:
            raise StoreUnusable(view.damage, hint="the next program that uses it starts afresh")
        if store_folder(view.folder.parent, view.fingerprint) != view.folder:
            raise StoreUnusable(
                f"{view.folder} does not have the name of the store in it",
                hint=f"its name should begin with {view.fingerprint[:8]}",
            )
        return cls.open(
            view.folder.parent,
            model=view.model,
            fingerprint=view.fingerprint,
            token_bytes=view.token_bytes,
            disk_bytes=1 << 62,
            free_reserve_bytes=0,
        )

    @staticmethod
    def open_readonly(root: Path) -> list[StoreView]:
        """What stands in the stores under a root, whether or not a process has them open.

        Raises:
            StoreUnusable: The root cannot be read.
        """
        return read_stores(root)

    def _accept(self, row: RecordRow) -> bool:
        """Whether a record of the index can be ours: its size makes sense, its bytes exist."""
        if row.payload_bytes != (row.end - row.start) * self.token_bytes:
            return False
        if row.extent_bytes != self._space.extents.rounded(HEADER_BYTES + row.payload_bytes):
            return False
        return self._space.extents.reserve(Extent(row.offset, row.extent_bytes))

    def _on_unlinked(self, record: Record) -> None:
        if record.num_readers == 0:
            self._space.give(record.extent)

    def _now_s(self) -> float:
        """Unix time, but later than at the last call: the order of uses must be plain."""
        self._last_s = max(self._wall_clock(), self._last_s + 1e-6)
        return self._last_s

    def session(self, app: str, name: str, *, persistent: bool) -> StoredSession:
        """Find or create a session.

        Args:
            app: Who owns it.
            name: Unique within the app.
            persistent: It outlives the process; one that already does stays so.

        Raises:
            ConfigError: A name is too long or no text.
            StoreUnusable: The conversation cannot be read.
        """
        _check_name("app", app)
        _check_name("session", name)
        with self._lock:
            session = self._catalog.find(app, name)
            if session is None:
                return self._catalog.add(
                    app, name, persistent=persistent, now_s=self._now_s()
                ).stored()
            if persistent and not session.persistent:
                self._catalog.persist(session)
            stored = session.stored()
        return self._with_conversation(stored)

    def find(self, app: str, name: str) -> StoredSession | None:
        """The session of that name. Raises StoreUnusable if its conversation cannot be read."""
        with self._lock:
            session = self._catalog.find(app, name)
            stored = None if session is None else session.stored()
        return None if stored is None else self._with_conversation(stored)

    def lookup(self, key: int) -> StoredSession | None:
        """The session of that key, without its conversation; touches no disk."""
        with self._lock:
            session = self._catalog.sessions.get(key)
            return None if session is None else session.stored()

    def _with_conversation(self, stored: StoredSession) -> StoredSession:
        if not stored.persistent:
            return stored
        return replace(stored, conversation=self._index.conversation(stored.key))

    def sessions(self) -> list[StoredSession]:
        """All sessions, the one used last first. Raises StoreUnusable."""
        conversations = self._index.conversations()
        with self._lock:
            found = [
                session.stored(conversations.get(session.key))
                for session in self._catalog.sessions.values()
            ]
        return sorted(found, key=lambda session: session.used_s, reverse=True)

    def stored_end(self, key: int) -> int:
        """How many tokens of a session are stored; 0 if it is not there."""
        with self._lock:
            session = self._catalog.sessions.get(key)
            return 0 if session is None else session.end

    def match(
        self, app: str, token_ids: Sequence[int], *, but_not: int | None = None
    ) -> tuple[int, int]:
        """The session of an app whose stored tokens begin most like these.

        Args:
            app: Only its sessions are looked at.
            token_ids: A prompt.
            but_not: Key of a session to leave out.

        Returns:
            Its key and the number of leading tokens it shares; (0, 0) if none shares any.
        """
        wanted = _token_array(token_ids)
        with self._lock:
            return self._catalog.match(app, wanted, but_not)

    def adopt(self, key: int, donor: int, num_tokens: int) -> int:
        """Replace a session's KV by the donor's first tokens, stored once for both.

        Nothing happens if that would not make the session's longer, or one of the two is gone.

        Returns:
            How many tokens of the session are stored now.
        """
        with self._lock:
            session, giver = (self._catalog.sessions.get(k) for k in (key, donor))
            if session is None:
                return 0
            if giver is not None and session.end < min(num_tokens, giver.end):
                self._catalog.adopt(session, giver, num_tokens)
            return session.end

    def truncate(self, key: int, num_tokens: int) -> None:
        """Forget a session's tokens from `num_tokens` on."""
        with self._lock:
            session = self._catalog.sessions.get(key)
            if session is not None:
                self._catalog.cut(session, num_tokens)

    def touch(self, key: int) -> None:
        """The session was used now."""
        with self._lock:
            session = self._catalog.sessions.get(key)
            if session is not None:
                self._catalog.touch(session, self._now_s())

    def pin(self, key: int) -> None:
        """Do not evict the session before as many `unpin`."""
        with self._lock:
            session = self._catalog.sessions.get(key)
            if session is not None:
                session.num_pins += 1

    def unpin(self, key: int) -> None:
        """Undo one `pin`; a session that is gone needs none."""
        with self._lock:
            session = self._catalog.sessions.get(key)
            if session is not None:
                assert session.num_pins > 0
                session.num_pins -= 1

    def write(
        self,
        key: int,
        start: int,
        token_ids: Sequence[int],
        payload: Sequence[Buffer],
        *,
        vectored: bool = True,
    ) -> RecordRef:
        """Store KV of tokens [start, start + len(token_ids)); what followed `start` is forgotten.

        Data first, then the index, in one commit. After an error the session has its first `start`
        tokens.

        Args:
            key: The session.
            start: At most its stored end.
            token_ids: Of these tokens alone.
            payload: Their KV, `len(token_ids) * token_bytes` bytes, cut anywhere; not changed
                before this returns.
            vectored: One system call for all, else one per buffer.

        Raises:
            StoreFull: Budget or free-space reserve; nothing was written.
            StoreStale: The session is gone, ends before `start`, or was cut while this wrote.
            StoreUnusable: The index cannot be written.
            OSError: The system refuses.
        """
        self._check_open()
        return self._transfers.write(
            key, start, _token_array(token_ids), payload, vectored=vectored
        )

    def read(self, ref: RecordRef, into: Sequence[Buffer], *, vectored: bool = True) -> None:
        """Fill buffers, in order, with a record's whole payload, and verify it.

        Args:
            ref: Of a stored session.
            into: Writable, `ref.payload_bytes` together; undefined after an error.
            vectored: One system call for all, else one per buffer.

        Raises:
            RecordCorrupt: Torn, damaged, foreign or out of date: call `quarantine`.
            StoreStale: The record was forgotten.
            OSError: The system refuses.
        """
        self._check_open()
        self._transfers.read(ref, into, vectored=vectored)

    def quarantine(self, key: int, start: int) -> None:
        """After `RecordCorrupt`: forget the record that begins at `start`, and what is behind it.

        All sessions that share it lose it: none of them could read it.
        """
        with self._lock:
            session = self._catalog.sessions.get(key)
            links = () if session is None else session.links
            record = next((record for record, _ in links if record.start == start), None)
            if record is not None:
                self._counters.num_corrupt += 1
                self._catalog.cut_sharers(record)

    def set_conversation(self, key: int, text: str) -> None:
        """Commit a persistent session's conversation; others' die with the process anyway.

        Args:
            key: The session.
            text: UTF-8 must be able to say it.

        Raises:
            StoreFull: Budget or free-space reserve.
            StoreStale: The session is gone.
            StoreUnusable: The index cannot be written.
            OSError: The system refuses.
        """
        self._check_open()
        with self._lock:
            session = self._catalog.sessions.get(key)
            if session is None:
                raise StoreStale(f"session {key} is gone, its conversation has no place")
            if not session.persistent:
                return
            session.num_pins += 1
        try:
            # Once in the log, once in the database, and some pages around it.
            self._space.make_room_for_index(2 * len(text.encode()) + (64 << 10), self._tenants)
            self._committer.commit((key, text))
        finally:
            self.unpin(key)

    def remove(self, key: int) -> None:
        """Forget a session, its conversation and the KV that no other shares.

        Raises:
            StoreFull, StoreUnusable: A persistent session is forgotten for now, but the index still
                has it.
        """
        with self._lock:
            session = self._catalog.sessions.get(key)
            if session is None:
                return
            self._catalog.remove(session)
        if session.persistent:
            self.flush()

    def flush(self) -> None:
        """Commit what only memory knows yet. Raises StoreFull, StoreUnusable."""
        self._committer.commit()

    def snapshot(self) -> StoreSnapshot:
        """Figures of this moment; what other stores take is as of the last write."""
        with self._lock:
            counters, extents, usage = self._counters, self._space.extents, self._space.last_usage
            totals = counters.totals
            return StoreSnapshot(
                budget_bytes=self._limits.disk_bytes,
                root_bytes=usage.root_bytes,
                peak_bytes=self._space.peak_bytes,
                file_bytes=self._space.segments.size_bytes + usage.index_bytes,
                used_bytes=extents.used_bytes,
                num_sessions=len(self._catalog.sessions),
                num_records=len(self._catalog.records),
                num_tokens=self._catalog.num_tokens,
                num_writes=counters.num_writes,
                num_write_calls=counters.num_write_calls,
                payload_written_bytes=counters.payload_written_bytes,
                kv_written_bytes=counters.kv_written_bytes,
                num_reads=counters.num_reads,
                num_read_calls=counters.num_read_calls,
                read_bytes=counters.read_bytes,
                num_corrupt=counters.num_corrupt,
                num_full=counters.num_full,
                num_stale=counters.num_stale,
                num_evicted=self._tenants.num_evicted,
                total_payload_written_bytes=totals[TOTAL_PAYLOAD],
                total_kv_written_bytes=totals[TOTAL_KV],
                num_index_lost=counters.num_index_lost,
                num_records_lost=counters.num_records_lost,
            )

    def check_integrity(self) -> None:
        """Assert that catalog, extents, index and budget agree; nothing may be under way."""
        self._committer.check_integrity()
        usage = self._space.usage()
        with self._lock:
            self._catalog.check_integrity()
            self._space.extents.check_integrity()
            taken = sum(record.extent.num_bytes for record in self._catalog.records.values())
            assert taken == self._space.extents.used_bytes, "an extent leaked"
            assert self._space.extents.size_bytes <= self._space.segments.size_bytes
        # An empty index stands even without a budget.
        assert self._space.segments.size_bytes == 0 or usage.root_bytes <= self._limits.disk_bytes

    def close(self) -> None:
        """Forget sessions that do not persist, commit, give the folder back.

        Nothing may be under way. Closing twice does nothing.

        Raises:
            StoreFull, StoreUnusable: The last changes could not be committed; it is closed.
            OSError: The system refuses; it is closed.
        """
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as last:
            last.callback(self._folder_lock.release)
            last.callback(self._space.close)
            last.callback(self._index.close)
            with self._lock:
                for session in [*self._catalog.sessions.values()]:
                    if not session.persistent:
                        self._catalog.remove(session)
            self.flush()
            self._space.trim(self._tenants)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnusable(f"the store in {self.folder} is closed", hint="open it again")


def _token_array(token_ids: Sequence[int]) -> "array[int]":
    if isinstance(token_ids, array) and token_ids.typecode == "I":
        return token_ids
    return array("I", token_ids)


def _check_name(field: str, value: object) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= NAME_CHARS_MAX:
        raise ConfigError.of(field, value, f"a name of 1 to {NAME_CHARS_MAX} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError.of(field, value, "text") from None


@contextlib.contextmanager
def _unusable(folder: Path) -> Iterator[None]:
    """What the system refuses while a store is opened makes it unusable."""
    try:
        yield
    except OSError as error:
        raise StoreUnusable(f"{folder}: {error.strerror or error}") from error
