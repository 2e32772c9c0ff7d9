"""The index: which session has which records, and where they stand; SQLite in WAL mode.

    meta           name, value              model, fingerprint, bytes of a token and of a segment
                                            file, wear
    sessions       session_key, app, name, created_s, used_s
    conversations  session_key, text        written by the runtime, opaque here
    records        record_id, start, end, offset, extent_bytes, payload_bytes, token_ids,
                   tokens_xxh3
    links          session_key, position, record_id, use_end      a session's records in order

A record that several sessions share has several links; one without any is garbage, which is
collected when the index is opened. `token_ids` are the ids of [start, end) as little-endian u32.

Only committed rows count. `synchronous=NORMAL` does not flush each commit to the drive: after a
power cut the last ones may be missing, and then a record's header says that it is not what the
index takes it for.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from edgekv.errors import StoreUnusable
from edgekv.store.rows import Changes, RecordRow, SessionRow, read_rows
from edgekv.store.sqlite import IndexDamaged, connect, create_file, transaction, typed_errors

INDEX_NAME = "index.sqlite"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x656B7649  # "ekvI"

_SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE sessions(
    session_key INTEGER PRIMARY KEY, app TEXT NOT NULL, name TEXT NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL, UNIQUE(app, name));
CREATE TABLE conversations(session_key INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE records(
    record_id INTEGER PRIMARY KEY, start INTEGER NOT NULL, "end" INTEGER NOT NULL,
    "offset" INTEGER NOT NULL, extent_bytes INTEGER NOT NULL, payload_bytes INTEGER NOT NULL,
    token_ids BLOB NOT NULL, tokens_xxh3 BLOB NOT NULL);
CREATE TABLE links(
    session_key INTEGER NOT NULL, position INTEGER NOT NULL, record_id INTEGER NOT NULL,
    use_end INTEGER NOT NULL, PRIMARY KEY(session_key, position)) WITHOUT ROWID;
"""


