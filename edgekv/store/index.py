"""The index: which session has which records, and what was said; SQLite in WAL mode.

    meta           name, value              model, fingerprint, layers, wear
    sessions       session_key, app, name, created_s, used_s
    conversations  session_key, text        written by the runtime, opaque here
    records        record_id, start, end, payload_bytes, token_ids, tokens_xxh3
    links          session_key, position, record_id, use_end      a session's records in order

A record that several sessions share has several links; one without any is garbage, which is
collected when the index is opened. `token_ids` are the ids of [start, end) as little-endian u32.

Only committed rows count. `synchronous=NORMAL` does not flush each commit to the drive: after a
power cut the last ones may be missing, and then files without rows are removed.

Version 1 kept records in segment files. Its sessions and conversations are taken over, its records
are not; whoever opens the store removes the files.
"""

import contextlib
import json
import os
import sqlite3
import threading
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from edgekv.errors import StoreFull, StoreUnusable
from edgekv.store.record import Record
from edgekv.store.values import LayerState

SCHEMA_VERSION = 2
APPLICATION_ID = 0x656B7649  # "ekvI"
NUMBER_MAX = 1 << 62  # keys, ids and totals are below; SQLite has room for twice that
_TIME_MAX_S = 1e11  # the year 5138; what is later would not be a date

# A table or column that is missing is SQLITE_ERROR.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_SCRUB_WAIT_MS = 50  # for readers of the log, before it is tried again another time

_RECORD_TABLES = f"""
PRAGMA user_version={SCHEMA_VERSION};
CREATE TABLE records(
    record_id INTEGER PRIMARY KEY, start INTEGER NOT NULL, "end" INTEGER NOT NULL,
    payload_bytes INTEGER NOT NULL, token_ids BLOB NOT NULL, tokens_xxh3 BLOB NOT NULL);
CREATE TABLE links(
    session_key INTEGER NOT NULL, position INTEGER NOT NULL, record_id INTEGER NOT NULL,
    use_end INTEGER NOT NULL, PRIMARY KEY(session_key, position)) WITHOUT ROWID;
"""
_SCHEMA = (
    """
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE sessions(
    session_key INTEGER PRIMARY KEY, app TEXT NOT NULL, name TEXT NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL, UNIQUE(app, name));
CREATE TABLE conversations(session_key INTEGER PRIMARY KEY, text TEXT NOT NULL);
"""
    + _RECORD_TABLES
)

Meta = dict[str, str | int]
LinkRow = tuple[int, int]  # record_id, use_end


class IndexDamaged(StoreUnusable):
    """The file is no index, or not a whole one; whoever opens it starts afresh."""


