"""KV on SSD: checksummed records in extents of a segment file, an SQLite index, a disk budget.

No MLX here. `Store` is the only door; its calls block and may come from any thread.
"""

from edgekv.store.readonly import StoreView
from edgekv.store.store import Store
from edgekv.store.values import RecordRef, StoredSession, StoreSnapshot

__all__ = ["RecordRef", "Store", "StoreSnapshot", "StoreView", "StoredSession"]
