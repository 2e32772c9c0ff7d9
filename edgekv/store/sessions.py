"""Sessions and records in memory, and as rows of the index."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from edgekv.store.extents import Extent
from edgekv.store.rows import RecordRow, SessionRow, pack_tokens, unpack_tokens
from edgekv.store.values import RecordRef, StoredSession


@dataclass(eq=False, kw_only=True, slots=True)
class Record:
    """KV of tokens [start, end), once on disk.

    Attributes:
        num_links: Sessions that have it.
        num_readers: Reads under way; its extent is not given back before they end.
        in_index: The index has its row.
    """

    record_id: int
    start: int
    end: int
    extent: Extent
    payload_bytes: int
    token_ids: "array[int]"
    tokens_xxh3: bytes
    num_links: int = 0
    num_readers: int = 0
    in_index: bool = False


class Link(NamedTuple):
    """A session's use of a record's tokens [record.start, use_end)."""

    record: Record
    use_end: int


@dataclass(eq=False, kw_only=True, slots=True)
class Session:
    """One session's stored prefix.

    Attributes:
        token_ids: Tokens whose KV is stored, typecode "I".
        num_pins: Reads, writes or callers that forbid evicting it.
        num_cuts: How often something of it was forgotten: a write that began before finds out.
        num_clean: Leading links that the index has.
    """

    key: int
    app: str
    name: str
    persistent: bool
    created_s: float
    used_s: float
    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    links: list[Link] = field(default_factory=list)
    num_pins: int = 0
    num_cuts: int = 0
    num_clean: int = 0

    @property
    def end(self) -> int:
        """Tokens whose KV is stored."""
        return len(self.token_ids)

    def stored(self, conversation: str | None = None) -> StoredSession:
        """The session as it is now, for callers."""
        return StoredSession(
            key=self.key,
            app=self.app,
            name=self.name,
            persistent=self.persistent,
            token_ids=self.token_ids[:],
            records=tuple(record_ref(record, use_end) for record, use_end in self.links),
            conversation=conversation,
            created_s=self.created_s,
            used_s=self.used_s,
            payload_bytes=sum(record.payload_bytes for record, _ in self.links),
        )


def record_ref(record: Record, use_end: int) -> RecordRef:
    """A record as a session that uses its tokens before `use_end` sees it."""
    return RecordRef(
        record_id=record.record_id,
        start=record.start,
        end=record.end,
        use_end=use_end,
        offset=record.extent.offset,
        payload_bytes=record.payload_bytes,
    )


def common_prefix(first: "array[int]", second: "array[int]") -> int:
    """Leading elements that two arrays share, by halving: slices compare at memory speed."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def row_of_session(session: Session) -> SessionRow:
    """What the index lacks of a session."""
    new = session.links[session.num_clean :]
    return SessionRow(
        key=session.key,
        app=session.app,
        name=session.name,
        created_s=session.created_s,
        used_s=session.used_s,
        first_position=session.num_clean,
        links=tuple((record.record_id, use_end) for record, use_end in new),
    )


def row_of_record(record: Record) -> RecordRow:
    """A record for the index."""
    return RecordRow(
        record_id=record.record_id,
        start=record.start,
        end=record.end,
        offset=record.extent.offset,
        extent_bytes=record.extent.num_bytes,
        payload_bytes=record.payload_bytes,
        token_ids=pack_tokens(record.token_ids),
        tokens_xxh3=record.tokens_xxh3,
    )


def record_of(row: RecordRow) -> Record:
    """A record that the index knew."""
    return Record(
        record_id=row.record_id,
        start=row.start,
        end=row.end,
        extent=Extent(row.offset, row.extent_bytes),
        payload_bytes=row.payload_bytes,
        token_ids=unpack_tokens(row.token_ids),
        tokens_xxh3=row.tokens_xxh3,
        in_index=True,
    )
