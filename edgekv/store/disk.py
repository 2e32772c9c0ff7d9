"""A store's folder while it is open: the index, the record files, and room for both.

    commit   what memory knows ─▶ index ─▶ files that nobody has any more are removed
    room     a larger claim, else KV of idle stores and the oldest of ours goes, then a commit
    write    room ─▶ file ─▶ (catalog) ─▶ commit

Opening takes what may be whole, damaged, half missing or too new:

    index      files       what happens
    whole      whole       records whose files have the right length are restored
    missing, 0 there       the files are removed; counted as a lost index
    damaged    any         put aside, one copy is kept; counted as a lost index; what can still be
                           read of what was said is carried over
    whole      missing     sessions stay, with what was said; records are counted as lost
    version 1  any         the same
    newer      any         StoreUnusable: nothing is touched
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import StoreFull
from edgekv.store.budget import Budget, Limits, drop_kv
from edgekv.store.catalog import Catalog
from edgekv.store.disk_io import OS_FILES, Files
from edgekv.store.folder import (
    INDEX_NAME,
    KV_NAME,
    files_of,
    folder_lock,
    has_kv,
    make_folder,
    put_index_aside,
    remove_segments,
    usable,
)
from edgekv.store.index import Index, salvage
from edgekv.store.record import Record, RecordFormat, taken_bytes
from edgekv.store.rows import IndexDamaged, Rows, total_of
from edgekv.store.values import StoredSession, StoreSnapshot

_WRITTEN = "payload_written_bytes"  # as the first release called `total_written_bytes`
_LOG_BYTES_MAX = 4 << 20
# Text is once in the log, once in the database, and some pages are around it.
_PAGES_AROUND_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store is told when it is opened: see `Store.open`."""

    folder: Path
    model: str
    form: RecordFormat
    limits: Limits
    files: Files = OS_FILES
    wall_clock_s: Callable[[], float] = time.time


