"""What a store is made of, put together in the order in which each needs the others.

    folder lock ─▶ index ─▶ space ─▶ catalog ─▶ committer ─▶ tenants ─▶ transfers

Whatever fails on the way, what was opened before is closed.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import StoreUnusable
from edgekv.store.budget import Limits
from edgekv.store.catalog import Catalog
from edgekv.store.committer import Committer
from edgekv.store.counters import Counters
from edgekv.store.extents import Extent
from edgekv.store.files import Files
from edgekv.store.folder import FolderLock, make_folder
from edgekv.store.index import Index
from edgekv.store.opening import OpenedIndex, open_index
from edgekv.store.record import HEADER_BYTES
from edgekv.store.rows import RecordRow
from edgekv.store.sessions import Record
from edgekv.store.space import Space
from edgekv.store.tenants import EvictableSessions
from edgekv.store.transfers import Transfers
from edgekv.store.values import StoreSnapshot


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store is told when it is opened.

    Attributes:
        folder: Its own.
        limits: What it may take of the disk.

    The others are those of `Store.open`.
    """

    folder: Path
    model: str
    fingerprint: str
    token_bytes: int
    limits: Limits
    files: Files
    segment_bytes: int
    step_bytes: int
    wall_clock_s: Callable[[], float]

    def __post_init__(self) -> None:
        assert self.token_bytes > 0


class Parts:
    """The parts of an open store; `lock`, the state lock, guards catalog, extents and counters."""

    def __init__(self, spec: StoreSpec) -> None:
        """Open them.

        Raises:
            StoreBusy: Another process, or this one, has the store open.
            StoreUnusable: Not writable, of a newer version, of another model.
            StoreFull: The volume is so full that not even an empty index fits.
        """
        self.spec = spec
        self.lock = threading.RLock()
        self.counters = Counters()
        self._last_s = 0.0
        make_folder(spec.folder)
        with contextlib.ExitStack() as undo:
            self._folder_lock = FolderLock(spec.folder)
            undo.callback(self._folder_lock.release)
            opened = open_index(
                spec.folder,
                {"fingerprint": spec.fingerprint, "token_bytes": spec.token_bytes},
                model=spec.model,
                segment_bytes=spec.segment_bytes,
                limits=spec.limits,
            )
            self.index = opened.index
            undo.callback(self.index.close)
            try:
                self.space = self._open_space(self.index)
                undo.callback(self.space.close)
                self._restore(opened)
            except OSError as error:
                what = error.strerror or error
                raise StoreUnusable(f"{spec.folder}: {what}") from error
            undo.pop_all()

    def _open_space(self, index: Index) -> Space:
        return Space(
            self.spec.folder,
            limits=self.spec.limits,
            lock=self.lock,
            files=self.spec.files,
            segment_bytes=int(index.meta()["segment_bytes"]),
            step_bytes=self.spec.step_bytes,
        )

    def _restore(self, opened: OpenedIndex) -> None:
        """Make the other parts, and all agree with what the index knew."""
        self.counters.load_totals(self.index.meta())
        self.counters.num_index_lost = int(opened.lost)
        self.catalog = Catalog(self._on_unlinked)
        self.counters.num_records_lost = self.catalog.restore(
            opened.sessions, opened.records, self._accept, now_s=self.now_s()
        )
        self.committer = Committer(self.index, self.catalog, self.counters, self.lock)
        self.tenants = EvictableSessions(self.catalog, self.lock, self.committer.commit)
        self.transfers = Transfers(
            fingerprint=self.spec.fingerprint,
            token_bytes=self.spec.token_bytes,
            lock=self.lock,
            catalog=self.catalog,
            counters=self.counters,
            space=self.space,
            tenants=self.tenants,
            committer=self.committer,
            now_s=self.now_s,
        )
        self.space.fit(self.tenants)
        self.committer.commit()

    def _accept(self, row: RecordRow) -> bool:
        """Whether a record of the index can be ours: its size makes sense, its bytes exist."""
        if row.payload_bytes != (row.end - row.start) * self.spec.token_bytes:
            return False
        if row.extent_bytes != self.space.extents.rounded(HEADER_BYTES + row.payload_bytes):
            return False
        return self.space.extents.reserve(Extent(row.offset, row.extent_bytes))

    def _on_unlinked(self, record: Record) -> None:
        if record.num_readers == 0:
            self.space.give(record.extent)

    def now_s(self) -> float:
        """Unix time, but later than at the last call: the order of uses must be plain."""
        self._last_s = max(self.spec.wall_clock_s(), self._last_s + 1e-6)
        return self._last_s

    def close(self) -> None:
        """Forget sessions that do not persist, commit, give free space and the folder back.

        Raises:
            StoreFull, StoreUnusable: The last changes could not be committed; all is closed.
            OSError: The system refuses; all is closed.
        """
        try:
            with self.lock:
                for session in [*self.catalog.sessions.values()]:
                    if not session.persistent:
                        self.catalog.remove(session)
            self.committer.commit()
            self.space.trim(self.tenants)
        finally:
            self.release()

    def release(self) -> None:
        """Close the files and let others have the folder; commit nothing."""
        with contextlib.ExitStack() as last:
            last.callback(self._folder_lock.release)
            last.callback(self.space.close)
            last.callback(self.index.close)

    def snapshot(self) -> StoreSnapshot:
        """Figures of this moment; what other stores take is as of the last write."""
        with self.lock:
            usage = self.space.last_usage
            return StoreSnapshot(
                budget_bytes=self.spec.limits.disk_bytes,
                root_bytes=usage.root_bytes,
                peak_bytes=self.space.peak_bytes,
                file_bytes=self.space.segments.size_bytes + usage.index_bytes,
                used_bytes=self.space.extents.used_bytes,
                num_sessions=len(self.catalog.sessions),
                num_records=len(self.catalog.records),
                num_tokens=self.catalog.num_tokens,
                num_evicted=self.tenants.num_evicted,
                **self.counters.figures(),
            )

    def check_integrity(self) -> None:
        """Assert that catalog, extents, index and budget agree, whatever is under way."""
        self.committer.check_integrity()
        usage = self.space.usage()
        with self.lock:
            self.catalog.check_integrity()
            self.space.extents.check_integrity()
            extents = {record.extent for record in self.catalog.records.values()}
            extents |= self.space.lent | self.transfers.extents_held
            taken = sum(extent.num_bytes for extent in extents)
            assert taken == self.space.extents.used_bytes, "an extent leaked"
            assert self.space.extents.size_bytes <= self.space.segments.size_bytes
        # An empty index stands even without a budget.
        has_kv = self.space.segments.size_bytes > 0
        assert not has_kv or usage.root_bytes <= self.spec.limits.disk_bytes
