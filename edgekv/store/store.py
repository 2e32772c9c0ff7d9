"""One model's KV on SSD: the façade over catalog, index, extents and segment files.

    Store ─┬─ Catalog      sessions, records and links, in memory         state lock
           ├─ Committer    what the index lacks, in one commit            one at a time
           ├─ Space        extents, segment files, budget                 room lock, state lock
           └─ Transfers    payloads in and out                            no lock around bytes

Locks are taken in the order room, commit, state. None is held around a payload: who asks what is
stored does not wait for who writes. A record being written is nobody's yet, and one being read
keeps its extent, whatever happens to its session meanwhile.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgekv.errors import ConfigError, StoreStale, StoreUnusable
from edgekv.store.budget import STEP_BYTES, Limits
from edgekv.store.files import OS_FILES, Buffer, Files
from edgekv.store.folder import store_folder
from edgekv.store.parts import Parts, StoreSpec
from edgekv.store.readonly import StoreView, read_stores
from edgekv.store.segment_file import SEGMENT_BYTES
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

    def __init__(self, spec: StoreSpec) -> None:
        """See `open`."""
        self._parts = Parts(spec)
        self._lock = self._parts.lock
        self._catalog = self._parts.catalog
        self._closed = False

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._parts.spec.folder

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        return self._parts.spec.token_bytes

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
        wall_clock_s: Callable[[], float] = time.time,
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
            wall_clock_s: Unix time.

        Raises:
            StoreBusy: Another process, or this one, has it open.
            StoreUnusable: Not writable, of a newer version, of another model.
            StoreFull: The volume is so full that not even an empty index fits.
        """
        return cls(
            StoreSpec(
                folder=store_folder(root, fingerprint),
                model=model,
                fingerprint=fingerprint,
                token_bytes=token_bytes,
                limits=Limits(disk_bytes=disk_bytes, free_reserve_bytes=free_reserve_bytes),
                files=files,
                segment_bytes=segment_bytes,
                step_bytes=step_bytes,
                wall_clock_s=wall_clock_s,
            )
        )

    @classmethod
    def reopen(cls, view: StoreView) -> "Store":
        """Open a store that `open_readonly` found, to remove sessions; nothing is evicted.

        Raises:
            StoreBusy: A process has it open.
            StoreUnusable: Not writable, or no longer what the view says.
        """
        if view.damage or not view.fingerprint:
            what = view.damage or f"{view.folder} is still empty"
            raise StoreUnusable(what, hint="the next program that uses it starts afresh")
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
                    app, name, persistent=persistent, now_s=self._parts.now_s()
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
        return replace(stored, conversation=self._parts.index.conversation(stored.key))

    def sessions(self) -> list[StoredSession]:
        """All sessions, the one used last first. Raises StoreUnusable."""
        conversations = self._parts.index.conversations()
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
        wanted = array("I", token_ids)
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
                self._catalog.touch(session, self._parts.now_s())

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
        # A copy, for it stays: the caller may go on with its own.
        own = array("I", token_ids)
        return self._parts.transfers.write(key, start, own, payload, vectored=vectored)

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
        self._parts.transfers.read(ref, into, vectored=vectored)

    def quarantine(self, key: int, start: int) -> None:
        """After `RecordCorrupt`: forget the record that begins at `start`, and what is behind it.

        All sessions that share it lose it: none of them could read it.
        """
        with self._lock:
            session = self._catalog.sessions.get(key)
            links = () if session is None else session.links
            record = next((record for record, _ in links if record.start == start), None)
            if record is not None:
                self._parts.counters.num_corrupt += 1
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
            self._parts.space.make_room_for_index(
                2 * len(text.encode()) + (64 << 10), self._parts.tenants
            )
            self._parts.committer.commit((key, text))
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
        self._parts.committer.commit()

    def snapshot(self) -> StoreSnapshot:
        """Figures of this moment; what other stores take is as of the last write."""
        return self._parts.snapshot()

    def check_integrity(self) -> None:
        """Assert that memory, index, extents and budget agree, whatever is under way."""
        self._parts.check_integrity()

    def close(self) -> None:
        """Forget sessions that do not persist, commit, give free space and the folder back.

        Nothing may be under way. Closing twice does nothing.

        Raises:
            StoreFull, StoreUnusable: The last changes could not be committed; it is closed.
            OSError: The system refuses; it is closed.
        """
        if not self._closed:
            self._closed = True
            self._parts.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnusable(f"the store in {self.folder} is closed", hint="open it again")


def _check_name(field: str, value: object) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= NAME_CHARS_MAX:
        raise ConfigError.of(field, value, f"a name of 1 to {NAME_CHARS_MAX} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError.of(field, value, "text") from None
