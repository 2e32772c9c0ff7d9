"""One model's KV on SSD, and who owns what.

* The *state lock* guards the catalog and the counters, which are the truth while the store is open.
  It is held for microseconds, longer where all sessions are looked through (`match`, evicting), and
  never around a call of the system.
* The *turn* at the disk (`Disk`) belongs to one thread at a time: it makes room, commits to the
  index, of which it has the only writing connection, and removes files. It may wait for the drive;
  it takes the state lock in between, and nobody who has the state lock waits for it.
* A record's file belongs to the thread that writes it until the catalog has the record. From then
  on nobody changes it; whoever reads it has it open, and may go on though it is removed.
* The folder belongs to the process that has its lock; the sum of all stores' claims to whoever has
  the root's (`budget`).

    write:  room ─▶ file ─▶ catalog ─▶ one commit          no lock around a payload
    read:   catalog ─▶ file ─▶ header and checksum verified

So who asks what is stored waits for nobody. A record being written is nobody's yet.
"""

import contextlib
import os
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgekv.errors import ConfigError, StoreError, StoreStale, StoreUnusable
from edgekv.store.budget import Limits
from edgekv.store.catalog import Catalog
from edgekv.store.disk import Disk, StoreSpec
from edgekv.store.disk_io import OS_FILES, Buffer, Files
from edgekv.store.folder import is_folder_of, read_stores, store_folder
from edgekv.store.payloads import Payloads
from edgekv.store.record import RecordFormat, is_fingerprint
from edgekv.store.values import LayerState, RecordRef, StoredSession, StoreSnapshot, StoreView

NAME_CHARS_MAX = 1024


