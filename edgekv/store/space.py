"""Room for records: extents of the segment files, within the budget.

Two locks. The *state lock* is the store's: it guards catalog and extents, and is held for
microseconds. The *room lock* is held by the one thread that makes room: it may wait for the system
to preallocate or for a commit, and takes the state lock in between. Who frees an extent or looks
something up never waits for that thread.
"""

import errno
import threading
from pathlib import Path
from typing import Protocol

from edgekv.errors import StoreFull
from edgekv.store import budget
from edgekv.store.budget import Limits, Usage
from edgekv.store.extents import BLOCK_BYTES, Extent, Extents
from edgekv.store.files import Files
from edgekv.store.folder import drop_segments, idle_stores, root_bytes, root_lock
from edgekv.store.index import INDEX_NAME, index_bytes
from edgekv.store.segment_file import SegmentFile

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class Tenants(Protocol):
    """Those whose records fill the space, as far as they can be evicted. Takes the state lock."""

    def oldest_s(self) -> float | None:
        """Unix time of the last use of the session that would be evicted first; None: nobody."""
        ...

    def evict_oldest(self) -> bool:
        """Forget one record, the last one of that session; False if there is none."""
        ...

    def clear_from(self, offset: int) -> bool:
        """Forget all records that reach behind an address; False if one is in use."""
        ...

    def commit(self) -> None:
        """Have the index forget them too. Raises StoreFull, StoreUnusable."""
        ...


