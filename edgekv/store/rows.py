"""What stands in an index, and how it is read by whoever opens one; SQLite checks no types."""

import contextlib
import json
import sqlite3
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from edgekv.errors import StoreFull, StoreUnusable
from edgekv.store.record import Record
from edgekv.store.values import LayerState

SCHEMA_VERSION = 2
APPLICATION_ID = 0x656B7649  # "ekvI"
NUMBER_MAX = 1 << 62  # SQLite has room for twice that
_TIME_MAX_S = 1e11  # the year 5138; what is later would not be a date
# What SQLite says of a damaged schema quotes it, and Python may fail to decode that.
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
# A table or column that is missing is SQLITE_ERROR.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)

Meta = dict[str, str | int]
LinkRow = tuple[int, int]  # record_id, use_end
_NO_LINK = (0, 0)  # in place of one that is not where it should be: those before it count


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
    """What the index holds, or what one commit writes: how it is, not how it came about."""

    sessions: Sequence[SessionRow] = ()
    records: Sequence[Record] = ()
    removed_sessions: Collection[int] = ()
    removed_records: Collection[int] = ()  # ids; of what was read, those of rows that make no sense

    def __bool__(self) -> bool:
        return any((self.sessions, self.records, self.removed_sessions, self.removed_records))


@contextlib.contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise into errors that say whose fault it is."""
    try:
        yield
    except SQLITE_ERRORS as error:
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
    """The version of an index; 0 of an empty database.

    Raises IndexDamaged, or StoreUnusable where it is of a newer version.
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


def read_rows(connection: sqlite3.Connection) -> Rows:
    """Sessions and records of any version that can be read. Raises IndexDamaged."""
    links: dict[int, list[LinkRow]] = {}
    for key, position, *link in connection.execute(
        "SELECT session_key, position, record_id, use_end FROM links ORDER BY session_key, position"
    ):
        found = links.setdefault(key, [])
        found.append((link[0], link[1]) if position == len(found) else _NO_LINK)
    sessions = [
        session_of(row, links.get(row[0], ()))
        for row in connection.execute(
            "SELECT session_key, app, name, created_s, used_s FROM sessions"
        )
    ]
    records = {
        row[0]: _record_of(row)
        for row in connection.execute(  # in "…" a column that is missing would be a text
            "SELECT record_id, start, [end], payload_bytes, token_ids, tokens_xxh3 FROM records"
        )
    }
    return Rows(
        sessions=sessions,
        records=[record for record in records.values() if record is not None],
        removed_records=[record_id for record_id, record in records.items() if record is None],
    )


def session_of(row: tuple[Any, ...], links: Sequence[LinkRow]) -> SessionRow:
    """A session of its row and links. Raises IndexDamaged if it makes no sense."""
    key, app, name, created_s, used_s = row
    named = type(app) is type(name) is str and type(key) is int and 0 < key < NUMBER_MAX
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


def pack_layers(layers: Sequence[LayerState]) -> str:
    """A model's layers, as the index keeps them."""
    return json.dumps([list(astuple(layer)) for layer in layers], separators=(",", ":"))


def unpack_layers(packed: object) -> tuple[LayerState, ...]:
    """What `pack_layers` packed. Raises IndexDamaged."""
    try:
        rows = json.loads(packed) if isinstance(packed, str) else None
        names = tuple(LayerState.__dataclass_fields__)
        layers = tuple(LayerState(**dict(zip(names, row, strict=True))) for row in rows or ())
    except (ValueError, TypeError, AssertionError, RecursionError) as error:
        raise IndexDamaged("the layers in the index make no sense") from error
    if not layers:
        raise IndexDamaged("the index does not say its layers")
    return layers
