"""Sessions and records as memory knows them, and what of it the index does not know yet.

Memory is the truth while the store is open. The index and the files follow: `take_changes` says
what must be written to make the index equal, `put_back` that writing failed, and `unlinked` which
files nobody has any more. So whoever only cuts, links or touches never waits for a disk.

    CatalogSession ─ links ─▶ Record ─▶ file  a record lives as long as a session links to it
       [0, 96)  [96, 200)  [200, 256)            links join without gaps; the last may use less
"""

import itertools
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

from edgekv.store.record import Record
from edgekv.store.rows import Rows, SessionRow
from edgekv.store.values import RecordRef, StoredSession, resume_point

ORDINARY_MAX = 1 << 40  # a session's key, a record's id


@dataclass(eq=False, kw_only=True, slots=True)
class CatalogSession:
    """One session's stored prefix."""

    key: int
    app: str
    name: str
    persistent: bool
    created_s: float
    used_s: float
    # Tokens whose KV is stored, typecode "I".
    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    links: list[RecordRef] = field(default_factory=list)  # its records, in order
    num_writes: int = 0  # under way: who makes room for a session does not evict it
    # How often something of it was forgotten: a write that began before finds out.
    num_cuts: int = 0
    num_clean: int = 0  # leading links that the index has
    has_state: bool = False  # see `StoredSession`

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
            records=tuple(self.links),
            conversation=conversation,
            created_s=self.created_s,
            used_s=self.used_s,
            payload_bytes=sum(link.payload_bytes for link in self.links),
            has_state=self.has_state,
        )

    def row(self) -> SessionRow:
        """What the index lacks of it."""
        return SessionRow(
            key=self.key,
            app=self.app,
            name=self.name,
            created_s=self.created_s,
            used_s=self.used_s,
            first_position=self.num_clean,
            links=tuple((r.record_id, r.use_end) for r in self.links[self.num_clean :]),
        )


