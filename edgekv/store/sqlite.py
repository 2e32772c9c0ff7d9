"""SQLite as the index uses it: private files, explicit transactions, typed errors."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from edgekv.errors import StoreFull, StoreUnusable

# A table or column that is missing is SQLITE_ERROR.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


class IndexDamaged(StoreUnusable):
    """The file is no index, or not a whole one; whoever opens it starts afresh."""


def create_file(path: Path) -> None:
    """Make the database file 0600, and follow no link; before any connection is open.

    Closing a descriptor drops the POSIX locks that SQLite has on the file in this process.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def connect(path: Path) -> sqlite3.Connection:
    """Open for reading and writing, for any thread; statements commit by themselves."""
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous=NORMAL")
    # What was said in a session that is removed is overwritten, wherever SQLite was built.
    connection.execute("PRAGMA secure_delete=ON")
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the statements inside, or none."""
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
