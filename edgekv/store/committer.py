"""What memory knows goes into the index: one commit at a time, in the order it came about."""

import threading

from edgekv.store.catalog import Catalog
from edgekv.store.counters import Counters
from edgekv.store.index import Index


class Committer:
    """Brings an index up to date with a catalog. Any thread may call.

    A commit may wait for the drive; it holds the state lock only to see what there is to write.
    """

    def __init__(
        self, index: Index, catalog: Catalog, counters: Counters, lock: threading.RLock
    ) -> None:
        """Commit to `index` what `catalog` and `counters`, guarded by `lock`, know."""
        self.index = index
        self._catalog = catalog
        self._counters = counters
        self._lock = lock
        self._one_at_a_time = threading.Lock()

    def commit(self, conversation: tuple[int, str] | None = None) -> None:
        """Commit all changes, and a conversation (session key, text) with them.

        When this returns, what was changed before it was called is committed, by whomever.

        Raises:
            StoreFull: The volume is full.
            StoreUnusable: SQLite cannot write.
        """
        with self._one_at_a_time:
            self._commit(conversation)

    def _commit(self, conversation: tuple[int, str] | None) -> None:
        with self._lock:
            changes = self._catalog.take_changes()
            totals = self._counters.totals
            alive = conversation is not None and conversation[0] in self._catalog.sessions
        conversations = [conversation] if conversation is not None and alive else []
        if not changes and not conversations:
            return
        try:
            self.index.apply(changes, meta=totals.items(), conversations=conversations)
        except BaseException:
            with self._lock:
                self._catalog.put_back(changes)
            raise

    def check_integrity(self) -> None:
        """Assert that the index is what the catalog makes of it, while nobody may change either."""
        with self._one_at_a_time, self._lock:
            self._commit(None)
            catalog = self._catalog
            sessions, records = self.index.rows()
            persistent = {s.key: s for s in catalog.sessions.values() if s.persistent}
            assert {row.key for row in sessions} == persistent.keys()
            for row in sessions:
                links = persistent[row.key].links
                assert row.links == tuple((record.record_id, end) for record, end in links)
            in_index = {record.record_id for record in catalog.records.values() if record.in_index}
            assert {row.record_id for row in records} == in_index
