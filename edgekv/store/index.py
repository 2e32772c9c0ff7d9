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
import os
import sqlite3
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import StoreFull, StoreUnusable

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

# A table or column that is missing is SQLITE_ERROR.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)

Link = tuple[int, int]  # record_id, use_end


class IndexDamaged(StoreUnusable):
    """The file is no index, or not a whole one; whoever opens it starts afresh."""


@dataclass(frozen=True, kw_only=True)
class RecordRow:
    """A row of `records`."""

    # Fields in the order of the table's columns.
    record_id: int
    start: int
    end: int
    offset: int
    extent_bytes: int
    payload_bytes: int
    token_ids: bytes
    tokens_xxh3: bytes

    @property
    def consistent(self) -> bool:
        """Whether a row that was read makes sense by itself; SQLite checks no types."""
        numbers = (self.record_id, self.start, self.end, self.offset, self.extent_bytes)
        return (
            all(type(number) is int and number >= 0 for number in numbers)
            and type(self.payload_bytes) is int
            and 0 < self.payload_bytes <= self.extent_bytes
            and type(self.token_ids) is type(self.tokens_xxh3) is bytes
            and len(self.tokens_xxh3) == 16
            and len(self.token_ids) == 4 * (self.end - self.start) > 0
        )


@dataclass(frozen=True, kw_only=True)
class SessionRow:
    """A row of `sessions` and the links from `first_position` on; those before stay."""

    key: int
    app: str
    name: str
    created_s: float
    used_s: float
    first_position: int
    links: tuple[Link, ...]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What one commit writes: the state of what changed, not how it came about."""

    removed_sessions: tuple[int, ...] = ()
    removed_records: tuple[int, ...] = ()
    sessions: tuple[SessionRow, ...] = ()
    records: tuple[RecordRow, ...] = ()

    def __bool__(self) -> bool:
        return any((self.removed_sessions, self.removed_records, self.sessions, self.records))


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
            _create_file(path)
            self._writer = _connect(path)
            try:
                self._prepare(identity, segment_bytes)
                self._name(model)
                self._limit_log(log_bytes)
                self._reader = _connect(path)
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
        with _transaction(self._writer):
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
        with typed_errors(self.path), self._write_lock, _transaction(self._writer):
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
        with typed_errors(self.path), self._write_lock, _transaction(self._writer):
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


def read_rows(connection: sqlite3.Connection) -> tuple[list[SessionRow], list[RecordRow]]:
    """Sessions and records as they stand."""
    links: dict[int, list[Link]] = {}
    for key, record_id, use_end in connection.execute(
        "SELECT session_key, record_id, use_end FROM links ORDER BY session_key, position"
    ):
        links.setdefault(key, []).append((record_id, use_end))
    sessions = [
        SessionRow(
            key=key,
            app=app,
            name=name,
            created_s=created_s,
            used_s=used_s,
            first_position=0,
            links=tuple(links.get(key, ())),
        )
        for key, app, name, created_s, used_s in connection.execute(
            "SELECT session_key, app, name, created_s, used_s FROM sessions"
        )
    ]
    if not all(_consistent(row) for row in sessions):
        raise IndexDamaged("a session in the index makes no sense")
    names = tuple(RecordRow.__dataclass_fields__)
    columns = ", ".join(f"[{name}]" for name in names)  # in "…" a missing one would be a text
    records = [
        RecordRow(**dict(zip(names, row, strict=True)))
        for row in connection.execute(f"SELECT {columns} FROM records")
    ]
    return sessions, records


def _consistent(row: SessionRow) -> bool:
    return (
        type(row.app) is type(row.name) is str
        and type(row.created_s) is type(row.used_s) is float
        and all(type(number) is int for link in row.links for number in link)
    )


def pack_tokens(token_ids: "array[int]") -> bytes:
    """Token ids, typecode "I", as little-endian u32."""
    if sys.byteorder == "big":
        token_ids = array("I", token_ids)
        token_ids.byteswap()
    return token_ids.tobytes()


def unpack_tokens(packed: bytes) -> "array[int]":
    """What `pack_tokens` packed."""
    token_ids = array("I", packed)
    assert token_ids.itemsize == 4
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids


def _create_file(path: Path) -> None:
    """Make the database file 0600, and follow no link; before any connection is open.

    Closing a descriptor drops the POSIX locks that SQLite has on the file in this process.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


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


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous=NORMAL")
    # What was said in a session that is removed is overwritten, wherever SQLite was built.
    connection.execute("PRAGMA secure_delete=ON")
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise into errors that say whose fault it is."""
    try:
        yield
    except sqlite3.Error as error:
        # What Python itself cannot make sense of, such as text that is no UTF-8, has no code.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreFull(f"{path}: the volume is full") from error
        if code in _DAMAGE:
            raise IndexDamaged(f"{path}: {error}") from error
        raise StoreUnusable(f"{path}: {error}") from error
    except OSError as error:
        raise StoreUnusable(f"{path}: {error.strerror}") from error