class Disk:
    """Index, record files and budget. One thread at a time has its turn here; see `Store`."""

    def __init__(self, spec: StoreSpec, catalog: Catalog, state: threading.Lock) -> None:
        """Take the folder and fill `catalog`, which `state` guards, as it does `figures`.

        See `Store.open` for errors.
        """
        self.spec = spec
        self.figures = StoreSnapshot(budget_bytes=spec.limits.disk_bytes)  # those that are counted
        self._catalog = catalog
        self._state = state
        self._turn = threading.Lock()
        self._kv = spec.folder / KV_NAME
        self._writing: set[str] = set()  # names of files under way; under `_state`
        self._doomed: set[str] = set()  # names that could not be removed when they should have
        self.salvaged: list[StoredSession] = []  # of an index that was damaged
        make_folder(spec.folder)
        with contextlib.ExitStack() as undo:
            undo.enter_context(folder_lock(spec.folder))
            make_folder(self._kv)
            self.index, rows = self._open_index()
            undo.callback(self.index.close)
            with usable(spec.folder):
                self._open_files(rows)
            self._owned = undo.pop_all()

    # --- opening and closing ---

    def _open_index(self) -> tuple[Index, Rows]:
        path = self.spec.folder / INDEX_NAME
        is_there = path.exists() and (path.stat().st_size or Path(f"{path}-wal").exists())
        self.figures.num_index_lost = int(not is_there and has_kv(self.spec.folder))
        try:
            return self._load_index(path)
        except IndexDamaged:
            self.salvaged = salvage(path)
            put_index_aside(self.spec.folder)
        self.figures.num_index_lost = 1
        return self._load_index(path)

    def _load_index(self, path: Path) -> tuple[Index, Rows]:
        log_bytes = min(_LOG_BYTES_MAX, self.spec.limits.index_reserve_bytes // 4)
        index = Index(path, self.spec.form, model=self.spec.model, log_bytes=log_bytes)
        try:
            return index, index.load()
        except BaseException:
            index.close()
            raise

    def _open_files(self, rows: Rows) -> None:
        """Make memory, index and files agree."""
        spec, figures, meta = self.spec, self.figures, self.index.meta
        remove_segments(spec.folder)
        self._sizes = files_of(self._kv)
        for record in rows.records:
            num_tokens = record.end - record.start
            record.state_bytes = spec.form.state_bytes_of(num_tokens, record.payload_bytes)
        num_refused = self._catalog.restore(rows, self._accept, now_s=spec.wall_clock_s())
        figures.num_records_lost = self.index.num_records_of_old + num_refused
        figures.total_written_bytes = total_of(meta.get(_WRITTEN))
        figures.total_kv_written_bytes = total_of(meta.get("kv_written_bytes"))
        known = {record.file_name for record in self._catalog.records.values()}
        self._catalog.unlinked.clear()  # of them, too, the files are unknown
        kv_bytes = sum(self._sizes.values())
        self.budget = Budget(spec.folder, spec.limits, spec.files, kv_bytes=kv_bytes)
        self._remove_files(self._sizes.keys() - known)
        self._give_back_excess()
        self._commit()

    def _accept(self, record: Record) -> bool:
        """Whether a record of the index can be ours: its size makes sense, its file exists."""
        size_bytes, form = self._sizes.get(record.file_name), self.spec.form
        if not form.layers:
            return size_bytes is not None
        kv_bytes = (record.end - record.start) * form.token_bytes
        right = record.payload_bytes - kv_bytes in {0, form.stored_state_bytes}
        return right and size_bytes == self._file_bytes(record)

    def _file_bytes(self, record: Record) -> int:
        return taken_bytes(self.spec.form.file_bytes(record))

    def close(self) -> None:
        """Commit, and let others have the folder whether or not that raises; see `Store.close`."""
        with self._turn, self._owned:
            try:
                self._commit()
            finally:
                self.index.close()  # its log goes: what is left then is claimed
                with contextlib.suppress(OSError):  # then others count what is here
                    self.budget.close()

    def path(self, record: Record) -> Path:
        """The file of a record."""
        return self._kv / record.file_name

    # --- commits ---

    def commit(self) -> None:
        """Have the index know what memory does, and remove files that nobody has any more.

        When this returns, what was changed before it was called is committed, by whomever. Raises
        StoreFull, StoreUnusable.
        """
        with self._turn:
            self._commit()

    def _commit(
        self, conversation: tuple[int, str] | None = None, *, taken_back: bool = False
    ) -> None:
        with self._state:
            changes = self._catalog.take_changes()
            unlinked, self._catalog.unlinked = self._catalog.unlinked, []
            totals = {
                _WRITTEN: self.figures.total_written_bytes,
                "kv_written_bytes": self.figures.total_kv_written_bytes,
            }
            if conversation is not None and conversation[0] not in self._catalog.sessions:
                conversation = None
        try:
            if changes or conversation is not None:
                self.index.apply(
                    changes,
                    meta=totals.items(),
                    conversation=conversation,
                    taken_back=taken_back,
                )
        except BaseException as error:
            with self._state:
                self._catalog.put_back(changes)
                if not isinstance(error, StoreFull):  # what the index has, has its file
                    self._catalog.unlinked += unlinked
                    unlinked = []
            raise
        finally:
            # On a full volume these make the room that the index lacks: memory is right.
            self._remove_files(record.file_name for record in unlinked)
            with contextlib.suppress(OSError):
                self.budget.look()

    def commit_text(self, key: int, text: str, *, taken_back: bool) -> None:
        """See `Store.set_conversation`."""
        text_bytes = 2 * len(text.encode()) + _PAGES_AROUND_BYTES
        with self._turn:
            self._make_room(text_bytes=text_bytes)
            while True:
                try:
                    return self._commit((key, text), taken_back=taken_back)
                except StoreFull:
                    if not self._free(text_bytes):
                        raise

    # --- room ---

    def begin_file(self, record: Record) -> Path:
        """Where a record can be written: room for it was made. See `Store.write` for errors."""
        num_bytes, path = self._file_bytes(record), self.path(record)
        with self._turn:
            self.index.check_place()
            make_folder(self._kv)  # somebody may have removed it to have room
            if path.name in self._sizes:  # left by somebody who was killed, and cannot be removed
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            if self._unlinked_bytes():  # what the session had from here on, if anything
                self._forget_unlinked()
            if self._lacking_free(num_bytes) or self.budget.lacking_bytes(kv_bytes=num_bytes):
                self._give_back_excess()  # that goes, too, where the record does not fit
                self._make_room_for_kv(num_bytes)
            self.budget.take(num_bytes)
            self._sizes[path.name] = num_bytes
            with self._state:
                self._writing.add(path.name)
        return path

    def keep_file(self, record: Record) -> None:
        """A file that was begun stands, and is a record's. For who has the state lock."""
        self._writing.remove(record.file_name)

    def drop_file(self, record: Record) -> None:
        """What there is of a file that was begun goes."""
        name = record.file_name
        with self._turn:
            with self._state:
                self._writing.remove(name)
            self._remove_files([name])

    def _make_room_for_kv(self, num_bytes: int) -> None:
        if not self.budget.could_hold(num_bytes):
            raise self.budget.refused(kv_bytes=num_bytes)
        short = self._lacking_free(num_bytes)
        if short and self._free(short) < short:
            raise self.budget.refused(kv_bytes=num_bytes)
        self._make_room(kv_bytes=num_bytes)

    def _make_room(self, **wanted_bytes: int) -> None:
        """Evict until the budget has room for so much KV or text. Raises StoreFull."""
        while short := self.budget.lacking_bytes(**wanted_bytes):
            if not self._free(short):
                raise self.budget.refused(**wanted_bytes)

    def _give_back_excess(self) -> None:
        """Evict until the limits hold, which may have been lowered, or as far as that goes."""
        if short := self._lacking_free(0):
            self._free(short)
        with contextlib.suppress(StoreFull):
            self._make_room()

    def _lacking_free(self, kv_bytes: int) -> int:
        with self._state:
            unwritten_bytes = sum(self._sizes[name] for name in self._writing)
        return self.budget.lacking_free_bytes(unwritten_bytes + kv_bytes)

    def _free(self, num_bytes: int) -> int:
        """Evict the KV that was used least recently, until so much is free; how much that is.

        All KV of an idle store goes at once; of ours one record after the other.
        """
        idle = self.budget.idle_stores()
        freed_bytes, before_bytes = 0, self.budget.kv_bytes
        while freed_bytes + self._unlinked_bytes() < num_bytes:
            with self._state:
                oldest = self._catalog.oldest()
                ours_is_next = not idle or (oldest is not None and oldest.used_s <= idle[0][0])
                evicted = ours_is_next and self._catalog.evict_one()
                self.figures.num_evicted += evicted
            if not ours_is_next:
                freed_bytes += drop_kv(idle.pop(0)[1])
            elif not evicted:
                break
        self._forget_unlinked()
        return freed_bytes + before_bytes - self.budget.kv_bytes

    def _forget_unlinked(self) -> None:
        """Remove files that nobody has any more, and have the index forget them if it can."""
        with contextlib.suppress(StoreFull):  # the files are gone, and the index follows
            self._commit()

    def _unlinked_bytes(self) -> int:
        with self._state:
            unlinked = [record.file_name for record in self._catalog.unlinked]
        return sum(self._sizes.get(name, 0) for name in unlinked)

    def _remove_files(self, names: Iterable[str]) -> None:
        """Remove files, and those again that could not be removed earlier."""
        for name in [*self._doomed, *names]:
            try:
                self.spec.files.unlink(self._kv / name)
            except FileNotFoundError:
                pass
            except OSError:
                self._doomed.add(name)
                with self._state:
                    self.figures.num_not_removed += 1
                continue
            self._doomed.discard(name)
            self.budget.give(self._sizes.pop(name, 0))
        with contextlib.suppress(OSError):
            self.budget.lower_claim()

    def check_integrity(self) -> None:
        """Assert that catalog, index, files and budget agree, whatever is under way."""
        with self._turn:
            checked = False
            while not checked:  # again if somebody changed the catalog meanwhile
                self._commit()
                with self._state:
                    self._catalog.check_integrity()
                    if checked := self._catalog.is_committed:
                        self._check_index()
                        self._check_files()

    def _check_index(self) -> None:
        catalog = self._catalog
        rows = self.index.rows()
        persistent = {s.key: s for s in catalog.sessions.values() if s.persistent}
        assert {row.key for row in rows.sessions} == persistent.keys()
        for row in rows.sessions:
            links = persistent[row.key].links
            assert row.links == tuple((link.record_id, link.use_end) for link in links)
        in_index = {record.record_id for record in catalog.records.values() if record.in_index}
        assert not rows.removed_records
        assert {row.record_id for row in rows.records} == in_index

    def _check_files(self) -> None:
        expected = {record.file_name for record in self._catalog.records.values()}
        unlinked = {record.file_name for record in self._catalog.unlinked}
        here = files_of(self._kv)
        whole = expected | unlinked | self._doomed
        assert whole | self._writing == self._sizes.keys(), "a file leaked"
        assert self.budget.kv_bytes == sum(self._sizes.values())
        for name, size_bytes in here.items():
            assert size_bytes <= self._sizes[name]  # less if under way, or a write was lost
        assert expected <= here.keys()
        budget = self.budget
        assert not self._sizes or budget.root_bytes <= self.spec.limits.disk_bytes
        assert not self._sizes or budget.needed_bytes() <= budget.claim_bytes
