"""Who is evicted when room is needed: the session used least recently, its last record first.

A prefix is worth more than a suffix: it can be restored without what follows, not the other way
round. What goes is KV alone; a named session keeps its name and its conversation.
"""

import threading
from collections.abc import Callable

from edgekv.store.catalog import Catalog
from edgekv.store.sessions import Session


class EvictableSessions:
    """The sessions of a catalog as `space.Tenants`. Takes the state lock itself."""

    def __init__(
        self,
        catalog: Catalog,
        lock: threading.RLock,
        commit: Callable[[], None],
    ) -> None:
        """Evict from `catalog` under `lock`; `commit` brings the index up to date."""
        self._catalog = catalog
        self._lock = lock
        self.commit = commit
        self.num_evicted = 0

    def _oldest(self) -> Session | None:
        idle = (s for s in self._catalog.sessions.values() if s.links and not s.num_pins)
        return min(idle, key=lambda session: session.used_s, default=None)

    def oldest_s(self) -> float | None:
        """Unix time of the last use of the session that would be evicted first."""
        with self._lock:
            oldest = self._oldest()
        return None if oldest is None else oldest.used_s

    def evict_oldest(self) -> bool:
        """Forget the last record of the session used least recently; False if there is none."""
        with self._lock:
            oldest = self._oldest()
            if oldest is None:
                return False
            self._catalog.cut(oldest, oldest.links[-1].record.start)
            self.num_evicted += 1
        return True

    def clear_from(self, offset: int) -> bool:
        """Forget all records that reach behind an address, unless one is in use."""
        with self._lock:
            there = [r for r in self._catalog.records.values() if r.extent.end > offset]
            sharers = {record: self._catalog.sharers(record) for record in there}
            if any(r.num_readers or any(s.num_pins for s in sharers[r]) for r in there):
                return False
            for record in there:
                if record.num_links:  # it may have gone with another's suffix
                    self._catalog.cut_sharers(record)
                    self.num_evicted += 1
        return True
