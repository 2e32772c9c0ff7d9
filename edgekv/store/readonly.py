"""What stands in stores that others may have open: names, sizes, conversations; never a payload.

SQLite's WAL lets a reader in beside the process that writes. Nothing is repaired here: what cannot
be read is said.
"""

import contextlib
import math
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import StoreError
from edgekv.store.catalog import Catalog
from edgekv.store.folder import folder_bytes, is_in_use, store_folders
from edgekv.store.index import INDEX_NAME, check_version
from edgekv.store.rows import read_rows
from edgekv.store.sqlite import typed_errors
from edgekv.store.values import StoredSession


@dataclass(frozen=True, kw_only=True)
class StoreView:
    """One model's store as it stood a moment ago.

    Attributes:
        folder: Where it is.
        model: The model's name; "" if the index cannot be read.
        fingerprint: Of whatever changes the model's KV; "" if the index cannot be read.
        token_bytes: KV of one token.
        sessions: Those that persist, the one used last first.
        file_bytes: What its files take on disk.
        in_use: Some process has it open.
        damage: Why the index cannot be read; "" if it can.
    """

    folder: Path
    model: str = ""
    fingerprint: str = ""
    token_bytes: int = 0
    sessions: tuple[StoredSession, ...] = ()
    file_bytes: int
    in_use: bool
    damage: str = ""


def read_stores(root: Path) -> list[StoreView]:
    """Views of all stores under a root, by folder name.

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
    token_bytes = meta.get("token_bytes")
    return StoreView(
        folder=folder,
        model=str(meta.get("model", "")),
        fingerprint=str(meta.get("fingerprint", "")),
        token_bytes=token_bytes if isinstance(token_bytes, int) else 0,
        sessions=tuple(sessions),
        file_bytes=file_bytes,
        in_use=in_use,
    )


def _read_index(path: Path) -> tuple[dict[str, str | int], list[StoredSession]]:
    with typed_errors(path), contextlib.closing(_connect(path)) as connection:
        if check_version(connection, path):
            return {}, []
        connection.execute("BEGIN")  # all of it as of one commit
        meta = dict(connection.execute("SELECT name, value FROM meta"))
        conversations = dict(connection.execute("SELECT session_key, text FROM conversations"))
        sessions, records = read_rows(connection)
    catalog = Catalog(on_unlinked=lambda _: None)
    catalog.restore(sessions, records, accept=lambda _: True, now_s=math.inf)
    found = [
        session.stored(conversations.get(session.key)) for session in catalog.sessions.values()
    ]
    return meta, sorted(found, key=lambda session: session.used_s, reverse=True)


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