class Index:
    """The database of one store. Any thread may call; one writes at a time, another may read."""

    def __init__(
        self,
        path: Path,
        identity: dict[str, str | int],
        *,
        model: str,
        segment_bytes: int,
        log_bytes: int,
    ) -> None:
        """Open or create.

        Args:
            path: The database file.
            identity: What a new index is told of its KV, and an old one must know the same.
            model: The model's name, for people.
            segment_bytes: Length of a new store's segment files; an old one's stays.
            log_bytes: How long the log may become before it moves into the database.

        Raises:
            IndexDamaged: The file is not a whole index.
            StoreUnusable: Newer version, of another model, or the system refuses.
        """
        self.path = path
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        with typed_errors(path):
            create_file(path)
            self._writer = connect(path)
            try:
                self._prepare(identity, segment_bytes)
                self._name(model)
                self._limit_log(log_bytes)
                self._reader = connect(path)
            except BaseException:
                self._writer.close()
                raise

    def _prepare(self, identity: dict[str, str | int], segment_bytes: int) -> None:
        is_new = check_version(self._writer, self.path)
        (journal,) = self._writer.execute("PRAGMA journal_mode=WAL").fetchone()
        if journal != "wal":
            raise StoreUnusable(f"{self.path}: the volume does not allow SQLite's WAL mode")
        if is_new:
            self._create(identity | {"segment_bytes": segment_bytes})
        self._check(identity)

    def _limit_log(self, log_bytes: int) -> None:
        (page_bytes,) = self._writer.execute("PRAGMA page_size").fetchone()
        num_pages = max(log_bytes // page_bytes, 1)
        self._writer.execute(f"PRAGMA wal_autocheckpoint={num_pages}")
        # A log that was emptied does not keep the size of its longest moment.
        self._writer.execute(f"PRAGMA journal_size_limit={log_bytes}")

    def _create(self, meta: dict[str, str | int]) -> None:
        with transaction(self._writer):
            for statement in _SCHEMA.split(";"):
                self._writer.execute(statement)  # `executescript` would commit by itself
            self._writer.executemany("INSERT INTO meta VALUES(?, ?)", meta.items())
            self._writer.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._writer.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _check(self, identity: dict[str, str | int]) -> None:
        found = self.meta()
        segment_bytes = found.get("segment_bytes")
        if not isinstance(segment_bytes, int) or segment_bytes.bit_count() != 1:
            raise IndexDamaged(f"{self.path} does not say how long its segment files are")
        for name, value in identity.items():
            if name not in found:
                raise IndexDamaged(f"{self.path} does not say its {name}")
            if found[name] != value:
                raise StoreUnusable(
                    f"{self.path} is of another model: its {name} is {found[name]}, not {value}",
                    hint=f"remove {self.path.parent}, or choose another store folder",
                )

    def _name(self, model: str) -> None:
        """The same weights may be called something else by now: a folder was moved."""
        if self.meta().get("model") != model:
            self._writer.execute("INSERT OR REPLACE INTO meta VALUES('model', ?)", (model,))

    def meta(self) -> dict[str, str | int]:
        """What the index says of its store."""
        return dict(self._writer.execute("SELECT name, value FROM meta"))

    def load(self) -> tuple[list[SessionRow], list[RecordRow]]:
        """All sessions and the records that they have; what nobody has is deleted.

        Raises:
            IndexDamaged: A page or a row makes no sense.
        """
        with typed_errors(self.path), self._write_lock, transaction(self._writer):
            for table in ("links", "conversations"):
                self._writer.execute(
                    f"DELETE FROM {table} WHERE session_key NOT IN"
                    " (SELECT session_key FROM sessions)"
                )
            self._writer.execute(
                "DELETE FROM records WHERE record_id NOT IN (SELECT record_id FROM links)"
            )
            return read_rows(self._writer)

    def apply(
        self,
        changes: Changes,
        *,
        meta: Iterable[tuple[str, int]] = (),
        conversations: Iterable[tuple[int, str]] = (),
    ) -> None:
        """Commit changes, all or none.

        Args:
            changes: Of sessions and records.
            meta: What to replace in `meta`.
            conversations: (session key, text) to put.

        Raises:
            StoreFull: The volume is full.
            StoreUnusable: SQLite cannot write.
        """
        with typed_errors(self.path), self._write_lock, transaction(self._writer):
            self._remove(changes)
            self._writer.executemany(
                "INSERT OR REPLACE INTO records VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
                [tuple(vars(record).values()) for record in changes.records],
            )
            for session in changes.sessions:
                self._put_session(session)
            self._writer.executemany("INSERT OR REPLACE INTO meta VALUES(?, ?)", meta)
            self._writer.executemany(
                "INSERT OR REPLACE INTO conversations VALUES(?, ?)", conversations
            )

    def _remove(self, changes: Changes) -> None:
        keys = [(key,) for key in changes.removed_sessions]
        for table in ("sessions", "conversations", "links"):
            self._writer.executemany(f"DELETE FROM {table} WHERE session_key = ?", keys)
        record_ids = [(record_id,) for record_id in changes.removed_records]
        self._writer.executemany("DELETE FROM records WHERE record_id = ?", record_ids)

    def _put_session(self, row: SessionRow) -> None:
        self._writer.execute(
            "INSERT INTO sessions VALUES(?, ?, ?, ?, ?)"
            " ON CONFLICT(session_key) DO UPDATE SET used_s = excluded.used_s",
            (row.key, row.app, row.name, row.created_s, row.used_s),
        )
        self._writer.execute(
            "DELETE FROM links WHERE session_key = ? AND position >= ?",
            (row.key, row.first_position),
        )
        self._writer.executemany(
            "INSERT INTO links VALUES(?, ?, ?, ?)",
            [(row.key, at, *link) for at, link in enumerate(row.links, row.first_position)],
        )

    def conversation(self, key: int) -> str | None:
        """A session's conversation; never waits for a commit. Raises StoreUnusable."""
        with typed_errors(self.path), self._read_lock:
            row = self._reader.execute(
                "SELECT text FROM conversations WHERE session_key = ?", (key,)
            ).fetchone()
        return None if row is None else str(row[0])

    def conversations(self) -> dict[int, str]:
        """All conversations by session key. Raises StoreUnusable."""
        with typed_errors(self.path), self._read_lock:
            return dict(self._reader.execute("SELECT session_key, text FROM conversations"))

    def rows(self) -> tuple[list[SessionRow], list[RecordRow]]:
        """Sessions and records as committed. Raises StoreUnusable."""
        with typed_errors(self.path), self._read_lock:
            return read_rows(self._reader)

    def close(self) -> None:
        """Close; what is committed moves from the log into the database."""
        with typed_errors(self.path), self._read_lock, self._write_lock:
            self._reader.close()
            self._writer.close()


def index_files(path: Path) -> tuple[Path, ...]:
    """The database, its log and the log's index."""
    return (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm"))


def index_bytes(path: Path) -> int:
    """What the index takes on disk."""
    total = 0
    for file in index_files(path):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def check_version(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether a database is empty; one that is not must be an index of this version.

    Raises:
        IndexDamaged: It is something else.
        StoreUnusable: It is of a newer version.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise StoreUnusable(
            f"{path} has version {version}, this edgekv reads {SCHEMA_VERSION}",
            hint="update edgekv, or choose another store folder",
        )
    is_empty = connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
    if not is_empty and (application, version) != (APPLICATION_ID, SCHEMA_VERSION):
        raise IndexDamaged(f"{path} is not an index of edgekv")
    return is_empty
