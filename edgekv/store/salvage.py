"""What was said, as far as a damaged index still gives it; KV is a miss, and computed again."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from edgekv.errors import StoreUnusable
from edgekv.store.folder import connect_readonly
from edgekv.store.rows import SQLITE_ERRORS, IndexDamaged, session_of
from edgekv.store.values import StoredSession


def salvage(path: Path) -> list[StoredSession]:
    """Sessions with something said in them that can be read one by one, whatever else cannot."""
    found: dict[tuple[str, str], StoredSession] = {}
    damaged = contextlib.suppress(*SQLITE_ERRORS, OSError)
    with damaged, contextlib.closing(connect_readonly(path)) as connection:
        for key in _keys(connection):
            with contextlib.suppress(*SQLITE_ERRORS, StoreUnusable):
                session = _session(connection, key)
                found.setdefault((session.app, session.name), session)
    return list(found.values())


def _keys(connection: sqlite3.Connection) -> list[int]:
    """Keys of conversations: from both ends up to where a page cannot be read."""
    found: dict[int, None] = {}
    for order in ("ASC", "DESC"):
        found |= dict.fromkeys(_until_damaged(connection, order))
    return list(found)


def _until_damaged(connection: sqlite3.Connection, order: str) -> Iterator[int]:
    with contextlib.suppress(*SQLITE_ERRORS):
        for (key,) in connection.execute(
            f"SELECT session_key FROM conversations ORDER BY session_key {order}"
        ):
            yield key


def _session(connection: sqlite3.Connection, key: int) -> StoredSession:
    """Raises what SQLite raises, IndexDamaged."""
    row = connection.execute(
        "SELECT session_key, app, name, created_s, used_s FROM sessions WHERE session_key = ?",
        (key,),
    ).fetchone()
    said = connection.execute(
        "SELECT text FROM conversations WHERE session_key = ?", (key,)
    ).fetchone()
    if row is None or said is None:
        raise IndexDamaged(f"session {key} cannot be read")
    session = session_of(row, ())
    return StoredSession(
        key=key,
        app=session.app,
        name=session.name,
        persistent=True,
        token_ids=(),
        records=(),
        conversation=str(said[0]),
        created_s=session.created_s,
        used_s=session.used_s,
        payload_bytes=0,
    )
