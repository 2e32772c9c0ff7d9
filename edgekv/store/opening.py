"""Opening what may be whole, damaged, half missing or too new: an index and its segment files.

index      segments    what happens
whole      whole       records whose bytes lie within the files are restored
missing    there       the files are empty again; counted as a lost index
damaged    any         put aside, one copy is kept; counted as a lost index
whole      missing     sessions stay, with their conversations; records are counted as lost
newer      any         StoreUnusable: nothing is touched
"""

from dataclasses import dataclass
from pathlib import Path

from edgekv.store.budget import Limits
from edgekv.store.folder import put_index_aside
from edgekv.store.index import INDEX_NAME, Index
from edgekv.store.rows import RecordRow, SessionRow
from edgekv.store.sqlite import IndexDamaged

_LOG_BYTES_MAX = 4 << 20


@dataclass(frozen=True, kw_only=True)
class OpenedIndex:
    """An index, what it knew, and whether that is nothing because it was lost."""

    index: Index
    sessions: list[SessionRow]
    records: list[RecordRow]
    lost: bool


def open_index(
    folder: Path,
    identity: dict[str, str | int],
    *,
    model: str,
    segment_bytes: int,
    limits: Limits,
) -> OpenedIndex:
    """Open, or make, the index of a store whose lock the caller has.

    Raises:
        StoreUnusable: Of another model, of a newer version, or the system refuses.
        StoreFull: The volume is full.
    """
    path = folder / INDEX_NAME
    missing = not path.exists() and any(folder.glob("segment-*.kv"))

    def load(*, lost: bool) -> OpenedIndex:
        log_bytes = min(_LOG_BYTES_MAX, limits.index_reserve_bytes // 4)
        index = Index(path, identity, model=model, segment_bytes=segment_bytes, log_bytes=log_bytes)
        return _load(index, lost=lost)

    try:
        return load(lost=missing)
    except IndexDamaged:
        put_index_aside(folder)
    return load(lost=True)


def _load(index: Index, *, lost: bool) -> OpenedIndex:
    try:
        sessions, records = index.load()
    except BaseException:
        index.close()
        raise
    return OpenedIndex(index=index, sessions=sessions, records=records, lost=lost)