class Space:
    """Extents within the budget. Any thread may call."""

    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits,
        lock: threading.RLock,
        files: Files,
        segment_bytes: int,
        step_bytes: int,
    ) -> None:
        """Open the segment files that are there.

        Args:
            folder: The store's.
            limits: What may be taken.
            lock: The state lock.
            files: System calls.
            segment_bytes: Length of a full segment file, a power of two.
            step_bytes: Preallocate at least this much at a time where the budget allows it.

        Raises:
            OSError: A file cannot be opened.
        """
        self.segments = SegmentFile(folder, segment_bytes=segment_bytes, files=files)
        self.extents = Extents(arena_bytes=segment_bytes)
        self.extents.grow(self.segments.size_bytes // BLOCK_BYTES * BLOCK_BYTES)
        self.limits = limits
        self.peak_bytes = 0
        self.lent: set[Extent] = set()  # taken by writes under way, and no record's yet
        self._folder = folder
        self._files = files
        self._step_bytes = step_bytes
        self._lock = lock
        self._room_lock = threading.Lock()
        try:
            self.last_usage = self.usage()
        except OSError:
            self.close()
            raise

    def usage(self) -> Usage:
        """What is taken now. Raises OSError."""
        self.last_usage = usage = Usage(
            root_bytes=root_bytes(self._folder.parent),
            index_bytes=index_bytes(self._folder / INDEX_NAME),
            free_bytes=self._files.volume_free_bytes(self._folder),
        )
        self.peak_bytes = max(self.peak_bytes, usage.root_bytes)
        return usage

    def take(self, num_bytes: int, tenants: Tenants) -> Extent:
        """An extent for `num_bytes`, evicting whom it must.

        What stood there before is forgotten by the index when this returns.

        Raises:
            StoreFull: It does not fit, whatever is evicted.
            StoreUnusable: The index cannot forget what was evicted.
            OSError: The system refuses.
        """
        if num_bytes > self.extents.extent_bytes_max:
            raise StoreFull(f"a record of {num_bytes} bytes is larger than a segment file")
        with self._room_lock:
            self._give_back_excess(0, tenants)
            extent = self._make_room(num_bytes, tenants)
            try:
                tenants.commit()
            except BaseException:
                self.give(extent)
                raise
            return extent

    def _make_room(self, num_bytes: int, tenants: Tenants) -> Extent:
        while True:
            with self._lock:
                extent = self.extents.allocate(num_bytes)
                if extent is not None:
                    self.lent.add(extent)
                    return extent
            if self._grow(num_bytes):
                continue
            usage = self.usage()
            oldest_s = tenants.oldest_s()
            idle = idle_stores(self._folder)
            self._check_possible(num_bytes, usage, others_bytes=usage.root_bytes if idle else 0)
            older = (path for used_s, path in idle if oldest_s is None or used_s < oldest_s)
            if not any(drop_segments(path) for path in older) and not tenants.evict_oldest():
                raise self._full(num_bytes, usage)

    def _grow(self, num_bytes: int) -> bool:
        """Preallocate more, if the limits allow as much as it takes."""
        with root_lock(self._folder.parent):
            left = budget.left_bytes(self.limits, self.usage())
            with self._lock:
                size_bytes = self.extents.size_bytes
                needed_bytes = self.extents.size_needed(num_bytes)
            if needed_bytes == size_bytes:  # somebody gave an extent back
                return True
            grown = budget.grown_bytes(
                size_bytes, needed_bytes, left, block_bytes=BLOCK_BYTES, step_bytes=self._step_bytes
            )
            if grown is None:
                return False
            try:
                self.segments.grow(grown)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                return False
            finally:
                with self._lock:
                    reached = self.segments.size_bytes // BLOCK_BYTES * BLOCK_BYTES
                    self.extents.grow(max(reached, size_bytes))
                self.usage()
        return True

    def _check_possible(self, num_bytes: int, usage: Usage, *, others_bytes: int) -> None:
        """Refuse what would not fit in an empty store, before anybody is evicted in vain."""
        left = budget.left_bytes(self.limits, usage) + others_bytes
        if self.extents.rounded(num_bytes) > self.extents.size_bytes + max(left, 0):
            raise self._full(num_bytes, usage)

    def _full(self, num_bytes: int, usage: Usage) -> StoreFull:
        limits, text = self.limits, budget.size_text
        if usage.free_bytes - num_bytes < limits.free_reserve_bytes:
            return StoreFull(
                f"{text(num_bytes)} find no room: {text(usage.free_bytes)} are free on the volume "
                f"of {self._folder.parent}, {text(limits.free_reserve_bytes)} stay so",
                hint="free some space, or lower free_reserve_bytes",
            )
        return StoreFull(
            f"{text(num_bytes)} find no room: {text(usage.root_bytes)} of "
            f"{text(limits.disk_bytes)} are taken in {self._folder.parent}",
            hint="raise disk_bytes, or remove sessions",
        )

    def make_room_for_index(self, num_bytes: int, tenants: Tenants) -> None:
        """See that the index may grow by `num_bytes`.

        Raises:
            StoreFull: It may not.
            StoreUnusable: The index cannot forget what was evicted.
            OSError: The system refuses.
        """
        with self._room_lock:
            self._give_back_excess(num_bytes, tenants)

    def _give_back_excess(self, num_bytes: int, tenants: Tenants) -> None:
        """Shrink until the limits hold, and would after `num_bytes` more."""
        if not budget.excess_bytes(self.limits, self.usage(), num_bytes):
            return
        self._shrink_to_fit(num_bytes, tenants)
        usage = self.usage()
        if budget.excess_bytes(self.limits, usage, num_bytes):
            raise self._full(num_bytes, usage)

    def fit(self, tenants: Tenants) -> None:
        """Shrink to the limits, which may have been lowered since.

        Raises:
            StoreUnusable: The index cannot forget what was evicted.
            OSError: The system refuses.
        """
        with self._room_lock:
            self._shrink_to_fit(0, tenants)

    def _shrink_to_fit(self, num_bytes: int, tenants: Tenants) -> None:
        size_bytes = budget.shrunk_bytes(
            self.limits,
            self.usage(),
            self.extents.size_bytes,
            num_bytes,
            block_bytes=BLOCK_BYTES,
        )
        self._shrink(size_bytes, tenants)

    def _shrink(self, size_bytes: int, tenants: Tenants) -> None:
        """Give the space behind `size_bytes` back, if nobody there is in use."""
        with self._lock:
            if size_bytes >= self.extents.size_bytes or not tenants.clear_from(size_bytes):
                return
            size_bytes = max(size_bytes, self.extents.size_used())
            self.extents.shrink(size_bytes)
        tenants.commit()
        self.segments.shrink(size_bytes)

    def trim(self, tenants: Tenants) -> None:
        """Give the free end of the space back.

        Raises:
            StoreUnusable: The index cannot forget what stood there.
            OSError: The system refuses.
        """
        with self._room_lock:
            self._shrink(self.extents.size_used(), tenants)

    def give(self, extent: Extent) -> None:
        """Take an extent back."""
        with self._lock:
            self.lent.discard(extent)
            self.extents.free(extent)

    def own(self, extent: Extent) -> None:
        """An extent that was lent to a write is a record's from now on."""
        with self._lock:
            self.lent.remove(extent)

    def close(self) -> None:
        """Close the files; nothing may be under way."""
        self.segments.close()