class Store:
    """KV of one model's sessions; owns its folder by a lock. Any thread may call.

    Attributes:
        folder: Where it lies.
        model: The model's name.
        token_bytes: KV of one token.

    Calls that touch no disk, and so suit the engine thread: `match`, `adopt`, `truncate`, `touch`,
    `forget`, `quarantine`, `stored_end`, `lookup`, `snapshot`, and `session` of one that does not
    persist; `session` and `find` read the conversation of one that does. What these change is on
    disk with the next commit: of `write`, `set_conversation`, `remove`, `flush`, `close`.

    One session's writes come one after the other: the next begins when the last has ended.
    """

    def __init__(self, spec: StoreSpec) -> None:
        """See `open`."""
        self.folder = spec.folder
        self.model = spec.model
        self.token_bytes = spec.form.token_bytes
        self._spec = spec
        self._state = threading.Lock()
        self._catalog = Catalog(has_state=spec.form.state_bytes > 0)
        self._disk = Disk(spec, self._catalog, self._state)
        self._figures = self._disk.figures
        self._payloads = Payloads(self._disk, self._catalog, self._state)
        self._unsaved: set[int] = set()  # keys of sessions whose newest text is on no disk
        self._process_id = os.getpid()
        self._closed = False
        for old in self._disk.salvaged:
            # What finds no room, or has no name, stands in the damaged index that was put aside.
            with contextlib.suppress(StoreError, ConfigError, OSError):
                self.take_over(old, old.conversation)

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        model: str,
        fingerprint: str,
        layers: Sequence[LayerState],
        disk_bytes: int,
        free_reserve_bytes: int,
        files: Files = OS_FILES,
        wall_clock_s: Callable[[], float] = time.time,
    ) -> "Store":
        """Open or create `<root>/<fingerprint[:32]>/`.

        Args:
            root: Folder of all stores; the budget is theirs together.
            model: Its name, for people.
            fingerprint: 32 to 64 letters and digits that change with whatever changes its KV.
            layers: What each layer keeps of a token, in the order of a payload.
            disk_bytes: Hard budget of all stores under the root.
            free_reserve_bytes: KV always leaves this much free on the volume.
            files: System calls on record files.
            wall_clock_s: Unix time.

        Raises:
            StoreBusy: Another process, or this one, has it open.
            StoreUnusable: Not writable, of a newer version, of another model.
            StoreFull: The volume is so full that not even an empty index fits.
        """
        assert layers
        return cls(
            StoreSpec(
                # The process may go to another folder while it has this open.
                folder=store_folder(root.absolute(), fingerprint),
                model=model,
                form=RecordFormat(fingerprint, tuple(layers)),
                limits=Limits(disk_bytes=disk_bytes, free_reserve_bytes=free_reserve_bytes),
                files=files,
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
        if not is_folder_of(view.folder, view.fingerprint) or not is_fingerprint(view.fingerprint):
            raise StoreUnusable(
                f"{view.folder} does not have the name of the store in it",
                hint=f"its name should begin with {view.fingerprint[:8]!r}",
            )
        return cls(
            StoreSpec(
                folder=view.folder,
                model=view.model,
                form=RecordFormat(view.fingerprint, ()),
                limits=Limits(disk_bytes=1 << 62, free_reserve_bytes=0),
            )
        )

    open_readonly = staticmethod(read_stores)

    # --- sessions ---

    def session(self, app: str, name: str, *, persistent: bool) -> StoredSession:
        """Find or create a session; one that is persistent stays so.

        Raises:
            ConfigError: A name is too long or no text.
            StoreUnusable: The conversation cannot be read.
        """
        self._check_open()
        _check_name("app", app)
        _check_name("session", name)
        with self._state:
            session = self._catalog.find(app, name)
            if session is None:
                now_s = self._spec.wall_clock_s()
                session = self._catalog.add(app, name, persistent=persistent, now_s=now_s)
            elif persistent and not session.persistent:
                self._catalog.persist(session)
            stored = session.stored()
        return self._with_conversation(stored)

    def find(self, app: str, name: str) -> StoredSession | None:
        """The session of that name. Raises StoreUnusable if its conversation cannot be read."""
        self._check_open()
        with self._state:
            session = self._catalog.find(app, name)
            stored = None if session is None else session.stored()
        return None if stored is None else self._with_conversation(stored)

    def lookup(self, key: int) -> StoredSession | None:
        """The session of that key, without its conversation; touches no disk."""
        with self._state:
            session = self._catalog.sessions.get(key)
            return None if session is None else session.stored()

    def _with_conversation(self, stored: StoredSession) -> StoredSession:
        if not stored.persistent:
            return stored
        return replace(stored, conversation=self._disk.index.conversation(stored.key))

    def sessions(self) -> list[StoredSession]:
        """All sessions, the one used last first. Raises StoreUnusable."""
        self._check_open()
        self._disk.index.check_place()
        conversations = self._disk.index.conversations()
        with self._state:
            return self._catalog.stored(conversations)

    def num_kept(self) -> Counter[str]:
        """Sessions that outlive the process, by app; touches no disk."""
        with self._state:
            return Counter(one.app for one in self._catalog.sessions.values() if one.persistent)

    def why_lost(self) -> str:
        """Why nothing of what is stored here will be found again; "" if it will."""
        try:
            self._disk.index.check_place()
        except StoreUnusable as error:
            return str(error)
        return ""

    def touch(self, key: int) -> None:
        """The session was used now."""
        with self._state:
            session = self._catalog.sessions.get(key)
            if session is not None:
                self._catalog.touch(session, self._spec.wall_clock_s())

    def set_conversation(self, key: int, text: str, *, taken_back: bool = False) -> None:
        """Commit a persistent session's conversation; others' die with the process anyway.

        KV makes room for it; the volume's reserve is not kept from it. Where something of what it
        was before is `taken_back`, no file holds that any more, and its KV is forgotten.

        Raises:
            StoreFull: The budget, or the volume, has no room though all KV is gone.
            StoreStale: The session is gone.
            StoreUnusable: The index cannot be written.
            OSError: The system refuses.
        """
        self._check_open()
        with self._state:
            session = self._catalog.sessions.get(key)
        if session is None:
            raise StoreStale(f"session {key} is gone, its conversation has no place")
        if session.persistent:
            with self._state:
                self._unsaved.add(key)
                if taken_back:
                    self._catalog.cut(session, 0)
            self._disk.commit_text(key, text, taken_back=taken_back)
            with self._state:
                self._unsaved.discard(key)

    def take_over(self, old: StoredSession, conversation: str | None) -> bool:
        """Commit what was said in a session of another store, and when; its KV stays there.

        Returns:
            False if there is one of its name, in which something else was said; nothing happened.

        Raises:
            As `set_conversation`.
        """
        self._check_open()
        here = self.find(old.app, old.name)
        if here is not None and here.conversation is not None:
            return here.conversation == conversation  # it was taken over before, by who was killed
        key = self.session(old.app, old.name, persistent=True).key
        with self._state:
            used_s = min(old.used_s, self._spec.wall_clock_s())
            self._catalog.date(self._catalog.sessions[key], old.created_s, used_s)
        if conversation is None:
            self.flush()
        else:
            self.set_conversation(key, conversation)
        return True

    def forget(self, key: int) -> None:
        """Forget a session, its conversation and the KV that no other shares."""
        with self._state:
            session = self._catalog.sessions.get(key)
            if session is not None:
                self._catalog.remove(session)
                self._unsaved.discard(key)

    def remove(self, key: int) -> None:
        """`forget`, on disk too.

        Raises:
            StoreFull, StoreUnusable: It is forgotten for now, but the index still has it.
        """
        self._check_open()
        self.forget(key)
        self.flush()

    def flush(self) -> None:
        """Commit what only memory knows yet. Raises StoreFull, StoreUnusable."""
        self._check_open()
        self._disk.commit()

    # --- what is stored, without a look at the disk ---

    def stored_end(self, key: int) -> int:
        """How many tokens of a session are stored; 0 if it is not there."""
        with self._state:
            session = self._catalog.sessions.get(key)
            return 0 if session is None else session.end

    def match(
        self, app: str, token_ids: Sequence[int], *, but_not: int | None = None
    ) -> tuple[int, int]:
        """The session of an app, but not one of this key, that begins most like a prompt.

        Returns:
            Its key and the number of leading tokens it shares; (0, 0) if none shares any.
        """
        wanted = array("I", token_ids)
        with self._state:
            return self._catalog.match(app, wanted, but_not)

    def adopt(self, key: int, donor: int, num_tokens: int) -> int:
        """Replace a session's KV by the donor's first tokens, stored once for both.

        Nothing happens if that would not make the session's longer, or one of the two is gone.

        Returns:
            How many tokens of the session are stored now.
        """
        with self._state:
            session, giver = (self._catalog.sessions.get(k) for k in (key, donor))
            if session is None:
                return 0
            if giver is not None and session.end < min(num_tokens, giver.end):
                self._catalog.adopt(session, giver, num_tokens)
            return session.end

    def truncate(self, key: int, num_tokens: int) -> None:
        """Forget a session's tokens from `num_tokens` on."""
        with self._state:
            session = self._catalog.sessions.get(key)
            if session is not None:
                self._catalog.cut(session, num_tokens)

    def quarantine(self, key: int, start: int) -> None:
        """After `RecordCorrupt`: forget the record that begins at `start`, and what is behind it.

        All sessions that share it lose it: none of them could read it.
        """
        with self._state:
            session = self._catalog.sessions.get(key)
            links = () if session is None else session.links
            bad = next((link.record_id for link in links if link.start == start), None)
            if bad is not None:
                self._figures.num_corrupt += 1
                self._catalog.cut_sharers(self._catalog.records[bad])

    # --- payloads ---

    def write(
        self, key: int, start: int, token_ids: Sequence[int], payload: Sequence[Buffer]
    ) -> RecordRef:
        """Store KV of tokens [start, start + len(token_ids)); what followed `start` is forgotten.

        Data first, then the index, in one commit. After an error the session has its first `start`
        tokens.

        Args:
            key: The session.
            start: At most its stored end.
            token_ids: Of these tokens alone.
            payload: Their KV, `len(token_ids) * token_bytes` bytes, cut anywhere, and perhaps the
                state behind them; not changed before this returns.

        Raises:
            StoreFull: Budget or free-space reserve; nothing was written.
            StoreStale: The session is gone, ends before `start`, or was cut while this wrote.
            StoreUnusable: The index cannot be written.
            OSError: The system refuses.
        """
        self._check_open()
        # A copy, for it stays: the caller may go on with its own.
        return self._payloads.write(key, start, array("I", token_ids), payload)

    def read(self, ref: RecordRef, into: Sequence[Buffer]) -> None:
        """Fill buffers, in order, with a record's whole KV, and verify it.

        Args:
            ref: Of a stored session.
            into: Writable, as many bytes as its KV has, or that and a state of the record that
                has one; undefined after an error.

        Raises:
            RecordCorrupt: Torn, damaged, foreign, out of date or gone: call `quarantine`.
            StoreStale: The record was forgotten.
            OSError: The system refuses.
        """
        self._check_open()
        self._payloads.read(ref, into)

    # --- all of it ---

    def snapshot(self) -> StoreSnapshot:
        """Figures of this moment; what other stores take is as of the last write."""
        budget = self._disk.budget
        with self._state:
            return replace(
                self._figures,
                root_bytes=budget.root_bytes,
                peak_bytes=budget.peak_bytes,
                file_bytes=budget.kv_bytes + budget.index_bytes,
                used_bytes=budget.kv_bytes,
                num_sessions=len(self._catalog.sessions),
                num_records=len(self._catalog.records),
                num_tokens=self._catalog.num_tokens,
                num_unsaved=len(self._unsaved),
            )

    def check_integrity(self) -> None:
        """Assert that memory, index, files and budget agree, whatever is under way."""
        self._disk.check_integrity()

    def close(self) -> None:
        """Forget sessions that do not persist, commit, give the folder back.

        Nothing may be under way. Closing twice does nothing, nor does a process that was forked.

        Raises:
            StoreFull, StoreUnusable: The last changes could not be committed; it is closed.
        """
        if self._closed or os.getpid() != self._process_id:
            return
        self._closed = True
        with self._state:
            for session in [*self._catalog.sessions.values()]:
                if not session.persistent:
                    self._catalog.remove(session)
        self._disk.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnusable(f"the store in {self.folder} is closed", hint="open it again")
        if os.getpid() != self._process_id:  # its locks, and SQLite's, belong to the other
            raise StoreUnusable(
                f"the store in {self.folder} belongs to process {self._process_id}, which forked "
                "this one",
                hint="open it in this process",
            )


def _check_name(field: str, value: object) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= NAME_CHARS_MAX:
        raise ConfigError.of(field, value, f"a name of 1 to {NAME_CHARS_MAX} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError.of(field, value, "text") from None
