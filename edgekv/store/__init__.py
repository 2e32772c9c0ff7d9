"""KV on SSD: a checksummed file for each record, an SQLite index, a disk budget, I/O threads.

No MLX here. `Store` is the only door; its calls may come from any thread.
"""

from edgekv.store.store import Store
from edgekv.store.values import LayerState, RecordRef, StoredSession, StoreSnapshot, StoreView

__all__ = ["LayerState", "RecordRef", "Store", "StoreSnapshot", "StoreView", "StoredSession"]
