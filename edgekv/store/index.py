"""The index: which session has which records, and what was said; SQLite in WAL mode.

`links` are a session's records in order. A record that several sessions share has several; one
without any is garbage, which is collected when the index is opened. `token_ids` are the ids of
[start, end) as little-endian u32, a conversation's text is opaque here, `meta` holds model,
fingerprint, layers and wear.

Only committed rows count. `synchronous=NORMAL` does not flush each commit to the drive: after a
power cut the last ones may be missing, and then files without rows are removed.

Version 1 kept records in segment files. Its sessions and conversations are taken over, its records
are not; whoever opens the store removes the files.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgekv.errors import StoreUnusable
from edgekv.store.folder import DAMAGED_NAME, connect_readonly
from edgekv.store.record import Record, RecordFormat, is_fingerprint
from edgekv.store.rows import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    SQLITE_ERRORS,
    IndexDamaged,
    Rows,
    SessionRow,
    check_version,
    pack_layers,
    read_conversations,
    read_meta,
    read_rows,
    session_of,
    typed_errors,
    unpack_layers,
)
from edgekv.store.values import StoredSession

_BUSY_MS = 10_000
_PUT_BACK = "put the folder back, or open the runtime again"
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
_SCHEMA = f"""{_RECORD_TABLES}
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE sessions(
    session_key INTEGER PRIMARY KEY, app TEXT NOT NULL, name TEXT NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL, UNIQUE(app, name));
CREATE TABLE conversations(session_key INTEGER PRIMARY KEY, text TEXT NOT NULL);
PRAGMA application_id={APPLICATION_ID};
"""


class Index:
    """The database of one store. One thread at a time writes; any may read beside it."""

    def __init__(self, path: Path, form: RecordFormat, *, model: str, log_bytes: int) -> None:
        """Create, or open if fingerprint and layers (if any are given) are those of before.

        The log moves into the database when it has `log_bytes`.

        Raises:
            IndexDamaged: The file is not a whole index.
            StoreUnusable: Newer version, of another model, or the system refuses.
            StoreFull: The volume is full.
        """
        self._path = path
        self._unscrubbed = False  # text that was removed can still be read somewhere
        self._read_lock = threading.Lock()  # of the reading connection, for one statement
        self.num_records_of_old = 0  # of an older version; they are gone
        with typed_errors(path):
            self._identity = _create_file(path)
            self._writer = _connect(path)
            try:
                self._prepare(form.fingerprint)
                self._describe(model, pack_layers(form.layers) if form.layers else None)
                self._limit_log(log_bytes)
                self._scrub_log()  # a process that was killed may have left removed text there
                self.meta = read_meta(self._writer)
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
                self._run(_SCHEMA)
                self._put_meta([("fingerprint", fingerprint)])
        found = read_meta(self._writer).get("fingerprint")
        if not isinstance(found, str) or not is_fingerprint(found):
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
        found = read_meta(self._writer)
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

    def load(self) -> Rows:
        """All sessions and the records that they have; what nobody has is deleted.

        Raises:
            IndexDamaged: A page or a row makes no sense.
        """
        with typed_errors(self._path), self._transaction():
            # 2 ms for 10 MB; what it finds would fail some commit later.
            (found,) = self._writer.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise IndexDamaged(f"{self._path}: {found}")
            for table in ("links", "conversations"):
                self._writer.execute(
                    f"DELETE FROM {table} WHERE session_key NOT IN"
                    " (SELECT session_key FROM sessions)"
                )
            self._writer.execute(
                "DELETE FROM links WHERE typeof(position) != 'integer' OR position < 0"
            )
            self._writer.execute(
                "DELETE FROM records WHERE record_id NOT IN (SELECT record_id FROM links)"
            )
            for _ in self._writer.execute("SELECT text FROM conversations"):
                pass  # they can be read, or who opens one of their sessions would find out
            return read_rows(self._writer)

    def apply(
        self,
        changes: Rows,
        *,
        meta: Iterable[tuple[str, int]] = (),
        conversation: tuple[int, str] | None = None,
        taken_back: bool = False,
    ) -> None:
        """Commit changes, what to replace in `meta`, and (session key, text); all or none.

        Text of sessions that are removed, or of which some was `taken_back`, is in no file after.

        Raises:
            StoreFull: The volume is full.
            StoreUnusable: SQLite cannot write, or what it would write to is not here any more.
        """
        with typed_errors(self._path):
            self.check_place()
            with self._transaction():
                self._remove(changes)
                self._writer.executemany(
                    "INSERT OR REPLACE INTO records VALUES(?, ?, ?, ?, ?, ?)",
                    [_row_of(record) for record in changes.records],
                )
                for session in changes.sessions:
                    self._put_session(session)
                self._put_meta(meta)
                if conversation is not None:
                    self._writer.execute(
                        "INSERT OR REPLACE INTO conversations VALUES(?, ?)", conversation
                    )
            self._unscrubbed |= taken_back or bool(changes.removed_sessions)
            self._scrub()

    def check_place(self) -> None:
        """See that what was opened is still here.

        A file that was removed, or whose volume is gone, takes commits, and loses them.

        Raises:
            StoreUnusable: It is not.
        """
        try:
            status = self._path.stat()
        except OSError as error:
            raise StoreUnusable(f"{self._path}: {error.strerror}", hint=_PUT_BACK) from error
        if (status.st_dev, status.st_ino) != self._identity:
            raise StoreUnusable(f"{self._path} is another file than was opened", hint=_PUT_BACK)

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

    def _scrub(self) -> None:
        """Have nothing left of text that was removed: in the log, in a damaged index put aside.

        What was asked for is committed: where this fails it is tried again, with the next commit.
        """
        if self._unscrubbed:
            with contextlib.suppress(OSError):
                self._path.with_name(DAMAGED_NAME).unlink(missing_ok=True)
                self._unscrubbed = not self._scrub_log()

    def _scrub_log(self) -> bool:
        """Empty the log, as soon as nobody reads it; whether it is empty."""
        self._writer.execute(f"PRAGMA busy_timeout={_SCRUB_WAIT_MS}")
        try:
            (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except SQLITE_ERRORS:
            return False
        finally:
            self._writer.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        return not busy

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All statements inside, or none."""
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


def _row_of(record: Record) -> tuple[object, ...]:
    numbers = (record.record_id, record.start, record.end, record.payload_bytes)
    return (*numbers, record.token_ids.tobytes(), record.tokens_xxh3)


def _create_file(path: Path) -> tuple[int, int]:
    """Make the database file 0600, and follow no link; before any connection is open.

    Closing a descriptor drops the POSIX locks that SQLite has on the file in this process.

    Returns:
        Device and inode.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    """Open for reading and writing, for any thread; statements commit by themselves."""
    connection = sqlite3.connect(
        path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA synchronous=NORMAL")
    # What was said in a session that is removed is overwritten, wherever SQLite was built.
    connection.execute("PRAGMA secure_delete=ON")
    return connection


# --- what a damaged one still gives ---


def salvage(path: Path) -> list[StoredSession]:
    """Sessions with something said in them that can be read one by one; KV is a miss."""
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
