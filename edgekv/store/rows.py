"""Rows of the index as values: what is read, checked, and what a commit writes."""

import sqlite3
import sys
from array import array
from dataclasses import dataclass

from edgekv.store.sqlite import IndexDamaged

Link = tuple[int, int]  # record_id, use_end


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

    @property
    def consistent(self) -> bool:
        """Whether a row that was read makes sense by itself; SQLite checks no types."""
        return (
            type(self.app) is type(self.name) is str
            and type(self.created_s) is type(self.used_s) is float
            and all(type(number) is int for link in self.links for number in link)
        )


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What one commit writes: the state of what changed, not how it came about."""

    removed_sessions: tuple[int, ...] = ()
    removed_records: tuple[int, ...] = ()
    sessions: tuple[SessionRow, ...] = ()
    records: tuple[RecordRow, ...] = ()

    def __bool__(self) -> bool:
        return any((self.removed_sessions, self.removed_records, self.sessions, self.records))


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
    if not all(row.consistent for row in sessions):
        raise IndexDamaged("a session in the index makes no sense")
    names = tuple(RecordRow.__dataclass_fields__)
    columns = ", ".join(f"[{name}]" for name in names)  # in "…" a missing one would be a text
    records = [
        RecordRow(**dict(zip(names, row, strict=True)))
        for row in connection.execute(f"SELECT {columns} FROM records")
    ]
    return sessions, records


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