class Catalog:
    """All sessions and records of a store. Owned by whoever holds the store's state lock."""

    def __init__(self, *, has_state: bool = False) -> None:
        """Begin empty; `has_state`: see `StoredSession`."""
        self._has_state = has_state
        self.sessions: dict[int, CatalogSession] = {}
        self.records: dict[int, Record] = {}
        self.unlinked: list[Record] = []  # their files are to be removed
        self.num_tokens = 0  # of all records
        self._by_app: dict[str, dict[str, CatalogSession]] = {}
        self._session_keys = _unused(())
        self.record_ids = _unused(())  # that no record had
        self._last_s = 0.0
        self._dirty: set[int] = set()
        self._removed_sessions: set[int] = set()
        self._removed_records: set[int] = set()

    # --- sessions ---

    def find(self, app: str, name: str) -> CatalogSession | None:
        """The session of that name."""
        return self._by_app.get(app, {}).get(name)

    def stored(self, conversations: Mapping[int, str]) -> list[StoredSession]:
        """All sessions as they are now, the one used last first."""
        found = [one.stored(conversations.get(one.key)) for one in self.sessions.values()]
        return sorted(found, key=lambda session: session.used_s, reverse=True)

    def add(self, app: str, name: str, *, persistent: bool, now_s: float) -> CatalogSession:
        """A new session without KV."""
        assert self.find(app, name) is None
        now_s = self._later_s(now_s)
        session = CatalogSession(
            key=next(self._session_keys),
            app=app,
            name=name,
            persistent=persistent,
            created_s=now_s,
            used_s=now_s,
            has_state=self._has_state,
        )
        self._enter(session)
        self._dirty.add(session.key)
        return session

    def _enter(self, session: CatalogSession) -> None:
        self.sessions[session.key] = session
        self._by_app.setdefault(session.app, {})[session.name] = session

    def persist(self, session: CatalogSession) -> None:
        """From now on the session outlives the process."""
        session.persistent = True
        self._dirty.add(session.key)

    def touch(self, session: CatalogSession, now_s: float) -> None:
        """The session was used."""
        session.used_s = self._later_s(now_s)
        self._dirty.add(session.key)

    def date(self, session: CatalogSession, created_s: float, used_s: float) -> None:
        """The session was made and used in another store."""
        session.created_s, session.used_s = created_s, used_s
        self._dirty.add(session.key)

    def _later_s(self, now_s: float) -> float:
        """Unix time, but later than at the last call: the order of uses must be plain."""
        self._last_s = max(now_s, self._last_s + 1e-6)
        return self._last_s

    def remove(self, session: CatalogSession) -> None:
        """Forget a session and its KV."""
        self.cut(session, 0)
        del self.sessions[session.key]
        named = self._by_app[session.app]
        del named[session.name]
        if not named:
            del self._by_app[session.app]
        self._dirty.discard(session.key)
        if session.persistent:
            self._removed_sessions.add(session.key)

    def match(self, app: str, token_ids: "array[int]", but_not: int | None) -> tuple[int, int]:
        """The session of an app whose stored tokens begin most like these, and how many do.

        Up to where it can be gone on from, see `StoredSession`.
        5000 sessions that share a system prompt take 1 ms: most are refused by one comparison.
        """
        best_key, best = 0, 0
        for session in self._by_app.get(app, {}).values():
            stored = session.token_ids
            if best == len(token_ids):
                break
            if session.key == but_not or len(stored) <= best or stored[best] != token_ids[best]:
                continue
            common = common_prefix(stored, token_ids)
            if session.has_state:
                common = resume_point(session.links, common)
            if common > best:
                best_key, best = session.key, common
        return best_key, best

    # --- records ---

    def link(self, session: CatalogSession, record: Record, use_end: int) -> None:
        """Extend a session by a record, of which it uses the tokens up to `use_end`."""
        assert record.start == session.end < use_end <= record.end
        if record.record_id not in self.records:
            self.records[record.record_id] = record
            self.num_tokens += record.end - record.start
        record.num_links += 1
        session.links.append(record.ref(use_end))
        session.token_ids.extend(record.token_ids[: use_end - record.start])
        self._dirty.add(session.key)

    def cut(self, session: CatalogSession, num_tokens: int) -> None:
        """Forget a session's tokens from `num_tokens` on; a record astride is used in part."""
        assert num_tokens >= 0
        if num_tokens >= session.end:
            return
        session.num_cuts += 1
        while session.links and session.links[-1].use_end > num_tokens:
            link = session.links.pop()
            if link.start < num_tokens:
                session.num_clean = min(session.num_clean, len(session.links))
                session.links.append(link.clipped(num_tokens))
                break
            self._unlink(self.records[link.record_id])
        session.num_clean = min(session.num_clean, len(session.links))
        del session.token_ids[num_tokens:]
        self._dirty.add(session.key)

    def _unlink(self, record: Record) -> None:
        record.num_links -= 1
        assert record.num_links >= 0
        if record.num_links == 0:
            del self.records[record.record_id]
            self.num_tokens -= record.end - record.start
            if record.in_index:
                self._removed_records.add(record.record_id)
            self.unlinked.append(record)

    def cut_sharers(self, record: Record) -> None:
        """Forget a record, and what is behind it, in all sessions that have it."""
        for session in [*self.sessions.values()]:
            if any(link.record_id == record.record_id for link in session.links):
                self.cut(session, record.start)
        assert record.num_links == 0

    def adopt(self, session: CatalogSession, donor: CatalogSession, num_tokens: int) -> None:
        """Make a session's KV the donor's first `num_tokens`, by links."""
        assert session is not donor
        assert session.app == donor.app
        links = [link.clipped(num_tokens) for link in donor.links if link.start < num_tokens]
        records = [self.records[link.record_id] for link in links]
        for record in records:  # those that both have must not go in between
            record.num_links += 1
        self.cut(session, 0)
        for record, link in zip(records, links, strict=True):
            self.link(session, record, link.use_end)
            record.num_links -= 1

    # --- eviction ---

    def oldest(self) -> CatalogSession | None:
        """The session used least recently of those that have KV and are not being written."""
        idle = (s for s in self.sessions.values() if s.links and not s.num_writes)
        return min(idle, key=lambda session: session.used_s, default=None)

    def evict_one(self) -> bool:
        """Forget the last record of the oldest session; False if there is none.

        A prefix is worth more than a suffix: it can be restored without what follows, not the
        other way round. What goes is KV alone; a named session keeps its conversation.
        """
        session = self.oldest()
        if session is not None:
            self.cut(session, session.links[-1].start)
        return session is not None

    # --- to the index and back ---

    @property
    def is_committed(self) -> bool:
        """Whether the index lacks nothing, or whoever is committing writes it."""
        return not (self._dirty or self._removed_sessions or self._removed_records)

    def take_changes(self) -> Rows:
        """What the index lacks; from now on it counts as written."""
        dirty = [self.sessions[key] for key in sorted(self._dirty)]
        rows = [session.row() for session in dirty if session.persistent]
        linked = {record_id: self.records[record_id] for row in rows for record_id, _ in row.links}
        changes = Rows(
            sessions=rows,
            records=[record for record in linked.values() if not record.in_index],
            removed_sessions=self._removed_sessions,
            removed_records=self._removed_records,
        )
        for record in changes.records:
            record.in_index = True
        for session in dirty:
            session.num_clean = len(session.links) if session.persistent else 0
        self._dirty, self._removed_sessions, self._removed_records = set(), set(), set()
        return changes

    def put_back(self, changes: Rows) -> None:
        """Taken changes were not written."""
        self._removed_sessions.update(changes.removed_sessions)
        self._removed_records.update(changes.removed_records)
        for row in changes.sessions:
            session = self.sessions.get(row.key)
            if session is not None:
                session.num_clean = min(session.num_clean, row.first_position)
                self._dirty.add(row.key)
        for record in changes.records:
            record.in_index = False

    def restore(self, rows: Rows, accept: Callable[[Record], bool], *, now_s: float) -> int:
        """Fill an empty catalog from the index; how many records had to be left out.

        That is, those that `accept` refuses, and those whose tokens are not what they were: their
        hash, which the file has too, is another. Nothing was used after `now_s`, whatever the clock
        said then.
        """
        assert not self.sessions
        known = {record.record_id: record for record in rows.records}
        good = {key: record for key, record in known.items() if accept(record)}
        self._removed_records.update(rows.removed_records, known.keys() - good.keys())
        for session_row in rows.sessions:
            self._restore_session(session_row, good, now_s)
        for record in good.values():
            if record.num_links == 0:
                self._removed_records.add(record.record_id)
                self.unlinked.append(record)
        self._session_keys = _unused(self.sessions)
        self.record_ids = _unused(known)
        return len(self._removed_records)

    def _restore_session(self, row: SessionRow, records: dict[int, Record], now_s: float) -> None:
        session = CatalogSession(
            key=row.key,
            app=row.app,
            name=row.name,
            persistent=True,
            created_s=row.created_s,
            used_s=min(row.used_s, now_s),
            has_state=self._has_state,
        )
        self._enter(session)
        digest = xxhash.xxh3_128()  # of the session's tokens so far
        for record_id, use_end in row.links:
            record = records.get(record_id)
            if record is None or not record.start == session.end < use_end <= record.end:
                break
            whole = digest.copy()
            whole.update(record.token_ids)
            if whole.digest() != record.tokens_xxh3:
                break
            digest.update(record.token_ids[: use_end - record.start])
            self.link(session, record, use_end)
        session.num_clean = len(session.links)
        self._dirty.discard(session.key)
        if len(session.links) < len(row.links):
            self._dirty.add(session.key)

    def check_integrity(self) -> None:
        """Assert that links, counts and tokens agree."""
        counts: dict[int, int] = {}
        for session in self.sessions.values():
            assert self.find(session.app, session.name) is session
            end = 0
            for link in session.links:
                record, use_end = self.records[link.record_id], link.use_end
                assert link == record.ref(use_end)
                assert record.start == end < use_end <= record.end
                assert record.token_ids[: use_end - end] == session.token_ids[end:use_end]
                counts[record.record_id] = counts.get(record.record_id, 0) + 1
                end = use_end
            assert end == session.end
            assert 0 <= session.num_clean <= len(session.links)
            assert session.num_writes >= 0
        assert counts == {r.record_id: r.num_links for r in self.records.values()}
        assert self.num_tokens == sum(r.end - r.start for r in self.records.values())
        assert len(self.sessions) == sum(len(named) for named in self._by_app.values())


def _unused(numbers: Collection[int]) -> Iterator[int]:
    """Numbers for what is new. One that is larger than any use makes it is damage: none follows."""
    taken = frozenset(numbers)
    last = max((number for number in taken if number < ORDINARY_MAX), default=0)
    return (number for number in itertools.count(last + 1) if number not in taken)


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
