"""What stands in stores that others may have open: never a payload, and nothing is repaired."""

import contextlib
import math
import sqlite3
from pathlib import Path

from edgekv.errors import StoreError, StoreUnusable
from edgekv.store.catalog import Catalog
from edgekv.store.folder import INDEX_NAME, folder_bytes, is_in_use, store_folders
from edgekv.store.rows import (
    Meta,
    check_version,
    read_conversations,
    read_meta,
    read_rows,
    typed_errors,
    unpack_layers,
)
from edgekv.store.values import StoredSession, StoreView


def read_stores(root: Path) -> list[StoreView]:
    """What stands in the stores under a root, by folder name; what cannot be read is said.

    SQLite's WAL lets a reader in beside the process that writes.

    Raises:
        StoreUnusable: The root cannot be read.
    """
    return [_read_store(folder) for folder in store_folders(root)]


def _read_store(folder: Path) -> StoreView:
    file_bytes, in_use = folder_bytes(folder), is_in_use(folder)
    try:
        meta, sessions = _read_index(folder / INDEX_NAME)
    except StoreError as error:
        return StoreView(folder=folder, file_bytes=file_bytes, in_use=in_use, damage=str(error))
    return StoreView(
        folder=folder,
        model=str(meta.get("model", "")),
        fingerprint=str(meta.get("fingerprint", "")),
        token_bytes=_token_bytes(meta),
        sessions=tuple(sessions),
        file_bytes=file_bytes,
        in_use=in_use,
    )


def _token_bytes(meta: Meta) -> int:
    with contextlib.suppress(StoreUnusable):
        return sum(layer.range_bytes(1) for layer in unpack_layers(meta.get("layers")))
    old = meta.get("token_bytes")  # of the first release
    return old if isinstance(old, int) and old > 0 else 0


def _read_index(path: Path) -> tuple[Meta, list[StoredSession]]:
    with typed_errors(path), contextlib.closing(_connect(path)) as connection:
        if not check_version(connection, path):
            return {}, []
        connection.execute("BEGIN")  # all of it as of one commit
        meta = read_meta(connection)
        conversations = read_conversations(connection)
        rows = read_rows(connection)
    catalog = Catalog()
    catalog.restore(rows, accept=lambda _: True, now_s=math.inf)
    return meta, catalog.stored(conversations)


def _connect(path: Path) -> sqlite3.Connection:
    """Open for reading; on a volume that cannot be written, without the files that WAL needs."""
    uri = path.absolute().as_uri()
    connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=10, isolation_level=None)
    try:
        connection.execute("SELECT 1 FROM sqlite_master")
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        uri += "?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    return connection