@dataclass(frozen=True, kw_only=True)
class SessionRow:
    """A row of `sessions` and the links from `first_position` on; those before stay."""

    key: int
    app: str
    name: str
    created_s: float
    used_s: float
    first_position: int = 0
    links: tuple[LinkRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the index holds, or what one commit writes: how it is, not how it came about.

    Attributes:
        removed_records: Ids; of what was read, those of rows that make no sense.
    """

    sessions: Sequence[SessionRow] = ()
    records: Sequence[Record] = ()
    removed_sessions: Collection[int] = ()
    removed_records: Collection[int] = ()

    def __bool__(self) -> bool:
        return any((self.sessions, self.records, self.removed_sessions, self.removed_records))


class Index:
    """The database of one store. One thread at a time writes; any may read beside it."""

    def __init__(
        self,
        path: Path,
        *,
        fingerprint: str,
        model: str,
        layers: Sequence[LayerState],
        log_bytes: int,
    ) -> None:
        """Open or create.

        Args:
            path: The database file.
            fingerprint: What a new index is told, and an old one must know.
            model: The model's name, for people.
            layers: The same holds; none to look at and remove sessions.
            log_bytes: How long the log may become before it moves into the database.

        Raises:
            IndexDamaged: The file is not a whole index.
            StoreUnusable: Newer version, of another model, or the system refuses.
            StoreFull: The volume is full.
        """
        self._path = path
        self._unscrubbed = False  # text that was removed can still be read in the log
        self._read_lock = threading.Lock()  # of the reading connection, for one statement
        self.num_records_of_old = 0  # of an older version; they are gone
        with typed_errors(path):
            _create_file(path)
            self._writer = _connect(path)
            try:
                self._prepare(fingerprint)
                self._describe(model, _pack_layers(layers) if layers else None)
                self._limit_log(log_bytes)
                self._reader = _connect(path)
            except BaseException:
                self._writer.close()
                raise

    def _prepare(self, fingerprint: str) -> None:
        """Create, or check and take over."""
        version = check_version(self._writer, self._path)
        (journal,) = self._writer.execute("PRAGMA journal_mode=WAL").fetchone()
        if journal != "wal":
            raise StoreUnusable(f"{self._path}: the volume does not allow SQLite's WAL mode")
        if version == 0:
            with self._transaction():
                self._run(_SCHEMA + f"PRAGMA application_id={APPLICATION_ID}")
                self._put_meta([("fingerprint", fingerprint)])
        found = self.meta().get("fingerprint")
        if found is None:
            raise IndexDamaged(f"{self._path} does not say its fingerprint")
        if found != fingerprint:
            raise self._of_another_model("fingerprint", found, fingerprint)
        if version == 1:
            self._take_over()

    def _take_over(self) -> None:
        """Keep what version 1 knew of sessions and what was said, but none of its records."""
        with self._transaction():
            found = self._writer.execute("SELECT count(*) FROM records").fetchone()
            (self.num_records_of_old,) = found
            self._run("DROP TABLE records; DROP TABLE links;" + _RECORD_TABLES)
            self._writer.execute("DELETE FROM meta WHERE name IN ('token_bytes', 'segment_bytes')")

    def _run(self, statements: str) -> None:
        for statement in statements.split(";"):
            self._writer.execute(statement)  # `executescript` would commit by itself

    def _describe(self, model: str, layers: str | None) -> None:
        """The same weights may be called something else by now: a folder was moved."""
        found = self.meta()
        wanted = {"model": model} | ({} if layers is None else {"layers": layers})
        old = found.get("layers", layers)
        if layers is not None and old != layers:
            unpack_layers(old)  # or it is damaged
            raise self._of_another_model("layers", old, layers)
        if not wanted.items() <= found.items():
            with self._transaction():
                self._put_meta(wanted.items())

    def _of_another_model(self, name: str, found: object, wanted: str) -> StoreUnusable:
        return StoreUnusable(
            f"{self._path} is of another model: its {name} is {found}, not {wanted}",
            hint=f"remove {self._path.parent}, or choose another store folder",
        )

    def _limit_log(self, log_bytes: int) -> None:
        (page_bytes,) = self._writer.execute("PRAGMA page_size").fetchone()
        num_pages = max(log_bytes // page_bytes, 1)
        self._writer.execute(f"PRAGMA wal_autocheckpoint={num_pages}")
        # A log that was emptied does not keep the size of its longest moment.
        self._writer.execute(f"PRAGMA journal_size_limit={log_bytes}")

    def meta(self) -> Meta:
        """What the index says of its store."""
        return read_meta(self._writer)

    def load(self) -> Rows:
        """All sessions and the records that they have; what nobody has is deleted.

        Raises:
            IndexDamaged: A page or a row makes no sense.
        """
        with typed_errors(self._path), self._transaction():
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
        changes: Rows,
        *,
        meta: Iterable[tuple[str, int]] = (),
        conversation: tuple[int, str] | None = None,
    ) -> None:
        """Commit changes, all or none.

        Args:
            changes: Of sessions and records.
            meta: What to replace in `meta`.
            conversation: (session key, text) to put.

        Raises:
            StoreFull: The volume is full.
            StoreUnusable: SQLite cannot write.
        """
        with typed_errors(self._path):
            with self._transaction():
                removes_text = bool(changes.removed_sessions)
                self._remove(changes)
                self._writer.executemany(
                    "INSERT OR REPLACE INTO records VALUES(?, ?, ?, ?, ?, ?)",
                    [_row_of(record) for record in changes.records],
                )
                for session in changes.sessions:
                    self._put_session(session)
                self._put_meta(meta)
                if conversation is not None:
                    removes_text |= self._put_conversation(*conversation)
            self._unscrubbed |= removes_text
            self._scrub()

    def _remove(self, changes: Rows) -> None:
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

    def _put_meta(self, meta: Iterable[tuple[str, str | int]]) -> None:
        self._writer.executemany("INSERT OR REPLACE INTO meta VALUES(?, ?)", meta)

    def _put_conversation(self, key: int, text: str) -> bool:
        """Whether it is shorter than before: then something of it was taken back."""
        longer = self._writer.execute(
            "SELECT 1 FROM conversations WHERE session_key = ? AND length(text) > length(?)",
            (key, text),
        ).fetchone()
        self._writer.execute("INSERT OR REPLACE INTO conversations VALUES(?, ?)", (key, text))
        return longer is not None

    def _scrub(self) -> None:
        """Empty the log, where what was removed can still be read; as soon as nobody reads it.

        In the database itself `secure_delete` overwrites it.
        """
        if not self._unscrubbed:
            return
        self._writer.execute(f"PRAGMA busy_timeout={_SCRUB_WAIT_MS}")
        try:
            (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error:  # what was asked for is committed; this is tried again
            return
        finally:
            self._writer.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        self._unscrubbed = bool(busy)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the statements inside, or none."""
        with self._writer:
            self._writer.execute("BEGIN IMMEDIATE")
            yield

    def conversation(self, key: int) -> str | None:
        """A session's conversation; never waits for a commit. Raises StoreUnusable."""
        with typed_errors(self._path), self._read_lock:
            row = self._reader.execute(
                "SELECT text FROM conversations WHERE session_key = ?", (key,)
            ).fetchone()
        return None if row is None else str(row[0])

    def conversations(self) -> dict[int, str]:
        """All conversations by session key. Raises StoreUnusable."""
        with typed_errors(self._path), self._read_lock:
            return read_conversations(self._reader)

    def rows(self) -> Rows:
        """Sessions and records as committed. Raises StoreUnusable."""
        with typed_errors(self._path), self._read_lock:
            return read_rows(self._reader)

    def close(self) -> None:
        """Close; what is committed moves from the log into the database, and the log is removed."""
        with typed_errors(self._path), self._read_lock:
            self._reader.close()
            self._writer.close()


# --- connections ---

_BUSY_MS = 10_000


def _create_file(path: Path) -> None:
    """Make the database file 0600, and follow no link; before any connection is open.

    Closing a descriptor drops the POSIX locks that SQLite has on the file in this process.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _connect(path: Path) -> sqlite3.Connection:
    """Open for reading and writing, for any thread; statements commit by themselves."""
    connection = sqlite3.connect(
        path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA synchronous=NORMAL")
    # What was said in a session that is removed is overwritten, wherever SQLite was built.
    connection.execute("PRAGMA secure_delete=ON")
    return connection


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


def check_version(connection: sqlite3.Connection, path: Path) -> int:
    """The version of an index, one that can be read; 0 of an empty database.

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
    if connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
        return 0
    if application != APPLICATION_ID or version < 1:
        raise IndexDamaged(f"{path} is not an index of edgekv")
    return int(version)


# --- rows ---


def read_rows(connection: sqlite3.Connection) -> Rows:
    """Sessions and records as they stand, of any version that can be read.

    Raises:
        IndexDamaged: A session makes no sense.
    """
    links: dict[int, list[LinkRow]] = {}
    for key, record_id, use_end in connection.execute(
        "SELECT session_key, record_id, use_end FROM links ORDER BY session_key, position"
    ):
        links.setdefault(key, []).append((record_id, use_end))
    sessions = [
        _session_of(row, links.get(row[0], ()))
        for row in connection.execute(
            "SELECT session_key, app, name, created_s, used_s FROM sessions"
        )
    ]
    found = {
        row[0]: _record_of(row)
        for row in connection.execute(  # in "…" a column that is missing would be a text
            "SELECT record_id, start, [end], payload_bytes, token_ids, tokens_xxh3 FROM records"
        )
    }
    return Rows(
        sessions=sessions,
        records=[record for record in found.values() if record is not None],
        removed_records=[record_id for record_id, record in found.items() if record is None],
    )


# SQLite checks no types.


def _session_of(row: tuple[Any, ...], links: Sequence[LinkRow]) -> SessionRow:
    key, app, name, created_s, used_s = row
    named = type(app) is type(name) is str and 0 < key < NUMBER_MAX
    if not named or not all(type(number) is int for link in links for number in link):
        raise IndexDamaged("a session in the index makes no sense")
    return SessionRow(
        key=key,
        app=app,
        name=name,
        created_s=_time_s(created_s),
        used_s=_time_s(used_s),
        links=tuple(links),
    )


def _time_s(value: object) -> float:
    """A Unix time; the oldest one if it makes no sense, for nothing else hangs on it."""
    return value if isinstance(value, float) and 0.0 <= value < _TIME_MAX_S else 0.0


def _record_of(row: tuple[Any, ...]) -> Record | None:
    """A record; None if it makes no sense by itself."""
    *numbers, ids, tokens_xxh3 = row
    if not all(type(number) is int and 0 <= number < NUMBER_MAX for number in numbers):
        return None
    record_id, start, end, payload_bytes = numbers
    if not type(ids) is type(tokens_xxh3) is bytes or len(tokens_xxh3) != 16:
        return None
    if not len(ids) == 4 * (end - start) > 0:
        return None
    return Record(
        record_id=record_id,
        start=start,
        end=end,
        payload_bytes=payload_bytes,
        token_ids=array("I", ids),
        tokens_xxh3=tokens_xxh3,
        in_index=True,
    )


def _row_of(record: Record) -> tuple[object, ...]:
    numbers = (record.record_id, record.start, record.end, record.payload_bytes)
    return (*numbers, record.token_ids.tobytes(), record.tokens_xxh3)


def read_meta(connection: sqlite3.Connection) -> Meta:
    """What the index says of its store."""
    return dict(connection.execute("SELECT name, value FROM meta"))


def read_conversations(connection: sqlite3.Connection) -> dict[int, str]:
    """What was said in each session, by its key."""
    found = connection.execute("SELECT session_key, text FROM conversations")
    return {key: str(text) for key, text in found}


def total_of(value: object) -> int:
    """A total of `meta`; 0 if it makes no sense."""
    return value if isinstance(value, int) and 0 <= value < NUMBER_MAX else 0


def _pack_layers(layers: Sequence[LayerState]) -> str:
    return json.dumps([list(astuple(layer)) for layer in layers], separators=(",", ":"))


def unpack_layers(packed: object) -> tuple[LayerState, ...]:
    """A model's layers, as the index keeps them. Raises IndexDamaged."""
    try:
        rows = json.loads(packed) if isinstance(packed, str) else None
        names = tuple(LayerState.__dataclass_fields__)
        layers = tuple(LayerState(**dict(zip(names, row, strict=True))) for row in rows or ())
    except (ValueError, TypeError, AssertionError, RecursionError) as error:
        raise IndexDamaged("the layers in the index make no sense") from error
    if not layers:
        raise IndexDamaged("the index does not say its layers")
    return layers
